// Fibers: stacks of their own that one operating-system thread switches between.
//
// Our own switch, because longjmp under the address sanitizer gives false reports and swapcontext makes two system
// calls. Sanitizers are told of every switch.
#pragma once

#include <cstddef>

namespace cuda_host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Makes the next resume() call `entry(argument)` on a fresh stack, whatever the fiber was doing before: what an
  // abandoned run left on its stack is never unwound. `entry` must not return; it ends with leave().
  void start(void (*entry)(void*), void* argument);

  // From the owner's stack: runs the fiber until it calls suspend() or leave().
  void resume();
  // From the fiber: back to the owner.
  void suspend();
  // From the fiber, for the last time.
  [[noreturn]] void leave();

  // Where a fresh stack starts; for the stack switch only.
  static void begin(Fiber* fiber);

 private:
  static constexpr std::size_t kStackBytes = 256 * 1024;

  std::byte* stack_;  // below it one page that faults
  void* fiber_sp_ = nullptr;
  void* owner_sp_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // The address sanitizer's view of the two stacks.
  void* fake_stack_ = nullptr;
  void* owner_fake_stack_ = nullptr;
  const void* owner_stack_ = nullptr;
  std::size_t owner_stack_bytes_ = 0;
};

}  // namespace cuda_host
