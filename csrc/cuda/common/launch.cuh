// The one way to launch a kernel. A function rather than triple brackets, so that the same sources can be compiled
// by a host compiler, where it runs the kernel's blocks on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace pykernels::cuda {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  // Dynamic. Above 48 KiB the kernel's limit is raised first, which host threads share: all launches of a kernel ask
  // for the same then, so that none lowers it for another.
  unsigned shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// An attribute of the current device; 0 when there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}
inline int multiprocessors() { return std::max(1, device_attribute(cudaDevAttrMultiProcessorCount)); }
// 10 major + minor: 80, 90, 100, 120.
inline int device_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Returns null, or CUDA's message for what went wrong with the launch.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  constexpr unsigned kDefaultSharedBytes = 48 * 1024;
  if (config.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(config.shared_bytes));
    if (raised != cudaSuccess) return cudaGetErrorString(raised);
  }
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = config.stream;
  const cudaError_t launched = cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...);
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace pykernels::cuda
