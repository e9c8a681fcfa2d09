// The causal convolution's launch functions.
#include "fields.h"
#include "include/pykernels/causal_conv1d.h"

namespace cuda_host {
namespace {

using namespace pykernels;

ChannelStrides strides(const py::dict& f, const char* name) {
  const auto [batch, channel, token] = f[name].cast<std::tuple<int64_t, int64_t, int64_t>>();
  return {batch, channel, token};
}

CausalConv1dParams conv_params(const py::dict& f) {
  CausalConv1dParams p{};
  p.dtype = static_cast<DType>(number(f, "dtype"));
  p.batch = number(f, "batch"), p.channels = number(f, "channels"), p.length = number(f, "length");
  p.width = number(f, "width"), p.sequences = number(f, "sequences");
  p.x = pointer<void>(f, "x"), p.x_stride = strides(f, "x_stride");
  p.weight = pointer<void>(f, "weight"), p.bias = pointer<void>(f, "bias");
  p.initial_state = pointer<void>(f, "initial_state"), p.cu_seqlens = pointer<int32_t>(f, "cu_seqlens");
  p.silu = f["silu"].cast<bool>();
  if (f.contains("out")) {
    p.out = pointer<void>(f, "out"), p.out_stride = strides(f, "out_stride");
    p.final_state = pointer<void>(f, "final_state");
  }
  return p;
}

CausalConv1dBackwardParams conv_bwd_params(const py::dict& f) {
  CausalConv1dBackwardParams p{};
  p.forward = conv_params(f);
  p.dout = pointer<void>(f, "dout"), p.dout_stride = strides(f, "dout_stride");
  p.dfinal_state = pointer<void>(f, "dfinal_state");
  p.dx = pointer<void>(f, "dx"), p.dx_stride = strides(f, "dx_stride");
  p.dweight = pointer<void>(f, "dweight"), p.dbias = pointer<void>(f, "dbias");
  p.dinitial_state = pointer<void>(f, "dinitial_state"), p.scratch = pointer<void>(f, "scratch");
  return p;
}

CausalConv1dStepParams conv_step_params(const py::dict& f) {
  CausalConv1dStepParams p{};
  p.dtype = static_cast<DType>(number(f, "dtype"));
  p.batch = number(f, "batch"), p.channels = number(f, "channels"), p.tokens = number(f, "tokens");
  p.width = number(f, "width"), p.slots = number(f, "slots");
  p.x = pointer<void>(f, "x"), p.x_stride = strides(f, "x_stride");
  p.state = pointer<void>(f, "state"), p.state_stride = strides(f, "state_stride");
  p.weight = pointer<void>(f, "weight"), p.bias = pointer<void>(f, "bias");
  p.weight_dtype = static_cast<DType>(number(f, "weight_dtype"));
  p.bias_dtype = static_cast<DType>(number(f, "bias_dtype"));
  p.state_indices = pointer<int32_t>(f, "state_indices"), p.silu = f["silu"].cast<bool>();
  p.out = pointer<void>(f, "out"), p.out_stride = strides(f, "out_stride");
  return p;
}

}  // namespace

void bind_causal_conv1d(py::module_& m) {
  m.def("causal_conv1d_fwd", [](const py::dict& f) { check(cuda::causal_conv1d_fwd(conv_params(f), nullptr)); });
  m.def("causal_conv1d_bwd_scratch",
        [](const py::dict& f) { return cuda::causal_conv1d_bwd_scratch(conv_bwd_params(f)); });
  m.def("causal_conv1d_bwd", [](const py::dict& f) { check(cuda::causal_conv1d_bwd(conv_bwd_params(f), nullptr)); });
  m.def("causal_conv1d_step", [](const py::dict& f) { check(cuda::causal_conv1d_step(conv_step_params(f), nullptr)); });
}

}  // namespace cuda_host
