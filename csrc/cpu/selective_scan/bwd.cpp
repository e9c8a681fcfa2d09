// Selective scan, backward. README.md of the op derives the recurrence of the adjoint g, which runs from the last token to the
// first:  g_t = conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}  with a_t = exp(dt_t A).
//
// A task is a few tiles of channels over some sequences. It walks through the chunks backwards; per chunk and tile it computes h
// and a again from the state that the forward pass kept, into scratch, then runs the adjoint over them, states in blocks that
// stay in registers.
//
// dB and dC sum over the channels of a group. Within a task they are summed per lane, over its tiles, in scratch; then over
// lanes; then over tasks, in the order of the tasks: each task adds a chunk once the task before it has (tasks start in that
// order, so the one waited for is running or done). The result depends on shapes alone, and no workspace is needed. What sums
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
                                         int64_t b_row, const S* c, int64_t c_row, const S* start, S* y, S* h_out, S* a_out) {
  constexpr int lanes = kLanes<S>, step = P * lanes;
  Number<S, P> h[Block];
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) h[n] = load_number<S, P>(start + n * step);
  for (int64_t t = 0; t < count; ++t) {
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

// Where one block's part of the adjoint goes.
template <class S>
struct Adjoint {
  S* carry;  // [n]: conj(a) g of the token after the chunk; of its first token on return
  Total<S> dA;
  Total<S> dB_total, dC_total;  // where B and C are constant
  S* dB;  // added to: [t][n][part][lane], or when constant [n] of a group of tokens; rows b_row apart
  S* dC;
  int64_t b_row, c_row;
  S* ddtu;  // [t], added to: Re(conj(B) g)
  S* ddt;   // [t], added to: Re(conj(A) conj(a) g conj(h_{t-1}))
};

template <class S, int P, int Block, bool BConstant, bool CConstant>
__attribute__((noinline)) void adjoint_block(int64_t count, const S* dt, const S* dtu, const S* dy, const S* A, const S* b,
                                             int64_t b_row, const S* c, int64_t c_row, const S* start, const S* h, const S* a,
                                             const Adjoint<S>& out) {
  constexpr int lanes = kLanes<S>, step = P * lanes;
  Number<S, P> carry[Block], dA[Block];
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) {
    carry[n] = load_number<S, P>(out.carry + n * step);
    dA[n] = Number<S, P>{};
  }
  for (int64_t t = count - 1; t >= 0; --t) {
    const Vec<S> dt_t = load(dt + t * lanes), dtu_t = load(dtu + t * lanes), dy_t = load(dy + t * lanes);
    const S *const h_t = h + t * Block * step, *const before = t > 0 ? h_t - Block * step : start, *const a_t = a + t * Block * step;
    const S *const b_t = b + t * b_row, *const c_t = c + t * c_row;
    S *const dB = out.dB + t * out.b_row, *const dC = out.dC + t * out.c_row;
    Vec<S> ddtu[2] = {}, ddt[2] = {};
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      const Number<S, P> b_n = BConstant ? load_number<S, P>(b_t + n * step) : broadcast_number<S, P>(b_t + n * P);
      const Number<S, P> c_n = CConstant ? load_number<S, P>(c_t + n * step) : broadcast_number<S, P>(c_t + n * P);
      const Number<S, P> g = scale_conj_add<S, P>(dy_t, c_n, carry[n]);
      store_number<S, P>(dC + n * step, scale_conj_add<S, P>(dy_t, load_number<S, P>(h_t + n * step), load_number<S, P>(dC + n * step)));
      store_number<S, P>(dB + n * step, scale_add<S, P>(dtu_t, g, load_number<S, P>(dB + n * step)));
      ddtu[n % 2] = real_multiply_conj_add<S, P>(g, b_n, ddtu[n % 2]);
      carry[n] = multiply_conj<S, P>(g, load_number<S, P>(a_t + n * step));
      // Gradient of dt A.
      const Number<S, P> dexponent = multiply_conj<S, P>(carry[n], load_number<S, P>(before + n * step));
      dA[n] = scale_add<S, P>(dt_t, dexponent, dA[n]);
      ddt[n % 2] = real_multiply_conj_add<S, P>(dexponent, load_number<S, P>(A + n * step), ddt[n % 2]);
    }
    store(out.ddtu + t * lanes, load(out.ddtu + t * lanes) + (ddtu[0] + ddtu[1]));
    store(out.ddt + t * lanes, load(out.ddt + t * lanes) + (ddt[0] + ddt[1]));
    if (t % kGroup != 0) continue;
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      out.dA.template add<P>(n * step, dA[n]);
      dA[n] = Number<S, P>{};
      if constexpr (BConstant) {
        out.dB_total.template add<P>(n * step, load_number<S, P>(dB + n * step));
        store_number<S, P>(dB + n * step, Number<S, P>{});
      }
      if constexpr (CConstant) {
        out.dC_total.template add<P>(n * step, load_number<S, P>(dC + n * step));
        store_number<S, P>(dC + n * step, Number<S, P>{});
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) store_number<S, P>(out.carry + n * step, carry[n]);
}

// dst[i] = the sum over lanes of src[i], for i < n; dst has room for whole vectors.
template <class S>
void reduce_lanes(S* dst, const S* src, int64_t n) {
  constexpr int lanes = kLanes<S>;
  for (int64_t i = 0; i < n; i += lanes) {
    Vec<S> v[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) v[j] = i + j < n ? load(src + (i + j) * lanes) : Vec<S>{};
    transpose(v);
#pragma GCC unroll 8
    for (int width = lanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) v[j] = v[j] + v[j + width];
    store(dst + i, v[0]);
  }
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

  void run(const Parallel& parallel) {
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
    S *b, *c, *dB_sum, *dC_sum;  // of a chunk; the sums [t][n][part][lane], or [n][part][lane] of a group when constant
    S* sums;                     // of a chunk: dB_sum or dC_sum over lanes, [t][n][part]

    Worker(const Backward& w, Scratch& scratch) : w(w), p(w.p), f(w.f) {
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
      sums = scratch.take<S>(kChunk * w.row);
      dB_sum = scratch.take<S>((BConstant ? 1 : kChunk) * of_states);
      dC_sum = scratch.take<S>((CConstant ? 1 : kChunk) * of_states);
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
        if constexpr (!BConstant) {
          load_projection<S, P>(b, f.B, segment.batch, group, token, count, f.state);
          fill(dB_sum, count * w.rows * lanes);
        }
        if constexpr (!CConstant) {
          load_projection<S, P>(c, f.C, segment.batch, group, token, count, f.state);
          fill(dC_sum, count * w.rows * lanes);
        }
        for (int64_t i = 0; i < tiles; ++i)
          tile(state[i], w.tiles[first_tile + i], segment.batch, token, count, w.segments.first_of(index) + chunk);
        if constexpr (!BConstant || !CConstant) {
          if (before != nullptr)
            for (int spins = 0; __atomic_load_n(before, __ATOMIC_ACQUIRE) <= chunks_done; ++spins)
              if (spins > 100) sched_yield();
          if constexpr (!BConstant) add_projection(p.dB, dB_sum, segment.batch, group, token, count, before != nullptr);
          if constexpr (!CConstant) add_projection(p.dC, dC_sum, segment.batch, group, token, count, before != nullptr);
          ++chunks_done;
          __atomic_store_n(done, chunks_done, __ATOMIC_RELEASE);
        }
      }
      if (p.dinitial_state != nullptr)
        for (int64_t i = 0; i < tiles; ++i)
          store_states(p.dinitial_state, index * f.channels, w.tiles[first_tile + i], state[i].carry, w.rows);
    }

    // dB or dC [B, G, N, L], complex with a last axis of 2, from the sums per lane [t][n][part][lane].
    void add_projection(void* dst, S* sum, int64_t batch, int64_t group, int64_t token, int64_t count, bool accumulate) {
      S* const base = static_cast<S*>(dst) + (batch * f.groups + group) * f.state * f.length * P;
      // Over lanes into [t][n][part], then transposed, so that what is added to memory is contiguous in t.
      S *const by_token = sums, *const by_state = sum;  // whose sums have been taken
      for (int64_t t = 0; t < count; ++t) reduce_lanes(by_token + t * w.row, sum + t * w.rows * lanes, w.rows);
      load_tile(by_state, kChunk, by_token, 1, w.row, w.rows, count);
      for (int64_t i = 0; i < w.rows; ++i) {
        S* const to = base + i / P * f.length * P + token * P + i % P;
        const S* const from = by_state + i * kChunk;
        if constexpr (P == 1) {
          for (int64_t t = 0; t < count; t += lanes)
            store_upto(to + t, accumulate ? load_upto(to + t, count - t) + load(from + t) : load(from + t), count - t);
        } else {
          for (int64_t t = 0; t < count; ++t) to[t * P] = accumulate ? to[t * P] + from[t] : from[t];
        }
      }
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

      for_blocks<kWide>(f.state, [&]<int Block>(int64_t n) {
        const int64_t at = n * P * lanes;
        const S* const b_n = BConstant ? s.b + at : b + n * P;
        const S* const c_n = CConstant ? s.c + at : c + n * P;
        const int64_t b_row = BConstant ? 0 : w.row, c_row = CConstant ? 0 : w.row;
        recompute<S, P, Block, BConstant, CConstant>(count, dt, rate, dtu, s.a + at, b_n, b_row, c_n, c_row, start + at,
                                                     f.z != nullptr ? y : nullptr, h, a);
        const Adjoint<S> out{s.carry + at,
                             s.dA.from(at),
                             BConstant ? s.dB.from(at) : Total<S>{},
                             CConstant ? s.dC.from(at) : Total<S>{},
                             dB_sum + at,
                             dC_sum + at,
                             BConstant ? 0 : w.rows * lanes,
                             CConstant ? 0 : w.rows * lanes,
                             ddtu,
                             ddt};
        adjoint_block<S, P, Block, BConstant, CConstant>(count, dt, dtu, dy, s.a + at, b_n, b_row, c_n, c_row, start + at, h, a,
                                                         out);
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
