/* cuda.h: stands for the headers of CUDA where a .cu file is compiled by g++ or clang for the emulator.
 *
 * Only these words are there, with the meanings of the CUDA C++ Programming Guide. Threads, blocks and collectives are the engine's,
 * the functions of the runtime are in runtime.h, and what PTX has and C++ has not is in csrc/cuda/device.h.
 */
#ifndef PE_EMULATE_CUDA_H
#define PE_EMULATE_CUDA_H

#include <cmath>
#include <type_traits>

#include "../quants.h"
#include "engine.h"

/* -- the language ------------------------------------------------------------------------------------------------------------- */
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 : emu::Index3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : emu::Index3{x, y, z} {}
};

#define threadIdx (emu::self()->thread)
#define blockIdx (emu::self()->block->index)
#define blockDim (emu::self()->block->launch->block)
#define gridDim (emu::self()->block->launch->grid)

/* -- vectors ------------------------------------------------------------------------------------------------------------------- */
/* Assignment is one store of the whole, so that the checks see what the card does; a copy is one load by itself. */
#define EMU_WHOLE(V)                                                                       \
  V() = default;                                                                           \
  V(const V &) = default;                                                                  \
  __forceinline__ V &operator=(const V &o) {                                               \
    typedef unsigned char Whole __attribute__((vector_size(sizeof(V)), may_alias));        \
    *reinterpret_cast<Whole *>(this) = *reinterpret_cast<const Whole *>(&o);               \
    return *this;                                                                          \
  }
#define EMU_VECTORS(T, name)                                                                      \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; EMU_WHOLE(name##2) };                           \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; EMU_WHOLE(name##4) };                     \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; }                             \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(int, int) EMU_VECTORS(unsigned, uint) EMU_VECTORS(float, float)

/* -- numbers -------------------------------------------------------------------------------------------------------------------- */
namespace emu {
template <class To, class From> __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

/* The bits of a half, rounded to the nearest even. */
inline uint16_t float_to_half(float f) {
  const uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000u) return 0x7fff;                               /* the card's NaN */
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00);             /* 65520 and more */
  if (rest < 0x38800000u)                                              /* subnormal: adding 1/2 rounds at 2^-24 */
    return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13));
}
}  // namespace emu

struct half { uint16_t bits; };
struct alignas(4) half2 { half x, y; EMU_WHOLE(half2) };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; EMU_WHOLE(__nv_bfloat162) };
__forceinline__ float __half2float(half h) { return pe_f16_to_f32(h.bits); }
__forceinline__ half __float2half_rn(float f) { return {emu::float_to_half(f)}; }
__forceinline__ half __ushort_as_half(unsigned short bits) { return {bits}; }
__forceinline__ unsigned short __half_as_ushort(half h) { return h.bits; }
__forceinline__ half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
__forceinline__ float2 __half22float2(half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t bits = emu::bits_as<uint32_t>(f);
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000u ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
__forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
__forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

#define EMU_MIN_MAX(T)                                                \
  __forceinline__ constexpr T min(T a, T b) { return b < a ? b : a; } \
  __forceinline__ constexpr T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int) EMU_MIN_MAX(unsigned) EMU_MIN_MAX(long) EMU_MIN_MAX(unsigned long) EMU_MIN_MAX(long long) EMU_MIN_MAX(unsigned long long)
#define EMU_MIN_MAX_NAN(T) /* the other one where one is NaN */       \
  __forceinline__ T min(T a, T b) { return std::fmin(a, b); }         \
  __forceinline__ T max(T a, T b) { return std::fmax(a, b); }
EMU_MIN_MAX_NAN(float) EMU_MIN_MAX_NAN(double)

#define EMU_ROUNDED(name, operation) __forceinline__ float name(float a, float b) { return a operation b; }
EMU_ROUNDED(__fadd_rn, +) EMU_ROUNDED(__fsub_rn, -) EMU_ROUNDED(__fmul_rn, *) EMU_ROUNDED(__fdiv_rn, /)
__forceinline__ float __fsqrt_rn(float a) { return std::sqrt(a); }
__forceinline__ int __float2int_rn(float a) { return int(std::nearbyint(a)); }
#define EMU_BITS(name, To, From) __forceinline__ To name(From a) { return emu::bits_as<To>(a); }
EMU_BITS(__float_as_int, int, float) EMU_BITS(__float_as_uint, unsigned, float)
EMU_BITS(__int_as_float, float, int) EMU_BITS(__uint_as_float, float, unsigned)
__forceinline__ int __popc(unsigned a) { return __builtin_popcount(a); }
__forceinline__ int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
__forceinline__ int __ffs(int a) { return __builtin_ffs(a); }
__forceinline__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) { /* byte i: number (selector >> 4i) & 7 of b:a */
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = selector >> 4 * i & 15, byte = unsigned(both >> (pick & 7) * 8 & 0xff);
    out |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i; /* bit 3: its sign, eight times */
  }
  return out;
}
template <class T> __forceinline__ T __ldg(const T *at) { return emu::expect_constant(at, sizeof(T)), *at; }

/* -- threads together --------------------------------------------------------------------------------------------------------- */
__forceinline__ void __syncthreads() { emu::barrier("__syncthreads"); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { emu::collective("__syncwarp", mask, nullptr, nullptr, true); }
__forceinline__ void __threadfence() { emu::fence(); }

namespace emu {
template <class T> struct Exchange { T value; int from; T result; };

/* Programming Guide, "Warp shuffle functions": the value of a lane that does not take part is undefined; here it is an error. */
template <class T> void shuffle_all(void *const *deposits, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    auto *s = static_cast<Exchange<T> *>(deposits[lane]);
    if (!(mask >> s->from & 1)) fault(self()->site, "a shuffle in which lane %d reads lane %d, which does not take part", lane, s->from);
    s->result = static_cast<Exchange<T> *>(deposits[s->from])->value;
  }
}

inline void vote_all(void *const *deposits, uint32_t mask) {
  uint32_t all = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) all |= static_cast<Exchange<uint32_t> *>(deposits[__builtin_ctz(rest)])->value;
  for (uint32_t rest = mask; rest; rest &= rest - 1) static_cast<Exchange<uint32_t> *>(deposits[__builtin_ctz(rest)])->result = all;
}

template <class T> __forceinline__ T exchange(const char *word, unsigned mask, T value, int from, Combine combine) {
  Exchange<T> mine{value, from, value};
  collective(word, mask, &mine, combine);
  return mine.result;
}

__forceinline__ uint32_t vote(const char *word, unsigned mask, bool mine) {
  return exchange(word, mask, uint32_t(mine) << self()->lane, 0, vote_all);
}

/* The value before, with next(value) in its place: by compare and swap of 4 or 8 bytes, of any type of that size. */
template <class T, class Next> __forceinline__ T atomically(T *at, Next &&next) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  touch(at, sizeof(T), Access::atomic);
  for (Bits old = swap_if(at, Bits(0), Bits(0)), seen;; old = seen) {
    seen = swap_if(at, old, bits_as<Bits>(T(next(bits_as<T>(old)))));
    if (seen == old) return bits_as<T>(old);
  }
}
}  // namespace emu

/* From a lane within this one's group of `width` lanes; outside of it a lane reads itself. */
#define EMU_SHUFFLE(name, from)                                                                                                 \
  template <class T> __forceinline__ T name(unsigned mask, T value, int by, int width = 32) {                                   \
    const int lane = emu::self()->lane, first = lane & ~(width - 1), wanted = from;                                             \
    return emu::exchange(#name, mask, value, wanted >= first && wanted < first + width ? wanted : lane, emu::shuffle_all<T>);   \
  }
EMU_SHUFFLE(__shfl_sync, first + (by & (width - 1))) EMU_SHUFFLE(__shfl_xor_sync, lane ^ by)
EMU_SHUFFLE(__shfl_up_sync, lane - by) EMU_SHUFFLE(__shfl_down_sync, lane + by)
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return emu::vote("__ballot_sync", mask, predicate != 0); }
__forceinline__ int __any_sync(unsigned mask, int predicate) { return emu::vote("__any_sync", mask, predicate != 0) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return emu::vote("__all_sync", mask, predicate == 0) == 0; }

#define EMU_ATOMIC(name, next) \
  template <class T> __forceinline__ T name(T *at, std::common_type_t<T> v) { return emu::atomically(at, [&](T old) { return next; }); }
EMU_ATOMIC(atomicAdd, old + v) EMU_ATOMIC(atomicMax, max(old, v))
template <class T> __forceinline__ T atomicCAS(T *at, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return emu::atomically(at, [&](T old) { return old == expected ? v : old; });
}

#include "runtime.h"
#endif
