// What forward and backward share: the taps of a call, the way it is computed, and vectors of a row with its ends.
#pragma once

#include "../../include/pykernels/fft_conv.h"
#include "../common/pages.h"
#include "../common/scratch.h"
#include "fft.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {

// ---- the taps -------------------------------------------------------------------------------------------------------

// The taps that have an effect, one array w with the tap of lag l at l + reverse, -reverse <= l <= forward. Circular
// ones that together reach once around are taken modulo L, to lags 0 .. L - 1.
struct Taps {
  int64_t length, forward, reverse;
  bool circular, folded;

  explicit Taps(const FFTConvParams& p) : length(p.spectrum ? p.spectrum_length : p.length), circular(p.circular) {
    forward = p.taps - 1;
    reverse = p.taps_rev ? p.taps_rev - 1 + p.k_rev_lag : 0;
    folded = circular && forward + reverse >= length;
    if (folded || forward >= length) forward = length - 1;
    if (folded)
      reverse = 0;
    else if (reverse >= length)
      reverse = length - 1;
  }
  int64_t count() const { return forward + reverse + 1; }
  // Where the tap of a lag is in w, or -1.
  int64_t index(int64_t lag) const {
    if (folded) {
      const int64_t rest = lag % length;
      return rest < 0 ? rest + length : rest;
    }
    return lag > forward || lag < -reverse ? -1 : lag + reverse;
  }
};

template <class S>
void gather_taps(const FFTConvParams& p, const Taps& taps, int64_t group, S* w) {
  const S* const k = static_cast<const S*>(p.k) + group * p.taps;
  if (taps.folded) {
    __builtin_memset(w, 0, sizeof(S) * taps.count());
    for (int64_t i = 0; i < p.taps; ++i) w[taps.index(i)] += k[i];
  } else {
    __builtin_memset(w, 0, sizeof(S) * taps.reverse);
    __builtin_memcpy(w + taps.reverse, k, sizeof(S) * (taps.forward + 1));
  }
  if (!p.k_rev) return;
  const S* const k_rev = static_cast<const S*>(p.k_rev) + group * p.taps_rev;
  for (int64_t i = 0; i < p.taps_rev; ++i)
    if (const int64_t at = taps.index(-(i + p.k_rev_lag)); at >= 0) w[at] += k_rev[i];
}

// ---- the way --------------------------------------------------------------------------------------------------------

// Windows of lags: number m holds those within kBlock of m kBlock. From the first with a tap to the last with one, of
// those that reach from the first block of a row to its last.
struct Windows {
  int64_t first, last;

  explicit Windows(const Taps& taps)
      : first(-((taps.reverse + kBlock - 1) / kBlock)),
        last(least(taps.forward + kBlock - 1, taps.length - 1) / kBlock) {}
  int64_t count() const { return last - first + 1; }
};

// Taps directly; or by blocks of samples and windows of lags (blocks.h); or by transforms of N points, of windows of 2N
// samples that begin `before` samples before the first of their `step` outputs.
struct Way {
  bool direct, blocked;
  int64_t points, before, step, blocks;
};

// Nanoseconds per point of a convolution of 2^(8 + i) points, on one core of a Xeon of the Sapphire Rapids generation
// with AVX-512 (512 KiB of samples and more fall out of its second-level cache).
constexpr float kPointCost[] = {1.0f, 1.0f, 1.05f, 1.15f, 1.35f, 1.45f, 1.65f, 1.75f,
                                2.0f, 2.4f, 2.8f,  3.1f,  3.4f,  4.5f,  5.5f};
// And per tap and sample of a direct one (one vector load, which crosses cache lines, per tap and vector).
constexpr float kTapCost = 0.025f;

// Times this where N is 3 2^a; and in windows that overlap, whose second halves are not zeros.
constexpr double kThreeCost = 1.18, kOverlapCost = 1.15;
// Nanoseconds per block of samples (blocks.h), and per product of a block and a window.
constexpr double kBlockCost = 187, kProductCost = 13;

// Where a kernel's spectrum is made once for any number of rows.
constexpr int64_t kManyRows = int64_t{1} << 20;

// `blocked`: by blocks of samples, where that is cheapest; else not.
template <class S>
Way choose_way(const Taps& taps, int64_t rows, bool blocked) {
  const auto cost = [](int64_t points) {
    int i = 63 - __builtin_clzll(static_cast<uint64_t>(points)) - 8;
    constexpr int last = sizeof(kPointCost) / sizeof(kPointCost[0]) - 1;
    return static_cast<double>(points) * kPointCost[i < last ? i : last] * (points % 3 ? 1.0 : kThreeCost);
  };
  Way best{};
  double least = 0;
  const int64_t forward = taps.forward, reverse = taps.reverse, length = taps.length;
  // One window for the whole row. Where the ends do not wrap, what its own ends wrap into only has to miss the outputs.
  const int64_t ends = taps.circular ? forward + reverse : most(forward, reverse);
  best.points = points_for(length + ends), best.step = length, best.blocks = 1;
  best.before = taps.circular ? forward : 0;
  least = (static_cast<double>(rows) + 0.5) * cost(best.points);
  const int64_t whole = best.points;
  for (int64_t points = kLeastPoints; points < whole; points *= 2) {
    const int64_t step = 2 * points - forward - reverse;
    if (step < points / 2) continue;
    const int64_t blocks = (length + step - 1) / step;
    const double total = (static_cast<double>(rows * blocks) + 0.5) * cost(points) * kOverlapCost;
    if (total < least) least = total, best = {false, false, points, forward, step, blocks};
  }
  if (blocked && kLanes<S> == kBlockLanes && !taps.circular) {
    const Windows windows(taps);
    const int64_t blocks = (length + kBlock - 1) / kBlock;
    const int64_t products =
        blocks * windows.count() - (windows.last * (windows.last + 1) + windows.first * (windows.first - 1)) / 2;
    const double row = static_cast<double>(blocks) * kBlockCost + static_cast<double>(products) * kProductCost;
    const double total = static_cast<double>(rows) * row + 0.5 * static_cast<double>(windows.count()) * kBlockCost;
    if (total < least) least = total, best.blocked = true;
  }
  const double direct =
      static_cast<double>(rows) * static_cast<double>(length) * static_cast<double>(taps.count()) * kTapCost;
  if (direct < least) best.direct = true, best.blocked = false;
  return best;
}

// Numbers that a kernel takes which fft_conv_spectrum keeps for rows that go this way. Those of windows are an odd
// number of vectors, which no plan's are, so that one is not taken for the other.
template <class S>
int64_t kernel_numbers(const Taps& taps, const Way& way) {
  return way.direct    ? taps.count()
         : way.blocked ? Windows(taps).count() * 2 * kBlock + kLanes<S>
                       : plan<S>(way.points).size();
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Rows are read and written in places too far apart for the processor to see a pattern. Up to this length the next one
// is fetched meanwhile, from its start to its end, and stays in the second-level cache until it is needed.
constexpr int64_t kLongestAhead = 32768;

class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* row, int64_t length)
      : at_(reinterpret_cast<const char*>(row)), end_(at_ + (length <= kLongestAhead ? length * sizeof(T) : 0)) {}
  PYKERNELS_INLINE void fetch(int64_t bytes) {
    const char* const until = bytes < end_ - at_ ? at_ + bytes : end_;
#pragma GCC unroll 1
    for (; at_ < until; at_ += 64) __builtin_prefetch(at_);
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

// x = values gate at origin + i, as vectors; zero outside [low, high), and positions wrap where `wraps`.
template <class T>
struct Reader {
  using S = Wide<T>;
  const T* values;
  const T* gate;  // or null
  int64_t length, origin, low, high;
  bool wraps;
  mutable Ahead ahead{};  // a row that is written next

  PYKERNELS_INLINE Vec<S> operator()(int64_t i) const {
    constexpr int lanes = kLanes<S>;
    const int64_t n = origin + i;
    if (n >= most<int64_t>(low, 0) && n + lanes <= least(high, length)) return whole(n);
    if (n >= high || n + lanes <= low) return Vec<S>{};
    return edge(n);
  }
  PYKERNELS_INLINE void block(int64_t i, int64_t apart, int count, S* to) const {
    ahead.fetch(sizeof(T) * kLanes<S> * count);
    copy(i, apart, count, to);
  }
  // `count` samples from i on: where they lie, or else copied to `buffer`.
  PYKERNELS_INLINE const S* samples(int64_t i, int count, S* buffer) const {
    const int64_t n = origin + i;
    if constexpr (sizeof(T) == sizeof(S))
      if (!gate && n >= most<int64_t>(low, 0) && n + count <= least(high, length)) return values + n;
    copy(i, kLanes<S>, count / kLanes<S>, buffer);
    return buffer;
  }
  PYKERNELS_INLINE void copy(int64_t i, int64_t apart, int count, S* to) const {
    constexpr int lanes = kLanes<S>;
    const T* const from = values;
    const T* const factors = gate;
    const int64_t first = most<int64_t>(low, 0), last = least(high, length) - lanes;
    int64_t n = origin + i;
    int l = 0;
#pragma GCC unroll 1
    for (; l < count && n < first; ++l, n += apart) store(to + l * lanes, (*this)(n - origin));
    if (factors)
#pragma GCC unroll 4
      for (; l < count && n <= last; ++l, n += apart) store(to + l * lanes, load(from + n) * load(factors + n));
    else
#pragma GCC unroll 4
      for (; l < count && n <= last; ++l, n += apart) store(to + l * lanes, load(from + n));
#pragma GCC unroll 1
    for (; l < count; ++l, n += apart) store(to + l * lanes, (*this)(n - origin));
  }
  PYKERNELS_INLINE Vec<S> whole(int64_t n) const {
    const Vec<S> x = load(values + n);
    return gate ? x * load(gate + n) : x;
  }
  // The first `count` lanes.
  PYKERNELS_INLINE Vec<S> part(int64_t n, int64_t count) const {
    const Vec<S> x = load_upto(values + n, count);
    return gate ? x * load_upto(gate + n, count) : x;
  }
  __attribute__((noinline)) Vec<S> edge(int64_t n) const {
    constexpr int lanes = kLanes<S>;
    if (wraps && n >= low && n + lanes <= high) {
      const int64_t m = n < 0 ? n + length : n >= length ? n - length : n;
      if (m + lanes <= length) return whole(m);
    }
    S x[lanes];
    for (int l = 0; l < lanes; ++l) {
      int64_t m = n + l;
      x[l] = 0;
      if (m < low || m >= high) continue;
      if (m < 0) m += length;
      if (m >= length) m -= length;
      x[l] = to_float(values[m]);
      if (gate) x[l] *= to_float(gate[m]);
    }
    return load(x);
  }
};

// The lanes of v that fall into [low, high) when the first is at n, moved to the front.
template <class S>
struct Part {
  int64_t n, count;
  Vec<S> v;
};
template <class S>
__attribute__((noinline)) Part<S> cut(int64_t n, Vec<S> v, int64_t low, int64_t high) {
  constexpr int lanes = kLanes<S>;
  S x[2 * lanes] = {};
  store(x, v);
  const int64_t skip = most<int64_t>(low - n, 0);
  if (skip >= lanes) return {n, 0, v};
  return {n + skip, least<int64_t>(high - n, lanes) - skip, load(x + skip)};
}

// The kernel's spectrum, over N.
template <class S>
void kernel_spectrum(const Plan<S>& plan, const Taps& taps, const S* w, S* work, S* spectrum) {
  constexpr int lanes = kLanes<S>;
  const int64_t samples = 2 * plan.points, forward = taps.forward, reverse = taps.reverse;
  const auto read = [&](int64_t i) {
    if (i + lanes <= forward + 1) return load(w + reverse + i);
    if (i > forward && i + lanes <= samples - reverse) return Vec<S>{};
    S x[lanes];
    for (int l = 0; l < lanes; ++l) {
      const int64_t n = i + l;
      x[l] = n <= forward ? w[reverse + n] : n >= samples - reverse ? -w[reverse + n - samples] : 0;
    }
    return load(x);
  };
  if (reverse == 0 && forward < plan.points)
    analyse<true, S>(plan, read, work);
  else
    analyse<false, S>(plan, read, work);
  transform(plan, work, Keep<S>{spectrum, static_cast<S>(1.0 / static_cast<double>(plan.points))});
}

template <class S, class Read>
PYKERNELS_INLINE void analyse(bool half, const Plan<S>& plan, const Read& read, S* work) {
  if (half)
    analyse<true, S>(plan, read, work);
  else
    analyse<false, S>(plan, read, work);
}
template <class S, class Write>
PYKERNELS_INLINE void synthesise(bool half, const Plan<S>& plan, const S* work, const Write& write) {
  if (half)
    synthesise<true, S>(plan, work, write);
  else
    synthesise<false, S>(plan, work, write);
}

// sum x y, with the products of floats exact: what a gradient summed over a whole batch may cancel to is far smaller
// than its terms.
PYKERNELS_INLINE void add_products(Vec<double>& sum, Vec<double>&, Vec<float> x, Vec<float> y) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half a[2], b[2];
  __builtin_memcpy(a, &x, sizeof(x));
  __builtin_memcpy(b, &y, sizeof(y));
  for (int i = 0; i < 2; ++i)
    sum = sum + __builtin_convertvector(a[i], Vec<double>) * __builtin_convertvector(b[i], Vec<double>);
}
// Of doubles, what the additions round off is kept in `rest`.
PYKERNELS_INLINE void add_products(Vec<double>& sum, Vec<double>& rest, Vec<double> x, Vec<double> y) {
  const Vec<double> product = x * y, next = sum + product, rounded = next - sum;
  rest = rest + ((sum - (next - rounded)) + (product - rounded));
  sum = next;
}

// ---- directly -------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = 1024;  // outputs at a time: all buffers stay in the first-level cache

// out_n = sum_i w_i x_{n + taps - 1 - i} for n in [0, count) and up to the next whole vector.
template <class S>
__attribute__((noinline)) void convolve(S* out, const S* x, const S* w, int64_t taps, int64_t count) {
  constexpr int lanes = kLanes<S>, kVectors = 8;
  const S* const last = w + taps - 1;
  int64_t n = 0;
  for (; n + (kVectors - 1) * lanes < count; n += kVectors * lanes) {
    Vec<S> sum[kVectors] = {};
    for (int64_t i = 0; i < taps; ++i) {
      const Vec<S> tap = splat(last[-i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + tap * load(x + n + i + v * lanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + n + v * lanes, sum[v]);
  }
  for (; n < count; n += lanes) {
    Vec<S> sum{};
    for (int64_t i = 0; i < taps; ++i) sum = sum + splat(last[-i]) * load(x + n + i);
    store(out + n, sum);
  }
}

// dw_i += sum_n g_n x_{n + taps - 1 - i}
template <class S>
__attribute__((noinline)) void correlate(double* dw, const S* g, const S* x, int64_t taps, int64_t count) {
  constexpr int lanes = kLanes<S>, kTaps = 8;
  for (int64_t first = 0; first < taps; first += kTaps) {
    // The x of eight taps, the last first; taps beyond the end repeat the last.
    const int64_t shift = most<int64_t>(taps - kTaps - first, 0);
    const int here = static_cast<int>(least<int64_t>(kTaps, taps));
    Vec<S> sum[kTaps] = {};
    for (int64_t n = 0; n < count; n += lanes) {
      const Vec<S> value = load_upto(g + n, count - n);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) sum[t] = sum[t] + value * load(x + n + shift + (t < here ? t : 0));
    }
    for (int t = 0; t < here; ++t) {
      const int64_t i = taps - 1 - shift - t;
      if (i >= first) dw[i] += static_cast<double>(reduce_add<S>(sum[t]));
    }
  }
}

}  // namespace fft
}  // namespace pykernels::cpu::PYKERNELS_ISA
