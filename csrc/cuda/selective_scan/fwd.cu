// The forward pass.
#include "scan.cuh"

namespace pykernels::cuda {
namespace scan {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kChannels = kWarps * kWarpChannels;

// kEnds: what the segment does to a state, ends and products [slots, N, D]; else the segment itself.
template <class T, bool kEnds>
__global__ void __launch_bounds__(kThreads, kEnds ? 5 : 4)
    selective_scan_fwd_kernel(const __grid_constant__ SelectiveScanParams p, Split split, float* products) {
  const Place place = Place::of<kChannels>(p);
  const Segment segment = segment_at(p, split, place.slot);
  const bool inside = place.active && segment.owned;
  const int states = static_cast<int>(p.state);
  SharedMemory shared;
  float* const state = shared.take<float>(static_cast<unsigned>(kChannels * states)) + place.row * states;
  for (int n = place.lane; n < states; n += kLanes) {
    float h = 0.0f;
    if (!kEnds && inside) {
      if (split.split)
        h = split.enter[row_at(p, place.slot, n, place.channel)];
      else if (p.initial_state != nullptr)
        h = static_cast<const float*>(p.initial_state)[state_at(p, segment.sequence, place.channel, n)];
    }
    state[n] = h;
  }
  __syncwarp();

  float segment_rate = 0.0f;
  int64_t chunk = segment.chunk;
#pragma unroll 1
  for (int64_t start = segment.first; start < segment.last; start += kChunk, ++chunk) {
    const int64_t token = start + place.lane * kRun;
    const int there = place.active ? static_cast<int>(max(min(segment.last - token, int64_t{kRun}), int64_t{0})) : 0;
    const int count = segment.owned ? there : 0;
    float rate[kRun], input[kRun], u[kRun], y[kRun] = {}, lane_rate = 0.0f;
    load_steps<T>(rate, p, segment.batch, place.channel, token, count);
    load_tokens<T>(u, p.u, p.u_stride, segment.batch, place.channel, token, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      input[i] = rate[i] * u[i];
      rate[i] *= kLog2E;
      lane_rate += rate[i];
    }
    segment_rate += lane_rate;
    ptx::keep(rate), ptx::keep(input);
    States<T> B(p.B, segment.batch, place.group, place.channel, states, token, count);
    States<T> C(p.C, segment.batch, place.group, place.channel, states, token, count);
    const float* const rates = rates_of(p, place.channel);
    const bool keeps = !kEnds && p.chunk_states != nullptr && inside && place.lane == 0;
    float* kept = static_cast<float*>(p.chunk_states) + row_at(p, chunk, 0, place.channel);
#pragma unroll 1
    for (int n = 0; n < states; ++n, kept += p.channels) {
      const float A = finite_rate(rates[n]), before = state[n];
      if (keeps) *kept = before;
      float a[kRun], x[kRun];
      B.next(x, p.B, count);
      float h = place.lane == 0 ? before : 0.0f;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        a[i] = ptx::exp2(rate[i] * A);
        x[i] *= input[i];
        h = a[i] * h + x[i];
      }
      h = scan_lanes<false>(h, ptx::exp2(lane_rate * A), place.lane);
      float entering = 0.0f;
      if constexpr (!kEnds) entering = __shfl_up_sync(0xffffffffu, h, 1u, kLanes);
      if (place.lane == kLanes - 1) state[n] = h;
      if constexpr (!kEnds) {
        h = place.lane == 0 ? before : entering;
        float c[kRun];
        C.next(c, p.C, count);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          h = a[i] * h + x[i];
          y[i] += h * c[i];
        }
      }
    }
    __syncwarp();
    if constexpr (!kEnds) {
      const float skip = p.D != nullptr ? static_cast<const float*>(p.D)[place.channel] : 0.0f;
#pragma unroll
      for (int i = 0; i < kRun; ++i) y[i] += skip * u[i];
      if (p.z != nullptr) {
        float z[kRun];
        load_tokens<T>(z, p.z, p.z_stride, segment.batch, place.channel, token, count);
#pragma unroll
        for (int i = 0; i < kRun; ++i) y[i] *= silu(z[i]);
      }
      if (!segment.owned) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) y[i] = 0.0f;
      }
      store_run(static_cast<T*>(p.out) + offset_of(p.out_stride, segment.batch, place.channel, token),
                p.out_stride.token, y, there);
    }
  }

  if constexpr (kEnds) segment_rate = sum_lanes(segment_rate);
  if (!inside) return;
  for (int n = place.lane; n < states; n += kLanes) {
    if constexpr (kEnds) {
      const int64_t at = row_at(p, place.slot, n, place.channel);
      split.enter[at] = state[n];
      products[at] = ptx::exp2(segment_rate * finite_rate(rates_of(p, place.channel)[n]));
    } else if (!split.split && segment.ends) {
      static_cast<float*>(p.final_state)[state_at(p, segment.sequence, place.channel, n)] = state[n];
    }
  }
}

}  // namespace
}  // namespace scan

int64_t selective_scan_fwd_scratch(const SelectiveScanParams& p) {
  const scan::Split split = scan::make_split(p, scan::blocks_of<scan::kChannels>(p));
  return split.split ? 2 * scan::rows_of(p, split) : 0;
}

const char* selective_scan_fwd(const SelectiveScanParams& p, void* scratch, void* stream) {
  if (const char* reason = scan::unsupported(p)) return reason;
  const int64_t blocks = scan::blocks_of<scan::kChannels>(p);
  scan::Split split = scan::make_split(p, blocks);
  split.enter = static_cast<float*>(scratch);
  float* const products = split.enter + (split.split ? scan::rows_of(p, split) : 0);
  return for_dtype(p.dtype, [&]<class T>() -> const char* {
    const auto run = [&](auto* kernel) {
      return scan::launch_blocks(kernel, split.slots * blocks, scan::kThreads, scan::kChannels * p.state, stream, p,
                                 split, products);
    };
    if (split.split) {
      if (const char* error = run(scan::selective_scan_fwd_kernel<T, true>)) return error;
      if (const char* error =
              scan::launch_carry<false>(p, split, products, p.initial_state, p.final_state, stream))
        return error;
    }
    if (const char* error = scan::clear_states(p, split, p.final_state, stream)) return error;
    return run(scan::selective_scan_fwd_kernel<T, false>);
  });
}

}  // namespace pykernels::cuda
