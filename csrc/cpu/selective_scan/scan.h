// What the selective scan's forward and backward kernels share. See selective_scan.h for the maths and the layout.
//
// Lanes are channels: a tile is kLanes channels that read the same B and C, and its state h is one vector per n (two
// when complex: real and imaginary parts). Tokens go one after another, in chunks staged in cache as rows [t][lane].
// Scratch arrays of states are [n][part][lane]; B and C are staged as [t][n][part], to be broadcast, or as states when
// constant.
#pragma once

#include <sched.h>

#include "../../include/pykernels/selective_scan.h"
#include "../common/ahead.h"
#include "../common/pages.h"
#include "../common/scratch.h"
#include "../common/tile.h"

namespace pykernels::cpu::PYKERNELS_ISA {

constexpr int64_t kChunk = kSelectiveScanChunk;

// ---- functions of vectors -------------------------------------------------------------------------------------------

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)), to a few ulp.
template <class S>
PYKERNELS_INLINE Vec<S> log1p_unit(Vec<S> e) {
  // s <= 1/3, so each term is a ninth of the one before
  const Vec<S> s = e * reciprocal<S>(e + static_cast<S>(2)), z = s * s;
  constexpr int terms = sizeof(S) == 4 ? 8 : 17;
  Vec<S> sum = splat(static_cast<S>(2.0 / (2 * terms - 1)));
#pragma GCC unroll 17
  for (int i = terms - 2; i >= 0; --i) sum = sum * z + static_cast<S>(2.0 / (2 * i + 1));
  return s * sum;
}
// softplus(x) given e = e^-|x|, and its slope.
template <class S>
PYKERNELS_INLINE Vec<S> softplus(Vec<S> x, Vec<S> e) {
  return (x > static_cast<S>(20)) ? x : max<S>(Vec<S>{}, x) + log1p_unit<S>(e);
}
template <class S>
PYKERNELS_INLINE Vec<S> softplus_slope(Vec<S> x, Vec<S> e) {
  return (x > static_cast<S>(20)) ? splat(static_cast<S>(1)) : exact_sigmoid<S>(x, e);
}

// sin and cos, for any x.
template <class S>
PYKERNELS_INLINE void sin_cos(Vec<S> x, Vec<S>& sin, Vec<S>& cos) {
  if constexpr (sizeof(S) == 8) {
    for (int i = 0; i < kLanes<S>; ++i) sin[i] = __builtin_sin(x[i]), cos[i] = __builtin_cos(x[i]);
  } else {
    // Reduction by pi / 2 in three parts (Cody and Waite), which is exact enough up to 8192; polynomials from Cephes.
    const Vec<S> shifted = x * 0.636619772f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    const Vec<S> r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f, z = r * r;
    const Vec<S> s = r + r * z * ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f);
    const Vec<S> c =
        1.0f - 0.5f * z + z * z * ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f);
    const Mask<S> quadrant = (Mask<S>)shifted & 3, odd = -(quadrant & 1), negative_sin = -(quadrant >> 1);
    const Mask<S> negative_cos = odd ^ negative_sin;
    sin = odd ? c : s;
    cos = odd ? s : c;
    sin = negative_sin ? -sin : sin;
    cos = negative_cos ? -cos : cos;
    const Mask<S> within = abs<S>(x) <= 8192.0f;
    for (int i = 0; i < kLanes<S>; ++i)
      if (!within[i]) sin[i] = __builtin_sinf(x[i]), cos[i] = __builtin_cosf(x[i]);
  }
}

// ---- real and complex numbers ---------------------------------------------------------------------------------------

// A vector of real (P = 1) or complex (P = 2) numbers.
template <class S, int P>
struct Number {
  Vec<S> re;
};
template <class S>
struct Number<S, 2> {
  Vec<S> re, im;
};

template <class S, int P>
PYKERNELS_INLINE Number<S, P> load_number(const S* p) {
  if constexpr (P == 1)
    return {load(p)};
  else
    return {load(p), load(p + kLanes<S>)};
}
template <class S, int P>
PYKERNELS_INLINE Number<S, P> broadcast_number(const S* p) {
  if constexpr (P == 1)
    return {splat(p[0])};
  else
    return {splat(p[0]), splat(p[1])};
}
template <class S, int P>
PYKERNELS_INLINE void store_number(S* p, Number<S, P> x) {
  store(p, x.re);
  if constexpr (P == 2) store(p + kLanes<S>, x.im);
}
template <class S, int P>
PYKERNELS_INLINE Number<S, P> add(Number<S, P> a, Number<S, P> b) {
  if constexpr (P == 1)
    return {a.re + b.re};
  else
    return {a.re + b.re, a.im + b.im};
}
// a b + c
template <class S, int P>
PYKERNELS_INLINE Number<S, P> multiply_add(Number<S, P> a, Number<S, P> b, Number<S, P> c) {
  if constexpr (P == 1)
    return {a.re * b.re + c.re};
  else
    return {a.re * b.re - a.im * b.im + c.re, a.re * b.im + a.im * b.re + c.im};
}
// x b for real x
template <class S, int P>
PYKERNELS_INLINE Number<S, P> scale(Vec<S> x, Number<S, P> b) {
  if constexpr (P == 1)
    return {x * b.re};
  else
    return {x * b.re, x * b.im};
}
// x conj(b) for real x
template <class S, int P>
PYKERNELS_INLINE Number<S, P> scale_conj(Vec<S> x, Number<S, P> b) {
  if constexpr (P == 1)
    return {x * b.re};
  else
    return {x * b.re, -(x * b.im)};
}
// x b + c for real x
template <class S, int P>
PYKERNELS_INLINE Number<S, P> scale_add(Vec<S> x, Number<S, P> b, Number<S, P> c) {
  if constexpr (P == 1)
    return {x * b.re + c.re};
  else
    return {x * b.re + c.re, x * b.im + c.im};
}
// x conj(b) + c for real x
template <class S, int P>
PYKERNELS_INLINE Number<S, P> scale_conj_add(Vec<S> x, Number<S, P> b, Number<S, P> c) {
  if constexpr (P == 1)
    return {x * b.re + c.re};
  else
    return {x * b.re + c.re, c.im - x * b.im};
}
// a conj(b)
template <class S, int P>
PYKERNELS_INLINE Number<S, P> multiply_conj(Number<S, P> a, Number<S, P> b) {
  if constexpr (P == 1)
    return {a.re * b.re};
  else
    return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
// Re(a b) + c
template <class S, int P>
PYKERNELS_INLINE Vec<S> real_multiply_add(Number<S, P> a, Number<S, P> b, Vec<S> c) {
  if constexpr (P == 1)
    return a.re * b.re + c;
  else
    return (a.re * b.re + c) - a.im * b.im;
}
// Re(a conj(b)) + c
template <class S, int P>
PYKERNELS_INLINE Vec<S> real_multiply_conj_add(Number<S, P> a, Number<S, P> b, Vec<S> c) {
  if constexpr (P == 1)
    return a.re * b.re + c;
  else
    return (a.re * b.re + c) + a.im * b.im;
}
// exp2, rounded best where it is near 1: the errors of slow decays add up over the tokens that they last for. (On
// AVX-512 exp2 itself takes the remainder in [0, 1), where its last bits are lost for small negative x.)
template <class S>
PYKERNELS_INLINE Vec<S> fine_exp2(Vec<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    // 0 of an infinity
    const Vec<S> f = (Vec<S>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (Vec<S>)_mm512_scalef_ps((__m512)exp2_reduced(f), (__m512)(x - f));
  }
#endif
  return exp2<S>(x);
}
// exp(dt A), where rate is decay_rate(dt): an exp2 in fp32; in fp64 exact_exp keeps to the few ulp that its error
// budget allows. log2 e goes with dt, whose rounding differs from token to token; with A it would be the same for all
// of them and add up.
template <class S>
PYKERNELS_INLINE Vec<S> decay_rate(Vec<S> dt) {
  if constexpr (sizeof(S) == 4)
    return dt * static_cast<S>(kLog2e);
  else
    return dt;
}
template <class S, int P>
PYKERNELS_INLINE Number<S, P> decay(Vec<S> dt, Vec<S> rate, Number<S, P> a) {
  Vec<S> size;
  if constexpr (sizeof(S) == 4)
    size = fine_exp2<S>(rate * a.re);
  else
    size = exact_exp<S>(rate * a.re);
  if constexpr (P == 1) {
    return {size};
  } else {
    Vec<S> sin, cos;
    sin_cos<S>(dt * a.im, sin, cos);
    return {size * cos, size * sin};
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// The channels of a tile: `count` from `channel` on, all of group `group`.
struct Tile {
  int64_t channel, count, group;
};
template <class S>
struct ChannelTiles {
  int64_t per_group, channels_of_group, count;
  explicit ChannelTiles(const SelectiveScanParams& p)
      : per_group(0), channels_of_group(p.groups > 0 ? p.channels / p.groups : 0), count(0) {
    per_group = (channels_of_group + kLanes<S> - 1) / kLanes<S>;
    count = per_group * p.groups;
  }
  Tile operator[](int64_t i) const {
    const int64_t group = i / per_group, within = i % per_group * kLanes<S>;
    return {group * channels_of_group + within, least<int64_t>(kLanes<S>, channels_of_group - within), group};
  }
};

template <class S>
PYKERNELS_INLINE void fill(S* p, int64_t n, S value = 0) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// Rows [first, last) of the states' arrays.
struct Rows {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// Of a [D, rows] array in the compute type (A, a state): dst[row][lane], those of `part` alone.
template <class S>
void load_states(S* dst, const void* src, int64_t offset_rows, const Tile& tile, int64_t rows, const Rows& part) {
  load_tile(dst + part.first * kLanes<S>, kLanes<S>,
            static_cast<const S*>(src) + (offset_rows + tile.channel) * rows + part.first, 1, rows, part.count(),
            tile.count);
}
template <class S>
void store_states(void* dst, int64_t offset_rows, const Tile& tile, const S* src, int64_t rows, const Rows& part) {
  store_tile(static_cast<S*>(dst) + (offset_rows + tile.channel) * rows + part.first, 1, rows,
             src + part.first * kLanes<S>, kLanes<S>, part.count(), tile.count);
}
// Of a [D] array: one vector; zeros for null.
template <class S>
Vec<S> load_channels(const void* src, const Tile& tile) {
  return src != nullptr ? load_upto(static_cast<const S*>(src) + tile.channel, tile.count) : Vec<S>{};
}

// h before chunk `index`, of one tile: rows of D.
template <class S, int P>
void load_chunk_state(S* h, const SelectiveScanParams& p, int64_t index, const Tile& tile, const Rows& part) {
  load_tile(h + part.first * kLanes<S>, kLanes<S>,
            static_cast<const S*>(p.chunk_states) + (index * p.state * P + part.first) * p.channels + tile.channel,
            p.channels, 1, part.count(), tile.count);
}
template <class S, int P>
void store_chunk_state(const SelectiveScanParams& p, int64_t index, const Tile& tile, const S* h, const Rows& part) {
  store_tile(static_cast<S*>(p.chunk_states) + (index * p.state * P + part.first) * p.channels + tile.channel,
             p.channels, 1, h + part.first * kLanes<S>, kLanes<S>, part.count(), tile.count);
}

// Elements of one token's row of B or C in scratch, and of a chunk's rows: a part of the states may start anywhere and
// is loaded in whole vectors, whose ends fall on what other parts have of the next row.
template <class S>
int64_t projection_row(int64_t rows) {
  return round_up(rows, kLanes<S>);
}
template <class S>
int64_t projection_size(int64_t rows) {
  return kChunk * projection_row<S>(rows) + kLanes<S>;
}

// dst[t][n][real, imaginary] of B or C at tokens start + [0, count), the rows of `part` alone.
template <class S, int P>
void load_projection(S* dst, const Projection& x, int64_t batch, int64_t group, int64_t start, int64_t count,
                     int64_t state, const Rows& part) {
  const int64_t ld = projection_row<S>(state * P), offset = batch * x.batch + group * x.group + start * x.token;
  if constexpr (P == 1) {
    load_tile(dst + part.first, ld, x.dtype, x.data, offset + part.first * x.state, x.token, x.state, count,
              part.count());
  } else {
    const S* const src = static_cast<const S*>(x.data) + offset;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t row = part.first; row < part.last; ++row)
        dst[t * ld + row] = src[t * x.token + row / 2 * x.state + row % 2];
  }
}

// [t][lane] of a [B, D, L] tensor.
template <class S>
void load_tokens(S* dst, DType dtype, const void* src, const ChannelStrides& stride, const Tile& tile, int64_t batch,
                 int64_t start, int64_t count) {
  load_tile(dst, kLanes<S>, dtype, src, batch * stride.batch + tile.channel * stride.channel + start * stride.token,
            stride.token, stride.channel, count, tile.count);
}
template <class S>
void store_tokens(DType dtype, void* dst, const ChannelStrides& stride, const Tile& tile, int64_t batch, int64_t start,
                  int64_t count, const S* src) {
  store_tile(dtype, dst, batch * stride.batch + tile.channel * stride.channel + start * stride.token, stride.token,
             stride.channel, src, kLanes<S>, count, tile.count);
}

// Cache lines of such a tile, at most: rows are channels, or tokens.
template <class S>
constexpr int64_t lines_of_tokens() {
  return most(Ahead::lines_of(kLanes<S>, kChunk * sizeof(S)), Ahead::lines_of(kChunk, kVectorBytes));
}
inline void add_tokens(Ahead& ahead, DType dtype, const void* src, const ChannelStrides& stride, const Tile& tile,
                       int64_t batch, int64_t start, int64_t count) {
  ahead.add(dtype, src, batch * stride.batch + tile.channel * stride.channel + start * stride.token, stride,
            tile.count, count);
}

// Elements from one array [t][lane] of a chunk to the next: by an odd number of cache lines more, lest they share sets.
template <class S>
constexpr int64_t kOfTokens = kChunk * kLanes<S> + 3 * 64 / static_cast<int64_t>(sizeof(S));

// Splits the states [n, last) into blocks: calls body.template operator()<Size>(first) with sizes Wide, 8, 4 and 1.
template <int Wide, class Body>
PYKERNELS_INLINE void for_blocks(int64_t n, int64_t last, Body&& body) {
  for (; n + Wide <= last; n += Wide) body.template operator()<Wide>(n);
  if constexpr (Wide > 8)
    for (; n + 8 <= last; n += 8) body.template operator()<8>(n);
  if constexpr (Wide > 4)
    for (; n + 4 <= last; n += 4) body.template operator()<4>(n);
  for (; n < last; ++n) body.template operator()<1>(n);
}
template <int Wide>
int64_t count_blocks(int64_t first, int64_t last) {
  int64_t blocks = 0;
  for_blocks<Wide>(first, last, [&]<int>(int64_t) { ++blocks; });
  return blocks;
}

// ---- who does what --------------------------------------------------------------------------------------------------

// A walk goes through the chunks of some channels one after another. Where there are fewer walks than threads, each is
// done in parts: a part has some of the states, takes a chunk from the part before it and hands it on, with its own
// states' share of y added. Where the number of walks would leave threads idle at the end, each is cut into rounds of
// so many chunks. Threads take units, the parts of a round of a walk, round by round; a unit waits for none but those
// before it, so that any number of threads gets through. How the work is divided depends on the number of threads, what
// is computed does not: every sum goes over the states in their order.
struct Schedule {
  int64_t walks, parts = 1, rounds = 1, round;  // round: chunks

  Schedule(int64_t threads, int64_t walks, int64_t most_parts, int64_t longest)
      : walks(walks), round(most<int64_t>(longest, 1)) {
    // Below so many chunks it is not worth it; above so many walks for each thread, the last ones hardly matter.
    constexpr int64_t kLeast = 8, kManyWalks = 8;
    if (longest < kLeast || walks % threads == 0 || walks > kManyWalks * threads) return;
    if (walks < threads) parts = least(most_parts, (threads + walks - 1) / walks);
    if (walks == 1 && parts == 1) return;
    round = most<int64_t>(4, least<int64_t>(16, longest / 16));
    rounds = (longest + round - 1) / round;
  }
  int64_t units() const { return rounds * walks * parts; }
  bool divided() const { return rounds * parts > 1; }
  // Chunks under way between the parts of a walk: a round's, so that a slot's last use is a unit before that of its
  // next.
  int64_t slots() const { return parts > 1 ? round : 1; }
  // Numbers of a unit.
  int64_t round_of(int64_t unit) const { return unit / (walks * parts); }
  int64_t walk_of(int64_t unit) const { return unit / parts % walks; }
  int64_t part_of(int64_t unit) const { return unit % parts; }
};

// How far each part of each walk has come, for others to wait for.
class Progress {
 public:
  Progress(Scratch& shared, int64_t walks, int64_t parts)
      : parts_(parts), counts_(shared.take<int64_t>(walks * parts * kApart)) {
    for (int64_t i = 0; i < walks * parts * kApart; ++i) counts_[i] = 0;
  }
  void wait(int64_t walk, int64_t part, int64_t count) const {
    for (int spins = 0; __atomic_load_n(at(walk, part), __ATOMIC_ACQUIRE) < count; ++spins)
      if (spins > 100) sched_yield();
  }
  void set(int64_t walk, int64_t part, int64_t count) const {
    __atomic_store_n(at(walk, part), count, __ATOMIC_RELEASE);
  }

 private:
  static constexpr int64_t kApart = 8;  // a cache line each
  int64_t* at(int64_t walk, int64_t part) const { return counts_ + (walk * parts_ + part) * kApart; }
  int64_t parts_;
  int64_t* counts_;
};

}  // namespace pykernels::cpu::PYKERNELS_ISA
