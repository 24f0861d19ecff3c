/* types.h: vector types and 16-bit floats under their CUDA names, and atomic access that no sanitizer rewrites. */
#ifndef PE_EMULATE_TYPES_H
#define PE_EMULATE_TYPES_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emu {

template <class To, class From> inline __attribute__((always_inline)) To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

/* A value of n bytes that is loaded and stored at once, as the card does it, and is seen so by the checks. */
template <int n> struct Chunk;
template <> struct Chunk<2> { typedef uint16_t Type __attribute__((may_alias)); };
template <> struct Chunk<4> { typedef uint32_t Type __attribute__((may_alias)); };
template <> struct Chunk<8> { typedef uint64_t Type __attribute__((may_alias)); };
template <> struct Chunk<16> { typedef uint32_t Type __attribute__((vector_size(16), may_alias)); };

uint32_t atomic_load_4(const void *at);
uint64_t atomic_load_8(const void *at);
uint32_t atomic_swap_if_4(void *at, uint32_t expected, uint32_t desired);
uint64_t atomic_swap_if_8(void *at, uint64_t expected, uint64_t desired);

template <class T> T atomic_load(const T *at) {
  if constexpr (sizeof(T) == 4) return bits_as<T>(atomic_load_4(at));
  else return bits_as<T>(atomic_load_8(at));
}
/* Store `desired` if `expected` is there; what was there. */
template <class T> T atomic_swap_if(T *at, T expected, T desired) {
  if constexpr (sizeof(T) == 4) return bits_as<T>(atomic_swap_if_4(at, bits_as<uint32_t>(expected), bits_as<uint32_t>(desired)));
  else return bits_as<T>(atomic_swap_if_8(at, bits_as<uint64_t>(expected), bits_as<uint64_t>(desired)));
}

/* -- half and bfloat16 as bits, rounding to nearest even --------------------------------------------------------------------------- */

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return bits_as<float>(sign | 0x7f800000u | rest);
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f)); /* exact, and right for subnormal numbers */
}

inline uint16_t float_to_half(float f) {
  const uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7fff);              /* NaN, the card's canonical one */
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00);             /* 65520 and more */
  if (rest < 0x38800000u) {                                            /* subnormal: let the addition of 1/2 round at 2^-24 */
    return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13));
}

inline float bf16_to_float(uint16_t b) { return bits_as<float>(uint32_t(b) << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = bits_as<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emu

/* -- vectors ------------------------------------------------------------------------------------------------------------------------ */

/* Assignment is one store of the whole, so that the checks see what the card does; a copy is one load by itself. */
#define EMU_VECTOR_BODY(V)                                                     \
  V() = default;                                                               \
  V(const V &) = default;                                                      \
  inline __attribute__((always_inline)) V &operator=(const V &o) {             \
    typedef emu::Chunk<sizeof(V)>::Type Whole;                                 \
    *reinterpret_cast<Whole *>(this) = *reinterpret_cast<const Whole *>(&o);   \
    return *this;                                                              \
  }
#define EMU_VECTORS(T, name)                                                                             \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; EMU_VECTOR_BODY(name##2) };                            \
  struct name##3 { T x, y, z; };                                                                         \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; EMU_VECTOR_BODY(name##4) }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                             \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char)
EMU_VECTORS(unsigned char, uchar)
EMU_VECTORS(short, short)
EMU_VECTORS(unsigned short, ushort)
EMU_VECTORS(int, int)
EMU_VECTORS(unsigned, uint)
EMU_VECTORS(float, float)
struct alignas(16) double2 { double x, y; EMU_VECTOR_BODY(double2) };
struct alignas(16) longlong2 { long long x, y; EMU_VECTOR_BODY(longlong2) };

/* -- 16-bit floats: arithmetic is that of float, rounded once ------------------------------------------------------------------------ */

#define EMU_FLOAT16(T, to_float, to_bits)                                                            \
  struct alignas(2) T {                                                                              \
    uint16_t bits;                                                                                   \
    T() = default;                                                                                   \
    T(float f) : bits(to_bits(f)) {}                                                                 \
    operator float() const { return to_float(bits); }                                                \
    T &operator+=(T o) { return *this = T(float(*this) + float(o)); }                                \
    T &operator-=(T o) { return *this = T(float(*this) - float(o)); }                                \
    T &operator*=(T o) { return *this = T(float(*this) * float(o)); }                                \
  };                                                                                                 \
  inline T operator+(T a, T b) { return T(float(a) + float(b)); }                                    \
  inline T operator-(T a, T b) { return T(float(a) - float(b)); }                                    \
  inline T operator*(T a, T b) { return T(float(a) * float(b)); }                                    \
  inline T operator/(T a, T b) { return T(float(a) / float(b)); }                                    \
  inline T operator-(T a) { T r; r.bits = a.bits ^ 0x8000; return r; }                               \
  inline T __hadd(T a, T b) { return a + b; }                                                        \
  inline T __hsub(T a, T b) { return a - b; }                                                        \
  inline T __hmul(T a, T b) { return a * b; }                                                        \
  inline T __hfma(T a, T b, T c) { return T(float(double(float(a)) * double(float(b)) + double(float(c)))); } \
  inline T __hmax(T a, T b) { return T(std::fmax(float(a), float(b))); }                             \
  inline T __hmin(T a, T b) { return T(std::fmin(float(a), float(b))); }                             \
  struct alignas(4) T##2 { T x, y; EMU_VECTOR_BODY(T##2) };                                          \
  inline T##2 __hadd2(T##2 a, T##2 b) { return {a.x + b.x, a.y + b.y}; }                             \
  inline T##2 __hsub2(T##2 a, T##2 b) { return {a.x - b.x, a.y - b.y}; }                             \
  inline T##2 __hmul2(T##2 a, T##2 b) { return {a.x * b.x, a.y * b.y}; }                             \
  inline T##2 __hfma2(T##2 a, T##2 b, T##2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline T##2 __hmax2(T##2 a, T##2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }

#define __half half
EMU_FLOAT16(half, emu::half_to_float, emu::float_to_half)
#define __nv_bfloat16 nv_bfloat16
EMU_FLOAT16(nv_bfloat16, emu::bf16_to_float, emu::float_to_bf16)
#undef EMU_FLOAT16
using __half2 = half2;
using __nv_bfloat162 = nv_bfloat162;

inline float __half2float(half h) { return emu::half_to_float(h.bits); }
inline half __float2half(float f) { return half(f); }
inline half __float2half_rn(float f) { return half(f); }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline half2 __float22half2_rn(float2 f) { return {half(f.x), half(f.y)}; }
inline half2 __float2half2_rn(float f) { return {half(f), half(f)}; }
inline float2 __half22float2(half2 h) { return {float(h.x), float(h.y)}; }
inline half2 __half2half2(half h) { return {h, h}; }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half __low2half(half2 h) { return h.x; }
inline half __high2half(half2 h) { return h.y; }
inline float __low2float(half2 h) { return h.x; }
inline float __high2float(half2 h) { return h.y; }
inline unsigned short __half_as_ushort(half h) { return h.bits; }
inline half __ushort_as_half(unsigned short bits) { return emu::bits_as<half>(uint16_t(bits)); }
inline float __bfloat162float(nv_bfloat16 b) { return emu::bf16_to_float(b.bits); }
inline nv_bfloat16 __float2bfloat16(float f) { return nv_bfloat16(f); }
inline nv_bfloat16 __float2bfloat16_rn(float f) { return nv_bfloat16(f); }
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {nv_bfloat16(x), nv_bfloat16(y)}; }
inline float2 __bfloat1622float2(nv_bfloat162 b) { return {float(b.x), float(b.y)}; }
inline unsigned short __bfloat16_as_ushort(nv_bfloat16 b) { return b.bits; }
inline nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return emu::bits_as<nv_bfloat16>(uint16_t(bits)); }

#endif
