// The kernels' parameters, and what launches them; fft_conv.cu puts them together. Each returns null or CUDA's message.
#pragma once

#include "conv.cuh"

namespace pykernels::cuda::fft {

constexpr int kLeastPoints = 256, kMostPoints = 4096;  // of a transform by one block

// The transforms that a block does at once, and the pieces in which warps leave the products of one (of a row whose
// stages go through memory, too).
__host__ __device__ constexpr int transforms_of_block(int points) { return points < 2048 ? 2048 / points : 1; }
__host__ __device__ constexpr int product_pieces(int points) { return points < 512 ? 1 : points / 512; }

// Points [rows, subs, N] or sums [G, parts, subs, N] are complex numbers in device memory; rows that are longer than a
// transform come through the former, after stages of radix 16 have split them into `subs` transforms.
enum class Place { kRows, kTaps, kPoints, kSums };

// Which rows and kernels a launch is about: rows from `first_row` on, with the groups from `first_group` on. One item
// is one transform: a window of a row, one of a row's subs, or a kernel.
struct Range {
  int64_t first_row, first_group, items;
  int subs;
};

// From a place, through a transform (not kSums), the product with a spectrum (not from kSums nor where one is made) and
// the inverse transform, to a place. To kSums: the spectrum itself.
struct TransformParams {
  Place from, to;
  bool conj;  // the product is with the conjugate
  Range range;
  Rows rows;
  Windows windows;
  Kernels kernels;
  float2* points;
  const float2* spectrum;
  float2* sums;  // read: `parts` of them are added up
  int parts;
  float scale;  // of the spectrum or dk
  float *dk, *dk_rev;
};
const char* transform(int points, const TransformParams& p, void* stream);

// What goes through a transform of the backward pass, and where what comes of it goes: windows of rows, or points in
// memory, in place.
struct Pass {
  Rows rows;
  Windows windows;
  float2* points;
};
// All gradients at once, for each window of a group (of points: for each row, of one of its subs):
//   kOfX: the spectrum of x, here of what a window owns;
//   kOfGradient: that of dc. Times the conjugate of x's it is added to the sums; times the conjugate of the kernel's it
//     goes back, to du and dpre;
//   kOfPostGate: x's, the one above or, where windows overlap, another, times the kernel's goes back, to dpost.
// A part is one block's: `share` items of a group, which its transforms take in turns.
constexpr int kOfX = 0, kOfGradient = 1, kOfPostGate = 2;
struct BackwardParams {
  Place from;       // kRows or kPoints
  Range range;      // items: (group, part) or (group, sub)
  Pass passes[3];
  int first, last;  // of the passes
  bool inputs;      // du is wanted
  bool same;        // kOfPostGate takes the spectrum of kOfX
  const float2* spectrum;
  float2* sums;     // [G, parts, N] or [G, subs, N]; null: not wanted
  bool add;         // to sums that are there
  int64_t total, share;  // items of a group, and of a part
  int parts;
};
const char* backward(int points, const BackwardParams& p, void* stream);

// One stage of radix 16 of rows in memory, `size` points apart.
struct StageParams {
  Place place;  // where the first stage reads and the last inverse one writes: rows or taps; kPoints for the others
  Range range;  // items: rows or kernels
  int total, size;  // points of a row, of each transform before the stage
  Rows rows;
  Windows windows;
  Kernels kernels;
  float2* points;
  float scale;
  float *dk, *dk_rev;
};
const char* split(const StageParams& p, void* stream);
const char* merge(const StageParams& p, void* stream);

// Sums over a few taps. `before` is how many samples before an output its first one lies; `reversed` reads the taps
// from the last lag down, for the transpose.
constexpr int kDirectTaps = 64, kDirectTile = 1024, kDirectThreads = 128;
struct DirectParams {
  Rows rows;
  Windows windows;  // of kDirectTile outputs
  Kernels kernels;
  bool reversed;
  int64_t items;  // windows of rows
};
const char* direct(const DirectParams& p, void* stream);

struct DirectTapsParams {
  Rows rows;  // x
  Signal dc;
  Windows windows;
  Kernels kernels;
  int64_t groups, total, share;  // windows of a group, and of a part
  int parts;
  float* sums;  // [G, parts, count]
  float *dk, *dk_rev;
};
const char* direct_taps(const DirectTapsParams& p, void* stream);

// dskip: sums of the products, of which each channel has so many `pieces`.
struct SkipParams {
  int64_t channels, pieces;
  const double* products;  // [D, pieces]
  float* dskip;
};
const char* skip_gradient(const SkipParams& p, void* stream);

// A launch of `blocks` blocks.
template <class... Parameters, class... Arguments>
const char* launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, unsigned shared_bytes,
                          void* stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "more transforms than a grid has blocks";
  return launch(kernel,
                {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes,
                 static_cast<cudaStream_t>(stream)},
                arguments...);
}

// Calls run.template operator()<kPoints>() for a transform of so many points.
template <int kPoints = kLeastPoints, class Run>
const char* for_points(int points, const Run& run) {
  if constexpr (kPoints > kMostPoints)
    return "no transform of that many points";
  else
    return points == kPoints ? run.template operator()<kPoints>() : for_points<2 * kPoints>(points, run);
}

}  // namespace pykernels::cuda::fft
