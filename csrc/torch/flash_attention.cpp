// torch.ops.pykernels.flash_attention_*_cpu.
#include "flash_attention.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                   double scale, double softcap, int64_t window_left, int64_t window_right,
                                   std::optional<Tensor> alibi_slopes, std::optional<Tensor> bias,
                                   std::optional<Tensor> sinks, std::optional<Tensor> seed, double dropout_p) {
  const Extras extras{alibi_slopes, bias, sinks, seed, dropout_p};
  return attention_fwd(on_torch_threads(cpu::flash_attention_fwd), q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap,
                       window_left, window_right, extras);
}

Gradients bwd_cpu(const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, const Tensor& lse, std::optional<Tensor> cu_seqlens_q,
                  std::optional<Tensor> cu_seqlens_k, double scale, double softcap, int64_t window_left,
                  int64_t window_right, bool deterministic, std::optional<Tensor> alibi_slopes,
                  std::optional<Tensor> bias, std::optional<Tensor> sinks, std::optional<Tensor> seed,
                  double dropout_p, bool bias_gradient) {
  const Extras extras{alibi_slopes, bias, sinks, seed, dropout_p};
  return attention_bwd(on_torch_threads(cpu::flash_attention_bwd), dout, dlse, q, k, v, out, lse, cu_seqlens_q,
                       cu_seqlens_k, scale, softcap, window_left, window_right, deterministic, extras, bias_gradient);
}

std::tuple<Tensor, Tensor> decode_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& cache_seqlens, int64_t new_tokens, double scale, double softcap,
                                      int64_t window_left, int64_t window_right,
                                      std::optional<Tensor> block_table, std::optional<Tensor> alibi_slopes,
                                      std::optional<Tensor> sinks) {
  const Extras extras{alibi_slopes, std::nullopt, sinks, std::nullopt, 0};
  return attention_decode(on_torch_threads(cpu::flash_attention_decode), q, k_cache, v_cache, cache_seqlens,
                          new_tokens, scale, softcap, window_left, window_right, block_table, extras);
}

void append_cpu(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& cache_seqlens,
                std::optional<Tensor> block_table) {
  attention_append(on_torch_threads(cpu::flash_attention_append), k_cache, v_cache, k, v, cache_seqlens, block_table);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "flash_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float "
      "scale, float softcap, int window_left, int window_right, Tensor? alibi_slopes=None, Tensor? bias=None, "
      "Tensor? sinks=None, Tensor? seed=None, float dropout_p=0.0) -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_bwd_cpu(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, float softcap, int window_left, int window_right, "
      "bool deterministic, Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? sinks=None, Tensor? seed=None, "
      "float dropout_p=0.0, bool bias_gradient=False) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)");
  m.def(
      "flash_attention_decode_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, int new_tokens, "
      "float scale, float softcap, int window_left, int window_right, Tensor? block_table=None, "
      "Tensor? alibi_slopes=None, Tensor? sinks=None) -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_append_cpu(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
      "Tensor? block_table=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("flash_attention_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("flash_attention_bwd_cpu", TORCH_BOX(&bwd_cpu));
  m.impl("flash_attention_decode_cpu", TORCH_BOX(&decode_cpu));
  m.impl("flash_attention_append_cpu", TORCH_BOX(&append_cpu));
}

}  // namespace pykernels::bindings
