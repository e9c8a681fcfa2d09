// torch.ops.pykernels.linear_attention_*_cuda.
#include "common_cuda.h"
#include "linear_attention.h"

namespace pykernels::bindings {
namespace {

LinearOutputs fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> decay,
                       std::optional<Tensor> bonus, std::optional<Tensor> initial_state,
                       std::optional<Tensor> cu_seqlens, double scale, bool normalize, bool reverse, bool checkpoint) {
  check_devices(q, k, v, decay, bonus, initial_state, cu_seqlens);
  const auto launch = [](const LinearAttentionParams& p, const Tensor& q) {
    const CudaScope scope(q);
    Tensor scratch = empty({cuda::linear_attention_fwd_scratch(p)}, ScalarType::Float, q);
    check_launch(cuda::linear_attention_fwd(p, scratch.mutable_data_ptr(), scope.stream()), "linear_attention_fwd");
  };
  return linear_attention_fwd(launch, q, k, v, decay, bonus, initial_state, cu_seqlens, scale, normalize, reverse,
                              checkpoint);
}

LinearGradients bwd_cuda(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& q, const Tensor& k,
                         const Tensor& v, std::optional<Tensor> decay, std::optional<Tensor> bonus,
                         std::optional<Tensor> cu_seqlens, const Tensor& out, const Tensor& checkpoints,
                         const Tensor& denominator, double scale, bool normalize, bool reverse, bool decay_gradient) {
  check_devices(q, k, v, dout, dfinal_state, decay, bonus, cu_seqlens, out, checkpoints, denominator);
  const auto launch = [](const LinearAttentionBackwardParams& b, const Tensor& q) {
    const CudaScope scope(q);
    Tensor scratch = empty({cuda::linear_attention_bwd_scratch(b)}, ScalarType::Float, q);
    check_launch(cuda::linear_attention_bwd(b, scratch.mutable_data_ptr(), scope.stream()), "linear_attention_bwd");
  };
  return linear_attention_bwd(launch, dout, dfinal_state, q, k, v, decay, bonus, cu_seqlens, out, checkpoints,
                              denominator, scale, normalize, reverse, decay_gradient);
}

Tensor step_cuda(Tensor state, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> decay,
                 std::optional<Tensor> bonus, std::optional<Tensor> state_indices, double scale, bool normalize) {
  check_devices(q, k, v, state, decay, bonus, state_indices);
  const auto launch = [](const LinearAttentionStepParams& s, const Tensor& q) {
    const CudaScope scope(q);
    check_launch(cuda::linear_attention_step(s, scope.stream()), "linear_attention_step");
  };
  return linear_attention_step(launch, state, q, k, v, decay, bonus, state_indices, scale, normalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "linear_attention_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, Tensor? initial_state, "
      "Tensor? cu_seqlens, float scale, bool normalize, bool reverse, bool checkpoint) "
      "-> (Tensor out, Tensor final_state, Tensor checkpoints, Tensor denominator)");
  m.def(
      "linear_attention_bwd_cuda(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? decay, "
      "Tensor? bonus, Tensor? cu_seqlens, Tensor out, Tensor checkpoints, Tensor denominator, float scale, "
      "bool normalize, bool reverse, bool decay_gradient) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay, Tensor dbonus, Tensor dinitial_state)");
  m.def(
      "linear_attention_step_cuda(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, "
      "Tensor? state_indices, float scale, bool normalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("linear_attention_fwd_cuda", TORCH_BOX(&fwd_cuda));
  m.impl("linear_attention_bwd_cuda", TORCH_BOX(&bwd_cuda));
  m.impl("linear_attention_step_cuda", TORCH_BOX(&step_cuda));
}

}  // namespace pykernels::bindings

// For `python -m pykernels info`.
extern "C" __attribute__((visibility("default"))) const char* pykernels_linear_attention_kernels(int capability) {
  return pykernels::cuda::linear_attention_kernels(capability);
}
