// Stages of radix 16 of rows that are longer than a block's transform: a thread for each butterfly, through memory.
#include "launches.cuh"

namespace pykernels::cuda::fft {
namespace {

constexpr int kThreads = 256;

// Of a stage, butterfly number blockIdx.x * kThreads + threadIdx.x.
struct Butterfly {
  int64_t item;
  int within, position, first, step;  // in the row; in its transform; its points in the row
  uint32_t turn;

  __device__ __forceinline__ explicit Butterfly(const StageParams& p) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int per_row = p.total / 16;
    within = static_cast<int>(i & (per_row - 1));
    item = i >> log2_of(per_row);
    step = p.size / 16;
    position = within & (step - 1);
    first = (within - position) * 16 + position;
    turn = static_cast<uint32_t>(position) << (32 - log2_of(p.size));
  }
};

__global__ void __launch_bounds__(kThreads, 2) fft_conv_split_kernel(const __grid_constant__ StageParams p) {
  const Butterfly at(p);
  float2* const points = p.points + at.item * p.total + at.first;
  float2 z[kPerThread];
  if (p.place == Place::kRows) {
    const int64_t row = p.range.first_row + at.item;
    load_window(z, p.rows.dtype, p.rows.x, p.rows.length, p.windows, 0, row % p.rows.batch, row / p.rows.batch,
                at.first, at.step, p.total);
  } else if (p.place == Place::kTaps) {
    load_taps(z, p.kernels, p.range.first_group + at.item, at.first, at.step, p.total);
  } else {
#pragma unroll
    for (int l = 0; l < kPerThread; ++l) z[l] = points[int64_t{l} * at.step];
  }
  stage16<false>(z, at.turn, p.place != Place::kPoints);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) points[int64_t{k} * at.step] = z[digits_swapped(k)];
}

__global__ void __launch_bounds__(kThreads, 2) fft_conv_merge_kernel(const __grid_constant__ StageParams p) {
  const Butterfly at(p);
  float2* const points = p.points + at.item * p.total + at.first;
  float2 z[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[digits_swapped(k)] = points[int64_t{k} * at.step];
  stage16<true>(z, at.turn, p.place != Place::kPoints);
  if (p.place == Place::kRows) {
    const int64_t row = p.range.first_row + at.item;
    const double sum = store_window(z, p.rows, p.windows, 0, row % p.rows.batch, row / p.rows.batch, at.first, at.step,
                                    p.total);
    put_products<32>(p.rows, row * product_pieces(p.total) + at.within / 32, sum);
  } else if (p.place == Place::kTaps) {
    const int64_t group = p.range.first_group + at.item;
    store_taps(z, p.kernels, p.dk, p.dk_rev, group, at.first, at.step, p.total, p.scale);
    p.kernels.clear(p.dk, p.dk_rev, group, at.position, at.step);
  } else {
#pragma unroll
    for (int l = 0; l < kPerThread; ++l) points[int64_t{l} * at.step] = z[l];
  }
}

const char* stage(void (*kernel)(StageParams), const StageParams& p, void* stream) {
  return launch_blocks(kernel, p.range.items * (p.total / 16 / kThreads), kThreads, 0, stream, p);
}

}  // namespace

const char* split(const StageParams& p, void* stream) { return stage(fft_conv_split_kernel, p, stream); }
const char* merge(const StageParams& p, void* stream) { return stage(fft_conv_merge_kernel, p, stream); }

}  // namespace pykernels::cuda::fft
