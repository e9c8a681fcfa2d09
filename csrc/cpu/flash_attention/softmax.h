// The softmax step of flash attention's forward: a tile of scores becomes weights, the row statistics move on.
#pragma once

#include "../common/matmul.h"

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
// Scores, in units of log 2, must be known to be below this in magnitude for Softmax::fast: keeps 128 (127 - m) within 1/32.
constexpr float kFastExp2Bound = 0x1p12f;
// The table's error matches what rounding scores of about this size to bf16 would bring; rows of smaller ones are exact.
constexpr float kFastExp2Least = 3;
// Scores are rounded up to a multiple of this many columns by the caller, hidden ones at the end.
template <class C>
constexpr int kSoftmaxColumns = kHasFastExp2<C> ? 32 : C::kColumnAlign;

#if defined(PYKERNELS_HAS_BF16_DOT) && defined(__AVX512VBMI__)
// The mantissa bits of 2^(i / 128), rounded to bf16's seven.
struct Exp2Mantissas {
  uint8_t bits[128];
  constexpr Exp2Mantissas() : bits() {
    double power = 1;
    for (int i = 0; i < 128; ++i, power *= 1.005429900864137)  // 2^(1/128)
      bits[i] = static_cast<uint8_t>((power - 1) * 128 + 0.5);
  }
};
alignas(64) constexpr Exp2Mantissas kExp2Mantissas;

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

  PYKERNELS_INLINE void exact_row(int i) {
    const Acc* const s = scores + i * stride;
    Elem* const w = weights + i * stride;
    const Acc here = row_max(s) * factor;
    if (here > m[i]) rescale(i, here);
    const Vec<Acc> base = splat(m[i] == -static_cast<Acc>(kInfinity) ? 0 : -m[i]);
    Vec<Acc> sum = load(l + i * kLane);
    for (int j = 0; j < columns; j += kLane) {
      const Vec<Acc> weight = exp2<Acc>(load(s + j) * factor + base);
      sum += weight;
      store(w + j, weight);
    }
    store(l + i * kLane, sum);
  }

  // For any scores: infinities and NaN have their effect on the weights.
  void exact() {
    for (int i = 0; i < rows; ++i) exact_row(i);
  }

#if defined(PYKERNELS_HAS_BF16_DOT) && defined(__AVX512VBMI__)
  // For bf16 weights. A score becomes t = 128 (score - m + 127) rounded to an integer and saturated to 16 unsigned bits: already
  // a bf16 number with a linear mantissa, whose seven low bits a table then corrects. That is 2^x to 2^-8 relative, in 3.5
  // instructions per 16 weights, and what underflows or is hidden comes out as zero. The sums are of the rounded weights.
  // m lags behind the maximum: it moves only when a weight would pass 2^8.
  void fast() {
    const __m512i low = _mm512_load_si512(kExp2Mantissas.bits), high = _mm512_load_si512(kExp2Mantissas.bits + 64);
    // Packing works within 128-bit lanes; this brings its 64-bit pieces in order.
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i limit = _mm512_set1_epi16((127 + 8) * 128);
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
        __m512i largest = _mm512_setzero_si512();
        for (int j = 0; j < columns; j += 32) {
          const __m512i a = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(s + j), slope, offset));
          const __m512i b = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(s + j + 16), slope, offset));
          const __m512i t = _mm512_packus_epi32(a, b);
          largest = _mm512_max_epu16(largest, t);
          const __m512i mantissa = _mm512_permutex2var_epi8(low, t, high);
          // The mantissa in the seven low bits, t in the others.
          const __m512i bits = _mm512_ternarylogic_epi64(t, mantissa, _mm512_set1_epi16(0x7f), 0xd8);
          const __m512i weight = _mm512_permutexvar_epi64(order, bits);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, ones);
          _mm512_storeu_si512(w + j, weight);
        }
        if (!again && _mm512_cmpgt_epu16_mask(largest, limit)) continue;
        _mm512_storeu_ps(l + i * kLane, sum);
        break;
      }
    }
  }
#endif
};

}  // namespace pykernels::cpu::PYKERNELS_ISA
