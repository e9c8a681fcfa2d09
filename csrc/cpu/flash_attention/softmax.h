// The softmax step of flash attention's forward: a tile of scores becomes weights, the row statistics move on.
#pragma once

#include "../common/matmul.h"
#include "terms.h"

namespace pykernels::cpu::PYKERNELS_ISA {

// Columns outside [begin, end) become -infinity; n is a multiple of the vector length.
template <class S>
PYKERNELS_INLINE void mask_row(S* row, int n, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<S>;
  const Vec<S> hidden = splat(static_cast<S>(-kInfinity));
  for (int j = 0; j < n; j += lanes) {
    if (j >= begin && j + lanes <= end) {
      // Visible as a whole: go on with the vector in which the visible range ends.
      j = static_cast<int>(least<int64_t>(end, n)) / lanes * lanes - lanes;
    } else if (j + lanes <= begin || j >= end) {
      store(row + j, hidden);
    } else {
      const Vec<S> column = iota<S>() + static_cast<S>(j);
      const Vec<S> low = (column >= splat(static_cast<S>(most<int64_t>(begin, -1)))) ? load(row + j) : hidden;
      store(row + j, (column < splat(static_cast<S>(least<int64_t>(end, n)))) ? low : hidden);
    }
  }
}

// Whether weights for the compute type C may come from the table below.
#if defined(PYKERNELS_HAS_BF16_DOT) && defined(__AVX512VBMI__)
template <class C>
constexpr bool kHasFastExp2 = sizeof(typename C::Elem) == 2;
#else
template <class C>
constexpr bool kHasFastExp2 = false;
#endif
// Scores, in units of log 2, must be known to be below this in magnitude for Softmax::fast: keeps 128 (127 - m)
// within 1/32.
constexpr float kFastExp2Bound = 0x1p12f;
// The table's error matches what rounding scores of about this size to bf16 would bring; rows of smaller ones are
// exact.
constexpr float kFastExp2Least = 3;
// Scores are rounded up to a multiple of this many columns by the caller, hidden ones at the end.
template <class C>
constexpr int kSoftmaxColumns = kHasFastExp2<C> || kIsSplit<C> ? 32 : C::kColumnAlign;

#if defined(PYKERNELS_HAS_BF16_DOT) && defined(__AVX512VBMI__)
// What a linear mantissa of seven bits, f / 128, has too much of 2^(f / 128) - 1, in units of its last bit, for f = 2
// i and 2 i + 1 (the curve is so flat that one value serves both).
struct Exp2Corrections {
  uint8_t units[64];
  constexpr Exp2Corrections() : units() {
    double power = 1.0027112750502025;  // 2^(1/256), then times 2^(1/64)
    for (int i = 0; i < 64; ++i, power *= 1.0108892860517005)
      units[i] = static_cast<uint8_t>(2 * i + 0.5 - (power - 1) * 128 + 0.5);
  }
};
alignas(64) constexpr Exp2Corrections kExp2Corrections;

// Weights 2^x of 32 scores, as bf16, in the order below. A score times 128 log 2 units plus `offset` = 128 (127 - m),
// rounded to an integer and saturated to 16 unsigned bits, is already a bf16 number with a linear mantissa, which the
// table corrects: 2^x to 2^-8 relative in 4 instructions per 16 weights. What underflows or is hidden comes out as
// zero. `largest` keeps the largest before the correction, so that overflow shows.
struct Exp2Table {
  __m512i units = _mm512_load_si512(kExp2Corrections.units);
  __m512i largest = _mm512_setzero_si512();

  PYKERNELS_INLINE __m512i weights(const float* scores, __m512 slope, __m512 offset) {
    return weights(_mm512_fmadd_ps(_mm512_loadu_ps(scores), slope, offset),
                   _mm512_fmadd_ps(_mm512_loadu_ps(scores + 16), slope, offset));
  }
  // Of scores that are in those units already.
  PYKERNELS_INLINE __m512i weights(__m512 low, __m512 high) {
    const __m512i t = _mm512_packus_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
    largest = _mm512_max_epu16(largest, t);
    // Low bytes look up bits 1-6; the mask clears the high ones.
    const __m512i excess = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, _mm512_srli_epi16(t, 1), units);
    return _mm512_sub_epi16(t, excess);
  }
  // Whether a weight passed 2^8.
  PYKERNELS_INLINE bool overflow() const {
    return _mm512_cmpgt_epu16_mask(largest, _mm512_set1_epi16((127 + 8) * 128)) != 0;
  }
};

// The largest |x| of n x columns elements, NaN or infinity if there is one.
inline float largest_magnitude(const BFloat16* x, int64_t stride, int64_t rows, int64_t columns) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < rows; ++i, x += stride)
    for (int64_t j = 0; j < columns; j += 32)
      largest = _mm512_max_epu16(
          largest, _mm512_and_si512((__m512i)detail::load_pairs(x + j, columns - j), _mm512_set1_epi16(0x7fff)));
  const __m512i halves = _mm512_max_epu16(largest, _mm512_slli_epi32(largest, 16));
  return bit_cast<float>(_mm512_reduce_max_epu32(_mm512_and_si512(halves, _mm512_set1_epi32(~0xffff))));
}
#endif

// The order that weights are in, and so the rows of the packed V: within each 32 keys, packing two vectors to half
// the width takes four of each in turn.
struct PackedOrder {
  static constexpr int kBlock = 32;
  static constexpr int source(int k) { return k / 32 * 32 + (k % 8 < 4 ? 0 : 16) + k % 32 / 8 * 4 + k % 4; }
};
template <bool Fast>
struct WeightOrderOf {
  using type = NaturalOrder;
};
template <>
struct WeightOrderOf<true> {
  using type = PackedOrder;
};
template <class C>
using WeightOrder = typename WeightOrderOf<kHasFastExp2<C>>::type;

// Weight j of a row.
template <class S>
PYKERNELS_INLINE S weight_at(const S* row, int j) {
  return row[j];
}
PYKERNELS_INLINE float weight_at(const BFloat16* row, int j) { return to_float(row[j]); }
#if defined(PYKERNELS_HAS_AMX)
PYKERNELS_INLINE float weight_at(const SplitF32::Elem* row, int j) { return split_element(row, j); }
#endif

// x y, rounded: the compiler may not make it part of a fused multiply-add.
template <class S>
PYKERNELS_INLINE Vec<S> rounded_product(Vec<S> x, S y) {
  Vec<S> product = x * y;
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

template <class C>
struct Softmax {
  using Elem = typename C::Elem;
  using Acc = typename C::Acc;
  static constexpr int kLane = kLanes<Acc>;

  int rows, columns;  // columns: a multiple of kSoftmaxColumns
  const Acc* scores;
  Elem* weights;  // may be where the scores are
  int64_t stride;  // of both
  Acc factor;      // of the scores, to units of log 2; positive
  Acc* m;          // [rows] the maximum so far in units of log 2, or near it; -infinity: nothing seen
  Acc* l;          // [rows, lanes] sums of weights, by lane
  Acc* o;          // [rows, width] accumulators
  int width;

  // Moves row i on to the maximum m_new.
  PYKERNELS_INLINE void rescale(int i, Acc m_new) {
    const Vec<Acc> alpha = exp2<Acc>(splat(m[i] - m_new));
    m[i] = m_new;
    store(l + i * kLane, load(l + i * kLane) * alpha);
    for (int j = 0; j < width; j += kLane) store(o + i * width + j, load(o + i * width + j) * alpha);
  }

  PYKERNELS_INLINE Acc row_max(const Acc* s) const {
    Vec<Acc> a = load(s), b = a;
    int j = kLane;
    for (; j + kLane < columns; j += 2 * kLane) {
      a = max<Acc>(load(s + j), a);
      b = max<Acc>(load(s + j + kLane), b);
    }
    if (j < columns) a = max<Acc>(load(s + j), a);
    return reduce_max<Acc>(max<Acc>(a, b));
  }

  PYKERNELS_INLINE void move_on(int i) {
    const Acc here = row_max(scores + i * stride) * factor;
    if (here > m[i]) rescale(i, here);
  }

  // The exponent of a score. m is the rounded product of the largest one: as long as a rounding is small the fused form
  // is the more exact one, but its zero would be off by half a unit of a large m.
  template <bool Far>
  PYKERNELS_INLINE Vec<Acc> exponents(const Acc* s, Vec<Acc> base) const {
    if constexpr (Far) return rounded_product<Acc>(load(s), factor) + base;
    return load(s) * factor + base;
  }
  PYKERNELS_INLINE bool far(int i) const {
    return m[i] >= kFar<Acc> || (m[i] <= -kFar<Acc> && m[i] > -static_cast<Acc>(kInfinity));
  }

  PYKERNELS_INLINE void exact_row(int i) {
    move_on(i);
    far(i) ? exact_weights<true>(i) : exact_weights<false>(i);
  }
  template <bool Far>
  PYKERNELS_INLINE void exact_weights(int i) {
    const Acc* const s = scores + i * stride;
    Elem* const w = weights + i * stride;
    const Vec<Acc> base = splat(m[i] == -static_cast<Acc>(kInfinity) ? 0 : -m[i]);
    Vec<Acc> sum = load(l + i * kLane);
    if constexpr (kHasFastExp2<C>) {
#if defined(PYKERNELS_HAS_BF16_DOT)
      const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
      for (int j = 0; j < columns; j += 32) {
        const Vec<float> a = exp2<float>(exponents<Far>(s + j, base));
        const Vec<float> b = exp2<float>(exponents<Far>(s + j + 16, base));
        sum += a + b;
        const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        _mm512_storeu_si512(w + j, _mm512_permutexvar_epi64(order, bits));
      }
#endif
    } else {
      for (int j = 0; j < columns; j += kLane) {
        const Vec<Acc> weight = exp2<Acc>(exponents<Far>(s + j, base));
        sum += weight;
        store(w + j, weight);
      }
    }
    store(l + i * kLane, sum);
  }

#if defined(PYKERNELS_HAS_AMX)
  // The work on a row for SplitF32 comes in three pieces, to go beside products of other tiles: the maximum, then the
  // weights of either half.
  int pieces() const { return 3 * rows; }
  __attribute__((noinline)) void piece(int n) {
    if (n % 3 == 0) return move_on(n / 3);
    far(n / 3) ? half_weights<true>(n) : half_weights<false>(n);
  }
  template <bool Far>
  PYKERNELS_INLINE void half_weights(int n) {
    const int i = n / 3, middle = columns / 64 * 32;
    const float* const s = scores + i * stride;
    Elem* const w = weights + i * stride;
    const Vec<float> base = splat(m[i] == -kInfinity ? 0 : -m[i]);
    Vec<float> sum = load(l + i * kLane);
    for (int j = n % 3 == 1 ? 0 : middle; j < (n % 3 == 1 ? middle : columns); j += 32) {
      const Vec<float> a = exp2<float>(exponents<Far>(s + j, base));
      const Vec<float> b = exp2<float>(exponents<Far>(s + j + 16, base));
      sum += a + b;
      store_row(w + j, split(a, b));
    }
    store(l + i * kLane, sum);
  }
#endif

  // For any scores: infinities and NaN have their effect on the weights.
  void exact() {
    if constexpr (kIsSplit<C>) {
#if defined(PYKERNELS_HAS_AMX)
      for (int n = 0; n < pieces(); ++n) piece(n);
#endif
    } else {
      for (int i = 0; i < rows; ++i) exact_row(i);
    }
  }

#if defined(PYKERNELS_HAS_BF16_DOT) && defined(__AVX512VBMI__)
  // For bf16 weights, by the table; the sums are of the rounded weights. m lags behind the maximum: it moves only
  // when a weight would pass 2^8.
  void fast() {
    const __m512 slope = _mm512_set1_ps(factor * 128);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int i = 0; i < rows; ++i) {
      const float* const s = scores + i * stride;
      BFloat16* const w = weights + i * stride;
      for (bool again = m[i] == -kInfinity;; again = true) {
        if (again) {
          const float here = row_max(s) * factor;
          if (here > m[i]) rescale(i, here);
        }
        if (__builtin_fabsf(m[i]) < kFastExp2Least) {
          exact_row(i);
          break;
        }
        const __m512 offset = _mm512_set1_ps((127 - (m[i] == -kInfinity ? 0 : m[i])) * 128);
        __m512 sum = _mm512_loadu_ps(l + i * kLane);
        Exp2Table table;
        for (int j = 0; j < columns; j += 32) {
          const __m512i weight = table.weights(s + j, slope, offset);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, ones);
          _mm512_storeu_si512(w + j, weight);
        }
        if (!again && table.overflow()) continue;
        _mm512_storeu_ps(l + i * kLane, sum);
        break;
      }
    }
  }
#endif
};

}  // namespace pykernels::cpu::PYKERNELS_ISA
