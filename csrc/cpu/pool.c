/* pool.c: threads, the barrier between kernels, and the start of a job.
 *
 * The caller of pe_pool_run is member 0. A barrier costs two cache-line transfers a member (0.1 to 0.3 us); members yield
 * after SPIN_BARRIER turns, so that a machine with fewer free cores than threads still makes progress.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

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
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  pthread_t *threads;
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
    else sched_yield();
  }
}

static void *member_main(void *arg) {
  struct member *m = arg;
  pe_pool *p = m->pool;
  uint32_t seen = 0;
  for (;;) {
    for (uint32_t i = 0; i < SPIN_IDLE && __atomic_load_n(&p->job_number.value, __ATOMIC_ACQUIRE) == seen; i++) PE_PAUSE();
    if (__atomic_load_n(&p->job_number.value, __ATOMIC_ACQUIRE) == seen) {
      pthread_mutex_lock(&p->mutex);
      p->sleeping++;
      while (__atomic_load_n(&p->job_number.value, __ATOMIC_ACQUIRE) == seen) pthread_cond_wait(&p->wake, &p->mutex);
      p->sleeping--;
      pthread_mutex_unlock(&p->mutex);
    }
    seen++;
    if (p->stop) return 0;
    p->job(p->context, m->ith, p->n);
    pe_pool_barrier(p);
  }
}

static void start_job(pe_pool *p) {
  pthread_mutex_lock(&p->mutex);
  __atomic_add_fetch(&p->job_number.value, 1, __ATOMIC_RELEASE);
  if (p->sleeping) pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->mutex);
}

pe_pool *pe_pool_new(int n) {
  pe_pool *p = aligned_alloc(LINE, (sizeof *p + LINE - 1) / LINE * LINE);
  if (!p) return 0;
  *p = (pe_pool){.n = n};
  pthread_mutex_init(&p->mutex, 0);
  pthread_cond_init(&p->wake, 0);
  p->threads = calloc((size_t)n, sizeof *p->threads);
  p->members = calloc((size_t)n, sizeof *p->members);
  if (!p->threads || !p->members) { p->n = 1; pe_pool_free(p); return 0; }
  for (int i = 1; i < n; i++) {
    p->members[i] = (struct member){p, i};
    if (pthread_create(&p->threads[i], 0, member_main, &p->members[i])) { p->n = i; pe_pool_free(p); return 0; }
  }
  return p;
}

void pe_pool_free(pe_pool *p) {
  if (!p) return;
  p->stop = 1;
  start_job(p);
  for (int i = 1; i < p->n; i++) pthread_join(p->threads[i], 0);
  pthread_mutex_destroy(&p->mutex);
  pthread_cond_destroy(&p->wake);
  free(p->threads);
  free(p->members);
  free(p);
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
