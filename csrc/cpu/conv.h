/* conv.h: what the files of conv2d share: conv.c says which of them computes what. */
#ifndef PE_CONV_H
#define PE_CONV_H

#include "linear_parts.h"

typedef struct conv {
  const pe_tensor *x, *w, *bias, *out;
  int64_t n, height, width, c;    /* the pictures */
  int64_t rows, columns, o;       /* the results */
  int64_t kh, kw, sy, sx, top, left, dy, dx, groups;
  int64_t cg, og, k;              /* channels and outputs of a group; k of a window */
  int32_t activation;
} conv;

static inline int32_t conv_format(const pe_tensor *w) { return w->dtype >= PE_PACKED ? w->dtype - PE_PACKED : w->dtype; }

/* winograd.c: whether it takes a convolution, the scratch that it needs, and the kernel. */
int PE_NAME(winograd_fits)(const conv *t);
int64_t PE_NAME(winograd_bytes)(const conv *t, int64_t n_threads);
pe_status PE_NAME(winograd)(const conv *t, pe_stream *s);

#endif
