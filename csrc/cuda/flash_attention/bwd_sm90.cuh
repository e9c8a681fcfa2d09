// Flash attention, backward, for sm_90a (TMA, wgmma, warp specialisation): one walk over the scores, dQ added up in
// global memory, in the order in which blocks come to it unless it must be bitwise repeatable. Here the head sizes up
// to 128, and what those above (bwd_sm90_wide.cuh) share with them.
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
// into tiles and clears the accumulator and the turns.
// What must be repeatable takes turns: blocks take their tiles of keys in the order in which they start, and each adds
// to a tile of dQ after the keys before its own. A block waits only for blocks that started before it.
// Shared memory: K, V [kN, kHead]; Q, dO two stages each [kM, kHead]; statistics [2][2][kM]; dS^T [2][kN, kM]; dQ
// [2 consumers][64 * 64] fp32; the mbarriers.
#pragma once

#include "sm90.cuh"

namespace pykernels::cuda::attention {

constexpr int kPart = 64 * 64;  // elements of a part of a tile of dQ

template <class T_, int kHead_>
struct BackwardConfigSm90 {
  using T = T_;
  static constexpr int kHead = kHead_, kConsumers = 2, kN = 64 * kConsumers, kM = kHead == 64 ? 128 : 64, kStages = 2;
  static_assert(kM * kHead == 64 * 64 * kConsumers);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kParts = kConsumers;  // of dQ, [64, 64] each
  using KTile = SharedTile<T, kN, kHead>;
  using QTile = SharedTile<T, kM, kHead>;
  using DsTile = SharedTile<T, kN, kM>;
  static constexpr unsigned kBarrierBytes = 8 * (4 * kStages + 1);
  static constexpr unsigned kSharedBytes = 2 * KTile::kBytes + 2 * kStages * QTile::kBytes + 2 * DsTile::kBytes +
                                           kParts * kPart * 4 + kStages * 2 * kM * 4 + kBarrierBytes + 4;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Tiles of kM queries are numbered within a head as locate() finds them: the first of a sequence.
template <int kM>
__device__ __forceinline__ int first_query_tile(const FlashAttentionParams& f, const Sequence& s) {
  return static_cast<int>(f.cu_seqlens_q == nullptr ? s.batch * ((f.seqlen_q + kM - 1) / kM)
                                                    : s.q_first / kM + s.index);
}

// The scratch memory, for each query head and tile of queries: the statistics [2][kM], lse in log2 units and delta;
// then for all of them the accumulator of dQ, [kParts][8][128 threads][4]; then the turns, how many tiles of keys each
// consumer has added; last the number of the next tile of keys to take.
template <class Config>
inline int64_t bwd_scratch_floats(const FlashAttentionParams& f) {
  return f.heads_q * tiles_per_head(f, f.seqlen_q, Config::kM) *
             (2 * Config::kM + Config::kParts * kPart + Config::kConsumers) +
         1;
}
template <class Config>
struct BackwardScratch {
  float *statistics, *dq;
  unsigned *turns, *next;
  __device__ __forceinline__ BackwardScratch(const FlashAttentionBackwardParams& p, int query_tiles, int head,
                                             int tile) {
    constexpr int kStatistics = 2 * Config::kM, kAccumulator = Config::kParts * kPart;
    auto* scratch = static_cast<float*>(p.scratch);
    const int64_t index = head * query_tiles + tile, count = p.forward.heads_q * query_tiles;
    statistics = scratch + index * kStatistics;
    dq = scratch + count * kStatistics + index * kAccumulator;
    auto* all_turns = reinterpret_cast<unsigned*>(scratch + count * (kStatistics + kAccumulator));
    turns = all_turns + index * Config::kConsumers, next = all_turns + count * Config::kConsumers;
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
  const BackwardScratch<Config> scratch(p, query_tiles, head, tile);
  if (blockIdx.x == 0 && threadIdx.x == 0) *scratch.next = 0;
  if (!locate<kM>(f, tile, sequence, row0)) return;
  if (threadIdx.x < Config::kConsumers) scratch.turns[threadIdx.x] = 0;
  for (int i = static_cast<int>(threadIdx.x); i < Config::kParts * kPart / 4; i += 256)
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

// A block has 128 threads for each part.
template <class Config>
__global__ void __launch_bounds__(128 * Config::kParts)
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
  const int part = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  float x[32];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float4 four = reinterpret_cast<const float4*>(scratch.dq + part * kPart)[n * 128 + thread];
    x[4 * n] = four.x, x[4 * n + 1] = four.y, x[4 * n + 2] = four.z, x[4 * n + 3] = four.w;
  }
  const int row = (kM == 128 ? 64 * part : 0) + thread / 32 * 16 + thread % 32 / 4;
  const int column = kM == 128 ? 0 : 64 * part, rows = min(kM, sequence.tq - row0);
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

// The number of the tile of keys that this block takes, known to all its threads; `place` is shared memory.
template <class Config>
__device__ __forceinline__ int take_key_tile(const FlashAttentionBackwardParams& p, int query_tiles, int* place) {
  if (!p.deterministic) return static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0)
    *place = static_cast<int>(atomicAdd(BackwardScratch<Config>(p, query_tiles, 0, 0).next, 1u));
  __syncthreads();
  return *place;
}

// What a block does: found alike by its producer and its consumers.
template <class Config>
struct BackwardWork {
  Sequence sequence;
  int head;                            // of the keys
  int row0, rows;                      // the keys
  int c_begin, c_tiles, steps, group;  // the tiles of queries that see any of them, once for each of `group` heads
  int first_tile;

  // False for a slot that holds no keys.
  __device__ __forceinline__ bool find(const FlashAttentionParams& f, int key_tile, int key_tiles) {
    constexpr int kM = Config::kM, kN = Config::kN;
    head = key_tile / key_tiles;
    // The first keys first: under a causal mask most queries see them.
    if (!locate<kN, true>(f, key_tile % key_tiles, sequence, row0)) return false;
    const Band band(f, sequence);
    rows = min(kN, sequence.tk - row0);
    c_begin = max(0, row0 - band.above) / kM;
    const int c_end = min(sequence.tq, row0 + rows - band.below);
    c_tiles = c_end <= 0 ? 0 : max(0, (c_end + kM - 1) / kM - c_begin);
    group = static_cast<int>(f.heads_q / f.heads_k), steps = c_tiles * group;
    first_tile = first_query_tile<kM>(f, sequence);
    return true;
  }
  // How many tiles of keys before this one a tile of queries sees.
  __device__ __forceinline__ unsigned turn(const Band& band, int c) const {
    return static_cast<unsigned>(row0 / Config::kN - max(0, c * Config::kM + band.below) / Config::kN);
  }
};

// The producer's part, by one thread: K and V once, then the tiles of queries.
template <class Config, class KTile, class QRing>
__device__ __forceinline__ void load_backward(const FlashAttentionBackwardParams& p, const BackwardWork<Config>& work,
                                              int query_tiles, const CUtensorMap* q_map, const CUtensorMap* k_map,
                                              const CUtensorMap* v_map, const CUtensorMap* dout_map,
                                              const KTile& k_tile, const KTile& v_tile, uint64_t* kv_full,
                                              const QRing& q_ring, const QRing& dout_ring, float* statistics) {
  constexpr int kM = Config::kM;
  constexpr unsigned kStatisticsBytes = 2 * kM * 4;
  const int batch = static_cast<int>(work.sequence.batch),
            k_first = static_cast<int>(work.sequence.k_first) + work.row0;
  ptx::mbarrier_arrive_expect_tx(kv_full, 2 * KTile::kBytes);
  tma_load_panels(k_tile, k_map, kv_full, k_first, work.head, batch);
  tma_load_panels(v_tile, v_map, kv_full, k_first, work.head, batch);
  PipelineState<Config::kStages> state;  // Q and dO keep step
#pragma unroll 1
  for (int h = work.head * work.group; h < (work.head + 1) * work.group; ++h)
#pragma unroll 1
    for (int c = work.c_begin; c < work.c_begin + work.c_tiles; ++c) {
      const int token = static_cast<int>(work.sequence.q_first) + c * kM;
      const BackwardScratch<Config> scratch(p, query_tiles, h, work.first_tile + c);
      q_ring.begin(state, Config::QTile::kBytes + kStatisticsBytes);
      tma_load_panels(q_ring.tile(state.stage()), q_map, q_ring.full + state.stage(), token, h, batch);
      ptx::bulk_load(statistics + state.stage() * 2 * kM, scratch.statistics, kStatisticsBytes,
                     q_ring.full + state.stage());
      dout_ring.begin(state, Config::QTile::kBytes);
      tma_load_panels(dout_ring.tile(state.stage()), dout_map, dout_ring.full + state.stage(), token, h, batch);
      state.advance();
    }
}

// Which of a lane's elements of S^T belong to queries that see their keys, `key` and key + 8; none sees a key that is
// not there.
struct Visible {
  int from, to0, to1;  // queries, counted from this lane's first
  __device__ __forceinline__ Visible(const Band& band, const Sequence& sequence, int key, int col0) {
    const int first = col0 + 2 * (static_cast<int>(threadIdx.x) % 4), to = key - band.below - first,
              last = sequence.tq - 1 - first;
    from = key - band.above - first;
    to0 = key < sequence.tk ? min(to, last) : -kUnbounded;
    to1 = key + 8 < sequence.tk ? min(to + 8, last) : -kUnbounded;
  }
  __device__ __forceinline__ bool at(int i) const {
    const int query = 8 * (i / 4) + i % 2, half = i / 2 % 2;
    return query >= from + 8 * half && query <= (half == 0 ? to0 : to1);
  }
};

// How weights come from q k^T: 2^(factor q.k - lse), with a soft cap 2^(factor tanh(ratio q.k) - lse).
struct Weighing {
  bool capped;
  float factor, ratio;
  __device__ __forceinline__ explicit Weighing(const FlashAttentionParams& f)
      : capped(f.softcap > 0.0),
        factor(static_cast<float>(capped ? f.softcap : f.scale) * kLog2e),
        ratio(capped ? static_cast<float>(f.scale) / static_cast<float>(f.softcap) : 0.0f) {}
};

// A warp's part of S^T [64, kM] becomes P^T in T, for dV, and in place P^T times the slope of the soft cap, for dS^T.
// The warp group's keys begin at key0, this lane's are `key` and key + 8; `lse` is that of this lane's two queries in
// every eight.
template <class T, int kM, bool kCapped>
__device__ __forceinline__ void weigh(float (&s)[kM / 2], uint32_t (&weights)[kM / 16][4], const Weighing& weighing,
                                      const Band& band, const Sequence& sequence, int key0, int key, int col0,
                                      const float2* lse) {
  const bool partial = col0 + kM > sequence.tq || key0 + 64 > sequence.tk ||
                       !band.whole(col0, col0 + kM - 1, key0, key0 + 63);
  if (!(kCapped && weighing.capped)) {
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      const float2 lse2 = lse[4 * n];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[4 * n + i] = ptx::exp2(fmaf(s[4 * n + i], weighing.factor, -(i % 2 == 0 ? lse2.x : lse2.y)));
    }
    if (partial) {
      const Visible visible(band, sequence, key, col0);
#pragma unroll
      for (int i = 0; i < kM / 2; ++i)
        if (!visible.at(i)) s[i] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kM / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = ptx::pack<T>(s[8 * n + 2 * i], s[8 * n + 2 * i + 1]);
  } else {
    const Visible visible(band, sequence, key, col0);
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      // Always so. Without the branch the compiler works on all elements at once, which takes more registers than there
      // are.
      if (sequence.tq > 0) {
        const float2 lse2 = lse[4 * n];
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float share = Scores::tanh(s[4 * n + i] * weighing.ratio);
          weight[i] = ptx::exp2(fmaf(share, weighing.factor, -(i % 2 == 0 ? lse2.x : lse2.y)));
          s[4 * n + i] = weight[i] * fmaf(-share, share, 1.0f);
          if (!visible.at(4 * n + i)) weight[i] = s[4 * n + i] = 0.0f;
        }
        weights[n / 2][n % 2 * 2] = ptx::pack<T>(weight[0], weight[1]);
        weights[n / 2][n % 2 * 2 + 1] = ptx::pack<T>(weight[2], weight[3]);
      }
    }
  }
}

// A warp's part of dK or dV, times a factor, to this lane's keys `row` and row + 8 of the block's.
template <class T, class Config, int kCount>
__device__ __forceinline__ void store_gradient(const float (&x)[kCount], float factor, const BackwardWork<Config>& work,
                                               int row, void* to, const Strides3& stride, int64_t columns,
                                               bool aligned) {
  auto* first = static_cast<T*>(to) + work.sequence.batch * stride.batch +
                (work.sequence.k_first + work.row0 + row) * stride.token + work.head * stride.head;
  const float factors[2] = {factor, factor};
  store_accumulators(x, factors, row < work.rows ? first : nullptr,
                     row + 8 < work.rows ? first + 8 * stride.token : nullptr, static_cast<int>(columns), aligned);
}

// Named barriers: of both consumers; a consumer's part of dQ, + its number, is there or may be overwritten.
constexpr unsigned kBoth = 1, kPartFull = 2, kPartFree = 4, kPartThreads = 128 + 32;

// Adds a consumer's parts of dQ to the accumulator, by a warp of the producer.
template <class Config>
__device__ __forceinline__ void send_dq(const FlashAttentionBackwardParams& p, const BackwardWork<Config>& work,
                                        int query_tiles, int consumer, const float* part) {
  const Band band(p.forward, work.sequence);
#pragma unroll 1
  for (int step = 0, c = work.c_begin, h = work.head * work.group; step < work.steps; ++step) {
    ptx::named_barrier_arrive(kPartFree + static_cast<unsigned>(consumer), kPartThreads);
    ptx::named_barrier_sync(kPartFull + static_cast<unsigned>(consumer), kPartThreads);
    if (threadIdx.x % 32 == 0) {
      const BackwardScratch<Config> scratch(p, query_tiles, h, work.first_tile + c);
      if (p.deterministic) ptx::semaphore_wait(scratch.turns + consumer, work.turn(band, c));
      ptx::bulk_reduce_add(scratch.dq + consumer * kPart, part, kPart * 4);
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      if (p.deterministic) {
        ptx::bulk_wait<0>();
        ptx::semaphore_add(scratch.turns + consumer, 1);
      }
    }
    __syncwarp();
    if (++c == work.c_begin + work.c_tiles) c = work.c_begin, ++h;
  }
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

  SharedMemory shared;
  const auto k_tile = take_tile<KTile>(shared), v_tile = take_tile<KTile>(shared);
  T* const q_data = shared.take<T>(kStages * QTile::kElements, QTile::kAlignment);
  T* const dout_data = shared.take<T>(kStages * QTile::kElements, QTile::kAlignment);
  T* const ds_data = shared.take<T>(kStages * DsTile::kElements, DsTile::kAlignment);
  float* const parts = shared.take<float>(Config::kParts * kPart, 16);
  float* const statistics = shared.take<float>(kStages * 2 * kM, 16);
  uint64_t* const barriers = shared.take<uint64_t>(4 * kStages + 1);
  int* const taken = shared.take<int>(1);
  BackwardWork<Config> work;
  const int key_tile = take_key_tile<Config>(p, query_tiles, taken);
  if (!work.find(f, key_tile, key_tiles)) return;
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
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      if (ptx::elect_one() && work.steps > 0)
        load_backward(p, work, query_tiles, &q_map, &k_map, &v_map, &dout_map, k_tile, v_tile, kv_full, q_ring,
                      dout_ring, statistics);
    } else if (warp <= Config::kConsumers) {
      send_dq(p, work, query_tiles, warp - 1, parts + (warp - 1) * kPart);
    }
    return;
  }

  ptx::setmaxnreg_increase<240>();
  const int consumer = warp_group - 1, thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32,
            lane = thread % 32, g = lane / 4, t = lane % 4;
  const int row = 64 * consumer + 16 * warp + g;  // a key of the block; and row + 8
  const Sequence& sequence = work.sequence;
  const Band band(f, sequence);
  const Weighing weighing(f);
  const bool packed = f.cu_seqlens_q != nullptr;
  float dk[kHead / 2] = {}, dv[kHead / 2] = {};
  PipelineState<kStages> state;  // Q and dO keep step

  if (work.steps > 0) {
    ptx::mbarrier_wait(kv_full, 0);
    if (packed && work.row0 + kN > sequence.tk) {
      // Keys of the next sequence: their weights are 0, which does not keep out what is not finite. So below for
      // queries.
      clear_rows<256>(k_tile, work.rows), clear_rows<256>(v_tile, work.rows);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kBoth, 256);
    }
  }
#pragma unroll 1
  for (int c = work.c_begin; static_cast<int>(state.step) < work.steps;) {
    const int col0 = c * kM, stage = state.stage();
    // At head size 128 what follows from it is found in each step: the loop has no registers to hold it in.
    const int own = kHead == 64 ? consumer : ptx::unhoisted(consumer);
    const uint64_t k_rows = by_rows(k_tile, 64 * own), v_rows = by_rows(v_tile, 64 * own);
    const QTile q = q_ring.tile(stage), dout = dout_ring.tile(stage);
    const DsTile ds{ds_data + stage * DsTile::kElements};
    T* const ds_lane = ds.at(64 * own + 16 * warp + lane % 16, lane / 16);
    // Set, so that the compiler does not take registers of products under way for what they held before.
    float s[kM / 2] = {}, dp[kM / 2] = {};
    uint32_t weights[kM / 16][4], dscores[kM / 16][4];

    q_ring.wait(state);
    if (packed && col0 + kM > sequence.tq) {
      dout_ring.wait(state);
      clear_rows<256>(q, sequence.tq - col0), clear_rows<256>(dout, sequence.tq - col0);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kBoth, 256);
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d)
      ptx::wgmma_ss<T, kM>(s, by_rows_step<KTile>(k_rows, d), by_rows_step<QTile>(by_rows(q), d), d != 0);
    ptx::wgmma_commit();
    dout_ring.wait(state);
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
    weigh<T, kM, kHead != 64>(s, weights, weighing, band, sequence, work.row0 + 64 * consumer,
                              work.row0 + ptx::unhoisted(row), col0, lse);
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
    // dS^T by columns, this consumer's queries; K by columns, this consumer's columns.
    const uint64_t ds_columns = advance(by_columns(ds), kM == 128 ? own * kN * DsTile::kWidth : 0),
                   k_columns = advance(by_columns(k_tile), kM == 64 ? own * kN * KTile::kWidth : 0);
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
    PipelineState<kStages> dout_state = state;
    dout_ring.release(dout_state);

    ptx::named_barrier_sync(kPartFree + static_cast<unsigned>(consumer), kPartThreads);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      reinterpret_cast<float4*>(parts + own * kPart)[n * 128 + thread] =
          make_float4(dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]);
    ptx::fence_proxy_async();
    ptx::named_barrier_arrive(kPartFull + static_cast<unsigned>(consumer), kPartThreads);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(dk);
    q_ring.release(state);
    if (++c == work.c_begin + work.c_tiles) c = work.c_begin;
  }

  // Found again: the loop has no registers to hold it in.
  work.find(f, ptx::unhoisted(key_tile), key_tiles);
  store_gradient<T>(dk, static_cast<float>(f.scale), work, row, p.dk, p.dk_stride, f.head_dim, aligned.dk);
  store_gradient<T>(dv, 1.0f, work, row, p.dv, p.dv_stride, f.value_dim, aligned.dv);
}

// Null, or what went wrong.
template <class Config, class Kernel>
const char* launch_bwd_sm90(Kernel kernel, const FlashAttentionBackwardParams& p, cudaStream_t stream) {
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
  if (const char* error = launch(kernel,
                                 {dim3(static_cast<unsigned>(key_tiles64 * f.heads_k)), dim3(Config::kThreads),
                                  Config::kSharedBytes, stream},
                                 p, q_map, k_map, v_map, dout_map, key_tiles, query_tiles, a))
    return error;
  LaunchConfig by_part = by_query;
  by_part.block = dim3(128 * Config::kParts);
  return launch(flash_attention_bwd_finish_sm90_kernel<Config>, by_part, p, query_tiles,
                aligned(p.dq, p.dq_stride));
}

// Each defined in a file of its own, so that they compile side by side.
#define PYKERNELS_DECLARE_BWD_SM90(head) \
  const char* bwd_sm90_##head(const FlashAttentionBackwardParams& p, cudaStream_t stream);
PYKERNELS_DECLARE_BWD_SM90(64)
PYKERNELS_DECLARE_BWD_SM90(128)
PYKERNELS_DECLARE_BWD_SM90(192)
PYKERNELS_DECLARE_BWD_SM90(256)
#undef PYKERNELS_DECLARE_BWD_SM90

#define PYKERNELS_DEFINE_BWD_SM90(head, kernel, Config)                                       \
  namespace pykernels::cuda::attention {                                                      \
  const char* bwd_sm90_##head(const FlashAttentionBackwardParams& p, cudaStream_t stream) {   \
    return p.forward.dtype == DType::kBFloat16                                                \
               ? launch_bwd_sm90<Config<BFloat16, head>>(kernel<Config<BFloat16, head>>, p, stream) \
               : launch_bwd_sm90<Config<Float16, head>>(kernel<Config<Float16, head>>, p, stream);  \
  }                                                                                           \
  }

}  // namespace pykernels::cuda::attention
