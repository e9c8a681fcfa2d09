// Flash attention, forward, for sm_90a (TMA, wgmma, warp specialisation).
//
// A block has one producer warp group and kConsumers consumer warp groups, and stays on its multiprocessor: it takes
// tile after tile of kM = 64 kConsumers queries of one head (Schedule). One lane of the producer loads by TMA, Q once
// per tile, K and V into rings of kStages tiles of kN keys; its registers go to the consumers, which own 64 queries
// each and walk the keys from the last tile that they see to the first:
//   S = Q K^T from shared memory; m, l and P = 2^(S - m) as in the sm_80 kernel; O += P V with P from registers.
// A consumer overlaps its own two products with its softmax: S of the next tile is issued before P V of this one, and
// softmax of the next runs while P V does. With kPingPong the warp groups also take turns in issuing, so that one's
// softmax meets the other's products.
// Shared memory: Q [kM, kHead]; K, V [kStages][kN, kHead]; the mbarriers. Each output goes from registers to global
// memory, so Q is free for the next tile after the last S.
#pragma once

#include "sm90.cuh"

namespace pykernels::cuda::attention {

template <class T_, int kHead_, int kN_, int kConsumers_, int kStages_>
struct ForwardConfigSm90 {
  using T = T_;
  static constexpr int kHead = kHead_, kN = kN_, kConsumers = kConsumers_, kStages = kStages_;
  static constexpr int kM = 64 * kConsumers;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr bool kPingPong = kHead <= 128;
  // Of 64 K: what the launch gives each thread, 168 or 128, is shared out anew.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32, kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  using QTile = SharedTile<T, kM, kHead>;
  using KTile = SharedTile<T, kN, kHead>;
  using KRing = Ring<KTile, kStages>;
  // Regions in the order in which the kernel takes them.
  static constexpr unsigned ring(unsigned end) {
    return SharedMemory::place(end, KTile::kAlignment) + kStages * (KTile::kBytes + 16);
  }
  static constexpr unsigned kSharedBytes = ring(ring(QTile::kBytes)) + 16;
  static_assert(kSharedBytes <= 227 * 1024);
};

// What a block does for one tile: found alike by its producer and its consumers.
struct ForwardWork {
  int64_t head;
  Sequence sequence;
  int m0, rows, steps_begin, steps_end;

  // False for a slot that holds no queries.
  template <int kM, int kN>
  __device__ __forceinline__ bool find(const FlashAttentionParams& p, const Schedule& schedule, int head_, int tile) {
    head = head_;
    // The last queries first: under a causal mask they take longest.
    if (!locate<kM>(p, schedule.tiles - 1 - tile, sequence, m0)) return false;
    rows = min(kM, sequence.tq - m0);
    const Band band(p, sequence);
    const int keys_end = min(sequence.tk, m0 + rows + band.above);
    steps_begin = max(0, m0 + band.below) / kN, steps_end = keys_end <= 0 ? 0 : (keys_end + kN - 1) / kN;
    return true;
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash_attention_fwd_sm90_kernel(const __grid_constant__ FlashAttentionParams p,
                                    const __grid_constant__ CUtensorMap q_map,
                                    const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map, const Schedule schedule,
                                    const bool aligned_out) {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  constexpr int kHead = Config::kHead, kN = Config::kN, kM = Config::kM, kConsumers = Config::kConsumers,
                kStages = Config::kStages;
  SharedMemory shared;
  const auto q_tile = take_tile<QTile>(shared);
  const auto k_ring = take_ring<KTile, kStages>(shared), v_ring = take_ring<KTile, kStages>(shared);
  uint64_t* q_full = shared.take<uint64_t>(2);
  uint64_t* q_empty = q_full + 1;
  if (threadIdx.x == 0) {
    k_ring.initialise(4 * kConsumers), v_ring.initialise(4 * kConsumers);
    ptx::mbarrier_init(q_full, 1), ptx::mbarrier_init(q_empty, 4 * kConsumers);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch(&q_map), ptx::tma_prefetch(&k_map), ptx::tma_prefetch(&v_map);
  }
  __syncthreads();

  // The same in all lanes of a warp, and known to be.
  const int warp_group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  const int group_size = static_cast<int>(p.heads_q / p.heads_k);
  int taken_head, taken_tile;
  ForwardWork work;
  if (warp_group == 0) {
    ptx::setmaxnreg_decrease<Config::kProducerRegisters>();
    if (threadIdx.x >= 32 || !ptx::elect_one()) return;
    PipelineState<kStages> k_state, v_state;
    unsigned q_parity = 0;
    for (int round = 0; schedule.take(round, taken_head, taken_tile); ++round) {
      if (!work.find<kM, kN>(p, schedule, taken_head, taken_tile) || work.steps_begin >= work.steps_end) continue;
      const int head_k = taken_head / group_size, batch = static_cast<int>(work.sequence.batch);
      const int q_first = static_cast<int>(work.sequence.q_first), k_first = static_cast<int>(work.sequence.k_first);
      k_ring.load(k_state, &k_map, k_first + (work.steps_end - 1) * kN, head_k, batch);
      ptx::mbarrier_wait(q_empty, q_parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(q_full, QTile::kBytes);
      tma_load_panels(q_tile, &q_map, q_full, q_first + work.m0, taken_head, batch);
      q_parity ^= 1;
      // K runs one tile ahead of V, as it does in the consumers.
      for (int step = work.steps_end - 1; step > work.steps_begin; --step) {
        k_ring.load(k_state, &k_map, k_first + (step - 1) * kN, head_k, batch);
        v_ring.load(v_state, &v_map, k_first + step * kN, head_k, batch);
      }
      v_ring.load(v_state, &v_map, k_first + work.steps_begin * kN, head_k, batch);
    }
    return;
  }

  ptx::setmaxnreg_increase<Config::kConsumerRegisters>();
  const int consumer = warp_group - 1;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = 64 * consumer + 16 * warp + g;  // of the tile; and row + 8
  const Scores scores(p);
  const uint64_t q_operand = by_rows(q_tile, 64 * consumer);
  PipelineState<kStages> k_state, v_state;
  unsigned q_parity = 0;

  // Turns: barrier 1 + i is consumer i's.
  const auto wait_turn = [&] {
    if constexpr (Config::kPingPong) ptx::named_barrier_sync(static_cast<unsigned>(1 + consumer), 256);
  };
  const auto give_turn = [&] {
    if constexpr (Config::kPingPong)
      ptx::named_barrier_arrive(static_cast<unsigned>(1 + (consumer + 1) % kConsumers), 256);
  };
  if (consumer == kConsumers - 1) give_turn();

  for (int round = 0; schedule.take(round, taken_head, taken_tile); ++round) {
    if (!work.find<kM, kN>(p, schedule, taken_head, taken_tile)) continue;
    const Band band(p, work.sequence);
    const int m0 = work.m0, tk = work.sequence.tk;
    const float slope = work.steps_begin < work.steps_end ? scores.slope(p, work.sequence, work.head) : 0.0f;
    float o[kHead / 2] = {}, s[kN / 2];
    uint32_t weights[kN / 16][4];
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f}, rescale[2];

    const auto issue_scores = [&] {  // S = Q K^T
      const uint64_t k_operand = by_rows(k_ring.tile(k_state.stage()));
      ptx::wgmma_fence();
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d)
        ptx::wgmma_ss<T, kN>(s, by_rows_step<QTile>(q_operand, d), by_rows_step<KTile>(k_operand, d), d != 0);
      ptx::wgmma_commit();
    };
    const auto issue_output = [&] {  // O += P V
      const uint64_t v_operand = by_columns(v_ring.tile(v_state.stage()));
      ptx::wgmma_fence();
#pragma unroll
      for (int n = 0; n < kN / 16; ++n)
        ptx::wgmma_rs<T, kHead, true>(o, weights[n], by_columns_step<KTile>(v_operand, n), true);
      ptx::wgmma_commit();
    };
    // S becomes P in place; the running maximum and sum move on, and `rescale` is what O must be multiplied with.
    const auto softmax = [&](int step) {
      const int n0 = step * kN, first = m0 + 64 * consumer;
      if (!scores.plain()) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) s[i] = scores.transform(s[i]);
      }
      if (slope != 0.0f) {
        // From row g's position to this lane's first key.
        const auto distance = static_cast<float>(n0 + 2 * t - (m0 + row + tk - work.sequence.tq));
#pragma unroll
        for (int i = 0; i < kN / 2; ++i)
          s[i] -= slope * fabsf(distance + static_cast<float>(i / 4 * 8 + i % 2 - i / 2 % 2 * 8));
      }
      if (n0 + kN > tk || !band.whole(first, first + 63, n0, n0 + kN - 1)) {
        // The keys that rows g and g + 8 see, counted from this lane's first.
        const int from = m0 + row + band.below - n0 - 2 * t, to = m0 + row + band.above - n0 - 2 * t,
                  last = tk - 1 - n0 - 2 * t;
        const int to0 = min(to, last), to1 = min(to + 8, last);
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          const int key = 8 * (i / 4) + i % 2, half = i / 2 % 2;
          if (key < from + 8 * half || key > (half == 0 ? to0 : to1)) s[i] = -INFINITY;
        }
      }
      // Always so. A branch is what keeps the compiler from moving the wait for P V, which follows, in front of the
      // exponentials that should run meanwhile.
      if (work.rows > 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float largest = row_max[half];
#pragma unroll
          for (int n = 0; n < kN / 8; ++n)
            largest = fmaxf(largest, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
          largest = warp_reduce<4>(largest, Max());
          // A row that has seen nothing yet: any finite shift gives zeros.
          const float shift = largest == -INFINITY ? 0.0f : largest * scores.factor;
          rescale[half] = ptx::exp2(row_max[half] * scores.factor - shift);
          row_max[half] = largest;
          row_sum[half] *= rescale[half];
#pragma unroll
          for (int n = 0; n < kN / 8; ++n)
#pragma unroll
            for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
              s[i] = ptx::exp2(fmaf(s[i], scores.factor, -shift));
              row_sum[half] += s[i];
            }
        }
      }
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int n = 0; n < kN / 16; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[n][i] = ptx::pack<T>(s[8 * n + 2 * i], s[8 * n + 2 * i + 1]);
    };
    const auto release_q = [&] {
      if (lane == 0) ptx::mbarrier_arrive(q_empty);
    };

    if (work.steps_begin < work.steps_end) {
      int step = work.steps_end - 1;
      ptx::mbarrier_wait(q_full, q_parity);
      q_parity ^= 1;
      k_ring.wait(k_state);
      issue_scores();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s);
      k_ring.release(k_state);
      if (step == work.steps_begin) release_q();
      softmax(step);
      pack_weights();
      if (p.cu_seqlens_k != nullptr && step * kN + kN > tk) {
        // The tile's last rows are values of the next sequence, which a weight of 0 does not keep out if they are not
        // finite.
        v_ring.wait(v_state);
        const KTile v = v_ring.tile(v_state.stage());
        const int first = tk - step * kN;
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x) - 128; i < (kN - first) * KTile::kChunks; i += 128 * kConsumers)
          *reinterpret_cast<uint4*>(v.at(first + i / KTile::kChunks, i % KTile::kChunks)) = make_uint4(0, 0, 0, 0);
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(1 + kConsumers, 128 * kConsumers);
      }
#pragma unroll 1
      for (; step > work.steps_begin; --step) {
        k_ring.wait(k_state);
        wait_turn();
        issue_scores();
        v_ring.wait(v_state);
        issue_output();
        give_turn();
        ptx::wgmma_wait<1>();
        ptx::wgmma_hold(s);
        k_ring.release(k_state);
        if (step - 1 == work.steps_begin) release_q();
        softmax(step - 1);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(o);
        v_ring.release(v_state);
#pragma unroll
        for (int i = 0; i < kHead / 2; ++i) o[i] *= rescale[i / 2 % 2];
        pack_weights();
      }
      v_ring.wait(v_state);
      issue_output();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(o);
      v_ring.release(v_state);
    }

    const int64_t token = work.sequence.q_first + m0;
    auto* lse = static_cast<float*>(p.lse) + (work.sequence.batch * p.heads_q + work.head) * p.seqlen_q + token;
    auto* out = static_cast<T*>(p.out) + work.sequence.batch * p.out_stride.batch + token * p.out_stride.token +
                work.head * p.out_stride.head;
    const float sink = sink_log2(p, work.sequence, work.head);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowEnd end(row_max[half] * scores.factor, warp_reduce<4>(row_sum[half], Sum()), sink);
      inverse[half] = end.inverse;
      if (t == 0 && row + 8 * half < work.rows) lse[row + 8 * half] = end.lse;
    }
    store_accumulators(o, inverse, row < work.rows ? out + row * p.out_stride.token : nullptr,
                       row + 8 < work.rows ? out + (row + 8) * p.out_stride.token : nullptr,
                       static_cast<int>(p.value_dim), aligned_out);
  }
  // The last turn that was given has no taker.
  if (consumer == 0) wait_turn();
}

template <class T, int kHead>
struct ForwardTilesSm90;
template <class T>
struct ForwardTilesSm90<T, 64> : ForwardConfigSm90<T, 64, 128, 3, 4> {};
template <class T>
struct ForwardTilesSm90<T, 96> : ForwardConfigSm90<T, 96, 128, 2, 3> {};
template <class T>
struct ForwardTilesSm90<T, 128> : ForwardConfigSm90<T, 128, 128, 2, 2> {};
template <class T>
struct ForwardTilesSm90<T, 192> : ForwardConfigSm90<T, 192, 112, 2, 2> {};
template <class T>
struct ForwardTilesSm90<T, 256> : ForwardConfigSm90<T, 256, 80, 2, 2> {};

// Null, or what went wrong.
template <class T, int kHead>
const char* launch_fwd_sm90(const FlashAttentionParams& p, cudaStream_t stream) {
  using Config = ForwardTilesSm90<T, kHead>;
  const int64_t tiles = tiles_per_head(p, p.seqlen_q, Config::kM);
  if (tiles * p.heads_q == 0) return nullptr;
  if (tiles * p.heads_q > INT32_MAX) return "more tiles of queries than the schedule counts";
  CUtensorMap q_map, k_map, v_map;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  if (const char* error = map_tokens<QTile>(&q_map, p.dtype, Config::kM, p.q, p.q_stride, p.batch, p.seqlen_q,
                                            p.heads_q, p.head_dim))
    return error;
  if (const char* error = map_tokens<KTile>(&k_map, p.dtype, Config::kN, p.k, p.k_stride, p.batch, p.seqlen_k,
                                            p.heads_k, p.head_dim))
    return error;
  if (const char* error = map_tokens<KTile>(&v_map, p.dtype, Config::kN, p.v, p.v_stride, p.batch, p.seqlen_k,
                                            p.heads_k, p.value_dim))
    return error;
  const Schedule schedule = make_schedule(tiles, p.heads_q, p.heads_q / p.heads_k,
                                          2 * p.batch * p.seqlen_k * (p.head_dim + p.value_dim));
  const unsigned blocks = static_cast<unsigned>(std::min(multiprocessors(), schedule.total));
  return launch(flash_attention_fwd_sm90_kernel<Config>,
                {dim3(blocks), dim3(Config::kThreads), Config::kSharedBytes, stream}, p, q_map, k_map, v_map, schedule,
                aligned(p.out, p.out_stride));
}

// Each defined in a file of its own, so that they compile side by side.
#define PYKERNELS_DECLARE_FWD_SM90(head) \
  const char* fwd_sm90_##head(const FlashAttentionParams& p, cudaStream_t stream);
PYKERNELS_DECLARE_FWD_SM90(64)
PYKERNELS_DECLARE_FWD_SM90(96)
PYKERNELS_DECLARE_FWD_SM90(128)
PYKERNELS_DECLARE_FWD_SM90(192)
PYKERNELS_DECLARE_FWD_SM90(256)
#undef PYKERNELS_DECLARE_FWD_SM90

#define PYKERNELS_DEFINE_FWD_SM90(head)                                             \
  namespace pykernels::cuda::attention {                                            \
  const char* fwd_sm90_##head(const FlashAttentionParams& p, cudaStream_t stream) { \
    return p.dtype == DType::kBFloat16 ? launch_fwd_sm90<BFloat16, head>(p, stream) \
                                       : launch_fwd_sm90<Float16, head>(p, stream); \
  }                                                                                 \
  }

}  // namespace pykernels::cuda::attention
