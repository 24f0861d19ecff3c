/* speed.cu: loops that do one thing only, as fast as a device can.
 *
 * copy_kernel, read_kernel  A thread moves 16 bytes at a time, neighbours side by side, in a stride of the whole grid; four loads are under way
 *                           at once. No shared memory. Bound by memory alone.
 * mma_kernel                A warp multiplies registers that never change into eight independent accumulators, so that the pipeline of the
 *                           tensor cores is full; eight warps a block, four blocks a multiprocessor. Touches no memory.
 * fma_kernel                The same for float32 with sixteen accumulators a thread.
 * Sums that nobody needs are written where they have a value that they never have, so that no compiler drops the loops.
 */
#include "speed.h"

#include "state.h"

namespace {

enum { THREADS = 256, BLOCKS_EACH = 4, AHEAD = 4, CHAINS = 8, FLOATS = 16 };

template <int STORE>
__global__ void __launch_bounds__(THREADS) move_kernel(const uint4 *from, uint4 *to, int64_t n) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  uint32_t mixed = 0;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += AHEAD * step) {
    uint4 v[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (i + j * step < n) v[j] = pe::ld_global_16(from + i + j * step);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (i + j * step < n) {
        if (STORE) to[i + j * step] = v[j];
        else mixed |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
      }
  }
  if (!STORE && mixed == 0x9e3779b9u) to[threadIdx.x].x = mixed; /* the memory holds zeros */
}

template <int WHAT>
__global__ void __launch_bounds__(THREADS) mma_kernel(int rounds, float *out) {
  const uint32_t a[4] = {threadIdx.x, 0, 0, 0}, b[2] = {0, threadIdx.x};
  float f[CHAINS][4] = {};
  int32_t s[CHAINS][4] = {};
  for (int r = 0; r < rounds; r++)
#pragma unroll
    for (int j = 0; j < CHAINS; j++) {
      if (WHAT == PE_SPEED_S8) pe::mma_s8(s[j], a, b);
      else if (WHAT == PE_SPEED_BF16) pe::mma_bf16(f[j], a, b);
      else pe::mma_f16(f[j], a, b);
    }
  float sum = 0;
  for (int j = 0; j < CHAINS; j++)
    for (int i = 0; i < 4; i++) sum += f[j][i] + (float)s[j][i];
  if (sum == -12345.0f) out[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) fma_kernel(int rounds, float *out) {
  const float x = 1.0f + 1e-6f * threadIdx.x;
  float f[FLOATS];
#pragma unroll
  for (int j = 0; j < FLOATS; j++) f[j] = x + j;
  for (int r = 0; r < rounds; r++)
#pragma unroll
    for (int j = 0; j < FLOATS; j++) f[j] = fmaf(f[j], x, 1e-3f);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < FLOATS; j++) sum += f[j];
  if (sum == -12345.0f) out[threadIdx.x] = sum;
}

/* Launch one round, and return what it amounts to. */
double once(const pe_card_queue *q, int32_t what, char *memory, int64_t size) {
  const int blocks = BLOCKS_EACH * q->multiprocessors;
  const uint4 *from = reinterpret_cast<const uint4 *>(memory);
  float *out = reinterpret_cast<float *>(memory);
  const int steps = (int)size;
  const double products = (double)blocks * (THREADS / 32) * steps * CHAINS;
  switch (what) {
    case PE_SPEED_COPY:
      pe::launch(q->stream, move_kernel<1>, dim3((unsigned)blocks), dim3(THREADS), 0, from, reinterpret_cast<uint4 *>(memory + size / 32 * 16), size / 32);
      return (double)(size / 32 * 32);
    case PE_SPEED_READ:
      pe::launch(q->stream, move_kernel<0>, dim3((unsigned)blocks), dim3(THREADS), 0, from, reinterpret_cast<uint4 *>(memory), size / 16);
      return (double)(size / 16 * 16);
    case PE_SPEED_S8:
      pe::launch(q->stream, mma_kernel<PE_SPEED_S8>, dim3((unsigned)blocks), dim3(THREADS), 0, steps, out);
      return products * 2 * 16 * 8 * 32;
    case PE_SPEED_BF16:
      pe::launch(q->stream, mma_kernel<PE_SPEED_BF16>, dim3((unsigned)blocks), dim3(THREADS), 0, steps, out);
      return products * 2 * 16 * 8 * 16;
    case PE_SPEED_F16:
      pe::launch(q->stream, mma_kernel<PE_SPEED_F16>, dim3((unsigned)blocks), dim3(THREADS), 0, steps, out);
      return products * 2 * 16 * 8 * 16;
    default:
      pe::launch(q->stream, fma_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, steps, out);
      return 2.0 * blocks * THREADS * steps * FLOATS;
  }
}

} // namespace

int32_t pe_card_speed(pe_card_queue *queue, int32_t what, uint64_t memory, int64_t size, int32_t rounds, double *amount, double *seconds) {
  char *at = reinterpret_cast<char *>(memory);
  cudaEvent_t begin = nullptr, end = nullptr;
  float ms = 0;
  if (what < PE_SPEED_COPY || what > PE_SPEED_F32 || size < 1 || size >= int64_t{1} << 40 || rounds < 1) return PE_BAD_VALUE;
  PE_TRY(cudaSetDevice(queue->device));
  PE_TRY(cudaEventCreate(&begin));
  cudaError_t error = cudaEventCreate(&end);
  once(queue, what, at, size); /* the first is slower */
  if (!error) error = cudaEventRecord(begin, queue->stream);
  *amount = 0;
  for (int32_t i = 0; i < rounds; i++) *amount += once(queue, what, at, size);
  if (!error) error = cudaEventRecord(end, queue->stream);
  if (!error) error = cudaEventSynchronize(end);
  if (!error) error = cudaEventElapsedTime(&ms, begin, end);
  if (!error) error = cudaGetLastError();
  cudaEventDestroy(begin);
  if (end) cudaEventDestroy(end);
  *seconds = ms * 1e-3;
  return error ? pe::failed("the measurement of a speed", error) : static_cast<int32_t>(PE_OK);
}
