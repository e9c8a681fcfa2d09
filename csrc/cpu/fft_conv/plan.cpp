#include "plan.h"

#include <stdio.h>
#include <stdlib.h>

namespace pykernels::cpu::PYKERNELS_ISA {
namespace fft {
namespace {

// Passes of 8 move the data two thirds as often as passes of 4 and their operands still are registers: on one core of a
// Xeon of the Sapphire Rapids generation with AVX-512, 1.33 instead of 1.45 ns per point at 2^14 points. What is left
// over goes to passes of 4. A pass of 16 spills, which pays where a block is beyond this many bytes (half of a
// second-level cache).
constexpr int64_t kBytesOfWidePass = int64_t{1} << 20;
// The first pass is done together with the analysis up to here. Beyond, that would read 64 places at a time, each in a
// page of its own: more than the processor fetches ahead for, and more of one cache set than it has ways.
constexpr int64_t kBytesOfFusedPass = int64_t{1} << 18;

struct Root {
  double re, im;
};

// e^{-2 pi i n / d}, reduced to the first octant in integers so that it is exact to half an ulp.
Root root(int64_t n, int64_t d) {
  n %= d;
  if (n < 0) n += d;
  n *= 8;
  const int64_t octant = n / d;
  const int64_t rest = octant % 2 ? d - n % d : n % d;  // of an eighth of the circle, in units of 1 / d of it
  const double angle = 0.78539816339744830962 * (static_cast<double>(rest) / static_cast<double>(d));
  const double c = __builtin_cos(angle), s = __builtin_sin(angle);
  switch (octant) {
    case 0:
      return {c, -s};
    case 1:
      return {s, -c};
    case 2:
      return {-s, -c};
    case 3:
      return {-c, -s};
    case 4:
      return {-c, s};
    case 5:
      return {-s, c};
    case 6:
      return {s, c};
    default:
      return {c, s};
  }
}

template <class T>
T* allocate(int64_t n) {
  void* const block = aligned_alloc(64, round_up(static_cast<size_t>(n) * sizeof(T), 64));
  if (!block) {
    fprintf(stderr, "pykernels: out of memory: no table of twiddle factors\n");
    abort();
  }
  return static_cast<T*>(block);
}

template <class S>
Plan<S>* make(int64_t points) {
  constexpr int lanes = kLanes<S>;
  Plan<S>* const plan = allocate<Plan<S>>(1);
  const int64_t length = points / lanes;
  plan->points = points, plan->length = length, plan->levels = 0;
  int64_t size = length, total = 0;
  const auto split = [&](int radix) {
    plan->radix[plan->levels++] = radix;
    total += size / radix * (radix - 1) * 2;
    size /= radix;
  };
  const auto bytes = [&] { return size * kStep<S> * static_cast<int64_t>(sizeof(S)); };
  plan->fused = size % 3 == 0 || bytes() <= kBytesOfFusedPass;
  if (size % 3 == 0) split(3);
  while (size > 8) {
    // Passes of 4 come first where the first is fused, so that it reads few places at a time; else the widest do.
    const int left = __builtin_ctzll(static_cast<uint64_t>(size)) - 3;  // factors of 2 above the leaves
    if (left >= 4 && bytes() > kBytesOfWidePass)
      split(16);
    else
      split(left % 3 == 0 || (left > 4 && !plan->fused) ? 8 : 4);
  }
  plan->leaf = static_cast<int>(size);
  S* next = allocate<S>(total + 1);
  size = length;
  for (int level = 0; level < plan->levels; ++level) {
    const int radix = plan->radix[level];
    plan->twiddle[level] = next;
    for (int64_t j = 0; j < size / radix; ++j)
      for (int r = 1; r < radix; ++r) {
        const Root w = root(j * r, size);
        *next++ = static_cast<S>(w.re), *next++ = static_cast<S>(w.im);
      }
    size /= radix;
  }
  // The parts of the first pass must not all fall into the same cache set.
  plan->stride = length / plan->radix[0];
  if (plan->stride * kStep<S> * static_cast<int64_t>(sizeof(S)) >= 4096) plan->stride += 2;
  constexpr int vectors = kInner<S> + kOuter<S> - 1;
  S* const first = allocate<S>(length / lanes * vectors * kStep<S>);
  plan->first = first;
  for (int64_t j = 0; j < length; ++j)
    for (int i = 0; i < vectors; ++i) {
      const int64_t quarters = i < kInner<S> ? 4 * i - 1 : 4 * kInner<S> * (i - kInner<S> + 1);
      const Root w = root(j * quarters, 4 * points);
      S* const at = first + (j / lanes * vectors + i) * kStep<S> + j % lanes;
      at[0] = static_cast<S>(w.re), at[lanes] = static_cast<S>(w.im);
    }
  return plan;
}

template <class S>
void release(Plan<S>* plan) {
  free(const_cast<S*>(plan->twiddle[0]));
  free(const_cast<S*>(plan->first));
  free(plan);
}

// By 2 log2 of the power of two, plus one with the factor 3.
constexpr int kPlans = 2 * 64;
Plan<float>* float_plans[kPlans];
Plan<double>* double_plans[kPlans];
Plan<float>** plans(float) { return float_plans; }
Plan<double>** plans(double) { return double_plans; }

// e^{2 pi i n / 1024}
template <class S>
void set(Turn<S>& turn, int lane, int64_t n) {
  const Root w = root(-n, 4 * kBlock);
  turn.cosine[lane] = static_cast<S>(w.re), turn.tangent[lane] = static_cast<S>(w.im / w.re);
}
template <class S>
void set(Unit<S>& unit, int lane, int64_t n) {
  const Root w = root(-n, 4 * kBlock);
  unit.cosine[lane] = static_cast<S>(w.re), unit.sine[lane] = static_cast<S>(w.im);
}
template <class S>
BlockFactors<S>* make_block_factors() {
  BlockFactors<S>* const factors = allocate<BlockFactors<S>>(1);
  for (int lane = 0; lane < kBlockLanes; ++lane) {
    // w for the k1 of this lane, per j; and for the j of this lane, per k1.
    const int k1 = lane / 4 + lane % 4 * 4, forward = 1 - 4 * k1, inverse = 4 * lane;
    set(factors->rows, lane, 4 * forward), set(factors->rows_squared, lane, 8 * forward);
    set(factors->inverse_rows, lane, 4 * inverse), set(factors->inverse_rows_squared, lane, 8 * inverse);
    for (int b = 0; b < 4; ++b) {
      const int turned = forward - 64 * b, inverse_turned = inverse + 64 * b;
      set(factors->groups[b], lane, turned), set(factors->groups_squared[b], lane, 2 * turned);
      set(factors->inverse_groups[b], lane, inverse_turned);
      set(factors->inverse_groups_squared[b], lane, 2 * inverse_turned);
      for (int a = 0; a < 4; ++a) set(factors->last[b][a], lane, 16 * (b + 4 * a) + lane);
    }
  }
  return factors;
}
BlockFactors<float>* float_block_factors;

// What is at *slot, made at the first call for it.
template <class T, class Make, class Release>
const T& kept(T** slot, const Make& make, const Release& release) {
  T* found = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
  if (found) return *found;
  T* const made = make();
  if (__atomic_compare_exchange_n(slot, &found, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return *made;
  release(made);  // another thread was first
  return *found;
}

}  // namespace

template <class S>
const Plan<S>& plan(int64_t points) {
  Plan<S>** const slot = plans(S{}) + 2 * __builtin_ctzll(static_cast<uint64_t>(points)) + (points % 3 == 0);
  return kept(slot, [&] { return make<S>(points); }, release<S>);
}
template const Plan<float>& plan<float>(int64_t);
template const Plan<double>& plan<double>(int64_t);

template <class S>
const BlockFactors<S>& block_factors() {
  return kept(&float_block_factors, make_block_factors<S>, free);
}
template const BlockFactors<float>& block_factors<float>();

}  // namespace fft
}  // namespace pykernels::cpu::PYKERNELS_ISA
