// What the CUDA bindings share: the device guard and torch's current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

// Weak: a CPU build of torch has no such symbol, and the library must still load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pykernels::bindings {

// Makes x's device current for its scope and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "pykernels: this torch gives no access to CUDA streams (a build without CUDA?)");
    const AOTITorchError failed = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_);
    STD_TORCH_CHECK(failed == 0, "pykernels: torch gave no current CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// All tensors that a kernel reads must be where it runs; each of `others` is a Tensor or an optional one.
template <class... Others>
void check_devices(const Tensor& x, const Others&... others) {
  const auto check = [&](const std::optional<Tensor>& other) {
    STD_TORCH_CHECK(!other || other->device() == x.device(), "pykernels: the tensors are on different devices");
  };
  (check(others), ...);
}

inline void check_launch(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, "pykernels: ", kernel, ": ", error);
}

}  // namespace pykernels::bindings
