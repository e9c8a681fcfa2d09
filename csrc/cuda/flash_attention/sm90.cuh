// What the flash attention kernels for sm_90a share: tensor maps, operands of wgmma, stages of a pipeline, and the
// order in which a persistent grid takes its tiles.
#pragma once

#include "sm80.cuh"

namespace pykernels::cuda::attention {

// ---- Tensor maps --------------------------------------------------------------------------------------------------

// Whether TMA can read x [B, T, H, size] of 16-bit elements. An axis of one element has no stride to speak of.
inline bool tma_readable(const void* x, const Strides3& stride, int64_t batch, int64_t tokens, int64_t heads) {
  const auto fits = [](int64_t elements, int64_t count) {
    return count == 1 || (elements > 0 && elements % 8 == 0 && elements < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && batch > 0 && tokens > 0 && heads > 0 &&
         fits(stride.batch, batch) && fits(stride.token, tokens) && fits(stride.head, heads);
}

// Boxes of a panel's columns and `rows` tokens of one head; axes (column, token, head, batch). What lies outside of
// the tensor, columns from `size` on among it, reads as zero. Null, or what went wrong.
template <class Tile>
const char* map_tokens(CUtensorMap* map, DType dtype, int rows, const void* x, const Strides3& stride, int64_t batch,
                       int64_t tokens, int64_t heads, int64_t size) {
  TensorMapConfig config{};
  config.dtype =
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  config.element_bytes = 2, config.rank = 4, config.base = x, config.swizzle = Tile::kSwizzle;
  const int64_t sizes[] = {size, tokens, heads, batch}, strides[] = {1, stride.token, stride.head, stride.batch};
  const int box[] = {Tile::kWidth / 2, rows, 1, 1};
  for (int i = 0; i < 4; ++i) {
    config.size[i] = static_cast<uint64_t>(sizes[i]), config.box[i] = static_cast<unsigned>(box[i]);
    config.stride[i] = sizes[i] == 1 ? 16 : static_cast<uint64_t>(2 * strides[i]);
  }
  return encode_tensor_map(map, config);
}

// Starts the loads of a whole tile from row `token` on; `barrier` receives Tile::kBytes, which it must expect.
template <class Tile>
__device__ __forceinline__ void tma_load_panels(const Tile& tile, const CUtensorMap* map, uint64_t* barrier,
                                                int token, int head, int batch) {
  constexpr int kColumns = Tile::kWidth / 2;
#pragma unroll
  for (int panel = 0; panel < Tile::kCols / kColumns; ++panel)
    ptx::tma_load(tile.data + panel * Tile::kRows * kColumns, map, barrier, panel * kColumns, token, head, batch);
}

// ---- Operands of wgmma --------------------------------------------------------------------------------------------

// A descriptor for the same layout `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes / 16);
}

// A tile whose rows are M or N and whose columns are the inner axis: from row0 on, its k16 step `step`.
template <class Tile>
__device__ __forceinline__ uint64_t by_rows(const Tile& tile, int row0 = 0) {
  return ptx::wgmma_descriptor(tile.data + row0 * (Tile::kWidth / 2), Tile::kSwizzle, 16, 8 * Tile::kWidth);
}
template <class Tile>
__device__ __forceinline__ uint64_t by_rows_step(uint64_t descriptor, int step) {
  constexpr int kSteps = Tile::kWidth / 32;  // in a panel
  return advance(descriptor, step / kSteps * Tile::kRows * Tile::kWidth + step % kSteps * 32);
}

// A tile whose columns are M or N and whose rows are the inner axis.
template <class Tile>
__device__ __forceinline__ uint64_t by_columns(const Tile& tile) {
  return ptx::wgmma_descriptor(tile.data, Tile::kSwizzle, Tile::kRows * Tile::kWidth, 8 * Tile::kWidth);
}
template <class Tile>
__device__ __forceinline__ uint64_t by_columns_step(uint64_t descriptor, int step) {
  return advance(descriptor, step * 16 * Tile::kWidth);
}

// From the address of a row's chunk 0 or 1 in its tile to that of the chunk `chunks` further on, an even number: within
// a panel the swizzle makes an exclusive or of the sum. Cheaper than to hold the address of each.
template <class Tile, class T>
__device__ __forceinline__ T* chunks_on(T* at, int chunks) {
  const int panel = chunks / Tile::kPanelChunks, inner = chunks % Tile::kPanelChunks;
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(at) ^ (inner * 16)) +
         panel * Tile::kRows * (Tile::kWidth / 2);
}

// ---- Pipelines ----------------------------------------------------------------------------------------------------

// Where a producer or consumer is in a ring of kStages tiles.
template <int kStages>
struct PipelineState {
  unsigned step = 0;  // the stage and the parity follow from it, so that a loop counts in one register
  __device__ __forceinline__ int stage() const { return static_cast<int>(step % kStages); }
  __device__ __forceinline__ unsigned parity() const { return step / kStages % 2; }  // of the phase that fills it
  __device__ __forceinline__ void advance() { ++step; }
};

// A ring of tiles filled by TMA. `full` completes when a stage's bytes are there, `empty` when every consumer warp
// has released it; both are [kStages].
template <class Tile, int kStages>
struct Ring {
  typename std::remove_const_t<decltype(Tile::data)> data;
  uint64_t *full, *empty;

  __device__ __forceinline__ Tile tile(int stage) const { return {data + stage * Tile::kElements}; }
  // One thread.
  __device__ __forceinline__ void initialise(int consumer_warps) const {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, static_cast<unsigned>(consumer_warps));
    }
  }
  // The producer: the stage is free, and will receive `bytes`.
  __device__ __forceinline__ void begin(const PipelineState<kStages>& state, unsigned bytes) const {
    ptx::mbarrier_wait(empty + state.stage(), state.parity() ^ 1);
    ptx::mbarrier_arrive_expect_tx(full + state.stage(), bytes);
  }
  __device__ __forceinline__ void load(PipelineState<kStages>& state, const CUtensorMap* map, int token, int head,
                                       int batch) const {
    begin(state, Tile::kBytes);
    tma_load_panels(tile(state.stage()), map, full + state.stage(), token, head, batch);
    state.advance();
  }
  __device__ __forceinline__ void wait(const PipelineState<kStages>& state) const {
    ptx::mbarrier_wait(full + state.stage(), state.parity());
  }
  // By all lanes of a consumer warp, when its own reads of the stage are over.
  __device__ __forceinline__ void release(PipelineState<kStages>& state) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + state.stage());
    state.advance();
  }
};

// A fence and a barrier must follow its initialisation.
template <class Tile, int kStages>
__device__ __forceinline__ Ring<Tile, kStages> take_ring(SharedMemory& shared) {
  using Element = std::remove_pointer_t<decltype(Tile::data)>;
  Ring<Tile, kStages> ring;
  ring.data = shared.take<Element>(kStages * Tile::kElements, Tile::kAlignment);
  ring.full = shared.take<uint64_t>(kStages), ring.empty = shared.take<uint64_t>(kStages);
  return ring;
}

// ---- The order of the tiles ---------------------------------------------------------------------------------------

// A persistent grid takes the tiles in rounds. Tiles are sorted longest first within sections of heads whose keys and
// values fit the L2 cache together; every other round runs backwards through the blocks, so that no block gets the
// longest tile of each.
struct Schedule {
  int tiles;    // per head
  int section;  // heads
  int heads, total;

  // The tile that this block takes in a round; false when there is none left.
  __device__ __forceinline__ bool take(int round, int& head, int& tile) const {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int64_t index64 = int64_t{round} * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    if (index64 >= total) return false;
    const int index = static_cast<int>(index64), before = index / (section * tiles) * section;
    const int heads_here = min(section, heads - before), rest = index - before * tiles;
    head = before + rest % heads_here, tile = rest / heads_here;
    return true;
  }
};

// `bytes`: of keys and values (or what else is read again and again) that one key head's tiles read; `group`: heads
// that share them.
inline Schedule make_schedule(int64_t tiles, int64_t heads, int64_t group, int64_t bytes) {
  constexpr int64_t kCacheBytes = 32 << 20;  // of an H100's or H200's 50 MiB
  const int64_t section = std::min(heads, std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, bytes)) * group);
  return {static_cast<int>(tiles), static_cast<int>(section), static_cast<int>(heads),
          static_cast<int>(tiles * heads)};
}

// ---- Outputs ------------------------------------------------------------------------------------------------------

// Writes a warp's part of wgmma accumulators [64, 2 * kCount], times a factor per row half, to rows of global memory:
// `first` and `second` are those of rows g and g + 8, null to leave them out. A quad exchanges its elements so that
// each lane holds 8 neighbouring columns and the quad writes 64 bytes.
template <class T, int kCount>
__device__ __forceinline__ void store_accumulators(const float (&x)[kCount], const float (&factor)[2], T* first,
                                                   T* second, int columns, bool aligned) {
  static_assert(kCount % 16 == 0);
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const row = half == 0 ? first : second;
#pragma unroll
    for (int n = 0; n < kCount / 4; n += 4) {
      // Lane t has pair t of the 8 columns of blocks n to n + 3 and wants all four pairs of block n + t: in step i
      // it sends the pair that lane t ^ i wants.
      uint32_t mine[4], wanted[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mine[i] = ptx::pack<T>(x[4 * (n + i) + 2 * half] * factor[half], x[4 * (n + i) + 2 * half + 1] * factor[half]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = t ^ i;
        const uint32_t sent = to == 0 ? mine[0] : to == 1 ? mine[1] : to == 2 ? mine[2] : mine[3];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, i);  // pair t ^ i of block n + t
        if (to == 0) wanted[0] = got;
        if (to == 1) wanted[1] = got;
        if (to == 2) wanted[2] = got;
        if (to == 3) wanted[3] = got;
      }
      const int column = 8 * (n + t);
      if (row == nullptr || column >= columns) continue;
      if (aligned && column + 8 <= columns) {
        *reinterpret_cast<uint4*>(row + column) = make_uint4(wanted[0], wanted[1], wanted[2], wanted[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (column + e < columns) row[column + e].bits = static_cast<uint16_t>(wanted[e / 2] >> 16 * (e % 2));
      }
    }
  }
}

}  // namespace pykernels::cuda::attention
