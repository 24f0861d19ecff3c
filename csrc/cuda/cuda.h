/* cuda.h: what every file of CUDA kernels includes. Each is compiled by nvcc for cards and by a C++ compiler for the emulator
 * (csrc/emulate); both give the same functions.
 *
 * A kernel of an op is a host function with the generated prototype. Its tensors' data and its scratch are in the device's memory. It
 * looks at shapes and formats and launches on pe::stream(s); it never waits, allocates, or reads memory of the device, because its
 * launches are recorded once and replayed as a graph. With no rows it launches nothing.
 */
#ifndef PE_CUDA_H
#define PE_CUDA_H

#include "../pe.h"

#define PE_CAT3_(a, b, c) a##b##c
#define PE_CAT3(a, b, c) PE_CAT3_(a, b, c)
#define PE_NAME(x) PE_CAT3(pe_cuda_, x, )

/* PE_KERNEL(cuda, rms_norm)(const pe_tensor *x, ...) { ... }        the named prototype is in gen/kernels.h
 * PE_SCRATCH(cuda, rms_norm)(const pe_args *a, const void *params, int32_t n_threads) { return bytes; }
 *   optional; called when a program is planned, with the largest shapes and without data or a device. */
#define PE_KERNEL(backend, op) PE_CAT3(PE_KERNEL_OF_, backend, )(op)
#define PE_SCRATCH(backend, op) PE_CAT3(PE_SCRATCH_OF_, backend, )(op)
#define PE_KERNEL_OF_cuda(op) pe_status PE_NAME(op)
#define PE_SCRATCH_OF_cuda(op) int64_t PE_NAME(PE_CAT3(op, _, scratch))

#include "../gen/kernels.h"
#include "device.h"

/* What a launch found that the host could not see: a token id or a cell out of range. One for each step of a program, zero while all is
 * well, in memory of the host that the device writes to; the host looks at them after a run, and raises for the first step that has one. */
typedef struct pe_fault {
  int32_t status;               /* pe_status, or PE_OK */
  int32_t reserved;
  int64_t value, limit;         /* "value is not below limit" */
} pe_fault;

/* Grids of the formats IQ1 .. IQ3 (dequant.h), 33 kB. */
struct pe_codebooks;

namespace pe {

/* What is behind pe_stream.team here. */
struct Queue {
  cudaStream_t stream;
  pe_fault *fault;              /* of the step that is launched; only for kernels */
  const pe_codebooks *codebooks; /* in the device's memory; null for a program without weights of these formats */
  int capability;               /* 75, 80, 86 .. */
  int multiprocessors;
};

inline const Queue &queue(const pe_stream *s) { return *static_cast<const Queue *>(s->team); }
inline cudaStream_t stream(const pe_stream *s) { return queue(s).stream; }
inline const pe_codebooks *codebooks(const pe_stream *s) { return queue(s).codebooks; }
inline pe_fault *fault(const pe_stream *s) { return queue(s).fault; }

/* In a kernel: note a fault of its step; the first thread that does so is heard. */
__device__ inline void raise(pe_fault *fault, pe_status status, int64_t value, int64_t limit) {
  if (atomicCAS(&fault->status, 0, static_cast<int>(status)) == 0) {
    fault->value = value;
    fault->limit = limit;
  }
}

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace pe

#endif
