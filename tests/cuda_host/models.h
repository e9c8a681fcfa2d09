// What the functions of ptx.cuh do, as C++: included by ptx.cuh when the kernels are compiled for the host.
//
// Written from the PTX manual. UNCONFIRMED: no vectors recorded on a GPU are in vectors/ yet (see
// record_vectors.py); until test_instructions.py has compared a model with such vectors, it only says what we read
// in the manual.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "runtime.h"

namespace pykernels::cuda::ptx {

using cuda_host::Where;

// ---- Conversions and arithmetic -----------------------------------------------------------------------------------

namespace model {

inline float fp16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;                                 // the canonical NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or is larger
  if (magnitude < 0x38800000) {                                              // below 2^-14: a multiple of 2^-24
    const float scaled = std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(scaled));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
uint16_t round_to(float value) {
  return std::is_same_v<T, BFloat16> ? float_to_bf16(value) : float_to_fp16(value);
}

template <class T>
float widen(uint16_t bits) {
  return std::is_same_v<T, BFloat16> ? std::bit_cast<float>(uint32_t{bits} << 16) : fp16_to_float(bits);
}

// Element `i` (0 or 1) of a register.
template <class T>
float element(uint32_t packed, int i) {
  return widen<T>(static_cast<uint16_t>(packed >> 16 * i));
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace model

template <class T>
uint32_t pack(float low, float high) {
  return uint32_t{model::round_to<T>(low)} | uint32_t{model::round_to<T>(high)} << 16;
}

template <class T>
float to_float(T value) {
  return model::widen<T>(value.bits);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) >= 0x7f800000) return bits;
  return (bits + 0x1000) & ~0x1fffu;  // ten bits of fraction
}

inline float exp2(float x) { return model::flush(std::exp2(model::flush(x))); }
inline float log2(float x) { return std::log2(model::flush(x)); }
inline int64_t unhoisted(int64_t x) { return x; }
inline int unhoisted(int x) { return x; }
template <int kCount>
void keep(float (&)[kCount]) {}

// ---- Matrix products of one warp ----------------------------------------------------------------------------------

namespace model {

// The tensor cores add the exact products of an instruction in an order and precision that NVIDIA does not
// document; here in double, rounded to fp32 once.
struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};

template <class T>
void mma_m16n8k16(Mma* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int reg = i / 2, row = g + 8 * (reg % 2), col = 2 * t + i % 2 + 8 * (reg / 2);
      a[row][col] = element<T>(lanes[lane]->a[reg], i % 2);
    }
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + 8 * (i / 2)][g] = element<T>(lanes[lane]->b[i / 2], i % 2);
  }
  double sum[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < 8; ++col) sum[row][col] += double{a[row][k]} * double{b[k][col]};
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      lanes[lane]->d[i] = static_cast<float>(lanes[lane]->c[i] + sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
}

inline void mma_m16n8k8_tf32(Mma* const* lanes) {
  float a[16][8], b[8][8];
  const auto tf32 = [](uint32_t bits) {
    return std::bit_cast<float>(bits & ~0x1fffu);
  };  // the unit ignores the low bits
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(lanes[lane]->a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32(lanes[lane]->b[i]);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      double sum = lanes[lane]->c[i];
      for (int k = 0; k < 8; ++k) sum += double{a[lane / 4 + 8 * (i / 2)][k]} * double{b[k][2 * (lane % 4) + i % 2]};
      lanes[lane]->d[i] = static_cast<float>(sum);
    }
}

}  // namespace model

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                  Where where = Where::current()) {
  model::Mma mine{d, a, b, c};
  cuda_host::warp_collective("mma.sync", ~0u, mine, where, model::mma_m16n8k16<T>);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                             Where where = Where::current()) {
  model::Mma mine{d, a, b, c};
  cuda_host::warp_collective("mma.sync tf32", ~0u, mine, where, model::mma_m16n8k8_tf32);
}

// ---- Fragments from and to shared memory --------------------------------------------------------------------------

namespace model {

struct Matrix {
  uint16_t* row;
  uint32_t* r;
};

inline uint16_t* checked_row(const void* row, const char* what, Where where) {
  cuda_host::current->block->shared_address(row, what);
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    cuda_host::fail(std::string(what) + ": the row is not 16-byte aligned", where);
  return static_cast<uint16_t*>(const_cast<void*>(row));
}

// Elements of matrix i that lane (g, t) holds: (g, 2t + e), or (2t + e, g) transposed.
template <bool kTrans, bool kStore>
void move_matrices(Matrix* const* lanes) {
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 2; ++e) {
        const int major = lane / 4, minor = 2 * (lane % 4) + e;
        uint16_t& shared = lanes[8 * i + (kTrans ? minor : major)]->row[kTrans ? major : minor];
        uint32_t& packed = lanes[lane]->r[i];
        if constexpr (kStore)
          shared = static_cast<uint16_t>(packed >> 16 * e);
        else
          packed = (packed & ~(0xffffu << 16 * e)) | uint32_t{shared} << 16 * e;
      }
}

}  // namespace model

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Where where = Where::current()) {
  model::Matrix mine{model::checked_row(shared_row, "ldmatrix", where), r};
  cuda_host::warp_collective("ldmatrix", ~0u, mine, where, model::move_matrices<false, false>);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Where where = Where::current()) {
  model::Matrix mine{model::checked_row(shared_row, "ldmatrix.trans", where), r};
  cuda_host::warp_collective("ldmatrix.trans", ~0u, mine, where, model::move_matrices<true, false>);
}
inline void stmatrix_x4(void* shared_row, const uint32_t (&r)[4], Where where = Where::current()) {
  model::Matrix mine{model::checked_row(shared_row, "stmatrix", where), const_cast<uint32_t*>(r)};
  cuda_host::warp_collective("stmatrix", ~0u, mine, where, model::move_matrices<false, true>);
}
inline void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4], Where where = Where::current()) {
  model::Matrix mine{model::checked_row(shared_row, "stmatrix.trans", where), const_cast<uint32_t*>(r)};
  cuda_host::warp_collective("stmatrix.trans", ~0u, mine, where, model::move_matrices<true, true>);
}

// ---- Asynchronous copies of one thread (generic proxy) ------------------------------------------------------------

namespace model {

struct CpAsync final : cuda_host::Async {
  std::byte* shared;
  const void* global;
  unsigned bytes, size;
  void effect() override {
    std::memcpy(shared, global, bytes);
    std::memset(shared + bytes, 0, size - bytes);
  }
  void poison() override { std::memset(shared, 0xff, size); }
  const char* at_exit() const override { return "while a cp.async was in flight"; }
};

inline void cp_async(void* shared, const void* global, unsigned bytes, unsigned size, Where where) {
  cuda_host::Block& block = *cuda_host::current->block;
  block.shared_pointer(block.shared_address(shared, "cp.async"), size, "cp.async");
  if (reinterpret_cast<std::uintptr_t>(shared) % size != 0 || reinterpret_cast<std::uintptr_t>(global) % size != 0)
    cuda_host::fail("cp.async: an address is not aligned to its " + std::to_string(size) + " bytes", where);
  if (bytes > size) cuda_host::fail("cp.async: more bytes than its size", where);
  auto copy = std::make_shared<CpAsync>();
  copy->shared = static_cast<std::byte*>(shared), copy->global = global, copy->bytes = bytes, copy->size = size;
  cuda_host::current->cp_async.groups.back().push_back(copy);
  block.issue(copy);
}

inline void commit(cuda_host::CopyGroups& copies) { copies.groups.emplace_back(); }

// The operations of all but the `pending` newest closed groups; they leave the list when `remove`.
template <class F>
void oldest(cuda_host::CopyGroups& copies, int pending, bool remove, F finish) {
  const std::size_t closed = copies.groups.size() - 1;
  const std::size_t done = closed > static_cast<std::size_t>(pending) ? closed - pending : 0;
  for (std::size_t i = 0; i < done; ++i)
    for (const auto& operation : copies.groups[i]) finish(*operation);
  if (remove) copies.groups.erase(copies.groups.begin(), copies.groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace model

inline void cp_async_16(void* shared, const void* global, unsigned bytes = 16, Where where = Where::current()) {
  model::cp_async(shared, global, bytes, 16, where);
}
template <int kBytes>
void cp_async_small(void* shared, const void* global, unsigned bytes = kBytes, Where where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8);
  model::cp_async(shared, global, bytes, kBytes, where);
}
inline void cp_async_commit() { model::commit(cuda_host::current->cp_async); }
template <int kPending>
void cp_async_wait() {
  cuda_host::Block& block = *cuda_host::current->block;
  model::oldest(cuda_host::current->cp_async, kPending, true, [&](cuda_host::Async& copy) { block.complete(copy); });
  cuda_host::maybe_yield();
}

// ---- Barriers and fences ------------------------------------------------------------------------------------------

inline void named_barrier_sync(unsigned id, unsigned threads, Where where = Where::current()) {
  cuda_host::barrier_sync(id, threads, false, where);
}
inline void named_barrier_arrive(unsigned id, unsigned threads, Where where = Where::current()) {
  cuda_host::barrier_arrive(id, threads, where);
}

inline bool elect_one(Where where = Where::current()) {
  int nothing = 0;
  cuda_host::warp_collective("elect.sync", ~0u, nothing, where, [](int* const*) {});
  return cuda_host::current->lane() == cuda_host::seed() % 32;
}

inline void mbarrier_init(uint64_t* shared_barrier, unsigned arrivals, Where where = Where::current()) {
  cuda_host::Block& block = *cuda_host::current->block;
  block.shared_pointer(block.shared_address(shared_barrier, "mbarrier.init"), 8, "mbarrier.init");
  if (arrivals == 0 || arrivals >= 1u << 20) cuda_host::fail("mbarrier.init: the count must be 1 to 2^20 - 1", where);
  if (block.mbarriers.count(shared_barrier)) cuda_host::fail("mbarrier.init: initialised already", where);
  cuda_host::MBarrier& barrier = block.mbarriers[shared_barrier];
  barrier.count = arrivals, barrier.pending = static_cast<int>(arrivals);
  *shared_barrier = 0;
}

inline void mbarrier_arrive(uint64_t* shared_barrier, Where where = Where::current()) {
  cuda_host::mbarrier_update(cuda_host::mbarrier_at(shared_barrier, where), 1, 0);
  cuda_host::maybe_yield();
}

inline void mbarrier_arrive_expect_tx(uint64_t* shared_barrier, unsigned bytes, Where where = Where::current()) {
  cuda_host::MBarrier& barrier = cuda_host::mbarrier_at(shared_barrier, where);
  if (barrier.bytes + bytes >= 1 << 20) cuda_host::fail("mbarrier: more than 2^20 - 1 bytes expected", where);
  cuda_host::mbarrier_update(barrier, 1, bytes);
  cuda_host::maybe_yield();
}

inline bool mbarrier_try_wait(uint64_t* shared_barrier, unsigned parity, Where where = Where::current()) {
  cuda_host::MBarrier& barrier = cuda_host::mbarrier_at(shared_barrier, where);
  cuda_host::maybe_yield();
  if (parity > 1) cuda_host::fail("mbarrier.try_wait: parity must be 0 or 1", where);
  if ((barrier.phase & 1) != parity) return true;
  barrier.waiting.push_back(cuda_host::current);
  cuda_host::wait("mbarrier", where, -1, &barrier);
  // Between the wake-up and now the next phase may have ended too: that is the same as having given up too early.
  return (barrier.phase & 1) != parity;
}

inline void mbarrier_wait(uint64_t* shared_barrier, unsigned parity, Where where = Where::current()) {
  while (!mbarrier_try_wait(shared_barrier, parity, where)) {
  }
}

inline void fence_mbarrier_init() {
  for (auto& [object, barrier] : cuda_host::current->block->mbarriers) barrier.fenced = true;
}
inline void fence_proxy_async() {
  cuda_host::current->block->proxy_fence();
  cuda_host::maybe_yield();
}

// ---- TMA and bulk copies ------------------------------------------------------------------------------------------

namespace model {

inline unsigned swizzled(unsigned address, CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return address ^ (address >> 7 & 1) << 4;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return address ^ (address >> 7 & 3) << 4;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return address ^ (address >> 7 & 7) << 4;
    default:
      return address;
  }
}

inline unsigned swizzle_alignment(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 128 : 128u << static_cast<int>(swizzle);  // 256, 512, 1024
}

// A tile of a tensor: its box, its place, and its home in shared memory.
struct Tile {
  CUtensorMap map;
  int64_t at[5];
  cuda_host::Block* block;
  unsigned address, bytes;

  Tile(const CUtensorMap& map_, const void* shared, const int* coordinates, int rank, const char* what, Where where)
      : map(map_),
        block(cuda_host::current->block),
        address(block->shared_address(shared, what)),
        bytes(map.element_bytes) {
    if (static_cast<unsigned>(rank) != map.rank)
      cuda_host::fail(std::string(what) + ": the tensor map has another rank", where);
    for (int i = 0; i < rank; ++i) at[i] = coordinates[i], bytes *= map.box[i];
    block->shared_pointer(address, bytes, what);
    if (address % swizzle_alignment(map.swizzle) != 0)
      cuda_host::fail(std::string(what) + ": the shared tile is not aligned to " +
                          std::to_string(swizzle_alignment(map.swizzle)) + " bytes",
                      where);
  }

  // Calls element(global, shared) for each element of the box; global is null outside of the tensor.
  template <class F>
  void for_each(F element) const {
    const unsigned elements = bytes / map.element_bytes;
    for (unsigned i = 0; i < elements; ++i) {
      unsigned rest = i;
      bool inside = true;
      std::byte* global = map.base;
      for (unsigned axis = 0; axis < map.rank; ++axis) {
        const int64_t index = at[axis] + rest % map.box[axis];
        rest /= map.box[axis];
        inside = inside && index >= 0 && static_cast<uint64_t>(index) < map.size[axis];
        global += index * static_cast<int64_t>(map.stride[axis]);
      }
      element(inside ? global : nullptr, swizzled(address + i * map.element_bytes, map.swizzle) - address);
    }
  }
};

// Arrival of `bytes` from the async proxy.
inline void arrived(cuda_host::Block& block, uint64_t* barrier, unsigned bytes) {
  cuda_host::mbarrier_update(block.mbarriers.at(barrier), 0, -static_cast<int64_t>(bytes));
}

inline void check_barrier(uint64_t* barrier, const char* what, Where where) {
  if (!cuda_host::mbarrier_at(barrier, where).fenced)
    cuda_host::fail(std::string(what) + ": missing fence between mbarrier.init and its use by the async proxy",
                    where);
}

// Bytes written to shared memory by the async proxy are seen by both proxies.
inline void async_write(cuda_host::Block& block, std::byte* shared, const void* data, std::size_t bytes) {
  std::memcpy(shared, data, bytes);
  std::memcpy(block.async_view(shared), data, bytes);
}

struct TmaLoad final : cuda_host::Async {
  Tile tile;
  std::byte* shared;
  uint64_t* barrier;
  TmaLoad(const Tile& tile_, void* shared_, uint64_t* barrier_)
      : tile(tile_), shared(static_cast<std::byte*>(shared_)), barrier(barrier_) {}
  void effect() override {
    const std::byte zero[8] = {};
    tile.for_each([&](const std::byte* global, unsigned offset) {
      async_write(*tile.block, shared + offset, global != nullptr ? global : zero, tile.map.element_bytes);
    });
    arrived(*tile.block, barrier, tile.bytes);
  }
  void poison() override {
    std::memset(shared, 0xff, tile.bytes);
    std::memset(tile.block->async_view(shared), 0xff, tile.bytes);
  }
  const char* at_exit() const override { return "while a TMA load was in flight"; }
};

struct BulkLoad final : cuda_host::Async {
  cuda_host::Block* block;
  std::byte* shared;
  const void* global;
  unsigned bytes;
  uint64_t* barrier;
  void effect() override {
    async_write(*block, shared, global, bytes);
    arrived(*block, barrier, bytes);
  }
  void poison() override {
    std::memset(shared, 0xff, bytes);
    std::memset(block->async_view(shared), 0xff, bytes);
  }
  const char* at_exit() const override { return "while a bulk load was in flight"; }
};

// A store or reduction: first reads shared memory, later writes global memory.
struct Outgoing : cuda_host::Async {
  cuda_host::Block* block;
  const std::byte* shared;
  std::vector<std::byte> data;  // once read
  bool read = false;
  unsigned bytes;
  void read_shared() {
    if (read) return;
    const std::byte* view = block->async_view(shared);
    data.assign(view, view + bytes);
    read = true;
  }
  virtual void write_global() = 0;
  void effect() final {
    read_shared();
    write_global();
  }
  const char* at_exit() const final {
    return read ? nullptr : "while a bulk store had still to read its shared memory";
  }
};

inline void add(void* to, const void* value, CUtensorMapDataType dtype) {
  if (dtype == CU_TENSOR_MAP_DATA_TYPE_FLOAT32) {
    float a, b;
    std::memcpy(&a, to, 4), std::memcpy(&b, value, 4);
    a += b;
    std::memcpy(to, &a, 4);
    return;
  }
  uint16_t a, b;
  std::memcpy(&a, to, 2), std::memcpy(&b, value, 2);
  a = dtype == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? float_to_bf16(widen<BFloat16>(a) + widen<BFloat16>(b))
                                                : float_to_fp16(fp16_to_float(a) + fp16_to_float(b));
  std::memcpy(to, &a, 2);
}

struct TmaStore final : Outgoing {
  Tile tile;
  bool reduce;
  TmaStore(const Tile& tile_, const void* shared_, bool reduce_) : tile(tile_), reduce(reduce_) {
    block = tile.block, shared = static_cast<const std::byte*>(shared_), bytes = tile.bytes;
  }
  void write_global() override {
    tile.for_each([&](std::byte* global, unsigned offset) {
      if (global == nullptr) return;
      if (reduce)
        add(global, data.data() + offset, tile.map.dtype);
      else
        std::memcpy(global, data.data() + offset, tile.map.element_bytes);
    });
  }
};

struct BulkStore final : Outgoing {
  std::byte* global;
  bool reduce;
  void write_global() override {
    if (!reduce) std::memcpy(global, data.data(), bytes);
    for (unsigned i = 0; reduce && i < bytes; i += 4)
      add(global + i, data.data() + i, CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
  }
};

inline void check_bulk(const void* shared, const void* global, unsigned bytes, const char* what, Where where) {
  cuda_host::Block& block = *cuda_host::current->block;
  block.shared_pointer(block.shared_address(shared, what), bytes, what);
  if (bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
    cuda_host::fail(std::string(what) + ": addresses and size must be multiples of 16 bytes", where);
}

template <class Operation>
void send(const std::shared_ptr<Operation>& operation) {
  cuda_host::current->bulk.groups.back().push_back(operation);
  cuda_host::current->block->issue(operation);
  cuda_host::maybe_yield();
}

}  // namespace model

// The coordinates come last in the real wrappers, so these take no place of the call.

inline void tma_prefetch(const CUtensorMap*) {}

template <class... Coordinates>
void tma_load(void* shared, const CUtensorMap* map, uint64_t* shared_barrier, Coordinates... coordinates) {
  const Where where = Where::current();
  const int c[] = {static_cast<int>(coordinates)...};
  model::check_barrier(shared_barrier, "TMA load", where);
  const model::Tile tile(*map, shared, c, sizeof...(Coordinates), "TMA load", where);
  cuda_host::current->block->issue(std::make_shared<model::TmaLoad>(tile, shared, shared_barrier));
  cuda_host::maybe_yield();
}

template <class... Coordinates>
void tma_store(const CUtensorMap* map, const void* shared, Coordinates... coordinates) {
  const int c[] = {static_cast<int>(coordinates)...};
  const model::Tile tile(*map, shared, c, sizeof...(Coordinates), "TMA store", Where::current());
  model::send(std::make_shared<model::TmaStore>(tile, shared, false));
}

template <class... Coordinates>
void tma_reduce_add(const CUtensorMap* map, const void* shared, Coordinates... coordinates) {
  const int c[] = {static_cast<int>(coordinates)...};
  const model::Tile tile(*map, shared, c, sizeof...(Coordinates), "TMA reduction", Where::current());
  model::send(std::make_shared<model::TmaStore>(tile, shared, true));
}

inline void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* shared_barrier,
                      Where where = Where::current()) {
  model::check_barrier(shared_barrier, "bulk load", where);
  model::check_bulk(shared, global, bytes, "bulk load", where);
  auto load = std::make_shared<model::BulkLoad>();
  load->block = cuda_host::current->block, load->shared = static_cast<std::byte*>(shared), load->global = global;
  load->bytes = bytes, load->barrier = shared_barrier;
  cuda_host::current->block->issue(load);
  cuda_host::maybe_yield();
}

inline void bulk_store(void* global, const void* shared, unsigned bytes, Where where = Where::current()) {
  model::check_bulk(shared, global, bytes, "bulk store", where);
  auto store = std::make_shared<model::BulkStore>();
  store->block = cuda_host::current->block, store->shared = static_cast<const std::byte*>(shared),
  store->bytes = bytes;
  store->global = static_cast<std::byte*>(global), store->reduce = false;
  model::send(store);
}

inline void bulk_reduce_add(float* global, const float* shared, unsigned bytes, Where where = Where::current()) {
  model::check_bulk(shared, global, bytes, "bulk reduction", where);
  auto store = std::make_shared<model::BulkStore>();
  store->block = cuda_host::current->block, store->shared = reinterpret_cast<const std::byte*>(shared),
  store->bytes = bytes;
  store->global = reinterpret_cast<std::byte*>(global), store->reduce = true;
  model::send(store);
}

inline void bulk_commit() { model::commit(cuda_host::current->bulk); }

template <int kPending>
void bulk_wait() {
  cuda_host::Block& block = *cuda_host::current->block;
  model::oldest(cuda_host::current->bulk, kPending, true, [&](cuda_host::Async& store) { block.complete(store); });
  cuda_host::maybe_yield();
}

template <int kPending>
void bulk_wait_read() {
  model::oldest(cuda_host::current->bulk, kPending, false,
                [](cuda_host::Async& store) { static_cast<model::Outgoing&>(store).read_shared(); });
  cuda_host::maybe_yield();
}

// ---- Sums and turns in global memory ------------------------------------------------------------------------------

inline void reduce_add(float4* global, float4 value) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
    cuda_host::fail("reduction: the address is not aligned to 16 bytes");
  global->x += value.x, global->y += value.y, global->z += value.z, global->w += value.w;
}

inline void semaphore_add(unsigned* global, unsigned count) {
  *global += count;
  cuda_host::semaphore_changed(global);
  cuda_host::maybe_yield();
}

inline void semaphore_wait(const unsigned* global, unsigned count, Where where = Where::current()) {
  cuda_host::maybe_yield();
  while (*global < count) cuda_host::wait_for_semaphore(global, where);
}

// ---- Matrix products of a warpgroup -------------------------------------------------------------------------------

namespace model {

constexpr unsigned kSwizzleWidth[] = {16, 128, 64, 32};  // bytes of a row, by the descriptor's mode
constexpr CUtensorMapSwizzle kSwizzleMode[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};

// A matrix operand in shared memory as its descriptor tells it.
struct Operand {
  cuda_host::Block* block;
  unsigned start, leading, stride, mode;
  bool mn_major;

  Operand(cuda_host::Block* block_, uint64_t descriptor, bool mn_major_, Where where)
      : block(block_),
        start(static_cast<unsigned>(descriptor & 0x3fff) << 4),
        leading(static_cast<unsigned>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<unsigned>(descriptor >> 32 & 0x3fff) << 4),
        mode(static_cast<unsigned>(descriptor >> 62)),
        mn_major(mn_major_) {
    // The base offset field is 0, so the swizzle's pattern must start at an address it repeats at.
    if ((start >> 7) % (kSwizzleWidth[mode] / 16) != 0)
      cuda_host::fail("wgmma: the operand's swizzle pattern does not start at a multiple of its size", where);
  }

  // Shared address of element (row, k), row along M or N.
  unsigned address(unsigned row, unsigned k) const {
    const unsigned width = kSwizzleWidth[mode];
    unsigned offset;
    if (!mn_major) {
      offset = row % 8 * width + row / 8 * stride + (mode == 0 ? k / 8 * leading : k / 8 * 16) + k % 8 * 2;
    } else if (mode == 0) {
      offset = row / 8 * stride + k % 8 * 16 + k / 8 * leading + row % 8 * 2;
    } else {
      const unsigned chunk = row / 8, chunks = width / 16;
      offset = chunk % chunks * 16 + chunk / chunks * leading + k % 8 * width + k / 8 * stride + row % 8 * 2;
    }
    return swizzled(start + offset, kSwizzleMode[mode]);
  }

  template <class T>
  float at(unsigned row, unsigned k) const {
    const std::byte* byte = block->async_view(block->shared_pointer(address(row, k), 2, "wgmma"));
    uint16_t bits;
    std::memcpy(&bits, byte, 2);
    return widen<T>(bits);
  }
};

struct WgmmaLane {
  float* d;
  const uint32_t* a;
};

struct WgmmaBase : cuda_host::Async {
  cuda_host::Warpgroup* group;
  WgmmaLane lanes[cuda_host::kWarpgroup];
};

template <class T, int N>
struct Wgmma final : WgmmaBase {
  std::vector<float> kept;        // accumulators while they are poisoned
  std::shared_ptr<Operand> a, b;  // a is null when it is in registers
  bool accumulate;
  void effect() override {
    // In order of issue: what the warpgroup issued before this comes first.
    while (group->open.front().get() != this) {
      const std::shared_ptr<cuda_host::Async> earlier = group->open.front();
      cuda_host::Block* block = b->block;
      block->complete(*earlier);
    }
    group->open.pop_front();
    for (std::size_t i = 0; i < kept.size(); ++i) lanes[i / (N / 2)].d[i % (N / 2)] = kept[i];
    float a_values[64][16], b_values[16][N];
    for (unsigned lane = 0; a == nullptr && lane < cuda_host::kWarpgroup; ++lane)
      for (unsigned i = 0; i < 8; ++i) {
        const unsigned reg = i / 2, g = lane % 32 / 4, t = lane % 4;
        a_values[lane / 32 * 16 + g + 8 * (reg % 2)][2 * t + i % 2 + 8 * (reg / 2)] =
            element<T>(lanes[lane].a[reg], static_cast<int>(i % 2));
      }
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned row = 0; a != nullptr && row < 64; ++row) a_values[row][k] = a->template at<T>(row, k);
      for (unsigned col = 0; col < N; ++col) b_values[k][col] = b->template at<T>(col, k);
    }
    for (unsigned lane = 0; lane < cuda_host::kWarpgroup; ++lane)
      for (unsigned i = 0; i < N / 2; ++i) {
        const unsigned row = lane / 32 * 16 + lane % 32 / 4 + 8 * (i / 2 % 2),
                       col = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        double sum = accumulate ? double{lanes[lane].d[i]} : 0.0;
        for (unsigned k = 0; k < 16; ++k) sum += double{a_values[row][k]} * double{b_values[k][col]};
        lanes[lane].d[i] = static_cast<float>(sum);
      }
  }
  void poison() override {
    // Accumulators that an earlier wgmma has yet to write are poisoned already.
    for (const auto& other : group->open)
      if (other.get() != this && static_cast<const WgmmaBase&>(*other).lanes[0].d == lanes[0].d) return;
    for (const WgmmaLane& lane : lanes) {
      kept.insert(kept.end(), lane.d, lane.d + N / 2);
      std::memset(lane.d, 0xff, N / 2 * sizeof(float));
    }
  }
  const char* at_exit() const override { return "while a wgmma was in flight"; }
};

inline cuda_host::Warpgroup& warpgroup() {
  return cuda_host::current->block->warpgroups[cuda_host::current->linear / cuda_host::kWarpgroup];
}

struct WgmmaArgument {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

template <class T, int N, bool kTransA, bool kTransB>
void wgmma(WgmmaArgument mine, Where where) {
  cuda_host::warpgroup_collective("wgmma.mma_async", mine, where, [where](WgmmaArgument* const* lanes) {
    cuda_host::Warpgroup& group = warpgroup();
    cuda_host::Block* block = cuda_host::current->block;
    // Stricter than PTX, which allows accumulators that were not touched in between.
    if (!group.fenced) cuda_host::fail("wgmma without wgmma.fence since the last wait", where);
    auto operation = std::make_shared<Wgmma<T, N>>();
    operation->group = &group;
    for (unsigned i = 0; i < cuda_host::kWarpgroup; ++i) {
      operation->lanes[i] = {lanes[i]->d, lanes[i]->a};
      if (lanes[i]->a_descriptor != lanes[0]->a_descriptor || lanes[i]->b_descriptor != lanes[0]->b_descriptor ||
          lanes[i]->accumulate != lanes[0]->accumulate)
        cuda_host::fail("wgmma: the lanes of a warpgroup disagree on a descriptor or on accumulate", where);
    }
    if (lanes[0]->a == nullptr)
      operation->a = std::make_shared<Operand>(block, lanes[0]->a_descriptor, kTransA, where);
    operation->b = std::make_shared<Operand>(block, lanes[0]->b_descriptor, kTransB, where);
    operation->accumulate = lanes[0]->accumulate;
    group.open.push_back(operation);
    if (group.groups.empty()) group.groups.emplace_back();
    group.groups.back().push_back(operation);
    block->issue(operation);
  });
}

}  // namespace model

inline uint64_t wgmma_descriptor(const void* shared, Swizzle swizzle, unsigned leading, unsigned stride) {
  constexpr uint64_t kMode[] = {0, 3, 2, 1};
  const unsigned address = cuda_host::current->block->shared_address(shared, "wgmma descriptor");
  return (uint64_t{address & 0x3ffff} >> 4) | (uint64_t{(leading & 0x3ffff) >> 4} << 16) |
         (uint64_t{(stride & 0x3ffff) >> 4} << 32) | (kMode[static_cast<int>(swizzle)] << 62);
}

inline void wgmma_fence(Where where = Where::current()) {
  int nothing = 0;
  cuda_host::warpgroup_collective("wgmma.fence", nothing, where,
                                  [](int* const*) { model::warpgroup().fenced = true; });
}

inline void wgmma_commit(Where where = Where::current()) {
  int nothing = 0;
  cuda_host::warpgroup_collective("wgmma.commit_group", nothing, where, [](int* const*) {
    auto& groups = model::warpgroup().groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
  });
}

template <int kPending>
void wgmma_wait(Where where = Where::current()) {
  int nothing = 0;
  cuda_host::warpgroup_collective("wgmma.wait_group", nothing, where, [](int* const*) {
    auto& groups = model::warpgroup().groups;
    while (groups.size() > kPending + 1) {
      for (const auto& operation : groups.front()) cuda_host::current->block->complete(*operation);
      groups.pop_front();
    }
    model::warpgroup().fenced = false;
  });
}

template <int kCount>
void wgmma_hold(float (&)[kCount]) {}

template <class T, int N, bool kTransA = false, bool kTransB = false>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Where where = Where::current()) {
  model::wgmma<T, N, kTransA, kTransB>({d, nullptr, a, b, accumulate}, where);
}

template <class T, int N, bool kTransB = false>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              Where where = Where::current()) {
  model::wgmma<T, N, false, kTransB>({d, a, 0, b, accumulate}, where);
}

template <int kRegisters>
void setmaxnreg_decrease(Where where = Where::current()) {
  int nothing = 0;
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  cuda_host::warpgroup_collective("setmaxnreg", nothing, where, [](int* const*) {});
}

template <int kRegisters>
void setmaxnreg_increase(Where where = Where::current()) {
  setmaxnreg_decrease<kRegisters>(where);
}

}  // namespace pykernels::cuda::ptx
