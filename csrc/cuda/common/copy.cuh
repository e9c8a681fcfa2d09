// Copies of tiles from global to shared memory.
#pragma once

#include <cstdint>

#include "../../include/pykernels/strides.h"
#include "ptx.cuh"
#include "tile.cuh"

namespace pykernels::cuda {

// Whether rows of 16-bit elements can be copied 16 bytes at a time.
inline bool aligned(const void* data, const Strides3& stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride.batch % 8 == 0 && stride.token % 8 == 0 &&
         stride.head % 8 == 0;
}

// An offset read from device memory, which nothing has checked.
__device__ __forceinline__ int clamp_offset(int offset, int64_t tokens) {
  return offset < 0 ? 0 : offset > tokens ? static_cast<int>(tokens) : offset;
}

// The stage of a double buffer that a step uses; by value, so that the tiles need no address.
template <class Tile>
__device__ __forceinline__ Tile stage(int step, const Tile& even, const Tile& odd) {
  return {step % 2 == 0 ? even.data : odd.data};
}

// Starts the copy of rows [0, rows) and columns [0, columns) into a tile, row r from source + offset(r) on; the rest of
// the tile becomes zero. Complete after cp_async_wait and a barrier.
template <int kThreads, class Tile, class T, class Offset>
__device__ __forceinline__ void load_rows(const Tile& tile, const T* source, Offset offset, int rows, int columns,
                                          bool aligned) {
  constexpr int kCopies = Tile::kRows * Tile::kChunks;
  if (aligned) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kCopies; i += kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      const int left = row < rows ? columns - chunk * 8 : 0;
      const unsigned bytes = left <= 0 ? 0 : left >= 8 ? 16 : 2 * left;
      ptx::cp_async_16(tile.at(row, chunk), bytes == 0 ? source : source + offset(row) + chunk * 8, bytes);
    }
  } else {
    // Rows at any address: element by element, through registers.
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kCopies; i += kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int column = chunk * 8 + e;
        const uint32_t bits = row < rows && column < columns ? source[offset(row) + column].bits : 0u;
        pairs[e / 2] = e % 2 == 0 ? bits : pairs[e / 2] | bits << 16;
      }
      *reinterpret_cast<uint4*>(tile.at(row, chunk)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// The same of rows that lie `stride` elements apart.
template <int kThreads, class Tile, class T>
__device__ __forceinline__ void load_tile(const Tile& tile, const T* source, int64_t stride, int rows, int columns,
                                          bool aligned) {
  load_rows<kThreads>(tile, source, [&](int row) { return row * stride; }, rows, columns, aligned);
}

}  // namespace pykernels::cuda
