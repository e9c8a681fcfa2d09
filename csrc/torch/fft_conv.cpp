// torch.ops.pykernels.fft_conv_*: schemas and the CPU implementations.
#include "fft_conv.h"

namespace pykernels::bindings {
namespace {

Tensor fwd_cpu(const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev, std::optional<Tensor> skip,
               std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag, bool circular) {
  const auto launch = [](const FFTConvParams& p, const Tensor&) { cpu::fft_conv_fwd(p, torch_threads()); };
  return fft_conv_fwd(launch, u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cpu(
    const Tensor& dout, const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev, std::optional<Tensor> skip,
    std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag, bool circular,
    bool input_gradient, bool kernel_gradient) {
  const auto launch = [](const FFTConvBackwardParams& p, const Tensor&) { cpu::fft_conv_bwd(p, torch_threads()); };
  return fft_conv_bwd(launch, dout, u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular, input_gradient,
                      kernel_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "fft_conv_fwd_cpu(Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? post_gate, int "
      "k_rev_lag, "
      "bool circular) -> Tensor");
  m.def(
      "fft_conv_bwd_cpu(Tensor dout, Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? "
      "post_gate, "
      "int k_rev_lag, bool circular, bool input_gradient, bool kernel_gradient) "
      "-> (Tensor du, Tensor dk, Tensor dk_rev, Tensor dD, Tensor dpre_gate, Tensor dpost_gate)");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("fft_conv_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("fft_conv_bwd_cpu", TORCH_BOX(&bwd_cpu));
}

}  // namespace pykernels::bindings
