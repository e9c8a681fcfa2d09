// Linear attention of a decay per channel, and of fp32: the same walks over tiles of fp32 in shared memory, with
// products on tf32 matrix units, and what happens inside of a chunk in kernels of its own. For sm_80 and newer.
//
// A decay per channel is part of the products: queries carry the factors from the chunk's start, keys those to its end.
// Inside of a chunk, for keys of its first block of 16 tokens and queries of its second, both sides are taken from the
// second block's start, so that they are matrix products too; pairs inside of a block are summed one by one. A decay
// that is no one per channel is the same on every channel here. No log factor is a difference of sums.
#pragma once

#include "../common/elements.cuh"
#include "sm80.cuh"
#include "walk.cuh"

namespace pykernels::cuda::linear {

constexpr int kBlock = 16;  // tokens of half a chunk
constexpr int kPanel = 64;  // channels or values at a time of the kernels inside of a chunk
static_assert(2 * kBlock == kChunk && 2 * kPanel == kThreads);

// ---- Products of fp32 -----------------------------------------------------------------------------------------------

// x = high + low / kLowScale to 22 bits. The scale keeps what high leaves of a small x.
constexpr float kLowScale = 4096.0f;

// tf32 has fewer denormals than fp32. Operands of which no element is above kSmall are raised by kRaise, which loses
// nothing, and their product is lowered again.
constexpr float kRaise = 0x1p60f, kSmall = 0x1p-60f;
__device__ __forceinline__ float raise(bool large) { return large ? 1.0f : kRaise; }

// An operand's registers: 4 of a, 2 of b.
template <int kCount>
struct Parts {
  uint32_t high[kCount], low[kCount];

  __device__ __forceinline__ void set(int i, float x) {
    high[i] = ptx::to_tf32(x);
    low[i] = ptx::to_tf32((x - __uint_as_float(high[i])) * kLowScale);
  }
};

// An accumulator [16, 8]. The matrix units truncate as they add, so that it takes few products before it is added, with
// rounding, to what else there is.
struct Product {
  float high[4] = {}, low[4] = {};

  // += a b; a part that is not asked for is taken for nothing, as is the product of both low ones.
  __device__ __forceinline__ void add(const Parts<4>& a, const Parts<2>& b, bool low_a, bool low_b) {
    if (low_a) ptx::mma_m16n8k8_tf32(low, a.low, b.high, low);
    if (low_b) ptx::mma_m16n8k8_tf32(low, a.high, b.low, low);
    ptx::mma_m16n8k8_tf32(high, a.high, b.high, high);
  }
  // That too, for sums over few and few products.
  __device__ __forceinline__ void add_all(const Parts<4>& a, const Parts<2>& b) {
    uint32_t unscaled[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) unscaled[i] = __float_as_uint(__uint_as_float(b.low[i]) * (1.0f / kLowScale));
    ptx::mma_m16n8k8_tf32(low, a.low, unscaled, low);
    add(a, b, true, true);
  }
  __device__ __forceinline__ float sum(int i, float raised) const {
    return fmaf(low[i], 1.0f / kLowScale, high[i]) * (1.0f / raised);
  }
};

// fp32 in shared memory; with 8 columns more neither rows nor columns of a fragment meet in a bank.
template <int kCols_, int kPadding = 8>
struct FloatTile {
  static constexpr int kCols = kCols_, kPitch = kCols + kPadding, kElements = kChunk * kPitch;
  static constexpr unsigned kAlignment = 16, kBytes = kElements * sizeof(float);
  float* data;
  __device__ __forceinline__ float* at(int row, int column) const { return data + row * kPitch + column; }
};
using PanelTile = FloatTile<kPanel>;
using PairTile = FloatTile<kChunk, 4>;  // [query, key] or [x, y]

// Operands whose inner axis lies along rows of the tile: a[m][k] = tile[row0 + m][col0 + k], b[k][n] = tile[row0 + n]
// [col0 + k], `raised` times. It is taken in the order in which lanes load pairs, that of accumulators: columns 2t and
// 2t + 1 stand for t and t + 4.
template <class Tile>
__device__ __forceinline__ Parts<4> a_by_rows(const Tile& tile, int row0, int col0, float raised) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Parts<4> a;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 pair = *reinterpret_cast<const float2*>(tile.at(row0 + g + 8 * i, col0 + 2 * t));
    a.set(i, pair.x * raised), a.set(i + 2, pair.y * raised);
  }
  return a;
}
template <class Tile>
__device__ __forceinline__ Parts<2> b_by_rows(const Tile& tile, int row0, int col0, float raised) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float2 pair = *reinterpret_cast<const float2*>(tile.at(row0 + g, col0 + 2 * t));
  Parts<2> b;
  b.set(0, pair.x * raised), b.set(1, pair.y * raised);
  return b;
}
// In order: a[m][k] = tile[row0 + m][col0 + k], or of its transpose (a[m][k] = tile[row0 + k][col0 + m]); b[k][n] =
// tile[row0 + k][col0 + n].
template <bool kTransposed, class Tile>
__device__ __forceinline__ Parts<4> a_in_order(const Tile& tile, int row0, int col0, float raised) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Parts<4> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = g + 8 * (i % 2), k = t + 4 * (i / 2);
    a.set(i, (kTransposed ? *tile.at(row0 + k, col0 + m) : *tile.at(row0 + m, col0 + k)) * raised);
  }
  return a;
}
template <class Tile>
__device__ __forceinline__ Parts<2> b_in_order(const Tile& tile, int row0, int col0, float raised) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Parts<2> b;
#pragma unroll
  for (int i = 0; i < 2; ++i) b.set(i, *tile.at(row0 + t + 4 * i, col0 + g) * raised);
  return b;
}

// ---- Loads ----------------------------------------------------------------------------------------------------------

// Four neighbours of a row, `left` of which exist.
template <class T>
__device__ __forceinline__ void load_four(float (&x)[4], const T* from, int left, bool aligned) {
  if (aligned && left >= 4) {
    Neighbours<4, T>::load(x, from);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = e < left ? widen(from[e]) : 0.0f;
  }
}

// Where the rows of a chunk lie in what is contiguous over [B, T, H].
struct ChunkRows {
  int64_t first, step;
  __device__ __forceinline__ int64_t operator()(int token) const { return first + token * step; }
  // A column of what has `columns` of them, from a token on.
  __device__ __forceinline__ ChunkRows times(int64_t columns, int token, int column) const {
    return {(*this)(token) * columns + column, step * columns};
  }
};
__device__ __forceinline__ ChunkRows rows_of_chunk(const Call& call, const Segment& segment, int64_t head, int at) {
  const int64_t token = segment.batch * call.tokens + segment.origin + int64_t{at} * segment.step;
  return {token * call.heads + head, segment.step * call.heads};
}

// Columns [column0, columns) of the n tokens from time `at` on, times their factors [B, T, H, channels] (null: 1; one
// channel stands for all columns); the rest of the tile becomes zero. -> whether this thread saw a large one.
template <class Tile>
__device__ __forceinline__ bool load_wide(const Tile& tile, const Operand& operand, DType dtype, const Segment& segment,
                                          int64_t head, const ChunkRows& rows, int at, int n, int column0, int columns,
                                          const float* factors, int64_t channels) {
  constexpr int kFours = Tile::kCols / 4;
  const int64_t stride = operand.stride.token * segment.step;
  bool large = false;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kFours; i += kThreads) {
    const int row = i / kFours, column = 4 * (i % kFours), left = row < n ? columns - column0 - column : 0;
    float x[4] = {};
    if (left > 0) {
      const int64_t offset = (at + row) * stride + column0 + column;
      if (operand.source == Source::kOnes)
        x[0] = 1.0f;
      else if (operand.source == Source::kColumn)
        x[0] = operand.start<float>(segment, head)[(at + row) * stride];
      else if (dtype == DType::kFloat32)
        load_four(x, operand.start<float>(segment, head) + offset, left, operand.aligned);
      else if (dtype == DType::kBFloat16)
        load_four(x, operand.start<BFloat16>(segment, head) + offset, left, operand.aligned);
      else
        load_four(x, operand.start<Float16>(segment, head) + offset, left, operand.aligned);
      if (factors != nullptr) {
        const float* const factor = factors + rows(row) * channels;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e < left) x[e] *= factor[channels == 1 ? 0 : column0 + column + e];
      }
    }
    *reinterpret_cast<float4*>(tile.at(row, column)) = make_float4(x[0], x[1], x[2], x[3]);
#pragma unroll
    for (int e = 0; e < 4; ++e) large |= fabsf(x[e]) > kSmall;
  }
  return large;
}

__device__ __forceinline__ void store_wide(void* to, DType dtype, int64_t at, float x) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(to)[at] = x;
  else if (dtype == DType::kBFloat16)
    static_cast<BFloat16*>(to)[at] = narrow<BFloat16>(x);
  else
    static_cast<Float16*>(to)[at] = narrow<Float16>(x);
}

// ---- The walk -------------------------------------------------------------------------------------------------------

template <int kInner_, bool kExact_>
struct WideConfig {
  static constexpr int kInner = kInner_;
  static constexpr bool kExact = kExact_;  // fp32; else 16-bit operands, for which the high parts are enough
  using InnerTile = FloatTile<kInner>;
  using ColumnTile = FloatTile<kColumns>;
  static constexpr int kBlocks = 2;  // of a multiprocessor, as many as their registers allow
  static constexpr unsigned kSharedBytes =
      2 * InnerTile::kBytes + ColumnTile::kBytes + PairTile::kBytes + kInner * sizeof(float) + 4 * sizeof(int);
};

// See walk.cuh. One stage of shared memory: a and b [kChunk, inner] and c [kChunk, kColumns], a and b (transposed: c)
// with their factors; the scores; factors of the chunk for the state. Barriers: the stage is no longer read; it is
// there.
template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kBlocks)
    linear_attention_wide_walk_sm80_kernel(const __grid_constant__ Walk w) {
  constexpr int kInner = Config::kInner;
  constexpr bool kExact = Config::kExact;
  const Call& call = w.call;
  const int64_t head = blockIdx.x % call.heads, slot = blockIdx.x / call.heads;
  Segment segment;
  if (!locate(call, slot, segment)) return;
  const Span span(w, segment);
  const bool with_result = w.result != nullptr;
  if (!with_result && span.final) return;

  SharedMemory shared;
  const auto a_tile = take_tile<typename Config::InnerTile>(shared);
  const auto b_tile = take_tile<typename Config::InnerTile>(shared);
  const auto c_tile = take_tile<typename Config::ColumnTile>(shared);
  const auto score_tile = take_tile<PairTile>(shared);
  // Of the inner axis, transposed: of the block's columns. Read in pairs.
  float* const chunk_factors = shared.take<float>(kInner, alignof(float2));
  int* const large = shared.take<int>(4);  // whether a, b, c, scores had large elements, in this chunk or one before
  if (threadIdx.x < 4) large[threadIdx.x] = !kExact;

  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int inner = static_cast<int>(w.inner), columns = static_cast<int>(w.columns);
  const int slice = static_cast<int>(blockIdx.y) * kColumns, warp_column = slice + 16 * warp;
  const bool active = warp_column < columns;
  const int64_t channels = w.channels;

  float state[kInner / 8][4];
  const StatePlace place(w, warp_column);
  begin_state<kInner>(state, place, w, segment, span, slot, head, with_result);

#pragma unroll 1
  for (int step = 0; step < span.chunks; ++step) {
    const int index = w.descending ? span.chunks - 1 - step : step;  // of the chunk in the segment
    const int at = span.begin + index * kChunk, n_tokens = min(kChunk, segment.length - at);
    const int64_t chunk = (slot * kChunksPerSegment + index) * call.heads + head;
    const ChunkRows rows = rows_of_chunk(call, segment, head, at);
    __syncthreads();
    if (with_result && load_wide(a_tile, w.a, w.dtype, segment, head, rows, at, n_tokens, 0, inner,
                                 w.transposed ? nullptr : w.x_factors, channels))
      large[0] = 1;
    if (load_wide(b_tile, w.b, w.dtype, segment, head, rows, at, n_tokens, 0, inner,
                  w.transposed ? nullptr : w.y_factors, channels))
      large[1] = 1;
    if (load_wide(c_tile, w.c, w.dtype, segment, head, rows, at, n_tokens, slice, columns,
                  w.transposed ? w.y_factors : nullptr, channels))
      large[2] = 1;
    if (w.scores != nullptr) {
#pragma unroll 2
      for (int i = static_cast<int>(threadIdx.x); i < kChunk * kChunk; i += kThreads) {
        const int query = i / kChunk, key = i % kChunk;
        const float score = query < n_tokens ? w.scores[rows(query) * kChunk + key] : 0.0f;
        *(w.descending ? score_tile.at(key, query) : score_tile.at(query, key)) = score;
        if (fabsf(score) > kSmall) large[3] = 1;
      }
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (w.transposed ? kColumns : kInner); i += kThreads) {
      const int channel = w.transposed ? slice + i : i, count = w.transposed ? columns : inner;
      chunk_factors[i] = channel < count ? expf(w.totals[chunk * channels + (channels == 1 ? 0 : channel)]) : 0.0f;
    }
    __syncthreads();
    if (!active) continue;
    const float raised_b = kExact ? raise(large[1]) : 1.0f, raised_c = kExact ? raise(large[2]) : 1.0f;

    if (with_result) {
      float raised_a = 1.0f, raised_state = 1.0f, raised_scores = 1.0f;
      if constexpr (kExact) {
        float largest = 0.0f;
#pragma unroll
        for (int n = 0; n < kInner / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(state[n][i]));
        raised_a = raise(large[0]), raised_scores = raise(large[3]);
        raised_state = raise(__any_sync(~0u, largest > kSmall));
      }
      float out[2][2][4] = {};  // 16-row blocks, 8-column blocks
#pragma unroll
      for (int d = 0; d < kInner / 32; ++d)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Product product[2];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = 4 * d + i;
            const Parts<4> a = a_by_rows(a_tile, 16 * m, 8 * n, raised_a);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              Parts<2> b;
              b.set(0, state[n][2 * half] * raised_state), b.set(1, state[n][2 * half + 1] * raised_state);
              // Gradients of the decay sum over all of the state.
              product[half].add(a, b, kExact, kExact || w.transposed);
            }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[m][half][i] += product[half].sum(i, raised_a * raised_state);
        }
      if (w.transposed) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = 16 * m + g + 8 * (i / 2), column = warp_column + 8 * n + 2 * t + i % 2;
              if (row < n_tokens && column < columns)
                out[m][n][i] *= w.x_factors[rows(row) * channels + (channels == 1 ? 0 : column)];
            }
      }
      if (w.scores != nullptr) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Product product[2];
#pragma unroll
          for (int y = 0; y < kChunk / 8; ++y) {
            if (w.descending ? y / 2 < m : y / 2 > m) continue;
            const Parts<4> a = a_in_order<false>(score_tile, 16 * m, 8 * y, raised_scores);
#pragma unroll
            for (int n = 0; n < 2; ++n)
              product[n].add(a, b_in_order(c_tile, 8 * y, 16 * warp + 8 * n, raised_c), kExact, kExact);
          }
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[m][n][i] += product[n].sum(i, raised_scores * raised_c);
        }
      }
      if (w.chunk_states != nullptr) {
        float4* const kept = chunk_state<kInner>(w, chunk, warp_column);
        if (w.descending) {
          float sum[2] = {};  // of columns g and g + 8
#pragma unroll
          for (int n = 0; n < kInner / 8; ++n) {
            const float4 other = kept[32 * n];
            sum[0] = fmaf(other.x, state[n][0], sum[0]), sum[0] = fmaf(other.y, state[n][1], sum[0]);
            sum[1] = fmaf(other.z, state[n][2], sum[1]), sum[1] = fmaf(other.w, state[n][3], sum[1]);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[i] = warp_reduce<4>(sum[i], Sum());
            const int column = warp_column + g + 8 * i;
            float* const to = w.crossing + chunk * columns + column;
            if (t == 0 && column < columns) *to = w.added ? *to + sum[i] : sum[i];
          }
        } else {
          keep_chunk_state<kInner>(kept, state);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + g + 8 * half;
          if (row >= n_tokens) continue;
          const float inverse = w.divisor != nullptr ? 1.0f / w.divisor[rows(row)] : 1.0f;
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = warp_column + 8 * n + 2 * t + e;
              if (column >= columns) continue;
              const int64_t to = rows(row) * columns + column;
              float x = fmaf(out[m][n][2 * half + e], inverse, w.epsilon);
              if (w.added) x += static_cast<const float*>(w.result)[to];
              store_wide(w.result, w.wide ? DType::kFloat32 : w.dtype, to, x);
            }
        }
    }

    // The state after the chunk: c^T with b. Of 16-bit operands the one without factors has no low part.
    Parts<4> c[kChunk / 8];
#pragma unroll
    for (int y = 0; y < kChunk / 8; ++y) c[y] = a_in_order<true>(c_tile, 8 * y, 16 * warp, raised_c);
#pragma unroll
    for (int n = 0; n < kInner / 8; ++n) {
      Product product;
#pragma unroll
      for (int y = 0; y < kChunk / 8; ++y)
        product.add(c[y], b_in_order(b_tile, 8 * y, 8 * n, raised_b), kExact || w.transposed, kExact || !w.transposed);
      const float2 by_inner = *reinterpret_cast<const float2*>(chunk_factors + 8 * n + 2 * t);
      const float by_column[2] = {chunk_factors[16 * warp + g], chunk_factors[16 * warp + g + 8]};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = w.transposed ? by_column[i / 2] : i % 2 == 0 ? by_inner.x : by_inner.y;
        state[n][i] = fmaf(state[n][i], factor, product.sum(i, raised_b * raised_c));
      }
    }
  }

  if (!with_result && blockIdx.y == 0) {
    const int64_t next = (slot + (w.descending ? -1 : 1)) * call.heads + head;
    for (int64_t channel = threadIdx.x; channel < channels; channel += kThreads) {
      float log_factor = 0.0f;
      for (int i = 0; i < span.chunks; ++i)
        log_factor += w.totals[((slot * kChunksPerSegment + i) * call.heads + head) * channels + channel];
      w.factors[next * channels + channel] = expf(log_factor);
    }
  }
  if (active) end_state<kInner>(state, place, w, segment, span, slot, head, with_result);
}

template <class Config>
const char* launch_wide_walk_sm80(const Walk& w, cudaStream_t stream) {
  return launch_walk(linear_attention_wide_walk_sm80_kernel<Config>, w, Config::kSharedBytes, stream);
}

template <int kInner>
const char* choose_wide_walk_sm80(const Walk& w, cudaStream_t stream) {
  return w.dtype == DType::kFloat32 ? launch_wide_walk_sm80<WideConfig<kInner, true>>(w, stream)
                                    : launch_wide_walk_sm80<WideConfig<kInner, false>>(w, stream);
}

// Each defined in a file of its own, so that they compile side by side.
const char* wide_walk_sm80_64(const Walk& w, cudaStream_t stream);
const char* wide_walk_sm80_128(const Walk& w, cudaStream_t stream);
const char* wide_walk_sm80_256(const Walk& w, cudaStream_t stream);

// ---- Inside of a chunk ----------------------------------------------------------------------------------------------

// What the kernels for the pairs inside of chunks read.
struct WideChunks {
  Call call;
  Operand q, k;
  DType dtype;
  int64_t key_dim, channels;
  const float* denominator;  // [B, T, H] divides queries; or null

  int64_t blocks() const { return call.segments() * kChunksPerSegment * call.heads; }
};

// Makes what the walks read, see Walk.
struct WideScores {
  WideChunks chunks;
  float* query_factors;
  float* key_factors;
  float* totals;
  float* scores;
};

// Adds up the gradients of q, k and decay: from the pairs inside of chunks and what the walks left.
struct WideGradients {
  WideChunks chunks;
  Operand v, dout;
  int64_t value_dim;
  const float* extra;      // [B, T, H], with normalize: the gradient of the denominator, times it
  const float* dq_states;  // [B, T, H, K]: the states' part
  const float* dk_states;
  const float* crossing;  // see Walk
  const float* totals;
  void* dq;
  void* dk;
  DType gradient_dtype;  // of dq and dk
  float* ddecay;         // [B, T, H, channels] or null
  float* dbonus;         // [chunks, H, K], with a bonus
  float* dbonus_sums;    // [segments, H, K]
};

const char* wide_scores_sm80(const WideScores& p, cudaStream_t stream);
const char* wide_gradients_sm80(const WideGradients& p, cudaStream_t stream);

}  // namespace pykernels::cuda::linear
