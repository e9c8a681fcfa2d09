// Takes the place of CUDA's header when the kernels are compiled for the host: the words of the language, the
// built-in variables, and the runtime functions that the sources use.
#pragma once

#define PYKERNELS_CUDA_HOST 1

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "../runtime.h"
#include "vector_types.h"

// __shared__ is left out on purpose: all shared memory is dynamic and taken through shared.cuh.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

// ---- Synchronisation ----------------------------------------------------------------------------------------------

inline void __syncthreads(cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::barrier_sync(0, (blockDim.x * blockDim.y * blockDim.z + 31) / 32 * 32, true, where);
}

inline void __syncwarp(unsigned mask = ~0u, cuda_host::Where where = cuda_host::Where::current()) {
  int nothing = 0;
  cuda_host::warp_collective("__syncwarp", mask, nothing, where, [](int* const*) {});
}

inline void __threadfence() { cuda_host::maybe_yield(); }
inline void __threadfence_block() { cuda_host::maybe_yield(); }

// ---- Warp collectives ---------------------------------------------------------------------------------------------

namespace cuda_host {

// result[lane] = value[source(lane)], its own where the source lies outside of the segment of `width` lanes.
template <class T, class Source>
T shuffle(const char* what, unsigned mask, T value, int width, Where where, Source source) {
  struct Argument {
    T value, result;
    int source;
  } mine{value, value, 0};
  const int lane = static_cast<int>(current->lane()), first = lane / width * width;
  const int from = source(lane - first, width);
  mine.source = from < 0 || from >= width ? lane : first + from;
  warp_collective(what, mask, mine, where, [mask](Argument* const* lanes) {
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) == 0) continue;
      const int from = lanes[i]->source;
      if ((mask >> from & 1) == 0)
        fail("shuffle: lane " + std::to_string(i) + " reads lane " + std::to_string(from) + " outside of the mask");
      lanes[i]->result = lanes[from]->value;
    }
  });
  return mine.result;
}

template <class Combine>
unsigned vote(const char* what, unsigned mask, bool predicate, Where where, Combine combine) {
  struct Argument {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  warp_collective(what, mask, mine, where, [&](Argument* const* lanes) {
    unsigned ballot = 0;
    for (unsigned i = 0; i < kWarp; ++i)
      if (mask >> i & 1) ballot |= unsigned{lanes[i]->predicate} << i;
    for (unsigned i = 0; i < kWarp; ++i)
      if (mask >> i & 1) lanes[i]->result = combine(ballot);
  });
  return mine.result;
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::shuffle("__shfl_sync", mask, value, width, where, [lane](int, int w) { return lane & (w - 1); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, width, where, [bits](int i, int) { return i ^ bits; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::shuffle("__shfl_up_sync", mask, value, width, where,
                            [delta](int i, int) { return i - static_cast<int>(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::shuffle("__shfl_down_sync", mask, value, width, where,
                            [delta](int i, int) { return i + static_cast<int>(delta); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::vote("__ballot_sync", mask, predicate != 0, where, [](unsigned ballot) { return ballot; });
}
inline int __any_sync(unsigned mask, int predicate, cuda_host::Where where = cuda_host::Where::current()) {
  return static_cast<int>(cuda_host::vote("__any_sync", mask, predicate != 0, where,
                                          [](unsigned ballot) { return unsigned{ballot != 0}; }));
}
inline int __all_sync(unsigned mask, int predicate, cuda_host::Where where = cuda_host::Where::current()) {
  return static_cast<int>(cuda_host::vote("__all_sync", mask, predicate != 0, where,
                                          [mask](unsigned ballot) { return unsigned{ballot == mask}; }));
}

// ---- Atomics: fibers do not interrupt one another, so plain code is atomic ----------------------------------------

namespace cuda_host {
template <class T, class F>
T atomic(T* address, F update) {
  maybe_yield();
  const T old = *address;
  *address = update(old);
  return old;
}
}  // namespace cuda_host

template <class T>
T atomicAdd(T* address, T value) {
  return cuda_host::atomic(address, [value](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return cuda_host::atomic(address, [value](T old) { return std::max(old, value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return cuda_host::atomic(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return cuda_host::atomic(address, [=](T old) { return old == expected ? value : old; });
}

// ---- Arithmetic ---------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
using std::max;
using std::min;

// ---- Runtime ------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_host {
inline std::string launch_error;                       // of the last launch that failed
inline std::map<const void*, unsigned> shared_limits;  // raised by cudaFuncSetAttribute
}  // namespace cuda_host

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return cuda_host::launch_error.c_str();
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid argument";
  }
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const auto limit = static_cast<unsigned>(bytes);
  if (bytes < 0 || limit > cuda_host::shared_limit()) return cudaErrorInvalidValue;
  if (cuda_host::shared_limits.try_emplace(kernel, limit).first->second == limit) return cudaSuccess;
  cuda_host::launch_error = "launches of a kernel raise its limit of shared memory to different values: one host "
                            "thread may lower it between another's raise and launch";
  return cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;  // few, so that persistent kernels loop
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = cuda_host::capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = cuda_host::capability() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_host::shared_limit());
      break;
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > cuda_host::shared_limit()) return cudaErrorInvalidValue;
  const auto raised = cuda_host::shared_limits.find(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes >
      (raised == cuda_host::shared_limits.end() ? 48 * 1024 : std::max(raised->second, 48u * 1024)))
    return cudaErrorInvalidValue;
  cuda_host::launch_error = cuda_host::run(grid, block, static_cast<unsigned>(config->dynamicSmemBytes),
                                           [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cuda_host::launch_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(static_cast<void*>(*pointer), 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// For tensor_map.cuh.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* found);
