/* dequant.h: one row of any GGUF format as float32. setup.py reads these declarations for cffi, so they stay plain. */
#ifndef PE_DEQUANT_H
#define PE_DEQUANT_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Write the n elements at src as float32, bit for bit as gguf-py 0.19 computes them (NaN payloads aside). src needs
 * no alignment. PE_BAD_SHAPE: n is negative or not a whole number of blocks. PE_BAD_DTYPE: not a weight format that
 * gguf-py dequantizes. PE_NO_KERNEL: an IQ format whose codebook has not been set. dst is written only if the result
 * is PE_OK. */
PE_API pe_status pe_dequantize_row(int32_t dtype, const void *src, float *dst, int64_t n);

/* Copy the codebook of an IQ1, IQ2 or IQ3 format: int8 [rows][8], for IQ3 [rows][4], elements as they enter the product
 * (quants.h). IQ1_S and IQ1_M share one. Setting the same table twice is fine; two threads must not set at once.
 * PE_BAD_DTYPE: the format has no codebook. PE_BAD_SHAPE: bytes is not the size of the table.
 * PE_BAD_VALUE: another table has been set before. */
PE_API pe_status pe_set_codebook(int32_t dtype, const void *table, int64_t bytes);

/* The codebook that was set, or NULL. It stays where it is for the life of the process. */
PE_API const int8_t *pe_codebook(int32_t dtype);

#ifdef __cplusplus
}
#endif
#endif
