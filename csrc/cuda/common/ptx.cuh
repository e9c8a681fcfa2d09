// Every PTX instruction that the kernels use, one wrapper each; kernels contain no other inline assembly.
//
// "Shared" pointers are generic pointers into the block's shared memory. Fragment layouts are those of the PTX
// manual: lane = 4 g + t of a warp, g = 0..7, t = 0..3. What is sm_90-only says so; calling it in code for an older
// target does not assemble.
//
// When the sources are compiled for the host (tests/cuda_host), models of the same functions take this file's place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../../common/dtype.h"
#include "tensor_map.cuh"

#ifdef PYKERNELS_CUDA_HOST
#include "models.h"
#else

namespace pykernels::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Conversions and arithmetic -----------------------------------------------------------------------------------

// Two fp32 rounded to nearest even into one register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <class T>
__device__ __forceinline__ float to_float(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) return __uint_as_float(uint32_t{value.bits} << 16);
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// fp32 to tf32 (in the register of an fp32), nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

// 2^x within 2 ulp; denormal results become 0, exp2(-inf) = 0.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2(x) with an absolute error of 2^-22 near 1; log2(0) = -inf.
__device__ __forceinline__ float log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// No instruction: what is computed from the result is computed where it stands, not once before a loop and then held in
// registers that the loop lacks.
__device__ __forceinline__ int unhoisted(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t unhoisted(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// No instruction: these values are held in registers, not computed again wherever they are used.
template <int kCount>
__device__ __forceinline__ void keep(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i]));
}

// ---- Matrix products of one warp ----------------------------------------------------------------------------------

// d [16, 8] = a [16, 16] b [16, 8] + c, T bf16 or fp16, accumulated in fp32. Registers of lane (g, t), two elements
// each:
//   a: (row g, cols 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)    b: (rows 2t, col g), (2t + 8, g)
//   c, d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4]) {
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
}

// d [16, 8] = a [16, 8] b [8, 8] + c in tf32, accumulated in fp32. Registers of lane (g, t), one element each:
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)    b: (t, g), (t + 4, g)    c, d: as above
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                 const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- Fragments from and to shared memory --------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements: lane l gives the address (16-byte aligned) of row l % 8 of matrix l / 8.
// Register i of lane (g, t) receives elements (g, 2t) and (g, 2t + 1) of matrix i; transposed: (2t, g) and (2t + 1,
// g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The converse of ldmatrix. sm_90.
__device__ __forceinline__ void stmatrix_x4(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(shared_address(shared_row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(shared_address(shared_row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- Asynchronous copies of one thread (generic proxy) ------------------------------------------------------------

// Copies `bytes` (0 to 16) from global to shared memory and fills up to 16 with zeros; both addresses are 16-byte
// aligned. Bypasses L1.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, unsigned bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same for 4 or 8 bytes, through L1.
template <int kBytes>
__device__ __forceinline__ void cp_async_small(void* shared, const void* global, unsigned bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(shared_address(shared)), "l"(global), "n"(kBytes), "r"(bytes)
               : "memory");
}

// Closes the thread's current group of cp.async; a group may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all but the newest kPending groups of this thread are complete. Other threads' copies need a barrier
// after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// ---- Barriers and fences ------------------------------------------------------------------------------------------

// Barrier `id` (0 is __syncthreads) of `threads` threads, a multiple of 32: waits for all of them to sync or arrive.
__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads) {
  asm volatile("barrier.sync.aligned %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(unsigned id, unsigned threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// One lane of the warp, the same at each call; all 32 lanes must call it. sm_90.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected)
               :
               : "memory");
  return elected != 0;
}

// An mbarrier (8 bytes, 8-byte aligned) whose phases end after `arrivals` arrivals and all expected bytes. One
// thread does it, then fences, then a barrier tells the others.
__device__ __forceinline__ void mbarrier_init(uint64_t* shared_barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :
               : "r"(shared_address(shared_barrier)), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* shared_barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}"
               :
               : "r"(shared_address(shared_barrier))
               : "memory");
}

// Arrives and lets the current phase also wait for `bytes` of asynchronous copies. sm_90.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* shared_barrier, unsigned bytes) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}"
               :
               : "r"(shared_address(shared_barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of that parity has completed, after waiting for a while that the hardware chooses. Phases count
// from 0; on a fresh barrier parity 1 counts as completed. sm_90.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* shared_barrier, unsigned parity) {
  uint32_t complete;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(complete)
               : "r"(shared_address(shared_barrier)), "r"(parity)
               : "memory");
  return complete != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* shared_barrier, unsigned parity) {
  while (!mbarrier_try_wait(shared_barrier, parity)) {
  }
}

// Makes initialised mbarriers visible to the async proxy. sm_90.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

// Orders this thread's earlier accesses to shared memory before later ones of the async proxy (TMA, bulk copies,
// wgmma) that it synchronises with. sm_90.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// ---- TMA: tiles of tensors (sm_90) --------------------------------------------------------------------------------

// The wrappers take the tile's first coordinate on each axis, innermost first; coordinates outside of the tensor
// read as zero and are not written. Shared tiles are 128-byte aligned, 1024 with the 128-byte swizzle (512, 256 for
// 64, 32).

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// Loads a tile; `barrier`'s current phase loses the tile's bytes (those outside of the tensor included).
template <class... Coordinates>
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* shared_barrier,
                                         Coordinates... coordinates) {
  const int c[] = {static_cast<int>(coordinates)...};
  constexpr int kRank = sizeof...(Coordinates);
  static_assert(kRank >= 2 && kRank <= 5);
  const uint32_t s = shared_address(shared), b = shared_address(shared_barrier);
  if constexpr (kRank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];"
        :
        : "r"(s), "l"(map), "r"(b), "r"(c[0]), "r"(c[1])
        : "memory");
  else if constexpr (kRank == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];"
        :
        : "r"(s), "l"(map), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
  else if constexpr (kRank == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];"
        :
        : "r"(s), "l"(map), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], "
        "[%2];"
        :
        : "r"(s), "l"(map), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
        : "memory");
}

// A tile from shared memory to the array; part of the thread's current bulk group.
#define PYKERNELS_TMA_OUT(kOp, kSuffix)                                                                       \
  const int c[] = {static_cast<int>(coordinates)...};                                                         \
  constexpr int kRank = sizeof...(Coordinates);                                                               \
  static_assert(kRank >= 2 && kRank <= 5);                                                                    \
  const uint32_t s = shared_address(shared);                                                                  \
  if constexpr (kRank == 2)                                                                                   \
    asm volatile(kOp ".2d.global.shared::cta" kSuffix " [%0, {%2,%3}], [%1];"                                 \
                 :                                                                                            \
                 : "l"(map), "r"(s), "r"(c[0]), "r"(c[1])                                                     \
                 : "memory");                                                                                 \
  else if constexpr (kRank == 3)                                                                              \
    asm volatile(kOp ".3d.global.shared::cta" kSuffix " [%0, {%2,%3,%4}], [%1];"                              \
                 :                                                                                            \
                 : "l"(map), "r"(s), "r"(c[0]), "r"(c[1]), "r"(c[2])                                          \
                 : "memory");                                                                                 \
  else if constexpr (kRank == 4)                                                                              \
    asm volatile(kOp ".4d.global.shared::cta" kSuffix " [%0, {%2,%3,%4,%5}], [%1];"                           \
                 :                                                                                            \
                 : "l"(map), "r"(s), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])                               \
                 : "memory");                                                                                 \
  else                                                                                                        \
    asm volatile(kOp ".5d.global.shared::cta" kSuffix " [%0, {%2,%3,%4,%5,%6}], [%1];"                        \
                 :                                                                                            \
                 : "l"(map), "r"(s), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])                    \
                 : "memory")

// Stores it.
template <class... Coordinates>
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* shared, Coordinates... coordinates) {
  PYKERNELS_TMA_OUT("cp.async.bulk.tensor", ".bulk_group");
}

// Adds it to what is there (atomically per element, in the tensor's dtype).
template <class... Coordinates>
__device__ __forceinline__ void tma_reduce_add(const CUtensorMap* map, const void* shared, Coordinates... coordinates) {
  PYKERNELS_TMA_OUT("cp.reduce.async.bulk.tensor", ".add.bulk_group");
}
#undef PYKERNELS_TMA_OUT

// ---- Bulk copies of contiguous bytes (sm_90) ----------------------------------------------------------------------

// Addresses are 16-byte aligned, `bytes` is a multiple of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes,
                                          uint64_t* shared_barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(shared_barrier))
               : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(global), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// global[i] += shared[i] for fp32, atomically per element.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared, unsigned bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(global), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Groups of this thread's stores and reductions (tensor and bulk), as for cp.async.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }

// Waits until all but the newest kPending groups are complete and visible to this thread.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(kPending) : "memory");
}

// Waits until they have read their shared memory, which may then be overwritten.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(kPending) : "memory");
}

// ---- Sums and turns in global memory ------------------------------------------------------------------------------

// Adds four fp32, atomically each, to 16 aligned bytes. sm_90.
__device__ __forceinline__ void reduce_add(float4* global, float4 value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(global), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// A counter that tells other blocks what this one has written: the writes of this thread, and those it has waited for
// at a barrier after their fence, are seen by who has waited for the count.
__device__ __forceinline__ void semaphore_add(unsigned* global, unsigned count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" : : "l"(global), "r"(count) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* global) {
  unsigned result;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(result) : "l"(global) : "memory");
  return result;
}
__device__ __forceinline__ void semaphore_wait(const unsigned* global, unsigned count) {
  while (load_acquire(global) < count) {
  }
}

// ---- Matrix products of a warpgroup (sm_90a) ----------------------------------------------------------------------

// Describes a matrix of 16-bit elements in shared memory: 8-row (K-major) or 8-k (MN-major) groups, swizzled as TMA
// does.
//   K-major, swizzled over W = 32, 64 or 128 bytes: a row is W bytes, row groups are `stride` bytes apart.
//   K-major, no swizzle: core matrices of 8 rows x 16 bytes, `leading` apart along K, `stride` along M or N.
//   MN-major, swizzled: for each k, W bytes of M or N; the next W bytes `leading` apart, the next 8 k `stride` apart.
//   MN-major, no swizzle: core matrices of 8 k x 16 bytes, `leading` apart along K, `stride` along M or N.
// Start addresses are those of TMA tiles; along K of a K-major tile they advance by 32 bytes per k16 step inside W.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, Swizzle swizzle, unsigned leading,
                                                     unsigned stride) {
  constexpr uint64_t kMode[] = {0, 3, 2, 1};  // none, 32, 64, 128 bytes
  return (uint64_t{shared_address(shared) & 0x3ffff} >> 4) | (uint64_t{(leading & 0x3ffff) >> 4} << 16) |
         (uint64_t{(stride & 0x3ffff) >> 4} << 32) | (kMode[static_cast<int>(swizzle)] << 62);
}

// Before the first wgmma, and again when its registers were touched by anything else since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Waits until all but the newest kPending groups are complete; until then accumulators, register operands and shared
// operands must be left alone.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// No instruction: the compiler takes an accumulator for written once its wgmma is issued, so after the wait for it
// this keeps the uses of it where they stand.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i]) : : "memory");
}

}  // namespace pykernels::cuda::ptx

#include "ptx_wgmma.cuh"

namespace pykernels::cuda::ptx {

// Gives up, or waits for and takes, registers per thread (of all warps in the warpgroup): a multiple of 8 from 24
// to 256.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_decrease() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_increase() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

}  // namespace pykernels::cuda::ptx

#endif  // PYKERNELS_CUDA_HOST
