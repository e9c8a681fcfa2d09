// Selective scan, forward. A task is one tile of channels of one sequence, which it walks through chunk by chunk. Within a
// chunk the states are taken in blocks that stay in registers over all its tokens; each adds its C . h to y.
#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

// States of a block: half of AVX-512's registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 16;
#else
constexpr int kBlock = 8;
#endif

// y[t] += C_t . h_t and h advanced over `count` tokens, for states of a block. b and c point at the block's first state; their
// rows are `b_row` apart (0 when constant). Each token fetches some of the lines ahead.
template <class S, int P, int Block, bool BConstant, bool CConstant>
__attribute__((noinline)) void scan_block(int64_t count, const S* dt, const S* rate, const S* dtu, const S* a, const S* b,
                                          int64_t b_row, const S* c, int64_t c_row, S* h_memory, S* y,
                                          Ahead::Part ahead) {
  constexpr int lanes = kLanes<S>, step = P * lanes, sums = Block < 4 ? Block : 4;
  Number<S, P> h[Block];
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) h[n] = load_number<S, P>(h_memory + n * step);
  for (int64_t t = 0; t < count; ++t) {
    ahead.fetch(t);
    const Vec<S> dt_t = load(dt + t * lanes), rate_t = load(rate + t * lanes), dtu_t = load(dtu + t * lanes);
    Vec<S> sum[sums] = {};  // several, so that their additions overlap
#pragma GCC unroll 16
    for (int n = 0; n < Block; ++n) {
      const Number<S, P> b_n = BConstant ? load_number<S, P>(b + n * step) : broadcast_number<S, P>(b + n * P);
      const Number<S, P> c_n = CConstant ? load_number<S, P>(c + n * step) : broadcast_number<S, P>(c + n * P);
      const Number<S, P> input = scale<S, P>(dtu_t, b_n);
      h[n] = multiply_add<S, P>(decay<S, P>(dt_t, rate_t, load_number<S, P>(a + n * step)), h[n], input);
      sum[n % sums] = real_multiply_add<S, P>(c_n, h[n], sum[n % sums]);
    }
    Vec<S> total = sum[0];
#pragma GCC unroll 4
    for (int i = 1; i < sums; ++i) total = total + sum[i];
    store(y + t * lanes, load(y + t * lanes) + total);
    b += b_row;
    c += c_row;
  }
#pragma GCC unroll 16
  for (int n = 0; n < Block; ++n) store_number<S, P>(h_memory + n * step, h[n]);
}

template <class S, int P, bool BConstant, bool CConstant>
void forward(const SelectiveScanParams& p, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>, kWide = P == 1 ? kBlock : 4;
  const Segments segments(p.batch, p.length, p.cu_seqlens, p.sequences, kChunk);
  const ChannelTiles<S> tiles(p);
  const int64_t rows = p.state * P, row = projection_row<S>(rows), blocks = count_blocks<kWide>(p.state);
  const int64_t sequences = p.cu_seqlens != nullptr ? p.sequences + 1 : p.batch;  // the last packed one: tokens of none
  want_huge_pages(p.out, static_cast<size_t>(p.batch * p.channels * p.length * bytes_of(p.dtype)));
  run_tasks(parallel, sequences * tiles.count, [&](TaskQueue& queue) {
    Scratch scratch;
    S* const u = scratch.take<S>(kChunk * lanes);
    S* const dt = scratch.take<S>(kChunk * lanes);
    S* const rate = scratch.take<S>(kChunk * lanes);
    S* const dtu = scratch.take<S>(kChunk * lanes);
    S* const y = scratch.take<S>(kChunk * lanes);
    S* const z = scratch.take<S>(kChunk * lanes);
    S* const a = scratch.take<S>(rows * lanes);
    S* const h = scratch.take<S>(rows * lanes);
    S* const b = scratch.take<S>(BConstant ? rows * lanes : kChunk * row);
    S* const c = scratch.take<S>(CConstant ? rows * lanes : kChunk * row);
    Ahead ahead(scratch.take<const char*>(Ahead::room(4 * lines_of_tokens<S>(), kChunk)));
    // Of the chunks that a sequence owns but does not need, so that the tensor is the same in every run.
    const auto clear_chunk_states = [&](int64_t index, int64_t sequence, const Tile& tile, S* zeros) {
      if (p.chunk_states == nullptr) return;
      fill(zeros, rows * lanes);
      for (; index < segments.end_of(sequence); ++index) store_chunk_state<S, P>(p, index, tile, zeros);
    };
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t sequence = task / tiles.count;
      const Tile tile = tiles[task % tiles.count];
      int64_t index = segments.first_of(sequence);
      const Segment segment = segments.at(sequence, 0);
      if (!segments.belongs(segment)) {
        fill(y, kChunk * lanes);
        for (int64_t t = 0; t < segment.length; t += kChunk)
          store_tokens(p.dtype, p.out, p.out_stride, tile, segment.batch, segment.start + t, least(kChunk, segment.length - t), y);
        clear_chunk_states(index, sequence, tile, h);
        continue;
      }
      const Vec<S> skip = load_channels<S>(p.D, tile), bias = load_channels<S>(p.delta_bias, tile);
      load_states(a, p.A, 0, tile, rows);
      if constexpr (BConstant) load_states(b, p.B.data, 0, tile, rows);
      if constexpr (CConstant) load_states(c, p.C.data, 0, tile, rows);
      if (p.initial_state != nullptr)
        load_states(h, p.initial_state, sequence * p.channels, tile, rows);
      else
        fill(h, rows * lanes);
      for (int64_t first = 0; first < segment.length || first == 0; first += kChunk, ++index) {
        const int64_t count = least(kChunk, segment.length - first), start = segment.start + first;
        if (count <= 0) break;
        if (p.chunk_states != nullptr) store_chunk_state<S, P>(p, index, tile, h);
        load_tokens(u, p.dtype, p.u, p.u_stride, tile, segment.batch, start, count);
        load_tokens(dt, p.delta_dtype, p.delta, p.delta_stride, tile, segment.batch, start, count);
        if (p.z != nullptr) load_tokens(z, p.dtype, p.z, p.z_stride, tile, segment.batch, start, count);
        if constexpr (!BConstant) load_projection<S, P>(b, p.B, segment.batch, tile.group, start, count, p.state);
        if constexpr (!CConstant) load_projection<S, P>(c, p.C, segment.batch, tile.group, start, count, p.state);
        for (int64_t i = 0; i < count * lanes; i += lanes) {
          Vec<S> step = load(dt + i) + bias;
          if (p.delta_softplus) step = softplus<S>(step, exact_exp<S>(-abs<S>(step)));
          store(dt + i, step);
          store(rate + i, decay_rate<S>(step));
          store(dtu + i, step * load(u + i));
          store(y + i, Vec<S>{});
        }
        ahead.clear();
        if (const int64_t next = start + count, tokens = least(kChunk, segment.length - first - count); tokens > 0) {
          add_tokens(ahead, p.dtype, p.u, p.u_stride, tile, segment.batch, next, tokens);
          add_tokens(ahead, p.delta_dtype, p.delta, p.delta_stride, tile, segment.batch, next, tokens);
          if (p.z != nullptr) add_tokens(ahead, p.dtype, p.z, p.z_stride, tile, segment.batch, next, tokens);
          add_tokens(ahead, p.dtype, p.out, p.out_stride, tile, segment.batch, next, tokens);
        }
        ahead.deal(blocks, count);
        int64_t block = 0;
        for_blocks<kWide>(p.state, [&]<int Block>(int64_t n) {
          scan_block<S, P, Block, BConstant, CConstant>(count, dt, rate, dtu, a + n * P * lanes,
                                                        b + n * P * (BConstant ? lanes : 1), BConstant ? 0 : row,
                                                        c + n * P * (CConstant ? lanes : 1), CConstant ? 0 : row,
                                                        h + n * P * lanes, y, ahead.part(block++));
        });
        for (int64_t i = 0; i < count * lanes; i += lanes) {
          Vec<S> result = load(y + i) * static_cast<S>(P) + skip * load(u + i);
          if (p.z != nullptr) result = result * (load(z + i) * sigmoid<S>(load(z + i)));
          store(y + i, result);
        }
        store_tokens(p.dtype, p.out, p.out_stride, tile, segment.batch, start, count, y);
      }
      store_states(p.final_state, sequence * p.channels, tile, h, rows);
      clear_chunk_states(index, sequence, tile, h);
    }
  });
}

template <class S, int P>
void forward_projections(const SelectiveScanParams& p, const Parallel& parallel) {
  if (p.B.constant)
    p.C.constant ? forward<S, P, true, true>(p, parallel) : forward<S, P, true, false>(p, parallel);
  else
    p.C.constant ? forward<S, P, false, true>(p, parallel) : forward<S, P, false, false>(p, parallel);
}

}  // namespace

void selective_scan_fwd(const SelectiveScanParams& p, const Parallel& parallel) {
  if (p.dtype == DType::kFloat64)
    p.is_complex ? forward_projections<double, 2>(p, parallel) : forward_projections<double, 1>(p, parallel);
  else
    p.is_complex ? forward_projections<float, 2>(p, parallel) : forward_projections<float, 1>(p, parallel);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
