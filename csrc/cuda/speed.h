/* speed.h: what a device can do at most, measured: `make gpu-check` reports kernels as shares of it. Flat functions for Python (cffi), so the
 * declarations stay plain. */
#ifndef PE_CUDA_SPEED_H
#define PE_CUDA_SPEED_H

#include "runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PE_SPEED_COPY, PE_SPEED_READ, PE_SPEED_S8, PE_SPEED_BF16, PE_SPEED_F16, PE_SPEED_F32 };

/* Do one thing as fast as it goes, `rounds` times: move `size` bytes (PE_SPEED_COPY from the first to the second half of the memory,
 * PE_SPEED_READ all of it), or multiply, `size` times eight products a warp (matrices of bytes, bf16 or f16 on tensor cores by mma.sync; floats
 * by fused multiply-add, sixteen a thread). memory: aligned to 16 bytes, at least 4096 of them, zeros. amount: bytes moved, or operations, a product and a
 * sum being two. seconds: of the device's clock. */
PE_API int32_t pe_card_speed(pe_card_queue *queue, int32_t what, uint64_t memory, int64_t size, int32_t rounds, double *amount,
                             double *seconds);

#ifdef __cplusplus
}
#endif
#endif
