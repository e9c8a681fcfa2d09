// Selective scan, backward. README.md of the op derives the recurrence of the adjoint g, which runs from the last token
// to the first:  g_t = conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}  with a_t = exp(dt_t A).
//
// A walk is a few tiles of channels over some sequences, chunk by chunk, backwards; per chunk and tile it computes h
// and a again from the state that the forward pass kept, into scratch, then runs the adjoint over them, states in
// blocks that stay in registers.
//
// dB and dC sum over the channels of a group. They are summed over lanes at once, in registers: what a token adds to
// them per lane is more than first-level cache holds. Then over the tiles of a walk, in scratch; then over walks, in
// their order: each adds a chunk once the walk before it has. The result depends on shapes alone, and no workspace is
// needed. What sums over tokens and sequences (dA, dD, ...) is summed within a walk, then over walks in order.
#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

// States of a block, which needs two registers for each.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
constexpr int64_t kTiles = 4;            // of a walk, at most
constexpr int64_t kWalks = 64;           // fewer tiles where there would be fewer walks
constexpr int64_t kSequenceBlocks = 32;  // at most so many partial sums of dA

// h_t and a_t of a block over a chunk into [t][n][part][lane]; y[t] += C_t . h_t if wanted.
template <class S, int P, int Block, bool BConstant, bool CConstant>
__attribute__((noinline)) void recompute(int64_t count, const S* dt, const S* rate, const S* dtu, const S* a,
                                         const S* b, int64_t b_row, const S* c, int64_t c_row, const S* start, S* y,
                                         S* h_out, S* a_out, Ahead::Part ahead) {
  constexpr int lanes = kLanes<S>, step = P * lanes;
  Number<S, P> h[Block];
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) h[n] = load_number<S, P>(start + n * step);
  for (int64_t t = 0; t < count; ++t) {
    ahead.fetch(t);
    const Vec<S> dt_t = load(dt + t * lanes), rate_t = load(rate + t * lanes), dtu_t = load(dtu + t * lanes);
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      const Number<S, P> b_n = BConstant ? load_number<S, P>(b + n * step) : broadcast_number<S, P>(b + n * P);
      const Number<S, P> a_n = decay<S, P>(dt_t, rate_t, load_number<S, P>(a + n * step));
      h[n] = multiply_add<S, P>(a_n, h[n], scale<S, P>(dtu_t, b_n));
      store_number<S, P>(h_out + n * step, h[n]);
      store_number<S, P>(a_out + n * step, a_n);
    }
    if (y != nullptr) {
      Vec<S> sum[2] = {};
#pragma GCC unroll 16
      for (int n = 0; n < Block; ++n) {
        const Number<S, P> c_n = CConstant ? load_number<S, P>(c + n * step) : broadcast_number<S, P>(c + n * P);
        sum[n % 2] = real_multiply_add<S, P>(c_n, h[n], sum[n % 2]);
      }
      store(y + t * lanes, load(y + t * lanes) + (sum[0] + sum[1]));
      c += c_row;
    }
    h_out += Block * step;
    a_out += Block * step;
    b += b_row;
  }
}

// A sum over many tokens, as two numbers: `low` keeps what each addition rounds off. (Terms of either sign leave a
// small sum of large ones, which plain addition in order would blur.)
template <class S>
struct Total {
  S *sum, *low;
  PYKERNELS_INLINE void add(int64_t i, Vec<S> x) const {
    const Vec<S> before = load(sum + i), after = before + x, added = after - before;
    store(low + i, load(low + i) + ((before - (after - added)) + (x - added)));
    store(sum + i, after);
  }
  template <int P>
  PYKERNELS_INLINE void add(int64_t i, Number<S, P> x) const {
    add(i, x.re);
    if constexpr (P == 2) add(i + kLanes<S>, x.im);
  }
  void clear(int64_t n) const {
    fill(sum, n);
    fill(low, n);
  }
  // Leaves all of it in `sum`. Where that is infinite, `low` is NaN.
  void finish(int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes<S>) {
      const Vec<S> rest = load(low + i);
      store(sum + i, load(sum + i) + (Vec<S>)((Mask<S>)rest & (rest == rest)));
    }
  }
  Total from(int64_t i) const { return {sum + i, low + i}; }
};
constexpr int64_t kGroup = 16;  // tokens that are summed in a register first

// The sums over lanes of the dB and dC of a block, of those that depend on tokens. They are rows, [n][dB, dC][part], of
// which as many as fit are folded into one vector: lane i then holds a sum, over some lanes, of row i modulo that many.
template <class S, int P, int Block, bool BConstant, bool CConstant>
struct Fold {
  static constexpr int lanes = kLanes<S>, of_state = P * (!BConstant + !CConstant), rows = Block * of_state;
  static constexpr int folded = rows < lanes ? rows : lanes;             // rows of a vector, a power of two
  static constexpr int slots = rows == 0 ? 0 : rows / folded * lanes;   // numbers of a token

  template <int Step>
  static PYKERNELS_INLINE Vec<S> join(Vec<S> a, Vec<S> b) {
    constexpr auto all = std::make_index_sequence<lanes>{};
    return detail::exchange<Step, false>(a, b, all) + detail::exchange<Step, true>(a, b, all);
  }
  // Row r is there now (r a constant, once the loop around is unrolled): joins it with those before it.
  static PYKERNELS_INLINE void add(Vec<S>* x, int r) {
    if constexpr (folded >= 2)
      if (r % 2 == 1) x[r - 1] = join<1>(x[r - 1], x[r]);
    if constexpr (folded >= 4)
      if (r % 4 == 3) x[r - 3] = join<2>(x[r - 3], x[r - 1]);
    if constexpr (folded >= 8)
      if (r % 8 == 7) x[r - 7] = join<4>(x[r - 7], x[r - 3]);
    if constexpr (folded >= 16)
      if (r % 16 == 15) x[r - 15] = join<8>(x[r - 15], x[r - 7]);
  }
  static PYKERNELS_INLINE void add(Vec<S>* x, int r, Number<S, P> value) {
    x[r] = value.re;
    add(x, r);
    if constexpr (P == 2) {
      x[r + 1] = value.im;
      add(x, r + 1);
    }
  }
};

// Where one block's part of the adjoint goes.
template <class S>
struct Adjoint {
  S* carry;  // [n]: conj(a) g of the token after the chunk; of its first token on return
  Total<S> dA;
  Total<S> dB_total, dC_total;  // where B and C are constant; then also
  S *dB, *dC;                   // [n], added to: of a group of tokens
  S* sums;                      // [t], added to: a Fold; rows sums_row apart
  int64_t sums_row;
  S* ddtu;  // [t], added to: Re(conj(B) g)
  S* ddt;   // [t], added to: Re(conj(A) conj(a) g conj(h_{t-1}))
};

template <class S, int P, int Block, bool BConstant, bool CConstant>
__attribute__((noinline)) void adjoint_block(int64_t count, const S* dt, const S* dtu, const S* dy, const S* A,
                                             const S* b, int64_t b_row, const S* c, int64_t c_row, const S* start,
                                             const S* h, const S* a, const Adjoint<S>& out,
                                             Ahead::Part ahead) {
  constexpr int lanes = kLanes<S>, step = P * lanes;
  using Sums = Fold<S, P, Block, BConstant, CConstant>;
  Number<S, P> carry[Block], dA[Block];
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) {
    carry[n] = load_number<S, P>(out.carry + n * step);
    dA[n] = Number<S, P>{};
  }
  for (int64_t t = count - 1; t >= 0; --t) {
    ahead.fetch(t);
    const Vec<S> dt_t = load(dt + t * lanes), dtu_t = load(dtu + t * lanes), dy_t = load(dy + t * lanes);
    const S *const h_t = h + t * Block * step, *const a_t = a + t * Block * step;
    const S* const before = t > 0 ? h_t - Block * step : start;
    const S *const b_t = b + t * b_row, *const c_t = c + t * c_row;
    Vec<S> ddtu[2] = {}, ddt[2] = {}, rows[Sums::rows + 1];
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      const Number<S, P> b_n = BConstant ? load_number<S, P>(b_t + n * step) : broadcast_number<S, P>(b_t + n * P);
      const Number<S, P> c_n = CConstant ? load_number<S, P>(c_t + n * step) : broadcast_number<S, P>(c_t + n * P);
      const Number<S, P> g = scale_conj_add<S, P>(dy_t, c_n, carry[n]);
      if constexpr (BConstant)
        store_number<S, P>(out.dB + n * step, scale_add<S, P>(dtu_t, g, load_number<S, P>(out.dB + n * step)));
      else
        Sums::add(rows, n * Sums::of_state, scale<S, P>(dtu_t, g));
      const Number<S, P> h_n = load_number<S, P>(h_t + n * step);
      if constexpr (CConstant)
        store_number<S, P>(out.dC + n * step, scale_conj_add<S, P>(dy_t, h_n, load_number<S, P>(out.dC + n * step)));
      else
        Sums::add(rows, n * Sums::of_state + (BConstant ? 0 : P), scale_conj<S, P>(dy_t, h_n));
      ddtu[n % 2] = real_multiply_conj_add<S, P>(g, b_n, ddtu[n % 2]);
      carry[n] = multiply_conj<S, P>(g, load_number<S, P>(a_t + n * step));
      // Gradient of dt A.
      const Number<S, P> dexponent = multiply_conj<S, P>(carry[n], load_number<S, P>(before + n * step));
      dA[n] = scale_add<S, P>(dt_t, dexponent, dA[n]);
      ddt[n % 2] = real_multiply_conj_add<S, P>(dexponent, load_number<S, P>(A + n * step), ddt[n % 2]);
    }
    store(out.ddtu + t * lanes, load(out.ddtu + t * lanes) + (ddtu[0] + ddtu[1]));
    store(out.ddt + t * lanes, load(out.ddt + t * lanes) + (ddt[0] + ddt[1]));
    if constexpr (Sums::rows > 0) {
      S* const sums = out.sums + t * out.sums_row;
#pragma GCC unroll 16
      for (int r = 0; r < Sums::rows; r += Sums::folded) {
        S* const to = sums + r / Sums::folded * lanes;
        store(to, load(to) + rows[r]);
      }
    }
    if (t % kGroup != 0) continue;
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      out.dA.template add<P>(n * step, dA[n]);
      dA[n] = Number<S, P>{};
      if constexpr (BConstant) {
        out.dB_total.template add<P>(n * step, load_number<S, P>(out.dB + n * step));
        store_number<S, P>(out.dB + n * step, Number<S, P>{});
      }
      if constexpr (CConstant) {
        out.dC_total.template add<P>(n * step, load_number<S, P>(out.dC + n * step));
        store_number<S, P>(out.dC + n * step, Number<S, P>{});
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) store_number<S, P>(out.carry + n * step, carry[n]);
}

template <class S, int P, bool BConstant, bool CConstant>
struct Backward {
  static constexpr int lanes = kLanes<S>;
  static constexpr int kWide = P == 1 ? kBlock : 4;
  static constexpr DType kWideType = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  const SelectiveScanBackwardParams& p;
  const SelectiveScanParams& f = p.forward;
  const Segments segments{f.batch, f.length, f.cu_seqlens, f.sequences, kChunk};
  const ChannelTiles<S> tiles{f};
  const int64_t rows = f.state * P, row = projection_row<S>(rows);
  const int64_t sequences = f.cu_seqlens != nullptr ? f.sequences + 1 : f.batch;
  // Walks: blocks of sequences x runs of tiles that do not cross a group of channels.
  const int64_t per_block = most<int64_t>(1, (sequences + kSequenceBlocks - 1) / kSequenceBlocks);
  const int64_t blocks = (sequences + per_block - 1) / per_block;
  const int64_t of_run = most<int64_t>(1, least(kTiles, blocks * tiles.count / kWalks));
  const int64_t runs_of_group = (tiles.per_group + of_run - 1) / of_run, runs = runs_of_group * f.groups;
  const int64_t sums = rows * (1 + BConstant + CConstant) + 2;  // rows of partial: dA, dB, dC, dD, ddelta_bias
  const int64_t state_blocks = count_blocks<kWide>(0, f.state);
  const int64_t slots = slots_of(0, f.state);

  // Of the folds of the states [first, last), which are whole blocks.
  static int64_t slots_of(int64_t first, int64_t last) {
    int64_t result = 0;
    for_blocks<kWide>(first, last, [&]<int Block>(int64_t) {
      result += Fold<S, P, Block, BConstant, CConstant>::slots;
    });
    return result;
  }
  // The first state of a block.
  int64_t state_of(int64_t block) const {
    int64_t result = f.state;
    for_blocks<kWide>(0, f.state, [&]<int>(int64_t n) { result = block-- == 0 ? n : result; });
    return result;
  }
  int64_t chunks_of(int64_t sequence) const {
    const Segment whole = segments.at(sequence, 0);
    return segments.belongs(whole) ? (whole.length + kChunk - 1) / kChunk : 0;
  }
  int64_t chunks_of_block(int64_t block) const {
    int64_t result = 0;
    for (int64_t s = block * per_block; s < least(sequences, (block + 1) * per_block); ++s) result += chunks_of(s);
    return result;
  }

  void run(const Parallel& parallel) const {
    const auto bytes = [&](DType dtype) {
      return static_cast<size_t>(f.batch * f.channels * f.length * bytes_of(dtype));
    };
    want_huge_pages(p.du, bytes(f.dtype));
    want_huge_pages(p.ddelta, bytes(f.delta_dtype));
    if (p.dz != nullptr) want_huge_pages(p.dz, bytes(f.dtype));
    int64_t longest = 0;
    for (int64_t block = 0; block < blocks; ++block) longest = most(longest, chunks_of_block(block));
    const Schedule schedule(parallel.threads, blocks * runs, state_blocks, longest);
    Scratch shared;
    S* const partial = shared.take<S>(blocks * sums * f.channels);  // [block][sum][channel]
    const Progress progress(shared, schedule.walks, schedule.parts);
    const int64_t of_walk = of_run * State::size(rows), of_slots = schedule.slots() * of_run * Chunk::size;
    S* const states = shared.take<S>(schedule.divided() ? schedule.walks * of_walk : 0);
    S* const handed_on = shared.take<S>(schedule.parts > 1 ? schedule.walks * of_slots : 0);
    run_tasks(parallel, schedule.units(), [&](TaskQueue& queue) {
      Scratch scratch;
      Worker worker(*this, schedule, progress, partial, scratch);
      // Runs vary slowest, so that neighbouring walks seldom wait for each other.
      for (int64_t unit; (unit = queue.next()) >= 0;) {
        const int64_t walk = schedule.walk_of(unit);
        worker.unit(schedule.round_of(unit), walk, schedule.part_of(unit),
                    schedule.divided() ? states + walk * of_walk : nullptr,
                    schedule.parts > 1 ? handed_on + walk * of_slots : nullptr);
      }
    });
    reduce(partial, parallel);
  }

  // Sums the partial sums of the blocks of sequences.
  void reduce(const S* partial, const Parallel& parallel) const {
    run_tasks(parallel, (f.channels + 63) / 64, [&](TaskQueue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;)
        for (int64_t d = task * 64; d < least(f.channels, task * 64 + 64); ++d)
          for (int64_t i = 0; i < sums; ++i) {
            S total = 0;
            for (int64_t block = 0; block < blocks; ++block) total += partial[(block * sums + i) * f.channels + d];
            if (i < rows)
              static_cast<S*>(p.dA)[d * rows + i] = total;
            else if (BConstant && i < 2 * rows)
              static_cast<S*>(p.dB)[d * rows + i - rows] = total;
            else if (i < sums - 2)
              static_cast<S*>(p.dC)[d * rows + i - (1 + BConstant) * rows] = total;
            else if (void* const out = i == sums - 2 ? p.dD : p.ddelta_bias)
              static_cast<S*>(out)[d] = total;
          }
    });
  }

  // What a walk keeps of a tile from chunk to chunk.
  struct State {
    S *a, *carry, *b, *c;
    Total<S> dA, dB, dC, dD, ddelta_bias;  // dB, dC: where constant
    static int64_t size(int64_t rows) { return ((4 + BConstant * 3 + CConstant * 3) * rows + 4) * lanes; }
    State(S* at, int64_t rows) {
      const auto take = [&](int64_t vectors) { return std::exchange(at, at + vectors * lanes); };
      const auto total = [&](int64_t vectors) -> Total<S> { return {take(vectors), take(vectors)}; };
      a = take(rows), carry = take(rows), b = take(BConstant * rows), c = take(CConstant * rows);
      dA = total(rows), dB = total(BConstant * rows), dC = total(CConstant * rows);
      dD = total(1), ddelta_bias = total(1);
    }
  };
  // What the parts of a walk hand on, [t][lane] of a chunk and tile; slope is softplus's, gate is sigmoid(z).
  struct Chunk {
    S *u, *slope, *dt, *rate, *dtu, *dout, *z, *gate, *dy, *y, *ddtu, *ddt;
    static constexpr int64_t size = 12 * kOfTokens<S>;
    explicit Chunk(S* at) {
      for (S** x : {&u, &slope, &dt, &rate, &dtu, &dout, &z, &gate, &dy, &y, &ddtu, &ddt}) *x = at, at += kOfTokens<S>;
    }
  };

  struct Worker {
    const Backward& w;
    const SelectiveScanBackwardParams& p;
    const SelectiveScanParams& f;
    const Schedule& schedule;
    const Progress& progress;
    S* const partial;
    S *own_states, *own_chunk;
    S *start;                    // [n]
    S *h, *a;                    // of a block over a chunk
    S *b, *c;                    // of a chunk
    S *dB_sum, *dC_sum;          // [n][part][lane] of a group of tokens, where constant
    S *sums, *sums_by_slot;      // of a chunk: the blocks' folds, [t][slot] and [slot][t]
    Ahead ahead;
    // The unit's.
    int64_t walk, part, first_tile, tiles, state, state_end, first_slot;
    Rows own{};
    bool leads, ends;  // whether the part is the walk's first, or last
    S *states, *handed_on;

    Worker(const Backward& w, const Schedule& schedule, const Progress& progress, S* partial, Scratch& scratch)
        : w(w), p(w.p), f(w.f), schedule(schedule), progress(progress), partial(partial),
          ahead(scratch.take<const char*>(
              Ahead::room(7 * lines_of_tokens<S>() + Ahead::lines_of(w.rows, kVectorBytes), kChunk))) {
      const int64_t of_states = w.rows * lanes, of_tokens = kChunk * lanes;
      own_states = scratch.take<S>(w.of_run * State::size(w.rows));
      own_chunk = scratch.take<S>(Chunk::size);
      start = scratch.take<S>(of_states);
      h = scratch.take<S>(of_tokens * kWide * P);
      a = scratch.take<S>(of_tokens * kWide * P);
      b = BConstant ? nullptr : scratch.take<S>(projection_size<S>(w.rows));
      c = CConstant ? nullptr : scratch.take<S>(projection_size<S>(w.rows));
      sums = scratch.take<S>(kChunk * w.slots);
      sums_by_slot = scratch.take<S>(kChunk * w.slots);
      dB_sum = scratch.take<S>(BConstant ? of_states : 0);
      dC_sum = scratch.take<S>(CConstant ? of_states : 0);
    }

    S* slot(int64_t step) const { return handed_on + step % (schedule.slots() * w.of_run) * Chunk::size; }
    State kept_of(int64_t tile) const { return State(states + tile * State::size(w.rows), w.rows); }

    // Null for `shared_states` and `shared_chunks` stands for the worker's own memory.
    void unit(int64_t round, int64_t walk_, int64_t part_, S* shared_states, S* shared_chunks) {
      walk = walk_, part = part_;
      const int64_t run = walk / w.blocks, block = walk % w.blocks;
      const int64_t group = run / w.runs_of_group, within = run % w.runs_of_group;
      first_tile = group * w.tiles.per_group + within * w.of_run;
      tiles = least(w.of_run, (group + 1) * w.tiles.per_group - first_tile);
      state = w.state_of(w.state_blocks * part / schedule.parts);
      state_end = w.state_of(w.state_blocks * (part + 1) / schedule.parts);
      first_slot = slots_of(0, state);
      own = {state * P, state_end * P};
      leads = part == 0, ends = part == schedule.parts - 1;
      states = shared_states != nullptr ? shared_states : own_states, handed_on = shared_chunks;
      // Each part adds to its own rows of dB and dC, after the same part of the walk with the tiles before.
      const int64_t before = within > 0 ? walk - w.blocks : -1;
      const int64_t chunks = w.chunks_of_block(block);
      const int64_t first = round * schedule.round, last = least(chunks, first + schedule.round);
      if (round > 0 && first >= chunks) return;
      if (round == 0)
        begin();
      else
        progress.wait(walk, part, first * tiles);
      int64_t number = 0;  // of chunks, of all sequences of the block
      const int64_t end_sequence = least(w.sequences, (block + 1) * w.per_block);
      for (int64_t s = block * w.per_block; s < end_sequence; number += w.chunks_of(s), ++s) {
        const Segment whole = w.segments.at(s, 0);
        if (!w.segments.belongs(whole)) {
          if (round == 0 && leads) rest(whole, before < 0);
          continue;
        }
        const int64_t n = w.chunks_of(s);
        if (n == 0 ? round > 0 : number >= last || number + n <= first) continue;
        sequence(s, most<int64_t>(0, first - number), least(n, last - number), number, before);
      }
      if (last == chunks) end(block);
    }

    void begin() {
      const int64_t at = own.first * lanes, n = own.count() * lanes;
      for (int64_t i = 0; i < tiles; ++i) {
        const State s = kept_of(i);
        const Tile tile = w.tiles[first_tile + i];
        load_states(s.a, f.A, 0, tile, w.rows, own);
        s.dA.from(at).clear(n);
        if constexpr (BConstant) load_states(s.b, f.B.data, 0, tile, w.rows, own), s.dB.from(at).clear(n);
        if constexpr (CConstant) load_states(s.c, f.C.data, 0, tile, w.rows, own), s.dC.from(at).clear(n);
        if (ends) s.dD.clear(lanes), s.ddelta_bias.clear(lanes);
      }
    }
    void end(int64_t block) {
      for (int64_t i = 0; i < tiles; ++i) {
        const State s = kept_of(i);
        const Tile tile = w.tiles[first_tile + i];
        S* out = partial + block * w.sums * f.channels + tile.channel;
        const auto put = [&](const Total<S>& all, const Rows& rows) {
          const Total<S> total = all.from(rows.first * lanes);
          total.finish(rows.count() * lanes);
          store_tile(out + rows.first * f.channels, f.channels, 1, total.sum, lanes, rows.count(), tile.count);
        };
        const auto put_states = [&](const Total<S>& total) {
          put(total, own);
          out += w.rows * f.channels;
        };
        put_states(s.dA);
        if constexpr (BConstant) put_states(s.dB);
        if constexpr (CConstant) put_states(s.dC);
        if (ends) put(s.dD, {0, 1}), out += f.channels, put(s.ddelta_bias, {0, 1});
      }
    }

    // The chunks [first, last) of a sequence, counted from its end, whose last chunk is number `number` of the walk.
    void sequence(int64_t index, int64_t first, int64_t last, int64_t number, int64_t before) {
      const int64_t chunks = w.chunks_of(index), at = own.first * lanes;
      for (int64_t i = 0; i < tiles && first == 0; ++i) {
        S* const carry = kept_of(i).carry;
        if (p.dfinal_state != nullptr)
          load_states(carry, p.dfinal_state, index * f.channels, w.tiles[first_tile + i], w.rows, own);
        else
          fill(carry + at, own.count() * lanes);
      }
      const int64_t group = w.tiles[first_tile].group;
      for (int64_t i = first; i < last; ++i) {
        const int64_t chunk = chunks - 1 - i;
        const Segment segment = w.segments.at(index, chunk);
        const int64_t token = segment.start + segment.first, count = segment.last - segment.first;
        const int64_t kept = w.segments.first_of(index) + chunk;
        if constexpr (!BConstant) load_projection<S, P>(b, f.B, segment.batch, group, token, count, f.state, own);
        if constexpr (!CConstant) load_projection<S, P>(c, f.C, segment.batch, group, token, count, f.state, own);
        fill(sums, count * w.slots);
        for (int64_t j = 0; j < tiles; ++j) {
          ahead.clear();
          if (j + 1 < tiles)
            look_ahead(w.tiles[first_tile + j + 1], segment.batch, token, count, kept);
          else if (i + 1 < last)
            look_ahead(w.tiles[first_tile], segment.batch, token - kChunk, kChunk, kept - 1);
          const int64_t step = (number + i) * tiles + j;
          ahead.deal(2 * count_blocks<kWide>(state, state_end), count);
          tile(kept_of(j), w.tiles[first_tile + j], segment.batch, token, count, kept, step);
          if (schedule.parts > 1 && j + 1 < tiles) progress.set(walk, part, step + 1);
        }
        if constexpr (!BConstant || !CConstant) {
          if (before >= 0) progress.wait(before, part, (number + i + 1) * w.of_run);
          add_projections(segment.batch, group, token, count, before >= 0);
        }
        progress.set(walk, part, (number + i + 1) * tiles);
      }
      if (last == chunks && p.dinitial_state != nullptr)
        for (int64_t i = 0; i < tiles; ++i)
          store_states(p.dinitial_state, index * f.channels, w.tiles[first_tile + i], kept_of(i).carry, w.rows, own);
    }

    // What tile() will read and write.
    void look_ahead(const Tile& tile, int64_t batch, int64_t token, int64_t count, int64_t kept) {
      ahead.add(kWideType, f.chunk_states, (kept * w.rows + own.first) * f.channels + tile.channel, {0, 1, f.channels},
                tile.count, own.count());
      if (leads) {
        add_tokens(ahead, f.dtype, f.u, f.u_stride, tile, batch, token, count);
        add_tokens(ahead, f.delta_dtype, f.delta, f.delta_stride, tile, batch, token, count);
        add_tokens(ahead, f.dtype, p.dout, p.dout_stride, tile, batch, token, count);
        if (f.z != nullptr) add_tokens(ahead, f.dtype, f.z, f.z_stride, tile, batch, token, count);
      }
      if (ends) {
        add_tokens(ahead, f.dtype, p.du, p.du_stride, tile, batch, token, count);
        add_tokens(ahead, f.delta_dtype, p.ddelta, p.ddelta_stride, tile, batch, token, count);
        if (p.dz != nullptr) add_tokens(ahead, f.dtype, p.dz, p.dz_stride, tile, batch, token, count);
      }
    }

    // Into dB and dC [B, G, N, L], complex with a last axis of 2.
    void add_projections(int64_t batch, int64_t group, int64_t token, int64_t count, bool accumulate) {
      load_tile(sums_by_slot, kChunk, sums + first_slot, 1, w.slots, slots_of(state, state_end), count);
      S* fold = sums_by_slot;
      for_blocks<kWide>(state, state_end, [&]<int Block>(int64_t first) {
        using Sums = Fold<S, P, Block, BConstant, CConstant>;
        for (int64_t r = 0; r < Sums::rows; ++r) {
          const int64_t n = first + r / Sums::of_state, within = r % Sums::of_state;
          const bool of_B = !BConstant && within < P;
          S* const to = static_cast<S*>(of_B ? p.dB : p.dC) +
                        ((batch * f.groups + group) * f.state + n) * f.length * P + token * P + within % P;
          const S* const from = fold + (r / Sums::folded * lanes + r % Sums::folded) * kChunk;
          for (int64_t t = 0; t < count; t += lanes) {
            Vec<S> sum = load(from + t);
            for (int part = Sums::folded; part < lanes; part += Sums::folded)
              sum = sum + load(from + part * kChunk + t);
            if constexpr (P == 1)
              store_upto(to + t, accumulate ? load_upto(to + t, count - t) + sum : sum, count - t);
            else
              for (int64_t i = 0; i < least<int64_t>(lanes, count - t); ++i)
                to[(t + i) * P] = accumulate ? to[(t + i) * P] + sum[i] : sum[i];
          }
        }
        fold += Sums::slots * kChunk;
      });
    }

    // Gradients of the tokens of no sequence: zeros.
    void rest(const Segment& segment, bool first_run) {
      S* const zeros = own_chunk;
      fill(zeros, kChunk * lanes);
      for (int64_t t = 0; t < segment.length; t += kChunk) {
        const int64_t token = segment.start + t, count = least(kChunk, segment.length - t);
        for (int64_t i = 0; i < tiles; ++i) {
          const Tile tile = w.tiles[first_tile + i];
          store_tokens(f.dtype, p.du, p.du_stride, tile, segment.batch, token, count, zeros);
          store_tokens(f.delta_dtype, p.ddelta, p.ddelta_stride, tile, segment.batch, token, count, zeros);
          if (p.dz != nullptr) store_tokens(f.dtype, p.dz, p.dz_stride, tile, segment.batch, token, count, zeros);
        }
      }
      const int64_t group = w.tiles[first_tile].group;
      if (first_run)
        for (int64_t n = 0; n < f.state; ++n) {
          const int64_t offset = ((segment.batch * f.groups + group) * f.state + n) * f.length + segment.start;
          if constexpr (!BConstant) fill(static_cast<S*>(p.dB) + offset * P, segment.length * P);
          if constexpr (!CConstant) fill(static_cast<S*>(p.dC) + offset * P, segment.length * P);
        }
    }

    // One chunk of a tile, which is step number `step` of the walk.
    void tile(const State& s, const Tile& tile, int64_t batch, int64_t token, int64_t count, int64_t chunk,
              int64_t step) {
      const Chunk x(handed_on != nullptr ? slot(step) : own_chunk);
      load_chunk_state<S, P>(start, f, chunk, tile, own);
      if constexpr (BConstant) fill(dB_sum, w.rows * lanes);
      if constexpr (CConstant) fill(dC_sum, w.rows * lanes);
      if (!leads) {
        progress.wait(walk, part - 1, step + 1);
      } else {
        if (handed_on != nullptr) progress.wait(walk, schedule.parts - 1, step + 1 - schedule.slots() * w.of_run);
        prepare(x, tile, batch, token, count);
      }
      S* fold = sums + first_slot;
      int64_t block = 0;
      for_blocks<kWide>(state, state_end, [&]<int Block>(int64_t n) {
        const int64_t at = n * P * lanes;
        const S* const b_n = BConstant ? s.b + at : b + n * P;
        const S* const c_n = CConstant ? s.c + at : c + n * P;
        const int64_t b_row = BConstant ? 0 : w.row, c_row = CConstant ? 0 : w.row;
        recompute<S, P, Block, BConstant, CConstant>(count, x.dt, x.rate, x.dtu, s.a + at, b_n, b_row, c_n, c_row,
                                                     start + at, f.z != nullptr ? x.y : nullptr, h, a,
                                                     ahead.part(block++));
        const Adjoint<S> out{s.carry + at,
                             s.dA.from(at),
                             BConstant ? s.dB.from(at) : Total<S>{},
                             CConstant ? s.dC.from(at) : Total<S>{},
                             BConstant ? dB_sum + at : nullptr,
                             CConstant ? dC_sum + at : nullptr,
                             fold,
                             w.slots,
                             x.ddtu,
                             x.ddt};
        adjoint_block<S, P, Block, BConstant, CConstant>(count, x.dt, x.dtu, x.dy, s.a + at, b_n, b_row, c_n, c_row,
                                                         start + at, h, a, out, ahead.part(block++));
        fold += Fold<S, P, Block, BConstant, CConstant>::slots;
      });
      if (ends) finish(x, s, tile, batch, token, count);
    }

    void prepare(const Chunk& x, const Tile& tile, int64_t batch, int64_t token, int64_t count) const {
      load_tokens(x.u, f.dtype, f.u, f.u_stride, tile, batch, token, count);
      load_tokens(x.dt, f.delta_dtype, f.delta, f.delta_stride, tile, batch, token, count);
      load_tokens(x.dout, f.dtype, p.dout, p.dout_stride, tile, batch, token, count);
      if (f.z != nullptr) load_tokens(x.z, f.dtype, f.z, f.z_stride, tile, batch, token, count);
      const Vec<S> bias = load_channels<S>(f.delta_bias, tile);
      for (int64_t i = 0; i < count * lanes; i += lanes) {
        Vec<S> step = load(x.dt + i) + bias;
        if (f.delta_softplus) {
          const Vec<S> e = exact_exp<S>(-abs<S>(step));
          store(x.slope + i, softplus_slope<S>(step, e));
          step = softplus<S>(step, e);
        }
        store(x.dt + i, step);
        store(x.rate + i, decay_rate<S>(step));
        store(x.dtu + i, step * load(x.u + i));
        Vec<S> dy_t = load(x.dout + i) * static_cast<S>(P);  // y is P Re(C . h) + D u
        if (f.z != nullptr) {
          // The exact one: every gradient goes through dy.
          const Vec<S> z_t = load(x.z + i), s = exact_sigmoid<S>(z_t, exact_exp<S>(-abs<S>(z_t)));
          store(x.gate + i, s);
          dy_t = dy_t * z_t * s;
        }
        store(x.dy + i, dy_t);
        for (S* const sum : {x.y, x.ddtu, x.ddt}) store(sum + i, Vec<S>{});
      }
    }

    void finish(const Chunk& x, const State& s, const Tile& tile, int64_t batch, int64_t token, int64_t count) const {
      const Vec<S> skip = load_channels<S>(f.D, tile);
      Vec<S> dD_sum{}, ddelta_bias_sum{};
      for (int64_t t = 0; t < count; ++t) {
        const int64_t i = t * lanes;
        const Vec<S> u_t = load(x.u + i), dout_t = load(x.dout + i);
        Vec<S> dy_t = dout_t;
        if (f.z != nullptr) {
          const Vec<S> z_t = load(x.z + i), gate_t = load(x.gate + i);
          const Vec<S> y_t = load(x.y + i) * static_cast<S>(P) + skip * u_t;
          dy_t = dout_t * z_t * gate_t;
          store(x.z + i, dout_t * y_t * silu_slope<S>(z_t, gate_t));  // dz
        }
        dD_sum = dD_sum + dy_t * u_t;
        store(x.dout + i, load(x.dt + i) * load(x.ddtu + i) + dy_t * skip);  // du
        Vec<S> ddt_t = u_t * load(x.ddtu + i) + load(x.ddt + i);
        if (f.delta_softplus) ddt_t = ddt_t * load(x.slope + i);
        ddelta_bias_sum = ddelta_bias_sum + ddt_t;
        store(x.ddt + i, ddt_t);
        if ((t + 1) % kGroup != 0 && t + 1 < count) continue;
        s.dD.add(0, dD_sum);
        s.ddelta_bias.add(0, ddelta_bias_sum);
        dD_sum = ddelta_bias_sum = Vec<S>{};
      }
      store_tokens(f.dtype, p.du, p.du_stride, tile, batch, token, count, x.dout);
      store_tokens(f.delta_dtype, p.ddelta, p.ddelta_stride, tile, batch, token, count, x.ddt);
      if (p.dz != nullptr) store_tokens(f.dtype, p.dz, p.dz_stride, tile, batch, token, count, x.z);
    }
  };
};

template <class S, int P>
void backward(const SelectiveScanBackwardParams& p, const Parallel& parallel) {
  if (p.forward.B.constant)
    p.forward.C.constant ? Backward<S, P, true, true>{p}.run(parallel) : Backward<S, P, true, false>{p}.run(parallel);
  else
    p.forward.C.constant ? Backward<S, P, false, true>{p}.run(parallel) : Backward<S, P, false, false>{p}.run(parallel);
}

}  // namespace

void selective_scan_bwd(const SelectiveScanBackwardParams& p, const Parallel& parallel) {
  if (p.forward.dtype == DType::kFloat64)
    p.forward.is_complex ? backward<double, 2>(p, parallel) : backward<double, 1>(p, parallel);
  else
    p.forward.is_complex ? backward<float, 2>(p, parallel) : backward<float, 1>(p, parallel);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
