// What the linear attention kernels for sm_80 and newer share: which tokens a block works on, a chunk's decays.
#pragma once

#include <cstdint>

#include "../../include/pykernels/linear_attention.h"
#include "../common/copy.cuh"
#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../common/tile.cuh"

namespace pykernels::cuda::linear {

constexpr int kChunk = 32;  // tokens, one for each lane of a warp
constexpr int kChunkLog2 = 5;
constexpr int kSegment = LinearAttentionParams::kSegment;
constexpr int kChunksPerSegment = kSegment / kChunk;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 16 * kWarps;  // of a result that a block makes

// What all kernels of a call read. Decays are log factors; a decay per head has batch and token stride 0.
struct Call {
  int64_t batch, tokens, heads;
  int64_t sequences;      // packed, else the batch
  int64_t segments_each;  // of an unpacked sequence: at least 1, so that one without tokens has its states written
  const int32_t* cu_seqlens;
  const float* decay;  // or null
  Strides3 decay_stride;
  const float* bonus;  // [H, K] or null
  float scale;
  bool reverse;

  __host__ __device__ int64_t segments() const {
    return cu_seqlens != nullptr ? tokens / kSegment + sequences : batch * segments_each;
  }
};

// A segment of a sequence. Time t of the sequence lies at row origin + t * step.
struct Segment {
  int64_t sequence, batch, origin;
  int step, length;  // of the whole sequence
  int index;         // in it
};

// Where segment `slot` lies; false for a slot that belongs to no sequence. A sequence without tokens has one segment.
__device__ __forceinline__ bool locate(const Call& call, int64_t slot, Segment& segment) {
  int64_t start = 0;
  if (call.cu_seqlens == nullptr) {
    segment.sequence = segment.batch = slot / call.segments_each;
    segment.length = static_cast<int>(call.tokens);
    segment.index = static_cast<int>(slot % call.segments_each);
  } else {
    if (call.sequences == 0) return false;
    const auto first = [&](int64_t s) { return clamp_offset(call.cu_seqlens[s], call.tokens) / kSegment + s; };
    int64_t low = 0, high = call.sequences - 1;  // the last s with first(s) <= slot
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first(middle) <= slot)
        low = middle;
      else
        high = middle - 1;
    }
    start = clamp_offset(call.cu_seqlens[low], call.tokens);
    segment.sequence = low, segment.batch = 0;
    segment.length =
        static_cast<int>(max(int64_t{0}, clamp_offset(call.cu_seqlens[low + 1], call.tokens) - start));
    segment.index = static_cast<int>(slot - first(low));
    if (segment.index < 0) return false;
  }
  segment.step = call.reverse ? -1 : 1;
  segment.origin = call.reverse ? start + segment.length - 1 : start;
  return segment.index == 0 || segment.index * int64_t{kSegment} < segment.length;
}

// Where chunk `index` of all segments' lies: tokens [at, at + n) of its sequence; false for one without tokens.
__device__ __forceinline__ bool locate_chunk(const Call& call, int64_t index, Segment& segment, int& at, int& n) {
  if (!locate(call, index / kChunksPerSegment, segment)) return false;
  const int64_t first = segment.index * int64_t{kSegment} + index % kChunksPerSegment * kChunk;
  if (first >= segment.length) return false;
  at = static_cast<int>(first), n = min(kChunk, segment.length - at);
  return true;
}

// A matrix [B, T, heads, columns] that tiles are loaded from. kOnes: one column of ones; kColumn: one column, fp32,
// [B, T, H].
enum class Source : int32_t { kRows, kOnes, kColumn };
struct Operand {
  Source source;
  bool aligned;
  const void* data;
  Strides3 stride;
  int64_t group;  // heads of the result that share one of its heads

  // Time 0 of a segment's sequence.
  template <class T>
  __device__ __forceinline__ const T* start(const Segment& s, int64_t head) const {
    return static_cast<const T*>(data) + s.batch * stride.batch + head / group * stride.head + s.origin * stride.token;
  }
};

inline Operand rows_of(const void* data, const Strides3& stride, int64_t group) {
  return {Source::kRows, aligned(data, stride), data, stride, group};
}
inline Operand ones() { return {Source::kOnes, true, nullptr, {0, 0, 0}, 1}; }
inline Operand column_of(const float* data, const Call& call) {
  return {Source::kColumn, true, data, {call.tokens * call.heads, call.heads, 1}, 1};
}

// Loads columns [column0, columns) of the n tokens from time `first` on.
template <class T, class Tile>
__device__ __forceinline__ void load_operand(const Tile& tile, const Operand& operand, const Segment& segment,
                                             int64_t head, int first, int n, int column0, int columns) {
  const int64_t stride = operand.stride.token * segment.step;
  if (operand.source == Source::kRows) {
    load_tile<kThreads>(tile, operand.start<T>(segment, head) + first * stride + column0, stride, n,
                        columns - column0, operand.aligned);
    return;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    float value = 0.0f;
    if (chunk == 0 && row < n)
      value = operand.source == Source::kOnes ? 1.0f : operand.start<float>(segment, head)[(first + row) * stride];
    *reinterpret_cast<uint4*>(tile.at(row, chunk)) = make_uint4(ptx::pack<T>(value, 0.0f), 0, 0, 0);
  }
}

// The log decay of each token of a chunk, one per lane; 0 past its end.
__device__ __forceinline__ float lane_decay(const Call& call, const Segment& segment, int64_t head, int first, int n) {
  const int lane = threadIdx.x % 32;
  if (call.decay == nullptr || lane >= n) return 0.0f;
  const Strides3& stride = call.decay_stride;
  return call.decay[segment.batch * stride.batch + head * stride.head +
                    (segment.origin + int64_t{first + lane} * segment.step) * stride.token];
}

// Decays of a chunk. Every log factor is a sum of decays of consecutive tokens, taken by adding up blocks of 2^l
// tokens: never a difference of two sums, so that weak decays stay exact beside strong ones.
struct Decays {
  // Level l: the sum from the start of a token's block of 2^l on to the token; after the token to the block's end.
  float until[kChunkLog2][kChunk], after[kChunkLog2][kChunk];
  float query[kChunk], key[kChunk];  // factors from the chunk's start to a query, and from a key to the chunk's end
  float weight[kChunk];              // of a query: the scale, over its denominator
  float total;                       // log factor of the chunk

  // Log factor of the tokens after a key, up to a token that is not before it.
  __device__ __forceinline__ float between(int query_index, int key_index) const {
    if (query_index == key_index) return 0.0f;
    const int level = 31 - __clz(query_index ^ key_index);
    return after[level][key_index] + until[level][query_index];
  }
};

// By one warp, from one decay per lane. With a bonus the state is read before it decays.
__device__ __forceinline__ void make_decays(Decays& decays, float decay, float weight, bool bonus) {
  const int lane = threadIdx.x % 32;
  float until = decay, after = 0.0f;
#pragma unroll
  for (int level = 0; level < kChunkLog2; ++level) {
    const int size = 1 << level;
    decays.until[level][lane] = until, decays.after[level][lane] = after;
    const float block = __shfl_sync(~0u, until, lane | (size - 1));
    const float sibling = __shfl_xor_sync(~0u, block, size);
    if (lane & size)
      until += sibling;
    else
      after += sibling;
  }
  const float before = __shfl_up_sync(~0u, until, 1);
  decays.query[lane] = !bonus ? expf(until) : lane == 0 ? 1.0f : expf(before);
  decays.key[lane] = expf(after);
  decays.weight[lane] = weight;
  if (lane == 31) decays.total = until;
}

}  // namespace pykernels::cuda::linear
