// The launch functions: which kernel serves a call.
#include "../../include/pykernels/flash_attention.h"

#include <algorithm>

#include "bwd_sm80.cuh"
#include "bwd_sm90_wide.cuh"
#include "decode_sm80.cuh"
#include "fwd_sm80.cuh"
#include "fwd_sm90.cuh"

namespace pykernels::cuda {
namespace {

// What no kernel here takes; the Python side does not send it.
const char* unsupported(const FlashAttentionParams& p, int64_t max_key_dim = 256, int64_t max_value_dim = 256) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return "the CUDA kernels take bfloat16 and float16";
  if (p.head_dim > max_key_dim || p.value_dim > max_value_dim)
    return "the CUDA kernels take head sizes up to 256, decoding keys up to 576 and values up to 512";
  if (p.bias != nullptr || p.dropout_seed != nullptr)
    return "the CUDA kernels have no bias and no dropout: the Triton kernels have";
  if (std::max(p.seqlen_q, p.seqlen_k) >= attention::kUnbounded / 4)
    return "the CUDA kernels take fewer than 2^28 tokens";
  return nullptr;
}

#ifdef PYKERNELS_SM90A
// Whether the kernels for sm_90a serve a call on this device: TMA must be able to read the tensors. Heads of 32 and
// smaller stay with sm_80's, which pad less.
bool fwd_by_sm90(const FlashAttentionParams& p) {
  return device_capability() == 90 && std::max(p.head_dim, p.value_dim) > 32 &&
         attention::tma_readable(p.q, p.q_stride, p.batch, p.seqlen_q, p.heads_q) &&
         attention::tma_readable(p.k, p.k_stride, p.batch, p.seqlen_k, p.heads_k) &&
         attention::tma_readable(p.v, p.v_stride, p.batch, p.seqlen_k, p.heads_k);
}

// The same of the backward pass; ALiBi stays with sm_80's.
bool bwd_by_sm90(const FlashAttentionBackwardParams& p) {
  const FlashAttentionParams& f = p.forward;
  return f.alibi_slopes == nullptr && fwd_by_sm90(f) &&
         attention::tma_readable(p.dout, p.dout_stride, f.batch, f.seqlen_q, f.heads_q);
}

// The head size of the kernels that serve it: those for 64 have no registers left for a soft cap.
int bwd_sm90_head(const FlashAttentionParams& f) {
  const int64_t size = std::max(f.head_dim, f.value_dim);
  if (size <= 64 && f.softcap <= 0.0) return 64;
  return size <= 128 ? 128 : size <= 192 ? 192 : 256;
}
#endif

// Floats of scratch that the kernels for sm_90a take; 0: those for sm_80 serve, which read delta alone.
int64_t bwd_scratch_sm90(const FlashAttentionBackwardParams& p) {
#ifdef PYKERNELS_SM90A
  using attention::BackwardConfigSm90, attention::WideBackwardConfigSm90;
  const FlashAttentionParams& f = p.forward;
  if (bwd_by_sm90(p)) {
    const int head = bwd_sm90_head(f);
    if (head == 64) return attention::bwd_scratch_floats<BackwardConfigSm90<BFloat16, 64>>(f);
    if (head == 128) return attention::bwd_scratch_floats<BackwardConfigSm90<BFloat16, 128>>(f);
    if (head == 192) return attention::bwd_scratch_floats<WideBackwardConfigSm90<BFloat16, 192>>(f);
    return attention::bwd_scratch_floats<WideBackwardConfigSm90<BFloat16, 256>>(f);
  }
#endif
  return 0;
}

// Whether delta [B, Hq, Tq] is computed, behind other scratch: the kernels for sm_90a have their own form of it.
bool bwd_needs_delta(const FlashAttentionBackwardParams& p, int64_t other) { return other == 0 || p.dsinks != nullptr; }

}  // namespace

#define PYKERNELS_LEFT_TO_TRITON "; bias, dropout and head sizes above 256 (but for decoding): Triton's kernels alone"

const char* flash_attention_kernels(int capability) {
#ifdef PYKERNELS_SM90A
  if (capability == 90)
    return "sm_90a (TMA, wgmma) for tensors at multiples of 16 bytes with head sizes 33 to 256, backward without "
           "ALiBi; else, and for decoding, sm_80 (mma.sync)" PYKERNELS_LEFT_TO_TRITON;
#endif
  return capability >= 80 ? "sm_80 (mma.sync)" PYKERNELS_LEFT_TO_TRITON : "none";
}

const char* flash_attention_fwd(const FlashAttentionParams& p, void* stream_) {
  if (const char* reason = unsupported(p)) return reason;
  auto* stream = static_cast<cudaStream_t>(stream_);
  const int64_t size = std::max(p.head_dim, p.value_dim);
#ifdef PYKERNELS_SM90A
  if (fwd_by_sm90(p)) {
    if (size <= 64) return attention::fwd_sm90_64(p, stream);
    if (size <= 96) return attention::fwd_sm90_96(p, stream);
    if (size <= 128) return attention::fwd_sm90_128(p, stream);
    if (size <= 192) return attention::fwd_sm90_192(p, stream);
    return attention::fwd_sm90_256(p, stream);
  }
#endif
  if (size <= 32) return attention::fwd_sm80_32(p, stream);
  if (size <= 64) return attention::fwd_sm80_64(p, stream);
  if (size <= 96) return attention::fwd_sm80_96(p, stream);
  if (size <= 128) return attention::fwd_sm80_128(p, stream);
  if (size <= 192) return attention::fwd_sm80_192(p, stream);
  return attention::fwd_sm80_256(p, stream);
}

int64_t flash_attention_bwd_scratch(const FlashAttentionBackwardParams& p) {
  const FlashAttentionParams& f = p.forward;
  const int64_t other = bwd_scratch_sm90(p);
  return other + (bwd_needs_delta(p, other) ? f.batch * f.heads_q * f.seqlen_q : 0);
}

const char* flash_attention_bwd(const FlashAttentionBackwardParams& p, void* stream_) {
  if (const char* reason = unsupported(p.forward)) return reason;
  auto* stream = static_cast<cudaStream_t>(stream_);
  const int64_t size = std::max(p.forward.head_dim, p.forward.value_dim);
  if (const int64_t other = bwd_scratch_sm90(p); bwd_needs_delta(p, other)) {
    float* const delta = static_cast<float*>(p.scratch) + other;
    const char* error = p.forward.dtype == DType::kBFloat16
                            ? attention::launch_bwd_rows_sm80<BFloat16>(p, delta, stream)
                            : attention::launch_bwd_rows_sm80<Float16>(p, delta, stream);
    if (error != nullptr) return error;
  }
#ifdef PYKERNELS_SM90A
  if (bwd_by_sm90(p)) {
    const int head = bwd_sm90_head(p.forward);
    if (head == 64) return attention::bwd_sm90_64(p, stream);
    if (head == 128) return attention::bwd_sm90_128(p, stream);
    if (head == 192) return attention::bwd_sm90_192(p, stream);
    return attention::bwd_sm90_256(p, stream);
  }
#endif
  if (size <= 32) return attention::bwd_sm80_32(p, stream);
  if (size <= 64) return attention::bwd_sm80_64(p, stream);
  if (size <= 96) return attention::bwd_sm80_96(p, stream);
  if (size <= 128) return attention::bwd_sm80_128(p, stream);
  if (size <= 192) return attention::bwd_sm80_192(p, stream);
  return attention::bwd_sm80_256(p, stream);
}

int64_t flash_attention_decode_splits(const FlashAttentionDecodeParams& p) { return attention::decode_splits(p); }

int64_t flash_attention_decode_scratch(const FlashAttentionDecodeParams& p) {
  return attention::decode_scratch_floats(p.forward, p.splits);
}

const char* flash_attention_decode(const FlashAttentionDecodeParams& p, void* stream_) {
  if (const char* reason = unsupported(p.forward, 576, 512)) return reason;
  auto* stream = static_cast<cudaStream_t>(stream_);
  if (attention::decode_large(p)) return attention::decode_sm80_576(p, stream);
  const int64_t size = std::max(p.forward.head_dim, p.forward.value_dim);
  if (size <= 64) return attention::decode_sm80_64(p, stream);
  if (size <= 128) return attention::decode_sm80_128(p, stream);
  return attention::decode_sm80_256(p, stream);
}

const char* flash_attention_append(const FlashAttentionAppendParams& p, void* stream_) {
  if (p.element_size != 2) return "the CUDA kernels append elements of 2 bytes";
  const bool wide = p.head_dim % 8 == 0 && p.value_dim % 8 == 0 && aligned(p.k, p.k_stride) &&
                    aligned(p.v, p.v_stride) && aligned(p.k_cache, p.k_cache_stride) &&
                    aligned(p.v_cache, p.v_cache_stride);
  const int64_t elements = p.batch * p.new_tokens * p.heads * (p.head_dim + p.value_dim);
  if (elements == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((elements / (wide ? 8 : 1) + 255) / 256, 32 * multiprocessors());
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(256), 0, static_cast<cudaStream_t>(stream_)};
  return wide ? launch(attention::flash_attention_append_sm80_kernel<uint4>, config, p)
              : launch(attention::flash_attention_append_sm80_kernel<uint16_t>, config, p);
}

}  // namespace pykernels::cuda
