// Gradients of kernels: products of spectra, added up over rows before any inverse transform.
#include "launches.cuh"

namespace pykernels::cuda::fft {
namespace {

template <int kPoints>
__global__ void __launch_bounds__(Transform<kPoints>::kBlockThreads, 256 / Transform<kPoints>::kBlockThreads)
    fft_conv_correlate_kernel(const __grid_constant__ CorrelateParams p) {
  using Block = Transform<kPoints>;
  const int t = static_cast<int>(threadIdx.x) % Block::kThreads, slot = static_cast<int>(threadIdx.x) / Block::kThreads;
  const int64_t item = int64_t{blockIdx.x} * Block::kPerBlock + slot;
  const bool of_rows = p.from == Place::kRows;
  const int64_t group = item / (of_rows ? p.parts : p.range.subs);
  const int64_t within = item % (of_rows ? p.parts : p.range.subs);
  SharedMemory memory;
  float2* const shared = memory.take<float2>(Block::kPerBlock * Block::kSharedPoints) + slot * Block::kSharedPoints;
  float2* const sums = p.sums + item * kPoints + t;

  float2 sum[kPerThread] = {};
  if (p.add && item < p.range.items) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum[i] = sums[i * Block::kThreads];
  }
#pragma unroll 1
  for (int64_t step = 0; step < p.share; ++step) {
    const int64_t i = (of_rows ? within * p.share : 0) + step;
    const bool active = item < p.range.items && i < p.total;
    const auto load = [&](float2 (&z)[kPerThread], const Signal& signal, const Windows& windows, const float2* points) {
      if (!active) {
#pragma unroll
        for (int l = 0; l < kPerThread; ++l) z[l] = make_float2(0.0f, 0.0f);
      } else if (of_rows) {
        const int64_t row = (p.range.first_group + group) * p.rows.per_group * p.rows.batch + i / windows.count;
        load_window(z, p.rows.dtype, signal, p.rows.length, windows, static_cast<int>(i % windows.count),
                    row % p.rows.batch, row / p.rows.batch, t, Block::kThreads, kPoints);
      } else {
        const float2* const from = points + ((group * p.total + i) * p.range.subs + within) * kPoints + t;
#pragma unroll
        for (int l = 0; l < kPerThread; ++l) z[l] = from[l * Block::kThreads];
      }
    };
    float2 x[kPerThread], z[kPerThread];
    load(x, p.rows.x, p.windows, p.x_points);
    Block::forward(x, shared, t, of_rows);
    Block::sync();  // everyone has read the last points of x
    load(z, p.dc, p.dc_windows, p.dc_points);
    Block::forward(z, shared, t, of_rows);
    Block::sync();
#pragma unroll
    for (int l = 0; l < kPerThread; ++l) sum[l] = sum[l] + times<true>(z[l], x[l]);
  }
  if (item >= p.range.items) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sums[i * Block::kThreads] = sum[i];
}

}  // namespace

const char* correlate(int points, const CorrelateParams& p, void* stream) {
  return for_points(points, [&]<int kPoints>() {
    using Block = Transform<kPoints>;
    return launch_blocks(fft_conv_correlate_kernel<kPoints>, (p.range.items + Block::kPerBlock - 1) / Block::kPerBlock,
                         Block::kBlockThreads, Block::kPerBlock * Block::kSharedPoints * sizeof(float2), stream, p);
  });
}

}  // namespace pykernels::cuda::fft
