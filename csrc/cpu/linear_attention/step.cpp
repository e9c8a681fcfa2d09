// One token per entry: every state is read and written once, which is what the time goes to.
#include "chunk.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace linear {
namespace {

// Columns [c, c + Vectors * lanes) of one state: S = a S + k v^T, out = q S (with a bonus, from S before its update).
template <class A, int Vectors, bool Whole>
PYKERNELS_INLINE void columns(A* state, int64_t ld, int64_t left, int key_dim, const A* q, const A* k, const A* factor,
                              const A* bonus, const A* v, A* out) {
  constexpr int lanes = kLanes<A>;
  Vec<A> value[Vectors], sum[Vectors];
  for (int x = 0; x < Vectors; ++x) value[x] = load_upto(v + x * lanes, left - x * lanes), sum[x] = Vec<A>{};
  for (int row = 0; row < key_dim; ++row, state += ld) {
#pragma GCC unroll 8
    for (int x = 0; x < Vectors; ++x) {
      Vec<A> s = Whole ? load(state + x * lanes) : load_upto(state + x * lanes, left - x * lanes);
      const Vec<A> product = value[x] * k[row];
      if (bonus) sum[x] = sum[x] + (s + product * bonus[row]) * q[row];
      s = s * factor[row] + product;
      if (!bonus) sum[x] = sum[x] + s * q[row];
      if (Whole)
        store(state + x * lanes, s);
      else
        store_upto(state + x * lanes, s, left - x * lanes);
    }
  }
  for (int x = 0; x < Vectors; ++x) store(out + x * lanes, sum[x]);
}

template <class T>
void run(const LinearAttentionStepParams& s, const Parallel& parallel) {
  using A = Wide<T>;
  constexpr int lanes = kLanes<A>, kVectors = 4;
  const LinearAttentionParams& p = s.forward;
  const int key_dim = static_cast<int>(p.key_dim);
  const int64_t value_dim = p.value_dim, state_dim = p.value_dim_state();
  run_tasks(parallel, p.batch * p.heads, [&](TaskQueue& queue) {
    Scratch scratch;
    A* const q = scratch.take<A>(padded(key_dim));
    A* const k = scratch.take<A>(padded(key_dim));
    A* const factor = scratch.take<A>(padded(key_dim));
    A* const v = scratch.take<A>(padded(state_dim));
    A* const out = scratch.take<A>(padded(state_dim) + kVectors * lanes);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t entry = task / p.heads, head = task % p.heads, head_k = head / (p.heads / p.heads_k);
      const auto at = [&](const void* x, const Strides3& stride, int64_t h) {
        return static_cast<const T*>(x) + entry * stride.batch + h * stride.head;
      };
      T* const to = static_cast<T*>(p.out) + entry * p.out_stride.batch + head * p.out_stride.head;
      const int64_t slot = s.state_indices ? s.state_indices[entry] : entry;
      if (slot < 0 || slot >= s.slots) {
        __builtin_memset(to, 0, sizeof(T) * value_dim);
        continue;
      }
      const T* const from_q = at(p.q, p.q_stride, head_k);
      const T* const from_k = at(p.k, p.k_stride, head_k);
      const T* const from_v = at(p.v, p.v_stride, head);
      const A* const decay =
          p.decay ? static_cast<const A*>(p.decay) + entry * p.decay_stride.batch + head * p.decay_stride.head
                  : nullptr;
      for (int c = 0; c < key_dim; c += lanes) {
        store(q + c, load_upto(from_q + c, key_dim - c) * static_cast<A>(p.scale));
        store(k + c, load_upto(from_k + c, key_dim - c));
        Vec<A> log_factor{};
        if (decay)
          log_factor = p.decay_kind == DecayKind::kChannel ? load_upto(decay + c, key_dim - c) : splat<A>(*decay);
        store(factor + c, exp_decay<A>(log_factor));
      }
      for (int64_t c = 0; c < value_dim; c += lanes) store(v + c, load_upto(from_v + c, value_dim - c));
      if (p.normalize) v[value_dim] = 1;
      const A* const bonus = p.bonus ? static_cast<const A*>(p.bonus) + head * key_dim : nullptr;
      A* const state = static_cast<A*>(s.state) + slot * s.slot_stride + head * s.head_stride;
      int64_t c = 0;
      for (; c + kVectors * lanes <= state_dim; c += kVectors * lanes)
        columns<A, kVectors, true>(state + c, state_dim, state_dim - c, key_dim, q, k, factor, bonus, v + c, out + c);
      for (; c < state_dim; c += lanes)
        columns<A, 1, false>(state + c, state_dim, state_dim - c, key_dim, q, k, factor, bonus, v + c, out + c);
      const A inverse = p.normalize ? A(1) / (out[value_dim] + static_cast<A>(kNormalizeEpsilon)) : A(1);
      for (c = 0; c < value_dim; c += lanes) store_upto(to + c, load(out + c) * inverse, value_dim - c);
    }
  });
}

}  // namespace
}  // namespace linear

void linear_attention_step(const LinearAttentionStepParams& s, const Parallel& parallel) {
  linear::with_type(s.forward.dtype, [&](auto x) { linear::run<decltype(x)>(s, parallel); });
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
