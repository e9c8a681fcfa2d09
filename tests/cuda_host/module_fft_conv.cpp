// The long convolution's launch functions.
#include "fields.h"
#include "include/pykernels/fft_conv.h"

namespace cuda_host {
namespace {

using namespace pykernels;

// Of the batch and the channel; the last axis is contiguous.
Strides2 strides(const py::dict& f, const std::string& name) {
  if (!f.contains(name + "_stride")) return {};
  const auto [batch, channel, sample] = f[py::str(name + "_stride")].cast<std::tuple<int64_t, int64_t, int64_t>>();
  return {batch, channel};
}

FFTConvParams fft_conv_params(const py::dict& f) {
  FFTConvParams p{};
  p.dtype = static_cast<DType>(number(f, "dtype"));
  p.batch = number(f, "batch"), p.channels = number(f, "channels"), p.length = number(f, "length");
  p.groups = number(f, "groups"), p.taps = number(f, "taps"), p.taps_rev = number(f, "taps_rev");
  p.k_rev_lag = number(f, "k_rev_lag"), p.circular = f["circular"].cast<bool>();
  p.u = pointer<void>(f, "u"), p.u_stride = strides(f, "u");
  p.pre_gate = pointer<void>(f, "pre_gate"), p.pre_stride = strides(f, "pre_gate");
  p.post_gate = pointer<void>(f, "post_gate"), p.post_stride = strides(f, "post_gate");
  p.k = pointer<void>(f, "k"), p.k_rev = pointer<void>(f, "k_rev"), p.skip = pointer<void>(f, "D");
  p.out = pointer<void>(f, "out"), p.out_stride = strides(f, "out");
  if (f.contains("part_bytes")) p.part_bytes = number(f, "part_bytes");
  return p;
}

FFTConvBackwardParams fft_conv_bwd_params(const py::dict& f) {
  FFTConvBackwardParams p{};
  p.forward = fft_conv_params(f);
  p.dout = pointer<void>(f, "dout"), p.dout_stride = strides(f, "dout");
  p.du = pointer<void>(f, "du"), p.dpre_gate = pointer<void>(f, "dpre_gate");
  p.dpost_gate = pointer<void>(f, "dpost_gate");
  p.dk = pointer<void>(f, "dk"), p.dk_rev = pointer<void>(f, "dk_rev"), p.dskip = pointer<void>(f, "dD");
  return p;
}

}  // namespace

void bind_fft_conv(py::module_& m) {
  m.def("fft_conv_fwd_scratch", [](const py::dict& f) { return cuda::fft_conv_fwd_scratch(fft_conv_params(f)); });
  m.def("fft_conv_fwd", [](const py::dict& f) {
    check(cuda::fft_conv_fwd(fft_conv_params(f), pointer<void>(f, "scratch"), nullptr));
  });
  m.def("fft_conv_bwd_scratch", [](const py::dict& f) { return cuda::fft_conv_bwd_scratch(fft_conv_bwd_params(f)); });
  m.def("fft_conv_bwd", [](const py::dict& f) {
    check(cuda::fft_conv_bwd(fft_conv_bwd_params(f), pointer<void>(f, "scratch"), nullptr));
  });
}

}  // namespace cuda_host
