// Linear attention with decay: the parameters and launch functions that every native backend shares. Torch-free.
//
// Per sequence and head, with the state S [K, V] starting at initial_state (or zero), for each token t in time order:
//     without bonus:  S = e^{decay_t} S + k_t v_t^T      out_t = scale q_t^T S
//     with bonus:     out_t = scale q_t^T (S + (bonus k_t) v_t^T)      S = e^{decay_t} S + k_t v_t^T
// normalize: V has one more column, of ones, and out_t is divided by its own last column plus kNormalizeEpsilon.
// reverse: time runs from the last token of a sequence to its first.
//
// Memory layout. q, k [B, T, Hk, K], v, out [B, T, H, V]: any strides (in elements) but for the last axis, which is
// contiguous. H is a multiple of Hk; head h reads q and k of head h / (H / Hk). States [N, H, K, Ve], Ve = V (V + 1
// with normalize), and bonus [H, K] are contiguous. Decay, bonus, states and statistics are fp32 (fp64 for fp64).
//
// Packed input: B = 1, cu_seqlens is [sequences + 1], N = sequences; kernels clamp what they read from it into [0, T].
// Tokens after the last offset belong to none: zeros in every output. Otherwise N = B.
//
// Segments: a sequence is cut, in time order, into segments of kSegment tokens; segment i of sequence s is tile
// first_tile(s) + i, with first_tile(s) = s * ceil(T / kSegment), when packed cu_seqlens[s] / kSegment + s.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "parallel.h"
#include "strides.h"

namespace pykernels {

constexpr double kNormalizeEpsilon = 1e-6;

enum class DecayKind : int32_t { kNone = 0, kHead = 1, kToken = 2, kChannel = 3 };

struct LinearAttentionParams {
  static constexpr int64_t kSegment = 512;

  DType dtype;  // of q, k, v, out and their gradients
  int64_t batch, tokens, heads, heads_k, key_dim, value_dim;
  const void* q;
  const void* k;
  const void* v;
  Strides3 q_stride, k_stride, v_stride;

  DecayKind decay_kind;
  const void* decay;  // natural log, <= 0: null, [H], [B, T, H] or [B, T, H, K] with the last axis contiguous
  Strides3 decay_stride;
  const void* bonus;          // [H, K] or null
  const void* initial_state;  // [N, H, K, Ve] or null; not used in backward, where the first checkpoint holds it
  const int32_t* cu_seqlens;
  int64_t sequences;
  double scale;
  bool normalize, reverse;

  // Forward writes these; backward reads out and denominator, with normalize only, and checkpoints.
  void* out;
  Strides3 out_stride;
  void* final_state;  // [N, H, K, Ve]
  void* checkpoints;  // [tiles, H, K, Ve]: the state before each segment; null in a forward that needs none
  void* denominator;  // [B, T, H] contiguous, with normalize: what out was divided by

  int64_t value_dim_state() const { return value_dim + (normalize ? 1 : 0); }
  int64_t state_count() const { return cu_seqlens ? sequences : batch; }
  int64_t tiles() const {
    return cu_seqlens ? tokens / kSegment + sequences : batch * ((tokens + kSegment - 1) / kSegment);
  }
};

struct LinearAttentionBackwardParams {
  LinearAttentionParams forward;
  const void* dout;  // [B, T, H, V]
  Strides3 dout_stride;
  const void* dfinal_state;  // [N, H, K, Ve] or null: zero
  // Every element is written. dq and dk have a head per head of v, [B, T, H, K] contiguous, and the caller sums over
  // those that share one: in the dtype of q when H = Hk, else in fp32 (fp64).
  void* dq;
  void* dk;
  void* dv;              // [B, T, H, V] contiguous
  void* ddecay;          // [B, T, H] (kNone, kHead, kToken) or [B, T, H, K], contiguous; or null
  void* dbonus;          // [tiles, H, K], to be summed over tiles; null without bonus
  void* dinitial_state;  // [N, H, K, Ve]
};

// One token for each of B entries: q, k [B, Hk, K], v, out [B, H, V], contiguous in the last axis (their token strides
// are 0); decay [H], [B, H] or [B, H, K]. Reads and writes state[slot] [H, K, Ve], slot = state_indices[b] or b;
// entries whose slot is outside [0, slots) give zeros and change nothing.
struct LinearAttentionStepParams {
  LinearAttentionParams forward;  // tokens = 1; initial_state, final_state, cu_seqlens are null, reverse is not read
  void* state;
  int64_t slots, slot_stride, head_stride;  // the last two axes are contiguous
  const int32_t* state_indices;             // [B] or null
};

namespace cpu {
void linear_attention_fwd(const LinearAttentionParams& params, const Parallel& parallel);
void linear_attention_bwd(const LinearAttentionBackwardParams& params, const Parallel& parallel);
void linear_attention_step(const LinearAttentionStepParams& params, const Parallel& parallel);
}  // namespace cpu

// On a CUDA stream; results are contiguous. Each returns null, or what went wrong. `scratch` holds as many floats as
// the function of that name says.
namespace cuda {
int64_t linear_attention_fwd_scratch(const LinearAttentionParams& params);
const char* linear_attention_fwd(const LinearAttentionParams& params, void* scratch, void* stream);
int64_t linear_attention_bwd_scratch(const LinearAttentionBackwardParams& params);
const char* linear_attention_bwd(const LinearAttentionBackwardParams& params, void* scratch, void* stream);
const char* linear_attention_step(const LinearAttentionStepParams& params, void* stream);
// The kernels that serve a compute capability (10 major + minor), in words.
const char* linear_attention_kernels(int capability);
}  // namespace cuda

}  // namespace pykernels
