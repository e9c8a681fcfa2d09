// Flash attention, forward.
//
// Rows. The query heads that share a key head are folded into the rows of one problem: row r of (sequence, key head) is
// query r / group of head r % group, so that K and V are packed once for all of them.
// Tasks. One is (sequence, key head, chunk of rows), a chunk being what keeps its queries and accumulators in the L2
// cache. A task walks over blocks of keys; a block of K and V is packed once, then every tile of kRows rows that sees
// some of it does
//   S = Q K^T,  P = 2^(c S - m),  l = l 2^(m' - m) + row sums of P,  O = O 2^(m' - m) + P V      (c = scale * log2 e)
// and at the end out = O / l, lse = (m + log2 l) ln 2. Tiles are cut down to the keys that any of their rows sees;
// only tiles at an edge of the mask look at single keys. The tiles of rows and blocks of keys depend on the shape
// alone, so results are the same whatever the number of threads. Few rows against many keys are cut along the keys too:
// a task then leaves O, m and l of its piece of keys, and a second pass puts the pieces of a chunk together.
#include "../../include/pykernels/flash_attention.h"

#include "../common/matmul.h"
#include "../common/scratch.h"
#include "softmax.h"
#include "terms.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

constexpr int64_t kUnbounded = int64_t{1} << 62;

// What the tasks of one call have in common.
struct Problem {
  const FlashAttentionParams& p;
  int64_t group;       // query heads per key head
  int64_t chunk_rows;  // a multiple of the rows of a tile
  int64_t left, right;
  int64_t key_heads;   // batch * heads_k: tasks per (sequence, chunk)
};

// One sequence: tokens [q0, q0 + tq) of q against [k0, k0 + tk) of k.
struct Sequence {
  int64_t q0, tq, k0, tk, index;
};

Sequence sequence(const FlashAttentionParams& p, int64_t s) {
  if (!p.cu_seqlens_q) return {0, p.seqlen_q, 0, p.seqlen_k, 0};
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  const int64_t q0 = clamp(p.cu_seqlens_q[s], 0, p.seqlen_q), k0 = clamp(p.cu_seqlens_k[s], 0, p.seqlen_k);
  return {q0, clamp(p.cu_seqlens_q[s + 1], q0, p.seqlen_q) - q0,
          k0, clamp(p.cu_seqlens_k[s + 1], k0, p.seqlen_k) - k0, s};
}

// The keys [begin, end) that query i of a sequence sees.
struct Range {
  int64_t begin, end;
};
Range visible(const Problem& problem, const Sequence& s, int64_t i) {
  const int64_t position = i + s.tk - s.tq;
  return {most<int64_t>(0, position - problem.left), least<int64_t>(s.tk, position + problem.right + 1)};
}

// A chunk of rows of a sequence against a piece of its keys, and about how many scores it takes.
struct Chunk {
  int64_t cost;
  int32_t sequence, index, piece, pieces;
  int64_t partial;  // where its pieces are left, in rows per key head
};

// Into how many pieces the keys of a sequence are cut: by shapes alone. Where there are many heads and sequences they
// are work enough, and pieces would take memory.
constexpr int64_t kPieceKeys = 1024, kMaxPieces = 8, kFewRows = 256, kFewTasks = 16;
int64_t keys_of_piece(const Sequence& s) {
  return kPieceKeys * ((s.tk + kMaxPieces * kPieceKeys - 1) / (kMaxPieces * kPieceKeys));
}
int64_t key_pieces(const Problem& problem, const Sequence& s) {
  const int64_t tasks = problem.key_heads * most<int64_t>(1, problem.p.sequences);
  if (tasks > kFewTasks || s.tq * problem.group > kFewRows || s.tk < 2 * kPieceKeys) return 1;
  return (s.tk + keys_of_piece(s) - 1) / keys_of_piece(s);
}

// Most expensive first (heap sort: in place, and nothing from the standard library).
void sort_chunks(Chunk* chunks, int64_t n) {
  const auto before = [](const Chunk& a, const Chunk& b) {
    if (a.cost != b.cost) return a.cost < b.cost;
    if (a.sequence != b.sequence) return a.sequence > b.sequence;
    return a.index != b.index ? a.index > b.index : a.piece > b.piece;
  };
  const auto sift = [&](int64_t root, int64_t end) {
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      // The least on top.
      if (child + 1 < end && before(chunks[child + 1], chunks[child])) ++child;
      if (!before(chunks[child], chunks[root])) return;
      const Chunk swapped = chunks[root];
      chunks[root] = chunks[child];
      chunks[child] = swapped;
    }
  };
  for (int64_t i = n / 2 - 1; i >= 0; --i) sift(i, n);
  for (int64_t end = n - 1; end > 0; --end) {
    const Chunk swapped = chunks[0];
    chunks[0] = chunks[end];
    chunks[end] = swapped;
    sift(0, end);
  }
}

#if defined(PYKERNELS_HAS_AMX)
// Times this, a tile of 32 weights per row comes out as the 16 sums of pairs.
struct PairSums {
  uint16_t ones[16 * 32];
  constexpr PairSums() : ones() {
    for (int i = 0; i < 16; ++i) ones[34 * i] = ones[34 * i + 1] = 0x3f80;
  }
};
alignas(64) constexpr PairSums kPairSums;
#endif

template <class C>
struct Shape {
  static constexpr bool kTiles = C::kRowAlign > 1;  // of AMX
  static constexpr int kRows = kTiles ? 32 : 48;
  static constexpr int kKeys = kTiles && sizeof(typename C::Elem) == 2 ? 256 : 128;
  static_assert(kRows % C::kRowAlign == 0 && kKeys % C::kPanel == 0 && kKeys % C::kDepthAlign == 0);
};

// One thread's buffers, and the work of a task.
template <class T, class C>
class Worker {
  using Elem = typename C::Elem;
  using Acc = typename C::Acc;
  static constexpr int kRows = Shape<C>::kRows, kKeys = Shape<C>::kKeys, kLane = kLanes<Acc>;
  // Of s_ and weights_; not a power of two.
  static constexpr int kStride = kKeys + (Shape<C>::kTiles ? 32 : 64 / static_cast<int>(sizeof(Elem)));
  static constexpr int kAhead = 16;  // rows of q fetched in advance
  static constexpr bool kFastExp = kHasFastExp2<C>;
  // What the products take: other values are packed as zeros, and what they bring is put in place afterwards, so that
  // rows that do not see them come out the same in every bit.
#if defined(PYKERNELS_HAS_AMX)
  static constexpr Acc kLimit = kIsSplit<C> ? static_cast<Acc>(kSplitLargest) : static_cast<Acc>(kInfinity);
#else
  static constexpr Acc kLimit = static_cast<Acc>(kInfinity);
#endif

 public:
  Worker(const Problem& problem, Scratch& scratch)
      : problem_(problem),
        p_(problem.p),
        terms_(problem.p),
        dropout_(problem.p),
        scratch_(scratch),
        depth_(static_cast<int>(round_up(p_.head_dim, C::kDepthAlign))),
        width_(static_cast<int>(round_up(p_.value_dim, C::kColumnAlign))) {
    q_ = scratch.take<Elem>(problem.chunk_rows * depth_);
    o_ = scratch.take<Acc>(problem.chunk_rows * width_);
    m_ = scratch.take<Acc>(problem.chunk_rows);
    tiles_ = scratch.take<QueryTile>(problem.chunk_rows / kRows);
    l_ = scratch.take<Acc>(problem.chunk_rows * kLane);
    k_ = scratch.take<Elem>(packed_size<C>(depth_, kKeys));
    v_ = scratch.take<Elem>(packed_size<C>(kKeys, width_));
    constexpr int buffers = kIsSplit<C> ? 2 : 1;
    s_ = scratch.take<Acc>(buffers * kRows * kStride);
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kFastExp) fused_terms_ = terms_.start(fast_terms_);
#endif
    weights_ = sizeof(Elem) == sizeof(Acc) ? reinterpret_cast<Elem*>(s_)
                                                   : scratch.take<Elem>(buffers * kRows * kStride);
  }

  // `partial`: the results of the chunk's pieces, [pieces][rows][partial_size(p)], where there are several.
  void run(const Sequence& s, int64_t batch, int64_t head_k, const Chunk& chunk, Acc* partial) {
    start(s, batch, head_k, chunk);
    int64_t end = visible(problem_, s, token(rows_ - 1)).end;
    int64_t begin = visible(problem_, s, token(0)).begin / kKeys * kKeys;
    if (chunk.pieces > 1) {
      static_assert(kPieceKeys % kKeys == 0);
      begin = most(begin, chunk.piece * keys_of_piece(s));
      end = least(end, (chunk.piece + 1) * keys_of_piece(s));
    }
    end_ = end;
    load_queries(begin, end);
    const int tiles = (rows_ + kRows - 1) / kRows;
    for (int64_t key = begin; key < end; key += kKeys) {
      // Also those that no row of this chunk sees: what a block's keys and values hold decides how it is computed, and
      // where chunks end depends on the threads.
      load_keys(key, static_cast<int>(least<int64_t>(kKeys, s.tk - key)));
      for (int t = 0; t < tiles; ++t) {
        prefetch_keys(key + kKeys, end, t, tiles);
        tile(t * kRows, key);
      }
#if defined(PYKERNELS_HAS_AMX)
      if constexpr (kIsSplit<C>) finish();
#endif
    }
    for (int t = 0; t < tiles; ++t)  // that have seen nothing
      if (!tiles_[t].started) __builtin_memset(o_ + t * kRows * width_, 0, sizeof(Acc) * kRows * width_);
    if (chunk.pieces == 1) return write();
    const int64_t size = partial_size(p_);
    partial += chunk.piece * rows_ * size;
    for (int row = 0; row < rows_; ++row, partial += size) {
      __builtin_memcpy(partial, o_ + row * width_, sizeof(Acc) * width_);
      partial[width_] = m_[row];
      partial[width_ + 1] = reduce_add<Acc>(load(l_ + row * kLane));
    }
  }

  // Puts the pieces of a chunk together.
  void merge(const Sequence& s, int64_t batch, int64_t head_k, const Chunk& chunk, const Acc* partial) {
    start(s, batch, head_k, chunk);
    const int64_t size = partial_size(p_), stride = rows_ * size;
    __builtin_memset(o_, 0, sizeof(Acc) * rows_ * width_);
    __builtin_memset(l_, 0, sizeof(Acc) * round_up(rows_, kLane) * kLane);
    for (int row = 0; row < rows_; ++row, partial += size) {
      Acc m = -static_cast<Acc>(kInfinity);
      for (int i = 0; i < chunk.pieces; ++i) m = most(m, partial[i * stride + width_]);
      m_[row] = m;
      for (int i = 0; i < chunk.pieces; ++i) {
        const Acc* const from = partial + i * stride;
        if (from[width_] == -static_cast<Acc>(kInfinity) && from[width_ + 1] == 0) continue;  // saw nothing
        const Vec<Acc> alpha = exp2<Acc>(splat(from[width_] - m));
        l_[row * kLane] += from[width_ + 1] * alpha[0];
        for (int j = 0; j < width_; j += kLane)
          store(o_ + row * width_ + j, load(o_ + row * width_ + j) + load(from + j) * alpha);
      }
    }
    write();
  }
  // O, m and l of a row.
  static int64_t partial_size(const FlashAttentionParams& p) { return round_up(p.value_dim, C::kColumnAlign) + kLane; }

 private:
  void start(const Sequence& s, int64_t batch, int64_t head_k, const Chunk& chunk) {
    s_q_ = &s;
    batch_ = batch;
    head_k_ = head_k;
    first_row_ = chunk.index * problem_.chunk_rows;
    rows_ = static_cast<int>(least(problem_.chunk_rows, s.tq * problem_.group - first_row_));
#if defined(PYKERNELS_HAS_AMX)
    next_bias_.row = -1;
#endif
  }
  int64_t token(int row) const { return (first_row_ + row) / problem_.group; }

  // Token and head of consecutive rows, without a division for each.
  struct Cursor {
    int64_t group, token, head;  // head: within the group
    PYKERNELS_INLINE void advance() {
      if (++head == group) {
        head = 0;
        ++token;
      }
    }
  };
  Cursor cursor(int row) const {
    const int64_t index = first_row_ + row, group = problem_.group;
    return {group, index / group, index % group};
  }
  template <class E>
  PYKERNELS_INLINE E* address(E* base, const Strides3& stride, const Cursor& at) const {
    return base + batch_ * stride.batch + (s_q_->q0 + at.token) * stride.token +
           (head_k_ * problem_.group + at.head) * stride.head;
  }

  // Brings part `part` of `parts` of the block of keys and values from `key` on into the L2 cache. Their rows are far
  // apart in memory, often in pages of their own: more than the hardware foresees. Inline, since GCC takes a function
  // that does nothing but prefetch for one without effect, and drops calls of it.
  PYKERNELS_INLINE void prefetch_keys(int64_t key, int64_t end, int part, int parts) const {
    if (p_.block_table) return;
    const int64_t n = least<int64_t>(kKeys, end - key);
    for (int64_t i = key + n * part / parts; i < key + n * (part + 1) / parts; ++i) {
      prefetch_row(keys() + i * p_.k_stride.token, p_.head_dim);
      prefetch_row(values() + i * p_.v_stride.token, p_.value_dim);
    }
  }
  PYKERNELS_INLINE static void prefetch_row(const T* row, int64_t n) {
    for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + j, 0, 2);
  }
  // The first key and value of this sequence and key head.
  const T* keys() const {
    return static_cast<const T*>(p_.k) + batch_ * p_.k_stride.batch + head_k_ * p_.k_stride.head +
           s_q_->k0 * p_.k_stride.token;
  }
  const T* values() const {
    return static_cast<const T*>(p_.v) + batch_ * p_.v_stride.batch + head_k_ * p_.v_stride.head +
           s_q_->k0 * p_.v_stride.token;
  }

  // Copies keys or values [key, key + n) out of their pages; rows of `dim`.
  const T* from_pages(T*& buffer, const void* pages, const Strides3& stride, int64_t key, int n, int64_t dim) {
    if (!buffer) buffer = scratch_.take<T>(kKeys * dim);
    for (int i = 0; i < n; ++i) {
      const int64_t page = page_of(p_, batch_, (key + i) / p_.page_size);
      const T* const from =
          static_cast<const T*>(pages) + page * stride.batch + (key + i) % p_.page_size * stride.token +
                            head_k_ * stride.head;
      __builtin_memcpy(buffer + i * dim, from, sizeof(T) * dim);
    }
    return buffer;
  }

  // Fetches the first block of keys on the side.
  void load_queries(int64_t first_key, int64_t end_key) {
    const T* const q = static_cast<const T*>(p_.q);
    const int padded = round_up(rows_, kRows);
    __builtin_memset(q_ + rows_ * depth_, 0, (padded - rows_) * depth_ * sizeof(Elem));
    Cursor at = cursor(0), ahead = cursor(kAhead);
    for (int row = 0; row < rows_; ++row, at.advance(), ahead.advance()) {
      if (row + kAhead < rows_) prefetch_row(address(q, p_.q_stride, ahead), p_.head_dim);
      if (row % 16 == 0) prefetch_keys(first_key, end_key, row / 16, (rows_ + 15) / 16);
      const T* const from = address(q, p_.q_stride, at);
      Elem* const to = q_ + row * depth_;
      copy_rows<C>(to, depth_, from, 0, 1, static_cast<int>(p_.head_dim));
      // A negative scale goes into the queries, so that the largest product is the largest score.
      if (p_.scale < 0) negate(to, depth_);
      if (row + 1 < rows_ && (row + 1) % kRows != 0) continue;
      const int t = row / kRows;
      tiles_[t].started = false;
      if constexpr (kFastExp) tiles_[t].largest = largest_magnitude(q_ + t * kRows * depth_, depth_, kRows, depth_);
    }
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>) set_exceptional_queries();
#endif
    __builtin_memset(l_, 0, sizeof(Acc) * padded * kLane);
    // Rows beyond the last have a maximum at once: theirs, of zeros.
    for (int row = 0; row < padded; ++row) m_[row] = row < rows_ ? -static_cast<Acc>(kInfinity) : 0;
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kFastExp)
      if (fused_terms_ && terms_.alibi() && p_.scale != 0 && !dropout_.on()) look_at_own_keys();
#endif
  }

  template <class E>
  static void negate(E* x, int n) {
    if constexpr (sizeof(E) % 4 == 2) {
      uint16_t* const halves = reinterpret_cast<uint16_t*>(x);
      for (int i = 0; i < n * static_cast<int>(sizeof(E) / 2); ++i) halves[i] ^= 0x8000u;
    } else {
      for (int i = 0; i < n; ++i) x[i] = -x[i];
    }
  }

  // A copy with zeros for what is not below kLimit, good until the next. Its stride is `columns`.
  const T* without_exceptional(const T* from, int64_t stride, int rows, int64_t columns) {
    if (!cleaned_) cleaned_ = scratch_.take<T>(kKeys * most(p_.head_dim, p_.value_dim));
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const Acc x = to_float(from[i * stride + j]);
        cleaned_[i * columns + j] = (x < 0 ? -x : x) < kLimit ? from[i * stride + j] : T{};
      }
    return cleaned_;
  }

  // Packs keys [key, key + n) and their values.
  void load_keys(int64_t key, int n) {
    const int head_dim = static_cast<int>(p_.head_dim), value_dim = static_cast<int>(p_.value_dim);
    const bool paged = p_.block_table != nullptr;
    const T* const k = paged ? from_pages(k_pages_, p_.k, p_.k_stride, key, n, head_dim)
                             : keys() + key * p_.k_stride.token;
    const T* const v = paged ? from_pages(v_pages_, p_.v, p_.v_stride, key, n, value_dim)
                             : values() + key * p_.v_stride.token;
    const int64_t k_stride = paged ? head_dim : p_.k_stride.token, v_stride = paged ? value_dim : p_.v_stride.token;
    keys_ = n;
    k_source_ = k, v_source_ = v;
    k_source_stride_ = k_stride, v_source_stride_ = v_stride;
    exact_k_ready_ = exact_v_ready_ = false;

    exceptional_keys_ = false;
    if constexpr (kIsSplit<C>) exceptional_keys_ = !magnitudes(k, k_stride, n, head_dim, kLimit).all_below;
    if (exceptional_keys_) {
      for (int j = 0; j < n; ++j)
        exceptional_key_[j] = !magnitudes(k + j * k_stride, 0, 1, head_dim, kLimit).all_below;
      __builtin_memset(exceptional_key_ + n, 0, kKeys - n);
      pack_columns<C>(k_, packed_panel<C>(depth_), without_exceptional(k, k_stride, n, head_dim), head_dim,
                      head_dim, n);
    } else {
      pack_columns<C>(k_, packed_panel<C>(depth_), k, k_stride, head_dim, n);
    }

    Magnitudes<Acc> values{};
    if constexpr (kFastExp)
      values.all_below = largest_magnitude(v, v_stride, n, value_dim) < kLimit;
    else
      values = magnitudes(v, v_stride, n, value_dim, kLimit);
    exceptional_values_ = !values.all_below;
    if (exceptional_values_) {
      for (int j = 0; j < n; ++j)
        exceptional_value_[j] = !magnitudes(v + j * v_stride, 0, 1, value_dim, kLimit).all_below;
      pack_rows<C, WeightOrder<C>>(v_, packed_panel<C>(kKeys), without_exceptional(v, v_stride, n, value_dim),
                                   value_dim, n, value_dim);
    } else {
      pack_rows<C, WeightOrder<C>>(v_, packed_panel<C>(kKeys), v, v_stride, n, value_dim);
    }
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>) tiny_values_ = values.largest > 0 && values.largest < kSplitLeast;
#endif
    if constexpr (kFastExp) {
      const double scale = p_.scale < 0 ? -p_.scale : p_.scale;
      score_bound_ = largest_magnitude(k, k_stride, n, p_.head_dim) *
                     static_cast<Acc>(static_cast<double>(p_.head_dim) * scale * kLog2e);
    }
  }

  // What rows [row, row + kRows) see of the block of keys from `key` on: columns [begin, begin + columns), whole panels
  // at the front and no key past the last seen; the ranges are those of the first and the last of the `rows` there are.
  struct Cut {
    int rows;
    Range first, last;
    int begin, columns;
  };
  PYKERNELS_INLINE Cut cut(int row, int64_t key) const {
    const int rows = least(kRows, rows_ - row);
    const Range first = visible(problem_, *s_q_, token(row)), last = visible(problem_, *s_q_, token(row + rows - 1));
    if (last.end <= key || first.begin >= key + kKeys) return {rows, first, last, 0, 0};
    const int begin = static_cast<int>(most<int64_t>(0, first.begin - key)) / C::kPanel * C::kPanel;
    return {rows, first, last, begin, static_cast<int>(least<int64_t>(kKeys, last.end - key)) - begin};
  }

  // Rows [row, row + kRows) against the packed block of keys from `key` on.
  void tile(int row, int64_t key) {
    const auto [rows, first, last, begin, columns] = cut(row, key);
    if (columns <= 0) return;
    const int padded = round_up(columns, kSoftmaxColumns<C>);
    const int64_t first_key = key + begin;
    const bool edge = last.begin > first_key || first.end < first_key + padded;
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>) {
      if (p_.softcap <= 0 && p_.scale != 0 && !dropout_.on() && !tiny_values_ && !exceptional_keys_ &&
          !tiles_[row / kRows].exceptional)
        return overlap({row, rows, begin, padded, key, edge});
      finish();
    }
#endif
    // Whether the scores may go to the table of exponentials; not if one is NaN.
    [[maybe_unused]] bool fast = false;
    if constexpr (kFastExp) fast = score_bound_ * tiles_[row / kRows].largest < kFastExp2Bound;
    bool done = false;
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kFastExp)
      if (fast && !dropout_.on())
        done = terms_.on() || p_.softcap > 0 ? fused_terms_ && fuse_with_terms(row, key, begin, padded, first, last)
                                             : fuse<Terms::kNone>(row, key, begin, padded, first, last);
#endif
    if (!done) {
      scores(row, rows, begin, columns, padded);
      if (terms_.on()) fast &= add_terms(s_, row, rows, first_key, columns, padded) && maxima_below_bound(row, rows);
      if (edge) hide(s_, row, rows, first_key, padded);
      Softmax<C> softmax{rows,    padded,   s_, weights_, kStride, factor_, m_ + row, l_ + row * kLane,
                         o_ + row * width_, width_};
      if constexpr (kFastExp)
        fast ? softmax.fast() : softmax.exact();
      else
        softmax.exact();
      if (dropout_.on()) drop(row, rows, first_key, padded);
      add_values(row, rows, begin, columns, padded);
    }
    if (exceptional_values_) add_exceptional_values(row, rows, key, begin, padded, weights_);
  }

#if defined(PYKERNELS_HAS_AMX)
  // The tiles of a block of keys for SplitF32, three at a time: while the tile unit multiplies the scores of one and
  // the values of another, the vector unit turns the scores of the one between into weights.
  struct Stage {
    int row, rows, begin, columns;  // columns: 0 if there is none
    int64_t key;
    bool edge;
  };
  void overlap(const Stage& next) {
    const Stage now = softmax_stage_, last = values_stage_;
    float *const s_now = s_ + phase_ * kRows * kStride, *const s_next = s_ + (1 - phase_) * kRows * kStride;
    Elem *const w_now = weights_ + phase_ * kRows * kStride, *const w_last = weights_ + (1 - phase_) * kRows * kStride;
    const Acc factor = terms_.on() ? 1 : static_cast<Acc>((p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e);
    Softmax<C> softmax{now.columns ? kRows : 0, now.columns, s_now, w_now, kStride, factor, m_ + now.row,
                       l_ + now.row * kLane, o_ + now.row * width_, width_};
    const int pieces = softmax.pieces(), fetched = next.columns ? look_at_next(next.row, next.key) : 0;
    const auto piece = [&](int n) {
      if (n < fetched) fetch_bias(n);
      if (n < pieces) softmax.piece(n);
    };
    Spread<decltype(piece)> beside(
        piece, most(pieces, fetched),
        tile_products<C>(kRows, next.columns, depth_) +
            tile_products<C>(kRows, last.columns ? width_ : 0, last.columns));
    matmul<C>(kRows, next.columns, depth_, {q_ + next.row * depth_, depth_},
              {k_ + next.begin / C::kPanel * packed_panel<C>(depth_), packed_panel<C>(depth_)}, {s_next, kStride},
              false, beside);
    if (last.columns)
      matmul<C>(kRows, width_, last.columns, {w_last, kStride}, {v_, packed_panel<C>(kKeys), last.begin},
                {o_ + last.row * width_, width_}, goes_on(last.row), beside);
    beside.finish();
    if (last.columns && exceptional_values_)
      add_exceptional_values(last.row, last.rows, last.key, last.begin, last.columns, w_last);
    if (next.columns && terms_.on()) {
      factor_ = static_cast<Acc>((p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e);
      add_terms(s_next, next.row, next.rows, next.key + next.begin, next.columns, next.columns);
    }
    if (next.edge) hide(s_next, next.row, next.rows, next.key + next.begin, next.columns);
    values_stage_ = now;
    softmax_stage_ = next;
    phase_ = 1 - phase_;
  }
  void finish() {
    const Stage none{};
    if (softmax_stage_.columns) overlap(none);
    if (values_stage_.columns) overlap(none);
  }
#endif

  // Scores of a tile for columns [begin, begin + columns) of the block, in s_; what takes them to units of log 2, in
  // factor_.
  void scores(int row, int rows, int begin, int columns, int padded) {
    matmul<C>(rows, columns, depth_, {q_ + row * depth_, depth_},
              {k_ + begin / C::kPanel * packed_panel<C>(depth_), packed_panel<C>(depth_)}, {s_, kStride}, false);
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>)
      if (exceptional_keys_ || tiles_[row / kRows].exceptional) set_exceptional_scores(row, rows, begin, columns);
#endif
    const Acc scale = static_cast<Acc>((p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e);
    factor_ = scale;
    if (p_.softcap > 0) {
      const Acc in = static_cast<Acc>((p_.scale < 0 ? -p_.scale : p_.scale) / p_.softcap);
      const Acc out = static_cast<Acc>(p_.softcap * kLog2e);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < padded; j += kLane)
          store(s_ + i * kStride + j, tanh<Acc>(load(s_ + i * kStride + j) * in) * out);
      factor_ = 1;
    } else if (scale == 0 && !terms_.on()) {
      // Not a factor: hidden scores stay -infinity.
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < padded; j += kLane) store(s_ + i * kStride + j, load(s_ + i * kStride + j) * scale);
      factor_ = 1;
    }
  }

  Place place(int head) const {
    return {batch_, p_.cu_seqlens_q ? s_q_->index : batch_, head_k_ * problem_.group + head, s_q_->q0, s_q_->tq,
            s_q_->k0, s_q_->tk};
  }
  // Scales the scores of a tile to units of log 2 and adds what the options say. Whether the table of exponentials may
  // have them. Columns from `valid` on, which will be hidden and hold anything yet, have no say in that.
  bool add_terms(Acc* s, int row, int rows, int64_t first_key, int valid, int columns) {
    Bounded<Acc, kFastExp> bounded{static_cast<Acc>(kFastExp2Bound)};
    Cursor at = cursor(row);
    for (int i = 0; i < rows; ++i, at.advance()) {
      for (int j = valid; j < columns; ++j) s[i * kStride + j] = 0;
      terms_.add(s + i * kStride, columns, factor_, place(static_cast<int>(at.head)), at.token, first_key, bounded);
    }
    factor_ = 1;
    return bounded.holds();
  }
  bool maxima_below_bound(int row, int rows) const {
    for (int i = row; i < row + rows; ++i)
      if (!(m_[i] < kFastExp2Bound) || (m_[i] <= -kFastExp2Bound && m_[i] > -static_cast<Acc>(kInfinity))) return false;
    return true;
  }

  // Zeroes the weights that dropout does not keep; `write` scales the others.
  void drop(int row, int rows, int64_t first_key, int columns) {
    if constexpr (!kIsSplit<C>) {
      alignas(64) uint32_t buffer[Dropout::buffer_size(kKeys)];
      Cursor at = cursor(row);
      for (int i = 0; i < rows; ++i, at.advance()) {
        const uint32_t* const words =
            dropout_.row(place(static_cast<int>(at.head)), at.token, first_key, columns, buffer);
        Elem* const w = weights_ + i * kStride;
        if constexpr (kFastExp) {
#if defined(PYKERNELS_HAS_BF16_DOT)
          const __m512i threshold = _mm512_set1_epi32(static_cast<int>(dropout_.threshold()));
          for (int j = 0; j < columns; j += 32) {
            const uint32_t low = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(words + j), threshold);
            const uint32_t high = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(words + j + 16), threshold);
            // In PackedOrder.
            const uint32_t keep = _pdep_u32(low, 0x0f0f0f0fu) | _pdep_u32(high, 0xf0f0f0f0u);
            _mm512_storeu_si512(w + j, _mm512_maskz_loadu_epi16(keep, w + j));
          }
#endif
        } else {
          for (int j = 0; j < columns; ++j) w[j] = words[j] >= dropout_.threshold() ? w[j] : Elem{};
        }
      }
    }
  }

  void hide(Acc* s, int row, int rows, int64_t first_key, int columns) {
    Cursor at = cursor(row);
    for (int i = 0; i < rows; ++i, at.advance()) {
      const Range range = visible(problem_, *s_q_, at.token);
      mask_row(s + i * kStride, columns, range.begin - first_key, range.end - first_key);
    }
  }

  // Whether the tile's accumulators hold something already; from now on they do.
  bool goes_on(int row) {
    const bool started = tiles_[row / kRows].started;
    tiles_[row / kRows].started = true;
    return started;
  }

  // O += P V.
  void add_values(int row, int rows, int begin, int columns, int padded) {
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>)
      if (tiny_values_) return add_tiny_values(row, rows, begin, columns);
#endif
    matmul<C>(rows, width_, WeightOrder<C>::kBlock > 1 ? padded : columns, {weights_, kStride},
              {v_, packed_panel<C>(kKeys), begin}, {o_ + row * width_, width_}, goes_on(row));
  }

  bool hidden_by_bias(int row, int64_t key) const {
    const Cursor at = cursor(row);
    return terms_.bias_of(place(static_cast<int>(at.head)), at.token, key) == -static_cast<Acc>(kInfinity);
  }

  // O += P V over the values left out of the packed V, for the rows that see them: zero weights would make NaN of the
  // infinities and NaN that are hidden from a row.
  void add_exceptional_values(int row, int rows, int64_t key, int begin, int columns, const Elem* weights) {
    if (!exceptional_row_) exceptional_row_ = scratch_.take<Acc>(width_);
    Range ranges[kRows];
    for (int i = 0; i < rows; ++i) ranges[i] = visible(problem_, *s_q_, token(row + i));
    for (int j = 0; j < columns; ++j) {
      const int n = begin + WeightOrder<C>::source(j);  // of the block's keys
      if (n >= keys_ || !exceptional_value_[n]) continue;
      const T* const v = v_source_ + n * v_source_stride_;
      for (int64_t d = 0; d < width_; d += kLane) {
        const Vec<Acc> x = load_upto(v + d, p_.value_dim - d);
        store(exceptional_row_ + d, (abs<Acc>(x) < splat(kLimit)) ? Vec<Acc>{} : x);
      }
      for (int i = 0; i < rows; ++i) {
        if (key + n < ranges[i].begin || key + n >= ranges[i].end) continue;
        const Acc weight = weight_at(weights + i * kStride, j);
        // Hidden, or dropped; 0 times infinity is NaN where it was seen.
        if (weight == 0 && (dropout_.on() || hidden_by_bias(row + i, key + n))) continue;
        Acc* const o = o_ + (row + i) * width_;
        for (int64_t d = 0; d < width_; d += kLane) store(o + d, load(o + d) + load(exceptional_row_ + d) * weight);
      }
    }
  }

#if defined(PYKERNELS_HAS_AMX)
  // What SplitF32 does not serve, by fused multiply-adds.
  float* exact(float*& buffer, int64_t n) {
    if (!buffer) buffer = scratch_.take<float>(n);
    return buffer;
  }
  void set_exceptional_queries() {
    for (int row = 0; row < rows_; ++row) {
      // A part shows what is too large, or NaN.
      if (row % kRows == 0) {
        const auto* const parts = reinterpret_cast<const BFloat16*>(q_ + row * depth_);
        tiles_[row / kRows].exceptional = 0;
        if (largest_magnitude(parts, 0, 1, kRows * depth_ * 3) < kLimit) {
          row += kRows - 1;
          continue;
        }
      }
      const T* const from = address(static_cast<const T*>(p_.q), p_.q_stride, cursor(row));
      if (magnitudes(from, 0, 1, p_.head_dim, kLimit).all_below) continue;
      tiles_[row / kRows].exceptional |= 1u << row % kRows;
      Elem* const to = q_ + row * depth_;
      copy_rows<C>(to, depth_, without_exceptional(from, 0, 1, p_.head_dim), 0, 1, static_cast<int>(p_.head_dim));
      if (p_.scale < 0) negate(to, depth_);
    }
  }
  // The scores of exceptional queries and keys.
  void set_exceptional_scores(int row, int rows, int begin, int columns) {
    const int64_t head_dim = p_.head_dim, panel = packed_panel<F32>(head_dim);
    float* const q = exact(exact_q_, kRows * head_dim);
    float* const k = exact(exact_k_, packed_size<F32>(head_dim, kKeys));
    float* const s = exact(exact_s_, kRows * kStride);
    if (!exact_k_ready_) {
      pack_columns<F32>(k, panel, k_source_, k_source_stride_, static_cast<int>(head_dim), keys_);
      exact_k_ready_ = true;
    }
    Cursor at = cursor(row);
    for (int i = 0; i < rows; ++i, at.advance())
      copy_rows<F32>(q + i * head_dim, head_dim, address(static_cast<const T*>(p_.q), p_.q_stride, at), 0, 1,
                     static_cast<int>(head_dim));
    if (p_.scale < 0) negate(q, static_cast<int>(rows * head_dim));
    matmul<F32>(rows, keys_, static_cast<int>(head_dim), {q, head_dim}, {k, panel}, {s, kStride}, false);
    for (int i = 0; i < rows; ++i) {
      const bool whole = tiles_[row / kRows].exceptional >> i & 1;
      for (int j = 0; j < columns; ++j)
        if (whole || (exceptional_keys_ && exceptional_key_[begin + j]))
          s_[i * kStride + j] = s[i * kStride + begin + j];
    }
  }
  // O += P V where the values are so small that parts of them would be lost.
  void add_tiny_values(int row, int rows, int begin, int columns) {
    const int64_t panel = packed_panel<F32>(kKeys);
    float* const v = exact(exact_v_, packed_size<F32>(kKeys, width_));
    float* const weights = exact(exact_s_, kRows * kStride);
    if (!exact_v_ready_) {
      const T* const from = exceptional_values_ ? without_exceptional(v_source_, v_source_stride_, keys_, p_.value_dim)
                                                : v_source_;
      pack_rows<F32>(v, panel, from, exceptional_values_ ? p_.value_dim : v_source_stride_, keys_,
                     static_cast<int>(p_.value_dim));
      exact_v_ready_ = true;
    }
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) weights[i * kStride + j] = weight_at(weights_ + i * kStride, j);
    matmul<F32>(rows, width_, columns, {weights, kStride}, {v, panel, begin}, {o_ + row * width_, width_},
                goes_on(row));
  }
#endif

#if defined(PYKERNELS_HAS_AMX)
  // The same in one pass for bf16 on AMX: while the tile unit multiplies the next 32 keys, the vector unit turns the
  // scores of the last 32 into weights. Returns false, with l and o unchanged, where rows have no maximum yet to go
  // by (the first keys are looked at for one), where their scores are too small for the table, or when one outgrows
  // its maximum; with terms, also where FastTerms does not serve.
  enum class Terms { kNone, kLinear, kBias, kAny };  // see FastTerms::is_linear and is_bias
  bool fuse_with_terms(int row, int64_t key, int begin, int columns, Range first, Range last) {
    bool serves = true;
    if (fast_terms_.by_row) {
      Cursor at = cursor(row);
      for (int i = 0; i < 32; ++i, at.advance()) {
        // Rows beyond the last are the last once more.
        if (row + i < rows_)
          serves &= terms_.set_row(fast_terms_, i, place(static_cast<int>(at.head)), at.token, key + begin);
        else
          fast_terms_.rows[i] = fast_terms_.rows[i - 1];
      }
    }
    if (!serves) return false;
    if (fast_terms_.alibi && !p_.bias && !exceptional_values_ && vanishes(row, columns)) return true;
    if (fast_terms_.by_key) {
      if (next_bias_.row == row && next_bias_.key == key + begin)
        __builtin_memcpy(fast_terms_.bias, next_bias_.rows, sizeof(next_bias_.rows));
      else
        bias_rows(row, key + begin, fast_terms_.bias);
    }
    return fast_terms_.is_linear(columns) ? fuse<Terms::kLinear>(row, key, begin, columns, first, last)
           : fast_terms_.is_bias(columns, s_q_->tk - key - begin)
               ? fuse<Terms::kBias>(row, key, begin, columns, first, last)
               : fuse<Terms::kAny>(row, key, begin, columns, first, last);
  }
  template <Terms Kind>
  bool fuse(int row, int64_t key, int begin, int columns, Range first, Range last) {
    // Rows of weights per product: all 32 beside the products of a panel.
    const auto fused = depth_ < 64    ? &Worker::fused_tile<8, Kind>
                       : depth_ < 128 ? &Worker::fused_tile<4, Kind>
                       : depth_ < 256 ? &Worker::fused_tile<2, Kind>
                                      : &Worker::fused_tile<1, Kind>;
    return (this->*fused)(row, key, begin, columns, first, last);
  }
  template <int Rows, Terms Kind>
  bool fused_tile(int row, int64_t key, int begin, int columns, Range first, Range last) {
    static_assert(kRows == 32 && 2 * 32 * 32 <= kRows * kStride);
    if (p_.scale == 0) return false;
    const float factor = static_cast<float>((p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e);
    float* const m = m_ + row;
    float* const buffers[2] = {s_, s_ + 32 * 32};
    const BFloat16* const q = q_ + row * depth_;
    const BFloat16* k = k_ + begin / 32 * packed_panel<C>(depth_);
    const int64_t first_key = key + begin;

    const __m512 slope = _mm512_set1_ps(factor * 128);
    const int64_t keys = s_q_->tk - first_key;
    if (m[0] == -kInfinity) {
      multiply_panel(q, k);
      store_panel(buffers[0]);
      if (last.begin > first_key || first.end < first_key + 32) mask_panel(buffers[0], row, first_key);
      for (int i = 0; i < 32; ++i) {
        if (m[i] > -kInfinity) continue;
        const float* const s = buffers[0] + 32 * i;
        if constexpr (Kind != Terms::kNone) {
          __m512 low, high;
          fast_terms_.exponents(i, s, 0, keys, slope, _mm512_set1_ps(fast_terms_.rows[i].constant), low, high);
          // What is clamped may be the NaN of a bias that is hidden.
          const float here = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
          if (here < FastTerms::kClamp) m[i] = here / 128;
        } else {
          m[i] = factor * reduce_max<float>(max<float>(load(s), load(s + 16)));
        }
      }
    }
    const __m512 m0 = _mm512_loadu_ps(m), m1 = _mm512_loadu_ps(m + 16);
    const __m512 hidden = _mm512_set1_ps(-kInfinity), least_max = _mm512_set1_ps(kFastExp2Least);
    if (_mm512_cmp_ps_mask(m0, hidden, _CMP_EQ_OQ) | _mm512_cmp_ps_mask(m1, hidden, _CMP_EQ_OQ)) return false;
    if (!(_mm512_cmp_ps_mask(_mm512_abs_ps(m0), least_max, _CMP_GE_OQ) |
          _mm512_cmp_ps_mask(_mm512_abs_ps(m1), least_max, _CMP_GE_OQ)))
      return false;
    if constexpr (Kind != Terms::kNone) {
      const __m512 bound = _mm512_set1_ps(kFastExp2Bound);
      if (_mm512_cmp_ps_mask(_mm512_abs_ps(m0), bound, _CMP_NLT_UQ) |
          _mm512_cmp_ps_mask(_mm512_abs_ps(m1), bound, _CMP_NLT_UQ))
        return false;
    }

    alignas(64) float offsets[32];
    _mm512_store_ps(offsets, _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(127), m0), _mm512_set1_ps(128)));
    _mm512_store_ps(offsets + 16, _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(127), m1), _mm512_set1_ps(128)));
    if constexpr (Kind == Terms::kLinear || Kind == Terms::kAny)
      for (int i = 0; i < 32; ++i) offsets[i] += fast_terms_.rows[i].constant;
    // Rows beyond the last get no weights: whether a task's last tile has any must not decide what serves its others.
    if constexpr (Kind != Terms::kNone)
      for (int i = rows_ - row; i < 32; ++i) offsets[i] = -static_cast<float>(kInfinity);
    if constexpr (Kind == Terms::kLinear)
      for (int i = 0; i < 32; ++i) fast_terms_.begin_linear(i, offsets[i], steps_[i]);
    Exp2Table table;
    // Beside the products: those of scores that have weights to compute beside them, and those of the values.
    [[maybe_unused]] Spread<FetchBias> fetching(
        FetchBias{next_bias_}, Kind == Terms::kBias || Kind == Terms::kAny ? look_at_next(row, key) : 0,
        (columns / 32 - 1) * (32 / Rows) + tile_products<C>(kRows, width_, columns));
    static constexpr Nothing nothing{};
    const auto beside = [&]() -> auto& {
      if constexpr (Kind == Terms::kBias || Kind == Terms::kAny)
        return fetching;
      else
        return nothing;
    };
    const char* o = reinterpret_cast<const char*>(o_ + row * width_);
    for (int j = 0;; j += 32) {
      float* const next = buffers[j / 32 % 2];
      if (j == 0) {
        multiply_panel(q, k);
      } else if (j < columns) {
        // The accumulators, needed at the end, come into the L1 cache meanwhile.
        multiply_and_weigh<Rows, Kind>(q, k, buffers[(j / 32 - 1) % 2], weights_ + j - 32, offsets, slope, table,
                                       j - 32, keys, o, beside());
        o += 128 * 32 / Rows;
      } else {
        const float* const s = buffers[(j / 32 - 1) % 2];
        BFloat16* const w = weights_ + j - 32;
#pragma GCC unroll 4
        for (int i = 0; i < 32; ++i)
          _mm512_store_si512(w + i * kStride, weights<Kind>(table, s + 32 * i, slope, offsets[i], i, j - 32, keys));
        break;
      }
      store_panel(next);
      if (last.begin > first_key + j || first.end < first_key + j + 32) mask_panel(next, row, first_key + j);
      k += packed_panel<C>(depth_);
    }
    if (table.overflow()) return false;

    // The sums of the weights, by pairs of keys: a product too, with a matrix of pairs of ones along the diagonal.
    float* const l = l_ + row * 16;
    amx::load<0>(l, 64);
    amx::load<1>(l + 256, 64);
    amx::load<6>(kPairSums.ones, 64);
    for (int j = 0; j < columns; j += 32) {
      amx::load<4>(weights_ + j, 2 * kStride);
      amx::dot<0, 4, 6>();
      amx::load<5>(weights_ + 16 * kStride + j, 2 * kStride);
      amx::dot<1, 5, 6>();
    }
    amx::store<0>(l, 64);
    amx::store<1>(l + 256, 64);
    matmul<C>(kRows, width_, columns, {weights_, kStride}, {v_, packed_panel<C>(kKeys), begin},
              {o_ + row * width_, width_}, goes_on(row), beside());
    return true;
  }

  // Where the rows of a tile have their bias for the keys from `key` on; rows beyond the last have the last one's.
  void bias_rows(int row, int64_t key, const char** rows) const {
    const int64_t size = terms_.bias_bytes(), by_head = p_.bias_stride.head * size,
                  by_token = p_.bias_stride.row * size - problem_.group * by_head;
    Cursor at = cursor(row);
    const char* from = terms_.bias_address(place(static_cast<int>(at.head)), at.token, key);
    for (int i = 0; i < 32; ++i) {
      rows[i] = from;
      if (row + i + 1 >= rows_) continue;
      at.advance();
      from += by_head + (at.head == 0 ? by_token : 0);
    }
  }
  __attribute__((noinline)) void fetch_bias(int part) { next_bias_.fetch(part); }
  // Sets what is fetched beside a tile, the bias of the next one; in how many parts.
  int look_at_next(int row, int64_t key) {
    if (!terms_.biased_by_key() || p_.bias_stride.row == 0) return 0;
    Cut next;
    do {
      row += kRows;
      if (row >= rows_) {
        row = 0;
        key += kKeys;
        if (key >= end_) return 0;
      }
      next = cut(row, key);
    } while (next.columns <= 0);
    next_bias_.row = row, next_bias_.key = key + next.begin;
    next_bias_.bytes = static_cast<int>(next.columns * terms_.bias_bytes());
    bias_rows(row, next_bias_.key, next_bias_.rows);
    return next_bias_.parts();
  }

  // ALiBi: the score of a row's own key is no smaller than its maximum by much, which therefore starts a little above
  // it.
  void look_at_own_keys() {
    if (p_.block_table) return;
    Cursor at = cursor(0);
    for (int row = 0; row < rows_; ++row, at.advance()) {
      const int64_t key = at.token + s_q_->tk - s_q_->tq;
      if (key < 0 || !terms_.serves_slope(place(static_cast<int>(at.head)))) continue;
      const T* const k = keys() + key * p_.k_stride.token;
      Vec<float> sum{};
      for (int64_t j = 0; j < p_.head_dim; j += kLane)
        sum += load(q_ + row * depth_ + j) * load_upto(k + j, p_.head_dim - j);
      const double scale = p_.scale < 0 ? -p_.scale : p_.scale;
      float s = reduce_add<float>(sum) * static_cast<float>(scale * kLog2e);
      if (p_.softcap > 0) {
        const float cap = static_cast<float>(p_.softcap * kLog2e);
        s = tanh<float>(splat(s / cap))[0] * cap;
      }
      s += terms_.bias_of(place(static_cast<int>(at.head)), at.token, key);
      if (s < kFastExp2Bound / 2 && s > -kFastExp2Bound / 2) m_[row] = s + 4;
    }
  }
  // Whether ALiBi takes all scores of a tile so far below their rows' maxima that no weight is left of them.
  bool vanishes(int row, int columns) const {
    constexpr float least_power = -140;
    const float largest = score_bound_ * tiles_[row / kRows].largest;
    for (int i = 0; i < least(32, rows_ - row); ++i) {
      const FastTerms::Row& r = fast_terms_.rows[i];
      const float before = -r.position, after = r.position - static_cast<float>(columns - 1);  // from the tile's keys
      if (!(largest - r.slope / 128 * (before > after ? before : after) < m_[row + i] + least_power)) return false;
    }
    return true;
  }

  // Scores of 32 rows and the 32 keys of a panel, into tiles 0 to 3, and from there to [32, 32] at s.
  PYKERNELS_INLINE void multiply_panel(const BFloat16* q, const BFloat16* k) {
    zero_panel();
    for (const BFloat16* const end = q + depth_; q < end; q += 32, k += 1024) multiply_step(q, k, [](int) {});
  }
  // Weights of a row of a tile for the 32 keys from `column` on, of `keys` that there are.
  template <Terms Kind>
  PYKERNELS_INLINE __m512i weights(Exp2Table& table, const float* s, __m512 slope, float offset, int row, int column,
                                   int64_t keys) {
    if constexpr (Kind == Terms::kNone) return table.weights(s, slope, _mm512_set1_ps(offset));
    __m512 low, high;
    if constexpr (Kind == Terms::kLinear) {
      const Vec<float> keys_on = iota<float>() + static_cast<float>(column);
      const Vec<float> step = splat(steps_[row]), start = splat(offset);
      low = _mm512_fmadd_ps(_mm512_loadu_ps(s), slope, (__m512)(keys_on * step + start));
      high = _mm512_fmadd_ps(_mm512_loadu_ps(s + 16), slope, (__m512)((keys_on + 16.0f) * step + start));
      return table.weights(low, high);
    }
    if constexpr (Kind == Terms::kBias)
      fast_terms_.exponents_by_bias(row, s, column, slope, _mm512_set1_ps(offset), low, high);
    else
      fast_terms_.exponents(row, s, column, keys - column, slope, _mm512_set1_ps(offset), low, high);
    return table.weights(low, high);
  }
  // While the tile unit multiplies, the vector unit turns the scores before these into weights: Rows rows after a
  // product, as the processor does not look far enough ahead to find work that comes later; two cache lines per product
  // are fetched on the side, from `fetched` on.
  template <int Rows, Terms Kind, class Beside>
  PYKERNELS_INLINE void multiply_and_weigh(const BFloat16* q, const BFloat16* k, const float* s, BFloat16* w,
                                           const float* offsets, __m512 slope, Exp2Table& table, int column,
                                           int64_t keys, const char* fetched, Beside& beside) {
    zero_panel();
    const BFloat16* const end = q + depth_;
    for (int row = 0; row < 32; row += 4 * Rows, q += 32, k += 1024) {
      multiply_step(q, k, [&](int product) __attribute__((always_inline)) {
        const int first = product * Rows;
#pragma GCC unroll 8
        for (int r = first; r < first + Rows; ++r)
          _mm512_store_si512(w + r * kStride,
                             weights<Kind>(table, s + 32 * r, slope, offsets[r], row + r, column, keys));
        __builtin_prefetch(fetched + 128 * product, 1, 3);
        __builtin_prefetch(fetched + 128 * product + 64, 1, 3);
        beside();
      });
      w += 4 * Rows * kStride;
      s += 4 * Rows * 32;
      offsets += 4 * Rows;
      fetched += 512;
    }
    for (; q < end; q += 32, k += 1024) multiply_step(q, k, [](int) {});
  }
  PYKERNELS_INLINE static void zero_panel() {
    amx::zero<0>();
    amx::zero<1>();
    amx::zero<2>();
    amx::zero<3>();
  }
  // 32 of the depth; after(0) to after(3) come after a product each.
  template <class After>
  PYKERNELS_INLINE void multiply_step(const BFloat16* q, const BFloat16* k, After&& after) const {
    const int64_t q_bytes = 2 * depth_;
    amx::load<6>(k, 128);
    amx::load<4>(q, q_bytes);
    amx::dot<0, 4, 6>();
    after(0);
    amx::load<7>(k + 32, 128);
    amx::dot<1, 4, 7>();
    after(1);
    amx::load<5>(q + 16 * depth_, q_bytes);
    amx::dot<2, 5, 6>();
    after(2);
    amx::dot<3, 5, 7>();
    after(3);
  }
  PYKERNELS_INLINE void store_panel(float* s) {
    amx::store<0>(s, 128);
    amx::store<1>(s + 16, 128);
    amx::store<2>(s + 512, 128);
    amx::store<3>(s + 528, 128);
  }

  // Hides what the rows of a tile do not see of the 32 keys from `key` on.
  void mask_panel(float* s, int row, int64_t key) {
    const __m512 hidden = _mm512_set1_ps(-kInfinity);
    const auto below = [](int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0u; };
    Cursor at = cursor(row);
    for (int i = 0; i < 32; ++i, s += 32, at.advance()) {
      // Rows beyond the last see nothing: beyond the last key their scores are of whatever memory held.
      const bool there = row + i < rows_;
      const Range range = there ? visible(problem_, *s_q_, at.token) : Range{};
      const uint32_t outside = ~below(range.end - key) | below(range.begin - key);
      _mm512_mask_storeu_ps(s, static_cast<__mmask16>(outside), hidden);
      _mm512_mask_storeu_ps(s + 16, static_cast<__mmask16>(outside >> 16), hidden);
    }
  }
#endif

  void write() {
    T* const out = static_cast<T*>(p_.out);
    Acc* const lse = static_cast<Acc*>(p_.lse);
    Cursor at = cursor(0), ahead = cursor(kAhead);
    static_assert(kRows % kLane == 0);
    for (int first = 0; first < rows_; first += kLane) {
      Vec<Acc> l[kLane];
      for (int i = 0; i < kLane; ++i) l[i] = load(l_ + (first + i) * kLane);
      const RowSums<Acc> sums(load(m_ + first), reduce_add_each(l));
      for (int row = first; row < least(first + kLane, rows_); ++row, at.advance(), ahead.advance()) {
        if (row + kAhead < rows_) prefetch_row(address(out, p_.out_stride, ahead), p_.value_dim);
        const int64_t head = head_k_ * problem_.group + at.head;
        const RowSum<Acc> sum = sums.of(row - first, p_, head);
        const Acc inverse = dropout_.on() ? sum.inverse * static_cast<Acc>(dropout_.scale()) : sum.inverse;
        T* const to = address(out, p_.out_stride, at);
        for (int64_t j = 0; j < p_.value_dim; j += kLane)
          store_upto(to + j, load(o_ + row * width_ + j) * inverse, p_.value_dim - j);
        lse[(batch_ * p_.heads_q + head) * p_.seqlen_q + s_q_->q0 + at.token] = sum.lse;
      }
    }
  }

  const Problem& problem_;
  const FlashAttentionParams& p_;
  const ScoreTerms<T> terms_;
  const Dropout dropout_;
  Scratch& scratch_;
  const int depth_, width_;  // padded head and value dims
  // The current task.
  const Sequence* s_q_ = nullptr;
  int64_t batch_ = 0, head_k_ = 0, first_row_ = 0;
  int rows_ = 0;
  int64_t end_ = 0;  // of the keys
  // The current block of keys: where it comes from, what is exceptional (has elements not below kLimit), whether its
  // values are too small for SplitF32, and what times the largest magnitude of queries bounds its scores.
  const T *k_source_ = nullptr, *v_source_ = nullptr;
  int64_t k_source_stride_ = 0, v_source_stride_ = 0;
  T *k_pages_ = nullptr, *v_pages_ = nullptr;  // copies of them
  int keys_ = 0;
  bool exceptional_keys_ = false, exceptional_values_ = false, tiny_values_ = false;
  bool exceptional_key_[kKeys], exceptional_value_[kKeys];
  Acc score_bound_ = 0;
  Acc factor_ = 1;  // of the scores in s_, to units of log 2
  struct QueryTile {
    Acc largest;           // magnitude, for bf16
    uint32_t exceptional;  // rows, as bits, for SplitF32
    bool started;          // whether o_ holds its accumulators yet
  };
  QueryTile* tiles_;  // [chunk_rows / kRows]
  Elem* q_;        // [chunk_rows, depth]
  Acc* o_;         // [chunk_rows, width]
  Acc* m_;         // [chunk_rows] row maxima, in units of log 2
  Acc* l_;         // [chunk_rows, lanes] row sums, to be added up
  Elem* k_;        // packed K^T [depth, keys]
  Elem* v_;        // packed V [keys, width]
  Acc* s_;         // [kRows, kStride] scores; two for SplitF32, and of the weights
  Elem* weights_;  // [kRows, kStride] P, in the place of the scores where they have the same type
#if defined(PYKERNELS_HAS_AMX)
  Stage softmax_stage_{}, values_stage_{};  // what `overlap` has begun
  int phase_ = 0;                           // which half of s_ the former has
  // The bias of the next tile: where its rows are, and how many bytes of each.
  struct NextBias {
    static constexpr int kPart = 256;
    const char* rows[32];
    int row = -1, bytes = 0;
    int64_t key = 0;

    // Fetched by so many parts, at most kPart bytes of a row each.
    int parts() const { return (bytes + kPart - 1) / kPart * 32; }
    // In assembly, as GCC drops what does nothing but prefetch.
    PYKERNELS_INLINE void fetch(int part) const {
      const char* const from = rows[part % 32];
      for (int i = part / 32 * kPart, end = least(i + kPart, bytes); i < end; i += 64)
        asm volatile("prefetcht1 (%0)" ::"r"(from + i));
    }
  } next_bias_;
  struct FetchBias {
    const NextBias& next;
    PYKERNELS_INLINE void operator()(int part) const { next.fetch(part); }
  };
  FastTerms fast_terms_{};                  // of the current tile
  bool fused_terms_ = false;                // whether it serves this call
  float steps_[32];                         // of its rows, where it is linear
#endif
  // For what is rare, taken when first needed.
  T* cleaned_ = nullptr;
  Acc* exceptional_row_ = nullptr;
  bool exact_k_ready_ = false, exact_v_ready_ = false;
  float *exact_q_ = nullptr, *exact_k_ = nullptr, *exact_v_ = nullptr, *exact_s_ = nullptr;
};

// Tokens of packed input that belong to no sequence.
template <class T>
void write_unused(const FlashAttentionParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < p.heads_q; ++h) {
      T* const out = static_cast<T*>(p.out) + t * p.out_stride.token + h * p.out_stride.head;
      __builtin_memset(out, 0, p.value_dim * sizeof(T));
      static_cast<Wide<T>*>(p.lse)[h * p.seqlen_q + t] = -static_cast<Wide<T>>(kInfinity);
    }
}

template <class T, class C>
void forward(const FlashAttentionParams& p, const Parallel& parallel) {
  constexpr int tile_rows = Shape<C>::kRows;
  Problem problem{p, p.heads_q / p.heads_k, 0, p.window_left < 0 ? kUnbounded : p.window_left,
                  p.window_right < 0 ? kUnbounded : p.window_right, p.batch * p.heads_k};
  const int64_t sequences = p.cu_seqlens_q ? p.sequences : 1;
  if (p.cu_seqlens_q) {
    const int64_t used = sequences ? sequence(p, 0).q0 : p.seqlen_q;
    write_unused<T>(p, 0, used);
    if (sequences) {
      const Sequence last = sequence(p, sequences - 1);
      write_unused<T>(p, last.q0 + last.tq, p.seqlen_q);
    }
  }

  // Rows per chunk: queries and accumulators take half a megabyte of L2, with AMX more (such processors have two), so
  // that keys and values are packed few times; more chunks than threads where there are rows enough.
  const int64_t row_bytes = round_up(p.head_dim, C::kDepthAlign) * sizeof(typename C::Elem) +
                            (round_up(p.value_dim, C::kColumnAlign) + kLanes<typename C::Acc>) *
                                sizeof(typename C::Acc);
  int64_t rows = 0, longest = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t here = sequence(p, s).tq * problem.group;
    rows += here;
    longest = most(longest, here);
  }
  constexpr int64_t cached = int64_t{Shape<C>::kTiles ? 1200 : 640} << 10;
  int64_t limit = most<int64_t>(4 * tile_rows, cached / row_bytes);
  if (parallel.threads > 1) limit = least(limit, most<int64_t>(128, rows * problem.key_heads / (4 * parallel.threads)));
  const int64_t pieces = most<int64_t>(1, (longest + limit - 1) / limit);
  problem.chunk_rows = most<int64_t>(tile_rows, round_up((longest + pieces - 1) / pieces, tile_rows));

  int64_t count = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const Sequence seq = sequence(p, s);
    count += (seq.tq * problem.group + problem.chunk_rows - 1) / problem.chunk_rows * key_pieces(problem, seq);
  }
  Scratch table;
  Chunk* const chunks = table.take<Chunk>(count);
  int64_t partial_rows = 0;
  count = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const Sequence seq = sequence(p, s);
    const int64_t in_all = seq.tq * problem.group, pieces = key_pieces(problem, seq);
    for (int64_t first = 0; first < in_all; first += problem.chunk_rows) {
      const int64_t n = least(problem.chunk_rows, in_all - first);
      const Range range = visible(problem, seq, (first + n / 2) / problem.group);
      const int64_t cost = n * most<int64_t>(1, range.end - range.begin) / pieces;
      for (int64_t piece = 0; piece < pieces; ++piece)
        chunks[count++] = {cost, static_cast<int32_t>(s), static_cast<int32_t>(first / problem.chunk_rows),
                           static_cast<int32_t>(piece), static_cast<int32_t>(pieces), partial_rows};
      if (pieces > 1) partial_rows += pieces * n;
    }
  }
  sort_chunks(chunks, count);
  using Acc = typename C::Acc;
  const int64_t partial_size = Worker<T, C>::partial_size(p);
  Acc* const partial = partial_rows ? table.take<Acc>(partial_rows * problem.key_heads * partial_size) : nullptr;
  const auto partial_of = [&](const Chunk& chunk, int64_t bh) {
    return partial + (bh * partial_rows + chunk.partial) * partial_size;
  };

  run_tasks(parallel, count * problem.key_heads, [&](TaskQueue& queue) {
    const Tiles tiles;
    Scratch scratch;
    Worker<T, C> worker(problem, scratch);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Chunk& chunk = chunks[task / problem.key_heads];
      const int64_t bh = task % problem.key_heads;
      worker.run(sequence(p, chunk.sequence), bh / p.heads_k, bh % p.heads_k, chunk, partial_of(chunk, bh));
    }
  });
  if (!partial) return;
  run_tasks(parallel, count * problem.key_heads, [&](TaskQueue& queue) {
    Scratch scratch;
    Worker<T, C> worker(problem, scratch);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Chunk& chunk = chunks[task / problem.key_heads];
      const int64_t bh = task % problem.key_heads;
      if (chunk.pieces > 1 && chunk.piece == 0)
        worker.merge(sequence(p, chunk.sequence), bh / p.heads_k, bh % p.heads_k, chunk, partial_of(chunk, bh));
    }
  });
}

// fp32 and fp16 go through the tiles of AMX where there are, but for shapes that would fill them with zeros or have too
// few queries to make up for packing. That choice is by shape and scale alone; what single blocks hold is looked at
// when they are packed.
template <class T>
void forward_fp32(const FlashAttentionParams& p, const Parallel& parallel) {
#if defined(PYKERNELS_HAS_AMX)
  const int64_t queries = p.cu_seqlens_q ? p.seqlen_q / most<int64_t>(1, p.sequences) : p.seqlen_q;
  const bool pays = p.head_dim + p.value_dim > 32 && queries * (p.heads_q / p.heads_k) >= 64;
  // Times a larger scale, what denormals lose might show.
  if (pays && p.scale < 0x1p30 && p.scale > -0x1p30 && !p.dropout_seed) return forward<T, SplitF32>(p, parallel);
#endif
  forward<T, ComputeFor<T>>(p, parallel);
}

}  // namespace

void flash_attention_fwd(const FlashAttentionParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return forward_fp32<float>(params, parallel);
    case DType::kBFloat16:
      return forward<BFloat16, ComputeFor<BFloat16>>(params, parallel);
    case DType::kFloat16:
      return forward_fp32<Float16>(params, parallel);
    case DType::kFloat64:
      return forward<double, ComputeFor<double>>(params, parallel);
  }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
