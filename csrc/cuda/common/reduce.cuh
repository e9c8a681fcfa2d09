// Reductions and scans over the lanes of a warp and the threads of a block, for any associative operator.
#pragma once

#include <cuda_runtime.h>

namespace pykernels::cuda {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over kLanes neighbouring lanes (a power of two); every lane gets the result. The operator must be commutative:
// lanes see their partner's value on either side.
template <int kLanes = 32, class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Inclusive scan over the warp's lanes: op(...op(x_0, x_1)..., x_lane); the earlier operand is on the left.
template <class T, class Op>
__device__ __forceinline__ T warp_scan(T value, Op op) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(step));
    if (lane >= step) value = op(before, value);
  }
  return value;
}

// Over a block of kWarps warps; every thread gets the result. `scratch` holds kWarps elements in shared memory and
// may be used again after the next __syncthreads.
template <int kWarps, class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Op op) {
  value = warp_reduce(value, op);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, scratch[warp]);
  return value;
}

// Inclusive scan over the threads of a block, in the order of threadIdx.x; the same scratch.
template <int kWarps, class T, class Op>
__device__ __forceinline__ T block_scan(T value, T* scratch, Op op) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  value = warp_scan(value, op);
  if (threadIdx.x % 32 == 31) scratch[warp] = value;
  __syncthreads();
  if (warp > 0) {
    T before = scratch[0];
    for (int i = 1; i < warp; ++i) before = op(before, scratch[i]);
    value = op(before, value);
  }
  return value;
}

}  // namespace pykernels::cuda
