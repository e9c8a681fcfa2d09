// Flash attention of a few queries against a key/value cache, and the append to that cache.
//
// Rows. The query heads that share a key head, times the queries: row r of (batch entry, key head) is query r / group
// of head r % group. All of them are served while a key is at hand, so that the cache is read once: this is bound by
// memory.
// Tasks. One is (batch entry, chunk of its keys, some key heads). It reads the keys (scores), makes the weights of all
// of them at once, reads the values, and leaves o, m and l of each row; whoever does the last chunk of some heads adds
// up all of theirs, in their order.
// The chunks depend on lengths and key heads alone, so results are the same whatever the batch and the number of
// threads.
// Order. A chunk is cut into kStreams equal pieces, read side by side, each in the order of memory: where the heads of
// a token lie side by side in the cache, a task takes several and reads whole tokens. Prefetchers stop at the end of a
// page; while one stream is there, the others go on: with the next lines of each fetched by software, one core reads
// 14.5 GB/s, of a single stream 10.5 (Sapphire Rapids, pages of 4 KiB). What is at hand at the same time, one key of
// each stream, has neighbouring numbers: slots. Slot j of a chunk is key j / kStreams of stream j % kStreams; the keys
// left over come last.
// Several rows of bf16 are multiplied on AMX tiles. Many rows are no longer bound by memory: they go to the forward
// kernel, one batch entry at a time.
#include "../../include/pykernels/flash_attention.h"

#include "../common/matmul.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "terms.h"

namespace pykernels::cpu::PYKERNELS_ISA {

void flash_attention_fwd(const FlashAttentionParams& params, const Parallel& parallel);

namespace {

constexpr int kChunk = 512, kLeastChunk = 64;  // keys; what a chunk leaves is written, and read once more
// Chunks of an entry: as many as make so many pieces with its key heads, within bounds. Chunks get larger above, up to
// the largest, and smaller below.
constexpr int kPieces = 128, kFewestChunks = 16, kMostChunks = 32;
constexpr int kAheadBytes = 1024;  // of each stream, that are fetched ahead,
constexpr int kAheadSteps = 4;     // but for short rows
constexpr int kTaskRows = 64;      // of all heads of a task, whose scores and results stay in the nearer caches
constexpr int kTasksPerThread = 2;  // below this, tasks take fewer heads
// Beyond these the products bound the time, not the memory, unless there is one key head, and chunks keep the threads
// busy. Not where there are fewer heads than threads: results must not depend on the number of threads.
constexpr int kFewRows = 16, kFewRowsAlone = 64;
constexpr int64_t kUnbounded = int64_t{1} << 62;

// Products of bf16 on AMX tiles: for more rows than kVectorRows (which vectors do as fast as memory gives), up to those
// of two tiles; a tile of keys, or values, at a time.
#if defined(PYKERNELS_HAS_AMX)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr int kTile = 16, kVectorRows = 4, kTiledTaskRows = 128;
// Also the keys that are worked on at a time.
template <bool Tiled>
constexpr int kStreams = Tiled ? kTile : 4;

PYKERNELS_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The valid keys of a batch entry.
int64_t length(const FlashAttentionDecodeParams& p, int64_t b) {
  return clamp(p.cache_seqlens[b] + p.new_tokens, 0, p.forward.seqlen_k);
}

// The vectors that a kernel loads of a row at a time: of bf16 two, the even and the odd elements of one vector's bytes,
// which are a shift and a mask away. Queries and results are kept in that order.
template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 2 : 1;
template <class T>
constexpr int kPartsLanes = kParts<T> * kLanes<Wide<T>>;
template <class T>
struct Parts {
  Vec<Wide<T>> x[kParts<T>];
};

template <class T>
PYKERNELS_INLINE Parts<T> load_parts(const T* p) {
  if constexpr (kParts<T> == 2) {
    VecU32 bits = load_bits<VecU32>(p);
    // Loaded once: the compiler would make a memory operand of either use.
#if defined(__x86_64__)
    __asm__("" : "+v"(bits));
#endif
    return {(Vec<float>)(bits << 16), (Vec<float>)(bits & 0xffff0000u)};
  } else {
    return {load(p)};
  }
}
// The first n elements, then zeros.
template <class T>
PYKERNELS_INLINE Parts<T> load_parts_upto(const T* p, int64_t n) {
  if (n >= kPartsLanes<T>) return load_parts(p);
  T buffer[kPartsLanes<T>] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load_parts(buffer);
}
template <class T>
PYKERNELS_INLINE void store_parts_upto(T* p, const Parts<T>& parts, int64_t n) {
  if constexpr (kParts<T> == 2) {
    const VecU32 bits = __builtin_convertvector(narrow(parts.x[0], T{}), VecU32) |
                        __builtin_convertvector(narrow(parts.x[1], T{}), VecU32) << 16;
    if (n >= kPartsLanes<T>)
      __builtin_memcpy(p, &bits, sizeof(bits));
    else
      __builtin_memcpy(p, &bits, static_cast<size_t>(n) * sizeof(T));
  } else {
    store_upto(p, parts.x[0], n);
  }
}

// The rows of keys (or values) that come later, of which a line is fetched for each that is used up.
template <class T>
struct Ahead {
  const T* const* rows;  // [slot], of the task's first head
  int64_t head_stride;
  int step, heads, head;  // slots that are worked on at a time, for all heads one after another

  Ahead(const T* const* rows, int64_t head_stride, int step, int heads, int64_t row_bytes)
      : rows(rows), head_stride(head_stride), step(step), heads(heads), head(0) {
    for (int64_t i = clamp(kAheadBytes / row_bytes, 1, kAheadSteps); i > 0; --i) advance();
  }
  PYKERNELS_INLINE void advance() {
    if (++head == heads) head = 0, rows += step;
  }
  PYKERNELS_INLINE const T* row(int slot) const { return rows[slot] + head * head_stride; }
};

// Splits a number of rows into groups of 4, 2 and 1 (none larger than a vector), for each of which there is a kernel.
// Tiles leave each row on its own.
template <class S, bool Tiled, class F>
PYKERNELS_INLINE void for_row_groups(int rows, F&& f) {
  int r = 0;
  if constexpr (!Tiled) {
    if constexpr (kLanes<S> >= 4)
      for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>{});
    for (; r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>{});
  }
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>{});
}

// s[j][r] = factor * q[r].k[j] for the keys of one vector of scores, k[j] being rows[j] + offset.
template <int Rows, bool Fetch, class T>
PYKERNELS_INLINE void score_step(const Wide<T>* q, int64_t q_stride, const T* const* rows, int64_t offset, int dim,
                                 Wide<T> factor, const Ahead<T>& ahead, int slot, Wide<T>* s) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>, keys = least(lanes / Rows, kStreams<false>), parts = kParts<T>;
  Vec<S> sum[lanes];
#pragma GCC unroll 4
  for (int first = 0; first < lanes / Rows; first += keys) {
    const T *key[keys], *next[keys];
#pragma GCC unroll 4
    for (int i = 0; i < keys; ++i) {
      key[i] = rows[first + i] + offset;
      if constexpr (Fetch) next[i] = ahead.row(slot + first + i);
    }
    Vec<S> part[keys][Rows] = {};
    const auto add = [&](int d, int i, const Parts<T>& x) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int p = 0; p < parts; ++p)
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) part[i][r] += x.x[p] * load(q + r * q_stride + d + p * lanes);
    };
    int d = 0;
    for (; d + kPartsLanes<T> <= dim; d += kPartsLanes<T>)
#pragma GCC unroll 4
      for (int i = 0; i < keys; ++i) {
        if constexpr (Fetch) __builtin_prefetch(next[i] + d, 0, 3);
        add(d, i, load_parts(key[i] + d));
      }
    if (d < dim)
#pragma GCC unroll 4
      for (int i = 0; i < keys; ++i) {
        if constexpr (Fetch) __builtin_prefetch(next[i] + d, 0, 3);
        add(d, i, load_parts_upto(key[i] + d, dim - d));
      }
#pragma GCC unroll 4
    for (int i = 0; i < keys; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[(first + i) * Rows + r] = part[i][r];
  }
  store(s, reduce_add_each(sum) * factor);
}

// o[r] += sum over j of w[j][r] v[j], v[j] being rows[j] + offset, in columns [0, Vectors vectors), the last of which
// may be ragged: there are `columns`.
template <int Keys, int Rows, int Vectors, bool Fetch, class T>
PYKERNELS_INLINE void add_values(const Wide<T>* w, const T* const* rows, int64_t offset, int columns,
                                 const Ahead<T>& ahead, int64_t column, Wide<T>* o, int64_t o_stride) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>, parts = kParts<T>;
  Vec<S> sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) sum[r][c] = load(o + r * o_stride + c * lanes);
#pragma GCC unroll 4
  for (int j = 0; j < Keys; ++j) {
    const T* const v = rows[j] + offset;
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; c += parts) {
      if constexpr (Fetch) __builtin_prefetch(ahead.row(j) + column + c * lanes, 0, 3);
      const Parts<T> x = Vectors == parts ? load_parts_upto(v, columns) : load_parts(v + c * lanes);
#pragma GCC unroll 2
      for (int p = 0; p < parts; ++p)
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sum[r][c + p] += x.x[p] * splat(w[j * Rows + r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) store(o + r * o_stride + c * lanes, sum[r][c]);
}

#if defined(PYKERNELS_HAS_AMX)
// Both products of bf16 on tiles: of all rows at once, so that a few more cost little. What is at hand is copied into
// scratch memory once, in the order that the tiles want, wherever it lies and however long its rows are.
class TileProducts {
 public:
  TileProducts(Scratch& scratch, int64_t heads, int64_t rows, int64_t head_dim, int64_t value_dim)
      : rows_(static_cast<int>(rows)), head_dim_(static_cast<int>(head_dim)), value_dim_(static_cast<int>(value_dim)),
        depth_(round_up(head_dim_, kBlock)), query_size_((rows > kTile ? 2 : 1) * kTile * depth_),
        tiles_(least(rows_, kTile), most(rows_ - kTile, 1)) {
    q_ = scratch.take<BFloat16>(heads * query_size_);
    k_ = scratch.take<BFloat16>(kTile * depth_);
    const int64_t value_size = 2 * 2 * kTile * round_up(value_dim_, kBlock);
    v_ = scratch.take<BFloat16>(value_size);
    __builtin_memset(v_, 0, static_cast<size_t>(value_size) * sizeof(BFloat16));
    s_ = scratch.take<float>(2 * kTile * kTile);
    __builtin_memset(q_, 0, static_cast<size_t>(heads * query_size_) * sizeof(BFloat16));
  }

  void set_query(int head, int row, const BFloat16* q) {
    BFloat16* const to = q_ + head * query_size_ + row / kTile * kTile * depth_ + row % kTile * 2;
    for (int d = 0; d < head_dim_; d += 2)
      __builtin_memcpy(to + d * kTile, q + d, (d + 1 < head_dim_ ? 2 : 1) * sizeof(BFloat16));
  }

  // s[r][j] = factor * q[r].k[j] for a tile of keys, k[j] being rows[j] + offset. Written by the next call, or by
  // finish_scores: the tiles take their time, in which other instructions go on.
  void scores(int head, const BFloat16* const* rows, int64_t offset, const Ahead<BFloat16>& ahead, float factor,
              float* s, int64_t s_stride) {
    for (int j = 0; j < kTile; ++j) {
      const BFloat16 *const from = rows[j] + offset, *const next = ahead.row(j);
      BFloat16* const to = k_ + j * depth_;
      for (int d = 0; d < head_dim_; d += kBlock) {
        __builtin_prefetch(next + d, 0, 3);
        const VecU32 bits = load_upto(from + d, head_dim_ - d);
        __builtin_memcpy(to + d, &bits, sizeof(bits));
      }
    }
    const BFloat16* const q = q_ + head * query_size_;
    const bool two = rows_ > kTile;
    amx::store<4>(s_, 64);
    amx::zero<4>();
    if (two) {
      amx::store<5>(s_ + kTile * kTile, 64);
      amx::zero<5>();
    }
    for (int d = 0; d < depth_; d += kBlock) {
      amx::load<6>(k_ + d, depth_ * 2);
      amx::load<7>(q + d * kTile, 64);
      amx::dot<4, 6, 7>();
      if (!two) continue;
      amx::load<7>(q + (depth_ + d) * kTile, 64);
      amx::dot<5, 6, 7>();
    }
    write_scores();
    scores_ = {s, s_stride, factor};
  }
  void finish_scores() {
    amx::store<4>(s_, 64);
    if (rows_ > kTile) amx::store<5>(s_ + kTile * kTile, 64);
    write_scores();
    scores_.s = nullptr;
  }

  // o[r] += sum over j of w[r][j] v[j] for a tile of values (those from `n` on are zero), v[j] being rows[j] + offset.
  // Added by the next call, or by finish_values.
  void values(const BFloat16* w, int64_t w_stride, const BFloat16* const* rows, int64_t offset, int n,
              const Ahead<BFloat16>& ahead, float* o, int64_t o_stride) {
    BFloat16* const pairs = v_ + (values_.v == v_ ? 2 * kTile * round_up(value_dim_, kBlock) : 0);
    for (int j = 0; j < kTile; j += 2)
      for (int c = 0; c < value_dim_; c += kBlock) {
        __builtin_prefetch(ahead.row(j) + c, 0, 3);
        __builtin_prefetch(ahead.row(j + 1) + c, 0, 3);
        const VecU32 a = j < n ? load_upto(rows[j] + offset + c, value_dim_ - c) : VecU32{};
        const VecU32 b = j + 1 < n ? load_upto(rows[j + 1] + offset + c, value_dim_ - c) : VecU32{};
        const VecU32 even = (a & 0xffffu) | b << 16, odd = a >> 16 | (b & 0xffff0000u);
        BFloat16* const to = pairs + c * 2 * kTile + j * kTile;
        __builtin_memcpy(to, &even, sizeof(even));
        __builtin_memcpy(to + 2 * kTile * kTile, &odd, sizeof(odd));
      }
    if (values_.v) add_values();
    values_ = {pairs, w, w_stride * 2, o, o_stride};
  }
  void finish_values() {
    if (values_.v) add_values();
    values_.v = nullptr;
  }

 private:
  static constexpr int kBlock = 32;  // elements of a row of a tile

  static PYKERNELS_INLINE VecU32 load_upto(const BFloat16* p, int n) {
    return n >= kBlock ? load_bits<VecU32>(p)
                       : (VecU32)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
  }
  void write_scores() {
    if (!scores_.s) return;
    for (int first = 0; first < rows_; first += kTile) {
      Vec<float> square[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) square[i] = load(s_ + (first + i) * kTile);
      transpose(square);
      for (int i = 0; i < least(rows_ - first, kTile); ++i)
        store(scores_.s + (first + i) * scores_.stride, square[i] * scores_.factor);
    }
  }
  void add_values() {
    const bool two = rows_ > kTile;
    const int64_t o_bytes = values_.o_stride * 4;
    float* const o = values_.o;
    amx::load<1>(values_.w, values_.w_bytes);
    if (two) amx::load<3>(values_.w + kTile * values_.w_bytes / 2, values_.w_bytes);
    for (int c = 0; c < round_up(value_dim_, kBlock); c += kTile) {
      amx::load<6>(values_.v + c * 2 * kTile, 64);
      amx::load<0>(o + c, o_bytes);
      amx::dot<0, 1, 6>();
      amx::store<0>(o + c, o_bytes);
      if (!two) continue;
      amx::load<2>(o + kTile * values_.o_stride + c, o_bytes);
      amx::dot<2, 3, 6>();
      amx::store<2>(o + kTile * values_.o_stride + c, o_bytes);
    }
  }

  const int rows_, head_dim_, value_dim_, depth_;
  const int64_t query_size_;
  const Tiles tiles_;  // 0 and 1 have the first tile's rows, 2 and 3 the second one's
  BFloat16* q_;  // [head, tile of rows, block, pair, row] pairs
  BFloat16* k_;  // [slot, depth]
  BFloat16* v_;  // [half a block: even or odd columns, pair of slots, column] pairs
  float* s_;     // [tile of rows, slot, row]
  // What the last calls were given and is still to be done.
  struct {
    float* s = nullptr;
    int64_t stride = 0;
    float factor = 0;
  } scores_;
  struct {
    const BFloat16 *v = nullptr, *w = nullptr;
    int64_t w_bytes = 0;
    float* o = nullptr;
    int64_t o_stride = 0;
  } values_;
};
#else
struct TileProducts {};
#endif
struct NoTiles {
  NoTiles(Scratch&, int64_t, int64_t, int64_t, int64_t) {}
};

// What the tasks of one call have in common.
struct Problem {
  const FlashAttentionDecodeParams& p;
  const FlashAttentionParams& f;
  int64_t group, rows;  // query heads per key head, and rows in all
  int64_t left, right;
  int64_t width, row_size;  // of o, padded to whole vectors; of o, m and l together
  int64_t task_heads;       // key heads of a task
  // Of batch entry b: tasks [chunks[b], chunks[b + 1]) are its chunks, the first of which holds key begin(b, 0).
  int64_t* chunks;
  void* partial;   // [chunk, key head, row] o, m, l
  int64_t* missing;  // [batch entry, group of task_heads heads] chunks that are still to be done

  int64_t position(int64_t b, int64_t t) const { return t + length(p, b) - f.seqlen_q; }
  int64_t begin(int64_t b, int64_t t) const { return most<int64_t>(0, position(b, t) - left); }
  int64_t end(int64_t b, int64_t t) const { return clamp(position(b, t) + right + 1, 0, length(p, b)); }
  // Keys of a chunk. The chunks are those of all keys, so that windows see the same ones as they move on.
  int64_t chunk(int64_t b) const {
    const int64_t chunks = clamp(kPieces / f.heads_k, kFewestChunks, kMostChunks);
    int64_t size = kLeastChunk;
    while (size < kChunk && size * chunks < end(b, f.seqlen_q - 1) - begin(b, 0)) size *= 2;
    return size;
  }
};

template <class T>
void write_row(const Problem& problem, int64_t b, int64_t head_k, int64_t row, const Wide<T>* o, Wide<T> m, Wide<T> l) {
  using S = Wide<T>;
  const FlashAttentionParams& f = problem.f;
  const int64_t head = head_k * problem.group + row % problem.group, t = row / problem.group;
  T* const out = static_cast<T*>(f.out) + b * f.out_stride.batch + t * f.out_stride.token + head * f.out_stride.head;
  const RowSum<S> sum(f, head, m, l);
  for (int64_t c = 0; c < f.value_dim; c += kPartsLanes<T>) {
    Parts<T> x;
    for (int p = 0; p < kParts<T>; ++p) x.x[p] = load(o + c + p * kLanes<S>) * sum.inverse;
    store_parts_upto(out + c, x, f.value_dim - c);
  }
  static_cast<S*>(f.lse)[(b * f.heads_q + head) * f.seqlen_q + t] = sum.lse;
}

// One thread's buffers, and the work of a task.
template <class T, bool Tiled>
class Worker {
  using S = Wide<T>;
  static constexpr int kLane = kLanes<S>;
  static constexpr int kPast = (kAheadSteps + 1) * kStreams<Tiled>;  // slots that are fetched beyond the last
  static constexpr int kSlots = kChunk + kLane;  // the last vector of scores may pass the end of the chunk

 public:
  Worker(const Problem& problem, Scratch& scratch)
      : problem_(problem), f_(problem.f), q_stride_(round_up(f_.head_dim, kPartsLanes<T>)),
        tiles_(scratch, problem.task_heads, problem.rows, f_.head_dim, f_.value_dim) {
    if constexpr (Tiled)
      w_ = scratch.take<T>(problem.task_heads * problem.rows * kSlots);
    else
      q_ = scratch.take<S>(problem.task_heads * problem.rows * q_stride_);
    s_ = scratch.take<S>(problem.task_heads * problem.rows * kSlots);
    rows_ = scratch.take<const T*>(2 * kSlots + kPast);
    key_ = scratch.take<int>(kSlots);
    result_ = scratch.take<S>(problem.task_heads * problem.rows * problem.row_size);
  }

  // Heads [head, head + heads) and one chunk of their keys.
  void run(int64_t b, int64_t chunk, int64_t head, int heads) {
    const int64_t chunks = problem_.chunks[b + 1] - problem_.chunks[b], rows = problem_.rows;
    const int64_t size = problem_.chunk(b), key = (problem_.begin(b, 0) / size + chunk) * size;
    const int64_t first = most(key, problem_.begin(b, 0));
    const int n = static_cast<int>(least(key + size, problem_.end(b, f_.seqlen_q - 1)) - first);
    S* const result = chunks == 1 ? result_
                                  : static_cast<S*>(problem_.partial) +
                                        ((problem_.chunks[b] + chunk) * f_.heads_k + head) * rows * problem_.row_size;
    if (b != query_batch_ || head != query_head_) {
      query_batch_ = b, query_head_ = head;
      for (int h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) load_query(b, head + h, h, r);
    }
    const int slots = find_rows(b, head, first, n);
    scores(slots, heads);
    for (int h = 0; h < heads; ++h)
      for_row_groups<S, Tiled>(static_cast<int>(rows), [&](int r, auto group) {
        weights<group()>(b, head + h, r, first, n, s_ + (h * rows + r) * kSlots,
                         result + (h * rows + r) * problem_.row_size);
      });
    for (int64_t r = 0; r < heads * rows; ++r)
      __builtin_memset(result + r * problem_.row_size, 0, problem_.width * sizeof(S));
    values(slots, n, heads, result);
    if (chunks == 1)
      for (int64_t r = 0; r < heads * rows; ++r) {
        const S* const o = result + r * problem_.row_size;
        write_row<T>(problem_, b, head + r / rows, r % rows, o, o[problem_.width], o[problem_.width + 1]);
      }
  }

 private:
  // Leaves in key_ the number of each slot's key within the chunk, and in rows_ where the slots' keys lie, then (from
  // the slots' count on, which is returned) their values. The keys number n from `first` on; slots beyond them, to the
  // end of a vector of scores, repeat the last one, and so do some rows beyond the values, which are fetched in vain.
  int find_rows(int64_t b, int64_t head, int64_t first, int n) {
    const int slots = round_up(n, kLane), length = n / kStreams<Tiled>;
    const T *const k = static_cast<const T*>(f_.k) + head * f_.k_stride.head,
                   *const v = static_cast<const T*>(f_.v) + head * f_.v_stride.head;
    int64_t batch = b, token = first, page_end = kUnbounded;
    if (f_.block_table) page_end = first;  // of which page is looked up at the first key
    const auto put = [&](int slot, int key) __attribute__((always_inline)) {
      if (first + key >= page_end) {
        const int64_t page = (first + key) / f_.page_size;
        batch = page_of(f_, b, page);
        token = first + key - page * f_.page_size;
        page_end = (page + 1) * f_.page_size;
      }
      key_[slot] = key;
      rows_[slot] = k + batch * f_.k_stride.batch + token * f_.k_stride.token;
      rows_[slots + slot] = v + batch * f_.v_stride.batch + token * f_.v_stride.token;
      ++token;
    };
    for (int stream = 0, key = 0; stream < kStreams<Tiled>; ++stream)
      for (int i = 0; i < length; ++i) put(i * kStreams<Tiled> + stream, key++);
    for (int key = length * kStreams<Tiled>; key < n; ++key) put(key, key);
    for (int slot = n; slot < slots; ++slot) key_[slot] = n - 1, rows_[slot] = rows_[n - 1];
    for (int slot = slots + n; slot < 2 * slots + kPast; ++slot) rows_[slot] = rows_[slots + n - 1];
    return slots;
  }

  void load_query(int64_t b, int64_t head_k, int h, int64_t row) {
    const int64_t head = head_k * problem_.group + row % problem_.group, t = row / problem_.group;
    const T* const from =
        static_cast<const T*>(f_.q) + b * f_.q_stride.batch + t * f_.q_stride.token + head * f_.q_stride.head;
    if constexpr (Tiled) return tiles_.set_query(h, static_cast<int>(row), from);
    S* const q = q_ + (h * problem_.rows + row) * q_stride_;
    for (int64_t d = 0; d < f_.head_dim; d += kPartsLanes<T>) {
      const Parts<T> x = load_parts_upto(from + d, f_.head_dim - d);
      for (int p = 0; p < kParts<T>; ++p) store(q + d + p * kLane, x.x[p]);
    }
  }

  // s_[head][row group][slot][row], in units of log 2.
  void scores(int slots, int heads) {
    const int dim = static_cast<int>(f_.head_dim), rows = static_cast<int>(problem_.rows);
    const S factor = static_cast<S>(f_.softcap > 0 ? f_.scale / f_.softcap : f_.scale * kLog2e);
    if constexpr (Tiled) {
      Ahead<T> ahead(rows_, f_.k_stride.head, kTile, heads, dim * sizeof(T));
      for (int j = 0; j < slots; j += kTile)
        for (int h = 0; h < heads; ++h, ahead.advance())
          tiles_.scores(h, rows_ + j, h * f_.k_stride.head, ahead, factor, s_ + h * rows * kSlots + j, kSlots);
      tiles_.finish_scores();
      return;
    }
    // The slots of a vector of scores of the smallest row group.
    const int step = rows % 2 != 0 ? kLane : rows % 4 != 0 || kLane < 4 ? kLane / 2 : kLane / 4;
    Ahead<T> ahead(rows_, f_.k_stride.head, step, heads, dim * sizeof(T));
    for (int j = 0; j < slots; j += step)
      for (int h = 0; h < heads; ++h, ahead.advance())
        for_row_groups<S, false>(rows, [&](int r, auto group) {
          constexpr int keys = kLane / group();
          const S* const q = q_ + (h * rows + r) * q_stride_;
          S* const s = s_ + (h * rows + r) * kSlots + j * group();
          for (int i = 0; i < step; i += keys) {
            const T* const* const keys_at = rows_ + j + i;
            const int64_t offset = h * f_.k_stride.head;
            if (r == 0)
              score_step<group(), true>(q, q_stride_, keys_at, offset, dim, factor, ahead, i, s + i * group());
            else
              score_step<group(), false>(q, q_stride_, keys_at, offset, dim, factor, ahead, i, s + i * group());
          }
        });
  }

  // The scores s of a group of rows from `row` on become weights; leaves m and l in their results.
  template <int Rows>
  void weights(int64_t b, int64_t head_k, int row, int64_t first, int n, S* s, S* result) {
    constexpr S hidden = -static_cast<S>(kInfinity);
    const int size = n * Rows, padded = round_up(size, kLane);
    if (f_.softcap > 0) {
      const S cap = static_cast<S>(f_.softcap * kLog2e);
      for (int i = 0; i < padded; i += kLane) store(s + i, tanh<S>(load(s + i)) * cap);
    }
    if (f_.alibi_slopes) {
      S slope[Rows], position[Rows];
      for (int r = 0; r < Rows; ++r) {
        const int64_t head = head_k * problem_.group + (row + r) % problem_.group;
        slope[r] = static_cast<const S*>(f_.alibi_slopes)[b * f_.alibi_stride + head] * static_cast<S>(kLog2e);
        position[r] = static_cast<S>(problem_.position(b, (row + r) / problem_.group) - first);
      }
      for (int j = 0; j < n; ++j)
        for (int r = 0; r < Rows; ++r) {
          const S distance = static_cast<S>(key_[j]) - position[r];
          s[j * Rows + r] -= slope[r] * (distance < 0 ? -distance : distance);
        }
    }
    for (int i = size; i < padded; ++i) s[i] = hidden;
    for (int r = 0; r < Rows; ++r) {
      const int64_t t = (row + r) / problem_.group;
      const int64_t begin = problem_.begin(b, t) - first, end = problem_.end(b, t) - first;
      if (begin <= 0 && end >= n) continue;
      for (int j = 0; j < n; ++j)
        if (key_[j] < begin || key_[j] >= end) s[j * Rows + r] = hidden;
    }
    Vec<S> largest = splat(hidden);
    for (int i = 0; i < padded; i += kLane) largest = max<S>(load(s + i), largest);
    // Lane i belongs to row i % Rows.
    S m[Rows];
    Vec<S> base{};
    for (int r = 0; r < Rows; ++r) {
      m[r] = hidden;
      for (int i = r; i < kLane; i += Rows) m[r] = most(m[r], static_cast<S>(largest[i]));
      for (int i = r; i < kLane; i += Rows) base[i] = m[r] == hidden ? 0 : m[r];
    }
    Vec<S> sum{};
    for (int i = 0; i < padded; i += kLane) {
      const Vec<S> w = exp2<S>(load(s + i) - base);
      store(s + i, w);
      sum += w;
    }
    for (int r = 0; r < Rows; ++r) {
      S* const statistics = result + r * problem_.row_size + problem_.width;
      statistics[0] = m[r];
      statistics[1] = 0;
      for (int i = r; i < kLane; i += Rows) statistics[1] += sum[i];
    }
  }

  void values(int slots, int n, int heads, S* result) {
    constexpr int step = kStreams<Tiled>;
    Ahead<T> ahead(rows_ + slots, f_.v_stride.head, step, heads, f_.value_dim * sizeof(T));
    int j = 0;
    if constexpr (Tiled) {
      const int64_t rows = problem_.rows;
      // Tiles read as many weights again, of which the products are with zeros.
      for (int64_t r = 0; r < heads * rows; ++r)
        for (int i = 0; i < slots + kTile; i += kLane)
          store(w_ + r * kSlots + i, i < slots ? load(s_ + r * kSlots + i) : Vec<S>{});
      for (; j < n; j += step)
        for (int h = 0; h < heads; ++h, ahead.advance())
          tiles_.values(w_ + h * rows * kSlots + j, kSlots, rows_ + slots + j, h * f_.v_stride.head, n - j, ahead,
                        result + h * rows * problem_.row_size, problem_.row_size);
      tiles_.finish_values();
      return;
    }
    for (; j + step <= n; j += step)
      for (int h = 0; h < heads; ++h, ahead.advance()) add_slots<step>(slots, j, h, ahead, result);
    for (; j < n; ++j)
      for (int h = 0; h < heads; ++h) add_slots<1>(slots, j, h, ahead, result);
  }
  template <int Keys>
  void add_slots(int slots, int j, int h, const Ahead<T>& ahead, S* result) {
    constexpr int vectors = 4;
    const int rows = static_cast<int>(problem_.rows), dim = static_cast<int>(f_.value_dim);
    const int64_t row_size = problem_.row_size;
    for_row_groups<S, false>(rows, [&](int r, auto group) {
      const S* const w = s_ + (h * rows + r) * kSlots + j * group();
      S* const o = result + (h * rows + r) * row_size;
      const auto add = [&](auto fetch) __attribute__((always_inline)) {
        int c = 0;
        for (; c + vectors * kLane <= dim; c += vectors * kLane)
          add_values<Keys, group(), vectors, fetch()>(w, rows_ + slots + j, h * f_.v_stride.head + c, vectors * kLane,
                                                      ahead, c, o + c, row_size);
        for (; c < dim; c += kPartsLanes<T>)
          add_values<Keys, group(), kParts<T>, fetch()>(w, rows_ + slots + j, h * f_.v_stride.head + c, dim - c, ahead,
                                                        c, o + c, row_size);
      };
      if (r == 0)
        add(std::true_type{});
      else
        add(std::false_type{});
    });
  }

  const Problem& problem_;
  const FlashAttentionParams& f_;
  const int64_t q_stride_;
  std::conditional_t<Tiled, TileProducts, NoTiles> tiles_;
  int64_t query_batch_ = -1, query_head_ = -1;  // whose queries are loaded
  T* w_;       // [head, row, slot] weights, where products are on tiles
  S* q_;       // [head, row, head dim]
  S* s_;       // [head, row group, slot, row of the group] scores, then weights
  const T** rows_;  // as find_rows says
  int* key_;
  S* result_;  // [head, row] o, m, l where they are not partial
};

// Adds up the chunks of one (batch entry, key head), or writes what a row without keys gets; o is scratch memory.
template <class T>
void combine(const Problem& problem, int64_t b, int64_t head_k, Wide<T>* o) {
  using S = Wide<T>;
  const int64_t chunks = problem.chunks[b + 1] - problem.chunks[b], heads = problem.f.heads_k;
  for (int64_t r = 0; r < problem.rows; ++r) {
    const S* const partial =
        static_cast<const S*>(problem.partial) +
            ((problem.chunks[b] * heads + head_k) * problem.rows + r) * problem.row_size;
    const int64_t stride = heads * problem.rows * problem.row_size;
    S m = -static_cast<S>(kInfinity), l = 0;
    for (int64_t i = 0; i < chunks; ++i) m = most(m, partial[i * stride + problem.width]);
    __builtin_memset(o, 0, problem.width * sizeof(S));
    for (int64_t i = 0; i < chunks; ++i) {
      const S* const from = partial + i * stride;
      const Vec<S> factor = m == -static_cast<S>(kInfinity) ? splat<S>(1) : exp2<S>(splat(from[problem.width] - m));
      l += from[problem.width + 1] * factor[0];
      for (int64_t c = 0; c < problem.width; c += kLanes<S>) store(o + c, load(o + c) + load(from + c) * factor);
    }
    write_row<T>(problem, b, head_k, r, o, m, l);
  }
}

template <class T, bool Tiled = false>
void decode(Problem& problem, const Parallel& parallel) {
  using S = Wide<T>;
  const FlashAttentionParams& f = problem.f;
  problem.width = round_up(f.value_dim, kPartsLanes<T>);
  problem.row_size = problem.width + kLanes<S>;
  Scratch table;
  int64_t* const chunks = table.take<int64_t>(f.batch + 1);
  problem.chunks = chunks;
  chunks[0] = 0;
  bool more_than_one = false, none = false;
  for (int64_t b = 0; b < f.batch; ++b) {
    const int64_t first = problem.begin(b, 0), end = problem.end(b, f.seqlen_q - 1), size = problem.chunk(b);
    const int64_t count = end > first ? (end - 1) / size - first / size + 1 : 0;
    chunks[b + 1] = chunks[b] + count;
    none |= count == 0;
    more_than_one |= count > 1;
  }
  if (more_than_one) problem.partial = table.take<S>(chunks[f.batch] * f.heads_k * problem.rows * problem.row_size);

  const bool heads_together = f.k_stride.head < f.k_stride.token && f.v_stride.head < f.v_stride.token;
  const int64_t tasks = parallel.threads > 1 ? kTasksPerThread * parallel.threads : 1;
  const int64_t most_heads = least(f.heads_k, (Tiled ? kTiledTaskRows : kTaskRows) / problem.rows);
  problem.task_heads = heads_together ? clamp(chunks[f.batch] * f.heads_k / tasks, 1, most_heads) : 1;
  const int64_t groups = (f.heads_k + problem.task_heads - 1) / problem.task_heads;
  problem.missing = table.take<int64_t>(f.batch * groups);
  for (int64_t i = 0; i < f.batch * groups; ++i) problem.missing[i] = chunks[i / groups + 1] - chunks[i / groups];
  run_tasks(parallel, chunks[f.batch] * groups, [&](TaskQueue& queue) {
    Scratch scratch;
    Worker<T, Tiled> worker(problem, scratch);
    S* const o = scratch.take<S>(problem.width);
    int64_t b = 0;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t chunk = task / groups, group = task % groups, head = group * problem.task_heads;
      while (chunk >= chunks[b + 1]) ++b;
      const int64_t end = least(head + problem.task_heads, f.heads_k);
      worker.run(b, chunk - chunks[b], head, static_cast<int>(end - head));
      if (chunks[b + 1] - chunks[b] > 1 &&
          __atomic_sub_fetch(&problem.missing[b * groups + group], 1, __ATOMIC_ACQ_REL) == 0)
        for (int64_t h = head; h < end; ++h) combine<T>(problem, b, h, o);
    }
  });
  if (!none) return;
  S* const o = table.take<S>(problem.width);
  for (int64_t b = 0; b < f.batch; ++b)
    for (int64_t h = 0; chunks[b + 1] == chunks[b] && h < f.heads_k; ++h) combine<T>(problem, b, h, o);
}

// Each batch entry as a forward pass of its own: several at once, or else each on all threads.
void decode_by_forward(const FlashAttentionDecodeParams& p, const Parallel& parallel) {
  const auto entry = [&](int64_t b, const Parallel& threads) {
    const int64_t size = p.forward.dtype == DType::kFloat64 ? 8 : p.forward.dtype == DType::kFloat32 ? 4 : 2;
    FlashAttentionParams f = p.forward;
    f.batch = 1;
    f.seqlen_k = length(p, b);
    f.q = static_cast<const char*>(f.q) + b * f.q_stride.batch * size;
    if (f.block_table) {
      f.block_table += b * f.block_table_stride;
    } else {
      f.k = static_cast<const char*>(f.k) + b * f.k_stride.batch * size;
      f.v = static_cast<const char*>(f.v) + b * f.v_stride.batch * size;
    }
    if (f.alibi_slopes)
      f.alibi_slopes = static_cast<const char*>(f.alibi_slopes) + b * f.alibi_stride * (size == 8 ? 8 : 4);
    f.out = static_cast<char*>(f.out) + b * f.out_stride.batch * size;
    f.lse = static_cast<char*>(f.lse) + b * f.heads_q * f.seqlen_q * (size == 8 ? 8 : 4);
    flash_attention_fwd(f, threads);
  };
  if (p.forward.batch < parallel.threads) {
    for (int64_t b = 0; b < p.forward.batch; ++b) entry(b, parallel);
    return;
  }
  run_tasks(parallel, p.forward.batch, [&](TaskQueue& queue) {
    for (int64_t b; (b = queue.next()) >= 0;) entry(b, Parallel{1, parallel.run});
  });
}

}  // namespace

void flash_attention_decode(const FlashAttentionDecodeParams& params, const Parallel& parallel) {
  const FlashAttentionParams& f = params.forward;
  const int64_t group = f.heads_q / f.heads_k, rows = group * f.seqlen_q;
  if (f.batch == 0 || rows == 0) return;
  const bool tiled = kHasTiles && f.dtype == DType::kBFloat16 && rows > kVectorRows;
  const int64_t few = tiled ? 2 * kTile : f.heads_k == 1 ? kFewRowsAlone : kFewRows;
  if (rows > few) return decode_by_forward(params, parallel);
  Problem problem{params,
                  f,
                  group,
                  rows,
                  f.window_left < 0 ? kUnbounded : least(f.window_left, kUnbounded),
                  f.window_right < 0 ? kUnbounded : least(f.window_right, kUnbounded),
                  0,
                  0,
                  0,
                  nullptr,
                  nullptr,
                  nullptr};
  switch (f.dtype) {
    case DType::kFloat32:
      return decode<float>(problem, parallel);
    case DType::kBFloat16:
      if (tiled) return decode<BFloat16, kHasTiles>(problem, parallel);
      return decode<BFloat16>(problem, parallel);
    case DType::kFloat16:
      return decode<Float16>(problem, parallel);
    case DType::kFloat64:
      return decode<double>(problem, parallel);
  }
}

void flash_attention_append(const FlashAttentionAppendParams& p, const Parallel& parallel) {
  run_tasks(parallel, p.batch, [&](TaskQueue& queue) {
    for (int64_t b; (b = queue.next()) >= 0;) {
      const auto copy =
          [&](const void* from, const Strides3& from_stride, void* to, const Strides3& to_stride, int64_t dim) {
        const int64_t start = p.cache_seqlens[b];
        for (int64_t t = 0; t < p.new_tokens; ++t) {
          if (start + t < 0 || start + t >= p.capacity) continue;
          const int64_t source = b * from_stride.batch + t * from_stride.token;
          int64_t target = b * to_stride.batch + (start + t) * to_stride.token;
          if (p.block_table) {
            const int64_t page = p.block_table[b * p.block_table_stride + (start + t) / p.page_size];
            if (page < 0 || page >= p.pages) continue;
            target = page * to_stride.batch + (start + t) % p.page_size * to_stride.token;
          }
          // A whole token at once where its heads lie side by side.
          const bool whole = from_stride.head == dim && to_stride.head == dim;
          for (int64_t h = 0; h < (whole ? least<int64_t>(1, p.heads) : p.heads); ++h)
            __builtin_memcpy(static_cast<char*>(to) + (target + h * to_stride.head) * p.element_size,
                             static_cast<const char*>(from) + (source + h * from_stride.head) * p.element_size,
                             static_cast<size_t>((whole ? p.heads : 1) * dim * p.element_size));
        }
      };
      copy(p.k, p.k_stride, p.k_cache, p.k_cache_stride, p.head_dim);
      copy(p.v, p.v_stride, p.v_cache, p.v_cache_stride, p.value_dim);
    }
  });
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
