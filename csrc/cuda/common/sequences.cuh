// Sequences packed along an axis of tokens. What cu_seqlens holds is not trusted: whatever it is, no token outside of
// [0, length) is named, and every token has one owner.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pykernels::cuda {

// Tokens [start, end) of one sequence. Number `sequences` is nobody: these tokens belong to none.
struct Sequence {
  int64_t index, start, end;
  __device__ __forceinline__ bool has(int64_t token) const { return token >= start && token < end; }
};

__device__ __forceinline__ int64_t clamped_offset(const int32_t* cu_seqlens, int64_t i, int64_t length) {
  const int64_t offset = cu_seqlens[i];
  return offset < 0 ? 0 : offset > length ? length : offset;
}

// The owner of a token; without cu_seqlens it is all of batch entry `batch`. Its end lies behind the token.
__device__ __forceinline__ Sequence owner_of(const int32_t* cu_seqlens, int64_t sequences, int64_t length,
                                             int64_t batch, int64_t token) {
  if (cu_seqlens == nullptr) return {batch, 0, length};
  int64_t low = 0, high = sequences;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (clamped_offset(cu_seqlens, middle, length) <= token)
      low = middle;
    else
      high = middle - 1;
  }
  const Sequence found{low, clamped_offset(cu_seqlens, low, length),
                       low < sequences ? clamped_offset(cu_seqlens, low + 1, length) : length};
  return found.has(token) ? found : Sequence{sequences, token, token + 1};
}

// Sequence `index` itself, or batch entry `index`.
__device__ __forceinline__ Sequence sequence_at(const int32_t* cu_seqlens, int64_t length, int64_t index) {
  if (cu_seqlens == nullptr) return {index, 0, length};
  const int64_t start = clamped_offset(cu_seqlens, index, length), end = clamped_offset(cu_seqlens, index + 1, length);
  return {index, start, end < start ? start : end};
}

}  // namespace pykernels::cuda
