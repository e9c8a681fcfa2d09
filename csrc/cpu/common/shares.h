// Short tasks, the same for a thread in every call.
#pragma once

#include <cstdint>

#include "../../include/pykernels/parallel.h"

namespace pykernels::cpu::PYKERNELS_ISA {

// Hands out a thread's share of the tasks: consecutive ones.
class Share {
 public:
  Share(int64_t first, int64_t last) : next_(first), last_(last) {}
  // The next task, or -1 when none is left.
  int64_t next() { return next_ < last_ ? next_++ : -1; }

 private:
  int64_t next_, last_;
};

// Runs body(Share&) once per thread, as run_tasks does with what is left for all; but each thread has the same tasks in
// every call, so that the memory they change stays in its cache from one call to the next. For tasks that take equally
// long.
template <class Body>
void run_shares(const Parallel& parallel, int64_t tasks, Body&& body) {
  if (tasks <= 0) return;
  struct Context {
    int64_t tasks, threads;
    Body* body;
  } context{tasks, parallel.threads < tasks ? parallel.threads : tasks, &body};
  const auto run = [](void* opaque, int64_t first, int64_t last) {
    const Context& shared = *static_cast<Context*>(opaque);
    for (int64_t i = first; i < last; ++i) {
      Share share(shared.tasks * i / shared.threads, shared.tasks * (i + 1) / shared.threads);
      (*shared.body)(share);
    }
  };
  if (context.threads <= 1)
    run(&context, 0, 1);
  else
    parallel.run(context.threads, 1, run, &context);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
