// Transforms that one block holds in shared memory, from samples to samples.
#include "launches.cuh"

namespace pykernels::cuda::fft {
namespace {

template <int kPoints>
__global__ void __launch_bounds__(Transform<kPoints>::kBlockThreads, 512 / Transform<kPoints>::kBlockThreads)
    fft_conv_transform_kernel(const __grid_constant__ TransformParams p) {
  using Block = Transform<kPoints>;
  const int t = static_cast<int>(threadIdx.x) % Block::kThreads, slot = static_cast<int>(threadIdx.x) / Block::kThreads;
  const int64_t item = int64_t{blockIdx.x} * Block::kPerBlock + slot;
  const bool active = item < p.range.items;
  SharedMemory memory;
  float2* const shared = memory.take<float2>(Block::kPerBlock * Block::kSharedPoints) + slot * Block::kSharedPoints;

  // Where the item is.
  const bool of_rows = p.from == Place::kRows;
  const int per_row = of_rows ? p.windows.count : p.range.subs, within = static_cast<int>(item % per_row);
  const int64_t row = p.range.first_row + item / per_row, channel = row / p.rows.batch, batch = row % p.rows.batch;
  float2* const points = p.points + item * kPoints;

  const bool shifted = p.from == Place::kRows || p.from == Place::kTaps || p.to == Place::kTaps;
  float2 z[kPerThread] = {};
  if (p.from == Place::kSums) {
    if (active)
      for (int part = 0; part < p.parts; ++part) {
        const float2* const sums = p.sums + (item * p.parts + part) * kPoints + t;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) z[i] = z[i] + sums[i * Block::kThreads];
      }
  } else {
    if (active) {
      if (of_rows) {
        load_window(z, p.rows.dtype, p.rows.x, p.rows.length, p.windows, within, batch, channel, t, Block::kThreads,
                    kPoints);
      } else if (p.from == Place::kTaps) {
        load_taps(z, p.kernels, p.range.first_group + item, t, Block::kThreads, kPoints);
      } else {
#pragma unroll
        for (int l = 0; l < kPerThread; ++l) z[l] = points[t + l * Block::kThreads];
      }
    }
    Block::forward(z, shared, t, shifted);
  }

  if (p.to == Place::kSums) {
    if (!active) return;
    float2* const sums = p.sums + item * kPoints + t;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sums[i * Block::kThreads] = make_float2(p.scale * z[i].x, p.scale * z[i].y);
    return;
  }
  if (p.from != Place::kSums && active) {
    const int64_t group = channel / p.rows.per_group - p.range.first_group;
    const float2* const spectrum = p.spectrum + (group * p.range.subs + (of_rows ? 0 : within)) * kPoints + t;
    const float sign = p.conj ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float2 w = spectrum[i * Block::kThreads];
      z[i] = times(z[i], make_float2(w.x, sign * w.y));
    }
  }
  Block::inverse(z, shared, t, shifted);

  if (!active) return;
  if (p.to == Place::kRows) {
    store_window(z, p.rows, p.windows, within, batch, channel, t, Block::kThreads, kPoints);
  } else if (p.to == Place::kTaps) {
    const int64_t group = p.range.first_group + item;
    store_taps(z, p.kernels, p.dk, p.dk_rev, group, t, Block::kThreads, kPoints, p.scale);
    p.kernels.clear(p.dk, p.dk_rev, group, t, Block::kThreads);
  } else {
#pragma unroll
    for (int l = 0; l < kPerThread; ++l) points[t + l * Block::kThreads] = z[l];
  }
}

}  // namespace

const char* transform(int points, const TransformParams& p, void* stream) {
  return for_points(points, [&]<int kPoints>() {
    using Block = Transform<kPoints>;
    return launch_blocks(fft_conv_transform_kernel<kPoints>, (p.range.items + Block::kPerBlock - 1) / Block::kPerBlock,
                         Block::kBlockThreads, Block::kPerBlock * Block::kSharedPoints * sizeof(float2), stream, p);
  });
}

}  // namespace pykernels::cuda::fft
