// What linear attention's bindings of every native backend share: schemas, memory checks, allocation.
#pragma once

#include <optional>
#include <tuple>

#include "../include/pykernels/linear_attention.h"
#include "common.h"

namespace pykernels::bindings {

inline Strides3 strides3(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// q, k [B, T, Hk, K] and v [B, T, H, V]; the tensors must outlive the launch.
inline LinearAttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                         bool normalize, bool reverse) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "pykernels: q, k and v need 4 axes");
  check_same_dtype(k, q, "k");
  check_same_dtype(v, q, "v");
  LinearAttentionParams p{};
  p.dtype = dtype_of(q);
  p.batch = v.size(0), p.tokens = v.size(1), p.heads = v.size(2), p.value_dim = v.size(3);
  p.heads_k = q.size(2), p.key_dim = q.size(3);
  check_shape(q, {p.batch, p.tokens, p.heads_k, p.key_dim}, "q");
  check_shape(k, {p.batch, p.tokens, p.heads_k, p.key_dim}, "k");
  STD_TORCH_CHECK(p.heads_k > 0 && p.heads % p.heads_k == 0, "pykernels: v's heads are no multiple of q's");
  STD_TORCH_CHECK(p.key_dim >= 1 && p.key_dim <= 256 && p.value_dim >= 1 && p.value_dim <= 512,
                  "pykernels: key sizes must be 1 to 256, value sizes 1 to 512");
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride = strides3(q), p.k_stride = strides3(k), p.v_stride = strides3(v);
  p.scale = scale, p.normalize = normalize, p.reverse = reverse;
  return p;
}

inline void set_bonus(LinearAttentionParams& p, const Tensor& q, const std::optional<Tensor>& bonus) {
  if (!bonus) return;
  check_dtype(*bonus, accumulator_of(q), "bonus");
  check_shape(*bonus, {p.heads, p.key_dim}, "bonus");
  p.bonus = bonus->const_data_ptr();
}

inline void set_decay(LinearAttentionParams& p, const Tensor& q, const std::optional<Tensor>& decay) {
  p.decay_kind = DecayKind::kNone;
  if (!decay) return;
  check_dtype(*decay, accumulator_of(q), "decay");
  p.decay = decay->const_data_ptr();
  if (decay->dim() == 1) {
    check_shape(*decay, {p.heads}, "decay");
    p.decay_kind = DecayKind::kHead;
    p.decay_stride = {0, 0, decay->stride(0)};
  } else if (decay->dim() == 3) {
    check_shape(*decay, {p.batch, p.tokens, p.heads}, "decay");
    p.decay_kind = DecayKind::kToken;
    p.decay_stride = strides3(*decay);
  } else {
    check_shape(*decay, {p.batch, p.tokens, p.heads, p.key_dim}, "decay");
    p.decay_kind = DecayKind::kChannel;
    p.decay_stride = strides3(*decay);
  }
}

inline void set_packing(LinearAttentionParams& p, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) return;
  STD_TORCH_CHECK(p.batch == 1, "pykernels: packed input has batch 1");
  check_dtype(*cu_seqlens, ScalarType::Int, "cu_seqlens");
  p.sequences = cu_seqlens->numel() - 1;
  STD_TORCH_CHECK(p.sequences >= 0, "pykernels: cu_seqlens is empty");
  check_shape(*cu_seqlens, {p.sequences + 1}, "cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens->is_contiguous(), "pykernels: cu_seqlens must be contiguous");
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
}

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(contiguous_or(*x)) : std::nullopt;
}
// A decay per channel is read like q and k.
inline std::optional<Tensor> decay_operand(const std::optional<Tensor>& x) {
  return x && x->dim() == 4 ? std::optional<Tensor>(last_contiguous(*x)) : x;
}

using LinearOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks, allocates, and calls launch(params, q).
template <class Launch>
LinearOutputs linear_attention_fwd(Launch launch, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                   const std::optional<Tensor>& decay_, const std::optional<Tensor>& bonus_,
                                   const std::optional<Tensor>& initial_state_,
                                   const std::optional<Tensor>& cu_seqlens, double scale, bool normalize, bool reverse,
                                   bool checkpoint) {
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_), v = last_contiguous(v_);
  const std::optional<Tensor> decay = decay_operand(decay_), bonus = contiguous_or_none(bonus_);
  const std::optional<Tensor> initial_state = contiguous_or_none(initial_state_);
  LinearAttentionParams p = make_params(q, k, v, scale, normalize, reverse);
  set_decay(p, q, decay);
  set_bonus(p, q, bonus);
  set_packing(p, cu_seqlens);
  const ScalarType wide = accumulator_of(q);
  const int64_t state_dim = p.value_dim_state(), count = p.state_count();
  if (initial_state) {
    check_dtype(*initial_state, wide, "initial_state");
    check_shape(*initial_state, {count, p.heads, p.key_dim, state_dim}, "initial_state");
    p.initial_state = initial_state->const_data_ptr();
  }
  Tensor out = empty({p.batch, p.tokens, p.heads, p.value_dim}, q.scalar_type(), q);
  Tensor final_state = empty({count, p.heads, p.key_dim, state_dim}, wide, q);
  Tensor checkpoints = empty({checkpoint ? p.tiles() : 0, p.heads, p.key_dim, state_dim}, wide, q);
  Tensor denominator = empty({p.batch, normalize ? p.tokens : 0, p.heads}, wide, q);
  p.out = out.mutable_data_ptr(), p.out_stride = strides3(out);
  p.final_state = final_state.mutable_data_ptr(), p.denominator = denominator.mutable_data_ptr();
  p.checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr;
  launch(p, q);
  return {out, final_state, checkpoints, denominator};
}

using LinearGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
LinearGradients linear_attention_bwd(Launch launch, const Tensor& dout_, const std::optional<Tensor>& dfinal_state_,
                                     const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                     const std::optional<Tensor>& decay_, const std::optional<Tensor>& bonus_,
                                     const std::optional<Tensor>& cu_seqlens, const Tensor& out_,
                                     const Tensor& checkpoints_, const Tensor& denominator_, double scale,
                                     bool normalize, bool reverse, bool decay_gradient) {
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_), v = last_contiguous(v_);
  const Tensor dout = last_contiguous(dout_), out = last_contiguous(out_);
  const Tensor checkpoints = contiguous_or(checkpoints_), denominator = contiguous_or(denominator_);
  const std::optional<Tensor> decay = decay_operand(decay_), bonus = contiguous_or_none(bonus_);
  const std::optional<Tensor> dfinal_state = contiguous_or_none(dfinal_state_);
  LinearAttentionBackwardParams b{};
  b.forward = make_params(q, k, v, scale, normalize, reverse);
  LinearAttentionParams& p = b.forward;
  set_decay(p, q, decay);
  set_bonus(p, q, bonus);
  set_packing(p, cu_seqlens);
  const ScalarType wide = accumulator_of(q);
  const int64_t state_dim = p.value_dim_state(), count = p.state_count();
  check_same_dtype(dout, q, "dout");
  check_shape(dout, {p.batch, p.tokens, p.heads, p.value_dim}, "dout");
  b.dout = dout.const_data_ptr(), b.dout_stride = strides3(dout);
  if (dfinal_state) {
    check_dtype(*dfinal_state, wide, "dfinal_state");
    check_shape(*dfinal_state, {count, p.heads, p.key_dim, state_dim}, "dfinal_state");
    b.dfinal_state = dfinal_state->const_data_ptr();
  }
  check_dtype(checkpoints, wide, "checkpoints");
  check_shape(checkpoints, {p.tiles(), p.heads, p.key_dim, state_dim}, "checkpoints");
  // Read only in backward.
  p.checkpoints = const_cast<void*>(checkpoints.const_data_ptr());
  if (normalize) {
    check_same_dtype(out, q, "out");
    check_shape(out, {p.batch, p.tokens, p.heads, p.value_dim}, "out");
    check_dtype(denominator, wide, "denominator");
    check_shape(denominator, {p.batch, p.tokens, p.heads}, "denominator");
    p.out = const_cast<void*>(out.const_data_ptr()), p.out_stride = strides3(out);
    p.denominator = const_cast<void*>(denominator.const_data_ptr());
  }
  const bool per_channel = p.decay_kind == DecayKind::kChannel;
  const ScalarType of_k = p.heads == p.heads_k ? q.scalar_type() : wide;
  Tensor dq = empty({p.batch, p.tokens, p.heads, p.key_dim}, of_k, q);
  Tensor dk = empty({p.batch, p.tokens, p.heads, p.key_dim}, of_k, q);
  Tensor dv = empty({p.batch, p.tokens, p.heads, p.value_dim}, q.scalar_type(), q);
  const int64_t rows = decay_gradient ? p.tokens : 0;
  Tensor ddecay = per_channel ? empty({p.batch, rows, p.heads, p.key_dim}, wide, q)  //
                              : empty({p.batch, rows, p.heads}, wide, q);
  Tensor dbonus = empty({bonus ? p.tiles() : 0, p.heads, p.key_dim}, wide, q);
  Tensor dinitial_state = empty({count, p.heads, p.key_dim, state_dim}, wide, q);
  b.dq = dq.mutable_data_ptr(), b.dk = dk.mutable_data_ptr(), b.dv = dv.mutable_data_ptr();
  b.ddecay = decay_gradient ? ddecay.mutable_data_ptr() : nullptr;
  b.dbonus = bonus ? dbonus.mutable_data_ptr() : nullptr;
  b.dinitial_state = dinitial_state.mutable_data_ptr();
  launch(b, q);
  return {dq, dk, dv, ddecay, dbonus, dinitial_state};
}

// q, k [B, Hk, K] and v [B, H, V]: one token each.
template <class Launch>
Tensor linear_attention_step(Launch launch, Tensor& state, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                             const std::optional<Tensor>& decay_, const std::optional<Tensor>& bonus_,
                             const std::optional<Tensor>& state_indices, double scale, bool normalize) {
  STD_TORCH_CHECK(q_.dim() == 3 && k_.dim() == 3 && v_.dim() == 3, "pykernels: q, k and v need 3 axes");
  const auto with_time = [](const Tensor& x) { return torch::stable::unsqueeze(last_contiguous(x), 1); };
  const Tensor q = with_time(q_), k = with_time(k_), v = with_time(v_);
  std::optional<Tensor> decay = decay_;
  if (decay && decay->dim() > 1)
    decay = decay->dim() == 3 ? with_time(*decay) : torch::stable::unsqueeze(*decay, 1);
  const std::optional<Tensor> bonus = contiguous_or_none(bonus_);
  LinearAttentionStepParams s{};
  s.forward = make_params(q, k, v, scale, normalize, false);
  LinearAttentionParams& p = s.forward;
  set_decay(p, q, decay);
  set_bonus(p, q, bonus);
  const int64_t state_dim = p.value_dim_state();
  check_dtype(state, accumulator_of(q), "state");
  STD_TORCH_CHECK(state.dim() == 4, "pykernels: state needs 4 axes");
  s.slots = state.size(0), s.slot_stride = state.stride(0), s.head_stride = state.stride(1);
  check_shape(state, {s.slots, p.heads, p.key_dim, state_dim}, "state");
  STD_TORCH_CHECK((state_dim <= 1 || state.stride(3) == 1) && (p.key_dim <= 1 || state.stride(2) == state_dim),
                  "pykernels: state must be contiguous in its last two axes");
  if (state_indices) {
    check_dtype(*state_indices, ScalarType::Int, "state_indices");
    check_shape(*state_indices, {p.batch}, "state_indices");
    STD_TORCH_CHECK(state_indices->is_contiguous(), "pykernels: state_indices must be contiguous");
    s.state_indices = static_cast<const int32_t*>(state_indices->const_data_ptr());
  }
  Tensor out = empty({p.batch, p.heads, p.value_dim}, q.scalar_type(), q);
  p.out = out.mutable_data_ptr(), p.out_stride = {out.stride(0), 0, out.stride(1)};
  s.state = state.mutable_data_ptr();
  launch(s, q);
  return out;
}

}  // namespace pykernels::bindings
