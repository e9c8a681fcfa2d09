// Block matrix products C (+)= A B on operands packed in scratch memory, and the functions that pack them.
//
// A compute type says how: F32 and F64 (fused multiply-add) everywhere; BF16 (products of bf16 pairs, summed in fp32)
// where the ISA has bf16 dot products or AMX tiles (PYKERNELS_HAS_BF16_DOT); SplitF32 (fp32 as sums of bf16) with AMX.
// ComputeFor<T> is the one for tensors of type T whatever their values; see SplitF32 for those that it serves.
//
// Layouts, for C [rows, columns], A [rows, depth], B [depth, columns]:
//   A  row-major, any leading dimension. Depth is padded with zeros to a multiple of kDepthAlign.
//   B  panels of kPanel columns. In a panel, element (k, n) is at (k / kPair) * kPanel * kPair + n * kPair + k % kPair:
//      pairs of consecutive k side by side. Depth is padded with zeros to a multiple of kDepthAlign, columns to one of
//      kColumnAlign (the pack functions do it); what is left of the last panel is neither written nor read.
//   C  row-major. Written up to rows rounded to kRowAlign and columns rounded to kColumnAlign: leave that room; A must
//      have those rows too (any contents: row i of C depends on row i of A alone).
// Ranges of a block are products of their own. A range of k starts at a multiple of kDepthAlign (A moved on by as
// many elements, PackedB::first), a range of n at a multiple of kPanel (B moved on by whole panels).
#pragma once

#include <type_traits>

#include "simd.h"

#if defined(__AVX512BF16__)
#define PYKERNELS_HAS_BF16_DOT 1
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define PYKERNELS_HAS_AMX 1
#endif

namespace pykernels::cpu::PYKERNELS_ISA {

template <class S>
struct FmaCompute {
  using Elem = S;  // of packed A and B
  using Acc = S;   // of C
  static constexpr int kPair = 1, kDepthAlign = 1, kRowAlign = 1;
  // Rows and vectors of C held in registers at a time. With 32 registers 6 x 4 accumulators take 10 loads per 24
  // products, 12 x 2 would take 14 (an eighth slower on a processor with two of each per cycle); 16 registers hold 6 x
  // 2.
  static constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kTileVectors = 4;
#else
  static constexpr int kTileVectors = 2;
#endif
  static constexpr int kColumnAlign = kLanes<S>, kPanel = kTileVectors * kLanes<S>;
};
using F32 = FmaCompute<float>;
using F64 = FmaCompute<double>;

#if defined(PYKERNELS_HAS_BF16_DOT)
struct BF16 {
  using Elem = BFloat16;
  using Acc = float;
  static constexpr int kPair = 2, kColumnAlign = 16, kPanel = 32;
#if defined(PYKERNELS_HAS_AMX)
  static constexpr int kDepthAlign = 32, kRowAlign = 16, kTileRows = 32;
#else
  static constexpr int kDepthAlign = 2, kRowAlign = 1, kTileRows = 12;
#endif
};
#endif

#if defined(PYKERNELS_HAS_AMX)
// fp32 on the bf16 tiles, at twice the rate of fused multiply-adds or more. A number of 24 bits is the sum of three
// bf16 numbers, x = x0 + x1 + x2, each the rest rounded; of the nine products of parts, x0 y0, x0 y1, x1 y0, x1 y1, x0
// y2 and x2 y0 are summed in fp32, and those left out are within 2^-24 |x y| (2^-27 on average, of either sign): less
// than the rounding of a product. The tiles take denormals as zero, and an infinity has no parts, so operands must be
// below kSplitLargest in magnitude, and what is below kSplitLeast may lose digits: by 2^-126 per product, times the
// other factor.
//
// Depth comes in blocks of 32; k and k + 16 of a block are neighbours in A and B alike. Each block has its three parts
// one after the other, so that strides and offsets in elements of six bytes hold: in A 32 numbers each, in B 32 x
// kPanel.
struct SplitF32 {
  struct Elem {
    uint16_t bits[3];
  };
  using Acc = float;
  static constexpr int kPair = 2, kDepthAlign = 32, kRowAlign = 16, kTileRows = 32, kColumnAlign = 16, kPanel = 32;
};
constexpr float kSplitLargest = 0x1p58f, kSplitLeast = 0x1p-90f;
template <class C>
constexpr bool kIsSplit = std::is_same_v<C, SplitF32>;
#else
template <class C>
constexpr bool kIsSplit = false;
#endif

namespace detail {
template <class T>
struct ComputeFor {
  using type = F32;
};
template <>
struct ComputeFor<double> {
  using type = F64;
};
#if defined(PYKERNELS_HAS_BF16_DOT)
template <>
struct ComputeFor<BFloat16> {
  using type = BF16;
};
#endif
}  // namespace detail
// fp16 is always computed in fp32: probabilities rounded to bf16 would spend more than its error budget.
template <class T>
using ComputeFor = typename detail::ComputeFor<T>::type;

// Elements of a packed B of this depth and number of columns; its panel_stride is packed_panel<C>(depth).
template <class C>
PYKERNELS_INLINE constexpr int64_t packed_panel(int64_t depth) {
  return round_up(depth, C::kDepthAlign) * C::kPanel;
}
template <class C>
PYKERNELS_INLINE constexpr int64_t packed_size(int64_t depth, int64_t columns) {
  return round_up(depth, C::kDepthAlign) * round_up(columns, C::kPanel);
}
// The operands of a product.
template <class C>
struct MatrixA {
  const typename C::Elem* data;
  int64_t stride;  // of its rows
};
template <class C>
struct PackedB {
  const typename C::Elem* data;
  int64_t panel_stride;
  int first = 0;  // the product takes rows first, first + 1, ... of B; a multiple of kDepthAlign
};
template <class C>
struct MatrixC {
  typename C::Acc* data;
  int64_t stride;
};

// AMX keeps its tile registers off until configured. Every thread that calls matmul<BF16> holds one of these
// meanwhile; it does nothing for other ISAs.
class Tiles {
 public:
  Tiles() : Tiles(16, 16) {}
  // For products of fewer rows: how many tiles 0 and 1 have, and tiles 2 and 3. `matmul` wants 16.
  Tiles([[maybe_unused]] int first, [[maybe_unused]] int second) {
#if defined(PYKERNELS_HAS_AMX)
    const auto low = static_cast<uint8_t>(first), high = static_cast<uint8_t>(second);
    const struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16];
    } config = {.rows = {low, low, high, high, 16, 16, 16, 16}};
    // Not the intrinsic: as far as GCC 12 knows that one reads only the first bytes, and it drops the stores of the
    // others.
    asm volatile("ldtilecfg %0" ::"m"(config));
#endif
  }
  ~Tiles() {
#if defined(PYKERNELS_HAS_AMX)
    asm volatile("tilerelease");
#endif
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#if defined(PYKERNELS_HAS_AMX)
// The instructions on tiles of 16 rows of 64 bytes. The compiler's intrinsics do not say that they read memory.
namespace amx {
template <int Tile>
PYKERNELS_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
PYKERNELS_INLINE void load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
PYKERNELS_INLINE void store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
// C += A B, 16 x 16 += 16 x 32 times 32 x 16.
template <int TileC, int TileA, int TileB>
PYKERNELS_INLINE void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TileC), "i"(TileA), "i"(TileB));
}
}  // namespace amx
#endif

// ---- the product --------------------------------------------------------------------------------------------------

namespace detail {

template <class S>
PYKERNELS_INLINE Vec<S> multiply_add(Vec<S> b, const S* a, Vec<S> c) {
  return c + b * splat(*a);
}
template <class S>
PYKERNELS_INLINE Vec<S> load_b(const S* b) {
  return load(b);
}
#if defined(PYKERNELS_HAS_BF16_DOT)
PYKERNELS_INLINE Vec<float> multiply_add(VecU32 b, const BFloat16* a, Vec<float> c) {
  const __m512i pair = _mm512_set1_epi32(load_bits<int>(a));
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)pair, (__m512bh)b);
}
PYKERNELS_INLINE VecU32 load_b(const BFloat16* b) { return load_bits<VecU32>(b); }
#endif

// C tile of Rows x Vectors registers.
template <class C, int Rows, int Vectors>
PYKERNELS_INLINE void register_tile(int depth, const typename C::Elem* a, int64_t lda, const typename C::Elem* b,
                                    typename C::Acc* c, int64_t ldc, bool accumulate) {
  using Acc = typename C::Acc;
  constexpr int lanes = kLanes<Acc>, step = lanes * C::kPair;
  Vec<Acc> sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vec<Acc>{};
  for (int k = 0; k < depth; k += C::kPair) {
    decltype(load_b(b)) row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) row[j] = load_b(b + j * step);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = multiply_add(row[j], a + i * lda, sum[i][j]);
    a += C::kPair;
    b += C::kPanel * C::kPair;
  }
  // What C already holds is added last: a chain of additions as long as this depth, not as all calls' together, so
  // that the rounding error does not grow with the sequence.
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      Acc* const at = c + i * ldc + j * lanes;
      store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
    }
}

// The rows % kTileRows last rows: the tile of exactly that height.
template <class C, int Rows, int Vectors>
void last_rows(int rows, int depth, const typename C::Elem* a, int64_t lda, const typename C::Elem* b,
               typename C::Acc* c, int64_t ldc, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      register_tile<C, Rows, Vectors>(depth, a, lda, b, c, ldc, accumulate);
    else
      last_rows<C, Rows - 1, Vectors>(rows, depth, a, lda, b, c, ldc, accumulate);
  }
}

// One panel of B against all rows.
template <class C, int Vectors>
struct Panel {
  template <class Beside>
  static __attribute__((noinline)) void multiply(int rows, int depth, const typename C::Elem* a, int64_t lda,
                                                 const typename C::Elem* b, typename C::Acc* c, int64_t ldc,
                                                 bool accumulate, Beside&) {
    int i = 0;
    for (; i + C::kTileRows <= rows; i += C::kTileRows)
      register_tile<C, C::kTileRows, Vectors>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
    last_rows<C, C::kTileRows - 1, Vectors>(rows - i, depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
  }
};

#if defined(PYKERNELS_HAS_AMX)
// C block of RowTiles x Vectors tiles of 16 x 16, in tiles 0-3; A in 4-5, B in 6-7.
template <int RowTiles, int Vectors>
PYKERNELS_INLINE void amx_zero_c() {
  amx::zero<0>();
  if constexpr (Vectors > 1) amx::zero<1>();
  if constexpr (RowTiles > 1) amx::zero<2>();
  if constexpr (RowTiles > 1 && Vectors > 1) amx::zero<3>();
}
template <int RowTiles, int Vectors>
PYKERNELS_INLINE void amx_load_c(const float* c, int64_t ldc) {
  const float* const c1 = c + 16 * ldc;
  amx::load<0>(c, ldc * 4);
  if constexpr (Vectors > 1) amx::load<1>(c + 16, ldc * 4);
  if constexpr (RowTiles > 1) amx::load<2>(c1, ldc * 4);
  if constexpr (RowTiles > 1 && Vectors > 1) amx::load<3>(c1 + 16, ldc * 4);
}
template <int RowTiles, int Vectors>
PYKERNELS_INLINE void amx_store_c(float* c, int64_t ldc) {
  float* const c1 = c + 16 * ldc;
  amx::store<0>(c, ldc * 4);
  if constexpr (Vectors > 1) amx::store<1>(c + 16, ldc * 4);
  if constexpr (RowTiles > 1) amx::store<2>(c1, ldc * 4);
  if constexpr (RowTiles > 1 && Vectors > 1) amx::store<3>(c1 + 16, ldc * 4);
}

template <int RowTiles, int Vectors, class Beside>
PYKERNELS_INLINE void amx_tile(int depth, const BFloat16* a, int64_t lda, const BFloat16* b, float* c, int64_t ldc,
                               bool accumulate, Beside& beside) {
  constexpr int b_bytes = 2 * 64;
  const int64_t a_bytes = lda * 2;
  const BFloat16* const a1 = a + 16 * lda;
  if (accumulate)
    amx_load_c<RowTiles, Vectors>(c, ldc);
  else
    amx_zero_c<RowTiles, Vectors>();
  for (int k = 0; k < depth; k += 32) {
    amx::load<6>(b, b_bytes);
    amx::load<4>(a + k, a_bytes);
    amx::dot<0, 4, 6>();
    if constexpr (Vectors > 1) {
      amx::load<7>(b + 32, b_bytes);
      amx::dot<1, 4, 7>();
    }
    if constexpr (RowTiles > 1) {
      amx::load<5>(a1 + k, a_bytes);
      amx::dot<2, 5, 6>();
      if constexpr (Vectors > 1) amx::dot<3, 5, 7>();
    }
    b += 2 * 512;
    beside();
  }
  amx_store_c<RowTiles, Vectors>(c, ldc);
}

// Adds a block of 32 in depth to tiles 0-3: the products of parts from small to large, in an order that changes the
// parts of one side at a time.
template <int RowTiles, int Vectors, class Beside>
PYKERNELS_INLINE void split_block(const SplitF32::Elem* a, int64_t lda, const SplitF32::Elem* b, Beside& beside) {
  constexpr int b_bytes = 2 * 64;
  const int64_t a_bytes = lda * 6;
  const char *const a0 = reinterpret_cast<const char*>(a), *const a1 = a0 + 16 * a_bytes;
  const char* const b0 = reinterpret_cast<const char*>(b);
  // The products with new parts of A, and with new parts of B; each tile is loaded right before its first product.
  const auto next_a = [&](int part) {
    amx::load<4>(a0 + 64 * part, a_bytes);
    amx::dot<0, 4, 6>();
    if constexpr (Vectors > 1) amx::dot<1, 4, 7>();
    if constexpr (RowTiles > 1) {
      amx::load<5>(a1 + 64 * part, a_bytes);
      amx::dot<2, 5, 6>();
      if constexpr (Vectors > 1) amx::dot<3, 5, 7>();
    }
    beside();
  };
  const auto next_b = [&](int part) {
    amx::load<6>(b0 + 2048 * part, b_bytes);
    amx::dot<0, 4, 6>();
    if constexpr (RowTiles > 1) amx::dot<2, 5, 6>();
    if constexpr (Vectors > 1) {
      amx::load<7>(b0 + 2048 * part + 64, b_bytes);
      amx::dot<1, 4, 7>();
      if constexpr (RowTiles > 1) amx::dot<3, 5, 7>();
    }
    beside();
  };
  amx::load<6>(b0, b_bytes);
  if constexpr (Vectors > 1) amx::load<7>(b0 + 64, b_bytes);
  next_a(2);
  next_a(1);
  next_b(1);
  next_a(0);
  next_b(2);
  next_b(0);
}

template <int RowTiles, int Vectors, class Beside>
PYKERNELS_INLINE void amx_tile(int depth, const SplitF32::Elem* a, int64_t lda, const SplitF32::Elem* b, float* c,
                               int64_t ldc, bool accumulate, Beside& beside) {
  if (accumulate)
    amx_load_c<RowTiles, Vectors>(c, ldc);
  else
    amx_zero_c<RowTiles, Vectors>();
  for (int k = 0; k < depth; k += 32) split_block<RowTiles, Vectors>(a + k, lda, b + k * SplitF32::kPanel, beside);
  amx_store_c<RowTiles, Vectors>(c, ldc);
}

template <class C, int Vectors>
struct TilePanel {
  using Elem = typename C::Elem;
  template <class Beside>
  static __attribute__((noinline)) void multiply(int rows, int depth, const Elem* a, int64_t lda, const Elem* b,
                                                 float* c, int64_t ldc, bool accumulate, Beside& beside) {
    int i = 0;
    for (; i + 16 < rows; i += 32)
      amx_tile<2, Vectors>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate, beside);
    if (i < rows) amx_tile<1, Vectors>(depth, a + i * lda, lda, b, c + i * ldc, ldc, accumulate, beside);
  }
};
template <int Vectors>
struct Panel<BF16, Vectors> : TilePanel<BF16, Vectors> {};
template <int Vectors>
struct Panel<SplitF32, Vectors> : TilePanel<SplitF32, Vectors> {};
#endif

// The product with a panel of so many columns, Vectors vectors of them at most.
template <class C, int Vectors, class Beside>
PYKERNELS_INLINE auto panel_product(int columns) {
  if constexpr (Vectors > 1)
    if (columns <= (Vectors - 1) * C::kColumnAlign) return panel_product<C, Vectors - 1, Beside>(columns);
  return &Panel<C, Vectors>::template multiply<Beside>;
}

}  // namespace detail

struct Nothing {
  PYKERNELS_INLINE void operator()() const {}
};

// C = A B, or C += A B. `depth` is rounded up to kDepthAlign (the padding of A and B is read).
//
// With AMX, `beside()` is called tile_products<C>(...) times while the tiles are multiplied: with work for the vector
// units, that has nothing to do with this product.
template <class C, class Beside = const Nothing>
void matmul(int rows, int columns, int depth, MatrixA<C> a, PackedB<C> b, MatrixC<C> c, bool accumulate,
            Beside& beside = Nothing{}) {
  depth = round_up(depth, C::kDepthAlign);
  const typename C::Elem* panel = b.data;
  for (int n = 0; n < columns; n += C::kPanel, panel += b.panel_stride) {
    const auto multiply = detail::panel_product<C, C::kPanel / C::kColumnAlign, Beside>(columns - n);
    multiply(rows, depth, a.data, a.stride, panel + b.first * C::kPanel, c.data + n, c.stride, accumulate, beside);
  }
}

template <class C>
PYKERNELS_INLINE constexpr int tile_products(int rows, int columns, int depth) {
  const int blocks =
      (rows + 31) / 32 * ((columns + C::kPanel - 1) / C::kPanel) * (round_up(depth, C::kDepthAlign) / C::kDepthAlign);
  return C::kRowAlign == 1 ? 0 : kIsSplit<C> ? 6 * blocks : blocks;
}

// Spreads the pieces of some vector work evenly over a number of calls: what `matmul` does beside its products.
template <class Work>
class Spread {
 public:
  Spread(const Work& work, int pieces, int calls) : work_(work), pieces_(pieces), calls_(calls) {}
  PYKERNELS_INLINE void operator()() {
    due_ += pieces_;
    while (done_ < pieces_ && done_ * calls_ < due_) work_(done_++);
  }
  void finish() {
    while (done_ < pieces_) work_(done_++);
  }

 private:
  Work work_;
  int pieces_, calls_, done_ = 0, due_ = 0;
};

// ---- magnitudes ---------------------------------------------------------------------------------------------------

// Of rows x columns numbers: whether all are below a limit (NaN is not), and the largest of those that are.
template <class S>
struct Magnitudes {
  bool all_below;
  S largest;
  // Not below the limit if one is not.
  S seen() const { return all_below ? largest : static_cast<S>(kInfinity); }
};
template <class T>
Magnitudes<Wide<T>> magnitudes(const T* x, int64_t stride, int64_t rows, int64_t columns, Wide<T> limit) {
  using S = Wide<T>;
  constexpr int lanes = kLanes<S>;
  // As integers magnitudes have the same order, NaN above infinity.
  const auto largest = [&](auto&& keep) {
    Mask<S> top{};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += lanes) {
        const Mask<S> bits = keep((Mask<S>)abs<S>(load_upto(x + i * stride + j, columns - j)));
        top = bits > top ? bits : top;
      }
    using Bits = decltype(top[0] + 0);
    S lane[lanes];
    store(lane, (Vec<S>)top);
    Bits result = 0;
    for (const S x : lane) result = most(result, bit_cast<Bits>(x));
    return bit_cast<S>(result);
  };
  const S all = largest([](Mask<S> bits) { return bits; });
  if (all < limit) return {true, all};
  return {false, largest([&](Mask<S> bits) { return bits & ((Vec<S>)bits < splat(limit)); })};
}

// The largest magnitudes of N tensors (or parts of them), gathered by all threads while they pack them.
template <int N>
class Largest {
 public:
  void add(int tensor, float largest) {
    const uint32_t value = bit_cast<uint32_t>(largest);
    uint32_t seen = __atomic_load_n(&bits_[tensor], __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(&bits_[tensor], &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  float operator[](int tensor) const { return bit_cast<float>(bits_[tensor]); }

 private:
  uint32_t bits_[N];  // of floats, in the order of which infinity comes after all numbers, and NaN after infinity
};

// ---- packing ------------------------------------------------------------------------------------------------------

namespace detail {

#if defined(PYKERNELS_HAS_BF16_DOT)
// Columns [0, n) of a row as bf16 bits.
PYKERNELS_INLINE HalfU16 load_bf16(const BFloat16* p, int64_t n) {
  if (n >= 16) return load_bits<HalfU16>(p);
  return n <= 0 ? HalfU16{} : (HalfU16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
}
template <class T>
PYKERNELS_INLINE HalfU16 load_bf16(const T* p, int64_t n) {
  return narrow(load_upto(p, n), BFloat16{});
}
// Pairs of consecutive columns.
PYKERNELS_INLINE VecU32 load_pairs(const BFloat16* p, int64_t n) {
  if (n >= 32) return load_bits<VecU32>(p);
  return n <= 0 ? VecU32{} : (VecU32)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
}
template <class T>
PYKERNELS_INLINE VecU32 load_pairs(const T* p, int64_t n) {
  return (VecU32)_mm512_cvtne2ps_pbh((__m512)load_upto(p + (n > 16 ? 16 : 0), n > 16 ? n - 16 : 0),
                                     (__m512)load_upto(p, n));
}
// Column by column, the elements of two rows.
PYKERNELS_INLINE VecU32 interleave(HalfU16 low, HalfU16 high) {
  return (VecU32)_mm512_cvtepu16_epi32((__m256i)low) | ((VecU32)_mm512_cvtepu16_epi32((__m256i)high) << 16);
}
#endif

}  // namespace detail

#if defined(PYKERNELS_HAS_AMX)
// The three parts of 32 numbers, those of `low` in the lower halves of lanes.
struct SplitParts {
  VecU32 part[3];
};
PYKERNELS_INLINE SplitParts split(Vec<float> low, Vec<float> high) {
  SplitParts result;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    VecU32 a = (VecU32)low, b = (VecU32)high;
    // Rounded to nearest; what is left for the last has no more bits than it holds.
    if (i < 2) a += 0x8000u, b += 0x8000u;
    // (a >> 16) | (b & 0xffff0000)
    result.part[i] =
        (VecU32)_mm512_ternarylogic_epi32((__m512i)(a >> 16), (__m512i)b, _mm512_set1_epi32(~0xffff), 0xf8);
    if (i < 2) low -= (Vec<float>)(a & 0xffff0000u), high -= (Vec<float>)(b & 0xffff0000u);
  }
  return result;
}
// 32 elements of a row of A.
PYKERNELS_INLINE void store_row(SplitF32::Elem* a, const SplitParts& x) {
  __builtin_memcpy(a, x.part, sizeof(x.part));
}
// The parts of two rows, (low, high) each, regrouped as those of (low, low) and (high, high).
PYKERNELS_INLINE SplitParts lower_halves(const SplitParts& a, const SplitParts& b) {
  SplitParts result;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) result.part[i] = (a.part[i] & 0xffffu) | (b.part[i] << 16);
  return result;
}
PYKERNELS_INLINE SplitParts upper_halves(const SplitParts& a, const SplitParts& b) {
  SplitParts result;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) result.part[i] = (a.part[i] >> 16) | (b.part[i] & 0xffff0000u);
  return result;
}
// Element j of a row of A.
PYKERNELS_INLINE float split_element(const SplitF32::Elem* a, int j) {
  const auto* const parts = reinterpret_cast<const BFloat16*>(a + j / 32 * 32) + 2 * (j % 16) + j % 32 / 16;
  return to_float(parts[0]) + to_float(parts[32]) + to_float(parts[64]);
}
// 16 columns of row `row` and `row` + 16 of B.
PYKERNELS_INLINE void store_pair(SplitF32::Elem* block, int row, int column, const SplitParts& x) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i)
    __builtin_memcpy(reinterpret_cast<char*>(block) + i * 2048 + row * 128 + column * 4, &x.part[i], 64);
}
#endif

// An Order of pack_rows: the row of the source that row k of B takes, a permutation of each kBlock rows (to a
// multiple of which the depth is then padded).
struct NaturalOrder {
  static constexpr int kBlock = 1;
  static constexpr int source(int k) { return k; }
};

// What happens to numbers on their way into an operand: map(x, row, column) -> what becomes of the elements x of that
// row of the source from `column` on. Only copy_columns takes another one for BF16.
struct AsTheyAre {
  template <class V>
  PYKERNELS_INLINE V operator()(V x, int, int) const {
    return x;
  }
};

// B[k][n] = source[k * stride + n]: rows of the source are rows of B. T is any storage type that C's Acc can hold.
template <class C, class Order = NaturalOrder, class T, class Map = AsTheyAre>
void pack_rows(typename C::Elem* b, int64_t panel_stride, const T* source, int64_t stride, int depth, int columns,
               Map map = {}) {
  using Acc = typename C::Acc;
  constexpr int lanes = kLanes<Acc>;
  const int depth_padded = round_up(depth, most(C::kDepthAlign, Order::kBlock));
  const int columns_padded = round_up(columns, C::kColumnAlign);
  for (int first = 0; first < columns_padded; first += C::kPanel, b += panel_stride) {
    const int width = least(C::kPanel, columns_padded - first);
#if defined(PYKERNELS_HAS_AMX)
    if constexpr (kIsSplit<C>) {
      static_assert(Order::kBlock == 1);
      for (int k = 0; k < depth_padded; k += 32)
        for (int i = 0; i < 16; ++i)
          for (int n = 0; n < width; n += lanes) {
            const auto row = [&](int r) {
              const int from = r < depth ? r : 0;
              const int left = r < depth ? columns - first - n : 0;
              return map(load_upto(source + from * stride + first + n, left), from, first + n);
            };
            store_pair(b + k * C::kPanel, i, n, split(row(k + i), row(k + i + 16)));
          }
      continue;
    }
#endif
    for (int k = 0; k < depth_padded; k += C::kPair) {
      typename C::Elem* const row = b + k * C::kPanel;
      const int row0 = Order::source(k), row1 = C::kPair == 1 ? row0 : Order::source(k + 1);
      const T* const from0 = source + (row0 < depth ? row0 : 0) * stride + first;
      [[maybe_unused]] const T* const from1 = source + (row1 < depth ? row1 : 0) * stride + first;
      for (int n = 0; n < width; n += lanes) {
        const int64_t left = columns - first - n;
        if constexpr (C::kPair == 1) {
          store(row + n, map(load_upto(from0 + n, left), row0, first + n));
        } else {
          static_assert(kIsSplit<C> || std::is_same_v<Map, AsTheyAre>);
#if defined(PYKERNELS_HAS_BF16_DOT)
          const VecU32 pairs = detail::interleave(detail::load_bf16(from0 + n, row0 < depth ? left : 0),
                                                  detail::load_bf16(from1 + n, row1 < depth ? left : 0));
          __builtin_memcpy(row + 2 * n, &pairs, sizeof(pairs));
#endif
        }
      }
    }
  }
}

// B[k][n] = source[n * stride + k]: rows of the source are columns of B.
template <class C, class T, class Map = AsTheyAre>
void pack_columns(typename C::Elem* b, int64_t panel_stride, const T* source, int64_t stride, int depth, int columns,
                  Map map = {}) {
  using Acc = typename C::Acc;
  constexpr int lanes = kLanes<Acc>;
  const int depth_padded = round_up(depth, C::kDepthAlign), columns_padded = round_up(columns, C::kColumnAlign);
  for (int first = 0; first < columns_padded; first += C::kPanel, b += panel_stride) {
    const int width = least(C::kPanel, columns_padded - first);
    for (int n = 0; n < width; n += lanes) {
      const int64_t rows = columns - first - n;  // of the source, from the next
      const T* const from = source + (first + n) * stride;
      for (int k = 0; k < depth_padded; k += lanes * C::kPair) {
        if constexpr (kIsSplit<C>) {
#if defined(PYKERNELS_HAS_AMX)
          Vec<Acc> square[2][lanes];
          for (int h = 0; h < 2; ++h) {
            const int first_k = k + h * lanes;
            for (int i = 0; i < lanes; ++i)
              square[h][i] = i < rows
                                 ? map(load_upto(from + i * stride + first_k, depth - first_k), first + n + i, first_k)
                                 : Vec<Acc>{};
            transpose(square[h]);
          }
          for (int i = 0; i < lanes; ++i) store_pair(b + k * C::kPanel, i, n, split(square[0][i], square[1][i]));
#endif
        } else if constexpr (C::kPair == 1) {
          Vec<Acc> square[lanes];
          for (int i = 0; i < lanes; ++i)
            square[i] = i < rows ? map(load_upto(from + i * stride + k, depth - k), first + n + i, k) : Vec<Acc>{};
          transpose(square);
          for (int i = 0; i < least(lanes, depth_padded - k); ++i) store(b + (k + i) * C::kPanel + n, square[i]);
        } else {
          static_assert(kIsSplit<C> || std::is_same_v<Map, AsTheyAre>);
#if defined(PYKERNELS_HAS_BF16_DOT)
          VecU32 square[lanes];
          for (int i = 0; i < lanes; ++i)
            square[i] = i < rows ? detail::load_pairs(from + i * stride + k, depth - k) : VecU32{};
          transpose(square);
          for (int i = 0; i < least(lanes, (depth_padded - k) / 2); ++i)
            __builtin_memcpy(b + (k + 2 * i) * C::kPanel + 2 * n, &square[i], sizeof(square[i]));
#endif
        }
      }
    }
  }
}

// A[m][k] = source[m * stride + k], zeros from depth to lda (at least depth rounded up to kDepthAlign).
// For SplitF32 lda is a multiple of kDepthAlign.
template <class C, class T, class Map = AsTheyAre>
void copy_rows(typename C::Elem* a, int64_t lda, const T* source, int64_t stride, int rows, int depth, Map map = {}) {
  using Acc = typename C::Acc;
  constexpr int lanes = kLanes<Acc>;
  for (int m = 0; m < rows; ++m, a += lda, source += stride)
    for (int k = 0; k < lda; k += kIsSplit<C> ? 2 * lanes : lanes) {
      if constexpr (kIsSplit<C>) {
#if defined(PYKERNELS_HAS_AMX)
        store_row(a + k, split(map(load_upto(source + k, depth - k), m, k),
                               map(load_upto(source + k + lanes, depth - k - lanes), m, k + lanes)));
#endif
      } else if constexpr (C::kPair == 1) {
        store_upto(a + k, map(load_upto(source + k, depth - k), m, k), lda - k);
      } else {
        static_assert(kIsSplit<C> || std::is_same_v<Map, AsTheyAre>);
#if defined(PYKERNELS_HAS_BF16_DOT)
        const HalfU16 bits = detail::load_bf16(source + k, depth - k);
        if (lda - k >= lanes)
          __builtin_memcpy(a + k, &bits, sizeof(bits));
        else
          __builtin_memcpy(a + k, &bits, 2 * static_cast<size_t>(lda - k));
#endif
      }
    }
}

// A[m][k] = source[k * stride + m], zeros from depth to lda.
template <class C, class T, class Map = AsTheyAre>
void copy_columns(typename C::Elem* a, int64_t lda, const T* source, int64_t stride, int rows, int depth,
                  Map map = {}) {
  using Acc = typename C::Acc;
  constexpr int lanes = kLanes<Acc>;
  for (int m = 0; m < rows; m += lanes)
    for (int k = 0; k < lda; k += lanes * C::kPair) {
      if constexpr (kIsSplit<C>) {
#if defined(PYKERNELS_HAS_AMX)
        Vec<Acc> square[2][lanes];
        for (int h = 0; h < 2; ++h) {
          for (int i = 0, row = k + h * lanes; i < lanes; ++i, ++row)
            square[h][i] = row < depth ? map(load_upto(source + row * stride + m, rows - m), row, m) : Vec<Acc>{};
          transpose(square[h]);
        }
        for (int i = 0; i < least(lanes, rows - m); ++i)
          store_row(a + (m + i) * lda + k, split(square[0][i], square[1][i]));
#endif
      } else if constexpr (C::kPair == 1) {
        Vec<Acc> square[lanes];
        for (int i = 0; i < lanes; ++i)
          square[i] = k + i < depth ? map(load_upto(source + (k + i) * stride + m, rows - m), k + i, m) : Vec<Acc>{};
        transpose(square);
        for (int i = 0; i < least(lanes, rows - m); ++i) store_upto(a + (m + i) * lda + k, square[i], lda - k);
      } else {
#if defined(PYKERNELS_HAS_BF16_DOT)
        VecU32 square[lanes];
        for (int i = 0; i < lanes; ++i) {
          const auto row = [&](int r) {
            const T* const from = source + r * stride + m;
            if (r >= depth) return HalfU16{};
            if constexpr (std::is_same_v<Map, AsTheyAre>)
              return detail::load_bf16(from, rows - m);
            else
              return (HalfU16)narrow(map(load_upto(from, rows - m), r, m), BFloat16{});
          };
          square[i] = detail::interleave(row(k + 2 * i), row(k + 2 * i + 1));
        }
        transpose(square);
        // Whole vectors have a constant size: a copy of any other is a call or a loop over bytes.
        for (int i = 0; i < least(lanes, rows - m); ++i) {
          if (lda - k >= 32)
            __builtin_memcpy(a + (m + i) * lda + k, &square[i], sizeof(square[i]));
          else
            __builtin_memcpy(a + (m + i) * lda + k, &square[i], 2 * static_cast<size_t>(lda - k));
        }
#endif
      }
    }
}

}  // namespace pykernels::cpu::PYKERNELS_ISA
