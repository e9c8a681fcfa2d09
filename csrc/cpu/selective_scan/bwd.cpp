// Selective scan, backward. README.md of the op derives the recurrence of the adjoint g, which runs from the last token to the
// first:  g_t = conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}  with a_t = exp(dt_t A).
//
// A task is a few tiles of channels over some sequences. It walks through the chunks backwards; per chunk and tile it computes h
// and a again from the state that the forward pass kept, into scratch, then runs the adjoint over them, states in blocks that
// stay in registers.
//
// dB and dC sum over the channels of a group. They are summed over lanes at once, in registers: what a token adds to them per lane
// is more than first-level cache holds. Then over the tiles of a task, in scratch; then over tasks, in the order of the tasks:
// each task adds a chunk once the task before it has (tasks start in that order, so the one waited for is running or done). The result depends on shapes alone, and no workspace is needed. What sums
// over tokens and sequences (dA, dD, ...) is summed within a task, then over tasks in order.
#include <sched.h>

#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

// States of a block, which needs two registers for each.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
constexpr int64_t kTiles = 4;        // of a task
constexpr int64_t kSequenceBlocks = 32;  // at most so many partial sums of dA

// h_t and a_t of a block over a chunk into [t][n][part][lane]; y[t] += C_t . h_t if wanted.
template <class S, int P, int Block, bool BConstant, bool CConstant>
__attribute__((noinline)) void recompute(int64_t count, const S* dt, const S* rate, const S* dtu, const S* a, const S* b,
                                         int64_t b_row, const S* c, int64_t c_row, const S* start, S* y, S* h_out, S* a_out,
                                         Ahead::Part ahead) {
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

// A sum over many tokens, as two numbers: `low` keeps what each addition rounds off. (Terms of either sign leave a small sum
// of large ones, which plain addition in order would blur.)
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

// The sums over lanes of the dB and dC of a block, of those that depend on tokens. They are rows, [n][dB, dC][part], of which as
// many as fit are folded into one vector: lane i then holds a sum, over some lanes, of row i modulo that many.
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
__attribute__((noinline)) void adjoint_block(int64_t count, const S* dt, const S* dtu, const S* dy, const S* A, const S* b,
                                             int64_t b_row, const S* c, int64_t c_row, const S* start, const S* h, const S* a,
                                             const Adjoint<S>& out, Ahead::Part ahead) {
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
    const S *const h_t = h + t * Block * step, *const before = t > 0 ? h_t - Block * step : start, *const a_t = a + t * Block * step;
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
  const SelectiveScanBackwardParams& p;
  const SelectiveScanParams& f = p.forward;
  const Segments segments{f.batch, f.length, f.cu_seqlens, f.sequences, kChunk};
  const ChannelTiles<S> tiles{f};
  const int64_t rows = f.state * P, row = projection_row<S>(rows);
  const int64_t sequences = f.cu_seqlens != nullptr ? f.sequences + 1 : f.batch;
  // Tasks: blocks of sequences x runs of tiles that do not cross a group of channels.
  const int64_t runs_of_group = (tiles.per_group + kTiles - 1) / kTiles, runs = runs_of_group * f.groups;
  const int64_t per_block = most<int64_t>(1, (sequences + kSequenceBlocks - 1) / kSequenceBlocks);
  const int64_t blocks = (sequences + per_block - 1) / per_block;
  const int64_t sums = rows * (1 + BConstant + CConstant) + 2;  // rows of partial: dA, dB, dC, dD, ddelta_bias
  const int64_t state_blocks = count_blocks<kWide>(f.state);
  int64_t slots = 0;  // of all blocks' folds

  void run(const Parallel& parallel) {
    for_blocks<kWide>(f.state, [&]<int Block>(int64_t) { slots += Fold<S, P, Block, BConstant, CConstant>::slots; });
    const auto bytes = [&](DType dtype) { return static_cast<size_t>(f.batch * f.channels * f.length * bytes_of(dtype)); };
    want_huge_pages(p.du, bytes(f.dtype));
    want_huge_pages(p.ddelta, bytes(f.delta_dtype));
    if (p.dz != nullptr) want_huge_pages(p.dz, bytes(f.dtype));
    Scratch shared;
    S* const partial = shared.take<S>(blocks * sums * f.channels);  // [block][sum][channel]
    int64_t* const progress = shared.take<int64_t>(blocks * runs);  // chunks whose dB and dC a task has added
    fill<int64_t>(progress, blocks * runs);
    run_tasks(parallel, blocks * runs, [&](TaskQueue& queue) {
      Scratch scratch;
      Worker worker(*this, scratch);
      // Runs vary slowest, so that neighbouring tasks seldom wait for each other.
      for (int64_t task; (task = queue.next()) >= 0;) worker.task(task / blocks, task % blocks, partial, progress);
    });
    reduce(partial, parallel);
  }

  // Sums the partial sums of the blocks of sequences.
  void reduce(const S* partial, const Parallel& parallel) {
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

  struct Worker {
    const Backward& w;
    const SelectiveScanBackwardParams& p;
    const SelectiveScanParams& f;
    // Per tile of the task.
    struct State {
      S *a, *carry, *b, *c;
      Total<S> dA, dB, dC, dD, ddelta_bias;  // dB, dC: where constant
    } state[kTiles];
    // Of a chunk and tile, [t][lane]; slope is softplus's, gate is sigmoid(z).
    S *u, *slope, *dt, *rate, *dtu, *dout, *z, *gate, *dy, *y, *ddtu, *ddt;
    S *start;                    // [n]
    S *h, *a;                    // of a block over a chunk
    S *b, *c;                    // of a chunk
    S *dB_sum, *dC_sum;          // [n][part][lane] of a group of tokens, where constant
    S *sums, *sums_by_slot;      // of a chunk: the blocks' folds, [t][slot] and [slot][t]
    Ahead ahead;

    Worker(const Backward& w, Scratch& scratch)
        : w(w), p(w.p), f(w.f), ahead(scratch.take<const char*>(Ahead::room(
              7 * lines_of_tokens<S>() + Ahead::lines_of(w.rows, kVectorBytes), kChunk))) {
      const int64_t of_states = w.rows * lanes, of_tokens = kChunk * lanes;
      for (State& s : state) {
        const auto total = [&](int64_t n) -> Total<S> { return {scratch.take<S>(n), scratch.take<S>(n)}; };
        for (S** x : {&s.a, &s.carry}) *x = scratch.take<S>(of_states);
        s.b = BConstant ? scratch.take<S>(of_states) : nullptr;
        s.c = CConstant ? scratch.take<S>(of_states) : nullptr;
        s.dA = total(of_states);
        s.dB = total(BConstant ? of_states : 0);
        s.dC = total(CConstant ? of_states : 0);
        s.dD = total(lanes), s.ddelta_bias = total(lanes);
      }
      for (S** x : {&u, &slope, &dt, &rate, &dtu, &dout, &z, &gate, &dy, &y, &ddtu, &ddt}) *x = scratch.take<S>(of_tokens);
      start = scratch.take<S>(of_states);
      h = scratch.take<S>(of_tokens * kWide * P);
      a = scratch.take<S>(of_tokens * kWide * P);
      b = BConstant ? nullptr : scratch.take<S>(kChunk * w.row);
      c = CConstant ? nullptr : scratch.take<S>(kChunk * w.row);
      sums = scratch.take<S>(kChunk * w.slots);
      sums_by_slot = scratch.take<S>(kChunk * w.slots);
      dB_sum = scratch.take<S>(BConstant ? of_states : 0);
      dC_sum = scratch.take<S>(CConstant ? of_states : 0);
    }

    void task(int64_t run, int64_t block, S* partial, int64_t* progress) {
      const int64_t group = run / w.runs_of_group, of_group = run % w.runs_of_group;
      const int64_t first_tile = group * w.tiles.per_group + of_group * kTiles;
      const int64_t count = least(kTiles, (group + 1) * w.tiles.per_group - first_tile);
      int64_t* const done = progress + block * w.runs + run;
      const int64_t* const before = of_group > 0 ? done - 1 : nullptr;
      for (int64_t i = 0; i < count; ++i) {
        const State& s = state[i];
        const Tile tile = w.tiles[first_tile + i];
        load_states(s.a, f.A, 0, tile, w.rows);
        s.dA.clear(w.rows * lanes);
        if constexpr (BConstant) load_states(s.b, f.B.data, 0, tile, w.rows), s.dB.clear(w.rows * lanes);
        if constexpr (CConstant) load_states(s.c, f.C.data, 0, tile, w.rows), s.dC.clear(w.rows * lanes);
        s.dD.clear(lanes), s.ddelta_bias.clear(lanes);
      }
      int64_t chunks_done = 0;
      for (int64_t s = block * w.per_block; s < least(w.sequences, (block + 1) * w.per_block); ++s)
        sequence(s, first_tile, count, before, done, chunks_done);
      for (int64_t i = 0; i < count; ++i) {
        const State& s = state[i];
        const Tile tile = w.tiles[first_tile + i];
        S* out = partial + block * w.sums * f.channels + tile.channel;
        const auto put = [&](const Total<S>& total, int64_t n) {
          total.finish(n * lanes);
          store_tile(out, f.channels, 1, total.sum, lanes, n, tile.count);
          out += n * f.channels;
        };
        put(s.dA, w.rows);
        if constexpr (BConstant) put(s.dB, w.rows);
        if constexpr (CConstant) put(s.dC, w.rows);
        put(s.dD, 1);
        put(s.ddelta_bias, 1);
      }
    }

    void sequence(int64_t index, int64_t first_tile, int64_t tiles, const int64_t* before, int64_t* done, int64_t& chunks_done) {
      const Segment whole = w.segments.at(index, 0);
      const int64_t chunks = (whole.length + kChunk - 1) / kChunk;
      if (!w.segments.belongs(whole)) {
        rest(whole, first_tile, tiles, before == nullptr);
        return;
      }
      for (int64_t i = 0; i < tiles; ++i) {
        if (p.dfinal_state != nullptr)
          load_states(state[i].carry, p.dfinal_state, index * f.channels, w.tiles[first_tile + i], w.rows);
        else
          fill(state[i].carry, w.rows * lanes);
      }
      const int64_t group = w.tiles[first_tile].group;
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const Segment segment = w.segments.at(index, chunk);
        const int64_t token = segment.start + segment.first, count = segment.last - segment.first;
        const int64_t kept = w.segments.first_of(index) + chunk;
        if constexpr (!BConstant) load_projection<S, P>(b, f.B, segment.batch, group, token, count, f.state);
        if constexpr (!CConstant) load_projection<S, P>(c, f.C, segment.batch, group, token, count, f.state);
        fill(sums, count * w.slots);
        for (int64_t i = 0; i < tiles; ++i) {
          ahead.clear();
          if (i + 1 < tiles)
            look_ahead(w.tiles[first_tile + i + 1], segment.batch, token, count, kept);
          else if (chunk > 0)
            look_ahead(w.tiles[first_tile], segment.batch, token - kChunk, kChunk, kept - 1);
          ahead.deal(2 * w.state_blocks, count);
          tile(state[i], w.tiles[first_tile + i], segment.batch, token, count, kept);
        }
        if constexpr (!BConstant || !CConstant) {
          if (before != nullptr)
            for (int spins = 0; __atomic_load_n(before, __ATOMIC_ACQUIRE) <= chunks_done; ++spins)
              if (spins > 100) sched_yield();
          add_projections(segment.batch, group, token, count, before != nullptr);
          ++chunks_done;
          __atomic_store_n(done, chunks_done, __ATOMIC_RELEASE);
        }
      }
      if (p.dinitial_state != nullptr)
        for (int64_t i = 0; i < tiles; ++i)
          store_states(p.dinitial_state, index * f.channels, w.tiles[first_tile + i], state[i].carry, w.rows);
    }

    // What tile() will read and write.
    void look_ahead(const Tile& tile, int64_t batch, int64_t token, int64_t count, int64_t kept) {
      constexpr DType wide = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
      ahead.add(wide, f.chunk_states, kept * w.rows * f.channels + tile.channel, {0, 1, f.channels}, tile.count, w.rows);
      add_tokens(ahead, f.dtype, f.u, f.u_stride, tile, batch, token, count);
      add_tokens(ahead, f.delta_dtype, f.delta, f.delta_stride, tile, batch, token, count);
      add_tokens(ahead, f.dtype, p.dout, p.dout_stride, tile, batch, token, count);
      add_tokens(ahead, f.dtype, p.du, p.du_stride, tile, batch, token, count);
      add_tokens(ahead, f.delta_dtype, p.ddelta, p.ddelta_stride, tile, batch, token, count);
      if (f.z == nullptr) return;
      add_tokens(ahead, f.dtype, f.z, f.z_stride, tile, batch, token, count);
      add_tokens(ahead, f.dtype, p.dz, p.dz_stride, tile, batch, token, count);
    }

    // Into dB and dC [B, G, N, L], complex with a last axis of 2.
    void add_projections(int64_t batch, int64_t group, int64_t token, int64_t count, bool accumulate) {
      load_tile(sums_by_slot, kChunk, sums, 1, w.slots, w.slots, count);
      S* fold = sums_by_slot;
      for_blocks<kWide>(f.state, [&]<int Block>(int64_t first) {
        using Sums = Fold<S, P, Block, BConstant, CConstant>;
        for (int64_t r = 0; r < Sums::rows; ++r) {
          const int64_t n = first + r / Sums::of_state, within = r % Sums::of_state;
          const bool of_B = !BConstant && within < P;
          S* const to = static_cast<S*>(of_B ? p.dB : p.dC) + ((batch * f.groups + group) * f.state + n) * f.length * P + token * P +
                        within % P;
          const S* const from = fold + (r / Sums::folded * lanes + r % Sums::folded) * kChunk;
          for (int64_t t = 0; t < count; t += lanes) {
            Vec<S> sum = load(from + t);
            for (int part = Sums::folded; part < lanes; part += Sums::folded) sum = sum + load(from + part * kChunk + t);
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
    void rest(const Segment& segment, int64_t first_tile, int64_t tiles, bool first_run) {
      fill(y, kChunk * lanes);
      for (int64_t t = 0; t < segment.length; t += kChunk) {
        const int64_t token = segment.start + t, count = least(kChunk, segment.length - t);
        for (int64_t i = 0; i < tiles; ++i) {
          const Tile tile = w.tiles[first_tile + i];
          store_tokens(f.dtype, p.du, p.du_stride, tile, segment.batch, token, count, y);
          store_tokens(f.delta_dtype, p.ddelta, p.ddelta_stride, tile, segment.batch, token, count, y);
          if (p.dz != nullptr) store_tokens(f.dtype, p.dz, p.dz_stride, tile, segment.batch, token, count, y);
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

    void tile(const State& s, const Tile& tile, int64_t batch, int64_t token, int64_t count, int64_t chunk) {
      load_tokens(u, f.dtype, f.u, f.u_stride, tile, batch, token, count);
      load_tokens(dt, f.delta_dtype, f.delta, f.delta_stride, tile, batch, token, count);
      load_tokens(dout, f.dtype, p.dout, p.dout_stride, tile, batch, token, count);
      if (f.z != nullptr) load_tokens(z, f.dtype, f.z, f.z_stride, tile, batch, token, count);
      const Vec<S> skip = load_channels<S>(f.D, tile), bias = load_channels<S>(f.delta_bias, tile);
      for (int64_t i = 0; i < count * lanes; i += lanes) {
        Vec<S> step = load(dt + i) + bias;
        if (f.delta_softplus) {
          const Vec<S> e = exact_exp<S>(-abs<S>(step));
          store(slope + i, softplus_slope<S>(step, e));
          step = softplus<S>(step, e);
        }
        store(dt + i, step);
        store(rate + i, decay_rate<S>(step));
        store(dtu + i, step * load(u + i));
        Vec<S> dy_t = load(dout + i) * static_cast<S>(P);  // y is P Re(C . h) + D u
        if (f.z != nullptr) {
          // The exact one: every gradient goes through dy.
          const Vec<S> z_t = load(z + i), s = exact_sigmoid<S>(z_t, exact_exp<S>(-abs<S>(z_t)));
          store(gate + i, s);
          dy_t = dy_t * z_t * s;
        }
        store(dy + i, dy_t);
        for (S* const x : {y, ddtu, ddt}) store(x + i, Vec<S>{});
      }
      load_chunk_state<S, P>(start, f, chunk, tile);
      if constexpr (BConstant) fill(dB_sum, w.rows * lanes);
      if constexpr (CConstant) fill(dC_sum, w.rows * lanes);

      S* fold = sums;
      int64_t block = 0;
      for_blocks<kWide>(f.state, [&]<int Block>(int64_t n) {
        const int64_t at = n * P * lanes;
        const S* const b_n = BConstant ? s.b + at : b + n * P;
        const S* const c_n = CConstant ? s.c + at : c + n * P;
        const int64_t b_row = BConstant ? 0 : w.row, c_row = CConstant ? 0 : w.row;
        recompute<S, P, Block, BConstant, CConstant>(count, dt, rate, dtu, s.a + at, b_n, b_row, c_n, c_row, start + at,
                                                     f.z != nullptr ? y : nullptr, h, a, ahead.part(block++));
        const Adjoint<S> out{s.carry + at,
                             s.dA.from(at),
                             BConstant ? s.dB.from(at) : Total<S>{},
                             CConstant ? s.dC.from(at) : Total<S>{},
                             BConstant ? dB_sum + at : nullptr,
                             CConstant ? dC_sum + at : nullptr,
                             fold,
                             w.slots,
                             ddtu,
                             ddt};
        adjoint_block<S, P, Block, BConstant, CConstant>(count, dt, dtu, dy, s.a + at, b_n, b_row, c_n, c_row, start + at, h, a,
                                                         out, ahead.part(block++));
        fold += Fold<S, P, Block, BConstant, CConstant>::slots;
      });

      Vec<S> dD_sum{}, ddelta_bias_sum{};
      for (int64_t t = 0; t < count; ++t) {
        const int64_t i = t * lanes;
        const Vec<S> u_t = load(u + i), dout_t = load(dout + i);
        Vec<S> dy_t = dout_t;
        if (f.z != nullptr) {
          const Vec<S> z_t = load(z + i), s = load(gate + i), y_t = load(y + i) * static_cast<S>(P) + skip * u_t;
          dy_t = dout_t * z_t * s;
          store(z + i, dout_t * y_t * silu_slope<S>(z_t, s));  // dz
        }
        dD_sum = dD_sum + dy_t * u_t;
        store(dout + i, load(dt + i) * load(ddtu + i) + dy_t * skip);  // du
        Vec<S> ddt_t = u_t * load(ddtu + i) + load(ddt + i);
        if (f.delta_softplus) ddt_t = ddt_t * load(slope + i);
        ddelta_bias_sum = ddelta_bias_sum + ddt_t;
        store(ddt + i, ddt_t);
        if ((t + 1) % kGroup != 0 && t + 1 < count) continue;
        s.dD.add(0, dD_sum);
        s.ddelta_bias.add(0, ddelta_bias_sum);
        dD_sum = ddelta_bias_sum = Vec<S>{};
      }
      store_tokens(f.dtype, p.du, p.du_stride, tile, batch, token, count, dout);
      store_tokens(f.delta_dtype, p.ddelta, p.ddelta_stride, tile, batch, token, count, ddt);
      if (p.dz != nullptr) store_tokens(f.dtype, p.dz, p.dz_stride, tile, batch, token, count, z);
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
