// What the flash attention kernels for sm_80 and newer share: which rows a block works on, masks, and moving tiles.
#pragma once

#include <cstdint>

#include "../../include/pykernels/flash_attention.h"
#include "../common/copy.cuh"
#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../common/tile.cuh"

namespace pykernels::cuda::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kUnbounded = 1 << 30;  // more than any distance between tokens; sums of two stay in 32 bits

// What kernels take beside the parameters: found on the host.
struct Alignment {
  bool q, k, v, out, dout, dq, dk, dv;  // 16-byte copies of whole chunks are possible
};

// One sequence of a batch or of packed input.
struct Sequence {
  int index;             // of the sequence; what follows the last offset is one more
  int batch;             // entry of the tensors
  int q_first, k_first;  // token offsets
  int tq, tk;

  // Whether these are queries of no sequence. Told from the offsets, so that a kernel that asks at its end need not
  // keep `index`.
  __device__ __forceinline__ bool rest(const FlashAttentionParams& p) const {
    return p.cu_seqlens_q != nullptr && q_first >= clamp_offset(p.cu_seqlens_q[p.sequences], p.seqlen_q);
  }
};

// Packed sequences are cut into tiles of kRows tokens. Without knowing the lengths on the host, sequence s gets the
// slots from offset(s) / kRows + s on, which are enough for it and overlap no other's; a slot may be empty. A
// further sequence holds what follows the last offset: its queries see no key.

// Tiles (packed: slots) for each head, on the host.
inline int64_t tiles_per_head(const FlashAttentionParams& p, int64_t tokens, int rows) {
  const bool packed = p.cu_seqlens_q != nullptr;
  return packed ? tokens / rows + p.sequences + 1 : p.batch * ((tokens + rows - 1) / rows);
}

// The sequence that a tile of one head belongs to, and its first row in there; false when the slot is empty.
// `by_key`: the tiles are cut along the keys instead of the queries.
template <int kRows, bool kByKey = false>
__device__ __forceinline__ bool locate(const FlashAttentionParams& p, int64_t tile, Sequence& sequence, int& row0) {
  const int64_t tokens = kByKey ? p.seqlen_k : p.seqlen_q;
  if (p.cu_seqlens_q == nullptr) {
    const int64_t tiles = (tokens + kRows - 1) / kRows;
    row0 = static_cast<int>(tile % tiles) * kRows;
    const int batch = static_cast<int>(tile / tiles);
    sequence = {batch, batch, 0, 0, static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k)};
    return true;
  }
  const int32_t* offsets = kByKey ? p.cu_seqlens_k : p.cu_seqlens_q;
  const auto slot = [&](int64_t s) { return clamp_offset(offsets[s], tokens) / kRows + s; };
  int64_t low = 0, high = p.sequences;  // the last s with slot(s) <= tile
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (slot(middle) <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  const bool rest = low == p.sequences;
  const int q0 = clamp_offset(p.cu_seqlens_q[low], p.seqlen_q), k0 = clamp_offset(p.cu_seqlens_k[low], p.seqlen_k);
  const int q1 = rest ? static_cast<int>(p.seqlen_q) : clamp_offset(p.cu_seqlens_q[low + 1], p.seqlen_q);
  const int k1 = rest ? static_cast<int>(p.seqlen_k) : clamp_offset(p.cu_seqlens_k[low + 1], p.seqlen_k);
  sequence = {static_cast<int>(low), 0, q0, k0, q1 > q0 ? q1 - q0 : 0, k1 > k0 ? k1 - k0 : 0};
  row0 = static_cast<int>(tile - slot(low)) * kRows;
  const int length = kByKey ? sequence.tk : sequence.tq;
  // Queries and keys of the rest see nothing of each other.
  if (rest) (kByKey ? sequence.tq : sequence.tk) = 0;
  return row0 >= 0 && row0 < length;
}

// Query i sees key j when  i + below <= j <= i + above.
struct Band {
  int below, above;
  __device__ __forceinline__ Band(const FlashAttentionParams& p, const Sequence& s) {
    const int shift = s.tk - s.tq;
    const int left = p.window_left < 0 || p.window_left > kUnbounded ? kUnbounded : static_cast<int>(p.window_left);
    const int right =
        p.window_right < 0 || p.window_right > kUnbounded ? kUnbounded : static_cast<int>(p.window_right);
    below = shift - left, above = shift + right;
  }
  // Whether every query in [i0, i1] sees every key in [j0, j1].
  __device__ __forceinline__ bool whole(int i0, int i1, int j0, int j1) const {
    return i1 + below <= j0 && j1 <= i0 + above;
  }
};

// Writes rows [row0, row0 + kRows) of a tile, those below `rows`, by one warp.
template <int kRows, class Tile, class T>
__device__ __forceinline__ void store_rows(const Tile& tile, int row0, T* target, int64_t stride, int rows,
                                           int columns, bool aligned) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x % 32); i < kRows * Tile::kChunks; i += 32) {
    const int row = row0 + i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (row >= rows || chunk * 8 >= columns) continue;
    const T* from = tile.at(row, chunk);
    T* to = target + row * stride + chunk * 8;
    if (aligned && chunk * 8 + 8 <= columns) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && chunk * 8 + e < columns; ++e) to[e] = from[e];
    }
  }
}

// Writes a warp's accumulators, [16, 16 * kTiles] times a factor per row half, into its rows of a tile.
template <class T, int kTiles, class Tile>
__device__ __forceinline__ void accumulators_to_tile(const float (&x)[2 * kTiles][4], float factor0, float factor1,
                                                     const Tile& tile, int row0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
    reinterpret_cast<uint32_t*>(tile.at(row0 + g, n))[t] = ptx::pack<T>(x[n][0] * factor0, x[n][1] * factor0);
    reinterpret_cast<uint32_t*>(tile.at(row0 + g + 8, n))[t] = ptx::pack<T>(x[n][2] * factor1, x[n][3] * factor1);
  }
}

// What comes from q k^T before the exponential, so that the weight of a key is 2^(factor * score - ...): with a
// soft cap, and for scales that are not positive (or next to nothing), the scores are transformed first. ALiBi is
// subtracted from either, in units of the score.
struct Scores {
  float scale, softcap, factor;
  __device__ __forceinline__ explicit Scores(const FlashAttentionParams& p)
      : scale(static_cast<float>(p.scale)),
        softcap(static_cast<float>(p.softcap)),
        factor(plain() ? scale * kLog2e : kLog2e) {}
  __device__ __forceinline__ bool plain() const { return softcap <= 0.0f && scale >= 1e-10f; }
  // Within 1e-6 of the value's own size, without branches: a series where the quotient would cancel.
  static __device__ __forceinline__ float tanh(float x) {
    const float x2 = x * x, e = ptx::exp2(2.0f * kLog2e * fminf(fabsf(x), 20.0f));
    const float series = x * fmaf(x2, fmaf(x2, 2.0f / 15.0f, -1.0f / 3.0f), 1.0f);
    return x2 >= 0.015f ? copysignf(1.0f - __fdividef(2.0f, e + 1.0f), x) : series;  // NaN stays NaN
  }
  // Not for plain() scores.
  __device__ __forceinline__ float transform(float s) const {
    return softcap > 0.0f ? softcap * tanh(s * (scale / softcap)) : s * scale;
  }
  // What a head's scores lose for each token of distance; 0 without ALiBi. Of a sequence that has keys.
  __device__ __forceinline__ float slope(const FlashAttentionParams& p, const Sequence& sequence, int64_t head) const {
    if (p.alibi_slopes == nullptr) return 0.0f;
    const float slope = static_cast<const float*>(p.alibi_slopes)[sequence.index * p.alibi_stride + head];
    return plain() ? slope / scale : slope;
  }
};

// A head's sink in log2 units: a score with a value of zero. -infinity: none.
__device__ __forceinline__ float sink_log2(const FlashAttentionParams& p, int64_t head) {
  return p.sinks == nullptr ? -INFINITY : static_cast<const float*>(p.sinks)[head] * kLog2e;
}
__device__ __forceinline__ float sink_log2(const FlashAttentionParams& p, const Sequence& sequence, int64_t head) {
  return p.sinks == nullptr || sequence.rest(p) ? -INFINITY : sink_log2(p, head);
}

// A row when its keys are all summed: `sum` of 2^(score - largest), scores and sink in log2 units.
struct RowEnd {
  float lse;      // natural log
  float inverse;  // what its output is multiplied with
  __device__ __forceinline__ RowEnd(float largest, float sum, float sink) {
    const float shift = fmaxf(largest, sink), kept = ptx::exp2(largest - shift);
    const float total = fmaf(sum, kept, ptx::exp2(sink - shift));
    const bool blind = shift == -INFINITY;  // neither a key nor a sink
    lse = blind ? -INFINITY : (shift + ptx::log2(total)) * kLn2;
    inverse = blind ? 0.0f : kept / total;
  }
};

}  // namespace pykernels::cuda::attention
