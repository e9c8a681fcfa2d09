// The walk for 16-bit elements and no decay, or one per head or token, for sm_80 and newer (mma.sync, cp.async).
//
// Shared memory: a, b [2][kChunk, inner], c [2][kChunk, kColumns], the weighted scores [kChunk, kChunk], decays [2].
// Two barriers per chunk: behind the first the present stage has arrived and the other one is no longer read, behind
// the second the scores are there.
#pragma once

#include "walk.cuh"

namespace pykernels::cuda::linear {

// What a walk is compiled for: states alone, a result, or all that gradients of decay and bonus, and the bonus, add.
enum class Mode { kStates, kResult, kGeneral };

template <class T_, int kInner_, Mode kMode_>
struct WalkConfig {
  using T = T_;
  static constexpr int kInner = kInner_;  // in shared memory and registers; what a and b lack is zero
  static constexpr Mode kMode = kMode_;
  using InnerTile = SharedTile<T, kChunk, kInner>;
  using ColumnTile = SharedTile<T, kChunk, kColumns>;
  using ScoreTile = SharedTile<T, kChunk, kChunk>;
  // Of a multiprocessor, as many as their registers allow without spills.
  static constexpr int kBlocks = (kInner <= 64 ? 4 : kInner <= 128 ? 3 : 2) - (kMode == Mode::kGeneral && kInner < 256);
  static constexpr unsigned kSharedBytes = 4 * InnerTile::kBytes + 2 * ColumnTile::kBytes + ScoreTile::kBytes +
                                           2 * sizeof(Decays) + kChunk * sizeof(float);
};

// What pack<T>(low, high) = packed lost.
template <class T>
__device__ __forceinline__ uint32_t pack_rest(float low, float high, uint32_t packed) {
  return ptx::pack<T>(low - ptx::to_float(T{static_cast<uint16_t>(packed)}),
                      high - ptx::to_float(T{static_cast<uint16_t>(packed >> 16)}));
}

// d += a b, b two neighbouring 16 x 8 blocks of a state, given as the accumulators of its transpose. `exactly`: in
// twice the instructions, with what rounding the state loses.
template <class T>
__device__ __forceinline__ void mma_state(float (&d)[2][4], const uint32_t (&a)[4], const float (&low)[4],
                                          const float (&high)[4], bool exactly) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t b[2] = {ptx::pack<T>(low[2 * n], low[2 * n + 1]), ptx::pack<T>(high[2 * n], high[2 * n + 1])};
      ptx::mma_m16n8k16<T>(d[n], a, b, d[n]);
      if (!exactly) continue;
      b[0] = pack_rest<T>(low[2 * n], low[2 * n + 1], b[0]), b[1] = pack_rest<T>(high[2 * n], high[2 * n + 1], b[1]);
      ptx::mma_m16n8k16<T>(d[n], a, b, d[n]);
    }
  } else {
    // The range of fp16 would limit how much a state may add up; tf32 is as precise. The inner axis is taken in the
    // order in which lanes hold it: columns 2t and 2t + 1 stand for t and t + 4.
    const auto half = [](uint32_t pair, int i) {
      return __float_as_uint(ptx::to_float(Float16{static_cast<uint16_t>(pair >> 16 * i)}));
    };
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t wide[4] = {half(a[2 * part], 0), half(a[2 * part + 1], 0), half(a[2 * part], 1),
                                half(a[2 * part + 1], 1)};
      const float(&state)[4] = part == 0 ? low : high;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[2] = {ptx::to_tf32(state[2 * n]), ptx::to_tf32(state[2 * n + 1])};
        ptx::mma_m16n8k8_tf32(d[n], wide, b, d[n]);
        if (!exactly) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) b[i] = ptx::to_tf32(state[2 * n + i] - __uint_as_float(b[i]));
        ptx::mma_m16n8k8_tf32(d[n], wide, b, d[n]);
      }
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kBlocks)
    linear_attention_walk_sm80_kernel(const __grid_constant__ Walk w) {
  using T = typename Config::T;
  constexpr int kInner = Config::kInner;
  // Rounding an update is shared by a whole row of the state, so that few errors average out. In bf16 other roundings
  // hide that; in fp16 what it loses is added too.
  constexpr bool kExactUpdate = std::is_same_v<T, Float16>;
  constexpr bool kResult = Config::kMode != Mode::kStates, kGeneral = Config::kMode == Mode::kGeneral;
  const Call& call = w.call;
  const int64_t head = blockIdx.x % call.heads, slot = blockIdx.x / call.heads;
  Segment segment;
  if (!locate(call, slot, segment)) return;
  const Span span(w, segment);
  const int begin = span.begin, chunks = span.chunks;
  if (!kResult && span.final) return;

  SharedMemory shared;
  const auto a_even = take_tile<typename Config::InnerTile>(shared),
             a_odd = take_tile<typename Config::InnerTile>(shared);
  const auto b_even = take_tile<typename Config::InnerTile>(shared),
             b_odd = take_tile<typename Config::InnerTile>(shared);
  const auto c_even = take_tile<typename Config::ColumnTile>(shared),
             c_odd = take_tile<typename Config::ColumnTile>(shared);
  const auto score_tile = take_tile<typename Config::ScoreTile>(shared);
  Decays* const decays = shared.take<Decays>(2);
  float* const diagonal = shared.take<float>(kChunk);

  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int inner = static_cast<int>(w.inner), columns = static_cast<int>(w.columns);
  const int slice = static_cast<int>(blockIdx.y) * kColumns;
  const int warp_column = slice + 16 * warp;  // of the result
  const bool active = warp_column < columns;  // the warp has columns
  const bool bonus = kGeneral && call.bonus != nullptr;

  float state[kInner / 8][4];
  const StatePlace place(w, warp_column);
  begin_state<kInner>(state, place, w, segment, span, slot, head, kResult);

  // Chunk `step` in walking order.
  const auto chunk_first = [&](int step) { return begin + (w.descending ? chunks - 1 - step : step) * kChunk; };
  const auto chunk_size = [&](int at) { return min(kChunk, segment.length - at); };
  const auto load_stage = [&](int step) {
    if (step < chunks) {
      const int at = chunk_first(step), n = chunk_size(at);
      if (kResult) load_operand<T>(stage(step, a_even, a_odd), w.a, segment, head, at, n, 0, inner);
      load_operand<T>(stage(step, b_even, b_odd), w.b, segment, head, at, n, 0, inner);
      load_operand<T>(stage(step, c_even, c_odd), w.c, segment, head, at, n, slice, columns);
    }
    ptx::cp_async_commit();
  };
  // Of tokens [B, T, H].
  const auto row_index = [&](int time) {
    return (segment.batch * call.tokens + segment.origin + int64_t{time} * segment.step) * call.heads + head;
  };
  const auto load_decays = [&](int step) {
    if (step >= chunks) return;
    const int at = chunk_first(step), n = chunk_size(at);
    float weight = call.scale;
    if (w.denominator != nullptr && lane < n) weight /= w.denominator[row_index(at + lane)];
    make_decays(decays[step % 2], lane_decay(call, segment, head, at, n), weight, call.bonus != nullptr);
  };
  // The scores are four blocks of 16 x 16, one for each warp; that of the queries before keys is empty, and its warp
  // makes the decays of the next chunk meanwhile.
  const int block_x = warp / 2, block_y = warp % 2;
  const bool no_scores = w.descending ? block_x > block_y : block_x < block_y;

  float log_factor = 0.0f;      // of the segment
  float dbonus[2][2] = {};      // of columns 8n + 2t, 8n + 2t + 1
  load_stage(0);
  if (no_scores) load_decays(0);
#pragma unroll 1
  for (int step = 0; step < chunks; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_stage(step + 1);
    const auto a_now = stage(step, a_even, a_odd), b_now = stage(step, b_even, b_odd);
    const auto c_now = stage(step, c_even, c_odd);
    const Decays& decay = decays[step % 2];
    const int at = chunk_first(step), n_tokens = chunk_size(at);

    if (no_scores) {
      load_decays(step + 1);
    } else if (kResult) {
      float s[2][4] = {};
#pragma unroll
      for (int d = 0; d < kInner / 16; ++d) {
        uint32_t a[4], b[2][2];
        load_a(a, a_now, 16 * block_x, 16 * d);
        load_b(b, b_now, 16 * block_y, 16 * d);
        ptx::mma_m16n8k16<T>(s[0], a, b[0], s[0]);
        ptx::mma_m16n8k16<T>(s[1], a, b[1], s[1]);
      }
      float own[2] = {0.0f, 0.0f};  // with a bonus: the diagonal's scores of rows g and g + 8
      if (bonus && block_x == block_y && w.scores_of_state) {
        // Two lanes for each row, every other chunk of 8.
        const float* u = call.bonus + head * inner;
        const int row = 16 * block_x + lane / 2;
        float sum = 0.0f;
        for (int chunk = lane % 2; 8 * chunk < inner; chunk += 2)
          for (int e = 0; e < 8 && 8 * chunk + e < inner; ++e)
            sum = fmaf(ptx::to_float(a_now.at(row, chunk)[e]) * u[8 * chunk + e],
                       ptx::to_float(b_now.at(row, chunk)[e]), sum);
        sum += __shfl_xor_sync(~0u, sum, 1);
        own[0] = __shfl_sync(~0u, sum, 2 * g), own[1] = __shfl_sync(~0u, sum, 2 * (g + 8));
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int x = 16 * block_x + g + 8 * (i / 2), y = 16 * block_y + 8 * n + 2 * t + i % 2;
          const int query = w.descending ? y : x, key = w.descending ? x : y;
          float score = s[n][i] * decay.weight[query];
          if (query < key) {
            score = 0.0f;
          } else if (bonus && query == key) {
            if (w.scores_of_state) {
              score = own[i / 2] * decay.weight[query];
            } else {
              diagonal[x] = score;
              score = 0.0f;
            }
          } else if (call.decay != nullptr) {
            score *= expf(decay.between(query - (bonus ? 1 : 0), key));
          }
          s[n][i] = score;
        }
        auto* to = reinterpret_cast<uint32_t*>(score_tile.at(16 * block_x + g, 2 * block_y + n));
        to[t] = ptx::pack<T>(s[n][0], s[n][1]);
        to = reinterpret_cast<uint32_t*>(score_tile.at(16 * block_x + g + 8, 2 * block_y + n));
        to[t] = ptx::pack<T>(s[n][2], s[n][3]);
      }
    }
    if (kResult) __syncthreads();

    const float total = decay.total;
    log_factor += total;
    if (!active) continue;
    if constexpr (kResult) {
      float out[2][2][4] = {};  // 16-row blocks, 8-column blocks
#pragma unroll
      for (int d = 0; d < kInner / 16; ++d) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t a[4];
          load_a(a, a_now, 16 * m, 16 * d);
          mma_state<T>(out[m], a, state[2 * d], state[2 * d + 1], kGeneral && w.row_dots != nullptr);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + g + 8 * half;
          const float factor = w.descending ? decay.key[row] : decay.query[row] * decay.weight[row];
#pragma unroll
          for (int n = 0; n < 2; ++n) out[m][n][2 * half] *= factor, out[m][n][2 * half + 1] *= factor;
        }
      const T* const d_row = !kGeneral || w.d.data == nullptr ? nullptr : w.d.template start<T>(segment, head);
      const int64_t d_stride = w.d.stride.token * segment.step;
      const auto d_at = [&](int row, int column) {  // 0 outside of the tensor
        return row < n_tokens && column < columns ? ptx::to_float(d_row[(at + row) * d_stride + column]) : 0.0f;
      };
      if (kGeneral && w.row_dots != nullptr) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + g + 8 * half;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                sum = fmaf(out[m][n][2 * half + e], d_at(row, warp_column + 8 * n + 2 * t + e), sum);
            sum = warp_reduce<4>(sum, Sum());
            if (t == 0 && row < n_tokens)
              w.row_dots[warp_column / 16 * (call.batch * call.tokens * call.heads) + row_index(at + row)] = sum;
          }
        const int64_t chunk = slot * kChunksPerSegment + (at - begin) / kChunk;
        float4* const kept = chunk_state<kInner>(w, chunk * call.heads + head, warp_column);
        if (w.descending) {
          float sum = 0.0f;
#pragma unroll
          for (int n = 0; n < kInner / 8; ++n) {
            const float4 other = kept[32 * n];
            sum = fmaf(other.x, state[n][0], sum), sum = fmaf(other.y, state[n][1], sum);
            sum = fmaf(other.z, state[n][2], sum), sum = fmaf(other.w, state[n][3], sum);
          }
          sum = warp_reduce(sum, Sum());
          if (lane == 0)
            w.chunk_dots[(warp_column / 16 * call.segments() * kChunksPerSegment + chunk) * call.heads + head] = sum;
        } else {
          keep_chunk_state<kInner>(kept, state);
        }
      }

#pragma unroll
      for (int y = 0; y < 2; ++y) {
        uint32_t b[2][2];
        load_b_trans(b, c_now, 16 * y, 16 * warp);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (w.descending ? y < m : y > m) continue;
          uint32_t a[4];
          load_a(a, score_tile, 16 * m, 16 * y);
          ptx::mma_m16n8k16<T>(out[m][0], a, b[0], out[m][0]);
          ptx::mma_m16n8k16<T>(out[m][1], a, b[1], out[m][1]);
        }
      }

#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + g + 8 * half;
          if (row >= n_tokens) continue;
          const int64_t index = row_index(at + row);
          const float inverse = w.divisor != nullptr ? 1.0f / w.divisor[index] : 1.0f;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int column = warp_column + 8 * n + 2 * t;
            float x[2] = {out[m][n][2 * half], out[m][n][2 * half + 1]};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (column + e >= columns) continue;
              if (bonus && !w.scores_of_state) {
                const float c = ptx::to_float(c_now.at(row, 2 * warp + n)[2 * t + e]);
                x[e] = fmaf(diagonal[row] * c, call.bonus[head * columns + column + e], x[e]);
                if (w.dbonus != nullptr) dbonus[n][e] = fmaf(diagonal[row] * c, d_at(row, column + e), dbonus[n][e]);
              }
              if (w.addend != nullptr) x[e] += w.addend[index * columns + column + e];
              x[e] = fmaf(x[e], inverse, w.epsilon);
            }
            if (column >= columns) continue;
            if (w.wide) {
              auto* to = static_cast<float*>(w.result) + index * columns + column;
              to[0] = x[0];
              if (column + 1 < columns) to[1] = x[1];
            } else {
              auto* to = static_cast<T*>(w.result) + index * columns + column;
              const uint32_t both = ptx::pack<T>(x[0], x[1]);
              if (columns % 2 == 0) {
                *reinterpret_cast<uint32_t*>(to) = both;
              } else {
                to[0] = T{static_cast<uint16_t>(both)};
                if (column + 1 < columns) to[1] = T{static_cast<uint16_t>(both >> 16)};
              }
            }
          }
        }
    }

    // The state after the chunk.
    if (call.decay != nullptr) {
      const float factor = expf(total);
#pragma unroll
      for (int n = 0; n < kInner / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[n][i] *= factor;
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      // Operand a is c^T with the factors of its columns.
      uint32_t c[4], high[4], low[4];
      load_a_trans(c, c_now, 16 * y, 16 * warp);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 16 * y + 8 * (i / 2) + 2 * t + e;
          const float factor = w.descending ? decay.query[row] * decay.weight[row] : decay.key[row];
          x[e] = ptx::to_float(T{static_cast<uint16_t>(c[i] >> 16 * e)}) * factor;
        }
        high[i] = ptx::pack<T>(x[0], x[1]);
        if constexpr (kExactUpdate) low[i] = pack_rest<T>(x[0], x[1], high[i]);
      }
#pragma unroll
      for (int d = 0; d < kInner / 16; ++d) {
        uint32_t b[2][2];
        load_b_trans(b, b_now, 16 * y, 16 * d);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if constexpr (kExactUpdate) ptx::mma_m16n8k16<T>(state[2 * d + n], low, b[n], state[2 * d + n]);
          ptx::mma_m16n8k16<T>(state[2 * d + n], high, b[n], state[2 * d + n]);
        }
      }
    }
  }

  if (!active) return;
  end_state<kInner>(state, place, w, segment, span, slot, head, kResult);
  if (!kResult && threadIdx.x == 0 && blockIdx.y == 0)
    w.factors[(slot + (w.descending ? -1 : 1)) * call.heads + head] = expf(log_factor);
  if (kGeneral && w.dbonus != nullptr && chunks > 0) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = dbonus[n][e];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        const int column = warp_column + 8 * n + 2 * t + e;
        float* const to = w.dbonus + (slot * call.heads + head) * columns + column;
        if (g == 0 && column < columns) *to = w.dbonus_added ? *to + sum : sum;
      }
  }
}

template <class Config>
const char* launch_walk_sm80(const Walk& w, cudaStream_t stream) {
  return launch_walk(linear_attention_walk_sm80_kernel<Config>, w, Config::kSharedBytes, stream);
}

template <class T, int kInner>
const char* choose_walk_sm80(const Walk& w, cudaStream_t stream) {
  if (w.result == nullptr) return launch_walk_sm80<WalkConfig<T, kInner, Mode::kStates>>(w, stream);
  if (w.call.bonus == nullptr && w.row_dots == nullptr)
    return launch_walk_sm80<WalkConfig<T, kInner, Mode::kResult>>(w, stream);
  return launch_walk_sm80<WalkConfig<T, kInner, Mode::kGeneral>>(w, stream);
}

// Each defined in a file of its own, so that they compile side by side.
const char* walk_sm80_64(const Walk& w, cudaStream_t stream);
const char* walk_sm80_128(const Walk& w, cudaStream_t stream);
const char* walk_sm80_256(const Walk& w, cudaStream_t stream);

#define PYKERNELS_DEFINE_WALK_SM80(inner)                                             \
  namespace pykernels::cuda::linear {                                                 \
  const char* walk_sm80_##inner(const Walk& w, cudaStream_t stream) {                 \
    return w.dtype == DType::kBFloat16 ? choose_walk_sm80<BFloat16, inner>(w, stream) \
                                       : choose_walk_sm80<Float16, inner>(w, stream); \
  }                                                                                   \
  }

}  // namespace pykernels::cuda::linear
