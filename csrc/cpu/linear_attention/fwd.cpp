// Chunked forward pass. Per chunk of n tokens with the state S before it (rows of Q S scaled by the decay since the
// chunk's start, those of Q where it differs between their channels):
//     out = scaled (Q S) + P V,  P = Q K^T * weights        S <- total S + (scaled K)^T V
// A segment computes its own part L of the state from zero and adds the decayed state S0 from before it where that is
// needed (S = D S0 + L), so that its results are the same bits whether segments run one after the other or side by
// side.
#include "chunk.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace linear {
namespace {

template <class T, class C, bool Channel>
class Forward {
  using A = typename C::Acc;
  using E = typename C::Elem;

 public:
  static constexpr bool kBackward = false;

  Forward(const LinearAttentionParams& params, Scratch& scratch, int group)
      : heads(group), p(params), key_dim(static_cast<int>(p.key_dim)), value_dim(static_cast<int>(p.value_dim_state())),
        results(p.batch * p.tokens * p.heads * p.value_dim * static_cast<int64_t>(sizeof(T))),
        ahead(tile_products<C>(kChunk, value_dim, key_dim + kChunk) + tile_products<C>(key_dim, value_dim, kChunk)) {
    kp = padded(key_dim), vp = round_up(padded(value_dim), C::kPanel);
    for (int i = 0; i < heads; ++i) head[i].allocate(p, scratch, kp, vp, head[0]);
    weights = scratch.take<E>(kChunk * kChunk);
    state = scratch.take<E>(packed_panel<C>(key_dim));
    values = scratch.take<E>(packed_size<C>(kChunk, vp));
    operand = scratch.take<E>(kChunk * kp);
    keys = scratch.take<E>(packed_size<C>(kp, kChunk));
    keys_t = scratch.take<E>(kp * kChunk);
    scores = scratch.take<A>(kChunk * kChunk);
    out = scratch.take<A>(kChunk * vp);
    of_state = scratch.take<A>(kChunk * vp);
    ones = p.normalize ? scratch.take<T>(kChunk * value_dim) : nullptr;
    side = Channel ? scratch.take<A>(kChunk * kp) : nullptr;
    rows = Channel ? scratch.take<Row<C>>(kChunk * kp) : nullptr;
    fill<A>(row_scale, kChunk, static_cast<A>(p.scale));
  }

  // Head `index` of the group becomes head `of` of a sequence.
  void begin(int index, const Sequence& s, int64_t of, ChainRange* range) {
    Head& h = head[index];
    h.begin(p, s, of, range);
    if (range) range->add(ChainRange::kScale, absolute(p.scale));
    h.o = rows_of<T>(p, p.out, p.out_stride, s, of);
    if (p.normalize) h.denominator = rows_of<A>(p, p.denominator, contiguous_strides(p, 1), s, of);
  }

  // Tokens [first, last) of all heads of the group, chunk by chunk: their rows are neighbours in memory. Leaves the
  // part of the state that comes from them in local, and in since what they leave of before [K, value_dim] (null:
  // zero), the state before them. Without `outputs` nothing else.
  void segment(int64_t first, int64_t last, const A* const* before, bool outputs) {
    for (int i = 0; i < heads; ++i) head[i].clear(kp, vp);
    for (int64_t t = first; t < last; t += kChunk) {
      const int n = static_cast<int>(least<int64_t>(kChunk, last - t));
      for (int i = 0; i < heads; ++i) {
        ahead.clear();
        if (outputs && !results.past_caches)
          ahead.add(head[i].o.from(t), n, static_cast<int>(p.value_dim));
        if constexpr (kIsSplit<C>) {
          coming(head[i], t, last, outputs);
          ahead.fetch();
        } else {
          coming(head[(i + 1) % heads], i + 1 < heads ? t : t + kChunk, last, outputs);
        }
        chunk(head[i], t, n, before[i], before[i] || t > first, outputs);
      }
    }
  }

  void own_part(int64_t first, int64_t last) {
    const A* const nothing = nullptr;
    segment(first, last, &nothing, false);
  }

  // after = since * before + local.
  void finish(int index, A* after, const A* before) {
    head[index].template finish<C>(after, before, kp, key_dim, value_dim);
  }

  const A* since(int index) const { return head[index].since; }

  const int heads;  // of the group

 private:
  struct Head : Chain<T, A, Channel> {
    Rows<T> o;
    Rows<A> denominator;
  };

  void coming(const Head& h, int64_t t, int64_t last, bool outputs) {
    const int n = static_cast<int>(least<int64_t>(kChunk, last - t));
    if (n <= 0) return;
    ahead.add(h.k.from(t), n, key_dim);
    ahead.add(h.v.from(t), n, static_cast<int>(p.value_dim));
    if (outputs) ahead.add(h.q.from(t), n, key_dim);
  }

  void chunk(Head& h, int64_t t, int n, const A* before, bool has_state, bool outputs) {
    Factors<A, Channel>& factors = h.factors;
    const Rows<const T> qs = h.q.from(t), ks = h.k.from(t);
    const Rows<const T> vs = h.values(t, n, value_dim, ones);
    h.prepare(t, key_dim, n, row_scale);
    Peak<A> key, value, query;
    pack_rows<C>(values, packed_panel<C>(kChunk), vs.data, vs.stride, n, value_dim, seen_by<C>(value));
    copy_columns<C>(keys_t, kChunk, ks.data, ks.stride, key_dim, n, [&](Vec<A> x, int j, int c) {
      if constexpr (kIsSplit<C>) key.see(x);
      return Vec<A>(x * factors.key_at(j, c));
    });
    MatrixA<C> of_query{};
    if (outputs) {
      if constexpr (Channel) {
        channel_scores<C>(factors, qs, ks, key_dim, n, rows, operand, keys, side, scores);
        if (has_state)
          scale_rows<C>(operand, kp, qs, n, key_dim, [&](int i, int c) { return factors.query_at(i, c); });
        of_query = {operand, kp};
      } else {
        pack_columns<C>(keys, packed_panel<C>(key_dim), ks.data, ks.stride, key_dim, n);
        of_query = left_operand<C>(operand, qs, n, key_dim, seen_by<C>(query));
      }
      for (int r = 0; r < n; r += kRows) {
        const int count = least(kRows, n - r), columns = least(r + kRows, n);
        if constexpr (!Channel)
          matmul<C>(count, columns, key_dim, {of_query.data + r * of_query.stride, of_query.stride},
                    {keys, packed_panel<C>(key_dim)}, {scores + r * kChunk, kChunk}, false);
        weigh(h, qs, ks, r, count, columns);
      }
    }
    const bool reads = outputs && has_state;
    // Panel by panel, so that the state is read and written while it is near, and its operand never leaves.
    for (int c = 0; c < value_dim; c += C::kPanel) {
      const int width = least(C::kPanel, value_dim - c);
      const PackedB<C> of_values{values + c / C::kPanel * packed_panel<C>(kChunk), 0};
      h.template advance_panel<C>(reads ? state : nullptr, c, kp, key_dim, value_dim, before, ChainRange::kState);
      if (reads) matmul<C>(n, width, key_dim, of_query, {state, 0}, {of_state + c, vp}, false, ahead);
      if (outputs)
        for (int r = 0; r < n; r += kRows)
          matmul<C>(least(kRows, n - r), width, least(r + kRows, n), {weights + r * kChunk, kChunk}, of_values,
                    {out + r * vp + c, vp}, false, ahead);
      matmul<C>(key_dim, width, n, {keys_t, kChunk}, of_values, {h.panel(c, kp), C::kPanel}, true, ahead);
    }
    if (outputs) write(h, t, n, has_state);
    for (int c = 0; c < kp; ++c) h.since[c] *= factors.total[c];
    if constexpr (kIsSplit<C>) {
      h.range->add(ChainRange::kKey, key.value());
      h.range->add(ChainRange::kValue, value.value());
      if (outputs)
        h.range->add_scaled_queries(Channel ? largest(qs, n, key_dim) : query.value(), factors.largest_query_factor(n));
    }
  }

  // weights[i][j] = scale * weight * score for rows [r, r + count) and the columns that are multiplied.
  void weigh(const Head& h, Rows<const T> qs, Rows<const T> ks, int r, int count, int columns) {
    constexpr int lanes = kLanes<A>;
    const Factors<A, Channel>& factors = h.factors;
    const Vec<A> index = iota<A>();
    for (int i = r; i < r + count; ++i) {
      const int last = factors.exclusive ? i - 1 : i;  // key
      const A own = h.bonus ? bonus_score(qs[i], ks[i], h.bonus, key_dim, row_scale[i]) : A(0);
      write_row<C>(weights + i * kChunk, columns, [&](int c) {
        Vec<A> x = load(scores + i * kChunk + c) * row_scale[i];
        if constexpr (!Channel) x = x * load(factors.weight + i * kChunk + c);
        if (c + lanes - 1 > last) x = index <= static_cast<A>(last - c) ? x : Vec<A>{};
        if (h.bonus) x = index == static_cast<A>(i - c) ? splat<A>(own) : x;
        return x;
      });
    }
  }

  void write(Head& h, int64_t t, int n, bool has_state) {
    const int columns = static_cast<int>(p.value_dim);
    for (int i = 0; i < n; ++i) {
      const A factor = Channel ? A(1) : h.factors.query[i];
      const auto sum = [&](int c) {
        const Vec<A> inside = load(out + i * vp + c);
        return has_state ? Vec<A>(load(of_state + i * vp + c) * factor + inside) : inside;
      };
      T* const to = h.o[t + i];
      if (p.normalize) {
        const A denominator =
            sum(columns / kLanes<A> * kLanes<A>)[columns % kLanes<A>] + static_cast<A>(kNormalizeEpsilon);
        *h.denominator[t + i] = denominator;
        const A inverse = A(1) / denominator;
        results.row(to, columns, [&](int c) { return Vec<A>(sum(c) * inverse); });
      } else {
        results.row(to, columns, sum);
      }
    }
  }

  const LinearAttentionParams& p;
  const int key_dim, value_dim;  // value_dim with the column of ones
  int kp, vp;
  const ResultWriter results;
  Ahead ahead;
  Head head[kHeads];
  E* weights;  // [kChunk, kChunk]
  E* state;   // a panel of the state, packed
  E* values;  // packed, rows are tokens
  E* operand;  // [kChunk, kp]: queries
  E* keys;    // packed, columns are tokens
  E* keys_t;  // [kp, kChunk]
  A* scores;  // [kChunk, kChunk]
  A* out;      // [kChunk, vp]: of values in the chunk
  A* of_state;  // [kChunk, vp]: of the state before it
  A* side;
  Row<C>* rows;  // channel decay: [kChunk, kp]
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
      __builtin_memset(static_cast<T*>(p.out) + t * p.out_stride.token + h * p.out_stride.head, 0,
                       sizeof(T) * p.value_dim);
      if (p.normalize) static_cast<A*>(p.denominator)[t * p.heads + h] = 1;
    }
}

template <class T, class C, bool Channel>
void run(const LinearAttentionParams& p, const Parallel& parallel, const Chains& chains, ChainRange* ranges) {
  using A = typename C::Acc;
  const int64_t size = p.key_dim * p.value_dim_state();
  const A* const initial = static_cast<const A*>(p.initial_state);
  A* const final_state = static_cast<A*>(p.final_state);
  const Plan plan(p, parallel, chains, ranges);
  using Engine = Forward<T, C, Channel>;
  A* const checkpoints = static_cast<A*>(p.checkpoints);
  const bool split = plan.split();  // then the states between segments are in the checkpoints already
  const auto segment = [&](Engine& forward, const int64_t* slots, int64_t first, int64_t last, const A* const* before) {
    if (checkpoints && !split)
      for (int g = 0; g < forward.heads; ++g) plan.copy(checkpoints + slots[g] * size, before[g]);
    forward.segment(first, last, before, true);
  };
  if (split) {
    Scratch shared;
    A* const states = checkpoints ? checkpoints : shared.take<A>(p.tiles() * p.heads * size);
    plan.side_by_side<Engine>(p, initial, states, final_state, segment);
  } else {
    plan.in_turn<Engine>(p, initial, final_state, segment);
  }
}

template <class T>
void run(const LinearAttentionParams& p, const Parallel& parallel) {
  using A = Wide<T>;
  want_huge_pages(p.out, static_cast<size_t>(p.batch * p.tokens * p.heads * p.value_dim) * sizeof(T));
  clear_rest<T, A>(p);
  if (p.cu_seqlens && p.checkpoints)  // some tiles have no segment
    __builtin_memset(p.checkpoints, 0, sizeof(A) * p.tiles() * p.heads * p.key_dim * p.value_dim_state());
  with_compute<T>(p, [&](auto compute, const Chains& chains, ChainRange* ranges) {
    using C = decltype(compute);
    if (p.decay_kind == DecayKind::kChannel)
      run<T, C, true>(p, parallel, chains, ranges);
    else
      run<T, C, false>(p, parallel, chains, ranges);
  });
}

}  // namespace
}  // namespace linear

void linear_attention_fwd(const LinearAttentionParams& p, const Parallel& parallel) {
  linear::with_type(p.dtype, [&](auto x) { linear::run<decltype(x)>(p, parallel); });
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
