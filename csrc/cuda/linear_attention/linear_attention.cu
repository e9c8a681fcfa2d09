// The launch functions: which kernels make a call, and the memory between them.
#include <algorithm>
#include <initializer_list>

#include "gradients_sm80.cuh"
#include "step_sm80.cuh"
#include "walk_sm80.cuh"
#include "wide_sm80.cuh"

namespace pykernels::cuda {
namespace {

using linear::Call, linear::Operand, linear::Walk, linear::kChunksPerSegment, linear::kColumns, linear::kSegment;

constexpr int64_t kMaxInner = 256;  // of a walk: longer inner axes take several

// What no kernel here takes; the Python side does not send it.
const char* unsupported(const LinearAttentionParams& p) {
  if (p.dtype == DType::kFloat64) return "the CUDA kernels take no float64";
  if (p.key_dim > 256 || p.value_dim > 512) return "the CUDA kernels take key sizes up to 256, value sizes up to 512";
  if (p.tokens >= int64_t{1} << 30) return "the CUDA kernels take fewer than 2^30 tokens";
  return nullptr;
}

// Whether the kernels of wide_sm80.cuh make a call, and how many channels the decay has there.
bool is_wide(const LinearAttentionParams& p) {
  return p.dtype == DType::kFloat32 || p.decay_kind == DecayKind::kChannel;
}
int64_t channels_of(const LinearAttentionParams& p) { return p.decay_kind == DecayKind::kChannel ? p.key_dim : 1; }
int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

Call make_call(const LinearAttentionParams& p) {
  Call call{};
  call.batch = p.batch, call.tokens = p.tokens, call.heads = p.heads, call.sequences = p.state_count();
  call.segments_each = std::max<int64_t>(1, (p.tokens + kSegment - 1) / kSegment);
  call.cu_seqlens = p.cu_seqlens;
  call.decay = static_cast<const float*>(p.decay), call.decay_stride = p.decay_stride;
  call.bonus = static_cast<const float*>(p.bonus);
  call.scale = static_cast<float>(p.scale), call.reverse = p.reverse;
  return call;
}

bool several_segments(const LinearAttentionParams& p) { return p.tokens > kSegment; }
int64_t state_size(const LinearAttentionParams& p) { return p.key_dim * p.value_dim_state(); }
int64_t states_floats(const LinearAttentionParams& p) { return make_call(p).segments() * p.heads * state_size(p); }
int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Operand query_of(const LinearAttentionParams& p) { return linear::rows_of(p.q, p.q_stride, p.heads / p.heads_k); }
Operand key_of(const LinearAttentionParams& p) { return linear::rows_of(p.k, p.k_stride, p.heads / p.heads_k); }
// From a column on.
Operand columns_of(const void* data, const Strides3& stride, int64_t first, DType dtype) {
  return linear::rows_of(static_cast<const char*>(data) + first * size_of(dtype), stride, 1);
}

// Runs one step after another until one fails.
class Steps {
 public:
  explicit Steps(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}
  const char* error() const { return error_; }

  // Where no kernel writes because a row or a state belongs to no sequence.
  void zero(void* data, int64_t bytes) {
    if (error_ != nullptr || bytes == 0) return;
    const cudaError_t failed = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_);
    if (failed != cudaSuccess) error_ = cudaGetErrorString(failed);
  }
  void walk(const Walk& w) {
    if (error_ != nullptr) return;
    if (w.wide_kernel)
      error_ = w.inner <= 64    ? linear::wide_walk_sm80_64(w, stream_)
               : w.inner <= 128 ? linear::wide_walk_sm80_128(w, stream_)
                                : linear::wide_walk_sm80_256(w, stream_);
    else
      error_ = w.inner <= 64    ? linear::walk_sm80_64(w, stream_)
               : w.inner <= 128 ? linear::walk_sm80_128(w, stream_)
                                : linear::walk_sm80_256(w, stream_);
  }
  void scores(const linear::WideScores& p) {
    if (error_ == nullptr) error_ = linear::wide_scores_sm80(p, stream_);
  }
  void gradients(const linear::WideGradients& p) {
    if (error_ == nullptr) error_ = linear::wide_gradients_sm80(p, stream_);
  }
  void scan(const linear::Scan& s) {
    const int64_t blocks = s.call.sequences * s.call.heads;
    if (error_ != nullptr || blocks == 0) return;
    if (blocks > INT32_MAX) {
      error_ = "more sequences of heads than a grid has blocks";
      return;
    }
    const auto slices = static_cast<unsigned>((s.size + linear::kThreads - 1) / linear::kThreads);
    error_ = launch(linear::linear_attention_scan_sm80_kernel,
                    {dim3(static_cast<unsigned>(blocks), slices), dim3(linear::kThreads), 0, stream_}, s);
  }
  void decay_gradient(const linear::DecayGradient& p, DType dtype) {
    if (error_ != nullptr) return;
    error_ = dtype == DType::kBFloat16 ? linear::launch_ddecay_sm80<BFloat16>(p, stream_)
                                       : linear::launch_ddecay_sm80<Float16>(p, stream_);
  }
  void extra(const linear::Extra& p, DType dtype) {
    if (error_ != nullptr || p.rows == 0) return;
    const int64_t blocks = (p.rows + linear::kWarps - 1) / linear::kWarps;
    if (blocks > INT32_MAX) {
      error_ = "more tokens of heads than a grid has blocks";
      return;
    }
    const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(linear::kThreads), 0, stream_};
    error_ = dtype == DType::kFloat32    ? launch(linear::linear_attention_extra_sm80_kernel<float>, config, p)
             : dtype == DType::kBFloat16 ? launch(linear::linear_attention_extra_sm80_kernel<BFloat16>, config, p)
                                         : launch(linear::linear_attention_extra_sm80_kernel<Float16>, config, p);
  }

 private:
  cudaStream_t stream_;
  const char* error_ = nullptr;
};

// Hands out a call's scratch memory, in pieces of whole 16 bytes; without memory it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<float*>(memory)) {}
  float* take(int64_t floats) {
    float* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(floats, 4);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

float* offset(void* data, int64_t elements) { return data == nullptr ? nullptr : static_cast<float*>(data) + elements; }
const float* offset(const void* data, int64_t elements) {
  return data == nullptr ? nullptr : static_cast<const float*>(data) + elements;
}

// What the wide walks of a pass read.
struct WideScratch {
  float* query_factors = nullptr;
  float* key_factors = nullptr;
  float* totals = nullptr;
  float* scores = nullptr;

  WideScratch(const LinearAttentionParams& p, Scratch& scratch) {
    if (!is_wide(p)) return;
    const int64_t rows = p.batch * p.tokens * p.heads, channels = channels_of(p);
    query_factors = scratch.take(rows * channels), key_factors = scratch.take(rows * channels);
    totals = scratch.take(make_call(p).segments() * kChunksPerSegment * p.heads * channels);
    scores = scratch.take(rows * linear::kChunk);
  }

  linear::WideChunks chunks(const LinearAttentionParams& p, const float* denominator) const {
    return {make_call(p), query_of(p), key_of(p), p.dtype, p.key_dim, channels_of(p), denominator};
  }
  void make(Steps& steps, const LinearAttentionParams& p, const float* denominator) const {
    if (is_wide(p)) steps.scores({chunks(p, denominator), query_factors, key_factors, totals, scores});
  }
  // A walk over keys and queries (out, dv), or over values (transposed: dq, dk).
  void serve(Walk& w, const LinearAttentionParams& p, bool transposed) const {
    if (!is_wide(p)) return;
    w.wide_kernel = true, w.transposed = transposed, w.channels = channels_of(p);
    w.x_factors = w.descending ? key_factors : query_factors;
    w.y_factors = w.descending ? query_factors : key_factors;
    w.totals = totals, w.scores = transposed ? nullptr : scores;
  }
};

// The states between segments, from what `states` has of each.
linear::Scan scan_of(const LinearAttentionParams& p, const Walk& w, const void* edge) {
  const int64_t channels = channels_of(p);
  return {w.call, w.states, w.factors, static_cast<const float*>(edge), w.state_size, w.descending, channels,
          std::max<int64_t>(1, w.state_size / channels)};
}

struct ForwardScratch {
  float* states = nullptr;
  float* factors = nullptr;
  WideScratch wide;
  int64_t floats;

  ForwardScratch(const LinearAttentionParams& p, void* memory) : ForwardScratch(p, Scratch(memory)) {}

 private:
  ForwardScratch(const LinearAttentionParams& p, Scratch scratch) : wide(p, scratch) {
    if (several_segments(p)) {
      if (p.checkpoints == nullptr) states = scratch.take(states_floats(p));
      factors = scratch.take(make_call(p).segments() * p.heads * channels_of(p));
    }
    floats = scratch.used();
  }
};

// An inner axis of the walks for dq and dk: a range of the values, or the column that normalize adds.
struct Part {
  int64_t first, size;
};
int64_t value_parts(const LinearAttentionParams& p) { return (p.value_dim + kMaxInner - 1) / kMaxInner; }
int64_t parts_count(const LinearAttentionParams& p) { return value_parts(p) + (p.normalize ? 1 : 0); }
Part part_of(const LinearAttentionParams& p, int64_t i) {
  if (i == value_parts(p)) return {p.value_dim, 1};
  return {i * kMaxInner, std::min(kMaxInner, p.value_dim - i * kMaxInner)};
}
// What a decay's gradient has of each 16 columns of the keys and each part.
int64_t dots_per_part(const LinearAttentionParams& p) { return (p.key_dim + 15) / 16; }

struct BackwardScratch {
  float* after = nullptr;  // gradients of the states after segments
  float* factors = nullptr;
  float* extra = nullptr;
  float* dq = nullptr;  // of the parts before the last one
  float* dk = nullptr;
  float* chunk_states = nullptr;
  float* query_dots = nullptr;
  float* key_dots = nullptr;
  float* chunk_dots = nullptr;
  float* crossing = nullptr;
  float* dbonus = nullptr;
  WideScratch wide;
  int64_t floats;

  BackwardScratch(const LinearAttentionBackwardParams& b, void* memory) : BackwardScratch(b, Scratch(memory)) {}

 private:
  BackwardScratch(const LinearAttentionBackwardParams& b, Scratch scratch) : wide(b.forward, scratch) {
    const LinearAttentionParams& p = b.forward;
    const int64_t rows = p.batch * p.tokens * p.heads, segments = make_call(p).segments();
    if (several_segments(p)) {
      after = scratch.take(states_floats(p));
      factors = scratch.take(segments * p.heads * channels_of(p));
    }
    if (p.normalize) extra = scratch.take(rows);
    const int64_t chunks = segments * kChunksPerSegment * p.heads;
    if (is_wide(p) && p.bonus != nullptr) dbonus = scratch.take(chunks * p.key_dim);
    if (is_wide(p) || parts_count(p) > 1) dq = scratch.take(rows * p.key_dim), dk = scratch.take(rows * p.key_dim);
    if (b.ddecay != nullptr) {
      const int64_t inner = p.value_dim <= 64 ? 64 : p.value_dim <= 128 ? 128 : 256;
      chunk_states = scratch.take(chunks * round_up(p.key_dim, kColumns) * inner);
      if (is_wide(p)) {
        crossing = scratch.take(chunks * p.key_dim);
      } else {
        const int64_t dots = parts_count(p) * dots_per_part(p);
        query_dots = scratch.take(dots * rows), key_dots = scratch.take(dots * rows);
        chunk_dots = scratch.take(dots * chunks);
      }
    }
    floats = scratch.used();
  }
};

}  // namespace

const char* linear_attention_kernels(int capability) {
  return capability >= 80 ? "sm_80 (mma.sync)" : "none";
}

int64_t linear_attention_fwd_scratch(const LinearAttentionParams& p) { return ForwardScratch(p, nullptr).floats; }

const char* linear_attention_fwd(const LinearAttentionParams& p, void* memory, void* stream) {
  if (const char* reason = unsupported(p)) return reason;
  const ForwardScratch scratch(p, memory);
  Steps steps(stream);
  const int64_t rows = p.batch * p.tokens * p.heads;
  if (p.cu_seqlens != nullptr) {
    steps.zero(p.out, size_of(p.dtype) * rows * p.value_dim);
    steps.zero(p.final_state, 4 * p.state_count() * p.heads * state_size(p));
  }
  scratch.wide.make(steps, p, nullptr);
  Walk main{};
  main.call = make_call(p), main.dtype = p.dtype;
  main.a = query_of(p), main.b = key_of(p), main.c = linear::rows_of(p.v, p.v_stride, 1);
  main.inner = p.key_dim, main.columns = p.value_dim;
  main.state_inner = p.value_dim_state(), main.state_column = 1, main.state_size = state_size(p);
  main.states = p.checkpoints != nullptr ? static_cast<float*>(p.checkpoints) : scratch.states;
  main.factors = scratch.factors;
  main.scores_of_state = true;
  scratch.wide.serve(main, p, false);
  // The column of ones that normalize adds: a walk of its own.
  Walk sums = main;
  sums.c = linear::ones(), sums.columns = 1, sums.states = offset(main.states, p.value_dim);

  if (several_segments(p)) {
    steps.walk(main);
    if (p.normalize) steps.walk(sums);
    steps.scan(scan_of(p, main, p.initial_state));
  }
  main.edge = static_cast<const float*>(p.initial_state), main.last = static_cast<float*>(p.final_state);
  main.keep_edge = sums.keep_edge = p.checkpoints != nullptr;
  main.result = p.out;
  if (p.normalize) {
    sums.edge = offset(p.initial_state, p.value_dim), sums.last = offset(p.final_state, p.value_dim);
    sums.result = p.denominator, sums.wide = true, sums.epsilon = static_cast<float>(kNormalizeEpsilon);
    steps.walk(sums);
    main.divisor = static_cast<const float*>(p.denominator);
  }
  steps.walk(main);
  return steps.error();
}

int64_t linear_attention_bwd_scratch(const LinearAttentionBackwardParams& b) {
  return BackwardScratch(b, nullptr).floats;
}

const char* linear_attention_bwd(const LinearAttentionBackwardParams& b, void* memory, void* stream) {
  const LinearAttentionParams& p = b.forward;
  if (const char* reason = unsupported(p)) return reason;
  const BackwardScratch scratch(b, memory);
  Steps steps(stream);
  const Call call = make_call(p);
  const int64_t rows = p.batch * p.tokens * p.heads;
  const bool grouped = p.heads != p.heads_k;  // then dq and dk are fp32
  const int64_t gradient_size = grouped ? 4 : size_of(p.dtype);
  if (p.cu_seqlens != nullptr) {
    for (void* const gradient : {b.dq, b.dk}) steps.zero(gradient, gradient_size * rows * p.key_dim);
    steps.zero(b.dv, size_of(p.dtype) * rows * p.value_dim);
    if (b.ddecay != nullptr) steps.zero(b.ddecay, 4 * rows * channels_of(p));
    if (p.bonus != nullptr) steps.zero(b.dbonus, 4 * p.tiles() * p.heads * p.key_dim);
    steps.zero(b.dinitial_state, 4 * p.state_count() * p.heads * state_size(p));
  }
  const auto* denominator = p.normalize ? static_cast<const float*>(p.denominator) : nullptr;
  if (p.normalize)
    steps.extra({p.out, b.dout, p.out_stride, b.dout_stride, p.tokens, p.heads, p.value_dim, rows, scratch.extra},
                p.dtype);

  scratch.wide.make(steps, p, denominator);

  const Operand q = query_of(p), k = key_of(p);
  const auto* dfinal = static_cast<const float*>(b.dfinal_state);
  Walk dv{};
  dv.call = call, dv.dtype = p.dtype;
  dv.a = k, dv.b = q, dv.c = linear::rows_of(b.dout, b.dout_stride, 1);
  dv.inner = p.key_dim, dv.columns = p.value_dim, dv.descending = true;
  dv.denominator = denominator;
  dv.state_inner = p.value_dim_state(), dv.state_column = 1, dv.state_size = state_size(p);
  dv.states = scratch.after, dv.factors = scratch.factors;
  dv.scores_of_state = true;
  scratch.wide.serve(dv, p, false);
  if (several_segments(p)) {
    steps.walk(dv);
    if (p.normalize) {
      Walk sums = dv;
      sums.c = linear::column_of(scratch.extra, call), sums.columns = 1;
      sums.states = offset(dv.states, p.value_dim);
      steps.walk(sums);
    }
    steps.scan(scan_of(p, dv, dfinal));
  }
  dv.edge = dfinal, dv.result = b.dv;
  steps.walk(dv);

  const int64_t parts = parts_count(p), dots = dots_per_part(p);
  const int64_t chunks = call.segments() * kChunksPerSegment * call.heads;
  for (int64_t i = 0; i < parts; ++i) {
    const Part part = part_of(p, i);
    const bool of_normalize = part.first == p.value_dim, last = i == parts - 1;
    const Operand v = of_normalize ? linear::ones() : columns_of(p.v, p.v_stride, part.first, p.dtype);
    const Operand dout = of_normalize ? linear::column_of(scratch.extra, call)
                                      : columns_of(b.dout, b.dout_stride, part.first, p.dtype);
    Walk dq{};
    dq.call = call, dq.dtype = p.dtype;
    dq.a = dout, dq.b = v, dq.c = k;
    if (b.ddecay != nullptr || p.bonus != nullptr) dq.d = q;
    dq.inner = part.size, dq.columns = p.key_dim;
    // The wide walks leave what states give, and the sum over the parts, to the kernel that adds the pairs' part.
    const bool of_states = is_wide(p);
    dq.result = last && !of_states ? b.dq : scratch.dq, dq.wide = !last || of_states || grouped;
    dq.addend = i > 0 ? scratch.dq : nullptr, dq.added = i > 0;
    dq.denominator = denominator;
    dq.state_inner = 1, dq.state_column = p.value_dim_state(), dq.state_size = state_size(p);
    dq.states = offset(p.checkpoints, part.first), dq.edge_kept = true;
    dq.dbonus = p.bonus != nullptr ? static_cast<float*>(b.dbonus) : nullptr, dq.dbonus_added = i > 0;
    if (b.ddecay != nullptr) {
      dq.chunk_states = reinterpret_cast<float4*>(scratch.chunk_states), dq.crossing = scratch.crossing;
    }
    if (b.ddecay != nullptr && !of_states) {
      dq.row_dots = scratch.query_dots + i * dots * rows, dq.chunk_dots = scratch.chunk_dots + i * dots * chunks;
    }
    scratch.wide.serve(dq, p, true);
    steps.walk(dq);

    Walk dk = dq;
    dk.a = v, dk.b = dout, dk.c = q, dk.descending = true;
    dk.d = b.ddecay != nullptr ? k : Operand{};
    dk.result = last && !of_states ? b.dk : scratch.dk, dk.addend = i > 0 ? scratch.dk : nullptr;
    dk.states = offset(scratch.after, part.first), dk.edge = offset(b.dfinal_state, part.first), dk.edge_kept = false;
    dk.last = offset(b.dinitial_state, part.first);
    dk.dbonus = nullptr;
    if (dq.row_dots != nullptr) dk.row_dots = scratch.key_dots + i * dots * rows;
    scratch.wide.serve(dk, p, true);
    steps.walk(dk);
  }

  if (is_wide(p)) {
    linear::WideGradients gradients{};
    gradients.chunks = scratch.wide.chunks(p, denominator);
    gradients.v = linear::rows_of(p.v, p.v_stride, 1), gradients.dout = dv.c, gradients.value_dim = p.value_dim;
    gradients.extra = scratch.extra;
    gradients.dq_states = scratch.dq, gradients.dk_states = scratch.dk;
    gradients.crossing = scratch.crossing, gradients.totals = scratch.wide.totals;
    gradients.dq = b.dq, gradients.dk = b.dk, gradients.gradient_dtype = grouped ? DType::kFloat32 : p.dtype;
    gradients.ddecay = static_cast<float*>(b.ddecay);
    gradients.dbonus = scratch.dbonus, gradients.dbonus_sums = static_cast<float*>(b.dbonus);
    steps.gradients(gradients);
  } else if (b.ddecay != nullptr) {
    linear::DecayGradient gradient{};
    gradient.call = call;
    gradient.q = q, gradient.k = k;
    gradient.v = linear::rows_of(p.v, p.v_stride, 1), gradient.dout = dv.c;
    gradient.key_dim = p.key_dim, gradient.value_dim = p.value_dim;
    gradient.denominator = denominator, gradient.extra = scratch.extra;
    gradient.parts = parts * dots;
    gradient.query_dots = scratch.query_dots, gradient.key_dots = scratch.key_dots;
    gradient.chunk_dots = scratch.chunk_dots;
    gradient.ddecay = static_cast<float*>(b.ddecay);
    steps.decay_gradient(gradient, p.dtype);
  }
  return steps.error();
}

const char* linear_attention_step(const LinearAttentionStepParams& s, void* stream_) {
  auto* stream = static_cast<cudaStream_t>(stream_);
  switch (s.forward.dtype) {
    case DType::kFloat32:
      return linear::launch_step_sm80<float>(s, stream);
    case DType::kBFloat16:
      return linear::launch_step_sm80<BFloat16>(s, stream);
    case DType::kFloat16:
      return linear::launch_step_sm80<Float16>(s, stream);
    default:
      return "the CUDA kernels take no float64";
  }
}

}  // namespace pykernels::cuda
