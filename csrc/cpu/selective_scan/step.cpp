// One token of the selective scan per batch entry, states in place. Lanes are states n: they are contiguous in memory, and there
// is one token only. A task is a run of channels of one batch entry.
#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

using Strides = SelectiveScanStepParams::Strides;

constexpr int64_t kRun = 64;  // channels of a task
// Fewer states than this are not worth waking another thread for.
constexpr int64_t kStatesPerThread = 1 << 16;

// dst[part][n] of the row of states at src; parts are `padded` apart.
template <class S, int P>
PYKERNELS_INLINE void load_row(S* dst, int64_t padded, DType dtype, const void* src, int64_t offset, int64_t stride, int64_t state) {
  for (int part = 0; part < P; ++part) load_tile(dst + part * padded, padded, dtype, src, offset + part, 0, stride, 1, state);
}

template <class S, int P>
void step(const SelectiveScanStepParams& p, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>;
  constexpr DType wide = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  const int64_t runs = (p.channels + kRun - 1) / kRun, padded = round_up(p.state, lanes);
  const bool in_place = P == 1 && p.states_stride.state == 1, a_in_place = P == 1 && p.A_stride.state == 1;
  Parallel worthwhile = parallel;
  worthwhile.threads = static_cast<int>(
      least<int64_t>(parallel.threads, 1 + p.batch * p.heads * p.channels * p.state * P / kStatesPerThread));
  run_tasks(worthwhile, p.batch * p.heads * runs, [&](TaskQueue& queue) {
    Scratch scratch;
    S* const b = scratch.take<S>(P * padded);
    S* const c = scratch.take<S>(P * padded);
    S* const a = scratch.take<S>(P * padded);
    S* const h = scratch.take<S>(P * padded);
    S* const dt = scratch.take<S>(kRun);
    S* const x = scratch.take<S>(kRun);
    S* const y = scratch.take<S>(kRun);
    S* const gate = scratch.take<S>(kRun);
    S* const parameter = scratch.take<S>(kRun);
    S* const sums = scratch.take<S>(kRun * lanes);  // C . h of each channel, over lanes
    fill(sums, kRun * lanes);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t batch = task / (p.heads * runs), head = task / runs % p.heads, first = task % runs * kRun;
      const int64_t count = least(kRun, p.channels - first), group = head / (p.heads / p.groups);
      const int64_t slot = p.state_indices != nullptr ? p.state_indices[batch] : batch;
      const auto offset = [&](const Strides& s) { return batch * s.batch + head * s.head + first * s.channel; };
      const auto put = [&] { store_tile(p.dtype, p.out, offset(p.out_stride), 0, p.out_stride.channel, y, kRun, 1, count); };
      if (slot < 0 || slot >= p.slots) {
        fill(y, kRun);
        put();
        continue;
      }
      load_row<S, P>(b, padded, p.B_dtype, p.B, batch * p.B_stride.batch + group * p.B_stride.head, p.B_stride.state, p.state);
      load_row<S, P>(c, padded, p.C_dtype, p.C, batch * p.C_stride.batch + group * p.C_stride.head, p.C_stride.state, p.state);
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
        for (int64_t i = 0; i < count; i += lanes) store(dt + i, softplus<S>(load(dt + i), exact_exp<S>(-abs<S>(load(dt + i)))));

      for (int64_t i = 0; i < count; ++i) {
        S* const states = static_cast<S*>(p.states) + slot * p.states_stride.batch + head * p.states_stride.head +
                          (first + i) * p.states_stride.channel;
        const int64_t a_offset = head * p.A_stride.head + (first + i) * p.A_stride.channel;
        const S* a_row = static_cast<const S*>(p.A) + a_offset;
        if (!a_in_place) load_row<S, P>(a, padded, wide, p.A, a_offset, p.A_stride.state, p.state), a_row = a;
        if (!in_place) load_row<S, P>(h, padded, wide, states, 0, p.states_stride.state, p.state);
        S* const h_row = in_place ? states : h;
        const Vec<S> dt_i = splat(dt[i]), rate = decay_rate<S>(dt_i), dtx = splat(dt[i] * x[i]);
        Vec<S> sum{};
        for (int64_t n = 0; n < p.state; n += lanes) {
          const int64_t left = p.state - n;
          const auto row = [&](const S* from) -> Number<S, P> {
            if constexpr (P == 1)
              return {load_upto(from + n, left)};
            else
              return {load_upto(from + n, left), load_upto(from + padded + n, left)};
          };
          const Number<S, P> next = multiply_add<S, P>(decay<S, P>(dt_i, rate, row(a_row)), row(h_row), scale<S, P>(dtx, row(b)));
          store_upto(h_row + n, next.re, left);
          if constexpr (P == 2) store_upto(h_row + padded + n, next.im, left);
          sum = real_multiply_add<S, P>(row(c), next, sum);
        }
        if (!in_place)
          for (int part = 0; part < P; ++part)
            for (int64_t n = 0; n < p.state; ++n) states[n * p.states_stride.state + part] = h[part * padded + n];
        store(sums + i * lanes, sum);
      }
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
