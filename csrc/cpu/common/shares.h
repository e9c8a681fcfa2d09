// Tasks that a thread finds in its cache: the same ones in every call.
#pragma once

#include <cstdint>

#include "../../include/pykernels/parallel.h"

namespace pykernels::cpu::PYKERNELS_ISA {

// Hands out consecutive tasks that are a thread's own, then what is left of the other threads'.
class Share {
 public:
  struct alignas(64) Range {
    int64_t next, last;
  };

  Share(Range* ranges, int64_t count, int64_t own) : ranges_(ranges), count_(count), at_(own) {}
  // The next task, or -1 when none is left.
  int64_t next() {
    for (; tried_ < count_; ++tried_, at_ = at_ + 1 < count_ ? at_ + 1 : 0) {
      Range& range = ranges_[at_];
      const int64_t task = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED);
      if (task < range.last) return task;
    }
    return -1;
  }

 private:
  Range* ranges_;
  int64_t count_, at_, tried_ = 0;
};

// Runs body(Share&) once per thread, as run_tasks does, but each starts with the same consecutive tasks in every call:
// what they change stays in its cache from call to call, and no thread asks ahead for memory that another writes. Which
// thread runs a task is arbitrary all the same.
template <class Body>
void run_shares(const Parallel& parallel, int64_t tasks, Body&& body) {
  constexpr int64_t kMostRanges = 64;  // more threads than that share them
  if (tasks <= 0) return;
  struct Context {
    Share::Range ranges[kMostRanges];
    int64_t count;
    Body* body;
  } context;
  const int64_t threads = parallel.threads < tasks ? parallel.threads : tasks;
  context.count = threads < 1 ? 1 : threads < kMostRanges ? threads : kMostRanges;
  context.body = &body;
  for (int64_t i = 0; i < context.count; ++i)
    context.ranges[i] = {tasks * i / context.count, tasks * (i + 1) / context.count};
  const auto run = [](void* opaque, int64_t first, int64_t last) {
    Context& shared = *static_cast<Context*>(opaque);
    for (int64_t i = first; i < last; ++i) {
      Share share(shared.ranges, shared.count, i % shared.count);
      (*shared.body)(share);
    }
  };
  if (threads <= 1)
    run(&context, 0, 1);
  else
    parallel.run(threads, 1, run, &context);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
