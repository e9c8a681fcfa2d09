// Tensor maps: what the TMA unit knows of a tensor in global memory. Encoded on the host, passed to the kernel as a
// `const __grid_constant__ CUtensorMap`.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pykernels::cuda {

// How 16-byte chunks of a shared tile are permuted so that columns of chunks spread over the banks. With rows of
// 128 bytes (64, 32), chunk c of row r lies at chunk c ^ (r % 8) (c ^ (r / 2 % 4), c ^ (r / 4 % 2)); in general,
// address bits 4-6 (4-5, 4) are xored with bits 7-9 (7-8, 7).
enum class Swizzle { kNone, k32, k64, k128 };

struct TensorMapConfig {
  CUtensorMapDataType dtype;
  unsigned element_bytes;
  int rank;            // 2 to 5
  const void* base;    // 16-byte aligned
  uint64_t size[5];    // elements on each axis, innermost first
  uint64_t stride[5];  // bytes, multiples of 16; stride[0] is unused (the innermost axis is contiguous)
  unsigned box[5];     // the tile; box[0] in bytes is at most the swizzle's width
  Swizzle swizzle;
};

// Returns null, or what is wrong. For compute capability 9.0: on Blackwell a bug of drivers up to 13.1 asks for a
// workaround where the tensor is smaller than 128 KiB (CUTLASS 4.3.4 has it).
inline const char* encode_tensor_map(CUtensorMap* map, const TensorMapConfig& config) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Through the runtime, so that nothing links to the driver.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                        : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  constexpr CUtensorMapSwizzle kModes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], element_stride[5];
  for (int i = 0; i < config.rank; ++i) {
    size[i] = config.size[i], box[i] = config.box[i], element_stride[i] = 1;
    if (i > 0) stride[i - 1] = config.stride[i];
  }
  const CUresult result =
      encode(map, config.dtype, static_cast<cuuint32_t>(config.rank), const_cast<void*>(config.base), size, stride,
             box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, kModes[static_cast<int>(config.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the tensor map";
}

}  // namespace pykernels::cuda
