// torch.ops.pykernels.causal_conv1d_*_cpu.
#include "causal_conv1d.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                   std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, bool silu) {
  const auto launch = [](const CausalConv1dParams& p, const Tensor&) { cpu::causal_conv1d_fwd(p, torch_threads()); };
  return conv_fwd(launch, x, weight, bias, initial_state, cu_seqlens, silu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd_cpu(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& x,
                                                   const Tensor& weight, std::optional<Tensor> bias,
                                                   std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens,
                                                   bool silu) {
  const auto launch = [](const CausalConv1dBackwardParams& p, const Tensor&) { cpu::causal_conv1d_bwd(p, torch_threads()); };
  return conv_bwd(launch, dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu);
}

Tensor step_cpu(const Tensor& x, Tensor state, const Tensor& weight, std::optional<Tensor> bias,
                std::optional<Tensor> state_indices, bool silu) {
  const auto launch = [](const CausalConv1dStepParams& p, const Tensor&) { cpu::causal_conv1d_step(p, torch_threads()); };
  return conv_step(launch, x, state, weight, bias, state_indices, silu);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "causal_conv1d_fwd_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor out, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd_cpu(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step_cpu(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, bool silu) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("causal_conv1d_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("causal_conv1d_bwd_cpu", TORCH_BOX(&bwd_cpu));
  m.impl("causal_conv1d_step_cpu", TORCH_BOX(&step_cpu));
}

}  // namespace pykernels::bindings
