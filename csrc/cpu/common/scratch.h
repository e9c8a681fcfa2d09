// Scratch memory and tasks of CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../include/pykernels/parallel.h"

namespace pykernels::cpu {

// A block of at least `bytes`, 64-byte aligned, its size written to `granted`; contents arbitrary. Blocks are kept
// for reuse up to a cap (scratch.cpp) and given back to the system by pykernels_release_scratch. Thread-safe; aborts
// without memory.
void* scratch_acquire(size_t bytes, size_t* granted);
void scratch_release(void* block, size_t granted);

}  // namespace pykernels::cpu

#if defined(PYKERNELS_ISA)
namespace pykernels::cpu::PYKERNELS_ISA {

// Hands out buffers that live as long as it does. Make one per thread body, not per block of work.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < count_; ++i) scratch_release(blocks_[i].start, blocks_[i].bytes);
  }

  // 64-byte aligned room for n objects, uninitialised.
  template <class T>
  T* take(int64_t n) {
    // The odd number of cache lines between buffers keeps those of power-of-two sizes from sharing cache sets.
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64 + 3 * 64;
    if (count_ == 0 || used_ + bytes > blocks_[count_ - 1].bytes) {
      if (count_ == kMaxBlocks) __builtin_trap();
      Block& block = blocks_[count_++];
      block.start = static_cast<char*>(scratch_acquire(bytes, &block.bytes));
      used_ = 0;
    }
    char* const start = blocks_[count_ - 1].start + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(start);
  }

 private:
  static constexpr int kMaxBlocks = 32;
  struct Block {
    char* start;
    size_t bytes;
  };
  Block blocks_[kMaxBlocks];
  int count_ = 0;
  size_t used_ = 0;
};

// Hands out the tasks 0, 1, ... of one parallel region, each once, in order: put the longest first and they balance.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t tasks) : tasks_(tasks) {}
  // The next task, or -1 when none is left.
  int64_t next() {
    const int64_t task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return task < tasks_ ? task : -1;
  }

 private:
  int64_t tasks_;
  alignas(64) int64_t next_ = 0;
};

// Runs body(TaskQueue&) once per thread; the body sets up its scratch, then loops over queue.next() until it gives -1.
// Which thread runs a task is arbitrary: nothing that a task writes may depend on it.
template <class Body>
void run_tasks(const Parallel& parallel, int64_t tasks, Body&& body) {
  if (tasks <= 0) return;
  struct Context {
    TaskQueue queue;
    Body* body;
  } context{TaskQueue(tasks), &body};
  const int64_t threads = parallel.threads < tasks ? parallel.threads : tasks;
  if (threads <= 1) {
    body(context.queue);
    return;
  }
  parallel.run(
      threads, 1,
      [](void* opaque, int64_t, int64_t) {
        Context& shared = *static_cast<Context*>(opaque);
        (*shared.body)(shared.queue);
      },
      &context);
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
#endif
