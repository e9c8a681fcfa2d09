// torch.ops.pykernels.causal_conv1d_*_cuda.
#include "causal_conv1d.h"
#include "common_cuda.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor> fwd_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, bool silu) {
  const auto launch = [](const CausalConv1dParams& p, const Tensor& x) {
    const CudaScope scope(x);
    check_launch(cuda::causal_conv1d_fwd(p, scope.stream()), "causal_conv1d_fwd");
  };
  check_devices(x, weight, bias, initial_state, cu_seqlens);
  return conv_fwd(launch, x, weight, bias, initial_state, cu_seqlens, silu);
}

ConvGradients bwd_cuda(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& x, const Tensor& weight,
                       std::optional<Tensor> bias, std::optional<Tensor> initial_state,
                       std::optional<Tensor> cu_seqlens, bool silu) {
  const auto launch = [](CausalConv1dBackwardParams& p, const Tensor& x) {
    const CudaScope scope(x);
    Tensor scratch = empty({cuda::causal_conv1d_bwd_scratch(p)}, ScalarType::Float, x);
    p.scratch = scratch.mutable_data_ptr();
    check_launch(cuda::causal_conv1d_bwd(p, scope.stream()), "causal_conv1d_bwd");
  };
  check_devices(x, dout, dfinal_state, weight, bias, initial_state, cu_seqlens);
  return conv_bwd(launch, dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu);
}

Tensor step_cuda(const Tensor& x, Tensor state, const Tensor& weight, std::optional<Tensor> bias,
                 std::optional<Tensor> state_indices, bool silu) {
  const auto launch = [](const CausalConv1dStepParams& p, const Tensor& x) {
    const CudaScope scope(x);
    check_launch(cuda::causal_conv1d_step(p, scope.stream()), "causal_conv1d_step");
  };
  check_devices(x, state, weight, bias, state_indices);
  return conv_step(launch, x, state, weight, bias, state_indices, silu);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "causal_conv1d_fwd_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool silu) -> (Tensor out, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd_cuda(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step_cuda(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, "
      "bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("causal_conv1d_fwd_cuda", TORCH_BOX(&fwd_cuda));
  m.impl("causal_conv1d_bwd_cuda", TORCH_BOX(&bwd_cuda));
  m.impl("causal_conv1d_step_cuda", TORCH_BOX(&step_cuda));
}

}  // namespace pykernels::bindings
