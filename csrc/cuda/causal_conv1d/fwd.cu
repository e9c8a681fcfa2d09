// The forward pass.
#include "conv.cuh"

namespace pykernels::cuda {
namespace conv {
namespace {

template <class T, int W, bool kAlongTokens>
__global__ void __launch_bounds__(kThreads, kAlongTokens ? 5 : W <= 6 ? 4 : 3)
    causal_conv1d_fwd_kernel(const __grid_constant__ CausalConv1dParams p, int64_t tiles) {
  using Tiles = Tiling<W, kAlongTokens>;
  constexpr int kPair = Tiles::kPair;
  const Place<T, W, kAlongTokens> place(p, tiles);
  if (!place.active) return;
  const T* const x = row_of<const T>(p.x, p.x_stride, place.batch, place.channel);
  T* const out = row_of<T>(p.out, p.out_stride, place.batch, place.channel);
  const Taps<W, kPair> taps(p, place.channel);
  for_pieces<Tiles>(p, place.batch, place.token, [&](const Sequence& sequence, const Piece& piece, int64_t first) {
    float y[kPair][kRun] = {};
    if (sequence.index < p.sequences) {
      float e[kPair][kRun + W - 1];
      const bool inner = piece.low <= -kRun && piece.high >= kRun;
      const int64_t stride = ptx::unhoisted(p.x_stride.token);
      load_tokens<1 - W, kAlongTokens>(e, x + first * stride, stride, piece, inner);
      if (!inner) load_state<T, W>(e, p, sequence, place.channel, piece);
#pragma unroll
      for (int c = 0; c < kPair; ++c)
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          y[c][i] = taps.bias[c];
#pragma unroll
          for (int w = 0; w < W; ++w) y[c][i] += taps.weight[c][w] * e[c][i + w];
        }
      if (p.silu) {
#pragma unroll
        for (int c = 0; c < kPair; ++c)
#pragma unroll
          for (int i = 0; i < kRun; ++i) y[c][i] = silu(y[c][i]);
      }
    }
    const int64_t stride = ptx::unhoisted(p.out_stride.token);
    store_run<kAlongTokens>(out + first * stride, stride, y, piece);
  });
}

// Any width and any strides.
template <class T, bool kAlongTokens>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_fwd_any_kernel(const __grid_constant__ CausalConv1dParams p, int64_t tiles) {
  using Tiles = Tiling<0, kAlongTokens>;
  const Place<T, 0, kAlongTokens> place(p, tiles);
  if (!place.active) return;
  const T* const x = row_of<const T>(p.x, p.x_stride, place.batch, place.channel);
  T* const out = row_of<T>(p.out, p.out_stride, place.batch, place.channel);
  const float* const weight = static_cast<const float*>(p.weight) + place.channel * p.width;
  const float bias = p.bias != nullptr ? static_cast<const float*>(p.bias)[place.channel] : 0.0f;
  Sequence sequence{0, 0, 0};
  for (int step = 0; step < Tiles::kSteps; ++step) {
    const int64_t first = place.token + step * Tiles::kStep;
    const int64_t last = min(first + kRun, p.length);
    for (int64_t token = max(first, int64_t{0}); token < last; ++token) {
      if (token >= sequence.end)
        sequence = owner_of(p.cu_seqlens, p.sequences, p.length, place.batch, token);
      float y = 0.0f;
      if (sequence.index < p.sequences) {
        y = bias;
        for (int64_t w = 0; w < p.width; ++w)
          y += weight[w] * entry(p, x, sequence, place.channel, token - (p.width - 1) + w);
        if (p.silu) y = silu(y);
      }
      out[token * p.out_stride.token] = narrow<T>(y);
    }
  }
}

// The last W - 1 entries of e. One thread for each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_fwd_state_kernel(const __grid_constant__ CausalConv1dParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, entries = p.width - 1;
  if (i >= p.sequences * p.channels * entries) return;
  const int64_t channel = i / entries % p.channels;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, i / entries / p.channels);
  const T* const x = row_of<const T>(p.x, p.x_stride, p.cu_seqlens != nullptr ? 0 : sequence.index, channel);
  static_cast<T*>(p.final_state)[i] =
      narrow<T>(entry(p, x, sequence, channel, sequence.end - entries + i % entries));
}

template <class T, bool kAlongTokens>
const char* launch_fwd_any(const CausalConv1dParams& p, void* stream) {
  using Tiles = Tiling<0, kAlongTokens>;
  return launch_blocks(causal_conv1d_fwd_any_kernel<T, kAlongTokens>, Tiles::blocks(p), kThreads, 0, stream, p,
                       Tiles::tiles(p.length));
}

template <class T, int W, bool kAlongTokens>
const char* launch_fwd(const CausalConv1dParams& p, void* stream) {
  if constexpr (W == 0) {
    return launch_fwd_any<T, kAlongTokens>(p, stream);
  } else {
    using Tiles = Tiling<W, kAlongTokens>;
    return launch_blocks(causal_conv1d_fwd_kernel<T, W, kAlongTokens>, Tiles::blocks(p), kThreads, 0, stream, p,
                         Tiles::tiles(p.length));
  }
}

}  // namespace
}  // namespace conv

const char* causal_conv1d_fwd(const CausalConv1dParams& p, void* stream) {
  return for_dtype(p.dtype, [&]<class T>() -> const char* {
    const char* error = conv::for_width(p.width, [&]<int W>() {
      if (p.x_stride.token == 1 && p.out_stride.token == 1) return conv::launch_fwd<T, W, true>(p, stream);
      if (p.channels % 2 == 0 && conv::in_pairs<T>(p.x, p.x_stride) && conv::in_pairs<T>(p.out, p.out_stride))
        return conv::launch_fwd<T, W, false>(p, stream);
      return conv::launch_fwd_any<T, false>(p, stream);
    });
    if (error != nullptr) return error;
    const int64_t entries = p.sequences * p.channels * (p.width - 1);
    return conv::launch_blocks(conv::causal_conv1d_fwd_state_kernel<T>, (entries + conv::kThreads - 1) / conv::kThreads,
                               conv::kThreads, 0, stream, p);
  });
}

}  // namespace pykernels::cuda
