// What the bindings of the selective scan do for every native backend: memory checks and allocation around
// launch(params, u). Complex numbers arrive as real tensors with a last axis of 2.
#pragma once

#include "../include/pykernels/selective_scan.h"

#include "channels.h"

namespace pykernels::bindings {

// The sizes as given, with a last axis of 2 if complex.
inline std::vector<int64_t> state_sizes(std::vector<int64_t> sizes, bool is_complex) {
  if (is_complex) sizes.push_back(2);
  return sizes;
}

inline Tensor empty_states(std::vector<int64_t> sizes, bool is_complex, const Tensor& u) {
  return empty(state_sizes(std::move(sizes), is_complex), accumulator_of(u), u);
}

inline Projection projection(const Tensor& x, const Tensor& u, SelectiveScanParams& p, const char* name,
                             Owner& owner) {
  Projection result{};
  result.constant = x.dim() == 2 + p.is_complex;
  if (result.constant) {
    const auto sizes = state_sizes({p.channels, p.state}, p.is_complex);
    result.data = contiguous_data(x, accumulator_of(u), sizes, name, owner);
    return result;
  }
  const int64_t groups = x.size(1);
  STD_TORCH_CHECK(p.groups == 0 || p.groups == groups, "pykernels: B and C have different groups");
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0,  //
                  "pykernels: the groups of ", name, " do not divide the channels");
  if (p.is_complex)
    check_dtype(x, accumulator_of(u), name);
  else
    check_wide(x, u, name);
  check_shape(x, state_sizes({p.batch, groups, p.state, p.length}, p.is_complex), name);
  const Tensor held = p.is_complex ? contiguous_or(x) : x;
  owner.push_back(held);
  result.data = held.const_data_ptr();
  result.dtype = dtype_of(held);
  result.batch = held.stride(0), result.group = held.stride(1);
  result.state = held.stride(2), result.token = held.stride(3);
  return result;
}

inline SelectiveScanParams scan_params(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                       const Tensor& C, const std::optional<Tensor>& D,
                                       const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                                       const std::optional<Tensor>& initial_state,
                                       const std::optional<Tensor>& cu_seqlens, bool delta_softplus, Owner& owner) {
  STD_TORCH_CHECK(u.dim() == 3, "pykernels: u needs 3 axes");
  STD_TORCH_CHECK(A.dim() == 2 || A.dim() == 3, "pykernels: A needs 2 axes, or 3 when complex");
  const ScalarType wide = accumulator_of(u);
  SelectiveScanParams p{};
  p.dtype = dtype_of(u), p.delta_dtype = dtype_of(delta);
  p.batch = u.size(0), p.channels = u.size(1), p.length = u.size(2), p.state = A.size(1);
  p.is_complex = A.dim() == 3;
  STD_TORCH_CHECK(p.state >= 1, "pykernels: A needs at least one state");
  check_wide(delta, u, "delta");
  check_shape(delta, {p.batch, p.channels, p.length}, "delta");
  p.u = u.const_data_ptr(), p.u_stride = channel_strides(u);
  p.delta = delta.const_data_ptr(), p.delta_stride = channel_strides(delta);
  if (z) {
    check_same_dtype(*z, u, "z");
    check_shape(*z, {p.batch, p.channels, p.length}, "z");
    p.z = z->const_data_ptr(), p.z_stride = channel_strides(*z);
  }
  p.A = contiguous_data(A, wide, state_sizes({p.channels, p.state}, p.is_complex), "A", owner);
  p.B = projection(B, u, p, "B", owner);
  p.C = projection(C, u, p, "C", owner);
  if (p.groups == 0) p.groups = 1;
  p.D = contiguous_data(D, wide, {p.channels}, "D", owner);
  p.delta_bias = contiguous_data(delta_bias, wide, {p.channels}, "delta_bias", owner);
  p.sequences = count_sequences(u, cu_seqlens);
  const auto states = state_sizes({p.sequences, p.channels, p.state}, p.is_complex);
  p.initial_state = contiguous_data(initial_state, wide, states, "initial_state", owner);
  p.cu_seqlens = indices_data(cu_seqlens, p.sequences + 1, "cu_seqlens");
  p.delta_softplus = delta_softplus;
  return p;
}

inline int64_t count_chunks(const SelectiveScanParams& p) {
  const int64_t chunks = p.length / kSelectiveScanChunk;
  return p.cu_seqlens != nullptr ? chunks + p.sequences + 1 : p.batch * (chunks + 1);
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor> scan_fwd(Launch&& launch, const Tensor& u, const Tensor& delta, const Tensor& A,
                                            const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                                            const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                                            const std::optional<Tensor>& initial_state,
                                            const std::optional<Tensor>& cu_seqlens, bool delta_softplus,
                                            bool keep_states) {
  Owner owner;
  SelectiveScanParams p =
      scan_params(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, owner);
  Tensor out = empty_like_layout(u);
  Tensor final_state = empty_states({p.sequences, p.channels, p.state}, p.is_complex, u);
  const int64_t chunks = keep_states ? count_chunks(p) : 0;
  Tensor chunk_states = empty({chunks, p.state * (1 + p.is_complex), p.channels}, accumulator_of(u), u);
  p.out = out.mutable_data_ptr(), p.out_stride = channel_strides(out);
  p.final_state = final_state.mutable_data_ptr();
  if (keep_states) p.chunk_states = chunk_states.mutable_data_ptr();
  launch(p, u);
  return {out, final_state, chunk_states};
}

using ScanGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
ScanGradients scan_bwd(Launch&& launch, const Tensor& dout, const std::optional<Tensor>& dfinal_state, const Tensor& u,
                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                       const std::optional<Tensor>& delta_bias, const std::optional<Tensor>& initial_state,
                       const std::optional<Tensor>& cu_seqlens, bool delta_softplus, const Tensor& chunk_states) {
  Owner owner;
  SelectiveScanBackwardParams p{};
  p.forward = scan_params(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, owner);
  SelectiveScanParams& f = p.forward;
  check_same_dtype(dout, u, "dout");
  check_shape(dout, {f.batch, f.channels, f.length}, "dout");
  p.dout = dout.const_data_ptr(), p.dout_stride = channel_strides(dout);
  const auto states = state_sizes({f.sequences, f.channels, f.state}, f.is_complex);
  p.dfinal_state = contiguous_data(dfinal_state, accumulator_of(u), states, "dfinal_state", owner);
  check_dtype(chunk_states, accumulator_of(u), "chunk_states");
  check_shape(chunk_states, {count_chunks(f), f.state * (1 + f.is_complex), f.channels}, "chunk_states");
  owner.push_back(contiguous_or(chunk_states));
  f.chunk_states = const_cast<void*>(owner.back().const_data_ptr());  // read only

  Tensor du = empty_like_layout(u), ddelta = empty_like_layout(delta);
  Tensor dz = z ? empty_like_layout(*z) : empty({0}, u.scalar_type(), u);
  p.du = du.mutable_data_ptr(), p.du_stride = channel_strides(du);
  p.ddelta = ddelta.mutable_data_ptr(), p.ddelta_stride = channel_strides(ddelta);
  if (z) p.dz = dz.mutable_data_ptr(), p.dz_stride = channel_strides(dz);
  const auto like = [&](const Projection& x) {
    return x.constant ? empty_states({f.channels, f.state}, f.is_complex, u)
                      : empty_states({f.batch, f.groups, f.state, f.length}, f.is_complex, u);
  };
  Tensor dA = empty_states({f.channels, f.state}, f.is_complex, u), dB = like(f.B), dC = like(f.C);
  Tensor dD = empty({D ? f.channels : 0}, accumulator_of(u), u);
  Tensor ddelta_bias = empty({delta_bias ? f.channels : 0}, accumulator_of(u), u);
  Tensor dinitial_state = empty_states({initial_state ? f.sequences : 0, f.channels, f.state}, f.is_complex, u);
  if (f.channels == 0) torch::stable::zero_(dB), torch::stable::zero_(dC);  // no channel writes them
  p.dA = dA.mutable_data_ptr(), p.dB = dB.mutable_data_ptr(), p.dC = dC.mutable_data_ptr();
  if (D) p.dD = dD.mutable_data_ptr();
  if (delta_bias) p.ddelta_bias = ddelta_bias.mutable_data_ptr();
  if (initial_state) p.dinitial_state = dinitial_state.mutable_data_ptr();
  launch(p, u);
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state};
}

// x [B, D] or, in heads, [B, H, P], and so the other tensors' axes of channels; B and C [B, N] or [B, G, N]. Without
// heads, each group of channels is one.
template <class Launch>
Tensor scan_step(Launch&& launch, const Tensor& x, Tensor& state, const Tensor& delta, const Tensor& A, const Tensor& B,
                 const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                 const std::optional<Tensor>& delta_bias, const std::optional<Tensor>& state_indices,
                 bool delta_softplus) {
  using Strides = SelectiveScanStepParams::Strides;
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "pykernels: x needs 2 or 3 axes");
  SelectiveScanStepParams p{};
  const bool in_heads = x.dim() == 3;
  p.is_complex = A.dim() == x.dim() + 1;
  STD_TORCH_CHECK(p.is_complex || A.dim() == x.dim(), "pykernels: A needs as many axes as x, or one more when complex");
  p.dtype = dtype_of(x), p.delta_dtype = dtype_of(delta);
  const auto groups_of = [&](const Tensor& y) { return y.dim() == 3 + p.is_complex ? y.size(1) : 1; };
  p.groups = groups_of(B), p.batch = x.size(0);
  const int64_t all = x.size(1);  // heads, or channels
  STD_TORCH_CHECK(p.groups > 0 && all % p.groups == 0, "pykernels: the groups of B do not divide the heads");
  p.heads = in_heads ? all : p.groups, p.channels = in_heads ? x.size(2) : all / p.groups;
  STD_TORCH_CHECK(state.dim() >= 1, "pykernels: state needs slots");
  p.state = A.size(1 + in_heads), p.slots = state.size(0);
  STD_TORCH_CHECK(p.state >= 1, "pykernels: A needs at least one state");
  check_slots(p.slots, p.batch, state_indices);

  // These check y's sizes, -> strides. It has the axes of x's channels, and of a batch and of states if asked for.
  constexpr int64_t kNone = -1;
  const auto check_states_axis = [&](const Tensor& y, int64_t axis, const char* name) {
    STD_TORCH_CHECK(y.dim() == axis + 1 + p.is_complex && y.size(axis) == p.state,  //
                    "pykernels: ", name, " has the wrong states");
    // The imaginary part must follow the real one.
    STD_TORCH_CHECK(!p.is_complex || (y.size(axis + 1) == 2 && y.stride(axis + 1) == 1),  //
                    "pykernels: ", name, " must be contiguous pairs");
    return y.stride(axis);
  };
  const auto channel_axes = [&](const Tensor& y, int64_t batch, bool states, const char* name) {
    Strides s{};
    int64_t axis = 0;
    const auto next = [&](int64_t size) {
      STD_TORCH_CHECK(axis < y.dim() && y.size(axis) == size,  //
                      "pykernels: ", name, " has the wrong size on axis ", axis);
      return y.stride(axis++);
    };
    if (batch != kNone) s.batch = next(batch);
    if (in_heads)
      s.head = next(p.heads), s.channel = next(p.channels);
    else
      s.channel = next(all), s.head = s.channel * p.channels;
    if (states)
      s.state = check_states_axis(y, axis, name);
    else
      STD_TORCH_CHECK(y.dim() == axis, "pykernels: ", name, " has too many axes");
    return s;
  };
  const ScalarType wide = accumulator_of(x);
  check_dtype(state, wide, "state"), check_dtype(A, wide, "A"), check_wide(delta, x, "delta");
  p.states = state.mutable_data_ptr(), p.states_stride = channel_axes(state, p.slots, true, "state");
  p.x = x.const_data_ptr(), p.x_stride = channel_axes(x, p.batch, false, "x");
  p.delta = delta.const_data_ptr(), p.delta_stride = channel_axes(delta, p.batch, false, "delta");
  p.A = A.const_data_ptr(), p.A_stride = channel_axes(A, kNone, true, "A");
  const auto projection = [&](const Tensor& y, const void*& data, Strides& s, DType& dtype, const char* name) {
    p.is_complex ? check_dtype(y, wide, name) : check_wide(y, x, name);
    const bool grouped = y.dim() == 3 + p.is_complex;
    STD_TORCH_CHECK(groups_of(y) == p.groups && y.size(0) == p.batch,  //
                    "pykernels: ", name, " has the wrong batch or groups");
    data = y.const_data_ptr(), dtype = dtype_of(y);
    s = {y.stride(0), grouped ? y.stride(1) : 0, 0, check_states_axis(y, 1 + grouped, name)};
  };
  projection(B, p.B, p.B_stride, p.B_dtype, "B");
  projection(C, p.C, p.C_stride, p.C_dtype, "C");
  if (z) {
    check_same_dtype(*z, x, "z");
    p.z = z->const_data_ptr(), p.z_stride = channel_axes(*z, p.batch, false, "z");
  }
  const auto parameter = [&](const std::optional<Tensor>& y, const void*& data, Strides& s, DType& dtype,
                             const char* name) {
    if (!y) return;
    check_wide(*y, x, name);
    data = y->const_data_ptr(), dtype = dtype_of(*y), s = channel_axes(*y, kNone, false, name);
  };
  parameter(D, p.D, p.D_stride, p.D_dtype, "D");
  parameter(delta_bias, p.delta_bias, p.delta_bias_stride, p.delta_bias_dtype, "delta_bias");
  p.state_indices = indices_data(state_indices, p.batch, "state_indices");
  p.delta_softplus = delta_softplus;
  Tensor out = in_heads ? empty({p.batch, p.heads, p.channels}, x.scalar_type(), x)
                        : empty({p.batch, all}, x.scalar_type(), x);
  p.out = out.mutable_data_ptr(), p.out_stride = channel_axes(out, p.batch, false, "out");
  launch(p, x);
  return out;
}

}  // namespace pykernels::bindings
