// What the bindings of the causal convolution do for every native backend: memory checks and allocation around
// launch(params, x).
#pragma once

#include "channels.h"

namespace pykernels::bindings {

inline CausalConv1dParams conv_params(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& initial_state,
                                      const std::optional<Tensor>& cu_seqlens, bool silu, Owner& owner) {
  STD_TORCH_CHECK(x.dim() == 3, "pykernels: x needs 3 axes");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1, "pykernels: weight needs 2 axes and a width of at least 1");
  CausalConv1dParams p{};
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.channels = x.size(1), p.length = x.size(2), p.width = weight.size(1);
  p.x = x.const_data_ptr(), p.x_stride = channel_strides(x);
  p.weight = contiguous_data(weight, accumulator_of(x), {p.channels, p.width}, "weight", owner);
  p.bias = contiguous_data(bias, accumulator_of(x), {p.channels}, "bias", owner);
  const int64_t states = count_sequences(x, cu_seqlens);
  p.initial_state =
      contiguous_data(initial_state, x.scalar_type(), {states, p.channels, p.width - 1}, "initial_state", owner);
  p.cu_seqlens = indices_data(cu_seqlens, states + 1, "cu_seqlens");
  p.sequences = states;
  p.silu = silu;
  return p;
}

template <class Launch>
std::tuple<Tensor, Tensor> conv_fwd(Launch&& launch, const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& initial_state,
                                    const std::optional<Tensor>& cu_seqlens, bool silu) {
  Owner owner;
  CausalConv1dParams p = conv_params(x, weight, bias, initial_state, cu_seqlens, silu, owner);
  Tensor out = empty_like_layout(x);
  Tensor final_state = empty({p.sequences, p.channels, p.width - 1}, x.scalar_type(), x);
  p.out = out.mutable_data_ptr(), p.out_stride = channel_strides(out);
  p.final_state = final_state.mutable_data_ptr();
  launch(p, x);
  return {out, final_state};
}

using ConvGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
ConvGradients conv_bwd(Launch&& launch, const Tensor& dout, const std::optional<Tensor>& dfinal_state, const Tensor& x,
                       const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
                       bool silu) {
  Owner owner;
  CausalConv1dBackwardParams p{};
  p.forward = conv_params(x, weight, bias, initial_state, cu_seqlens, silu, owner);
  const CausalConv1dParams& f = p.forward;
  check_same_dtype(dout, x, "dout");
  check_shape(dout, {f.batch, f.channels, f.length}, "dout");
  p.dout = dout.const_data_ptr(), p.dout_stride = channel_strides(dout);
  p.dfinal_state =
      contiguous_data(dfinal_state, x.scalar_type(), {f.sequences, f.channels, f.width - 1}, "dfinal_state", owner);
  Tensor dx = empty_like_layout(x);
  Tensor dweight = empty({f.channels, f.width}, accumulator_of(x), x);
  Tensor dbias = empty({f.channels}, accumulator_of(x), x);
  Tensor dinitial_state = empty({initial_state ? f.sequences : 0, f.channels, f.width - 1}, x.scalar_type(), x);
  p.dx = dx.mutable_data_ptr(), p.dx_stride = channel_strides(dx);
  p.dweight = dweight.mutable_data_ptr(), p.dbias = dbias.mutable_data_ptr();
  if (initial_state) p.dinitial_state = dinitial_state.mutable_data_ptr();
  launch(p, x);
  return {dx, dweight, dbias, dinitial_state};
}

// x [B, D] or [B, D, T]; weight and bias in the compute type or x's.
template <class Launch>
Tensor conv_step(Launch&& launch, const Tensor& x, Tensor& state, const Tensor& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& state_indices, bool silu) {
  STD_TORCH_CHECK((x.dim() == 2 || x.dim() == 3) && state.dim() == 3, "pykernels: x needs 2 or 3 axes, state 3");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1, "pykernels: weight needs 2 axes and a width of at least 1");
  Owner owner;
  CausalConv1dStepParams p{};
  const bool one = x.dim() == 2;
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.channels = x.size(1), p.tokens = one ? 1 : x.size(2);
  p.width = weight.size(1), p.slots = state.size(0);
  check_slots(p.slots, p.batch, state_indices);
  check_same_dtype(state, x, "state");
  check_shape(state, {p.slots, p.channels, p.width - 1}, "state");
  p.x = x.const_data_ptr(), p.x_stride = {x.stride(0), x.stride(1), one ? 1 : x.stride(2)};
  p.state = state.mutable_data_ptr(), p.state_stride = channel_strides(state);
  check_wide(weight, x, "weight");
  p.weight = contiguous_data(weight, weight.scalar_type(), {p.channels, p.width}, "weight", owner);
  p.weight_dtype = dtype_of(weight);
  if (bias) {
    check_wide(*bias, x, "bias");
    p.bias = contiguous_data(bias, bias->scalar_type(), {p.channels}, "bias", owner);
    p.bias_dtype = dtype_of(*bias);
  }
  p.state_indices = indices_data(state_indices, p.batch, "state_indices");
  p.silu = silu;
  Tensor out = one ? empty({p.batch, p.channels}, x.scalar_type(), x) : empty_like_layout(x);
  p.out = out.mutable_data_ptr(), p.out_stride = {out.stride(0), out.stride(1), one ? 1 : out.stride(2)};
  launch(p, x);
  return out;
}

}  // namespace pykernels::bindings
