// The walk over the chunks of a segment: its parameters, and what its kernels share.
//
// Every result of forward and backward is a linear attention of its own. With rows x and y of a chunk,
//   result_x = sum over y of w_xy (a_x . b_y) c_y + f_x a_x state
//   state <- total state + sum over y of f_y b_y c_y^T
//
//   result   a   b   c    time         state            inner axis
//   out      q   k   v    ascending    S                K
//   dq       dO  v   k    ascending    S^T              V
//   dk       v   dO  q    descending   gradient of S^T  V
//   dv       k   q   dO   descending   gradient of S    K
//
// where f is the factor from the chunk's start to a query (with the scale), or from a key to its end, and w what lies
// between a key and a later query. A block owns kColumns columns of the result for one segment of a head, each warp 16
// of them. A warp holds its part of the state transposed, [16, inner], as accumulators: those are, as they stand, the
// second operand of a state, and what the update adds to. So the state never leaves the registers.
#pragma once

#include "sm80.cuh"

namespace pykernels::cuda::linear {

struct Walk {
  Call call;
  Operand a, b, c;
  Operand d;  // q for dq, k for dk, where the gradients of decay or bonus want them; else its data is null
  int64_t inner, columns;
  bool descending;
  DType dtype;  // of q, k, v and dO

  // The result [B, T, H, columns]; null: the walk leaves a segment's own state in the next segment's slot, and its
  // factor in `factors`.
  void* result;
  bool wide;             // fp32, else the dtype
  const float* addend;   // [B, T, H, columns] is added first; or null
  const float* divisor;  // [B, T, H] divides it; or null
  float epsilon;         // is added to it
  const float* denominator;  // [B, T, H] divides queries; or null

  // A state's element (i, column) lies at i * state_inner + column * state_column. The first segment in walking order
  // starts from `edge` (null: zero), the others from `states`, as do all with edge_kept; keep_edge writes the first
  // one's there. The last one leaves its state in `last`.
  int64_t state_inner, state_column, state_size;
  float* states;       // [segments, H, state_size]
  const float* edge;   // [sequences, H, state_size]
  float* last;         // [sequences, H, state_size]
  float* factors;      // [segments, H], wide: [segments, H, channels]
  bool edge_kept, keep_edge;

  // For the decay's gradient: the states before chunks, in the order of registers, which an ascending walk leaves and
  // the descending one takes; of 16 columns each, rows [B, T, H] of d . f_x a_x state and, descending, per chunk
  // <state of the other walk, state>.
  bool scores_of_state;  // the bonus applies to a product of inner axes K (out, dv), else to the columns (dq, dk)
  float4* chunk_states;
  float* row_dots;
  float* chunk_dots;
  float* dbonus;  // [segments, H, columns]; added to with dbonus_added
  bool dbonus_added;

  // For the kernel of wide_sm80.cuh alone, which has no addend, d, row_dots, chunk_dots, dbonus and denominator.
  // Channels: K for a decay per channel, else 1. They are the inner axis, or, transposed, the columns.
  bool wide_kernel, transposed;
  int64_t channels;
  const float* x_factors;  // [B, T, H, channels] of rows x, with scale and denominator where those are queries
  const float* y_factors;  // of rows y
  const float* totals;     // [chunks, H, channels]: log factors
  const float* scores;     // [B, T, H, kChunk (keys)] with their weights; null: the result has the state's part alone
  bool added;              // result, wide, and crossing are added to
  float* crossing;         // [chunks, H, columns]: <state of the other walk, state> of each column
};

// Where a segment lies in its sequence.
struct Span {
  int begin, chunks;
  bool first, final;  // in walking order

  __device__ __forceinline__ Span(const Walk& w, const Segment& segment) {
    begin = segment.index * kSegment;
    const int left = segment.length - begin;
    chunks = left <= 0 ? 0 : (min(left, kSegment) + kChunk - 1) / kChunk;
    first = w.descending ? left <= kSegment : segment.index == 0;
    final = w.descending ? segment.index == 0 : left <= kSegment;
  }
};

// Where in memory a warp's part of the state lies. Transposed: rows are 16 columns of the result, block n of 8 columns
// lies along the inner axis.
struct StatePlace {
  int inner, columns, state_inner, state_column, first_inner, first_column;

  __device__ __forceinline__ StatePlace(const Walk& w, int warp_column) {
    const int lane = threadIdx.x % 32;
    inner = static_cast<int>(w.inner), columns = static_cast<int>(w.columns);
    state_inner = static_cast<int>(w.state_inner), state_column = static_cast<int>(w.state_column);
    first_inner = 2 * (lane % 4), first_column = warp_column + lane / 4;
  }
  __device__ __forceinline__ int at(int n, int i) const {
    return first_inner * state_inner + first_column * state_column + (8 * n + i % 2) * state_inner +
           8 * (i / 2) * state_column;
  }
  __device__ __forceinline__ bool exists(int n, int i) const {
    return 8 * n + first_inner + i % 2 < inner && first_column + 8 * (i / 2) < columns;
  }
};

template <int kInner>
__device__ __forceinline__ void store_state(const float (&state)[kInner / 8][4], const StatePlace& place, float* to) {
#pragma unroll
  for (int n = 0; n < kInner / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (place.exists(n, i)) to[place.at(n, i)] = state[n][i];
}

// The state that a segment starts from.
template <int kInner>
__device__ __forceinline__ void begin_state(float (&state)[kInner / 8][4], const StatePlace& place, const Walk& w,
                                            const Segment& segment, const Span& span, int64_t slot, int64_t head,
                                            bool with_result) {
  const float* from = nullptr;
  const int64_t kept = (slot * w.call.heads + head) * w.state_size;
  if (with_result && (!span.first || (w.edge_kept && span.chunks > 0)))
    from = w.states + kept;
  else if (with_result && w.edge != nullptr)
    from = w.edge + (segment.sequence * w.call.heads + head) * w.state_size;
#pragma unroll
  for (int n = 0; n < kInner / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) state[n][i] = from != nullptr && place.exists(n, i) ? from[place.at(n, i)] : 0.0f;
  if (with_result && w.keep_edge && span.first && span.chunks > 0) store_state<kInner>(state, place, w.states + kept);
}

// What becomes of the state after a segment.
template <int kInner>
__device__ __forceinline__ void end_state(const float (&state)[kInner / 8][4], const StatePlace& place, const Walk& w,
                                          const Segment& segment, const Span& span, int64_t slot, int64_t head,
                                          bool with_result) {
  if (with_result && span.final && w.last != nullptr)
    store_state<kInner>(state, place, w.last + (segment.sequence * w.call.heads + head) * w.state_size);
  if (!with_result)
    store_state<kInner>(state, place,
                        w.states + ((slot + (w.descending ? -1 : 1)) * w.call.heads + head) * w.state_size);
}

// A lane's part of the state before a chunk: every 32nd of kInner / 8.
template <int kInner>
__device__ __forceinline__ float4* chunk_state(const Walk& w, int64_t chunk_of_head, int warp_column) {
  const int64_t part = chunk_of_head * kWarps * gridDim.y + warp_column / 16;
  return w.chunk_states + part * (kInner / 8) * 32 + threadIdx.x % 32;
}
template <int kInner>
__device__ __forceinline__ void keep_chunk_state(float4* kept, const float (&state)[kInner / 8][4]) {
#pragma unroll
  for (int n = 0; n < kInner / 8; ++n)
    kept[32 * n] = make_float4(state[n][0], state[n][1], state[n][2], state[n][3]);
}

inline const char* launch_walk(void (*kernel)(Walk), const Walk& w, unsigned shared_bytes, cudaStream_t stream) {
  const int64_t blocks = w.call.segments() * w.call.heads;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more segments of heads than a grid has blocks";
  return launch(kernel,
                {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((w.columns + kColumns - 1) / kColumns)),
                 dim3(kThreads), shared_bytes, stream},
                w);
}

}  // namespace pykernels::cuda::linear
