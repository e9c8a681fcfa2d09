// How a CPU kernel gets its threads. The torch bindings fill this with torch's own thread pool, so that
// torch.set_num_threads holds; the tests can fill it with anything else. Kernels never start threads.
#pragma once

#include <cstdint>

namespace pykernels {

struct Parallel {
  // Threads that `run` can keep busy at once (1 inside an enclosing parallel region).
  int threads;
  // Calls body(context, begin, end) on disjoint ranges that cover [0, n), each at least `grain` long where possible,
  // from several threads at once, and returns when all are done. The body must not throw.
  void (*run)(int64_t n, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

}  // namespace pykernels
