/* program.c: fill in run-time axes, then call one kernel after another on all threads. */
#include "program.h"

#include "../guard.h"
#include "pack.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "../host/system.h"

static int64_t value_of(pe_axis a, const int64_t *dims) { return a.dim < 0 ? a.scale : a.scale * dims[a.dim]; }

static void resolve(pe_program *p, const int64_t *dims) {
  for (int32_t i = 0; i < p->n_tensors; i++) {
    const pe_program_tensor *spec = &p->spec[i];
    pe_tensor *t = &p->tensors[i];
    t->data = p->bases[spec->base] + spec->offset;
    for (int d = 0; d < spec->ndim; d++) {
      t->shape[d] = value_of(spec->shape[d], dims);
      t->stride[d] = value_of(spec->stride[d], dims);
    }
  }
}

#if defined(PE_ASAN)
/* The program's memories are poisoned during a run, but for the arguments and the scratch of the kernel that runs: not what lies
 * between tensors, nor what belongs to other steps. */
typedef void (*marker)(void const volatile *p, size_t bytes);

static void mark(const pe_program *p, const char *start, int64_t bytes, marker as) {
  for (int32_t m = 0; m < p->n_memories; m++) {
    const char *end = p->memories[m].start + p->memories[m].bytes;
    if (start < p->memories[m].start || start >= end) continue;
    const size_t before = as == __asan_poison_memory_region ? (uintptr_t)start % 8 : 0; /* shadows are of 8 bytes */
    as(start - before, (size_t)(bytes < end - start ? bytes : end - start) + before);
  }
}

static void mark_tensor(const pe_program *p, const pe_tensor *t, marker as) {
  int64_t index[PE_MAX_DIMS] = {0};
  for (int d = 0; d < t->ndim; d++)
    if (t->shape[d] <= 0) return;
  if (t->dtype >= PE_PACKED) {
    int64_t bytes = pe_pack_bytes(t->dtype - PE_PACKED, t->shape[t->ndim - 2], t->shape[t->ndim - 1]);
    for (int d = 0; d < t->ndim - 2; d++) bytes *= t->shape[d];
    mark(p, t->data, bytes, as);
    return;
  }
  const pe_format f = pe_format_of(t->dtype);
  int outer = t->ndim; /* axes that are walked; a run of the others has no gaps */
  int64_t run = f.bytes;
  if (outer && t->stride[outer - 1] == f.bytes) run *= t->shape[--outer] / f.elements;
  while (outer && outer < t->ndim && t->stride[outer - 1] == run) run *= t->shape[--outer];
  for (;;) {
    const char *at = t->data;
    int d = outer - 1;
    for (int i = 0; i < outer; i++) at += index[i] * t->stride[i];
    mark(p, at, run, as);
    while (d >= 0 && ++index[d] == t->shape[d]) index[d--] = 0;
    if (d < 0) return;
  }
}

static void mark_node(const pe_program *p, const pe_program_node *node, marker as) {
  for (int32_t i = 0; i < node->args.n_in + node->args.n_out; i++)
    for (int32_t j = 0; j < node->args.count[i]; j++) mark_tensor(p, node->args.t[node->args.start[i] + j], as);
  if (node->scratch_bytes) mark(p, p->bases[0] + node->scratch_offset, node->scratch_bytes, as);
}

static void mark_all(const pe_program *p, marker as) {
  for (int32_t m = 0; m < p->n_memories; m++) as(p->memories[m].start, (size_t)p->memories[m].bytes);
}
#endif

static void run_member(void *context, int ith, int nth) {
  pe_program *p = context;
  char message[PE_MAX_MESSAGE];
  double start = p->profile && ith == 0 ? pe_seconds() : 0;
  for (int32_t i = p->first_node; i < p->n_nodes; i++) {
    pe_program_node *node = &p->nodes[i];
    message[0] = 0;
#if defined(PE_ASAN)
    if (ith == 0) mark_node(p, node, __asan_unpoison_memory_region);
    if (nth > 1) pe_pool_barrier(p->pool);
#endif
    pe_stream s = {ith, nth, p->bases[0] + node->scratch_offset, node->scratch_bytes,
                   p->counters + (int64_t)i * PE_COUNTER_STRIDE, p->pool, message};
    pe_status status = node->run(&node->args, node->params, &s);
    if (status != PE_OK) {
      int32_t none = -1;
      if (__atomic_compare_exchange_n(&p->failed_node, &none, i, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        p->status = (int32_t)status;
        memcpy(p->message, message, sizeof message);
      }
    }
    if (nth > 1) pe_pool_barrier(p->pool);
#if defined(PE_ASAN)
    if (ith == 0) mark_node(p, node, __asan_poison_memory_region);
#endif
    if (p->profile && ith == 0) {
      double t = pe_seconds();
      node->seconds += t - start;
      start = t;
    }
    /* Not "has any failed": a member that is ahead may fail in the next kernel before another one looks, which must go there
     * too. */
    if (__atomic_load_n(&p->failed_node, __ATOMIC_ACQUIRE) == i) return;
  }
}

int32_t pe_program_run(pe_program *p, pe_pool *pool, const int64_t *dims, int32_t first_node) {
  p->first_node = first_node;
  resolve(p, dims);
  memset(p->counters, 0, sizeof(int64_t) * PE_COUNTER_STRIDE * (size_t)p->n_nodes);
  p->pool = pool;
  p->status = PE_OK;
  p->failed_node = -1;
  p->message[0] = 0;
#if defined(PE_ASAN)
  mark_all(p, __asan_poison_memory_region);
#endif
  pe_pool_run(pool, run_member, p);
#if defined(PE_ASAN)
  mark_all(p, __asan_unpoison_memory_region);
#endif
  return p->status;
}

void pe_barrier(pe_stream *s) {
  if (s->nth > 1) pe_pool_barrier(s->team);
}

pe_status pe_fail(pe_stream *s, pe_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(s->message, PE_MAX_MESSAGE, format, args);
  va_end(args);
  return status;
}
