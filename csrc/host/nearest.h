/* nearest.h: which of the kept rows points most nearly the same way as each evicted one. setup.py reads these declarations for cffi, so
 * they stay plain.
 *
 *   nearest[i] = argmax over c of  x_i . y_c / (|x_i| |y_c|)      x_i = keys[evicted[i]], y_c = keys[kept[c]]; of equals the lowest c
 *
 * All products are made in float32, of rows of length 1, in tiles; then those that can be the largest are compared in double: all within
 * `margin` of the largest one, which is twice the most that a float32 product of such rows can be wrong by, and at least 1e-5. So the
 * result is that of doubles, on every instruction set. A row of length 0 has the cosine 0 to every other.
 */
#ifndef PE_NEAREST_H
#define PE_NEAREST_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pe_nearest_input {
  const double *keys;              /* [n][width] */
  const int64_t *kept, *evicted;   /* [n_kept], [n_evicted]: rows of keys */
  int64_t width, n_kept, n_evicted;
} pe_nearest_input;

/* Bytes of scratch, which keeps nothing between calls; aligned to 8 bytes. */
PE_API int64_t pe_nearest_scratch(int64_t n_kept, int64_t width);

/* nearest and cosine [n_evicted]. `isa` is "avx512", "avxvnni", "avx2", "sme", "sve256", "i8mm", "neon" or "generic", NULL for the machine's best; all give the same bits.
 * Calls with other evicted rows may run side by side. PE_BAD_SHAPE: n_kept or width below 1. PE_BAD_VALUE: a row that is not finite, or
 * whose length is not. PE_NO_KERNEL: no such instruction set here. */
PE_API pe_status pe_nearest(const char *isa, const pe_nearest_input *input, void *scratch, int32_t *nearest, double *cosine);

#ifdef __cplusplus
}
#endif
#endif
