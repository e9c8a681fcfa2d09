// Flash attention, forward, for sm_80 and newer (mma.sync, cp.async).
//
// A block owns kM queries of one head; each of its warps kMTiles times 16 of them. It walks the tiles of kN keys
// that its queries see, in two stages of shared memory: while the warps work on one, the next is copied.
//   S = Q K^T; the running row maximum m and sum l; P = 2^(S - m); O = O 2^(m_old - m) + P V; at the end O / l.
// S, P, O, m and l stay in registers (P as the operand of the second product), Q in shared memory.
// Shared memory: Q, later the output [kM, kHead]; K and V [2][kN, kHead].
// One barrier per step: behind it the present stage has arrived and the other one is no longer read.
#pragma once

#include "sm80.cuh"

namespace pykernels::cuda::attention {

template <class T_, int kHead_>
struct ForwardConfig {
  using T = T_;
  static constexpr int kHead = kHead_;  // head size in shared memory; what K and V lack is zero
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // Two row tiles per warp use each fragment of K and V twice, as long as the registers suffice.
  static constexpr int kMTiles = kHead <= 128 ? 2 : 1;
  static constexpr int kN = kHead <= 64 ? 64 : kHead == 96 ? 48 : 32;
  static constexpr int kM = 16 * kMTiles * kWarps;
  using QTile = SharedTile<T, kM, kHead>;
  using KTile = SharedTile<T, kN, kHead>;
  static constexpr unsigned kSharedBytes = QTile::kBytes + 4 * KTile::kBytes;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    flash_attention_fwd_sm80_kernel(const __grid_constant__ FlashAttentionParams p, const Alignment aligned,
                                    const int64_t tiles) {
  using T = typename Config::T;
  constexpr int kHead = Config::kHead, kN = Config::kN, kM = Config::kM, kMTiles = Config::kMTiles,
                kThreads = Config::kThreads;
  const int64_t head = blockIdx.x / tiles;
  Sequence sequence;
  int m0;
  // The last queries first: under a causal mask they take longest.
  if (!locate<kM>(p, tiles - 1 - blockIdx.x % tiles, sequence, m0)) return;

  SharedMemory shared;
  const auto q_tile = take_tile<typename Config::QTile>(shared);
  const auto k_even = take_tile<typename Config::KTile>(shared), k_odd = take_tile<typename Config::KTile>(shared);
  const auto v_even = take_tile<typename Config::KTile>(shared), v_odd = take_tile<typename Config::KTile>(shared);

  const int64_t head_k = head / (p.heads_q / p.heads_k);
  const auto* q = static_cast<const T*>(p.q) + sequence.batch * p.q_stride.batch +
                  (sequence.q_first + m0) * p.q_stride.token + head * p.q_stride.head;
  const auto* k = static_cast<const T*>(p.k) + sequence.batch * p.k_stride.batch +
                  sequence.k_first * p.k_stride.token + head_k * p.k_stride.head;
  const auto* v = static_cast<const T*>(p.v) + sequence.batch * p.v_stride.batch +
                  sequence.k_first * p.v_stride.token + head_k * p.v_stride.head;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int rows = min(kM, sequence.tq - m0);

  // The tiles of keys that any of the queries sees.
  const Band band(p, sequence);
  const int keys_end = min(sequence.tk, m0 + rows + band.above);
  const int steps_begin = max(0, m0 + band.below) / kN, steps_end = keys_end <= 0 ? 0 : (keys_end + kN - 1) / kN;

  const auto load_stage = [&](int step) {
    if (step < steps_end) {
      const int n0 = step * kN;
      load_tile<kThreads>(stage(step, k_even, k_odd), k + n0 * p.k_stride.token, p.k_stride.token, sequence.tk - n0,
                          head_dim, aligned.k);
      load_tile<kThreads>(stage(step, v_even, v_odd), v + n0 * p.v_stride.token, p.v_stride.token, sequence.tk - n0,
                          value_dim, aligned.v);
    }
    ptx::cp_async_commit();
  };

  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * kMTiles, lane = threadIdx.x % 32, g = lane / 4,
            t = lane % 4;
  const Scores scores(p);
  const float slope = steps_begin < steps_end ? scores.slope(p, sequence, head) : 0.0f;
  float o[kMTiles][kHead / 8][4] = {};
  float row_max[kMTiles][2], row_sum[kMTiles][2];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) row_max[m][0] = row_max[m][1] = -INFINITY, row_sum[m][0] = row_sum[m][1] = 0.0f;

  if (steps_begin < steps_end) {
    load_tile<kThreads>(q_tile, q, p.q_stride.token, rows, head_dim, aligned.q);
    load_stage(steps_begin);
  }
#pragma unroll 1
  for (int step = steps_begin; step < steps_end; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_stage(step + 1);
    const auto k_now = stage(step, k_even, k_odd);
    const auto v_now = stage(step, v_even, v_odd);
    const int n0 = step * kN;

    float s[kMTiles][kN / 8][4] = {};  // S = Q K^T
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) load_a(a[m], q_tile, warp_row + 16 * m, 16 * d);
#pragma unroll
      for (int n = 0; n < kN / 16; ++n) {
        uint32_t b[2][2];
        load_b(b, k_now, 16 * n, 16 * d);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_m16n8k16<T>(s[m][2 * n], a[m], b[0], s[m][2 * n]);
          ptx::mma_m16n8k16<T>(s[m][2 * n + 1], a[m], b[1], s[m][2 * n + 1]);
        }
      }
    }

    if (!scores.plain()) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = scores.transform(s[m][n][i]);
    }
    if (slope != 0.0f) {
      // From row g's position to this lane's first key.
      const auto distance = static_cast<float>(n0 + 2 * t - (m0 + warp_row + g + sequence.tk - sequence.tq));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            s[m][n][i] -= slope * fabsf(distance + static_cast<float>(8 * n + i % 2 - 16 * m - i / 2 * 8));
    }
    if (n0 + kN > sequence.tk || !band.whole(m0, m0 + kM - 1, n0, n0 + kN - 1)) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = m0 + warp_row + 16 * m + g + 8 * (i / 2), key = n0 + 8 * n + 2 * t + i % 2;
            if (key < row + band.below || key > row + band.above || key >= sequence.tk) s[m][n][i] = -INFINITY;
          }
    }

    // S becomes P.
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows g and g + 8
        float largest = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        largest = warp_reduce<4>(largest, Max());
        // A row that has seen nothing yet: any finite shift gives zeros.
        const float shift = largest == -INFINITY ? 0.0f : largest * scores.factor;
        const float rescale = ptx::exp2(row_max[m][half] * scores.factor - shift);
        row_max[m][half] = largest;
        row_sum[m][half] *= rescale;
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = ptx::exp2(fmaf(s[m][n][i], scores.factor, -shift));
            row_sum[m][half] += s[m][n][i];
          }
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n) o[m][n][2 * half] *= rescale, o[m][n][2 * half + 1] *= rescale;
      }
    }

#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {  // O += P V
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = ptx::pack<T>(s[m][2 * n + i / 2][2 * (i % 2)], s[m][2 * n + i / 2][2 * (i % 2) + 1]);
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) {
        uint32_t b[2][2];
        load_b_trans(b, v_now, 16 * n, 16 * d);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_m16n8k16<T>(o[m][2 * d], a[m], b[0], o[m][2 * d]);
          ptx::mma_m16n8k16<T>(o[m][2 * d + 1], a[m], b[1], o[m][2 * d + 1]);
        }
      }
    }
  }

  // A warp's rows of Q are read by it alone, so it may put its output there.
  __syncwarp();
  auto* lse = static_cast<float*>(p.lse) + (sequence.batch * p.heads_q + head) * p.seqlen_q + sequence.q_first + m0;
  const float sink = sink_log2(p, sequence, head);
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowEnd end(row_max[m][half] * scores.factor, warp_reduce<4>(row_sum[m][half], Sum()), sink);
      inverse[half] = end.inverse;
      const int row = warp_row + 16 * m + g + 8 * half;
      if (t == 0 && row < rows) lse[row] = end.lse;
    }
    accumulators_to_tile<T, kHead / 16>(o[m], inverse[0], inverse[1], q_tile, warp_row + 16 * m);
  }
  __syncwarp();
  auto* out = static_cast<T*>(p.out) + sequence.batch * p.out_stride.batch +
              (sequence.q_first + m0) * p.out_stride.token + head * p.out_stride.head;
  store_rows<16 * kMTiles>(q_tile, warp_row, out, p.out_stride.token, rows, value_dim, aligned.out);
}

// Null, or what went wrong.
template <class T, int kHead>
const char* launch_fwd_sm80(const FlashAttentionParams& p, cudaStream_t stream) {
  using Config = ForwardConfig<T, kHead>;
  const int64_t tiles = tiles_per_head(p, p.seqlen_q, Config::kM), blocks = tiles * p.heads_q;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more tiles of queries than a grid has blocks";
  Alignment a{};
  a.q = aligned(p.q, p.q_stride), a.k = aligned(p.k, p.k_stride), a.v = aligned(p.v, p.v_stride),
  a.out = aligned(p.out, p.out_stride);
  return launch(flash_attention_fwd_sm80_kernel<Config>,
                {dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), Config::kSharedBytes, stream}, p, a,
                tiles);
}

// Each defined in a file of its own, so that they compile side by side.
#define PYKERNELS_DECLARE_FWD_SM80(head) \
  const char* fwd_sm80_##head(const FlashAttentionParams& p, cudaStream_t stream);
PYKERNELS_DECLARE_FWD_SM80(32)
PYKERNELS_DECLARE_FWD_SM80(64)
PYKERNELS_DECLARE_FWD_SM80(96)
PYKERNELS_DECLARE_FWD_SM80(128)
PYKERNELS_DECLARE_FWD_SM80(192)
PYKERNELS_DECLARE_FWD_SM80(256)
#undef PYKERNELS_DECLARE_FWD_SM80

#define PYKERNELS_DEFINE_FWD_SM80(head)                                             \
  namespace pykernels::cuda::attention {                                            \
  const char* fwd_sm80_##head(const FlashAttentionParams& p, cudaStream_t stream) { \
    return p.dtype == DType::kBFloat16 ? launch_fwd_sm80<BFloat16, head>(p, stream) \
                                       : launch_fwd_sm80<Float16, head>(p, stream); \
  }                                                                                 \
  }

}  // namespace pykernels::cuda::attention
