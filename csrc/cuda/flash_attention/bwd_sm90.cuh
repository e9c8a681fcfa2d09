// Flash attention, backward, for sm_90a (TMA, wgmma, warp specialisation): one walk over the scores, dQ added up in
// global memory, so not bitwise repeatable; the sm_80 kernels serve what must be.
//
// A block owns kN = 128 keys of one key head, 64 for each of its two consumer warp groups, and walks the tiles of kM
// queries (of all query heads of its key head) that see them. With P, dP, dS and delta as in bwd_sm80.cuh, a consumer
// holds the transposed products, keys by queries:
//   S^T = K Q^T,  dP^T = V dO^T                  both operands from shared memory
//   dV += P^T dO,  dK += dS^T Q                  P^T and dS^T from registers
//   dQ += dS K                                   dS, of both consumers, through shared memory
// Each consumer computes half of a tile's dQ, [64, 64] either way: half of the queries when kM is 128 (head size 64),
// half of the columns when it is 64 (head size 128). It is added to an fp32 accumulator by a bulk reduction, in the
// order of the registers, which a last kernel puts right. Before, a first kernel computes delta, puts the statistics
// into tiles and clears the accumulator.
// Shared memory: K, V [kN, kHead]; Q, dO two stages each [kM, kHead]; statistics [2][2][kM]; dS^T [2][kN, kM]; dQ
// [2 consumers][64 * 64] fp32; the mbarriers.
#pragma once

#include "sm90.cuh"

namespace pykernels::cuda::attention {

template <class T_, int kHead_>
struct BackwardConfigSm90 {
  using T = T_;
  static constexpr int kHead = kHead_, kConsumers = 2, kN = 64 * kConsumers, kM = kHead == 64 ? 128 : 64, kStages = 2;
  static_assert(kM * kHead == 64 * 64 * kConsumers);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kPart = 64 * 64;  // of dQ, for each consumer
  using KTile = SharedTile<T, kN, kHead>;
  using QTile = SharedTile<T, kM, kHead>;
  using DsTile = SharedTile<T, kN, kM>;
  static constexpr unsigned kBarrierBytes = 8 * (4 * kStages + 1);
  static constexpr unsigned kSharedBytes = 2 * KTile::kBytes + 2 * kStages * QTile::kBytes + 2 * DsTile::kBytes +
                                           kConsumers * kPart * 4 + kStages * 2 * kM * 4 + kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Tiles of kM queries are numbered within a head as locate() finds them: the first of a sequence.
template <int kM>
__device__ __forceinline__ int first_query_tile(const FlashAttentionParams& f, const Sequence& s) {
  return static_cast<int>(f.cu_seqlens_q == nullptr ? s.batch * ((f.seqlen_q + kM - 1) / kM)
                                                    : s.q_first / kM + s.index);
}

// The scratch memory, for each query head and tile of queries: the statistics [2][kM], lse in log2 units and delta, and
// then for all of them the accumulator of dQ, [2 consumers][8][128 threads][4].
template <class Config>
inline int64_t bwd_scratch_floats(const FlashAttentionParams& f) {
  return f.heads_q * tiles_per_head(f, f.seqlen_q, Config::kM) * (2 * Config::kM + 2 * Config::kPart);
}
template <class Config>
struct BackwardScratch {
  float *statistics, *dq;
  __device__ __forceinline__ BackwardScratch(const FlashAttentionBackwardParams& p, int query_tiles, int head,
                                             int tile) {
    auto* scratch = static_cast<float*>(p.scratch);
    const int64_t index = head * query_tiles + tile, count = p.forward.heads_q * query_tiles;
    statistics = scratch + index * (2 * Config::kM);
    dq = scratch + count * (2 * Config::kM) + index * (2 * Config::kPart);
  }
};

template <class Config>
__global__ void __launch_bounds__(256)
    flash_attention_bwd_prepare_sm90_kernel(const __grid_constant__ FlashAttentionBackwardParams p,
                                            const int query_tiles) {
  using T = typename Config::T;
  constexpr int kM = Config::kM;
  const FlashAttentionParams& f = p.forward;
  const int head = static_cast<int>(blockIdx.x) / query_tiles, tile = static_cast<int>(blockIdx.x) % query_tiles;
  Sequence sequence;
  int row0;
  if (!locate<kM>(f, tile, sequence, row0)) return;
  const BackwardScratch<Config> scratch(p, query_tiles, head, tile);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * Config::kPart / 4; i += 256)
    reinterpret_cast<float4*>(scratch.dq)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const int lane = threadIdx.x % 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < kM; i += 8) {  // one warp per row
    float lse = INFINITY, delta = 0.0f;  // of a row that sees nothing, or is none: its weights are 0
    if (row0 + i < sequence.tq) {
      const int64_t token = sequence.q_first + row0 + i;
      const auto* dout = static_cast<const T*>(p.dout) + sequence.batch * p.dout_stride.batch +
                         token * p.dout_stride.token + head * p.dout_stride.head;
      const auto* out = static_cast<const T*>(f.out) + sequence.batch * f.out_stride.batch +
                        token * f.out_stride.token + head * f.out_stride.head;
      float sum = 0.0f;
      for (int64_t c = lane; c < f.value_dim; c += 32) sum += ptx::to_float(dout[c]) * ptx::to_float(out[c]);
      sum = warp_reduce(sum, Sum());
      const int64_t statistic = (sequence.batch * f.heads_q + head) * f.seqlen_q + token;
      const float natural = static_cast<const float*>(f.lse)[statistic];
      const float dlse = p.dlse == nullptr ? 0.0f : static_cast<const float*>(p.dlse)[statistic];
      if (natural != -INFINITY) lse = natural * kLog2e, delta = sum - dlse;
    }
    if (lane == 0) scratch.statistics[i] = lse, scratch.statistics[kM + i] = delta;
  }
}

template <class Config>
__global__ void __launch_bounds__(256)
    flash_attention_bwd_finish_sm90_kernel(const __grid_constant__ FlashAttentionBackwardParams p,
                                           const int query_tiles, const bool aligned_dq) {
  using T = typename Config::T;
  constexpr int kM = Config::kM;
  const FlashAttentionParams& f = p.forward;
  const int head = static_cast<int>(blockIdx.x) / query_tiles, tile = static_cast<int>(blockIdx.x) % query_tiles;
  Sequence sequence;
  int row0;
  if (!locate<kM>(f, tile, sequence, row0)) return;
  const BackwardScratch<Config> scratch(p, query_tiles, head, tile);
  const int consumer = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  float x[32];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float4 four = reinterpret_cast<const float4*>(scratch.dq + consumer * Config::kPart)[n * 128 + thread];
    x[4 * n] = four.x, x[4 * n + 1] = four.y, x[4 * n + 2] = four.z, x[4 * n + 3] = four.w;
  }
  const int row = (kM == 128 ? 64 * consumer : 0) + thread / 32 * 16 + thread % 32 / 4;
  const int column = kM == 128 ? 0 : 64 * consumer, rows = min(kM, sequence.tq - row0);
  auto* dq = static_cast<T*>(p.dq) + sequence.batch * p.dq_stride.batch +
             (sequence.q_first + row0) * p.dq_stride.token + head * p.dq_stride.head + column;
  const float scale[2] = {static_cast<float>(f.scale), static_cast<float>(f.scale)};
  store_accumulators(x, scale, row < rows ? dq + row * p.dq_stride.token : nullptr,
                     row + 8 < rows ? dq + (row + 8) * p.dq_stride.token : nullptr,
                     static_cast<int>(f.head_dim) - column, aligned_dq);
}

// Zeros in the rows of a tile from `first` on, by all consumers; the async proxy sees them after the barrier.
template <int kThreads, class Tile>
__device__ __forceinline__ void clear_rows(const Tile& tile, int first) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) - 128; i < (Tile::kRows - first) * Tile::kChunks; i += kThreads)
    *reinterpret_cast<uint4*>(tile.at(first + i / Tile::kChunks, i % Tile::kChunks)) = make_uint4(0, 0, 0, 0);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_bwd_sm90_kernel(const __grid_constant__ FlashAttentionBackwardParams p,
                                    const __grid_constant__ CUtensorMap q_map,
                                    const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map,
                                    const __grid_constant__ CUtensorMap dout_map, const int key_tiles,
                                    const int query_tiles, const Alignment aligned) {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  using DsTile = typename Config::DsTile;
  constexpr int kHead = Config::kHead, kN = Config::kN, kM = Config::kM, kStages = Config::kStages;
  const FlashAttentionParams& f = p.forward;
  const int head = static_cast<int>(blockIdx.x) / key_tiles, group = static_cast<int>(f.heads_q / f.heads_k);
  Sequence sequence;
  int row0;
  // The first keys first: under a causal mask most queries see them.
  if (!locate<kN, true>(f, static_cast<int>(blockIdx.x) % key_tiles, sequence, row0)) return;

  SharedMemory shared;
  const auto k_tile = take_tile<KTile>(shared), v_tile = take_tile<KTile>(shared);
  T* const q_data = shared.take<T>(kStages * QTile::kElements, QTile::kAlignment);
  T* const dout_data = shared.take<T>(kStages * QTile::kElements, QTile::kAlignment);
  T* const ds_data = shared.take<T>(2 * DsTile::kElements, DsTile::kAlignment);
  float* const parts = shared.take<float>(Config::kConsumers * Config::kPart, 16);
  float* const statistics = shared.take<float>(kStages * 2 * kM, 16);
  uint64_t* const barriers = shared.take<uint64_t>(4 * kStages + 1);
  const Ring<QTile, kStages> q_ring{q_data, barriers, barriers + kStages};
  const Ring<QTile, kStages> dout_ring{dout_data, barriers + 2 * kStages, barriers + 3 * kStages};
  uint64_t* const kv_full = barriers + 4 * kStages;
  if (threadIdx.x == 0) {
    q_ring.initialise(4 * Config::kConsumers), dout_ring.initialise(4 * Config::kConsumers);
    ptx::mbarrier_init(kv_full, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch(&q_map), ptx::tma_prefetch(&k_map), ptx::tma_prefetch(&v_map), ptx::tma_prefetch(&dout_map);
  }
  __syncthreads();

  // The tiles of queries that see any of the keys, once for each query head of the group.
  const Band band(f, sequence);
  const int rows = min(kN, sequence.tk - row0);
  const int c_begin = max(0, row0 - band.above) / kM, c_end = min(sequence.tq, row0 + rows - band.below);
  const int c_tiles = c_end <= 0 ? 0 : max(0, (c_end + kM - 1) / kM - c_begin), steps = c_tiles * group;
  const int first_tile = first_query_tile<kM>(f, sequence);

  const int warp_group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warp_group == 0) {
    ptx::setmaxnreg_decrease<24>();
    if (threadIdx.x >= 32 || !ptx::elect_one() || steps == 0) return;
    const int batch = static_cast<int>(sequence.batch), k_first = static_cast<int>(sequence.k_first) + row0;
    ptx::mbarrier_arrive_expect_tx(kv_full, 2 * KTile::kBytes);
    tma_load_panels(k_tile, &k_map, kv_full, k_first, head, batch);
    tma_load_panels(v_tile, &v_map, kv_full, k_first, head, batch);
    PipelineState<kStages> state;  // Q and dO keep step
#pragma unroll 1
    for (int h = head * group; h < (head + 1) * group; ++h)
#pragma unroll 1
      for (int c = c_begin; c < c_begin + c_tiles; ++c) {
        const int token = static_cast<int>(sequence.q_first) + c * kM;
        const BackwardScratch<Config> scratch(p, query_tiles, h, first_tile + c);
        q_ring.begin(state, QTile::kBytes + 2 * kM * 4);
        tma_load_panels(q_ring.tile(state.stage), &q_map, q_ring.full + state.stage, token, h, batch);
        ptx::bulk_load(statistics + state.stage * 2 * kM, scratch.statistics, 2 * kM * 4, q_ring.full + state.stage);
        dout_ring.begin(state, QTile::kBytes);
        tma_load_panels(dout_ring.tile(state.stage), &dout_map, dout_ring.full + state.stage, token, h, batch);
        state.advance();
      }
    return;
  }

  ptx::setmaxnreg_increase<240>();
  const int consumer = warp_group - 1, thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32,
            lane = thread % 32, g = lane / 4, t = lane % 4;
  const int row = 64 * consumer + 16 * warp + g;  // a key of the block; and row + 8
  const float factor = static_cast<float>(f.scale) * kLog2e;
  constexpr unsigned kBoth = 1, kOwn = 2;  // named barriers: of both consumers; of one, + its number
  const bool packed = f.cu_seqlens_q != nullptr;
  const uint64_t k_rows = by_rows(k_tile, 64 * consumer), v_rows = by_rows(v_tile, 64 * consumer);
  // dS^T by columns, this consumer's queries; K by columns, this consumer's columns.
  const uint64_t k_columns = advance(by_columns(k_tile), kM == 64 ? consumer * kN * KTile::kWidth : 0);
  float* const part = parts + consumer * Config::kPart;
  float dk[kHead / 2] = {}, dv[kHead / 2] = {};
  PipelineState<kStages> q_state, dout_state;

  if (steps > 0) {
    ptx::mbarrier_wait(kv_full, 0);
    if (packed && row0 + kN > sequence.tk) {
      // Keys of the next sequence: their weights are 0, which does not keep out what is not finite. So below for
      // queries.
      clear_rows<256>(k_tile, sequence.tk - row0), clear_rows<256>(v_tile, sequence.tk - row0);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kBoth, 256);
    }
  }
#pragma unroll 1
  for (int step = 0, c = c_begin, h = head * group; step < steps; ++step) {
    const int col0 = c * kM, stage = q_state.stage;
    const QTile q = q_ring.tile(stage), dout = dout_ring.tile(stage);
    const DsTile ds{ds_data + step % 2 * DsTile::kElements};
    T* const ds_lane = ds.at(64 * consumer + 16 * warp + lane % 16, lane / 16);
    // Set, so that the compiler does not take registers of products under way for what they held before.
    float s[kM / 2] = {}, dp[kM / 2] = {};
    uint32_t weights[kM / 16][4], dscores[kM / 16][4];

    q_ring.wait(q_state);
    if (packed && col0 + kM > sequence.tq) {
      dout_ring.wait(dout_state);
      clear_rows<256>(q, sequence.tq - col0), clear_rows<256>(dout, sequence.tq - col0);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kBoth, 256);
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d)
      ptx::wgmma_ss<T, kM>(s, by_rows_step<KTile>(k_rows, d), by_rows_step<QTile>(by_rows(q), d), d != 0);
    ptx::wgmma_commit();
    dout_ring.wait(dout_state);
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d)
      ptx::wgmma_ss<T, kM>(dp, by_rows_step<KTile>(v_rows, d), by_rows_step<QTile>(by_rows(dout), d), d != 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::wgmma_hold(s);

    // Of this lane's two queries in every eight.
    const auto* const lse = reinterpret_cast<const float2*>(statistics + stage * 2 * kM + 2 * t);
    const auto* const delta = lse + kM / 2;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      const float2 lse2 = lse[4 * n];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[4 * n + i] = ptx::exp2(fmaf(s[4 * n + i], factor, -(i % 2 == 0 ? lse2.x : lse2.y)));
    }
    const int key0 = row0 + 64 * consumer;
    if (col0 + kM > sequence.tq || key0 + 64 > sequence.tk || !band.whole(col0, col0 + kM - 1, key0, key0 + 63)) {
      // The queries that see keys g and g + 8, counted from this lane's first; none see a key that is not there.
      const int from = row0 + row - band.above - col0 - 2 * t, to = row0 + row - band.below - col0 - 2 * t,
                last = sequence.tq - 1 - col0 - 2 * t;
      const int to0 = row0 + row < sequence.tk ? min(to, last) : -kUnbounded,
                to1 = row0 + row + 8 < sequence.tk ? min(to + 8, last) : -kUnbounded;
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) {
        const int query = 8 * (i / 4) + i % 2, half = i / 2 % 2;
        if (query < from + 8 * half || query > (half == 0 ? to0 : to1)) s[i] = 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kM / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = ptx::pack<T>(s[8 * n + 2 * i], s[8 * n + 2 * i + 1]);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kM / 16; ++n)
      ptx::wgmma_rs<T, kHead, true>(dv, weights[n], by_columns_step<QTile>(by_columns(dout), n), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::wgmma_hold(dp);

#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      const float2 delta2 = delta[4 * n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = 4 * n + i;
        dp[e] = s[e] * (dp[e] - (i % 2 == 0 ? delta2.x : delta2.y));
      }
    }
#pragma unroll
    for (int n = 0; n < kM / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dscores[n][i] = ptx::pack<T>(dp[8 * n + 2 * i], dp[8 * n + 2 * i + 1]);
      ptx::stmatrix_x4(chunks_on<DsTile>(ds_lane, 2 * n), dscores[n]);
    }
    ptx::fence_proxy_async();
    // Both consumers' dS are there; and both are done with the dQ of the step before, so that its dS may be
    // overwritten in the next.
    ptx::named_barrier_sync(kBoth, 256);

    float dq[32] = {};
    const uint64_t ds_columns = advance(by_columns(ds), kM == 128 ? consumer * kN * DsTile::kWidth : 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kN / 16; ++n)
      ptx::wgmma_ss<T, 64, true, true>(dq, by_columns_step<DsTile>(ds_columns, n),
                                       by_columns_step<KTile>(k_columns, n), n != 0);
    ptx::wgmma_commit();
#pragma unroll
    for (int n = 0; n < kM / 16; ++n)
      ptx::wgmma_rs<T, kHead, true>(dk, dscores[n], by_columns_step<QTile>(by_columns(q), n), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // dV and dQ
    ptx::wgmma_hold(dv);
    ptx::wgmma_hold(dq);
    dout_ring.release(dout_state);

    if (thread == 0) ptx::bulk_wait_read<0>();
    ptx::named_barrier_sync(kOwn + static_cast<unsigned>(consumer), 128);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      reinterpret_cast<float4*>(part)[n * 128 + thread] =
          make_float4(dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kOwn + static_cast<unsigned>(consumer), 128);
    if (thread == 0) {
      const BackwardScratch<Config> scratch(p, query_tiles, h, first_tile + c);
      ptx::bulk_reduce_add(scratch.dq + consumer * Config::kPart, part, Config::kPart * 4);
      ptx::bulk_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(dk);
    q_ring.release(q_state);
    if (++c == c_begin + c_tiles) c = c_begin, ++h;
  }
  if (thread == 0) ptx::bulk_wait<0>();

  const float scale = static_cast<float>(f.scale), dk_factor[2] = {scale, scale}, dv_factor[2] = {1.0f, 1.0f};
  const auto store = [&](const auto& x, const float(&by)[2], void* to, const Strides3& stride, int64_t columns,
                         bool aligned_to) {
    auto* first = static_cast<T*>(to) + sequence.batch * stride.batch +
                  (sequence.k_first + row0 + row) * stride.token + head * stride.head;
    store_accumulators(x, by, row < rows ? first : nullptr, row + 8 < rows ? first + 8 * stride.token : nullptr,
                       static_cast<int>(columns), aligned_to);
  };
  store(dk, dk_factor, p.dk, p.dk_stride, f.head_dim, aligned.dk);
  store(dv, dv_factor, p.dv, p.dv_stride, f.value_dim, aligned.dv);
}

// Null, or what went wrong.
template <class T, int kHead>
const char* launch_bwd_sm90(const FlashAttentionBackwardParams& p, cudaStream_t stream) {
  using Config = BackwardConfigSm90<T, kHead>;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  const FlashAttentionParams& f = p.forward;
  const int64_t query_tiles64 = tiles_per_head(f, f.seqlen_q, Config::kM),
                key_tiles64 = tiles_per_head(f, f.seqlen_k, Config::kN);
  if (query_tiles64 * f.heads_q > INT32_MAX || key_tiles64 * f.heads_k > INT32_MAX)
    return "more tiles than a grid has blocks";
  const int query_tiles = static_cast<int>(query_tiles64), key_tiles = static_cast<int>(key_tiles64);
  CUtensorMap q_map, k_map, v_map, dout_map;
  if (const char* error = map_tokens<QTile>(&q_map, f.dtype, Config::kM, f.q, f.q_stride, f.batch, f.seqlen_q,
                                            f.heads_q, f.head_dim))
    return error;
  if (const char* error = map_tokens<QTile>(&dout_map, f.dtype, Config::kM, p.dout, p.dout_stride, f.batch,
                                            f.seqlen_q, f.heads_q, f.value_dim))
    return error;
  if (const char* error = map_tokens<KTile>(&k_map, f.dtype, Config::kN, f.k, f.k_stride, f.batch, f.seqlen_k,
                                            f.heads_k, f.head_dim))
    return error;
  if (const char* error = map_tokens<KTile>(&v_map, f.dtype, Config::kN, f.v, f.v_stride, f.batch, f.seqlen_k,
                                            f.heads_k, f.value_dim))
    return error;
  Alignment a{};
  a.dk = aligned(p.dk, p.dk_stride), a.dv = aligned(p.dv, p.dv_stride);
  const LaunchConfig by_query{dim3(static_cast<unsigned>(query_tiles64 * f.heads_q)), dim3(256), 0, stream};
  if (const char* error = launch(flash_attention_bwd_prepare_sm90_kernel<Config>, by_query, p, query_tiles))
    return error;
  if (const char* error = launch(flash_attention_bwd_sm90_kernel<Config>,
                                 {dim3(static_cast<unsigned>(key_tiles64 * f.heads_k)), dim3(Config::kThreads),
                                  Config::kSharedBytes, stream},
                                 p, q_map, k_map, v_map, dout_map, key_tiles, query_tiles, a))
    return error;
  return launch(flash_attention_bwd_finish_sm90_kernel<Config>, by_query, p, query_tiles,
                aligned(p.dq, p.dq_stride));
}

// Each defined in a file of its own, so that they compile side by side.
#define PYKERNELS_DECLARE_BWD_SM90(head) \
  const char* bwd_sm90_##head(const FlashAttentionBackwardParams& p, cudaStream_t stream);
PYKERNELS_DECLARE_BWD_SM90(64)
PYKERNELS_DECLARE_BWD_SM90(128)
#undef PYKERNELS_DECLARE_BWD_SM90

#define PYKERNELS_DEFINE_BWD_SM90(head)                                                     \
  namespace pykernels::cuda::attention {                                                    \
  const char* bwd_sm90_##head(const FlashAttentionBackwardParams& p, cudaStream_t stream) { \
    return p.forward.dtype == DType::kBFloat16 ? launch_bwd_sm90<BFloat16, head>(p, stream) \
                                               : launch_bwd_sm90<Float16, head>(p, stream); \
  }                                                                                         \
  }

}  // namespace pykernels::cuda::attention
