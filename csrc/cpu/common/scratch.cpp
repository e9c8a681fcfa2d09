#include "scratch.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace pykernels::cpu {
namespace {

// Blocks are at least this long; only the pages that a kernel touches become real.
constexpr size_t kLeastBytes = size_t{4} << 20;
// Longer blocks are given back at once, and so is what would bring the idle ones above the sum.
constexpr size_t kMostBytesKept = size_t{64} << 20, kMostBytesKeptInAll = size_t{512} << 20;
constexpr int kMostBlocksKept = 256;

struct Pool {
  std::mutex mutex;
  int count = 0;
  size_t bytes_in_all = 0;
  struct {
    void* start;
    size_t bytes;
  } idle[kMostBlocksKept];
};
// Not destroyed at exit: threads of the pool that runs kernels may outlive static destructors.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

void* scratch_acquire(size_t bytes, size_t* granted) {
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    // Last in, first out: most likely still in this core's cache.
    for (int i = p.count - 1; i >= 0; --i) {
      if (p.idle[i].bytes < bytes) continue;
      void* const block = p.idle[i].start;
      *granted = p.idle[i].bytes;
      p.bytes_in_all -= *granted;
      for (int j = i + 1; j < p.count; ++j) p.idle[j - 1] = p.idle[j];
      --p.count;
      return block;
    }
  }
  *granted = bytes <= kLeastBytes ? kLeastBytes : (bytes + 4095) / 4096 * 4096;
  void* const block = std::aligned_alloc(4096, *granted);
  if (!block) {
    std::fprintf(stderr, "pykernels: out of memory: no %zu bytes of scratch\n", *granted);
    std::abort();
  }
  return block;
}

void scratch_release(void* block, size_t granted) {
  if (granted <= kMostBytesKept) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    if (p.count < kMostBlocksKept && p.bytes_in_all + granted <= kMostBytesKeptInAll) {
      p.idle[p.count++] = {block, granted};
      p.bytes_in_all += granted;
      return;
    }
  }
  std::free(block);
}

}  // namespace pykernels::cpu

extern "C" __attribute__((visibility("default"))) void pykernels_release_scratch() {
  using namespace pykernels::cpu;
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (int i = 0; i < p.count; ++i) std::free(p.idle[i].start);
  p.count = 0;
  p.bytes_in_all = 0;
}
