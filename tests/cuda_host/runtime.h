// Runs CUDA kernels on the CPU: the blocks of a grid with their threads as fibers, in a seeded random order.
//
// Fibers switch only where CUDA threads may wait for each other (barriers, warp collectives, mbarriers, waits for
// asynchronous copies), so a data race shows as a wrong order of the stretches between those. To make it show:
//   - shared memory and registers start as NaN, regions of shared memory have red zones around them;
//   - asynchronous operations take effect at a random moment between their issue and the wait for them;
//   - the async proxy (TMA, bulk copies, wgmma) reads shared memory as it was at the last proxy fence.
// A fault ends the launch with a message instead of a result. Models of the instructions are in models.h.
//
// The seed chooses the policies too, so that 12 consecutive seeds see every combination of: asynchronous effects at
// once, as late as possible, or in between; their destination NaN until then or not; warps in uniform order or by
// random priorities.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "shim/vector_types.h"

namespace cuda_host {

using Where = std::source_location;

constexpr unsigned kWarp = 32;
constexpr unsigned kWarpgroup = 128;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kNamedBarriers = 16;

// An operation that was issued and has not yet taken effect.
class Async {
 public:
  virtual ~Async() = default;
  // The effect; called once, by complete() or at a moment the executor picks.
  virtual void effect() = 0;
  // What an early reader would find: called at issue unless the effect is immediate.
  virtual void poison() {}
  // What goes wrong if the block ends before a wait for this operation, or null.
  virtual const char* at_exit() const { return nullptr; }

 private:
  friend class Block;
  bool done_ = false;
  std::size_t slot_ = 0;
};

struct Barrier {
  unsigned expected = 0;  // threads, 0 while nobody has come
  Where where;
  std::bitset<kMaxThreads> arrived;
  std::vector<struct Thread*> waiting;
};

// An mbarrier object in shared memory.
struct MBarrier {
  unsigned count = 0;  // arrivals per phase
  int pending = 0;     // arrivals the current phase still needs
  int64_t bytes = 0;   // transaction bytes the current phase still expects; may be negative for a while
  unsigned phase = 0;
  bool fenced = false;  // its initialisation has been made visible to the async proxy
  std::vector<struct Thread*> waiting;
};

// Threads of a warp or warpgroup that came to a collective instruction and wait for the others.
struct Rendezvous {
  const char* what;
  Where where;
  unsigned mask;  // lanes of a warp; for a warpgroup ~0
  unsigned arrived = 0;
  void* arguments[kWarpgroup];
  struct Thread* threads[kWarpgroup];
};

// cp.async and bulk copies of one thread, oldest group first; the last one is open.
struct CopyGroups {
  std::deque<std::vector<std::shared_ptr<Async>>> groups{1};
};

struct Warp {
  class Block* block;
  unsigned index;
  std::vector<struct Thread*> ready;
  std::size_t slot;  // in the executor's list of warps with ready threads
  unsigned priority;
  std::vector<Rendezvous> meetings;
};

struct Warpgroup {
  std::vector<Rendezvous> meetings;
  // wgmma operations take effect in order of issue.
  std::deque<std::shared_ptr<Async>> open;
  std::deque<std::vector<std::shared_ptr<Async>>> groups;
  bool fenced = false;
};

struct Thread {
  class Block* block;
  uint3 index;
  unsigned linear;
  Warp* warp;
  Fiber fiber;
  bool exited;
  CopyGroups cp_async, bulk;
  // What it waits for.
  const char* waits_for = nullptr;
  Where where;
  int barrier = -1;
  const MBarrier* mbarrier = nullptr;

  unsigned lane() const { return linear % kWarp; }
};

class Block {
 public:
  Block();
  ~Block();
  void start(uint3 index, unsigned shared_bytes);
  // The end of its threads: what asynchronous operations left undone, and red zones.
  void finish();

  // The region of dynamic shared memory at `offset` of the block's layout; the same arguments give the same region.
  std::byte* shared(unsigned offset, unsigned bytes, unsigned alignment, Where where);
  unsigned shared_address(const void* pointer, const char* what) const;  // 32-bit address in the shared window
  std::byte* shared_pointer(unsigned address, unsigned bytes, const char* what) const;
  // The async proxy's view of the same byte.
  std::byte* async_view(const void* pointer) const;
  void proxy_fence();

  void issue(const std::shared_ptr<Async>& operation);
  void complete(Async& operation);
  bool run_some_async();  // one pending effect; false when there is none

  uint3 index;
  unsigned live = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[kNamedBarriers];
  std::unordered_map<const void*, MBarrier> mbarriers;

 private:
  struct Region {
    unsigned offset, bytes, alignment;
    std::byte* memory;
  };
  void check_red_zones() const;

  std::byte* arena_;  // generic view, then the async proxy's
  unsigned used_ = 0;
  unsigned shared_bytes_ = 0;
  std::vector<Region> regions_;
  std::vector<std::shared_ptr<Async>> pending_;
};

// ---- For the shim and the models, from within a kernel ------------------------------------------------------------

extern Thread* current;
using Random = std::mt19937_64;
Random& random();
bool eager();  // asynchronous effects happen at issue
uint64_t seed();

// Ends the launch with a message; it begins with the block and the thread.
[[noreturn]] void fail(const std::string& message, Where where);
[[noreturn]] void fail(const std::string& message);
std::string text(Where where);

// Lets other threads run first, perhaps.
void maybe_yield();
// Blocks the current thread until wake() is called for it; the description is for the report of a deadlock.
void wait(const char* what, Where where, int barrier = -1, const MBarrier* mbarrier = nullptr);
void wake(Thread* thread);

// Waits until all threads of the warp in `mask` have come to the same instruction; the last one calls
// effect(arguments), where arguments[lane] is what that lane gave.
using Effect = void (*)(void* const* arguments, void* context);
void warp_collective(const char* what, unsigned mask, void* argument, Effect effect, void* context, Where where);
void warpgroup_collective(const char* what, void* argument, Effect effect, void* context, Where where);

template <class Argument, class F>
void warp_collective(const char* what, unsigned mask, Argument& argument, Where where, F effect) {
  warp_collective(
      what, mask, const_cast<std::remove_const_t<Argument>*>(&argument),
      [](void* const* arguments, void* context) {
        (*static_cast<F*>(context))(reinterpret_cast<Argument* const*>(arguments));
      },
      &effect, where);
}
template <class Argument, class F>
void warpgroup_collective(const char* what, Argument& argument, Where where, F effect) {
  warpgroup_collective(
      what, const_cast<std::remove_const_t<Argument>*>(&argument),
      [](void* const* arguments, void* context) {
        (*static_cast<F*>(context))(reinterpret_cast<Argument* const*>(arguments));
      },
      &effect, where);
}

// barrier.sync and barrier.arrive; `syncthreads` demands all threads of the block at one place of the source.
void barrier_sync(unsigned id, unsigned threads, bool syncthreads, Where where);
void barrier_arrive(unsigned id, unsigned threads, Where where);

// Blocks the current thread until the next change of a counter in global memory, by whichever block.
void wait_for_semaphore(const unsigned* global, Where where);
void semaphore_changed(const unsigned* global);

MBarrier& mbarrier_at(const void* object, Where where);
void mbarrier_update(MBarrier& barrier, int arrivals, int64_t bytes);  // ends the phase when nothing is missing

// ---- For the launch -----------------------------------------------------------------------------------------------

void set_seed(uint64_t seed);
// The dynamic shared memory that a block may have on the modelled GPU; 227 KiB at first.
void set_shared_limit(unsigned bytes);
unsigned shared_limit();
// The compute capability of the modelled GPU, as 10 major + minor; 80 at first.
void set_capability(int capability);
int capability();
// Runs body() once per thread. Returns what went wrong, or an empty string.
std::string run(dim3 grid, dim3 block, unsigned shared_bytes, const std::function<void()>& body);

}  // namespace cuda_host
