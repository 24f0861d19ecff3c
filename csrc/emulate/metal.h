/* metal.h: the words of the Metal Shading Language (specification 3.1) that csrc/metal uses, as C++17 over the fibres of engine.h.
 *
 * A .metal file is compiled inside the namespace `metal`, by a source that pyengine/backends/metal/thunks.py writes: it includes this
 * header, holds the file's text without its attributes, and has a thunk for each kernel that takes buffers by number and finds what the
 * attributes of the kernel's parameters stood for. Address spaces are empty words (a `constant` is a const). A simdgroup is a warp of 32.
 *
 * What no specification fixes is fixed here and must not be relied upon: the order of simd_sum (a butterfly) and which elements of a
 * simdgroup_matrix a thread holds.
 */
#ifndef PE_EMULATE_METAL_H
#define PE_EMULATE_METAL_H

#include "engine.h"
#include "metal/types.h"

namespace metal {
namespace emulated {
/* What attributes of a kernel's parameters stand for. Engine's names are used here only, before the words below hide them. */
inline uint3 three(const emu::Index3 &i) { return uint3(i.x, i.y, i.z); }
inline uint3 thread_in_group() { return three(emu::self()->thread); }
inline uint3 group_in_grid() { return three(emu::self()->block->index); }
inline uint3 threads_of_group() { return three(emu::self()->block->launch->block); }
inline uint3 groups_of_grid() { return three(emu::self()->block->launch->grid); }
inline uint thread_number() { return (uint)emu::self()->index; }
inline uint group_number() { return thread_number() / emu::WARP; }
inline uint lane() { return (uint)emu::self()->lane; }
inline uint simdgroups() { return (uint)emu::self()->block->n_warps; }
inline char *memory_of_group() { return emu::self()->block->shared; }
}  // namespace emulated
}  // namespace metal

#define kernel
#define device
#define constant const
#define threadgroup
#define thread
#define METAL_FUNC inline
#define PE_CONSTANT(type, name, index) static type name

namespace metal {

/* ---- collectives of a simdgroup ---- */

enum { SIMD_WIDTH = 32 };

namespace emulated {

/* Lanes of this simdgroup that have not returned: all of them must take part. (Metal lets those take part that are active, so that a
 * collective in one branch is legal there; here it is reported, because its result depends on how the compiler joins branches.) */
inline uint32_t running() { return emu::self()->warp->present & ~emu::self()->warp->done; }

template <class T> inline T *of(void *const *deposits, uint i) { return static_cast<T *>(deposits[i]); }

/* The value of another lane; where there is none, the lane's own (the specification: undefined). */
template <class T> struct swap { T mine, got; uint from; };
template <class T> inline void swap_all(void *const *deposits, uint32_t mask) {
  for (uint i = 0; i < SIMD_WIDTH; i++)
    if (mask >> i & 1u) {
      swap<T> *to = of<swap<T>>(deposits, i);
      to->got = to->from < SIMD_WIDTH && mask >> to->from & 1u ? of<swap<T>>(deposits, to->from)->mine : to->mine;
    }
}
template <class T> inline T from_lane(const char *word, T x, uint lane) {
  swap<T> own = {x, x, lane};
  emu::collective(word, running(), &own, swap_all<T>);
  return own.got;
}

/* F over all lanes in pairs that are 16, 8, 4, 2, 1 apart; absent lanes are left out. Every lane gets the same. */
template <class T, class F> inline void reduce_all(void *const *deposits, uint32_t mask) {
  T value[SIMD_WIDTH];
  bool there[SIMD_WIDTH];
  for (uint i = 0; i < SIMD_WIDTH; i++)
    if ((there[i] = mask >> i & 1u)) value[i] = *of<T>(deposits, i);
  for (uint step = SIMD_WIDTH / 2; step; step /= 2)
    for (uint i = 0; i < step; i++) {
      if (there[i] && there[i + step]) value[i] = F::of(value[i], value[i + step]);
      else if (there[i + step]) value[i] = value[i + step];
      there[i] = there[i] || there[i + step];
    }
  for (uint i = 0; i < SIMD_WIDTH; i++)
    if (mask >> i & 1u) *of<T>(deposits, i) = value[0];
}
template <class F, class T> inline T reduced(const char *word, T x) {
  emu::collective(word, running(), &x, reduce_all<T, F>);
  return x;
}
#define PE_REDUCTION(name, expression) struct name { template <class T> static T of(T a, T b) { return (T)(expression); } };
PE_REDUCTION(sum, a + b) PE_REDUCTION(product, a * b) PE_REDUCTION(largest, a < b ? b : a) PE_REDUCTION(least, b < a ? b : a)
PE_REDUCTION(either, a | b) PE_REDUCTION(both, a & b)
#undef PE_REDUCTION

/* Sums of the lanes before each one, with or without its own. */
template <class T> struct prefix { T x, before; };
template <class T> inline void prefix_all(void *const *deposits, uint32_t mask) {
  T sum = T(0);
  for (uint i = 0; i < SIMD_WIDTH; i++)
    if (mask >> i & 1u) {
      of<prefix<T>>(deposits, i)->before = sum;
      sum = (T)(sum + of<prefix<T>>(deposits, i)->x);
    }
}
template <class T> inline T sum_before(const char *word, T x) {
  prefix<T> own = {x, T(0)};
  emu::collective(word, running(), &own, prefix_all<T>);
  return own.before;
}

struct vote { bool x; uint32_t all; };
inline void vote_all(void *const *deposits, uint32_t mask) {
  uint32_t all = 0;
  for (uint i = 0; i < SIMD_WIDTH; i++)
    if (mask >> i & 1u && of<vote>(deposits, i)->x) all |= 1u << i;
  for (uint i = 0; i < SIMD_WIDTH; i++)
    if (mask >> i & 1u) of<vote>(deposits, i)->all = all;
}

inline void nothing(void *const *, uint32_t) {}

}  // namespace emulated

template <class T> inline T simd_shuffle(T x, ushort lane) { return emulated::from_lane("simd_shuffle", x, lane); }
template <class T> inline T simd_shuffle_xor(T x, ushort mask) { return emulated::from_lane("simd_shuffle_xor", x, emulated::lane() ^ mask); }
template <class T> inline T simd_shuffle_down(T x, ushort n) { return emulated::from_lane("simd_shuffle_down", x, emulated::lane() + n); }
template <class T> inline T simd_shuffle_up(T x, ushort n) { return emulated::from_lane("simd_shuffle_up", x, emulated::lane() - n); }
template <class T> inline T simd_broadcast(T x, ushort lane) { return emulated::from_lane("simd_broadcast", x, lane); }
template <class T> inline T simd_broadcast_first(T x) {
  return emulated::from_lane("simd_broadcast_first", x, (uint)__builtin_ctz(emulated::running()));
}

template <class T> inline T simd_sum(T x) { return emulated::reduced<emulated::sum>("simd_sum", x); }
template <class T> inline T simd_product(T x) { return emulated::reduced<emulated::product>("simd_product", x); }
template <class T> inline T simd_max(T x) { return emulated::reduced<emulated::largest>("simd_max", x); }
template <class T> inline T simd_min(T x) { return emulated::reduced<emulated::least>("simd_min", x); }
template <class T> inline T simd_or(T x) { return emulated::reduced<emulated::either>("simd_or", x); }
template <class T> inline T simd_and(T x) { return emulated::reduced<emulated::both>("simd_and", x); }
template <class T> inline T simd_prefix_exclusive_sum(T x) { return emulated::sum_before("simd_prefix_exclusive_sum", x); }
template <class T> inline T simd_prefix_inclusive_sum(T x) { return (T)(emulated::sum_before("simd_prefix_inclusive_sum", x) + x); }

struct simd_vote {
  typedef uint64_t vote_t;
  vote_t bits;
  explicit operator vote_t() const { return bits; }
};
inline simd_vote simd_ballot(bool x) {
  emulated::vote own = {x, 0};
  emu::collective("simd_ballot", emulated::running(), &own, emulated::vote_all);
  return simd_vote{own.all};
}
inline bool simd_any(bool x) { return simd_ballot(x).bits != 0; }
inline bool simd_all(bool x) { return simd_ballot(!x).bits == 0; }

/* ---- barriers ---- */

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }

inline void threadgroup_barrier(mem_flags) { emu::barrier("threadgroup_barrier"); }
inline void simdgroup_barrier(mem_flags flags) {
  char own = 0;
  emu::collective("simdgroup_barrier", emulated::running(), &own, emulated::nothing, flags != mem_flags::mem_none);
}

/* ---- matrices of 8 x 8 over a simdgroup ---- */

namespace emulated {

/* Element i of a lane's two is number 2 lane + i of the matrix, row by row; in the checked form they are held from the end, so that tests
 * in both forms show who relies on that. */
inline int other_end(int at) {
#ifdef PE_CHECKED
  return 63 - at;
#else
  return at;
#endif
}
inline int element(int i) { return other_end(2 * (int)lane() + i); }

}  // namespace emulated

template <class T, int C, int R> struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8 x 8");
  alignas(2 * sizeof(T)) T e[2];
  simdgroup_matrix() = default;
  vec<T, 2> &thread_elements() { return *reinterpret_cast<vec<T, 2> *>(e); }
  explicit simdgroup_matrix(T x) { /* x on the diagonal */
    for (int i = 0; i < 2; i++) e[i] = emulated::element(i) / 8 == emulated::element(i) % 8 ? x : T(0);
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R> inline simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, C, R> m;
  m.e[0] = m.e[1] = x;
  return m;
}

namespace emulated {

/* Where element i of this lane's two lies in memory. */
inline size_t matrix_place(int i, ulong per_row, ulong2 origin, bool transposed) {
  const ulong at = (ulong)element(i), row = transposed ? at % 8 : at / 8, column = transposed ? at / 8 : at % 8;
  return (row + origin.y) * per_row + column + origin.x;
}
inline void meet(const char *word) {
  char own = 0;
  emu::collective(word, running(), &own, nothing);
}

struct product_parts { float a[2], b[2], d[2]; };
inline void multiply_all(void *const *deposits, uint32_t mask) {
  float a[8][8], b[8][8];
  if (mask != 0xffffffffu) return; /* a whole simdgroup is needed: see whole_simdgroup */
  for (int i = 0; i < 64; i++) {
    const product_parts *from = of<product_parts>(deposits, (uint)i / 2);
    a[other_end(i) / 8][other_end(i) % 8] = from->a[i % 2];
    b[other_end(i) / 8][other_end(i) % 8] = from->b[i % 2];
  }
  for (int i = 0; i < 64; i++)
    for (int k = 0; k < 8; k++) {
      float *d = &of<product_parts>(deposits, (uint)i / 2)->d[i % 2];
      *d = ::fmaf(a[other_end(i) / 8][k], b[k][other_end(i) % 8], *d);
    }
}
inline void whole_simdgroup(const char *word) {
  if (running() != 0xffffffffu) emu::fault(__builtin_return_address(0), "%s by a part of a simdgroup", word);
}

}  // namespace emulated

/* per_row: elements between the starts of two rows in memory. */
template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8> &m, const P *from, ulong per_row = 8, ulong2 origin = ulong2(0), bool transposed = false) {
  emulated::whole_simdgroup("simdgroup_load");
  emulated::meet("simdgroup_load");
  for (int i = 0; i < 2; i++) m.e[i] = from[emulated::matrix_place(i, per_row, origin, transposed)];
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8> &m, P *to, ulong per_row = 8, ulong2 origin = ulong2(0), bool transposed = false) {
  emulated::whole_simdgroup("simdgroup_store");
  emulated::meet("simdgroup_store");
  for (int i = 0; i < 2; i++) to[emulated::matrix_place(i, per_row, origin, transposed)] = m.e[i];
}

/* d = a b + c in float, k ascending, rounded to the type of d. */
template <class D, class A, class B>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a, const simdgroup_matrix<B, 8, 8> &b,
                                          const simdgroup_matrix<D, 8, 8> &c) {
  emulated::whole_simdgroup("simdgroup_multiply_accumulate");
  emulated::product_parts own = {{(float)a.e[0], (float)a.e[1]}, {(float)b.e[0], (float)b.e[1]}, {(float)c.e[0], (float)c.e[1]}};
  emu::count(emu::Event::mma);
  emu::collective("simdgroup_multiply_accumulate", emulated::running(), &own, emulated::multiply_all);
  for (int i = 0; i < 2; i++) d.e[i] = D(own.d[i]);
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a, const simdgroup_matrix<B, 8, 8> &b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)));
}

/* ---- atomics: of 4 bytes, relaxed; blocks of a launch may run on several threads of the system ---- */

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T v; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;

namespace emulated {

template <class T> inline T atomic_read(const atomic<T> *a) {
  emu::touch(a, sizeof(T), emu::Access::atomic);
  return as_type<T>(emu::swap_if(const_cast<atomic<T> *>(a), 0u, 0u));
}
/* Put next(value) in the place of the value, which is returned. */
template <class T, class New> inline T atomically(atomic<T> *a, New next) {
  static_assert(sizeof(T) == 4, "atomics of 4 bytes only");
  emu::touch(a, sizeof(T), emu::Access::atomic);
  for (uint32_t old = emu::swap_if(a, 0u, 0u);;) {
    const uint32_t seen = emu::swap_if(a, old, as_type<uint32_t>((T)next(as_type<T>(old))));
    if (seen == old) return as_type<T>(old);
    old = seen;
  }
}

}  // namespace emulated

template <class T> inline T atomic_load_explicit(const atomic<T> *a, memory_order) { return emulated::atomic_read(a); }
template <class T> inline void atomic_store_explicit(atomic<T> *a, typename same<T>::type x, memory_order) {
  emulated::atomically(a, [x](T) { return x; });
}
#define PE_ATOMIC(name, expression)                                                                                              \
  template <class T> inline T atomic_fetch_##name##_explicit(atomic<T> *a, typename same<T>::type x, memory_order) {             \
    return emulated::atomically(a, [x](T old) { return expression; });                                                           \
  }
PE_ATOMIC(add, old + x) PE_ATOMIC(sub, old - x) PE_ATOMIC(or, old | x) PE_ATOMIC(and, old & x)
PE_ATOMIC(max, old < x ? x : old) PE_ATOMIC(min, x < old ? x : old)
#undef PE_ATOMIC
template <class T>
inline bool atomic_compare_exchange_weak_explicit(atomic<T> *a, T *expected, typename same<T>::type wanted, memory_order, memory_order) {
  const T want = *expected, old = emulated::atomically(a, [=](T now) { return now == want ? wanted : now; });
  *expected = old;
  return old == want;
}

/* ---- mathematics: of scalars, and of vectors element by element ---- */

#define PE_UNARY(name, call)                                                                                                     \
  inline float name(float x) { return call(x); }                                                                                 \
  template <int N> inline vec<float, N> name(const vec<float, N> &x) {                                                           \
    vec<float, N> y;                                                                                                             \
    for (int i = 0; i < N; i++) y[i] = call(x[i]);                                                                               \
    return y;                                                                                                                    \
  }
#define PE_UNARIES                                                                                                               \
  PE_UNARY(exp, ::expf) PE_UNARY(exp2, ::exp2f) PE_UNARY(log, ::logf) PE_UNARY(log2, ::log2f) PE_UNARY(sqrt, ::sqrtf)            \
  PE_UNARY(rsqrt, 1.0f / ::sqrtf) PE_UNARY(tanh, ::tanhf) PE_UNARY(sin, ::sinf) PE_UNARY(cos, ::cosf)
PE_UNARIES
PE_UNARY(fabs, ::fabsf) PE_UNARY(floor, ::floorf) PE_UNARY(ceil, ::ceilf) PE_UNARY(trunc, ::truncf) PE_UNARY(rint, ::rintf)
PE_UNARY(round, ::roundf)
namespace precise { PE_UNARIES }
namespace fast { PE_UNARIES }
#undef PE_UNARIES
#undef PE_UNARY
inline float pow(float x, float y) { return ::powf(x, y); }
inline float copysign(float x, float y) { return ::copysignf(x, y); }
inline float ldexp(float x, int n) { return ::ldexpf(x, n); }
inline float fmin(float x, float y) { return ::fminf(x, y); }
inline float fmax(float x, float y) { return ::fmaxf(x, y); }
inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(::fmaf(a, b, c)); }
template <int N> inline vec<float, N> fma(const vec<float, N> &a, const vec<float, N> &b, const vec<float, N> &c) {
  vec<float, N> r;
  for (int i = 0; i < N; i++) r[i] = ::fmaf(a[i], b[i], c[i]);
  return r;
}
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return ::fabsf(x) == HUGE_VALF; }
inline bool isfinite(float x) { return ::fabsf(x) < HUGE_VALF; }
inline float abs(float x) { return ::fabsf(x); }
inline int abs(int x) { return x < 0 ? -x : x; }

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
template <class T> inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T, int N> inline vec<T, N> min(const vec<T, N> &a, const vec<T, N> &b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = min(a[i], b[i]);
  return r;
}
template <class T, int N> inline vec<T, N> max(const vec<T, N> &a, const vec<T, N> &b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = max(a[i], b[i]);
  return r;
}
template <class T> inline T select(T a, T b, bool second) { return second ? b : a; }

inline uint popcount(uint x) { return (uint)__builtin_popcount(x); }
inline uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32u; }
inline uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32u; }
inline uint reverse_bits(uint x) {
  uint y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline uint extract_bits(uint x, uint offset, uint bits) { return bits >= 32 ? x : x >> offset & ((1u << bits) - 1u); }

}  // namespace metal
#endif
