/* system.h: what operating systems do differently: pages of memory, threads, the clock. POSIX, and Windows by its own functions. */
#ifndef PE_SYSTEM_H
#define PE_SYSTEM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#include <process.h>
#else
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#endif

/* pe_pages_new: zeroed memory that begins on a page; null when there is none. Huge pages are a wish, and only Linux hears it.
 * PE_THREAD(name, argument) { ... return 0; } is what a thread runs. pe_thread_start returns 0 when the thread runs.
 * pe_condition_wait may return early, so its caller asks again. pe_seconds: of a clock that never goes back. */
#if defined(_WIN32)

static inline void *pe_pages_new(size_t nbytes, int huge) {
  (void)huge;
  return VirtualAlloc(0, nbytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
static inline void pe_pages_free(void *p, size_t nbytes) { (void)nbytes; VirtualFree(p, 0, MEM_RELEASE); }

typedef HANDLE pe_thread;
typedef SRWLOCK pe_mutex;
typedef CONDITION_VARIABLE pe_condition;
#define PE_THREAD(name, argument) static unsigned __stdcall name(void *argument)
static inline int pe_thread_start(pe_thread *t, unsigned(__stdcall *run)(void *), void *argument) {
  *t = (HANDLE)_beginthreadex(0, 0, run, argument, 0, 0);
  return *t == 0;
}
static inline void pe_thread_join(pe_thread t) { WaitForSingleObject(t, INFINITE); CloseHandle(t); }
static inline void pe_thread_yield(void) { SwitchToThread(); }
static inline void pe_mutex_new(pe_mutex *m) { InitializeSRWLock(m); }
static inline void pe_mutex_free(pe_mutex *m) { (void)m; }
static inline void pe_mutex_lock(pe_mutex *m) { AcquireSRWLockExclusive(m); }
static inline void pe_mutex_unlock(pe_mutex *m) { ReleaseSRWLockExclusive(m); }
static inline void pe_condition_new(pe_condition *c) { InitializeConditionVariable(c); }
static inline void pe_condition_free(pe_condition *c) { (void)c; }
static inline void pe_condition_wait(pe_condition *c, pe_mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static inline void pe_condition_wake_all(pe_condition *c) { WakeAllConditionVariable(c); }

static inline int64_t pe_process_id(void) { return (int64_t)GetCurrentProcessId(); }
static inline double pe_seconds(void) {
  LARGE_INTEGER now, rate;
  QueryPerformanceCounter(&now);
  QueryPerformanceFrequency(&rate);
  return (double)now.QuadPart / (double)rate.QuadPart;
}

#else

static inline void *pe_pages_new(size_t nbytes, int huge) {
  void *p = mmap(0, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return 0;
#if defined(MADV_HUGEPAGE)
  if (nbytes >= (size_t)4 << 20) madvise(p, nbytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
  (void)huge;
#endif
  return p;
}
static inline void pe_pages_free(void *p, size_t nbytes) { munmap(p, nbytes); }

typedef pthread_t pe_thread;
typedef pthread_mutex_t pe_mutex;
typedef pthread_cond_t pe_condition;
#define PE_THREAD(name, argument) static void *name(void *argument)
static inline int pe_thread_start(pe_thread *t, void *(*run)(void *), void *argument) { return pthread_create(t, 0, run, argument); }
static inline void pe_thread_join(pe_thread t) { pthread_join(t, 0); }
static inline void pe_thread_yield(void) { sched_yield(); }
static inline void pe_mutex_new(pe_mutex *m) { pthread_mutex_init(m, 0); }
static inline void pe_mutex_free(pe_mutex *m) { pthread_mutex_destroy(m); }
static inline void pe_mutex_lock(pe_mutex *m) { pthread_mutex_lock(m); }
static inline void pe_mutex_unlock(pe_mutex *m) { pthread_mutex_unlock(m); }
static inline void pe_condition_new(pe_condition *c) { pthread_cond_init(c, 0); }
static inline void pe_condition_free(pe_condition *c) { pthread_cond_destroy(c); }
static inline void pe_condition_wait(pe_condition *c, pe_mutex *m) { pthread_cond_wait(c, m); }
static inline void pe_condition_wake_all(pe_condition *c) { pthread_cond_broadcast(c); }

static inline int64_t pe_process_id(void) { return getpid(); }
static inline double pe_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
#endif
