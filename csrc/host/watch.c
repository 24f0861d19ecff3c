/* watch.c: portable C, compiled once. watch.h says what for.
 *
 * The handler runs on the thread that reads. It looks through a table that is only added to while it runs, replaces pages by one
 * system call, and touches nothing else. POSIX does not list mmap among the functions that a handler may call; on Linux, macOS and
 * the BSDs it is the bare system call.
 */
#include "watch.h"

#if defined(_WIN32)
int32_t pe_watch(const void *start, int64_t n_bytes) { (void)start; (void)n_bytes; return -1; }
int32_t pe_watch_lost(int32_t number) { (void)number; return 0; }
void pe_watch_end(int32_t number) { (void)number; }
#else
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WATCHED = 1024 };                                 /* files at once: a model in parts has some tens */

static struct watched { uintptr_t start, end; int32_t lost; } table[WATCHED];      /* end 0: free */
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;                          /* what handled the signal before us */
static int32_t passing;                                  /* a fault that is not ours has been passed on, and has not come back */
static uintptr_t page_bytes;

/* Let whoever was there before have it. A handler that ends the process raises the signal again, which may come back here. */
static void pass_on(int number, siginfo_t *info, void *context) {
  const int takes_info = (before.sa_flags & SA_SIGINFO) != 0, sent = info->si_code <= 0;
  const int handled = takes_info || (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN);
  if (!takes_info && before.sa_handler == SIG_IGN && sent) return;
  if (handled && !__atomic_exchange_n(&passing, 1, __ATOMIC_ACQ_REL)) {
    if (takes_info) before.sa_sigaction(number, info, context);
    else before.sa_handler(number);
    __atomic_store_n(&passing, 0, __ATOMIC_RELEASE);
    return;
  }
  signal(number, SIG_DFL);
  if (sent) raise(number); /* else the read is done again, and ends the process */
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
  const uintptr_t at = (uintptr_t)info->si_addr;
  for (int32_t i = 0; info->si_code > 0 && i < WATCHED; i++) { /* 0 and below: another process sent it */
    struct watched *w = &table[i];
    const uintptr_t end = __atomic_load_n(&w->end, __ATOMIC_ACQUIRE);
    if (!end || at < w->start || at >= end) continue;
    const uintptr_t page = at / page_bytes * page_bytes;
    const int was = errno;
    void *zeros = mmap((void *)page, end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    errno = was;
    if (zeros == MAP_FAILED) break;
    __atomic_store_n(&w->lost, 1, __ATOMIC_RELEASE);
    return;
  }
  pass_on(number, info, context);
}

/* Others may have taken the signal since the last file was opened. */
static int take_signal(void) {
  struct sigaction now, ours = {0};
  if (sigaction(SIGBUS, 0, &now)) return 0;
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return 1;
  before = now;
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; /* what is raised while it is passed on comes at once */
  sigemptyset(&ours.sa_mask);
  return !sigaction(SIGBUS, &ours, 0);
}

int32_t pe_watch(const void *start, int64_t n_bytes) {
  int32_t number = -1;
  pthread_mutex_lock(&changing);
  page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
  for (int32_t i = 0; n_bytes > 0 && take_signal() && i < WATCHED; i++) {
    if (table[i].end) continue;
    const uintptr_t end = (uintptr_t)start + (uintptr_t)n_bytes;
    table[i].start = (uintptr_t)start;
    table[i].lost = 0;
    __atomic_store_n(&table[i].end, (end + page_bytes - 1) / page_bytes * page_bytes, __ATOMIC_RELEASE);
    number = i;
    break;
  }
  pthread_mutex_unlock(&changing);
  return number;
}

int32_t pe_watch_lost(int32_t number) {
  return number >= 0 && number < WATCHED ? __atomic_load_n(&table[number].lost, __ATOMIC_ACQUIRE) : 0;
}

void pe_watch_end(int32_t number) {
  if (number < 0 || number >= WATCHED) return;
  pthread_mutex_lock(&changing);
  __atomic_store_n(&table[number].end, 0, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&changing);
}
#endif
