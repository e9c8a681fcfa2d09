// c = A x with x = pre u, y = post (c + skip x). Per row, with dc = post dy:
//     dpost = dy (c + skip x)    dx = A^T dc + skip dc    du = pre dx    dpre = u dx    dskip = sum dc x    dw = sum of
//     dc and x lagged
// c is computed again. A block of overlap-save is a product with a spectrum between a window cut out of x and outputs
// cut out of the window; its transpose puts dc there, multiplies by the conjugate, and adds the window to dx.
#include "conv.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {
namespace {

// Where a gradient that is a sum over rows is added up depends on the shape alone, so that it does not on the thread
// count.
constexpr int64_t kChunks = 64;

// dpost = dy (c + skip x), of vectors of c.
template <class T>
struct PostGradient {
  using S = Wide<T>;
  T* dpost;
  const T* dy;
  const Reader<T>* x;
  Vec<S> skip;
  bool skips;
  int64_t origin, low, high;

  PYKERNELS_INLINE void operator()(int64_t i, Vec<S> c) const {
    constexpr int lanes = kLanes<S>;
    const int64_t n = origin + i;
    if (n >= low && n + lanes <= high) {
      if (skips) c = c + skip * x->whole(n);
      store(dpost + n, c * load(dy + n));
    } else if (n < high && n + lanes > low) {
      edge(cut<S>(n, c, low, high));
    }
  }
  __attribute__((noinline)) void edge(Part<S> part) const {
    if (skips) part.v = part.v + skip * x->part(part.n, part.count);
    store_upto(dpost + part.n, part.v * load_upto(dy + part.n, part.count), part.count);
  }
};

// Adds vectors to a row, where they fall into [low, high); positions wrap. `fresh`: the row is written for the first
// time.
template <class S>
struct Adder {
  S* row;
  int64_t length, origin, low, high;
  bool fresh;

  PYKERNELS_INLINE void operator()(int64_t i, Vec<S> v) const {
    constexpr int lanes = kLanes<S>;
    const int64_t n = origin + i;
    if (n >= most<int64_t>(low, 0) && n + lanes <= least(high, length))
      store(row + n, fresh ? v : load(row + n) + v);
    else if (n < high && n + lanes > low)
      edge(n, v);
  }
  __attribute__((noinline)) void edge(int64_t n, Vec<S> v) const {
    constexpr int lanes = kLanes<S>;
    for (int l = 0; l < lanes; ++l) {
      int64_t m = n + l;
      if (m < low || m >= high) continue;
      if (m < 0) m += length;
      if (m >= length) m -= length;
      row[m] = fresh ? v[l] : row[m] + v[l];
    }
  }
};

template <class T>
void run(const FFTConvBackwardParams& b, const Parallel& parallel) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  const FFTConvParams& p = b.forward;
  if (p.channels == 0) return;
  const bool of_x = b.du || b.dpre_gate, of_kernel = b.dk;
  const auto put_taps = [&](const Taps& taps, int64_t group, const auto* dw) {
    S* const dk = static_cast<S*>(b.dk) + group * p.taps;
    if (taps.folded) {
      for (int64_t i = 0; i < p.taps; ++i) dk[i] = static_cast<S>(dw[taps.index(i)]);
    } else {
      for (int64_t i = 0; i <= taps.forward; ++i) dk[i] = static_cast<S>(dw[taps.reverse + i]);
      for (int64_t i = taps.forward + 1; i < p.taps; ++i) dk[i] = 0;
    }
    if (!p.k_rev) return;
    S* const dk_rev = static_cast<S*>(b.dk_rev) + group * p.taps_rev;
    for (int64_t i = 0; i < p.taps_rev; ++i) {
      const int64_t at = taps.index(-(i + p.k_rev_lag));
      dk_rev[i] = at < 0 ? 0 : static_cast<S>(dw[at]);
    }
  };
  if (p.batch == 0 || p.length == 0) {
    if (of_kernel) {
      __builtin_memset(b.dk, 0, sizeof(S) * p.groups * p.taps);
      if (p.k_rev) __builtin_memset(b.dk_rev, 0, sizeof(S) * p.groups * p.taps_rev);
    }
    if (b.dskip) __builtin_memset(b.dskip, 0, sizeof(S) * p.channels);
    return;
  }

  void* const gradients[] = {b.du, b.dpre_gate, b.dpost_gate};
  for (void* gradient : gradients)
    if (gradient) want_huge_pages(gradient, sizeof(T) * static_cast<size_t>(p.batch * p.channels * p.length));
  const Taps taps(p);
  const int64_t count = taps.count(), per_group = p.channels / p.groups, rows = p.batch * per_group;
  const Way way = choose_way<S>(taps, rows, false);
  const Plan<S>* const transform_plan = way.direct ? nullptr : &plan<S>(way.points);
  const int64_t chunks = p.groups >= kChunks ? 1 : least(rows, (kChunks + p.groups - 1) / p.groups);
  Scratch shared;
  // Sums of a chunk's rows. A chunk is a range of rows, channel by channel: [groups, chunks, taps] and [channels,
  // chunks].
  S* const chunk_taps = shared.take<S>(of_kernel && chunks > 1 ? p.groups * chunks * count : 1);
  double* const chunk_skip = shared.take<double>(b.dskip ? p.channels * chunks : 1);
  if (b.dskip)
    for (int64_t i = 0; i < p.channels * chunks; ++i) chunk_skip[i] = 0;

  run_tasks(parallel, p.groups * chunks, [&](TaskQueue& queue) {
    Scratch scratch;
    const int64_t window = kTile + count + 2 * lanes, size = way.direct ? window : transform_plan->size();
    S* const w = scratch.take<S>(count + lanes);
    S* const work = scratch.take<S>(size);
    S* const kept = scratch.take<S>(size);                                   // the window of x, its spectrum
    S* const spectrum = scratch.take<S>(way.direct ? count + lanes : size);  // directly: the taps in reverse order
    S* const sum = scratch.take<S>(way.direct || !of_kernel ? 1 : size);
    double* const dw = scratch.take<double>(of_kernel && way.direct ? count : 1);
    S* const row_sum = scratch.take<S>((way.direct ? kTile : of_x ? p.length : 1) + lanes);
    int64_t kernel_of = -1;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t group = task / chunks, chunk = task % chunks;
      if (group != kernel_of) {
        gather_taps(p, taps, group, w);
        if (way.direct)
          for (int64_t i = 0; i < count; ++i) spectrum[i] = w[count - 1 - i];
        else
          kernel_spectrum(*transform_plan, taps, w, work, spectrum);
        kernel_of = group;
      }
      if (of_kernel) {
        if (way.direct)
          for (int64_t i = 0; i < count; ++i) dw[i] = 0;
        else
          for (int64_t i = 0; i < size; ++i) sum[i] = 0;
      }
      for (int64_t row = chunk * rows / chunks; row < (chunk + 1) * rows / chunks; ++row) {
        const int64_t channel = group * per_group + row / p.batch, entry = row % p.batch;
        const auto at = [&](const void* x, const Strides2& stride) {
          return x ? static_cast<const T*>(x) + entry * stride.batch + channel * stride.channel : nullptr;
        };
        const auto to = [&](void* x) {
          return x ? static_cast<T*>(x) + (entry * p.channels + channel) * p.length : nullptr;
        };
        Reader<T> x{at(p.u, p.u_stride), at(p.pre_gate, p.pre_stride), p.length, 0, 0, p.length, p.circular};
        Reader<T> dc{at(b.dout, b.dout_stride), at(p.post_gate, p.post_stride), p.length, 0, 0, p.length, p.circular};
        const Vec<S> skip = p.skip ? splat(static_cast<const S*>(p.skip)[channel]) : Vec<S>{};
        PostGradient<T> post{to(b.dpost_gate), dc.values, &x, skip, p.skip != nullptr, 0, 0, 0};
        T* const du = to(b.du);
        T* const dpre = to(b.dpre_gate);
        double* const dskip = b.dskip ? chunk_skip + channel * chunks + chunk : nullptr;

        const int64_t after = row + 1, next = group * per_group + after / p.batch;
        const T* const next_u =
            p.length <= kLongestAhead && after < (chunk + 1) * rows / chunks
                ? static_cast<const T*>(p.u) + after % p.batch * p.u_stride.batch + next * p.u_stride.channel
                : nullptr;

        // What follows from A^T dc at positions [first, last), given from there on.
        const auto finish = [&](const S* transposed, int64_t first, int64_t last) {
          for (int64_t tile = first; tile < last; tile += kTile) {
            Vec<double> skip_sum{}, skip_rest{};
            for (int64_t n = tile; n < least(tile + kTile, last); n += lanes) {
              const int64_t left = last - n;
              if (next_u) __builtin_prefetch(next_u + n);
              const Vec<S> d = dc.part(n, left);
              if (dskip) add_products(skip_sum, skip_rest, d, x.part(n, left));
              if (!of_x) continue;
              Vec<S> dx = load(transposed + n - first);
              if (p.skip) dx = dx + skip * d;
              if (dpre) store_upto(dpre + n, dx * load_upto(x.values + n, left), left);
              if (du) store_upto(du + n, x.gate ? dx * load_upto(x.gate + n, left) : dx, left);
            }
            if (dskip) *dskip += reduce_add<double>(skip_sum + skip_rest);
          }
        };

        if (way.direct) {
          if (p.circular) {
            x.low = -taps.forward, x.high = p.length + taps.reverse;
            dc.low = -taps.reverse, dc.high = p.length + taps.forward;
          }
          for (int64_t first = 0; first < p.length; first += kTile) {
            const int64_t here = least(kTile, p.length - first);
            x.origin = first - taps.forward, dc.origin = first - taps.reverse;
            for (int64_t i = 0; i < round_up(here, lanes) + count - 1; i += lanes)
              store(kept + i, x(i)), store(work + i, dc(i));
            if (post.dpost) {
              convolve(row_sum, kept, w, count, here);
              post.origin = post.low = first, post.high = first + here;
              for (int64_t i = 0; i < here; i += lanes) post(i, load(row_sum + i));
            }
            if (of_x) convolve(row_sum, work, spectrum, count, here);
            if (of_kernel) correlate(dw, work + taps.reverse, kept, count, here);
            finish(row_sum, first, first + here);
          }
          continue;
        }

        const Plan<S>& plan = *transform_plan;
        if (p.circular) x.low = -taps.forward, x.high = p.length + taps.reverse;
        const bool fresh = way.blocks == 1 && !p.circular;  // one window, and nothing of it wraps into the row
        if (of_x && !fresh) __builtin_memset(row_sum, 0, sizeof(S) * p.length);
        x.ahead = Ahead(dc.values, p.length);
        if (du) dc.ahead = Ahead(du, p.length);
        for (int64_t block = 0; block < way.blocks; ++block) {
          const int64_t first = block * way.step, last = least(first + way.step, p.length), origin = first - way.before;
          if (of_kernel || post.dpost) {
            x.origin = origin;
            analyse(x.high <= origin + plan.points, plan, x, work);
            if (post.dpost) {
              transform(plan, work, KeepAndConvolve<S>{kept, spectrum});
              post.origin = origin, post.low = first, post.high = last;
              synthesise(last <= origin + plan.points, plan, work, post);
            } else {
              transform(plan, work, Keep<S>{kept, 1});
            }
          }
          if (!of_x && !of_kernel) continue;
          dc.origin = origin, dc.low = first, dc.high = last;
          analyse(last <= origin + plan.points, plan, dc, work);
          if (!of_x) {
            transform(plan, work, Correlate<S, false, true>{spectrum, kept, sum});
            continue;
          }
          if (of_kernel)
            transform(plan, work, Correlate<S, true, true>{spectrum, kept, sum});
          else
            transform(plan, work, Correlate<S, true, false>{spectrum, kept, sum});
          const int64_t low = p.circular ? -taps.forward : 0, high = p.circular ? p.length + taps.reverse : p.length;
          synthesise(high <= origin + plan.points, plan, work, Adder<S>{row_sum, p.length, origin, low, high, fresh});
        }
        finish(row_sum, 0, p.length);
      }

      if (!of_kernel) continue;
      S* const sums = chunks > 1 ? chunk_taps + task * count : w;
      if (way.direct) {
        for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<S>(dw[i]);
      } else {
        const Plan<S>& plan = *transform_plan;
        const int64_t samples = 2 * plan.points;
        const S scale = static_cast<S>(1.0 / static_cast<double>(plan.points));
        transform(plan, sum, Invert<S>{});
        const auto write = [&](int64_t i, Vec<S> v) {
          v = v * scale;
          if (i + lanes <= taps.forward + 1) {
            store(sums + taps.reverse + i, v);
          } else if (i <= taps.forward || i + lanes > samples - taps.reverse) {
            for (int l = 0; l < lanes; ++l) {
              const int64_t n = i + l;
              if (n <= taps.forward)
                sums[taps.reverse + n] = v[l];
              else if (n >= samples - taps.reverse)
                sums[taps.reverse + n - samples] = -v[l];
            }
          }
        };
        synthesise(taps.reverse == 0 && taps.forward < plan.points, plan, sum, write);
      }
      if (chunks == 1) put_taps(taps, group, sums), kernel_of = -1;  // the sums took the place of the taps
    }
  });

  if (of_kernel && chunks > 1)
    run_tasks(parallel, p.groups, [&](TaskQueue& queue) {
      Scratch scratch;
      double* const total = scratch.take<double>(count);
      for (int64_t group; (group = queue.next()) >= 0;) {
        for (int64_t i = 0; i < count; ++i) total[i] = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const S* const part = chunk_taps + (group * chunks + chunk) * count;
          for (int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(part[i]);
        }
        put_taps(taps, group, total);
      }
    });
  if (b.dskip)
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += chunk_skip[channel * chunks + chunk];
      static_cast<S*>(b.dskip)[channel] = static_cast<S>(total);
    }
}

}  // namespace
}  // namespace fft

void fft_conv_bwd(const FFTConvBackwardParams& params, const Parallel& parallel) {
  switch (params.forward.dtype) {
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
