// What every op's bindings share: checks that guard memory, allocation, dtypes, threads. Argument errors that a user
// can cause are raised in Python, with better words; these only keep a direct call of torch.ops from touching foreign
// memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../common/dtype.h"
#include "../include/pykernels/parallel.h"

// What went wrong in the call of torch that failed last in this thread. Weak: torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace pykernels::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "pykernels: expected float32, bfloat16, float16 or float64");
  }
}

// States and statistics are fp32, fp64 for fp64 input.
inline ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether new tensors go through torch's dispatcher, which the tests' poisoning of fresh memory needs. It takes a
// microsecond each.
extern bool allocates_by_dispatch;

// Mostly for want of memory, so it says how much was asked for. Torch's own words come last: callers look for "out of
// memory" in them.
[[noreturn]] inline void allocation_failed(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string list;
  for (int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
  const bool explained = torch_exception_get_what_without_backtrace != nullptr;
  STD_TORCH_CHECK(false, "pykernels: torch could not allocate a tensor of sizes [", list, "]",
                  explained ? ": " : "", explained ? torch_exception_get_what_without_backtrace() : "");
}

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  if (allocates_by_dispatch) return torch::stable::new_empty(like, sizes, dtype);
  constexpr size_t kMostAxes = 8;
  STD_TORCH_CHECK(sizes.size() <= kMostAxes, "pykernels: too many axes");
  int64_t strides[kMostAxes], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device = 0, index = 0;
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, static_cast<int32_t>(dtype),
                               device, index, &result) != TORCH_SUCCESS)
    allocation_failed(sizes);
  return Tensor(result);
}

// The kernels take any strides but need the last axis contiguous; a tensor that lacks it is copied.
inline Tensor last_contiguous(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor contiguous_or(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline void check_shape(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, const char* name) {
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(sizes.size()),  //
                  "pykernels: ", name, " has ", x.dim(), " axes, expected ", sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(x.size(axis) == size,  //
                    "pykernels: ", name, " has size ", x.size(axis), " on axis ", axis, ", expected ", size);
    ++axis;
  }
}

inline void check_same_dtype(const Tensor& x, const Tensor& reference, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == reference.scalar_type(), "pykernels: the dtype of ", name, " differs from q's");
}

inline void check_dtype(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "pykernels: ", name, " has the wrong dtype");
}

// Kernels on torch's own intra-op threads.
inline Parallel torch_threads() {
  Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

// A CPU kernel as the bindings launch it.
template <class Params>
auto on_torch_threads(void (*kernel)(const Params&, const Parallel&)) {
  return [kernel](const Params& params, const Tensor&) { kernel(params, torch_threads()); };
}

}  // namespace pykernels::bindings
