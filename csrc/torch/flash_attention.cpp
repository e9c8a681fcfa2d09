// torch.ops.pykernels.flash_attention_*_cpu.
#include "flash_attention.h"

namespace pykernels::bindings {
namespace {

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                   double scale, double softcap, int64_t window_left, int64_t window_right) {
  const auto launch = [](const FlashAttentionParams& p, const Tensor&) {
    cpu::flash_attention_fwd(p, torch_threads());
  };
  return attention_fwd(launch, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right);
}

std::tuple<Tensor, Tensor, Tensor> bwd_cpu(const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q,
                                           const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                           std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                           double scale, double softcap, int64_t window_left, int64_t window_right,
                                           bool deterministic) {
  const auto launch = [](const FlashAttentionBackwardParams& p, const Tensor&) {
    cpu::flash_attention_bwd(p, torch_threads());
  };
  return attention_bwd(launch, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left,
                       window_right, deterministic);
}

std::tuple<Tensor, Tensor> decode_cpu(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& cache_seqlens, int64_t new_tokens, double scale, double softcap,
                                      int64_t window_left, int64_t window_right) {
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_cache), v = last_contiguous(v_cache);
  FlashAttentionDecodeParams p{};
  p.forward = make_params(q, k, v, scale, softcap, window_left, window_right);
  FlashAttentionParams& f = p.forward;
  check_dtype(cache_seqlens, ScalarType::Int, "cache_seqlens");
  check_shape(cache_seqlens, {f.batch}, "cache_seqlens");
  STD_TORCH_CHECK(cache_seqlens.is_contiguous(), "pykernels: cache_seqlens must be contiguous");
  Tensor out = empty({f.batch, f.seqlen_q, f.heads_q, f.value_dim}, q.scalar_type(), q);
  Tensor lse = empty({f.batch, f.heads_q, f.seqlen_q}, accumulator_of(q), q);
  f.out = out.mutable_data_ptr(), f.out_stride = strides3(out), f.lse = lse.mutable_data_ptr();
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  p.new_tokens = new_tokens;
  cpu::flash_attention_decode(p, torch_threads());
  return {out, lse};
}

void append_cpu(Tensor k_cache, Tensor v_cache, const Tensor& k_, const Tensor& v_, const Tensor& cache_seqlens) {
  STD_TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && k_.dim() == 4 && v_.dim() == 4,
                  "pykernels: k, v and their caches need 4 axes");
  FlashAttentionAppendParams p{};
  p.element_size = k_cache.element_size();
  p.batch = k_cache.size(0), p.capacity = k_cache.size(1), p.heads = k_cache.size(2), p.head_dim = k_cache.size(3);
  p.new_tokens = k_.size(1), p.value_dim = v_cache.size(3);
  check_shape(k_, {p.batch, p.new_tokens, p.heads, p.head_dim}, "k");
  check_shape(v_cache, {p.batch, p.capacity, p.heads, p.value_dim}, "v_cache");
  check_shape(v_, {p.batch, p.new_tokens, p.heads, p.value_dim}, "v");
  for (const Tensor* x : {static_cast<const Tensor*>(&v_cache), &k_, &v_})
    check_same_dtype(*x, k_cache, "k, v or v_cache");
  check_dtype(cache_seqlens, ScalarType::Int, "cache_seqlens");
  check_shape(cache_seqlens, {p.batch}, "cache_seqlens");
  STD_TORCH_CHECK(cache_seqlens.is_contiguous(), "pykernels: cache_seqlens must be contiguous");
  // The caches are written in place, so a copy would not do.
  for (const Tensor* x : {&k_cache, &v_cache})
    STD_TORCH_CHECK(x->size(3) <= 1 || x->stride(3) == 1,
                    "pykernels: the caches must be contiguous in their last axis");
  const Tensor k = last_contiguous(k_), v = last_contiguous(v_);
  p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.k_stride = strides3(k), p.v_stride = strides3(v);
  p.k_cache = k_cache.mutable_data_ptr(), p.v_cache = v_cache.mutable_data_ptr();
  p.k_cache_stride = strides3(k_cache), p.v_cache_stride = strides3(v_cache);
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  cpu::flash_attention_append(p, torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "flash_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float "
      "scale, float softcap, int window_left, int window_right) -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_bwd_cpu(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, float softcap, int window_left, int "
      "window_right, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "flash_attention_decode_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, int "
      "new_tokens, float scale, float softcap, int window_left, int window_right) -> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_append_cpu(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor "
      "cache_seqlens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("flash_attention_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("flash_attention_bwd_cpu", TORCH_BOX(&bwd_cpu));
  m.impl("flash_attention_decode_cpu", TORCH_BOX(&decode_cpu));
  m.impl("flash_attention_append_cpu", TORCH_BOX(&append_cpu));
}

}  // namespace pykernels::bindings
