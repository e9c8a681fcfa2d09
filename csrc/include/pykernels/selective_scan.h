// Selective scan: the parameters and launch functions that every native backend shares. Torch-free.
//
// Per batch entry and channel d, with x = delta + delta_bias, dt = softplus(x) (x itself above 20), x without softplus:
//   h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t            [N]
//   y_t = C_t . h_t + D u_t                              2 Re(C_t . h_t) when complex
//   out_t = y_t silu(z_t), or y_t without z
//
// Memory layout. u, delta, z and out [B, D, L], any strides (in elements). A [D, N], D [D] and delta_bias [D] in the
// compute type (fp32, fp64 for fp64), contiguous. B and C either [D, N], as A, or [B, G, N, L] with any strides;
// channel d reads group d / (D / G). States [B, D, N] in the compute type, contiguous. Complex numbers are pairs (real,
// imaginary): A, constant B and C and the states then have a last axis of 2.
// Packed input: B = 1, cu_seqlens [sequences + 1], states [sequences, D, N]; kernels clamp what they read from
// cu_seqlens. Tokens of no sequence give zeros.
//
// chunk_states [chunks, N, D] (complex: [chunks, N, 2, D]) holds h before each chunk of kSelectiveScanChunk tokens.
// Batch entry b owns chunks b * (L / chunk + 1) on, packed sequence s those from cu_seqlens[s] / chunk + s on.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "causal_conv1d.h"
#include "parallel.h"

namespace pykernels {

constexpr int64_t kSelectiveScanChunk = 64;

// B or C.
struct Projection {
  const void* data;
  bool constant;  // [D, N] in the compute type, contiguous; else the fields below
  DType dtype;
  int64_t batch, group, state, token;  // strides in real elements; the imaginary part follows the real one
};

struct SelectiveScanParams {
  DType dtype;        // of u, z, out and their gradients
  DType delta_dtype;  // of delta and its gradient: dtype or fp32
  int64_t batch, channels, length, state, groups;
  bool is_complex;
  const void* u;
  const void* delta;
  const void* z;  // or null
  ChannelStrides u_stride, delta_stride, z_stride;
  const void* A;
  Projection B, C;
  const void* D;              // or null
  const void* delta_bias;     // or null
  const void* initial_state;  // or null: zeros
  const int32_t* cu_seqlens;  // or null
  int64_t sequences;          // states: sequences when packed, else batch
  bool delta_softplus;

  // Written by the forward pass; chunk_states may be null, the backward pass reads it.
  void* out;
  ChannelStrides out_stride;
  void* final_state;
  void* chunk_states;
};

struct SelectiveScanBackwardParams {
  SelectiveScanParams forward;
  const void* dout;
  ChannelStrides dout_stride;
  const void* dfinal_state;  // contiguous, or null: zero
  // Every element is written. Contiguous and in the compute type but for du, ddelta and dz.
  void* du;
  void* ddelta;
  void* dz;  // or null
  ChannelStrides du_stride, ddelta_stride, dz_stride;
  void* dA;              // as A
  void* dB;              // as B: [D, N] or [B, G, N, L], complex with a last axis of 2
  void* dC;
  void* dD;              // or null
  void* ddelta_bias;     // or null
  void* dinitial_state;  // or null
  void* scratch;         // cuda: selective_scan_bwd_scratch() floats
};

// One token of each batch entry against states that are read and replaced. state [slots, H, P, N] is indexed by
// state_indices[b], or b without them; an entry whose index is outside [0, slots) is padding: out is zero, no state is
// touched. x, delta, z and out [B, H, P], A [H, P, N], D and delta_bias [H, P], B and C [B, G, N], any strides; head h
// reads group h / (H / G). A in the compute type, delta, B, C, D and delta_bias in that or x's.
struct SelectiveScanStepParams {
  DType dtype;        // of x, z and out
  DType delta_dtype, B_dtype, C_dtype, D_dtype, delta_bias_dtype;
  int64_t batch, heads, channels, state, groups, slots;  // channels: P
  bool is_complex;
  struct Strides {
    int64_t batch, head, channel, state;  // in (real) elements, 0 for axes that the tensor lacks
  };
  void* states;
  const void* x;
  const void* delta;
  const void* z;  // or null
  const void* A;
  const void* B;
  const void* C;
  const void* D;           // or null
  const void* delta_bias;  // or null
  Strides states_stride, x_stride, delta_stride, z_stride, A_stride, B_stride, C_stride, D_stride, delta_bias_stride;
  const int32_t* state_indices;  // [B], or null
  bool delta_softplus;
  void* out;
  Strides out_stride;
};

namespace cpu {
void selective_scan_fwd(const SelectiveScanParams& params, const Parallel& parallel);
void selective_scan_bwd(const SelectiveScanBackwardParams& params, const Parallel& parallel);
void selective_scan_step(const SelectiveScanStepParams& params, const Parallel& parallel);
}  // namespace cpu

// On the current device's `stream` (a cudaStream_t), for real A; return null, or what went wrong with the launch.
// The sizes of scratch memory, in floats, depend on the current device.
namespace cuda {
int64_t selective_scan_fwd_scratch(const SelectiveScanParams& params);
const char* selective_scan_fwd(const SelectiveScanParams& params, void* scratch, void* stream);
int64_t selective_scan_bwd_scratch(const SelectiveScanBackwardParams& params);
const char* selective_scan_bwd(const SelectiveScanBackwardParams& params, void* stream);
const char* selective_scan_step(const SelectiveScanStepParams& params, void* stream);
}  // namespace cuda

}  // namespace pykernels
