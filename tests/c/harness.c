/* harness.c: runs one kernel with plain pthreads, so that kernels can be tested without the extension.
 * Compiled into the same shared library as the kernels of one instruction set. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cpu/cpu.h"
#include "../../csrc/table.h"

extern const pe_kernel_entry PE_NAME(kernels)[];

void pe_barrier(pe_stream *s) { pthread_barrier_wait((pthread_barrier_t *)s->team); }

pe_status pe_fail(pe_stream *s, pe_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(s->message, PE_MAX_MESSAGE, format, args);
  va_end(args);
  return status;
}

typedef struct job {
  pe_kernel run;
  const pe_args *args;
  const void *params;
  pe_stream stream;
  char message[PE_MAX_MESSAGE];
  pe_status status;
} job;

static void *run_job(void *p) {
  job *j = p;
  j->status = j->run(j->args, j->params, &j->stream);
  return 0;
}

static const pe_kernel_entry *find(const char *name) {
  for (const pe_kernel_entry *k = PE_NAME(kernels); k->name; k++)
    if (!strcmp(k->name, name)) return k;
  return 0;
}

/* Bytes of scratch that the kernel asks for, or -1 where there is no such kernel. */
PE_API int64_t harness_scratch(const char *name, const pe_args *args, const void *params, int32_t n_threads) {
  const pe_kernel_entry *k = find(name);
  if (!k) return -1;
  return k->scratch ? k->scratch(args, params, n_threads) : 0;
}

/* Run a kernel `repeat` times; returns its status, -1 where there is none. message: [PE_MAX_MESSAGE]. */
PE_API int harness_run(const char *name, const pe_args *args, const void *params, int32_t n_threads, char *scratch,
                       int64_t scratch_bytes, int32_t repeat, char *message) {
  const pe_kernel_entry *k = find(name);
  if (!k || n_threads < 1 || n_threads > 64) return -1;
  job *jobs = calloc((size_t)n_threads, sizeof(job));
  pthread_t ids[64];
  pthread_barrier_t barrier;
  int status = PE_OK;
  pthread_barrier_init(&barrier, 0, (unsigned)n_threads);
  for (int32_t r = 0; r < repeat && !status; r++) {
    int64_t counters[PE_MAX_PHASES] = {0};
    for (int32_t i = 0; i < n_threads; i++) {
      job *j = &jobs[i];
      *j = (job){.run = k->run, .args = args, .params = params};
      j->stream = (pe_stream){i, n_threads, scratch, scratch_bytes, counters, &barrier, j->message};
      if (i) pthread_create(&ids[i], 0, run_job, j);
    }
    run_job(&jobs[0]);
    for (int32_t i = 1; i < n_threads; i++) pthread_join(ids[i], 0);
    for (int32_t i = 0; i < n_threads; i++)
      if (jobs[i].status && !status) {
        status = jobs[i].status;
        memcpy(message, jobs[i].message, PE_MAX_MESSAGE);
      }
  }
  pthread_barrier_destroy(&barrier);
  free(jobs);
  return status;
}
