// Long convolution: the parameters and launch functions that every native backend shares. Torch-free.
//
// Per batch entry b and channel d, with x = pre_gate u and channel d reading the kernel of group d / (D / G):
//     c_n = sum over lags of w_lag x_{n - lag}        out_n = post_gate_n (c_n + skip_d x_n)
//     w_lag = k_lag for lag >= 0, plus k_rev_i at lag -(i + k_rev_lag)
// causal: x is zero outside [0, L), so taps at lags beyond +-(L - 1) have no effect. circular: positions are taken
// modulo L.
//
// Memory layout. u, gates, out and their gradients [B, D, L]: any strides but for the last axis, which is contiguous. k
// [G, K], k_rev [G, R] and skip [D] are contiguous, fp32 (fp64 for fp64), and so are their gradients.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "parallel.h"

namespace pykernels {

struct Strides2 {
  int64_t batch, channel;  // in elements
};

struct FFTConvParams {
  DType dtype;  // of u, the gates, out and their gradients
  int64_t batch, channels, length, groups;
  const void* u;
  const void* pre_gate;  // or null, as the next
  const void* post_gate;
  Strides2 u_stride, pre_stride, post_stride;
  const void* k;      // [G, K]
  const void* k_rev;  // [G, R] or null
  const void* skip;   // [D] or null
  int64_t taps, taps_rev;
  int64_t k_rev_lag;  // 0 or 1
  bool circular;
  void* out;
  Strides2 out_stride;
  // CPU, forward: what fft_conv_spectrum made, for points 0, of kernels for rows of up to spectrum_length samples
  // (circular: of as many); then k and k_rev are not read.
  const void* spectrum = nullptr;
  int64_t spectrum_length = 0;
  // CUDA: rows that no block can hold go through scratch memory, in parts of about this many bytes.
  int64_t part_bytes = int64_t{256} << 20;
};

// Gradients of everything, from that of out; those that are null are not computed.
struct FFTConvBackwardParams {
  FFTConvParams forward;  // out is not read
  const void* dout;
  Strides2 dout_stride;
  void *du, *dpre_gate, *dpost_gate;  // [B, D, L] contiguous
  void *dk, *dk_rev, *dskip;          // dk and dk_rev are wanted together
};

// The spectra of kernels that many calls or steps share. What they hold is the instruction set's own affair.
struct FFTConvSpectrumParams {
  FFTConvParams forward;  // of which dtype, groups, length, circular and what is said of the kernels count
  int64_t points;         // of the transform, for steps: a power of two from 256 on, causal, at most 2 points taps; or
                          // 0: what fft_conv_fwd takes, which may be the taps themselves where they are few
  void* spectrum;         // [G, size], or null: only the size is wanted
  int64_t* size;          // numbers per kernel
  int64_t* lanes;         // spectra are for the instruction sets that have as many lanes
};

// One token of the causal convolution. C, a power of two from kFFTConvBlock on, is the length of rings: token t is at
// t % C. Within its block of kFFTConvBlock tokens a token is added to the outputs at once. After the last of a block
// the last `side` tokens are convolved with the kernel into the `side` outputs after them: side is the largest power
// of two that divides t + 1, but no more than C.
constexpr int64_t kFFTConvBlock = 64;
inline int64_t fft_conv_side(int64_t tokens, int64_t capacity) {  // after `tokens` tokens; 0: nothing is due
  const int64_t power = tokens & -tokens;
  return power < kFFTConvBlock ? 0 : power < capacity ? power : capacity;
}
// Points of the transform of a square, of which spectra of 2 side taps are; 0: it is summed directly.
inline int64_t fft_conv_side_points(int64_t side) { return side <= kFFTConvBlock ? 0 : side < 256 ? 256 : side; }
struct FFTConvStepParams {
  DType dtype;  // of u, the gates and out
  int64_t batch, channels, groups, capacity, tokens;
  const void* u;  // [B, D] with any strides, as the gates
  const void* pre_gate;
  const void* post_gate;
  Strides2 u_stride, pre_stride, post_stride;
  const void* k;         // [G, C], zeros after the last tap; fp32 (fp64 for fp64), as what follows
  const void* spectrum;  // of the first 2 side taps, where it is needed
  const void* skip;      // [D] or null
  void* inputs;          // [B, D, C]: samples of x
  void* pending;         // [B, D, C]: what is known of outputs to come
  void* out;             // [B, D] contiguous
};

namespace cpu {
void fft_conv_spectrum(const FFTConvSpectrumParams& params, const Parallel& parallel);
void fft_conv_step(const FFTConvStepParams& params, const Parallel& parallel);
void fft_conv_fwd(const FFTConvParams& params, const Parallel& parallel);
void fft_conv_bwd(const FFTConvBackwardParams& params, const Parallel& parallel);
}  // namespace cpu

namespace cuda {
// Floats of scratch memory that a call needs.
int64_t fft_conv_fwd_scratch(const FFTConvParams& params);
int64_t fft_conv_bwd_scratch(const FFTConvBackwardParams& params);
// Each returns null, or what went wrong. `scratch` is aligned to 16 bytes.
const char* fft_conv_fwd(const FFTConvParams& params, void* scratch, void* stream);
const char* fft_conv_bwd(const FFTConvBackwardParams& params, void* scratch, void* stream);
// Which kernels serve a compute capability (10 major + minor), in words.
const char* fft_conv_kernels(int capability);
}  // namespace cuda

}  // namespace pykernels
