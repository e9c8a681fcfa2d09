// What the bindings of all ops share: the fields of a params struct arrive as a dict of their names.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

namespace cuda_host {

namespace py = pybind11;

inline void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

// An address, null when it is 0 or missing.
template <class T>
T* pointer(const py::dict& fields, const char* name) {
  return fields.contains(name) ? reinterpret_cast<T*>(fields[name].cast<std::uintptr_t>()) : nullptr;
}

inline int64_t number(const py::dict& fields, const char* name) { return fields[name].cast<int64_t>(); }

}  // namespace cuda_host
