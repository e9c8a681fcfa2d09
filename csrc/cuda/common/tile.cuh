// Tiles of 16-bit elements in shared memory, laid out so that ldmatrix, cp.async, TMA and wgmma all reach them
// without bank conflicts.
//
// A tile [kRows, kCols] is a sequence of panels. A panel holds all rows of kWidth bytes of columns, row after row,
// its 16-byte chunks swizzled over kWidth bytes (see Swizzle in tensor_map.cuh): what TMA writes for a box of
// [kRows, kWidth bytes], and a K-major (or, with the roles of the axes exchanged, MN-major) operand of wgmma.
#pragma once

#include <cuda_runtime.h>

#include "ptx.cuh"
#include "shared.cuh"

namespace pykernels::cuda {

template <class T, int kRows_, int kCols_>
struct SharedTile {
  static_assert(sizeof(T) == 2 && kRows_ % 8 == 0 && kCols_ % 16 == 0);
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kChunk = 8;                                                  // elements in 16 bytes
  static constexpr int kChunks = kCols / kChunk;                                    // per row
  static constexpr int kWidth = kCols % 64 == 0 ? 128 : kCols % 32 == 0 ? 64 : 32;  // bytes of a panel's row
  static constexpr Swizzle kSwizzle = kWidth == 128 ? Swizzle::k128 : kWidth == 64 ? Swizzle::k64 : Swizzle::k32;
  static constexpr int kPanelChunks = kWidth / 16;
  static constexpr int kElements = kRows * kCols;
  static constexpr unsigned kBytes = kElements * 2;
  static constexpr unsigned kAlignment = 8 * kWidth;  // where the swizzle's pattern begins

  T* data;

  // The 8 elements from column 8 * chunk of a row.
  __device__ __forceinline__ T* at(int row, int chunk) const {
    const int panel = chunk / kPanelChunks, inner = chunk % kPanelChunks;
    // Address bits 7 and up, which the swizzle takes, in terms of the row.
    const int mask = (kWidth == 128 ? row : kWidth == 64 ? row / 2 : row / 4) % kPanelChunks;
    return data + (panel * kRows + row) * (kWidth / 2) + (inner ^ mask) * kChunk;
  }
};

template <class Tile, class Element = std::remove_pointer_t<decltype(Tile::data)>>
__device__ __forceinline__ Tile take_tile(SharedMemory& shared) {
  return {shared.take<Element>(Tile::kElements, Tile::kAlignment)};
}

// Operand a of mma_m16n8k16: rows row0 to row0 + 15, columns col0 to col0 + 15.
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int row0, int col0) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile.at(row0 + lane % 16, col0 / 8 + lane / 16));
}

// Operands b of two neighbouring mma_m16n8k16, from a tile whose rows are the product's columns (b[k][n] =
// tile[n][k]): b[0] for rows row0 to row0 + 7, b[1] for the next 8; columns col0 to col0 + 15.
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const Tile& tile, int row0, int col0) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  ptx::ldmatrix_x4(r, tile.at(row0 + lane / 16 * 8 + lane % 8, col0 / 8 + lane / 8 % 2));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// The same from a tile whose rows are the product's inner axis (b[k][n] = tile[k][n]): rows row0 to row0 + 15; b[0]
// for columns col0 to col0 + 7, b[1] for the next 8.
template <class Tile>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[2][2], const Tile& tile, int row0, int col0) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, tile.at(row0 + lane % 16, col0 / 8 + lane / 16));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Operand a from a tile that holds its transpose (a[m][k] = tile[k][m]): rows row0 to row0 + 15 of the tile are k.
template <class Tile>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], const Tile& tile, int row0, int col0) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(a, tile.at(row0 + lane / 16 * 8 + lane % 8, col0 / 8 + lane / 8 % 2));
}

}  // namespace pykernels::cuda
