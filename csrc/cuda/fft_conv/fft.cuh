// Complex transforms of fp32 points, 16 of them in the registers of each thread.
//
// A transform of N points goes by radix 16, decimation in frequency: butterflies over points N/16 apart, then sixteen
// transforms of N/16 points side by side; the last radix is what is left. Its inverse takes the same steps backwards,
// so spectra stay in the order in which they come out, and nothing is ever put in order. Everything is in place: a
// thread writes only where it has read.
//
// "Shifted" transforms, e^{-2 pi i n (k - 1/4) / N}, are what fft_conv.h's real sequences need: see README.md.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/shared.cuh"

namespace pykernels::cuda::fft {

constexpr int kPerThread = 16;

// cos(2 pi i / 64) for i in [0, 64].
__host__ __device__ constexpr float cosine64(int i) {
  constexpr float kQuarter[17] = {1.0f,         0.995184727f, 0.980785280f, 0.956940336f, 0.923879533f, 0.881921264f,
                                  0.831469612f, 0.773010453f, 0.707106781f, 0.634393284f, 0.555570233f, 0.471396737f,
                                  0.382683432f, 0.290284677f, 0.195090322f, 0.0980171403f, 0.0f};
  return i <= 16 ? kQuarter[i] : i <= 32 ? -kQuarter[32 - i] : i <= 48 ? -kQuarter[i - 32] : kQuarter[64 - i];
}
// e^{-2 pi i n / 64} for n in [0, 64)
template <int n>
struct Root64 {
  static constexpr float re = cosine64(n), im = -cosine64((n + 48) % 64);
};

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }

// a w, or a conj(w).
template <bool kConj = false>
__device__ __forceinline__ float2 times(float2 a, float2 w) {
  if constexpr (kConj) return make_float2(a.x * w.x + a.y * w.y, a.y * w.x - a.x * w.y);
  return make_float2(a.x * w.x - a.y * w.y, a.x * w.y + a.y * w.x);
}

// e^{-2 pi i turn / 2^32} to an ulp of 1: what is left of the turn beside the nearest quarter is exact.
__device__ __forceinline__ float2 unit(uint32_t turn) {
  const uint32_t quarter = (turn + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(turn - (quarter << 30))) * 1.46291807926715968e-9f;
  const float z = x * x;
  // Cephes' minimax fits on [-pi/4, pi/4].
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z +
                  1.0f;
  const bool odd = (quarter & 1) != 0;
  const float re = odd ? s : c, im = odd ? c : s;
  return make_float2(((quarter + 1) & 2) != 0 ? -re : re, (quarter & 2) != 0 ? im : -im);
}

// ---- Butterflies: transforms in registers ---------------------------------------------------------------------------

// Points of radix 16 and 8 come out with their digits swapped: a + 4 b stands where point 4 a + b (2 a + b of 8) of the
// input did. Their inverses take that order.
template <bool kInverse, int kFirst, int kStep>
__device__ __forceinline__ void butterfly4(float2 (&z)[kPerThread]) {
  constexpr int i0 = kFirst, i1 = kFirst + kStep, i2 = kFirst + 2 * kStep, i3 = kFirst + 3 * kStep;
  const float2 even = z[i0] + z[i2], even_odd = z[i0] - z[i2], odd = z[i1] + z[i3], d = z[i1] - z[i3];
  const float2 turned = kInverse ? make_float2(-d.y, d.x) : make_float2(d.y, -d.x);
  z[i0] = even + odd, z[i2] = even - odd;
  z[i1] = even_odd + turned, z[i3] = even_odd - turned;
}
template <int kFirst, int kStep>
__device__ __forceinline__ void butterfly2(float2 (&z)[kPerThread]) {
  const float2 a = z[kFirst], b = z[kFirst + kStep];
  z[kFirst] = a + b, z[kFirst + kStep] = a - b;
}
// z[kAt] times e^{-+2 pi i kRoot / 64}
template <bool kInverse, int kAt, int kRoot>
__device__ __forceinline__ void turn64(float2 (&z)[kPerThread]) {
  if constexpr (kRoot % 64 == 0)
    return;
  else if constexpr (kRoot % 64 == 16)
    z[kAt] = kInverse ? make_float2(-z[kAt].y, z[kAt].x) : make_float2(z[kAt].y, -z[kAt].x);
  else
    z[kAt] = times<kInverse>(z[kAt], make_float2(Root64<kRoot % 64>::re, Root64<kRoot % 64>::im));
}

template <bool kInverse, int kIndex = 0>
__device__ __forceinline__ void turns16(float2 (&z)[kPerThread]) {
  if constexpr (kIndex < 16) {
    turn64<kInverse, kIndex, 4 * (kIndex / 4) * (kIndex % 4)>(z);
    turns16<kInverse, kIndex + 1>(z);
  }
}
template <bool kInverse>
__device__ __forceinline__ void butterfly16(float2 (&z)[kPerThread]) {
  const auto outer = [&] {
    butterfly4<kInverse, 0, 4>(z), butterfly4<kInverse, 1, 4>(z);
    butterfly4<kInverse, 2, 4>(z), butterfly4<kInverse, 3, 4>(z);
  };
  const auto inner = [&] {
    butterfly4<kInverse, 0, 1>(z), butterfly4<kInverse, 4, 1>(z);
    butterfly4<kInverse, 8, 1>(z), butterfly4<kInverse, 12, 1>(z);
  };
  if constexpr (kInverse)
    inner(), turns16<true>(z), outer();
  else
    outer(), turns16<false>(z), inner();
}
template <bool kInverse, int kFirst>
__device__ __forceinline__ void butterfly8(float2 (&z)[kPerThread]) {
  const auto outer = [&] { butterfly4<kInverse, kFirst, 2>(z), butterfly4<kInverse, kFirst + 1, 2>(z); };
  const auto turns = [&] {
    turn64<kInverse, kFirst + 3, 8>(z), turn64<kInverse, kFirst + 5, 16>(z), turn64<kInverse, kFirst + 7, 24>(z);
  };
  const auto inner = [&] {
    butterfly2<kFirst, 1>(z), butterfly2<kFirst + 2, 1>(z);
    butterfly2<kFirst + 4, 1>(z), butterfly2<kFirst + 6, 1>(z);
  };
  if constexpr (kInverse)
    inner(), turns(), outer();
  else
    outer(), turns(), inner();
}
// 16 / kRadix of them, of neighbours.
template <bool kInverse, int kRadix, int kFirst = 0>
__device__ __forceinline__ void butterflies(float2 (&z)[kPerThread]) {
  if constexpr (kFirst < kPerThread) {
    if constexpr (kRadix == 2) butterfly2<kFirst, 1>(z);
    if constexpr (kRadix == 4) butterfly4<kInverse, kFirst, 1>(z);
    if constexpr (kRadix == 8) butterfly8<kInverse, kFirst>(z);
    if constexpr (kRadix == 16) butterfly16<kInverse>(z);
    butterflies<kInverse, kRadix, kFirst + kRadix>(z);
  }
}

// Where radix 16 leaves point k = a + 4 b: at 4 a + b.
__device__ constexpr int digits_swapped(int i) { return i / 4 + i % 4 * 4; }

// z[l] e^{+-2 pi i l / 64}: the shift's part within a butterfly of radix 16.
template <bool kInverse, int l = 1>
__device__ __forceinline__ void shift16(float2 (&z)[kPerThread]) {
  if constexpr (l < kPerThread) {
    turn64<!kInverse, l, l>(z);
    shift16<kInverse, l + 1>(z);
  }
}

// The twiddles between a butterfly of radix 16 and what follows: point k times e^{-+2 pi i (k - 1/4) turn / 2^32},
// without the 1/4 if not `shifted`. `turn` is a multiple of 4.
template <bool kInverse>
__device__ __forceinline__ void twiddle16(float2 (&z)[kPerThread], uint32_t turn, bool shifted) {
  float2 w[8];
  w[0] = shifted ? unit(0u - turn / 4) : make_float2(1.0f, 0.0f);
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
    const float2 next = unit(turn * static_cast<uint32_t>(half));
#pragma unroll
    for (int k = 0; k < half; ++k) w[half + k] = times(w[k], next);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) z[digits_swapped(k)] = times<kInverse>(z[digits_swapped(k)], w[k]);
  const float2 next = unit(turn * 8);
#pragma unroll
  for (int k = 8; k < 16; ++k) z[digits_swapped(k)] = times<kInverse>(z[digits_swapped(k)], times(w[k - 8], next));
}

// One stage of radix 16, of points that lie apart; position `turn` of the butterfly within its transform as a fraction
// of a turn.
template <bool kInverse>
__device__ __forceinline__ void stage16(float2 (&z)[kPerThread], uint32_t turn, bool shifted) {
  if constexpr (kInverse) {
    twiddle16<true>(z, turn, shifted);
    butterfly16<true>(z);
    if (shifted) shift16<true>(z);
  } else {
    if (shifted) shift16<false>(z);
    butterfly16<false>(z);
    twiddle16<false>(z, turn, shifted);
  }
}

__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

// ---- A transform by kPoints / 16 threads ----------------------------------------------------------------------------

// Given: z[l] of thread t is point t + l kThreads. Result: in an order of its own, which `inverse` takes.
template <int kPoints>
struct Transform {
  static constexpr int kThreads = kPoints / kPerThread;
  static constexpr int kBlockThreads = kThreads < 128 ? 128 : kThreads;
  static constexpr int kPerBlock = kBlockThreads / kThreads;
  // Of sixteen neighbours' ends one place is left free, so that no access meets the same bank twice.
  static constexpr int kSharedPoints = kPoints / 16 * 17;

  static constexpr int last_radix(int size = kPoints) { return size > 16 ? last_radix(size / 16) : size; }
  static constexpr int kLast = last_radix();

  static __device__ __forceinline__ int padded(int i) { return i + i / 16; }

  static __device__ __forceinline__ void sync() {
    if constexpr (kThreads <= 32)
      __syncwarp();
    else
      __syncthreads();
  }

  template <int kSize>
  static __device__ __forceinline__ int base(int t) {
    return t / (kSize / 16) * kSize + t % (kSize / 16);
  }
  template <int kSize>
  static __device__ __forceinline__ uint32_t turn(int t) {
    return static_cast<uint32_t>(t % (kSize / 16)) * (0x80000000u / (kSize / 2));
  }
  static __device__ __forceinline__ int last_place(int t, int i) {
    return padded(kLast * (t + kThreads * (i / kLast)) + i % kLast);
  }

  template <int kSize = kPoints>
  static __device__ __forceinline__ void forward(float2 (&z)[kPerThread], float2* shared, int t, bool shifted) {
    if constexpr (kSize <= 16) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) z[i] = shared[last_place(t, i)];
      butterflies<false, kLast>(z);
    } else {
      const int first = base<kSize>(t);
      if constexpr (kSize < kPoints) {
#pragma unroll
        for (int l = 0; l < kPerThread; ++l) z[l] = shared[padded(first + l * (kSize / 16))];
      }
      stage16<false>(z, turn<kSize>(t), kSize == kPoints && shifted);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) shared[padded(first + k * (kSize / 16))] = z[digits_swapped(k)];
      sync();
      forward<kSize / 16>(z, shared, t, shifted);
    }
  }

  // Times kPoints.
  template <int kSize = kPoints>
  static __device__ __forceinline__ void inverse(float2 (&z)[kPerThread], float2* shared, int t, bool shifted) {
    if constexpr (kSize <= 16) {
      butterflies<true, kLast>(z);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) shared[last_place(t, i)] = z[i];
      sync();
    } else {
      inverse<kSize / 16>(z, shared, t, shifted);
      const int first = base<kSize>(t);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) z[digits_swapped(k)] = shared[padded(first + k * (kSize / 16))];
      stage16<true>(z, turn<kSize>(t), kSize == kPoints && shifted);
      if constexpr (kSize < kPoints) {
#pragma unroll
        for (int l = 0; l < kPerThread; ++l) shared[padded(first + l * (kSize / 16))] = z[l];
        sync();
      }
    }
  }
};

}  // namespace pykernels::cuda::fft
