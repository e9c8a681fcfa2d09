// What flash attention's options add to the scores (ALiBi, bias), and which weights its dropout keeps.
//
// All of it goes through tiles in the L1 cache, beside products that take longer: the kernels know one term per score
// and one factor per weight, whatever they are made of.
#pragma once

#include "../../include/pykernels/flash_attention.h"
#include "../common/simd.h"

namespace pykernels::cpu::PYKERNELS_ISA {

// Where a sequence and a head lie in the tensors. Queries and keys are counted within the sequence.
struct Place {
  int64_t batch, entry;  // entry: of the slopes
  int64_t head;          // of the queries
  int64_t q0, tq, k0, tk;
};

// Maxima from here on (in units of log 2) are so large that they are rounded by about 1 or more.
template <class S>
constexpr S kFar = sizeof(S) == 4 ? static_cast<S>(0x1p23) : static_cast<S>(0x1p52);

// What becomes of a row's maximum m (in units of log 2) and its sum l of weights relative to that, with its head's
// sink.
template <class S>
struct RowSum {
  S inverse, lse;  // what the accumulators are multiplied by; 0 where no key was seen

  RowSum(S inverse, S lse) : inverse(inverse), lse(lse) {}
  RowSum(const FlashAttentionParams& f, int64_t head, S m, S l) {
    if (!f.sinks) {
      inverse = l == 0 ? 0 : 1 / l;
      lse = l == 0 ? -static_cast<S>(kInfinity)
                   : static_cast<S>(static_cast<double>(m) * kLn2 + __builtin_log(static_cast<double>(l)));
      return;
    }
    const S sink = static_cast<const S*>(f.sinks)[head];
    if (l == 0) {
      inverse = 0;
      lse = sink;
      return;
    }
    const double in_log2 = static_cast<double>(sink) * kLog2e, wide_m = static_cast<double>(m);
    const double top = in_log2 > wide_m ? in_log2 : wide_m;
    const double alpha = __builtin_exp2(wide_m - top),
                 sum = static_cast<double>(l) * alpha + __builtin_exp2(in_log2 - top);
    inverse = static_cast<S>(alpha / sum);
    lse = static_cast<S>(top * kLn2 + __builtin_log(sum));
  }
};

// ln x within 1e-12, of normal numbers and what is beyond them.
PYKERNELS_INLINE Vec<double> log(Vec<double> x) {
  // x = 2^n y with y between the roots of 1/2 and 2, then ln y = 2 artanh((y - 1) / (y + 1)). Offsets make the shift a
  // logical one, and n a double by its bits.
  const Mask<double> root = (Mask<double>)splat(0.70710678118654752440);
  const Mask<double> n = (Mask<double>)(((VecU64)((Mask<double>)x - root) + (uint64_t{2048} << 52)) >> 52) - 2048;
  const Vec<double> y = (Vec<double>)((Mask<double>)x - (n << 52));
  const Vec<double> power = (Vec<double>)((Mask<double>)splat(0x1.8p52) + n) - 0x1.8p52;
  const Vec<double> z = (y - 1.0) / (y + 1.0), w = z * z;
  Vec<double> p = w * (2.0 / 13) + 2.0 / 11;
  p = p * w + 2.0 / 9;
  p = p * w + 2.0 / 7;
  p = p * w + 2.0 / 5;
  p = p * w + 2.0 / 3;
  p = p * w + 2.0;
  return (x < splat(static_cast<double>(kInfinity))) ? power * kLn2 + p * z : x;
}

// The same of as many rows as a vector has lanes.
template <class S>
class RowSums {
 public:
  RowSums(Vec<S> m, Vec<S> l) {
    store(m_, m);
    store(l_, l);
    if constexpr (sizeof(S) == 4) {
      typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
      constexpr int half = kLanes<S> / 2;
      for (int i = 0; i < kLanes<S>; i += half) {
        const auto wide = [&](const float* p) { return __builtin_convertvector(load_bits<Half>(p + i), Vec<double>); };
        const Half lse = __builtin_convertvector(wide(m_) * kLn2 + log(wide(l_)), Half);
        __builtin_memcpy(lse_ + i, &lse, sizeof(lse));
      }
      const Mask<S> none = l == Vec<S>{};
      store(lse_, none ? splat(-kInfinity) : load(lse_));
      store(inverse_, none ? Vec<S>{} : 1.0f / l);
    }
  }
  RowSum<S> of(int i, const FlashAttentionParams& f, int64_t head) const {
    if (sizeof(S) == 8 || f.sinks) return {f, head, m_[i], l_[i]};
    return {inverse_[i], lse_[i]};
  }

 private:
  S m_[kLanes<S>], l_[kLanes<S>], inverse_[kLanes<S>], lse_[kLanes<S>];
};

PYKERNELS_INLINE int64_t page_of(const FlashAttentionParams& f, int64_t b, int64_t i) {
  const int64_t page = f.block_table[b * f.block_table_stride + i];
  return page < 0 ? 0 : page < f.pages ? page : f.pages - 1;
}

// ---- random numbers -------------------------------------------------------------------------------------------------

namespace detail {
// The products of the even lanes.
PYKERNELS_INLINE VecU64 multiply_even(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
PYKERNELS_INLINE void multiply(VecU32 a, uint32_t factor, VecU32& high, VecU32& low) {
  constexpr uint64_t below = 0xffffffffu;
  const VecU64 b = factor - VecU64{}, even = multiply_even((VecU64)a, b), odd = multiply_even((VecU64)a >> 32, b);
  high = (VecU32)((even >> 32) | (odd & ~below));
  low = (VecU32)((even & below) | (odd << 32));
}
template <bool High, size_t... I>
PYKERNELS_INLINE VecU32 zip(VecU32 a, VecU32 b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((High ? n / 2 : 0) + static_cast<int>(I) / 2 + (I % 2 ? n : 0))...);
}
}  // namespace detail

// Philox4x32-10 of the counters (c0, c1, c2, 0), lane by lane.
PYKERNELS_INLINE void philox(uint32_t k0, uint32_t k1, VecU32 c0, VecU32 c1, VecU32 c2, VecU32 (&words)[4]) {
  VecU32 c3{};
  for (int round = 0; round < 10; ++round) {
    VecU32 high0, low0, high2, low2;
    detail::multiply(c0, 0xD2511F53u, high0, low0);
    detail::multiply(c2, 0xCD9E8D57u, high2, low2);
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

class Dropout {
 public:
  static constexpr int kLane = kLanes<float>;

  explicit Dropout(const FlashAttentionParams& f)
      : heads_(f.heads_q), on_(f.dropout_seed != nullptr), scale_(1 / (1 - f.dropout_p)) {
    if (!on_) return;
    const uint64_t seed = static_cast<uint64_t>(*f.dropout_seed);
    k0_ = static_cast<uint32_t>(seed);
    k1_ = static_cast<uint32_t>(seed >> 32);
    const double below = __builtin_nearbyint(f.dropout_p * 0x1p32);
    threshold_ = below < 0xffffffffu ? static_cast<uint32_t>(below) : 0xffffffffu;
  }

  bool on() const { return on_; }
  double scale() const { return scale_; }  // of what is kept
  uint32_t threshold() const { return threshold_; }  // words from here on keep

  // The words of n keys from `key` on, for one query, at the address returned inside of `buffer`.
  static constexpr int buffer_size(int n) { return round_up(n + 4, 4 * kLane); }
  const uint32_t* row(const Place& place, int64_t query, int64_t key, int n, uint32_t* buffer) const {
    const uint32_t first = static_cast<uint32_t>(place.k0 + key);
    const auto all = [](uint32_t x) { return x - VecU32{}; };
    VecU32 lane{};
    for (int i = 0; i < kLane; ++i) lane[i] = static_cast<uint32_t>(i);
    const VecU32 q = all(static_cast<uint32_t>(place.q0 + query)), head = all(number(place));
    for (int i = 0; i < n + 4; i += 4 * kLane) {
      VecU32 w[4];
      philox(k0_, k1_, lane + (first / 4 + static_cast<uint32_t>(i) / 4), q, head, w);
      constexpr auto lanes = std::make_index_sequence<kLane>{};
      const VecU32 a = detail::zip<false>(w[0], w[2], lanes), b = detail::zip<true>(w[0], w[2], lanes);
      const VecU32 c = detail::zip<false>(w[1], w[3], lanes), d = detail::zip<true>(w[1], w[3], lanes);
      const VecU32 ordered[4] = {detail::zip<false>(a, c, lanes), detail::zip<true>(a, c, lanes),
                                 detail::zip<false>(b, d, lanes), detail::zip<true>(b, d, lanes)};
      __builtin_memcpy(buffer + i, ordered, sizeof(ordered));
    }
    return buffer + first % 4;
  }

  // What the weights of `rows` keys from `key` on (rows of `to`) and `columns` queries from `query` on are multiplied
  // by.
  template <class S>
  void tile(const Place& place, int64_t query, int columns, int64_t key, int rows, S* to) const {
    const auto all = [](uint32_t x) { return x - VecU32{}; };
    VecU32 lane{};
    for (int i = 0; i < kLane; ++i) lane[i] = static_cast<uint32_t>(i);
    const S kept = static_cast<S>(scale_);
    for (int c = 0; c < columns; c += kLane) {
      const VecU32 q = lane + static_cast<uint32_t>(place.q0 + query + c);
      VecU32 w[4];
      for (int j = 0; j < rows; ++j) {
        const uint32_t k = static_cast<uint32_t>(place.k0 + key + j);
        if (j == 0 || k % 4 == 0) philox(k0_, k1_, all(k / 4), q, all(number(place)), w);
        const VecU32 word = w[k % 4];
        for (int i = 0; i < kLane; ++i) to[j * columns + c + i] = word[i] >= threshold_ ? kept : static_cast<S>(0);
      }
    }
  }

 private:
  uint32_t number(const Place& place) const { return static_cast<uint32_t>(place.batch * heads_ + place.head); }

  int64_t heads_;
  bool on_;
  double scale_;
  uint32_t k0_ = 0, k1_ = 0, threshold_ = 0;
};

// ---- terms of the scores --------------------------------------------------------------------------------------------

// Whether scores with their terms, in units of log 2, are all below a bound in magnitude, or -infinity: where that is
// wanted.
template <class S, bool Wanted>
struct Bounded {
  S bound;
  Mask<S> beyond{};

  PYKERNELS_INLINE void look(Vec<S> x) {
    // Not below, rather than above: NaN is neither.
    if constexpr (Wanted)
      beyond |= ~(x < splat(bound)) | ((x <= splat(-bound)) & (x > splat(-static_cast<S>(kInfinity))));
  }
  bool holds() const {
    bool any = !Wanted;
    for (int i = 0; i < kLanes<S>; ++i) any |= beyond[i] != 0;
    return !any;
  }
};

#if defined(__AVX512BF16__)
// tanh by parabolas in a = |x| + 1, within 6e-5: eight in each octave of a up to 8, and 1 from there on. The exponent's
// lowest bits and the first three of the mantissa say which.
struct TanhTable {
  float constant[32], linear[32], square[32];
  static constexpr double exact(double x) {
    double e = 1, term = 1;  // e^(-2x / 64)
    for (int i = 1; i < 12; ++i) e += term *= -x / 32 / i;
    for (int i = 0; i < 6; ++i) e *= e;
    return (1 - e) / (1 + e);
  }
  constexpr TanhTable() : constant(), linear(), square() {
    for (int i = 0; i < 32; ++i) {
      const double unit = i >= 24 ? 1 : i < 8 ? 2 : 4, middle = unit * (1 + (i % 8 + 0.5) / 8);
      constant[i] = 1;
      if (i >= 16 && i < 24) continue;
      // Through three Chebyshev nodes.
      const double h = unit / 16 * 0.8660254037844386;
      const double y = exact(middle - 1), low = exact(middle - 1 - h), high = exact(middle - 1 + h);
      const double a = (high - 2 * y + low) / (2 * h * h), b = (high - low) / (2 * h);
      square[i] = static_cast<float>(a);
      linear[i] = static_cast<float>(b - 2 * a * middle);
      constant[i] = static_cast<float>(y - b * middle + a * middle * middle);
    }
  }
};
alignas(64) constexpr TanhTable kTanhTable;

// The options' share in the scores of 32 queries, while these become weights: exponents in units of log 2 / 128, 16
// keys at a time. For caps and slopes of limited size, see ScoreTerms::start and set_row.
class FastTerms {
 public:
  static constexpr float kLargest = 128;     // of a cap, in units of log 2, and of a bias of all keys
  // Beyond, hardly a key but one counts, and its weight's error is the sum's.
  static constexpr float kLargestSlope = 1.25;
  // Exponents with a bias that are larger, or NaN, come out as this: an overflow.
  static constexpr float kClamp = 0x1p16f;
  float in = 0, out = 0;                  // softcap: out tanh(in score); 0: none
  bool alibi = false;
  BiasType type{};
  bool by_key = false;  // there is a bias to read
  bool by_row = false;  // there is something in `rows`
  struct Row {
    float slope, position, constant;  // position: of the query, counted from the first key; constant: bias of all keys
  } rows[32] = {};
  const char* bias[32];  // of every row's first key

  // Whether ALiBi is the only term of a tile of `columns` keys, and linear in the key: all of them on one side of every
  // query.
  bool is_linear(int columns) const {
    return alibi && out == 0 && !by_key &&
           (rows[0].position >= static_cast<float>(columns - 1) || rows[31].position <= 0);
  }
  // Then `offset`, of a row's exponents, becomes that of its first key; a key further they are `step` more.
  PYKERNELS_INLINE void begin_linear(int row, float& offset, float& step) const {
    const Row& r = rows[row];
    step = r.position > 0 ? r.slope : -r.slope;
    offset -= step * r.position;
  }

  // Whether a bias as wide as the scores' tensors is the only term, and there is one for all keys of a tile, of `keys`
  // that there are.
  bool is_bias(int columns, int64_t keys) const {
    return by_key && !alibi && out == 0 && type == BiasType::kSameAsQ && columns <= keys;
  }
  PYKERNELS_INLINE void add_bias(__m512 a, __m512 b, __m512& low, __m512& high) const {
    const __m512 unit = _mm512_set1_ps(static_cast<float>(kLog2e * 128)), clamp = _mm512_set1_ps(kClamp);
    low = _mm512_min_ps(_mm512_fmadd_ps(a, unit, low), clamp);
    high = _mm512_min_ps(_mm512_fmadd_ps(b, unit, high), clamp);
  }
  // `exponents` where that holds.
  PYKERNELS_INLINE void exponents_by_bias(int row, const float* s, int key, __m512 slope, __m512 offset, __m512& low,
                                          __m512& high) const {
    // A bf16 number is the upper half of an fp32 one.
    constexpr uint32_t upper = 0xaaaaaaaau;
    VecU32 first{};
    for (int i = 0; i < 16; ++i) first[i] = static_cast<uint32_t>(i) << 16;
    const VecU32 second = first + (16u << 16);
    const __m512i both = _mm512_loadu_si512(bias[row] + 2 * key);
    low = _mm512_fmadd_ps(_mm512_loadu_ps(s), slope, offset);
    high = _mm512_fmadd_ps(_mm512_loadu_ps(s + 16), slope, offset);
    add_bias((__m512)_mm512_maskz_permutexvar_epi16(upper, (__m512i)first, both),
             (__m512)_mm512_maskz_permutexvar_epi16(upper, (__m512i)second, both), low, high);
  }

  // Keys [key, key + 32), of which `valid` exist.
  PYKERNELS_INLINE void exponents(int row, const float* s, int key, int64_t valid, __m512 slope, __m512 offset,
                                  __m512& low, __m512& high) const {
    const Row& r = rows[row];
    low = _mm512_loadu_ps(s), high = _mm512_loadu_ps(s + 16);
    low = out != 0 ? softcapped(low, offset) : _mm512_fmadd_ps(low, slope, offset);
    high = out != 0 ? softcapped(high, offset) : _mm512_fmadd_ps(high, slope, offset);
    if (alibi) {
      const __m512 distance =
          _mm512_add_ps((__m512)iota<float>(), _mm512_set1_ps(static_cast<float>(key) - r.position));
      const __m512 minus = _mm512_set1_ps(-r.slope);
      low = _mm512_fmadd_ps(_mm512_abs_ps(distance), minus, low);
      high = _mm512_fmadd_ps(_mm512_abs_ps(_mm512_add_ps(distance, _mm512_set1_ps(16))), minus, high);
    }
    if (!by_key) return;
    const uint32_t there = valid >= 32 ? ~0u : valid <= 0 ? 0 : (1u << valid) - 1;
    const __mmask16 first = static_cast<__mmask16>(there), second = static_cast<__mmask16>(there >> 16);
    if (type == BiasType::kBoolean) {
      const char* const from = bias[row] + key;
      const uint32_t seen =
          _mm256_mask_test_epi8_mask(there, _mm256_maskz_loadu_epi8(there, from), _mm256_set1_epi8(-1));
      const __m512 hidden = _mm512_set1_ps(-kInfinity);
      low = _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(seen), low);
      high = _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(seen >> 16), high);
      return;
    }
    __m512 a, b;
    if (type == BiasType::kFloat32) {
      const char* const from = bias[row] + 4 * key;
      a = _mm512_maskz_loadu_ps(first, from), b = _mm512_maskz_loadu_ps(second, from + 64);
    } else {
      const char* const from = bias[row] + 2 * key;
      a = (__m512)widen((HalfU16)_mm256_maskz_loadu_epi16(first, from), BFloat16{});
      b = (__m512)widen((HalfU16)_mm256_maskz_loadu_epi16(second, from + 32), BFloat16{});
    }
    add_bias(a, b, low, high);
  }

 private:
  PYKERNELS_INLINE __m512 softcapped(__m512 s, __m512 offset) const {
    constexpr int lesser_magnitude = 0xa;
    const __m512 a =
        _mm512_add_ps(_mm512_range_ps(_mm512_mul_ps(s, _mm512_set1_ps(in)), _mm512_set1_ps(8), lesser_magnitude),
                                   _mm512_set1_ps(1));
    const __m512i which = _mm512_srli_epi32((__m512i)a, 20);
    const auto look_up = [&](const float* table) __attribute__((always_inline)) {
      return _mm512_permutex2var_ps(_mm512_load_ps(table), which, _mm512_load_ps(table + 16));
    };
    const TanhTable& table = kTanhTable;
    const __m512 magnitude =
        _mm512_fmadd_ps(_mm512_fmadd_ps(look_up(table.square), a, look_up(table.linear)), a, look_up(table.constant));
    const __m512 capped =
        _mm512_fmadd_ps((__m512)copy_sign<float>((Vec<float>)magnitude, (Vec<float>)s), _mm512_set1_ps(out), offset);
    constexpr int keep_minus_infinity = 1 << 4 * 4;  // of s: it is hidden
    return _mm512_fixupimm_ps(capped, s, _mm512_set1_epi32(keep_minus_infinity), 0);
  }
};
#endif

template <class T>
class ScoreTerms {
  using S = Wide<T>;
  static constexpr int kLane = kLanes<S>;

 public:
  explicit ScoreTerms(const FlashAttentionParams& f) : f_(f) {}
  bool on() const { return f_.alibi_slopes || f_.bias; }

  // s[j] = factor * s[j] + terms, in units of log 2, of query `query` and n keys (a multiple of the vector length) from
  // `key` on; those beyond the sequence get any terms.
  template <class Bound>
  void add(S* s, int n, S factor, const Place& place, int64_t query, int64_t key, Bound& bounded) const {
    if (!f_.bias) return add_typed<None>(s, n, factor, place, query, key, bounded);
    if (f_.bias_type == BiasType::kBoolean) return add_typed<uint8_t>(s, n, factor, place, query, key, bounded);
    if constexpr (!std::is_same_v<T, double>)
      if (f_.bias_type == BiasType::kFloat32) return add_typed<float>(s, n, factor, place, query, key, bounded);
    add_typed<T>(s, n, factor, place, query, key, bounded);
  }

  bool alibi() const { return f_.alibi_slopes != nullptr; }
  const char* bias_address(const Place& place, int64_t query, int64_t key) const {
    if (f_.bias_type == BiasType::kBoolean) return reinterpret_cast<const char*>(address<uint8_t>(place, query, key));
    if (f_.bias_type == BiasType::kFloat32) return reinterpret_cast<const char*>(address<float>(place, query, key));
    return reinterpret_cast<const char*>(address<T>(place, query, key));
  }
  // Whether there is a bias with numbers of its own for every key, and the bytes of one.
  bool biased_by_key() const { return f_.bias && f_.bias_stride.key != 0; }
  int64_t bias_bytes() const {
    return f_.bias_type == BiasType::kBoolean ? 1 : f_.bias_type == BiasType::kFloat32 ? 4 : sizeof(T);
  }
  // -infinity: hidden.
  S bias_of(const Place& place, int64_t query, int64_t key) const {
    if (!f_.bias) return 0;
    if (f_.bias_type == BiasType::kBoolean) return bias_at(address<uint8_t>(place, query, key));
    if constexpr (!std::is_same_v<T, double>)
      if (f_.bias_type == BiasType::kFloat32) return bias_at(address<float>(place, query, key));
    return bias_at(address<T>(place, query, key));
  }
#if defined(__AVX512BF16__)
  // What every tile of a call shares; whether FastTerms serves it.
  bool start(FastTerms& fast) const {
    if (f_.softcap > 0) {
      fast.in = static_cast<float>((f_.scale < 0 ? -f_.scale : f_.scale) / f_.softcap);
      fast.out = static_cast<float>(f_.softcap * kLog2e * 128);
    }
    fast.alibi = alibi();
    fast.type = f_.bias_type;
    fast.by_key = biased_by_key();
    fast.by_row = fast.alibi || (f_.bias && !fast.by_key);
    return !(fast.out > 128 * FastTerms::kLargest);
  }
  bool serves_slope(const Place& place) const {
    const S slope = slope_of(place);
    return slope >= 0 && slope < FastTerms::kLargestSlope;
  }
  // Row `row` of a tile whose first key is `key`; whether its slope is one that FastTerms serves.
  bool set_row(FastTerms& fast, int row, const Place& place, int64_t query, int64_t key) const {
    const S slope = slope_of(place);
    FastTerms::Row& r = fast.rows[row];
    r = {static_cast<float>(slope * 128), static_cast<float>(query + place.tk - place.tq - key), 0};
    if (f_.bias && !fast.by_key) r.constant = static_cast<float>(bias_of(place, query, key) * 128);
    return serves_slope(place) && r.constant < 128 * FastTerms::kLargest;
  }
#endif

  // The terms of `columns` queries from `query` on and `rows` keys (the rows of `to`) from `key` on.
  void tile(const Place& place, int64_t query, int columns, int64_t key, int rows, S* to) const {
    const S slope = slope_of(place);
    const int64_t distance = query + place.tk - place.tq - key;
    for (int j = 0; j < rows; ++j)
      for (int c = 0; c < columns; c += kLane)
        store(to + j * columns + c, -slope * abs<S>(iota<S>() + static_cast<S>(distance + c - j)));
    if (!f_.bias) return;
    if (f_.bias_type == BiasType::kBoolean) return tile_typed<uint8_t>(place, query, columns, key, rows, to);
    if constexpr (!std::is_same_v<T, double>)
      if (f_.bias_type == BiasType::kFloat32) return tile_typed<float>(place, query, columns, key, rows, to);
    tile_typed<T>(place, query, columns, key, rows, to);
  }

 private:
  struct None {};

  S slope_of(const Place& place) const {
    if (!f_.alibi_slopes) return 0;
    return static_cast<const S*>(f_.alibi_slopes)[place.entry * f_.alibi_stride + place.head] * static_cast<S>(kLog2e);
  }
  template <class B>
  const B* address(const Place& place, int64_t query, int64_t key) const {
    const Strides4& stride = f_.bias_stride;
    return static_cast<const B*>(f_.bias) + place.batch * stride.batch + place.head * stride.head +
           (place.q0 + query) * stride.row + (place.k0 + key) * stride.key;
  }

  // Biases in units of log 2; those of columns [0, n).
  template <class B>
  static PYKERNELS_INLINE Vec<S> load_bias(const B* p, int64_t n) {
    if constexpr (std::is_same_v<B, uint8_t>) {
      typedef uint8_t Bytes __attribute__((vector_size(kLane)));
      Bytes bytes{};
      if (n >= kLane)
        __builtin_memcpy(&bytes, p, kLane);
      else if (n > 0)
        __builtin_memcpy(&bytes, p, static_cast<size_t>(n));
      return __builtin_convertvector(bytes, Mask<S>) != 0 ? Vec<S>{} : splat(-static_cast<S>(kInfinity));
    } else {
      return load_upto(p, n) * static_cast<S>(kLog2e);
    }
  }
  template <class B>
  static PYKERNELS_INLINE S bias_at(const B* p) {
    return load_bias(p, 1)[0];
  }

  template <class B, class Bound>
  void add_typed(S* s, int n, S factor, const Place& place, int64_t query, int64_t key, Bound& bounded) const {
    constexpr bool biased = !std::is_same_v<B, None>;
    const S slope = slope_of(place);
    const S distance = static_cast<S>(query + place.tk - place.tq - key);
    [[maybe_unused]] const B* bias = nullptr;
    S constant = 0;
    bool by_key = false;
    if constexpr (biased) {
      by_key = f_.bias_stride.key != 0;
      bias = address<B>(place, query, by_key ? key : 0);
      if (!by_key) constant = bias_at(bias);
    }
    const int64_t keys = place.tk - key;
    const Vec<S> hidden = splat(-static_cast<S>(kInfinity));
    const auto pass = [=, &bounded](auto sloped) __attribute__((always_inline)) {
      for (int j = 0; j < n; j += kLane) {
        Vec<S> x = load(s + j) * factor;
        if constexpr (decltype(sloped)::value) x -= slope * abs<S>(iota<S>() + (static_cast<S>(j) - distance));
        if constexpr (biased) {
          // A score that is hidden may be NaN.
          const Vec<S> b = by_key ? load_bias(bias + j, keys - j) : splat(constant);
          x = (b == hidden) ? hidden : x + b;
        }
        bounded.look(x);
        store(s + j, x);
      }
    };
    !biased || alibi() ? pass(std::true_type{}) : pass(std::false_type{});
  }

  template <class B>
  void tile_typed(const Place& place, int64_t query, int columns, int64_t key, int rows, S* to) const {
    const int64_t queries = place.tq - query, keys = place.tk - key;
    if (f_.bias_stride.row == 0 || f_.bias_stride.key == 0) {
      const B* const bias = address<B>(place, query, f_.bias_stride.key ? key : 0);
      for (int c = 0; c < columns; c += kLane) {
        Vec<S> of_query{};
        if (f_.bias_stride.row)
          for (int i = 0; i < least<int64_t>(kLane, queries - c); ++i)
            of_query[i] = bias_at(bias + (c + i) * f_.bias_stride.row);
        const bool constant = !f_.bias_stride.row && !f_.bias_stride.key;
        if (constant) of_query = splat(bias_at(bias));
        for (int j = 0; j < least<int64_t>(rows, keys); ++j) {
          const Vec<S> x = f_.bias_stride.key ? splat(bias_at(bias + j)) : of_query;
          store(to + j * columns + c, load(to + j * columns + c) + x);
        }
      }
      return;
    }
    for (int c = 0; c < columns; c += kLane)
      for (int j = 0; j < rows; j += kLane) {
        Vec<S> square[kLane];
        for (int r = 0; r < kLane; ++r)
          square[r] = c + r < queries ? load_bias(address<B>(place, query + c + r, key + j), keys - j) : Vec<S>{};
        transpose(square);
        for (int r = 0; r < least(kLane, rows - j); ++r) {
          S* const at = to + (j + r) * columns + c;
          store(at, load(at) + square[r]);
        }
      }
  }

  const FlashAttentionParams& f_;
};

}  // namespace pykernels::cpu::PYKERNELS_ISA
