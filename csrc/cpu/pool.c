/* pool.c: threads, the barrier between kernels, and the start of a job.
 *
 * The caller of pe_pool_run is member 0. A barrier costs two cache-line transfers a member (0.1 to 0.3 us); members yield
 * after SPIN_BARRIER turns, so that a machine with fewer free cores than threads still makes progress.
 */
#include "pool.h"

#include <stdlib.h>

#include "../host/system.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define PE_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PE_PAUSE() __asm__ __volatile__("yield")
#else
#define PE_PAUSE() ((void)0)
#endif

enum { SPIN_BARRIER = 1 << 11, SPIN_IDLE = 1 << 13, LINE = 64 };

typedef struct { _Alignas(LINE) uint32_t value; } line_u32;

struct pe_pool {
  line_u32 arrived, phase; /* barrier */
  line_u32 job_number;     /* grows by one for each job */
  pe_job job;
  void *context;
  int n, stop;
  int sleeping;            /* under mutex */
  pe_mutex mutex;
  pe_condition wake;
  pe_thread *threads;
  struct member { pe_pool *pool; int ith; } *members;
};

void pe_pool_barrier(pe_pool *p) {
  if (p->n == 1) return;
  uint32_t phase = __atomic_load_n(&p->phase.value, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&p->arrived.value, 1, __ATOMIC_ACQ_REL) == (uint32_t)p->n) {
    __atomic_store_n(&p->arrived.value, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&p->phase.value, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (uint32_t i = 0; __atomic_load_n(&p->phase.value, __ATOMIC_ACQUIRE) == phase; i++) {
    if (i < SPIN_BARRIER) PE_PAUSE();
    else pe_thread_yield();
  }
}

PE_THREAD(member_main, arg) {
  struct member *m = arg;
  pe_pool *p = m->pool;
  uint32_t seen = 0;
  for (;;) {
    for (uint32_t i = 0; i < SPIN_IDLE && __atomic_load_n(&p->job_number.value, __ATOMIC_ACQUIRE) == seen; i++) PE_PAUSE();
    if (__atomic_load_n(&p->job_number.value, __ATOMIC_ACQUIRE) == seen) {
      pe_mutex_lock(&p->mutex);
      p->sleeping++;
      while (__atomic_load_n(&p->job_number.value, __ATOMIC_ACQUIRE) == seen) pe_condition_wait(&p->wake, &p->mutex);
      p->sleeping--;
      pe_mutex_unlock(&p->mutex);
    }
    seen++;
    if (p->stop) return 0;
    p->job(p->context, m->ith, p->n);
    pe_pool_barrier(p);
  }
}

static void start_job(pe_pool *p) {
  pe_mutex_lock(&p->mutex);
  __atomic_add_fetch(&p->job_number.value, 1, __ATOMIC_RELEASE);
  if (p->sleeping) pe_condition_wake_all(&p->wake);
  pe_mutex_unlock(&p->mutex);
}

pe_pool *pe_pool_new(int n) {
  pe_pool *p = pe_pages_new(sizeof *p, 0); /* whole cache lines */
  if (!p) return 0;
  p->n = n;
  pe_mutex_new(&p->mutex);
  pe_condition_new(&p->wake);
  p->threads = calloc((size_t)n, sizeof *p->threads);
  p->members = calloc((size_t)n, sizeof *p->members);
  if (!p->threads || !p->members) { p->n = 1; pe_pool_free(p); return 0; }
  for (int i = 1; i < n; i++) {
    p->members[i] = (struct member){p, i};
    if (pe_thread_start(&p->threads[i], member_main, &p->members[i])) { p->n = i; pe_pool_free(p); return 0; }
  }
  return p;
}

void pe_pool_free(pe_pool *p) {
  if (!p) return;
  p->stop = 1;
  start_job(p);
  for (int i = 1; i < p->n; i++) pe_thread_join(p->threads[i]);
  pe_mutex_free(&p->mutex);
  pe_condition_free(&p->wake);
  free(p->threads);
  free(p->members);
  pe_pages_free(p, sizeof *p);
}

int pe_pool_size(const pe_pool *p) { return p->n; }

void pe_pool_run(pe_pool *p, pe_job job, void *context) {
  if (p->n == 1) { job(context, 0, 1); return; }
  p->job = job;
  p->context = context;
  start_job(p);
  job(context, 0, p->n);
  pe_pool_barrier(p);
}
