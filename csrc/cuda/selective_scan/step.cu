// A step of generation: eight lanes for each channel of each batch entry, along its states, which they alone read and
// replace.
#include "scan.cuh"

namespace pykernels::cuda {
namespace scan {
namespace {

constexpr int kThreads = 128, kChannels = kThreads / kLanes;

__device__ __forceinline__ int64_t offset_of(const SelectiveScanStepParams::Strides& stride, int64_t batch,
                                             int64_t head, int64_t channel) {
  return batch * stride.batch + head * stride.head + channel * stride.channel;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    selective_scan_step_kernel(const __grid_constant__ SelectiveScanStepParams p) {
  const int lane = threadIdx.x % kLanes;
  const int64_t i = int64_t{blockIdx.x} * kChannels + threadIdx.x / kLanes;
  const bool there = i < p.batch * p.heads * p.channels;
  const int64_t channel = there ? i % p.channels : 0, head = there ? i / p.channels % p.heads : 0,
                batch = there ? i / p.channels / p.heads : 0;
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[batch] : batch;
  const bool active = there && slot >= 0 && slot < p.slots;
  float u = 0.0f, y = 0.0f;
  if (active) {
    u = widen(static_cast<const T*>(p.x)[offset_of(p.x_stride, batch, head, channel)]);
    float dt = load_either<T>(p.delta, p.delta_dtype, offset_of(p.delta_stride, batch, head, channel));
    if (p.delta_bias != nullptr)
      dt += load_either<T>(p.delta_bias, p.delta_bias_dtype, offset_of(p.delta_bias_stride, 0, head, channel));
    if (p.delta_softplus) dt = softplus(dt);
    const float rate = dt * kLog2E, input = dt * u;
    const int64_t group = head / (p.heads / p.groups);
    float* const state = static_cast<float*>(p.states) + offset_of(p.states_stride, slot, head, channel);
    const float* const A = static_cast<const float*>(p.A) + offset_of(p.A_stride, 0, head, channel);
    const int64_t B = offset_of(p.B_stride, batch, group, 0), C = offset_of(p.C_stride, batch, group, 0);
    for (int64_t n = lane; n < p.state; n += kLanes) {
      float& h = state[n * p.states_stride.state];
      h = ptx::exp2(rate * A[n * p.A_stride.state]) * h +
          input * load_either<T>(p.B, p.B_dtype, B + n * p.B_stride.state);
      y += h * load_either<T>(p.C, p.C_dtype, C + n * p.C_stride.state);
    }
  }
  y = sum_lanes(y);
  if (!there || lane > 0) return;
  if (active && p.D != nullptr) y += load_either<T>(p.D, p.D_dtype, offset_of(p.D_stride, 0, head, channel)) * u;
  if (active && p.z != nullptr)
    y *= silu(widen(static_cast<const T*>(p.z)[offset_of(p.z_stride, batch, head, channel)]));
  static_cast<T*>(p.out)[offset_of(p.out_stride, batch, head, channel)] = narrow<T>(y);
}

}  // namespace
}  // namespace scan

const char* selective_scan_step(const SelectiveScanStepParams& p, void* stream) {
  if (p.is_complex) return "the CUDA kernels take a real A";
  const int64_t channels = p.batch * p.heads * p.channels;
  return for_dtype(p.dtype, [&]<class T>() {
    return scan::launch_blocks(scan::selective_scan_step_kernel<T>, (channels + scan::kChannels - 1) / scan::kChannels,
                               scan::kThreads, 0, stream, p);
  });
}

}  // namespace pykernels::cuda
