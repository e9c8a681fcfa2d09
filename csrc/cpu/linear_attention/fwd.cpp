// Chunked forward pass. Per chunk of n tokens with the state S before it (rows of Q scaled by the decay since the chunk's start):
//     out = [scaled Q | P] [S; V],  P = Q K^T * weights        S <- total S + (scaled K)^T V
// A segment computes its own part L of the state from zero and adds the decayed state S0 from before it where that is needed
// (S = D S0 + L), so that its results are the same bits whether segments run one after the other or side by side.
#include "chunk.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace linear {
namespace {

template <class T, class C, bool Channel>
class Forward {
  using A = typename C::Acc;
  using E = typename C::Elem;

 public:
  Forward(const LinearAttentionParams& params, Scratch& scratch, int group)
      : heads(group), p(params), key_dim(static_cast<int>(p.key_dim)), value_dim(static_cast<int>(p.value_dim_state())) {
    kp = padded(key_dim), vp = padded(value_dim);
    kd = round_up(key_dim, C::kDepthAlign);
    for (int i = 0; i < heads; ++i) {
      head[i].local = scratch.take<A>(kp * vp);
      head[i].since = scratch.take<A>(kp);
      // Only a decay per head leaves something in the factors from one chunk to the next.
      if (i == 0 || p.decay_kind == DecayKind::kHead)
        head[i].factors.allocate(scratch, kp, p.bonus != nullptr);
      else
        head[i].factors = head[0].factors;
    }
    lda = kp + kChunk;
    a = scratch.take<E>(kChunk * lda);
    panel = packed_panel<C>(kd + kChunk);
    b = scratch.take<E>(packed_size<C>(kd + kChunk, vp));
    rows = scratch.take<E>(kChunk * kp);
    keys = scratch.take<E>(packed_size<C>(kp, kChunk));
    keys_t = scratch.take<E>(kp * kChunk);
    scores = scratch.take<A>(kChunk * kChunk);
    out = scratch.take<A>(kChunk * vp);
    ones = p.normalize ? scratch.take<T>(kChunk * value_dim) : nullptr;
    side = Channel ? scratch.take<A>(kChunk * kp) : nullptr;
    fill<A>(row_scale, kChunk, static_cast<A>(p.scale));
  }

  // Head `index` of the group becomes head `of` of a sequence.
  void begin(int index, const Sequence& s, int64_t of) {
    Head& h = head[index];
    const int64_t of_k = of / (p.heads / p.heads_k);
    h.q = rows_of<const T>(p, p.q, p.q_stride, s, of_k);
    h.k = rows_of<const T>(p, p.k, p.k_stride, s, of_k);
    h.v = rows_of<const T>(p, p.v, p.v_stride, s, of);
    h.o = rows_of<T>(p, p.out, p.out_stride, s, of);
    if (p.normalize) h.denominator = rows_of<A>(p, p.denominator, contiguous_strides(p, 1), s, of);
    h.bonus = p.bonus ? static_cast<const A*>(p.bonus) + of * key_dim : nullptr;
    if (p.decay_kind == DecayKind::kNone)
      h.factors.prepare_constant(nullptr);
    else if (p.decay_kind == DecayKind::kHead)
      h.factors.prepare_constant(static_cast<const A*>(p.decay) + of * p.decay_stride.head);
    else
      h.decay = rows_of<const A>(p, p.decay, p.decay_stride, s, of);
  }

  // Tokens [first, last) of all heads of the group, chunk by chunk: their rows are neighbours in memory. Leaves the part of the
  // state that comes from them in local, and in since what they leave of before [K, value_dim] (null: zero), the state before
  // them. Without `outputs` nothing else.
  void segment(int64_t first, int64_t last, const A* const* before, bool outputs) {
    for (int i = 0; i < heads; ++i) {
      fill<A>(head[i].local, int64_t{kp} * vp, 0);
      fill<A>(head[i].since, kp, 1);
    }
    for (int64_t t = first; t < last; t += kChunk)
      for (int i = 0; i < heads; ++i)
        chunk(head[i], t, static_cast<int>(least<int64_t>(kChunk, last - t)), before[i], before[i] || t > first, outputs);
  }

  // after = since * before + local.
  void finish(int index, A* after, const A* before) {
    const Head& h = head[index];
    combine_state(after, value_dim, h.since, before, value_dim, h.local, vp, key_dim, value_dim);
  }

  const A* since(int index) const { return head[index].since; }

  const int heads;  // of the group

 private:
  struct Head {
    A* local;
    A* since;
    Factors<A, Channel> factors;
    Rows<const T> q, k, v;
    Rows<T> o;
    Rows<A> denominator;
    Rows<const A> decay{};
    const A* bonus;
  };

  void chunk(Head& h, int64_t t, int n, const A* before, bool has_state, bool outputs) {
    Factors<A, Channel>& factors = h.factors;
    A* const local = h.local;
    const Rows<const T> qs = h.q.from(t), ks = h.k.from(t);
    Rows<const T> vs = h.v.from(t);
    if (p.normalize) {
      for (int i = 0; i < n; ++i) {
        __builtin_memcpy(ones + i * value_dim, vs[i], sizeof(T) * (value_dim - 1));
        ones[i * value_dim + value_dim - 1] = one<T>();
      }
      vs = {ones, value_dim};
    }
    factors.prepare(h.decay.data ? h.decay.from(t) : h.decay, key_dim, n, row_scale);
    pack_rows_at<C>(b, panel, kd, vs.data, vs.stride, n, value_dim);

    if (outputs) {
      const bool with_state = has_state;
      if (with_state) {
        pack_state<C>(b, panel, h.since, before, value_dim, local, vp, factors.total, key_dim, value_dim);
        scale_rows<C>(a, lda, qs, n, key_dim, [&](int i, int c) { return factors.query_at(i, c); });
      }
      if constexpr (Channel)
        channel_scores(factors, qs, ks, n);
      else
        pack_columns<C>(keys, packed_panel<C>(key_dim), ks.data, ks.stride, key_dim, n);
      for (int r = 0; r < n; r += kRows) {
        const int count = least(kRows, n - r), columns = least(r + kRows, n);
        if constexpr (!Channel) {
          const MatrixA<C> left = left_operand<C>(rows, qs.from(r), count, key_dim);
          matmul<C>(count, columns, key_dim, left, {keys, packed_panel<C>(key_dim)}, {scores + r * kChunk, kChunk}, false);
        }
        weigh(h, qs, ks, r, count, columns);
        const int skipped = with_state ? 0 : kd;
        matmul<C>(count, value_dim, kd + columns - skipped, {a + r * lda + skipped, lda}, {b, panel, skipped},
                  {out + r * vp, vp}, false);
      }
      write(h, t, n);
    }

    if (!outputs || !has_state) decay_state(local, vp, factors.total, key_dim);
    scale_rows<C>(rows, kp, ks, n, key_dim, [&](int j, int c) { return factors.key_at(j, c); });
    copy_columns<C>(keys_t, kChunk, rows, kp, key_dim, n);
    matmul<C>(key_dim, value_dim, n, {keys_t, kChunk}, {b, panel, kd}, {local, vp}, true);
    for (int c = 0; c < kp; ++c) h.since[c] *= factors.total[c];
  }

  // Scores of channel decay, weights included.
  void channel_scores(const Factors<A, Channel>& factors, Rows<const T> qs, Rows<const T> ks, int n) {
    if constexpr (Channel) {
      leaf_scores(factors, qs, ks, key_dim, n, scores);
      for (int size = kLeaf; size < n; size *= 2) {
        level_factors(factors, size, n, side);
        level_rows<C>(rows, kp, side, kp, qs, ks, key_dim, size, n);
        for (int first = 0; first + size < n; first += 2 * size) {
          const int middle = first + size;
          pack_columns<C>(keys, packed_panel<C>(key_dim), rows + first * kp, kp, key_dim, size);
          matmul<C>(least(size, n - middle), size, key_dim, {rows + middle * kp, kp}, {keys, packed_panel<C>(key_dim)},
                    {scores + middle * kChunk + first, kChunk}, false);
        }
      }
    }
  }

  // a[i][kd + j] = scale * weight * score for rows [r, r + count) and the columns that are multiplied.
  void weigh(const Head& h, Rows<const T> qs, Rows<const T> ks, int r, int count, int columns) {
    constexpr int lanes = kLanes<A>;
    const Factors<A, Channel>& factors = h.factors;
    const A* const bonus = h.bonus;
    const Vec<A> index = iota<A>();
    const int end = round_up(columns, most(lanes, C::kDepthAlign));
    for (int i = r; i < r + count; ++i) {
      E* const to = a + i * lda + kd;
      const int last = factors.exclusive ? i - 1 : i;  // key
      for (int c = 0; c < end; c += lanes) {
        Vec<A> x = load(scores + i * kChunk + c) * row_scale[i];
        if constexpr (!Channel) x = x * load(factors.weight + i * kChunk + c);
        if (c + lanes - 1 > last) x = index <= static_cast<A>(last - c) ? x : Vec<A>{};
        store_element(to + c, x);
      }
      if (bonus) {
        Vec<A> sum{};
        for (int c = 0; c < key_dim; c += lanes) {
          const int left = key_dim - c;
          sum = sum + load_upto(qs[i] + c, left) * load_upto(bonus + c, left) * load_upto(ks[i] + c, left);
        }
        const A x = reduce_add<A>(sum) * row_scale[i];
        if constexpr (sizeof(E) == sizeof(A))
          to[i] = x;
        else
          to[i] = from_float<E>(x);
      }
    }
  }

  void write(Head& h, int64_t t, int n) {
    constexpr int lanes = kLanes<A>;
    const int columns = static_cast<int>(p.value_dim);
    for (int i = 0; i < n; ++i) {
      const A* const from = out + i * vp;
      T* const to = h.o[t + i];
      A inverse = 1;
      if (p.normalize) {
        const A sum = from[columns] + static_cast<A>(kNormalizeEpsilon);
        *h.denominator[t + i] = sum;
        inverse = A(1) / sum;
      }
      if (p.normalize)
        for (int c = 0; c < columns; c += lanes) store_upto(to + c, load(from + c) * inverse, columns - c);
      else
        for (int c = 0; c < columns; c += lanes) store_upto(to + c, load(from + c), columns - c);
    }
  }

  const LinearAttentionParams& p;
  const int key_dim, value_dim;  // value_dim with the column of ones
  int kp, vp, kd;
  int64_t lda, panel;
  Head head[kHeads];
  E* a;       // [kChunk, kd | kChunk]
  E* b;       // kd rows of the state, then kChunk of v
  E* rows;    // [kChunk, kp]
  E* keys;    // packed, columns are tokens
  E* keys_t;  // [kp, kChunk]
  A* scores;  // [kChunk, kChunk]
  A* out;     // [kChunk, vp]
  A* side;
  T* ones;
  alignas(64) A row_scale[kChunk];
};

// Tokens that belong to no sequence.
template <class T, class A>
void clear_rest(const LinearAttentionParams& p) {
  if (!p.cu_seqlens) return;
  const int64_t end = p.sequences > 0 ? clamped(p.cu_seqlens[p.sequences], p.tokens) : 0;
  for (int64_t t = end; t < p.tokens; ++t)
    for (int64_t h = 0; h < p.heads; ++h) {
      __builtin_memset(static_cast<T*>(p.out) + t * p.out_stride.token + h * p.out_stride.head, 0, sizeof(T) * p.value_dim);
      if (p.normalize) static_cast<A*>(p.denominator)[t * p.heads + h] = 1;
    }
}

template <class T, class C, bool Channel>
void run(const LinearAttentionParams& p, const Parallel& parallel) {
  using A = typename C::Acc;
  const int64_t size = p.key_dim * p.value_dim_state();
  const A* const initial = static_cast<const A*>(p.initial_state);
  A* const final_state = static_cast<A*>(p.final_state);
  clear_rest<T, A>(p);
  if (p.cu_seqlens && p.checkpoints)  // some tiles have no segment
    __builtin_memset(p.checkpoints, 0, sizeof(A) * p.tiles() * p.heads * size);

  int64_t most_segments = 0;
  for (int64_t s = 0; s < p.state_count(); ++s) most_segments = most(most_segments, sequence(p, s).segments());
  const int64_t chains = p.state_count() * p.heads;
  Scratch shared;
  A* checkpoints = static_cast<A*>(p.checkpoints);
  const bool split = chains < parallel.threads && most_segments > 1;
  const auto slot = [&](int64_t tile, int64_t head) { return (tile * p.heads + head) * size; };

  const auto copy_or_clear = [&](A* to, const A* from) {
    if (from)
      __builtin_memcpy(to, from, sizeof(A) * size);
    else
      __builtin_memset(to, 0, sizeof(A) * size);
  };

  if (!split) {
    const int group = heads_together(p, parallel.threads);
    run_tasks(parallel, chains / group, [&](TaskQueue& queue) {
      const Tiles tiles;
      Scratch scratch;
      Forward<T, C, Channel> forward(p, scratch, group);
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t first = task * group;  // of the chains
        const Sequence s = sequence(p, first / p.heads);
        const A* before[kHeads];
        for (int g = 0; g < group; ++g) {
          before[g] = initial ? initial + (first + g) * size : nullptr;
          forward.begin(g, s, first % p.heads + g);
        }
        for (int64_t i = 0; i < s.segments(); ++i) {
          if (checkpoints)
            for (int g = 0; g < group; ++g) copy_or_clear(checkpoints + slot(s.tile + i, first % p.heads + g), before[g]);
          forward.segment(i * kSegment, least((i + 1) * kSegment, s.length), before, true);
          for (int g = 0; g < group; ++g) {
            A* const after = final_state + (first + g) * size;
            forward.finish(g, after, before[g]);  // in place from the second segment on: row by row
            before[g] = after;
          }
        }
        if (s.segments() == 0)
          for (int g = 0; g < group; ++g) copy_or_clear(final_state + (first + g) * size, before[g]);
      }
    });
    return;
  }

  // Side by side: every segment's own part, then the states between them, then the outputs.
  if (!checkpoints) checkpoints = shared.take<A>(p.tiles() * p.heads * size);
  A* const locals = shared.take<A>(p.tiles() * p.heads * size);
  A* const since = shared.take<A>(p.tiles() * p.heads * p.key_dim);
  const int64_t tasks = chains * most_segments;
  for (const bool outputs : {false, true}) {
    run_tasks(parallel, tasks, [&](TaskQueue& queue) {
      const Tiles tiles;
      Scratch scratch;
      Forward<T, C, Channel> forward(p, scratch, 1);
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t chain = task / most_segments, i = task % most_segments, head = chain % p.heads;
        const Sequence s = sequence(p, chain / p.heads);
        if (i >= s.segments()) continue;
        forward.begin(0, s, head);
        const int64_t at = slot(s.tile + i, head), last = least((i + 1) * kSegment, s.length);
        if (outputs) {
          const A* const before = i > 0 || initial ? checkpoints + at : nullptr;
          forward.segment(i * kSegment, last, &before, true);
        } else {
          const A* const nothing = nullptr;
          forward.segment(i * kSegment, last, &nothing, false);
          forward.finish(0, locals + at, nullptr);
          __builtin_memcpy(since + at / size * p.key_dim, forward.since(0), sizeof(A) * p.key_dim);
        }
      }
    });
    if (outputs) break;
    run_tasks(parallel, chains, [&](TaskQueue& queue) {
      const int64_t columns = p.value_dim_state();
      for (int64_t task; (task = queue.next()) >= 0;) {
        const Sequence s = sequence(p, task / p.heads);
        const int64_t head = task % p.heads;
        const A* before = initial ? initial + task * size : nullptr;
        A* const end = final_state + task * size;
        for (int64_t i = 0; i <= s.segments(); ++i) {
          A* const to = i < s.segments() ? checkpoints + slot(s.tile + i, head) : end;
          if (i == 0) {
            copy_or_clear(to, before);
          } else {
            const int64_t last = slot(s.tile + i - 1, head);
            combine_state(to, columns, since + last / size * p.key_dim, before, columns, locals + last, columns,
                          static_cast<int>(p.key_dim), static_cast<int>(columns));
          }
          if (i > 0 || before) before = to;
        }
      }
    });
  }
}

template <class T>
void run(const LinearAttentionParams& p, const Parallel& parallel) {
  if (p.decay_kind == DecayKind::kChannel)
    run<T, ComputeFor<T>, true>(p, parallel);
  else
    run<T, ComputeFor<T>, false>(p, parallel);
}

}  // namespace
}  // namespace linear

void linear_attention_fwd(const LinearAttentionParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::kFloat32:
      return linear::run<float>(p, parallel);
    case DType::kBFloat16:
      return linear::run<BFloat16>(p, parallel);
    case DType::kFloat16:
      return linear::run<Float16>(p, parallel);
    case DType::kFloat64:
      return linear::run<double>(p, parallel);
  }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
