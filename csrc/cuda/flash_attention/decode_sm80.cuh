// Decoding against a key/value cache for sm_80 and newer: bound by the bandwidth of the cache, so what counts is that
// every multiprocessor reads all the time and that keys are read once for all query heads that share them.
//
// The rows of a block are the queries of one key head, all its query heads side by side: row r is query r / group of
// head r % group. The keys that the rows see are cut into `splits` pieces of whole tiles, one for each block; a second
// kernel combines the pieces. The number of splits follows from shapes alone, the length of a piece from the cache's
// length on the device, so nothing waits for the host, and the sums have one fixed order.
//
// kWarpsN warps share a block's rows and take turns of 16 keys (few rows: one token), or each of kWarpsM warps owns 16
// rows and all keys (drafts, prompts), or kWarpsV warps share rows and keys, of which each computes the scores and sums
// its part of the values' columns (large heads). The step is that of the forward kernel; at the end the warps' pieces
// are combined in shared memory.
// Of a paged cache the threads look up, during each step, the pages of the rows that are copied in the next but one.
// Shared memory: Q [kM, kHead]; K, V, two stages each [kN, kHead or kValue], later the warps' outputs in fp32 [kWarpsN,
// kM, kValue]; the warps' maxima and sums [kWarpsN, kM, 2]; of a paged cache where rows lie [2][kN].
#pragma once

#include "sm80.cuh"

namespace pykernels::cuda::attention {

// Where a row of a paged cache lies.
struct PagedRow {
  int page, token;
};

template <class T_, int kHead_, int kValue_, int kWarpsM_, int kWarpsN_, int kWarpsV_, int kN_>
struct DecodeConfig {
  using T = T_;
  static constexpr int kHead = kHead_, kValue = kValue_, kN = kN_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsV = kWarpsV_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsV, kM = 16 * kWarpsM;
  static constexpr int kKeys = kN / kWarpsN, kColumns = kValue / kWarpsV;  // of a tile, for each warp
  using QTile = SharedTile<T, kM, kHead>;
  using KTile = SharedTile<T, kN, kHead>;
  using VTile = SharedTile<T, kN, kValue>;
  static constexpr unsigned kCacheBytes = 2 * KTile::kBytes + 2 * VTile::kBytes;
  // With what a paged cache alone takes: all launches of a kernel have the same shared memory, see LaunchConfig.
  static constexpr unsigned kSharedBytes = QTile::kBytes + kCacheBytes +
                                           2 * kWarpsN * kM * static_cast<unsigned>(sizeof(float)) +
                                           2 * kN * static_cast<unsigned>(sizeof(PagedRow));
  static_assert(kWarpsN * kM * kValue * sizeof(float) <= kCacheBytes && KTile::kBytes % VTile::kAlignment == 0);
  static_assert(kN <= kThreads);
};

// One token, or a few, of heads that share keys; more rows than that.
template <class T, int kHead>
using DecodeFew = DecodeConfig<T, kHead, kHead, 1, kHead <= 128 ? 4 : 2, 1, kHead <= 128 ? 64 : 32>;
template <class T, int kHead>
using DecodeMany = DecodeConfig<T, kHead, kHead, 4, 1, 1, 32>;
// Any number of them, of heads of more than 256.
template <class T>
using DecodeLarge = DecodeConfig<T, 576, 512, 1, 1, 4, 16>;

// Rows of one key head: the queries of all its query heads.
inline int64_t decode_rows(const FlashAttentionDecodeParams& p) {
  return p.forward.seqlen_q * (p.forward.heads_q / p.forward.heads_k);
}
inline bool decode_large(const FlashAttentionDecodeParams& p) {
  return std::max(p.forward.head_dim, p.forward.value_dim) > 256;
}

// The scratch memory: for each split out [B, Tq, Hq, V], then for each split lse [B, Hq, Tq]; fp32.
inline int64_t decode_scratch_floats(const FlashAttentionParams& f, int64_t splits) {
  return splits == 1 ? 0 : splits * f.batch * f.seqlen_q * f.heads_q * (f.value_dim + 1);
}
__device__ __forceinline__ float* decode_partial_out(const FlashAttentionDecodeParams& p, int64_t split) {
  const FlashAttentionParams& f = p.forward;
  return static_cast<float*>(p.scratch) + split * f.batch * f.seqlen_q * f.heads_q * f.value_dim;
}
__device__ __forceinline__ float* decode_partial_lse(const FlashAttentionDecodeParams& p, int64_t split) {
  const FlashAttentionParams& f = p.forward;
  return decode_partial_out(p, p.splits) + split * f.batch * f.seqlen_q * f.heads_q;
}

// As many splits as give each multiprocessor three blocks, of 128 keys or more if the cache is full; from shapes
// alone.
inline int64_t decode_splits(const FlashAttentionDecodeParams& p) {
  const FlashAttentionParams& f = p.forward;
  const int64_t rows = decode_rows(p), in_tile = rows <= 16 || decode_large(p) ? 16 : 64;
  const int64_t row_tiles = (rows + in_tile - 1) / in_tile;
  const int64_t blocks = std::max<int64_t>(1, f.batch * f.heads_k * row_tiles);
  const int64_t wanted = (3 * multiprocessors() + blocks - 1) / blocks, most = (f.seqlen_k + 127) / 128;
  return std::max<int64_t>(1, std::min(wanted, most));
}

// The query and the head of a row, within the queries of one key head.
struct DecodeRow {
  int query, head;
  __device__ __forceinline__ DecodeRow(int row, int group) : query(row / group), head(row % group) {}
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    flash_attention_decode_sm80_kernel(const __grid_constant__ FlashAttentionDecodeParams p, const Alignment aligned,
                                       const int row_tiles) {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  using VTile = typename Config::VTile;
  constexpr int kHead = Config::kHead, kN = Config::kN, kM = Config::kM, kKeys = Config::kKeys,
                kColumns = Config::kColumns, kThreads = Config::kThreads, kWarpsN = Config::kWarpsN;
  const FlashAttentionParams& f = p.forward;
  const int splits = static_cast<int>(p.splits), split = static_cast<int>(blockIdx.x) % splits;
  const int64_t rest = blockIdx.x / p.splits;
  const int row0 = static_cast<int>(rest % row_tiles) * kM;
  const int64_t head_k = rest / row_tiles % f.heads_k, batch = rest / row_tiles / f.heads_k;
  const int group = static_cast<int>(f.heads_q / f.heads_k), tq = static_cast<int>(f.seqlen_q);
  const int rows = min(kM, tq * group - row0);

  SharedMemory shared;
  const auto q_tile = take_tile<QTile>(shared);
  T* const cache = shared.take<T>(Config::kCacheBytes / sizeof(T), KTile::kAlignment);
  const KTile k_even{cache}, k_odd{cache + KTile::kElements};
  const VTile v_even{cache + 2 * KTile::kElements}, v_odd{v_even.data + VTile::kElements};
  float* const statistics = shared.take<float>(2 * kWarpsN * kM);
  const bool paged = f.block_table != nullptr;
  PagedRow* const where = paged ? shared.take<PagedRow>(2 * kN) : nullptr;

  // The keys that any of the rows sees, and this split's part of their tiles.
  const int64_t length64 = p.cache_seqlens[batch] + p.new_tokens;
  const int length = static_cast<int>(length64 < 0 ? 0 : length64 > f.seqlen_k ? f.seqlen_k : length64);
  const Sequence sequence{static_cast<int>(batch), static_cast<int>(batch), 0, 0, tq, length};
  const Band band(f, sequence);
  const int keys_begin = max(0, row0 / group + band.below);
  const int keys_end = min(length, (row0 + rows - 1) / group + 1 + band.above);
  const int tiles_begin = keys_begin / kN, tiles_end = keys_end <= 0 ? 0 : (keys_end + kN - 1) / kN;
  const int tiles = max(0, tiles_end - tiles_begin), share = (tiles + splits - 1) / splits;
  const int steps_begin = tiles_begin + min(tiles, split * share),
            steps_end = tiles_begin + min(tiles, (split + 1) * share);

  const auto* k = static_cast<const T*>(f.k) + (paged ? 0 : batch * f.k_stride.batch) + head_k * f.k_stride.head;
  const auto* v = static_cast<const T*>(f.v) + (paged ? 0 : batch * f.v_stride.batch) + head_k * f.v_stride.head;
  const int head_dim = static_cast<int>(f.head_dim), value_dim = static_cast<int>(f.value_dim);
  // The row of a step's tile that is this thread's to look up, its page and its place in there. Behind the last key
  // that key's, which is not copied.
  const bool finds = paged && threadIdx.x < kN;
  const int page_size = static_cast<int>(f.page_size);
  const auto token_of = [&](int step) { return min(step * kN + static_cast<int>(threadIdx.x), length - 1); };
  const auto page_of = [&](int step) {
    const int page = f.block_table[batch * f.block_table_stride + token_of(step) / page_size];
    return max(0, min(page, static_cast<int>(f.pages) - 1));
  };
  const auto note = [&](int step, int page) {
    where[step % 2 * kN + threadIdx.x] = {page, token_of(step) % page_size};
  };
  const auto load_stage = [&](int step) {
    if (step < steps_end) {
      const int n0 = step * kN;
      const auto k_now = stage(step, k_even, k_odd);
      const auto v_now = stage(step, v_even, v_odd);
      if (paged) {
        const auto offset = [&](const Strides3& stride) {
          return [&, at = where + step % 2 * kN](int row) {
            return at[row].page * stride.batch + at[row].token * stride.token;
          };
        };
        load_rows<kThreads>(k_now, k, offset(f.k_stride), length - n0, head_dim, aligned.k);
        load_rows<kThreads>(v_now, v, offset(f.v_stride), length - n0, value_dim, aligned.v);
      } else {
        load_tile<kThreads>(k_now, k + n0 * f.k_stride.token, f.k_stride.token, length - n0, head_dim, aligned.k);
        load_tile<kThreads>(v_now, v + n0 * f.v_stride.token, f.v_stride.token, length - n0, value_dim, aligned.v);
      }
    }
    ptx::cp_async_commit();
  };

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp / (kWarpsN * Config::kWarpsV) * 16, warp_n = warp % kWarpsN, warp_key = warp_n * kKeys;
  const int warp_v = warp / kWarpsN % Config::kWarpsV, warp_column = warp_v * kColumns;
  const Scores scores(f);
  float o[kColumns / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
  const int query[2] = {DecodeRow(row0 + warp_row + g, group).query, DecodeRow(row0 + warp_row + g + 8, group).query};

  if (steps_begin < steps_end) {
    if (paged) {
      for (int step = steps_begin; finds && step < min(steps_begin + 2, steps_end); ++step) note(step, page_of(step));
      __syncthreads();
    }
    load_stage(steps_begin);
    for (int i = static_cast<int>(threadIdx.x); i < kM * QTile::kChunks; i += kThreads) {
      const int row = i / QTile::kChunks, chunk = i % QTile::kChunks;
      const DecodeRow at(row0 + row, group);
      const auto* from = static_cast<const T*>(f.q) + batch * f.q_stride.batch + at.query * f.q_stride.token +
                         (head_k * group + at.head) * f.q_stride.head + chunk * 8;
      T* to = q_tile.at(row, chunk);
      if (aligned.q && row < rows && chunk * 8 + 8 <= head_dim) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = row < rows && chunk * 8 + e < head_dim ? from[e] : T{};
      }
    }
  }
#pragma unroll 1
  for (int step = steps_begin; step < steps_end; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_stage(step + 1);
    const bool finds_next = f.block_table != nullptr && threadIdx.x < kN && step + 2 < steps_end;
    const int next_page = finds_next ? page_of(step + 2) : 0;  // arrives while the scores are computed
    const KTile k_now = stage(step, k_even, k_odd);
    const VTile v_now = stage(step, v_even, v_odd);
    const int n0 = step * kN + warp_key;

    float s[kKeys / 8][4] = {};  // S = Q K^T
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
      uint32_t a[4];
      load_a(a, q_tile, warp_row, 16 * d);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[2][2];
        load_b(b, k_now, warp_key + 16 * n, 16 * d);
        ptx::mma_m16n8k16<T>(s[2 * n], a, b[0], s[2 * n]);
        ptx::mma_m16n8k16<T>(s[2 * n + 1], a, b[1], s[2 * n + 1]);
      }
    }
    if (!scores.plain()) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = scores.transform(s[n][i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8: S becomes P
      float largest = row_max[half];
      if (f.alibi_slopes != nullptr) {
        const int row = row0 + warp_row + g + 8 * half;
        const float slope = scores.slope(f, sequence, head_k * group + DecodeRow(row, group).head);
        const auto distance = static_cast<float>(n0 + 2 * t - (query[half] + length - tq));
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i)
            s[n][i] -= slope * fabsf(distance + static_cast<float>(8 * n + i % 2));
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int key = n0 + 8 * n + 2 * t + i % 2;
          if (key < query[half] + band.below || key > query[half] + band.above || key >= length) s[n][i] = -INFINITY;
          largest = fmaxf(largest, s[n][i]);
        }
      largest = warp_reduce<4>(largest, Max());
      // A row that has seen nothing yet: any finite shift gives zeros.
      const float shift = largest == -INFINITY ? 0.0f : largest * scores.factor;
      const float rescale = ptx::exp2(row_max[half] * scores.factor - shift);
      row_max[half] = largest;
      row_sum[half] *= rescale;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = ptx::exp2(fmaf(s[n][i], scores.factor, -shift));
          row_sum[half] += s[n][i];
        }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) o[n][2 * half] *= rescale, o[n][2 * half + 1] *= rescale;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {  // O += P V
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = ptx::pack<T>(s[2 * n + i / 2][2 * (i % 2)], s[2 * n + i / 2][2 * (i % 2) + 1]);
#pragma unroll
      for (int d = 0; d < kColumns / 16; ++d) {
        uint32_t b[2][2];
        load_b_trans(b, v_now, warp_key + 16 * n, warp_column + 16 * d);
        ptx::mma_m16n8k16<T>(o[2 * d], a, b[0], o[2 * d]);
        ptx::mma_m16n8k16<T>(o[2 * d + 1], a, b[1], o[2 * d + 1]);
      }
    }
    if (finds_next) note(step + 2, next_page);
  }

  // The warps' pieces, relative to the row's maximum over all of them.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row_sum[half] = warp_reduce<4>(row_sum[half], Sum());
    float* mine = statistics + 2 * (warp_n * kM + warp_row + g + 8 * half);
    if (t == 0 && warp_v == 0) mine[0] = row_max[half], mine[1] = row_sum[half];
  }
  __syncthreads();  // and nobody reads K or V any more
  auto* const outputs = reinterpret_cast<float*>(cache);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + g + 8 * half;
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kWarpsN; ++n) largest = fmaxf(largest, statistics[2 * (n * kM + row)]);
    const float shift = largest == -INFINITY ? 0.0f : largest * scores.factor;
#pragma unroll
    for (int n = 0; n < kWarpsN; ++n)
      sum += statistics[2 * (n * kM + row) + 1] * ptx::exp2(statistics[2 * (n * kM + row)] * scores.factor - shift);
    const DecodeRow at(row0 + row, group);
    const int64_t head = head_k * group + at.head;
    // The combination of the splits adds the sink.
    const RowEnd end(largest * scores.factor, sum, p.splits == 1 ? sink_log2(f, head) : -INFINITY);
    const float factor = ptx::exp2(row_max[half] * scores.factor - shift) * end.inverse;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
      *reinterpret_cast<float2*>(outputs + (warp_n * kM + row) * Config::kValue + warp_column + 8 * n + 2 * t) =
          make_float2(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
    if (warp_n == 0 && warp_v == 0 && t == 0 && row < rows) {
      float* lse = p.splits == 1 ? static_cast<float*>(f.lse) : decode_partial_lse(p, split);
      lse[(batch * f.heads_q + head) * f.seqlen_q + at.query] = end.lse;
    }
  }
  __syncthreads();
  // A split without keys has no part in the combination.
  if (p.splits > 1 && steps_begin >= steps_end) return;
  constexpr int kValue = Config::kValue;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kValue; i += kThreads) {
    const int row = i / kValue, column = i % kValue;
    if (column >= value_dim) continue;
    float sum = outputs[row * kValue + column];
#pragma unroll
    for (int n = 1; n < kWarpsN; ++n) sum += outputs[(n * kM + row) * kValue + column];
    const DecodeRow at(row0 + row, group);
    const int64_t head = head_k * group + at.head;
    if (p.splits == 1)
      static_cast<T*>(f.out)[batch * f.out_stride.batch + at.query * f.out_stride.token + head * f.out_stride.head +
                             column] = {static_cast<uint16_t>(ptx::pack<T>(sum, 0.0f))};
    else
      decode_partial_out(p, split)[((batch * f.seqlen_q + at.query) * f.heads_q + head) * value_dim + column] = sum;
  }
}

// out = sum over splits of e^(lse_s - lse) out_s, lse that of all of them and the sink; one warp for each query and
// head, always in the order of the splits.
template <class T>
__global__ void __launch_bounds__(128)
    flash_attention_decode_combine_sm80_kernel(const __grid_constant__ FlashAttentionDecodeParams p) {
  const FlashAttentionParams& f = p.forward;
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;  // [batch][query][head]
  if (row >= f.batch * f.seqlen_q * f.heads_q) return;
  const int64_t head = row % f.heads_q, query = row / f.heads_q % f.seqlen_q, batch = row / f.heads_q / f.seqlen_q;
  const int64_t index = (batch * f.heads_q + head) * f.seqlen_q + query;
  const int lane = threadIdx.x % 32, splits = static_cast<int>(p.splits);
  float largest = -INFINITY;
  for (int s = lane; s < splits; s += 32) largest = fmaxf(largest, decode_partial_lse(p, s)[index]);
  largest = warp_reduce(largest, Max());
  float sum = 0.0f;
  for (int s = lane; s < splits && largest > -INFINITY; s += 32)
    sum += ptx::exp2((decode_partial_lse(p, s)[index] - largest) * kLog2e);
  sum = warp_reduce(sum, Sum());
  const RowEnd end(largest * kLog2e, sum, sink_log2(f, head));
  if (lane == 0) static_cast<float*>(f.lse)[index] = end.lse;
  auto* out = static_cast<T*>(f.out) + batch * f.out_stride.batch + query * f.out_stride.token +
              head * f.out_stride.head;
  for (int64_t column = lane; column < f.value_dim; column += 32) {
    float total = 0.0f;
    for (int s = 0; s < splits; ++s) {
      const float lse = decode_partial_lse(p, s)[index];
      if (lse == -INFINITY) continue;  // its output was not written
      total += ptx::exp2((lse - largest) * kLog2e) * decode_partial_out(p, s)[row * f.value_dim + column];
    }
    out[column] = {static_cast<uint16_t>(ptx::pack<T>(total * end.inverse, 0.0f))};
  }
}

// Copies new tokens into the caches, a Unit at a time.
template <class Unit>
__global__ void __launch_bounds__(256)
    flash_attention_append_sm80_kernel(const __grid_constant__ FlashAttentionAppendParams p) {
  const int64_t per_unit = static_cast<int64_t>(sizeof(Unit)) / p.element_size;
  const int64_t k_units = p.head_dim / per_unit, units = k_units + p.value_dim / per_unit;
  const int64_t total = p.batch * p.new_tokens * p.heads * units;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < total; i += int64_t{gridDim.x} * 256) {
    const int64_t unit = i % units, head = i / units % p.heads, token = i / units / p.heads % p.new_tokens,
                  batch = i / units / p.heads / p.new_tokens;
    int64_t entry = batch, to = p.cache_seqlens[batch] + token;
    if (to < 0 || to >= p.capacity) continue;
    if (p.block_table != nullptr) {
      entry = p.block_table[batch * p.block_table_stride + to / p.page_size], to %= p.page_size;
      if (entry < 0 || entry >= p.pages) continue;
    }
    const bool key = unit < k_units;
    const int64_t column = (key ? unit : unit - k_units) * per_unit;
    const Strides3 &from_stride = key ? p.k_stride : p.v_stride,
                   &to_stride = key ? p.k_cache_stride : p.v_cache_stride;
    const auto* source = static_cast<const unsigned char*>(key ? p.k : p.v);
    auto* target = static_cast<unsigned char*>(key ? p.k_cache : p.v_cache);
    const int64_t from_element =
        batch * from_stride.batch + token * from_stride.token + head * from_stride.head + column;
    const int64_t to_element = entry * to_stride.batch + to * to_stride.token + head * to_stride.head + column;
    *reinterpret_cast<Unit*>(target + to_element * p.element_size) =
        *reinterpret_cast<const Unit*>(source + from_element * p.element_size);
  }
}

template <class Config>
const char* launch_decode_sm80_rows(const FlashAttentionDecodeParams& p, cudaStream_t stream) {
  using T = typename Config::T;
  const FlashAttentionParams& f = p.forward;
  const int64_t rows = f.seqlen_q * (f.heads_q / f.heads_k), row_tiles = (rows + Config::kM - 1) / Config::kM;
  const int64_t blocks = f.batch * f.heads_k * row_tiles * p.splits;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX || rows > INT32_MAX) return "more tiles of queries than a grid has blocks";
  Alignment a{};
  a.q = aligned(f.q, f.q_stride), a.k = aligned(f.k, f.k_stride), a.v = aligned(f.v, f.v_stride);
  if (const char* error = launch(flash_attention_decode_sm80_kernel<Config>,
                                 {dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), Config::kSharedBytes,
                                  stream},
                                 p, a, static_cast<int>(row_tiles)))
    return error;
  if (p.splits == 1) return nullptr;
  const int64_t outputs = f.batch * f.seqlen_q * f.heads_q;
  return launch(flash_attention_decode_combine_sm80_kernel<T>,
                {dim3(static_cast<unsigned>((outputs + 3) / 4)), dim3(128), 0, stream}, p);
}

// Null, or what went wrong.
template <class T, int kHead>
const char* launch_decode_sm80(const FlashAttentionDecodeParams& p, cudaStream_t stream) {
  if constexpr (kHead > 256)
    return launch_decode_sm80_rows<DecodeLarge<T>>(p, stream);
  else
    return decode_rows(p) <= DecodeFew<T, kHead>::kM ? launch_decode_sm80_rows<DecodeFew<T, kHead>>(p, stream)
                                                     : launch_decode_sm80_rows<DecodeMany<T, kHead>>(p, stream);
}

// Each defined in a file of its own, so that they compile side by side.
#define PYKERNELS_DECLARE_DECODE_SM80(head) \
  const char* decode_sm80_##head(const FlashAttentionDecodeParams& p, cudaStream_t stream);
PYKERNELS_DECLARE_DECODE_SM80(64)
PYKERNELS_DECLARE_DECODE_SM80(128)
PYKERNELS_DECLARE_DECODE_SM80(256)
PYKERNELS_DECLARE_DECODE_SM80(576)
#undef PYKERNELS_DECLARE_DECODE_SM80

#define PYKERNELS_DEFINE_DECODE_SM80(head)                                                     \
  namespace pykernels::cuda::attention {                                                       \
  const char* decode_sm80_##head(const FlashAttentionDecodeParams& p, cudaStream_t stream) {   \
    return p.forward.dtype == DType::kBFloat16 ? launch_decode_sm80<BFloat16, head>(p, stream) \
                                               : launch_decode_sm80<Float16, head>(p, stream); \
  }                                                                                            \
  }

}  // namespace pykernels::cuda::attention
