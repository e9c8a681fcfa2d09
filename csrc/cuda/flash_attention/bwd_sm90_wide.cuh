// Flash attention, backward, for sm_90a and head sizes above 128: as in bwd_sm90.cuh, but dK and dV of 64 keys are 256
// registers of each thread of a warp group, so the two consumers share the work by product, not by key.
//
// A block owns kN = 64 keys. For each tile of kM = 64 queries
//   consumer 0:  S^T = K Q^T, P;      dV += P^T dO;   the first 128 columns of dQ += dS K
//   consumer 1:  dP^T = V dO^T, dS;   dK += dS^T Q;   the columns of dQ from 128 on
// Each hands the other a tile through shared memory: P^T in T (times the slope of the soft cap), in the order of the
// registers, and dS^T as an operand of wgmma, which consumer 1 reads itself too. One buffer of each is enough: consumer
// 0 waits for dS before it writes the next P, and has waited for its part of dQ by then. The softmax of one consumer
// meets products of the other. dQ goes from registers to the accumulator in global memory.
// Shared memory: K, V [kN, kHead]; Q, dO two stages each [kM, kHead]; dS^T [kN, kM]; P^T [4][128 threads] of 16 bytes;
// statistics [2][2][kM]; the mbarriers.
#pragma once

#include "bwd_sm90.cuh"

namespace pykernels::cuda::attention {

template <class T_, int kHead_>
struct WideBackwardConfigSm90 {
  using T = T_;
  static constexpr int kHead = kHead_, kConsumers = 2, kN = 64, kM = 64, kStages = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kParts = kHead / 64;                            // of dQ, 64 columns each
  static constexpr int kColumns[kConsumers] = {128, kHead - 128};      // of dQ, for each consumer
  using KTile = SharedTile<T, kN, kHead>;
  using QTile = SharedTile<T, kM, kHead>;
  using DsTile = SharedTile<T, kN, kM>;
  static constexpr int kWeights = kM / 16 * 128;  // of 16 bytes
  static constexpr unsigned kBarrierBytes = 8 * (4 * kStages + 1);
  static constexpr unsigned kSharedBytes = 2 * KTile::kBytes + 2 * kStages * QTile::kBytes + DsTile::kBytes +
                                           kWeights * 16 + kStages * 2 * kM * 4 + kBarrierBytes + 4;
  static_assert(kSharedBytes <= 227 * 1024);
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_bwd_wide_sm90_kernel(const __grid_constant__ FlashAttentionBackwardParams p,
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

  SharedMemory shared;
  const auto k_tile = take_tile<KTile>(shared), v_tile = take_tile<KTile>(shared);
  T* const q_data = shared.take<T>(kStages * QTile::kElements, QTile::kAlignment);
  T* const dout_data = shared.take<T>(kStages * QTile::kElements, QTile::kAlignment);
  const auto ds_tile = take_tile<DsTile>(shared);
  uint4* const handed = shared.take<uint4>(Config::kWeights);
  float* const statistics = shared.take<float>(kStages * 2 * kM, 16);
  uint64_t* const barriers = shared.take<uint64_t>(4 * kStages + 1);
  int* const taken = shared.take<int>(1);
  BackwardWork<Config> work;
  if (!work.find(f, take_key_tile<Config>(p, query_tiles, taken), key_tiles)) return;
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

  const int warp_group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  if (warp_group == 0) {
    ptx::setmaxnreg_decrease<24>();
    if (threadIdx.x >= 32 || !ptx::elect_one() || work.steps == 0) return;
    load_backward(p, work, query_tiles, &q_map, &k_map, &v_map, &dout_map, k_tile, v_tile, kv_full, q_ring, dout_ring,
                  statistics);
    return;
  }

  ptx::setmaxnreg_increase<240>();
  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32, g = lane / 4,
            t = lane % 4;
  const int row = 16 * warp + g;  // a key of the block; and row + 8
  const Sequence& sequence = work.sequence;
  const Band band(f, sequence);
  // Named barriers beside that of both consumers: P is there; dS is there; of one consumer, + its number.
  constexpr unsigned kWeights = 2, kDs = 3, kOwn = 4;
  const bool packed = f.cu_seqlens_q != nullptr;
  PipelineState<kStages> q_state, dout_state;

  if (work.steps > 0) {
    ptx::mbarrier_wait(kv_full, 0);
    if (packed && work.row0 + kN > sequence.tk) {
      // As in bwd_sm90.cuh: what a weight of 0 does not keep out.
      clear_rows<256>(k_tile, work.rows), clear_rows<256>(v_tile, work.rows);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kBoth, 256);
    }
  }
  // Zeros for the queries of the next sequence, which a weight of 0 does not keep out either. Both rings are at dO's
  // step: consumer 1 still holds Q of the step before.
  const auto clear_queries = [&](int col0) {
    if (packed && col0 + kM > sequence.tq) {
      q_ring.wait(dout_state), dout_ring.wait(dout_state);
      clear_rows<256>(q_ring.tile(dout_state.stage()), sequence.tq - col0);
      clear_rows<256>(dout_ring.tile(dout_state.stage()), sequence.tq - col0);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kBoth, 256);
    }
  };
  const auto next_tile = [&](int& c, int& h) {
    if (++c == work.c_begin + work.c_tiles) c = work.c_begin, ++h;
  };
  // dQ = dS K in a consumer's columns, from the accumulators of wgmma to those in global memory.
  const auto issue_dq = [&](auto& dq, int column0) {
    constexpr int kColumns = 2 * std::extent_v<std::remove_reference_t<decltype(dq)>>;
    const uint64_t ds_columns = by_columns(ds_tile),
                   k_columns = advance(by_columns(k_tile), column0 / 64 * kN * KTile::kWidth);
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < kN / 16; ++n)
      ptx::wgmma_ss<T, kColumns, true, true>(dq, by_columns_step<DsTile>(ds_columns, n),
                                             by_columns_step<KTile>(k_columns, n), n != 0);
    ptx::wgmma_commit();
  };
  const auto add_dq = [&](const auto& dq, int consumer, int c, int h) {
    constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(dq)>>;
    const BackwardScratch<Config> scratch(p, query_tiles, h, work.first_tile + c);
    if (p.deterministic) {
      if (thread == 0) ptx::semaphore_wait(scratch.turns + consumer, work.turn(band, c));
      ptx::named_barrier_sync(kOwn + static_cast<unsigned>(consumer), 128);
    }
    auto* to = reinterpret_cast<float4*>(scratch.dq + 2 * consumer * kPart) + thread;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n)
      ptx::reduce_add(to + n * 128, make_float4(dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]));
    if (p.deterministic) {
      __threadfence();
      ptx::named_barrier_sync(kOwn + static_cast<unsigned>(consumer), 128);
      if (thread == 0) ptx::semaphore_add(scratch.turns + consumer, 1);
    }
  };

  if (warp_group == 1) {
    const Weighing weighing(f);
    float dv[kHead / 2] = {};
#pragma unroll 1
    for (int step = 0, c = work.c_begin, h = work.head * work.group; step < work.steps; ++step) {
      // Set, so that the compiler does not take registers of products under way for what they held before.
      float s[kM / 2] = {}, dq[Config::kColumns[0] / 2] = {};
      uint32_t weights[kM / 16][4];
      clear_queries(c * kM);
      q_ring.wait(q_state);
      const uint64_t k_rows = by_rows(k_tile), q_rows = by_rows(q_ring.tile(q_state.stage()));
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d)
        ptx::wgmma_ss<T, kM>(s, by_rows_step<KTile>(k_rows, d), by_rows_step<QTile>(q_rows, d), d != 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s);
      weigh<T, kM, true>(s, weights, weighing, band, sequence, work.row0, work.row0 + row, c * kM,
                   reinterpret_cast<const float2*>(statistics + q_state.stage() * 2 * kM + 2 * t));
#pragma unroll
      for (int n = 0; n < kM / 16; ++n)
        handed[n * 128 + thread] =
            make_uint4(ptx::pack<T>(s[8 * n], s[8 * n + 1]), ptx::pack<T>(s[8 * n + 2], s[8 * n + 3]),
                       ptx::pack<T>(s[8 * n + 4], s[8 * n + 5]), ptx::pack<T>(s[8 * n + 6], s[8 * n + 7]));
      ptx::named_barrier_arrive(kWeights, 256);

      dout_ring.wait(dout_state);
      const uint64_t dout_columns = by_columns(dout_ring.tile(dout_state.stage()));
      ptx::wgmma_fence();
      q_ring.release(q_state);
#pragma unroll
      for (int n = 0; n < kM / 16; ++n)
        ptx::wgmma_rs<T, kHead, true>(dv, weights[n], by_columns_step<QTile>(dout_columns, n), true);
      ptx::wgmma_commit();
      ptx::named_barrier_sync(kDs, 256);
      issue_dq(dq, 0);
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(dv);
      dout_ring.release(dout_state);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dq);
      add_dq(dq, 0, c, h);
      next_tile(c, h);
    }
    store_gradient<T>(dv, 1.0f, work, row, p.dv, p.dv_stride, f.value_dim, aligned.dv);
  } else {
    float dk[kHead / 2] = {};
    uint32_t dscores[kM / 16][4] = {};
    T* const ds_lane = ds_tile.at(16 * warp + lane % 16, lane / 16);
#pragma unroll 1
    for (int step = 0, c = work.c_begin, h = work.head * work.group; step < work.steps; ++step) {
      float dp[kM / 2] = {}, dq[Config::kColumns[1] / 2] = {};
      const int stage = dout_state.stage();
      clear_queries(c * kM);
      dout_ring.wait(dout_state);
      const uint64_t v_rows = by_rows(v_tile), dout_rows = by_rows(dout_ring.tile(stage));
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d)
        ptx::wgmma_ss<T, kM>(dp, by_rows_step<KTile>(v_rows, d), by_rows_step<QTile>(dout_rows, d), d != 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // dK of the step before
      ptx::wgmma_hold(dk);
      if (step > 0) q_ring.release(q_state);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dp);
      dout_ring.release(dout_state);

      q_ring.wait(q_state);
      const auto* const delta = reinterpret_cast<const float2*>(statistics + stage * 2 * kM + kM + 2 * t);
      ptx::named_barrier_sync(kWeights, 256);
#pragma unroll
      for (int n = 0; n < kM / 16; ++n) {
        const uint4 four = handed[n * 128 + thread];
        const uint32_t weights[4] = {four.x, four.y, four.z, four.w};
        const float2 delta2[2] = {delta[8 * n], delta[8 * n + 4]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = ptx::to_float(T{static_cast<uint16_t>(weights[i])}),
                      high = ptx::to_float(T{static_cast<uint16_t>(weights[i] >> 16)});
          const int e = 8 * n + 2 * i;
          dscores[n][i] = ptx::pack<T>(low * (dp[e] - delta2[i / 2].x), high * (dp[e + 1] - delta2[i / 2].y));
        }
        ptx::stmatrix_x4(chunks_on<DsTile>(ds_lane, 2 * n), dscores[n]);
      }
      ptx::fence_proxy_async();
      ptx::named_barrier_arrive(kDs, 256);
      ptx::named_barrier_sync(kOwn + 1, 128);
      issue_dq(dq, Config::kColumns[0]);
      const uint64_t q_columns = by_columns(q_ring.tile(stage));
#pragma unroll
      for (int n = 0; n < kM / 16; ++n)
        ptx::wgmma_rs<T, kHead, true>(dk, dscores[n], by_columns_step<QTile>(q_columns, n), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(dq);
      add_dq(dq, 1, c, h);
      next_tile(c, h);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(dk);
    store_gradient<T>(dk, static_cast<float>(f.scale), work, row, p.dk, p.dk_stride, f.head_dim, aligned.dk);
  }
}

}  // namespace pykernels::cuda::attention
