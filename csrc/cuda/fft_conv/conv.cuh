// What the kernels of the long convolution share: which lags have taps, where samples of rows and taps come from and go
// to. See fft_conv.h for the maths and the layout, README.md for the design.
//
// A window is 2N samples of a row, of which some are zero; position p of it meets p + N in one complex point. Positions
// and lags fit 31 bits; offsets of rows are 64-bit.
#pragma once

#include "../../include/pykernels/fft_conv.h"

#include "../common/elements.cuh"
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "fft.cuh"

namespace pykernels::cuda::fft {

// ---- taps -----------------------------------------------------------------------------------------------------------

// The kernels as one array of taps of lags -reverse to forward, those that have an effect. Circular ones that together
// reach once around are folded to lags 0 to L - 1.
struct Kernels {
  const float *k, *k_rev;  // [G, taps], [G, taps_rev] or null
  int64_t taps, taps_rev;
  int lag, length, forward, reverse;
  bool folded;

  Kernels() = default;
  explicit Kernels(const FFTConvParams& p)
      : k(static_cast<const float*>(p.k)), k_rev(static_cast<const float*>(p.k_rev)), taps(p.taps),
        taps_rev(p.taps_rev),
        lag(static_cast<int>(p.k_rev_lag)), length(static_cast<int>(p.length)) {
    const int64_t ahead = p.taps - 1, behind = p.k_rev != nullptr ? p.taps_rev - 1 + p.k_rev_lag : 0;
    const int64_t most = p.length - 1;
    folded = p.circular && ahead + behind >= p.length;
    forward = static_cast<int>(folded ? most : std::min(ahead, most));
    reverse = static_cast<int>(folded ? 0 : std::min(behind, most));
  }
  __host__ __device__ int count() const { return forward + reverse + 1; }

  // The tap of lag index - reverse.
  __device__ __forceinline__ float tap(int64_t group, int index) const {
    const float* const ahead = k + group * taps;
    const float* const behind = k_rev + group * taps_rev;
    float sum = 0.0f;
    if (folded) {
      for (int64_t i = index; i < taps; i += length) sum += ahead[i];
      if (k_rev != nullptr)
        for (int64_t i = first_behind(index); i < taps_rev; i += length) sum += behind[i];
      return sum;
    }
    const int at = index - reverse, back = -at - lag;
    if (at >= 0) sum = ahead[at];
    if (k_rev != nullptr && back >= 0 && back < taps_rev) sum += behind[back];
    return sum;
  }

  // Writes the gradient of a tap into dk and dk_rev; all of them and `clear` write every element once.
  __device__ __forceinline__ void put(float* dk, float* dk_rev, int64_t group, int index, float value) const {
    float* const ahead = dk + group * taps;
    float* const behind = dk_rev + group * taps_rev;
    if (folded) {
      for (int64_t i = index; i < taps; i += length) ahead[i] = value;
      if (dk_rev != nullptr)
        for (int64_t i = first_behind(index); i < taps_rev; i += length) behind[i] = value;
      return;
    }
    const int at = index - reverse, back = -at - lag;
    if (at >= 0) ahead[at] = value;
    if (dk_rev != nullptr && back >= 0 && back < taps_rev) behind[back] = value;
  }
  // Zeros for the gradients of a group's taps without effect: `threads` threads take them in turns.
  __device__ __forceinline__ void clear(float* dk, float* dk_rev, int64_t group, int64_t thread,
                                        int64_t threads) const {
    if (folded) return;
    for (int64_t i = forward + 1 + thread; i < taps; i += threads) dk[group * taps + i] = 0.0f;
    if (dk_rev == nullptr) return;
    for (int64_t i = max(reverse - lag + 1, 0) + thread; i < taps_rev; i += threads)
      dk_rev[group * taps_rev + i] = 0.0f;
  }

 private:
  // The first tap of k_rev whose lag is `index` modulo the length.
  __device__ __forceinline__ int64_t first_behind(int index) const {
    return (2 * int64_t{length} - index - lag) % length;
  }
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// x = values gate, rows [B, D, L].
struct Signal {
  const void *values, *gate;  // gate may be null
  Strides2 stride, gate_stride;
};
// out = factor (c + skip x), rows likewise; out or factor may be null.
struct Result {
  void* out;
  const void* factor;
  Strides2 stride, factor_stride;
};

// Windows of rows: number w of a row begins `before` samples before sample w step, the first of the `step` outputs that
// it owns. Samples outside [low, high) are zero, of windows of what they `own` those too that others do; samples
// outside [0, L) are modulo L.
struct Windows {
  int count, before, step, low, high;
  bool own;
};

// The rows of a call, in the order channel by channel, each with all batch entries.
struct Rows {
  DType dtype;
  int64_t batch, per_group;  // channels of a group
  int length;
  Signal x;
  const float* skip;  // [D] or null
  Result out, second;
  double* products;  // or null: pieces of sums of x times both factors, for `put_products`
};

template <class T>
__device__ __forceinline__ T* row_of(const void* data, const Strides2& stride, int64_t batch, int64_t channel) {
  return data == nullptr ? nullptr
                         : static_cast<T*>(const_cast<void*>(data)) + (batch * stride.batch + channel * stride.channel);
}

// Calls f with an element of the type.
template <class F>
__device__ __forceinline__ void for_dtype(DType dtype, F&& f) {
  if (dtype == DType::kFloat32)
    f(float{});
  else if (dtype == DType::kBFloat16)
    f(BFloat16{});
  else
    f(Float16{});
}

// Where sample n of a window is in its row; -1 where it is zero.
__device__ __forceinline__ int sample_at(int n, int length, int low, int high) {
  if (n < low || n >= high) return -1;
  return n < 0 ? n + length : n >= length ? n - length : n;
}

// z[l] = points first + l step of a window of 2 `points` samples: x there and x `points` further on.
__device__ __forceinline__ void load_window(float2 (&z)[kPerThread], DType dtype, const Signal& x, int length,
                                            const Windows& windows, int window, int64_t batch, int64_t channel,
                                            int first, int step, int points) {
  const int begin = window * windows.step, origin = begin - windows.before + first;
  const int low = windows.own ? begin : windows.low;
  const int high = windows.own ? min(begin + windows.step, length) : windows.high;
  for_dtype(dtype, [&]<class T>(T) {
    const T* const values = row_of<const T>(x.values, x.stride, batch, channel);
    const T* const gate = row_of<const T>(x.gate, x.gate_stride, batch, channel);
    const auto load = [&](int n) {
      const int at = sample_at(n, length, low, high);
      float value = 0.0f;
      if (at >= 0) {
        value = widen(values[at]);
        if (gate != nullptr) value *= widen(gate[at]);
      }
      return value;
    };
#pragma unroll
    for (int l = 0; l < kPerThread; ++l) z[l].x = load(origin + l * step);
    if (origin - first + points < high) {
#pragma unroll
      for (int l = 0; l < kPerThread; ++l) z[l].y = load(origin + l * step + points);
    } else {
#pragma unroll
      for (int l = 0; l < kPerThread; ++l) z[l].y = 0.0f;
    }
  });
}

// Writes the results of sample n, where c is the convolution's, and returns what it adds to the products.
template <class T>
struct Writer {
  const T *values, *gate, *factor, *second_factor;
  T *out, *second;
  float skip;
  bool skips, multiplies;

  __device__ __forceinline__ Writer(const Rows& rows, int64_t batch, int64_t channel)
      : values(row_of<const T>(rows.x.values, rows.x.stride, batch, channel)),
        gate(row_of<const T>(rows.x.gate, rows.x.gate_stride, batch, channel)),
        factor(row_of<const T>(rows.out.factor, rows.out.factor_stride, batch, channel)),
        second_factor(row_of<const T>(rows.second.factor, rows.second.factor_stride, batch, channel)),
        out(row_of<T>(rows.out.out, rows.out.stride, batch, channel)),
        second(row_of<T>(rows.second.out, rows.second.stride, batch, channel)),
        skip(rows.skip != nullptr ? rows.skip[channel] : 0.0f),
        skips(rows.skip != nullptr),
        multiplies(rows.products != nullptr) {}

  __device__ __forceinline__ double operator()(int n, float c) const {
    const float by = factor != nullptr ? widen(factor[n]) : 1.0f;
    float x = 0.0f, second_by = 0.0f;
    if (skips) {
      x = gate != nullptr ? widen(values[n]) * widen(gate[n]) : widen(values[n]);
      c += skip * x;
    }
    if (second != nullptr || multiplies) second_by = widen(second_factor[n]);
    if (second != nullptr) second[n] = narrow<T>(c * second_by);
    if (out != nullptr) out[n] = narrow<T>(c * by);
    return multiplies ? static_cast<double>(x) * static_cast<double>(second_by * by) : 0.0;
  }
};

// A piece of the products: what kLanes neighbouring lanes have of it. In double, whose products of floats are exact:
// what a sum over a whole batch may cancel to is far smaller than its terms.
template <int kLanes>
__device__ __forceinline__ void put_products(const Rows& rows, int64_t piece, double sum, bool active = true) {
  if (rows.products == nullptr) return;
  sum = warp_reduce<kLanes>(sum, Sum());
  if (active && threadIdx.x % kLanes == 0) rows.products[piece] = sum;
}

// Writes what a window owns of points first + l step, and returns what they add to the products.
__device__ __forceinline__ double store_window(const float2 (&z)[kPerThread], const Rows& rows, const Windows& windows,
                                               int window, int64_t batch, int64_t channel, int first, int step,
                                               int points) {
  const int low = window * windows.step, origin = low - windows.before + first;
  const int high = min(low + windows.step, rows.length);
  double sum = 0.0;
  for_dtype(rows.dtype, [&]<class T>(T) {
    const Writer<T> write(rows, batch, channel);
#pragma unroll
    for (int l = 0; l < kPerThread; ++l) {
      const int n = origin + l * step;
      if (n >= low && n < high) sum += write(n, z[l].x);
    }
    if (origin - first + points < high) {
#pragma unroll
      for (int l = 0; l < kPerThread; ++l) {
        const int n = origin + l * step + points;
        if (n >= low && n < high) sum += write(n, z[l].y);
      }
    }
  });
  return sum;
}

// Of the lags modulo 2 `points`, those from there minus `reverse` on stand for negative ones, and wrap with their sign
// changed.
__device__ __forceinline__ void load_taps(float2 (&z)[kPerThread], const Kernels& kernels, int64_t group, int first,
                                          int step, int points) {
  const auto load = [&](int p) {
    if (p <= kernels.forward) return kernels.tap(group, kernels.reverse + p);
    const int back = p - 2 * points;
    return back >= -kernels.reverse ? -kernels.tap(group, kernels.reverse + back) : 0.0f;
  };
#pragma unroll 1
  for (int l = 0; l < kPerThread; ++l) {
    const float2 value = make_float2(load(first + l * step), load(first + l * step + points));
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)  // no array is indexed by a variable
      if (i == l) z[i] = value;
  }
}

__device__ __forceinline__ void store_taps(const float2 (&z)[kPerThread], const Kernels& kernels, float* dk,
                                           float* dk_rev, int64_t group, int first, int step, int points, float scale) {
  const auto store = [&](int p, float value) {
    if (p <= kernels.forward) kernels.put(dk, dk_rev, group, kernels.reverse + p, value);
    const int back = p - 2 * points;
    if (back >= -kernels.reverse) kernels.put(dk, dk_rev, group, kernels.reverse + back, -value);
  };
#pragma unroll 1
  for (int l = 0; l < kPerThread; ++l) {
    float2 value = z[0];
#pragma unroll
    for (int i = 1; i < kPerThread; ++i)
      if (i == l) value = z[i];
    store(first + l * step, scale * value.x), store(first + l * step + points, scale * value.y);
  }
}

}  // namespace pykernels::cuda::fft
