#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
static void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "cuda_host: write the stack switch for this processor"
#endif

// Saves what the calling convention says a call preserves, stores the stack pointer in *from, and continues at `to`.
extern "C" void cuda_host_switch(void** from, void* to);
// Where a fresh stack starts: calls cuda_host_begin with the fiber.
extern "C" void cuda_host_trampoline();
extern "C" void cuda_host_begin(cuda_host::Fiber* fiber);

#if defined(__APPLE__)
#define SYMBOL(name) "_" #name
#else
#define SYMBOL(name) #name
#endif

#if defined(__x86_64__)
asm(".text\n.globl " SYMBOL(cuda_host_switch) "\n" SYMBOL(
    cuda_host_switch) R"(:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)"
                      ".globl " SYMBOL(cuda_host_trampoline) "\n" SYMBOL(cuda_host_trampoline) R"(:
  movq %rbx, %rdi
  xorl %ebp, %ebp
  call )" SYMBOL(cuda_host_begin) "\n  ud2\n");
#else
asm(".text\n.balign 4\n.globl " SYMBOL(cuda_host_switch) "\n" SYMBOL(
    cuda_host_switch) R"(:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)"
                      ".globl " SYMBOL(cuda_host_trampoline) "\n" SYMBOL(cuda_host_trampoline) R"(:
  mov x0, x19
  mov x29, xzr
  bl )" SYMBOL(cuda_host_begin) "\n  brk #0\n");
#endif

extern "C" void cuda_host_begin(cuda_host::Fiber* fiber) { cuda_host::Fiber::begin(fiber); }

namespace cuda_host {

Fiber::Fiber() {
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard, PROT_NONE);
  stack_ = static_cast<std::byte*>(memory) + guard;
}

Fiber::~Fiber() {
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
  munmap(stack_ - guard, guard + kStackBytes);
}

void Fiber::start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
  // Registers start undefined: where the compiler keeps them in memory they read as NaN.
  constexpr std::size_t kPoisoned = 16 * 1024;
  std::byte* top = stack_ + kStackBytes;
  std::memset(top - kPoisoned, 0xff, kPoisoned);
#if defined(__x86_64__)
  // From low to high: control words, r15, r14, r13, r12, rbx, rbp, return address; then a slot that keeps the
  // alignment.
  auto* frame = reinterpret_cast<std::uint64_t*>(top) - 10;
  std::memset(frame, 0, 10 * sizeof(std::uint64_t));
  asm volatile("stmxcsr (%0)\n fnstcw 4(%0)" : : "r"(frame) : "memory");
  frame[5] = reinterpret_cast<std::uint64_t>(this);
  frame[7] = reinterpret_cast<std::uint64_t>(&cuda_host_trampoline);
#else
  auto* frame = reinterpret_cast<std::uint64_t*>(top) - 20;
  std::memset(frame, 0, 20 * sizeof(std::uint64_t));
  frame[0] = reinterpret_cast<std::uint64_t>(this);                    // x19
  frame[11] = reinterpret_cast<std::uint64_t>(&cuda_host_trampoline);  // x30
#endif
  fiber_sp_ = frame;
}

void Fiber::begin(Fiber* fiber) {
  __sanitizer_finish_switch_fiber(nullptr, &fiber->owner_stack_, &fiber->owner_stack_bytes_);
  fiber->entry_(fiber->argument_);
  std::abort();
}

void Fiber::resume() {
  __sanitizer_start_switch_fiber(&owner_fake_stack_, stack_, kStackBytes);
  cuda_host_switch(&owner_sp_, fiber_sp_);
  __sanitizer_finish_switch_fiber(owner_fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() {
  __sanitizer_start_switch_fiber(&fake_stack_, owner_stack_, owner_stack_bytes_);
  cuda_host_switch(&fiber_sp_, owner_sp_);
  __sanitizer_finish_switch_fiber(fake_stack_, &owner_stack_, &owner_stack_bytes_);
}

void Fiber::leave() {
  __sanitizer_start_switch_fiber(nullptr, owner_stack_, owner_stack_bytes_);
  cuda_host_switch(&fiber_sp_, owner_sp_);
  std::abort();
}

}  // namespace cuda_host
