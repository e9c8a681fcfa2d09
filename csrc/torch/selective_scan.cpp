// torch.ops.pykernels.selective_scan_*_cpu.
#include "selective_scan.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                           const Tensor& C, std::optional<Tensor> D, std::optional<Tensor> z,
                                           std::optional<Tensor> delta_bias, std::optional<Tensor> initial_state,
                                           std::optional<Tensor> cu_seqlens, bool delta_softplus, bool keep_states) {
  return scan_fwd(on_torch_threads(cpu::selective_scan_fwd), u, delta, A, B, C, D, z, delta_bias, initial_state,
                  cu_seqlens, delta_softplus, keep_states);
}

ScanGradients bwd_cpu(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& u, const Tensor& delta,
                      const Tensor& A, const Tensor& B, const Tensor& C, std::optional<Tensor> D,
                      std::optional<Tensor> z, std::optional<Tensor> delta_bias, std::optional<Tensor> initial_state,
                      std::optional<Tensor> cu_seqlens, bool delta_softplus, const Tensor& chunk_states) {
  return scan_bwd(on_torch_threads(cpu::selective_scan_bwd), dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias,
                  initial_state, cu_seqlens, delta_softplus, chunk_states);
}

Tensor step_cpu(const Tensor& x, Tensor state, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                std::optional<Tensor> D, std::optional<Tensor> z, std::optional<Tensor> delta_bias,
                std::optional<Tensor> state_indices, bool delta_softplus) {
  return scan_step(on_torch_threads(cpu::selective_scan_step), x, state, delta, A, B, C, D, z, delta_bias,
                   state_indices, delta_softplus);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "selective_scan_fwd_cpu(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool keep_states) "
      "-> (Tensor out, Tensor final_state, Tensor chunk_states)");
  m.def(
      "selective_scan_bwd_cpu(Tensor dout, Tensor? dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool delta_softplus, Tensor chunk_states) "
      "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, "
      "Tensor dinitial_state)");
  m.def(
      "selective_scan_step_cpu(Tensor x, Tensor(a!) state, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? state_indices, bool delta_softplus) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("selective_scan_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("selective_scan_bwd_cpu", TORCH_BOX(&bwd_cpu));
  m.impl("selective_scan_step_cpu", TORCH_BOX(&step_cpu));
}

}  // namespace pykernels::bindings
