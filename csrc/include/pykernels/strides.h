#pragma once

#include <cstdint>

namespace pykernels {

// Of a tensor [B, T, H, .] whose last axis is contiguous.
struct Strides3 {
  int64_t batch, token, head;  // in elements
};

}  // namespace pykernels
