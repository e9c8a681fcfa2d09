// Chunked backward pass; README.md of the op derives it. Per segment, the states before its chunks are recomputed from
// the checkpoint, then the chunks are visited from the last to the first with the gradient dS of the state after each:
//     dQ = scaled dO S^T + dP K          dK = scaled V dS^T + dP^T Q          dV = scaled K dS + P^T dO
//     dS <- total dS + (scaled Q)^T dO
// with dP = (dO V^T) * weights. As in the forward pass, a segment computes its own part of dS from zero.
// The gradient of a log factor sums over what crosses its token; each sum has terms of that size alone (no differences
// of larger ones), so that it is exact for strong decay too.
#include "chunk.h"

namespace pykernels::cpu::PYKERNELS_ISA {
namespace linear {
namespace {

template <class T, class C, bool Channel>
class Backward {
  using A = typename C::Acc;
  using E = typename C::Elem;
  static constexpr int lanes = kLanes<A>;

 public:
  static constexpr bool kBackward = true;

  Backward(const LinearAttentionBackwardParams& params, Scratch& scratch, int group)
      : heads(group), b(params), p(params.forward), key_dim(static_cast<int>(p.key_dim)),
        value_dim(static_cast<int>(p.value_dim_state())),
        results(p.batch * p.tokens * p.heads * least(p.key_dim, p.value_dim) * static_cast<int64_t>(sizeof(T))),
        // Most products of a chunk with outputs: memory is slower than they are, so its lines are asked for all along.
        ahead(tile_products<C>(kChunk, value_dim, key_dim + kChunk) +
              2 * tile_products<C>(kChunk, key_dim, value_dim + kChunk) + tile_products<C>(key_dim, value_dim, kChunk)),
        ahead_of_states(tile_products<C>(key_dim, value_dim, kChunk)) {
    kp = padded(key_dim), vp = round_up(padded(value_dim), C::kPanel);
    const int widest = most(kp, vp);
    const int64_t square = int64_t{kp} * vp;
    const int64_t chunks = (least<int64_t>(kSegment, p.tokens) + kChunk - 1) / kChunk;
    for (int i = 0; i < heads; ++i) {
      head[i].states = scratch.take<A>(chunks * square);
      head[i].allocate(p, scratch, kp, vp, head[0]);
    }
    dstate = scratch.take<A>(square);
    packed = scratch.take<E>(packed_size<C>(kChunk, vp));
    panel = scratch.take<E>(packed_panel<C>(most(key_dim, value_dim)));
    tokens = scratch.take<E>(packed_size<C>(widest, kChunk));
    query_rows = scratch.take<E>(packed_size<C>(kChunk, kp));
    key_rows = scratch.take<E>(packed_size<C>(kChunk, kp));
    operand = scratch.take<E>(kChunk * widest);
    dout_rows = scratch.take<E>(kChunk * vp);
    transposed = scratch.take<E>(kp * kChunk);
    scores = scratch.take<A>(kChunk * kChunk);
    dscores = scratch.take<A>(kChunk * kChunk);
    weighted = scratch.take<Row<C>>(kChunk * kChunk);
    dweighted = scratch.take<Row<C>>(kChunk * kChunk);
    weighted_t = scratch.take<E>(kChunk * kChunk);
    dweighted_t = scratch.take<E>(kChunk * kChunk);
    dq = scratch.take<A>(kChunk * kp);
    dk = scratch.take<A>(kChunk * kp);
    dv = scratch.take<A>(kChunk * vp);
    cross = scratch.take<A>(kp);
    if (Channel) {
      rows = scratch.take<Row<C>>(kChunk * kp);
      side = scratch.take<A>(kChunk * kp);
      product = scratch.take<A>(kChunk * kp);
      ddecay_rows = scratch.take<A>(kChunk * kp);
    }
    if (p.normalize) {
      ones = scratch.take<T>(kChunk * value_dim);
      extended = scratch.take<T>(kChunk * value_dim);
    }
  }

  // Head `index` of the group becomes head `of` of a sequence.
  void begin(int index, const Sequence& s, int64_t of, ChainRange* range) {
    Head& h = head[index];
    h.begin(p, s, of, range);
    h.dout = rows_of<const T>(p, b.dout, b.dout_stride, s, of);
    if (p.normalize) {
      h.out = rows_of<const T>(p, p.out, p.out_stride, s, of);
      h.denominator = rows_of<const A>(p, p.denominator, contiguous_strides(p, 1), s, of);
    }
    const Strides3 like_k = contiguous_strides(p, key_dim);
    if (p.heads == p.heads_k) {
      h.dq = rows_of<T>(p, b.dq, like_k, s, of);
      h.dk = rows_of<T>(p, b.dk, like_k, s, of);
    } else {
      h.dq_wide = rows_of<A>(p, b.dq, like_k, s, of);
      h.dk_wide = rows_of<A>(p, b.dk, like_k, s, of);
    }
    h.dv = rows_of<T>(p, b.dv, contiguous_strides(p, p.value_dim), s, of);
    if (b.ddecay) h.ddecay = rows_of<A>(p, b.ddecay, contiguous_strides(p, Channel ? key_dim : 1), s, of);
  }

  // Tokens [first, last) of all heads of the group, chunk by chunk, with the state before them (null: zero) and the
  // gradient of the state after them (null: zero), both [K, value_dim]. Leaves the part of the gradient of the state
  // before them that comes from them in local, and in since what they leave of the later one. Without `outputs` nothing
  // else. dbonus [K] is written if there is a bonus.
  void segment(int64_t first, int64_t last, const A* const* before, const A* const* after, A* const* dbonus,
               bool outputs) {
    for (int i = 0; i < heads; ++i) {
      head[i].clear(kp, vp);
      if (dbonus[i]) fill<A>(dbonus[i], key_dim, 0);
    }
    if (outputs) recompute(first, last, before);
    for (int64_t c = (last - first + kChunk - 1) / kChunk - 1; c >= 0; --c) {
      const int64_t t = first + c * kChunk;
      const int n = static_cast<int>(least<int64_t>(kChunk, last - t));
      for (int i = 0; i < heads; ++i) {
        ahead.clear();
        if (outputs) {
          if (!results.past_caches) {
            ahead.add(head[i].dv.from(t), n, static_cast<int>(p.value_dim));
            if (p.heads == p.heads_k) {
              ahead.add(head[i].dq.from(t), n, key_dim);
              ahead.add(head[i].dk.from(t), n, key_dim);
            }
          }
          if constexpr (kIsSplit<C>) {
            coming(head[i], t, n, first);
            ahead.fetch();
          } else {
            coming(head[(i + 1) % heads], i + 1 < heads ? t : t - kChunk, i + 1 < heads ? n : kChunk, first);
          }
        }
        chunk(head[i], t, n, before[i] || c > 0 ? head[i].states + c * kp * vp : nullptr, after[i],
              after[i] || t + n < last, dbonus[i], outputs);
      }
    }
  }

  void own_part(int64_t first, int64_t last) {
    const A* const nothing = nullptr;
    A* const no_bonus = nullptr;
    segment(first, last, &nothing, &nothing, &no_bonus, false);
  }

  // before = since * after + local: gradients of states.
  void finish(int index, A* before, const A* after) {
    head[index].template finish<C>(before, after, kp, key_dim, value_dim);
  }

  const A* since(int index) const { return head[index].since; }

  const int heads;  // of the group

 private:
  struct Head : Chain<T, A, Channel> {
    A* states;  // before each chunk of the segment, [kp, vp] each
    Rows<const T> dout, out{};
    Rows<const A> denominator{};
    Rows<T> dq{}, dk{}, dv;
    Rows<A> dq_wide{}, dk_wide{}, ddecay{};
  };

  void coming(const Head& h, int64_t t, int n, int64_t first) {
    if (t < first) return;
    ahead.add(h.dout.from(t), n, static_cast<int>(p.value_dim));
    ahead.add(h.v.from(t), n, static_cast<int>(p.value_dim));
    ahead.add(h.q.from(t), n, key_dim);
    ahead.add(h.k.from(t), n, key_dim);
  }

  // Gradients of out before its division, without the factor 1 / denominator, which joins row_scale: dout and
  // -dout . out.
  Rows<const T> gradients(const Head& h, int64_t t, int n) {
    const Rows<const T> ds = h.dout.from(t);
    if (!p.normalize) {
      for (int i = 0; i < n; ++i) row_scale[i] = static_cast<A>(p.scale);
      return ds;
    }
    const int columns = value_dim - 1;
    for (int i = 0; i < n; ++i) {
      Vec<A> sum{};
      for (int c = 0; c < columns; c += lanes)
        sum = sum + load_upto(ds[i] + c, columns - c) * load_upto(h.out[t + i] + c, columns - c);
      T* const to = extended + i * value_dim;
      __builtin_memcpy(to, ds[i], sizeof(T) * columns);
      to[columns] = element<T>(-reduce_add<A>(sum));
      row_scale[i] = static_cast<A>(p.scale) / *h.denominator[t + i];
    }
    return {extended, value_dim};
  }

  // The states before each chunk; `before` is the first's.
  void recompute(int64_t first, int64_t last, const A* const* before) {
    for (int i = 0; i < heads; ++i)
      for (int row = 0; row < key_dim; ++row)
        for (int c = 0; c < vp; c += lanes)
          store(head[i].states + row * vp + c,
                before[i] ? load_upto(before[i] + row * value_dim + c, value_dim - c) : Vec<A>{});
    fill<A>(row_scale, kChunk, 1);
    for (int64_t t = first; t + kChunk < last; t += kChunk)
      for (int i = 0; i < heads; ++i) {
        Head& h = head[i];
        const A* const s = h.states + (t - first) / kChunk * kp * vp;
        A* const next = h.states + ((t - first) / kChunk + 1) * kp * vp;
        ahead_of_states.clear();
        const auto add = [&](const Head& of, int64_t from) {
          ahead_of_states.add(of.k.from(from), kChunk, key_dim);
          ahead_of_states.add(of.v.from(from), kChunk, static_cast<int>(p.value_dim));
        };
        if constexpr (kIsSplit<C>) {
          add(h, t);
          ahead_of_states.fetch();
        } else {
          const int64_t next_t = i + 1 < heads ? t : t + kChunk;
          if (next_t + kChunk < last) add(head[(i + 1) % heads], next_t);
        }
        h.prepare(t, key_dim, kChunk, row_scale);
        Peak<A> peak;
        for (int row = 0; row < key_dim; ++row)
          for (int c = 0; c < vp; c += lanes) {
            const Vec<A> x = load(s + row * vp + c);
            if constexpr (kIsSplit<C>) peak.see(x);
            store(next + row * vp + c, x * h.factors.total[row]);
          }
        if constexpr (kIsSplit<C>) h.range->add(ChainRange::kState, peak.value());
        const Rows<const T> vs = h.values(t, kChunk, value_dim, ones);
        pack_rows<C>(packed, packed_panel<C>(kChunk), vs.data, vs.stride, kChunk, value_dim);
        const Rows<const T> ks = h.k.from(t);
        copy_columns<C>(transposed, kChunk, ks.data, ks.stride, key_dim, kChunk,
                        [&](Vec<A> x, int j, int c) { return Vec<A>(x * h.factors.key_at(j, c)); });
        matmul<C>(key_dim, value_dim, kChunk, {transposed, kChunk}, {packed, packed_panel<C>(kChunk)}, {next, vp}, true,
                  ahead_of_states);
      }
    if constexpr (kIsSplit<C>)
      for (int i = 0; i < heads; ++i) {
        const A* const final = head[i].states + (last - first - 1) / kChunk * kp * vp;
        head[i].range->add(ChainRange::kState, largest(Rows<const A>{final, vp}, key_dim, value_dim));
      }
  }

  // `before`: the state before the chunk [kp, vp] or null; `later`: whether the state after it has a gradient.
  void chunk(Head& h, int64_t t, int n, const A* before, const A* after, bool later, A* dbonus, bool outputs) {
    const Factors<A, Channel>& factors = h.factors;
    const Rows<const T> qs = h.q.from(t), ks = h.k.from(t);
    const Rows<const T> vs = h.values(t, n, value_dim, ones), ds = gradients(h, t, n);
    h.prepare(t, key_dim, n, row_scale);
    Peak<A> query, gradient;
    pack_rows<C>(packed, packed_panel<C>(kChunk), ds.data, ds.stride, n, value_dim, seen_by<C>(gradient));
    copy_columns<C>(transposed, kChunk, qs.data, qs.stride, key_dim, n, [&](Vec<A> x, int i, int c) {
      if constexpr (kIsSplit<C>) query.see(x);
      return Vec<A>(x * factors.query_at(i, c));
    });
    const bool reads = outputs && later;
    if (outputs) score(h, qs, ks, vs, ds, n);
    if (reads) scale_rows<C>(operand, kp, ks, n, key_dim, [&](int j, int c) { return factors.key_at(j, c); });
    // Panel by panel, so that the state's gradient is read and written while it is near, and its operand never leaves.
    for (int c = 0; c < value_dim; c += C::kPanel) {
      const int width = least(C::kPanel, value_dim - c);
      const PackedB<C> of_gradients{packed + c / C::kPanel * packed_panel<C>(kChunk), 0};
      h.template advance_panel<C>(reads ? panel : nullptr, c, kp, key_dim, value_dim, after, ChainRange::kStateGradient,
                                  dstate + c, vp);
      if (reads) matmul<C>(n, width, key_dim, {operand, kp}, {panel, 0}, {dv + c, vp}, false, ahead);
      if (outputs)
        for (int r = 0; r < n; r += kRows)
          matmul<C>(least(kRows, n - r), width, n - r, {weighted_t + r * kChunk + r, kChunk},
                    {of_gradients.data, 0, r}, {dv + r * vp + c, vp}, later, ahead);
      matmul<C>(key_dim, width, n, {transposed, kChunk}, of_gradients, {h.panel(c, kp), C::kPanel}, true, ahead);
    }
    if (outputs) {
      const int columns = static_cast<int>(p.value_dim);
      for (int i = 0; i < n; ++i) results.row(h.dv[t + i], columns, [&](int c) { return load(dv + i * vp + c); });
      key_query_gradients(h, t, n, qs, ks, vs, before, later ? dstate : nullptr, dbonus);
    }
    for (int c = 0; c < kp; ++c) h.since[c] *= factors.total[c];
    if constexpr (kIsSplit<C>) {
      h.range->add_scaled_queries(query.value(), factors.largest_query_factor(n));
      h.range->add(ChainRange::kOutGradient, gradient.value());
      h.range->add(ChainRange::kScale, largest(Rows<const A>{row_scale, 0}, 1, n));
    }
  }

  // weighted = P, dweighted = dP (both with row_scale), and for the gradient of scalar decay scores = P * (dO V^T).
  void score(const Head& h, Rows<const T> qs, Rows<const T> ks, Rows<const T> vs, Rows<const T> ds, int n) {
    const Factors<A, Channel>& factors = h.factors;
    const A* const bonus = h.bonus;
    Peak<A> key, value;
    pack_columns<C>(tokens, packed_panel<C>(value_dim), vs.data, vs.stride, value_dim, n, seen_by<C>(value));
    of_dout = left_operand<C>(dout_rows, ds, n, value_dim);
    for (int r = 0; r < n; r += kRows) {
      const int count = least(kRows, n - r), columns = least(r + kRows, n);
      matmul<C>(count, columns, value_dim, {of_dout.data + r * of_dout.stride, of_dout.stride},
                {tokens, packed_panel<C>(value_dim)}, {dscores + r * kChunk, kChunk}, false, ahead);
    }
    if constexpr (Channel) {
      channel_scores<C>(factors, qs, ks, key_dim, n, rows, operand, tokens, side, scores);
    } else {
      pack_columns<C>(tokens, packed_panel<C>(key_dim), ks.data, ks.stride, key_dim, n, seen_by<C>(key));
      for (int r = 0; r < n; r += kRows) {
        const int count = least(kRows, n - r), columns = least(r + kRows, n);
        const MatrixA<C> left = left_operand<C>(operand, qs.from(r), count, key_dim);
        matmul<C>(count, columns, key_dim, left, {tokens, packed_panel<C>(key_dim)},
                  {scores + r * kChunk, kChunk}, false, ahead);
      }
    }
    if constexpr (kIsSplit<C>) {
      h.range->add(ChainRange::kKey, Channel ? largest(ks, n, key_dim) : key.value());
      h.range->add(ChainRange::kValue, value.value());
    }
    const Vec<A> index = iota<A>();
    for (int i = 0; i < n; ++i) {
      const int last = factors.exclusive ? i - 1 : i, end = (i / kRows + 1) * kRows;
      diagonal[i] = bonus ? dscores[i * kChunk + i] * row_scale[i] : 0;
      for (int c = 0; c < end; c += lanes) {
        Vec<A> weight = splat<A>(row_scale[i]);
        if constexpr (!Channel) weight = weight * load(factors.weight + i * kChunk + c);
        Vec<A> x = load(scores + i * kChunk + c) * weight, dx = load(dscores + i * kChunk + c);
        if (c + lanes - 1 > last) {
          const Mask<A> visible = index <= static_cast<A>(last - c);
          x = visible ? x : Vec<A>{};
          dx = visible ? dx : Vec<A>{};
          weight = visible ? weight : Vec<A>{};
        }
        store(scores + i * kChunk + c, x * dx);
        store_element(weighted + i * kChunk + c, x);
        store_element(dweighted + i * kChunk + c, dx * weight);
      }
      // Products whose depth is padded read these; what they multiply is zero, so they must not be NaN.
      for (int c = end; c < kChunk; c += lanes) store_element(dweighted + i * kChunk + c, Vec<A>{});
      if (bonus) weighted[i * kChunk + i] = element<Row<C>>(bonus_score(qs[i], ks[i], bonus, key_dim, row_scale[i]));
    }
    copy_columns<C>(weighted_t, kChunk, weighted, kChunk, n, n);
    copy_columns<C>(dweighted_t, kChunk, dweighted, kChunk, n, n);
  }

  // to [n, key_dim] = left state^T, panel by panel.
  void times_transposed(A* to, int n, MatrixA<C> left, const A* state) {
    for (int c = 0; c < key_dim; c += C::kPanel) {
      const int width = least(C::kPanel, key_dim - c);
      pack_columns<C>(panel, 0, state + c * vp, vp, value_dim, width);
      matmul<C>(n, width, value_dim, left, {panel, 0}, {to + c, kp}, false, ahead);
    }
  }

  void key_query_gradients(const Head& h, int64_t t, int n, Rows<const T> qs, Rows<const T> ks, Rows<const T> vs,
                           const A* before, const A* later, A* dbonus) {
    const Factors<A, Channel>& factors = h.factors;
    const A* const bonus = h.bonus;
    // From the state before the chunk, and through the state after it.
    if (before) {
      times_transposed(dq, n, of_dout, before);
    } else {
      fill<A>(dq, int64_t{n} * kp, 0);
    }
    if (later) {
      times_transposed(dk, n, left_operand<C>(operand, vs, n, value_dim), later);
    } else {
      fill<A>(dk, int64_t{n} * kp, 0);
    }
    for (int i = 0; i < n; ++i) {
      Vec<A> of_query{}, of_key{};
      for (int c = 0; c < key_dim; c += lanes) {
        const Vec<A> x = load(dq + i * kp + c) * factors.query_at(i, c);
        const Vec<A> y = load(dk + i * kp + c) * factors.key_at(i, c);
        store(dq + i * kp + c, x);
        store(dk + i * kp + c, y);
        if (!Channel && b.ddecay) {
          of_query = of_query + x * load_upto(qs[i] + c, key_dim - c);
          of_key = of_key + y * load_upto(ks[i] + c, key_dim - c);
        }
      }
      if (!Channel && b.ddecay) query_sum[i] = reduce_add<A>(of_query), key_sum[i] = reduce_add<A>(of_key);
    }
    if (b.ddecay) {
      // What crosses the whole chunk: total * sum over values of state * dstate.
      for (int row = 0; row < kp; ++row) {
        Vec<A> sum{};
        if (before && later && row < key_dim)
          for (int c = 0; c < value_dim; c += lanes)
            sum = sum + load_upto(before + row * vp + c, value_dim - c) *
                            load_upto(later + row * vp + c, value_dim - c);
        cross[row] = reduce_add<A>(sum) * factors.total[row];
      }
    }
    if constexpr (Channel) {
      channel_gradients(h, qs, ks, n);
    } else {
      pack_rows<C>(query_rows, packed_panel<C>(kChunk), qs.data, qs.stride, n, key_dim);
      pack_rows<C>(key_rows, packed_panel<C>(kChunk), ks.data, ks.stride, n, key_dim);
      for (int r = 0; r < n; r += kRows) {
        const int count = least(kRows, n - r), columns = least(r + kRows, n);
        const MatrixA<C> left = left_operand<C>(operand, dweighted + r * kChunk, kChunk, count, columns);
        matmul<C>(count, key_dim, columns, left, {key_rows, packed_panel<C>(kChunk)}, {dq + r * kp, kp}, true, ahead);
        matmul<C>(count, key_dim, n - r, {dweighted_t + r * kChunk + r, kChunk},
                  {query_rows, packed_panel<C>(kChunk), r}, {dk + r * kp, kp}, true, ahead);
      }
      if (b.ddecay) scalar_decay_gradient(h, t, n);
    }
    if (bonus) {
      for (int c = 0; c < key_dim; c += lanes) {
        const int left = key_dim - c;
        const Vec<A> u = load_upto(bonus + c, left);
        Vec<A> du = load_upto(dbonus + c, left);
        for (int i = 0; i < n; ++i) {
          const Vec<A> x = load_upto(qs[i] + c, left), y = load_upto(ks[i] + c, left);
          store(dq + i * kp + c, load(dq + i * kp + c) + u * y * diagonal[i]);
          store(dk + i * kp + c, load(dk + i * kp + c) + u * x * diagonal[i]);
          du = du + x * y * diagonal[i];
        }
        store_upto(dbonus + c, du, left);
      }
    }
    const bool shared = p.heads != p.heads_k;
    const auto write = [&](auto* to, const A* from) {
      results.row(to, key_dim, [&](int c) { return load(from + c); });
    };
    for (int i = 0; i < n; ++i) {
      if (shared) {
        write(h.dq_wide[t + i], dq + i * kp);
        write(h.dk_wide[t + i], dk + i * kp);
      } else {
        write(h.dq[t + i], dq + i * kp);
        write(h.dk[t + i], dk + i * kp);
      }
      if (Channel && b.ddecay) write(h.ddecay[t + i], ddecay_rows + i * kp);
    }
  }

  // d log factor_t: pairs (i, j) with j < t <= i (t < i when exclusive), queries i >= t (i > t) of the state before the
  // chunk, keys j < t of the one after it, and what crosses.
  void scalar_decay_gradient(const Head& h, int64_t t, int n) {
    const Factors<A, Channel>& factors = h.factors;
    A crossing = 0;
    for (int row = 0; row < key_dim; ++row) crossing += cross[row];
    const int shift = factors.exclusive ? 1 : 0;
    A result[kChunk], sum = 0;
    for (int i = n - 1; i >= 0; --i) {
      if (!shift) sum += query_sum[i];
      result[i] = sum;
      if (shift) sum += query_sum[i];
    }
    sum = 0;
    // prefix[i]: sum over j < m of the pairs (i, j); of those the queries from m on count.
    A prefix[kChunk] = {};
    for (int m = 0; m < n; ++m) {
      A pairs = 0;
      for (int i = m + shift; i < n; ++i) pairs += prefix[i];
      result[m] += sum + crossing + pairs;
      sum += key_sum[m];
      for (int i = m; i < n; ++i) prefix[i] += scores[i * kChunk + m];
    }
    for (int m = 0; m < n; ++m) *h.ddecay[t + m] = result[m];
  }

  void channel_gradients(const Head& h, Rows<const T> qs, Rows<const T> ks, int n) {
    if constexpr (Channel) {
      const Factors<A, Channel>& factors = h.factors;
      const bool shift = factors.exclusive;
      // Suffix sums over queries of the state before the chunk, prefix sums over keys of the one after it.
      for (int c = 0; c < kp; c += lanes) {
        const Vec<A> crossing = b.ddecay ? load(cross + c) : Vec<A>{};
        Vec<A> sum = crossing;
        for (int i = n - 1; i >= 0; --i) {
          const Vec<A> x = load(dq + i * kp + c) * load_upto(qs[i] + c, key_dim - c);
          store(ddecay_rows + i * kp + c, shift ? sum : sum + x);
          sum = sum + x;
        }
        sum = Vec<A>{};
        for (int j = 0; j < n; ++j) {
          store(ddecay_rows + j * kp + c, load(ddecay_rows + j * kp + c) + sum);
          sum = sum + load(dk + j * kp + c) * load_upto(ks[j] + c, key_dim - c);
        }
      }
      for (int size = kLeaf; size < n; size *= 2) {
        level_factors(factors, size, n, side);
        level_rows<C>(rows, kp, side, kp, qs, ks, key_dim, size, n);
        for (int first = 0; first + size < n; first += 2 * size) {
          const int middle = first + size, end = least(middle + size, n), count = end - middle;
          pack_rows<C>(key_rows, packed_panel<C>(kChunk), rows + first * kp, kp, size, key_dim);
          const MatrixA<C> left = left_operand<C>(operand, dweighted + middle * kChunk + first, kChunk, count, size);
          matmul<C>(count, key_dim, size, left, {key_rows, packed_panel<C>(kChunk)}, {product + middle * kp, kp},
                    false);
          pack_rows<C>(query_rows, packed_panel<C>(kChunk), rows + middle * kp, kp, count, key_dim);
          matmul<C>(size, key_dim, count, transposed_block(first, middle, size, count),
                    {query_rows, packed_panel<C>(kChunk)}, {product + first * kp, kp}, false);
          for (int c = 0; c < key_dim; c += lanes) {
            Vec<A> sum{};
            for (int i = end - 1; i >= middle; --i) {
              const Vec<A> x = load(product + i * kp + c) * load(side + i * kp + c);
              store(dq + i * kp + c, load(dq + i * kp + c) + x);
              const Vec<A> next = sum + x * load_upto(qs[i] + c, key_dim - c);
              store(ddecay_rows + i * kp + c, load(ddecay_rows + i * kp + c) + (shift ? sum : next));
              sum = next;
            }
            sum = Vec<A>{};
            for (int j = first; j < middle; ++j) {
              const Vec<A> x = load(product + j * kp + c) * load(side + j * kp + c);
              store(dk + j * kp + c, load(dk + j * kp + c) + x);
              store(ddecay_rows + j * kp + c, load(ddecay_rows + j * kp + c) + sum);
              sum = sum + x * load_upto(ks[j] + c, key_dim - c);
            }
          }
        }
      }
      for (int first = 0; first < n; first += kLeaf)
        leaf_gradients(h, qs.from(first), ks.from(first), first, least(kLeaf, n - first));
    }
  }

  // dP^T, keys [first, first + size) by queries [middle, middle + count), as a left operand.
  MatrixA<C> transposed_block(int first, int middle, int size, int count) {
    if constexpr (kIsSplit<C>) {  // middle may lie within a block of its depth
      copy_columns<C>(operand, kChunk, dweighted + middle * kChunk + first, kChunk, size, count);
      return {operand, kChunk};
    } else {
      return {dweighted_t + first * kChunk + middle, kChunk};
    }
  }

  // Pairs inside a block of kLeaf tokens. For key j, carried(i) is k_j times the factors up to query i, and back(i) the
  // sum over queries from i on of dP q times the factors from i to them; what crosses token i is their product.
  void leaf_gradients(const Head& h, Rows<const T> qs, Rows<const T> ks, int first, int count) {
    const Factors<A, Channel>& factors = h.factors;
    const A* const token = factors.token + first * kp;
    // P_ij above was zeroed on and above what is not visible; dweighted may be rounded, so the exact gradients are
    // used.
    const A* const dp = dscores + first * kChunk + first;
    for (int c = 0; c < key_dim; c += lanes) {
      Vec<A> query[kLeaf], factor[kLeaf], dquery[kLeaf], dfactor[kLeaf], carried[kLeaf];
      for (int i = 0; i < count; ++i) {
        query[i] = load_upto(qs[i] + c, key_dim - c);
        factor[i] = load(token + i * kp + c);
        dquery[i] = load(dq + (first + i) * kp + c);
        dfactor[i] = load(ddecay_rows + (first + i) * kp + c);
      }
      for (int j = 0; j < count; ++j) {
        const auto dpair = [&](int i) { return dp[i * kChunk + j] * row_scale[first + i]; };
        Vec<A> key = load_upto(ks[j] + c, key_dim - c), back{};
        if (factors.exclusive) {
          // Query i reads what is carried over the tokens j + 1 .. i - 1.
          for (int i = j + 1; i < count; ++i) {
            dquery[i] = dquery[i] + key * dpair(i);
            key = key * factor[i];
            carried[i] = key;
          }
          for (int i = count - 1; i > j; --i) {
            dfactor[i] = dfactor[i] + carried[i] * back;
            back = back * factor[i] + query[i] * dpair(i);
          }
        } else {
          dquery[j] = dquery[j] + key * dpair(j);
          for (int i = j + 1; i < count; ++i) {
            key = key * factor[i];
            carried[i] = key;
            dquery[i] = dquery[i] + key * dpair(i);
          }
          for (int i = count - 1; i > j; --i) {
            back = back + query[i] * dpair(i);
            dfactor[i] = dfactor[i] + carried[i] * back;
            back = back * factor[i];
          }
          back = back + query[j] * dpair(j);
        }
        store(dk + (first + j) * kp + c, load(dk + (first + j) * kp + c) + back);
      }
      for (int i = 0; i < count; ++i) {
        store(dq + (first + i) * kp + c, dquery[i]);
        store(ddecay_rows + (first + i) * kp + c, dfactor[i]);
      }
    }
  }

  const LinearAttentionBackwardParams& b;
  const LinearAttentionParams& p;
  const int key_dim, value_dim;  // value_dim with the column of ones
  int kp, vp;
  const ResultWriter results;
  Ahead ahead, ahead_of_states;
  Head head[kHeads];
  A* dstate;
  E* packed;       // rows are tokens: dout (v)
  E* panel;        // of a state or of its gradient
  E* tokens;       // columns are tokens: v or k
  E* query_rows;   // rows are tokens
  E* key_rows;
  E* operand;
  E* dout_rows;
  MatrixA<C> of_dout;  // dout as a left operand
  Row<C>* rows = nullptr;  // channel decay: scaled queries and keys
  E* transposed;
  A* scores;
  A* dscores;
  Row<C>* weighted;
  Row<C>* dweighted;
  E* weighted_t;
  E* dweighted_t;
  A* dq;
  A* dk;
  A* dv;
  A* cross;
  A* side = nullptr;
  A* product = nullptr;
  A* ddecay_rows = nullptr;
  T* ones = nullptr;
  T* extended = nullptr;
  alignas(64) A row_scale[kChunk];
  A diagonal[kChunk], query_sum[kChunk], key_sum[kChunk];
};

// Tokens that belong to no sequence.
template <class T, class A>
void clear_rest(const LinearAttentionBackwardParams& b) {
  const LinearAttentionParams& p = b.forward;
  if (!p.cu_seqlens) return;
  const int64_t end = p.sequences > 0 ? clamped(p.cu_seqlens[p.sequences], p.tokens) : 0;
  const auto clear = [&](void* x, int64_t bytes_per_head) {
    if (x)
      __builtin_memset(static_cast<char*>(x) + end * p.heads * bytes_per_head, 0,
                       (p.tokens - end) * p.heads * bytes_per_head);
  };
  const int64_t of_k = (p.heads == p.heads_k ? sizeof(T) : sizeof(A)) * p.key_dim;
  clear(b.dq, of_k);
  clear(b.dk, of_k);
  clear(b.dv, sizeof(T) * p.value_dim);
  clear(b.ddecay, sizeof(A) * (p.decay_kind == DecayKind::kChannel ? p.key_dim : 1));
}

template <class T, class C, bool Channel>
void run(const LinearAttentionBackwardParams& b, const Parallel& parallel, const Chains& chains, ChainRange* ranges) {
  using A = typename C::Acc;
  const LinearAttentionParams& p = b.forward;
  const int64_t size = p.key_dim * p.value_dim_state();
  const A* const dfinal = static_cast<const A*>(b.dfinal_state);
  A* const dinitial = static_cast<A*>(b.dinitial_state);
  const A* const checkpoints = static_cast<const A*>(p.checkpoints);
  A* const dbonus = static_cast<A*>(b.dbonus);
  const Plan plan(p, parallel, chains, ranges);
  using Engine = Backward<T, C, Channel>;
  const auto segment = [&](Engine& backward, const int64_t* slots, int64_t first, int64_t last, const A* const* after) {
    const A* before[kHeads];
    A* of_bonus[kHeads];
    for (int g = 0; g < backward.heads; ++g) {
      before[g] = checkpoints + slots[g] * size;
      of_bonus[g] = dbonus ? dbonus + slots[g] * p.key_dim : nullptr;
    }
    backward.segment(first, last, before, after, of_bonus, true);
  };
  if (plan.split()) {
    Scratch shared;
    A* const afters = shared.take<A>(p.tiles() * p.heads * size);
    plan.side_by_side<Engine>(b, dfinal, afters, dinitial, segment);
  } else {
    plan.in_turn<Engine>(b, dfinal, dinitial, segment);
  }
}

template <class T>
void run(const LinearAttentionBackwardParams& b, const Parallel& parallel) {
  using A = Wide<T>;
  const LinearAttentionParams& p = b.forward;
  clear_rest<T, A>(b);
  const int64_t rows = p.batch * p.tokens * p.heads;
  for (void* const gradient : {b.dq, b.dk})
    want_huge_pages(gradient, static_cast<size_t>(rows * p.key_dim) * (p.heads == p.heads_k ? sizeof(T) : sizeof(A)));
  want_huge_pages(b.dv, static_cast<size_t>(rows * p.value_dim) * sizeof(T));
  // Tiles may have no segment.
  if (b.dbonus) __builtin_memset(b.dbonus, 0, sizeof(A) * p.tiles() * p.heads * p.key_dim);
  with_compute<T>(p, [&](auto compute, const Chains& chains, ChainRange* ranges) {
    using C = decltype(compute);
    if (p.decay_kind == DecayKind::kChannel)
      run<T, C, true>(b, parallel, chains, ranges);
    else
      run<T, C, false>(b, parallel, chains, ranges);
  });
}

}  // namespace
}  // namespace linear

void linear_attention_bwd(const LinearAttentionBackwardParams& b, const Parallel& parallel) {
  linear::with_type(b.forward.dtype, [&](auto x) { linear::run<decltype(x)>(b, parallel); });
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
