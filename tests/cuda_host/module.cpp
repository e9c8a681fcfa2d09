// The Python module: the executor's settings, the kernels' launch functions and the instructions, all on host memory.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "include/pykernels/flash_attention.h"
#include "runtime.h"

namespace py = pybind11;

extern "C" const char* pykernels_run_instruction(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes);
namespace pykernels::cuda {
const char* run_fault(const char* name, const float* in, float* out, int n);
}

namespace {

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace

PYBIND11_MODULE(pykernels_cuda_host, m) {
  m.def("set_seed", &cuda_host::set_seed, "The order of the threads and the moments of asynchronous effects of the next launches.");
  m.def("set_shared_limit", &cuda_host::set_shared_limit, "Dynamic shared memory per block of the modelled GPU, in bytes.");
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
}
