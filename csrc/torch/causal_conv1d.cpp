// torch.ops.pykernels.causal_conv1d_*_cpu.
#include "causal_conv1d.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                   std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, bool silu) {
  return conv_fwd(on_torch_threads(cpu::causal_conv1d_fwd), x, weight, bias, initial_state, cu_seqlens, silu);
}

ConvGradients bwd_cpu(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& x, const Tensor& weight,
                      std::optional<Tensor> bias, std::optional<Tensor> initial_state,
                      std::optional<Tensor> cu_seqlens, bool silu) {
  return conv_bwd(on_torch_threads(cpu::causal_conv1d_bwd), dout, dfinal_state, x, weight, bias, initial_state,
                  cu_seqlens, silu);
}

Tensor step_cpu(const Tensor& x, Tensor state, const Tensor& weight, std::optional<Tensor> bias,
                std::optional<Tensor> state_indices, bool silu) {
  return conv_step(on_torch_threads(cpu::causal_conv1d_step), x, state, weight, bias, state_indices, silu);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "causal_conv1d_fwd_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool silu) -> (Tensor out, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd_cpu(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step_cpu(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, "
      "bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("causal_conv1d_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("causal_conv1d_bwd_cpu", TORCH_BOX(&bwd_cpu));
  m.impl("causal_conv1d_step_cpu", TORCH_BOX(&step_cpu));
}

}  // namespace pykernels::bindings
