// Convolution by blocks of 256 samples, for vectors of 16 lanes: where a row is short, transforms that stay within the
// nearest cache, most of their operations fused, cost less than one over the whole row.
//
// U_i is the spectrum (plan.h, N = 256) of block i of the row, whose other half is zeros, and T_m that of the taps of
// lags 256 m + 0 .. 255. Multiplication by x^N is by i, so T_m - i T_{m-1} is the spectrum of the lags within 256 of
// 256 m, and block i of the outputs the first half of the inverse of
//     sum_m (T_m - i T_{m-1}) U_{i-m}.
// What wraps, and the lag 256 m - 256, fall into the second half, which is not computed.
//
// A transform is two of 16 points with a transposition between (n = 16 l + j, k = k1 + 16 k2), each of them two steps
// of 4. Four steps would take four stages that load and store all 16 complex vectors; the first two are one, since of
// real samples half of the outputs at a time leave room in the registers. The transposition exchanges the two bits of
// a row's number with two of a lane's twice, each time among four rows that a stage has in registers anyway. So lane
// a + 4 b of a spectrum is k1 = b + 4 a, and vector a of group b is k2 = b + 4 a: the constants say where things are.
//
// Products by twiddles are fused with the butterflies: with w = c (1 + i t), a +- w b are six multiply-adds instead of
// four operations for the product and four additions. The factors w^2 of the inverse, which include i, are not fused.
//
// What binds: multiply-adds read three registers each, and where nothing else runs a store of a whole vector delays
// them (96 take 48 cycles, with 24 stores 66; where half of them are additions or shuffles, 49). Hence as few stages as
// can be.
#pragma once

#include "conv.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {
namespace blocks {

constexpr int kVectors = kBlock / kBlockLanes;  // complex ones of a spectrum
template <class S>
constexpr int kGroup = 4 * kStep<S>;  // numbers of four complex vectors
template <class S>
constexpr int kNumbers = 4 * kGroup<S>;  // and of all
static_assert(kVectors == 16);

#define PYKERNELS_EACH(i, count) _Pragma("GCC unroll 1") for (int i = 0; i < count; ++i)

// ---- steps of four points -------------------------------------------------------------------------------------------

// Loaded once: what is used twice would become an operand in memory of each use, and there are but two loads per cycle.
template <class S>
PYKERNELS_INLINE Vec<S> take(const S* p) {
  Vec<S> x = load(p);
  asm("" : "+v"(x));
  return x;
}
template <class S>
PYKERNELS_INLINE Complex<S> take_complex(const S* p) {
  return {take(p), take(p + kLanes<S>)};
}
template <class S>
PYKERNELS_INLINE void take_four(Complex<S> (&x)[4], const S* from, int64_t apart) {
  PYKERNELS_REPEAT(4, i, { x[i] = take_complex(from + i * apart); });
}
template <class S>
PYKERNELS_INLINE void store_four(const Complex<S> (&x)[4], S* to, int64_t apart) {
  PYKERNELS_REPEAT(4, i, { store_complex<S>(to + i * apart, x[i]); });
}

// cos and sin of 2 pi m / 64
constexpr double cosine(int m) {
  m = (m < 0 ? -m : m) % 64;
  if (m > 32) m = 64 - m;
  return m <= 16 ? kCosine[m] : -kCosine[32 - m];
}
constexpr double sine(int m) { return cosine(m - 16); }

// A factor w = cosine (1 + i tangent) per lane, or e^{2 pi i M / 64} in all of them.
template <class S>
struct Factor {
  Vec<S> cosine, tangent;
};
template <int M>
struct Root {};

template <class S>
PYKERNELS_INLINE Factor<S> factor(const Turn<S>& turn) {
  return {take(turn.cosine), take(turn.tangent)};
}
template <class S>
PYKERNELS_INLINE Complex<S> factor(const Unit<S>& unit) {
  return {take(unit.cosine), take(unit.sine)};
}

// a, b <- a + i^R w b, a - i^R w b
template <int R, class S>
PYKERNELS_INLINE void butterfly(Complex<S>& a, Complex<S>& b, Factor<S> w) {
  const Vec<S> re = b.re - w.tangent * b.im, im = b.im + w.tangent * b.re, c = w.cosine;
  const Complex<S> x = a;
  if constexpr (R == 0) {
    a = {x.re + c * re, x.im + c * im};
    b = {x.re - c * re, x.im - c * im};
  } else if constexpr (R == 1) {
    a = {x.re - c * im, x.im + c * re};
    b = {x.re + c * im, x.im - c * re};
  } else {
    static_assert(R == -1);
    a = {x.re + c * im, x.im - c * re};
    b = {x.re - c * im, x.im + c * re};
  }
}
template <int R, class S>
PYKERNELS_INLINE void butterfly(Complex<S>& a, Complex<S>& b, Complex<S> w) {
  const Complex<S> x = a, y = rotate<(R + 4) % 4, 4, true, S>(b * w);
  a = x + y;
  b = x - y;
}
template <int R, class S, int M>
PYKERNELS_INLINE void butterfly(Complex<S>& a, Complex<S>& b, Root<M>) {
  if constexpr (M % 16 == 0) {
    const Complex<S> x = a, y = rotate<(R + M / 16 + 4) % 4, 4, true, S>(b);
    a = x + y;
    b = x - y;
  } else {
    constexpr S c = static_cast<S>(cosine(M)), t = static_cast<S>(sine(M) / cosine(M));
    butterfly<R, S>(a, b, Factor<S>{splat(c), splat(t)});
  }
}

// x_k <- sum_p w^p x_p e^{-+2 pi i p k / 4}, with w and w^2
template <bool Plus, class S, class W, class W2>
PYKERNELS_INLINE void dft4(Complex<S> (&x)[4], W w, W2 w2) {
  butterfly<0, S>(x[0], x[2], w2);
  butterfly<0, S>(x[1], x[3], w2);
  butterfly<0, S>(x[0], x[1], w);
  butterfly<Plus ? 1 : -1, S>(x[2], x[3], w);
  const Complex<S> second = x[1];
  x[1] = x[2];
  x[2] = second;
}

// Row r, lane 4 s + t <-> row t, lane 4 s + r; and row r, lane 4 s + t <-> row s, lane 4 r + t.
// Written out, as these orders of lanes are one instruction each without a register of indices: the registers are full.
template <class V>
PYKERNELS_INLINE void exchange_lanes(V& r0, V& r1, V& r2, V& r3) {
  const V a = __builtin_shufflevector(r0, r1, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const V b = __builtin_shufflevector(r0, r1, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const V c = __builtin_shufflevector(r2, r3, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const V d = __builtin_shufflevector(r2, r3, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  r0 = __builtin_shufflevector(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  r1 = __builtin_shufflevector(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  r2 = __builtin_shufflevector(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  r3 = __builtin_shufflevector(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
template <class V>
PYKERNELS_INLINE void exchange_quarters(V& r0, V& r1, V& r2, V& r3) {
  const V a = __builtin_shufflevector(r0, r1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const V b = __builtin_shufflevector(r0, r1, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const V c = __builtin_shufflevector(r2, r3, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const V d = __builtin_shufflevector(r2, r3, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  r0 = __builtin_shufflevector(a, c, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  r1 = __builtin_shufflevector(a, c, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  r2 = __builtin_shufflevector(b, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  r3 = __builtin_shufflevector(b, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
template <class S>
PYKERNELS_INLINE void exchange_lanes(Complex<S> (&x)[4]) {
  exchange_lanes(x[0].re, x[1].re, x[2].re, x[3].re);
  exchange_lanes(x[0].im, x[1].im, x[2].im, x[3].im);
}
template <class S>
PYKERNELS_INLINE void exchange_quarters(Complex<S> (&x)[4]) {
  exchange_quarters(x[0].re, x[1].re, x[2].re, x[3].re);
  exchange_quarters(x[0].im, x[1].im, x[2].im, x[3].im);
}

// ---- samples -> spectrum, P blocks together -------------------------------------------------------------------------
// In the arrays between stages, complex vector 4 a + b is at (4 a + b) kStep.

// The transform over l of e^{2 pi i l / 64} x_l, for k1 = B and B + 2 of 4, first over p of l = q + 4 p.
template <int B, class S>
PYKERNELS_INLINE void transform_half(const S* samples, S* to) {
  constexpr int lanes = kLanes<S>, m = 4 * (1 - 4 * B);  // in 64ths of a turn, per p
  constexpr S c1 = static_cast<S>(cosine(m)), s1 = static_cast<S>(sine(m));
  constexpr S c2 = static_cast<S>(cosine(2 * m)), s2 = static_cast<S>(sine(2 * m));
  constexpr S c = static_cast<S>(cosine(3 * m) / cosine(m)), s = static_cast<S>(sine(3 * m) / sine(m));
  Complex<S> x[2][4];
  PYKERNELS_REPEAT(4, q, {
    const Vec<S> x0 = load(samples + q * lanes), x1 = take(samples + (q + 4) * lanes);
    const Vec<S> x2 = take(samples + (q + 8) * lanes), x3 = take(samples + (q + 12) * lanes);
    const Complex<S> even = {x0 + c2 * x2, s2 * x2};
    const Vec<S> re = x1 + c * x3, im = x1 + s * x3;
    x[0][q] = {even.re + c1 * re, even.im + s1 * im};
    x[1][q] = {even.re - c1 * re, even.im - s1 * im};
  });
  PYKERNELS_REPEAT(2, i, {
    constexpr int b = B + 2 * i;
    dft4<false, S>(x[i], Root<1 - 4 * b>{}, Root<2 - 8 * b>{});
    exchange_lanes(x[i]);
    store_four(x[i], to + b * kGroup<S>, kStep<S>);
  });
}
template <int P, class S>
__attribute__((noinline)) void transform_samples(const S* samples, S* to) {
  PYKERNELS_EACH(n, P) {
    transform_half<0>(samples + n * kBlock, to + n * kNumbers<S>);
    transform_half<1>(samples + n * kBlock, to + n * kNumbers<S>);
  }
}
// That over j of e^{-2 pi i j (k1 - 1/4) / 256} x_j, two steps.
template <int P, class S>
__attribute__((noinline)) void transform_rows(const BlockFactors<S>& factors, const S* from, S* to) {
  const Factor<S> w = factor(factors.rows), w2 = factor(factors.rows_squared);
  PYKERNELS_EACH(n, P) PYKERNELS_EACH(q, 4) {
    const int64_t at = n * kNumbers<S> + q * kStep<S>;
    Complex<S> x[4];
    take_four(x, from + at, kGroup<S>);
    exchange_quarters(x);
    dft4<false, S>(x, w, w2);
    store_four(x, to + at, kGroup<S>);
  }
}
template <int P, class S>
__attribute__((noinline)) void transform_groups(const BlockFactors<S>& factors, const S* from, S* to, int64_t apart) {
  PYKERNELS_EACH(n, P) PYKERNELS_EACH(b, 4) {
    Complex<S> x[4];
    take_four(x, from + n * kNumbers<S> + b * kGroup<S>, kStep<S>);
    dft4<false, S>(x, factor(factors.groups[b]), factor(factors.groups_squared[b]));
    store_four(x, to + b * apart + n * kGroup<S>, kStep<S>);
  }
}

template <int P, class T, class S = Wide<T>>
PYKERNELS_INLINE void analyse(const BlockFactors<S>& factors, const Reader<T>& x, int64_t i, S* to, int64_t apart) {
  alignas(64) S buffer[P * kBlock], work[2][P * kNumbers<S>];
  constexpr int64_t part = P * kBlock * sizeof(T) / 4;  // a few lines at a time, so that loads need not wait
  const S* const samples = x.samples(i * kBlock, P * kBlock, buffer);
  x.ahead.fetch(part);
  transform_samples<P>(samples, work[0]);
  x.ahead.fetch(part);
  transform_rows<P>(factors, work[0], work[1]);
  x.ahead.fetch(part);
  transform_groups<P>(factors, work[1], to, apart);
  x.ahead.fetch(part);
}

// The spectra of the blocks [0, count) of x. Group b of block i is at b count kGroup + i kGroup, so that what is
// multiplied together lies together.
template <class T, class S = Wide<T>>
void analyse(const BlockFactors<S>& factors, const Reader<T>& x, int64_t count, S* spectra) {
  int64_t i = 0;
  for (; i + 1 < count; i += 2) analyse<2>(factors, x, i, spectra + i * kGroup<S>, count * kGroup<S>);
  if (i < count) analyse<1>(factors, x, i, spectra + i * kGroup<S>, count * kGroup<S>);
}

// The spectra of the windows of lags, from the taps w.
template <class S>
void kernel_spectra(const BlockFactors<S>& factors, const Taps& taps, const S* w, S* spectra) {
  const Windows windows(taps);
  Reader<S> lags{w, nullptr, taps.count(), windows.first * kBlock + taps.reverse, 0, taps.count(), false};
  analyse(factors, lags, windows.count(), spectra);
  const Vec<S> scale = splat(static_cast<S>(1.0 / kBlock));
  PYKERNELS_EACH(b, 4) {
    S* at = spectra + (b + 1) * windows.count() * kGroup<S>;
    for (int64_t m = windows.last; m >= windows.first; --m)
      PYKERNELS_EACH(a, 4) {
        at -= kStep<S>;
        const Complex<S> x = load_complex(at);
        const Complex<S> before = m > windows.first ? load_complex(at - kGroup<S>) : Complex<S>{};  // no lags there
        store_complex<S>(at, {(x.re + before.im) * scale, (x.im - before.re) * scale});
      }
  }
}

// ---- spectra -> outputs ---------------------------------------------------------------------------------------------

// Adds a block's share to blocks First, ..., First + Count - 1 of the outputs; `kernel`: the window for the first.
template <int First, int Count, int P, class S>
PYKERNELS_INLINE void add_products(Complex<S> (&sum)[P][4], const S* block, const S* kernel) {
  PYKERNELS_REPEAT(4, a, {
    const Complex<S> u = take_complex(block + a * kStep<S>);
    PYKERNELS_REPEAT(Count, i, {
      const Complex<S> k = take_complex(kernel + i * kGroup<S> + a * kStep<S>);
      Complex<S>& to = sum[First + i][a];
      to.re += k.re * u.re, to.im += k.re * u.im;
      to.re -= k.im * u.im, to.im += k.im * u.re;
    });
  });
}
// What blocks i, ..., i + P - 1 of the outputs are the inverse of, after its first step: over a in each group.
template <int P, class S>
__attribute__((noinline)) void convolve(const S* spectra, int64_t count, const S* kernel, const Windows& windows,
                                        int64_t i, S* to) {
  Complex<S> sum[P][4] = {};
  const auto block = [&](int64_t j) { return spectra + j * kGroup<S>; };
  const auto window = [&](int64_t m) { return kernel + (m - windows.first) * kGroup<S>; };
  const int64_t low = i + P - 1 - windows.last, high = i - windows.first;  // of the blocks that count for all
  if (P == 2 && low > 0) add_products<0, 1>(sum, block(low - 1), window(windows.last));
  for (int64_t j = most<int64_t>(low, 0); j <= least(high, count - 1); ++j)
    add_products<0, P>(sum, block(j), window(i - j));
  if (P == 2 && high + 1 < count) add_products<P - 1, 1>(sum, block(high + 1), window(windows.first));
  PYKERNELS_REPEAT(P, o, {
    dft4<true, S>(sum[o], Root<0>{}, Root<0>{});
    store_four(sum[o], to + (i + o) * kGroup<S>, kStep<S>);
  });
}

// The rest of the transform over k2, then that over k1 of e^{2 pi i j k1 / 256} x_k1, of which e^{-2 pi i n / 1024}
// times, the real part.
template <int P, class S>
__attribute__((noinline)) void invert_groups(const S* from, int64_t apart, S* to) {
  PYKERNELS_EACH(n, P) {
    PYKERNELS_REPEAT(4, b, {
      Complex<S> x[4];
      take_four(x, from + n * kGroup<S> + b * kStep<S>, apart);
      dft4<true, S>(x, Root<4 * b>{}, Root<8 * b>{});
      exchange_quarters(x);
      store_four(x, to + n * kNumbers<S> + b * kGroup<S>, kStep<S>);
    });
  }
}
template <int P, class S>
__attribute__((noinline)) void invert_rows(const BlockFactors<S>& factors, const S* from, S* to) {
  const Factor<S> w = factor(factors.inverse_rows);
  const Complex<S> w2 = factor(factors.inverse_rows_squared);
  PYKERNELS_EACH(n, P) PYKERNELS_EACH(q, 4) {
    const int64_t at = n * kNumbers<S> + q * kStep<S>;
    Complex<S> x[4];
    take_four(x, from + at, kGroup<S>);
    exchange_lanes(x);
    dft4<true, S>(x, w, w2);
    store_four(x, to + at, kGroup<S>);
  }
}
template <int P, class S>
__attribute__((noinline)) void invert_samples(const BlockFactors<S>& factors, const S* from, S* samples) {
  PYKERNELS_EACH(n, P) PYKERNELS_EACH(b, 4) {
    Complex<S> x[4];
    take_four(x, from + n * kNumbers<S> + b * kGroup<S>, kStep<S>);
    dft4<true, S>(x, factor(factors.inverse_groups[b]), factor(factors.inverse_groups_squared[b]));
    PYKERNELS_REPEAT(4, a, {
      const Turn<S>& turn = factors.last[b][a];
      store(samples + n * kBlock + (b + 4 * a) * kLanes<S>,
            load(turn.cosine) * (x[a].re + load(turn.tangent) * x[a].im));
    });
  }
}

template <int P, class S, class Write>
PYKERNELS_INLINE void synthesise(const BlockFactors<S>& factors, const S* sums, int64_t apart, int64_t i,
                                 const Write& write) {
  alignas(64) S samples[P * kBlock], work[2][P * kNumbers<S>];
  constexpr int64_t part = P * kBlock * Write::kSampleBytes / 8;
  invert_groups<P>(sums + i * kGroup<S>, apart, work[0]);
  write.ahead.fetch(part);
  invert_rows<P>(factors, work[0], work[1]);
  write.ahead.fetch(part);
  invert_samples<P>(factors, work[1], samples);
  write.ahead.fetch(2 * part);
  write.copy(i * kBlock, kLanes<S>, P * kVectors, samples);
}

// The blocks [0, count) of the outputs, from the spectra of the row and of the windows; `sums` takes as much as the
// former and, where no lags are negative, may be them.
template <class S, class Write>
void synthesise(const BlockFactors<S>& factors, const S* spectra, int64_t count, const S* kernel,
                const Windows& windows, S* sums, const Write& write) {
  const int64_t apart = count * kGroup<S>;
  // Group by group, so that what is read again and again stays in the nearest cache.
  PYKERNELS_EACH(b, 4) {
    const S* const u = spectra + b * apart;
    const S* const k = kernel + b * windows.count() * kGroup<S>;
    int64_t i = count;
    if (count % 2) convolve<1>(u, count, k, windows, i -= 1, sums + b * apart);
    while (i > 0) {
      convolve<2>(u, count, k, windows, i -= 2, sums + b * apart);
      write.ahead.fetch(kBlock * Write::kSampleBytes / 4);
    }
  }
  int64_t i = 0;
  for (; i + 1 < count; i += 2) synthesise<2>(factors, sums, apart, i, write);
  if (i < count) synthesise<1>(factors, sums, apart, i, write);
}

#undef PYKERNELS_EACH

}  // namespace blocks
}  // namespace fft
}  // namespace pykernels::cpu::PYKERNELS_ISA
