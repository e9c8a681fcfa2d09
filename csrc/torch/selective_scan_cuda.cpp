// torch.ops.pykernels.selective_scan_*_cuda.
#include "selective_scan.h"

#include "common_cuda.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd_cuda(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                            const Tensor& C, std::optional<Tensor> D, std::optional<Tensor> z,
                                            std::optional<Tensor> delta_bias, std::optional<Tensor> initial_state,
                                            std::optional<Tensor> cu_seqlens, bool delta_softplus, bool keep_states) {
  const auto launch = [](const SelectiveScanParams& p, const Tensor& u) {
    const CudaScope scope(u);
    Tensor scratch = empty({cuda::selective_scan_fwd_scratch(p)}, ScalarType::Float, u);
    check_launch(cuda::selective_scan_fwd(p, scratch.mutable_data_ptr(), scope.stream()), "selective_scan_fwd");
  };
  check_devices(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens);
  return scan_fwd(launch, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, keep_states);
}

ScanGradients bwd_cuda(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& u, const Tensor& delta,
                       const Tensor& A, const Tensor& B, const Tensor& C, std::optional<Tensor> D,
                       std::optional<Tensor> z, std::optional<Tensor> delta_bias, std::optional<Tensor> initial_state,
                       std::optional<Tensor> cu_seqlens, bool delta_softplus, const Tensor& chunk_states) {
  const auto launch = [](SelectiveScanBackwardParams& p, const Tensor& u) {
    const CudaScope scope(u);
    Tensor scratch = empty({cuda::selective_scan_bwd_scratch(p)}, ScalarType::Float, u);
    p.scratch = scratch.mutable_data_ptr();
    check_launch(cuda::selective_scan_bwd(p, scope.stream()), "selective_scan_bwd");
  };
  check_devices(u, dout, dfinal_state, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states);
  return scan_bwd(launch, dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
                  delta_softplus, chunk_states);
}

Tensor step_cuda(const Tensor& x, Tensor state, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                std::optional<Tensor> D, std::optional<Tensor> z, std::optional<Tensor> delta_bias,
                std::optional<Tensor> state_indices, bool delta_softplus) {
  const auto launch = [](const SelectiveScanStepParams& p, const Tensor& x) {
    const CudaScope scope(x);
    check_launch(cuda::selective_scan_step(p, scope.stream()), "selective_scan_step");
  };
  check_devices(x, state, delta, A, B, C, D, z, delta_bias, state_indices);
  return scan_step(launch, x, state, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "selective_scan_fwd_cuda(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool keep_states) "
      "-> (Tensor out, Tensor final_state, Tensor chunk_states)");
  m.def(
      "selective_scan_bwd_cuda(Tensor dout, Tensor? dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool delta_softplus, Tensor chunk_states) "
      "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, "
      "Tensor dinitial_state)");
  m.def(
      "selective_scan_step_cuda(Tensor x, Tensor(a!) state, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? state_indices, bool delta_softplus) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("selective_scan_fwd_cuda", TORCH_BOX(&fwd_cuda));
  m.impl("selective_scan_bwd_cuda", TORCH_BOX(&bwd_cuda));
  m.impl("selective_scan_step_cuda", TORCH_BOX(&step_cuda));
}

}  // namespace pykernels::bindings
