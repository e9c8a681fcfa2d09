// The driver function that encodes tensor maps, with the conditions that its manual states.
#include <cuda.h>
#include <cuda_runtime.h>

namespace {

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType dtype, cuuint32_t rank, void* base,
                      const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                      const cuuint32_t* element_stride, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  CUtensorMap result{};
  result.dtype = dtype, result.swizzle = swizzle, result.rank = rank, result.base = static_cast<std::byte*>(base);
  result.element_bytes = dtype == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0 || reinterpret_cast<std::uintptr_t>(base) % 16 != 0 ||
      rank < 1 || rank > 5)
    return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || element_stride[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (stride[i - 1] % 16 != 0 || stride[i - 1] >= uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
    result.size[i] = size[i], result.box[i] = box[i];
    result.stride[i] = i == 0 ? result.element_bytes : stride[i - 1];
  }
  const unsigned inner = box[0] * result.element_bytes;
  if (inner % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > 16u << static_cast<int>(swizzle))
    return CUDA_ERROR_INVALID_VALUE;
  *map = result;
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
