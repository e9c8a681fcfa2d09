// What the chunked kernels share: sequences and their segments, decay factors, products inside a chunk.
//
// Weights are products of per-token factors e^{decay} <= 1, never quotients of cumulative products: a factor of 0 and
// factors below e^-50 keep their exact meaning, and nothing overflows. Between query i and key j <= i of a chunk the
// weight is
//     w(i, j) = product of factor_t over  j < t <= i,   with a bonus over  j < t < i,
// one number per pair (Kind::scalar), or one per key channel (channel decay), for which a chunk is split in half again
// and again: of the pairs across the middle m, queries carry the product from m on and keys the product up to m, so
// that their scores are a matrix product. Blocks of kLeaf tokens are left; those are summed pair by pair.
#pragma once

#include "../../include/pykernels/linear_attention.h"
#include "../common/matmul.h"
#include "../common/pages.h"
#include "../common/scratch.h"

namespace pykernels::cpu::PYKERNELS_ISA::linear {

constexpr int kChunk = 64;  // tokens
constexpr int kRows = 32;   // of a chunk's score matrix at a time; what lies above the diagonal block is not computed
constexpr int kLeaf = 16;   // a power of two, as is kChunk / kLeaf
constexpr int64_t kSegment = LinearAttentionParams::kSegment;
static_assert(kSegment % kChunk == 0 && kRows % 32 == 0);

// ---- sequences -----------------------------------------------------------------------------------------------------

struct Sequence {
  int64_t batch, first, length, tile;  // batch entry, first token, tokens, first tile
  int64_t segments() const { return (length + kSegment - 1) / kSegment; }
};

PYKERNELS_INLINE int64_t clamped(int64_t x, int64_t high) { return x < 0 ? 0 : x > high ? high : x; }

inline Sequence sequence(const LinearAttentionParams& p, int64_t s) {
  if (!p.cu_seqlens) return {s, 0, p.tokens, s * ((p.tokens + kSegment - 1) / kSegment)};
  const int64_t first = clamped(p.cu_seqlens[s], p.tokens), last = clamped(p.cu_seqlens[s + 1], p.tokens);
  return {0, first, most<int64_t>(last - first, 0), first / kSegment + s};
}

// Row i of a chunk lies at data + i * stride; stride is negative when time runs backwards.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
  T* operator[](int64_t row) const { return data + row * stride; }
};

// Brings the rows of the chunk that comes next nearer: a few lines at each product of tiles, so that memory is not
// waited for. Products of SplitF32 read more operands per result, and lines from memory keep them from the buffers that
// all loads go through: with that type the rows of the chunk at hand are asked for at once, before it is packed.
class Ahead {
 public:
  explicit Ahead(int products) : products_(products) {}

  void clear() { part_ = parts_ = line_ = total_ = 0; }
  template <class T>
  void add(Rows<T> rows, int count, int columns) {
    const int lines = static_cast<int>((columns * sizeof(T) + 63) / 64);
    parts[parts_++] = {reinterpret_cast<const char*>(rows.data), rows.stride * static_cast<int64_t>(sizeof(T)), count,
                       lines};
    total_ += count * lines;
  }
  // All of them, now and into the first-level cache.
  void fetch() {
    for (; part_ < parts_; ++part_) {
      const Part& part = parts[part_];
      for (int row = 0; row < part.rows; ++row)
        for (int line = 0; line < part.lines; ++line) __builtin_prefetch(part.row + row * part.stride + 64 * line);
    }
  }
  PYKERNELS_INLINE void operator()() {
    for (int due = 0; part_ < parts_ && due < total_; due += products_) {
      Part& part = parts[part_];
      __builtin_prefetch(part.row + 64 * line_, 0, 2);
      if (++line_ < part.lines) continue;
      line_ = 0;
      part.row += part.stride;
      if (--part.rows == 0) ++part_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t stride;
    int rows, lines;
  };
  Part parts[7];
  int products_, part_ = 0, parts_ = 0, line_ = 0, total_ = 0;
};

template <class T>
Rows<T> rows_of(const LinearAttentionParams& p, const void* x, const Strides3& stride, const Sequence& s,
                int64_t head) {
  T* const base = static_cast<T*>(const_cast<void*>(x)) + s.batch * stride.batch + head * stride.head;
  if (p.reverse) return {base + (s.first + s.length - 1) * stride.token, -stride.token};
  return {base + s.first * stride.token, stride.token};
}

#if defined(__AVX512F__)
PYKERNELS_INLINE void store_past_caches(float* p, Vec<float> x) { _mm512_stream_ps(p, (__m512)x); }
template <class T>
PYKERNELS_INLINE void store_past_caches(T* p, Vec<float> x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(x, T{}));
}
#endif

// Writes the rows of results. Tensors of twice a second-level cache and more go past the caches: their lines are not
// read before they are written (a tenth of the backward pass's time), and push nothing out. Each thread has its own.
class ResultWriter {
 public:
  explicit ResultWriter(int64_t bytes) : past_caches(bytes >= int64_t{4} << 20) {}
  ResultWriter(const ResultWriter&) = delete;
  ResultWriter& operator=(const ResultWriter&) = delete;
  ~ResultWriter() {
#if defined(__AVX512F__)
    _mm_sfence();  // other threads may read the rows next
#endif
  }

  // to[c] = element(c), vector by vector.
  template <class T, class F>
  PYKERNELS_INLINE void row(T* to, int columns, F&& element) const {
    constexpr int lanes = kLanes<Wide<T>>;
    int c = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(Wide<T>) == 4)
      if (past_caches && reinterpret_cast<uintptr_t>(to) % (lanes * sizeof(T)) == 0)
        for (; c + lanes <= columns; c += lanes) store_past_caches(to + c, element(c));
#endif
    for (; c < columns; c += lanes) store_upto(to + c, element(c), columns - c);
  }

  const bool past_caches;
};

// Heads that one task takes side by side, at most. The rows of a head lie a whole token apart; with those of its
// neighbours they make the runs that hardware prefetches and pages like. The states of all must fit the second-level
// cache.
constexpr int kHeads = 4;
inline int heads_together(const LinearAttentionParams& p, int threads) {
  constexpr int64_t kMostBytes = 512 << 10;
  const int64_t state = p.key_dim * p.value_dim_state() * (p.dtype == DType::kFloat64 ? 8 : 4);
  int group = kHeads;
  while (group > 1 &&
         (p.heads % group != 0 || p.state_count() * p.heads / group < threads || group * state > kMostBytes))
    group /= 2;
  return group;
}

PYKERNELS_INLINE Strides3 contiguous_strides(const LinearAttentionParams& p, int64_t columns) {
  return {p.tokens * p.heads * columns, p.heads * columns, columns};
}

// ---- small loops ---------------------------------------------------------------------------------------------------

// Rows of scratch matrices are padded to whole vectors of every type.
PYKERNELS_INLINE int padded(int64_t n) { return static_cast<int>(round_up(n, 32)); }

template <class A>
PYKERNELS_INLINE void fill(A* x, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// e^x for x <= 0, within about 1 ulp: the rounding of x log2 e would cost |x| ulp.
template <class A>
PYKERNELS_INLINE Vec<A> exp_decay(Vec<A> x) {
  constexpr A high = static_cast<A>(kLog2e);
  constexpr A low = static_cast<A>(sizeof(A) == 4 ? kLog2e - static_cast<double>(high) : 2.0355273740931033e-17);
  // Below -800 the result is 0 in every type; an infinite x would make NaN of the correction.
  const Vec<A> bounded = x < static_cast<A>(-800) ? splat<A>(-800) : x;
  const Vec<A> y = bounded * high;
  Vec<A> error;  // of y, which a fused multiply-add gives exactly
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    error = (Vec<A>)_mm512_fmsub_ps((__m512)bounded, (__m512)splat<A>(high), (__m512)y);
  else
    error = (Vec<A>)_mm512_fmsub_pd((__m512d)bounded, (__m512d)splat<A>(high), (__m512d)y);
#elif defined(__FMA__)
  if constexpr (sizeof(A) == 4)
    error = (Vec<A>)_mm256_fmsub_ps((__m256)bounded, (__m256)splat<A>(high), (__m256)y);
  else
    error = (Vec<A>)_mm256_fmsub_pd((__m256d)bounded, (__m256d)splat<A>(high), (__m256d)y);
#else
  for (int i = 0; i < kLanes<A>; ++i) {
    if constexpr (sizeof(A) == 4)
      error[i] = static_cast<float>(static_cast<double>(bounded[i]) * high - static_cast<double>(y[i]));
    else
      error[i] = __builtin_fma(bounded[i], high, -y[i]);
  }
#endif
  return exp2<A>(y) * (static_cast<A>(1) + (error + bounded * low) * static_cast<A>(kLn2));
}
template <class A>
PYKERNELS_INLINE A exp_decay_scalar(A x) {
  return exp_decay<A>(splat<A>(x))[0];
}

// x, rounded to T.
template <class T, class A>
PYKERNELS_INLINE T element(A x) {
  if constexpr (sizeof(T) == sizeof(A))
    return x;
  else
    return from_float<T>(x);
}

template <class A>
PYKERNELS_INLINE void store_element(A* p, Vec<A> x) {
  store(p, x);
}
PYKERNELS_INLINE void store_element(BFloat16* p, Vec<float> x) { store(p, x); }

// Rows that are transposed, packed, or multiplied from the left later on: what the operands of C are made of. SplitF32
// takes its operands apart only then.
template <class C>
using Row = std::conditional_t<kIsSplit<C>, typename C::Acc, typename C::Elem>;

// Calls store(c, vector) with the elements of a row of a left operand, vector by vector up to a whole number of
// kDepthAlign.
template <class C, class F>
PYKERNELS_INLINE void write_row(typename C::Elem* row, int columns, F&& element) {
  constexpr int lanes = kLanes<typename C::Acc>;
  if constexpr (kIsSplit<C>) {
#if defined(PYKERNELS_HAS_AMX)
    for (int c = 0; c < columns; c += 2 * lanes) store_row(row + c, split(element(c), element(c + lanes)));
#endif
  } else {
    for (int c = 0; c < round_up(columns, most(lanes, C::kDepthAlign)); c += lanes) store_element(row + c, element(c));
  }
}

// to[i][c] = source[i][c] * factor(i, c), zeros from `columns` up to a whole number of kDepthAlign. To: Row<C> or
// C::Elem.
template <class C, class To, class T, class F>
PYKERNELS_INLINE void scale_rows(To* to, int64_t ld, Rows<T> source, int rows, int columns, F&& factor) {
  constexpr int lanes = kLanes<typename C::Acc>;
  for (int i = 0; i < rows; ++i) {
    const T* const from = source[i];
    const auto element = [&](int c) { return Vec<typename C::Acc>(load_upto(from + c, columns - c) * factor(i, c)); };
    if constexpr (std::is_same_v<To, typename C::Elem>) {
      write_row<C>(to + i * ld, columns, element);
    } else {
      for (int c = 0; c < columns; c += lanes) store(to + i * ld + c, element(c));
    }
  }
}

// Rows as the left operand of a product: in place where their type and padding allow, else copied to `buffer` [rows,
// padded].
template <class C, class T, class Map = AsTheyAre>
PYKERNELS_INLINE MatrixA<C> left_operand(typename C::Elem* buffer, Rows<T> source, int rows, int columns,
                                         Map map = {}) {
  if constexpr (sizeof(T) == sizeof(typename C::Elem) && C::kPair == (sizeof(T) == 2 ? 2 : 1)) {
    if (columns % C::kDepthAlign == 0 && rows % C::kRowAlign == 0)
      return {reinterpret_cast<const typename C::Elem*>(source.data), source.stride};
  }
  copy_rows<C>(buffer, padded(columns), source.data, source.stride, rows, columns, map);
  return {buffer, padded(columns)};
}
// The same of our own rows, which are padded already.
template <class C>
PYKERNELS_INLINE MatrixA<C> left_operand(typename C::Elem* buffer, const Row<C>* rows, int64_t ld, int count,
                                         int columns) {
  if constexpr (kIsSplit<C>) {
    copy_rows<C>(buffer, padded(columns), rows, ld, count, columns);
    return {buffer, padded(columns)};
  } else {
    return {rows, ld};
  }
}

// The largest magnitude of what it sees, infinity and NaN above all numbers.
template <class A>
class Peak {
 public:
  PYKERNELS_INLINE void see(Vec<A> x) {
    const Mask<A> bits = (Mask<A>)abs<A>(x);
    top_ = bits > top_ ? bits : top_;
  }
  A value() const {
    auto result = top_[0];
    for (int i = 1; i < kLanes<A>; ++i) result = most(result, top_[i]);
    return bit_cast<A>(result);
  }

 private:
  Mask<A> top_{};
};
// For the functions that make operands: lets the peak see what goes into them, for SplitF32, which alone asks for it.
template <class C>
PYKERNELS_INLINE auto seen_by(Peak<typename C::Acc>& peak) {
  if constexpr (kIsSplit<C>)
    return [&peak](Vec<typename C::Acc> x, int, int) {
      peak.see(x);
      return x;
    };
  else
    return AsTheyAre{};
}

// ---- decay ---------------------------------------------------------------------------------------------------------

// The factors of one chunk.
//   query(i, c): from the chunk's start to query i, scaled.   key(j, c): from key j to the chunk's end.
//   total: of the chunk.
// Scalar decay keeps them in vectors [kChunk] and the weights in weight [kChunk, kChunk], zero above the diagonal (on
// it too with a bonus); channel decay in matrices [kChunk, Kp].
template <class A, bool Channel>
struct Factors {
  A* query;
  A* key;
  A* total;    // [Kp] (scalar: all the same)
  A* weight;   // scalar
  A* token;    // channel: e^decay [kChunk, Kp]
  A* power;    // kHead and kNone: e^{n decay} for n = 0 .. kChunk
  int width;   // Kp
  bool exclusive;
  bool constant;

  void allocate(Scratch& scratch, int key_dim_padded, bool with_bonus) {
    width = key_dim_padded;
    exclusive = with_bonus;
    const int64_t size = Channel ? static_cast<int64_t>(kChunk) * width : kChunk;
    query = scratch.take<A>(size);
    key = scratch.take<A>(size);
    total = scratch.take<A>(width);
    weight = Channel ? nullptr : scratch.take<A>(kChunk * kChunk);
    token = Channel ? scratch.take<A>(size) : nullptr;
    power = Channel ? nullptr : scratch.take<A>(kChunk + 1);
    constant = false;
  }

  // Of a decay that is the same for every token of the head; `decay` null: none.
  void prepare_constant(const A* decay) {
    if constexpr (!Channel) {
      constant = true;
      const double log_factor = decay ? static_cast<double>(*decay) : 0.0;
      for (int n = 0; n <= kChunk; ++n)
        power[n] = n == 0 ? A(1) : static_cast<A>(exp_decay_scalar<double>(n * log_factor));
      for (int i = 0; i < kChunk; ++i)
        for (int j = 0; j < kChunk; ++j) {
          const int distance = i - j - (exclusive ? 1 : 0);
          weight[i * kChunk + j] = distance >= 0 ? power[distance] : A(0);
        }
    }
  }

  // Of n tokens at `decay`; row_scale[i] is the factor on query i's scores.
  void prepare(Rows<const A> decay, int key_dim, int n, const A* row_scale) {
    constexpr int lanes = kLanes<A>;
    if constexpr (Channel) {
      for (int c = 0; c < width; c += lanes) {
        Vec<A> product = splat<A>(1);
        for (int i = 0; i < n; ++i) {
          const Vec<A> f = exp_decay<A>(load_upto(decay[i] + c, key_dim - c));
          store(token + i * width + c, f);
          const Vec<A> next = product * f;
          store(query + i * width + c, (exclusive ? product : next) * row_scale[i]);
          product = next;
        }
        store(total + c, product);
        product = splat<A>(1);
        for (int j = n - 1; j >= 0; --j) {
          store(key + j * width + c, product);
          product = product * load(token + j * width + c);
        }
      }
    } else if (constant) {
      for (int i = 0; i < n; ++i) query[i] = power[exclusive ? i : i + 1] * row_scale[i];
      for (int j = 0; j < n; ++j) key[j] = power[n - 1 - j];
      fill(total, width, power[n]);
    } else {
      A factor[kChunk], product = 1;
      for (int i = 0; i < n; ++i) factor[i] = *decay[i];
      for (int i = 0; i < n; i += lanes)
        store_upto(factor + i, exp_decay<A>(load_upto(factor + i, n - i)), n - i);
      for (int i = 0; i < n; ++i) {
        query[i] = (exclusive ? product : product * factor[i]) * row_scale[i];
        product *= factor[i];
      }
      fill(total, width, product);
      product = 1;
      for (int j = n - 1; j >= 0; --j) {
        key[j] = product;
        product *= factor[j];
      }
      // Row i from row i - 1: times factor_i, and 1 on the diagonal. `row` is that of weights over j < t <= i.
      Vec<A> row[kChunk / lanes] = {};
      const Vec<A> index = iota<A>();
      for (int i = 0; i < n; ++i) {
        A* const to = weight + i * kChunk;
        for (int c = 0; c < kChunk; c += lanes) {
          if (exclusive) store(to + c, row[c / lanes]);
          const Vec<A> scaled = row[c / lanes] * factor[i];
          row[c / lanes] = index == static_cast<A>(i - c) ? splat<A>(1) : scaled;
          if (!exclusive) store(to + c, row[c / lanes]);
        }
      }
    }
  }

  // The largest of n queries' factors.
  A largest_query_factor(int n) const {
    const int columns = Channel ? width : 1;
    return magnitudes(query, columns, n, columns, static_cast<A>(kInfinity)).seen();
  }

  PYKERNELS_INLINE Vec<A> query_at(int i, int c) const {
    return Channel ? load(query + i * width + c) : splat<A>(query[i]);
  }
  PYKERNELS_INLINE Vec<A> key_at(int j, int c) const { return Channel ? load(key + j * width + c) : splat<A>(key[j]); }
};

// state *= total, row by row.
template <class A>
PYKERNELS_INLINE void decay_state(A* state, int64_t ld, const A* total, int key_dim) {
  for (int k = 0; k < key_dim; ++k) {
    if (total[k] == A(1)) continue;
    for (int c = 0; c < ld; c += kLanes<A>) store(state + k * ld + c, load(state + k * ld + c) * total[k]);
  }
}

// to = factor * from + local, row by row; from may be null (zero).
template <class A>
PYKERNELS_INLINE void combine_state(A* to, int64_t ld_to, const A* factor, const A* from, int64_t ld_from,
                                    const A* local, int64_t ld_local, int key_dim, int columns) {
  for (int k = 0; k < key_dim; ++k)
    for (int c = 0; c < columns; c += kLanes<A>) {
      const int left = columns - c;
      Vec<A> x = load_upto(local + k * ld_local + c, left);
      if (from) x = load_upto(from + k * ld_from + c, left) * factor[k] + x;
      store_upto(to + k * ld_to + c, x, left);
    }
}

// In one pass over a panel of a state [key_dim, kPanel], `columns` of it: packs factor * from + local (from may be
// null: zero) as an operand and, unless null, writes it to `whole` [key_dim, ld_whole] too, and multiplies local by
// total. For SplitF32 -> the largest magnitude.
template <class C>
typename C::Acc pack_panel(typename C::Elem* b, const typename C::Acc* factor, const typename C::Acc* from,
                           int64_t ld_from, typename C::Acc* local, const typename C::Acc* total, int key_dim,
                           int columns, typename C::Acc* whole, int64_t ld_whole) {
  using A = typename C::Acc;
  constexpr int lanes = kLanes<A>;
  [[maybe_unused]] Peak<A> peak;
  // `all`: all columns, of a number that the compiler knows.
  const auto pack = [&](auto all) {
    constexpr bool whole_panel = decltype(all)::value;
    const auto state = [&](int k, int c) {
      if (k >= key_dim) return Vec<A>{};
      A* const p = local + k * C::kPanel + c;
      Vec<A> x = load(p);
      store(p, x * total[k]);
      if (from) {
        const A* const y = from + k * ld_from + c;
        x = (whole_panel ? load(y) : load_upto(y, columns - c)) * factor[k] + x;
      }
      if (whole) store(whole + k * ld_whole + c, x);
      if constexpr (kIsSplit<C>) peak.see(x);
      return x;
    };
    const int columns_padded = whole_panel ? C::kPanel : round_up(columns, C::kColumnAlign);
    if constexpr (kIsSplit<C>) {
#if defined(PYKERNELS_HAS_AMX)
      for (int k = 0; k < key_dim; k += 32)
        for (int i = 0; i < 16; ++i)
#pragma GCC unroll 2
          for (int c = 0; c < columns_padded; c += lanes)
            store_pair(b + k * C::kPanel, i, c, split(state(k + i, c), state(k + i + 16, c)));
#endif
    } else {
      for (int k = 0; k < round_up(key_dim, C::kDepthAlign); k += C::kPair)
#pragma GCC unroll 4
        for (int c = 0; c < columns_padded; c += lanes) {
          typename C::Elem* const to = b + k * C::kPanel + c * C::kPair;
          if constexpr (C::kPair == 1) {
            store(to, state(k, c));
          } else {
#if defined(PYKERNELS_HAS_BF16_DOT)
            const HalfU16 low = narrow(state(k, c), BFloat16{}), high = narrow(state(k + 1, c), BFloat16{});
            const VecU32 pairs = detail::interleave(low, high);
            __builtin_memcpy(to, &pairs, sizeof(pairs));
#endif
          }
        }
    }
  };
  if (columns == C::kPanel)
    pack(std::true_type{});
  else
    pack(std::false_type{});
  return kIsSplit<C> ? peak.value() : A(0);
}

// ---- channel decay inside a chunk ----------------------------------------------------------------------------------

// One way of pairing up blocks of `size` tokens: keys [first, first + size), queries [first + size, ...), first a
// multiple of 2 size. Every token belongs to one block, as a query or as a key: row t of `side` [kChunk, Kp] is its
// factor, and row t of `scaled` [kChunk, Kd] the query or key times it.
template <class A>
PYKERNELS_INLINE void level_factors(const Factors<A, true>& f, int size, int n, A* side) {
  constexpr int lanes = kLanes<A>;
  const int width = f.width;
  for (int first = 0; first < n; first += 2 * size) {
    const int middle = first + size, end = least(middle + size, n);
    if (middle >= n) break;
    for (int c = 0; c < width; c += lanes) {
      Vec<A> product = splat<A>(1);
      for (int i = middle; i < end; ++i) {
        const Vec<A> next = product * load(f.token + i * width + c);
        store(side + i * width + c, f.exclusive ? product : next);
        product = next;
      }
      product = splat<A>(1);
      for (int j = middle - 1; j >= first; --j) {
        store(side + j * width + c, product);
        product = product * load(f.token + j * width + c);
      }
    }
  }
}

template <class C, class T>
PYKERNELS_INLINE void level_rows(Row<C>* scaled, int64_t ld, const typename C::Acc* side, int width, Rows<T> q,
                                 Rows<T> k, int key_dim, int size, int n) {
  using A = typename C::Acc;
  for (int first = 0; first + size < n; first += 2 * size) {
    const int middle = first + size;
    scale_rows<C>(scaled + first * ld, ld, k.from(first), size, key_dim,
                  [&](int i, int c) { return Vec<A>(load(side + (first + i) * width + c)); });
    scale_rows<C>(scaled + middle * ld, ld, q.from(middle), least(size, n - middle), key_dim,
                  [&](int i, int c) { return Vec<A>(load(side + (middle + i) * width + c)); });
  }
}

// Scores of the pairs inside blocks of kLeaf tokens, weights included; zero above the diagonal (and on it when
// exclusive).
template <class A, class T>
void leaf_scores(const Factors<A, true>& f, Rows<T> q, Rows<T> k, int key_dim, int n, A* scores) {
  constexpr int lanes = kLanes<A>;
  for (int first = 0; first < n; first += kLeaf) {
    const int count = least(kLeaf, n - first);
    Vec<A> sum[kLeaf][kLeaf];  // [query][key]
    for (int i = 0; i < kLeaf; ++i)
      for (int j = 0; j < kLeaf; ++j) sum[i][j] = Vec<A>{};
    for (int c = 0; c < key_dim; c += lanes) {
      const int64_t left = key_dim - c;
      Vec<A> qs[kLeaf], factor[kLeaf];
      for (int i = 0; i < count; ++i) {
        qs[i] = load_upto(q[first + i] + c, left);
        factor[i] = load(f.token + (first + i) * f.width + c);
      }
      for (int j = 0; j < count; ++j) {
        Vec<A> key = load_upto(k[first + j] + c, left);
        if (!f.exclusive) sum[j][j] = sum[j][j] + qs[j] * key;
        for (int i = j + 1; i < count; ++i) {
          if (f.exclusive) {
            sum[i][j] = sum[i][j] + qs[i] * key;
            key = key * factor[i];
          } else {
            key = key * factor[i];
            sum[i][j] = sum[i][j] + qs[i] * key;
          }
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      A* const to = scores + (first + i) * kChunk + first;
      for (int j = 0; j < kLeaf; j += lanes) {
        Vec<A> square[lanes];
        for (int l = 0; l < lanes; ++l) square[l] = sum[i][j + l];
        transpose(square);
        Vec<A> row = square[0];
        for (int l = 1; l < lanes; ++l) row = row + square[l];
        store(to + j, row);
      }
    }
  }
}

// Scores of a chunk with channel decay, weights included. Room: `rows` and `operand` [kChunk, kp], `keys`, packed [kp,
// kChunk], `side` [kChunk, kp].
template <class C, class T>
void channel_scores(const Factors<typename C::Acc, true>& f, Rows<T> q, Rows<T> k, int key_dim, int n, Row<C>* rows,
                    typename C::Elem* operand, typename C::Elem* keys, typename C::Acc* side, typename C::Acc* scores) {
  const int kp = f.width;
  leaf_scores(f, q, k, key_dim, n, scores);
  for (int size = kLeaf; size < n; size *= 2) {
    level_factors(f, size, n, side);
    level_rows<C>(rows, kp, side, kp, q, k, key_dim, size, n);
    for (int first = 0; first + size < n; first += 2 * size) {
      const int middle = first + size;
      pack_columns<C>(keys, packed_panel<C>(key_dim), rows + first * kp, kp, key_dim, size);
      const int count = least(size, n - middle);
      const MatrixA<C> left = left_operand<C>(operand, rows + middle * kp, kp, count, key_dim);
      matmul<C>(count, size, key_dim, left, {keys, packed_panel<C>(key_dim)},
                {scores + middle * kChunk + first, kChunk}, false);
    }
  }
}

// The score of a token with itself under a bonus: scale * q . (bonus k).
template <class A, class T>
PYKERNELS_INLINE A bonus_score(const T* q, const T* k, const A* bonus, int key_dim, A scale) {
  Vec<A> sum{};
  for (int c = 0; c < key_dim; c += kLanes<A>) {
    const int left = key_dim - c;
    sum = sum + load_upto(q + c, left) * load_upto(bonus + c, left) * load_upto(k + c, left);
  }
  return reduce_add<A>(sum) * scale;
}

// ---- what values a chain has ---------------------------------------------------------------------------------------

// The largest magnitudes of a chain (a head of a sequence). They decide afterwards whether SplitF32 served: for the
// whole chain or not at all, so that nothing depends on the threads or on other chains.
struct ChainRange : Largest<8> {
  enum Tensor { kQuery, kKey, kValue, kScale, kState, kOutGradient, kStateGradient, kFading };

  // Of a chunk's queries, the largest of which is `query`, after their decay since its start. Where all fade, what they
  // make of the state, or leave of its gradient, is as small, and may be all that there is.
  void add_scaled_queries(float query, float factor) {
    add(kQuery, query);
    if (query * factor > 0) add(kFading, 1 / (query * factor));
  }
#if defined(PYKERNELS_HAS_AMX)
  // No operand made of these reaches kSplitLargest, and what falls below the normal numbers is small beside the largest
  // of each result (zeros give zeros, exactly).
  bool split_serves() const {
    const ChainRange& x = *this;
    for (const int i : {kQuery, kKey, kValue, kScale, kOutGradient})
      if (!(x[i] < 0x1p24f)) return false;
    const auto fits = [](float y) { return y == 0 || y > 0x1p-75f; };
    for (const int i : {kKey, kValue, kState, kOutGradient, kStateGradient})
      if (!(x[i] < kSplitLargest && fits(x[i]))) return false;
    const float query = x[kQuery] * x[kScale], score = query * x[kKey];
    const float dscore = x[kOutGradient] * x[kValue] * x[kScale];
    for (const float y : {query, score, dscore})
      if (!(y < 0x1p48f && fits(y))) return false;
    return x[kFading] < 0x1p75f && fits(dscore * x[kQuery]) && fits(dscore * x[kKey]);
  }
#endif
};

PYKERNELS_INLINE float absolute(double x) { return static_cast<float>(x < 0 ? -x : x); }
// The largest magnitude in some rows.
template <class T>
float largest(Rows<T> rows, int count, int columns) {
  using S = Wide<std::remove_const_t<T>>;
  return static_cast<float>(magnitudes(rows.data, rows.stride, count, columns, static_cast<S>(kInfinity)).seen());
}

// The chains that a pass is about: those listed, or the first `count`.
struct Chains {
  const int64_t* list;
  int64_t count;
  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

// Calls run(compute type, chains, ranges): fp32 and fp16 on AMX tiles, where that pays, and again without them for the
// chains whose values do not allow it; everything else at once, without ranges.
template <class T, class Run>
void with_compute(const LinearAttentionParams& p, Run&& run) {
  const Chains all{nullptr, p.state_count() * p.heads};
#if defined(PYKERNELS_HAS_AMX)
  if constexpr (std::is_same_v<ComputeFor<T>, F32>)
    if (p.key_dim >= 32 && p.value_dim >= 32) {
      Scratch scratch;
      ChainRange* const ranges = scratch.take<ChainRange>(all.count);
      __builtin_memset(ranges, 0, sizeof(ChainRange) * all.count);
      run(SplitF32{}, all, ranges);
      int64_t* const list = scratch.take<int64_t>(all.count);
      int64_t left = 0;
      for (int64_t i = 0; i < all.count; ++i)
        if (!ranges[i].split_serves()) list[left++] = i;
      if (left) run(F32{}, Chains{list, left}, static_cast<ChainRange*>(nullptr));
      return;
    }
#endif
  run(ComputeFor<T>{}, all, static_cast<ChainRange*>(nullptr));
}

// ---- heads of sequences --------------------------------------------------------------------------------------------

// What both passes keep of a head: its rows, its decay, and of the state (backward: of its gradient) the part that
// comes from the segment at hand, with the factor on what comes from outside it.
template <class T, class A, bool Channel>
struct Chain {
  A* local;  // panels of columns
  A* since;  // [kp]
  Factors<A, Channel> factors;
  Rows<const T> q, k, v;
  Rows<const A> decay{};
  const A* bonus;
  ChainRange* range;  // of what is packed, for SplitF32

  // `first`: of the group's chains.
  void allocate(const LinearAttentionParams& p, Scratch& scratch, int kp, int vp, const Chain& first) {
    local = scratch.take<A>(int64_t{kp} * vp);
    since = scratch.take<A>(kp);
    // Only a decay per head leaves something in the factors from one chunk to the next.
    if (this == &first || p.decay_kind == DecayKind::kHead)
      factors.allocate(scratch, kp, p.bonus != nullptr);
    else
      factors = first.factors;
  }

  // Becomes head `of` of a sequence.
  void begin(const LinearAttentionParams& p, const Sequence& s, int64_t of, ChainRange* range_of_chain) {
    range = range_of_chain;
    const int64_t of_k = of / (p.heads / p.heads_k);
    q = rows_of<const T>(p, p.q, p.q_stride, s, of_k);
    k = rows_of<const T>(p, p.k, p.k_stride, s, of_k);
    v = rows_of<const T>(p, p.v, p.v_stride, s, of);
    bonus = p.bonus ? static_cast<const A*>(p.bonus) + of * p.key_dim : nullptr;
    if (p.decay_kind == DecayKind::kNone)
      factors.prepare_constant(nullptr);
    else if (p.decay_kind == DecayKind::kHead)
      factors.prepare_constant(static_cast<const A*>(p.decay) + of * p.decay_stride.head);
    else
      decay = rows_of<const A>(p, p.decay, p.decay_stride, s, of);
  }

  // Columns [c, c + kPanel) of local. Panels are contiguous [kp, kPanel], so that they take turns in the first-level
  // cache.
  A* panel(int c, int kp) const { return local + int64_t{kp} * c; }

  // The state's columns [c, c + kPanel) on the way over a chunk: packed into `to` as an operand (and written to
  // `whole`), with what comes from outside the segment, and noted as `kind`; or, where `to` is null, decayed alone.
  template <class C>
  void advance_panel(typename C::Elem* to, int c, int kp, int key_dim, int value_dim, const A* outside,
                     ChainRange::Tensor kind, A* whole = nullptr, int64_t ld_whole = 0) const {
    if (to == nullptr) return decay_state(panel(c, kp), C::kPanel, factors.total, key_dim);
    [[maybe_unused]] const A largest =
        pack_panel<C>(to, since, outside ? outside + c : nullptr, value_dim, panel(c, kp), factors.total, key_dim,
                      least(C::kPanel, value_dim - c), whole, ld_whole);
    if constexpr (kIsSplit<C>) range->add(kind, largest);
  }

  // to = since * from + local.
  template <class C>
  void finish(A* to, const A* from, int kp, int key_dim, int value_dim) const {
    for (int c = 0; c < value_dim; c += C::kPanel)
      combine_state(to + c, value_dim, since, from ? from + c : nullptr, value_dim, panel(c, kp), C::kPanel, key_dim,
                    least(C::kPanel, value_dim - c));
  }

  void clear(int kp, int vp) {
    fill<A>(local, int64_t{kp} * vp, 0);
    fill<A>(since, kp, 1);
  }

  // The factors of n tokens from t on.
  void prepare(int64_t t, int key_dim, int n, const A* row_scale) {
    factors.prepare(decay.data ? decay.from(t) : decay, key_dim, n, row_scale);
  }

  // Values of n tokens from t on; with `ones` [kChunk, value_dim], copied there with a last column of ones.
  Rows<const T> values(int64_t t, int n, int value_dim, T* ones) const {
    const Rows<const T> rows = v.from(t);
    if (!ones) return rows;
    for (int i = 0; i < n; ++i) {
      __builtin_memcpy(ones + i * value_dim, rows[i], sizeof(T) * (value_dim - 1));
      ones[i * value_dim + value_dim - 1] = element<T>(A(1));
    }
    return {ones, value_dim};
  }
};

// How the work is cut, and the states between segments. Forward walks over segments in time order and carries the
// state, backward (Engine::kBackward) from the last to the first, with the gradient of the state.
struct Plan {
  const LinearAttentionParams& p;
  const Parallel& parallel;
  const Chains chains;
  ChainRange* const ranges;  // of all chains, or null
  int64_t size, most_segments = 0;

  Plan(const LinearAttentionParams& params, const Parallel& run, const Chains& served, ChainRange* ranges_of_chains)
      : p(params), parallel(run), chains(served), ranges(ranges_of_chains), size(p.key_dim * p.value_dim_state()) {
    for (int64_t s = 0; s < p.state_count(); ++s) most_segments = most(most_segments, sequence(p, s).segments());
  }

  bool split() const { return chains.count < parallel.threads && most_segments > 1; }
  ChainRange* range(int64_t chain) const { return ranges ? ranges + chain : nullptr; }
  int64_t slot(int64_t tile, int64_t head) const { return tile * p.heads + head; }

  // A state, or zero for null.
  template <class A>
  void copy(A* to, const A* from) const {
    if (from)
      __builtin_memcpy(to, from, sizeof(A) * size);
    else
      __builtin_memset(to, 0, sizeof(A) * size);
  }

  // One segment of a chain after the other. `edge`: the states that walks begin with (null: zero), `end`: where they
  // end up. outputs(engine, slots, first, last, states) runs tokens [first, last) of a group's heads, given their
  // states.
  template <class Engine, class Params, class A, class Outputs>
  void in_turn(const Params& params, const A* edge, A* end, Outputs&& outputs) const {
    const int group = chains.list ? 1 : heads_together(p, parallel.threads);
    run_tasks(parallel, chains.count / group, [&](TaskQueue& queue) {
      const Tiles tiles;
      Scratch scratch;
      Engine engine(params, scratch, group);
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t chain = chains[task * group], head = chain % p.heads;
        const Sequence s = sequence(p, chain / p.heads);
        const A* state[kHeads];
        int64_t slots[kHeads];
        for (int g = 0; g < group; ++g) {
          state[g] = edge ? edge + (chain + g) * size : nullptr;
          engine.begin(g, s, head + g, range(chain + g));
        }
        for (int64_t j = 0; j < s.segments(); ++j) {
          const int64_t i = Engine::kBackward ? s.segments() - 1 - j : j;
          for (int g = 0; g < group; ++g) slots[g] = slot(s.tile + i, head + g);
          outputs(engine, slots, i * kSegment, least((i + 1) * kSegment, s.length), state);
          for (int g = 0; g < group; ++g) {
            A* const next = end + (chain + g) * size;
            engine.finish(g, next, state[g]);  // in place from the second segment on: row by row
            state[g] = next;
          }
        }
        if (s.segments() == 0)
          for (int g = 0; g < group; ++g) copy(end + (chain + g) * size, state[g]);
      }
    });
  }

  // Side by side: every segment's own part of the state, then the states between them, into states [tiles, H, K, Ve],
  // then the outputs. The sums are those of in_turn.
  template <class Engine, class Params, class A, class Outputs>
  void side_by_side(const Params& params, const A* edge, A* states, A* end, Outputs&& outputs) const {
    Scratch shared;
    A* const locals = shared.take<A>(p.tiles() * p.heads * size);
    A* const since = shared.take<A>(p.tiles() * p.heads * p.key_dim);
    for (const bool own : {true, false}) {
      run_tasks(parallel, chains.count * most_segments, [&](TaskQueue& queue) {
        const Tiles tiles;
        Scratch scratch;
        Engine engine(params, scratch, 1);
        for (int64_t task; (task = queue.next()) >= 0;) {
          const int64_t chain = chains[task / most_segments], i = task % most_segments, head = chain % p.heads;
          const Sequence s = sequence(p, chain / p.heads);
          if (i >= s.segments()) continue;
          engine.begin(0, s, head, range(chain));
          const int64_t at = slot(s.tile + i, head), first = i * kSegment, last = least(first + kSegment, s.length);
          if (own) {
            engine.own_part(first, last);
            engine.finish(0, locals + at * size, nullptr);
            __builtin_memcpy(since + at * p.key_dim, engine.since(0), sizeof(A) * p.key_dim);
          } else {
            const bool begins = Engine::kBackward ? i + 1 == s.segments() : i == 0;
            const A* const state = begins && !edge ? nullptr : states + at * size;
            outputs(engine, &at, first, last, &state);
          }
        }
      });
      if (own) between<Engine::kBackward>(edge, states, end, locals, since);
    }
  }

 private:
  template <bool Backward, class A>
  void between(const A* edge, A* states, A* end, const A* locals, const A* since) const {
    run_tasks(parallel, chains.count, [&](TaskQueue& queue) {
      const int64_t columns = p.value_dim_state();
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t chain = chains[task];
        const Sequence s = sequence(p, chain / p.heads);
        const A* state = edge ? edge + chain * size : nullptr;
        int64_t before = 0;  // slot of the segment before, in walking order
        for (int64_t j = 0; j <= s.segments(); ++j) {
          const int64_t at = slot(s.tile + (Backward ? s.segments() - 1 - j : j), chain % p.heads);
          A* const to = j < s.segments() ? states + at * size : end + chain * size;
          if (j == 0)
            copy(to, state);
          else
            combine_state(to, columns, since + before * p.key_dim, state, columns, locals + before * size, columns,
                          static_cast<int>(p.key_dim), static_cast<int>(columns));
          if (j > 0 || state) state = to;
          before = at;
        }
      }
    });
  }
};

// Calls run(T{}) for the params' type T.
template <class Run>
void with_type(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
    case DType::kFloat64:
      return run(double{});
  }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA::linear
