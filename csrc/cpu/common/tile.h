// Moving tiles of channels x tokens between tensors of any dtype and layout and compute-type scratch, and the segments
// that the tokens of a batch or of packed sequences are worked through in.
#pragma once

#include "simd.h"

namespace pykernels::cpu::PYKERNELS_ISA {

// dst[r * ld + c] = src[r * row + c * column] for r < rows, c < columns. Writes each row to the next multiple of the
// vector (zeros), so ld must leave that room. Fast where row or column is 1; transposes in registers where it is row.
template <class T>
void load_tile(Wide<T>* dst, int64_t ld, const T* src, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  if (column == 1 || columns == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += lanes) store(dst + r * ld + c, load_upto(src + r * row + c, columns - c));
  } else if (row == 1 || rows == 1) {
    for (int64_t c = 0; c < columns; c += lanes)
      for (int64_t r = 0; r < rows; r += lanes) {
        Vec<S> v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          v[i] = c + i < columns ? load_upto(src + r + (c + i) * column, rows - r) : Vec<S>{};
        transpose(v);
        if (rows - r >= lanes) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) store(dst + (r + i) * ld + c, v[i]);
        } else {
          for (int i = 0; i < rows - r; ++i) store(dst + (r + i) * ld + c, v[i]);
        }
      }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) dst[r * ld + c] = to_float(src[r * row + c * column]);
      for (int64_t c = columns; c % lanes != 0; ++c) dst[r * ld + c] = 0;
    }
  }
}

// store_upto, but denormals stay: AVX-512's conversion to bf16 makes them zero.
template <class T>
PYKERNELS_INLINE void store_exact_upto(T* p, Vec<Wide<T>> v, int64_t n) {
  store_upto(p, v, n);
}
#if defined(__AVX512BF16__)
template <>
PYKERNELS_INLINE void store_exact_upto<BFloat16>(BFloat16* p, Vec<float> v, int64_t n) {
  constexpr int denormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, denormal) == 0, 1)) return store_upto(p, v, n);
  for (int i = 0; i < least<int64_t>(n, kLanes<float>); ++i) p[i] = from_float<BFloat16>(v[i]);
}
#endif

// dst[r * row + c * column] = src[r * ld + c] for r < rows, c < columns, rounded to T; nothing else is written. src is
// read in whole vectors, and when row is 1 in whole squares of them where ld leaves room for the columns.
template <class T>
void store_tile(T* dst, int64_t row, int64_t column, const Wide<T>* src, int64_t ld, int64_t rows, int64_t columns) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  if (column == 1 || columns == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += lanes)
        store_exact_upto(dst + r * row + c, load(src + r * ld + c), columns - c);
  } else if (row == 1 || rows == 1) {
    for (int64_t c = 0; c < columns; c += lanes)
      for (int64_t r = 0; r < rows; r += lanes) {
        Vec<S> v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = r + i < rows ? load(src + (r + i) * ld + c) : Vec<S>{};
        transpose(v);
        for (int i = 0; i < least<int64_t>(lanes, columns - c); ++i)
          store_exact_upto(dst + r + (c + i) * column, v[i], rows - r);
      }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        if constexpr (sizeof(T) == sizeof(S))
          dst[r * row + c * column] = src[r * ld + c];
        else
          dst[r * row + c * column] = from_float<T>(src[r * ld + c]);
      }
  }
}

// f(null pointer to the type that dtype stands for), and what it returns. S = double goes with fp64 alone.
template <class S, class F>
PYKERNELS_INLINE auto for_dtype(DType dtype, F&& f) {
  if constexpr (sizeof(S) == 8)
    return f(static_cast<double*>(nullptr));
  else if (dtype == DType::kFloat32)
    return f(static_cast<float*>(nullptr));
  else if (dtype == DType::kBFloat16)
    return f(static_cast<BFloat16*>(nullptr));
  else
    return f(static_cast<Float16*>(nullptr));
}

// The same for a dtype known at run time; `offset`, in elements, is added to the pointer.
template <class S>
void load_tile(S* dst, int64_t ld, DType dtype, const void* src, int64_t offset, int64_t row, int64_t column,
               int64_t rows, int64_t columns) {
  for_dtype<S>(dtype, [&]<class T>(T*) {
    load_tile(dst, ld, static_cast<const T*>(src) + offset, row, column, rows, columns);
  });
}
template <class S>
void store_tile(DType dtype, void* dst, int64_t offset, int64_t row, int64_t column, const S* src, int64_t ld,
                int64_t rows, int64_t columns) {
  for_dtype<S>(dtype, [&]<class T>(T*) {
    store_tile(static_cast<T*>(dst) + offset, row, column, src, ld, rows, columns);
  });
}

namespace detail {
// Lane i of `row`, or of `next` where it is next's, vector number Number: lane i of the result is entry source(i) of
// all vectors in a row. `row` holds what the vectors before `next` have.
template <int Number, class Source, class V, size_t... I>
PYKERNELS_INLINE V collect(V row, V next, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  constexpr auto from = [](int i) {
    const int entry = Source::of(i, lanes), lane = entry % lanes;
    return entry / lanes == Number ? lanes + lane : Number == 1 && entry < lanes ? lane : i;
  };
  return __builtin_shufflevector(row, next, from(I)...);
}
template <class Source, int Number = 1, class V, int N>
PYKERNELS_INLINE V collect_from(V row, const V (&rows)[N]) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if constexpr (Number < N) {
    const V next = collect<Number, Source>(row, rows[Number], std::make_index_sequence<lanes>{});
    return collect_from<Source, Number + 1>(next, rows);
  } else {
    return row;
  }
}
template <int N, int Column>
struct OfColumn {
  static constexpr int of(int i, int) { return i * N + Column; }
};
template <int N, int Part>
struct OfPart {
  static constexpr int of(int i, int lanes) { return (Part * lanes + i) % N * lanes + (Part * lanes + i) / N; }
};
}  // namespace detail

// Lane i of columns[j] becomes entry i * N + j of the vectors in a row: the columns of a matrix of N columns, given its
// memory.
template <class V, int N, size_t... J>
PYKERNELS_INLINE void deinterleave(V (&columns)[N], std::index_sequence<J...>) {
  const V result[N] = {detail::collect_from<detail::OfColumn<N, J>>(columns[0], columns)...};
  ((columns[J] = result[J]), ...);
}
template <class V, int N>
PYKERNELS_INLINE void deinterleave(V (&columns)[N]) {
  deinterleave(columns, std::make_index_sequence<N>{});
}
// Its inverse.
template <class V, int N, size_t... J>
PYKERNELS_INLINE void interleave(V (&columns)[N], std::index_sequence<J...>) {
  const V result[N] = {detail::collect_from<detail::OfPart<N, J>>(columns[0], columns)...};
  ((columns[J] = result[J]), ...);
}
template <class V, int N>
PYKERNELS_INLINE void interleave(V (&columns)[N]) {
  interleave(columns, std::make_index_sequence<N>{});
}

// 1 / x for normal x up to 2^126 in magnitude, within 1 ulp or so; a quarter of a division's time on AVX-512.
template <class S>
PYKERNELS_INLINE Vec<S> reciprocal(Vec<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    const Vec<S> r = (Vec<S>)_mm512_rcp14_ps((__m512)x);
    return r * (1.0f - x * r) + r;
  }
#endif
  return static_cast<S>(1) / x;
}

// e^x to a few ulp however large x is: exp2(x log2 e) alone loses as many bits as its exponent takes. x is clamped to
// where the result is a normal number.
template <class S>
PYKERNELS_INLINE Vec<S> exact_exp(Vec<S> x) {
  constexpr bool single = sizeof(S) == 4;
  constexpr S round = static_cast<S>(single ? 0x1.8p23 : 0x1.8p52);
  // ln 2 in two parts, the first of so few bits that n times it is exact.
  constexpr S high = static_cast<S>(single ? 0.693359375 : 6.93145751953125e-1);
  constexpr S low = static_cast<S>(single ? -2.12194440054690583e-4 : 1.42860682030941723212e-6);
  const Vec<S> limit = splat(static_cast<S>(single ? -87 : -708));
  const Vec<S> y = -max<S>(limit, -max<S>(limit, x));  // NaN for NaN
  const Vec<S> shifted = y * static_cast<S>(kLog2e) + round, n = shifted - round, rest = (y - n * high) - n * low;
  const Mask<S> power = (single ? 127 : 1023) + ((Mask<S>)shifted - (Mask<S>)splat(round));
  return exp2<S>(rest * static_cast<S>(kLog2e)) * (Vec<S>)(power << (single ? 23 : 52));
}
// 1 / (1 + e^-x) given e = e^-|x|, to a few ulp.
template <class S>
PYKERNELS_INLINE Vec<S> exact_sigmoid(Vec<S> x, Vec<S> e) {
  return ((x < Vec<S>{}) ? e : splat(static_cast<S>(1))) * reciprocal<S>(e + static_cast<S>(1));
}

// 1 / (1 + e^-x), at least 2^-126. In fp32 with an error of a few ulp of 1 only: fast, for activations.
template <class S>
PYKERNELS_INLINE Vec<S> sigmoid(Vec<S> x) {
  if constexpr (sizeof(S) == 8) return exact_sigmoid<S>(x, exact_exp<S>(-abs<S>(x)));
  // -max(-126, y) is the lesser of 126 and -y, and NaN for NaN.
  const Vec<S> y = max<S>(splat(static_cast<S>(-126)), x * static_cast<S>(kLog2e));
  return reciprocal<S>(exp2<S>(-y) + static_cast<S>(1));
}

// The derivative of x s, s = sigmoid(x).
template <class S>
PYKERNELS_INLINE Vec<S> silu_slope(Vec<S> x, Vec<S> s) {
  Vec<S> rest = static_cast<S>(1) - s;
  if constexpr (sizeof(S) == 8) rest = sigmoid<S>(-x);  // without the cancellation
  return s * (x * rest + static_cast<S>(1));
}

// A run of tokens of one sequence: [first, last) of its `length` tokens, which start at token `start` of batch entry
// `batch`.
struct Segment {
  int64_t sequence, batch, start, length, first, last;
  bool empty() const { return first >= last; }
};

// The segments of at most `block` tokens that a batch of equally long sequences, or one batch entry of packed ones,
// falls into. Each sequence has at least one, its first, which may be empty; others may be empty too. What comes after
// the packed sequences is a sequence of its own, number `sequences`. Count and order depend on shapes and cu_seqlens
// alone.
class Segments {
 public:
  Segments(int64_t batch, int64_t length, const int32_t* cu_seqlens, int64_t sequences, int64_t block)
      : length_(length), cu_(cu_seqlens), sequences_(sequences), block_(block) {
    per_sequence_ = length / block + 1;
    count_ = cu_ != nullptr ? length / block + sequences + 1 : batch * per_sequence_;
  }
  int64_t count() const { return count_; }

  Segment operator[](int64_t i) const {
    if (cu_ == nullptr) return at(i / per_sequence_, i % per_sequence_);
    // Sequence s owns the segments from cu[s] / block + s on: at least one, and as many as it needs.
    int64_t low = 0, high = sequences_;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_of(middle) <= i)
        low = middle;
      else
        high = middle - 1;
    }
    return at(low, most<int64_t>(0, i - first_of(low)));
  }
  // Segment number `within` of a sequence, its index being first_of(sequence) + within.
  Segment at(int64_t sequence, int64_t within) const {
    Segment s;
    s.sequence = sequence;
    s.batch = cu_ == nullptr ? sequence : 0;
    s.start = cu_ == nullptr ? 0 : offset(sequence);
    s.length = cu_ == nullptr ? length_
                              : most<int64_t>(0, (sequence < sequences_ ? offset(sequence + 1) : length_) - s.start);
    s.first = within * block_;
    s.last = least(s.first + block_, s.length);
    return s;
  }
  // The first segment of a sequence.
  int64_t first_of(int64_t sequence) const {
    return cu_ == nullptr ? sequence * per_sequence_ : offset(sequence) / block_ + sequence;
  }
  // One past the last segment of a sequence.
  int64_t end_of(int64_t sequence) const {
    return cu_ == nullptr ? (sequence + 1) * per_sequence_ : sequence < sequences_ ? first_of(sequence + 1) : count_;
  }
  bool belongs(const Segment& s) const { return cu_ == nullptr || s.sequence < sequences_; }

 private:
  int64_t offset(int64_t i) const { return least(most<int64_t>(cu_[i], 0), length_); }

  int64_t length_;
  const int32_t* cu_;
  int64_t sequences_, block_, per_sequence_, count_;
};

}  // namespace pykernels::cpu::PYKERNELS_ISA
