// Flash attention, backward, for sm_80 and newer (mma.sync, cp.async). Deterministic: no atomics.
//
// Two walks over the scores, each recomputing them, instead of one that adds dQ up in global memory: 7 matrix
// products instead of 5, but every gradient is summed in one fixed order, and no fp32 copy of dQ is needed.
//   by query: a block owns kR queries, walks keys:     dQ += dS K
//   by key:   a block owns kR keys, walks queries (of all query heads of its key head):  dK += dS^T Q,  dV += P^T dO
// with P = exp(S - lse), dS = P (dP - delta), dP = dO V^T, delta = rowsum(dO O) - dlse.
//
// Both are the same kernel: rows R1, R2 in shared memory, columns C1, C2 in two stages. In registers X = R1 C1^T
// (the scores, or their transpose), Y = R2 C2^T, and from them the operand of first += dS C1 and second += P C2:
//   by query: R1 = Q, R2 = dO, C1 = K, C2 = V, first = dQ
//   by key:   R1 = K, R2 = V, C1 = Q, C2 = dO, first = dK, second = dV
// Shared memory: R1, later the first output [kR, kHead]; R2, later the second; C1, C2 [2][kC, kHead]; by key lse
// and delta of the columns [2][2][kC], and the slope of their head [2]. One barrier per step, as in the forward kernel.
#pragma once

#include <type_traits>

#include "sm80.cuh"

namespace pykernels::cuda::attention {

template <class T_, int kHead_, bool kByKey_, bool kFirst_, bool kSecond_>
struct BackwardConfig {
  using T = T_;
  static constexpr int kHead = kHead_;
  static constexpr bool kByKey = kByKey_, kFirst = kFirst_, kSecond = kSecond_;  // which of the two outputs
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // Two row tiles of 16 per warp use each fragment of the columns twice, as long as the registers suffice.
  static constexpr int kRTiles = kHead <= (kByKey ? 32 : 64) ? 2 : 1;
  static constexpr int kR = 16 * kRTiles * kWarps;
  static constexpr int kC = kHead <= 192 ? 32 : 16;
  using RTile = SharedTile<T, kR, kHead>;
  using CTile = SharedTile<T, kC, kHead>;
  static constexpr unsigned kSharedBytes =
      (kFirst ? 2 : 1) * RTile::kBytes + 4 * CTile::kBytes + (4 * kC + 2) * sizeof(float);
};

// delta [B, Hq, Tq] = rowsum(dout * out) - dlse; one warp per row. Rows that see nothing get 0: they have no gradient.
template <class T>
__global__ void __launch_bounds__(256)
    flash_attention_bwd_delta_sm80_kernel(const __grid_constant__ FlashAttentionBackwardParams p, float* const delta) {
  const FlashAttentionParams& f = p.forward;
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (row >= f.batch * f.seqlen_q * f.heads_q) return;
  const int64_t head = row % f.heads_q, token = row / f.heads_q % f.seqlen_q, batch = row / f.heads_q / f.seqlen_q;
  const auto* dout = static_cast<const T*>(p.dout) + batch * p.dout_stride.batch + token * p.dout_stride.token +
                     head * p.dout_stride.head;
  const auto* out = static_cast<const T*>(f.out) + batch * f.out_stride.batch + token * f.out_stride.token +
                    head * f.out_stride.head;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < f.value_dim; i += 32) sum += ptx::to_float(dout[i]) * ptx::to_float(out[i]);
  sum = warp_reduce(sum, Sum());
  const int64_t statistic = (batch * f.heads_q + head) * f.seqlen_q + token;
  if (threadIdx.x % 32 == 0) {
    const bool blind = static_cast<const float*>(f.lse)[statistic] == -INFINITY;
    const float dlse = p.dlse == nullptr ? 0.0f : static_cast<const float*>(p.dlse)[statistic];
    delta[statistic] = blind ? 0.0f : sum - dlse;
  }
}

// A sink is a key whose value is zero: its gradient is -sum exp(sink - lse) delta over the rows of its head. One block
// for each head, always in the same order.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    flash_attention_bwd_dsinks_sm80_kernel(const __grid_constant__ FlashAttentionBackwardParams p,
                                           const float* const delta) {
  const FlashAttentionParams& f = p.forward;
  const int64_t head = blockIdx.x;
  const float sink = sink_log2(f, head);
  const auto* lse = static_cast<const float*>(f.lse);
  float sum = 0.0f;
  for (int64_t batch = 0; batch < f.batch; ++batch)
    for (int64_t token = threadIdx.x; token < f.seqlen_q; token += 32 * kWarps) {
      const int64_t statistic = (batch * f.heads_q + head) * f.seqlen_q + token;
      // Tokens of no sequence have neither a sink nor an lse.
      if (lse[statistic] > -INFINITY) sum -= ptx::exp2(fmaf(lse[statistic], -kLog2e, sink)) * delta[statistic];
    }
  SharedMemory shared;
  sum = block_reduce<kWarps>(sum, shared.take<float>(kWarps), Sum());
  if (threadIdx.x == 0) static_cast<float*>(p.dsinks)[head] = sum;
}

// lse in log2 units; infinite for rows that see nothing, whose weights then are 0.
__device__ __forceinline__ float lse_log2(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    flash_attention_bwd_sm80_kernel(const __grid_constant__ FlashAttentionBackwardParams p, const Alignment aligned,
                                    const int64_t tiles) {
  using T = typename Config::T;
  constexpr int kHead = Config::kHead, kR = Config::kR, kC = Config::kC, kRTiles = Config::kRTiles,
                kThreads = Config::kThreads;
  constexpr bool kByKey = Config::kByKey;
  const FlashAttentionParams& f = p.forward;
  const int64_t head = blockIdx.x / tiles, group = f.heads_q / f.heads_k;
  Sequence sequence;
  int row0;
  // The longest first under a causal mask: the last queries, the first keys.
  const int64_t tile = blockIdx.x % tiles;
  if (!locate<kR, kByKey>(f, kByKey ? tile : tiles - 1 - tile, sequence, row0)) return;

  SharedMemory shared;
  const auto r1 = take_tile<typename Config::RTile>(shared);
  const auto r2 = Config::kFirst ? take_tile<typename Config::RTile>(shared) : r1;
  const auto c1_even = take_tile<typename Config::CTile>(shared), c1_odd = take_tile<typename Config::CTile>(shared);
  const auto c2_even = take_tile<typename Config::CTile>(shared), c2_odd = take_tile<typename Config::CTile>(shared);
  float* statistics = shared.take<float>(4 * kC);  // [stage][lse, delta][kC]
  float* slopes = shared.take<float>(2);           // [stage]

  const int head_dim = static_cast<int>(f.head_dim), value_dim = static_cast<int>(f.value_dim);
  // Row 0 of the sequence, for a head of q or of k.
  const auto q_rows = [&](const void* x, const Strides3& stride, int64_t h) {
    return static_cast<const T*>(x) + sequence.batch * stride.batch + sequence.q_first * stride.token +
           h * stride.head;
  };
  const auto k_rows = [&](const void* x, const Strides3& stride, int64_t h) {
    return static_cast<const T*>(x) + sequence.batch * stride.batch + sequence.k_first * stride.token +
           h * stride.head;
  };
  const auto statistic = [&](int64_t h) { return (sequence.batch * f.heads_q + h) * f.seqlen_q + sequence.q_first; };
  const auto* lse = static_cast<const float*>(f.lse);
  const auto* delta = static_cast<const float*>(p.scratch);  // [B, Hq, Tq]

  // The columns that any of the rows meets, tile by tile; by key once for each query head of the group.
  const Band band(f, sequence);
  const int length_r = kByKey ? sequence.tk : sequence.tq, length_c = kByKey ? sequence.tq : sequence.tk;
  const int rows = min(kR, length_r - row0);
  const int c_begin = max(0, kByKey ? row0 - band.above : row0 + band.below) / kC;
  const int c_end = min(length_c, kByKey ? row0 + rows - band.below : row0 + rows + band.above);
  const int c_tiles = c_end <= 0 ? 0 : max(0, (c_end + kC - 1) / kC - c_begin);
  const int steps = c_tiles * (kByKey ? static_cast<int>(group) : 1);

  const Scores scores(f);
  const auto load_stage = [&](int step) {
    if (step < steps) {
      const int col0 = (c_begin + step % c_tiles) * kC;
      const auto c1 = stage(step, c1_even, c1_odd), c2 = stage(step, c2_even, c2_odd);
      if constexpr (kByKey) {
        const int64_t h = head * group + step / c_tiles;
        load_tile<kThreads>(c1, q_rows(f.q, f.q_stride, h) + col0 * f.q_stride.token, f.q_stride.token,
                            length_c - col0, head_dim, aligned.q);
        load_tile<kThreads>(c2, q_rows(p.dout, p.dout_stride, h) + col0 * p.dout_stride.token, p.dout_stride.token,
                            length_c - col0, value_dim, aligned.dout);
        const int i = threadIdx.x;
        if (i == 0) slopes[step % 2] = scores.slope(f, sequence, h);
        if (i < kC) {
          const bool inside = col0 + i < length_c;
          float* to = statistics + step % 2 * 2 * kC + i;
          to[0] = inside ? lse_log2(lse[statistic(h) + col0 + i]) : INFINITY;
          to[kC] = inside ? delta[statistic(h) + col0 + i] : 0.0f;
        }
      } else {
        const int64_t h = head / group;
        load_tile<kThreads>(c1, k_rows(f.k, f.k_stride, h) + col0 * f.k_stride.token, f.k_stride.token,
                            length_c - col0, head_dim, aligned.k);
        load_tile<kThreads>(c2, k_rows(f.v, f.v_stride, h) + col0 * f.v_stride.token, f.v_stride.token,
                            length_c - col0, value_dim, aligned.v);
      }
    }
    ptx::cp_async_commit();
  };

  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * kRTiles, lane = threadIdx.x % 32, g = lane / 4,
            t = lane % 4;
  float row_lse[kRTiles][2], row_delta[kRTiles][2];  // by query
  if constexpr (!kByKey) {
#pragma unroll
    for (int m = 0; m < kRTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + warp_row + 16 * m + g + 8 * half;
        const bool inside = row < length_r;
        row_lse[m][half] = inside ? lse_log2(lse[statistic(head) + row]) : INFINITY;
        row_delta[m][half] = inside ? delta[statistic(head) + row] : 0.0f;
      }
  }
  if (steps > 0) {
    if constexpr (kByKey) {
      load_tile<kThreads>(r1, k_rows(f.k, f.k_stride, head) + row0 * f.k_stride.token, f.k_stride.token, rows,
                          head_dim, aligned.k);
      if constexpr (Config::kFirst)
        load_tile<kThreads>(r2, k_rows(f.v, f.v_stride, head) + row0 * f.v_stride.token, f.v_stride.token, rows,
                            value_dim, aligned.v);
    } else {
      load_tile<kThreads>(r1, q_rows(f.q, f.q_stride, head) + row0 * f.q_stride.token, f.q_stride.token, rows,
                          head_dim, aligned.q);
      load_tile<kThreads>(r2, q_rows(p.dout, p.dout_stride, head) + row0 * p.dout_stride.token, p.dout_stride.token,
                          rows, value_dim, aligned.dout);
    }
    load_stage(0);
  }

  float first[Config::kFirst ? kRTiles : 1][kHead / 8][4] = {};
  float second[Config::kSecond ? kRTiles : 1][kHead / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_stage(step + 1);
    const auto c1 = stage(step, c1_even, c1_odd), c2 = stage(step, c2_even, c2_odd);
    const int col0 = (c_begin + step % c_tiles) * kC;

    float x[kRTiles][kC / 8][4] = {};                       // scores
    float y[Config::kFirst ? kRTiles : 1][kC / 8][4] = {};  // dP
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
      uint32_t a1[kRTiles][4], a2[kRTiles][4];
#pragma unroll
      for (int m = 0; m < kRTiles; ++m) {
        load_a(a1[m], r1, warp_row + 16 * m, 16 * d);
        if constexpr (Config::kFirst) load_a(a2[m], r2, warp_row + 16 * m, 16 * d);
      }
#pragma unroll
      for (int n = 0; n < kC / 16; ++n) {
        uint32_t b[2][2];
        load_b(b, c1, 16 * n, 16 * d);
#pragma unroll
        for (int i = 0; i < 2 * kRTiles; ++i)
          ptx::mma_m16n8k16<T>(x[i / 2][2 * n + i % 2], a1[i / 2], b[i % 2], x[i / 2][2 * n + i % 2]);
        if constexpr (Config::kFirst) {
          load_b(b, c2, 16 * n, 16 * d);
#pragma unroll
          for (int i = 0; i < 2 * kRTiles; ++i)
            ptx::mma_m16n8k16<T>(y[i / 2][2 * n + i % 2], a2[i / 2], b[i % 2], y[i / 2][2 * n + i % 2]);
        }
      }
    }

    const int row_last = row0 + kR - 1, col_last = col0 + kC - 1;
    const bool masked =
        row_last >= length_r || col_last >= length_c ||
        !(kByKey ? band.whole(col0, col_last, row0, row_last) : band.whole(row0, row_last, col0, col_last));
    // The scores become weights, dP becomes dS. `plain`: without a transformation or ALiBi.
    const auto weigh = [&](auto plain) {
      const float alibi = plain.value ? 0.0f : kByKey ? slopes[step % 2] : scores.slope(f, sequence, head);
      const int shift = sequence.tk - sequence.tq;
      const auto distance =
          static_cast<float>(col0 + 2 * t - (row0 + warp_row + g) + (kByKey ? shift : -shift));
#pragma unroll
      for (int m = 0; m < kRTiles; ++m)
#pragma unroll
        for (int n = 0; n < kC / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = 8 * n + 2 * t + i % 2;
            const float* column_statistics = statistics + step % 2 * 2 * kC + column;
            const float row_or_column_lse = kByKey ? column_statistics[0] : row_lse[m][i / 2];
            float score = x[m][n][i], derivative = 1.0f;  // of the score, by scale * q.k
            if constexpr (!plain.value) {
              if (!scores.plain()) score = scores.transform(score);
              if (scores.softcap > 0.0f) derivative = 1.0f - (score / scores.softcap) * (score / scores.softcap);
              score -= alibi * fabsf(distance + static_cast<float>(8 * n + i % 2 - 16 * m - i / 2 * 8));
            }
            float weight = ptx::exp2(fmaf(score, scores.factor, -row_or_column_lse));
            if (masked) {
              const int row = row0 + warp_row + 16 * m + g + 8 * (i / 2), col = col0 + column;
              const int query = kByKey ? col : row, key = kByKey ? row : col;
              if (key < query + band.below || key > query + band.above || row >= length_r || col >= length_c)
                weight = 0.0f;
            }
            x[m][n][i] = weight;
            if constexpr (Config::kFirst) {
              const float row_or_column_delta = kByKey ? column_statistics[kC] : row_delta[m][i / 2];
              y[m][n][i] = weight * (y[m][n][i] - row_or_column_delta) * derivative;
            }
          }
    };
    if (scores.plain() && f.alibi_slopes == nullptr)
      weigh(std::true_type());
    else
      weigh(std::false_type());

#pragma unroll
    for (int n = 0; n < kC / 16; ++n) {
      uint32_t weights[kRTiles][4], dscores[kRTiles][4];
#pragma unroll
      for (int m = 0; m < kRTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 2 * n + i / 2, half = 2 * (i % 2);
          if constexpr (Config::kSecond) weights[m][i] = ptx::pack<T>(x[m][column][half], x[m][column][half + 1]);
          if constexpr (Config::kFirst) dscores[m][i] = ptx::pack<T>(y[m][column][half], y[m][column][half + 1]);
        }
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) {
        uint32_t b[2][2];
        if constexpr (Config::kFirst) {
          load_b_trans(b, c1, 16 * n, 16 * d);
#pragma unroll
          for (int i = 0; i < 2 * kRTiles; ++i)
            ptx::mma_m16n8k16<T>(first[i / 2][2 * d + i % 2], dscores[i / 2], b[i % 2], first[i / 2][2 * d + i % 2]);
        }
        if constexpr (Config::kSecond) {
          load_b_trans(b, c2, 16 * n, 16 * d);
#pragma unroll
          for (int i = 0; i < 2 * kRTiles; ++i)
            ptx::mma_m16n8k16<T>(second[i / 2][2 * d + i % 2], weights[i / 2], b[i % 2],
                                 second[i / 2][2 * d + i % 2]);
        }
      }
    }
  }

  // A warp's rows of R1 and R2 are read by it alone, so it may put its outputs there.
  __syncwarp();
  const float scale = static_cast<float>(f.scale);
#pragma unroll
  for (int m = 0; m < kRTiles; ++m) {
    if constexpr (Config::kFirst) accumulators_to_tile<T, kHead / 16>(first[m], scale, scale, r1, warp_row + 16 * m);
    if constexpr (Config::kSecond) accumulators_to_tile<T, kHead / 16>(second[m], 1.0f, 1.0f, r2, warp_row + 16 * m);
  }
  __syncwarp();
  const auto store = [&](const auto& from, void* to, const Strides3& stride, int columns, bool aligned_out) {
    const int64_t token = (kByKey ? sequence.k_first : sequence.q_first) + row0;
    store_rows<16 * kRTiles>(
        from, warp_row,
        static_cast<T*>(to) + sequence.batch * stride.batch + token * stride.token + head * stride.head, stride.token,
        rows, columns, aligned_out);
  };
  if constexpr (Config::kFirst)
    store(r1, kByKey ? p.dk : p.dq, kByKey ? p.dk_stride : p.dq_stride, head_dim, kByKey ? aligned.dk : aligned.dq);
  if constexpr (Config::kSecond) store(r2, p.dv, p.dv_stride, value_dim, aligned.dv);
}

// Of the rows: delta, and from it the gradient of the sinks.
template <class T>
const char* launch_bwd_rows_sm80(const FlashAttentionBackwardParams& p, float* delta, cudaStream_t stream) {
  const FlashAttentionParams& f = p.forward;
  const int64_t rows = f.batch * f.seqlen_q * f.heads_q;
  if ((rows + 7) / 8 > INT32_MAX) return "more queries than a grid has blocks";
  if (rows > 0) {
    const dim3 grid(static_cast<unsigned>((rows + 7) / 8));
    if (const char* error = launch(flash_attention_bwd_delta_sm80_kernel<T>, {grid, dim3(256), 0, stream}, p, delta))
      return error;
  }
  if (p.dsinks == nullptr || f.heads_q == 0) return nullptr;
  constexpr int kWarps = 16;
  return launch(flash_attention_bwd_dsinks_sm80_kernel<kWarps>,
                {dim3(static_cast<unsigned>(f.heads_q)), dim3(32 * kWarps), kWarps * sizeof(float), stream}, p, delta);
}

template <class Config>
const char* launch_bwd_sm80_walk(const FlashAttentionBackwardParams& p, const Alignment& aligned,
                                 cudaStream_t stream) {
  const FlashAttentionParams& f = p.forward;
  const int64_t tiles = tiles_per_head(f, Config::kByKey ? f.seqlen_k : f.seqlen_q, Config::kR);
  const int64_t blocks = tiles * (Config::kByKey ? f.heads_k : f.heads_q);
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more tiles than a grid has blocks";
  return launch(flash_attention_bwd_sm80_kernel<Config>,
                {dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), Config::kSharedBytes, stream}, p,
                aligned, tiles);
}

// Null, or what went wrong. Delta is in p.scratch.
template <class T, int kHead>
const char* launch_bwd_sm80(const FlashAttentionBackwardParams& p, cudaStream_t stream) {
  const FlashAttentionParams& f = p.forward;
  Alignment a{};
  a.q = aligned(f.q, f.q_stride), a.k = aligned(f.k, f.k_stride), a.v = aligned(f.v, f.v_stride),
  a.dout = aligned(p.dout, p.dout_stride);
  a.dq = aligned(p.dq, p.dq_stride), a.dk = aligned(p.dk, p.dk_stride), a.dv = aligned(p.dv, p.dv_stride);
  if (const char* error = launch_bwd_sm80_walk<BackwardConfig<T, kHead, false, true, false>>(p, a, stream))
    return error;
  if constexpr (kHead <= 128) {
    return launch_bwd_sm80_walk<BackwardConfig<T, kHead, true, true, true>>(p, a, stream);
  } else {
    // Both accumulators do not fit the registers: one walk each.
    if (const char* error = launch_bwd_sm80_walk<BackwardConfig<T, kHead, true, true, false>>(p, a, stream))
      return error;
    return launch_bwd_sm80_walk<BackwardConfig<T, kHead, true, false, true>>(p, a, stream);
  }
}

// Each defined in a file of its own, so that they compile side by side.
#define PYKERNELS_DECLARE_BWD_SM80(head) \
  const char* bwd_sm80_##head(const FlashAttentionBackwardParams& p, cudaStream_t stream);
PYKERNELS_DECLARE_BWD_SM80(32)
PYKERNELS_DECLARE_BWD_SM80(64)
PYKERNELS_DECLARE_BWD_SM80(96)
PYKERNELS_DECLARE_BWD_SM80(128)
PYKERNELS_DECLARE_BWD_SM80(192)
PYKERNELS_DECLARE_BWD_SM80(256)
#undef PYKERNELS_DECLARE_BWD_SM80

#define PYKERNELS_DEFINE_BWD_SM80(head)                                                     \
  namespace pykernels::cuda::attention {                                                    \
  const char* bwd_sm80_##head(const FlashAttentionBackwardParams& p, cudaStream_t stream) { \
    return p.forward.dtype == DType::kBFloat16 ? launch_bwd_sm80<BFloat16, head>(p, stream) \
                                               : launch_bwd_sm80<Float16, head>(p, stream); \
  }                                                                                         \
  }

}  // namespace pykernels::cuda::attention
