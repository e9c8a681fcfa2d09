// torch.ops.pykernels.linear_attention_*_cpu.
#include "linear_attention.h"

namespace pykernels::bindings {
namespace {

LinearOutputs fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> decay,
                      std::optional<Tensor> bonus, std::optional<Tensor> initial_state,
                      std::optional<Tensor> cu_seqlens, double scale, bool normalize, bool reverse, bool checkpoint) {
  return linear_attention_fwd(on_torch_threads(cpu::linear_attention_fwd), q, k, v, decay, bonus, initial_state,
                              cu_seqlens, scale, normalize, reverse, checkpoint);
}

LinearGradients bwd_cpu(const Tensor& dout, std::optional<Tensor> dfinal_state, const Tensor& q, const Tensor& k,
                        const Tensor& v, std::optional<Tensor> decay, std::optional<Tensor> bonus,
                        std::optional<Tensor> cu_seqlens, const Tensor& out, const Tensor& checkpoints,
                        const Tensor& denominator, double scale, bool normalize, bool reverse, bool decay_gradient) {
  return linear_attention_bwd(on_torch_threads(cpu::linear_attention_bwd), dout, dfinal_state, q, k, v, decay, bonus,
                              cu_seqlens, out, checkpoints, denominator, scale, normalize, reverse, decay_gradient);
}

Tensor step_cpu(Tensor state, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> decay,
                std::optional<Tensor> bonus, std::optional<Tensor> state_indices, double scale, bool normalize) {
  return linear_attention_step(on_torch_threads(cpu::linear_attention_step), state, q, k, v, decay, bonus,
                               state_indices, scale, normalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "linear_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, Tensor? initial_state, "
      "Tensor? cu_seqlens, float scale, bool normalize, bool reverse, bool checkpoint) "
      "-> (Tensor out, Tensor final_state, Tensor checkpoints, Tensor denominator)");
  m.def(
      "linear_attention_bwd_cpu(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? decay, "
      "Tensor? bonus, Tensor? cu_seqlens, Tensor out, Tensor checkpoints, Tensor denominator, float scale, "
      "bool normalize, bool reverse, bool decay_gradient) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay, Tensor dbonus, Tensor dinitial_state)");
  m.def(
      "linear_attention_step_cpu(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, "
      "Tensor? state_indices, float scale, bool normalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("linear_attention_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("linear_attention_bwd_cpu", TORCH_BOX(&bwd_cpu));
  m.impl("linear_attention_step_cpu", TORCH_BOX(&step_cpu));
}

}  // namespace pykernels::bindings
