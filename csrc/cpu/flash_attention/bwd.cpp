// Flash attention, backward.
//
// With P = 2^(c S - lse) recomputed (c = scale * log2 e), dO the gradient at out, delta = rowsum(dO out) - dlse:
//   S^T = K Q^T    dP^T = V dO^T    dS^T = P^T (dP^T - delta)    dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
// Transposed, because then lse and delta lie along vectors, P^T and dS^T come out as left operands of the next
// products, and only dS^T is needed as a right operand too; dQ is accumulated as its transpose.
//
// Units. One is (sequence, key head) with the query heads that share the key head. Units are taken in waves that bound
// the scratch memory. Per wave, a first pass packs every block of kQueries queries (Q and dO in both orders, lse,
// delta) and zeroes its dQ^T; a second pass runs over tasks (unit, block of keys), each with its own dK and dV, through
// all query blocks that see some of its keys. A block of keys is worked through in strips of kStrip keys, a strip in
// panels of kPanel queries: scores and weights of a panel stay in the L1 cache, those of a block of keys in L2.
//
// Determinism. The blocks of keys add to the dQ^T of a query block in ascending order: each waits for its predecessor,
// which an earlier task holds and finishes without waiting for later ones. So do the units that share a block of a
// bias' gradient. Every sum has one order for a given size of the blocks of keys, which follows from the shape and,
// unless deterministic results are asked for, from the number of threads.
#include "../../include/pykernels/flash_attention.h"

#include <sched.h>

#include "../common/matmul.h"
#include "../common/scratch.h"
#include "terms.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

constexpr int64_t kUnbounded = int64_t{1} << 62;
constexpr int64_t kWaveBytes = int64_t{48} << 20;   // of packed queries, unless one unit takes more
constexpr int64_t kCacheBytes = int64_t{768} << 10;  // of L2 for a block of keys and a block of queries

template <class C>
constexpr int kQueries = 128;
template <class C>
constexpr int kStrip = C::kRowAlign > 1 ? 64 : 48;

// The stride of rows of n elements: rows a multiple of 512 bytes apart would share few cache sets.
template <class E>
PYKERNELS_INLINE constexpr int64_t row_stride(int64_t n) {
  constexpr int64_t more = sizeof(E) % 4 == 2 ? 32 : 64 / static_cast<int64_t>(sizeof(E));
  return n * sizeof(E) % 512 ? n : n + more;
}

// ---- geometry -------------------------------------------------------------------------------------------------------

// Tokens [q0, q0 + tq) of q against [k0, k0 + tk) of k: a batch entry, or a packed sequence.
struct Sequence {
  int64_t batch, q0, tq, k0, tk, index;
};

// Waits until it is the turn of `rank`.
inline void await(const int64_t* turn, int64_t rank) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != rank; ++spins) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (spins > 1000) sched_yield();
  }
}
inline void pass_on(int64_t* turn, int64_t next) { __atomic_store_n(turn, next, __ATOMIC_RELEASE); }

struct Problem {
  const FlashAttentionBackwardParams& p;
  const FlashAttentionParams& f;
  int64_t group;  // query heads per key head
  int64_t left, right;

  int64_t sequences() const { return f.cu_seqlens_q ? f.sequences : f.batch; }
  Sequence sequence(int64_t s) const {
    if (!f.cu_seqlens_q) return {s, 0, f.seqlen_q, 0, f.seqlen_k, s};
    const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
    const int64_t q0 = clamp(f.cu_seqlens_q[s], 0, f.seqlen_q), k0 = clamp(f.cu_seqlens_k[s], 0, f.seqlen_k);
    return {0, q0, clamp(f.cu_seqlens_q[s + 1], q0, f.seqlen_q) - q0, k0,
            clamp(f.cu_seqlens_k[s + 1], k0, f.seqlen_k) - k0, s};
  }

  // The gradient of a bias over keys; one over queries alone is a matter of rows (see `row_gradients`). Blocks of it
  // are summed over the batch, the heads or the rows.
  bool bias_gradient() const { return p.dbias && f.bias_stride.key != 0; }
  bool over_batch() const { return f.bias_stride.batch == 0 && !f.cu_seqlens_q; }
  bool over_heads() const { return f.bias_stride.head == 0; }
  bool over_rows() const { return f.bias_stride.row == 0; }
  int64_t bias_heads() const { return over_heads() ? 1 : f.heads_q; }
  template <class Acc>
  Acc* dbias(const Sequence& s, int64_t head, int64_t query, int64_t key) const {
    const int64_t rows = over_rows() ? 1 : f.seqlen_q;
    const int64_t b = over_batch() ? 0 : s.batch, h = over_heads() ? 0 : head, i = over_rows() ? 0 : s.q0 + query;
    return static_cast<Acc*>(p.dbias) + ((b * bias_heads() + h) * rows + i) * f.seqlen_k + s.k0 + key;
  }
};

struct Range {
  int64_t begin, end;
};
// The keys that any of queries [begin, end) of a sequence sees.
Range visible_keys(const Problem& problem, const Sequence& s, int64_t begin, int64_t end) {
  const int64_t shift = s.tk - s.tq;
  return {most<int64_t>(0, begin + shift - problem.left), least(s.tk, end + shift + problem.right)};
}
// The queries that see any of keys [begin, end), not yet limited to the sequence.
PYKERNELS_INLINE Range visible_queries(const Problem& problem, const Sequence& s, int64_t begin, int64_t end) {
  const int64_t shift = s.tk - s.tq;
  return {begin - shift - problem.right, end - shift + problem.left};
}
// The blocks of keys [begin, end) that contribute to a block of queries.
template <class C>
Range key_blocks(const Problem& problem, const Sequence& s, int64_t query_block, int64_t keys) {
  const int64_t first = query_block * kQueries<C>;
  const Range range = visible_keys(problem, s, first, least(s.tq, first + kQueries<C>));
  return range.begin < range.end ? Range{range.begin / keys, (range.end + keys - 1) / keys} : Range{0, 0};
}

// ---- a packed block of queries --------------------------------------------------------------------------------------

template <class C>
struct QueryBlock {
  typename C::Elem *q_columns, *q_rows, *dout_columns, *dout_rows;  // packed Q^T, Q, dO^T, dO
  typename C::Acc *lse, *delta;                                     // lse in units of log 2
  typename C::Acc* dq;                                              // dQ^T, rows of row_stride(kQueries)
  bool far;                                                         // whether an lse is so large that it is not exact
};

template <class C>
class QueryBlocks {
  using Elem = typename C::Elem;
  using Acc = typename C::Acc;
  static constexpr int64_t kQ = kQueries<C>;

 public:
  explicit QueryBlocks(const FlashAttentionParams& f) {
    const int64_t sizes[7] = {packed_size<C>(f.head_dim, kQ) * elem,  packed_size<C>(kQ, f.head_dim) * elem,
                              packed_size<C>(f.value_dim, kQ) * elem, packed_size<C>(kQ, f.value_dim) * elem,
                              kQ * acc,                               kQ * acc,
                              dq_bytes(f)};
    offsets_[0] = 0;
    // Another odd line between parts, against parts that share cache sets.
    for (int i = 0; i < 7; ++i) offsets_[i + 1] = offsets_[i] + round_up(sizes[i], 64) + 64;
  }
  int64_t bytes() const { return offsets_[7]; }
  static int64_t dq_bytes(const FlashAttentionParams& f) {
    return round_up(f.head_dim, C::kRowAlign) * row_stride<Acc>(kQ) * acc;
  }
  QueryBlock<C> at(char* base, int64_t index) const {
    char* const start = base + index * bytes();
    const auto part = [&](int i) { return start + offsets_[i]; };
    return {reinterpret_cast<Elem*>(part(0)), reinterpret_cast<Elem*>(part(1)), reinterpret_cast<Elem*>(part(2)),
            reinterpret_cast<Elem*>(part(3)), reinterpret_cast<Acc*>(part(4)),  reinterpret_cast<Acc*>(part(5)),
            reinterpret_cast<Acc*>(part(6)), false};
  }

 private:
  static constexpr int64_t elem = sizeof(Elem), acc = sizeof(Acc);
  int64_t offsets_[8];
};

// ---- a panel of weights ---------------------------------------------------------------------------------------------

// kPanel queries of a strip of keys: from S^T and dP^T to P^T and dS^T.
template <class C>
struct Panel {
  using Elem = typename C::Elem;
  using Acc = typename C::Acc;
  static constexpr int kLane = kLanes<Acc>, kVectors = C::kPanel / kLane;

  const Acc *scores, *dp;      // [rows, kPanel]
  const Acc *lse, *delta;      // [kPanel]
  Elem *weights, *ds;          // left operands, rows of `stride`
  int64_t stride;
  Elem* ds_packed;             // a right operand
  int rows;                    // a multiple of kPair
  Acc factor, cap;             // see `run`
  // Under Extra; null where there is none. [rows, kPanel] but for dbias.
  const Acc *terms, *keep;     // added to the scores, in units of log 2; what dropout multiplies weights by
  Acc* dbias;                  // gradients of the terms, rows of `dbias_stride`
  int64_t dbias_stride;
  bool far;                    // whether an lse is too large to be exact
  int64_t first, last, valid;  // row j is seen by columns [first + j, last + j), if j < valid

  // The exponent of a weight as far as a large lse tells: it holds the maximum, rounded.
  static PYKERNELS_INLINE Vec<Acc> far_exponent(Vec<Acc> x, Vec<Acc> lse) {
    const Vec<Acc> size = abs<Acc>(lse);
    const Vec<Acc> slack = x + size * static_cast<Acc>(sizeof(Acc) == 4 ? 0x1p-22 : 0x1p-51);
    return (size >= splat(kFar<Acc>)) & (size < splat(static_cast<Acc>(kInfinity)))
        ? (slack < Vec<Acc>{} ? slack : Vec<Acc>{}) : x;
  }

  // P and dS of row j, vector c.
  template <bool Softcap, bool Cut, bool Extra>
  PYKERNELS_INLINE void element(int j, int c, Vec<Acc>& p, Vec<Acc>& ds_out) const {
    const Vec<Acc> s = load(scores + j * C::kPanel + c * kLane);
    const Vec<Acc> base = load(lse + c * kLane);
    // Beside what is of its size first: the sum is small where weights are not.
    Vec<Acc> x = -base;
    if constexpr (Extra)
      if (terms) x += load(terms + j * C::kPanel + c * kLane);
    if constexpr (Softcap)
      x += tanh<Acc>(s * factor) * cap;
    else
      x += s * factor;
    if constexpr (Extra)
      if (far) x = far_exponent(x, base);
    p = exp2<Acc>(x);
    Vec<Acc> dp_here = load(dp + j * C::kPanel + c * kLane);
    [[maybe_unused]] Vec<Acc> kept;
    if constexpr (Extra)
      if (keep) {
        kept = load(keep + j * C::kPanel + c * kLane);
        dp_here *= kept;
      }
    ds_out = p * (dp_here - load(delta + c * kLane));
    if constexpr (Extra) {
      if (keep) p *= kept;
      if (dbias) {
        Vec<Acc> gradient = ds_out;
        if constexpr (Cut) gradient = seen(j, c) ? gradient : Vec<Acc>{};
        store(dbias + j * dbias_stride + c * kLane, gradient);
      }
    }
    if constexpr (Softcap) {
      // 1 - tanh^2 without cancellation.
      const Vec<Acc> r =
          static_cast<Acc>(1) / (exp2<Acc>(abs<Acc>(s * factor) * static_cast<Acc>(2 * kLog2e)) + static_cast<Acc>(1));
      ds_out *= static_cast<Acc>(4) * r * (static_cast<Acc>(1) - r);
    }
    if constexpr (Cut) {
      const Mask<Acc> visible = seen(j, c);
      p = visible ? p : Vec<Acc>{};
      ds_out = visible ? ds_out : Vec<Acc>{};
    }
  }

  // The columns of vector c that see row j.
  PYKERNELS_INLINE Mask<Acc> seen(int j, int c) const {
    using Int = decltype(Mask<Acc>{}[0] + 0);
    Mask<Acc> column;
    for (int i = 0; i < kLane; ++i) column[i] = c * kLane + i;
    const bool real = j < valid;
    const Int low = static_cast<Int>(least<int64_t>(C::kPanel, most<int64_t>(0, first + j)));
    const Int high = real ? static_cast<Int>(least<int64_t>(C::kPanel, most<int64_t>(0, last + j))) : 0;
    return (column >= low) & (column < high);
  }

  // factor: of S, to units of log 2; under a softcap to units of the softcap, which is `cap` in units of log 2.
  template <bool Softcap>
  void run(bool cut, bool extra) const {
    if (cut)
      extra ? run<Softcap, true, true>() : run<Softcap, true, false>();
    else
      extra ? run<Softcap, false, true>() : run<Softcap, false, false>();
  }
  template <bool Softcap, bool Cut, bool Extra>
  void run() const {
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>) return run_split<Softcap, Cut, Extra>();
#endif
    for (int j = 0; j < rows; j += C::kPair) {
      Vec<Acc> p[C::kPair][kVectors], d[C::kPair][kVectors];
#pragma GCC unroll 2
      for (int r = 0; r < C::kPair; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < kVectors; ++c) element<Softcap, Cut, Extra>(j + r, c, p[r][c], d[r][c]);
      if constexpr (C::kPair == 1) {
#pragma GCC unroll 2
        for (int c = 0; c < kVectors; ++c) {
          store(weights + j * stride + c * kLane, p[0][c]);
          store(ds + j * stride + c * kLane, d[0][c]);
          store(ds_packed + j * C::kPanel + c * kLane, d[0][c]);
        }
      } else {
#if defined(PYKERNELS_HAS_BF16_DOT)
        __m512i row[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          _mm512_storeu_si512(weights + (j + r) * stride,
                              (__m512i)_mm512_cvtne2ps_pbh((__m512)p[r][1], (__m512)p[r][0]));
          row[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)d[r][1], (__m512)d[r][0]);
          _mm512_storeu_si512(ds + (j + r) * stride, row[r]);
        }
        // Column by column the elements of both rows.
        VecU32 low{};
        for (int i = 0; i < 16; ++i) low[i] = static_cast<uint32_t>(i | (i + 32) << 16);
        const VecU32 high = low + (16 | 16 << 16);
        _mm512_storeu_si512(ds_packed + j * C::kPanel, _mm512_permutex2var_epi16(row[0], (__m512i)low, row[1]));
        _mm512_storeu_si512(ds_packed + j * C::kPanel + 32, _mm512_permutex2var_epi16(row[0], (__m512i)high, row[1]));
#endif
      }
    }
  }

#if defined(PYKERNELS_HAS_AMX)
  // Rows that are neighbours in a right operand together.
  template <bool Softcap, bool Cut, bool Extra>
  void run_split() const {
    for (int block = 0; block < rows; block += 32)
      for (int i = 0; i < 16; ++i) {
        SplitParts row[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          const int j = block + i + 16 * r;
          Vec<Acc> p[2], d[2];
#pragma GCC unroll 2
          for (int c = 0; c < 2; ++c) element<Softcap, Cut, Extra>(j, c, p[c], d[c]);
          store_row(weights + j * stride, split(p[0], p[1]));
          row[r] = split(d[0], d[1]);
          store_row(ds + j * stride, row[r]);
        }
        store_pair(ds_packed + block * C::kPanel, i, 0, lower_halves(row[0], row[1]));
        store_pair(ds_packed + block * C::kPanel, i, 16, upper_halves(row[0], row[1]));
      }
  }
#endif
};

// ---- a block of keys ------------------------------------------------------------------------------------------------

// One thread's buffers for a block of keys, and the products with a block of queries.
template <class T, class C>
class KeyBlock {
 protected:
  using Elem = typename C::Elem;
  using Acc = typename C::Acc;
  static constexpr int kQ = kQueries<C>, kRows = kStrip<C>, kWidth = C::kPanel;
  static_assert(kQ % kWidth == 0 && kWidth % C::kDepthAlign == 0 && kRows % C::kRowAlign == 0 && kRows % C::kPair == 0);

  KeyBlock(const Problem& problem, int64_t keys, Scratch& scratch)
      : problem_(problem),
        score_terms_(problem.f),
        dropout_(problem.f),
        head_dim_(static_cast<int>(problem.f.head_dim)),
        value_dim_(static_cast<int>(problem.f.value_dim)),
        k_stride_(row_stride<Elem>(round_up(head_dim_, C::kDepthAlign))),
        v_stride_(row_stride<Elem>(round_up(value_dim_, C::kDepthAlign))),
        kt_stride_(row_stride<Elem>(round_up(keys, C::kDepthAlign))),
        dk_stride_(row_stride<Acc>(round_up(head_dim_, C::kColumnAlign))),
        dv_stride_(row_stride<Acc>(round_up(value_dim_, C::kColumnAlign))),
        ds_panel_(packed_panel<C>(keys)) {
    k_ = scratch.take<Elem>(keys * k_stride_);
    v_ = scratch.take<Elem>(keys * v_stride_);
    kt_ = scratch.take<Elem>(round_up(head_dim_, C::kRowAlign) * kt_stride_);
    dk_ = scratch.take<Acc>(keys * dk_stride_);
    dv_ = scratch.take<Acc>(keys * dv_stride_);
    ds_packed_ = scratch.take<Elem>(ds_panel_ * (kQ / kWidth));
    scores_ = scratch.take<Acc>(kRows * kWidth);
    dp_ = scratch.take<Acc>(kRows * kWidth);
    weights_ = scratch.take<Elem>(kRows * kWeightStride);
    ds_ = scratch.take<Elem>(kRows * kWeightStride);
    panels_ = scratch.take<PanelRange>(keys / kRows + 1);
    if (score_terms_.on()) terms_ = scratch.take<Acc>(kRows * kWidth);
    if (dropout_.on()) keep_ = scratch.take<Acc>(kRows * kWidth);
    if (problem.bias_gradient()) dbias_ = scratch.take<Acc>(keys * kBiasStride);
  }

  // dK and dV of the strips take what the block of queries [query, query + n) gives, and dS^T is left for `add_dq`.
  void add_queries(const Sequence& s, int64_t head, int64_t query, int n, const QueryBlock<C>& block) {
    const FlashAttentionParams& f = problem_.f;
    const Place place{s.batch, s.index, head, s.q0, s.tq, s.k0, s.tk};
    const int columns = round_up(n, kWidth);
    for (int strip = 0; strip * kRows < keys_; ++strip) {
      const int row = strip * kRows, rows = least(kRows, keys_ - row);
      const int64_t key = first_key_ + row;
      const Range range = visible_queries(problem_, s, key, key + rows);
      const int begin = static_cast<int>(most<int64_t>(0, least<int64_t>(range.begin - query, columns)) / kWidth);
      const int end =
          static_cast<int>(round_up(most<int64_t>(0, least<int64_t>(range.end - query, n)), kWidth) / kWidth);
      panels_[strip] = {begin, most(begin, end)};
      if (begin >= end) continue;
      for (int i = begin; i < end; ++i) {
        matmul<C>(rows, kWidth, head_dim_, {k_ + row * k_stride_, k_stride_},
                  {block.q_columns + i * packed_panel<C>(head_dim_), packed_panel<C>(head_dim_)}, {scores_, kWidth},
                  false);
        matmul<C>(rows, kWidth, value_dim_, {v_ + row * v_stride_, v_stride_},
                  {block.dout_columns + i * packed_panel<C>(value_dim_), packed_panel<C>(value_dim_)}, {dp_, kWidth},
                  false);
        Panel<C> panel;
        panel.scores = scores_, panel.dp = dp_;
        panel.lse = block.lse + i * kWidth, panel.delta = block.delta + i * kWidth;
        panel.weights = weights_ + i * kWidth, panel.ds = ds_ + i * kWidth, panel.stride = kWeightStride;
        panel.ds_packed = ds_packed_ + i * ds_panel_ + row * kWidth;
        panel.rows = round_up(rows, C::kDepthAlign);
        // Row by row the first and last visible query move on by one.
        const Range one = visible_queries(problem_, s, key, key + 1);
        panel.first = one.begin - query - i * kWidth;
        panel.last = one.end - query - i * kWidth;
        panel.valid = rows;
        const bool cut = panel.first + rows - 1 > 0 || panel.last < kWidth || panel.rows != rows;
        panel.terms = terms_, panel.keep = keep_;
        panel.dbias = dbias_ ? dbias_ + row * kBiasStride + i * kWidth : nullptr, panel.dbias_stride = kBiasStride;
        panel.far = block.far;
        if (terms_) score_terms_.tile(place, query + i * kWidth, kWidth, key, rows, terms_);
        if (keep_) dropout_.tile(place, query + i * kWidth, kWidth, key, rows, keep_);
        const bool extra = terms_ || keep_ || dbias_ || block.far;
        if (f.softcap > 0) {
          panel.factor = static_cast<Acc>(f.scale / f.softcap), panel.cap = static_cast<Acc>(f.softcap * kLog2e);
          panel.template run<true>(cut, extra);
        } else {
          panel.factor = static_cast<Acc>(f.scale * kLog2e), panel.cap = 0;
          panel.template run<false>(cut, extra);
        }
      }
      const int first = begin * kWidth, depth = (end - begin) * kWidth;
      matmul<C>(rows, value_dim_, depth, {weights_ + first, kWeightStride},
                {block.dout_rows, packed_panel<C>(kQ), first}, {dv_ + row * dv_stride_, dv_stride_}, true);
      matmul<C>(rows, head_dim_, depth, {ds_ + first, kWeightStride}, {block.q_rows, packed_panel<C>(kQ), first},
                {dk_ + row * dk_stride_, dk_stride_}, true);
    }
  }

  // dQ^T += K^T dS^T, panels of queries that the same strips contribute to together.
  void add_dq(int n, const QueryBlock<C>& block) {
    const int panels = round_up(n, kWidth) / kWidth, strips = (keys_ + kRows - 1) / kRows;
    const auto contributing = [&](int panel) {
      int begin = 0, end = strips;
      while (begin < strips && !(panels_[begin].begin <= panel && panel < panels_[begin].end)) ++begin;
      while (end > begin && !(panels_[end - 1].begin <= panel && panel < panels_[end - 1].end)) --end;
      return PanelRange{begin, end};
    };
    for (int first = 0, next; first < panels; first = next) {
      const PanelRange here = contributing(first);
      for (next = first + 1; next < panels; ++next) {
        const PanelRange there = contributing(next);
        if (there.begin != here.begin || there.end != here.end) break;
      }
      if (here.begin == here.end) continue;
      const int key = here.begin * kRows;
      matmul<C>(head_dim_, (next - first) * kWidth, least(here.end * kRows, keys_) - key, {kt_ + key, kt_stride_},
                {ds_packed_ + first * ds_panel_, ds_panel_, key}, {block.dq + first * kWidth, row_stride<Acc>(kQ)},
                true);
    }
  }

  // Adds what `add_queries` left of the gradient of the terms to a bias' gradient, of queries [query, query + n).
  void add_dbias(const Sequence& s, int64_t head, int64_t query, int n) {
    for_dbias_panels(n, [&](int row, int rows, int first, int columns) {
      for (int c = first; c < first + columns; c += kLane)
        for (int j = 0; j < rows; j += kLane) {
          Vec<Acc> square[kLane];
          for (int r = 0; r < kLane; ++r)
            square[r] = j + r < rows ? load(dbias_ + (row + j + r) * kBiasStride + c) : Vec<Acc>{};
          transpose(square);
          for (int r = 0; r < least(kLane, n - c); ++r) {
            Acc* const to = problem_.dbias<Acc>(s, head, query + c + r, first_key_ + row + j);
            store_upto(to, load_upto(to, rows - j) + square[r], rows - j);
          }
        }
    });
  }
  // The same, summed over queries, to `sums` of the keys.
  void add_dbias_rows(int n, Acc* sums) {
    for_dbias_panels(n, [&](int row, int rows, int first, int columns) {
      for (int j = row; j < row + rows; ++j) {
        Vec<Acc> sum{};
        for (int c = first; c < first + columns; c += kLane) sum += load(dbias_ + j * kBiasStride + c);
        sums[j] += reduce_add<Acc>(sum);
      }
    });
  }

  static constexpr int64_t kWeightStride = row_stride<Elem>(kQ), kBiasStride = row_stride<Acc>(kQ);
  static constexpr int kLane = kLanes<Acc>;

 private:
  template <class F>
  void for_dbias_panels(int n, F&& f) {
    for (int strip = 0; strip * kRows < keys_; ++strip) {
      const PanelRange range = panels_[strip];
      const int first = range.begin * kWidth, end = least(range.end * kWidth, round_up(n, kWidth));
      if (first < end) f(strip * kRows, least(kRows, keys_ - strip * kRows), first, end - first);
    }
  }

 protected:
  const Problem& problem_;
  const ScoreTerms<T> score_terms_;
  const Dropout dropout_;
  const int head_dim_, value_dim_;
  const int64_t k_stride_, v_stride_, kt_stride_, dk_stride_, dv_stride_, ds_panel_;
  // The current block: keys [first_key_, first_key_ + keys_).
  int64_t first_key_ = 0;
  int keys_ = 0;
  Elem *k_, *v_, *kt_;      // K and V by rows, K^T by rows
  Acc *dk_, *dv_;           // [keys, dim]
  Elem* ds_packed_;         // dS^T [keys, kQueries] as a right operand
  Acc *scores_, *dp_;       // [kStrip, kPanel]
  Elem *weights_, *ds_;     // P^T and dS^T [kStrip, kQueries] of a strip, left operands
  struct PanelRange {
    int begin, end;
  };
  PanelRange* panels_;      // the panels of queries that see a strip
  // Of a panel, or null: terms of its scores, factors of its weights; of a block of queries, the gradients of the
  // former.
  Acc *terms_ = nullptr, *keep_ = nullptr, *dbias_ = nullptr;
};

// ---- what values a unit has -----------------------------------------------------------------------------------------

// The largest magnitudes of a unit's tensors, gathered while they are packed. They decide afterwards whether SplitF32
// served: for all of the unit or for none of it, so that nothing depends on the threads or on other units.
struct UnitRange : Largest<5> {
  enum Tensor { kQ, kK, kV, kOutGradient, kDelta, kTensors };
#if defined(PYKERNELS_HAS_AMX)
  // No product of the magnitudes allowed, nor a sum of many, overflows, and what falls below the normal numbers is
  // small beside the largest of each gradient (zeros give zeros, exactly).
  bool split_serves() const {
    float x[kTensors];
    for (int i = 0; i < kTensors; ++i) {
      x[i] = (*this)[i];
      if (!(x[i] < (i == kDelta ? 0x1p70f : 0x1p30f))) return false;
    }
    const float dp = most(x[kOutGradient] * x[kV], x[kDelta]);
    const auto fits = [](float y) { return y == 0 || y > 0x1p-75f; };
    return fits(x[kOutGradient]) && fits(dp) && fits(dp * x[kQ]) && fits(dp * x[kK]);
  }
#endif
};

// Whose turn it is to add to a block of a bias' gradient that several units share.
struct BiasTurns {
  int64_t* turns;            // null: none are shared
  const int64_t* first;      // of a sequence: its first block, within a head
  int64_t blocks, key_blocks;  // blocks of a head in all, and blocks of keys of a sequence (the longest)

  int64_t* at(const Problem& problem, const Sequence& s, int64_t head, int64_t query_block, int64_t key_block) const {
    if (!turns) return nullptr;
    const int64_t start = problem.over_batch() ? 0 : first[s.index];
    return turns + (problem.over_heads() ? 0 : head) * blocks + start + query_block * key_blocks + key_block;
  }
  // The place among those that add: batch entries in order, their heads in order.
  int64_t rank(const Problem& problem, const Sequence& s, int64_t head, int64_t heads) const {
    const int64_t b = problem.over_batch() ? s.batch : 0;
    return problem.over_heads() ? b * heads + head : b;
  }
};

// ---- loading and storing --------------------------------------------------------------------------------------------

template <class T, class C>
class Worker : KeyBlock<T, C> {
  using Base = KeyBlock<T, C>;
  using typename Base::Acc;
  using typename Base::Elem;
  using Base::kQ, Base::kRows, Base::kWidth, Base::kLane, Base::problem_, Base::head_dim_, Base::value_dim_,
      Base::keys_;

 public:
  Worker(const Problem& problem, int64_t keys, Scratch& scratch) : Base(problem, keys, scratch), size_(keys) {
    if (problem.bias_gradient() && problem.over_rows()) row_sums_ = scratch.take<Acc>(keys * problem.group);
  }

  // Task (unit, block of keys); `blocks` are the unit's packed queries, `turns` whose turn it is to add to each,
  // `bias_turns` the same for the blocks [query heads or 1][query blocks][blocks of keys] of a bias' gradient that
  // units share (or null).
  template <class Blocks>
  void run(const Sequence& s, int64_t head_k, int64_t key_block, Blocks&& blocks, int64_t* turns,
           const BiasTurns& bias_turns, UnitRange* range_of_unit) {
    load_keys(s, head_k, key_block * size_, range_of_unit);
    const int64_t query_blocks = (s.tq + kQ - 1) / kQ, group = problem_.group;
    const bool dbias = problem_.bias_gradient();
    // Heads that share blocks of the gradient add to each before the next, so that other units need not wait long.
    const bool heads_first = dbias && problem_.over_heads() && !problem_.over_rows();
    if (row_sums_) __builtin_memset(row_sums_, 0, sizeof(Acc) * keys_ * group);
    for (int64_t n_of = 0; n_of < group * query_blocks; ++n_of) {
      const int64_t g = heads_first ? n_of % group : n_of / query_blocks;
      const int64_t i = heads_first ? n_of / group : n_of % query_blocks;
      const Range range = key_blocks<C>(problem_, s, i, size_);
      if (key_block < range.begin || key_block >= range.end) continue;
      const int n = static_cast<int>(least<int64_t>(kQ, s.tq - i * kQ));
      const int64_t head = head_k * group + g;
      const QueryBlock<C> block = blocks(g * query_blocks + i);
      this->add_queries(s, head, i * kQ, n, block);
      if (row_sums_) {
        this->add_dbias_rows(n, row_sums_ + (problem_.over_heads() ? 0 : g * keys_));
      } else if (dbias) {
        int64_t* const turn = bias_turns.at(problem_, s, head, i, key_block);
        const int64_t rank = bias_turns.rank(problem_, s, head, problem_.f.heads_q);
        if (turn) await(turn, rank);
        this->add_dbias(s, head, i * kQ, n);
        if (turn) pass_on(turn, rank + 1);
      }
      int64_t* const turn = turns + g * query_blocks + i;
      await(turn, key_block);
      this->add_dq(n, block);
      pass_on(turn, key_block + 1);
      if (key_block + 1 == range.end) write_dq(s, head, i, n, block.dq);
    }
    for (int64_t g = 0; row_sums_ && g < (problem_.over_heads() ? 1 : group); ++g) {
      const int64_t head = head_k * group + g;
      int64_t* const turn = bias_turns.at(problem_, s, head, 0, key_block);
      const int64_t rank = bias_turns.rank(problem_, s, problem_.over_heads() ? head_k : head, problem_.f.heads_k);
      if (turn) await(turn, rank);
      Acc* const to = problem_.template dbias<Acc>(s, head, 0, this->first_key_);
      for (int j = 0; j < keys_; ++j) to[j] += row_sums_[g * keys_ + j];
      if (turn) pass_on(turn, rank + 1);
    }
    write_keys(s, head_k);
  }

 private:
  void load_keys(const Sequence& s, int64_t head_k, int64_t key, [[maybe_unused]] UnitRange* range) {
    const FlashAttentionParams& f = problem_.f;
    this->first_key_ = key;
    keys_ = static_cast<int>(least(size_, s.tk - key));
    const T* const k = static_cast<const T*>(f.k) + s.batch * f.k_stride.batch + head_k * f.k_stride.head +
                       (s.k0 + key) * f.k_stride.token;
    const T* const v = static_cast<const T*>(f.v) + s.batch * f.v_stride.batch + head_k * f.v_stride.head +
                       (s.k0 + key) * f.v_stride.token;
    if constexpr (kIsSplit<C>) {
      range->add(UnitRange::kK, magnitudes(k, f.k_stride.token, keys_, head_dim_, kInfinity).seen());
      range->add(UnitRange::kV, magnitudes(v, f.v_stride.token, keys_, value_dim_, kInfinity).seen());
    }
    copy_rows<C>(this->k_, this->k_stride_, k, f.k_stride.token, keys_, head_dim_);
    copy_rows<C>(this->v_, this->v_stride_, v, f.v_stride.token, keys_, value_dim_);
    copy_columns<C>(this->kt_, this->kt_stride_, k, f.k_stride.token, head_dim_, keys_);
    __builtin_memset(this->dk_, 0, sizeof(Acc) * keys_ * this->dk_stride_);
    __builtin_memset(this->dv_, 0, sizeof(Acc) * keys_ * this->dv_stride_);
  }

  void write_keys(const Sequence& s, int64_t head_k) {
    const FlashAttentionBackwardParams& p = problem_.p;
    const auto write =
        [&](void* base, const Strides3& stride, const Acc* from, int64_t from_stride, int dim, Acc factor) {
      T* to = static_cast<T*>(base) + s.batch * stride.batch + head_k * stride.head +
          (s.k0 + this->first_key_) * stride.token;
      for (int j = 0; j < keys_; ++j, to += stride.token, from += from_stride)
        for (int d = 0; d < dim; d += kLane) store_upto(to + d, load(from + d) * factor, dim - d);
    };
    write(p.dk, p.dk_stride, this->dk_, this->dk_stride_, head_dim_, static_cast<Acc>(problem_.f.scale));
    write(p.dv, p.dv_stride, this->dv_, this->dv_stride_, value_dim_, 1);
  }

  void write_dq(const Sequence& s, int64_t head, int64_t query_block, int n, const Acc* dq) {
    const FlashAttentionBackwardParams& p = problem_.p;
    const int64_t stride = p.dq_stride.token;
    const Acc scale = static_cast<Acc>(problem_.f.scale);
    T* const to = static_cast<T*>(p.dq) + s.batch * p.dq_stride.batch + head * p.dq_stride.head +
                  (s.q0 + query_block * kQ) * stride;
    for (int i = 0; i < n; i += kLane)
      for (int d = 0; d < head_dim_; d += kLane) {
        Vec<Acc> square[kLane];
        for (int r = 0; r < kLane; ++r)
          square[r] = d + r < head_dim_ ? load(dq + (d + r) * row_stride<Acc>(kQ) + i) * scale : Vec<Acc>{};
        transpose(square);
        for (int r = 0; r < least(kLane, n - i); ++r) store_upto(to + (i + r) * stride + d, square[r], head_dim_ - d);
      }
  }

  const int64_t size_;        // keys of a block
  Acc* row_sums_ = nullptr;   // [heads of the group or 1, keys] of a bias' gradient that is summed over rows
};

// Packs a block of queries of one head; its dQ is zeroed, and written where no key is seen.
template <class T, class C>
class Packer {
  using Acc = typename C::Acc;
  static constexpr int kQ = kQueries<C>, kLane = kLanes<Acc>;

 public:
  Packer(const Problem& problem, Scratch& scratch) : problem_(problem), f_(problem.f) {
    staged_ = scratch.take<T>(kQ * most(f_.head_dim, f_.value_dim));
    out_ = scratch.take<typename C::Elem>(packed_size<C>(f_.value_dim, kQ));
    if constexpr (kIsSplit<C>) products_ = scratch.take<Acc>(C::kPanel * C::kPanel);
  }

  // Returns whether an lse is so large that it is not exact.
  bool run(const Sequence& s, int64_t head, int64_t query_block, bool unseen, const QueryBlock<C>& to,
           [[maybe_unused]] UnitRange* range) {
    const FlashAttentionBackwardParams& p = problem_.p;
    const int64_t first = query_block * kQ, token = s.q0 + first;
    const int n = static_cast<int>(least<int64_t>(kQ, s.tq - first));
    if (unseen) {
      T* const dq = static_cast<T*>(p.dq) + s.batch * p.dq_stride.batch + head * p.dq_stride.head +
          token * p.dq_stride.token;
      for (int i = 0; i < n; ++i) __builtin_memset(dq + i * p.dq_stride.token, 0, sizeof(T) * f_.head_dim);
      return false;
    }
    pack(static_cast<const T*>(f_.q), f_.q_stride, s, head, token, n, f_.head_dim, to.q_columns, to.q_rows);
    pack(static_cast<const T*>(p.dout), p.dout_stride, s, head, token, n, f_.value_dim, to.dout_columns, to.dout_rows);
    if constexpr (kIsSplit<C>) {
      const T* const out = rows_of(static_cast<const T*>(f_.out), f_.out_stride, s, head, token);
      copy_rows<C>(out_, round_up(f_.value_dim, C::kDepthAlign), out, f_.out_stride.token, n,
                   static_cast<int>(f_.value_dim));
      const auto add = [&](UnitRange::Tensor tensor, const void* base, const Strides3& stride, int64_t dim) {
        range->add(tensor, magnitudes(rows_of(static_cast<const T*>(base), stride, s, head, token), stride.token, n,
                                      dim, kInfinity).seen());
      };
      add(UnitRange::kQ, f_.q, f_.q_stride, f_.head_dim);
      add(UnitRange::kOutGradient, p.dout, p.dout_stride, f_.value_dim);
    } else {
      pack(static_cast<const T*>(f_.out), f_.out_stride, s, head, token, n, f_.value_dim, out_, nullptr);
    }
    __builtin_memset(to.dq, 0, static_cast<size_t>(QueryBlocks<C>::dq_bytes(f_)));
    const int64_t row = (s.batch * f_.heads_q + head) * f_.seqlen_q + token;
    dot(to, n);
    for (int i = 0; i < n; ++i) {
      if (p.dlse) to.delta[i] -= static_cast<const Acc*>(p.dlse)[row + i];
      // Of a row that saw no key: weights of 2^-infinity.
      const Acc lse = static_cast<const Acc*>(f_.lse)[row + i];
      to.lse[i] = lse == -static_cast<Acc>(kInfinity) ? static_cast<Acc>(kInfinity) : lse * static_cast<Acc>(kLog2e);
    }
    for (int i = n; i < kQ; ++i) to.lse[i] = static_cast<Acc>(kInfinity), to.delta[i] = 0;
    if constexpr (kIsSplit<C>) range->add(UnitRange::kDelta, magnitudes(to.delta, 0, 1, n, kInfinity).seen());
    bool far = false;
    for (int i = 0; i < n; ++i) {
      const Acc size = to.lse[i] < 0 ? -to.lse[i] : to.lse[i];
      far |= size >= kFar<Acc> && size < static_cast<Acc>(kInfinity);
    }
    return far;
  }

 private:
  static const T* rows_of(const T* base, const Strides3& stride, const Sequence& s, int64_t head, int64_t token) {
    return base + s.batch * stride.batch + head * stride.head + token * stride.token;
  }

  // By columns and, unless null, by rows, with zeros for the rows that are missing to whole panels.
  void pack(const T* base, const Strides3& stride, const Sequence& s, int64_t head, int64_t token, int n, int64_t dim,
            typename C::Elem* columns, typename C::Elem* rows) {
    const T* from = rows_of(base, stride, s, head, token);
    int64_t from_stride = stride.token;
    const int padded = round_up(n, C::kPanel);
    if (n < padded) {
      for (int i = 0; i < n; ++i) __builtin_memcpy(staged_ + i * dim, from + i * from_stride, sizeof(T) * dim);
      __builtin_memset(staged_ + n * dim, 0, sizeof(T) * (padded - n) * dim);
      from = staged_;
      from_stride = dim;
    }
    pack_columns<C>(columns, packed_panel<C>(dim), from, from_stride, static_cast<int>(dim), padded);
    if (rows) pack_rows<C>(rows, packed_panel<C>(kQ), from, from_stride, padded, static_cast<int>(dim));
  }

  // delta = rowsum(dO out), in the order of summation of dP = dO V^T: where a row sees one key, dP - delta is zero
  // exactly.
  void dot(const QueryBlock<C>& block, int n) {
    const int64_t panel = packed_panel<C>(f_.value_dim);
    if constexpr (kIsSplit<C>) {
      // Only on the tiles are sums in that order: the diagonal of a product.
      const int64_t stride = round_up(f_.value_dim, C::kDepthAlign);
      for (int i = 0; i < n; i += C::kPanel) {
        const int rows = least(C::kPanel, n - i);
        matmul<C>(rows, rows, static_cast<int>(stride), {out_ + i * stride, stride},
                  {block.dout_columns + i / C::kPanel * panel, panel},
                  {products_, C::kPanel}, false);
        for (int r = 0; r < rows; ++r) block.delta[i + r] = products_[r * C::kPanel + r];
      }
      return;
    }
    const int64_t depth = round_up(f_.value_dim, C::kPair);
    for (int i = 0; i < n; i += kLane) {
      const int64_t first = i / C::kPanel * panel + i % C::kPanel * C::kPair;
      const typename C::Elem *a = out_ + first, *b = block.dout_columns + first;
      Vec<Acc> sum{};
      for (int64_t d = 0; d < depth; d += C::kPair, a += C::kPanel * C::kPair, b += C::kPanel * C::kPair) {
#if defined(PYKERNELS_HAS_BF16_DOT)
        if constexpr (C::kPair == 2)
          sum = (Vec<Acc>)_mm512_dpbf16_ps((__m512)sum, load_bits<__m512bh>(a), load_bits<__m512bh>(b));
        else
#endif
          sum = sum + load(a) * load(b);
      }
      store(block.delta + i, sum);
    }
  }

  const Problem& problem_;
  const FlashAttentionParams& f_;
  T* staged_;
  typename C::Elem* out_;    // packed out^T; for SplitF32 out, a left operand
  Acc* products_ = nullptr;  // [kPanel, kPanel]
};

// ---- the passes -----------------------------------------------------------------------------------------------------

// Gradients of packed tokens that belong to no sequence.
template <class T>
void write_unused(void* base, const Strides3& stride, int64_t heads, int64_t dim, Range tokens) {
  for (int64_t t = tokens.begin; t < tokens.end; ++t)
    for (int64_t h = 0; h < heads; ++h)
      __builtin_memset(static_cast<T*>(base) + t * stride.token + h * stride.head, 0, sizeof(T) * dim);
}

// The number of keys of a block: what the cache holds, but no fewer blocks than keep the threads busy.
template <class C>
int64_t keys_of_block(const Problem& problem, int threads) {
  using Elem = typename C::Elem;
  using Acc = typename C::Acc;
  const FlashAttentionParams& f = problem.f;
  const int64_t query_bytes = kQueries<C> * (2 * (f.head_dim + f.value_dim) * sizeof(Elem) + f.head_dim * sizeof(Acc));
  const int64_t key_bytes = (2 * f.head_dim + f.value_dim + kQueries<C>) * sizeof(Elem) +
      (f.head_dim + f.value_dim) * sizeof(Acc);
  int64_t longest = 1, keys = 0;
  for (int64_t s = 0; s < problem.sequences(); ++s) {
    const int64_t tk = problem.sequence(s).tk;
    longest = most(longest, tk);
    keys += tk * f.heads_k;
  }
  const int64_t cached = most<int64_t>(0, kCacheBytes - query_bytes) / key_bytes, shared = keys / (4 * threads);
  const int64_t limit = least<int64_t>(512, threads > 1 ? least(cached, most<int64_t>(shared, 128)) : cached);
  const int64_t strips = most<int64_t>(1, limit / kStrip<C>) * kStrip<C>;
  return round_up((longest + (longest + strips - 1) / strips - 1) / ((longest + strips - 1) / strips), kStrip<C>);
}

struct Task {
  int64_t unit, key_block;
};

// The gradients of the units listed. `ranges`, by unit, is filled in for SplitF32.
template <class T, class C>
void backward_units(const Problem& problem, const Parallel& parallel, const int64_t* list, int64_t units,
                    UnitRange* ranges) {
  const FlashAttentionBackwardParams& p = problem.p;
  const FlashAttentionParams& f = p.forward;
  // The size of the blocks decides how dQ's sums are grouped: fixed where results must not depend on the threads.
  const int64_t keys = keys_of_block<C>(problem, p.deterministic ? 2 : parallel.threads);
  const QueryBlocks<C> layout(f);
  // All by place in the list.
  const auto sequence_of = [&](int64_t unit) { return problem.sequence(list[unit] / f.heads_k); };
  const auto head_of = [&](int64_t unit) { return list[unit] % f.heads_k; };
  const auto query_blocks = [&](int64_t unit) {
    return problem.group * ((sequence_of(unit).tq + kQueries<C> - 1) / kQueries<C>);
  };
  const auto key_blocks_of = [&](int64_t unit) { return (sequence_of(unit).tk + keys - 1) / keys; };

  Scratch all_waves;
  BiasTurns bias_turns{nullptr, nullptr, 0, 0};
  if (problem.bias_gradient() && (problem.over_heads() || problem.over_batch())) {
    int64_t* const first_block = all_waves.take<int64_t>(problem.sequences());
    bias_turns.first = first_block;
    for (int64_t s = 0; s < problem.sequences(); ++s)
      bias_turns.key_blocks = most(bias_turns.key_blocks, (problem.sequence(s).tk + keys - 1) / keys);
    for (int64_t s = 0; s < problem.sequences(); ++s) {
      first_block[s] = problem.over_batch() ? 0 : bias_turns.blocks;
      const int64_t here = (problem.sequence(s).tq + kQueries<C> - 1) / kQueries<C> * bias_turns.key_blocks;
      bias_turns.blocks = problem.over_batch() ? most(here, bias_turns.blocks) : bias_turns.blocks + here;
    }
    // One more where there are no queries, but sums over them.
    bias_turns.blocks += bias_turns.key_blocks;
    bias_turns.turns = all_waves.take<int64_t>(bias_turns.blocks * problem.bias_heads());
    __builtin_memset(bias_turns.turns, 0, sizeof(int64_t) * bias_turns.blocks * problem.bias_heads());
  }

  for (int64_t begin = 0, end; begin < units; begin = end) {
    // The wave: units [begin, end).
    int64_t blocks = 0, tasks = 0;
    for (end = begin; end < units; ++end) {
      const int64_t more = query_blocks(end);
      if (end > begin && (blocks + more) * layout.bytes() > kWaveBytes) break;
      blocks += more;
      tasks += key_blocks_of(end);
    }
    Scratch scratch;
    char* const packed = scratch.take<char>(blocks * layout.bytes());
    bool* const far = scratch.take<bool>(blocks);
    int64_t* const turns = scratch.take<int64_t>(blocks);           // the block of keys that may add to its dQ
    int64_t* const first = scratch.take<int64_t>(end - begin + 1);  // of a unit's query blocks
    Task* const task = scratch.take<Task>(tasks);
    first[0] = 0;
    for (int64_t u = begin; u < end; ++u) first[u - begin + 1] = first[u - begin] + query_blocks(u);
    // As many units at a time as there are threads: few enough to stay in the caches, enough not to wait for each
    // other.
    tasks = 0;
    for (int64_t u = begin, next; u < end; u = next) {
      next = least<int64_t>(end, u + parallel.threads);
      bool more = true;
      for (int64_t i = 0; more; ++i) {
        more = false;
        for (int64_t v = u; v < next; ++v) {
          if (i >= key_blocks_of(v)) continue;
          task[tasks++] = {v, i};
          more = true;
        }
      }
    }

    run_tasks(parallel, blocks, [&](TaskQueue& queue) {
      const Tiles tiles;
      Scratch own;
      Packer<T, C> packer(problem, own);
      int64_t u = begin;
      for (int64_t i; (i = queue.next()) >= 0;) {
        while (i >= first[u - begin + 1]) ++u;
        const Sequence s = sequence_of(u);
        const int64_t per_head = query_blocks(u) / problem.group, index = i - first[u - begin];
        const Range range = key_blocks<C>(problem, s, index % per_head, keys);
        turns[i] = range.begin;
        far[i] = packer.run(s, head_of(u) * problem.group + index / per_head, index % per_head,
                            range.begin == range.end, layout.at(packed, i), ranges ? ranges + list[u] : nullptr);
      }
    });
    run_tasks(parallel, tasks, [&](TaskQueue& queue) {
      const Tiles tiles;
      Scratch own;
      Worker<T, C> worker(problem, keys, own);
      for (int64_t i; (i = queue.next()) >= 0;) {
        const int64_t u = task[i].unit, base = first[u - begin];
        const auto block = [&](int64_t n) {
          QueryBlock<C> result = layout.at(packed, base + n);
          result.far = far[base + n];
          return result;
        };
        worker.run(sequence_of(u), head_of(u), task[i].key_block, block, turns + base, bias_turns,
                   ranges ? ranges + list[u] : nullptr);
      }
    });
  }
}

// The gradients of sinks, and of a bias that is the same for all keys. With D = dO out, and p the weight of the sink (0
// without): every other weight's value took part in D, so  dsink = -p (D - dlse)  and  dbias = p D + (1 - p) dlse  for
// the row.
template <class T>
void row_gradients(const Problem& problem, const Parallel& parallel) {
  using S = Wide<T>;
  const FlashAttentionBackwardParams& p = problem.p;
  const FlashAttentionParams& f = p.forward;
  const bool bias = p.dbias && f.bias_stride.key == 0;
  if (!bias && !p.dsinks) return;
  Scratch scratch;
  S* const rows = bias ? scratch.take<S>(f.batch * f.heads_q * f.seqlen_q) : nullptr;
  S* const sinks = scratch.take<S>(f.batch * f.heads_q);
  run_tasks(parallel, f.batch * f.heads_q, [&](TaskQueue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t b = task / f.heads_q, h = task % f.heads_q;
      const T* const out = static_cast<const T*>(f.out) + b * f.out_stride.batch + h * f.out_stride.head;
      const T* const dout = static_cast<const T*>(p.dout) + b * p.dout_stride.batch + h * p.dout_stride.head;
      double dsink = 0;
      for (int64_t t = 0; t < f.seqlen_q; ++t) {
        const int64_t row = task * f.seqlen_q + t;
        const S lse = static_cast<const S*>(f.lse)[row];
        if (rows) rows[row] = 0;
        if (lse == -static_cast<S>(kInfinity)) continue;  // sees nothing, not even a sink
        Vec<S> sum{};
        for (int64_t d = 0; d < f.value_dim; d += kLanes<S>)
          sum += load_upto(out + t * f.out_stride.token + d, f.value_dim - d) *
                 load_upto(dout + t * p.dout_stride.token + d, f.value_dim - d);
        const double dot = static_cast<double>(reduce_add<S>(sum));
        const double dlse = p.dlse ? static_cast<double>(static_cast<const S*>(p.dlse)[row]) : 0;
        double weight = 0;
        if (f.sinks)
          weight = __builtin_exp(static_cast<double>(static_cast<const S*>(f.sinks)[h]) - static_cast<double>(lse));
        dsink -= weight * (dot - dlse);
        if (rows) rows[row] = static_cast<S>(weight * dot + (1 - weight) * dlse);
      }
      sinks[task] = static_cast<S>(dsink);
    }
  });
  for (int64_t h = 0; p.dsinks && h < f.heads_q; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < f.batch; ++b) sum += static_cast<double>(sinks[b * f.heads_q + h]);
    static_cast<S*>(p.dsinks)[h] = static_cast<S>(sum);
  }
  if (!bias) return;
  const int64_t batch = f.bias_stride.batch ? f.batch : 1, heads = f.bias_stride.head ? f.heads_q : 1;
  const int64_t queries = f.bias_stride.row ? f.seqlen_q : 1;
  for (int64_t i = 0; i < batch * heads * queries; ++i) {
    // The rows that share this element.
    const int64_t b = i / (heads * queries), h = i / queries % heads, t = i % queries;
    double sum = 0;
    for (int64_t n = 0; n < f.batch * f.heads_q * f.seqlen_q / most<int64_t>(1, batch * heads * queries); ++n) {
      const int64_t of_rows = f.seqlen_q / most<int64_t>(1, queries), of_heads = f.heads_q / most<int64_t>(1, heads);
      const int64_t row = n % of_rows, head = n / of_rows % of_heads, entry = n / of_rows / of_heads;
      sum += static_cast<double>(rows[((b + entry) * f.heads_q + h + head) * f.seqlen_q + t + row]);
    }
    static_cast<S*>(p.dbias)[i] = static_cast<S>(sum);
  }
}

// A bias' gradient starts from zeros.
template <class S>
void clear_dbias(const Problem& problem, const Parallel& parallel) {
  if (!problem.bias_gradient()) return;
  const FlashAttentionParams& f = problem.f;
  const int64_t rows =
      (f.bias_stride.batch ? f.batch : 1) * problem.bias_heads() * (problem.over_rows() ? 1 : f.seqlen_q);
  run_tasks(parallel, rows, [&](TaskQueue& queue) {
    for (int64_t row; (row = queue.next()) >= 0;)
      __builtin_memset(static_cast<S*>(problem.p.dbias) + row * f.seqlen_k, 0, sizeof(S) * f.seqlen_k);
  });
}

template <class T>
void backward(const FlashAttentionBackwardParams& p, const Parallel& parallel) {
  const FlashAttentionParams& f = p.forward;
  const Problem problem{p, f, f.heads_q / f.heads_k, f.window_left < 0 ? kUnbounded : least(f.window_left, kUnbounded),
                        f.window_right < 0 ? kUnbounded : least(f.window_right, kUnbounded)};
  const int64_t sequences = problem.sequences(), units = sequences * f.heads_k;
  if (f.cu_seqlens_q) {
    const Sequence first = sequences ? problem.sequence(0) : Sequence{};
    const Sequence last = sequences ? problem.sequence(sequences - 1) : first;
    const auto unused = [&](Range q, Range k) {
      write_unused<T>(p.dq, p.dq_stride, f.heads_q, f.head_dim, q);
      write_unused<T>(p.dk, p.dk_stride, f.heads_k, f.head_dim, k);
      write_unused<T>(p.dv, p.dv_stride, f.heads_k, f.value_dim, k);
    };
    unused({0, first.q0}, {0, first.k0});
    unused({last.q0 + last.tq, f.seqlen_q}, {last.k0 + last.tk, f.seqlen_k});
  }

  row_gradients<T>(problem, parallel);
  clear_dbias<Wide<T>>(problem, parallel);
  Scratch scratch;
  int64_t* const list = scratch.take<int64_t>(units);
  for (int64_t u = 0; u < units; ++u) list[u] = u;
  int64_t left = units;
#if defined(PYKERNELS_HAS_AMX)
  // fp32 and fp16 on the tiles; again, and otherwise, the units whose values turn out not to allow that.
  if constexpr (std::is_same_v<ComputeFor<T>, F32>)
    if (f.head_dim + f.value_dim > 32 && f.scale < 0x1p30 && f.scale > -0x1p30) {
      UnitRange* const ranges = scratch.take<UnitRange>(units);
      __builtin_memset(ranges, 0, sizeof(UnitRange) * units);
      backward_units<T, SplitF32>(problem, parallel, list, units, ranges);
      left = 0;
      for (int64_t u = 0; u < units; ++u)
        if (!ranges[u].split_serves()) list[left++] = u;
      if (left && problem.bias_gradient()) {
        // What they added can't be taken back.
        clear_dbias<Wide<T>>(problem, parallel);
        for (left = 0; left < units; ++left) list[left] = left;
      }
    }
#endif
  backward_units<T, ComputeFor<T>>(problem, parallel, list, left, nullptr);
}

}  // namespace

void flash_attention_bwd(const FlashAttentionBackwardParams& params, const Parallel& parallel) {
  switch (params.forward.dtype) {
    case DType::kFloat32:
      return backward<float>(params, parallel);
    case DType::kBFloat16:
      return backward<BFloat16>(params, parallel);
    case DType::kFloat16:
      return backward<Float16>(params, parallel);
    case DType::kFloat64:
      return backward<double>(params, parallel);
  }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
