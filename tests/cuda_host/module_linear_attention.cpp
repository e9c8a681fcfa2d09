// Linear attention's launch functions.
#include "fields.h"
#include "include/pykernels/linear_attention.h"

namespace cuda_host {
namespace {

using namespace pykernels;

Strides3 strides(const py::dict& f, const char* name) {
  const auto [batch, token, head] = f[name].cast<std::tuple<int64_t, int64_t, int64_t>>();
  return {batch, token, head};
}

LinearAttentionParams params(const py::dict& f) {
  LinearAttentionParams p{};
  p.dtype = static_cast<DType>(number(f, "dtype"));
  p.batch = number(f, "batch"), p.tokens = number(f, "tokens"), p.heads = number(f, "heads");
  p.heads_k = number(f, "heads_k"), p.key_dim = number(f, "key_dim"), p.value_dim = number(f, "value_dim");
  p.q = pointer<void>(f, "q"), p.k = pointer<void>(f, "k"), p.v = pointer<void>(f, "v");
  p.q_stride = strides(f, "q_stride"), p.k_stride = strides(f, "k_stride"), p.v_stride = strides(f, "v_stride");
  p.decay_kind = static_cast<DecayKind>(number(f, "decay_kind"));
  p.decay = pointer<void>(f, "decay"), p.decay_stride = strides(f, "decay_stride");
  p.bonus = pointer<void>(f, "bonus"), p.initial_state = pointer<void>(f, "initial_state");
  p.cu_seqlens = pointer<int32_t>(f, "cu_seqlens"), p.sequences = number(f, "sequences");
  p.scale = f["scale"].cast<double>(), p.normalize = f["normalize"].cast<bool>(), p.reverse = f["reverse"].cast<bool>();
  if (f.contains("out")) p.out = pointer<void>(f, "out"), p.out_stride = strides(f, "out_stride");
  p.final_state = pointer<void>(f, "final_state"), p.checkpoints = pointer<void>(f, "checkpoints");
  p.denominator = pointer<void>(f, "denominator");
  return p;
}

LinearAttentionBackwardParams backward_params(const py::dict& f) {
  LinearAttentionBackwardParams b{};
  b.forward = params(f);
  b.dout = pointer<void>(f, "dout"), b.dout_stride = strides(f, "dout_stride");
  b.dfinal_state = pointer<void>(f, "dfinal_state");
  b.dq = pointer<void>(f, "dq"), b.dk = pointer<void>(f, "dk"), b.dv = pointer<void>(f, "dv");
  b.ddecay = pointer<void>(f, "ddecay"), b.dbonus = pointer<void>(f, "dbonus");
  b.dinitial_state = pointer<void>(f, "dinitial_state");
  return b;
}

LinearAttentionStepParams step_params(const py::dict& f) {
  LinearAttentionStepParams s{};
  s.forward = params(f);
  s.state = pointer<void>(f, "state"), s.slots = number(f, "slots");
  s.slot_stride = number(f, "slot_stride"), s.head_stride = number(f, "head_stride");
  s.state_indices = pointer<int32_t>(f, "state_indices");
  return s;
}

}  // namespace

void bind_linear_attention(py::module_& m) {
  m.def("linear_attention_fwd_scratch",
        [](const py::dict& f) { return cuda::linear_attention_fwd_scratch(params(f)); });
  m.def("linear_attention_fwd",
        [](const py::dict& f) { check(cuda::linear_attention_fwd(params(f), pointer<void>(f, "scratch"), nullptr)); });
  m.def("linear_attention_bwd_scratch",
        [](const py::dict& f) { return cuda::linear_attention_bwd_scratch(backward_params(f)); });
  m.def("linear_attention_bwd", [](const py::dict& f) {
    check(cuda::linear_attention_bwd(backward_params(f), pointer<void>(f, "scratch"), nullptr));
  });
  m.def("linear_attention_step",
        [](const py::dict& f) { check(cuda::linear_attention_step(step_params(f), nullptr)); });
}

}  // namespace cuda_host
