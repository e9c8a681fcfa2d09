#include "include/pykernels/probe.h"

#include <algorithm>

#include "launch.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void probe_kernel(const float* in, float* out, int64_t n) {
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride) out[i] = in[i] + 1.0f;
}

}  // namespace

const char* probe(const float* in, float* out, int64_t n, void* stream) {
  if (n == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((n + kThreads - 1) / kThreads, 65535);
  return launch(probe_kernel,
                {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, static_cast<cudaStream_t>(stream)}, in, out,
                n);
}

}  // namespace pykernels::cuda
