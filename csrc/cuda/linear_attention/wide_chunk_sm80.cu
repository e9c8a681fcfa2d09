// The pairs inside of chunks, for a decay per channel and for fp32: see wide_sm80.cuh.
//
// A block owns a chunk of a head and takes its channels in panels. Thread (channel, half) owns a channel of a panel for
// the tokens of half a chunk.
#include "wide_sm80.cuh"

namespace pykernels::cuda::linear {
namespace {

// Whether operands of the products had large elements, in this panel or one before.
struct Large {
  int x, y, pairs, scaled[2];
};
__device__ __forceinline__ Large& take_large(SharedMemory& shared) {
  Large* const large = shared.take<Large>(1);
  if (threadIdx.x == 0) *large = {};
  return *large;
}

// Of a thread's channel and half.
struct Channel {
  int half, in_panel, index, first;  // index: of all channels; first token
  bool exists;
  float log[kBlock];  // of each token's decay
  // Of the first half's keys, from after each to the half's end; of the second half's queries, from the half's start.
  float factor[kBlock];
  float total;  // the half's log factor

  __device__ __forceinline__ Channel(const WideChunks& p, const Segment& segment, int64_t head, int at, int n,
                                     int panel) {
    half = static_cast<int>(threadIdx.x) / kPanel, in_panel = threadIdx.x % kPanel;
    index = panel * kPanel + in_panel, first = half * kBlock;
    exists = index < p.key_dim;
    const Call& call = p.call;
    const Strides3& stride = call.decay_stride;
    const int64_t row = segment.origin + int64_t{at + first} * segment.step;
    const float* from = call.decay + segment.batch * stride.batch + head * stride.head + row * stride.token +
                        (p.channels == 1 ? 0 : index);
#pragma unroll
    for (int i = 0; i < kBlock; ++i)
      log[i] = call.decay != nullptr && exists && first + i < n ? from[i * (segment.step * stride.token)] : 0.0f;
    const auto keep = [&](int i, float x) { factor[i] = x; };
    total = half == 0 ? key_factors(0.0f, keep) : query_factors(0.0f, call.bonus != nullptr, keep);
  }

  // Uses the factor to each query, from a log factor before the half on -> that with the half's. With a bonus the state
  // is read before it decays.
  template <class Use>
  __device__ __forceinline__ float query_factors(float until, bool bonus, Use use) const {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float before = until;
      until += log[i];
      use(i, expf(bonus ? before : until));
    }
    return until;
  }
  // The factor from each key, up to a log factor after the half.
  template <class Use>
  __device__ __forceinline__ float key_factors(float after, Use use) const {
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      use(i, expf(after));
      after += log[i];
    }
    return after;
  }

  // The first half's keys and the second half's queries with their factors.
  __device__ __forceinline__ void scale(const PanelTile& to, const PanelTile& q, const PanelTile& k,
                                        Large& large) const {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float x = *(half == 0 ? k : q).at(first + i, in_panel) * factor[i];
      *to.at(first + i, in_panel) = x;
      if (fabsf(x) > kSmall) large.scaled[half] = 1;
    }
  }
};

// The weights of a chunk's queries. A barrier is to follow.
__device__ __forceinline__ void load_weights(float* weights, const WideChunks& p, const ChunkRows& rows, int n) {
  const int token = static_cast<int>(threadIdx.x);
  if (token >= kChunk) return;
  const bool divided = p.denominator != nullptr && token < n;
  weights[token] = divided ? p.call.scale / p.denominator[rows(token)] : p.call.scale;
}

template <class Tile>
__device__ __forceinline__ void load_panel(const Tile& x_tile, const Operand& x, const Tile& y_tile, const Operand& y,
                                           DType dtype, const Segment& segment, int64_t head, const ChunkRows& rows,
                                           int at, int n, int panel, int64_t columns, Large& large) {
  __syncthreads();  // nobody reads the last panel any more
  const int first = panel * kPanel, last = static_cast<int>(columns);
  if (load_wide(x_tile, x, dtype, segment, head, rows, at, n, first, last, nullptr, 1)) large.x = 1;
  if (load_wide(y_tile, y, dtype, segment, head, rows, at, n, first, last, nullptr, 1)) large.y = 1;
  __syncthreads();
}

constexpr unsigned kScoresBytes = 4 * PanelTile::kBytes + PairTile::kBytes +
                                  (kWarps * kBlock * kBlock + 2 * kPanel + kChunk) * sizeof(float) + sizeof(Large);

__global__ void __launch_bounds__(kThreads, 3)
    linear_attention_wide_scores_sm80_kernel(const __grid_constant__ WideScores p) {
  const WideChunks& c = p.chunks;
  const Call& call = c.call;
  const int64_t head = blockIdx.x % call.heads, chunk = blockIdx.x / call.heads;
  Segment segment;
  int at, n;
  if (!locate_chunk(call, chunk, segment, at, n)) return;
  const ChunkRows rows = rows_of_chunk(call, segment, head, at);

  SharedMemory shared;
  const auto q_tile = take_tile<PanelTile>(shared), k_tile = take_tile<PanelTile>(shared);
  const auto scaled = take_tile<PanelTile>(shared), decays = take_tile<PanelTile>(shared);
  const auto pairs = take_tile<PairTile>(shared);  // of one half
  float* const across = shared.take<float>(kWarps * kBlock * kBlock);  // [query, key], a part of each warp
  float* const halves = shared.take<float>(2 * kPanel);                // log factors of halves
  float* const weights = shared.take<float>(kChunk);
  Large& large = take_large(shared);

  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool bonus = call.bonus != nullptr;
  load_weights(weights, c, rows, n);

  // A query's pairs with the keys of its half are summed by four lanes, each over a quarter of the channels.
  const int query = static_cast<int>(threadIdx.x) / 4, own = query % kBlock, first_key = query - own;
  float within[kBlock] = {}, off[2][4] = {};
  const int panels = static_cast<int>((c.key_dim + kPanel - 1) / kPanel);
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel) {
    load_panel(q_tile, c.q, k_tile, c.k, c.dtype, segment, head, rows, at, n, panel, c.key_dim, large);
    {
      const Channel channel(c, segment, head, at, n, panel);
      channel.scale(scaled, q_tile, k_tile, large);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) *decays.at(channel.first + i, channel.in_panel) = expf(channel.log[i]);
      halves[channel.half * kPanel + channel.in_panel] = channel.total;
      __syncthreads();
      if (channel.index < c.channels) {
        const float first = halves[channel.in_panel], second = halves[kPanel + channel.in_panel];
        const ChunkRows places = rows.times(c.channels, channel.first, channel.index);
        channel.query_factors(channel.half == 0 ? 0.0f : first, bonus, [&](int i, float x) {
          if (channel.first + i < n) p.query_factors[places(i)] = x * weights[channel.first + i];
        });
        channel.key_factors(channel.half == 0 ? second : 0.0f, [&](int i, float x) {
          if (channel.first + i < n) p.key_factors[places(i)] = x;
        });
        if (channel.half == 0) p.totals[(chunk * call.heads + head) * c.channels + channel.index] = first + second;
      }
    }

#pragma unroll 1
    for (int column = 4 * t; column < kPanel; column += 16) {
      const float4 q = *reinterpret_cast<const float4*>(q_tile.at(query, column));
      float x[4] = {q.x, q.y, q.z, q.w};
      // From the last key to the first: one token's factor more lies between it and the query.
#pragma unroll
      for (int j = kBlock - 1; j >= 0; --j) {
        if (j > own) continue;
        const float4 k = *reinterpret_cast<const float4*>(k_tile.at(first_key + j, column));
        const float y[4] = {k.x, k.y, k.z, k.w};
        const float4 decay = *reinterpret_cast<const float4*>(decays.at(first_key + j, column));
        const float factors[4] = {decay.x, decay.y, decay.z, decay.w};
        const bool itself = bonus && j == own;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int index = panel * kPanel + column + e;
          const float weight = itself && index < c.key_dim ? call.bonus[head * c.key_dim + index] : 1.0f;
          within[j] = fmaf(x[e] * weight, y[e], within[j]);
          if (!itself) x[e] *= factors[e];
        }
      }
    }

    // The second half's queries with the first half's keys: each warp takes a quarter of the channels.
    const float raised_k = raise(large.scaled[0]), raised_q = raise(large.scaled[1]);
    Product product[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 16 * warp + 8 * i;
      const Parts<4> a = a_by_rows(scaled, kBlock, column, raised_q);
#pragma unroll
      for (int m = 0; m < 2; ++m) product[m].add_all(a, b_by_rows(scaled, 8 * m, column, raised_k));
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) off[m][i] += product[m].sum(i, raised_q * raised_k);
  }

#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    const float sum = warp_reduce<4>(within[j], Sum());
    if (t == 0) *pairs.at(query, first_key + j) = j <= own ? sum : 0.0f;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      across[(warp * kBlock + g + 8 * (i / 2)) * kBlock + 8 * m + 2 * t + i % 2] = off[m][i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kChunk; i += kThreads) {
    const int x = i / kChunk, y = i % kChunk;
    if (x >= n) continue;
    float score = 0.0f;
    if (x / kBlock == y / kBlock)
      score = *pairs.at(x, y);
    else if (x > y)
      for (int part = 0; part < kWarps; ++part) score += across[(part * kBlock + x - kBlock) * kBlock + y];
    p.scores[rows(x) * kChunk + y] = score * weights[x];
  }
}

constexpr unsigned kGradientsBytes =
    4 * PanelTile::kBytes + PairTile::kBytes + (4 * kPanel + kChunk) * sizeof(float) + sizeof(Large);

// Gradients of the scores [query, key] into `pairs`. A barrier is to follow.
__device__ __forceinline__ void score_gradients(const PairTile& pairs, const WideGradients& p, const Segment& segment,
                                                int64_t head, const ChunkRows& rows, int at, int n,
                                                const float* weights, const PanelTile& dout_tile,
                                                const PanelTile& v_tile, Large& large) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int block_x = warp / 2 * kBlock, block_y = warp % 2 * kBlock;
  const bool exact = p.chunks.dtype == DType::kFloat32;
  float sums[2][4] = {};
  const int panels = static_cast<int>((p.value_dim + kPanel - 1) / kPanel);
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel) {
    load_panel(dout_tile, p.dout, v_tile, p.v, p.chunks.dtype, segment, head, rows, at, n, panel, p.value_dim,
               large);
    if (block_x < block_y) continue;
    const float raised_dout = raise(large.x), raised_v = raise(large.y);
#pragma unroll 1
    for (int first = 0; first < kPanel; first += 32) {
      Product product[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts<4> a = a_by_rows(dout_tile, block_x, first + 8 * i, raised_dout);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const Parts<2> b = b_by_rows(v_tile, block_y + 8 * m, first + 8 * i, raised_v);
          if (exact)
            product[m].add_all(a, b);
          else
            product[m].add(a, b, false, false);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][i] += product[m].sum(i, raised_dout * raised_v);
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int x = block_x + g + 8 * (i / 2), y = block_y + 8 * m + 2 * t + i % 2;
      float gradient = sums[m][i];
      if (p.extra != nullptr && x < n) gradient += p.extra[rows(x)];
      gradient = x >= y && x < n ? gradient * weights[x] : 0.0f;
      *pairs.at(x, y) = gradient;
      if (fabsf(gradient) > kSmall) large.pairs = 1;
    }
}

__global__ void __launch_bounds__(kThreads, 2)
    linear_attention_wide_gradients_sm80_kernel(const __grid_constant__ WideGradients p) {
  const WideChunks& c = p.chunks;
  const Call& call = c.call;
  const int64_t head = blockIdx.x % call.heads, chunk = blockIdx.x / call.heads, key_dim = c.key_dim;
  const int64_t chunk_of_head = chunk * call.heads + head;
  Segment segment;
  int at, n;
  if (!locate_chunk(call, chunk, segment, at, n)) return;
  const ChunkRows rows = rows_of_chunk(call, segment, head, at);

  SharedMemory shared;
  const auto q_tile = take_tile<PanelTile>(shared), k_tile = take_tile<PanelTile>(shared);
  const auto scaled = take_tile<PanelTile>(shared);
  const auto off = take_tile<PanelTile>(shared);  // of pairs across halves: dk of the first one, dq of the second
  const auto pairs = take_tile<PairTile>(shared);
  float* const crossing_sums = shared.take<float>(2 * kPanel);  // of a half, for the other one
  float* const bonus_sums = shared.take<float>(2 * kPanel);
  float* const weights = shared.take<float>(kChunk);
  Large& large = take_large(shared);

  const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool bonus = call.bonus != nullptr;
  load_weights(weights, c, rows, n);
  score_gradients(pairs, p, segment, head, rows, at, n, weights, q_tile, k_tile, large);

  float ddecay = 0.0f;  // of a decay for all channels: of token threadIdx.x / 4, a quarter of the channels
  const int panels = static_cast<int>((key_dim + kPanel - 1) / kPanel);
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel) {
    load_panel(q_tile, c.q, k_tile, c.k, c.dtype, segment, head, rows, at, n, panel, key_dim, large);
    const Channel channel(c, segment, head, at, n, panel);
    channel.scale(scaled, q_tile, k_tile, large);
    __syncthreads();
    {
      const float raised_pairs = raise(large.pairs);
      const float raised_k = raise(large.scaled[0]), raised_q = raise(large.scaled[1]);
      Product dk[2], dq[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Parts<4> to_dq = a_in_order<false>(pairs, kBlock, 8 * i, raised_pairs);
        const Parts<4> to_dk = a_in_order<true>(pairs, kBlock + 8 * i, 0, raised_pairs);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int column = 16 * warp + 8 * m;
          dq[m].add_all(to_dq, b_in_order(scaled, 8 * i, column, raised_k));
          dk[m].add_all(to_dk, b_in_order(scaled, kBlock + 8 * i, column, raised_q));
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = g + 8 * (i / 2), column = 16 * warp + 8 * m + 2 * t + i % 2;
          *off.at(row, column) = dk[m].sum(i, raised_pairs * raised_q);
          *off.at(kBlock + row, column) = dq[m].sum(i, raised_pairs * raised_k);
        }
    }
    __syncthreads();

    const int d = channel.in_panel, first = channel.first;
    const bool later = channel.half == 1;
    const float u = bonus && channel.exists ? call.bonus[head * key_dim + channel.index] : 1.0f;
    const ChunkRows places = rows.times(key_dim, first, channel.index);  // of [B, T, H, K]
    float k[kBlock], weight[kBlock], dk[kBlock] = {}, dlog[kBlock] = {};
    float dbonus = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) k[i] = *k_tile.at(first + i, d), weight[i] = 1.0f;
    // Query by query; the weights are those between its and every earlier key.
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const int token = first + i;
      const bool exists = channel.exists && token < n;
      const float q = *q_tile.at(token, d), decay = expf(channel.log[i]);
      const float of_state = exists ? p.dq_states[places(i)] : 0.0f;
      float dq = of_state + (later ? *off.at(token, d) * channel.factor[i] : 0.0f);
      if (later) sum = fmaf(q, of_state, sum);
      *q_tile.at(token, d) = q * dq;  // for the decay's gradient
      float before = 0.0f;  // of the query's pairs with keys up to one
#pragma unroll
      for (int j = 0; j < i; ++j) {
        if (!bonus) weight[j] *= decay;
        const float pair = *pairs.at(token, first + j) * weight[j];
        dq = fmaf(pair, k[j], dq), dk[j] = fmaf(pair, q, dk[j]);
        before = fmaf(pair * q, k[j], before);
        if (bonus) weight[j] *= decay;
        if (j + 1 < i || !bonus) dlog[j + 1] += before;
      }
      const float pair = *pairs.at(token, token);
      dq = fmaf(pair * u, k[i], dq), dk[i] = fmaf(pair * u, q, dk[i]);
      dbonus = fmaf(pair * q, k[i], dbonus);
      if (exists) store_wide(p.dq, p.gradient_dtype, places(i), dq);
    }
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      const int token = first + j;
      const bool exists = channel.exists && token < n;
      const float of_state = exists ? p.dk_states[places(j)] : 0.0f;
      const float dk_elsewhere = of_state + (later ? 0.0f : *off.at(token, d) * channel.factor[j]);
      if (!later) sum = fmaf(k[j], of_state, sum);
      k[j] *= dk_elsewhere;
      if (exists) store_wide(p.dk, p.gradient_dtype, places(j), dk[j] + dk_elsewhere);
    }
    crossing_sums[channel.half * kPanel + d] = sum, bonus_sums[channel.half * kPanel + d] = dbonus;
    __syncthreads();

    if (bonus && !later && channel.exists)
      p.dbonus[chunk_of_head * key_dim + channel.index] = bonus_sums[d] + bonus_sums[kPanel + d];
    if (p.ddecay == nullptr) continue;
    float crossing = 0.0f;
    if (channel.exists)
      crossing = p.crossing[chunk_of_head * key_dim + channel.index] *
                 expf(p.totals[chunk_of_head * c.channels + (c.channels == 1 ? 0 : channel.index)]);
    // Queries from each token on (with a bonus after it), keys before it.
    float queries = later ? 0.0f : crossing_sums[kPanel + d], keys = later ? crossing_sums[d] : 0.0f;
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      const float from = queries + *q_tile.at(first + i, d);
      dlog[i] += (bonus ? queries : from) + crossing;
      queries = from;
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      dlog[i] += keys, keys += k[i];
      const int token = first + i;
      if (c.channels == 1)
        *scaled.at(token, d) = channel.exists ? dlog[i] : 0.0f;
      else if (channel.exists && token < n)
        p.ddecay[places(i)] = dlog[i];
    }
    if (c.channels == 1) {
      __syncthreads();
      for (int column = t; column < kPanel; column += 4) ddecay += *scaled.at(threadIdx.x / 4, column);
    }
  }
  if (p.ddecay == nullptr || c.channels > 1) return;
  const int token = static_cast<int>(threadIdx.x) / 4;
  ddecay = warp_reduce<4>(ddecay, Sum());
  if (t == 0 && token < n) p.ddecay[rows(token)] = ddecay;
}

// A thread owns a channel of a segment of a head: adds up the bonus's gradient over its chunks.
__global__ void __launch_bounds__(kThreads)
    linear_attention_dbonus_sm80_kernel(const __grid_constant__ WideGradients p) {
  const Call& call = p.chunks.call;
  const int64_t head = blockIdx.x % call.heads, slot = blockIdx.x / call.heads, key_dim = p.chunks.key_dim;
  Segment segment;
  if (!locate(call, slot, segment)) return;
  const int left = segment.length - segment.index * kSegment;
  if (left <= 0) return;
  for (int64_t channel = threadIdx.x; channel < key_dim; channel += kThreads) {
    float sum = 0.0f;
    for (int i = 0; i < min(kChunksPerSegment, (left + kChunk - 1) / kChunk); ++i)
      sum += p.dbonus[((slot * kChunksPerSegment + i) * call.heads + head) * key_dim + channel];
    p.dbonus_sums[(slot * call.heads + head) * key_dim + channel] = sum;
  }
}

template <class Params>
const char* launch_blocks(void (*kernel)(Params), const Params& p, int64_t blocks, unsigned shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more chunks of heads than a grid has blocks";
  return launch(kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes, stream}, p);
}

}  // namespace

const char* wide_scores_sm80(const WideScores& p, cudaStream_t stream) {
  return launch_blocks(linear_attention_wide_scores_sm80_kernel, p, p.chunks.blocks(), kScoresBytes, stream);
}

const char* wide_gradients_sm80(const WideGradients& p, cudaStream_t stream) {
  const char* error =
      launch_blocks(linear_attention_wide_gradients_sm80_kernel, p, p.chunks.blocks(), kGradientsBytes, stream);
  if (error == nullptr && p.dbonus != nullptr)
    error = launch_blocks(linear_attention_dbonus_sm80_kernel, p, p.chunks.blocks() / kChunksPerSegment, 0, stream);
  return error;
}

}  // namespace pykernels::cuda::linear
