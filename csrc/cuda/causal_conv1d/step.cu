// A step of generation: one thread for each batch entry and channel, whose state it alone reads and replaces.
#include "conv.cuh"

namespace pykernels::cuda {
namespace conv {
namespace {

// W is the width when it is 2 to 4, else 0.
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_step_kernel(const __grid_constant__ CausalConv1dStepParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.batch * p.channels) return;
  const int64_t channel = i % p.channels, batch = i / p.channels, width = W > 0 ? W : p.width;
  const T* const x = row_of<const T>(p.x, p.x_stride, batch, channel);
  T* const out = row_of<T>(p.out, p.out_stride, batch, channel);
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[batch] : batch;
  if (slot < 0 || slot >= p.slots) {
    for (int64_t t = 0; t < p.tokens; ++t) out[t * p.out_stride.token] = narrow<T>(0.0f);
    return;
  }
  T* const state = row_of<T>(p.state, p.state_stride, slot, channel);
  const auto weight = [&](int64_t w) { return load_either<T>(p.weight, p.weight_dtype, channel * width + w); };
  const float bias = p.bias != nullptr ? load_either<T>(p.bias, p.bias_dtype, channel) : 0.0f;
  // Of the state followed by x.
  const auto entry = [&](int64_t j) {
    return j < width - 1 ? state[j * p.state_stride.token] : x[(j - (width - 1)) * p.x_stride.token];
  };
  for (int64_t t = 0; t < p.tokens; ++t) {
    float y = bias;
    if constexpr (W > 0) {
#pragma unroll
      for (int w = 0; w < W; ++w) y += weight(w) * widen(entry(t + w));
    } else {
      for (int64_t w = 0; w < width; ++w) y += weight(w) * widen(entry(t + w));
    }
    out[t * p.out_stride.token] = narrow<T>(p.silu ? silu(y) : y);
  }
  // Each entry moves T places down, the first one first: what it overwrites has been read.
  for (int64_t j = 0; p.tokens > 0 && j < width - 1; ++j) state[j * p.state_stride.token] = entry(p.tokens + j);
}

}  // namespace
}  // namespace conv

const char* causal_conv1d_step(const CausalConv1dStepParams& p, void* stream) {
  return for_dtype(p.dtype, [&]<class T>() {
    const int64_t blocks = (p.batch * p.channels + conv::kThreads - 1) / conv::kThreads;
    const auto launch = [&](auto* kernel) {
      return conv::launch_blocks(kernel, blocks, conv::kThreads, 0, stream, p);
    };
    switch (p.width) {
      case 2:
        return launch(conv::causal_conv1d_step_kernel<T, 2>);
      case 3:
        return launch(conv::causal_conv1d_step_kernel<T, 3>);
      case 4:
        return launch(conv::causal_conv1d_step_kernel<T, 4>);
      default:
        return launch(conv::causal_conv1d_step_kernel<T, 0>);
    }
  });
}

}  // namespace pykernels::cuda
