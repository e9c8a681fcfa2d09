// Element types that cross the boundary between the torch bindings and the kernels. Torch-free, host and device.
#pragma once

#include <cstdint>

namespace pykernels {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Storage only: the arithmetic on them lives with each backend, which widens to fp32 first.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace pykernels
