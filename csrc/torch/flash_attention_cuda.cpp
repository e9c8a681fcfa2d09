// torch.ops.pykernels.flash_attention_{fwd,bwd}_cuda.
#include "common_cuda.h"
#include "flash_attention.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor> fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                    std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                    double scale, double softcap, int64_t window_left, int64_t window_right) {
  const auto launch = [](const FlashAttentionParams& p, const Tensor& q) {
    const CudaScope scope(q);
    check_launch(cuda::flash_attention_fwd(p, scope.stream()), "flash_attention_fwd");
  };
  return attention_fwd(launch, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right);
}

std::tuple<Tensor, Tensor, Tensor> bwd_cuda(const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                            double scale, double softcap, int64_t window_left, int64_t window_right,
                                            bool deterministic) {
  const auto launch = [](FlashAttentionBackwardParams& p, const Tensor& q) {
    const CudaScope scope(q);
    const FlashAttentionParams& f = p.forward;
    Tensor delta = empty({f.batch, f.heads_q, f.seqlen_q}, ScalarType::Float, q);
    p.delta = delta.mutable_data_ptr();
    check_launch(cuda::flash_attention_bwd(p, scope.stream()), "flash_attention_bwd");
  };
  return attention_bwd(launch, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left,
                       window_right, deterministic);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "flash_attention_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float "
      "scale, float softcap, int window_left, int window_right) -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_bwd_cuda(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, float softcap, int window_left, int "
      "window_right, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("flash_attention_fwd_cuda", TORCH_BOX(&fwd_cuda));
  m.impl("flash_attention_bwd_cuda", TORCH_BOX(&bwd_cuda));
}

}  // namespace pykernels::bindings
