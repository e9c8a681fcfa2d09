// The backward pass. A block walks over the chunks of a segment from the last to the first; h is computed again from
// the state before each chunk. Sums over tokens are kept per segment, sums over channels per block, and added up in
// order by a last kernel: no atomics, bitwise repeatable.
#include "scan.cuh"

namespace pykernels::cuda {
namespace scan {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kChannels = kWarps * kWarpChannels;

// Where the parts of the sums lie in scratch memory; null for those that are not wanted.
struct Parts {
  float* products;  // [slots, N, D], like split.enter
  float *A, *B, *C;  // [slots, N, D] of A and of constant B and C; [blocks of a group, B, G, N, L] of those per token
  float *skip, *delta_bias;  // [slots, D]
};

// dy, the gradient before the gate.
template <class T>
__device__ __forceinline__ void load_gradient(float (&dy)[kRun], const SelectiveScanBackwardParams& p, int64_t batch,
                                              int64_t channel, int64_t token, int count) {
  const SelectiveScanParams& f = p.forward;
  load_tokens<T>(dy, p.dout, p.dout_stride, batch, channel, token, count);
  if (f.z == nullptr) return;
  float z[kRun];
  load_tokens<T>(z, f.z, f.z_stride, batch, channel, token, count);
#pragma unroll
  for (int i = 0; i < kRun; ++i) dy[i] *= silu(z[i]);
}

// q = a g of a segment's first token, given that of the token after it is zero: ends and products [slots, N, D].
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    selective_scan_bwd_ends_kernel(const __grid_constant__ SelectiveScanBackwardParams p, Split split, Parts parts) {
  const SelectiveScanParams& f = p.forward;
  const Place place = Place::of<kChannels>(f);
  const Segment segment = segment_at(f, split, place.slot);
  const bool inside = place.active && segment.owned;
  const int states = static_cast<int>(f.state);
  SharedMemory shared;
  float* const carry = shared.take<float>(static_cast<unsigned>(kChannels * states)) + place.row * states;
  for (int n = place.lane; n < states; n += kLanes) carry[n] = 0.0f;
  __syncwarp();
  float segment_rate = 0.0f;
  const int chunks = static_cast<int>((segment.last - segment.first + kChunk - 1) / kChunk);
#pragma unroll 1
  for (int k = chunks - 1; k >= 0; --k) {
    const int64_t token = segment.first + int64_t{k} * kChunk + place.lane * kRun;
    const int count = inside ? static_cast<int>(max(min(segment.last - token, int64_t{kRun}), int64_t{0})) : 0;
    float rate[kRun], dy[kRun], lane_rate = 0.0f;
    load_steps<T>(rate, f, segment.batch, place.channel, token, count);
    load_gradient<T>(dy, p, segment.batch, place.channel, token, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      rate[i] *= kLog2E;
      lane_rate += rate[i];
    }
    segment_rate += lane_rate;
    ptx::keep(rate);
    States<T> C(f.C, segment.batch, place.group, place.channel, states, token, count);
#pragma unroll 1
    for (int n = 0; n < states; ++n) {
      const float A = finite_rate(rates_of(f, ptx::unhoisted(place.channel))[n]);
      float c[kRun], q = place.lane == kLanes - 1 ? carry[n] : 0.0f;
      C.next(c, f.C, count);
#pragma unroll
      for (int i = kRun - 1; i >= 0; --i) q = ptx::exp2(rate[i] * A) * (c[i] * dy[i] + q);
      q = scan_lanes<true>(q, ptx::exp2(lane_rate * A), place.lane);
      if (place.lane == 0) carry[n] = q;
    }
    __syncwarp();
  }
  segment_rate = sum_lanes(segment_rate);
  if (!inside) return;
  for (int n = place.lane; n < states; n += kLanes) {
    const int64_t at = row_at(f, place.slot, n, place.channel);
    split.enter[at] = carry[n];
    parts.products[at] = ptx::exp2(segment_rate * finite_rate(rates_of(f, place.channel)[n]));
  }
}

// Adds eight tokens' values of B's and C's gradients over the four channels of a warp. Lane bit 4 receives B's (0) or
// C's, bit 3 the first four tokens (0) or the others.
__device__ __forceinline__ void sum_channels(float (&sum)[kRun / 2], const float (&dB)[kRun], const float (&dC)[kRun]) {
  const bool of_C = threadIdx.x & 16, later = threadIdx.x & 8;
  float half[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    half[i] = (of_C ? dC[i] : dB[i]) + __shfl_xor_sync(0xffffffffu, of_C ? dB[i] : dC[i], 16);
#pragma unroll
  for (int i = 0; i < kRun / 2; ++i)
    sum[i] = (later ? half[i + kRun / 2] : half[i]) +
             __shfl_xor_sync(0xffffffffu, later ? half[i] : half[i + kRun / 2], 8);
}

// Adds a value of one channel, summed over its lanes, to the segment's part.
__device__ __forceinline__ void add_part(float* part, float value, bool fresh, bool writes) {
  value = sum_lanes(value);
  if (writes) *part = fresh ? value : *part + value;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    selective_scan_bwd_kernel(const __grid_constant__ SelectiveScanBackwardParams p, Split split, Parts parts) {
  const SelectiveScanParams& f = p.forward;
  const Place place = Place::of<kChannels>(f);
  const Segment segment = segment_at(f, split, place.slot);
  const bool inside = place.active && segment.owned;
  const int states = static_cast<int>(f.state);
  SharedMemory shared;
  float* const carry = shared.take<float>(static_cast<unsigned>(kChannels * states)) + place.row * states;
  // What the warps have of dB and dC: [2 turns][warp][dB, dC][token]
  constexpr int kTokens = 2 * kChunk;
  float* const exchange = shared.take<float>(2 * kWarps * kTokens, 16);
  const int warp = threadIdx.x / 32;
  for (int n = place.lane; n < states; n += kLanes) {
    float q = 0.0f;
    if (inside) {
      if (split.split)
        q = split.enter[row_at(f, place.slot, n, place.channel)];
      else if (segment.ends && p.dfinal_state != nullptr)
        q = static_cast<const float*>(p.dfinal_state)[state_at(f, segment.sequence, place.channel, n)];
    }
    carry[n] = q;
  }
  __syncwarp();

  const int chunks = static_cast<int>((segment.last - segment.first + kChunk - 1) / kChunk);
  const bool writes = place.active && place.lane == 0;
  float dskip = 0.0f, dbias = 0.0f;
  int turn = 0;
#pragma unroll 1
  for (int k = chunks - 1; k >= 0; --k) {
    const int64_t start = segment.first + int64_t{k} * kChunk, token = start + place.lane * kRun;
    const bool fresh = k == chunks - 1;
    const int there = place.active ? static_cast<int>(max(min(segment.last - token, int64_t{kRun}), int64_t{0})) : 0;
    const int count = segment.owned ? there : 0;
    float dt[kRun], input[kRun], dy[kRun], y[kRun] = {}, dinput[kRun] = {}, ddt[kRun] = {}, lane_rate = 0.0f;
    load_steps<T>(dt, f, segment.batch, place.channel, token, count);
    load_tokens<T>(input, f.u, f.u_stride, segment.batch, place.channel, token, count);
    load_gradient<T>(dy, p, segment.batch, place.channel, token, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      input[i] *= dt[i];
      lane_rate += dt[i] * kLog2E;
    }
#pragma unroll 1
    for (int n = 0; n < states; ++n) {
      const float A = finite_rate(rates_of(f, place.channel)[n]);
      float a[kRun], b[kRun], c[kRun], before[kRun];  // before: h of the token before
      // Their places are found anew for each state: no registers are left to keep them in.
      States<T>(f.B, segment.batch, place.group, place.channel, states, token, count, n).next(b, f.B, count);
      States<T>(f.C, segment.batch, place.group, place.channel, states, token, count, n).next(c, f.C, count);
      const float product = ptx::exp2(lane_rate * A);
      float h = 0.0f;
      if (inside && place.lane == 0)
        h = static_cast<const float*>(f.chunk_states)[row_at(f, segment.chunk + k, n, place.channel)];
      before[0] = h;
      float q = place.lane == kLanes - 1 ? carry[n] : 0.0f;
      const float after = q;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        a[i] = ptx::exp2(dt[i] * kLog2E * A);
        h = a[i] * h + input[i] * b[i];
      }
#pragma unroll
      for (int i = kRun - 1; i >= 0; --i) q = a[i] * (c[i] * dy[i] + q);
      h = scan_lanes<false>(h, product, place.lane);
      q = scan_lanes<true>(q, product, place.lane);
      const float entering = __shfl_up_sync(0xffffffffu, h, 1u, kLanes);
      const float following = __shfl_down_sync(0xffffffffu, q, 1u, kLanes);
      if (place.lane == 0) carry[n] = q;
      h = place.lane == 0 ? before[0] : entering;
      q = place.lane == kLanes - 1 ? after : following;
      float dB[kRun], dC[kRun], dA = 0.0f;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        before[i] = h;
        h = a[i] * h + input[i] * b[i];
        y[i] += h * c[i];
        dC[i] = h * dy[i];
      }
#pragma unroll
      for (int i = kRun - 1; i >= 0; --i) {
        const float g = c[i] * dy[i] + q;
        q = a[i] * g;
        const float w = q * before[i];  // the gradient of dt A
        dA += w * dt[i];
        ddt[i] += w * A;
        dinput[i] += g * b[i];
        dB[i] = g * input[i];
      }
      const int64_t row = row_at(f, place.slot, n, place.channel);
      add_part(parts.A + row, dA, fresh, writes);
      if (f.B.constant) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kRun; ++i) sum += dB[i];
        add_part(parts.B + row, sum, fresh, writes);
      }
      if (f.C.constant) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kRun; ++i) sum += dC[i];
        add_part(parts.C + row, sum, fresh, writes);
      }
      if (!f.B.constant || !f.C.constant) {
        float sum[kRun / 2];
        sum_channels(sum, dB, dC);
        float* const mine = exchange + turn * kWarps * kTokens;
        const int lane = threadIdx.x % 32;
        Neighbours<kRun / 2, float>::store(
            mine + warp * kTokens + lane / 16 * kChunk + place.lane * kRun + lane / 8 % 2 * (kRun / 2), sum);
        __syncthreads();  // the other half is free: whoever read it last turn is past that
        turn ^= 1;
        if (threadIdx.x < kTokens) {
          const int of_C = static_cast<int>(threadIdx.x) / kChunk;
          const int64_t at = start + threadIdx.x % kChunk;
          if (at < segment.last && !(of_C ? f.C.constant : f.B.constant)) {
            float total = mine[threadIdx.x];
#pragma unroll
            for (int other = 1; other < kWarps; ++other) total += mine[other * kTokens + threadIdx.x];
            float* const part = of_C ? parts.C : parts.B;
            part[(((place.block * f.batch + segment.batch) * f.groups + place.group) * f.state + n) * f.length + at] =
                total;
          }
        }
      }
    }
    __syncwarp();

    // Read only now, that registers may hold the loop: u, of which input holds dt u, and the parameters.
    const float skip = f.D != nullptr ? static_cast<const float*>(f.D)[place.channel] : 0.0f;
    const float bias = f.delta_bias != nullptr ? static_cast<const float*>(f.delta_bias)[place.channel] : 0.0f;
    float u[kRun], x[kRun], du[kRun];
    load_tokens<T>(u, f.u, f.u_stride, segment.batch, place.channel, token, count);
    load_run<T>(x, f.delta, f.delta_dtype, offset_of(f.delta_stride, segment.batch, place.channel, token),
                f.delta_stride.token, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      y[i] += skip * u[i];
      du[i] = dt[i] * dinput[i] + skip * dy[i];
      ddt[i] += u[i] * dinput[i];
      x[i] += bias;
      if (f.delta_softplus && x[i] <= 20.0f) ddt[i] *= sigmoid(x[i]).value;
      if (i >= count) du[i] = 0.0f, ddt[i] = 0.0f;  // of no sequence
      dskip += dy[i] * u[i];
      dbias += ddt[i];
    }
    store_run(static_cast<T*>(p.du) + offset_of(p.du_stride, segment.batch, place.channel, token), p.du_stride.token,
              du, there);
    store_run<T>(p.ddelta, f.delta_dtype, offset_of(p.ddelta_stride, segment.batch, place.channel, token),
                 p.ddelta_stride.token, ddt, there);
    if (f.z != nullptr) {
      float z[kRun], dz[kRun];
      load_tokens<T>(z, f.z, f.z_stride, segment.batch, place.channel, token, count);
      load_tokens<T>(dz, p.dout, p.dout_stride, segment.batch, place.channel, token, count);
#pragma unroll
      for (int i = 0; i < kRun; ++i) dz[i] = i < count ? dz[i] * y[i] * silu_slope(z[i]) : 0.0f;
      store_run(static_cast<T*>(p.dz) + offset_of(p.dz_stride, segment.batch, place.channel, token), p.dz_stride.token,
                dz, there);
    }
  }

  const int64_t at = place.slot * f.channels + place.channel;
  if (parts.skip != nullptr) add_part(parts.skip + at, dskip, true, writes);
  if (parts.delta_bias != nullptr) add_part(parts.delta_bias + at, dbias, true, writes);
  if (!place.active) return;
  for (int n = place.lane; n < states; n += kLanes) {
    if (chunks == 0) {  // a place without tokens
      const int64_t row = row_at(f, place.slot, n, place.channel);
      parts.A[row] = 0.0f;
      if (f.B.constant) parts.B[row] = 0.0f;
      if (f.C.constant) parts.C[row] = 0.0f;
    }
    if (inside && !split.split && segment.begins && p.dinitial_state != nullptr)
      static_cast<float*>(p.dinitial_state)[state_at(f, segment.sequence, place.channel, n)] = carry[n];
  }
}

// Sums over parts: to[j] = sum of from[part][i], where j is i, or i transposed from [rows, columns]. A thread adds
// every eighth part, then the eight sums are added, always in the same order.
constexpr int kSumColumns = 32, kSumRows = 8;

__global__ void __launch_bounds__(kSumColumns* kSumRows)
    selective_scan_bwd_sum_kernel(const float* from, float* to, int64_t parts, int64_t rows, int64_t columns,
                                  bool transposed) {
  const int lane = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns;
  const int64_t size = rows * columns, i = int64_t{blockIdx.x} * kSumColumns + lane;
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 4
    for (int64_t part = row; part < parts; part += kSumRows) sum += from[part * size + i];
  }
  SharedMemory shared;
  float* const sums = shared.take<float>(kSumColumns * kSumRows);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || i >= size) return;
#pragma unroll
  for (int other = 1; other < kSumRows; ++other) sum += sums[other * kSumColumns + lane];
  to[transposed ? i % columns * rows + i / columns : i] = sum;
}

const char* launch_sum(const float* from, void* to, int64_t parts, int64_t rows, int64_t columns, bool transposed,
                       void* stream) {
  return launch_blocks(selective_scan_bwd_sum_kernel, (rows * columns + kSumColumns - 1) / kSumColumns,
                       kSumColumns * kSumRows, kSumColumns * kSumRows, stream, from, static_cast<float*>(to), parts,
                       rows, columns, transposed);
}

// Lays the scratch memory out from `base`; returns its size in floats.
int64_t lay_out(const SelectiveScanBackwardParams& p, float* base, Split& split, Parts& parts) {
  const SelectiveScanParams& f = p.forward;
  const int64_t blocks = blocks_of<kChannels>(f), rows = (split = make_split(f, blocks), rows_of(f, split));
  const int64_t tokens = blocks / f.groups * f.batch * f.groups * f.state * f.length;
  int64_t size = 0;
  const auto take = [&](int64_t floats) {
    size += floats;
    return base == nullptr ? nullptr : base + (size - floats);
  };
  parts = {};
  if (split.split) split.enter = take(rows), parts.products = take(rows);
  parts.A = take(rows);
  parts.B = take(f.B.constant ? rows : tokens);
  parts.C = take(f.C.constant ? rows : tokens);
  if (p.dD != nullptr) parts.skip = take(split.slots * f.channels);
  if (p.ddelta_bias != nullptr) parts.delta_bias = take(split.slots * f.channels);
  return size;
}

template <class T>
const char* launch_bwd(const SelectiveScanBackwardParams& p, void* stream) {
  const SelectiveScanParams& f = p.forward;
  Split split;
  Parts parts;
  lay_out(p, static_cast<float*>(p.scratch), split, parts);
  const int64_t of_group = blocks_of<kChannels>(f) / f.groups, blocks = split.slots * f.groups * of_group;
  if (split.split) {
    if (const char* error = launch_blocks(selective_scan_bwd_ends_kernel<T>, blocks, kThreads, kChannels * f.state,
                                          stream, p, split, parts))
      return error;
    if (const char* error =
            launch_carry<true>(f, split, parts.products, p.dfinal_state, p.dinitial_state, stream))
      return error;
  }
  if (const char* error = clear_states(f, split, p.dinitial_state, stream)) return error;
  if (const char* error = launch_blocks(selective_scan_bwd_kernel<T>, blocks, kThreads,
                                        kChannels * f.state + 4 * kWarps * kChunk, stream, p, split, parts))
    return error;
  const char* error = launch_sum(parts.A, p.dA, split.slots, f.state, f.channels, true, stream);
  const auto projection = [&](const Projection& x, const float* part, void* to) {
    if (error != nullptr) return;
    error = x.constant ? launch_sum(part, to, split.slots, f.state, f.channels, true, stream)
                       : launch_sum(part, to, of_group, f.batch * f.groups * f.state, f.length, false, stream);
  };
  projection(f.B, parts.B, p.dB), projection(f.C, parts.C, p.dC);
  if (error == nullptr && p.dD != nullptr)
    error = launch_sum(parts.skip, p.dD, split.slots, 1, f.channels, false, stream);
  if (error == nullptr && p.ddelta_bias != nullptr)
    error = launch_sum(parts.delta_bias, p.ddelta_bias, split.slots, 1, f.channels, false, stream);
  return error;
}

}  // namespace
}  // namespace scan

int64_t selective_scan_bwd_scratch(const SelectiveScanBackwardParams& p) {
  scan::Split split;
  scan::Parts parts;
  return scan::lay_out(p, nullptr, split, parts);
}

const char* selective_scan_bwd(const SelectiveScanBackwardParams& p, void* stream) {
  if (const char* reason = scan::unsupported(p.forward)) return reason;
  return for_dtype(p.forward.dtype, [&]<class T>() { return scan::launch_bwd<T>(p, stream); });
}

}  // namespace pykernels::cuda
