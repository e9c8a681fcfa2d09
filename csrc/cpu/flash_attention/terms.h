// What flash attention's options add to the scores (ALiBi, bias), and which weights its dropout keeps.
//
// All of it goes through tiles in the L1 cache, beside products that take longer: the kernels know one term per score and one
// factor per weight, whatever they are made of.
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

// What becomes of a row's maximum m (in units of log 2) and its sum l of weights relative to that, with its head's sink.
template <class S>
struct RowSum {
  S inverse, lse;  // what the accumulators are multiplied by; 0 where no key was seen

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
    const double alpha = __builtin_exp2(wide_m - top), sum = static_cast<double>(l) * alpha + __builtin_exp2(in_log2 - top);
    inverse = static_cast<S>(alpha / sum);
    lse = static_cast<S>(top * kLn2 + __builtin_log(sum));
  }
};

PYKERNELS_INLINE int64_t page_of(const FlashAttentionParams& f, int64_t b, int64_t i) {
  const int64_t page = f.block_table[b * f.block_table_stride + i];
  return page < 0 ? 0 : page < f.pages ? page : f.pages - 1;
}

// ---- random numbers ----------------------------------------------------------------------------------------------------

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

  // What the weights of `rows` keys from `key` on (rows of `to`) and `columns` queries from `query` on are multiplied by.
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

// ---- terms of the scores -----------------------------------------------------------------------------------------------

// Whether scores with their terms, in units of log 2, are all below a bound in magnitude, or -infinity.
template <class S>
struct Bounded {
  S bound;
  Mask<S> beyond{};

  PYKERNELS_INLINE void look(Vec<S> x) {
    // Not below, rather than above: NaN is neither.
    beyond |= ~(x < splat(bound)) | ((x <= splat(-bound)) & (x > splat(-static_cast<S>(kInfinity))));
  }
  bool holds() const {
    bool any = false;
    for (int i = 0; i < kLanes<S>; ++i) any |= beyond[i] != 0;
    return !any;
  }
};

template <class T>
class ScoreTerms {
  using S = Wide<T>;
  static constexpr int kLane = kLanes<S>;

 public:
  explicit ScoreTerms(const FlashAttentionParams& f) : f_(f) {}
  bool on() const { return f_.alibi_slopes || f_.bias; }

  // s[j] = factor * s[j] + terms, in units of log 2, of query `query` and n keys (a multiple of the vector length) from `key` on;
  // those beyond the sequence get any terms.
  void add(S* s, int n, S factor, const Place& place, int64_t query, int64_t key, Bounded<S>& bounded) const {
    if (!f_.bias) return add_typed<None>(s, n, factor, place, query, key, bounded);
    if (f_.bias_type == BiasType::kBoolean) return add_typed<uint8_t>(s, n, factor, place, query, key, bounded);
    if constexpr (!std::is_same_v<T, double>)
      if (f_.bias_type == BiasType::kFloat32) return add_typed<float>(s, n, factor, place, query, key, bounded);
    add_typed<T>(s, n, factor, place, query, key, bounded);
  }

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

  template <class B>
  void add_typed(S* s, int n, S factor, const Place& place, int64_t query, int64_t key, Bounded<S>& bounded) const {
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
    for (int j = 0; j < n; j += kLane) {
      Vec<S> x = load(s + j) * factor - slope * abs<S>(iota<S>() + (static_cast<S>(j) - distance)) + constant;
      if constexpr (biased)
        if (by_key) x += load_bias(bias + j, keys - j);
      bounded.look(x);
      store(s + j, x);
    }
  }

  template <class B>
  void tile_typed(const Place& place, int64_t query, int columns, int64_t key, int rows, S* to) const {
    const int64_t queries = place.tq - query, keys = place.tk - key;
    if (f_.bias_stride.row == 0 || f_.bias_stride.key == 0) {
      const B* const bias = address<B>(place, query, f_.bias_stride.key ? key : 0);
      for (int c = 0; c < columns; c += kLane) {
        Vec<S> of_query{};
        if (f_.bias_stride.row)
          for (int i = 0; i < least<int64_t>(kLane, queries - c); ++i) of_query[i] = bias_at(bias + (c + i) * f_.bias_stride.row);
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
