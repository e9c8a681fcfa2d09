// torch.ops.pykernels.fft_conv_*: schemas and the CPU implementations.
#include "fft_conv.h"

namespace pykernels::bindings {
namespace {

// A spectrum is one flat tensor: [G, size] numbers, then the lanes of the instruction set that it is for.
void check_spectrum(const Tensor& spectrum, FFTConvSpectrumParams s, ScalarType dtype) {
  int64_t size = 0, lanes = 0;
  s.spectrum = nullptr, s.size = &size, s.lanes = &lanes;
  cpu::fft_conv_spectrum(s, torch_threads());
  check_dtype(spectrum, dtype, "spectrum");
  STD_TORCH_CHECK(spectrum.dim() == 1 && spectrum.is_contiguous() && spectrum.size(0) >= 1,
                  "pykernels: spectrum needs one contiguous axis");
  const int64_t last = spectrum.size(0) - 1;
  const void* const data = spectrum.const_data_ptr();
  const double made_for = dtype == ScalarType::Double ? static_cast<const double*>(data)[last]
                                                      : static_cast<double>(static_cast<const float*>(data)[last]);
  STD_TORCH_CHECK(last == s.forward.groups * size && made_for == static_cast<double>(lanes),
                  "pykernels: the spectrum is for another kernel or another instruction set: make it again");
}

Tensor fwd_cpu(const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev, std::optional<Tensor> skip,
               std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag, bool circular) {
  return fft_conv_fwd(on_torch_threads(cpu::fft_conv_fwd), u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag, circular);
}

Tensor spectrum_cpu(const Tensor& k, std::optional<Tensor> k_rev, int64_t k_rev_lag, bool circular, int64_t length,
                    int64_t points) {
  int64_t size = 0, lanes = 0;
  FFTConvSpectrumParams s{};
  FFTConvParams& p = s.forward;
  const FFTConvKernels kernels(p, k, k_rev, k_rev_lag, circular);
  STD_TORCH_CHECK(length >= 1, "pykernels: length must be at least 1");
  STD_TORCH_CHECK(points == 0 || (points >= 256 && (points & (points - 1)) == 0 && length <= 2 * points && !circular &&
                                  !k_rev),
                  "pykernels: points must be 0 or a power of two, at least 256, that holds causal taps");
  const ScalarType wide = kernels.k.scalar_type();
  p.dtype = dtype_of(kernels.k), p.length = length;
  s.points = points, s.size = &size, s.lanes = &lanes;
  cpu::fft_conv_spectrum(s, torch_threads());
  Tensor spectrum = empty({p.groups * size + 1}, wide, kernels.k);
  s.spectrum = spectrum.mutable_data_ptr();
  cpu::fft_conv_spectrum(s, torch_threads());
  if (wide == ScalarType::Double)
    static_cast<double*>(s.spectrum)[p.groups * size] = static_cast<double>(lanes);
  else
    static_cast<float*>(s.spectrum)[p.groups * size] = static_cast<float>(lanes);
  return spectrum;
}

Tensor fwd_spectrum_cpu(const Tensor& u, const Tensor& spectrum, std::optional<Tensor> skip,
                        std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t groups, int64_t taps,
                        int64_t taps_rev, int64_t k_rev_lag, bool circular, int64_t length) {
  STD_TORCH_CHECK(taps >= 1 && taps_rev >= 0 && (k_rev_lag == 0 || k_rev_lag == 1) && length >= 1,
                  "pykernels: there is no such kernel");
  FFTConvSpectrumParams s{};
  FFTConvParams p{};
  p.groups = groups, p.taps = taps, p.taps_rev = taps_rev, p.k_rev_lag = k_rev_lag, p.circular = circular;
  const FFTConvRows rows(p, u, skip, pre_gate, post_gate);
  STD_TORCH_CHECK(circular ? p.length == length : p.length <= length, "pykernels: the spectrum is for sequences of ",
                  length, " samples, u has ", p.length);
  const ScalarType wide = accumulator_of(u);
  s.forward = p, s.forward.length = length;
  s.forward.dtype = wide == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  check_spectrum(spectrum, s, wide);
  p.spectrum = spectrum.const_data_ptr(), p.spectrum_length = length;
  return fft_conv_output(on_torch_threads(cpu::fft_conv_fwd), p, u);
}

Tensor step_cpu(const Tensor& u, Tensor inputs, Tensor pending, const Tensor& k, std::optional<Tensor> spectrum,
                std::optional<Tensor> skip_, std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate,
                int64_t tokens) {
  FFTConvStepParams p{};
  STD_TORCH_CHECK(u.dim() == 2 && inputs.dim() == 3 && k.dim() == 2, "pykernels: u needs 2 axes, inputs 3 and k 2");
  const ScalarType wide = accumulator_of(u);
  p.dtype = dtype_of(u), p.batch = u.size(0), p.channels = u.size(1), p.groups = k.size(0), p.capacity = inputs.size(2);
  p.tokens = tokens;
  STD_TORCH_CHECK(tokens >= 0, "pykernels: tokens must not be negative");
  STD_TORCH_CHECK(p.capacity >= kFFTConvBlock && (p.capacity & (p.capacity - 1)) == 0,
                  "pykernels: the rings' length must be a power of two, at least ", kFFTConvBlock);
  STD_TORCH_CHECK(p.groups > 0 ? p.channels % p.groups == 0 : p.channels == 0,
                  "pykernels: u's channels are no multiple of k's");
  check_shape(inputs, {p.batch, p.channels, p.capacity}, "inputs");
  check_shape(pending, {p.batch, p.channels, p.capacity}, "pending");
  check_shape(k, {p.groups, p.capacity}, "k");
  const auto plain = [&](const Tensor& x, const char* name) {
    check_dtype(x, wide, name);
    STD_TORCH_CHECK(x.is_contiguous(), "pykernels: ", name, " must be contiguous");
  };
  plain(inputs, "inputs"), plain(pending, "pending"), plain(k, "k");
  p.u = u.const_data_ptr(), p.u_stride = strides2(u), p.k = k.const_data_ptr();
  p.inputs = inputs.mutable_data_ptr(), p.pending = pending.mutable_data_ptr();
  const std::optional<Tensor> skip = contiguous_or(skip_);
  if (skip) {
    check_dtype(*skip, wide, "D");
    check_shape(*skip, {p.channels}, "D");
    p.skip = skip->const_data_ptr();
  }
  const auto gate = [&](const std::optional<Tensor>& x, const void*& data, Strides2& stride, const char* name) {
    if (!x) return;
    check_same_dtype(*x, u, name);
    check_shape(*x, {p.batch, p.channels}, name);
    data = x->const_data_ptr(), stride = strides2(*x);
  };
  gate(pre_gate, p.pre_gate, p.pre_stride, "pre_gate");
  gate(post_gate, p.post_gate, p.post_stride, "post_gate");
  const int64_t side = fft_conv_side(tokens + 1, p.capacity);
  if (const int64_t points = fft_conv_side_points(side); points && p.batch > 0 && p.channels > 0) {
    STD_TORCH_CHECK(spectrum.has_value(), "pykernels: after token ", tokens, " the spectrum of ", 2 * side,
                    " taps is needed");
    FFTConvSpectrumParams s{};
    s.forward.dtype = dtype_of(k), s.forward.groups = p.groups, s.forward.taps = p.capacity;
    s.forward.length = 2 * side, s.forward.k = p.k, s.points = points;
    check_spectrum(*spectrum, s, wide);
    p.spectrum = spectrum->const_data_ptr();
  }
  Tensor out = empty({p.batch, p.channels}, u.scalar_type(), u);
  p.out = out.mutable_data_ptr();
  cpu::fft_conv_step(p, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cpu(
    const Tensor& dout, const Tensor& u, const Tensor& k, std::optional<Tensor> k_rev, std::optional<Tensor> skip,
    std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t k_rev_lag, bool circular,
    bool input_gradient, bool kernel_gradient) {
  return fft_conv_bwd(on_torch_threads(cpu::fft_conv_bwd), dout, u, k, k_rev, skip, pre_gate, post_gate, k_rev_lag,
                      circular, input_gradient, kernel_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def(
      "fft_conv_fwd_cpu(Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? post_gate, int "
      "k_rev_lag, "
      "bool circular) -> Tensor");
  m.def(
      "fft_conv_spectrum_cpu(Tensor k, Tensor? k_rev, int k_rev_lag, bool circular, int length, int points) -> "
      "Tensor");
  m.def(
      "fft_conv_fwd_spectrum_cpu(Tensor u, Tensor spectrum, Tensor? D, Tensor? pre_gate, Tensor? post_gate, int "
      "groups, int taps, int taps_rev, int k_rev_lag, bool circular, int length) -> Tensor");
  m.def(
      "fft_conv_step_cpu(Tensor u_t, Tensor(a!) inputs, Tensor(b!) pending, Tensor k, Tensor? spectrum, Tensor? D, "
      "Tensor? pre_gate, Tensor? post_gate, int tokens) -> Tensor");
  m.def(
      "fft_conv_bwd_cpu(Tensor dout, Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? "
      "post_gate, "
      "int k_rev_lag, bool circular, bool input_gradient, bool kernel_gradient) "
      "-> (Tensor du, Tensor dk, Tensor dk_rev, Tensor dD, Tensor dpre_gate, Tensor dpost_gate)");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("fft_conv_fwd_cpu", TORCH_BOX(&fwd_cpu));
  m.impl("fft_conv_spectrum_cpu", TORCH_BOX(&spectrum_cpu));
  m.impl("fft_conv_fwd_spectrum_cpu", TORCH_BOX(&fwd_spectrum_cpu));
  m.impl("fft_conv_step_cpu", TORCH_BOX(&step_cpu));
  m.impl("fft_conv_bwd_cpu", TORCH_BOX(&bwd_cpu));
}

}  // namespace pykernels::bindings
