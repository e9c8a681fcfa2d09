// Vectors of the widest registers of the ISA being compiled, and the few vector functions that kernels are made of.
//
// Vec<float> and Vec<double> are compiler vector types: + - * / and comparisons work on them, a * b + c contracts to
// a fused multiply-add where the ISA has one. Comparisons give Mask<S>, an integer vector of 0 and -1, for `mask ? a
// : b`. Storage types (bf16, fp16) are widened by `load` and rounded (to nearest even, NaN kept) by `store`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
// GCC 12 warns about the deliberately undefined operands inside its own intrinsics (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../../common/dtype.h"

namespace pykernels::cpu::PYKERNELS_ISA {

#define PYKERNELS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};

template <class S>
using Vec = typename VectorOf<S>::type;
template <class S>
using Mask = typename VectorOf<S>::mask;
template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfU16 __attribute__((vector_size(kVectorBytes / 2)));  // one per lane of a Vec<float>

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
PYKERNELS_INLINE constexpr T round_up(T n, int64_t multiple) {
  return static_cast<T>((n + multiple - 1) / multiple * multiple);
}
template <class T>
PYKERNELS_INLINE constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
PYKERNELS_INLINE constexpr T most(T a, T b) {
  return a < b ? b : a;
}

// ---- construction -------------------------------------------------------------------------------------------------

template <class S>
PYKERNELS_INLINE Vec<S> splat(S x) {
  return x - Vec<S>{};  // not x + 0: keeps -0
}
template <class S>
PYKERNELS_INLINE Vec<S> iota() {  // 0, 1, 2, ...
  Vec<S> v;
  for (int i = 0; i < kLanes<S>; ++i) v[i] = static_cast<S>(i);
  return v;
}
template <class To, class From>
PYKERNELS_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// ---- scalar conversions -------------------------------------------------------------------------------------------

PYKERNELS_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
PYKERNELS_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Shifted into place the exponent is 112 too small; the product also normalises denormals. Infinity and NaN need
  // the top.
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u
                                             : bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  return bit_cast<float>(bits | sign);
}
PYKERNELS_INLINE float to_float(float x) { return x; }
PYKERNELS_INLINE double to_float(double x) { return x; }

template <class T>
T from_float(float x);
template <>
PYKERNELS_INLINE float from_float<float>(float x) {
  return x;
}
template <>
PYKERNELS_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
PYKERNELS_INLINE Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 aligns the units of the sum with fp16's denormal step, so the addition itself rounds.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// ---- loads and stores ---------------------------------------------------------------------------------------------
// load(p) reads kLanes elements, load(p, n) the first n < kLanes (the other lanes are zero and their memory is not
// touched); the same for store. No alignment is needed.

template <class V, class T>
PYKERNELS_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

PYKERNELS_INLINE Vec<float> widen(HalfU16 bits, BFloat16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (Vec<float>)(__builtin_convertvector(bits, VecU32) << 16);
#endif
}
PYKERNELS_INLINE Vec<float> widen(HalfU16 bits, Float16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__ARM_NEON)
  return (Vec<float>)vcvt_f32_f16((float16x4_t)bits);
#else
  const VecU32 wide = __builtin_convertvector(bits, VecU32), magnitude = wide & 0x7fffu;
  const VecU32 finite = (VecU32)((Vec<float>)(magnitude << 13) * 0x1p112f);
  return (Vec<float>)(((magnitude >= 0x7c00u) ? ((magnitude << 13) | 0x7f800000u) : finite) | ((wide & 0x8000u) << 16));
#endif
}
PYKERNELS_INLINE HalfU16 narrow(Vec<float> x, BFloat16) {
#if defined(__AVX512BF16__)
  return (HalfU16)_mm512_cvtneps_pbh((__m512)x);
#else
  const VecU32 bits = (VecU32)x;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 result = (x == x) ? rounded : ((bits >> 16) | 0x40u);
#if defined(__AVX512F__)
  return (HalfU16)_mm512_cvtepi32_epi16((__m512i)result);
#else
  return __builtin_convertvector(result, HalfU16);
#endif
#endif
}
PYKERNELS_INLINE HalfU16 narrow(Vec<float> x, Float16) {
#if defined(__AVX512F__)
  return (HalfU16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__ARM_NEON)
  return (HalfU16)vcvt_f16_f32((float32x4_t)x);
#else
  HalfU16 result;
  for (int i = 0; i < kLanes<float>; ++i) result[i] = from_float<Float16>(x[i]).bits;
  return result;
#endif
}

PYKERNELS_INLINE Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
PYKERNELS_INLINE Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
PYKERNELS_INLINE Vec<float> load(const BFloat16* p) { return widen(load_bits<HalfU16>(p), BFloat16{}); }
PYKERNELS_INLINE Vec<float> load(const Float16* p) { return widen(load_bits<HalfU16>(p), Float16{}); }

template <class S>
PYKERNELS_INLINE void store(S* p, Vec<S> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
PYKERNELS_INLINE void store(BFloat16* p, Vec<float> v) {
  const HalfU16 bits = narrow(v, BFloat16{});
  __builtin_memcpy(p, &bits, sizeof(bits));
}
PYKERNELS_INLINE void store(Float16* p, Vec<float> v) {
  const HalfU16 bits = narrow(v, Float16{});
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// The type that T is computed in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

#if defined(__AVX512F__)
PYKERNELS_INLINE Vec<float> load(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
PYKERNELS_INLINE Vec<double> load(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
template <class T>
PYKERNELS_INLINE Vec<float> load(const T* p, int n) {
  static_assert(sizeof(T) == 2);
  return widen((HalfU16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p), T{});
}
PYKERNELS_INLINE void store(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
PYKERNELS_INLINE void store(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}
template <class T>
PYKERNELS_INLINE void store(T* p, Vec<float> v, int n) {
  static_assert(sizeof(T) == 2);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)narrow(v, T{}));
}
#else
template <class T>
PYKERNELS_INLINE Vec<Wide<T>> load(const T* p, int n) {
  T buffer[kLanes<Wide<T>>] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
PYKERNELS_INLINE void store(T* p, Vec<Wide<T>> v, int n) {
  T buffer[kLanes<Wide<T>>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}
#endif

// The lanes of columns [0, n), for any n (also negative or beyond the vector): what a ragged row loads and stores.
template <class T>
PYKERNELS_INLINE Vec<Wide<T>> load_upto(const T* p, int64_t n) {
  constexpr int lanes = kLanes<Wide<T>>;
  return n >= lanes ? load(p) : n > 0 ? load(p, static_cast<int>(n)) : Vec<Wide<T>>{};
}
template <class T>
PYKERNELS_INLINE void store_upto(T* p, Vec<Wide<T>> v, int64_t n) {
  constexpr int lanes = kLanes<Wide<T>>;
  if (n >= lanes)
    store(p, v);
  else if (n > 0)
    store(p, v, static_cast<int>(n));
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// Of the two, `b` where either is NaN.
template <class S>
PYKERNELS_INLINE Vec<S> max(Vec<S> a, Vec<S> b);
template <>
PYKERNELS_INLINE Vec<float> max<float>(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
template <>
PYKERNELS_INLINE Vec<double> max<double>(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

template <class S>
PYKERNELS_INLINE S reduce_add(Vec<S> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
#else
  S x[kLanes<S>];
  store(x, v);
  for (int width = kLanes<S> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
#endif
}
template <class S>
PYKERNELS_INLINE S reduce_max(Vec<S> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return _mm512_reduce_max_ps((__m512)v);
  else
    return _mm512_reduce_max_pd((__m512d)v);
#else
  S x[kLanes<S>];
  store(x, v);
  for (int width = kLanes<S> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
#endif
}

template <class S>
PYKERNELS_INLINE Vec<S> abs(Vec<S> x) {
  if constexpr (sizeof(S) == 4)
    return (Vec<S>)((Mask<S>)x & 0x7fffffff);
  else
    return (Vec<S>)((Mask<S>)x & 0x7fffffffffffffffll);
}
// |magnitude| with the sign of `sign`.
template <class S>
PYKERNELS_INLINE Vec<S> copy_sign(Vec<S> magnitude, Vec<S> sign) {
  const Mask<S> top = (Mask<S>)splat<S>(static_cast<S>(-0.0));
  return (Vec<S>)(((Mask<S>)magnitude & ~top) | ((Mask<S>)sign & top));
}

// 2^f for f in [-1/2, 1/2], before rounding: relative error 2e-9 (float, minimax) and 2^-58 (double, Taylor). Exact
// at 0.
PYKERNELS_INLINE Vec<float> exp2_reduced(Vec<float> f) {
  Vec<float> p = splat(1.535336195e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  return p * f + 1.0f;
}
PYKERNELS_INLINE Vec<double> exp2_reduced(Vec<double> f) {
  constexpr double c[] = {1.0,
                          6.931471805599453094e-1,
                          2.402265069591007123e-1,
                          5.550410866482157995e-2,
                          9.618129107628477232e-3,
                          1.333355814642844342e-3,
                          1.540353039338160995e-4,
                          1.525273380405984028e-5,
                          1.321548679014430949e-6,
                          1.017808600923969973e-7,
                          7.054911620801123330e-9,
                          4.445538271870811498e-10,
                          2.567843599348820514e-11};
  Vec<double> p = splat(c[12]);
  for (int i = 11; i >= 0; --i) p = p * f + c[i];
  return p;
}

// 2^x within about 1 ulp for any x: 0 at -infinity and, without AVX-512, where the result would be denormal; infinity
// beyond the range, NaN for NaN.
template <class S>
PYKERNELS_INLINE Vec<S> exp2(Vec<S> x);
template <>
PYKERNELS_INLINE Vec<float> exp2<float>(Vec<float> x) {
#if defined(__AVX512F__)
  // scalef multiplies by 2^floor(x), so the remainder is taken in [0, 1) (of an infinity it is 0): the same minimax
  // error.
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> p = splat(2.161291495e-4f);
  p = p * f + 1.246784645e-3f;
  p = p * f + 9.675451567e-3f;
  p = p * f + 5.548528062e-2f;
  p = p * f + 2.402293056e-1f;
  p = p * f + 6.931470444e-1f;
  p = p * f + 1.0f;
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const Vec<float> low = max<float>(splat(-126.5f), x);
  const Vec<float> clamped = (low > 128.0f) ? splat(128.0f) : low;
  const Vec<float> shifted = clamped + 0x1.8p23f;  // rounds to an integer, kept in the low mantissa bits
  const Vec<float> f = clamped - (shifted - 0x1.8p23f);
  // 2^n as two factors: one exponent field does not reach 2^128.
  const Mask<float> n = (Mask<float>)shifted - (Mask<float>)splat(0x1.8p23f), half = n >> 1;
  const Vec<float> result =
      exp2_reduced(f) * (Vec<float>)((half + 127) << 23) * (Vec<float>)((n - half + 127) << 23);
  return (x < -126.0f) ? Vec<float>{} : (x > 128.0f) ? splat(kInfinity) : result;
#endif
}
template <>
PYKERNELS_INLINE Vec<double> exp2<double>(Vec<double> x) {
#if defined(__AVX512F__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Vec<double> f = (Vec<double>)_mm512_reduce_pd((__m512d)x, nearest);
  return (Vec<double>)_mm512_scalef_pd((__m512d)exp2_reduced(f), _mm512_roundscale_pd((__m512d)x, nearest));
#else
  const Vec<double> low = max<double>(splat(-1022.5), x);
  const Vec<double> clamped = (low > 1024.0) ? splat(1024.0) : low;
  const Vec<double> shifted = clamped + 0x1.8p52;
  const Vec<double> f = clamped - (shifted - 0x1.8p52);
  // No ISA before AVX-512 shifts 64-bit integers arithmetically; n is small, so that an offset makes it a logical
  // shift.
  const Mask<double> n = (Mask<double>)shifted - (Mask<double>)splat(0x1.8p52);
  const Mask<double> half = (Mask<double>)((VecU64)(n + 2048) >> 1) - 1024;
  const Vec<double> result =
      exp2_reduced(f) * (Vec<double>)((half + 1023) << 52) * (Vec<double>)((n - half + 1023) << 52);
  return (x < -1022.0) ? Vec<double>{} : (x > 1024.0) ? splat<double>(kInfinity) : result;
#endif
}

// Relative error of a few ulp everywhere: a rational function near zero (Cephes), 1 - 2 / (e^2|x| + 1) beyond.
template <class S>
PYKERNELS_INLINE Vec<S> tanh(Vec<S> x) {
  const Vec<S> magnitude = abs<S>(x), z = x * x;
  Vec<S> near_zero;
  if constexpr (sizeof(S) == 4) {
    Vec<S> p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    near_zero = p * z * x + x;
  } else {
    const Vec<S> p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
    const Vec<S> q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
    near_zero = x + x * z * (p / q);
  }
  const Vec<S> e = exp2<S>(magnitude * static_cast<S>(2 * kLog2e));
  const Vec<S> far = copy_sign<S>(static_cast<S>(1) - static_cast<S>(2) / (e + static_cast<S>(1)), x);
  // A NaN compares false and comes out of `far`, through e.
  return (magnitude < static_cast<S>(0.625)) ? near_zero : far;
}

// ---- transposition ------------------------------------------------------------------------------------------------

namespace detail {
// Lane i of the two rows that a step of the transposition makes of (a, b): blocks of `Block` lanes change places.
template <int Block, bool High, class V, size_t... I>
PYKERNELS_INLINE V exchange(V a, V b, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(
      a, b, (High ? (I & Block ? lanes + I : I + Block) : (I & Block ? lanes + I - Block : I))...);
}
template <int Block, class V, int N>
PYKERNELS_INLINE void transpose_step(V (&rows)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (i & Block) continue;
    const V a = rows[i], b = rows[i + Block];
    rows[i] = exchange<Block, false>(a, b, std::make_index_sequence<N>{});
    rows[i + Block] = exchange<Block, true>(a, b, std::make_index_sequence<N>{});
  }
  if constexpr (2 * Block < N) transpose_step<2 * Block>(rows);
}
// Sums of pairs of lanes: what the steps above exchange is added up instead, which halves the number of rows.
template <int Block, class V, int N>
PYKERNELS_INLINE V reduce_step(V (&rows)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 2 * Block)
    rows[i] = exchange<Block, false>(rows[i], rows[i + Block], std::make_index_sequence<N>{}) +
              exchange<Block, true>(rows[i], rows[i + Block], std::make_index_sequence<N>{});
  if constexpr (2 * Block < N)
    return reduce_step<2 * Block>(rows);
  else
    return rows[0];
}
}  // namespace detail

// Transposes the square of as many vectors as each has lanes.
template <class V, int N>
PYKERNELS_INLINE void transpose(V (&rows)[N]) {
  static_assert(sizeof(V) / sizeof(V{}[0]) == N);
  detail::transpose_step<1>(rows);
}

// Lane i of the result is the sum of rows[i].
template <class V, int N>
PYKERNELS_INLINE V reduce_add_each(V (&rows)[N]) {
  static_assert(sizeof(V) / sizeof(V{}[0]) == N);
  return detail::reduce_step<1>(rows);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
