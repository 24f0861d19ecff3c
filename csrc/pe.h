/* pe.h: the C ABI of pyengine.
 *
 * A kernel is a plain function over tensor descriptors. Every thread of a run calls it with the same arguments and its own
 * `pe_stream`; the kernel divides its work with pe_next (dynamic chunks) or ith/nth, and must give bitwise the same result for
 * any number of threads, and for any number of other rows in the same batch. The runner waits for all threads after each
 * kernel. Parameter structs and named prototypes (gen/kernels.h) and tables of kernels (gen/cpu/table.c) are generated from the op
 * declarations in pyengine/ops, formats (gen/formats.h) from the table of dtypes.
 */
#ifndef PE_H
#define PE_H

#include <stddef.h>
#include <stdint.h>

#include "gen/formats.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PE_API __declspec(dllexport)
#else
#define PE_API __attribute__((visibility("default")))
#endif

enum { PE_MAX_DIMS = 6, PE_MAX_PHASES = 4, PE_MAX_MESSAGE = 256 };

typedef enum pe_status {
  PE_OK = 0,
  PE_BAD_SHAPE = 1,
  PE_BAD_DTYPE = 2,
  PE_BAD_VALUE = 3,   /* a run-time number (token id, cell, position) is out of its range */
  PE_NO_MEMORY = 4,
  PE_NO_KERNEL = 5    /* this backend has no kernel for these dtypes or this layout */
} pe_status;

/* What one block of a format holds; a plain number is a block of one. elements is 0 where there is no such format. The formats and
 * their numbers are ggml's (gen/formats.h: PE_Q4_0 and so on); PE_PACKED + number is the same format after pe_pack_groups. */
typedef struct pe_format { int32_t elements, bytes; } pe_format;

static inline __attribute__((always_inline)) pe_format pe_format_of(int32_t dtype) { /* folds away where dtype is a constant */
  switch (dtype) {
#define PE_FORMAT_CASE(name, id, elements, bytes) case id: { const pe_format f = {elements, bytes}; return f; }
    PE_FORMATS(PE_FORMAT_CASE)
#undef PE_FORMAT_CASE
    default: { const pe_format none = {0, 0}; return none; }
  }
}

/* Shapes are row-major, last axis contiguous. Strides are in bytes. For block formats shape[ndim-1] counts elements, and
 * stride[ndim-1] is the size of one block. */
typedef struct pe_tensor {
  void *data;
  int32_t dtype;
  int32_t ndim;
  int64_t shape[PE_MAX_DIMS];
  int64_t stride[PE_MAX_DIMS];
} pe_tensor;

/* What one thread of a run knows. `scratch` is shared by all threads of the node; its size is what the op's declaration asked
 * for. Counters start at zero for every node. */
typedef struct pe_stream {
  int32_t ith, nth;
  char *scratch;
  int64_t scratch_bytes;
  int64_t *counters;      /* [PE_MAX_PHASES], shared by the threads of the node */
  void *team;             /* the pool's own */
  char *message;          /* [PE_MAX_MESSAGE]: why a kernel failed */
} pe_stream;

/* The next chunk number of a phase: 0, 1, 2 ... each handed out once; the caller stops at its own number of chunks. */
static inline int64_t pe_next(pe_stream *s, int phase) {
  return __atomic_fetch_add(&s->counters[phase], 1, __ATOMIC_RELAXED);
}

/* All threads of the run wait for each other; memory written before is seen after. */
PE_API void pe_barrier(pe_stream *s);

/* Note why a kernel fails and return the status: `return pe_fail(s, PE_BAD_VALUE, "rows: id %d of %d", ...)`. */
PE_API pe_status pe_fail(pe_stream *s, pe_status status, const char *format, ...);

/* Arguments of a kernel in the order of its declaration. Argument i is t[start[i]] .. t[start[i] + count[i] - 1]: one tensor,
 * none (an optional input that is absent) or several. Outputs come after inputs. */
typedef struct pe_args {
  const pe_tensor *const *t;
  const int32_t *start;
  const int32_t *count;
  int32_t n_in, n_out;
} pe_args;

/* A user's own op is a shared library that exports functions of this type. */
typedef pe_status (*pe_kernel)(const pe_args *args, const void *params, pe_stream *s);

static inline const pe_tensor *pe_arg(const pe_args *a, int i) { return a->count[i] ? a->t[a->start[i]] : (const pe_tensor *)0; }

#ifdef __cplusplus
}
#endif
#endif
