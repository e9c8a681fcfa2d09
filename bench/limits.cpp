// What one core of this machine can do, for bench/limits.py: compiled with -march=native when the benchmarks start.
//
// Each arithmetic function runs `iterations` rounds of independent instructions, enough of them in flight to hide
// their latency, and returns the floating-point operations it did (a multiply-add is two), or 0 when the machine has
// no such unit. The caller runs one call per thread and takes the time.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int kLanes = VECTOR_BYTES / sizeof(float);

// Keeps a result from being optimised away.
static volatile float sink;

// Chains that start alike would be computed as one: here the compiler takes them to differ.
template <class V, int N>
static inline void make_distinct(V (&chains)[N]) {
  for (V& chain : chains) asm volatile("" : "+m"(chain));
}

extern "C" {

int vector_bits() { return VECTOR_BYTES * 8; }

double fp32_fma(int64_t iterations) {
  constexpr int kChains = 12;  // covers a latency of 4 to 6 cycles at two instructions a cycle
  Vector acc[kChains] = {};
  make_distinct(acc);
  Vector a, b;
  for (int i = 0; i < kLanes; ++i) a[i] = 0.5f, b[i] = 1.0f;
  asm volatile("" : "+m"(a), "+m"(b));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) acc[j] = acc[j] * a + b;  // contracted to one instruction where there is one
  }
  float total = 0;
  for (int j = 0; j < kChains; ++j) total += acc[j][0];
  sink = total;
  return double(iterations) * kChains * kLanes * 2;
}

double bf16_dot(int64_t iterations) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  constexpr int kChains = 12;
  __m512 acc[kChains];
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
#pragma GCC unroll 12
  for (int j = 0; j < kChains; ++j) acc[j] = _mm512_setzero_ps();
  make_distinct(acc);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], ones, ones);
  }
  float total = 0;
#pragma GCC unroll 12
  for (int j = 0; j < kChains; ++j) total += _mm512_reduce_add_ps(acc[j]);
  sink = total;
  return double(iterations) * kChains * 32 * 2;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  constexpr int kChains = 12;
  float32x4_t acc[kChains] = {};
  make_distinct(acc);
  const bfloat16x8_t ones = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f80));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) acc[j] = vbfmmlaq_f32(acc[j], ones, ones);  // 2x4 by 4x2
  }
  float total = 0;
  for (int j = 0; j < kChains; ++j) total += vaddvq_f32(acc[j]);
  sink = total;
  return double(iterations) * kChains * 16 * 2;
#else
  (void)iterations;
  return 0;
#endif
}

double bf16_tile(int64_t iterations) {
#if defined(HAVE_TILES)
  // Linux grants the tile registers (state component 18) to a process that asks.
  if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) != 0) return 0;
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof(config) == 64);
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  // gcc's intrinsic claims to read only the first 8 bytes; this makes all of them be stored.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  // Numbers of either sign between 1/2 and 2, other ones for every product: zeros, or the same ones again, take less
  // power, and so the clock is higher than beneath anything that is computed (3.0 instead of 2.3 GHz on a Xeon).
  constexpr int kSteps = 4, kTile = 512;
  alignas(64) static uint16_t numbers[kSteps][4][kTile];
  uint32_t state = 1;
  for (auto& step : numbers)
    for (auto& tile : step)
      for (uint16_t& x : tile) state = state * 1664525u + 1013904223u, x = 0x3f00 | (state >> 16 & 0x80ff);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t n = 0; n < iterations; ++n) {  // the 2x2 block of tiles that a matrix kernel keeps
    const auto& step = numbers[n % kSteps];
    _tile_loadd(4, step[0], 64);
    _tile_loadd(6, step[1], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, step[2], 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, step[3], 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return double(iterations) * 4 * 16 * 16 * 32 * 2;
#else
  (void)iterations;
  return 0;
#endif
}

// Reads `bytes` (a multiple of 1024) from `source`.
void read_memory(const void* source, int64_t bytes) {
  constexpr int kChains = 8;
  Vector acc[kChains] = {};
  const Vector* p = static_cast<const Vector*>(source);
  for (int64_t i = 0; i < bytes / VECTOR_BYTES; i += kChains) {
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) acc[j] += p[i + j];
  }
  float total = 0;
  for (int j = 0; j < kChains; ++j) total += acc[j][0];
  sink = total;
}

// Copies past the caches where the machine has such stores, so that the destination is not read first.
void copy_memory(void* target, const void* source, int64_t bytes) {
#if defined(__AVX512F__)
  auto* to = static_cast<__m512i*>(target);
  auto* from = static_cast<const __m512i*>(source);
  for (int64_t i = 0; i < bytes / 64; ++i) _mm512_stream_si512(to + i, _mm512_load_si512(from + i));
  _mm_sfence();
#elif defined(__AVX__)
  auto* to = static_cast<__m256i*>(target);
  auto* from = static_cast<const __m256i*>(source);
  for (int64_t i = 0; i < bytes / 32; ++i) _mm256_stream_si256(to + i, _mm256_load_si256(from + i));
  _mm_sfence();
#else
  std::memcpy(target, source, bytes);
#endif
}

}  // extern "C"
