/* cuda.h: stands for the headers of CUDA where a .cu file is compiled by g++ or clang for the emulator.
 *
 * Only these words of CUDA are there. Threads, blocks and collectives are the engine's; the types, the functions of the runtime and
 * the mathematics behave as the CUDA C++ Programming Guide says. What PTX has and C++ has not is in csrc/cuda/device.h.
 */
#ifndef PE_EMULATE_CUDA_H
#define PE_EMULATE_CUDA_H

#include <cmath>
#include <cstring>

#include "engine.h"
#include "types.h"

/* -- the language ------------------------------------------------------------------------------------------------------------- */

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (emu::self()->thread)
#define blockIdx (emu::self()->block->index)
#define blockDim (emu::self()->block->launch->block)
#define gridDim (emu::self()->block->launch->grid)
static constexpr int warpSize = emu::WARP;

/* -- threads together --------------------------------------------------------------------------------------------------------- */

__forceinline__ void __syncthreads() { emu::barrier("__syncthreads"); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { emu::collective("__syncwarp", mask, nullptr, nullptr, true); }
__forceinline__ void __threadfence() { emu::fence(); }
__forceinline__ void __threadfence_block() {}
[[noreturn]] __forceinline__ void __trap() { emu::fault(__builtin_return_address(0), "__trap()"); }

namespace emu {

enum class Shuffle { indexed, up, down, xored };

template <class T> struct Shuffled {
  T value;
  int argument, width;
  Shuffle how;
  T result;
};

/* Section "Warp shuffle functions": lanes form groups of `width`; a source outside the group is the lane itself, except for
 * __shfl_sync, which takes it modulo width. Values of lanes that do not take part are undefined: an error here. */
template <class T> void shuffle_all(void *const *deposits, uint32_t mask) {
  for (int lane = 0; lane < WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto *s = static_cast<Shuffled<T> *>(deposits[lane]);
    const int first = lane & ~(s->width - 1), last = first + s->width - 1;
    int from = lane;
    if (s->how == Shuffle::indexed) from = first + (s->argument & (s->width - 1));
    if (s->how == Shuffle::up && lane - s->argument >= first) from = lane - s->argument;
    if (s->how == Shuffle::down && lane + s->argument <= last) from = lane + s->argument;
    if (s->how == Shuffle::xored && (lane ^ s->argument) <= last) from = lane ^ s->argument;
    if (!(mask >> from & 1)) fault(self()->meeting.site, "a shuffle in which lane %d reads lane %d, which does not take part", lane, from);
    s->result = static_cast<Shuffled<T> *>(deposits[from])->value;
  }
}

template <class T> __forceinline__ T shuffle(const char *word, unsigned mask, Shuffle how, T value, int argument, int width) {
  Shuffled<T> s{value, argument, width, how, value};
  collective(word, mask, &s, shuffle_all<T>);
  return s.result;
}

struct Vote { bool mine; uint32_t all; };

inline void vote_all(void *const *deposits, uint32_t mask) {
  uint32_t ballot = 0;
  for (int i = 0; i < WARP; i++) ballot |= uint32_t(mask >> i & 1 && static_cast<Vote *>(deposits[i])->mine) << i;
  for (int i = 0; i < WARP; i++)
    if (mask >> i & 1) static_cast<Vote *>(deposits[i])->all = ballot;
}

__forceinline__ uint32_t vote(const char *word, unsigned mask, bool mine) {
  Vote v{mine, 0};
  collective(word, mask, &v, vote_all);
  return v.all;
}

}  // namespace emu

template <class T> __forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emu::shuffle("__shfl_sync", mask, emu::Shuffle::indexed, value, lane, width);
}
template <class T> __forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emu::shuffle("__shfl_xor_sync", mask, emu::Shuffle::xored, value, bits, width);
}
template <class T> __forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emu::shuffle("__shfl_up_sync", mask, emu::Shuffle::up, value, int(by), width);
}
template <class T> __forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emu::shuffle("__shfl_down_sync", mask, emu::Shuffle::down, value, int(by), width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return emu::vote("__ballot_sync", mask, predicate != 0); }
__forceinline__ int __any_sync(unsigned mask, int predicate) { return emu::vote("__any_sync", mask, predicate != 0) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return emu::vote("__all_sync", mask, predicate == 0) == 0; }

/* -- atomics: relaxed, as on the card ------------------------------------------------------------------------------------------- */

namespace emu {
/* The first value, and new(value) in its place. Built on compare-and-swap of 4 or 8 bytes; T is any type of that size. */
template <class T, class New> __forceinline__ T atomically(T *at, New &&next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  touch(at, sizeof(T), Access::atomic);
  for (T old = atomic_load(at);;) {
    const T seen = atomic_swap_if(at, old, T(next(old)));
    if (std::memcmp(&seen, &old, sizeof(T)) == 0) return old;
    old = seen;
  }
}
}  // namespace emu

template <class T> __forceinline__ T atomicAdd(T *at, std::common_type_t<T> v) { return emu::atomically(at, [&](T old) { return old + v; }); }
template <class T> __forceinline__ T atomicMax(T *at, std::common_type_t<T> v) { return emu::atomically(at, [&](T old) { return old < v ? v : old; }); }
template <class T> __forceinline__ T atomicMin(T *at, std::common_type_t<T> v) { return emu::atomically(at, [&](T old) { return v < old ? v : old; }); }
template <class T> __forceinline__ T atomicOr(T *at, std::common_type_t<T> v) { return emu::atomically(at, [&](T old) { return old | v; }); }
template <class T> __forceinline__ T atomicExch(T *at, std::common_type_t<T> v) { return emu::atomically(at, [&](T) { return v; }); }
template <class T> __forceinline__ T atomicCAS(T *at, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return emu::atomically(at, [&](T old) { return old == expected ? v : old; });
}

/* -- numbers -------------------------------------------------------------------------------------------------------------------- */

#define EMU_MIN_MAX(T)                                          \
  __forceinline__ constexpr T min(T a, T b) { return b < a ? b : a; } \
  __forceinline__ constexpr T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int) EMU_MIN_MAX(unsigned) EMU_MIN_MAX(long) EMU_MIN_MAX(unsigned long) EMU_MIN_MAX(long long) EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
__forceinline__ float min(float a, float b) { return std::fmin(a, b); } /* the other one where one is NaN */
__forceinline__ float max(float a, float b) { return std::fmax(a, b); }
__forceinline__ double min(double a, double b) { return std::fmin(a, b); }
__forceinline__ double max(double a, double b) { return std::fmax(a, b); }

/* The C library declares functions of these names, so they are macros. */
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
#define __powf(x, y) ::powf(x, y)
#define rsqrtf(x) emu::inverse_root(x)
namespace emu { __forceinline__ float inverse_root(float x) { return 1.0f / std::sqrt(x); } }

__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
__forceinline__ float __fsqrt_rn(float a) { return std::sqrt(a); }
__forceinline__ float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; } /* 0 for NaN */
__forceinline__ int __float2int_rn(float a) { return int(std::nearbyint(a)); }
__forceinline__ int __float2int_rz(float a) { return int(a); }
__forceinline__ float __int2float_rn(int a) { return float(a); }
__forceinline__ float __uint2float_rn(unsigned a) { return float(a); }
__forceinline__ int __float_as_int(float a) { return emu::bits_as<int>(a); }
__forceinline__ unsigned __float_as_uint(float a) { return emu::bits_as<unsigned>(a); }
__forceinline__ float __int_as_float(int a) { return emu::bits_as<float>(a); }
__forceinline__ float __uint_as_float(unsigned a) { return emu::bits_as<float>(a); }
__forceinline__ long long __double_as_longlong(double a) { return emu::bits_as<long long>(a); }
__forceinline__ double __longlong_as_double(long long a) { return emu::bits_as<double>(a); }

__forceinline__ int __popc(unsigned a) { return __builtin_popcount(a); }
__forceinline__ int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
__forceinline__ int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
__forceinline__ int __ffs(int a) { return __builtin_ffs(a); }
__forceinline__ unsigned __brev(unsigned a) {
  a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
  a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
  a = (a >> 4 & 0x0f0f0f0fu) | (a & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(a);
}
__forceinline__ unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) { /* byte i: number (selector >> 4i) & 7 of b:a */
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = selector >> 4 * i & 15, byte = unsigned(both >> (pick & 7) * 8 & 0xff);
    out |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i; /* bit 3: its sign, eight times */
  }
  return out;
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return unsigned((uint64_t(high) << 32 | low) >> (by & 31)); }
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) { return unsigned((uint64_t(high) << 32 | low) << (by & 31) >> 32); }
__forceinline__ int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

template <class T> __forceinline__ T __ldg(const T *at) { return *at; }

#include "runtime.h"

#endif
