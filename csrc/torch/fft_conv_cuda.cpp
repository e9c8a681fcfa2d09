// torch.ops.pykernels.fft_conv_*_cuda.
#include "common_cuda.h"
#include "fft_conv.h"

namespace pykernels::bindings {
namespace {

Tensor fwd_cuda(const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev, std::optional<Tensor> skip,
                std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag, bool circular) {
  const auto launch = [](const FFTConvParams& p, const Tensor& u) {
    const CudaScope scope(u);
    Tensor scratch = empty({cuda::fft_conv_fwd_scratch(p)}, ScalarType::Float, u);
    check_launch(cuda::fft_conv_fwd(p, scratch.mutable_data_ptr(), scope.stream()), "fft_conv_fwd");
  };
  check_devices(u, k, k_rev, skip, pre_gate, post_gate);
  return fft_conv_fwd(launch, u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cuda(
    const Tensor& dout, const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev, std::optional<Tensor> skip,
    std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag, bool circular,
    bool input_gradient, bool kernel_gradient) {
  const auto launch = [](const FFTConvBackwardParams& p, const Tensor& u) {
    const CudaScope scope(u);
    Tensor scratch = empty({cuda::fft_conv_bwd_scratch(p)}, ScalarType::Float, u);
    check_launch(cuda::fft_conv_bwd(p, scratch.mutable_data_ptr(), scope.stream()), "fft_conv_bwd");
  };
  check_devices(u, dout, k, k_rev, skip, pre_gate, post_gate);
  return fft_conv_bwd(launch, dout, u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular, input_gradient,
                      kernel_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "fft_conv_fwd_cuda(Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? post_gate, int "
      "k_rev_lag, "
      "bool circular) -> Tensor");
  m.def(
      "fft_conv_bwd_cuda(Tensor dout, Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? "
      "post_gate, "
      "int k_rev_lag, bool circular, bool input_gradient, bool kernel_gradient) "
      "-> (Tensor du, Tensor dk, Tensor dk_rev, Tensor dD, Tensor dpre_gate, Tensor dpost_gate)");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("fft_conv_fwd_cuda", TORCH_BOX(&fwd_cuda));
  m.impl("fft_conv_bwd_cuda", TORCH_BOX(&bwd_cuda));
}

}  // namespace pykernels::bindings

extern "C" __attribute__((visibility("default"))) const char* pykernels_fft_conv_kernels(int capability) {
  return pykernels::cuda::fft_conv_kernels(capability);
}
