// A minimal kernel that proves the CUDA route end to end: the op it backs tells whether this build's kernels run here.
#pragma once

#include <cstdint>

namespace pykernels::cuda {

// out[i] = in[i] + 1 for n floats, on `stream` (a cudaStream_t) of the current device. Returns null, or what CUDA said.
const char* probe(const float* in, float* out, int64_t n, void* stream);

}  // namespace pykernels::cuda
