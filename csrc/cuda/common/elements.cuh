// Elements of the three types in and out of fp32, one or a few at a time, and the functions of one number that the
// channel-first ops share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../../common/dtype.h"
#include "ptx.cuh"

namespace pykernels::cuda {

template <class T>
__device__ __forceinline__ float widen(T x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return ptx::to_float(x);
}

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return {static_cast<uint16_t>(ptx::pack<T>(x, 0.0f))};
}

// Element i of data in fp32 or in T, as dtype says.
template <class T>
__device__ __forceinline__ float load_either(const void* data, DType dtype, int64_t i) {
  if (std::is_same_v<T, float> || dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  return widen(static_cast<const T*>(data)[i]);
}

// kCount neighbours as one access of the hardware, or as several of 16 bytes: p is aligned to the smaller of those.
template <int kCount, class T>
struct Neighbours {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes % 16 == 0);
  using Word = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
  static constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(T)), kWords = kCount / kPerWord;
  static constexpr int kAlignment = static_cast<int>(sizeof(Word));

  static __device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % kAlignment == 0;
  }
  static __device__ __forceinline__ void load(float (&x)[kCount], const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word word = reinterpret_cast<const Word*>(p)[i];
      const uint32_t* const parts = reinterpret_cast<const uint32_t*>(&word);
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        if constexpr (std::is_same_v<T, float>)
          x[i * kPerWord + j] = __uint_as_float(parts[j]);
        else
          x[i * kPerWord + j] = ptx::to_float(T{static_cast<uint16_t>(parts[j / 2] >> j % 2 * 16)});
      }
    }
  }
  static __device__ __forceinline__ void store(T* p, const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      Word word;
      uint32_t* const parts = reinterpret_cast<uint32_t*>(&word);
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) parts[j] = __float_as_uint(x[i * kPerWord + j]);
      } else {
#pragma unroll
        for (int j = 0; j < kPerWord / 2; ++j)
          parts[j] = ptx::pack<T>(x[i * kPerWord + 2 * j], x[i * kPerWord + 2 * j + 1]);
      }
      reinterpret_cast<Word*>(p)[i] = word;
    }
  }
};

constexpr float kLog2E = 1.44269504088896340736f;

// sigma(x) and 1 - sigma(x), both to a few ulp of themselves.
struct Sigmoid {
  float value, complement;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float e = ptx::exp2(-fabsf(x) * kLog2E), larger = __fdividef(1.0f, 1.0f + e), smaller = e * larger;
  return x >= 0.0f ? Sigmoid{larger, smaller} : Sigmoid{smaller, larger};
}
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + ptx::exp2(-x * kLog2E)); }
__device__ __forceinline__ float silu_slope(float x) {
  const Sigmoid s = sigmoid(x);
  return s.value * (1.0f + x * s.complement);
}

// Calls launch.template operator()<T>() with the type of the elements.
template <class Launch>
const char* for_dtype(DType dtype, Launch&& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch.template operator()<float>();
    case DType::kBFloat16:
      return launch.template operator()<BFloat16>();
    case DType::kFloat16:
      return launch.template operator()<Float16>();
    default:
      return "the CUDA kernels compute in float32";
  }
}

}  // namespace pykernels::cuda
