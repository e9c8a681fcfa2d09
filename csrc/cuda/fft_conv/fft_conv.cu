// Which way a call is computed, and the launches that it takes.
#include "launches.cuh"

namespace pykernels::cuda {
namespace fft {
namespace {

constexpr int64_t kLongest = int64_t{1} << 28;  // samples of a row

// As sums; by transforms of windows of 2 `points` samples; or of whole rows of `total` points, of which stages of radix
// 16 leave `points`.
struct Way {
  bool direct;
  int points, total;
  int count, step;  // windows of a row, outputs of each

  bool staged() const { return total > points; }
  int subs() const { return total / points; }
};

// By counted work: a transform of N points is N (log2 N + 4), 4 for its ends; a stage through memory counts as 40 more.
Way choose_way(const FFTConvParams& p, const Kernels& kernels) {
  if (kernels.count() <= kDirectTaps) {
    const int64_t windows = (p.length + kDirectTile - 1) / kDirectTile;
    return {true, 0, 0, static_cast<int>(windows), kDirectTile};
  }
  // Where the ends do not wrap, what a whole row's own ends wrap into only has to miss the outputs.
  const int64_t forward = kernels.forward, reverse = kernels.reverse;
  const int64_t samples = p.length + (p.circular ? forward + reverse : std::max(forward, reverse));
  Way best{false, kLeastPoints, kLeastPoints, 1, static_cast<int>(p.length)};
  int log = 8, stages = 0;
  for (; 2 * int64_t{best.total} < samples; best.total *= 2) ++log;
  best.points = best.total;
  for (; best.points > kMostPoints; best.points /= 16) ++stages;
  int64_t least = int64_t{best.total} * (log + 4 + 40 * stages);
  for (int points = kLeastPoints, own = 8; points <= kMostPoints && points < best.total; points *= 2, ++own) {
    const int64_t step = 2 * int64_t{points} - forward - reverse;
    if (step <= 0) continue;
    const int64_t windows = (p.length + step - 1) / step, work = windows * points * (own + 4);
    if (work < least) least = work, best = {false, points, points, static_cast<int>(windows), static_cast<int>(step)};
  }
  return best;
}

// Does one launch after another, until one fails.
struct Steps {
  const char* error = nullptr;
  void operator()(const char* result) {
    if (error == nullptr) error = result;
  }
};

// A call: the way, and what its launches are told.
struct Call {
  const FFTConvParams& p;
  Kernels kernels;
  Way way;
  int64_t per_group, group_rows;  // rows of a group

  explicit Call(const FFTConvParams& p_)
      : p(p_), kernels(p_), way(choose_way(p_, kernels)), per_group(p_.channels / p_.groups),
        group_rows(per_group * p_.batch) {}

  // Whether windows are rows, and all samples those of the row.
  bool whole() const { return !way.direct && way.count == 1 && way.step == p.length && !p.circular; }
  // The windows of x; of the gradient, for the transpose, whose lags are the negatives.
  Windows windows(bool reversed = false) const {
    const int ahead = reversed ? kernels.reverse : kernels.forward;
    const int behind = reversed ? kernels.forward : kernels.reverse;
    const int length = static_cast<int>(p.length);
    Windows w{way.count, whole() ? 0 : ahead, way.step, 0, length, false};
    if (p.circular) w.low = -ahead, w.high = length + behind;
    return w;
  }
  Rows rows(const Signal& x, const Result& out, const Result& second) const {
    return {p.dtype, p.batch, per_group, static_cast<int>(p.length), x, static_cast<const float*>(p.skip), out, second,
            nullptr};
  }
  Signal x() const { return {p.u, p.pre_gate, p.u_stride, p.pre_stride}; }

  int64_t windows_of_group() const { return group_rows * way.count; }
  int64_t spectrum_floats() const { return 2 * p.groups * int64_t{way.points}; }
  // Pieces of dskip of a channel.
  int64_t pieces() const {
    return p.batch * way.count * (way.direct ? kDirectThreads / 32 : product_pieces(way.total));
  }

  // How the windows of a group are split into blocks' parts: enough for every multiprocessor, of at least four windows
  // for each transform of a block.
  int64_t share() const {
    const int64_t total = windows_of_group(), least = way.direct ? 4 : 4 * transforms_of_block(way.points);
    const int64_t parts = std::min((total + least - 1) / least, (1023 + p.groups) / p.groups);
    return (total + parts - 1) / parts;
  }
  int parts() const { return static_cast<int>((windows_of_group() + share() - 1) / share()); }

  // Of rows that come in parts: the groups and the rows of one. `copies` are there of each row.
  int64_t rows_in_memory(int copies) const {
    return std::max<int64_t>(1, p.part_bytes / (8 * int64_t{way.total} * copies));
  }
  int64_t some_groups(int copies) const {
    return std::min<int64_t>(p.groups, std::max<int64_t>(1, rows_in_memory(copies) / group_rows));
  }
  int64_t some_rows(int copies) const {
    return std::min(some_groups(copies) * group_rows, rows_in_memory(copies));
  }
  // Of them, and of as many spectra or sums of each group.
  int64_t staged_floats(int copies) const {
    return 2 * way.total * (some_groups(copies) + some_rows(copies)) * copies;
  }

  TransformParams transform_params(const Rows& r, const Windows& w, bool reversed) const {
    TransformParams t{};
    t.conj = reversed, t.rows = r, t.windows = w, t.kernels = kernels, t.range.subs = 1;
    t.scale = 1.0f / static_cast<float>(way.total);
    return t;
  }

  // ---- what one block transforms ----

  const char* spectrum(float2* to, void* stream) const {
    TransformParams t = transform_params({}, {}, false);
    t.rows.batch = t.rows.per_group = 1;
    t.from = Place::kTaps, t.to = Place::kSums, t.range.items = p.groups, t.sums = to;
    return transform(way.points, t, stream);
  }
  const char* windowed(const Rows& r, bool reversed, const float2* spectra, void* stream) const {
    TransformParams t = transform_params(r, windows(reversed), reversed);
    t.from = t.to = Place::kRows, t.range.items = p.groups * windows_of_group(), t.spectrum = spectra;
    return transform(way.points, t, stream);
  }

  // ---- what goes through memory ----

  // All stages of `items` rows or kernels, forward or back.
  const char* stages(bool forward, Place place, const Rows& r, const Windows& w, int64_t first_row, int64_t first_group,
                     int64_t items, float2* points, float* dk, float* dk_rev, void* stream) const {
    StageParams s{place, {first_row, first_group, items, 1}, way.total, way.total, r, w, kernels, points,
                  1.0f / static_cast<float>(way.total), dk, dk_rev};
    int count = 0;
    for (int size = way.total; size > way.points; size /= 16) ++count;
    Steps steps;
    for (int i = 0; i < count; ++i) {
      const int stage = forward ? i : count - 1 - i;
      s.size = way.total >> 4 * stage, s.place = stage == 0 ? place : Place::kPoints;
      steps(forward ? split(s, stream) : merge(s, stream));
    }
    return steps.error;
  }
  const char* staged_spectrum(int64_t first_group, int64_t groups, float2* to, void* stream) const {
    Steps steps;
    steps(stages(true, Place::kTaps, {}, {}, 0, first_group, groups, to, nullptr, nullptr, stream));
    TransformParams t = transform_params({}, {}, false);
    t.rows.batch = t.rows.per_group = 1;
    t.from = Place::kPoints, t.to = Place::kSums, t.range = {0, first_group, groups * way.subs(), way.subs()};
    t.points = t.sums = to;
    steps(transform(way.points, t, stream));
    return steps.error;
  }
  // For each part of the rows that fits: run(first group, groups, first row, rows), before all of some groups'
  // enter(first group, groups) and after them leave(first group, groups).
  template <class Enter, class Run, class Leave>
  const char* for_parts(int copies, Enter&& enter, Run&& run, Leave&& leave) const {
    const int64_t groups = some_groups(copies), most = some_rows(copies);
    Steps steps;
    for (int64_t g = 0; g < p.groups && steps.error == nullptr; g += groups) {
      const int64_t count = std::min(groups, p.groups - g), end = (g + count) * group_rows;
      steps(enter(g, count));
      for (int64_t row = g * group_rows; row < end && steps.error == nullptr; row += most)
        steps(run(g, count, row, std::min(most, end - row)));
      steps(leave(g, count));
    }
    return steps.error;
  }
  const char* staged(const Rows& r, bool reversed, float2* scratch, void* stream) const {
    const Windows w = windows(reversed);
    float2* const points = scratch + some_groups(1) * way.total;
    return for_parts(
        1, [&](int64_t g, int64_t groups) { return staged_spectrum(g, groups, scratch, stream); },
        [&](int64_t g, int64_t, int64_t row, int64_t rows_) {
          Steps steps;
          steps(stages(true, Place::kRows, r, w, row, g, rows_, points, nullptr, nullptr, stream));
          TransformParams t = transform_params(r, w, reversed);
          t.from = t.to = Place::kPoints, t.range = {row, g, rows_ * way.subs(), way.subs()};
          t.points = points, t.spectrum = scratch;
          steps(transform(way.points, t, stream));
          steps(stages(false, Place::kRows, r, w, row, g, rows_, points, nullptr, nullptr, stream));
          return steps.error;
        },
        [](int64_t, int64_t) -> const char* { return nullptr; });
  }
};

const char* convolve(const Call& call, const Rows& rows, bool reversed, float2* scratch, void* stream) {
  if (call.way.direct)
    return direct({rows, call.windows(reversed), call.kernels, reversed, call.p.groups * call.windows_of_group()},
                  stream);
  return call.way.staged() ? call.staged(rows, reversed, scratch, stream)
                           : call.windowed(rows, reversed, scratch, stream);
}

// What is wanted of a backward pass, and the rows that its parts read and write.
struct Gradients {
  const FFTConvBackwardParams& b;
  bool inputs;    // dskip comes with them
  bool gradient;  // the transform of dc is needed
  Rows x, dc;     // to dpost_gate; to du, dpre_gate and pieces of dskip

  Gradients(const Call& call, const FFTConvBackwardParams& b_, double* products)
      : b(b_), inputs(b_.du != nullptr || b_.dskip != nullptr), gradient(inputs || b_.dk != nullptr) {
    const FFTConvParams& p = call.p;
    const Strides2 contiguous{p.channels * p.length, p.length};
    x = call.rows(call.x(), {b.dpost_gate, b.dout, contiguous, b.dout_stride}, {});
    dc = call.rows({b.dout, p.post_gate, b.dout_stride, p.post_stride}, {b.du, p.pre_gate, contiguous, p.pre_stride},
                   {b.dpre_gate, p.u, contiguous, p.u_stride});
    if (b.dskip != nullptr) dc.products = products;
  }
};

const char* direct_gradients(const Call& call, const Gradients& wanted, void* memory, void* stream) {
  const FFTConvBackwardParams& b = wanted.b;
  Steps steps;
  if (wanted.inputs) steps(convolve(call, wanted.dc, true, nullptr, stream));
  if (b.dpost_gate != nullptr) steps(convolve(call, wanted.x, false, nullptr, stream));
  if (b.dk != nullptr)
    steps(direct_taps({wanted.x, wanted.dc.x, call.windows(), call.kernels, call.p.groups, call.windows_of_group(),
                       call.share(), call.parts(), static_cast<float*>(memory), static_cast<float*>(b.dk),
                       static_cast<float*>(b.dk_rev)},
                      stream));
  return steps.error;
}

// What the passes of `backward` are: as few as give what is wanted of du, dk and, if `post`, dpost_gate.
BackwardParams backward_params(const Call& call, const Gradients& wanted, bool post, float2* spectrum, float2* sums) {
  BackwardParams r{};
  r.inputs = wanted.inputs, r.same = wanted.gradient && call.whole(), r.spectrum = spectrum;
  r.sums = wanted.b.dk != nullptr ? sums : nullptr;
  // What a window owns of x lies where dc's does, which holds all samples that the owned ones' lags reach.
  Windows own = call.windows(true);
  own.own = true;
  r.passes[kOfX] = {wanted.x, own, nullptr};
  r.passes[kOfGradient] = {wanted.dc, call.windows(true), nullptr};
  r.passes[kOfPostGate] = {wanted.x, call.windows(), nullptr};
  r.first = !wanted.gradient ? kOfPostGate : r.sums != nullptr || (post && r.same) ? kOfX : kOfGradient;
  r.last = post ? kOfPostGate : kOfGradient;
  return r;
}
// From the sums of groups to their taps' gradients.
TransformParams of_sums(const Call& call, const Gradients& wanted, float2* sums, int parts) {
  TransformParams t = call.transform_params({}, {}, false);
  t.rows.batch = t.rows.per_group = 1;
  t.from = Place::kSums, t.to = Place::kTaps, t.sums = sums, t.parts = parts;
  t.dk = static_cast<float*>(wanted.b.dk), t.dk_rev = static_cast<float*>(wanted.b.dk_rev);
  return t;
}

const char* windowed_gradients(const Call& call, const Gradients& wanted, float2* memory, void* stream) {
  const bool post = wanted.b.dpost_gate != nullptr;
  if (!wanted.gradient && !post) return nullptr;
  float2* const sums = memory + call.p.groups * call.way.points;
  Steps steps;
  if (wanted.inputs || post) steps(call.spectrum(memory, stream));
  if (steps.error != nullptr) return steps.error;
  BackwardParams r = backward_params(call, wanted, post, memory, sums);
  r.from = Place::kRows, r.total = call.windows_of_group(), r.share = call.share(), r.parts = call.parts();
  r.range = {0, 0, call.p.groups * r.parts, 1};
  steps(backward(call.way.points, r, stream));
  if (r.sums == nullptr || steps.error != nullptr) return steps.error;
  TransformParams t = of_sums(call, wanted, sums, r.parts);
  t.range.items = call.p.groups;
  steps(transform(call.way.points, t, stream));
  return steps.error;
}

const char* staged_gradients(const Call& call, const Gradients& wanted, float2* memory, void* stream) {
  const int points = call.way.points, subs = call.way.subs();
  float2* const sums = memory + call.some_groups(2) * call.way.total;
  float2* const x_points = sums + call.some_groups(2) * call.way.total;
  float2* const dc_points = x_points + call.some_rows(2) * call.way.total;
  const bool post = wanted.b.dpost_gate != nullptr && wanted.gradient && call.whole();
  BackwardParams r = backward_params(call, wanted, post, memory, sums);
  r.from = Place::kPoints;
  r.passes[kOfX].points = r.passes[kOfPostGate].points = x_points, r.passes[kOfGradient].points = dc_points;
  const auto stages = [&](bool forward, int number, int64_t row, int64_t g, int64_t rows) {
    const Pass& pass = r.passes[number];
    return call.stages(forward, Place::kRows, pass.rows, pass.windows, row, g, rows, pass.points, nullptr, nullptr,
                       stream);
  };
  Steps steps;
  if (wanted.b.dpost_gate != nullptr && !post) steps(convolve(call, wanted.x, false, memory, stream));
  if (!wanted.gradient || steps.error != nullptr) return steps.error;
  steps(call.for_parts(
      2,
      [&](int64_t g, int64_t groups) {
        return wanted.inputs || post ? call.staged_spectrum(g, groups, memory, stream) : nullptr;
      },
      [&](int64_t g, int64_t groups, int64_t row, int64_t rows) {
        Steps parts;
        if (r.first == kOfX) parts(stages(true, kOfX, row, g, rows));
        parts(stages(true, kOfGradient, row, g, rows));
        r.add = row > g * call.group_rows, r.range = {row, g, groups * subs, subs};
        r.total = r.share = rows / groups, r.parts = 1;
        parts(backward(points, r, stream));
        if (r.inputs) parts(stages(false, kOfGradient, row, g, rows));
        if (post) parts(stages(false, kOfPostGate, row, g, rows));
        return parts.error;
      },
      [&](int64_t g, int64_t groups) -> const char* {
        if (r.sums == nullptr) return nullptr;
        Steps parts;
        TransformParams t = of_sums(call, wanted, sums, 1);
        t.to = Place::kPoints, t.range = {0, g, groups * subs, subs}, t.points = sums;
        parts(transform(points, t, stream));
        parts(call.stages(false, Place::kTaps, {}, {}, 0, g, groups, sums, t.dk, t.dk_rev, stream));
        return parts.error;
      }));
  return steps.error;
}

bool is_empty(const FFTConvParams& p) { return p.batch == 0 || p.channels == 0 || p.length == 0; }

const char* unsupported(const FFTConvParams& p) {
  if (p.dtype == DType::kFloat64) return "the CUDA kernels compute in float32";
  if (p.length > kLongest) return "rows have more than 2^28 samples; the cpu backend has no such limit";
  return nullptr;
}

}  // namespace
}  // namespace fft

int64_t fft_conv_fwd_scratch(const FFTConvParams& p) {
  if (fft::unsupported(p) != nullptr || fft::is_empty(p)) return 0;
  const fft::Call call(p);
  return call.way.direct ? 0 : call.way.staged() ? call.staged_floats(1) : call.spectrum_floats();
}

const char* fft_conv_fwd(const FFTConvParams& p, void* scratch, void* stream) {
  if (const char* reason = fft::unsupported(p)) return reason;
  if (fft::is_empty(p)) return nullptr;
  const fft::Call call(p);
  float2* const memory = static_cast<float2*>(scratch);
  fft::Steps steps;
  if (!call.way.direct && !call.way.staged()) steps(call.spectrum(memory, stream));
  const fft::Rows rows = call.rows(call.x(), {p.out, p.post_gate, p.out_stride, p.post_stride}, {});
  if (steps.error == nullptr) steps(fft::convolve(call, rows, false, memory, stream));
  return steps.error;
}

int64_t fft_conv_bwd_scratch(const FFTConvBackwardParams& b) {
  const FFTConvParams& p = b.forward;
  if (fft::unsupported(p) != nullptr || fft::is_empty(p)) return 0;
  const fft::Call call(p);
  const int64_t products = b.dskip != nullptr ? 2 * p.channels * call.pieces() : 0;
  if (call.way.staged()) return products + std::max(call.staged_floats(1), call.staged_floats(2));
  const int64_t sums = b.dk != nullptr ? int64_t{call.parts()} * p.groups : 0;
  return products + (call.way.direct ? sums * call.kernels.count()
                                     : call.spectrum_floats() + 2 * sums * call.way.points);
}

const char* fft_conv_bwd(const FFTConvBackwardParams& b, void* scratch, void* stream) {
  const FFTConvParams& p = b.forward;
  if (const char* reason = fft::unsupported(p)) return reason;
  if (fft::is_empty(p)) {
    const auto zero = [&](void* to, int64_t floats) -> const char* {
      if (to == nullptr || floats == 0) return nullptr;
      const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
      const cudaError_t failed = cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream));
      return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
    };
    fft::Steps steps;
    steps(zero(b.dk, p.groups * p.taps));
    steps(zero(b.dk_rev, p.groups * p.taps_rev));
    steps(zero(b.dskip, p.channels));
    return steps.error;
  }
  const fft::Call call(p);
  double* const products = static_cast<double*>(scratch);
  float2* const memory = reinterpret_cast<float2*>(products + (b.dskip != nullptr ? p.channels * call.pieces() : 0));
  const fft::Gradients wanted(call, b, products);
  fft::Steps steps;
  steps(call.way.direct     ? fft::direct_gradients(call, wanted, memory, stream)
        : call.way.staged() ? fft::staged_gradients(call, wanted, memory, stream)
                            : fft::windowed_gradients(call, wanted, memory, stream));
  if (steps.error == nullptr && b.dskip != nullptr)
    steps(fft::skip_gradient({p.channels, call.pieces(), products, static_cast<float*>(b.dskip)}, stream));
  return steps.error;
}

const char* fft_conv_kernels(int capability) {
  return capability >= 80 ? "sm_80 (fp32 transforms in shared memory)" : "none";
}

}  // namespace pykernels::cuda
