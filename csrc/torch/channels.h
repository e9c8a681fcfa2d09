// What the bindings of the channel-first ops [B, D, L] share.
#pragma once

#include "../include/pykernels/causal_conv1d.h"
#include "common.h"

namespace pykernels::bindings {

inline ChannelStrides channel_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

inline void check_wide(const Tensor& x, const Tensor& main, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == main.scalar_type() ||
                      (x.scalar_type() == ScalarType::Float && main.scalar_type() != ScalarType::Double),
                  "pykernels: ", name, " must have the main dtype or float32");
}

// A new [B, D, L] laid out as x is: token by token when x is, else channel by channel.
inline Tensor empty_like_layout(const Tensor& x) {
  if (x.stride(1) == 1 && x.stride(2) != 1) {
    Tensor token_first = empty({x.size(0), x.size(2), x.size(1)}, x.scalar_type(), x);
    return torch::stable::transpose(token_first, 1, 2);
  }
  return empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type(), x);
}

using Owner = std::vector<Tensor>;

// Checks a contiguous tensor and returns its data, null for none. `owner` keeps a copy alive where one had to be made.
inline const void* contiguous_data(const std::optional<Tensor>& x, ScalarType dtype,
                                   torch::headeronly::IntHeaderOnlyArrayRef sizes, const char* name, Owner& owner) {
  if (!x) return nullptr;
  check_dtype(*x, dtype, name);
  check_shape(*x, sizes, name);
  owner.push_back(contiguous_or(*x));
  return owner.back().const_data_ptr();
}

inline const int32_t* indices_data(const std::optional<Tensor>& x, int64_t size, const char* name) {
  if (!x) return nullptr;
  check_dtype(*x, ScalarType::Int, name);
  check_shape(*x, {size}, name);
  STD_TORCH_CHECK(x->is_contiguous(), "pykernels: ", name, " must be contiguous");
  return static_cast<const int32_t*>(x->const_data_ptr());
}

inline void check_slots(int64_t slots, int64_t batch, const std::optional<Tensor>& state_indices) {
  STD_TORCH_CHECK(state_indices || slots == batch,
                  "pykernels: state needs one slot per batch entry, or state_indices");
}

// -> the number of states that go with a batch or with packed sequences
inline int64_t count_sequences(const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) return x.size(0);
  STD_TORCH_CHECK(x.size(0) == 1, "pykernels: packed input has batch 1");
  STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "pykernels: cu_seqlens is empty");
  return cu_seqlens->size(0) - 1;
}

}  // namespace pykernels::bindings
