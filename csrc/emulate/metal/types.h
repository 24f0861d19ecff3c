/* types.h: half, bfloat and vectors of the Metal Shading Language (MSL specification 3.1, section 2) as C++17.
 *
 * Vectors have the sizes and alignments of the specification (table 2.3): float3 takes 16 bytes, packed_float3 12. Of swizzles there are
 * .xy, .zw and .xyz. Arithmetic in half rounds after each operation, as a GPU does. Like everything of MSL these words stand in the
 * namespace `metal`, in which the emulator compiles a .metal file.
 */
#ifndef PE_EMULATE_METAL_TYPES_H
#define PE_EMULATE_METAL_TYPES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <type_traits>

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

/* The bits of one type as another of the same size. */
template <class To, class From> inline To as_type(const From &from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

/* float -> IEEE binary16, to nearest, ties to even. */
inline uint16_t half_bits(float f) {
  const uint32_t u = as_type<uint32_t>(f), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | magnitude >> 13);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more */
  if (magnitude < 0x38800000u) {                                   /* below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits */
    const float shifted = as_type<float>(magnitude) + 0.5f;
    return (uint16_t)(sign | (as_type<uint32_t>(shifted) - 0x3f000000u));
  }
  return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline float half_value(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = (uint32_t)(h & 0x8000u) << 16;
  if (magnitude < 0x0400u) {
    const float v = (float)magnitude * 5.9604644775390625e-8f;
    return sign ? -v : v;
  }
  return as_type<float>(sign | ((magnitude << 13) + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u)));
}

inline uint16_t bfloat_bits(float f) {
  const uint32_t u = as_type<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline float bfloat_value(uint16_t h) { return as_type<float>((uint32_t)h << 16); }

/* A number of 16 bits that computes as float and rounds. */
#define PE_SHORT_FLOAT(name)                                                                                                     \
  struct name {                                                                                                                  \
    uint16_t bits;                                                                                                               \
    name() = default;                                                                                                            \
    template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>> name(T x) : bits(name##_bits((float)x)) {}        \
    operator float() const { return name##_value(bits); }                                                                        \
    name &operator+=(name o) { return *this = name((float)*this + (float)o); }                                                   \
    name &operator-=(name o) { return *this = name((float)*this - (float)o); }                                                   \
    name &operator*=(name o) { return *this = name((float)*this * (float)o); }                                                   \
    name &operator/=(name o) { return *this = name((float)*this / (float)o); }                                                   \
    name operator-() const { return name(-(float)*this); }                                                                       \
  };                                                                                                                             \
  inline name operator+(name a, name b) { return name((float)a + (float)b); }                                                    \
  inline name operator-(name a, name b) { return name((float)a - (float)b); }                                                    \
  inline name operator*(name a, name b) { return name((float)a * (float)b); }                                                    \
  inline name operator/(name a, name b) { return name((float)a / (float)b); }                                                    \
  inline float operator+(name a, float b) { return (float)a + b; }                                                               \
  inline float operator-(name a, float b) { return (float)a - b; }                                                               \
  inline float operator*(name a, float b) { return (float)a * b; }                                                               \
  inline float operator/(name a, float b) { return (float)a / b; }                                                               \
  inline float operator+(float a, name b) { return a + (float)b; }                                                               \
  inline float operator-(float a, name b) { return a - (float)b; }                                                               \
  inline float operator*(float a, name b) { return a * (float)b; }                                                               \
  inline float operator/(float a, name b) { return a / (float)b; }

PE_SHORT_FLOAT(half)
PE_SHORT_FLOAT(bfloat)
#undef PE_SHORT_FLOAT

/* ---- vectors ---- */

template <class T, int N> struct vec;

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    struct { T x, y; };
    T v[2];
  };
  vec() = default;
  vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
  template <class U> explicit vec(const vec<U, 2> &o) : x((T)o.x), y((T)o.y) {}
  T &operator[](int i) { return v[i]; }
  const T &operator[](int i) const { return v[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    struct { T x, y, z; };
    struct { vec<T, 2> xy; };
    T v[3];
  };
  vec() = default;
  vec(T a) : x(a), y(a), z(a) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <class U> explicit vec(const vec<U, 3> &o) : x((T)o.x), y((T)o.y), z((T)o.z) {}
  T &operator[](int i) { return v[i]; }
  const T &operator[](int i) const { return v[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    struct { T x, y, z, w; };
    struct { vec<T, 2> xy, zw; };
    struct { vec<T, 3> xyz; };
    T v[4];
  };
  vec() = default;
  vec(T a) : x(a), y(a), z(a), w(a) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  vec(vec<T, 2> a, T c, T d) : x(a.x), y(a.y), z(c), w(d) {}
  vec(T a, T b, vec<T, 2> c) : x(a), y(b), z(c.x), w(c.y) {}
  vec(vec<T, 3> a, T d) : x(a.x), y(a.y), z(a.z), w(d) {}
  template <class U> explicit vec(const vec<U, 4> &o) : x((T)o.x), y((T)o.y), z((T)o.z), w((T)o.w) {}
  T &operator[](int i) { return v[i]; }
  const T &operator[](int i) const { return v[i]; }
};

template <class T> struct same { typedef T type; }; /* keeps an argument out of deduction */

#define PE_VEC_OP(op)                                                                                                            \
  template <class T, int N> inline vec<T, N> operator op(const vec<T, N> &a, const vec<T, N> &b) {                               \
    vec<T, N> r;                                                                                                                 \
    for (int i = 0; i < N; i++) r[i] = (T)(a[i] op b[i]);                                                                        \
    return r;                                                                                                                    \
  }                                                                                                                              \
  template <class T, int N> inline vec<T, N> operator op(const vec<T, N> &a, typename same<T>::type b) { return a op vec<T, N>(b); } \
  template <class T, int N> inline vec<T, N> operator op(typename same<T>::type a, const vec<T, N> &b) { return vec<T, N>(a) op b; } \
  template <class T, int N> inline vec<T, N> &operator op##=(vec<T, N> &a, const vec<T, N> &b) { return a = a op b; }            \
  template <class T, int N> inline vec<T, N> &operator op##=(vec<T, N> &a, typename same<T>::type b) { return a = a op vec<T, N>(b); }
PE_VEC_OP(+) PE_VEC_OP(-) PE_VEC_OP(*) PE_VEC_OP(/) PE_VEC_OP(%) PE_VEC_OP(&) PE_VEC_OP(|) PE_VEC_OP(^) PE_VEC_OP(<<) PE_VEC_OP(>>)
#undef PE_VEC_OP

template <class T, int N> inline vec<T, N> operator-(const vec<T, N> &a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = (T)-a[i];
  return r;
}

template <class T, int N> inline T dot(const vec<T, N> &a, const vec<T, N> &b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r = r + a[i] * b[i];
  return r;
}

#define PE_VECTORS(type, name)                                                                                                   \
  typedef vec<type, 2> name##2;                                                                                                  \
  typedef vec<type, 3> name##3;                                                                                                  \
  typedef vec<type, 4> name##4;
PE_VECTORS(float, float) PE_VECTORS(half, half) PE_VECTORS(bfloat, bfloat) PE_VECTORS(char, char) PE_VECTORS(uchar, uchar)
PE_VECTORS(short, short) PE_VECTORS(ushort, ushort) PE_VECTORS(int, int) PE_VECTORS(uint, uint) PE_VECTORS(long, long)
PE_VECTORS(ulong, ulong) PE_VECTORS(bool, bool)
#undef PE_VECTORS

/* Vectors that are aligned as their elements are. */
template <class T, int N> struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(const vec<T, N> &o) { for (int i = 0; i < N; i++) v[i] = o[i]; }
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = v[i];
    return r;
  }
  T &operator[](int i) { return v[i]; }
  const T &operator[](int i) const { return v[i]; }
};
#define PE_PACKED_VECTORS(type)                                                                                                  \
  typedef packed_vec<type, 2> packed_##type##2;                                                                                  \
  typedef packed_vec<type, 3> packed_##type##3;                                                                                  \
  typedef packed_vec<type, 4> packed_##type##4;
PE_PACKED_VECTORS(float) PE_PACKED_VECTORS(half) PE_PACKED_VECTORS(char) PE_PACKED_VECTORS(uchar) PE_PACKED_VECTORS(short)
PE_PACKED_VECTORS(ushort) PE_PACKED_VECTORS(int) PE_PACKED_VECTORS(uint)
#undef PE_PACKED_VECTORS

}  // namespace metal
#endif
