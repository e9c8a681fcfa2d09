// What linear attention does beside the walks, for sm_80 and newer: the states between segments, the decay's gradient.
#pragma once

#include "../common/elements.cuh"
#include "sm80.cuh"

namespace pykernels::cuda::linear {

// ---- States between segments ----------------------------------------------------------------------------------------

struct Scan {
  Call call;
  float* states;         // [segments, H, size]: what segments add, in place the states between them
  const float* factors;  // [segments, H, channels]
  const float* edge;     // [sequences, H, size], the state before (descending: after) all of them; null: zero
  int64_t size;
  bool descending;
  int64_t channels, channel_size;  // a channel has so many neighbouring elements of a state
};

// A block owns kThreads elements of the state of a sequence's head.
__global__ void __launch_bounds__(kThreads) linear_attention_scan_sm80_kernel(const __grid_constant__ Scan s) {
  const int64_t head = blockIdx.x % s.call.heads, sequence = blockIdx.x / s.call.heads;
  int64_t slot = sequence * s.call.segments_each, length = s.call.tokens;
  if (s.call.cu_seqlens != nullptr) {
    const int start = clamp_offset(s.call.cu_seqlens[sequence], s.call.tokens);
    slot = start / kSegment + sequence;
    length = clamp_offset(s.call.cu_seqlens[sequence + 1], s.call.tokens) - start;
  }
  const int64_t element = blockIdx.y * int64_t{kThreads} + threadIdx.x;
  if (element >= s.size) return;
  const int64_t count = (length + kSegment - 1) / kSegment, channel = element / s.channel_size;
  float state = s.edge != nullptr ? s.edge[(sequence * s.call.heads + head) * s.size + element] : 0.0f;
#pragma unroll 4
  for (int64_t i = 1; i < count; ++i) {
    const int64_t index = (slot + (s.descending ? count - 1 - i : i)) * s.call.heads + head;
    float* const to = s.states + index * s.size + element;
    state = fmaf(state, s.factors[index * s.channels + channel], *to);
    *to = state;
  }
}

// ---- The gradient of the decay --------------------------------------------------------------------------------------

struct DecayGradient {
  Call call;
  Operand q, k, v, dout;
  int64_t key_dim, value_dim;
  const float* denominator;  // [B, T, H], with normalize, and then
  const float* extra;        // [B, T, H]: the gradient of the denominator, times it
  // What the walks left: `parts` of each. Of tokens [B, T, H], q . (what states give to dq) and k . (to dk); of chunks,
  // <state before, gradient of the state after>.
  int64_t parts;
  const float* query_dots;
  const float* key_dots;
  const float* chunk_dots;
  float* ddecay;  // [B, T, H]
};

template <class T>
struct DecayGradientConfig {
  using Tile = SharedTile<T, kChunk, 64>;
  static constexpr int kPitch = kChunk + 1;
  static constexpr unsigned kSharedBytes = 4 * Tile::kBytes + sizeof(Decays) + kChunk * kPitch * sizeof(float);
};

// s += x y^T for the warp's 16 x 16 block of a chunk, in panels of 64 columns through two stages of shared memory.
template <class T, class Tile>
__device__ __forceinline__ void add_products(float (&s)[2][4], const Operand& x, const Operand& y,
                                             const Segment& segment, int64_t head, int at, int n, int columns,
                                             const Tile& x_even, const Tile& x_odd, const Tile& y_even,
                                             const Tile& y_odd) {
  const int warp = static_cast<int>(threadIdx.x / 32), panels = (columns + 63) / 64;
  const auto load_stage = [&](int panel) {
    if (panel < panels) {
      load_operand<T>(stage(panel, x_even, x_odd), x, segment, head, at, n, 64 * panel, columns);
      load_operand<T>(stage(panel, y_even, y_odd), y, segment, head, at, n, 64 * panel, columns);
    }
    ptx::cp_async_commit();
  };
  load_stage(0);
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_stage(panel + 1);
    if (warp == 1) continue;  // keys after all of its queries
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      uint32_t a[4], b[2][2];
      load_a(a, stage(panel, x_even, x_odd), warp / 2 * 16, 16 * d);
      load_b(b, stage(panel, y_even, y_odd), warp % 2 * 16, 16 * d);
      ptx::mma_m16n8k16<T>(s[0], a, b[0], s[0]);
      ptx::mma_m16n8k16<T>(s[1], a, b[1], s[1]);
    }
  }
  __syncthreads();
}

// A block owns the tokens of a chunk of a head.
//   ddecay_t = sum over keys j < t <= queries i of G_ij, G the gradient of the scores times them (with a bonus, t < i)
//            + sum over i >= t of query_dots_i + sum over j < t of key_dots_j + e^total chunk_dots
template <class T>
__global__ void __launch_bounds__(kThreads)
    linear_attention_ddecay_sm80_kernel(const __grid_constant__ DecayGradient p) {
  using Config = DecayGradientConfig<T>;
  const Call& call = p.call;
  const int64_t head = blockIdx.x % call.heads, chunk = blockIdx.x / call.heads;
  Segment segment;
  int at, n_tokens;
  if (!locate_chunk(call, chunk, segment, at, n_tokens)) return;

  SharedMemory shared;
  const auto x_even = take_tile<typename Config::Tile>(shared), x_odd = take_tile<typename Config::Tile>(shared);
  const auto y_even = take_tile<typename Config::Tile>(shared), y_odd = take_tile<typename Config::Tile>(shared);
  Decays& decay = *shared.take<Decays>(1);
  float* const pairs = shared.take<float>(kChunk * Config::kPitch);  // [query, key]

  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool bonus = call.bonus != nullptr;
  const auto row_index = [&](int token) {  // of the chunk, in [B, T, H]
    return (segment.batch * call.tokens + segment.origin + int64_t{at + token} * segment.step) * call.heads + head;
  };
  const int64_t row = row_index(lane);
  if (warp == 1) {
    float weight = call.scale;
    if (p.denominator != nullptr && lane < n_tokens) weight /= p.denominator[row];
    make_decays(decay, lane_decay(call, segment, head, at, n_tokens), weight, bonus);
  }
  float scores[2][4] = {}, gradients[2][4] = {};
  add_products<T>(scores, p.q, p.k, segment, head, at, n_tokens, static_cast<int>(p.key_dim), x_even, x_odd, y_even,
                  y_odd);
  add_products<T>(gradients, p.dout, p.v, segment, head, at, n_tokens, static_cast<int>(p.value_dim), x_even, x_odd,
                  y_even, y_odd);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = warp / 2 * 16 + g + 8 * (i / 2), key = warp % 2 * 16 + 8 * n + 2 * t + i % 2;
      float pair = 0.0f;
      if (query > key) {
        float gradient = gradients[n][i];
        if (p.extra != nullptr && query < n_tokens) gradient += p.extra[row_index(query)];
        pair = gradient * scores[n][i] * decay.weight[query] * expf(decay.between(query - (bonus ? 1 : 0), key));
      }
      pairs[query * Config::kPitch + key] = pair;
    }
  __syncthreads();
  if (warp > 0) return;

  // Sums over the queries from each row on, key by key; then over the keys before the row.
  float sum = 0.0f;
  for (int query = kChunk - 1; query >= 0; --query) {
    float& pair = pairs[query * Config::kPitch + lane];
    sum += pair;
    pair = query > lane ? sum : 0.0f;
  }
  __syncwarp();
  // Token t is crossed by the pairs of the keys before it and the queries from it on, with a bonus after it.
  const int from = lane + (bonus ? 1 : 0);
  float gradient = 0.0f;
  if (from < kChunk)
    for (int key = 0; key < lane; ++key) gradient += pairs[from * Config::kPitch + key];

  const int64_t rows = call.batch * call.tokens * call.heads, chunks = call.segments() * kChunksPerSegment * call.heads;
  float query_dot = 0.0f, key_dot = 0.0f, crossing = 0.0f;
  for (int64_t part = 0; part < p.parts; ++part) {
    if (lane < n_tokens) query_dot += p.query_dots[part * rows + row], key_dot += p.key_dots[part * rows + row];
    crossing += p.chunk_dots[part * chunks + chunk * call.heads + head];
  }
  // From the last lane to the first.
  float queries = __shfl_sync(~0u, query_dot, 31 - lane);
  queries = __shfl_sync(~0u, warp_scan(queries, Sum()), 31 - lane);
  const float after = __shfl_down_sync(~0u, queries, 1);
  if (bonus) queries = lane == 31 ? 0.0f : after;
  const float keys = __shfl_up_sync(~0u, warp_scan(key_dot, Sum()), 1);
  gradient += queries + (lane == 0 ? 0.0f : keys) + expf(decay.total) * crossing;
  if (lane < n_tokens) p.ddecay[row] = gradient;
}

template <class T>
const char* launch_ddecay_sm80(const DecayGradient& p, cudaStream_t stream) {
  const int64_t blocks = p.call.segments() * kChunksPerSegment * p.call.heads;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more chunks of heads than a grid has blocks";
  return launch(linear_attention_ddecay_sm80_kernel<T>,
                {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), DecayGradientConfig<T>::kSharedBytes, stream}, p);
}

// ---- normalize ------------------------------------------------------------------------------------------------------

struct Extra {
  const void* out;
  const void* dout;
  Strides3 out_stride, dout_stride;
  int64_t tokens, heads, value_dim, rows;
  float* extra;  // [B, T, H]
};

// A warp owns a row: -out . dout, the gradient of the denominator times it.
template <class T>
__global__ void __launch_bounds__(kThreads) linear_attention_extra_sm80_kernel(const __grid_constant__ Extra p) {
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int64_t head = row % p.heads, token = row / p.heads % p.tokens, batch = row / p.heads / p.tokens;
  const auto start = [&](const void* x, const Strides3& stride) {
    return static_cast<const T*>(x) + batch * stride.batch + token * stride.token + head * stride.head;
  };
  const T* const out = start(p.out, p.out_stride);
  const T* const dout = start(p.dout, p.dout_stride);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < p.value_dim; i += 32)
    sum = fmaf(-widen(out[i]), widen(dout[i]), sum);
  sum = warp_reduce(sum, Sum());
  if (threadIdx.x % 32 == 0) p.extra[row] = sum;
}

}  // namespace pykernels::cuda::linear
