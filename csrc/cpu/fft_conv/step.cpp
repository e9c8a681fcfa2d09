// One token of a causal convolution, and the spectra that are kept for many calls.
#include "blocks.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {
namespace {

// So many multiplications are worth waking another thread for.
constexpr int64_t kWorkPerThread = 1 << 17;

template <class S>
void make_spectra(const FFTConvSpectrumParams& s, const Parallel& parallel) {
  constexpr int lanes = kLanes<S>;
  const FFTConvParams& p = s.forward;
  const Taps taps(p);
  const Way way = s.points ? Way{false, false, s.points, 0, 0, 1} : choose_way<S>(taps, kManyRows, true);
  const int64_t size = kernel_numbers<S>(taps, way);
  *s.lanes = lanes, *s.size = size;
  if (!s.spectrum) return;
  run_tasks(parallel, p.groups, [&](TaskQueue& queue) {
    Scratch scratch;
    S* const w = scratch.take<S>(taps.count() + lanes);
    S* const work = scratch.take<S>(way.direct || way.blocked ? 1 : size);
    for (int64_t group; (group = queue.next()) >= 0;) {
      S* const spectrum = static_cast<S*>(s.spectrum) + group * size;
      gather_taps(p, taps, group, way.direct ? spectrum : w);
      if (way.direct) continue;
      for (int64_t i = 0; i < size; ++i) spectrum[i] = 0;  // what lies between the parts is never read, but is copied
      if (!way.blocked)
        kernel_spectrum(plan<S>(way.points), taps, w, work, spectrum);
      else if constexpr (kLanes<S> == kBlockLanes)
        blocks::kernel_spectra(block_factors<S>(), taps, w, spectrum);
    }
  });
}

// out_n += sum_i x_i k_{block + n - i} over a block of inputs and of outputs; k has 2 block taps.
template <class S>
__attribute__((noinline)) void add_block(S* out, const S* x, const S* k) {
  constexpr int lanes = kLanes<S>, block = static_cast<int>(kFFTConvBlock), vectors = 4;
  static_assert(block % (vectors * lanes) == 0);
  for (int first = 0; first < block; first += vectors * lanes) {
    Vec<S> sum[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[v] = load(out + first + v * lanes);
    for (int i = 0; i < block; ++i) {
      const Vec<S> value = splat(x[i]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + value * load(k + block + first - i + v * lanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(out + first + v * lanes, sum[v]);
  }
}

template <class T>
void step(const FFTConvStepParams& p, const Parallel& parallel) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  const int64_t capacity = p.capacity, t = p.tokens % capacity, rows = p.batch * p.channels;
  if (rows == 0) return;  // there may be no groups to divide by
  const int64_t per_group = p.channels / p.groups, rest = kFFTConvBlock - t % kFFTConvBlock;
  const int64_t side = fft_conv_side(p.tokens + 1, capacity), points = fft_conv_side_points(side);
  const Plan<S>* const transform_plan = points ? &plan<S>(points) : nullptr;
  const int64_t work_per_row = points ? 32 * side : kFFTConvBlock * (side ? kFFTConvBlock : 1);
  const int64_t rows_per_task = least(rows, most<int64_t>(kWorkPerThread / work_per_row, 1));
  run_tasks(parallel, (rows + rows_per_task - 1) / rows_per_task, [&](TaskQueue& queue) {
    Scratch scratch;
    S* const work = scratch.take<S>(points ? transform_plan->size() : 1);
    for (int64_t task; (task = queue.next()) >= 0;)
      for (int64_t row = task * rows_per_task; row < least(rows, (task + 1) * rows_per_task); ++row) {
        const int64_t batch = row / p.channels, channel = row % p.channels, group = channel / per_group;
        const auto at = [&](const void* x, const Strides2& stride) {
          return static_cast<S>(to_float(static_cast<const T*>(x)[batch * stride.batch + channel * stride.channel]));
        };
        S* const inputs = static_cast<S*>(p.inputs) + row * capacity;
        S* const pending = static_cast<S*>(p.pending) + row * capacity;
        const S* const k = static_cast<const S*>(p.k) + group * capacity;
        S x = at(p.u, p.u_stride);
        if (p.pre_gate) x *= at(p.pre_gate, p.pre_stride);
        inputs[t] = x;
        for (int64_t i = 0; i < rest; i += lanes) {
          const Vec<S> added = splat(x) * load_upto(k + i, rest - i);
          store_upto(pending + t + i, load_upto(pending + t + i, rest - i) + added, rest - i);
        }
        S out = pending[t];
        if (p.skip) out += static_cast<const S*>(p.skip)[channel] * x;
        if (p.post_gate) out *= at(p.post_gate, p.post_stride);
        if constexpr (sizeof(T) == sizeof(S))
          static_cast<T*>(p.out)[row] = out;
        else
          static_cast<T*>(p.out)[row] = from_float<T>(out);
        pending[t] = 0;
        if (side == 0) continue;

        const S* const from = inputs + t + 1 - side;
        S* const to = pending + (t + 1) % capacity;
        if (!points) {
          S taps[2 * kFFTConvBlock + lanes] = {};
          __builtin_memcpy(taps, k, sizeof(S) * least(capacity, 2 * kFFTConvBlock));
          add_block(to, from, taps);
          continue;
        }
        const auto read = [&](int64_t i) { return i < side ? load(from + i) : Vec<S>{}; };
        const auto add = [&](int64_t i, Vec<S> c) {
          if (i >= side && i < 2 * side) store(to + i - side, load(to + i - side) + c);
        };
        const Plan<S>& plan = *transform_plan;
        analyse<true, S>(plan, read, work);
        transform(plan, work, Convolve<S>{static_cast<const S*>(p.spectrum) + group * plan.size()});
        synthesise<false, S>(plan, work, add);
      }
  });
}

}  // namespace
}  // namespace fft

void fft_conv_spectrum(const FFTConvSpectrumParams& params, const Parallel& parallel) {
  if (params.forward.dtype == DType::kFloat64)
    fft::make_spectra<double>(params, parallel);
  else
    fft::make_spectra<float>(params, parallel);
}

void fft_conv_step(const FFTConvStepParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::kFloat32:
      return fft::step<float>(params, parallel);
    case DType::kBFloat16:
      return fft::step<BFloat16>(params, parallel);
    case DType::kFloat16:
      return fft::step<Float16>(params, parallel);
    case DType::kFloat64:
      return fft::step<double>(params, parallel);
  }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
