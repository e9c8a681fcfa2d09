// One small kernel per instruction: input bytes in, output bytes out. The host module runs them on the models, and
// record_vectors.py on a GPU, on the same inputs.
#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tile.cuh"

// Where the target has the instructions of sm_90a.
#if defined(PYKERNELS_CUDA_HOST) || defined(PYKERNELS_SM90A)
#define HAS_SM90A 1
#endif

namespace pykernels::cuda {
namespace {

// Registers of one lane, in the order that the kernels' inputs and outputs have them: [register][lane].
template <class T, int kCount>
__device__ __forceinline__ void load_registers(T (&r)[kCount], const void* in, int first = 0, int threads = 32) {
  for (int i = 0; i < kCount; ++i) r[i] = static_cast<const T*>(in)[(first + i) * threads + threadIdx.x];
}
template <class T, int kCount>
__device__ __forceinline__ void store_registers(const T (&r)[kCount], void* out, int threads = 32) {
  for (int i = 0; i < kCount; ++i) static_cast<T*>(out)[i * threads + threadIdx.x] = r[i];
}

// in: a [4], b [2], c [4]; out: d [4]
template <class T>
__global__ void mma_kernel(const void* in, void* out) {
  uint32_t a[4], b[2];
  float c[4], d[4];
  load_registers(a, in), load_registers(b, in, 4), load_registers(c, in, 6);
  if constexpr (std::is_same_v<T, float>)
    ptx::mma_m16n8k8_tf32(d, a, b, c);
  else
    ptx::mma_m16n8k16<T>(d, a, b, c);
  store_registers(d, out);
}

// in: 512 bytes, four matrices one after the other; out: r [4]
template <bool kTrans>
__global__ void ldmatrix_kernel(const void* in, void* out) {
  SharedMemory shared;
  uint4* rows = shared.take<uint4>(32);
  rows[threadIdx.x] = static_cast<const uint4*>(in)[threadIdx.x];
  __syncthreads();
  uint32_t r[4];
  if constexpr (kTrans)
    ptx::ldmatrix_x4_trans(r, rows + threadIdx.x);
  else
    ptx::ldmatrix_x4(r, rows + threadIdx.x);
  store_registers(r, out);
}

// in: x fp32 [n]; out: the results, 4 bytes each
template <int kFunction>
__global__ void convert_kernel(const void* in, void* out) {
  const float x = static_cast<const float*>(in)[threadIdx.x],
              y = static_cast<const float*>(in)[blockDim.x - 1 - threadIdx.x];
  uint32_t result;
  if constexpr (kFunction == 0) result = ptx::pack<BFloat16>(x, y);
  if constexpr (kFunction == 1) result = ptx::pack<Float16>(x, y);
  if constexpr (kFunction == 2) result = ptx::to_tf32(x);
  if constexpr (kFunction == 3) result = __float_as_uint(ptx::exp2(x));
  if constexpr (kFunction == 4) result = __float_as_uint(ptx::log2(fabsf(x)));
  if constexpr (kFunction == 5)
    result = __float_as_uint(ptx::to_float(Float16{static_cast<uint16_t>(__float_as_uint(x) >> 16)}));
  static_cast<uint32_t*>(out)[threadIdx.x] = result;
}

// in: 512 bytes and 32 byte counts (int32); out: 512 bytes of shared memory after one cp.async of each lane
__global__ void cp_async_kernel(const void* in, void* out) {
  SharedMemory shared;
  uint4* rows = shared.take<uint4>(32);
  ptx::cp_async_16(rows + threadIdx.x, static_cast<const uint4*>(in) + threadIdx.x,
                   static_cast<const unsigned*>(in)[128 + threadIdx.x]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  static_cast<uint4*>(out)[threadIdx.x] = rows[threadIdx.x];
}

// in: fp32 [128]; out: sums of quads, warp scan, block sum, block scan [4][128]
__global__ void reduce_kernel(const void* in, void* out) {
  SharedMemory shared;
  float* scratch = shared.take<float>(4);
  const float x = static_cast<const float*>(in)[threadIdx.x];
  float results[4];
  results[0] = warp_reduce<4>(x, Sum());
  results[1] = warp_scan(x, Sum());
  results[2] = block_reduce<4>(x, scratch, Max());
  __syncthreads();
  results[3] = block_scan<4>(x, scratch, Sum());
  store_registers(results, out, 128);
}

// in: x uint32 [blocks, 32]; out: values [32], which each block doubles before it adds its x, then whose turn it is
// [1], then how many blocks have begun [1]: their order is that of their turns, since one that has not begun can't be
// waited for.
__global__ void turns_kernel(const void* in, void* out) {
  uint32_t* const values = static_cast<uint32_t*>(out);
  unsigned* const turn = values + 32;
  SharedMemory shared;
  unsigned* const mine = shared.take<unsigned>(1);
  if (threadIdx.x == 0) {
    *mine = atomicAdd(turn + 1, 1u);
    ptx::semaphore_wait(turn, *mine);
  }
  __syncthreads();
  values[threadIdx.x] = 2 * values[threadIdx.x] + static_cast<const uint32_t*>(in)[*mine * 32 + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) ptx::semaphore_add(turn, 1);
}

#ifdef HAS_SM90A

// in: x fp32 [32, 4]; out: sums [8, 4], to which lane i adds row i at i % 8
__global__ void reduce_add_kernel(const void* in, void* out) {
  ptx::reduce_add(static_cast<float4*>(out) + threadIdx.x % 8, static_cast<const float4*>(in)[threadIdx.x]);
}

template <bool kTrans>
__global__ void stmatrix_kernel(const void* in, void* out) {
  SharedMemory shared;
  uint4* rows = shared.take<uint4>(32);
  uint32_t r[4];
  load_registers(r, in);
  if constexpr (kTrans)
    ptx::stmatrix_x4_trans(rows + threadIdx.x, r);
  else
    ptx::stmatrix_x4(rows + threadIdx.x, r);
  __syncthreads();
  static_cast<uint4*>(out)[threadIdx.x] = rows[threadIdx.x];
}

// The tensor [5, 6, kCols] of T is `in`; one tile [2, 4, box] of it goes to shared memory and out as it lies there,
// with coordinates that leave the tensor on two sides.
constexpr int kTmaInner = 96, kTmaRows = 6, kTmaSlices = 5;

template <int kTileBytes>
__global__ void tma_load_kernel(const __grid_constant__ CUtensorMap map, void* out, int c0, int c1, int c2) {
  SharedMemory shared;
  unsigned char* tile = shared.take<unsigned char>(kTileBytes, 1024);
  uint64_t* barrier = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, kTileBytes);
    ptx::tma_load(tile, &map, barrier, c0, c1, c2);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kTileBytes; i += 32) static_cast<unsigned char*>(out)[i] = tile[i];
}

// The other way: `in` is the shared tile.
template <int kTileBytes, bool kReduce>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, const void* in, int c0, int c1, int c2) {
  SharedMemory shared;
  unsigned char* tile = shared.take<unsigned char>(kTileBytes, 1024);
  for (int i = static_cast<int>(threadIdx.x); i < kTileBytes; i += 32)
    tile[i] = static_cast<const unsigned char*>(in)[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kReduce)
      ptx::tma_reduce_add(&map, tile, c0, c1, c2);
    else
      ptx::tma_store(&map, tile, c0, c1, c2);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// in: fp32 [256]; out [256]: in, with 1 added to each element by a reduction from shared memory
__global__ void bulk_kernel(const void* in, void* out) {
  SharedMemory shared;
  float* copy = shared.take<float>(256, 16);
  float* ones = shared.take<float>(256, 16);
  uint64_t* barrier = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) ones[i] = 1.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, 1024);
    ptx::bulk_load(copy, in, 1024, barrier);
    ptx::mbarrier_wait(barrier, 0);
    ptx::bulk_store(out, copy, 1024);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::bulk_reduce_add(static_cast<float*>(out), ones, 1024);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// in: a [64, 32], b [N, 32] (K-major; b [32, N] when kTransB) in T; out: d [64][N], a b over 32 inner elements,
// from two wgmma of which the second accumulates. With kTransA a is [32, 64]. kRegisters: a comes from registers.
template <class T, int N, bool kRegisters, bool kTransA, bool kTransB, int kWidth>
__global__ void wgmma_kernel(const void* in, void* out) {
  constexpr int K = 32;
  constexpr Swizzle kMode = kWidth == 128  ? Swizzle::k128
                            : kWidth == 64 ? Swizzle::k64
                            : kWidth == 32 ? Swizzle::k32
                                           : Swizzle::kNone;
  constexpr int kInner = (kWidth == 16 ? 16 : kWidth) / 2;  // elements of a panel's row
  SharedMemory shared;
  T* a = shared.take<T>(64 * K * (128 / 16), 1024);
  T* b = shared.take<T>(N * K * (128 / 16), 1024);
  const T* source = static_cast<const T*>(in);
  // Rows of `inner` contiguous elements go into panels of kInner columns (one 16-byte chunk without swizzle), row
  // after row.
  const auto fill = [&](T* to, const T* from, int rows, int columns) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += 128) {
      const int row = i / columns, column = i % columns, panel = column / kInner;
      int offset = (panel * rows + row) * kInner * 2 + column % kInner * 2;
      if (kWidth == 128) offset ^= (offset >> 7 & 7) << 4;
      if (kWidth == 64) offset ^= (offset >> 7 & 3) << 4;
      if (kWidth == 32) offset ^= (offset >> 7 & 1) << 4;
      to[offset / 2] = from[i];
    }
  };
  fill(a, source, kTransA ? K : 64, kTransA ? 64 : K);
  fill(b, source + 64 * K, kTransB ? K : N, kTransB ? N : K);
  ptx::fence_proxy_async();
  __syncthreads();
  // Where the k16 step begins, and the descriptor's two distances.
  const auto descriptor = [&](const T* matrix, int step, bool transposed, int size) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(matrix);
    if (!transposed) {
      const int panel_bytes = size * kInner * 2;
      if (kWidth == 16) return ptx::wgmma_descriptor(bytes + step * 2 * panel_bytes, kMode, panel_bytes, 128);
      const int column = step * 16;
      return ptx::wgmma_descriptor(bytes + column / kInner * panel_bytes + column % kInner * 2, kMode, 16,
                                   8 * kWidth);
    }
    const int panel_bytes = K * kInner * 2;
    if (kWidth == 16) return ptx::wgmma_descriptor(bytes + step * 256, kMode, 128, panel_bytes);
    return ptx::wgmma_descriptor(bytes + step * 16 * kWidth, kMode, panel_bytes, 8 * kWidth);
  };
  float d[N / 2];
  uint32_t registers[2][4];
  for (int step = 0; step < 2; ++step)
    for (int i = 0; i < 4; ++i) {
      const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4 + i % 2 * 8,
                column = step * 16 + lane % 4 * 2 + i / 2 * 8;
      memcpy(&registers[step][i], source + row * K + column, 4);
    }
  ptx::wgmma_fence();
  for (int step = 0; step < 2; ++step) {
    if constexpr (kRegisters)
      ptx::wgmma_rs<T, N, kTransB>(d, registers[step], descriptor(b, step, kTransB, N), step != 0);
    else
      ptx::wgmma_ss<T, N, kTransA, kTransB>(d, descriptor(a, step, kTransA, 64), descriptor(b, step, kTransB, N),
                                            step != 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4 + i / 2 % 2 * 8,
              column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    static_cast<float*>(out)[row * N + column] = d[i];
  }
}

template <class T, int kBox, Swizzle kSwizzle>
struct Tma {
  static constexpr int kBytes = 2 * 4 * kBox * static_cast<int>(sizeof(T));
  static const char* map(CUtensorMap* result, const void* base) {
    TensorMapConfig config{};
    config.dtype = sizeof(T) == 4                ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                   : std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    config.element_bytes = sizeof(T), config.rank = 3, config.base = base, config.swizzle = kSwizzle;
    const uint64_t size[] = {kTmaInner, kTmaRows, kTmaSlices}, row = kTmaInner * sizeof(T);
    const uint64_t stride[] = {0, row, row * kTmaRows};
    const unsigned box[] = {kBox, 4, 2};
    for (int i = 0; i < 3; ++i) config.size[i] = size[i], config.stride[i] = stride[i], config.box[i] = box[i];
    return encode_tensor_map(result, config);
  }
  static const char* load(const void* in, void* out, int c0, int c1, int c2) {
    CUtensorMap tensor;
    if (const char* error = map(&tensor, in)) return error;
    return launch(tma_load_kernel<kBytes>, {1, 32, kBytes + 8}, tensor, out, c0, c1, c2);
  }
  template <bool kReduce>
  static const char* store(const void* in, void* out, int c0, int c1, int c2) {
    CUtensorMap tensor;
    if (const char* error = map(&tensor, out)) return error;
    return launch(tma_store_kernel<kBytes, kReduce>, {1, 32, kBytes}, tensor, in, c0, c1, c2);
  }
};

template <class T, int N, bool kRegisters, bool kTransA, bool kTransB, int kWidth>
const char* wgmma(const void* in, void* out) {
  return launch(wgmma_kernel<T, N, kRegisters, kTransA, kTransB, kWidth>, {1, 128, (64 + N) * 32 * 8 * 2}, in, out);
}

#endif  // HAS_SM90A

}  // namespace

// Runs instruction `name` on device pointers; null or what went wrong.
const char* run_instruction(const char* name, const void* in, void* out) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  if (is("mma_bf16")) return launch(mma_kernel<BFloat16>, {1, 32}, in, out);
  if (is("mma_fp16")) return launch(mma_kernel<Float16>, {1, 32}, in, out);
  if (is("mma_tf32")) return launch(mma_kernel<float>, {1, 32}, in, out);
  if (is("ldmatrix")) return launch(ldmatrix_kernel<false>, {1, 32, 512}, in, out);
  if (is("ldmatrix_trans")) return launch(ldmatrix_kernel<true>, {1, 32, 512}, in, out);
  if (is("pack_bf16")) return launch(convert_kernel<0>, {1, 256}, in, out);
  if (is("pack_fp16")) return launch(convert_kernel<1>, {1, 256}, in, out);
  if (is("to_tf32")) return launch(convert_kernel<2>, {1, 256}, in, out);
  if (is("exp2")) return launch(convert_kernel<3>, {1, 256}, in, out);
  if (is("log2")) return launch(convert_kernel<4>, {1, 256}, in, out);
  if (is("fp16_to_float")) return launch(convert_kernel<5>, {1, 256}, in, out);
  if (is("cp_async")) return launch(cp_async_kernel, {1, 32, 512}, in, out);
  if (is("reduce")) return launch(reduce_kernel, {1, 128, 16}, in, out);
  if (is("turns")) return launch(turns_kernel, {4, 32, 4}, in, out);
#ifdef HAS_SM90A
  if (is("stmatrix")) return launch(stmatrix_kernel<false>, {1, 32, 512}, in, out);
  if (is("stmatrix_trans")) return launch(stmatrix_kernel<true>, {1, 32, 512}, in, out);
  if (is("reduce_add")) return launch(reduce_add_kernel, {1, 32, 0}, in, out);
  if (is("bulk")) return launch(bulk_kernel, {1, 32, 2056}, in, out);
  if (is("tma_load_none")) return Tma<Float16, 32, Swizzle::kNone>::load(in, out, 16, 1, 1);
  if (is("tma_load_32")) return Tma<Float16, 16, Swizzle::k32>::load(in, out, 88, -2, 4);
  if (is("tma_load_64")) return Tma<BFloat16, 32, Swizzle::k64>::load(in, out, -8, 3, 1);
  if (is("tma_load_128")) return Tma<BFloat16, 64, Swizzle::k128>::load(in, out, 40, 4, -1);
  if (is("tma_store_128")) return Tma<BFloat16, 64, Swizzle::k128>::store<false>(in, out, 40, 4, -1);
  if (is("tma_store_none")) return Tma<float, 32, Swizzle::kNone>::store<false>(in, out, -4, 1, 1);
  if (is("tma_reduce_fp32")) return Tma<float, 32, Swizzle::k128>::store<true>(in, out, 4, 1, 4);
  if (is("tma_reduce_bf16")) return Tma<BFloat16, 32, Swizzle::k64>::store<true>(in, out, 72, 1, 1);
  if (is("wgmma_ss_64")) return wgmma<BFloat16, 64, false, false, false, 64>(in, out);
  if (is("wgmma_ss_32")) return wgmma<Float16, 32, false, false, false, 32>(in, out);
  if (is("wgmma_ss_none")) return wgmma<BFloat16, 96, false, false, false, 16>(in, out);
  if (is("wgmma_ss_80")) return wgmma<BFloat16, 80, false, false, false, 64>(in, out);
  if (is("wgmma_ss_112")) return wgmma<Float16, 112, false, false, false, 64>(in, out);
  if (is("wgmma_ss_trans_b")) return wgmma<BFloat16, 128, false, false, true, 128>(in, out);
  if (is("wgmma_ss_trans_both")) return wgmma<Float16, 128, false, true, true, 128>(in, out);
  if (is("wgmma_ss_trans_64")) return wgmma<BFloat16, 64, false, true, true, 64>(in, out);
  if (is("wgmma_ss_trans_none")) return wgmma<BFloat16, 32, false, true, true, 16>(in, out);
  if (is("wgmma_rs")) return wgmma<BFloat16, 192, true, false, false, 64>(in, out);
  if (is("wgmma_rs_176")) return wgmma<BFloat16, 176, true, false, false, 64>(in, out);
  if (is("wgmma_rs_trans_b")) return wgmma<Float16, 256, true, false, true, 128>(in, out);
#endif
  return "no such instruction";
}

}  // namespace pykernels::cuda

// For record_vectors.py: host pointers; `out` is also copied in, for what adds to it or leaves parts alone.
extern "C" const char* pykernels_run_instruction(const char* name, const void* in, size_t in_bytes, void* out,
                                                 size_t out_bytes) {
  void *device_in = nullptr, *device_out = nullptr;
  if (cudaMalloc(&device_in, in_bytes) != cudaSuccess || cudaMalloc(&device_out, out_bytes) != cudaSuccess)
    return "cudaMalloc failed";
  cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice);
  cudaMemcpy(device_out, out, out_bytes, cudaMemcpyHostToDevice);
  const char* error = pykernels::cuda::run_instruction(name, device_in, device_out);
  const cudaError_t failed = cudaDeviceSynchronize();
  if (error == nullptr && failed != cudaSuccess) error = cudaGetErrorString(failed);
  cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost);
  cudaFree(device_in), cudaFree(device_out);
  return error;
}
