// One token of linear attention: reads and writes each state once. Bound by memory, 8 K V bytes per head.
#pragma once

#include "../common/elements.cuh"
#include "sm80.cuh"

namespace pykernels::cuda::linear {

constexpr int kStepWarps = 8, kStepThreads = 32 * kStepWarps;
constexpr int kStepColumns = 128;  // of a block at a time, each lane 4
constexpr int kStepRows = 4;       // of a warp at a time: loads in flight

inline unsigned step_shared_bytes(const LinearAttentionStepParams& s) {
  const LinearAttentionParams& p = s.forward;
  return static_cast<unsigned>(sizeof(float) * (4 * p.key_dim + p.value_dim_state() + kStepWarps * kStepColumns));
}

// A block owns a slice of columns of an entry's head; with normalize all of them, since each output needs the last.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    linear_attention_step_sm80_kernel(const __grid_constant__ LinearAttentionStepParams s) {
  const LinearAttentionParams& p = s.forward;
  const int64_t head = blockIdx.x % p.heads, entry = blockIdx.x / p.heads;
  const int64_t slot = s.state_indices != nullptr ? s.state_indices[entry] : entry;
  const bool exists = slot >= 0 && slot < s.slots;
  const int key_dim = static_cast<int>(p.key_dim), value_dim = static_cast<int>(p.value_dim);
  const int columns = value_dim + (p.normalize ? 1 : 0);  // of the state
  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32;
  const bool bonus = p.bonus != nullptr;

  SharedMemory shared;
  float* const query = shared.take<float>(key_dim);
  float* const key = shared.take<float>(key_dim);
  float* const factor = shared.take<float>(key_dim);
  float* const weight = shared.take<float>(key_dim);  // of the token itself
  float* const out = shared.take<float>(columns);
  float* const partial = shared.take<float>(kStepWarps * kStepColumns);  // [warp, column]

  const int64_t head_k = head / (p.heads / p.heads_k);
  const T* const q = static_cast<const T*>(p.q) + entry * p.q_stride.batch + head_k * p.q_stride.head;
  const T* const k = static_cast<const T*>(p.k) + entry * p.k_stride.batch + head_k * p.k_stride.head;
  const T* const v = static_cast<const T*>(p.v) + entry * p.v_stride.batch + head * p.v_stride.head;
  const float* const decay = p.decay == nullptr ? nullptr
                                                : static_cast<const float*>(p.decay) + entry * p.decay_stride.batch +
                                                      head * p.decay_stride.head;
  for (int i = static_cast<int>(threadIdx.x); i < key_dim; i += kStepThreads) {
    query[i] = widen(q[i]) * static_cast<float>(p.scale);
    key[i] = widen(k[i]);
    factor[i] = decay == nullptr ? 1.0f : expf(decay[p.decay_kind == DecayKind::kChannel ? i : 0]);
    weight[i] = bonus ? static_cast<const float*>(p.bonus)[head * key_dim + i] : 1.0f;
  }
  __syncthreads();

  float* const state = static_cast<float*>(s.state) + slot * s.slot_stride + head * s.head_stride;
  const int slices = (columns + kStepColumns - 1) / kStepColumns;
  for (int slice = static_cast<int>(blockIdx.y); slice < slices; slice += static_cast<int>(gridDim.y)) {
    float sum[4] = {}, value[4];
    int column[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      column[c] = slice * kStepColumns + 32 * c + lane;
      value[c] = column[c] < value_dim ? widen(v[column[c]]) : 1.0f;
    }
    for (int first = warp; exists && first < key_dim; first += kStepWarps * kStepRows) {
      float old[kStepRows][4];
#pragma unroll
      for (int r = 0; r < kStepRows; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = first + r * kStepWarps;
          old[r][c] = row < key_dim && column[c] < columns ? state[int64_t{row} * columns + column[c]] : 0.0f;
        }
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        const int row = first + r * kStepWarps;
        if (row >= key_dim) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float update = key[row] * value[c], after = fmaf(factor[row], old[r][c], update);
          // With a bonus the state is read before it decays.
          sum[c] = fmaf(query[row], bonus ? fmaf(weight[row], update, old[r][c]) : after, sum[c]);
          if (column[c] < columns) state[int64_t{row} * columns + column[c]] = after;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) partial[warp * kStepColumns + 32 * c + lane] = sum[c];
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < kStepColumns; c += kStepThreads) {
      float total = partial[c];
#pragma unroll
      for (int other = 1; other < kStepWarps; ++other) total += partial[other * kStepColumns + c];
      if (slice * kStepColumns + c < columns) out[slice * kStepColumns + c] = total;
    }
    __syncthreads();
  }

  const float inverse = p.normalize ? 1.0f / (out[value_dim] + static_cast<float>(kNormalizeEpsilon)) : 1.0f;
  T* const to = static_cast<T*>(p.out) + entry * p.out_stride.batch + head * p.out_stride.head;
  for (int slice = static_cast<int>(blockIdx.y); slice < slices; slice += static_cast<int>(gridDim.y)) {
    const int column = slice * kStepColumns + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) >= kStepColumns || column >= value_dim) continue;
    const float result = exists ? out[column] * inverse : 0.0f;
    to[column] = narrow<T>(result);
  }
}

template <class T>
const char* launch_step_sm80(const LinearAttentionStepParams& s, cudaStream_t stream) {
  const LinearAttentionParams& p = s.forward;
  const int64_t blocks = p.batch * p.heads;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more heads than a grid has blocks";
  const int64_t slices = p.normalize ? 1 : (p.value_dim + kStepColumns - 1) / kStepColumns;
  return launch(linear_attention_step_sm80_kernel<T>,
                {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), dim3(kStepThreads),
                 step_shared_bytes(s), stream},
                s);
}

}  // namespace pykernels::cuda::linear
