#include "dispatch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pykernels::cpu {
namespace {

#define PYKERNELS_ISA_NAME(isa, ...) #isa,
constexpr const char* kNames[] = {PYKERNELS_FOR_EACH_ISA(PYKERNELS_ISA_NAME, )};
#undef PYKERNELS_ISA_NAME
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#if defined(__x86_64__)
bool request_amx() {
  // Linux keeps the tile registers off until a process asks for them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
}
#endif

// Whether the processor, and the operating system for its registers, has what the ISA named `name` is compiled for.
bool machine_has(const char* name) {
  if (!std::strcmp(name, "baseline") || !std::strcmp(name, "neon")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!std::strcmp(name, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx512")) return avx512;
  // The byte permutes come with every bf16 unit but that of Cooper Lake.
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (!std::strcmp(name, "avx512_bf16")) return avx512_bf16;
  if (!std::strcmp(name, "amx")) {
    unsigned a, b, c, d;
    if (!avx512_bf16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    return (d & kAmxBf16) && (d & kAmxTile) && request_amx();
  }
#endif
  return false;
}

int index_of(const char* name) {
  for (int i = 0; i < kCount; ++i)
    if (!std::strcmp(kNames[i], name)) return i;
  return -1;
}

int detect() {
  if (const char* forced = std::getenv("PYKERNELS_ISA"); forced && *forced) {
    const int index = index_of(forced);
    if (index >= 0 && machine_has(forced)) return index;
    // A wrong name must not go unnoticed, and an instruction the machine lacks must not run.
    std::fprintf(stderr, "pykernels: PYKERNELS_ISA=%s is not %s; ignored\n", forced,
                 index < 0 ? "one of this build's instruction sets" : "supported by this machine");
  }
  for (int i = kCount - 1; i > 0; --i)
    if (machine_has(kNames[i])) return i;
  return 0;
}

// -1: not chosen yet. Racing first uses detect the same value.
std::atomic<int> active{-1};

}  // namespace

Isa active_isa() {
  int isa = active.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = detect();
    active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

}  // namespace pykernels::cpu

// Plain C entry points, reached from Python through ctypes.
#define PYKERNELS_EXPORT extern "C" __attribute__((visibility("default")))

PYKERNELS_EXPORT const char* pykernels_active_isa() {
  return pykernels::cpu::kNames[static_cast<int>(pykernels::cpu::active_isa())];
}

// Comma-separated, from least to most capable.
PYKERNELS_EXPORT const char* pykernels_built_isas() {
#define PYKERNELS_ISA_NAME(isa, ...) "," #isa
  return &PYKERNELS_FOR_EACH_ISA(PYKERNELS_ISA_NAME, )[1];
#undef PYKERNELS_ISA_NAME
}

PYKERNELS_EXPORT int pykernels_machine_has_isa(const char* name) {
  return pykernels::cpu::index_of(name) >= 0 && pykernels::cpu::machine_has(name);
}

// Returns 0, or -1 when the build or the machine lacks it.
PYKERNELS_EXPORT int pykernels_set_isa(const char* name) {
  if (!pykernels_machine_has_isa(name)) return -1;
  pykernels::cpu::active.store(pykernels::cpu::index_of(name), std::memory_order_relaxed);
  return 0;
}
