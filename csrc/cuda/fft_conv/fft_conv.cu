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

  // The windows of x; of the gradient, for the transpose, whose lags are the negatives.
  Windows windows(bool reversed = false) const {
    const int ahead = reversed ? kernels.reverse : kernels.forward;
    const int behind = reversed ? kernels.forward : kernels.reverse;
    const int length = static_cast<int>(p.length);
    const bool whole = !way.direct && way.count == 1 && way.step == length && !p.circular;
    Windows w{way.count, whole ? 0 : ahead, way.step, 0, length, false};
    if (p.circular) w.low = -ahead, w.high = length + behind;
    return w;
  }
  Rows rows(const Signal& x, const Result& out, const Result& second) const {
    return {p.dtype, p.batch, per_group, static_cast<int>(p.length), x, static_cast<const float*>(p.skip), out, second};
  }
  Signal x() const { return {p.u, p.pre_gate, p.u_stride, p.pre_stride}; }

  int64_t windows_of_group() const { return group_rows * way.count; }
  int64_t spectrum_floats() const { return 2 * p.groups * int64_t{way.points}; }

  // How gradients of taps are split into parts: enough for every multiprocessor, of at least four windows each.
  int64_t share() const {
    const int64_t total = windows_of_group();
    const int64_t parts = std::max<int64_t>(1, std::min((total + 3) / 4, 1024 / p.groups));
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
  int64_t staged_floats(int copies) const {
    return 2 * way.total * (some_groups(copies) + some_rows(copies) * copies);
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
  const char* staged(const Rows& r, bool reversed, int copies, float2* scratch, void* stream) const {
    const Windows w = windows(reversed);
    float2* const points = scratch + some_groups(copies) * way.total;
    return for_parts(
        copies, [&](int64_t g, int64_t groups) { return staged_spectrum(g, groups, scratch, stream); },
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

const char* convolve(const Call& call, const Rows& rows, bool reversed, int copies, float2* scratch, void* stream) {
  if (call.way.direct)
    return direct({rows, call.windows(reversed), call.kernels, reversed, call.p.groups * call.windows_of_group()},
                  stream);
  return call.way.staged() ? call.staged(rows, reversed, copies, scratch, stream)
                           : call.windowed(rows, reversed, scratch, stream);
}

// dk and dk_rev, from x and dc.
const char* kernel_gradient(const Call& call, const FFTConvBackwardParams& b, const Rows& rows, const Signal& dc,
                            void* memory, void* stream) {
  const FFTConvParams& p = call.p;
  float* const dk = static_cast<float*>(b.dk);
  float* const dk_rev = static_cast<float*>(b.dk_rev);
  const int64_t total = call.windows_of_group(), share = call.share();
  const Windows windows = call.windows();
  Steps steps;
  if (call.way.direct)
    return direct_taps({rows, dc, windows, call.kernels, p.groups, total, share, call.parts(),
                        static_cast<float*>(memory), dk, dk_rev},
                       stream);
  // Windows of dc lie where x's do, and hold what they own.
  Windows own = windows;
  own.own = true;
  float2* const scratch = static_cast<float2*>(memory);
  CorrelateParams c{};
  c.rows = rows, c.dc = dc, c.windows = windows, c.dc_windows = own;
  TransformParams t = call.transform_params({}, {}, false);
  t.rows.batch = t.rows.per_group = 1;
  t.from = Place::kSums, t.to = Place::kTaps, t.dk = dk, t.dk_rev = dk_rev;
  if (!call.way.staged()) {
    c.from = Place::kRows, c.total = total, c.share = share, c.parts = call.parts();
    c.range = {0, 0, p.groups * c.parts, 1}, c.sums = scratch;
    steps(correlate(call.way.points, c, stream));
    t.range.items = p.groups, t.sums = scratch, t.parts = c.parts;
    steps(transform(call.way.points, t, stream));
    return steps.error;
  }
  const int subs = call.way.subs();
  float2* const x_points = scratch + call.some_groups(2) * call.way.total;
  float2* const dc_points = x_points + call.some_rows(2) * call.way.total;
  const Rows dc_rows = call.rows(dc, {}, {});
  return call.for_parts(
      2, [](int64_t, int64_t) -> const char* { return nullptr; },
      [&](int64_t g, int64_t groups, int64_t row, int64_t rows_) {
        Steps parts;
        parts(call.stages(true, Place::kRows, rows, windows, row, g, rows_, x_points, nullptr, nullptr, stream));
        parts(call.stages(true, Place::kRows, dc_rows, own, row, g, rows_, dc_points, nullptr, nullptr, stream));
        c.from = Place::kPoints, c.add = row > g * call.group_rows, c.range = {row, g, groups * subs, subs};
        c.x_points = x_points, c.dc_points = dc_points, c.sums = scratch;
        c.total = c.share = rows_ / groups, c.parts = 1;
        parts(correlate(call.way.points, c, stream));
        return parts.error;
      },
      [&](int64_t g, int64_t groups) {
        Steps parts;
        t.to = Place::kPoints, t.range = {0, g, groups * subs, subs}, t.points = t.sums = scratch, t.parts = 1;
        parts(transform(call.way.points, t, stream));
        parts(call.stages(false, Place::kTaps, {}, {}, 0, g, groups, scratch, dk, dk_rev, stream));
        return parts.error;
      });
}

bool is_empty(const FFTConvParams& p) { return p.batch == 0 || p.channels == 0 || p.length == 0; }

const char* unsupported(const FFTConvParams& p) {
  if (p.dtype == DType::kFloat64) return "the CUDA kernels compute in float32";
  if (p.length > kLongest) return "rows have more than 2^28 samples; the cpu backend has no such limit";
  return nullptr;
}

constexpr int kSkipShare = 8192;  // samples of a part
int64_t skip_parts(const FFTConvParams& p) { return (p.length + kSkipShare - 1) / kSkipShare; }

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
  if (steps.error == nullptr) steps(fft::convolve(call, rows, false, 1, memory, stream));
  return steps.error;
}

int64_t fft_conv_bwd_scratch(const FFTConvBackwardParams& b) {
  const FFTConvParams& p = b.forward;
  if (fft::unsupported(p) != nullptr || fft::is_empty(p)) return 0;
  const fft::Call call(p);
  const int64_t sums = int64_t{call.parts()} * p.groups;
  const int64_t skip = b.dskip != nullptr ? 2 * p.channels * fft::skip_parts(p) : 0;
  if (call.way.staged()) return std::max({call.staged_floats(1), b.dk != nullptr ? call.staged_floats(2) : 0, skip});
  const int64_t of_kernel = b.dk == nullptr ? 0 : sums * (call.way.direct ? call.kernels.count() : 2 * call.way.points);
  return std::max({call.way.direct ? 0 : call.spectrum_floats(), of_kernel, skip});
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
  const Strides2 contiguous{p.channels * p.length, p.length};
  float2* const memory = static_cast<float2*>(scratch);
  const fft::Signal x = call.x(), dc{b.dout, p.post_gate, b.dout_stride, p.post_stride};
  fft::Steps steps;
  if (!call.way.direct && !call.way.staged() && (b.du != nullptr || b.dpost_gate != nullptr))
    steps(call.spectrum(memory, stream));
  if (steps.error == nullptr && b.du != nullptr) {
    const fft::Rows rows =
        call.rows(dc, {b.du, p.pre_gate, contiguous, p.pre_stride}, {b.dpre_gate, p.u, contiguous, p.u_stride});
    steps(fft::convolve(call, rows, true, 1, memory, stream));
  }
  if (steps.error == nullptr && b.dpost_gate != nullptr) {
    const fft::Rows rows = call.rows(x, {b.dpost_gate, b.dout, contiguous, b.dout_stride}, {});
    steps(fft::convolve(call, rows, false, 1, memory, stream));
  }
  const fft::Rows rows = call.rows(x, {}, {});
  if (steps.error == nullptr && b.dk != nullptr) steps(fft::kernel_gradient(call, b, rows, dc, memory, stream));
  if (steps.error == nullptr && b.dskip != nullptr)
    steps(fft::skip_gradient({rows, dc, p.channels, fft::kSkipShare, static_cast<int>(fft::skip_parts(p)),
                              static_cast<double*>(scratch), static_cast<float*>(b.dskip)},
                             stream));
  return steps.error;
}

const char* fft_conv_kernels(int capability) {
  return capability >= 80 ? "sm_80 (fp32 transforms in shared memory)" : "none";
}

}  // namespace pykernels::cuda
