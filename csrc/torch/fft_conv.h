// What the bindings of the long convolution do for every native backend: memory checks and allocation around
// launch(params, u).
#pragma once

#include "../include/pykernels/fft_conv.h"

#include "common.h"

namespace pykernels::bindings {

inline Strides2 strides2(const Tensor& x) { return {x.stride(0), x.stride(1)}; }

inline std::optional<Tensor> readable(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(last_contiguous(*x)) : std::nullopt;
}

inline std::optional<Tensor> contiguous_or(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(contiguous_or(*x)) : std::nullopt;
}

// The parts of a call write what they know into its parameters; their tensors must outlive the launch.
struct FFTConvKernels {
  Tensor k;
  std::optional<Tensor> k_rev;

  FFTConvKernels(FFTConvParams& p, const Tensor& k_, const std::optional<Tensor>& k_rev_, int64_t k_rev_lag,
                 bool circular)
      : k(contiguous_or(k_)), k_rev(contiguous_or(k_rev_)) {
    STD_TORCH_CHECK(k.dim() == 2 && k.size(1) >= 1, "pykernels: k needs 2 axes and a tap");
    const ScalarType wide = accumulator_of(k);
    check_dtype(k, wide, "k");
    p.k = k.const_data_ptr(), p.groups = k.size(0), p.taps = k.size(1);
    p.k_rev_lag = k_rev_lag, p.circular = circular;
    STD_TORCH_CHECK(k_rev_lag == 0 || k_rev_lag == 1, "pykernels: k_rev_lag must be 0 or 1");
    if (!k_rev) return;
    check_dtype(*k_rev, wide, "k_rev");
    STD_TORCH_CHECK(k_rev->dim() == 2 && k_rev->size(1) >= 1, "pykernels: k_rev needs 2 axes and a tap");
    check_shape(*k_rev, {p.groups, k_rev->size(1)}, "k_rev");
    p.k_rev = k_rev->const_data_ptr(), p.taps_rev = k_rev->size(1);
  }
};
struct FFTConvRows {
  Tensor u;
  std::optional<Tensor> skip, pre_gate, post_gate;

  FFTConvRows(FFTConvParams& p, const Tensor& u_, const std::optional<Tensor>& skip_,
              const std::optional<Tensor>& pre_gate_, const std::optional<Tensor>& post_gate_)
      : u(last_contiguous(u_)),
        skip(contiguous_or(skip_)),
        pre_gate(readable(pre_gate_)),
        post_gate(readable(post_gate_)) {
    STD_TORCH_CHECK(u.dim() == 3, "pykernels: u needs 3 axes");
    p.dtype = dtype_of(u);
    p.batch = u.size(0), p.channels = u.size(1), p.length = u.size(2);
    STD_TORCH_CHECK(p.groups > 0 ? p.channels % p.groups == 0 : p.channels == 0,
                    "pykernels: u's channels are no multiple of k's");
    p.u = u.const_data_ptr(), p.u_stride = strides2(u);
    if (skip) {
      check_dtype(*skip, accumulator_of(u), "D");
      check_shape(*skip, {p.channels}, "D");
      p.skip = skip->const_data_ptr();
    }
    const auto gate = [&](const std::optional<Tensor>& x, const void*& data, Strides2& stride, const char* name) {
      if (!x) return;
      check_same_dtype(*x, u, name);
      check_shape(*x, {p.batch, p.channels, p.length}, name);
      data = x->const_data_ptr(), stride = strides2(*x);
    };
    gate(pre_gate, p.pre_gate, p.pre_stride, "pre_gate");
    gate(post_gate, p.post_gate, p.post_stride, "post_gate");
  }
};

// The arguments of a call, of which the kernels come first: the rows are checked against them.
struct FFTConvArguments {
  FFTConvParams params{};
  FFTConvKernels kernels;
  FFTConvRows rows;

  FFTConvArguments(const Tensor& u, const Tensor& k, const std::optional<Tensor>& k_rev,
                   const std::optional<Tensor>& skip, const std::optional<Tensor>& pre_gate,
                   const std::optional<Tensor>& post_gate, int64_t k_rev_lag, bool circular)
      : kernels(params, k, k_rev, k_rev_lag, circular), rows(params, u, skip, pre_gate, post_gate) {
    check_dtype(kernels.k, accumulator_of(u), "k");
  }
};

template <class Launch>
Tensor fft_conv_output(Launch&& launch, FFTConvParams& p, const Tensor& u) {
  Tensor out = empty({p.batch, p.channels, p.length}, u.scalar_type(), u);
  p.out = out.mutable_data_ptr(), p.out_stride = strides2(out);
  launch(p, u);
  return out;
}

template <class Launch>
Tensor fft_conv_fwd(Launch&& launch, const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev,
                    std::optional<Tensor> skip, std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate,
                    int64_t k_rev_lag, bool circular) {
  FFTConvArguments arguments(u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular);
  return fft_conv_output(launch, arguments.params, u);
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fft_conv_bwd(
    Launch&& launch, const Tensor& dout_, const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev,
    std::optional<Tensor> skip, std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag,
    bool circular, bool input_gradient, bool kernel_gradient) {
  const FFTConvArguments arguments(u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular);
  FFTConvBackwardParams b{};
  b.forward = arguments.params;
  const FFTConvParams& p = b.forward;
  const Tensor dout = last_contiguous(dout_);
  check_same_dtype(dout, u, "dout");
  check_shape(dout, {p.batch, p.channels, p.length}, "dout");
  b.dout = dout.const_data_ptr(), b.dout_stride = strides2(dout);
  const ScalarType narrow = u.scalar_type(), wide = accumulator_of(u);
  const auto row = [&](bool wanted) { return empty({wanted ? p.batch : 0, p.channels, p.length}, narrow, u); };
  Tensor du = row(input_gradient), dpre = row(input_gradient && pre_gate), dpost = row(post_gate.has_value());
  Tensor dk = empty({kernel_gradient ? p.groups : 0, p.taps}, wide, u);
  Tensor dk_rev = empty({kernel_gradient && k_rev ? p.groups : 0, k_rev ? p.taps_rev : 0}, wide, u);
  Tensor dskip = empty({skip ? p.channels : 0}, wide, u);
  if (input_gradient) b.du = du.mutable_data_ptr();
  if (input_gradient && pre_gate) b.dpre_gate = dpre.mutable_data_ptr();
  if (post_gate) b.dpost_gate = dpost.mutable_data_ptr();
  if (kernel_gradient) b.dk = dk.mutable_data_ptr();
  if (kernel_gradient && k_rev) b.dk_rev = dk_rev.mutable_data_ptr();
  if (skip) b.dskip = dskip.mutable_data_ptr();
  launch(b, u);
  return {du, dk, dk_rev, dskip, dpre, dpost};
}

}  // namespace pykernels::bindings
