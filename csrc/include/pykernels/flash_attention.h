// Flash attention: the parameters and launch functions that every native backend shares. Torch-free.
//
// Memory layout. q [B, Tq, Hq, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V], out [B, Tq, Hq, V]: any strides (in elements)
// but for the last axis, which is contiguous. Hq is a multiple of Hk; query head h reads key head h / (Hq / Hk).
// lse [B, Hq, Tq], contiguous: natural log of the row's sum of exp(score).
//
// Packed input: B = 1, cu_seqlens_q and cu_seqlens_k are [sequences + 1], row i of sequence s is token cu_seqlens[s] +
// i. Kernels clamp what they read from them into [0, T].
//
// Row i of a sequence with tq queries and tk keys sees key j when  p - window_left <= j <= p + window_right  with
// p = i + tk - tq (bottom-right aligned); a negative window bound means unbounded, causal is window_right = 0.
// score = scale * q.k, then softcap * tanh(score / softcap) when softcap > 0, then - slope |p - j|, then + bias.
// A row that sees no key gives zeros and lse = -inf, or its head's sink; its gradients are zero.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "parallel.h"
#include "strides.h"

namespace pykernels {

// Boolean: true where the key is visible.
enum class BiasType : int32_t { kBoolean, kFloat32, kSameAsQ };
struct Strides4 {
  int64_t batch, head, row, key;
};

struct FlashAttentionParams {
  DType dtype;  // of q, k, v, out and their gradients; lse, dlse and delta are fp32 (fp64 for fp64)
  int64_t batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, value_dim;

  const void* q;
  const void* k;
  const void* v;
  Strides3 q_stride, k_stride, v_stride;

  // Forward writes out and lse; backward reads them.
  void* out;
  Strides3 out_stride;
  void* lse;

  // Packed sequences, else null and 0.
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t sequences;

  double scale, softcap;               // softcap 0: none
  int64_t window_left, window_right;   // < 0: unbounded

  // What follows is null where it is off. Slopes and sinks are of lse's type.
  const void* alibi_slopes;     // [Hq] (stride 0), or [B or sequences, Hq]
  int64_t alibi_stride;
  const void* bias;             // element (b, h, i, j) of what it is broadcast to: i and j count along the packed axis
  BiasType bias_type;
  Strides4 bias_stride;         // 0 along axes that it lacks; else key is 1
  const void* sinks;            // [Hq]
  const int64_t* dropout_seed;  // a weight is kept as pykernels/ops/flash_attention/reference.py says
  double dropout_p;
  // Decoding: k and v are [pages, page size, Hk, dim], and seqlen_k is what an entry's pages hold together. Token t of
  // entry b lies in page block_table[b, t / page_size] (clamped).
  const int32_t* block_table;   // [B, block_table_stride]
  int64_t block_table_stride, page_size, pages;
};

struct FlashAttentionBackwardParams {
  FlashAttentionParams forward;
  const void* dout;  // [B, Tq, Hq, V]
  Strides3 dout_stride;
  const void* dlse;  // [B, Hq, Tq] contiguous, or null: zero
  // Same shapes as q, k, v; contiguous in the last axis. Every element is written.
  void* dq;
  void* dk;
  void* dv;
  Strides3 dq_stride, dk_stride, dv_stride;
  // Of the accumulator's type and contiguous; null: not wanted. dbias has bias' shape: 1 along the axes of stride 0.
  void* dbias;
  void* dsinks;  // [Hq]
  // The CPU kernels are bitwise repeatable at a fixed thread count either way; set, also across thread counts. The CUDA
  // kernels for sm_80 are always bitwise repeatable, those for sm_90a never; set, the former serve.
  bool deterministic;
  // Of the CUDA kernels: flash_attention_bwd_scratch() floats, 16-byte aligned.
  void* scratch;
};

// q [B, Tq, Hq, K] against k_cache [B, Tmax, Hk, K] and v_cache [B, Tmax, Hk, V]; batch entry b has
// cache_seqlens[b] + new_tokens valid keys (clamped to Tmax), and the same alignment and masking as above.
struct FlashAttentionDecodeParams {
  FlashAttentionParams forward;  // k, v, seqlen_k describe the cache (seqlen_k = Tmax); cu_seqlens are null
  const int32_t* cache_seqlens;  // [B], tokens before the append
  int64_t new_tokens;
  // Of the CUDA kernels: pieces that the keys are cut into, and the memory for their results.
  int64_t splits;
  void* scratch;
};

// Copies new tokens into a cache: k_cache[b, cache_seqlens[b] + t] = k[b, t], v likewise. Tokens that would land
// outside [0, Tmax) are dropped. With a block table the cache is paged as above (tokens of pages that don't exist are
// dropped too), and capacity what an entry's pages hold together.
struct FlashAttentionAppendParams {
  int64_t element_size;  // bytes; the copy does not look inside elements
  int64_t batch, new_tokens, capacity, heads, head_dim, value_dim;
  // [B, Tnew, Hk, K or V] and [B, Tmax, Hk, K or V]; the last axis is contiguous
  const void* k;
  const void* v;
  Strides3 k_stride, v_stride;
  void* k_cache;
  void* v_cache;
  Strides3 k_cache_stride, v_cache_stride;
  const int32_t* cache_seqlens;  // [B]
  const int32_t* block_table;    // [B, block_table_stride], or null
  int64_t block_table_stride, page_size, pages;
};

namespace cpu {
void flash_attention_append(const FlashAttentionAppendParams& params, const Parallel& parallel);
void flash_attention_fwd(const FlashAttentionParams& params, const Parallel& parallel);
void flash_attention_bwd(const FlashAttentionBackwardParams& params, const Parallel& parallel);
void flash_attention_decode(const FlashAttentionDecodeParams& params, const Parallel& parallel);
}  // namespace cpu

// On `stream` of the current device; bf16 and fp16; heads up to 256, decoding keys to 576 and values to 512; neither
// bias nor dropout. Return null, or what went wrong.
namespace cuda {
// In words: which kernels serve which calls on a device of that compute capability (10 major + minor).
const char* flash_attention_kernels(int capability);
const char* flash_attention_fwd(const FlashAttentionParams& params, void* stream);
// Depends on the current device.
int64_t flash_attention_bwd_scratch(const FlashAttentionBackwardParams& params);
const char* flash_attention_bwd(const FlashAttentionBackwardParams& params, void* stream);

// Into how many pieces to cut the keys (params.splits) on the current device, and the floats of scratch that they need.
int64_t flash_attention_decode_splits(const FlashAttentionDecodeParams& params);
int64_t flash_attention_decode_scratch(const FlashAttentionDecodeParams& params);
const char* flash_attention_decode(const FlashAttentionDecodeParams& params, void* stream);
// Elements of 2 bytes.
const char* flash_attention_append(const FlashAttentionAppendParams& params, void* stream);
}  // namespace cuda

}  // namespace pykernels
