// torch.ops.pykernels.cuda_probe: x + 1 through this build's own CUDA kernel; `python -m pykernels info` calls it.
#include "../include/pykernels/probe.h"

#include "common_cuda.h"

namespace pykernels::bindings {
namespace {

Tensor cuda_probe(const Tensor& x_) {
  check_dtype(x_, ScalarType::Float, "x");
  const Tensor x = contiguous_or(x_);
  const CudaScope scope(x);
  Tensor out = torch::stable::empty_like(x);
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  check_launch(cuda::probe(from, static_cast<float*>(out.mutable_data_ptr()), x.numel(), scope.stream()),
               "probe_kernel");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) { m.def("cuda_probe(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("cuda_probe", TORCH_BOX(&cuda_probe)); }

}  // namespace pykernels::bindings
