/* device.h: the words of kernels that C++ has not, for a card (nvcc: PTX) and for the emulator (g++, clang: C++).
 *
 * Each instruction is a function with a PTX body and an emulated one, both after the PTX ISA; where a card is too old for it (below
 * sm_80 there is neither cp.async nor bf16 mma) the PTX body is a synchronous one that gives the same values.
 * A kernel takes its shared memory as a struct: `auto &sh = pe::shared<Tile>();`, launched with sizeof(Tile) bytes.
 */
#ifndef PE_CUDA_DEVICE_H
#define PE_CUDA_DEVICE_H

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PE_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define PE_SM80 1
#else
#define PE_SM80 0
#endif
#else
#define PE_EMULATED 1
#include "../emulate/cuda.h"
#define PE_DEVICE __forceinline__
#endif

namespace pe {

constexpr unsigned ALL = 0xffffffffu; /* lanes of a warp */

/* -- launching --------------------------------------------------------------------------------------------------------------- */

/* Run a kernel on a stream; arguments are converted to its parameters. Errors stay with the runtime: cudaGetLastError(). */
template <class... P, class... A>
inline void launch(cudaStream_t stream, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A &&...arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  if (shared_bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
#if PE_EMULATED
  emu::enqueue(stream, emu::bind(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, P(arguments)...));
#else
  [&](P... values) {
    void *pointers[] = {const_cast<void *>(static_cast<const void *>(&values))..., nullptr};
    cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, block, pointers, shared_bytes, stream);
  }(static_cast<P>(arguments)...);
#endif
}

/* -- memory ------------------------------------------------------------------------------------------------------------------- */

/* The block's shared memory, aligned to 128 bytes. */
template <class T> PE_DEVICE T &shared() {
#if PE_EMULATED
  const emu::Block &block = *emu::self()->block;
  if (sizeof(T) > block.launch->shared_bytes)
    emu::fault(nullptr, "shared memory of %zu bytes, but the launch gave %zu", sizeof(T), block.launch->shared_bytes);
  return *reinterpret_cast<T *>(block.shared);
#else
  extern __shared__ __align__(128) unsigned char pe_shared_bytes[];
  return *reinterpret_cast<T *>(pe_shared_bytes);
#endif
}

/* 16 bytes that are read once: not kept in L1. ld.global.nc, so nobody may write them while the kernel runs. Aligned to 16. */
PE_DEVICE uint4 ld_global_16(const void *at) {
#if PE_EMULATED
  return __ldg(static_cast<const uint4 *>(at));
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
#endif
}

/* The same for 8 and 4 bytes. */
PE_DEVICE uint2 ld_global_8(const void *at) {
#if PE_EMULATED
  return __ldg(static_cast<const uint2 *>(at));
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
#endif
}
PE_DEVICE uint32_t ld_global_4(const void *at) {
#if PE_EMULATED
  return __ldg(static_cast<const uint32_t *>(at));
#else
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
#endif
}

#if !PE_EMULATED
PE_DEVICE uint32_t shared_address(const void *at) { return uint32_t(__cvta_generic_to_shared(at)); }
#endif

/* Begin to copy 16 bytes from global to shared memory, both aligned to 16; zeros where !valid, and `from` is not read. They are there
 * for the thread that copied after cp_async_wait, for others after a barrier behind it. */
PE_DEVICE void cp_async16(void *to, const void *from, bool valid = true) {
#if PE_EMULATED
  emu::copy_later(to, from, valid ? 16 : 0, valid ? 0 : 16);
#elif PE_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  *static_cast<uint4 *>(to) = valid ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
#endif
}

/* The same for 8 and 4 bytes (cp.async.ca), aligned to as many. */
template <int BYTES> PE_DEVICE void cp_async(void *to, const void *from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8);
#if PE_EMULATED
  emu::copy_later(to, from, valid ? BYTES : 0, valid ? 0 : BYTES);
#elif PE_SM80
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
#else
  for (int i = 0; i < BYTES / 4; i++) static_cast<uint32_t *>(to)[i] = valid ? static_cast<const uint32_t *>(from)[i] : 0;
#endif
}
PE_DEVICE void cp_async8(void *to, const void *from, bool valid = true) { cp_async<8>(to, from, valid); }
PE_DEVICE void cp_async4(void *to, const void *from, bool valid = true) { cp_async<4>(to, from, valid); }

/* Close the group of copies begun since the last one. */
PE_DEVICE void cp_async_commit() {
#if PE_EMULATED
  emu::commit_copies();
#elif PE_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Wait until at most the N youngest groups of this thread are under way. */
template <int N> PE_DEVICE void cp_async_wait() {
#if PE_EMULATED
  emu::wait_copies(N);
#elif PE_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* x, but what follows from it is worked out where it stands, and not beforehand and kept, for which registers are short. */
PE_DEVICE int again(int x) {
#if !PE_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

/* -- bits -------------------------------------------------------------------------------------------------------------------- */

/* Two 16-bit floats in a register, the first in the low half, as mma wants them. */
PE_DEVICE uint32_t pack_half2(float low, float high) {
  const half2 v = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
PE_DEVICE uint32_t pack_bf162(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
PE_DEVICE float2 unpack_half2(uint32_t bits) {
  half2 v;
  memcpy(static_cast<void *>(&v), &bits, 4);
  return __half22float2(v);
}
PE_DEVICE float2 unpack_bf162(uint32_t bits) { return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)); }

/* c + the dot product of four signed bytes with four signed bytes. */
PE_DEVICE int32_t dp4a(uint32_t a, uint32_t b, int32_t c) {
#if PE_EMULATED
  emu::count(emu::Event::dp4a);
  for (int i = 0; i < 4; i++) c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return c;
#else
  return __dp4a(int(a), int(b), c);
#endif
}

/* 2^x as the card's special function unit has it, within 2 units in the last place; 0 where the result is below 2^-126. */
PE_DEVICE float exp2_fast(float x) {
#if PE_EMULATED
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/* -- sums and maxima over a warp, the same in all lanes; the order of additions is fixed: 16, 8, 4, 2, 1 lanes apart -------------- */

template <int WIDTH = 32, class T> PE_DEVICE T warp_sum(T v) {
  for (int apart = WIDTH / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(ALL, v, apart);
  return v;
}
template <int WIDTH = 32, class T> PE_DEVICE T warp_max(T v) {
  for (int apart = WIDTH / 2; apart > 0; apart /= 2) v = max(v, __shfl_xor_sync(ALL, v, apart));
  return v;
}

/* -- matrices of a warp: PTX ISA, "Warp-level matrix instructions" -----------------------------------------------------------------
 *
 * With g = lane / 4 and t = lane % 4, of D[16][8] += A[16][k] * B[k][8]:
 *   d[0], d[1]  D[g][2t], D[g][2t+1]        d[2], d[3]  D[g+8][2t], D[g+8][2t+1]
 *   16-bit, k = 16: a register holds two neighbours along k        8-bit, k = 32: four neighbours
 *     a[0] A[g][2t..]    a[1] A[g+8][2t..]                           a[0] A[g][4t..]     a[1] A[g+8][4t..]
 *     a[2] A[g][2t+8..]  a[3] A[g+8][2t+8..]                         a[2] A[g][4t+16..]  a[3] A[g+8][4t+16..]
 *     b[0] B[2t..][g]    b[1] B[2t+8..][g]                           b[0] B[4t..][g]     b[1] B[4t+16..][g]
 * The 8-bit one with k = 16 (mma_s8_k16) has the first half of these registers: a[0], a[1], b[0].
 * All lanes of the warp call together. */

#if PE_EMULATED

template <class D> struct MmaLane { D *d; const uint32_t *a, *b; };

/* PER elements a register, KS pairs of registers of A along k (each with 4 lanes' elements), from(register, i) is the i-th as a
 * number. Sums of floats are exact until they are rounded once: the card's own order within an mma is not documented. */
template <class D, class Sum, int PER, int KS, Sum (*from)(uint32_t, int)> void mma_all(void *const *lanes, uint32_t) {
  Sum b[4 * KS * PER][8];
  for (int n = 0; n < 8; n++)
    for (int k = 0; k < 4 * KS * PER; k++)
      b[k][n] = from(static_cast<const MmaLane<D> *>(lanes[n * 4 + k / PER % 4])->b[k / (4 * PER)], k % PER);
  for (int m = 0; m < 16; m++) {
    Sum sums[8];
    for (int n = 0; n < 8; n++) sums[n] = Sum(static_cast<const MmaLane<D> *>(lanes[m % 8 * 4 + n / 2])->d[m / 8 * 2 + n % 2]);
    for (int k = 0; k < 4 * KS * PER; k++) {
      const Sum a = from(static_cast<const MmaLane<D> *>(lanes[m % 8 * 4 + k / PER % 4])->a[k / (4 * PER) * 2 + m / 8], k % PER);
      for (int n = 0; n < 8; n++) sums[n] += a * b[k][n];
    }
    for (int n = 0; n < 8; n++) static_cast<const MmaLane<D> *>(lanes[m % 8 * 4 + n / 2])->d[m / 8 * 2 + n % 2] = D(sums[n]);
  }
}
inline double half_at(uint32_t bits, int i) { return pe_f16_to_f32(uint16_t(bits >> 16 * i)); }
inline double bf16_at(uint32_t bits, int i) { return pe_bf16_to_f32(uint16_t(bits >> 16 * i)); }
inline uint32_t s8_at(uint32_t bits, int i) { return uint32_t(int8_t(bits >> 8 * i)); } /* sums wrap around */

template <class D, class Sum, int PER, int KS, Sum (*from)(uint32_t, int)>
PE_DEVICE void mma(const char *word, D *d, const uint32_t *a, const uint32_t *b) {
  MmaLane<D> mine{d, a, b};
  if (emu::self()->lane == 0) emu::count(emu::Event::mma);
  emu::collective(word, ALL, &mine, mma_all<D, Sum, PER, KS, from>, false, true);
}

PE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<float, double, 2, 2, half_at>("mma_f16", d, a, b); }
PE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<float, double, 2, 2, bf16_at>("mma_bf16", d, a, b); }
PE_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<int32_t, uint32_t, 4, 2, s8_at>("mma_s8", d, a, b); }
PE_DEVICE void mma_s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b) { mma<int32_t, uint32_t, 4, 1, s8_at>("mma_s8_k16", d, a, &b); }

#else

PE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if PE_SM80
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int high = 0; high < 2; high++)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2 * high]), "r"(a[2 * high + 1]), "r"(b[high]));
#endif
}

PE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if PE_SM80
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else /* element by element: registers of the lanes that hold row g of A and columns 2t and 2t+1 of B */
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int high = 0; high < 2; high++)
#pragma unroll 1 /* all of it side by side is more than a thread has registers for */
    for (int from = 0; from < 4; from++) {
      const float2 top = unpack_bf162(__shfl_sync(ALL, a[2 * high], g * 4 + from));
      const float2 bottom = unpack_bf162(__shfl_sync(ALL, a[2 * high + 1], g * 4 + from));
      const float2 left = unpack_bf162(__shfl_sync(ALL, b[high], 2 * t * 4 + from));
      const float2 right = unpack_bf162(__shfl_sync(ALL, b[high], (2 * t + 1) * 4 + from));
      d[0] += top.x * left.x + top.y * left.y;
      d[1] += top.x * right.x + top.y * right.y;
      d[2] += bottom.x * left.x + bottom.y * left.y;
      d[3] += bottom.x * right.x + bottom.y * right.y;
    }
#endif
}

PE_DEVICE void mma_s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if PE_SM80
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
#else
  for (int i = 0; i < 2; i++) /* rows 0 to 7, then 8 to 15 */
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d[2 * i]), "+r"(d[2 * i + 1]) : "r"(a[i]), "r"(b));
#endif
}

PE_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if PE_SM80
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int half = 0; half < 2; half++) mma_s8_k16(d, {a[2 * half], a[2 * half + 1]}, b[half]);
#endif
}

#endif

/* Four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 i + j passes the address of row j of matrix i (16 bytes, aligned);
 * in r[i] a lane gets elements [g][2t], [g][2t+1] of matrix i. trans: of its transpose, so [2t][g] and [2t+1][g]. */
#if PE_EMULATED

struct LdmatrixLane { const void *row; uint32_t *r; };

template <bool TRANS> void ldmatrix_all(void *const *lanes, uint32_t) {
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 32; lane++) {
      uint16_t two[2];
      for (int e = 0; e < 2; e++) {
        const int row = TRANS ? lane % 4 * 2 + e : lane / 4, column = TRANS ? lane / 4 : lane % 4 * 2 + e;
        two[e] = static_cast<const uint16_t *>(static_cast<const LdmatrixLane *>(lanes[8 * i + row])->row)[column];
      }
      static_cast<const LdmatrixLane *>(lanes[lane])->r[i] = two[0] | uint32_t(two[1]) << 16;
    }
}
template <bool TRANS> PE_DEVICE void ldmatrix(const char *word, uint32_t (&r)[4], const void *row) {
  LdmatrixLane mine{row, r};
  emu::touch(row, 16, emu::Access::read);
  emu::collective(word, ALL, &mine, ldmatrix_all<TRANS>, false, true);
}
PE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *row) { ldmatrix<false>("ldmatrix_x4", r, row); }
PE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) { ldmatrix<true>("ldmatrix_x4_trans", r, row); }

#else

PE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
PE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

#endif

}  // namespace pe

#endif
