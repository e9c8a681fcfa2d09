// The transforms of plan.h on one work array: analysis (samples -> lanes and their first pass), the passes in each
// lane, synthesis.
//
// The passes go depth first: a block is split, its parts go all the way to the leaves and back while they are in cache,
// then the block is put together. Leaves do what is done with the spectrum (a Mode), in the order in which the passes
// leave it: nothing is ever put in natural order.
#pragma once

#include "plan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {

// ---- complex vectors ------------------------------------------------------------------------------------------------

template <class S>
struct Complex {
  Vec<S> re, im;
};
template <class S>
PYKERNELS_INLINE Complex<S> operator+(Complex<S> a, Complex<S> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class S>
PYKERNELS_INLINE Complex<S> operator-(Complex<S> a, Complex<S> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class S>
PYKERNELS_INLINE Complex<S> operator*(Complex<S> a, Complex<S> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// a conj(b)
template <class S>
PYKERNELS_INLINE Complex<S> times_conj(Complex<S> a, Complex<S> b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
template <bool Conjugate, class S>
PYKERNELS_INLINE Complex<S> times(Complex<S> a, Complex<S> b) {
  return Conjugate ? times_conj<S>(a, b) : a * b;
}
template <class S>
PYKERNELS_INLINE Complex<S> load_complex(const S* p) {
  return {load(p), load(p + kLanes<S>)};
}
template <class S>
PYKERNELS_INLINE void store_complex(S* p, Complex<S> x) {
  store(p, x.re);
  store(p + kLanes<S>, x.im);
}
template <class S>
PYKERNELS_INLINE Complex<S> splat_complex(const S* p) {
  return {splat(p[0]), splat(p[1])};
}

// Calls f(Index<0>{}), f(Index<1>{}), ...: indices that are constants inside.
template <int N>
struct Index {
  static constexpr int value = N;
};
template <class F, size_t... I>
PYKERNELS_INLINE void repeat(F&& f, std::index_sequence<I...>) {
  (f(Index<static_cast<int>(I)>{}), ...);
}
#define PYKERNELS_REPEAT(n, i, ...)                           \
  ::pykernels::cpu::PYKERNELS_ISA::fft::repeat(               \
      [&](auto index_of_##i) __attribute__((always_inline)) { \
        constexpr int i = decltype(index_of_##i)::value;      \
        __VA_ARGS__                                           \
      },                                                      \
      std::make_index_sequence<n>{})

// cos(2 pi m / 64) for m = 0 .. 16.
constexpr double kCosine[17] = {1.0,
                                0.99518472667219688624,
                                0.98078528040323044913,
                                0.95694033573220886494,
                                0.92387953251128675613,
                                0.88192126434835502971,
                                0.83146961230254523708,
                                0.77301045336273696081,
                                0.70710678118654752440,
                                0.63439328416364549822,
                                0.55557023301960222474,
                                0.47139673682599764856,
                                0.38268343236508977173,
                                0.29028467725446236764,
                                0.19509032201612826785,
                                0.09801714032956060199,
                                0.0};

// x e^{-2 pi i M / R}, or with the sign changed x e^{+2 pi i M / R}, for M / R < 1.
template <int M, int R, bool Plus, class S>
PYKERNELS_INLINE Complex<S> rotate(Complex<S> x) {
  if constexpr (M == 0) {
    return x;
  } else if constexpr (2 * M >= R) {
    const Complex<S> y = rotate<M - R / 2, R, Plus, S>(x);
    return {-y.re, -y.im};
  } else if constexpr (4 * M == R) {
    return Plus ? Complex<S>{-x.im, x.re} : Complex<S>{x.im, -x.re};
  } else if constexpr (8 * M == R) {
    constexpr S h = static_cast<S>(kCosine[8]);
    return Plus ? Complex<S>{(x.re - x.im) * h, (x.im + x.re) * h} : Complex<S>{(x.re + x.im) * h, (x.im - x.re) * h};
  } else if constexpr (8 * M == 3 * R) {
    constexpr S h = static_cast<S>(kCosine[8]);
    return Plus ? Complex<S>{(x.re + x.im) * -h, (x.re - x.im) * h} : Complex<S>{(x.im - x.re) * h, (x.re + x.im) * -h};
  } else {
    constexpr int m = 64 / R * M;
    constexpr S c = static_cast<S>(m <= 16 ? kCosine[m] : -kCosine[32 - m]);
    constexpr S s = static_cast<S>(m <= 16 ? kCosine[16 - m] : kCosine[m - 16]) * (Plus ? -1 : 1);
    return {x.re * c + x.im * s, x.im * c - x.re * s};
  }
}

// The transform over the R vectors x, natural order in and out; Plus: with the sign of the inverse, not scaled.
template <int R, bool Plus, class S>
PYKERNELS_INLINE void dft(Complex<S> (&x)[R]) {
  if constexpr (R == 2) {
    const Complex<S> a = x[0];
    x[0] = a + x[1];
    x[1] = a - x[1];
  } else if constexpr (R == 3) {
    constexpr S h = static_cast<S>(0.86602540378443864676) * (Plus ? -1 : 1);
    const Complex<S> sum = x[1] + x[2], difference = x[1] - x[2];
    const Complex<S> middle = {x[0].re - sum.re * static_cast<S>(0.5), x[0].im - sum.im * static_cast<S>(0.5)};
    x[0] = x[0] + sum;
    x[1] = {middle.re + difference.im * h, middle.im - difference.re * h};
    x[2] = {middle.re - difference.im * h, middle.im + difference.re * h};
  } else if constexpr (R == 4) {
    const Complex<S> a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = rotate<1, 4, Plus, S>(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else {
    constexpr int Q = R / 4;  // n = q + Q p -> k = b + 4 a
    Complex<S> y[4][Q];
    PYKERNELS_REPEAT(Q, q, {
      Complex<S> z[4] = {x[q], x[q + Q], x[q + 2 * Q], x[q + 3 * Q]};
      dft<4, Plus, S>(z);
      y[0][q] = z[0], y[1][q] = rotate<q, R, Plus, S>(z[1]);
      y[2][q] = rotate<2 * q, R, Plus, S>(z[2]), y[3][q] = rotate<3 * q, R, Plus, S>(z[3]);
    });
    PYKERNELS_REPEAT(4, b, {
      dft<Q, Plus, S>(y[b]);
      PYKERNELS_REPEAT(Q, a, { x[b + 4 * a] = y[b][a]; });
    });
  }
}

// ---- samples <-> lanes ----------------------------------------------------------------------------------------------

// e^{-2 pi i j (k1 - 1/4) / N} for the vector of j that starts at `at`, k1 = K1.
template <int K1, class S>
PYKERNELS_INLINE Complex<S> first_factor(const S* at) {
  const Complex<S> of_b = load_complex(at + K1 % kInner<S> * kStep<S>);
  if constexpr (K1 < kInner<S>)
    return of_b;
  else
    return of_b * load_complex(at + (kInner<S> + K1 / kInner<S> - 1) * kStep<S>);
}

// `count` vectors of samples, `apart` from one to the next, between `read` or `write` and an array. Those that have a
// function for it ask where a vector lies once for many: asked for each one, that costs as much as its arithmetic.
template <class S, class Read>
PYKERNELS_INLINE void read_block(const Read& read, int64_t i, int64_t apart, int count, S* to) {
  if constexpr (requires { read.block(i, apart, count, to); }) {
    read.block(i, apart, count, to);
  } else {
#pragma GCC unroll 1
    for (int l = 0; l < count; ++l) store(to + l * kLanes<S>, read(i + l * apart));
  }
}
template <class S, class Write>
PYKERNELS_INLINE void write_block(const Write& write, int64_t i, int64_t apart, int count, const S* from) {
  if constexpr (requires { write.block(i, apart, count, from); }) {
    write.block(i, apart, count, from);
  } else {
#pragma GCC unroll 1
    for (int l = 0; l < count; ++l) write(i + l * apart, load(from + l * kLanes<S>));
  }
}

// The lanes of j, j + 1, ... , as many vectors as there are lanes, from read(i), which gives the vector of samples i, i
// + 1, ... Half: the samples from N on are zero.
template <bool Half, class S, class Read>
PYKERNELS_INLINE void analyse_block(const Plan<S>& plan, const Read& read, int64_t j, S* to) {
  constexpr int lanes = kLanes<S>;
  const S* const factors = plan.first + j / lanes * (kInner<S> + kOuter<S> - 1) * kStep<S>;
  alignas(64) S samples[(Half ? 1 : 2) * lanes * lanes];
  read_block<S>(read, j, plan.length, lanes, samples);
  if constexpr (!Half) read_block<S>(read, plan.points + j, plan.length, lanes, samples + lanes * lanes);
  Complex<S> x[lanes];
  PYKERNELS_REPEAT(lanes, l, {
    const Vec<S> re = load(samples + l * lanes);
    if constexpr (Half) {
      // Times e^{2 pi i l / 4V}, of real numbers.
      constexpr S c = static_cast<S>(kCosine[16 / lanes * l]);
      constexpr S s = static_cast<S>(kCosine[16 - 16 / lanes * l]);
      x[l] = {re * c, re * s};
    } else {
      x[l] = rotate<l, 4 * lanes, true, S>({re, load(samples + (lanes + l) * lanes)});
    }
  });
  dft<lanes, false, S>(x);
  Vec<S> re[lanes];
  Vec<S> im[lanes];
  PYKERNELS_REPEAT(lanes, k, {
    const Complex<S> y = x[k] * first_factor<k, S>(factors);
    re[k] = y.re, im[k] = y.im;
  });
  transpose(re);
  transpose(im);
  PYKERNELS_REPEAT(lanes, i, { store_complex<S>(to + i * kStep<S>, {re[i], im[i]}); });
}

// The reverse: write(i, vector) takes the samples i, i + 1, ..., N times too large; Half: those from N on are not
// needed.
template <bool Half, class S, class Write>
PYKERNELS_INLINE void synthesise_block(const Plan<S>& plan, const S* from, int64_t j, const Write& write) {
  constexpr int lanes = kLanes<S>;
  const S* const factors = plan.first + j / lanes * (kInner<S> + kOuter<S> - 1) * kStep<S>;
  Vec<S> re[lanes];
  Vec<S> im[lanes];
  PYKERNELS_REPEAT(lanes, i, {
    re[i] = load(from + i * kStep<S>);
    im[i] = load(from + i * kStep<S> + lanes);
  });
  transpose(re);
  transpose(im);
  Complex<S> x[lanes];
  PYKERNELS_REPEAT(lanes, k, { x[k] = times_conj<S>({re[k], im[k]}, first_factor<k, S>(factors)); });
  dft<lanes, true, S>(x);
  alignas(64) S samples[(Half ? 1 : 2) * lanes * lanes];
  PYKERNELS_REPEAT(lanes, l, {
    if constexpr (Half) {
      constexpr S c = static_cast<S>(kCosine[16 / lanes * l]);
      constexpr S s = static_cast<S>(kCosine[16 - 16 / lanes * l]);
      store(samples + l * lanes, x[l].re * c + x[l].im * s);
    } else {
      const Complex<S> y = rotate<l, 4 * lanes, false, S>(x[l]);
      store(samples + l * lanes, y.re);
      store(samples + (lanes + l) * lanes, y.im);
    }
  });
  write_block<S>(write, j, plan.length, lanes, samples);
  if constexpr (!Half) write_block<S>(write, plan.points + j, plan.length, lanes, samples + lanes * lanes);
}

// ---- in each lane ---------------------------------------------------------------------------------------------------

// Splits R parts of `size` vectors, part r at from + r * from_apart, into as many; Back: puts them together.
template <int R, bool Back, class S>
PYKERNELS_INLINE void butterflies(const S* from, int64_t from_apart, S* to, int64_t to_apart, int64_t size,
                                  const S* twiddle) {
  for (int64_t j = 0; j < size; ++j, from += kStep<S>, to += kStep<S>, twiddle += 2 * (R - 1)) {
    Complex<S> x[R];
    PYKERNELS_REPEAT(R, r, {
      x[r] = load_complex(from + r * from_apart);
      if constexpr (Back && r > 0) x[r] = times_conj<S>(x[r], splat_complex(twiddle + 2 * (r - 1)));
    });
    dft<R, Back, S>(x);
    PYKERNELS_REPEAT(R, r, {
      if constexpr (!Back && r > 0) x[r] = x[r] * splat_complex(twiddle + 2 * (r - 1));
      store_complex<S>(to + r * to_apart, x[r]);
    });
  }
}
template <int R, bool Back, class S>
__attribute__((noinline)) void pass(S* work, int64_t size, int64_t stride, const S* twiddle) {
  butterflies<R, Back, S>(work, stride * kStep<S>, work, stride * kStep<S>, size, twiddle);
}
template <bool Back, class S>
PYKERNELS_INLINE void pass(int radix, S* work, int64_t size, int64_t stride, const S* twiddle) {
  if (radix == 4)
    pass<4, Back, S>(work, size, stride, twiddle);
  else if (radix == 8)
    pass<8, Back, S>(work, size, stride, twiddle);
  else
    pass<16, Back, S>(work, size, stride, twiddle);
}

// What happens to the spectrum. Arrays beside the work array have its layout; `at` is the place in all of them.
//   kIn: the work array holds samples of lanes (else a spectrum); kOut: it shall again (else it is left as it is).
template <class S>
struct Keep {  // the spectrum, times `scale`
  static constexpr bool kIn = true, kOut = false;
  S* to;
  S scale;
  PYKERNELS_INLINE Complex<S> operator()(int64_t at, Complex<S> x) const {
    store_complex<S>(to + at, {x.re * scale, x.im * scale});
    return x;
  }
};
template <class S>
struct Convolve {
  static constexpr bool kIn = true, kOut = true;
  const S* kernel;
  PYKERNELS_INLINE Complex<S> operator()(int64_t at, Complex<S> x) const { return x * load_complex(kernel + at); }
};
template <class S>
struct KeepAndConvolve {
  static constexpr bool kIn = true, kOut = true;
  S* to;
  const S* kernel;
  PYKERNELS_INLINE Complex<S> operator()(int64_t at, Complex<S> x) const {
    store_complex<S>(to + at, x);
    return x * load_complex(kernel + at);
  }
};
// The gradients of a convolution: that of x from the work array on, that of the kernel added up.
template <class S, bool OfInput, bool OfKernel>
struct Correlate {
  static constexpr bool kIn = true, kOut = OfInput;
  const S* kernel;
  const S* x;
  S* sum;
  PYKERNELS_INLINE Complex<S> operator()(int64_t at, Complex<S> g) const {
    if constexpr (OfKernel) store_complex<S>(sum + at, load_complex(sum + at) + times_conj<S>(g, load_complex(x + at)));
    return OfInput ? times_conj<S>(g, load_complex(kernel + at)) : g;
  }
};
template <class S>
struct Invert {  // a spectrum that is in the work array
  static constexpr bool kIn = false, kOut = true;
  PYKERNELS_INLINE Complex<S> operator()(int64_t, Complex<S> x) const { return x; }
};

template <int R, class S, class Mode>
__attribute__((noinline)) void leaves(S* work, int64_t at, int64_t count, const Mode& mode_) {
  const Mode mode = mode_;
  for (int64_t i = 0; i < count; ++i, at += R * kStep<S>) {
    Complex<S> x[R];
    PYKERNELS_REPEAT(R, r, { x[r] = load_complex(work + at + r * kStep<S>); });
    if constexpr (Mode::kIn) dft<R, false, S>(x);
    PYKERNELS_REPEAT(R, r, { x[r] = mode(at + r * kStep<S>, x[r]); });
    if constexpr (Mode::kOut) {
      dft<R, true, S>(x);
      PYKERNELS_REPEAT(R, r, { store_complex<S>(work + at + r * kStep<S>, x[r]); });
    }
  }
}

template <class S, class Mode>
void descend(const Plan<S>& plan, int level, int64_t size, S* work, int64_t at, const Mode& mode) {
  if (level == plan.levels) {
    if (plan.leaf == 4)
      leaves<4, S>(work, at, size / 4, mode);
    else
      leaves<8, S>(work, at, size / 8, mode);
    return;
  }
  const int radix = plan.radix[level];
  const int64_t part = size / radix;
  if constexpr (Mode::kIn) pass<false, S>(radix, work + at, part, part, plan.twiddle[level]);
  if (level + 1 < plan.levels)
    for (int r = 0; r < radix; ++r) descend(plan, level + 1, part, work, at + r * part * kStep<S>, mode);
  else
    descend(plan, level + 1, size, work, at, mode);  // the leaves of all parts at once
  if constexpr (Mode::kOut) pass<true, S>(radix, work + at, part, part, plan.twiddle[level]);
}

// What is between analysis and synthesis.
template <class S, class Mode>
PYKERNELS_INLINE void transform(const Plan<S>& plan, S* work, const Mode& mode) {
  const int radix = plan.radix[0];
  const int64_t part = plan.length / radix;
  if (Mode::kIn && !plan.fused) pass<false, S>(radix, work, part, plan.stride, plan.twiddle[0]);
  for (int r = 0; r < radix; ++r) descend(plan, 1, part, work, r * plan.stride * kStep<S>, mode);
  if (Mode::kOut && !plan.fused) pass<true, S>(radix, work, part, plan.stride, plan.twiddle[0]);
}

// Samples to lanes. R: with the first pass, of that radix, which takes the blocks of all parts while they are in the
// nearest cache; 1: without.
template <int R, bool Half, class S, class Read>
__attribute__((noinline)) void analyse(const Plan<S>& plan, const Read& read, S* work) {
  constexpr int lanes = kLanes<S>;
  const int64_t part = plan.length / plan.radix[0];
  if constexpr (R == 1) {
    for (int r = 0; r < plan.radix[0]; ++r)
      for (int64_t j = 0; j < part; j += lanes)
        analyse_block<Half, S>(plan, read, r * part + j, work + (r * plan.stride + j) * kStep<S>);
  } else {
    alignas(64) S tile[R * lanes * kStep<S>];
    for (int64_t j = 0; j < part; j += lanes) {
      const int64_t here = least<int64_t>(part - j, lanes);
      // Parts shorter than a vector are neighbours in one block.
      for (int r = 0; r < R; ++r)
        if (r * part % lanes == 0) analyse_block<Half, S>(plan, read, r * part + j, tile + r * here * kStep<S>);
      butterflies<R, false, S>(tile, here * kStep<S>, work + j * kStep<S>, plan.stride * kStep<S>, here,
                               plan.twiddle[0] + j * 2 * (R - 1));
    }
  }
}
template <int R, bool Half, class S, class Write>
__attribute__((noinline)) void synthesise(const Plan<S>& plan, const S* work, const Write& write_) {
  constexpr int lanes = kLanes<S>;
  const Write write = write_;
  const int64_t part = plan.length / plan.radix[0];
  if constexpr (R == 1) {
    for (int r = 0; r < plan.radix[0]; ++r)
      for (int64_t j = 0; j < part; j += lanes)
        synthesise_block<Half, S>(plan, work + (r * plan.stride + j) * kStep<S>, r * part + j, write);
  } else {
    alignas(64) S tile[R * lanes * kStep<S>];
    for (int64_t j = 0; j < part; j += lanes) {
      const int64_t here = least<int64_t>(part - j, lanes);
      butterflies<R, true, S>(work + j * kStep<S>, plan.stride * kStep<S>, tile, here * kStep<S>, here,
                              plan.twiddle[0] + j * 2 * (R - 1));
      for (int r = 0; r < R; ++r)
        if (r * part % lanes == 0) synthesise_block<Half, S>(plan, tile + r * here * kStep<S>, r * part + j, write);
    }
  }
}

template <bool Half, class S, class Read>
PYKERNELS_INLINE void analyse(const Plan<S>& plan, const Read& read, S* work) {
  if (!plan.fused)
    analyse<1, Half, S>(plan, read, work);
  else if (plan.radix[0] == 3)
    analyse<3, Half, S>(plan, read, work);
  else if (plan.radix[0] == 4)
    analyse<4, Half, S>(plan, read, work);
  else
    analyse<8, Half, S>(plan, read, work);
}
template <bool Half, class S, class Write>
PYKERNELS_INLINE void synthesise(const Plan<S>& plan, const S* work, const Write& write) {
  if (!plan.fused)
    synthesise<1, Half, S>(plan, work, write);
  else if (plan.radix[0] == 3)
    synthesise<3, Half, S>(plan, work, write);
  else if (plan.radix[0] == 4)
    synthesise<4, Half, S>(plan, work, write);
  else
    synthesise<8, Half, S>(plan, work, write);
}

}  // namespace fft
}  // namespace pykernels::cpu::PYKERNELS_ISA
