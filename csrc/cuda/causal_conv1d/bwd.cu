// The backward pass: dx, and the sums over tokens of a tile that make dweight and dbias; a second kernel adds the tiles
// up in order. Nothing is kept from the forward pass: what lies before the activation is computed again.
#include "conv.cuh"

namespace pykernels::cuda {
namespace conv {
namespace {

// Where the parts of dweight and dbias of a tile lie: rows [W + 1][D], the taps, then the bias.
__device__ __forceinline__ float* part_of(const CausalConv1dBackwardParams& p, int64_t part) {
  return static_cast<float*>(p.scratch) + part * (p.forward.width + 1) * p.forward.channels;
}

template <class T, int W, bool kAlongTokens>
__global__ void __launch_bounds__(kThreads, kAlongTokens ? 4 : W <= 4 ? 3 : 2)
    causal_conv1d_bwd_kernel(const __grid_constant__ CausalConv1dBackwardParams p, int64_t tiles) {
  using Tiles = Tiling<W, kAlongTokens>;
  constexpr int kPair = Tiles::kPair;
  const CausalConv1dParams& f = p.forward;
  const Place<T, W, kAlongTokens> place(f, tiles);
  float dweight[kPair][W] = {}, dbias[kPair] = {};
  if (place.active) {
    const T* const x = row_of<const T>(f.x, f.x_stride, place.batch, place.channel);
    const T* const dout = row_of<const T>(p.dout, p.dout_stride, place.batch, place.channel);
    T* const dx = row_of<T>(p.dx, p.dx_stride, place.batch, place.channel);
    const Taps<W, kPair> taps(f, place.channel);
    for_pieces<Tiles>(f, place.batch, place.token, [&](const Sequence& sequence, const Piece& piece, int64_t first) {
      float result[kPair][kRun] = {};
      if (sequence.index < f.sequences) {
        // e before, in and after the run; dy, the gradient before the activation, in and after it.
        float e[kPair][kRun + 2 * (W - 1)], dy[kPair][kRun + W - 1];
        const bool inner = piece.low <= -kRun && piece.high >= 2 * kRun;
        const int64_t x_stride = ptx::unhoisted(f.x_stride.token), dout_stride = ptx::unhoisted(p.dout_stride.token);
        load_tokens<1 - W, kAlongTokens>(e, x + first * x_stride, x_stride, piece, inner);
        load_tokens<0, kAlongTokens>(dy, dout + first * dout_stride, dout_stride, piece, inner);
        if (!inner) load_state<T, W>(e, f, sequence, place.channel, piece);
        if (f.silu) {
#pragma unroll
          for (int c = 0; c < kPair; ++c)
#pragma unroll
            for (int i = 0; i < kRun + W - 1; ++i) {
              float y = taps.bias[c];
#pragma unroll
              for (int w = 0; w < W; ++w) y += taps.weight[c][w] * e[c][i + w];
              const float slope = silu_slope(y);
              dy[c][i] = piece.has(i) ? dy[c][i] * slope : 0.0f;  // outside of the sequence y may be anything
            }
        }
#pragma unroll
        for (int c = 0; c < kPair; ++c)
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
#pragma unroll
            for (int w = 0; w < W; ++w) result[c][i] += taps.weight[c][w] * dy[c][i + W - 1 - w];
            if (!piece.has(i)) continue;
            dbias[c] += dy[c][i];
#pragma unroll
            for (int w = 0; w < W; ++w) dweight[c][w] += dy[c][i] * e[c][i + w];
          }
        if (!inner && p.dfinal_state != nullptr) {
#pragma unroll
          for (int c = 0; c < kPair; ++c) {
            const T* const dstate = state_row<const T>(p.dfinal_state, f, sequence.index, place.channel + c);
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              const int entry = i + W - 1 - piece.high;
              if (entry >= 0 && entry < W - 1) result[c][i] += widen(dstate[entry]);
            }
          }
        }
      }
      const int64_t stride = ptx::unhoisted(p.dx_stride.token);
      store_run<kAlongTokens>(dx + first * stride, stride, result, piece);
    });
  }
  float* const part = part_of(p, place.batch * tiles + place.tile);
  if constexpr (kAlongTokens) {
#pragma unroll
    for (int w = 0; w <= W; ++w) {
      const float sum = warp_reduce(w < W ? dweight[0][w < W ? w : 0] : dbias[0], Sum());
      if (place.active && threadIdx.x % 32 == 0) part[w * f.channels + place.channel] = sum;
    }
  } else {
    constexpr int kSums = (W + 1) * Tiles::kBlockChannels;
    SharedMemory shared;
    float* const sums = shared.take<float>(kWarps * kSums);
    const int warp = threadIdx.x / 32, within = threadIdx.x % 32 * kPair;
#pragma unroll
    for (int c = 0; c < kPair; ++c)
#pragma unroll
      for (int w = 0; w <= W; ++w)
        sums[warp * kSums + w * Tiles::kBlockChannels + within + c] = w < W ? dweight[c][w < W ? w : 0] : dbias[c];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kSums; i += kThreads) {
      const int64_t channel = place.channel - within + i % Tiles::kBlockChannels;
      if (channel >= f.channels) continue;
      float sum = sums[i];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) sum += sums[other * kSums + i];
      part[i / Tiles::kBlockChannels * f.channels + channel] = sum;
    }
  }
}

// The gradient before the activation at a token of a sequence, for any width.
template <class T>
__device__ float gradient_at(const CausalConv1dBackwardParams& p, const T* x, const T* dout, const Sequence& sequence,
                             int64_t channel, int64_t token) {
  const CausalConv1dParams& f = p.forward;
  const float g = widen(dout[token * p.dout_stride.token]);
  if (!f.silu) return g;
  const float* const weight = static_cast<const float*>(f.weight) + channel * f.width;
  float y = f.bias != nullptr ? static_cast<const float*>(f.bias)[channel] : 0.0f;
  for (int64_t w = 0; w < f.width; ++w) y += weight[w] * entry(f, x, sequence, channel, token - (f.width - 1) + w);
  return g * silu_slope(y);
}

// ---- Any width and any strides: dy [B, D, L] through scratch memory, then dx and the sums from it ------------------

__device__ __forceinline__ float* dy_row(const CausalConv1dBackwardParams& p, int64_t parts, int64_t batch,
                                         int64_t channel) {
  return part_of(p, parts) + (batch * p.forward.channels + channel) * p.forward.length;
}

// kInput false: dy; true: dx.
template <class T, bool kAlongTokens, bool kInput>
__global__ void __launch_bounds__(kThreads, 8)
    causal_conv1d_bwd_any_kernel(const __grid_constant__ CausalConv1dBackwardParams p, int64_t tiles, int64_t parts) {
  using Tiles = Tiling<0, kAlongTokens>;
  const CausalConv1dParams& f = p.forward;
  const Place<T, 0, kAlongTokens> place(f, tiles);
  if (!place.active) return;
  const T* const x = row_of<const T>(f.x, f.x_stride, place.batch, place.channel);
  const T* const dout = row_of<const T>(p.dout, p.dout_stride, place.batch, place.channel);
  T* const dx = row_of<T>(p.dx, p.dx_stride, place.batch, place.channel);
  const float* const weight = static_cast<const float*>(f.weight) + place.channel * f.width;
  float* const dy = dy_row(p, parts, place.batch, place.channel);
  Sequence sequence{0, 0, 0};
  for (int step = 0; step < Tiles::kSteps; ++step) {
    const int64_t first = place.token + step * Tiles::kStep;
    const int64_t last = min(first + kRun, f.length);
    for (int64_t token = max(first, int64_t{0}); token < last; ++token) {
      if (token >= sequence.end)
        sequence = owner_of(f.cu_seqlens, f.sequences, f.length, place.batch, token);
      const bool owned = sequence.index < f.sequences;
      if constexpr (!kInput) {
        dy[token] = owned ? gradient_at(p, x, dout, sequence, place.channel, token) : 0.0f;
      } else {
        float sum = 0.0f;
        if (owned) {
          for (int64_t w = 0; w < f.width; ++w) {
            const int64_t other = token + f.width - 1 - w;
            if (other < sequence.end) sum += weight[w] * dy[other];
          }
          const int64_t index = token + f.width - 1 - sequence.end;
          if (index >= 0 && p.dfinal_state != nullptr)
            sum += widen(state_row<const T>(p.dfinal_state, f, sequence.index, place.channel)[index]);
        }
        dx[token * p.dx_stride.token] = narrow<T>(sum);
      }
    }
  }
}

constexpr int kSumTile = 1024;  // tokens of a part

// A warp for each part, channel and tap; tap W is the bias.
template <class T>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_bwd_any_sums_kernel(const __grid_constant__ CausalConv1dBackwardParams p, int64_t tiles) {
  const CausalConv1dParams& f = p.forward;
  const int64_t taps = f.width + 1, i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= f.batch * tiles * f.channels * taps) return;
  const int64_t w = i % taps, channel = i / taps % f.channels, part = i / taps / f.channels;
  const int64_t tile = part % tiles, batch = part / tiles, last = min((tile + 1) * kSumTile, f.length);
  const T* const x = row_of<const T>(f.x, f.x_stride, batch, channel);
  const float* const dy = dy_row(p, f.batch * tiles, batch, channel);
  Sequence sequence{0, 0, 0};
  float sum = 0.0f;
  for (int64_t token = tile * kSumTile + threadIdx.x % 32; token < last; token += 32) {
    if (token >= sequence.end)
      sequence = owner_of(f.cu_seqlens, f.sequences, f.length, batch, token);
    if (sequence.index == f.sequences) continue;
    sum += w == f.width ? dy[token] : dy[token] * entry(f, x, sequence, channel, token - (f.width - 1) + w);
  }
  sum = warp_reduce(sum, Sum());
  if (threadIdx.x % 32 == 0) part_of(p, part)[w * f.channels + channel] = sum;
}

// ---- Both --------------------------------------------------------------------------------------------------------

constexpr int kSumColumns = 32, kSumRows = 8;

// dweight and dbias from their parts: a thread adds every eighth part, then the eight sums are added, always in the
// same order.
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    causal_conv1d_bwd_reduce_kernel(const __grid_constant__ CausalConv1dBackwardParams p, int64_t parts) {
  const CausalConv1dParams& f = p.forward;
  const int column = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns;
  const int64_t columns = (f.width + 1) * f.channels, i = int64_t{blockIdx.x} * kSumColumns + column;
  float sum = 0.0f;
  if (i < columns) {
#pragma unroll 4
    for (int64_t part = row; part < parts; part += kSumRows) sum += part_of(p, part)[i];
  }
  SharedMemory shared;
  float* const sums = shared.take<float>(kSumColumns * kSumRows);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || i >= columns) return;
#pragma unroll
  for (int other = 1; other < kSumRows; ++other) sum += sums[other * kSumColumns + column];
  const int64_t w = i / f.channels, channel = i % f.channels;
  if (w < f.width)
    static_cast<float*>(p.dweight)[channel * f.width + w] = sum;
  else
    static_cast<float*>(p.dbias)[channel] = sum;
}

// The gradient of e's first W - 1 entries. One thread for each.
template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    causal_conv1d_bwd_state_kernel(const __grid_constant__ CausalConv1dBackwardParams p) {
  const CausalConv1dParams& f = p.forward;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, entries = f.width - 1;
  if (i >= f.sequences * f.channels * entries) return;
  const int64_t j = i % entries, channel = i / entries % f.channels;
  const Sequence sequence = sequence_at(f.cu_seqlens, f.length, i / entries / f.channels);
  const int64_t batch = f.cu_seqlens != nullptr ? 0 : sequence.index, length = sequence.end - sequence.start;
  const T* const x = row_of<const T>(f.x, f.x_stride, batch, channel);
  const T* const dout = row_of<const T>(p.dout, p.dout_stride, batch, channel);
  const float* const weight = static_cast<const float*>(f.weight) + channel * f.width;
  float sum = 0.0f;
  for (int64_t w = 0; w <= j; ++w)
    if (j - w < length) sum += weight[w] * gradient_at(p, x, dout, sequence, channel, sequence.start + j - w);
  if (j >= length && p.dfinal_state != nullptr)
    sum += widen(state_row<const T>(p.dfinal_state, f, sequence.index, channel)[j - length]);
  static_cast<T*>(p.dinitial_state)[i] = narrow<T>(sum);
}

// How a call goes: with a width known to the compiler, or through scratch memory.
enum class Route { kAlongTokens, kAlongChannels, kAnyAlongTokens, kAnyAlongChannels };

template <class T>
Route route_of(const CausalConv1dBackwardParams& p) {
  const CausalConv1dParams& f = p.forward;
  const bool rows = f.x_stride.token == 1 && p.dout_stride.token == 1 && p.dx_stride.token == 1;
  if (rows && f.width <= 8) return Route::kAlongTokens;
  const bool pairs = f.channels % 2 == 0 && in_pairs<T>(f.x, f.x_stride) && in_pairs<T>(p.dout, p.dout_stride) &&
                     in_pairs<T>(p.dx, p.dx_stride);
  if (pairs && f.width <= 8) return Route::kAlongChannels;
  return f.x_stride.token == 1 ? Route::kAnyAlongTokens : Route::kAnyAlongChannels;
}

int64_t parts_of(const CausalConv1dBackwardParams& p, Route route) {
  const int64_t length = p.forward.length;
  switch (route) {
    case Route::kAlongTokens:
      return p.forward.batch * Tiling<1, true>::tiles(length);
    case Route::kAlongChannels:
      return p.forward.batch * Tiling<1, false>::tiles(length);
    default:
      return p.forward.batch * ((length + kSumTile - 1) / kSumTile);
  }
}

template <class T, int W, bool kAlongTokens>
const char* launch_bwd(const CausalConv1dBackwardParams& p, void* stream) {
  if constexpr (W == 0) {
    return "unreachable";
  } else {
    using Tiles = Tiling<W, kAlongTokens>;
    constexpr unsigned kShared = kAlongTokens ? 0 : kWarps * (W + 1) * Tiles::kBlockChannels * sizeof(float);
    return launch_blocks(causal_conv1d_bwd_kernel<T, W, kAlongTokens>, Tiles::blocks(p.forward), kThreads, kShared,
                         stream, p, Tiles::tiles(p.forward.length));
  }
}

template <class T, bool kAlongTokens>
const char* launch_bwd_any(const CausalConv1dBackwardParams& p, int64_t parts, void* stream) {
  using Tiles = Tiling<0, kAlongTokens>;
  const CausalConv1dParams& f = p.forward;
  const int64_t blocks = Tiles::blocks(f), tiles = Tiles::tiles(f.length);
  if (const char* error = launch_blocks(causal_conv1d_bwd_any_kernel<T, kAlongTokens, false>, blocks, kThreads, 0,
                                        stream, p, tiles, parts))
    return error;
  if (const char* error = launch_blocks(causal_conv1d_bwd_any_kernel<T, kAlongTokens, true>, blocks, kThreads, 0,
                                        stream, p, tiles, parts))
    return error;
  const int64_t sums = parts * f.channels * (f.width + 1);
  return launch_blocks(causal_conv1d_bwd_any_sums_kernel<T>, (sums + kWarps - 1) / kWarps, kThreads, 0, stream, p,
                       (f.length + kSumTile - 1) / kSumTile);
}

}  // namespace
}  // namespace conv

int64_t causal_conv1d_bwd_scratch(const CausalConv1dBackwardParams& p) {
  const CausalConv1dParams& f = p.forward;
  int64_t floats = 0;
  for_dtype(p.forward.dtype, [&]<class T>() -> const char* {
    const conv::Route route = conv::route_of<T>(p);
    floats = conv::parts_of(p, route) * (f.width + 1) * f.channels;
    if (route == conv::Route::kAnyAlongTokens || route == conv::Route::kAnyAlongChannels)
      floats += f.batch * f.channels * f.length;
    return nullptr;
  });
  return floats;
}

const char* causal_conv1d_bwd(const CausalConv1dBackwardParams& p, void* stream) {
  const CausalConv1dParams& f = p.forward;
  return for_dtype(f.dtype, [&]<class T>() -> const char* {
    const conv::Route route = conv::route_of<T>(p);
    const int64_t parts = conv::parts_of(p, route);
    const char* error = nullptr;
    switch (route) {
      case conv::Route::kAlongTokens:
        error = conv::for_width(f.width, [&]<int W>() { return conv::launch_bwd<T, W, true>(p, stream); });
        break;
      case conv::Route::kAlongChannels:
        error = conv::for_width(f.width, [&]<int W>() { return conv::launch_bwd<T, W, false>(p, stream); });
        break;
      case conv::Route::kAnyAlongTokens:
        error = conv::launch_bwd_any<T, true>(p, parts, stream);
        break;
      case conv::Route::kAnyAlongChannels:
        error = conv::launch_bwd_any<T, false>(p, parts, stream);
        break;
    }
    if (error != nullptr) return error;
    const int64_t columns = (f.width + 1) * f.channels;
    error = conv::launch_blocks(conv::causal_conv1d_bwd_reduce_kernel,
                                (columns + conv::kSumColumns - 1) / conv::kSumColumns,
                                conv::kSumColumns * conv::kSumRows, conv::kSumColumns * conv::kSumRows * sizeof(float),
                                stream, p, parts);
    if (error != nullptr || p.dinitial_state == nullptr) return error;
    const int64_t entries = f.sequences * f.channels * (f.width - 1);
    return conv::launch_blocks(conv::causal_conv1d_bwd_state_kernel<T>, (entries + conv::kThreads - 1) / conv::kThreads,
                               conv::kThreads, 0, stream, p);
  });
}

}  // namespace pykernels::cuda
