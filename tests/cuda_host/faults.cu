// Kernels with one planted fault each, beside the same kernel without it ("..._good"): what the executor must
// catch, and must not. All of them compute out[i] = 2 in[i] for n floats, n a multiple of 256.
#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/shared.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kThreads = 128;

__device__ int thread() { return static_cast<int>(threadIdx.x); }

// Each thread hands its element to another one through shared memory.
template <bool kBarrier>
__global__ void barrier_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(kThreads);
  for (int first = 0; first < n; first += kThreads) {
    values[thread()] = in[first + thread()];
    __syncthreads();
    const int other = kThreads - 1 - thread();
    out[first + other] = 2 * values[other];
    if constexpr (kBarrier) __syncthreads();  // before the values are overwritten
  }
}

template <bool kWait>
__global__ void cp_async_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(4 * kThreads, 16);
  for (int first = 0; first < n; first += 4 * kThreads) {
    if (first + 4 * thread() < n) ptx::cp_async_16(values + 4 * thread(), in + first + 4 * thread());
    ptx::cp_async_commit();
    if constexpr (kWait) ptx::cp_async_wait<0>();
    __syncthreads();
    for (int i = thread(); i < 4 * kThreads && first + i < n; i += kThreads) out[first + i] = 2 * values[i];
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
}

// Two stages by cp.async; the next stage is filled while the present one is read. With the fault there is no
// barrier between the last reads of a stage and its refilling.
template <bool kBarrier>
__global__ void cp_async_pipeline_kernel(const float* in, float* out, int n) {
  constexpr int kStage = 4 * kThreads;
  SharedMemory shared;
  float* stages = shared.take<float>(2 * kStage, 16);
  const auto fill = [&](int stage, int first) {
    if (first + 4 * thread() < n) ptx::cp_async_16(stages + stage * kStage + 4 * thread(), in + first + 4 * thread());
    ptx::cp_async_commit();
  };
  fill(0, 0);
  for (int first = 0, stage = 0; first < n; first += kStage, stage ^= 1) {
    if constexpr (kBarrier) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      fill(stage ^ 1, first + kStage);
    } else {
      fill(stage ^ 1, first + kStage);
      ptx::cp_async_wait<1>();
      __syncthreads();
    }
    const int other = kThreads - 1 - thread();
    for (int i = other; i < kStage && first + i < n; i += kThreads) out[first + i] = 2 * stages[stage * kStage + i];
  }
  ptx::cp_async_wait<0>();
}

// A producer warp and three consumer warps around two stages filled by bulk copies. The faults: the producer does
// not wait until a stage has been read, or the consumers say so too early.
enum class PipelineFault { kNone, kWaitEmpty, kReleasedEarly };

template <PipelineFault kFault>
__global__ void pipeline_kernel(const float* in, float* out, int n) {
  constexpr int kStage = 96, kBytes = kStage * 4;
  SharedMemory shared;
  float* stages[2] = {shared.take<float>(kStage, 128), shared.take<float>(kStage, 128)};
  uint64_t* full = shared.take<uint64_t>(2);
  uint64_t* empty = shared.take<uint64_t>(2);
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(full + i, 1), ptx::mbarrier_init(empty + i, 96);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int steps = n / kStage;
  if (thread() < 32) {
    const bool leader = ptx::elect_one();
    for (int step = 0; leader && step < steps; ++step) {
      const int stage = step % 2;
      const unsigned round = static_cast<unsigned>(step / 2);
      if constexpr (kFault != PipelineFault::kWaitEmpty) ptx::mbarrier_wait(empty + stage, (round & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + stage, kBytes);
      ptx::bulk_load(stages[stage], in + step * kStage, kBytes, full + stage);
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2, i = thread() - 32;
      ptx::mbarrier_wait(full + stage, static_cast<unsigned>(step / 2) & 1);
      if constexpr (kFault == PipelineFault::kReleasedEarly) ptx::mbarrier_arrive(empty + stage);
      out[step * kStage + i] = 2 * stages[stage][i];
      if constexpr (kFault != PipelineFault::kReleasedEarly) ptx::mbarrier_arrive(empty + stage);
    }
    // What is left of n.
    for (int i = steps * kStage + thread() - 32; i < n; i += 96) out[i] = 2 * in[i];
  }
}

template <bool kFence>
__global__ void proxy_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(kThreads, 16);
  for (int first = 0; first < n; first += kThreads) {
    values[thread()] = 2 * in[first + thread()];
    if constexpr (kFence) ptx::fence_proxy_async();
    __syncthreads();
    if (thread() == 0) {
      ptx::bulk_store(out + first, values, kThreads * 4);
      ptx::bulk_commit();
      ptx::bulk_wait<0>();
    }
    __syncthreads();
  }
}

// The stage of a bulk store is overwritten before it was read.
template <bool kWait>
__global__ void store_reuse_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(kThreads, 16);
  for (int first = 0; first < n; first += kThreads) {
    values[thread()] = 2 * in[first + thread()];
    ptx::fence_proxy_async();
    __syncthreads();
    if (thread() == 0) {
      ptx::bulk_store(out + first, values, kThreads * 4);
      ptx::bulk_commit();
      if constexpr (kWait) ptx::bulk_wait_read<0>();
    }
    __syncthreads();
  }
  if (thread() == 0) ptx::bulk_wait<0>();
}

template <bool kGood>
__global__ void global_bounds_kernel(const float* in, float* out, int n) {
  for (int i = thread(); kGood ? i < n : i <= n; i += kThreads) out[i] = 2 * in[i];
}

template <bool kGood>
__global__ void shared_bounds_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(kThreads);
  float* others = shared.take<float>(kThreads);
  for (int first = 0; first < n; first += kThreads) {
    const int shift = kGood ? 0 : 1;
    others[thread()] = 1.0f;
    values[thread() + shift] = in[first + thread()];
    __syncthreads();
    out[first + thread()] = 2 * values[thread() + shift] * others[thread()];
    __syncthreads();
  }
}

template <bool kGood>
__global__ void unwritten_kernel(const float* in, float* out, int n) {
  for (int i = thread(); i < (kGood ? n : n - 1); i += kThreads) out[i] = 2 * in[i];
}

template <bool kGood>
__global__ void divergent_kernel(const float* in, float* out, int n) {
  for (int i = thread(); i < n; i += kThreads) out[i] = 2 * in[i];
  if (kGood || thread() < 64)
    __syncthreads();
  else
    __syncthreads();
}

template <bool kGood>
__global__ void exited_kernel(const float* in, float* out, int n) {
  for (int i = thread(); i < n; i += kThreads) out[i] = 2 * in[i];
  if (!kGood && thread() >= 96) return;
  __syncthreads();
}

template <bool kGood>
__global__ void divergent_warp_kernel(const float* in, float* out, int n) {
  float sum = 0;
  for (int i = thread(); i < n; i += kThreads) out[i] = 2 * in[i];
  if (kGood || thread() % 32 < 16)
    sum = __shfl_xor_sync(~0u, sum, 1);
  else
    sum = __shfl_xor_sync(~0u, sum, 1);
}

// Barrier 3 waits for a warp that never comes.
template <bool kGood>
__global__ void deadlock_kernel(const float* in, float* out, int n) {
  for (int i = thread(); i < n; i += kThreads) out[i] = 2 * in[i];
  if (kGood || thread() >= 32) ptx::named_barrier_sync(3, kThreads);
}

// The consumer waits for bytes that nobody sends.
template <bool kGood>
__global__ void mbarrier_deadlock_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(4, 16);
  uint64_t* barrier = shared.take<uint64_t>(1);
  for (int i = thread(); i < n; i += kThreads) out[i] = 2 * in[i];
  if (thread() == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (thread() == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, kGood ? 16 : 32);
    ptx::bulk_load(values, in, 16, barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
}

template <bool kGood>
__global__ void init_fence_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  float* values = shared.take<float>(4, 16);
  uint64_t* barrier = shared.take<uint64_t>(1);
  for (int i = thread(); i < n; i += kThreads) out[i] = 2 * in[i];
  if (thread() == 0) {
    ptx::mbarrier_init(barrier, 1);
    if constexpr (kGood) ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 16);
    ptx::bulk_load(values, in, 16, barrier);
    ptx::mbarrier_wait(barrier, 0);
  }
}

// Identity by wgmma: D = A I, with A in shared memory. The faults: no fence of the proxy, no wait, no wgmma.fence.
enum class WgmmaFault { kNone, kProxyFence, kWait, kFence };

template <WgmmaFault kFault>
__global__ void wgmma_kernel(const float* in, float* out, int n) {
  SharedMemory shared;
  uint16_t* a = shared.take<uint16_t>(64 * 16, 256);
  uint16_t* b = shared.take<uint16_t>(32 * 16, 256);
  const auto place = [](int row, int column) {
    const int offset = row * 32 + column * 2;
    return (offset ^ (offset >> 7 & 1) << 4) / 2;
  };
  for (int i = thread(); i < 32 * 16; i += kThreads)
    b[place(i / 16, i % 16)] =
        i / 16 == i % 16 ? static_cast<uint16_t>(0x4000) : static_cast<uint16_t>(0);  // 2 in bf16
  for (int first = 0; first < n; first += 64) {
    // Column 0 of A holds 64 inputs (small integers, exact in bf16).
    for (int i = thread(); i < 64 * 16; i += kThreads)
      a[place(i / 16, i % 16)] =
          i % 16 == 0 ? static_cast<uint16_t>(__float_as_uint(in[first + i / 16]) >> 16) : static_cast<uint16_t>(0);
    if constexpr (kFault != WgmmaFault::kProxyFence) ptx::fence_proxy_async();
    __syncthreads();
    float d[16] = {};
    if constexpr (kFault != WgmmaFault::kFence) ptx::wgmma_fence();
    ptx::wgmma_ss<BFloat16, 32>(d, ptx::wgmma_descriptor(a, Swizzle::k32, 16, 256),
                                ptx::wgmma_descriptor(b, Swizzle::k32, 16, 256), false);
    ptx::wgmma_commit();
    if constexpr (kFault != WgmmaFault::kWait) ptx::wgmma_wait<0>();
    const int lane = thread() % 32, row = thread() / 32 * 16 + lane / 4;
    if (lane % 4 == 0) out[first + row] = d[0], out[first + row + 8] = d[2];
    ptx::wgmma_wait<0>();
    __syncthreads();
  }
}

}  // namespace

const char* run_fault(const char* name, const float* in, float* out, int n) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  const auto run = [&](void (*kernel)(const float*, float*, int), unsigned shared_bytes = 0) {
    return launch(kernel, {1, kThreads, shared_bytes}, in, out, n);
  };
  constexpr unsigned kStage = 4 * kThreads * 4;
  if (is("barrier_good")) return run(barrier_kernel<true>, 512);
  if (is("barrier_missing")) return run(barrier_kernel<false>, 512);
  if (is("cp_async_good")) return run(cp_async_kernel<true>, kStage);
  if (is("cp_async_wait_missing")) return run(cp_async_kernel<false>, kStage);
  if (is("cp_async_pipeline_good")) return run(cp_async_pipeline_kernel<true>, 2 * kStage);
  if (is("cp_async_pipeline_refilled_early")) return run(cp_async_pipeline_kernel<false>, 2 * kStage);
  if (is("pipeline_good")) return run(pipeline_kernel<PipelineFault::kNone>, 800);
  if (is("pipeline_refilled_early")) return run(pipeline_kernel<PipelineFault::kWaitEmpty>, 800);
  if (is("pipeline_released_early")) return run(pipeline_kernel<PipelineFault::kReleasedEarly>, 800);
  if (is("proxy_good")) return run(proxy_kernel<true>, 512);
  if (is("proxy_fence_missing")) return run(proxy_kernel<false>, 512);
  if (is("store_reuse_good")) return run(store_reuse_kernel<true>, 512);
  if (is("store_reused_early")) return run(store_reuse_kernel<false>, 512);
  if (is("global_bounds_good")) return run(global_bounds_kernel<true>);
  if (is("global_bounds")) return run(global_bounds_kernel<false>);
  if (is("shared_bounds_good")) return run(shared_bounds_kernel<true>, 1024);
  if (is("shared_bounds")) return run(shared_bounds_kernel<false>, 1024);
  if (is("shared_too_small")) return run(shared_bounds_kernel<true>, 1000);
  if (is("unwritten_good")) return run(unwritten_kernel<true>);
  if (is("unwritten")) return run(unwritten_kernel<false>);
  if (is("divergent_good")) return run(divergent_kernel<true>);
  if (is("divergent")) return run(divergent_kernel<false>);
  if (is("exited_good")) return run(exited_kernel<true>);
  if (is("exited")) return run(exited_kernel<false>);
  if (is("divergent_warp_good")) return run(divergent_warp_kernel<true>);
  if (is("divergent_warp")) return run(divergent_warp_kernel<false>);
  if (is("deadlock_good")) return run(deadlock_kernel<true>);
  if (is("deadlock")) return run(deadlock_kernel<false>);
  if (is("mbarrier_deadlock_good")) return run(mbarrier_deadlock_kernel<true>, 32);
  if (is("mbarrier_deadlock")) return run(mbarrier_deadlock_kernel<false>, 32);
  if (is("init_fence_good")) return run(init_fence_kernel<true>, 32);
  if (is("init_fence_missing")) return run(init_fence_kernel<false>, 32);
  if (is("wgmma_good")) return run(wgmma_kernel<WgmmaFault::kNone>, 3072);
  if (is("wgmma_proxy_fence_missing")) return run(wgmma_kernel<WgmmaFault::kProxyFence>, 3072);
  if (is("wgmma_wait_missing")) return run(wgmma_kernel<WgmmaFault::kWait>, 3072);
  if (is("wgmma_fence_missing")) return run(wgmma_kernel<WgmmaFault::kFence>, 3072);
  return "no such fault";
}

}  // namespace pykernels::cuda
