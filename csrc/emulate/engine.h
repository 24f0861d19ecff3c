/* engine.h: blocks of threads on the CPU, for kernels written for a graphics card.
 *
 * Nothing here knows CUDA or Metal: cuda.h and metal.h put their words on top. A launch runs `body` once for every thread of every
 * block. Each thread is a fibre (a lane) with its own stack; 32 lanes are a warp (Metal: a simdgroup). A lane runs until it must wait
 * for others - a barrier of the block, or a collective of its warp - and then the next one continues, always in the same order, so
 * a run can be repeated. Blocks run one after the other on each thread of the OS; several such threads share the blocks of a launch.
 *
 * What goes wrong inside a kernel ends the launch: launch() returns false and last_error() says what, with kernel, block, thread and
 * line. With PE_CHECKED the engine watches every access of memory as well (check.cpp).
 */
#ifndef PE_EMULATE_ENGINE_H
#define PE_EMULATE_ENGINE_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace emu {
constexpr int WARP = 32, MAX_THREADS = 1024;

enum class Event : uint8_t { block, barrier, collective, mma, dp4a, atomic, n_events };

struct Index3 {
  uint32_t x = 1, y = 1, z = 1;

  /* The index of number n in a box of this size, x fastest. */
  Index3 at(int64_t n) const { return {uint32_t(n % x), uint32_t(n / x % y), uint32_t(n / x / y)}; }
  std::string text() const { return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")"; }
};
struct Range { const void *begin; size_t bytes; };

struct Launch {
  const void *kernel = nullptr;           /* its code: the name in messages and counts is looked up from it */
  Index3 grid, block;
  size_t shared_bytes = 0;
  std::function<void()> body;             /* one thread; asks self() who it is */
  const void *arguments = nullptr;        /* what the body reads, the same for every thread: the card's constant bank */
  size_t argument_bytes = 0;
  std::shared_ptr<const void> owner;      /* of the arguments */
  std::vector<Range> ranges;              /* in the checked form the memory it may use; none: all that was allocated */
};

/* -- who runs ------------------------------------------------------------------------------------------------------------ */
struct Warp;
struct Block;
using Combine = void (*)(void *const *deposits, uint32_t mask);

/* To shared memory, under way: see copy_later(). */
struct Copy {
  void *shared;
  const void *source;
  int bytes, bytes_zeroed, group;
  const void *site;
};

struct Lane {
  void *stack_pointer;                    /* while it does not run */
  char *stack, *stack_end;                /* lowest address, and the one after the highest */
  Index3 thread;                          /* threadIdx */
  int index, lane;                        /* number in its block, in its warp */
  Warp *warp;
  Block *block;
  bool fenced;
  bool quiet;                             /* what it does now is the emulator's work and no access of the kernel */
  const char *word;                       /* what it waits at, such as "__syncthreads" */
  const void *site;                       /* the code that called it */
  uint32_t mask;                          /* of the collective, as what follows: see collective() */
  void *deposit;
  Combine combine;
  bool orders, whole;
  int copy_groups;                        /* committed so far */
  std::vector<Copy> copies;
};

struct Warp {
  Lane *lanes[WARP];
  uint32_t present, ready, arrived, done; /* bits by lane: in the block, may run, waits at a collective, has returned */
  uint32_t clock[WARP][WARP];             /* clock[i][j]: the last time of lane j that lane i comes after; [i][i] is its own */
};

/* What one thread of the OS needs to run blocks, one after the other. Kept from launch to launch. */
struct Block {
  const Launch *launch;
  Index3 index;                           /* blockIdx */
  char *shared;
  Lane lanes[MAX_THREADS] = {};
  Warp warps[MAX_THREADS / WARP] = {};
  int n_threads, n_warps, n_done;
  uint32_t serial, epoch;                 /* of this block over all launches; barriers so far */
  std::set<uint32_t> before;              /* serials of blocks that fences order before it (check.cpp) */
  void *scheduler;                        /* its stack pointer while a lane runs */
  bool failed = false;
  uint64_t events[int(Event::n_events)] = {};

  Block();
};

/* The lane that runs on this thread of the OS, null in host code. */
extern thread_local Lane *current __attribute__((tls_model("initial-exec")));
inline Lane *self() { return current; }

/* -- what a kernel does ----------------------------------------------------------------------------------------------------- */
/* All lanes of the block that have not returned wait for each other. */
void barrier(const char *word);

/* The lanes in `mask` meet; the last one to come calls combine(deposits by lane, mask of those present) once, then all go on.
 * `word` names the collective: lanes that wait for different ones, or with different masks, are an error. orders: memory written
 * before is seen after (true of __syncwarp, not of shuffles). whole: a lane that has returned or never was is an error too. */
void collective(const char *word, uint32_t mask, void *deposit, Combine combine, bool orders = false, bool whole = false);

/* Memory written before is seen by other blocks before what follows. */
inline void fence() { self()->fenced = true; }

/* A copy to shared memory that is under way until wait_copies: a kernel that reads too early reads what was there before. */
void copy_later(void *shared, const void *source, int bytes, int bytes_zeroed);
void commit_copies();
void wait_copies(int groups_left);

/* End the launch with a message about the thread that runs and the code `site`, null for the code that calls this. */
[[noreturn]] void fault(const void *site, const char *format, ...) __attribute__((noinline, format(printf, 2, 3)));

/* In the checked form: an access by the emulator's own code in the name of the line that calls it, such as an atomic; and a load that
 * goes by way of a cache which does not see what the launch itself writes. */
enum class Access : uint8_t { read, write, atomic };
#ifdef PE_CHECKED
constexpr bool CHECKED = true;
#define PE_WATCHED(declaration) declaration;
#else
constexpr bool CHECKED = false;
#define PE_WATCHED(declaration) inline declaration {}
#endif
PE_WATCHED(void touch(const void * /* address */, size_t, Access))
PE_WATCHED(void expect_constant(const void * /* address */, size_t))

/* Store `desired` if `expected` is there, at once; what was there. Of 4 or 8 bytes; no sanitizer rewrites these. */
template <class Bits> Bits swap_if(void *at, Bits expected, Bits desired);

void count(Event event);

/* -- running ---------------------------------------------------------------------------------------------------------------- */
bool launch(const Launch &launch);
const std::string &last_error();

/* "csrc/cuda/norm.cu:41" and "norm<4>", from the symbols in the library (where.cpp). */
std::string describe_code(const void *site);
std::string name_of(const void *kernel);
}  // namespace emu
#endif
