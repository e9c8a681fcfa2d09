// How a transform of N points is laid out and factored, and its twiddle factors.
//
// A real sequence of 2N samples, taken modulo x^{2N} = -1, is one complex sequence z_n = x_n + i x_{n+N} of N points,
// and its spectrum is
//     X[k] = sum_n z_n e^{-2 pi i n (k - 1/4) / N},
// because the points e^{-2 pi i (k - 1/4) / N} are N of the 2N roots of x^{2N} = -1, one of each conjugate pair.
// Products of such spectra are convolutions of 2N real samples whose ends wrap with the sign changed: padding by zeros
// costs no transform of twice the length, each row is a transform of its own, and nothing has to be separated
// afterwards.
//
// With V lanes and S = N / V, n = l S + j and k = k1 + V k2:
//     X[k1 + V k2] = sum_j e^{-2 pi i j k2 / S} e^{-2 pi i j (k1 - 1/4) / N} sum_l z_{lS+j} e^{-2 pi i l (k1 - 1/4) /
//     V}
// The inner sum runs over V vectors of consecutive j; transposed, lane k1 holds its own sequence over j, and what is
// left is one transform of S points in every lane, whose twiddle factors are the same for all lanes.
#pragma once

#include "../common/simd.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {

// The work array holds, for each j, a vector of real and a vector of imaginary parts.
template <class S>
constexpr int kStep = 2 * kLanes<S>;

// The transform over V vectors is done as kOuter by kInner; e^{-2 pi i j (k1 - 1/4) / N} with k1 = b + kInner a is the
// product of a factor for b and one for a.
template <class S>
constexpr int kInner = kLanes<S> < 4 ? kLanes<S> : 4;
template <class S>
constexpr int kOuter = kLanes<S> / kInner<S>;

template <class S>
struct Plan {
  static constexpr int kMostLevels = 32;
  int64_t points;  // N
  int64_t length;  // S, what each lane transforms
  int levels;      // passes over the lanes before the leaves; the first splits `length`, the next each part, ...
  int radix[kMostLevels];
  const S* twiddle[kMostLevels];  // [size / radix][radix - 1][2]: e^{-2 pi i j r / size}
  int leaf;                       // 4 or 8 vectors
  bool fused;                     // the first pass is part of the analysis and synthesis
  int64_t stride;                 // vectors between the parts of the first pass, in the work array
  const S* first;  // [S / V][kInner + kOuter - 1][2][V]: the factors for b = 0, 1, ..., then those for a = 1, 2, ...

  // Numbers of a work array.
  int64_t size() const { return radix[0] * stride * kStep<S>; }
};

// N is 2^a or 3 2^a, at least kLeastPoints. Made at the first call for it and kept; thread-safe.
constexpr int64_t kLeastPoints = 256;
template <class S>
const Plan<S>& plan(int64_t points);

// The least such N that holds `samples` real samples.
PYKERNELS_INLINE int64_t points_for(int64_t samples) {
  const int64_t half = (samples + 1) / 2;
  int64_t points = kLeastPoints;
  while (points < half) points *= 2;
  const int64_t three = points / 4 * 3;
  return three >= half && three >= 3 * kLeastPoints ? three : points;
}

// What blocks.h takes for a transform of kBlock points: factors cosine (1 + i tangent), or cosine + i sine, one in each
// lane.
constexpr int kBlock = 256, kBlockLanes = 16;
template <class S>
struct Turn {
  S cosine[kBlockLanes], tangent[kBlockLanes];
};
template <class S>
struct Unit {
  S cosine[kBlockLanes], sine[kBlockLanes];
};
template <class S>
struct BlockFactors {
  Turn<S> rows, rows_squared, groups[4], groups_squared[4], inverse_rows, inverse_groups[4], last[4][4];
  Unit<S> inverse_rows_squared, inverse_groups_squared[4];
};
template <class S>
const BlockFactors<S>& block_factors();

}  // namespace fft
}  // namespace pykernels::cpu::PYKERNELS_ISA
