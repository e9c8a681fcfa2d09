// What the selective scan's forward and backward kernels share. See selective_scan.h for the maths and the layout,
// README.md for the design.
//
// Tokens go in chunks of kChunk: eight lanes of a warp hold one channel's, eight tokens each, so that a warp has four
// channels and a block kWarps times as many. States n come one after another, each as a scan over the eight lanes. A
// block walks over the chunks of a segment, and what enters the next chunk stays in shared memory. A segment is a whole
// sequence when that fills the machine; else a piece of one, and three kernels take turns: what each segment does to a
// state, the states that enter the segments, the segments themselves.
#pragma once

#include "../../include/pykernels/selective_scan.h"

#include <algorithm>
#include <cfloat>

#include "../common/elements.cuh"
#include "../common/launch.cuh"
#include "../common/sequences.cuh"
#include "../common/shared.cuh"

namespace pykernels::cuda::scan {

constexpr int kLanes = 8, kRun = 8, kChunk = kLanes * kRun;  // lanes of a channel, tokens of a lane
static_assert(kChunk == kSelectiveScanChunk);
constexpr int kWarpChannels = 32 / kLanes;

// How tokens are dealt to blocks.
struct Split {
  int64_t size;       // tokens of a segment, a multiple of kChunk
  int64_t per_batch;  // segments of a batch entry that is not packed
  int64_t slots;      // places for segments; packed sequence s has those from cu_seqlens[s] / size + s on
  bool split;         // whether sequences may have several segments
  // [slots, N, D] when split: the state (or its adjoint) that enters a segment.
  float* enter;
};

// Tokens [first, last) of a sequence, `chunk` the index of their first chunk in chunk_states.
struct Segment {
  int64_t sequence, batch, first, last, chunk;
  bool owned;         // by a sequence
  bool begins, ends;  // whether it holds its sequence's first place, and the last
};

__device__ __forceinline__ Segment segment_at(const SelectiveScanParams& p, const Split& split, int64_t slot) {
  int64_t sequence = slot / split.per_batch, start = 0, end = p.length, index = slot % split.per_batch;
  int64_t chunk = sequence * (p.length / kChunk + 1);
  if (p.cu_seqlens != nullptr) {
    int64_t low = 0, high = p.sequences;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (clamped_offset(p.cu_seqlens, middle, p.length) / split.size + middle <= slot)
        low = middle;
      else
        high = middle - 1;
    }
    sequence = low, start = clamped_offset(p.cu_seqlens, low, p.length);
    if (low < p.sequences) end = max(start, clamped_offset(p.cu_seqlens, low + 1, p.length));
    index = max(slot - (start / split.size + low), int64_t{0});
    chunk = start / kChunk + low;
  }
  const int64_t first = min(start + index * split.size, end), last = min(first + split.size, end);
  return {sequence,
          p.cu_seqlens != nullptr ? 0 : sequence,
          first,
          last,
          chunk + index * (split.size / kChunk),
          p.cu_seqlens == nullptr || sequence < p.sequences,
          index == 0,
          last == end && (first < last || index == 0)};
}

// What a thread works on in a block of kChannels channels, which all belong to one group.
struct Place {
  int64_t channel;
  int slot, group, block;  // block: of the group
  int lane, row;           // of the eight; of the block's channels
  bool active;             // whether there is such a channel

  template <int kChannels>
  static __device__ __forceinline__ Place of(const SelectiveScanParams& p) {
    const int64_t per_group = p.channels / p.groups;
    // A grid has fewer than 2^31 blocks.
    const int of_group = static_cast<int>((per_group + kChannels - 1) / kChannels);
    const int index = static_cast<int>(blockIdx.x);
    const int blocks = static_cast<int>(p.groups) * of_group;
    Place place;
    place.slot = index / blocks;
    place.group = index % blocks / of_group;
    place.block = index % of_group;
    place.lane = threadIdx.x % kLanes;
    place.row = threadIdx.x / kLanes;
    const int64_t within = int64_t{place.block} * kChannels + place.row;
    place.active = within < per_group;
    place.channel = place.group * per_group + (place.active ? within : 0);
    return place;
  }
};
template <int kChannels>
int64_t blocks_of(const SelectiveScanParams& p) {
  return p.groups * ((p.channels / p.groups + kChannels - 1) / kChannels);
}

// The first `count` of eight tokens, zeros after; T or fp32.
template <class T>
__device__ __forceinline__ void load_run(float (&x)[kRun], const T* p, int64_t stride, int count) {
  if (count == kRun && stride == 1 && Neighbours<kRun, T>::aligned(p)) {
    Neighbours<kRun, T>::load(x, p);
  } else {
    stride = ptx::unhoisted(stride);
#pragma unroll
    for (int i = 0; i < kRun; ++i, p += stride) x[i] = i < count ? widen(*p) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void load_run(float (&x)[kRun], const void* data, DType dtype, int64_t offset,
                                         int64_t stride, int count) {
  if (std::is_same_v<T, float> || dtype == DType::kFloat32)
    load_run(x, static_cast<const float*>(data) + offset, stride, count);
  else
    load_run(x, static_cast<const T*>(data) + offset, stride, count);
}
template <class T>
__device__ __forceinline__ void store_run(T* p, int64_t stride, const float (&x)[kRun], int count) {
  if (count == kRun && stride == 1 && Neighbours<kRun, T>::aligned(p)) {
    Neighbours<kRun, T>::store(p, x);
  } else {
    stride = ptx::unhoisted(stride);
#pragma unroll
    for (int i = 0; i < kRun; ++i, p += stride)
      if (i < count) *p = narrow<T>(x[i]);
  }
}
template <class T>
__device__ __forceinline__ void store_run(void* data, DType dtype, int64_t offset, int64_t stride,
                                          const float (&x)[kRun], int count) {
  if (std::is_same_v<T, float> || dtype == DType::kFloat32)
    store_run(static_cast<float*>(data) + offset, stride, x, count);
  else
    store_run(static_cast<T*>(data) + offset, stride, x, count);
}

__device__ __forceinline__ int64_t offset_of(const ChannelStrides& stride, int64_t batch, int64_t channel,
                                             int64_t token) {
  return batch * stride.batch + channel * stride.channel + token * stride.token;
}

// log(1 + e^x), the identity above 20; log1p(e) is 2 atanh(e / (2 + e)), whose series keeps the bits of a small e.
__device__ __forceinline__ float softplus(float x) {
  const float e = ptx::exp2(-fabsf(x) * kLog2E), s = __fdividef(e, e + 2.0f), z = s * s;
  float sum = 2.0f / 15;
  sum = sum * z + 2.0f / 13;
  sum = sum * z + 2.0f / 11;
  sum = sum * z + 2.0f / 9;
  sum = sum * z + 2.0f / 7;
  sum = sum * z + 2.0f / 5;
  sum = sum * z + 2.0f / 3;
  sum = sum * z + 2.0f;
  return x > 20.0f ? x : fmaxf(x, 0.0f) + s * sum;
}

// dt of a thread's tokens, zero behind the first `count`.
template <class T>
__device__ __forceinline__ void load_steps(float (&dt)[kRun], const SelectiveScanParams& p, int64_t batch,
                                           int64_t channel, int64_t token, int count) {
  load_run<T>(dt, p.delta, p.delta_dtype, offset_of(p.delta_stride, batch, channel, token), p.delta_stride.token,
              count);
  const float bias = p.delta_bias != nullptr ? static_cast<const float*>(p.delta_bias)[channel] : 0.0f;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const float x = dt[i] + bias;
    dt[i] = i < count ? (p.delta_softplus ? softplus(x) : x) : 0.0f;
  }
}

// A tensor [B, D, L] of type T.
template <class T>
__device__ __forceinline__ void load_tokens(float (&x)[kRun], const void* data, const ChannelStrides& stride,
                                            int64_t batch, int64_t channel, int64_t token, int count) {
  load_run(x, static_cast<const T*>(data) + offset_of(stride, batch, channel, token), stride.token, count);
}

// B or C at a thread's tokens, one state after another from n on.
template <class T>
class States {
 public:
  __device__ __forceinline__ States(const Projection& from, int64_t batch, int64_t group, int64_t channel,
                                    int64_t states, int64_t token, int count, int n = 0) {
    fp32_ = std::is_same_v<T, float> || from.constant || from.dtype == DType::kFloat32;
    const int64_t first = from.constant ? channel * states + n
                                        : batch * from.batch + group * from.group + n * from.state + token * from.token;
    at_ = first * size();
    // Whether eight tokens of every state are 16 bytes, or twice 16, at a multiple of 16.
    wide_ = !from.constant && count == kRun && from.token == 1 &&
            ((reinterpret_cast<uintptr_t>(from.data) + static_cast<uintptr_t>(at_)) |
             static_cast<uintptr_t>(from.state * size())) % 16 == 0;
  }

  __device__ __forceinline__ void next(float (&x)[kRun], const Projection& from, int count) {
    const unsigned char* const p = static_cast<const unsigned char*>(from.data) + at_;
    if (wide_) {
      if (std::is_same_v<T, float> || fp32_)
        Neighbours<kRun, float>::load(x, reinterpret_cast<const float*>(p));
      else
        Neighbours<kRun, T>::load(x, reinterpret_cast<const T*>(p));
    } else if (from.constant) {
      const float value = *reinterpret_cast<const float*>(p);
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[i] = value;
    } else {
      load_run<T>(x, p, fp32_ ? DType::kFloat32 : from.dtype, 0, from.token, count);
    }
    at_ += (from.constant ? 1 : from.state) * size();
  }

 private:
  __device__ __forceinline__ int64_t size() const { return std::is_same_v<T, float> || fp32_ ? 4 : sizeof(T); }

  int64_t at_;  // in bytes
  bool fp32_, wide_;
};

// A rate that is minus infinity forgets all, but not where there is no step: 0 times it must be 0.
__device__ __forceinline__ float finite_rate(float rate) { return rate < -FLT_MAX ? -FLT_MAX : rate; }
__device__ __forceinline__ const float* rates_of(const SelectiveScanParams& p, int64_t channel) {
  return static_cast<const float*>(p.A) + channel * p.state;
}

// h -> product h + end of a lane's tokens, to that of all tokens up to it (from it, if kReverse) of the eight lanes.
template <bool kReverse>
__device__ __forceinline__ float scan_lanes(float end, float product, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const unsigned delta = static_cast<unsigned>(step);
    const float other_end = kReverse ? __shfl_down_sync(0xffffffffu, end, delta, kLanes)
                                     : __shfl_up_sync(0xffffffffu, end, delta, kLanes);
    const float other_product = kReverse ? __shfl_down_sync(0xffffffffu, product, delta, kLanes)
                                         : __shfl_up_sync(0xffffffffu, product, delta, kLanes);
    if (kReverse ? lane + step < kLanes : lane >= step) {
      end = product * other_end + end;
      product *= other_product;
    }
  }
  return end;
}

__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Of a [states, D, N] or a [slots, N, D] tensor.
__device__ __forceinline__ int64_t state_at(const SelectiveScanParams& p, int64_t sequence, int64_t channel,
                                            int64_t n) {
  return (sequence * p.channels + channel) * p.state + n;
}
__device__ __forceinline__ int64_t row_at(const SelectiveScanParams& p, int64_t slot, int64_t n, int64_t channel) {
  return (slot * p.state + n) * p.channels + channel;
}

// Replaces what each segment does from zero, ends and products [slots, N, D], by the state that enters it, in the order
// of the scan. One thread for each state of each sequence.
constexpr int kCarryThreads = 128;
template <bool kReverse>
__global__ void __launch_bounds__(kCarryThreads)
    selective_scan_carry_kernel(const __grid_constant__ SelectiveScanParams p, Split split, const float* products,
                                const float* first_state, float* last_state) {
  const int64_t i = int64_t{blockIdx.x} * kCarryThreads + threadIdx.x, rows = p.state * p.channels;
  if (i >= p.sequences * rows) return;
  const int64_t index = i / rows, n = i % rows / p.channels, channel = i % p.channels;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const int64_t slot = p.cu_seqlens != nullptr ? sequence.start / split.size + index : index * split.per_batch;
  const int64_t count = (sequence.end - sequence.start + split.size - 1) / split.size;
  float h = first_state != nullptr ? first_state[state_at(p, index, channel, n)] : 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = row_at(p, slot + (kReverse ? count - 1 - k : k), n, channel);
    const float end = split.enter[at], product = products[at];
    split.enter[at] = h;
    h = product * h + end;
  }
  if (last_state != nullptr) last_state[state_at(p, index, channel, n)] = h;
}

// ---- Host ---------------------------------------------------------------------------------------------------------

// Whole sequences while their blocks fill the machine twice; else segments for four blocks on each multiprocessor, of
// 256 tokens or more: a split computes every decay twice.
inline Split make_split(const SelectiveScanParams& p, int64_t blocks) {
  const int64_t machine = multiprocessors(), whole = std::max<int64_t>(1, (p.length + kChunk - 1) / kChunk);
  const int64_t have = std::max<int64_t>(1, blocks * p.batch);
  int64_t chunks = whole;
  if (have < 2 * machine) {
    const int64_t pieces = (4 * machine + have - 1) / have;
    chunks = std::min(whole, std::max<int64_t>(4, (whole + pieces - 1) / pieces));
  }
  Split split{};
  split.size = chunks * kChunk;
  split.per_batch = (whole + chunks - 1) / chunks;
  split.slots = p.cu_seqlens != nullptr ? p.length / split.size + p.sequences + 1 : p.batch * split.per_batch;
  split.split = chunks < whole;
  return split;
}

inline int64_t rows_of(const SelectiveScanParams& p, const Split& split) { return split.slots * p.state * p.channels; }

template <class... Parameters, class... Arguments>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_floats,
                          void* stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more segments than a grid has blocks";
  return launch(kernel,
                {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                 static_cast<unsigned>(shared_floats * static_cast<int64_t>(sizeof(float))),
                 static_cast<cudaStream_t>(stream)},
                arguments...);
}

template <bool kReverse>
const char* launch_carry(const SelectiveScanParams& p, const Split& split, const float* products, const void* first,
                         void* last, void* stream) {
  const int64_t states = p.sequences * p.state * p.channels;
  return launch_blocks(selective_scan_carry_kernel<kReverse>, (states + kCarryThreads - 1) / kCarryThreads,
                       kCarryThreads, 0, stream, p, split, products, static_cast<const float*>(first),
                       static_cast<float*>(last));
}

// States of packed sequences that no block serves, as offsets that lie may leave some, are zero.
inline const char* clear_states(const SelectiveScanParams& p, const Split& split, void* states, void* stream) {
  if (p.cu_seqlens == nullptr || split.split || states == nullptr) return nullptr;
  const size_t bytes = static_cast<size_t>(p.sequences * p.channels * p.state) * sizeof(float);
  const cudaError_t error = cudaMemsetAsync(states, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What no kernel here takes; the Python side does not send it.
inline const char* unsupported(const SelectiveScanParams& p) {
  if (p.dtype == DType::kFloat64) return "the CUDA kernels compute in float32";
  if (p.is_complex) return "the CUDA kernels take a real A";
  return nullptr;
}

}  // namespace pykernels::cuda::scan
