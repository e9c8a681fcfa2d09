// Causal depthwise convolution, forward, backward and step. See causal_conv1d.h for the maths and the layout.
//
// A task is some channels of one segment of tokens. It works through tiles staged in first-level cache as rows of one
// channel each, in the compute type, whatever the tensor's layout: vectors then run along tokens, and the taps are
// unaligned loads. Rows that lie in memory just so are used in place. Segments of one sequence are independent but for
// W - 1 tokens of overlap, which are read again.
//
// The gradients of weight and bias are summed per lane within a segment, over lanes at its end, then over segments in
// order: the result does not depend on the number of threads.
#include "../../include/pykernels/causal_conv1d.h"

#include <type_traits>

#include "../common/ahead.h"
#include "../common/pages.h"
#include "../common/scratch.h"
#include "../common/shares.h"
#include "../common/tile.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

constexpr int64_t kSegment = 4096;
// How far ahead the backward pass fetches its rows, in elements: they are short, and hardware stops at the ends of
// pages. A fifth of the time at D 1536, L 2048 on a Xeon with AMX.
constexpr int64_t kAhead = 1024;

// A task has `channels` channels, a tile `rows` of them and `block` tokens. Token-first tensors are transposed in tiles
// wide enough for whole cache lines; channel-first ones go row by row. Both tiles of the forward pass fit 32 KiB.
struct Tiling {
  int64_t channels, rows, block;
  explicit Tiling(const ChannelStrides& x) {
    if (x.token == 1)
      channels = 8, rows = 1, block = 2048;
    else
      channels = 64, rows = 64, block = 48;
  }
};

// What forward and backward share: where e, the state followed by x, is read from.
template <class S>
struct Input {
  const CausalConv1dParams& p;
  Segment segment;
  int64_t channel, rows;  // the task's first channel, and how many

  int64_t state_offset() const { return (segment.sequence * p.channels + channel) * (p.width - 1); }
  int64_t x_offset(int64_t t) const {
    return segment.batch * p.x_stride.batch + channel * p.x_stride.channel + (segment.start + t) * p.x_stride.token;
  }

  // dst[r * ld + i] = e at token from + i of the sequence, for from + i < to; zeros past its end and for a vector or
  // more after.
  void stage(S* dst, int64_t ld, int64_t from, int64_t to) const {
    const int64_t state = p.width - 1, end = least(to, segment.length), filled = most(end - from, int64_t{0});
    if (from < 0) {
      const int64_t count = least(-from, to - from);
      if (p.initial_state != nullptr)
        load_tile(dst, ld, p.dtype, p.initial_state, state_offset() + state + from, state, 1, rows, count);
      else
        for (int64_t r = 0; r < rows; ++r) clear(dst + r * ld, 0, count);
    }
    const int64_t first = most<int64_t>(from, 0);
    if (first < end)
      load_tile(dst + (first - from), ld, p.dtype, p.x, x_offset(first), p.x_stride.channel, p.x_stride.token, rows,
                end - first);
    const int64_t zeros = most(filled, from < 0 ? least(-from, to - from) : int64_t{0});
    for (int64_t r = 0; r < rows; ++r)
      clear(dst + r * ld, zeros, least(ld, round_up(to - from, kLanes<S>) + kLanes<S>));
  }

  static void clear(S* row, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) row[i] = 0;
  }
};

// y sigmoid(y) with a relative error of 2^-12.8 at most, where rounding to bf16 adds up to 2^-8: the time that the
// exact one takes shows.
PYKERNELS_INLINE Vec<float> rough_silu(Vec<float> y) {
#if defined(__AVX512F__)
  const Vec<float> x = y * static_cast<float>(-kLog2e);
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // 2^f for f in [-1/2, 1/2], minimax.
  const Vec<float> p = ((f * 5.517167e-2f + 2.4261112e-1f) * f + 6.9326099e-1f) * f + 9.9992807e-1f;
  const Vec<float> e = (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
  return y * (Vec<float>)_mm512_rcp14_ps((__m512)(e + 1.0f));
#else
  return y * sigmoid<float>(y);
#endif
}

// store_exact_upto of two whole vectors that follow one another.
template <class T>
PYKERNELS_INLINE void store_exact_pair(T* p, Vec<Wide<T>> first, Vec<Wide<T>> second) {
  constexpr int lanes = kLanes<Wide<T>>;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int denormal = 0x20;
    const __mmask16 a = _mm512_fpclass_ps_mask((__m512)first, denormal);
    const __mmask16 b = _mm512_fpclass_ps_mask((__m512)second, denormal);
    if (__builtin_expect(_kortestz_mask16_u8(a, b), 1)) {
      const __m512bh bits = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      __builtin_memcpy(p, &bits, sizeof(bits));
      return;
    }
  }
#endif
  store_exact_upto(p, first, lanes);
  store_exact_upto(p + lanes, second, lanes);
}

// Memory that the next row of an output is computed from and goes to.
struct Next {
  const char *in, *out;
};

// Width is a compile-time W for the common ones, whose taps then stay in registers; 0 for any.
template <class S, int W>
struct Convolution {
  static constexpr int lanes = kLanes<S>;
  int width;
  const S* weight;  // of one channel
  Vec<S> bias, taps[W != 0 ? W : 1];

  Convolution(const CausalConv1dParams& p, int64_t channel)
      : width(W != 0 ? W : static_cast<int>(p.width)),
        weight(static_cast<const S*>(p.weight) + channel * p.width),
        bias(splat(p.bias != nullptr ? static_cast<const S*>(p.bias)[channel] : S{0})) {
    for (int w = 0; w < W; ++w) taps[w] = splat(weight[w]);
  }
  PYKERNELS_INLINE Vec<S> tap(int w) const {
    if constexpr (W != 0)
      return taps[w];
    else
      return splat(weight[w]);
  }

  // bias + sum_w weight[w] e[i + w], for the vector at e
  PYKERNELS_INLINE Vec<S> at(const S* e) const {
    Vec<S> sum = bias;
#pragma GCC unroll 8
    for (int w = 0; w < (W != 0 ? W : width); ++w) sum = sum + load(e + w) * tap(w);
    return sum;
  }
  // result[i] = act(convolution at e + i), i < count; e is read to the next whole vector. Backwards: forwards, loads
  // would reach into the vector stored just before where both arrays lie alike within their pages, and processors wait
  // for the store then. Meanwhile it asks for what the next row will read and write: a row is short, and hardware stops
  // at the ends of pages.
  template <bool Silu, class T>
  void run(T* result, const S* e, int64_t count, const Next& next) const {
    const Convolution self = *this;  // not in memory that `result` might be
    int64_t i = count / lanes * lanes;
    if (i < count) store_exact_upto(result + i, activate<Silu, T>(self.at(e + i)), count - i);
    if (i % (2 * lanes) != 0) i -= lanes, store_exact_upto(result + i, activate<Silu, T>(self.at(e + i)), lanes);
    int64_t fetched = 0;
    for (i -= 2 * lanes; i >= 0; i -= 2 * lanes) {
      for (int64_t end = fetched + 2 * lanes * static_cast<int64_t>(sizeof(T)); fetched < end; fetched += 64)
        __builtin_prefetch(next.in + fetched), __builtin_prefetch(next.out + fetched, 1);
      const Vec<S> second = activate<Silu, T>(self.at(e + i + lanes)), first = activate<Silu, T>(self.at(e + i));
      store_exact_pair(result + i, first, second);
    }
  }
  // The same into a row of `dtype`.
  void run(bool silu, DType dtype, void* result, int64_t offset, const S* e, int64_t count, const Next& next) const {
    const auto into = [&](auto* row) {
      silu ? run<true>(row + offset, e, count, next) : run<false>(row + offset, e, count, next);
    };
    if (sizeof(S) == 8 || dtype == DType::kFloat32)
      into(static_cast<S*>(result));
    else if constexpr (sizeof(S) == 4)
      dtype == DType::kBFloat16 ? into(static_cast<BFloat16*>(result)) : into(static_cast<Float16*>(result));
  }
  // SiLU of what will be rounded to T.
  template <bool Silu, class T>
  static PYKERNELS_INLINE Vec<S> activate(Vec<S> y) {
    if constexpr (!Silu) return y;
    if constexpr (std::is_same_v<T, BFloat16>)
      return rough_silu(y);
    else
      return y * sigmoid<S>(y);
  }
  // dpre[i] = dout[i] times SiLU's slope at the convolution at e + i, i < count and to the next whole vector
  void activation_gradient(S* dpre, const S* dout, const S* e, int64_t count) const {
    const Convolution self = *this;
    for (int64_t i = 0; i < count; i += lanes) {
      __builtin_prefetch(e + i + kAhead), __builtin_prefetch(dout + i + kAhead);
      const Vec<S> y = self.at(e + i);
      store(dpre + i, load(dout + i) * silu_slope<S>(y, sigmoid<S>(y)));
    }
  }
  // dx[i], i < count, from dpre; what these tokens add to the sums over lanes: dweight, then dbias.
  void gradients(S* dx, S* sums, const S* dpre, const S* e, int64_t count) const {
    const Convolution self = *this;
    const auto valid = [&](int64_t i) { return load_upto(dpre + i, count - i); };
    if constexpr (W != 0) {
      Vec<S> dweight[W] = {}, dbias{};
      for (int64_t i = round_up(count, lanes) - lanes; i >= 0; i -= lanes) {
        store_upto(dx + i, self.transposed_at(dpre + i), count - i);
        const Vec<S> v = valid(i);
        dbias = dbias + v;
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) dweight[w] = dweight[w] + v * load(e + i + w);
      }
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) store(sums + w * lanes, load(sums + w * lanes) + dweight[w]);
      store(sums + W * lanes, load(sums + W * lanes) + dbias);
    } else {
      for (int64_t i = round_up(count, lanes) - lanes; i >= 0; i -= lanes)
        store_upto(dx + i, self.transposed_at(dpre + i), count - i);
      for (int w = 0; w <= width; ++w) {
        Vec<S> part{};
        for (int64_t i = 0; i < count; i += lanes) part = part + (w < width ? valid(i) * load(e + i + w) : valid(i));
        store(sums + w * lanes, load(sums + w * lanes) + part);
      }
    }
  }
  // sum_w weight[w] dpre[i + width - 1 - w]
  PYKERNELS_INLINE Vec<S> transposed_at(const S* dpre) const {
    Vec<S> sum{};
#pragma GCC unroll 8
    for (int w = 0; w < (W != 0 ? W : width); ++w) sum = sum + load(dpre + (width - 1 - w)) * tap(w);
    return sum;
  }
};

template <class S, int W>
void forward(const CausalConv1dParams& p, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>;
  const Segments segments(p.batch, p.length, p.cu_seqlens, p.sequences, kSegment);
  const Tiling tiling(p.x_stride);
  const int64_t tasks = (p.channels + tiling.channels - 1) / tiling.channels, state = p.width - 1;
  const int64_t ld = round_up(tiling.block + state, lanes) + lanes;
  constexpr DType kWide = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  const bool wide = p.dtype == kWide, rows_in = p.x_stride.token == 1, rows_out = p.out_stride.token == 1;
  const int64_t bytes = bytes_of(p.dtype);
  want_huge_pages(p.out, static_cast<size_t>(p.batch * p.channels * p.length * bytes));
  run_shares(parallel, segments.count() * tasks, [&](Share& share) {
    Scratch scratch;
    S* const e = scratch.take<S>(tiling.rows * ld);
    S* const out = scratch.take<S>(tiling.rows * tiling.block);
    for (int64_t task; (task = share.next()) >= 0;) {
      const Segment segment = segments[task / tasks];
      const bool inside = segments.belongs(segment);
      const int64_t first_channel = task % tasks * tiling.channels;
      const int64_t end_channel = least(first_channel + tiling.channels, p.channels);
      // After `count` tokens from t on, of one channel: those that follow, or the next channel's first.
      const auto next = [&](int64_t channel, int64_t t, int64_t count) -> Next {
        const bool onward = t + count < segment.last;
        const int64_t row = onward ? channel : channel + 1;
        const int64_t token = segment.start + (onward ? t + count : segment.first);
        const auto at = [&](const void* start, const ChannelStrides& s) {
          const int64_t offset = segment.batch * s.batch + row * s.channel + token * s.token;
          return static_cast<const char*>(start) + offset * bytes;
        };
        return {at(p.x, p.x_stride), at(p.out, p.out_stride)};
      };
      for (int64_t channel = first_channel; channel < end_channel; channel += tiling.rows) {
        const Input<S> input{p, segment, channel, least(tiling.rows, end_channel - channel)};
        for (int64_t t = segment.first, count; t < segment.last; t += count) {
          count = least(tiling.block, segment.last - t);
          // Rows of the compute type are read in place: all but the first tokens, which see the state, and a ragged
          // end.
          const bool staged = !wide || !rows_in || t < state || count < lanes;
          if (!staged)
            count = count / lanes * lanes;
          else if (wide && rows_in && t < state)
            count = least(count, round_up(state, lanes));
          const int64_t offset = segment.batch * p.out_stride.batch + channel * p.out_stride.channel +
                                 (segment.start + t) * p.out_stride.token;
          if (inside && staged) input.stage(e, ld, t - state, t + count);
          for (int64_t r = 0; r < input.rows; ++r) {
            const S* const row =
                staged ? e + r * ld : static_cast<const S*>(p.x) + input.x_offset(t - state) + r * p.x_stride.channel;
            if (!inside)
              Input<S>::clear(out + r * tiling.block, 0, count);
            else if (rows_out)
              Convolution<S, W>(p, channel + r)
                  .run(p.silu, p.dtype, p.out, offset + r * p.out_stride.channel, row, count,
                       next(channel + r, t, count));
            else
              Convolution<S, W>(p, channel + r)
                  .run(p.silu, kWide, out + r * tiling.block, 0, row, count,
                       {reinterpret_cast<const char*>(row), reinterpret_cast<const char*>(out)});
          }
          if (!inside || !rows_out)
            store_tile(p.dtype, p.out, offset, p.out_stride.channel, p.out_stride.token, out, tiling.block, input.rows,
                       count);
        }
        // The task of a sequence's first segment writes its final state.
        if (inside && segment.first == 0) {
          for (int64_t j = 0; j < state; j += tiling.block) {
            const int64_t count = least(tiling.block, state - j), from = segment.length - state + j;
            input.stage(e, ld, from, from + count);
            store_tile(p.dtype, p.final_state, input.state_offset() + j, state, 1, e, ld, input.rows, count);
          }
        }
      }
    }
  });
}

template <class S, int W>
void backward(const CausalConv1dBackwardParams& p, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>;
  const CausalConv1dParams& f = p.forward;
  const Segments segments(f.batch, f.length, f.cu_seqlens, f.sequences, kSegment);
  const Tiling tiling(f.x_stride);
  const int64_t block = tiling.block, state = f.width - 1, sums = f.width + 1;
  const int64_t tasks = (f.channels + tiling.channels - 1) / tiling.channels;
  const int64_t ld_dpre = round_up(block + state, lanes) + lanes, ld_e = ld_dpre + round_up(state, lanes);
  constexpr DType kWide = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  const bool wide = f.dtype == kWide, rows_out = wide && p.dx_stride.token == 1;
  const bool rows_in = wide && f.x_stride.token == 1 && p.dout_stride.token == 1;
  want_huge_pages(p.dx, static_cast<size_t>(f.batch * f.channels * f.length * bytes_of(f.dtype)));
  Scratch shared;
  S* const partial = shared.take<S>(segments.count() * f.channels * sums);  // of dweight, then dbias
  run_shares(parallel, segments.count() * tasks, [&](Share& share) {
    Scratch scratch;
    S* const e = scratch.take<S>(tiling.rows * ld_e);
    S* const dpre = scratch.take<S>(tiling.rows * ld_dpre);
    S* const dx = scratch.take<S>(tiling.rows * block);
    S* const sum = scratch.take<S>(tiling.rows * sums * lanes);
    S* const dstate = scratch.take<S>(tiling.rows * round_up(state, lanes));
    for (int64_t task; (task = share.next()) >= 0;) {
      const int64_t index = task / tasks, first_channel = task % tasks * tiling.channels;
      const Segment segment = segments[index];
      const bool inside = segments.belongs(segment);
      const int64_t end_channel = least(first_channel + tiling.channels, f.channels);
      for (int64_t channel = first_channel; channel < end_channel; channel += tiling.rows) {
        const Input<S> input{f, segment, channel, least(tiling.rows, end_channel - channel)};
        const int64_t rows = input.rows, length = segment.length;
        for (int64_t i = 0; i < rows * sums * lanes; ++i) sum[i] = 0;
        const auto strides_offset = [&](const ChannelStrides& s, int64_t t) {
          return segment.batch * s.batch + channel * s.channel + (segment.start + t) * s.token;
        };
        // dpre[r, i] = gradient of the convolution's result at token t + i, for i < count; zero past the sequence's
        // end.
        const auto stage_dpre = [&](int64_t t, int64_t count) {
          const int64_t valid = most<int64_t>(least(count, length - t), 0);
          if (valid > 0)
            load_tile(dpre, ld_dpre, f.dtype, p.dout, strides_offset(p.dout_stride, t), p.dout_stride.channel,
                      p.dout_stride.token, rows, valid);
          for (int64_t r = 0; r < rows; ++r) Input<S>::clear(dpre + r * ld_dpre, valid, ld_dpre);
          if (!f.silu) return;
          for (int64_t r = 0; r < rows; ++r) {
            S* const g = dpre + r * ld_dpre;
            Convolution<S, W>(f, channel + r).activation_gradient(g, g, e + r * ld_e, valid);
          }
        };
        for (int64_t t = segment.first, count; t < segment.last; t += count) {
          count = least(block, segment.last - t);
          // Rows of the compute type are read in place: all but the first tokens, which see the state, and the last,
          // past which there is nothing to read.
          const int64_t room = least(count, length - t - round_up(state, lanes)) / lanes * lanes;
          const bool staged = !rows_in || t < state || room < lanes;
          if (!staged)
            count = room;
          else if (rows_in && t < state)
            count = least(count, round_up(state, lanes));
          if (inside && staged) {
            input.stage(e, ld_e, t - state, t + count + state);
            stage_dpre(t, count + state);
          }
          for (int64_t r = 0; r < rows; ++r) {
            S* const result =
                rows_out ? static_cast<S*>(p.dx) + strides_offset(p.dx_stride, t) + r * p.dx_stride.channel
                         : dx + r * block;
            if (!inside) {
              Input<S>::clear(result, 0, count);
              continue;
            }
            const Convolution<S, W> convolution(f, channel + r);
            const S *x = e + r * ld_e, *g = dpre + r * ld_dpre;
            if (!staged) {
              x = static_cast<const S*>(f.x) + input.x_offset(t - state) + r * f.x_stride.channel;
              const S* const dout =
                  static_cast<const S*>(p.dout) + strides_offset(p.dout_stride, t) + r * p.dout_stride.channel;
              if (f.silu)
                convolution.activation_gradient(dpre + r * ld_dpre, dout, x, count + state);
              else
                g = dout;
            }
            convolution.gradients(result, sum + r * sums * lanes, g, x, count);
            // Tokens that the final state holds.
            if (p.dfinal_state != nullptr && state > 0 && t + count > length - state) {
              const int64_t first = most(t, length - state);
              load_tile(dstate, round_up(state, lanes), f.dtype, p.dfinal_state, input.state_offset() + r * state,
                        state, 1, 1, state);
              for (int64_t i = first; i < t + count; ++i) result[i - t] += dstate[i - (length - state)];
            }
          }
          if (!rows_out)
            store_tile(f.dtype, p.dx, strides_offset(p.dx_stride, t), p.dx_stride.channel, p.dx_stride.token, dx,
                       block, rows, count);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t w = 0; w < sums; ++w)
            partial[(index * f.channels + channel + r) * sums + w] = reduce_add<S>(load(sum + (r * sums + w) * lanes));

        // The task of a sequence's first segment writes the initial state's gradient: e's entries before the first
        // token.
        if (inside && segment.first == 0 && state > 0 && p.dinitial_state != nullptr) {
          const int64_t ld = round_up(state, lanes);
          if (p.dfinal_state != nullptr)
            load_tile(dstate, ld, f.dtype, p.dfinal_state, input.state_offset(), state, 1, rows, state);
          for (int64_t r = 0; r < rows; ++r) {
            S* const d = dstate + r * ld;
            // Entry j of the final state is entry length + j of e.
            for (int64_t j = state - 1; j >= 0; --j)
              d[j] = p.dfinal_state != nullptr && j >= length ? d[j - length] : S{0};
          }
          for (int64_t t = 0; t < state; t += block) {
            const int64_t count = least(block, state - t);
            input.stage(e, ld_e, t - state, t + count);
            stage_dpre(t, count);
            for (int64_t r = 0; r < rows; ++r) {
              const S* const weight = static_cast<const S*>(f.weight) + (channel + r) * f.width;
              for (int64_t j = t; j < state; ++j)
                for (int64_t i = t; i < t + count && i <= j; ++i)
                  dstate[r * ld + j] += weight[j - i] * dpre[r * ld_dpre + i - t];
            }
          }
          store_tile(f.dtype, p.dinitial_state, input.state_offset(), state, 1, dstate, ld, rows, state);
        }
      }
    }
  });
  run_tasks(parallel, tasks, [&](TaskQueue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;)
      for (int64_t d = task * tiling.channels; d < least(f.channels, (task + 1) * tiling.channels); ++d)
        for (int64_t w = 0; w < sums; ++w) {
          S total = 0;
          for (int64_t i = 0; i < segments.count(); ++i) total += partial[(i * f.channels + d) * sums + w];
          if (w < f.width)
            static_cast<S*>(p.dweight)[d * f.width + w] = total;
          else
            static_cast<S*>(p.dbias)[d] = total;
        }
  });
}

// One token of `count` channels whose states follow one another: lanes are channels.
template <int W, class T, class P>
void step_in_place(T* out, T* state, const T* x, const P* weight, const P* bias, bool silu, int64_t count) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  for (int64_t i = 0; i < count; i += lanes, state += (W - 1) * lanes, weight += W * lanes) {
    const int64_t left = count - i;
    Vec<S> e[W - 1], taps[W], y = bias != nullptr ? load_upto(bias + i, left) : Vec<S>{};
#pragma GCC unroll 4
    for (int w = 0; w < W - 1; ++w) e[w] = load_upto(state + w * lanes, left * (W - 1) - w * lanes);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) taps[w] = load_upto(weight + w * lanes, left * W - w * lanes);
    const Vec<S> newest = load_upto(x + i, left);
    deinterleave(e), deinterleave(taps);
#pragma GCC unroll 4
    for (int w = 0; w < W - 1; ++w) y = y + e[w] * taps[w];
    y = y + newest * taps[W - 1];
    if (silu) y = y * sigmoid<S>(y);
    store_exact_upto(out + i, y, left);
#pragma GCC unroll 4
    for (int w = 0; w < W - 2; ++w) e[w] = e[w + 1];
    e[W - 2] = newest;
    interleave(e);
#pragma GCC unroll 4
    for (int w = 0; w < W - 1; ++w) store_exact_upto(state + w * lanes, e[w], left * (W - 1) - w * lanes);
  }
}

// `count` channels of the state `slot` and of batch entry b by step_in_place, if they lie in memory as it takes them;
// -> whether so.
template <class S, class T>
bool step_in_place(const CausalConv1dStepParams& p, int64_t b, int64_t slot, int64_t channel, int64_t count) {
  const int64_t width = p.width;
  if (p.tokens != 1 || width < 2 || width > 4 || p.x_stride.channel != 1 || p.state_stride.channel != width - 1 ||
      (p.state_stride.token != 1 && width > 2))
    return false;
  constexpr DType kWide = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  const auto with = [&]<class P>(const P* weight, const P* bias) {
    const auto run = [&](auto function) {
      function(static_cast<T*>(p.out) + b * p.out_stride.batch + channel * p.out_stride.channel,
               static_cast<T*>(p.state) + slot * p.state_stride.batch + channel * (width - 1),
               static_cast<const T*>(p.x) + b * p.x_stride.batch + channel, weight + channel * width,
               bias == nullptr ? bias : bias + channel, p.silu, count);
    };
    run(width == 2 ? step_in_place<2, T, P> : width == 3 ? step_in_place<3, T, P> : step_in_place<4, T, P>);
  };
  if (p.bias != nullptr && p.bias_dtype != p.weight_dtype) return false;
  if (p.weight_dtype == kWide)
    with(static_cast<const S*>(p.weight), static_cast<const S*>(p.bias));
  else
    with(static_cast<const T*>(p.weight), static_cast<const T*>(p.bias));
  return true;
}

// Tokens are taken one by one, each shifting the taps kept in scratch; lanes are channels here too.
template <class S>
void step(const CausalConv1dStepParams& p, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>;
  constexpr int64_t block = 64;  // channels of a task
  const int64_t tiles = (p.channels + block - 1) / block, state = p.width - 1;
  // A few microseconds of work, and more than it takes to hand them to a thread that spins.
  constexpr int64_t kProductsPerThread = 1 << 14;
  Parallel worthwhile = parallel;
  worthwhile.threads = static_cast<int>(
      least<int64_t>(parallel.threads, 1 + p.batch * p.tokens * p.channels * p.width / kProductsPerThread));
  run_shares(worthwhile, p.batch * tiles, [&](Share& share) {
    Scratch scratch;
    // Row j of e is token j: the state, then the new ones.
    S* const e = scratch.take<S>((state + p.tokens) * block);
    S* const weight = scratch.take<S>(p.width * block);
    S* const bias = scratch.take<S>(block);
    S* const out = scratch.take<S>(p.tokens * block);
    for (int64_t task; (task = share.next()) >= 0;) {
      const int64_t b = task / tiles, channel = task % tiles * block, count = least(block, p.channels - channel);
      const int64_t slot = p.state_indices != nullptr ? p.state_indices[b] : b;
      const bool valid = slot >= 0 && slot < p.slots;
      const int64_t state_offset = slot * p.state_stride.batch + channel * p.state_stride.channel;
      if (valid) {
        const auto in_place = [&]<class T>(T*) { return step_in_place<S, T>(p, b, slot, channel, count); };
        if (for_dtype<S>(p.dtype, in_place)) continue;
        load_tile(e, block, p.dtype, p.state, state_offset, p.state_stride.token, p.state_stride.channel, state, count);
        load_tile(e + state * block, block, p.dtype, p.x, b * p.x_stride.batch + channel * p.x_stride.channel,
                  p.x_stride.token, p.x_stride.channel, p.tokens, count);
        load_tile(weight, block, p.weight_dtype, p.weight, channel * p.width, 1, p.width, p.width, count);
        if (p.bias != nullptr)
          load_tile(bias, block, p.bias_dtype, p.bias, channel, 0, 1, 1, count);
        else
          for (int64_t i = 0; i < block; ++i) bias[i] = 0;
      }
      for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t i = 0; i < count; i += lanes) {
          Vec<S> y{};
          if (valid) {
            y = load(bias + i);
            for (int64_t w = 0; w < p.width; ++w) y = y + load(e + (t + w) * block + i) * load(weight + w * block + i);
            if (p.silu) y = y * sigmoid<S>(y);
          }
          store(out + t * block + i, y);
        }
      store_tile(p.dtype, p.out, b * p.out_stride.batch + channel * p.out_stride.channel, p.out_stride.token,
                 p.out_stride.channel, out, block, p.tokens, count);
      if (valid)
        store_tile(p.dtype, p.state, state_offset, p.state_stride.token, p.state_stride.channel, e + p.tokens * block,
                   block, state, count);
    }
  });
}

template <class S>
void forward_any(const CausalConv1dParams& p, const Parallel& parallel) {
  switch (p.width) {
    case 2:
      return forward<S, 2>(p, parallel);
    case 3:
      return forward<S, 3>(p, parallel);
    case 4:
      return forward<S, 4>(p, parallel);
    default:
      return forward<S, 0>(p, parallel);
  }
}
template <class S>
void backward_any(const CausalConv1dBackwardParams& p, const Parallel& parallel) {
  switch (p.forward.width) {
    case 2:
      return backward<S, 2>(p, parallel);
    case 3:
      return backward<S, 3>(p, parallel);
    case 4:
      return backward<S, 4>(p, parallel);
    default:
      return backward<S, 0>(p, parallel);
  }
}

}  // namespace

void causal_conv1d_fwd(const CausalConv1dParams& p, const Parallel& parallel) {
  p.dtype == DType::kFloat64 ? forward_any<double>(p, parallel) : forward_any<float>(p, parallel);
}
void causal_conv1d_bwd(const CausalConv1dBackwardParams& p, const Parallel& parallel) {
  p.forward.dtype == DType::kFloat64 ? backward_any<double>(p, parallel) : backward_any<float>(p, parallel);
}
void causal_conv1d_step(const CausalConv1dStepParams& p, const Parallel& parallel) {
  p.dtype == DType::kFloat64 ? step<double>(p, parallel) : step<float>(p, parallel);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
