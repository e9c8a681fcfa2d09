// Selective scan, forward. A walk is one tile of channels of one sequence, chunk by chunk. Within a chunk the states
// are taken in blocks that stay in registers over all its tokens; each adds its C . h to y, four states at a time and
// in their order, so that y is the same however the states are divided.
#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

// States of a block: half of AVX-512's registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 16;
#else
constexpr int kBlock = 8;
#endif
constexpr int kQuad = 4;  // states that are summed on their own; a part has some of them

// y[t] += C_t . h_t and h advanced over `count` tokens, for states of a block. b and c point at the block's first
// state; their rows are `b_row` apart (0 when constant). Each token fetches some of the lines ahead.
template <class S, int P, int Block, bool BConstant, bool CConstant>
__attribute__((noinline)) void scan_block(int64_t count, const S* dt, const S* rate, const S* dtu, const S* a,
                                          const S* b, int64_t b_row, const S* c, int64_t c_row, S* h_memory, S* y,
                                          Ahead::Part ahead) {
  constexpr int lanes = kLanes<S>, step = P * lanes, sums = (Block + kQuad - 1) / kQuad;
  Number<S, P> h[Block];
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) h[n] = load_number<S, P>(h_memory + n * step);
  for (int64_t t = 0; t < count; ++t) {
    ahead.fetch(t);
    const Vec<S> dt_t = load(dt + t * lanes), rate_t = load(rate + t * lanes), dtu_t = load(dtu + t * lanes);
    Vec<S> sum[sums] = {};
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      const Number<S, P> b_n = BConstant ? load_number<S, P>(b + n * step) : broadcast_number<S, P>(b + n * P);
      const Number<S, P> c_n = CConstant ? load_number<S, P>(c + n * step) : broadcast_number<S, P>(c + n * P);
      const Number<S, P> input = scale<S, P>(dtu_t, b_n);
      h[n] = multiply_add<S, P>(decay<S, P>(dt_t, rate_t, load_number<S, P>(a + n * step)), h[n], input);
      sum[n / kQuad] = real_multiply_add<S, P>(c_n, h[n], sum[n / kQuad]);
    }
    Vec<S> total = load(y + t * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < sums; ++i) total = total + sum[i];
    store(y + t * lanes, total);
    b += b_row;
    c += c_row;
  }
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) store_number<S, P>(h_memory + n * step, h[n]);
}

template <class S, int P, bool BConstant, bool CConstant>
struct Forward {
  static constexpr int lanes = kLanes<S>, kWide = P == 1 ? kBlock : 4;
  // Of a chunk, [t][lane]. The parts of a walk hand on dt and y; lines that another core has written are dear, so that
  // each computes the others again.
  struct Chunk {
    S *dt, *y, *u, *rate, *dtu, *z;
    static constexpr int64_t handed_on = 2 * kOfTokens<S>, own = 4 * kOfTokens<S>;
    Chunk(S* at, S* own) : dt(at), y(at + kOfTokens<S>) {
      for (S** x : {&u, &rate, &dtu, &z}) *x = own, own += kOfTokens<S>;
    }
  };
  const SelectiveScanParams& p;
  const Segments segments{p.batch, p.length, p.cu_seqlens, p.sequences, kChunk};
  const ChannelTiles<S> tiles{p};
  const int64_t rows = p.state * P, row = projection_row<S>(rows), quads = (p.state + kQuad - 1) / kQuad;
  const int64_t sequences = p.cu_seqlens != nullptr ? p.sequences + 1 : p.batch;  // the last packed one: tokens of none

  int64_t chunks_of(int64_t sequence) const { return (segments.at(sequence, 0).length + kChunk - 1) / kChunk; }
  int64_t longest() const {
    int64_t result = 0;
    for (int64_t s = 0; s < (p.cu_seqlens != nullptr ? p.sequences : 1); ++s) result = most(result, chunks_of(s));
    return result;
  }

  void run(const Parallel& parallel) const {
    want_huge_pages(p.out, static_cast<size_t>(p.batch * p.channels * p.length * bytes_of(p.dtype)));
    const Schedule schedule(parallel.threads, sequences * tiles.count, quads, longest());
    Scratch shared;
    const Progress progress(shared, schedule.walks, schedule.parts);
    S* const states = shared.take<S>(schedule.divided() ? schedule.walks * rows * lanes : 0);
    S* const handed_on = shared.take<S>(schedule.parts > 1 ? schedule.walks * schedule.slots() * Chunk::handed_on : 0);
    run_tasks(parallel, schedule.units(), [&](TaskQueue& queue) {
      Scratch scratch;
      Worker worker(*this, schedule, progress, scratch);
      for (int64_t unit; (unit = queue.next()) >= 0;) {
        const int64_t walk = schedule.walk_of(unit);
        worker.unit(schedule.round_of(unit), walk, schedule.part_of(unit),
                    schedule.divided() ? states + walk * rows * lanes : nullptr,
                    schedule.parts > 1 ? handed_on + walk * schedule.slots() * Chunk::handed_on : nullptr);
      }
    });
  }

  struct Worker {
    const Forward& f;
    const SelectiveScanParams& p;
    const Schedule& schedule;
    const Progress& progress;
    S *own_chunk, *own_h, *a, *b, *c;
    Ahead ahead;

    Worker(const Forward& f, const Schedule& schedule, const Progress& progress, Scratch& scratch)
        : f(f),
          p(f.p),
          schedule(schedule),
          progress(progress),
          own_chunk(scratch.take<S>(Chunk::own + Chunk::handed_on)),
          own_h(scratch.take<S>(f.rows * lanes)),
          a(scratch.take<S>(f.rows * lanes)),
          b(scratch.take<S>(BConstant ? f.rows * lanes : projection_size<S>(f.rows))),
          c(scratch.take<S>(CConstant ? f.rows * lanes : projection_size<S>(f.rows))),
          ahead(scratch.take<const char*>(Ahead::room(4 * lines_of_tokens<S>(), kChunk))) {}

    // Null for `h` and `handed_on` stands for the worker's own memory.
    void unit(int64_t round, int64_t walk, int64_t part, S* h, S* handed_on) {
      const int64_t sequence = walk / f.tiles.count;
      const Tile tile = f.tiles[walk % f.tiles.count];
      const int64_t chunks = f.chunks_of(sequence);
      const int64_t first = round * schedule.round, last = least(chunks, first + schedule.round);
      const Segment segment = f.segments.at(sequence, 0);
      const bool leads = part == 0, ends = part == schedule.parts - 1;
      if (!f.segments.belongs(segment)) {
        if (round == 0 && leads) none(segment, sequence, tile);
        return;
      }
      if (round > 0 && first >= chunks) return;
      const int64_t state = f.quads * part / schedule.parts * kQuad;
      const int64_t state_end = least(p.state, f.quads * (part + 1) / schedule.parts * kQuad);
      const Rows own{state * P, state_end * P};
      if (h == nullptr) h = own_h;
      const Vec<S> skip = load_channels<S>(p.D, tile), bias = load_channels<S>(p.delta_bias, tile);
      load_states(a, p.A, 0, tile, f.rows, own);
      if constexpr (BConstant) load_states(b, p.B.data, 0, tile, f.rows, own);
      if constexpr (CConstant) load_states(c, p.C.data, 0, tile, f.rows, own);
      if (round > 0)
        progress.wait(walk, part, first);
      else if (p.initial_state != nullptr)
        load_states(h, p.initial_state, sequence * p.channels, tile, f.rows, own);
      else
        fill(h + own.first * lanes, own.count() * lanes);
      const int64_t blocks = count_blocks<kWide>(state, state_end);
      for (int64_t i = first; i < last; ++i) {
        const int64_t count = least(kChunk, segment.length - i * kChunk), start = segment.start + i * kChunk;
        S* const slot =
            handed_on != nullptr ? handed_on + i % schedule.slots() * Chunk::handed_on : own_chunk + Chunk::own;
        const Chunk chunk(slot, own_chunk);
        if (p.chunk_states != nullptr) store_chunk_state<S, P>(p, f.segments.first_of(sequence) + i, tile, h, own);
        if constexpr (!BConstant) load_projection<S, P>(b, p.B, segment.batch, tile.group, start, count, p.state, own);
        if constexpr (!CConstant) load_projection<S, P>(c, p.C, segment.batch, tile.group, start, count, p.state, own);
        load_tokens(chunk.u, p.dtype, p.u, p.u_stride, tile, segment.batch, start, count);
        if (ends && p.z != nullptr) load_tokens(chunk.z, p.dtype, p.z, p.z_stride, tile, segment.batch, start, count);
        if (!leads)
          progress.wait(walk, part - 1, i + 1);
        else if (handed_on != nullptr)
          progress.wait(walk, schedule.parts - 1, i + 1 - schedule.slots());
        if (leads) first_steps(chunk, tile, segment.batch, start, count, bias);
        for (int64_t j = 0; j < count * lanes; j += lanes) {
          store(chunk.rate + j, decay_rate<S>(load(chunk.dt + j)));
          store(chunk.dtu + j, load(chunk.dt + j) * load(chunk.u + j));
        }
        ahead.clear();
        if (i + 1 < last) {
          const int64_t left = segment.length - (i + 1) * kChunk;
          look_ahead(tile, segment.batch, start + count, least(kChunk, left), leads, ends);
        }
        ahead.deal(blocks, count);
        int64_t block = 0;
        for_blocks<kWide>(state, state_end, [&]<int Block>(int64_t n) {
          scan_block<S, P, Block, BConstant, CConstant>(count, chunk.dt, chunk.rate, chunk.dtu, a + n * P * lanes,
                                                        b + n * P * (BConstant ? lanes : 1), BConstant ? 0 : f.row,
                                                        c + n * P * (CConstant ? lanes : 1), CConstant ? 0 : f.row,
                                                        h + n * P * lanes, chunk.y, ahead.part(block++));
        });
        if (ends) finish(chunk, tile, segment.batch, start, count, skip);
        if (schedule.divided()) progress.set(walk, part, i + 1);
      }
      if (last < chunks) return;
      store_states(p.final_state, sequence * p.channels, tile, h, f.rows, own);
      if (ends) clear_chunk_states(f.segments.first_of(sequence) + chunks, sequence, tile);
    }

    void first_steps(const Chunk& x, const Tile& tile, int64_t batch, int64_t start, int64_t count, Vec<S> bias) const {
      load_tokens(x.dt, p.delta_dtype, p.delta, p.delta_stride, tile, batch, start, count);
      for (int64_t i = 0; i < count * lanes; i += lanes) {
        Vec<S> step = load(x.dt + i) + bias;
        if (p.delta_softplus) step = softplus<S>(step, exact_exp<S>(-abs<S>(step)));
        store(x.dt + i, step);
        store(x.y + i, Vec<S>{});
      }
    }

    void finish(const Chunk& x, const Tile& tile, int64_t batch, int64_t start, int64_t count, Vec<S> skip) const {
      for (int64_t i = 0; i < count * lanes; i += lanes) {
        Vec<S> result = load(x.y + i) * static_cast<S>(P) + skip * load(x.u + i);
        if (p.z != nullptr) result = result * (load(x.z + i) * sigmoid<S>(load(x.z + i)));
        store(x.y + i, result);
      }
      store_tokens(p.dtype, p.out, p.out_stride, tile, batch, start, count, x.y);
    }

    // What a part that is the first, or the last, will read and write.
    void look_ahead(const Tile& tile, int64_t batch, int64_t start, int64_t count, bool leads, bool ends) {
      add_tokens(ahead, p.dtype, p.u, p.u_stride, tile, batch, start, count);
      if (leads) add_tokens(ahead, p.delta_dtype, p.delta, p.delta_stride, tile, batch, start, count);
      if (ends && p.z != nullptr) add_tokens(ahead, p.dtype, p.z, p.z_stride, tile, batch, start, count);
      if (ends) add_tokens(ahead, p.dtype, p.out, p.out_stride, tile, batch, start, count);
    }

    // The tokens of no sequence: zeros.
    void none(const Segment& segment, int64_t sequence, const Tile& tile) {
      fill(own_chunk, kChunk * lanes);
      for (int64_t t = 0; t < segment.length; t += kChunk)
        store_tokens(p.dtype, p.out, p.out_stride, tile, segment.batch, segment.start + t,
                     least(kChunk, segment.length - t), own_chunk);
      clear_chunk_states(f.segments.first_of(sequence), sequence, tile);
    }
    // Of the chunks that a sequence owns but does not need, so that the tensor is the same in every run.
    void clear_chunk_states(int64_t index, int64_t sequence, const Tile& tile) {
      if (p.chunk_states == nullptr) return;
      fill(own_h, f.rows * lanes);
      for (; index < f.segments.end_of(sequence); ++index) store_chunk_state<S, P>(p, index, tile, own_h, {0, f.rows});
    }
  };
};

template <class S, int P>
void forward(const SelectiveScanParams& p, const Parallel& parallel) {
  if (p.B.constant)
    p.C.constant ? Forward<S, P, true, true>{p}.run(parallel) : Forward<S, P, true, false>{p}.run(parallel);
  else
    p.C.constant ? Forward<S, P, false, true>{p}.run(parallel) : Forward<S, P, false, false>{p}.run(parallel);
}

}  // namespace

void selective_scan_fwd(const SelectiveScanParams& p, const Parallel& parallel) {
  if (p.dtype == DType::kFloat64)
    p.is_complex ? forward<double, 2>(p, parallel) : forward<double, 1>(p, parallel);
  else
    p.is_complex ? forward<float, 2>(p, parallel) : forward<float, 1>(p, parallel);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
