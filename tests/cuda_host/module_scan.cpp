// The selective scan's launch functions.
#include "fields.h"
#include "include/pykernels/selective_scan.h"

namespace cuda_host {
namespace {

using namespace pykernels;

DType dtype(const py::dict& f, const char* name) { return static_cast<DType>(number(f, name)); }

ChannelStrides strides(const py::dict& f, const std::string& name) {
  if (!f.contains(name + "_stride")) return {};
  const auto [batch, channel, token] = f[py::str(name + "_stride")].cast<std::tuple<int64_t, int64_t, int64_t>>();
  return {batch, channel, token};
}

Projection projection(const py::dict& f, const char* name) {
  Projection x{};
  x.data = pointer<void>(f, name), x.constant = !f.contains(std::string(name) + "_stride");
  if (x.constant) return x;
  const auto stride = f[py::str(std::string(name) + "_stride")].cast<std::vector<int64_t>>();
  x.batch = stride[0], x.group = stride[1], x.state = stride[2], x.token = stride[3];
  x.dtype = dtype(f, (std::string(name) + "_dtype").c_str());
  return x;
}

SelectiveScanParams scan_params(const py::dict& f) {
  SelectiveScanParams p{};
  p.dtype = dtype(f, "dtype"), p.delta_dtype = dtype(f, "delta_dtype");
  p.batch = number(f, "batch"), p.channels = number(f, "channels"), p.length = number(f, "length");
  p.state = number(f, "state"), p.groups = number(f, "groups"), p.sequences = number(f, "sequences");
  p.u = pointer<void>(f, "u"), p.u_stride = strides(f, "u");
  p.delta = pointer<void>(f, "delta"), p.delta_stride = strides(f, "delta");
  p.z = pointer<void>(f, "z"), p.z_stride = strides(f, "z");
  p.A = pointer<void>(f, "A"), p.B = projection(f, "B"), p.C = projection(f, "C");
  p.D = pointer<void>(f, "D"), p.delta_bias = pointer<void>(f, "delta_bias");
  p.initial_state = pointer<void>(f, "initial_state"), p.cu_seqlens = pointer<int32_t>(f, "cu_seqlens");
  p.delta_softplus = f["delta_softplus"].cast<bool>();
  p.out = pointer<void>(f, "out"), p.out_stride = strides(f, "out");
  p.final_state = pointer<void>(f, "final_state"), p.chunk_states = pointer<void>(f, "chunk_states");
  return p;
}

SelectiveScanBackwardParams scan_bwd_params(const py::dict& f) {
  SelectiveScanBackwardParams p{};
  p.forward = scan_params(f);
  p.dout = pointer<void>(f, "dout"), p.dout_stride = strides(f, "dout");
  p.dfinal_state = pointer<void>(f, "dfinal_state");
  p.du = pointer<void>(f, "du"), p.du_stride = strides(f, "du");
  p.ddelta = pointer<void>(f, "ddelta"), p.ddelta_stride = strides(f, "ddelta");
  p.dz = pointer<void>(f, "dz"), p.dz_stride = strides(f, "dz");
  p.dA = pointer<void>(f, "dA"), p.dB = pointer<void>(f, "dB"), p.dC = pointer<void>(f, "dC");
  p.dD = pointer<void>(f, "dD"), p.ddelta_bias = pointer<void>(f, "ddelta_bias");
  p.dinitial_state = pointer<void>(f, "dinitial_state"), p.scratch = pointer<void>(f, "scratch");
  return p;
}

// Axes that a tensor lacks have stride 0.
SelectiveScanStepParams::Strides step_strides(const py::dict& f, const std::string& name) {
  if (!f.contains(name + "_stride")) return {};
  const auto stride = f[py::str(name + "_stride")].cast<std::vector<int64_t>>();
  return {stride[0], stride[1], stride[2], stride[3]};
}

SelectiveScanStepParams scan_step_params(const py::dict& f) {
  SelectiveScanStepParams p{};
  p.dtype = dtype(f, "dtype"), p.delta_dtype = dtype(f, "delta_dtype");
  p.B_dtype = dtype(f, "B_dtype"), p.C_dtype = dtype(f, "C_dtype");
  p.D_dtype = dtype(f, "D_dtype"), p.delta_bias_dtype = dtype(f, "delta_bias_dtype");
  p.batch = number(f, "batch"), p.heads = number(f, "heads"), p.channels = number(f, "channels");
  p.state = number(f, "state"), p.groups = number(f, "groups"), p.slots = number(f, "slots");
  p.states = pointer<void>(f, "states"), p.states_stride = step_strides(f, "states");
  p.x = pointer<void>(f, "x"), p.x_stride = step_strides(f, "x");
  p.delta = pointer<void>(f, "delta"), p.delta_stride = step_strides(f, "delta");
  p.z = pointer<void>(f, "z"), p.z_stride = step_strides(f, "z");
  p.A = pointer<void>(f, "A"), p.A_stride = step_strides(f, "A");
  p.B = pointer<void>(f, "B"), p.B_stride = step_strides(f, "B");
  p.C = pointer<void>(f, "C"), p.C_stride = step_strides(f, "C");
  p.D = pointer<void>(f, "D"), p.D_stride = step_strides(f, "D");
  p.delta_bias = pointer<void>(f, "delta_bias"), p.delta_bias_stride = step_strides(f, "delta_bias");
  p.state_indices = pointer<int32_t>(f, "state_indices"), p.delta_softplus = f["delta_softplus"].cast<bool>();
  p.out = pointer<void>(f, "out"), p.out_stride = step_strides(f, "out");
  return p;
}

}  // namespace

void bind_selective_scan(py::module_& m) {
  m.def("selective_scan_fwd_scratch",
        [](const py::dict& f) { return cuda::selective_scan_fwd_scratch(scan_params(f)); });
  m.def("selective_scan_fwd", [](const py::dict& f) {
    check(cuda::selective_scan_fwd(scan_params(f), pointer<void>(f, "scratch"), nullptr));
  });
  m.def("selective_scan_bwd_scratch",
        [](const py::dict& f) { return cuda::selective_scan_bwd_scratch(scan_bwd_params(f)); });
  m.def("selective_scan_bwd", [](const py::dict& f) { check(cuda::selective_scan_bwd(scan_bwd_params(f), nullptr)); });
  m.def("selective_scan_step",
        [](const py::dict& f) { check(cuda::selective_scan_step(scan_step_params(f), nullptr)); });
}

}  // namespace cuda_host
