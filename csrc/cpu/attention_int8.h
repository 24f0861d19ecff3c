/* attention_int8.h: the form of attention that multiplies bytes; attention.c hands over to it where products="int8". */
#ifndef PE_ATTENTION_INT8_H
#define PE_ATTENTION_INT8_H

#include "cpu.h"

int64_t PE_NAME(attention_int8_scratch)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, int32_t n_threads);
pe_status PE_NAME(attention_int8)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo,
                                  const pe_tensor *hi, const pe_tensor *out, float scale, pe_stream *s);

#endif
