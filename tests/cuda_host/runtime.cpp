#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

Thread* current = nullptr;

namespace {

constexpr unsigned kArenaBytes = 256 * 1024;  // what the 18-bit addresses of matrix descriptors reach
constexpr unsigned kFirstAddress = 1024;      // so that address 0 is no region
constexpr unsigned kRedZone = 256;

enum class Timing { kEager, kLazy, kRandom };

struct Executor {
  uint64_t seed = 0;
  uint64_t launches = 0;
  unsigned shared_limit = 227 * 1024;
  int capability = 80;
  Random random;
  Timing timing;
  bool poison;      // destinations of asynchronous copies, from issue to effect
  bool priorities;  // else uniform
  std::vector<std::unique_ptr<Block>> pool;
  std::vector<Block*> resident;
  std::vector<Warp*> ready;  // warps with ready threads
  Warp* last;                // the one picked before
  std::unordered_map<const unsigned*, std::vector<Thread*>> semaphores;  // who waits for a counter in global memory
  const std::function<void()>* body;
  std::string error;

  std::size_t below(std::size_t n) { return static_cast<std::size_t>(random() % n); }
};
Executor executor;

void make_ready(Thread* thread) {
  Warp* warp = thread->warp;
  if (warp->ready.empty()) {
    warp->slot = executor.ready.size();
    executor.ready.push_back(warp);
  }
  warp->ready.push_back(thread);
}

Thread* pick() {
  Warp* warp;
  if (executor.priorities) {
    warp = *std::max_element(executor.ready.begin(), executor.ready.end(),
                             [](const Warp* a, const Warp* b) { return a->priority < b->priority; });
    // Now and then the order changes, so that a warp also falls behind in the middle of its work.
    if (executor.below(512) == 0) warp->priority = static_cast<unsigned>(executor.random());
  } else {
    // Mostly the same warp as before: faster, and it lets warps drift apart.
    if (executor.last == nullptr || executor.last->ready.empty() || executor.below(32) == 0)
      executor.last = executor.ready[executor.below(executor.ready.size())];
    warp = executor.last;
  }
  const std::size_t at = executor.below(warp->ready.size());
  Thread* thread = warp->ready[at];
  warp->ready[at] = warp->ready.back();
  warp->ready.pop_back();
  if (warp->ready.empty()) {
    executor.ready[warp->slot] = executor.ready.back();
    executor.ready[warp->slot]->slot = warp->slot;
    executor.ready.pop_back();
  }
  return thread;
}

std::string name(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// "0-31, 40" for a set of thread numbers.
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string result;
  for (std::size_t i = 0, j; i < numbers.size(); i = j) {
    for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1; ++j) {
    }
    if (!result.empty()) result += ", ";
    result += std::to_string(numbers[i]);
    if (j > i + 1) result += "-" + std::to_string(numbers[j - 1]);
  }
  return result;
}

std::string waiting_text(const Thread& thread) {
  std::string result;
  if (thread.exited) return "exited";
  if (thread.barrier >= 0) {
    const Barrier& barrier = thread.block->barriers[thread.barrier];
    result = "wait at barrier " + std::to_string(thread.barrier) + " (" + std::to_string(barrier.arrived.count()) +
             " of " + std::to_string(barrier.expected) + " threads came)";
  } else if (thread.mbarrier != nullptr) {
    for (const auto& [object, barrier] : thread.block->mbarriers) {
      if (&barrier != thread.mbarrier) continue;
      std::ostringstream out;
      out << "wait at the mbarrier at shared address " << thread.block->shared_address(object, "mbarrier")
          << " (phase " << barrier.phase << ", " << barrier.pending << " of " << barrier.count << " arrivals and "
          << barrier.bytes << " bytes missing)";
      result = out.str();
    }
  } else {
    result = std::string("wait at ") + (thread.waits_for != nullptr ? thread.waits_for : "nothing");
  }
  return result + ", " + text(thread.where);
}

std::string deadlock() {
  std::string result = "deadlock:";
  for (const Block* block : executor.resident) {
    result += " block " + name(block->index) + ":";
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    for (unsigned i = 0; i < block->threads.size(); ++i) {
      const std::string what = waiting_text(*block->threads[i]);
      auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == what; });
      if (group == groups.end()) group = groups.insert(groups.end(), {what, {}});
      group->second.push_back(i);
    }
    for (const auto& [what, numbers] : groups) result += " threads " + ranges(numbers) + " " + what + ";";
  }
  result.pop_back();
  return result;
}

void thread_main(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  (*executor.body)();
  thread->exited = true;
  --thread->block->live;
  thread->fiber.leave();
}

}  // namespace

Random& random() { return executor.random; }
bool eager() { return executor.timing == Timing::kEager; }
uint64_t seed() { return executor.seed; }
void set_seed(uint64_t seed) { executor.seed = seed, executor.launches = 0; }
void set_shared_limit(unsigned bytes) { executor.shared_limit = bytes; }
unsigned shared_limit() { return executor.shared_limit; }
void set_capability(int capability) { executor.capability = capability; }
int capability() { return executor.capability; }

std::string text(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

void fail(const std::string& message, Where where) { fail(message + ", " + text(where)); }

void fail(const std::string& message) {
  if (executor.error.empty()) {
    executor.error = message;
    if (current != nullptr)
      executor.error = "block " + name(current->block->index) + " thread " + name(current->index) + ": " + message;
  }
  if (current == nullptr) throw std::runtime_error(executor.error);  // from an effect that the executor ran
  current->fiber.leave();
}

void maybe_yield() {
  if (executor.below(4) != 0) return;
  make_ready(current);
  current->fiber.suspend();
}

void wait(const char* what, Where where, int barrier, const MBarrier* mbarrier) {
  current->waits_for = what, current->where = where, current->barrier = barrier, current->mbarrier = mbarrier;
  current->fiber.suspend();
}

void wake(Thread* thread) {
  thread->waits_for = nullptr, thread->barrier = -1, thread->mbarrier = nullptr;
  make_ready(thread);
}

// ---- Collectives --------------------------------------------------------------------------------------------------

namespace {

bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
bool same(Where a, Where b) { return a.line() == b.line() && same(a.file_name(), b.file_name()); }

void meet(std::vector<Rendezvous>& meetings, const char* what, unsigned mask, unsigned position, unsigned count,
          void* argument, Effect effect, void* context, Where where) {
  std::size_t i = 0;
  for (; i < meetings.size(); ++i) {
    if ((meetings[i].mask & mask) == 0) continue;
    const Rendezvous& other = meetings[i];
    if (other.mask == mask && same(other.what, what) && same(other.where, where)) break;
    fail(std::string("divergent warp: ") + what + " at " + text(where) + " with mask " + std::to_string(mask) +
         ", while other lanes of it are in " + other.what + " at " + text(other.where) + " with mask " +
         std::to_string(other.mask));
  }
  if (i == meetings.size()) meetings.push_back({what, where, mask, 0, {}, {}});
  Rendezvous& meeting = meetings[i];
  meeting.arguments[position] = argument;
  meeting.threads[position] = current;
  if (++meeting.arrived < count) return wait(what, where);
  const Rendezvous complete = meeting;
  meetings[i] = meetings.back();
  meetings.pop_back();
  effect(complete.arguments, context);
  for (unsigned j = 0; j < kWarpgroup; ++j)
    if (complete.threads[j] != nullptr && complete.threads[j] != current) wake(complete.threads[j]);
  // The last to come is no longer ahead of the others than any of them.
  make_ready(current);
  current->fiber.suspend();
}

}  // namespace

void warp_collective(const char* what, unsigned mask, void* argument, Effect effect, void* context, Where where) {
  const unsigned lane = current->lane();
  if ((mask >> lane & 1) == 0) fail(std::string(what) + ": the mask leaves out the calling lane", where);
  const unsigned first = current->warp->index * kWarp;
  for (unsigned i = 0; current->warp->meetings.empty() && i < kWarp; ++i)
    if ((mask >> i & 1) &&
        (first + i >= current->block->threads.size() || current->block->threads[first + i]->exited))
      fail(std::string(what) + ": the mask names lane " + std::to_string(i) + ", which has exited or never was",
           where);
  meet(current->warp->meetings, what, mask, lane, static_cast<unsigned>(__builtin_popcount(mask)), argument, effect,
       context, where);
}

void warpgroup_collective(const char* what, void* argument, Effect effect, void* context, Where where) {
  const unsigned group = current->linear / kWarpgroup;
  if ((group + 1) * kWarpgroup > current->block->threads.size())
    fail(std::string(what) + ": the warpgroup is not whole", where);
  meet(current->block->warpgroups[group].meetings, what, ~0u, current->linear % kWarpgroup, kWarpgroup, argument,
       effect, context, where);
}

// ---- Barriers -----------------------------------------------------------------------------------------------------

namespace {

// True when the barrier is complete with the current thread.
bool arrive(unsigned id, unsigned threads, bool syncthreads, Where where) {
  if (id >= kNamedBarriers) fail("barrier " + std::to_string(id) + " does not exist", where);
  if (threads == 0 || threads % kWarp != 0)
    fail("barrier " + std::to_string(id) + ": the number of threads (" + std::to_string(threads) +
             ") is no multiple of 32",
         where);
  Barrier& barrier = current->block->barriers[id];
  if (barrier.expected == 0) {
    barrier.expected = threads, barrier.where = where;
  } else if (barrier.expected != threads) {
    fail("barrier " + std::to_string(id) + ": " + std::to_string(threads) + " threads expected here, but " +
             std::to_string(barrier.expected) + " at " + text(barrier.where),
         where);
  } else if (syncthreads && !same(barrier.where, where)) {
    fail("divergent barrier: __syncthreads at " + text(where) + " while other threads are in the one at " +
         text(barrier.where));
  }
  if (barrier.arrived[current->linear])
    fail("barrier " + std::to_string(id) + ": the thread came twice in one phase", where);
  barrier.arrived[current->linear] = true;
  if (barrier.arrived.count() < barrier.expected) return false;
  // The hardware counts warps.
  for (unsigned warp = 0; warp * kWarp < kMaxThreads; ++warp) {
    unsigned lanes = 0;
    for (unsigned i = 0; i < kWarp; ++i) lanes += barrier.arrived[warp * kWarp + i];
    if (lanes != 0 && lanes != kWarp && (warp + 1) * kWarp <= current->block->threads.size())
      fail("divergent barrier: only " + std::to_string(lanes) + " threads of warp " + std::to_string(warp) +
               " came to barrier " + std::to_string(id),
           where);
  }
  return true;
}

void release(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
  barrier.arrived.reset();
  barrier.expected = 0;
}

}  // namespace

void barrier_sync(unsigned id, unsigned threads, bool syncthreads, Where where) {
  Block& block = *current->block;
  if (syncthreads && block.live < block.threads.size())
    fail("divergent barrier: __syncthreads after some threads have exited", where);
  if (arrive(id, threads, syncthreads, where)) {
    release(block.barriers[id]);
    make_ready(current);
    current->fiber.suspend();
  } else {
    block.barriers[id].waiting.push_back(current);
    wait("barrier", where, static_cast<int>(id));
  }
}

void barrier_arrive(unsigned id, unsigned threads, Where where) {
  if (arrive(id, threads, false, where)) release(current->block->barriers[id]);
  maybe_yield();
}

void wait_for_semaphore(const unsigned* global, Where where) {
  executor.semaphores[global].push_back(current);
  wait("semaphore", where);
}

void semaphore_changed(const unsigned* global) {
  for (Thread* thread : executor.semaphores[global]) wake(thread);
  executor.semaphores.erase(global);
}

MBarrier& mbarrier_at(const void* object, Where where) {
  const auto found = current->block->mbarriers.find(object);
  if (found == current->block->mbarriers.end()) fail("the mbarrier was not initialised", where);
  return found->second;
}

void mbarrier_update(MBarrier& barrier, int arrivals, int64_t bytes) {
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending < 0) fail("mbarrier: more arrivals than the " + std::to_string(barrier.count) + " of a phase");
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = static_cast<int>(barrier.count);
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

// ---- Blocks -------------------------------------------------------------------------------------------------------

Block::Block() {
  // Aligned to its size, so that a pointer's low bits are those of the shared address.
  void* memory =
      mmap(nullptr, 4 * kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  arena_ = static_cast<std::byte*>(memory) + ((kArenaBytes - address % kArenaBytes) % kArenaBytes);
  std::memset(arena_, 0xff, 2 * kArenaBytes);
}

Block::~Block() = default;  // the pool lives as long as the process

void Block::start(uint3 index_, unsigned shared_bytes) {
  index = index_;
  shared_bytes_ = shared_bytes;
  ASAN_UNPOISON_MEMORY_REGION(arena_, 2 * kArenaBytes);
  std::memset(arena_, 0xff, used_);
  std::memset(arena_ + kArenaBytes, 0xff, used_);
  ASAN_POISON_MEMORY_REGION(arena_, kArenaBytes);
  used_ = kFirstAddress;
  regions_.clear();
  pending_.clear();
  mbarriers.clear();
  for (Barrier& barrier : barriers) barrier = Barrier{};
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  threads.resize(count);
  executor.last = nullptr;
  warps.resize((count + kWarp - 1) / kWarp);
  warpgroups.clear();
  warpgroups.resize(count / kWarpgroup);
  for (unsigned i = 0; i < warps.size(); ++i) {
    if (warps[i] == nullptr) warps[i] = std::make_unique<Warp>();
    *warps[i] = Warp{this, i, {}, 0, static_cast<unsigned>(executor.random()), {}};
  }
  live = count;
  for (unsigned i = 0; i < count; ++i) {
    if (threads[i] == nullptr) threads[i] = std::make_unique<Thread>();
    Thread& thread = *threads[i];
    thread.block = this;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.linear = i;
    thread.warp = warps[i / kWarp].get();
    thread.exited = false;
    thread.cp_async = {}, thread.bulk = {};
    thread.waits_for = nullptr, thread.barrier = -1, thread.mbarrier = nullptr;
    thread.fiber.start(thread_main, &thread);
    make_ready(&thread);
  }
}

void Block::finish() {
  for (unsigned id = 0; id < kNamedBarriers; ++id)
    if (barriers[id].expected != 0)
      fail("block " + name(index) + ": " + std::to_string(barriers[id].arrived.count()) +
               " threads arrived at barrier " + std::to_string(id) + ", which was never completed",
           barriers[id].where);
  for (const auto& operation : pending_)
    if (const char* problem = operation->at_exit()) fail("block " + name(index) + " exited " + problem);
  while (run_some_async()) {
  }
  check_red_zones();
}

std::byte* Block::shared(unsigned offset, unsigned bytes, unsigned alignment, Where where) {
  for (const Region& region : regions_) {
    if (region.offset == offset && region.bytes == bytes && region.alignment == alignment) return region.memory;
    if (offset < region.offset + region.bytes && region.offset < offset + bytes)
      fail("the shared memory at offset " + std::to_string(offset) + " overlaps another region", where);
  }
  if (offset + bytes > shared_bytes_)
    fail("shared memory up to " + std::to_string(offset + bytes) + " bytes, but the launch gave " +
             std::to_string(shared_bytes_),
         where);
  // Aligned as asked for and no better.
  unsigned address = used_ + kRedZone;
  address = (address + alignment - 1) / alignment * alignment;
  if (address / alignment % 2 == 0) address += alignment;
  if (address + bytes + kRedZone > kArenaBytes) fail("too many regions of shared memory for their red zones", where);
  used_ = address + bytes + kRedZone;
  regions_.push_back({offset, bytes, alignment, arena_ + address});
  ASAN_UNPOISON_MEMORY_REGION(arena_ + address, bytes);
  return arena_ + address;
}

void Block::check_red_zones() const {
  ASAN_UNPOISON_MEMORY_REGION(arena_, kArenaBytes);
  unsigned at = 0;
  const auto clean = [&](unsigned end) {
    for (; at < end; ++at)
      if (arena_[at] != std::byte{0xff}) return false;
    return true;
  };
  for (std::size_t i = 0; i <= regions_.size(); ++i) {
    const unsigned end = i < regions_.size() ? static_cast<unsigned>(regions_[i].memory - arena_) : used_;
    if (!clean(end)) {
      std::string around = i > 0 ? "after the region at offset " + std::to_string(regions_[i - 1].offset) + " of " +
                                       std::to_string(regions_[i - 1].bytes) + " bytes"
                                 : "before the first region";
      fail("block " + name(index) + ": write outside of shared memory regions, " + around);
    }
    if (i < regions_.size()) at = end + regions_[i].bytes;
  }
}

unsigned Block::shared_address(const void* pointer, const char* what) const {
  const auto* byte = static_cast<const std::byte*>(pointer);
  if (byte < arena_ || byte >= arena_ + kArenaBytes) fail(std::string(what) + ": not an address in shared memory");
  return static_cast<unsigned>(byte - arena_);
}

std::byte* Block::shared_pointer(unsigned address, unsigned bytes, const char* what) const {
  for (const Region& region : regions_) {
    const auto start = static_cast<unsigned>(region.memory - arena_);
    if (address >= start && address + bytes <= start + region.bytes) return arena_ + address;
  }
  fail(std::string(what) + ": shared address " + std::to_string(address) +
       " is outside of every region of shared memory");
}

std::byte* Block::async_view(const void* pointer) const {
  return arena_ + kArenaBytes + shared_address(pointer, "async proxy");
}

void Block::proxy_fence() {
  for (const Region& region : regions_) std::memcpy(region.memory + kArenaBytes, region.memory, region.bytes);
  for (auto& [object, barrier] : mbarriers) barrier.fenced = true;
}

void Block::issue(const std::shared_ptr<Async>& operation) {
  operation->slot_ = pending_.size();
  pending_.push_back(operation);
  if (executor.timing == Timing::kEager || (executor.timing == Timing::kRandom && executor.below(4) == 0))
    complete(*operation);
  else if (executor.poison)
    operation->poison();
}

void Block::complete(Async& operation) {
  if (operation.done_) return;
  operation.done_ = true;
  const std::shared_ptr<Async> kept = pending_[operation.slot_];
  pending_[operation.slot_] = pending_.back();
  pending_[operation.slot_]->slot_ = operation.slot_;
  pending_.pop_back();
  operation.effect();
}

bool Block::run_some_async() {
  if (pending_.empty()) return false;
  complete(*pending_[executor.below(pending_.size())]);
  return true;
}

// ---- The launch ---------------------------------------------------------------------------------------------------

namespace {

bool run_some_async() {
  const std::size_t first = executor.below(executor.resident.size());
  for (std::size_t i = 0; i < executor.resident.size(); ++i)
    if (executor.resident[(first + i) % executor.resident.size()]->run_some_async()) return true;
  return false;
}

void run_grid(dim3 grid, unsigned shared_bytes) {
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), executor.random);
  const std::size_t slots = 1 + executor.below(2);
  while (executor.pool.size() < slots) executor.pool.push_back(std::make_unique<Block>());
  executor.resident.clear();
  executor.ready.clear();
  executor.semaphores.clear();
  executor.last = nullptr;
  std::size_t next = 0;
  std::vector<Block*> free;
  for (std::size_t i = 0; i < slots; ++i) free.push_back(executor.pool[i].get());
  while (true) {
    while (!free.empty() && next < order.size()) {
      const uint64_t i = order[next++];
      free.back()->start({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                          static_cast<unsigned>(i / grid.x / grid.y)},
                         shared_bytes);
      executor.resident.push_back(free.back());
      free.pop_back();
    }
    if (executor.resident.empty()) return;
    if (executor.timing == Timing::kRandom && executor.below(16) == 0) run_some_async();
    if (executor.ready.empty()) {
      if (run_some_async()) continue;
      fail(deadlock());
    }
    current = pick();
    Block* block = current->block;
    threadIdx = current->index, blockIdx = block->index;
    current->fiber.resume();
    current = nullptr;
    if (!executor.error.empty()) return;
    if (block->live == 0) {
      block->finish();
      executor.resident.erase(std::find(executor.resident.begin(), executor.resident.end(), block));
      free.push_back(block);
    }
  }
}

}  // namespace

std::string run(dim3 grid, dim3 block, unsigned shared_bytes, const std::function<void()>& body) {
  executor.random.seed(executor.seed * 0x9e3779b97f4a7c15u + ++executor.launches);
  executor.timing = static_cast<Timing>(executor.seed % 3);
  executor.poison = executor.seed / 3 % 2 != 0;
  executor.priorities = executor.seed / 6 % 2 != 0;
  executor.body = &body;
  executor.error.clear();
  gridDim = grid, blockDim = block;
  try {
    run_grid(grid, shared_bytes);
  } catch (const std::runtime_error&) {
    // fail() has left the message.
  }
  current = nullptr;
  return executor.error;
}

}  // namespace cuda_host
