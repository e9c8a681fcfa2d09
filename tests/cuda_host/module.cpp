// The Python module: the executor's settings, the kernels' launch functions and the instructions, all on host memory.
#include <string>

#include "fields.h"
#include "include/pykernels/flash_attention.h"
#include "runtime.h"

namespace py = pybind11;

extern "C" const char* pykernels_run_instruction(const char* name, const void* in, size_t in_bytes, void* out,
                                                 size_t out_bytes);
namespace pykernels::cuda {
const char* run_fault(const char* name, const float* in, float* out, int n);
}

namespace cuda_host {
void bind_causal_conv1d(py::module_& m);
void bind_selective_scan(py::module_& m);
void bind_linear_attention(py::module_& m);
void bind_fft_conv(py::module_& m);
}

namespace {

using cuda_host::check;
using cuda_host::pointer;

pykernels::Strides3 strides(const py::dict& fields, const char* name) {
  const auto stride = fields[name].cast<std::tuple<int64_t, int64_t, int64_t>>();
  return {std::get<0>(stride), std::get<1>(stride), std::get<2>(stride)};
}

template <class Params>
void set_pages(const py::dict& f, Params& p) {
  p.block_table = pointer<int32_t>(f, "block_table");
  if (p.block_table == nullptr) return;
  p.block_table_stride = cuda_host::number(f, "block_table_stride"), p.page_size = cuda_host::number(f, "page_size");
  p.pages = cuda_host::number(f, "pages");
}

pykernels::FlashAttentionParams attention_params(const py::dict& f) {
  pykernels::FlashAttentionParams p{};
  p.dtype = static_cast<pykernels::DType>(f["dtype"].cast<int>());
  const auto number = [&](const char* name) { return f[name].cast<int64_t>(); };
  p.batch = number("batch"), p.seqlen_q = number("seqlen_q"), p.seqlen_k = number("seqlen_k"),
  p.heads_q = number("heads_q");
  p.heads_k = number("heads_k"), p.head_dim = number("head_dim"), p.value_dim = number("value_dim");
  p.q = pointer<void>(f, "q"), p.k = pointer<void>(f, "k"), p.v = pointer<void>(f, "v");
  p.q_stride = strides(f, "q_stride"), p.k_stride = strides(f, "k_stride"), p.v_stride = strides(f, "v_stride");
  p.out = pointer<void>(f, "out"), p.out_stride = strides(f, "out_stride"), p.lse = pointer<void>(f, "lse");
  p.cu_seqlens_q = pointer<int32_t>(f, "cu_seqlens_q"), p.cu_seqlens_k = pointer<int32_t>(f, "cu_seqlens_k");
  p.sequences = number("sequences");
  p.scale = f["scale"].cast<double>(), p.softcap = f["softcap"].cast<double>();
  p.window_left = number("window_left"), p.window_right = number("window_right");
  p.alibi_slopes = pointer<void>(f, "alibi_slopes"), p.sinks = pointer<void>(f, "sinks");
  p.alibi_stride = p.alibi_slopes == nullptr ? 0 : number("alibi_stride");
  set_pages(f, p);
  return p;
}

pykernels::FlashAttentionBackwardParams backward_params(const py::dict& f) {
  pykernels::FlashAttentionBackwardParams p{};
  p.forward = attention_params(f);
  p.dout = pointer<void>(f, "dout"), p.dout_stride = strides(f, "dout_stride"), p.dlse = pointer<void>(f, "dlse");
  p.dq = pointer<void>(f, "dq"), p.dk = pointer<void>(f, "dk"), p.dv = pointer<void>(f, "dv");
  p.dq_stride = strides(f, "dq_stride"), p.dk_stride = strides(f, "dk_stride"),
  p.dv_stride = strides(f, "dv_stride");
  p.dsinks = pointer<void>(f, "dsinks");
  p.deterministic = f["deterministic"].cast<bool>(), p.scratch = pointer<void>(f, "scratch");
  return p;
}

pykernels::FlashAttentionDecodeParams decode_params(const py::dict& f) {
  pykernels::FlashAttentionDecodeParams p{};
  p.forward = attention_params(f);
  p.cache_seqlens = pointer<int32_t>(f, "cache_seqlens"), p.new_tokens = f["new_tokens"].cast<int64_t>();
  p.splits = pykernels::cuda::flash_attention_decode_splits(p);
  return p;
}

}  // namespace

PYBIND11_MODULE(pykernels_cuda_host, m) {
  m.def("set_seed", &cuda_host::set_seed,
        "The order of the threads and the moments of asynchronous effects of the next launches.");
  m.def("set_shared_limit", &cuda_host::set_shared_limit,
        "Dynamic shared memory per block of the modelled GPU, in bytes.");
  m.def("set_capability", &cuda_host::set_capability,
        "Compute capability of the modelled GPU as 10 major + minor: launch functions choose their kernels by it.");
  m.def(
      "run_instruction",
      [](const std::string& name, py::buffer in, py::buffer out) {
        const py::buffer_info i = in.request(), o = out.request(true);
        check(pykernels_run_instruction(name.c_str(), i.ptr, static_cast<size_t>(i.size * i.itemsize), o.ptr,
                                        static_cast<size_t>(o.size * o.itemsize)));
      },
      "Runs a kernel of instructions.cu; `out` is read and written.");
  m.def(
      "run_fault",
      [](const std::string& name, py::buffer in, py::buffer out) {
        const py::buffer_info i = in.request(), o = out.request(true);
        check(pykernels::cuda::run_fault(name.c_str(), static_cast<const float*>(i.ptr), static_cast<float*>(o.ptr),
                                         static_cast<int>(i.size)));
      },
      "Runs a kernel of faults.cu on n floats.");
  m.def(
      "flash_attention_fwd",
      [](const py::dict& fields) { check(pykernels::cuda::flash_attention_fwd(attention_params(fields), nullptr)); },
      "pykernels::cuda::flash_attention_fwd; the fields of its params by name, pointers as addresses.");
  m.def(
      "flash_attention_bwd",
      [](const py::dict& f) { check(pykernels::cuda::flash_attention_bwd(backward_params(f), nullptr)); },
      "pykernels::cuda::flash_attention_bwd, likewise.");
  m.def(
      "flash_attention_bwd_scratch",
      [](const py::dict& f) { return pykernels::cuda::flash_attention_bwd_scratch(backward_params(f)); },
      "Floats of scratch.");
  m.def(
      "flash_attention_decode_splits",
      [](const py::dict& f) {
        const pykernels::FlashAttentionDecodeParams p = decode_params(f);
        return std::pair(p.splits, pykernels::cuda::flash_attention_decode_scratch(p));
      },
      "(splits, floats of scratch).");
  m.def(
      "flash_attention_decode",
      [](const py::dict& f) {
        pykernels::FlashAttentionDecodeParams p = decode_params(f);
        p.scratch = pointer<void>(f, "scratch");
        check(pykernels::cuda::flash_attention_decode(p, nullptr));
      },
      "pykernels::cuda::flash_attention_decode, likewise.");
  m.def(
      "flash_attention_append",
      [](const py::dict& f) {
        pykernels::FlashAttentionAppendParams p{};
        const auto number = [&](const char* name) { return f[name].cast<int64_t>(); };
        p.element_size = number("element_size"), p.batch = number("batch"), p.new_tokens = number("new_tokens"),
        p.capacity = number("capacity"), p.heads = number("heads"), p.head_dim = number("head_dim"),
        p.value_dim = number("value_dim");
        p.k = pointer<void>(f, "k"), p.v = pointer<void>(f, "v");
        p.k_stride = strides(f, "k_stride"), p.v_stride = strides(f, "v_stride");
        p.k_cache = pointer<void>(f, "k_cache"), p.v_cache = pointer<void>(f, "v_cache");
        p.k_cache_stride = strides(f, "k_cache_stride"), p.v_cache_stride = strides(f, "v_cache_stride");
        p.cache_seqlens = pointer<int32_t>(f, "cache_seqlens");
        set_pages(f, p);
        check(pykernels::cuda::flash_attention_append(p, nullptr));
      },
      "pykernels::cuda::flash_attention_append, likewise.");
  cuda_host::bind_causal_conv1d(m);
  cuda_host::bind_selective_scan(m);
  cuda_host::bind_linear_attention(m);
  cuda_host::bind_fft_conv(m);
}
