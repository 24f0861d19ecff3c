/* program.c: fill in run-time axes, then call one kernel after another on all threads. */
#include "program.h"

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

static void run_member(void *context, int ith, int nth) {
  pe_program *p = context;
  char message[PE_MAX_MESSAGE];
  double start = p->profile && ith == 0 ? pe_seconds() : 0;
  for (int32_t i = p->first_node; i < p->n_nodes; i++) {
    pe_program_node *node = &p->nodes[i];
    message[0] = 0;
    pe_stream s = {ith, nth, p->bases[0] + node->scratch_offset, node->scratch_bytes,
                   p->counters + (int64_t)i * PE_COUNTER_STRIDE, p->pool, message};
    pe_status status = node->run(&node->args, node->params, &s);
    if (status != PE_OK) {
      int32_t none = PE_OK;
      if (__atomic_compare_exchange_n(&p->status, &none, (int32_t)status, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        p->failed_node = i;
        memcpy(p->message, message, sizeof message);
      }
    }
    if (nth > 1) pe_pool_barrier(p->pool);
    if (p->profile && ith == 0) {
      double t = pe_seconds();
      node->seconds += t - start;
      start = t;
    }
    if (__atomic_load_n(&p->status, __ATOMIC_ACQUIRE) != PE_OK) return;
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
  pe_pool_run(pool, run_member, p);
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
