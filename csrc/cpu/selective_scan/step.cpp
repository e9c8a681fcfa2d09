// One token of the selective scan per batch entry, states in place. Lanes are states n: they are contiguous in memory, and there
// is one token only. A task is a run of channels of one batch entry.
#include "scan.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace {

// One scalar of a dtype known at run time.
template <class S>
PYKERNELS_INLINE S load_scalar(DType dtype, const void* p, int64_t i) {
  if constexpr (sizeof(S) == 8) return static_cast<const double*>(p)[i];
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kBFloat16) return static_cast<S>(to_float(static_cast<const BFloat16*>(p)[i]));
  return static_cast<S>(to_float(static_cast<const Float16*>(p)[i]));
}
template <class S>
PYKERNELS_INLINE void store_scalar(DType dtype, void* p, int64_t i, S x) {
  if constexpr (sizeof(S) == 8) {
    static_cast<double*>(p)[i] = x;
  } else if (dtype == DType::kFloat32) {
    static_cast<float*>(p)[i] = x;
  } else if (dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(p)[i] = from_float<BFloat16>(x);
  } else {
    static_cast<Float16*>(p)[i] = from_float<Float16>(x);
  }
}

using Strides = SelectiveScanStepParams::Strides;

constexpr int64_t kRun = 64;  // channels of a task

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
  run_tasks(parallel, p.batch * p.heads * runs, [&](TaskQueue& queue) {
    Scratch scratch;
    S* const b = scratch.take<S>(P * padded);
    S* const c = scratch.take<S>(P * padded);
    S* const a = scratch.take<S>(P * padded);
    S* const h = scratch.take<S>(P * padded);
    S* const dt = scratch.take<S>(kRun);
    S* const x = scratch.take<S>(kRun);
    S* const y = scratch.take<S>(kRun);
    S* const gate = scratch.take<S>(kRun);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t batch = task / (p.heads * runs), head = task / runs % p.heads, first = task % runs * kRun;
      const int64_t count = least(kRun, p.channels - first), group = head / (p.heads / p.groups);
      const int64_t slot = p.state_indices != nullptr ? p.state_indices[batch] : batch;
      const auto offset = [&](const Strides& s) { return batch * s.batch + head * s.head + first * s.channel; };
      if (slot < 0 || slot >= p.slots) {
        for (int64_t i = 0; i < count; ++i) store_scalar<S>(p.dtype, p.out, offset(p.out_stride) + i * p.out_stride.channel, 0);
        continue;
      }
      load_row<S, P>(b, padded, p.B_dtype, p.B, batch * p.B_stride.batch + group * p.B_stride.head, p.B_stride.state, p.state);
      load_row<S, P>(c, padded, p.C_dtype, p.C, batch * p.C_stride.batch + group * p.C_stride.head, p.C_stride.state, p.state);
      fill(dt, kRun), fill(x, kRun), fill(gate, kRun);
      const auto gather = [&](S* dst, DType dtype, const void* src, const Strides& s) {
        for (int64_t i = 0; i < count; ++i) dst[i] = load_scalar<S>(dtype, src, offset(s) + i * s.channel);
      };
      gather(dt, p.delta_dtype, p.delta, p.delta_stride);
      gather(x, p.dtype, p.x, p.x_stride);
      if (p.z != nullptr) gather(gate, p.dtype, p.z, p.z_stride);
      const auto parameter = [&](const void* src, const Strides& s, int64_t i) {
        return static_cast<const S*>(src)[head * s.head + (first + i) * s.channel];
      };
      if (p.delta_bias != nullptr)
        for (int64_t i = 0; i < count; ++i) dt[i] += parameter(p.delta_bias, p.delta_bias_stride, i);
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
        y[i] = reduce_add<S>(sum) * static_cast<S>(P);
        if (p.D != nullptr) y[i] += parameter(p.D, p.D_stride, i) * x[i];
      }
      if (p.z != nullptr)
        for (int64_t i = 0; i < count; i += lanes) store(y + i, load(y + i) * (load(gate + i) * sigmoid<S>(load(gate + i))));
      for (int64_t i = 0; i < count; ++i) store_scalar<S>(p.dtype, p.out, offset(p.out_stride) + i * p.out_stride.channel, y[i]);
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
