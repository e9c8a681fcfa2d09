// What the forward and backward kernels of the causal convolution share. See causal_conv1d.h for the maths and the
// layout, README.md for the design.
//
// A thread owns a run of kRun tokens of one channel (of two neighbours when the channels are contiguous). A warp's
// lanes lie along the axis that is contiguous in memory:
//   along tokens: a warp owns kTile tokens of one channel, lane after lane, in kSteps steps;
//   along channels: a block owns kTile tokens of its channels, warp after warp, in kSteps steps.
// Between two sequences a run falls into pieces, which are worked on one after another.
#pragma once

#include "../../include/pykernels/causal_conv1d.h"

#include <algorithm>

#include "../common/elements.cuh"
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/sequences.cuh"
#include "../common/shared.cuh"

namespace pykernels::cuda::conv {

constexpr int kThreads = 128, kWarps = kThreads / 32, kRun = 8;

// Template parameters: W is the width when it is 1 to 8, else 0; kAlongTokens says what lanes do.
template <int W, bool kAlongTokens>
struct Tiling {
  static constexpr int kPair = W > 0 && !kAlongTokens ? 2 : 1;  // channels of a thread
  static constexpr int kSteps = kAlongTokens ? 4 : 8;
  static constexpr int kStep = kRun * (kAlongTokens ? 32 : kWarps);  // tokens
  static constexpr int kTile = kStep * kSteps;
  static constexpr int kBlockChannels = kAlongTokens ? kWarps : 32 * kPair;

  // Runs begin at multiples of 16 bytes, so up to kRun - 1 tokens before the row does.
  static int64_t tiles(int64_t length) { return length == 0 ? 0 : (length + kRun - 1 + kTile - 1) / kTile; }
  static int64_t blocks(const CausalConv1dParams& p) {
    return p.batch * tiles(p.length) * ((p.channels + kBlockChannels - 1) / kBlockChannels);
  }
};

// What a thread works on.
template <class T, int W, bool kAlongTokens>
struct Place {
  using Tiles = Tiling<W, kAlongTokens>;
  int64_t batch, channel, tile, token;  // token: of the first run; may be negative
  bool active;                          // whether there is such a channel

  __device__ __forceinline__ Place(const CausalConv1dParams& p, int64_t tiles) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t blocks = (p.channels + Tiles::kBlockChannels - 1) / Tiles::kBlockChannels;
    int64_t group;
    if constexpr (kAlongTokens) {
      tile = blockIdx.x % tiles, group = blockIdx.x / tiles % blocks, batch = blockIdx.x / tiles / blocks;
      channel = group * kWarps + warp;
    } else {
      group = blockIdx.x % blocks, tile = blockIdx.x / blocks % tiles, batch = blockIdx.x / blocks / tiles;
      channel = group * Tiles::kBlockChannels + lane * Tiles::kPair;
    }
    active = channel < p.channels;
    token = tile * Tiles::kTile + (kAlongTokens ? lane : warp) * kRun;
    if constexpr (kAlongTokens) {
      const auto row = reinterpret_cast<uintptr_t>(static_cast<const T*>(p.x) + batch * p.x_stride.batch +
                                                   channel * p.x_stride.channel);
      token -= static_cast<int64_t>(row / sizeof(T) % (16 / sizeof(T)));
    }
  }
};

// Where a tensor has a thread's first channel.
template <class T>
__device__ __forceinline__ T* row_of(const void* data, const ChannelStrides& stride, int64_t batch, int64_t channel) {
  return static_cast<T*>(const_cast<void*>(data)) + batch * stride.batch + channel * stride.channel;
}
template <class T>
__device__ __forceinline__ T* state_row(const void* data, const CausalConv1dParams& p, int64_t sequence,
                                        int64_t channel) {
  return static_cast<T*>(const_cast<void*>(data)) + (sequence * p.channels + channel) * (p.width - 1);
}

// e, the initial state followed by x, at the place of a token; tokens before the sequence are the state's.
template <class T>
__device__ __forceinline__ float entry(const CausalConv1dParams& p, const T* x_row, const Sequence& sequence,
                                       int64_t channel, int64_t token) {
  if (token >= sequence.end) return 0.0f;
  if (token >= sequence.start) return widen(x_row[token * p.x_stride.token]);
  const int64_t index = token - sequence.start + p.width - 1;
  if (p.initial_state == nullptr || index < 0) return 0.0f;
  return widen(state_row<T>(p.initial_state, p, sequence.index, channel)[index]);
}

// The taps of a thread's channels, in registers.
template <int W, int kPair>
struct Taps {
  float weight[kPair][W], bias[kPair];

  __device__ __forceinline__ Taps(const CausalConv1dParams& p, int64_t channel) {
#pragma unroll
    for (int c = 0; c < kPair; ++c) {
#pragma unroll
      for (int w = 0; w < W; ++w) weight[c][w] = static_cast<const float*>(p.weight)[(channel + c) * W + w];
      bias[c] = p.bias != nullptr ? static_cast<const float*>(p.bias)[channel + c] : 0.0f;
    }
  }
};

// A run as its sequence sees it: tokens [low, high), counted from the run's first. Beyond kFar they are not told apart.
struct Piece {
  static constexpr int kFar = 1024;
  int low, high;
  __device__ __forceinline__ Piece(const Sequence& sequence, int64_t first)
      : low(static_cast<int>(min(max(sequence.start - first, int64_t{-kFar}), int64_t{kFar}))),
        high(static_cast<int>(min(max(sequence.end - first, int64_t{-kFar}), int64_t{kFar}))) {}
  __device__ __forceinline__ bool has(int token) const { return token >= low && token < high; }
};

// Eight neighbours of a row, as vectors if they are aligned.
template <class T>
__device__ __forceinline__ void load_run(float (&x)[kRun], const T* p) {
  if (Neighbours<kRun, T>::aligned(p)) {
    Neighbours<kRun, T>::load(x, p);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = widen(p[i]);
  }
}

// values[c][i] of channel + c at token kFrom + i of the run that begins at `row`. Of all of them, if `inner`, when
// kRun tokens on either side of the run belong to the sequence too; else zero where the sequence has no token.
template <int kFrom, bool kAlongTokens, class T, int kPair, int kCount>
__device__ __forceinline__ void load_tokens(float (&values)[kPair][kCount], const T* row, int64_t stride,
                                            const Piece& piece, bool inner) {
  if (!inner) {
    const T* p = row + kFrom * (kAlongTokens ? 1 : stride);
#pragma unroll
    for (int i = 0; i < kCount; ++i, p += kAlongTokens ? 1 : stride) {
      const bool there = piece.has(kFrom + i);
#pragma unroll
      for (int c = 0; c < kPair; ++c) values[c][i] = there ? widen(p[c]) : 0.0f;
    }
  } else if constexpr (kAlongTokens) {
    static_assert(kFrom > -kRun && kFrom <= 0 && kFrom + kCount <= 2 * kRun);
    float part[kRun];
    if constexpr (kFrom < 0) {
      load_run(part, row - kRun);
#pragma unroll
      for (int i = 0; i < -kFrom; ++i) values[0][i] = part[kRun + kFrom + i];
    }
    load_run(part, row);
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[0][i - kFrom] = part[i];
    if constexpr (kFrom + kCount > kRun) {
      load_run(part, row + kRun);
#pragma unroll
      for (int i = kRun; i < kFrom + kCount; ++i) values[0][i - kFrom] = part[i - kRun];
    }
  } else {
    const T* p = row + kFrom * stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i, p += stride) {
      float pair[kPair];
      Neighbours<kPair, T>::load(pair, p);
#pragma unroll
      for (int c = 0; c < kPair; ++c) values[c][i] = pair[c];
    }
  }
}

// Fills the entries of e before the sequence, of which e[.][0] is the one W - 1 before the run, from its state.
template <class T, int W, int kPair, int kCount>
__device__ __forceinline__ void load_state(float (&e)[kPair][kCount], const CausalConv1dParams& p,
                                           const Sequence& sequence, int64_t channel, const Piece& piece) {
  if (p.initial_state == nullptr || piece.low <= -(W - 1)) return;
#pragma unroll
  for (int c = 0; c < kPair; ++c) {
    const T* const state = state_row<const T>(p.initial_state, p, sequence.index, channel + c);
#pragma unroll
    for (int i = 0; i < kRun + W - 1; ++i) {
      const int entry = i - piece.low;  // of the state
      if (entry >= 0 && entry < W - 1) e[c][i] = widen(state[entry]);
    }
  }
}

// Writes tokens [low, high) of a run.
template <bool kAlongTokens, class T, int kPair>
__device__ __forceinline__ void store_run(T* row, int64_t stride, const float (&values)[kPair][kRun],
                                          const Piece& piece) {
  if constexpr (kAlongTokens) {
    if (piece.low <= 0 && piece.high >= kRun && Neighbours<kRun, T>::aligned(row)) {
      Neighbours<kRun, T>::store(row, values[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (piece.has(i)) row[i] = narrow<T>(values[0][i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i, row += stride) {
      if (!piece.has(i)) continue;
      const float pair[2] = {values[0][i], values[1][i]};
      Neighbours<2, T>::store(row, pair);
    }
  }
}

// Walks over the pieces of a thread's runs: calls piece(sequence, its Piece, first token of the run).
template <class Tiles, class F>
__device__ __forceinline__ void for_pieces(const CausalConv1dParams& p, int64_t batch, int64_t token, F&& piece) {
  Sequence sequence{0, 0, 0};
#pragma unroll 1
  for (int step = 0; step < Tiles::kSteps; ++step) {
    const int64_t first = token + step * Tiles::kStep;
    if (first >= p.length) return;
    int64_t next = max(first, int64_t{0});
#pragma unroll 1
    do {
      if (next >= sequence.end) sequence = owner_of(p.cu_seqlens, p.sequences, p.length, batch, next);
      piece(sequence, Piece(sequence, first), first);
      next = sequence.end;
    } while (next < min(first + kRun, p.length));
  }
}

// Whether pairs of neighbouring channels can be read and written at once, everywhere in a tensor.
template <class T>
bool in_pairs(const void* data, const ChannelStrides& stride) {
  return stride.channel == 1 && stride.batch % 2 == 0 && stride.token % 2 == 0 &&
         reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0;
}

// Calls launch.template operator()<W>() with the width, 0 for those above 8.
template <class Launch>
const char* for_width(int64_t width, Launch&& launch) {
  switch (width) {
    case 1:
      return launch.template operator()<1>();
    case 2:
      return launch.template operator()<2>();
    case 3:
      return launch.template operator()<3>();
    case 4:
      return launch.template operator()<4>();
    case 5:
      return launch.template operator()<5>();
    case 6:
      return launch.template operator()<6>();
    case 7:
      return launch.template operator()<7>();
    case 8:
      return launch.template operator()<8>();
    default:
      return launch.template operator()<0>();
  }
}

// A launch of `blocks` blocks; none is fine.
template <class... Parameters, class... Arguments>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, unsigned shared_bytes,
                          void* stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more tiles than a grid has blocks";
  return launch(kernel,
                {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes,
                 static_cast<cudaStream_t>(stream)},
                arguments...);
}

}  // namespace pykernels::cuda::conv
