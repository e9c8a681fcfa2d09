// The backward pass of what one block transforms: every gradient from one reading of x and dc.
#include "../common/ptx.cuh"
#include "launches.cuh"

namespace pykernels::cuda::fft {
namespace {

// The sums lie in shared memory, where each thread reads what it wrote: 128 registers hold a spectrum and a transform.
// Where several transforms share a block their places take a few more, which leaves room for three blocks.
template <int kPoints>
__global__ void __launch_bounds__(Transform<kPoints>::kBlockThreads,
                                  kPoints < 2048 ? 3 : 512 / Transform<kPoints>::kBlockThreads)
    fft_conv_backward_kernel(const __grid_constant__ BackwardParams p) {
  using Block = Transform<kPoints>;
  static_assert(Block::kPerBlock == transforms_of_block(kPoints));
  constexpr int kLanes = Block::kThreads < 32 ? Block::kThreads : 32;
  const int thread = static_cast<int>(threadIdx.x), slot = thread / Block::kThreads;
  SharedMemory memory;
  float2* const shared = memory.take<float2>(Block::kPerBlock * Block::kSharedPoints) + slot * Block::kSharedPoints;
  float2* const all_sums = memory.take<float2>(Block::kPerBlock * kPoints);
  float2* const own_sums = all_sums + slot * kPoints;

  const bool of_rows = p.from == Place::kRows;
  const int per_group = of_rows ? p.parts : p.range.subs;
  const int group = static_cast<int>(blockIdx.x) / per_group, within = static_cast<int>(blockIdx.x) % per_group;
  for (int i = thread; i < Block::kPerBlock * kPoints; i += Block::kBlockThreads) all_sums[i] = make_float2(0.0f, 0.0f);
  __syncthreads();

  const int64_t rows_batch = p.passes[kOfGradient].rows.batch, begin = of_rows ? within * p.share : 0;
  const int count = static_cast<int>(min(p.share, p.total - begin));  // no GPU holds 2^31 rows, nor a part of as many
  const int windows = of_rows ? p.passes[kOfGradient].windows.count : 1;
#pragma unroll 1
  for (int first = 0; first < count; first += Block::kPerBlock) {
    const int64_t item = begin + first + slot;  // of the group
    const bool active = first + slot < count;
    const int window = static_cast<int>(item % windows);
    const int64_t row = group * p.passes[kOfGradient].rows.per_group * rows_batch + item / windows;
    const int batch = static_cast<int>(row % rows_batch), channel = static_cast<int>(row / rows_batch);
    const int64_t index = group * p.total + item;  // of the launch
    float2 x[kPerThread] = {};  // its spectrum
#pragma unroll 1
    for (int number = p.first; number <= p.last; ++number) {
      const Pass& pass = p.passes[number];
      int t = ptx::unhoisted(thread) % Block::kThreads;  // no twiddle is kept from one transform to the next
      float2* const sum = own_sums + t;
      float2* const points = pass.points + (index * p.range.subs + within) * kPoints + t;
      float2 z[kPerThread] = {};
      if (number == kOfPostGate && p.same) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) z[i] = x[i];
      } else {
        if (active && of_rows)
          load_window(z, pass.rows.dtype, pass.rows.x, pass.rows.length, pass.windows, window, batch, channel, t,
                      Block::kThreads, kPoints);
        if (active && !of_rows) {
#pragma unroll
          for (int l = 0; l < kPerThread; ++l) z[l] = points[l * Block::kThreads];
        }
        Block::forward(z, shared, t, of_rows);
      }
      if (number == kOfX) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) x[i] = z[i];
      }
      if (number == kOfGradient && p.sums != nullptr) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          float2& of_all = sum[i * Block::kThreads];
          of_all = of_all + times<true>(z[i], x[i]);
        }
      }
      if (number == kOfPostGate || (number == kOfGradient && p.inputs)) {
        const float2* const spectrum =
            p.spectrum + (int64_t{group} * p.range.subs + (of_rows ? 0 : within)) * kPoints + t;
        const float sign = number == kOfGradient ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          const float2 w = spectrum[i * Block::kThreads];
          z[i] = times(z[i], make_float2(w.x, sign * w.y));
        }
        t = ptx::unhoisted(t);
        Block::inverse(z, shared, t, of_rows);
        double products = 0.0;
        if (active && of_rows)
          products = store_window(z, pass.rows, pass.windows, window, batch, channel, t, Block::kThreads, kPoints);
        if (of_rows)
          put_products<kLanes>(pass.rows, index * product_pieces(kPoints) + t / kLanes, products, active);
        if (active && !of_rows) {
#pragma unroll
          for (int l = 0; l < kPerThread; ++l) points[l * Block::kThreads] = z[l];
        }
      }
      Block::sync();  // everyone has read the last points
    }
  }

  // The sums of the block's transforms, in order.
  if (p.sums == nullptr) return;
  __syncthreads();
  float2* const sums = p.sums + int64_t{blockIdx.x} * kPoints;
  for (int i = static_cast<int>(threadIdx.x); i < kPoints; i += Block::kBlockThreads) {
    float2 total = p.add ? sums[i] : make_float2(0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < Block::kPerBlock; ++s) total = total + all_sums[s * kPoints + i];
    sums[i] = total;
  }
}

}  // namespace

const char* backward(int points, const BackwardParams& p, void* stream) {
  return for_points(points, [&]<int kPoints>() {
    using Block = Transform<kPoints>;
    constexpr unsigned kShared = Block::kPerBlock * (Block::kSharedPoints + kPoints) * sizeof(float2);
    return launch_blocks(fft_conv_backward_kernel<kPoints>, p.range.items, Block::kBlockThreads, kShared, stream, p);
  });
}

}  // namespace pykernels::cuda::fft
