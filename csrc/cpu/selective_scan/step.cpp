// One token of the selective scan per batch entry, states in place. Lanes are states n: they are contiguous in memory,
// and there is one token only. A task is a run of channels of one batch entry.
#include "../common/shares.h"
#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

using Strides = SelectiveScanStepParams::Strides;

constexpr int64_t kRun = 64;  // channels of a task
constexpr int kUsual = 16;     // states of a channel, as most models have them
// Channels whose states are asked for ahead of the one at hand: hardware does so within a page alone, and a model's
// states outgrow the second-level cache from one token to the next.
constexpr int64_t kAhead = 32;
// Fewer states than this, 4 us of work, are not worth handing to another thread. It takes a microsecond or two where
// threads spin between parallel regions, as torch's do for milliseconds, and 80 where they sleep
// (OMP_WAIT_POLICY=passive).
constexpr int64_t kStatesPerThread = 1 << 13;

// dst[part][n] of the row of states at src; parts are `padded` apart.
template <class S, int P>
PYKERNELS_INLINE void load_row(S* dst, int64_t padded, DType dtype, const void* src, int64_t offset, int64_t stride,
                               int64_t state) {
  for (int part = 0; part < P; ++part)
    load_tile(dst + part * padded, padded, dtype, src, offset + part, 0, stride, 1, state);
}

// One channel's states h, in place, given its row of A; -> C . h over lanes. Parts of complex rows are `padded` apart.
// dt, rate = decay_rate(dt) and dtx = dt x are the channel's.
template <class S, int P>
PYKERNELS_INLINE Vec<S> advance(S* h, const S* a, const S* b, const S* c, int64_t padded, int64_t state, S dt, S rate,
                                S dtx) {
  constexpr int lanes = kLanes<S>;
  Vec<S> sum{};
  const auto vector = [&](int64_t n, int64_t left) __attribute__((always_inline)) {
    const auto row = [&](const S* from) -> Number<S, P> {
      if constexpr (P == 1)
        return {load_upto(from + n, left)};
      else
        return {load_upto(from + n, left), load_upto(from + padded + n, left)};
    };
    const Number<S, P> input = scale<S, P>(splat(dtx), row(b));
    const Number<S, P> next = multiply_add<S, P>(decay<S, P>(splat(dt), splat(rate), row(a)), row(h), input);
    store_upto(h + n, next.re, left);
    if constexpr (P == 2) store_upto(h + padded + n, next.im, left);
    sum = real_multiply_add<S, P>(row(c), next, sum);
  };
  int64_t n = 0;
  for (; n + lanes <= state; n += lanes) vector(n, lanes);
  if (n < state) vector(n, state - n);
  return sum;
}

// The real states of `count` channels where they lie. State is their number at compile time, 0 for any.
template <class S, int State>
void advance_in_place(S* h, int64_t h_stride, const S* a, int64_t a_stride, const S* b, const S* c, const S* rate,
                      const S* dtx, S* sums, int64_t count, int64_t state) {
  // not in memory that h might be: they stay in registers
  S own_b[State != 0 ? State : 1], own_c[State != 0 ? State : 1];
  if constexpr (State != 0) {
    state = State;
    for (int n = 0; n < State; ++n) own_b[n] = b[n], own_c[n] = c[n];
    b = own_b, c = own_c;
  }
  for (int64_t i = 0; i < count; ++i, h += h_stride, a += a_stride) {
    for (int64_t n = 0; n < state; n += 64 / static_cast<int64_t>(sizeof(S)))
      __builtin_prefetch(h + kAhead * h_stride + n, 1), __builtin_prefetch(a + kAhead * a_stride + n);
    store(sums + i * kLanes<S>, advance<S, 1>(h, a, b, c, 0, state, S{}, rate[i], dtx[i]));
  }
}

template <class S, int P>
void step(const SelectiveScanStepParams& p, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>;
  constexpr DType wide = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  const int64_t runs = (p.channels + kRun - 1) / kRun, padded = round_up(p.state, lanes);
  const bool in_place = P == 1 && p.states_stride.state == 1 && p.A_stride.state == 1;
  Parallel worthwhile = parallel;
  worthwhile.threads = static_cast<int>(
      least<int64_t>(parallel.threads, 1 + p.batch * p.heads * p.channels * p.state * P / kStatesPerThread));
  run_shares(worthwhile, p.batch * p.heads * runs, [&](Share& share) {
    Scratch scratch;
    S* const b = scratch.take<S>(P * padded);
    S* const c = scratch.take<S>(P * padded);
    S* const a = scratch.take<S>(P * padded);
    S* const h = scratch.take<S>(P * padded);
    S* const dt = scratch.take<S>(kRun);
    S* const rate = scratch.take<S>(kRun);
    S* const dtx = scratch.take<S>(kRun);
    S* const x = scratch.take<S>(kRun);
    S* const y = scratch.take<S>(kRun);
    S* const gate = scratch.take<S>(kRun);
    S* const parameter = scratch.take<S>(kRun);
    S* const sums = scratch.take<S>(kRun * lanes);  // C . h of each channel, over lanes
    for (int64_t task; (task = share.next()) >= 0;) {
      const int64_t batch = task / (p.heads * runs), head = task / runs % p.heads, first = task % runs * kRun;
      const int64_t count = least(kRun, p.channels - first), group = head / (p.heads / p.groups);
      const int64_t slot = p.state_indices != nullptr ? p.state_indices[batch] : batch;
      const auto offset = [&](const Strides& s) { return batch * s.batch + head * s.head + first * s.channel; };
      const auto put = [&] {
        store_tile(p.dtype, p.out, offset(p.out_stride), 0, p.out_stride.channel, y, kRun, 1, count);
      };
      if (slot < 0 || slot >= p.slots) {
        fill(y, kRun);
        put();
        continue;
      }
      load_row<S, P>(b, padded, p.B_dtype, p.B, batch * p.B_stride.batch + group * p.B_stride.head, p.B_stride.state,
                     p.state);
      load_row<S, P>(c, padded, p.C_dtype, p.C, batch * p.C_stride.batch + group * p.C_stride.head, p.C_stride.state,
                     p.state);
      const auto gather = [&](S* dst, DType dtype, const void* src, const Strides& s) {
        load_tile(dst, kRun, dtype, src, offset(s), 0, s.channel, 1, count);
      };
      gather(dt, p.delta_dtype, p.delta, p.delta_stride);
      gather(x, p.dtype, p.x, p.x_stride);
      if (p.z != nullptr) gather(gate, p.dtype, p.z, p.z_stride);
      if (p.delta_bias != nullptr) {
        gather(parameter, p.delta_bias_dtype, p.delta_bias, p.delta_bias_stride);
        for (int64_t i = 0; i < count; i += lanes) store(dt + i, load(dt + i) + load(parameter + i));
      }
      if (p.delta_softplus)
        for (int64_t i = 0; i < count; i += lanes)
          store(dt + i, softplus<S>(load(dt + i), exact_exp<S>(-abs<S>(load(dt + i)))));
      for (int64_t i = 0; i < count; i += lanes) {
        store(rate + i, decay_rate<S>(load(dt + i)));
        store(dtx + i, load(dt + i) * load(x + i));
      }

      S* const states = static_cast<S*>(p.states) + slot * p.states_stride.batch + head * p.states_stride.head +
                        first * p.states_stride.channel;
      const int64_t a_offset = head * p.A_stride.head + first * p.A_stride.channel;
      if (in_place) {
        const auto run = [&](auto function) {
          function(states, p.states_stride.channel, static_cast<const S*>(p.A) + a_offset, p.A_stride.channel, b, c,
                   rate, dtx, sums, count, p.state);
        };
        run(p.state == kUsual ? advance_in_place<S, kUsual> : advance_in_place<S, 0>);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          S* const row = states + i * p.states_stride.channel;
          load_row<S, P>(a, padded, wide, p.A, a_offset + i * p.A_stride.channel, p.A_stride.state, p.state);
          load_row<S, P>(h, padded, wide, row, 0, p.states_stride.state, p.state);
          store(sums + i * lanes, advance<S, P>(h, a, b, c, padded, p.state, dt[i], rate[i], dtx[i]));
          for (int part = 0; part < P; ++part)
            for (int64_t n = 0; n < p.state; ++n) row[n * p.states_stride.state + part] = h[part * padded + n];
        }
      }
      fill(sums + count * lanes, (round_up(count, lanes) - count) * lanes);
      if (p.D != nullptr) gather(parameter, p.D_dtype, p.D, p.D_stride);
      for (int64_t i = 0; i < count; i += lanes) {
        Vec<S> rows[lanes];
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) rows[j] = load(sums + (i + j) * lanes);
        Vec<S> result = reduce_add_each(rows) * static_cast<S>(P);
        if (p.D != nullptr) result = result + load(parameter + i) * load(x + i);
        if (p.z != nullptr) result = result * (load(gate + i) * sigmoid<S>(load(gate + i)));
        store(y + i, result);
      }
      put();
    }
  });
}

}  // namespace

void selective_scan_step(const SelectiveScanStepParams& p, const Parallel& parallel) {
  if (p.dtype == DType::kFloat64)
    p.is_complex ? step<double, 2>(p, parallel) : step<double, 1>(p, parallel);
  else
    p.is_complex ? step<float, 2>(p, parallel) : step<float, 1>(p, parallel);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
