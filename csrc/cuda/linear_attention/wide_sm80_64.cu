#include "wide_sm80.cuh"

namespace pykernels::cuda::linear {
const char* wide_walk_sm80_64(const Walk& w, cudaStream_t stream) { return choose_wide_walk_sm80<64>(w, stream); }
}  // namespace pykernels::cuda::linear
