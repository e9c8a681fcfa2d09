// What flash attention's bindings of every native backend share: schemas, memory checks, allocation.
#pragma once

#include <tuple>
#include <utility>

#include "../include/pykernels/flash_attention.h"
#include "common.h"

namespace pykernels::bindings {

inline void check_same_device(const Tensor& x, const Tensor& reference, const char* name) {
  STD_TORCH_CHECK(x.device() == reference.device(), "pykernels: ", name, " is on another device than q");
}

inline Strides3 strides3(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Latent attention decodes with larger keys.
constexpr int64_t kMaxHeadDim = 512, kMaxDecodeKeyDim = 576;

// Fills what forward, backward and decode share; the tensors must outlive the launch. In a paged cache the first axes
// of k and v are pages and their tokens.
inline FlashAttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                        double softcap, int64_t window_left, int64_t window_right,
                                        int64_t max_key_dim = kMaxHeadDim, bool paged = false) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "pykernels: q, k and v need 4 axes");
  check_same_dtype(k, q, "k");
  check_same_dtype(v, q, "v");
  check_same_device(k, q, "k");
  check_same_device(v, q, "v");
  FlashAttentionParams p{};
  p.dtype = dtype_of(q);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.heads_q = q.size(2), p.head_dim = q.size(3);
  p.seqlen_k = k.size(1), p.heads_k = k.size(2), p.value_dim = v.size(3);
  const int64_t first = paged ? k.size(0) : p.batch;
  check_shape(k, {first, p.seqlen_k, p.heads_k, p.head_dim}, "k");
  check_shape(v, {first, p.seqlen_k, p.heads_k, p.value_dim}, "v");
  STD_TORCH_CHECK(p.heads_k > 0 && p.heads_q % p.heads_k == 0, "pykernels: q's heads are no multiple of k's");
  STD_TORCH_CHECK(p.head_dim >= 1 && p.head_dim <= max_key_dim && p.value_dim >= 1 && p.value_dim <= kMaxHeadDim,
                  "pykernels: head sizes must be 1 to ", max_key_dim, " for keys and 1 to ", kMaxHeadDim,
                  " for values");
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride = strides3(q), p.k_stride = strides3(k), p.v_stride = strides3(v);
  p.scale = scale, p.softcap = softcap;
  p.window_left = window_left, p.window_right = window_right;
  return p;
}

// The optional tensors that scores and weights depend on, as they are handed to the ops.
struct Extras {
  std::optional<Tensor> alibi_slopes, bias, sinks, seed;
  double dropout_p = 0;

  void set(FlashAttentionParams& p, const Tensor& q) {
    if (alibi_slopes) {
      const int64_t entries = p.cu_seqlens_q ? p.sequences : p.batch;
      check_statistic(*alibi_slopes, q, "alibi_slopes");
      if (alibi_slopes->dim() == 2) {
        check_shape(*alibi_slopes, {entries, p.heads_q}, "alibi_slopes");
        p.alibi_stride = p.heads_q;
      } else {
        check_shape(*alibi_slopes, {p.heads_q}, "alibi_slopes");
      }
      p.alibi_slopes = alibi_slopes->const_data_ptr();
    }
    if (sinks) {
      check_statistic(*sinks, q, "sinks");
      check_shape(*sinks, {p.heads_q}, "sinks");
      p.sinks = sinks->const_data_ptr();
    }
    if (bias) {
      check_same_device(*bias, q, "bias");
      STD_TORCH_CHECK(bias->dim() == 4, "pykernels: bias needs 4 axes");
      const int64_t sizes[4] = {p.batch, p.heads_q, p.seqlen_q, p.seqlen_k};
      int64_t strides[4];
      bias = last_contiguous(*bias);
      for (int axis = 0; axis < 4; ++axis) {
        STD_TORCH_CHECK(bias->size(axis) == 1 || bias->size(axis) == sizes[axis], "pykernels: bias has size ",
                        bias->size(axis), " on axis ", axis, ", expected 1 or ", sizes[axis]);
        strides[axis] = bias->size(axis) == 1 ? 0 : bias->stride(axis);
      }
      if (bias->size(3) != 1) strides[3] = 1;  // of no element, torch's stride may be any
      p.bias = bias->const_data_ptr();
      p.bias_stride = {strides[0], strides[1], strides[2], strides[3]};
      const ScalarType type = bias->scalar_type();
      p.bias_type = type == ScalarType::Bool      ? BiasType::kBoolean
                    : type == q.scalar_type()     ? BiasType::kSameAsQ
                                                  : BiasType::kFloat32;
      STD_TORCH_CHECK(p.bias_type != BiasType::kFloat32 || (type == ScalarType::Float && p.dtype != DType::kFloat64),
                      "pykernels: bias has the wrong dtype");
    }
    if (seed) {
      check_same_device(*seed, q, "seed");
      check_dtype(*seed, ScalarType::Long, "seed");
      check_shape(*seed, {1}, "seed");
      STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "pykernels: dropout_p must be at least 0 and less than 1");
      p.dropout_seed = static_cast<const int64_t*>(seed->const_data_ptr());
      p.dropout_p = dropout_p;
    }
  }

  // For kernels that have neither.
  void reject_bias_and_dropout(const char* kernels) const {
    STD_TORCH_CHECK(!bias && !seed,  //
                    "pykernels: the ", kernels, " kernels of flash attention have no bias and no dropout");
  }

 private:
  static void check_statistic(const Tensor& x, const Tensor& q, const char* name) {
    check_same_device(x, q, name);
    check_dtype(x, accumulator_of(q), name);
    STD_TORCH_CHECK(x.is_contiguous(), "pykernels: ", name, " must be contiguous");
  }
};

// A block table, and the number of tokens that it has room for.
inline int64_t set_pages(const std::optional<Tensor>& block_table, const Tensor& cache, int64_t batch,
                         const int32_t*& table, int64_t& stride, int64_t& page_size, int64_t& pages) {
  if (!block_table) return cache.size(1);
  check_same_device(*block_table, cache, "block_table");
  check_dtype(*block_table, ScalarType::Int, "block_table");
  STD_TORCH_CHECK(block_table->dim() == 2 && block_table->is_contiguous(),
                  "pykernels: block_table needs 2 contiguous axes");
  check_shape(*block_table, {batch, block_table->size(1)}, "block_table");
  table = static_cast<const int32_t*>(block_table->const_data_ptr());
  stride = block_table->size(1), page_size = cache.size(1), pages = cache.size(0);
  return pages > 0 ? stride * page_size : 0;
}

inline void set_packing(FlashAttentionParams& p, const Tensor& q, const std::optional<Tensor>& cu_seqlens_q,
                        const std::optional<Tensor>& cu_seqlens_k) {
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "pykernels: give both cu_seqlens or neither");
  if (!cu_seqlens_q) return;
  STD_TORCH_CHECK(p.batch == 1, "pykernels: packed input has batch 1");
  p.sequences = cu_seqlens_q->size(0) - 1;
  STD_TORCH_CHECK(p.sequences >= 0, "pykernels: cu_seqlens_q is empty");
  for (const Tensor* cu : {&*cu_seqlens_q, &*cu_seqlens_k}) {
    check_same_device(*cu, q, "cu_seqlens");
    check_dtype(*cu, ScalarType::Int, "cu_seqlens");
    check_shape(*cu, {p.sequences + 1}, "cu_seqlens");
    STD_TORCH_CHECK(cu->is_contiguous(), "pykernels: cu_seqlens must be contiguous");
  }
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q->const_data_ptr());
  p.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k->const_data_ptr());
}

// Checks, allocates, and calls launch(params, q).
template <class Launch>
std::tuple<Tensor, Tensor> attention_fwd(Launch launch, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                         const std::optional<Tensor>& cu_seqlens_q,
                                         const std::optional<Tensor>& cu_seqlens_k, double scale, double softcap,
                                         int64_t window_left, int64_t window_right, Extras extras) {
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_), v = last_contiguous(v_);
  FlashAttentionParams p = make_params(q, k, v, scale, softcap, window_left, window_right);
  set_packing(p, q, cu_seqlens_q, cu_seqlens_k);
  extras.set(p, q);
  Tensor out = empty({p.batch, p.seqlen_q, p.heads_q, p.value_dim}, q.scalar_type(), q);
  Tensor lse = empty({p.batch, p.heads_q, p.seqlen_q}, accumulator_of(q), q);
  p.out = out.mutable_data_ptr(), p.out_stride = strides3(out), p.lse = lse.mutable_data_ptr();
  launch(p, q);
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Launch>
Gradients attention_bwd(Launch launch, const Tensor& dout_, const std::optional<Tensor>& dlse_, const Tensor& q_,
                        const Tensor& k_, const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                        const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                        double scale, double softcap, int64_t window_left, int64_t window_right, bool deterministic,
                        Extras extras, bool bias_gradient) {
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_), v = last_contiguous(v_);
  const Tensor dout = last_contiguous(dout_), out = last_contiguous(out_), lse = contiguous_or(lse_);
  std::optional<Tensor> dlse;
  if (dlse_) dlse = contiguous_or(*dlse_);

  FlashAttentionBackwardParams p{};
  p.forward = make_params(q, k, v, scale, softcap, window_left, window_right);
  FlashAttentionParams& f = p.forward;
  set_packing(f, q, cu_seqlens_q, cu_seqlens_k);
  extras.set(f, q);
  for (const auto& [x, name] : {std::pair{&dout, "dout"}, std::pair{&out, "out"}}) {
    check_same_dtype(*x, q, name);
    check_same_device(*x, q, name);
    check_shape(*x, {f.batch, f.seqlen_q, f.heads_q, f.value_dim}, name);
  }
  check_same_device(lse, q, "lse");
  check_dtype(lse, accumulator_of(q), "lse");
  check_shape(lse, {f.batch, f.heads_q, f.seqlen_q}, "lse");
  if (dlse) {
    check_same_device(*dlse, q, "dlse");
    check_dtype(*dlse, accumulator_of(q), "dlse");
    check_shape(*dlse, {f.batch, f.heads_q, f.seqlen_q}, "dlse");
    p.dlse = dlse->const_data_ptr();
  }
  // Read only in backward.
  f.out = const_cast<void*>(out.const_data_ptr()), f.out_stride = strides3(out);
  f.lse = const_cast<void*>(lse.const_data_ptr());
  p.dout = dout.const_data_ptr(), p.dout_stride = strides3(dout);

  Tensor dq = empty({f.batch, f.seqlen_q, f.heads_q, f.head_dim}, q.scalar_type(), q);
  Tensor dk = empty({f.batch, f.seqlen_k, f.heads_k, f.head_dim}, q.scalar_type(), q);
  Tensor dv = empty({f.batch, f.seqlen_k, f.heads_k, f.value_dim}, q.scalar_type(), q);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.dq_stride = strides3(dq), p.dk_stride = strides3(dk), p.dv_stride = strides3(dv);
  const ScalarType wide = accumulator_of(q);
  Tensor dbias = empty({0}, wide, q), dsinks = empty({0}, wide, q);
  if (bias_gradient) {
    STD_TORCH_CHECK(f.bias && f.bias_type != BiasType::kBoolean,
                    "pykernels: a gradient is wanted of a bias that has none");
    const Tensor& bias = *extras.bias;
    dbias = empty({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, wide, q);
    p.dbias = dbias.mutable_data_ptr();
  }
  if (f.sinks) {
    dsinks = empty({f.heads_q}, wide, q);
    p.dsinks = dsinks.mutable_data_ptr();
  }
  p.deterministic = deterministic;
  launch(p, q);
  return {dq, dk, dv, dbias, dsinks};
}

template <class Launch>
std::tuple<Tensor, Tensor> attention_decode(Launch launch, const Tensor& q_, const Tensor& k_cache,
                                            const Tensor& v_cache, const Tensor& cache_seqlens, int64_t new_tokens,
                                            double scale, double softcap, int64_t window_left, int64_t window_right,
                                            const std::optional<Tensor>& block_table, Extras extras) {
  const Tensor q = last_contiguous(q_), k = last_contiguous(k_cache), v = last_contiguous(v_cache);
  FlashAttentionDecodeParams p{};
  const bool paged = block_table.has_value();
  p.forward = make_params(q, k, v, scale, softcap, window_left, window_right, kMaxDecodeKeyDim, paged);
  FlashAttentionParams& f = p.forward;
  f.seqlen_k = set_pages(block_table, k, f.batch, f.block_table, f.block_table_stride, f.page_size, f.pages);
  extras.set(f, q);
  check_same_device(cache_seqlens, q, "cache_seqlens");
  check_dtype(cache_seqlens, ScalarType::Int, "cache_seqlens");
  check_shape(cache_seqlens, {f.batch}, "cache_seqlens");
  STD_TORCH_CHECK(cache_seqlens.is_contiguous(), "pykernels: cache_seqlens must be contiguous");
  Tensor out = empty({f.batch, f.seqlen_q, f.heads_q, f.value_dim}, q.scalar_type(), q);
  Tensor lse = empty({f.batch, f.heads_q, f.seqlen_q}, accumulator_of(q), q);
  f.out = out.mutable_data_ptr(), f.out_stride = strides3(out), f.lse = lse.mutable_data_ptr();
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  p.new_tokens = new_tokens;
  launch(p, q);
  return {out, lse};
}

template <class Launch>
void attention_append(Launch launch, Tensor& k_cache, Tensor& v_cache, const Tensor& k_, const Tensor& v_,
                      const Tensor& cache_seqlens, const std::optional<Tensor>& block_table) {
  STD_TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && k_.dim() == 4 && v_.dim() == 4,
                  "pykernels: k, v and their caches need 4 axes");
  FlashAttentionAppendParams p{};
  p.element_size = k_cache.element_size();
  p.batch = block_table ? k_.size(0) : k_cache.size(0), p.heads = k_cache.size(2), p.head_dim = k_cache.size(3);
  p.new_tokens = k_.size(1), p.value_dim = v_cache.size(3);
  check_shape(k_, {p.batch, p.new_tokens, p.heads, p.head_dim}, "k");
  check_shape(v_cache, {k_cache.size(0), k_cache.size(1), p.heads, p.value_dim}, "v_cache");
  check_shape(v_, {p.batch, p.new_tokens, p.heads, p.value_dim}, "v");
  for (const Tensor* x : {static_cast<const Tensor*>(&v_cache), &k_, &v_}) {
    check_same_dtype(*x, k_cache, "k, v or v_cache");
    check_same_device(*x, k_cache, "k, v or v_cache");
  }
  p.capacity = set_pages(block_table, k_cache, p.batch, p.block_table, p.block_table_stride, p.page_size, p.pages);
  check_same_device(cache_seqlens, k_cache, "cache_seqlens");
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
  launch(p, k_cache);
}

}  // namespace pykernels::bindings
