// wgmma.mma_async for each tile width: included by ptx.cuh only.
//
// d [64, N] += a [64, 16] b [16, N] (or = with accumulate false), T bf16 or fp16, accumulated in fp32. Warp w of
// the warpgroup holds rows 16 w to 16 w + 15 of d: register 4 j + i of lane (g, t) is what mma_m16n8k16's d[i] is
// for columns 8 j to 8 j + 7. wgmma_ss takes both operands from shared memory, wgmma_rs takes a from registers,
// laid out as for mma_m16n8k16. kTransA, kTransB: the operand in shared memory is MN-major instead of K-major.
#pragma once

namespace pykernels::cuda::ptx {

template <class T, int N>
struct Wgmma;

template <class T, int N, bool kTransA = false, bool kTransB = false>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T, N>::template ss<kTransA, kTransB>(d, a, b, accumulate);
}

template <class T, int N, bool kTransB = false>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<T, N>::template rs<kTransB>(d, a, b, accumulate);
}

// Sixteen registers: their places in the instruction and in the array.
#define PYKERNELS_R(i) "+f"(d[i])
#define PYKERNELS_R16(i)                                                                                       \
  PYKERNELS_R(i), PYKERNELS_R(i + 1), PYKERNELS_R(i + 2), PYKERNELS_R(i + 3), PYKERNELS_R(i + 4),              \
      PYKERNELS_R(i + 5), PYKERNELS_R(i + 6), PYKERNELS_R(i + 7), PYKERNELS_R(i + 8), PYKERNELS_R(i + 9),      \
      PYKERNELS_R(i + 10), PYKERNELS_R(i + 11), PYKERNELS_R(i + 12), PYKERNELS_R(i + 13), PYKERNELS_R(i + 14), \
      PYKERNELS_R(i + 15)
#define PYKERNELS_S0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PYKERNELS_S16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PYKERNELS_S32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PYKERNELS_S48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PYKERNELS_S64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define PYKERNELS_S80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PYKERNELS_S96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define PYKERNELS_S112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// Eight more, where N is no multiple of 32.
#define PYKERNELS_R8(i)                                                                                   \
  PYKERNELS_R(i), PYKERNELS_R(i + 1), PYKERNELS_R(i + 2), PYKERNELS_R(i + 3), PYKERNELS_R(i + 4),         \
      PYKERNELS_R(i + 5), PYKERNELS_R(i + 6), PYKERNELS_R(i + 7)
#define PYKERNELS_HALF_S32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define PYKERNELS_HALF_S48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define PYKERNELS_HALF_S80 ",%80,%81,%82,%83,%84,%85,%86,%87"

// For N columns of D_TYPE: the registers, and the numbers of the operands that follow them.
#define PYKERNELS_WGMMA(TYPE, NAME, N, STRINGS, REGISTERS, P0, P1, P2, P3, P4, P5, P6)                             \
  template <>                                                                                                      \
  struct Wgmma<TYPE, N> {                                                                                          \
    template <bool kTransA, bool kTransB>                                                                          \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {        \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " P2 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N          \
                   "k16.f32." NAME "." NAME " {" STRINGS "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}"          \
                   : REGISTERS                                                                                     \
                   : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{kTransA}), "n"(int{kTransB}));                  \
    }                                                                                                              \
    template <bool kTransB>                                                                                        \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,               \
                                              bool accumulate) {                                                   \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " P5 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N          \
                   "k16.f32." NAME "." NAME " {" STRINGS "}, {" P0 "," P1 "," P2 "," P3 "}, " P4 ", p, 1, 1, " P6  \
                   ";\n}"                                                                                          \
                   : REGISTERS                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(int{kTransB})); \
    }                                                                                                              \
  };
#define PYKERNELS_LIST(...) __VA_ARGS__
#define PYKERNELS_WGMMA_WIDTHS(TYPE, NAME)                                                                          \
  PYKERNELS_WGMMA(TYPE, NAME, 32, PYKERNELS_S0, PYKERNELS_R16(0), "%16", "%17", "%18", "%19", "%20", "%21", "%22")  \
  PYKERNELS_WGMMA(TYPE, NAME, 64, PYKERNELS_S0 PYKERNELS_S16, PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16)),  \
                  "%32", "%33", "%34", "%35", "%36", "%37", "%38")                                                  \
  PYKERNELS_WGMMA(TYPE, NAME, 80, PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_HALF_S32,                                    \
                  PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R8(32)), "%40", "%41", "%42",       \
                  "%43", "%44", "%45", "%46")                                                                       \
  PYKERNELS_WGMMA(TYPE, NAME, 96, PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32,                                         \
                  PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32)), "%48", "%49", "%50",      \
                  "%51", "%52", "%53", "%54")                                                                       \
  PYKERNELS_WGMMA(TYPE, NAME, 112, PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32 PYKERNELS_HALF_S48,                     \
                  PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32), PYKERNELS_R8(48)), "%56",  \
                  "%57", "%58", "%59", "%60", "%61", "%62")                                                         \
  PYKERNELS_WGMMA(TYPE, NAME, 128, PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32 PYKERNELS_S48,                          \
                  PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32), PYKERNELS_R16(48)), "%64", \
                  "%65", "%66", "%67", "%68", "%69", "%70")                                                         \
  PYKERNELS_WGMMA(                                                                                                  \
      TYPE, NAME, 160, PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32 PYKERNELS_S48 PYKERNELS_S64,                        \
      PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32), PYKERNELS_R16(48), PYKERNELS_R16(64)), \
      "%80", "%81", "%82", "%83", "%84", "%85", "%86")                                                              \
  PYKERNELS_WGMMA(                                                                                                  \
      TYPE, NAME, 176, PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32 PYKERNELS_S48 PYKERNELS_S64 PYKERNELS_HALF_S80,     \
      PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32), PYKERNELS_R16(48), PYKERNELS_R16(64),  \
                     PYKERNELS_R8(80)),                                                                             \
      "%88", "%89", "%90", "%91", "%92", "%93", "%94")                                                              \
  PYKERNELS_WGMMA(TYPE, NAME, 192,                                                                                  \
                  PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32 PYKERNELS_S48 PYKERNELS_S64 PYKERNELS_S80,               \
                  PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32), PYKERNELS_R16(48),         \
                                 PYKERNELS_R16(64), PYKERNELS_R16(80)),                                             \
                  "%96", "%97", "%98", "%99", "%100", "%101", "%102")                                               \
  PYKERNELS_WGMMA(TYPE, NAME, 256,                                                                                  \
                  PYKERNELS_S0 PYKERNELS_S16 PYKERNELS_S32 PYKERNELS_S48 PYKERNELS_S64 PYKERNELS_S80 PYKERNELS_S96  \
                      PYKERNELS_S112,                                                                               \
                  PYKERNELS_LIST(PYKERNELS_R16(0), PYKERNELS_R16(16), PYKERNELS_R16(32), PYKERNELS_R16(48),         \
                                 PYKERNELS_R16(64), PYKERNELS_R16(80), PYKERNELS_R16(96), PYKERNELS_R16(112)),      \
                  "%128", "%129", "%130", "%131", "%132", "%133", "%134")

PYKERNELS_WGMMA_WIDTHS(BFloat16, "bf16")
PYKERNELS_WGMMA_WIDTHS(Float16, "f16")

#undef PYKERNELS_WGMMA_WIDTHS
#undef PYKERNELS_LIST
#undef PYKERNELS_WGMMA
#undef PYKERNELS_HALF_S80
#undef PYKERNELS_HALF_S48
#undef PYKERNELS_HALF_S32
#undef PYKERNELS_R8
#undef PYKERNELS_S112
#undef PYKERNELS_S96
#undef PYKERNELS_S80
#undef PYKERNELS_S64
#undef PYKERNELS_S48
#undef PYKERNELS_S32
#undef PYKERNELS_S16
#undef PYKERNELS_S0
#undef PYKERNELS_R16
#undef PYKERNELS_R

}  // namespace pykernels::cuda::ptx
