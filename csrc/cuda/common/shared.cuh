// Shared memory is dynamic only and handed out region by region, so that the host executor can put red zones
// between the regions and know what each is.
#pragma once

#include <cuda_runtime.h>

namespace pykernels::cuda {

#ifndef PYKERNELS_CUDA_HOST
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
#endif

// A block's dynamic shared memory. All threads take the same regions in the same order.
class SharedMemory {
 public:
  // Where a region of `bytes` lies that follows `end` bytes: the kernels' sizes come from the same rule.
  static constexpr unsigned place(unsigned end, unsigned alignment) {
    return (end + alignment - 1) / alignment * alignment;
  }

  template <class T>
  __device__ __forceinline__ T* take(unsigned count, unsigned alignment = alignof(T)) {
    const unsigned offset = place(end_, alignment), bytes = count * static_cast<unsigned>(sizeof(T));
    end_ = offset + bytes;
#ifdef PYKERNELS_CUDA_HOST
    return reinterpret_cast<T*>(
        ::cuda_host::current->block->shared(offset, bytes, alignment, ::cuda_host::Where::current()));
#else
    return reinterpret_cast<T*>(dynamic_shared_memory + offset);
#endif
  }

 private:
  unsigned end_ = 0;
};

}  // namespace pykernels::cuda
