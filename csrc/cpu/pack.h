/* pack.h: weights repacked so that 16 rows lie side by side. setup.py reads these declarations for cffi, so they stay plain.
 *
 * A matrix [n, k] becomes ceil(n / 16) groups of 16 rows; rows beyond n are zero. A group is one run of memory that the
 * decode kernel reads from end to end. Everything in it is a vector with one lane a row:
 *
 *   group   = unit, unit, ...          unit = [head of 1, 2 or 4 blocks][body of block 0][body of block 1] ...
 *             A unit has so many blocks that its heads fill whole cache lines; the last unit may hold fewer bodies.
 *   block   = 32 or 256 of k, as in the file; its body is a run of steps of 32 of k.
 *   step    = nibbles (4 vectors of 64 bytes) and bit planes, or 8 vectors of whole bytes
 *
 *   bytes     vector g (0..7), lane r, byte j       = code of row r at k = 4 g + j of the step (Q8_0: with the top bit flipped,
 *                                                     so that 0 is 128)
 *   nibbles   vector v (0..3), low nibbles          = the bytes of vector v;   high nibbles = those of vector v + 4
 *   plane 1   one vector, bit g of a byte           = one bit of the byte of vector g
 *   plane 2   two vectors, bits 2t, 2t+1 of vector i = two bits of the byte of vector 4 i + t
 *
 *   format  k    head of a block                    steps of the body          w = s * (u - z), or s * u + o    bytes/weight
 *   Q4_0    32   d                                  nibbles                    s = d, z = 8                     0.5625
 *   Q4_1    32   d, m                               nibbles                    s = d, o = m                     0.625
 *   Q5_0    32   d                                  nibbles, plane 1           s = d, z = 16                    0.6875
 *   Q5_1    32   d, m                               nibbles, plane 1           s = d, o = m                     0.75
 *   Q8_0    32   d                                  bytes                      s = d, z = 128                   1.0625
 *   IQ4_NL  32   d                                  nibbles                    s = d, u = table, z = 128        0.5625
 *   MXFP4   32   e (one byte a row)                 nibbles                    s = 2^(e-128), u = table, z = 12 0.5313
 *   Q2_K    256  d, dmin, 16 bytes [min:scale]      plane 2                    by 16: s = d*sc, o = -dmin*min   0.3281
 *   Q3_K    256  d    (12 bytes of scales in body)  plane 2, plane 1           by 16: s = d*(sc-32), z = 4      0.4297
 *   Q4_K    256  d, dmin, 12 bytes of scales        nibbles                    s = d*sc, o = -dmin*min          0.5625
 *   Q5_K    256  d, dmin, 12 bytes of scales        nibbles, plane 1           s = d*sc, o = -dmin*min          0.6875
 *   Q6_K    256  d    (16 scales in body)           nibbles, plane 2           by 16: s = d*sc, z = 32          0.8203
 *   IQ4_XS  256  d, scales_h, scales_l              nibbles                    s = d*(sc-32), u = table, z = 128 0.5313
 *   F32, F16, BF16: [k][16 rows]                                                                                4, 2, 2
 *
 * d, m, dmin, scales_h are 16-bit numbers, 16 of them side by side (32 bytes). The bytes of scales of one row stay words of 4
 * bytes, one word a lane (64 bytes for 16 rows), as the file has them. So a packed matrix has the size of the file's, but for
 * rows added to fill the last group and at most 48 bytes a group to fill the last unit.
 */
#ifndef PE_PACK_H
#define PE_PACK_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of one group of 16 rows; 0 if the format has no packed form or k is no whole number of blocks. */
PE_API int64_t pe_pack_group_bytes(int32_t dtype, int64_t k);

/* Bytes of the packed matrix [n, k]; 0 if the format has no packed form (its file layout is used instead), a size is not
 * positive, k is no whole number of blocks, or the bytes do not fit 63 bits. */
PE_API int64_t pe_pack_bytes(int32_t dtype, int64_t n, int64_t k);

/* Pack groups group_begin .. group_end - 1 of the matrix at src (file layout, rows one after the other) into their place in
 * the packed matrix at dst; threads may pack disjoint ranges at once. Neither needs alignment, but kernels are fastest when
 * dst has 64 bytes. PE_BAD_DTYPE: no packed form. PE_BAD_SHAPE: sizes as in pe_pack_bytes, or a range outside the matrix. */
PE_API pe_status pe_pack_groups(int32_t dtype, const void *src, int64_t n, int64_t k, int64_t group_begin,
                                int64_t group_end, void *dst);

#ifdef __cplusplus
}
#endif
#endif
