#include "scratch.h"

#include "pages.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#endif

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

constexpr size_t kHugePageBytes = size_t{2} << 20;

}  // namespace

void want_huge_pages(void* start, size_t bytes) {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes) / kHugePageBytes * kHugePageBytes;
  if (last >= first + 2 * kHugePageBytes) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

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
      // Passes that stride through a long block would miss the translation buffer.
      if (bytes >= kHugePageBytes) want_huge_pages(block, *granted);
      return block;
    }
  }
  *granted = bytes <= kLeastBytes ? kLeastBytes : (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  void* const block = std::aligned_alloc(kHugePageBytes, *granted);
  if (!block) {
    std::fprintf(stderr, "pykernels: out of memory: no %zu bytes of scratch\n", *granted);
    std::abort();
  }
  if (bytes >= kHugePageBytes) want_huge_pages(block, *granted);
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
