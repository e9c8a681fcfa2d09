// Fetching cache lines ahead of their use.
#pragma once

#include "../../include/pykernels/causal_conv1d.h"
#include "simd.h"

namespace pykernels::cpu::PYKERNELS_ISA {

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Cache lines to be asked for a few at a time while something else is computed: rows of a tile are short and lie far
// apart, so that neither hardware prefetchers nor out-of-order execution hide where they come from. Into the
// second-level cache.
class Ahead {
 public:
  // What one loop fetches: `each` of the lines per step.
  struct Part {
    const char* const* lines;
    int64_t each;
    PYKERNELS_INLINE void fetch(int64_t step) const {
      for (int64_t i = step * each; i < (step + 1) * each; ++i) __builtin_prefetch(lines[i], 0, 2);
    }
  };

  // Lines that rows of up to `bytes` are part of.
  static constexpr int64_t lines_of(int64_t rows, int64_t bytes) { return rows * ((bytes + 63) / 64 + 1); }
  // Elements of the array given to the constructor, for so many lines dealt out over so many steps.
  static constexpr int64_t room(int64_t lines, int64_t steps) { return 2 * lines + (kLeastEach + 1) * steps; }
  explicit Ahead(const char** room) : lines_(room) {}

  void clear() { count_ = 0; }
  // The tile [channels, tokens] at `src` + `offset` elements; nothing where neither axis is contiguous.
  void add(DType dtype, const void* src, int64_t offset, const ChannelStrides& stride, int64_t channels,
           int64_t tokens) {
    const int64_t bytes = bytes_of(dtype);
    const char* const start = static_cast<const char*>(src) + offset * bytes;
    if (stride.token == 1)
      add_rows(start, stride.channel * bytes, channels, tokens * bytes);
    else if (stride.channel == 1)
      add_rows(start, stride.token * bytes, tokens, channels * bytes);
  }
  // Deals the lines out to `parts` loops of `steps` steps, the first ones first.
  void deal(int64_t parts, int64_t steps) {
    steps_ = steps;
    each_ = most(kLeastEach, (count_ + parts * steps - 1) / (parts * steps));
    for (; count_ % (each_ * steps) != 0; ++count_) lines_[count_] = lines_[count_ - 1];
  }
  Part part(int64_t i) const { return {lines_ + i * each_ * steps_, i * each_ * steps_ < count_ ? each_ : 0}; }

 private:
  static constexpr int64_t kLeastEach = 2;
  void add_rows(const char* start, int64_t stride, int64_t rows, int64_t bytes) {
    for (int64_t r = 0; r < rows; ++r, start += stride)
      for (const char* line = start - (reinterpret_cast<uintptr_t>(start) & 63); line < start + bytes; line += 64)
        lines_[count_++] = line;
  }

  const char** lines_;
  int64_t count_ = 0, steps_ = 1, each_ = 0;
};

}  // namespace pykernels::cpu::PYKERNELS_ISA
