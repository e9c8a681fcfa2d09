#include "blocks.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {
namespace {

// out = post_gate (c + skip x), of vectors of c.
template <class T>
struct Output {
  using S = Wide<T>;
  static constexpr int64_t kSampleBytes = sizeof(T);
  T* out;
  const T* gate;  // or null
  const Reader<T>* x;
  Vec<S> skip;
  bool skips;
  int64_t origin, low, high;  // the outputs wanted
  mutable Ahead ahead{};      // a row that is read next

  PYKERNELS_INLINE void operator()(int64_t i, Vec<S> c) const {
    constexpr int lanes = kLanes<S>;
    const int64_t n = origin + i;
    if (n >= low && n + lanes <= high) {
      if (skips) c = c + skip * x->whole(n);
      if (gate) c = c * load(gate + n);
      store(out + n, c);
    } else if (n < high && n + lanes > low) {
      edge(cut<S>(n, c, low, high));
    }
  }
  PYKERNELS_INLINE void block(int64_t i, int64_t apart, int count, const S* from) const {
    ahead.fetch(sizeof(T) * kLanes<S> * count);
    copy(i, apart, count, from);
  }
  PYKERNELS_INLINE void copy(int64_t i, int64_t apart, int count, const S* from) const {
    constexpr int lanes = kLanes<S>;
    const Output to = *this;  // what is written could be a part of this, for all the compiler knows, but not of a copy
    const Reader<T> in = *x;
    int64_t n = origin + i;
    int l = 0;
#pragma GCC unroll 1
    for (; l < count && n < low; ++l, n += apart) (*this)(n - origin, load(from + l * lanes));
    if (to.skips && !to.gate && !in.gate)
#pragma GCC unroll 4
      for (; l < count && n + lanes <= to.high; ++l, n += apart)
        store(to.out + n, load(from + l * lanes) + to.skip * load(in.values + n));
#pragma GCC unroll 1
    for (; l < count && n + lanes <= to.high; ++l, n += apart) {
      Vec<S> c = load(from + l * lanes);
      if (to.skips) c = c + to.skip * in.whole(n);
      if (to.gate) c = c * load(to.gate + n);
      store(to.out + n, c);
    }
#pragma GCC unroll 1
    for (; l < count; ++l, n += apart) (*this)(n - origin, load(from + l * lanes));
  }
  __attribute__((noinline)) void edge(Part<S> part) const {
    if (skips) part.v = part.v + skip * x->part(part.n, part.count);
    if (gate) part.v = part.v * load_upto(gate + part.n, part.count);
    store_upto(out + part.n, part.v, part.count);
  }
};

template <class T>
void run(const FFTConvParams& p, const Parallel& parallel) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  if (p.batch == 0 || p.channels == 0 || p.length == 0) return;
  if (p.out_stride.batch == p.channels * p.length && p.out_stride.channel == p.length)
    want_huge_pages(p.out, sizeof(T) * static_cast<size_t>(p.batch * p.channels * p.length));
  const Taps taps(p);
  const int64_t rows = p.batch * (p.channels / p.groups);
  const Way way = choose_way<S>(taps, p.spectrum ? kManyRows : rows, true);
  const Plan<S>* const transform_plan = way.direct || way.blocked ? nullptr : &plan<S>(way.points);
  const int64_t row_blocks = (p.length + kBlock - 1) / kBlock;
  const int64_t wanted = 4 * parallel.threads;
  const int64_t chunks = p.groups >= wanted ? 1 : least(rows, (wanted + p.groups - 1) / p.groups);
  run_tasks(parallel, p.groups * chunks, [&](TaskQueue& queue) {
    Scratch scratch;
    const int64_t size = way.direct    ? 2 * kTile + taps.count() + 2 * lanes
                         : way.blocked ? row_blocks * 4 * kBlock
                                       : transform_plan->size();
    S* const work = scratch.take<S>(size);
    S* const w = scratch.take<S>(p.spectrum ? 1 : taps.count() + lanes);
    S* const transformed = scratch.take<S>(p.spectrum || way.direct ? 1 : kernel_numbers<S>(taps, way));
    const S* spectrum = way.direct ? w : transformed;  // what a row is convolved with
    int64_t kernel_of = -1;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t group = task / chunks, chunk = task % chunks;
      if (p.spectrum) {
        spectrum = static_cast<const S*>(p.spectrum) + group * kernel_numbers<S>(taps, way);
      } else if (group != kernel_of) {
        gather_taps(p, taps, group, w);
        if (way.blocked) {
          if constexpr (kLanes<S> == kBlockLanes) blocks::kernel_spectra(block_factors<S>(), taps, w, transformed);
        } else if (!way.direct) {
          kernel_spectrum(*transform_plan, taps, w, work, transformed);
        }
        kernel_of = group;
      }
      for (int64_t row = chunk * rows / chunks; row < (chunk + 1) * rows / chunks; ++row) {
        const int64_t channel = group * (p.channels / p.groups) + row / p.batch, b = row % p.batch;
        const auto at = [&](const void* x, const Strides2& stride) {
          return x ? static_cast<const T*>(x) + b * stride.batch + channel * stride.channel : nullptr;
        };
        Reader<T> x{at(p.u, p.u_stride), at(p.pre_gate, p.pre_stride), p.length, 0, 0, p.length, p.circular};
        if (p.circular) x.low = -taps.forward, x.high = p.length + taps.reverse;
        Output<T> out{static_cast<T*>(p.out) + b * p.out_stride.batch + channel * p.out_stride.channel,
                      at(p.post_gate, p.post_stride),
                      &x,
                      Vec<S>{},
                      p.skip != nullptr,
                      0,
                      0,
                      0};
        if (!way.direct) {
          const int64_t after = row + 1, next = group * (p.channels / p.groups) + after / p.batch;
          x.ahead = Ahead(out.out, p.length);
          if (after < (chunk + 1) * rows / chunks)
            out.ahead = Ahead(
                static_cast<const T*>(p.u) + after % p.batch * p.u_stride.batch + next * p.u_stride.channel, p.length);
        }
        if (p.skip) out.skip = splat(static_cast<const S*>(p.skip)[channel]);
        if (way.direct) {
          S* const c = work + kTile + taps.count() + lanes;
          for (int64_t first = 0; first < p.length; first += kTile) {
            const int64_t count = least(kTile, p.length - first);
            x.origin = first - taps.forward;
            for (int64_t i = 0; i < round_up(count, lanes) + taps.count() - 1; i += lanes) store(work + i, x(i));
            convolve(c, work, spectrum, taps.count(), count);
            out.origin = out.low = first, out.high = first + count;
            for (int64_t i = 0; i < count; i += lanes) out(i, load(c + i));
          }
          continue;
        }
        if (way.blocked) {
          if constexpr (kLanes<S> == kBlockLanes) {
            out.high = p.length;
            blocks::analyse(block_factors<S>(), x, row_blocks, work);
            S* const sums = taps.reverse ? work + row_blocks * 2 * kBlock : work;
            blocks::synthesise(block_factors<S>(), work, row_blocks, spectrum, Windows(taps), sums, out);
          }
          continue;
        }
        const Plan<S>& plan = *transform_plan;
        for (int64_t first = 0; first < p.length; first += way.step) {
          out.low = first, out.high = least(first + way.step, p.length);
          x.origin = out.origin = out.low - way.before;
          analyse(x.high <= x.origin + plan.points, plan, x, work);
          transform(plan, work, Convolve<S>{spectrum});
          synthesise(out.high <= out.origin + plan.points, plan, work, out);
        }
      }
    }
  });
}

}  // namespace
}  // namespace fft

void fft_conv_fwd(const FFTConvParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return fft::run<float>(params, parallel);
    case DType::kBFloat16:
      return fft::run<BFloat16>(params, parallel);
    case DType::kFloat16:
      return fft::run<Float16>(params, parallel);
    case DType::kFloat64:
      return fft::run<double>(params, parallel);
  }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
