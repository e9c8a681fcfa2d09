// Causal depthwise convolution: the parameters and launch functions that every native backend shares. Torch-free.
//
// With e the initial state (zeros without one) followed by x, W - 1 + L entries per channel:
//   out[d, t] = act(bias[d] + sum_w weight[d, w] e[d, t + w])      final_state[d, j] = e[d, L + j]
//
// Memory layout. x and out [B, D, L], any strides (in elements). weight [D, W] and bias [D] in the compute type (fp32,
// fp64 for fp64), contiguous. States [B, D, W - 1] in x's type, contiguous.
// Packed input: B = 1, cu_seqlens [sequences + 1], states [sequences, D, W - 1]; sequence s is tokens cu_seqlens[s] to
// cu_seqlens[s + 1]. Kernels clamp what they read from it. Tokens of no sequence give zeros.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "parallel.h"

namespace pykernels {

struct ChannelStrides {
  int64_t batch, channel, token;  // in elements
};

struct CausalConv1dParams {
  DType dtype;  // of x, out, the states and their gradients
  int64_t batch, channels, length, width;
  const void* x;
  ChannelStrides x_stride;
  const void* weight;
  const void* bias;           // or null
  const void* initial_state;  // or null: zeros
  const int32_t* cu_seqlens;  // or null
  int64_t sequences;
  bool silu;  // act is SiLU, else the identity

  // Written by the forward pass.
  void* out;
  ChannelStrides out_stride;
  void* final_state;
};

struct CausalConv1dBackwardParams {
  CausalConv1dParams forward;
  const void* dout;
  ChannelStrides dout_stride;
  const void* dfinal_state;  // contiguous, or null: zero
  // Every element is written.
  void* dx;
  ChannelStrides dx_stride;
  void* dweight;         // [D, W] in the compute type
  void* dbias;           // [D] in the compute type
  void* dinitial_state;  // contiguous, or null: not wanted
  void* scratch;         // cuda: causal_conv1d_bwd_scratch() floats
};

// A few new tokens x [B, D, T] per entry against states that are read and replaced: state[slot], slot =
// state_indices[b] or b without them. An entry whose index is outside [0, slots) is padding: out is zero, no state is
// touched.
struct CausalConv1dStepParams {
  DType dtype;
  int64_t batch, channels, tokens, width, slots;
  const void* x;
  ChannelStrides x_stride;
  void* state;  // [slots, D, W - 1]
  ChannelStrides state_stride;
  const void* weight;  // as above, but in the compute type or x's
  const void* bias;
  DType weight_dtype, bias_dtype;
  const int32_t* state_indices;  // [B], or null
  bool silu;
  void* out;
  ChannelStrides out_stride;
};

namespace cpu {
void causal_conv1d_fwd(const CausalConv1dParams& params, const Parallel& parallel);
void causal_conv1d_bwd(const CausalConv1dBackwardParams& params, const Parallel& parallel);
void causal_conv1d_step(const CausalConv1dStepParams& params, const Parallel& parallel);
}  // namespace cpu

// On the current device's stream `stream` (a cudaStream_t); return null, or what went wrong with the launch.
namespace cuda {
const char* causal_conv1d_fwd(const CausalConv1dParams& params, void* stream);
int64_t causal_conv1d_bwd_scratch(const CausalConv1dBackwardParams& params);
const char* causal_conv1d_bwd(const CausalConv1dBackwardParams& params, void* stream);
const char* causal_conv1d_step(const CausalConv1dStepParams& params, void* stream);
}  // namespace cuda

}  // namespace pykernels
