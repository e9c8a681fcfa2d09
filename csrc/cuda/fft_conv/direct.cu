// Convolutions with few taps, as sums, and their gradients; and the gradient of the skip connection.
#include "launches.cuh"

namespace pykernels::cuda::fft {
namespace {

constexpr int kThreads = kDirectThreads, kRun = 8;  // outputs, or taps, of a thread
static_assert(kThreads * kRun == kDirectTile);

// Eight neighbours, and the eight after them, are read by lanes eight apart: a free place after each eight spreads them
// over the banks.
__device__ __forceinline__ int padded(int i) { return i + i / kRun; }
constexpr int kTilePlaces = kDirectTile / kRun * (kRun + 1);
constexpr int kWindowPlaces = (kDirectTile + kDirectTaps) / kRun * (kRun + 1);

__device__ __forceinline__ int rounded_up(int i) { return (i + kRun - 1) / kRun * kRun; }

// `count` samples of a window into shared memory.
__device__ __forceinline__ void load_tile(float* tile, int count, DType dtype, const Signal& x, int length,
                                          const Windows& windows, int window, int64_t batch, int64_t channel) {
  const int origin = window * windows.step - windows.before;
  for_dtype(dtype, [&]<class T>(T) {
    const T* const values = row_of<const T>(x.values, x.stride, batch, channel);
    const T* const gate = row_of<const T>(x.gate, x.gate_stride, batch, channel);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const int at = sample_at(origin + i, length, windows.low, windows.high);
      float value = 0.0f;
      if (at >= 0) value = gate != nullptr ? widen(values[at]) * widen(gate[at]) : widen(values[at]);
      tile[padded(i)] = value;
    }
  });
}

__device__ __forceinline__ void load_run(float (&x)[kRun], const float* tile, int first) {
  const float* const run = tile + padded(first);
#pragma unroll
  for (int i = 0; i < kRun; ++i) x[i] = run[i];
}

// A block owns kDirectTile outputs, a thread eight of them: output j is the sum over i of v_i x_{j + i}, x from the
// window's first sample on.
__global__ void __launch_bounds__(kThreads) fft_conv_direct_kernel(const __grid_constant__ DirectParams p) {
  SharedMemory memory;
  float* const x = memory.take<float>(kWindowPlaces);
  float* const v = memory.take<float>(kDirectTaps, 16);
  float* const c = memory.take<float>(kTilePlaces);
  const int window = static_cast<int>(blockIdx.x % p.windows.count), thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / p.windows.count, batch = row % p.rows.batch, channel = row / p.rows.batch;
  const int count = p.kernels.count(), taps = rounded_up(count);
  load_tile(x, kDirectTile + taps, p.rows.dtype, p.rows.x, p.rows.length, p.windows, window, batch, channel);
  for (int i = thread; i < taps; i += kThreads)
    v[i] = i < count ? p.kernels.tap(channel / p.rows.per_group, p.reversed ? i : count - 1 - i) : 0.0f;
  __syncthreads();

  float sum[kRun] = {}, near[kRun], far[kRun], tap[kRun];
  load_run(near, x, thread * kRun);
#pragma unroll 2
  for (int first = 0; first < taps; first += kRun) {
    load_run(far, x, thread * kRun + first + kRun);
    Neighbours<kRun, float>::load(tap, v + first);
#pragma unroll
    for (int i = 0; i < kRun; ++i)
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] += tap[i] * (i + j < kRun ? near[(i + j) % kRun] : far[(i + j) % kRun]);
#pragma unroll
    for (int i = 0; i < kRun; ++i) near[i] = far[i];
  }

  // Through shared memory, so that neighbouring lanes write neighbours.
#pragma unroll
  for (int j = 0; j < kRun; ++j) c[padded(thread * kRun) + j] = sum[j];
  __syncthreads();
  const int low = window * p.windows.step;
  double products = 0.0;
  for_dtype(p.rows.dtype, [&]<class T>(T) {
    const Writer<T> write(p.rows, batch, channel);
#pragma unroll 4
    for (int i = thread; i < min(kDirectTile, p.rows.length - low); i += kThreads)
      products += write(low + i, c[padded(i)]);
  });
  put_products<32>(p.rows, int64_t{blockIdx.x} * (kThreads / 32) + thread / 32, products);
}

// A block owns a part of a group's windows. Tap m, counted from the last lag down, is the sum over n of dc_n x_{n + m};
// a thread adds up eight taps over every sixteenth run of eight n.
__global__ void __launch_bounds__(kThreads) fft_conv_direct_taps_kernel(const __grid_constant__ DirectTapsParams p) {
  constexpr int kOctets = kDirectTaps / kRun, kSegments = kThreads / kOctets;
  SharedMemory memory;
  float* const x = memory.take<float>(kWindowPlaces);
  float* const dc = memory.take<float>(kTilePlaces);
  float* const sums = memory.take<float>(kDirectTaps * (kSegments + 1));
  const int thread = static_cast<int>(threadIdx.x), octet = thread % kOctets, segment = thread / kOctets;
  const int count = p.kernels.count(), taps = rounded_up(count);
  const int64_t group = blockIdx.x / p.parts, part = blockIdx.x % p.parts, end = min((part + 1) * p.share, p.total);
  Windows own = p.windows;
  own.before = 0, own.low = 0, own.high = p.rows.length;
  float sum[kRun] = {};
  for (int64_t i = part * p.share; i < end; ++i) {
    const int window = static_cast<int>(i % p.windows.count);
    const int64_t row = group * p.rows.per_group * p.rows.batch + i / p.windows.count;
    const int64_t batch = row % p.rows.batch, channel = row / p.rows.batch;
    load_tile(x, kDirectTile + taps, p.rows.dtype, p.rows.x, p.rows.length, p.windows, window, batch, channel);
    load_tile(dc, kDirectTile, p.rows.dtype, p.dc, p.rows.length, own, window, batch, channel);
    __syncthreads();
    if (octet * kRun < count) {
#pragma unroll 1
      for (int first = segment * kRun; first < kDirectTile; first += kSegments * kRun) {
        float near[kRun], far[kRun], value[kRun];
        load_run(near, x, first + octet * kRun);
        load_run(far, x, first + octet * kRun + kRun);
        load_run(value, dc, first);
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int m = 0; m < kRun; ++m)
            sum[m] += value[j] * (m + j < kRun ? near[(m + j) % kRun] : far[(m + j) % kRun]);
      }
    }
    __syncthreads();  // before the next tiles come
  }
#pragma unroll
  for (int m = 0; m < kRun; ++m) sums[(octet * kRun + m) * (kSegments + 1) + segment] = sum[m];
  __syncthreads();
  if (thread >= count) return;
  float total = 0.0f;
#pragma unroll
  for (int s = 0; s < kSegments; ++s) total += sums[thread * (kSegments + 1) + s];
  p.sums[(group * p.parts + part) * count + count - 1 - thread] = total;
}

__global__ void __launch_bounds__(kThreads) fft_conv_direct_sums_kernel(const __grid_constant__ DirectTapsParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, count = p.kernels.count();
  if (i >= p.groups * count) return;
  const int64_t group = i / count, index = i % count;
  double sum = 0.0;
  for (int part = 0; part < p.parts; ++part)
    sum += static_cast<double>(p.sums[(group * p.parts + part) * count + index]);
  p.kernels.put(p.dk, p.dk_rev, group, static_cast<int>(index), static_cast<float>(sum));
  p.kernels.clear(p.dk, p.dk_rev, group, index, count);
}

__global__ void __launch_bounds__(kThreads) fft_conv_skip_kernel(const __grid_constant__ SkipParams p) {
  SharedMemory memory;
  double* const scratch = memory.take<double>(kThreads / 32);
  const int64_t channel = blockIdx.x;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < p.pieces; i += kThreads) sum += p.products[channel * p.pieces + i];
  sum = block_reduce<kThreads / 32>(sum, scratch, Sum());
  if (threadIdx.x == 0) p.dskip[channel] = static_cast<float>(sum);
}

int64_t blocks_of(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

}  // namespace

const char* direct(const DirectParams& p, void* stream) {
  constexpr unsigned kShared = (kWindowPlaces + kDirectTaps + kTilePlaces) * sizeof(float);
  return launch_blocks(fft_conv_direct_kernel, p.items, kThreads, kShared, stream, p);
}

const char* direct_taps(const DirectTapsParams& p, void* stream) {
  constexpr unsigned kShared =
      (kWindowPlaces + kTilePlaces + kDirectTaps * (kThreads / (kDirectTaps / kRun) + 1)) * sizeof(float);
  if (const char* error =
          launch_blocks(fft_conv_direct_taps_kernel, p.groups * p.parts, kThreads, kShared, stream, p))
    return error;
  return launch_blocks(fft_conv_direct_sums_kernel, blocks_of(p.groups * p.kernels.count()), kThreads, 0, stream, p);
}

const char* skip_gradient(const SkipParams& p, void* stream) {
  return launch_blocks(fft_conv_skip_kernel, p.channels, kThreads, kThreads / 32 * sizeof(double), stream, p);
}

}  // namespace pykernels::cuda::fft
