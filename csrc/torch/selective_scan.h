// What the bindings of the selective scan do for every native backend: memory checks and allocation around
// launch(params, u). Complex numbers arrive as real tensors with a last axis of 2.
#pragma once

#include "../include/pykernels/selective_scan.h"

#include "channels.h"

namespace pykernels::bindings {

inline void check_wide(const Tensor& x, const Tensor& main, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == main.scalar_type() ||
                      (x.scalar_type() == ScalarType::Float && main.scalar_type() != ScalarType::Double),
                  "pykernels: ", name, " must have u's dtype or float32");
}

// Checks sizes, with a last axis of 2 if complex.
inline void check_states(const Tensor& x, std::initializer_list<int64_t> sizes, bool is_complex, const char* name) {
  std::vector<int64_t> expected(sizes);
  if (is_complex) expected.push_back(2);
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(expected.size()), "pykernels: ", name, " has the wrong number of axes");
  for (size_t i = 0; i < expected.size(); ++i)
    STD_TORCH_CHECK(x.size(i) == expected[i], "pykernels: ", name, " has the wrong size on axis ", i);
}

inline const void* states_data(const std::optional<Tensor>& x, ScalarType dtype, std::initializer_list<int64_t> sizes, bool is_complex,
                        const char* name, std::vector<Tensor>& owner) {
  if (!x) return nullptr;
  check_dtype(*x, dtype, name);
  check_states(*x, sizes, is_complex, name);
  owner.push_back(contiguous_or(*x));
  return owner.back().const_data_ptr();
}

inline Tensor empty_states(std::initializer_list<int64_t> sizes, bool is_complex, const Tensor& u) {
  std::vector<int64_t> shape(sizes);
  if (is_complex) shape.push_back(2);
  return torch::stable::empty({shape.data(), shape.size()}, accumulator_of(u), std::nullopt, u.device());
}

inline Projection projection(const Tensor& x, const Tensor& u, SelectiveScanParams& p, const char* name, std::vector<Tensor>& owner) {
  Projection result{};
  result.constant = x.dim() == 2 + p.is_complex;
  if (result.constant) {
    result.data = states_data(x, accumulator_of(u), {p.channels, p.state}, p.is_complex, name, owner);
    return result;
  }
  const int64_t groups = x.size(1);
  STD_TORCH_CHECK(p.groups == 0 || p.groups == groups, "pykernels: B and C have different groups");
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0, "pykernels: the groups of ", name, " do not divide the channels");
  if (p.is_complex)
    check_dtype(x, accumulator_of(u), name);
  else
    check_wide(x, u, name);
  check_states(x, {p.batch, groups, p.state, p.length}, p.is_complex, name);
  const Tensor held = p.is_complex ? contiguous_or(x) : x;
  owner.push_back(held);
  result.data = held.const_data_ptr();
  result.dtype = dtype_of(held);
  result.batch = held.stride(0), result.group = held.stride(1), result.state = held.stride(2), result.token = held.stride(3);
  return result;
}

inline SelectiveScanParams scan_params(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                const std::optional<Tensor>& delta_bias, const std::optional<Tensor>& initial_state,
                                const std::optional<Tensor>& cu_seqlens, bool delta_softplus, std::vector<Tensor>& owner) {
  STD_TORCH_CHECK(u.dim() == 3, "pykernels: u needs 3 axes");
  STD_TORCH_CHECK(A.dim() == 2 || A.dim() == 3, "pykernels: A needs 2 axes, or 3 when complex");
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
  p.A = states_data(A, accumulator_of(u), {p.channels, p.state}, p.is_complex, "A", owner);
  p.B = projection(B, u, p, "B", owner);
  p.C = projection(C, u, p, "C", owner);
  if (p.groups == 0) p.groups = 1;
  p.D = contiguous_data(D, accumulator_of(u), {p.channels}, "D", owner);
  p.delta_bias = contiguous_data(delta_bias, accumulator_of(u), {p.channels}, "delta_bias", owner);
  p.sequences = count_sequences(u, cu_seqlens);
  p.initial_state =
      states_data(initial_state, accumulator_of(u), {p.sequences, p.channels, p.state}, p.is_complex, "initial_state", owner);
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
                                            const std::optional<Tensor>& cu_seqlens, bool delta_softplus, bool keep_states) {
  std::vector<Tensor> owner;
  SelectiveScanParams p = scan_params(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, owner);
  Tensor out = empty_like_layout(u);
  Tensor final_state = empty_states({p.sequences, p.channels, p.state}, p.is_complex, u);
  Tensor chunk_states = empty({keep_states ? count_chunks(p) : 0, p.state * (1 + p.is_complex), p.channels}, accumulator_of(u), u);
  p.out = out.mutable_data_ptr(), p.out_stride = channel_strides(out);
  p.final_state = final_state.mutable_data_ptr();
  if (keep_states) p.chunk_states = chunk_states.mutable_data_ptr();
  launch(p, u);
  return {out, final_state, chunk_states};
}

using ScanGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
ScanGradients scan_bwd(Launch&& launch, const Tensor& dout, const std::optional<Tensor>& dfinal_state, const Tensor& u,
                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                       const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                       const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
                       bool delta_softplus, const Tensor& chunk_states) {
  std::vector<Tensor> owner;
  SelectiveScanBackwardParams p{};
  p.forward = scan_params(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, owner);
  SelectiveScanParams& f = p.forward;
  check_same_dtype(dout, u, "dout");
  check_shape(dout, {f.batch, f.channels, f.length}, "dout");
  p.dout = dout.const_data_ptr(), p.dout_stride = channel_strides(dout);
  p.dfinal_state =
      states_data(dfinal_state, accumulator_of(u), {f.sequences, f.channels, f.state}, f.is_complex, "dfinal_state", owner);
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

// Axes are [batch, head, channel, state], of which `present` says which ones the tensor has.
inline SelectiveScanStepParams::Strides step_strides(const Tensor& x, bool batch, bool head, bool channel, bool state) {
  SelectiveScanStepParams::Strides s{};
  int64_t axis = 0;
  if (batch) s.batch = x.stride(axis++);
  if (head) s.head = x.stride(axis++);
  if (channel) s.channel = x.stride(axis++);
  if (state) s.state = x.stride(axis++);
  return s;
}

template <class Launch>
Tensor scan_step(Launch&& launch, const Tensor& x, Tensor& state, const Tensor& delta, const Tensor& A, const Tensor& B,
                 const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                 const std::optional<Tensor>& delta_bias, const std::optional<Tensor>& state_indices, bool delta_softplus) {
  STD_TORCH_CHECK(x.dim() == 3, "pykernels: x needs 3 axes");
  SelectiveScanStepParams p{};
  p.is_complex = A.dim() == 4;
  STD_TORCH_CHECK(A.dim() == 3 || A.dim() == 4, "pykernels: A needs 3 axes, or 4 when complex");
  p.dtype = dtype_of(x), p.delta_dtype = dtype_of(delta);
  p.batch = x.size(0), p.heads = x.size(1), p.channels = x.size(2), p.state = A.size(2), p.slots = state.size(0);
  STD_TORCH_CHECK(p.state >= 1, "pykernels: A needs at least one state");
  STD_TORCH_CHECK(state_indices || p.slots == p.batch, "pykernels: state needs one slot per batch entry, or state_indices");
  const ScalarType wide = accumulator_of(x);
  check_dtype(state, wide, "state");
  check_states(state, {p.slots, p.heads, p.channels, p.state}, p.is_complex, "state");
  check_dtype(A, wide, "A");
  check_states(A, {p.heads, p.channels, p.state}, p.is_complex, "A");
  check_wide(delta, x, "delta");
  check_shape(delta, {p.batch, p.heads, p.channels}, "delta");
  p.groups = B.size(1);
  STD_TORCH_CHECK(p.groups > 0 && p.heads % p.groups == 0, "pykernels: the groups of B do not divide the heads");
  for (const auto& [projection, name] : {std::pair{&B, "B"}, std::pair{&C, "C"}}) {
    p.is_complex ? check_dtype(*projection, wide, name) : check_wide(*projection, x, name);
    check_states(*projection, {p.batch, p.groups, p.state}, p.is_complex, name);
  }
  // The imaginary part must follow the real one.
  for (const Tensor* pair : {static_cast<const Tensor*>(&state), &A, &B, &C})
    STD_TORCH_CHECK(!p.is_complex || pair->stride(pair->dim() - 1) == 1, "pykernels: complex pairs must be contiguous");
  p.states = state.mutable_data_ptr(), p.states_stride = step_strides(state, true, true, true, true);
  p.x = x.const_data_ptr(), p.x_stride = step_strides(x, true, true, true, false);
  p.delta = delta.const_data_ptr(), p.delta_stride = step_strides(delta, true, true, true, false);
  p.A = A.const_data_ptr(), p.A_stride = step_strides(A, false, true, true, true);
  p.B = B.const_data_ptr(), p.B_stride = step_strides(B, true, true, false, true), p.B_dtype = dtype_of(B);
  p.C = C.const_data_ptr(), p.C_stride = step_strides(C, true, true, false, true), p.C_dtype = dtype_of(C);
  if (z) {
    check_same_dtype(*z, x, "z");
    check_shape(*z, {p.batch, p.heads, p.channels}, "z");
    p.z = z->const_data_ptr(), p.z_stride = step_strides(*z, true, true, true, false);
  }
  const auto parameter = [&](const std::optional<Tensor>& y, const void*& data, SelectiveScanStepParams::Strides& strides,
                             const char* name) {
    if (!y) return;
    check_dtype(*y, wide, name);
    check_shape(*y, {p.heads, p.channels}, name);
    data = y->const_data_ptr(), strides = step_strides(*y, false, true, true, false);
  };
  parameter(D, p.D, p.D_stride, "D");
  parameter(delta_bias, p.delta_bias, p.delta_bias_stride, "delta_bias");
  p.state_indices = indices_data(state_indices, p.batch, "state_indices");
  p.delta_softplus = delta_softplus;
  Tensor out = empty({p.batch, p.heads, p.channels}, x.scalar_type(), x);
  p.out = out.mutable_data_ptr(), p.out_stride = step_strides(out, true, true, true, false);
  launch(p, x);
  return out;
}

}  // namespace pykernels::bindings
