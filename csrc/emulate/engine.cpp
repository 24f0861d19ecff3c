/* engine.cpp: fibres, warps and blocks (engine.h says what they promise). */
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "switch.h"

namespace emu {

thread_local Lane *current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 16 << 10, MAX_SHARED = 256 << 10;
constexpr int64_t LANES_WORTH_A_THREAD = 2048; /* fewer in a launch are run by the caller alone: starting a thread takes 20 us */

/* What one thread of the OS needs to run blocks. Kept from launch to launch. */
struct Machine {
  Lane lanes[MAX_THREADS] = {};
  Warp warps[MAX_THREADS / WARP] = {};
  Block block = {};
  void *scheduler = nullptr;              /* its stack pointer while a lane runs */
  char *stacks = nullptr, *shared = nullptr;
  bool failed = false;
  uint64_t events[int(Event::n_events)] = {};

  Machine();
};

thread_local Machine *machine __attribute__((tls_model("initial-exec"))) = nullptr;

std::mutex launching;                     /* one launch at a time */
std::string error;                        /* of the last launch that failed */
std::mutex error_lock;
std::atomic<bool> stop;
std::atomic<uint32_t> serials{FIRST_SERIAL};

char *pages(size_t bytes) {
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort(); /* no address space left: nothing could be reported to anybody */
  return static_cast<char *>(p);
}

void lane_main();
bool complete(Lane *lane);

/* Give a lane a fresh stack. Where it begins differs a little from lane to lane: 128 KB apart, the lines that all lanes use
 * would fall into the same sets of the cache. */
void renew(Lane &lane) {
  lane.stack_end = lane.stack + STACK_BYTES - lane.index * 320 % 4096 / 64 * 64;
  lane.stack_pointer = new_stack(lane.stack, lane.stack_end, lane_main);
}

Machine::Machine() {
  stacks = pages((STACK_BYTES + GUARD_BYTES) * MAX_THREADS);
  shared = pages(MAX_SHARED + 2 * GUARD_BYTES) + GUARD_BYTES;
  for (int i = 0; i < MAX_THREADS; i++) {
    Lane &lane = lanes[i];
    lane.index = i;
    lane.lane = i % WARP;
    lane.warp = &warps[i / WARP];
    lane.block = &block;
    lane.warp->lanes[lane.lane] = &lane;
    char *guard = stacks + i * (STACK_BYTES + GUARD_BYTES);
    mprotect(guard, GUARD_BYTES, PROT_NONE);
    lane.stack = guard + GUARD_BYTES;
    renew(lane);
  }
  block.lanes = lanes;
  block.warps = warps;
  block.shared = shared;
  block.engine = {this, sizeof *this};
}

/* -- switching between lanes -------------------------------------------------------------------------------------------------- */

/* The lane cannot go on: the next ready one of its warp does, or the scheduler. Comes back when it was chosen again. */
void leave(Lane *lane) {
  const uint32_t ready = lane->warp->ready;
  Lane *next = ready ? lane->warp->lanes[__builtin_ctz(ready)] : nullptr;
  current = next;
  emu_switch(&lane->stack_pointer, next ? next->stack_pointer : machine->scheduler);
}

void resume(Lane *lane) {
  current = lane;
  emu_switch(&machine->scheduler, lane->stack_pointer);
}

void lane_main() {
  for (;;) { /* one block a turn */
    Lane *lane = current;
    lane->block->launch->body();
    lane->warp->ready &= ~(1u << lane->lane);
    lane->warp->done |= 1u << lane->lane;
    lane->block->n_done++;
    lane->copies.clear();
    if (lane->warp->arrived) complete(lane->warp->lanes[__builtin_ctz(lane->warp->arrived)]);
    leave(lane);
  }
}

std::string place(const Block &block, const Lane *lane) {
  char text[160];
  const int n = std::snprintf(text, sizeof text, ", block (%u,%u,%u)", block.index.x, block.index.y, block.index.z);
  if (lane) std::snprintf(text + n, sizeof text - n, ", thread (%u,%u,%u)", lane->thread.x, lane->thread.y, lane->thread.z);
  return "kernel " + name_of(block.launch->kernel) + text;
}

void fail(const Block &block, const Lane *lane, const void *site, const std::string &what) {
  std::lock_guard<std::mutex> hold(error_lock);
  machine->failed = true;
  if (!stop.exchange(true)) error = place(block, lane) + ": " + what + (site ? ", at " + describe_code(site) : "");
}

/* -- collectives -------------------------------------------------------------------------------------------------------------------- */

/* Finish the collective that this lane waits for, if all others have come. */
bool complete(Lane *lane) {
  Warp *warp = lane->warp;
  const Meeting &m = lane->meeting;
  const uint32_t expected = m.whole ? m.mask : m.mask & warp->present & ~warp->done;
  if (expected & ~warp->arrived) return false;
  void *deposits[WARP] = {};
  for (uint32_t rest = expected; rest; rest &= rest - 1) {
    const Lane *other = warp->lanes[__builtin_ctz(rest)];
    if (other->meeting.word != m.word || other->meeting.mask != m.mask) return false;
    deposits[other->lane] = other->meeting.deposit;
  }
  warp->arrived &= ~expected;
  warp->ready |= expected;
  machine->events[int(Event::collective)]++;
  warp_met(*lane->block, *warp, expected, m.orders);
  if (m.combine) {
    Lane *me = current;
    me->quiet = true;
    m.combine(deposits, expected);
    me->quiet = false;
  }
  return true;
}

void meet(const Meeting &meeting) {
  Lane *lane = current;
  const uint32_t bit = 1u << lane->lane;
  if (!(meeting.mask & bit))
    fault(meeting.site, "%s with mask %08x, which lacks the caller's own lane %d", meeting.word, meeting.mask, lane->lane);
  lane->meeting = meeting;
  lane->site = meeting.site;
  lane->word = meeting.word;
  lane->warp->arrived |= bit;
  lane->warp->ready &= ~bit;
  if (!complete(lane)) leave(lane);
}

/* -- running a block ------------------------------------------------------------------------------------------------------------ */

void begin(Machine &m, const Launch &launch, int64_t number) {
  Block &b = m.block;
  const Index3 g = launch.grid, t = launch.block;
  b.launch = &launch;
  b.number = number;
  b.index = {uint32_t(number % g.x), uint32_t(number / g.x % g.y), uint32_t(number / g.x / g.y)};
  b.n_threads = int(t.x * t.y * t.z);
  b.n_warps = (b.n_threads + WARP - 1) / WARP;
  b.n_done = 0;
  b.serial = serials.fetch_add(1);
  b.epoch = 0;
  std::memset(m.shared, 0xff, launch.shared_bytes); /* as floats: NaN */
  for (int w = 0; w < b.n_warps; w++) {
    const int n = std::min(WARP, b.n_threads - w * WARP);
    Warp &warp = m.warps[w];
    warp.present = warp.ready = n == WARP ? ~0u : (1u << n) - 1;
    warp.arrived = warp.done = 0;
  }
  for (int i = 0; i < b.n_threads; i++) {
    m.lanes[i].thread = {uint32_t(i) % t.x, uint32_t(i) / t.x % t.y, uint32_t(i) / t.x / t.y};
    m.lanes[i].at_barrier = m.lanes[i].quiet = m.lanes[i].fenced = false;
    m.lanes[i].copy_groups = 0;
  }
  begin_block(b);
}

/* A warp has no lane that could go on, but some wait for others in its collective: say who does not come. */
void report_stuck(const Block &block, const Warp &warp) {
  const Lane *lane = warp.lanes[__builtin_ctz(warp.arrived)];
  const Meeting &m = lane->meeting;
  char text[200];
  const int n = std::snprintf(text, sizeof text, "%s with mask %08x: not all lanes come, ", m.word, m.mask);
  for (const uint32_t lanes : {m.mask & warp.present & ~warp.done, m.mask & warp.done}) {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int other = __builtin_ctz(rest);
      const Meeting &theirs = warp.lanes[other]->meeting;
      const bool arrived = warp.arrived >> other & 1;
      if (arrived && theirs.word == m.word && theirs.mask == m.mask) continue;
      std::string where;
      if (warp.done >> other & 1) std::snprintf(text + n, sizeof text - n, "lane %d has returned", other);
      else if (!arrived) std::snprintf(text + n, sizeof text - n, "lane %d waits at %s", other, warp.lanes[other]->word);
      else std::snprintf(text + n, sizeof text - n, "lane %d waits at %s with mask %08x", other, theirs.word, theirs.mask);
      if (!(warp.done >> other & 1)) where = " at " + describe_code(warp.lanes[other]->site);
      return fail(block, lane, m.site, text + where);
    }
  }
  std::snprintf(text + n, sizeof text - n, "the block has only lanes %08x of this warp", warp.present);
  fail(block, lane, m.site, text);
}

void open_barrier(Block &block) {
  const Lane *first = nullptr;
  for (int i = 0; i < block.n_threads; i++) {
    Lane &lane = block.lanes[i];
    if (!lane.at_barrier) continue;
    if (!first) first = &lane;
    if (!same_line(lane.site, first->site))
      return fail(block, &lane, lane.site, std::string("a divergent ") + lane.word + ", while thread " + std::to_string(first->index) +
                  " waits at another one at " + describe_code(first->site));
    lane.at_barrier = false;
    lane.warp->ready |= 1u << lane.lane;
  }
  block.epoch++;
  barrier_opened(block);
}

void run_block(Machine &m) {
  Block &b = m.block;
  for (;;) {
    for (int w = 0; w < b.n_warps && !m.failed; w++) {
      Warp &warp = m.warps[w];
      if (warp.ready) resume(warp.lanes[__builtin_ctz(warp.ready)]);
      if (warp.arrived && !m.failed) report_stuck(b, warp);
    }
    if (!m.failed && b.n_done < b.n_threads) open_barrier(b);
    if (m.failed || b.n_done == b.n_threads) break;
  }
  current = nullptr;
  if (!m.failed) end_block(b);
}

void run_blocks(Machine &m, const Launch &launch, std::atomic<int64_t> &next, int64_t n_blocks) {
  machine = &m;
  m.failed = false;
  for (int64_t number; !stop && (number = next.fetch_add(1)) < n_blocks;) {
    begin(m, launch, number);
    run_block(m);
  }
  if (m.failed)
    for (Lane &lane : m.lanes) { /* their stacks stand in the middle of a kernel */
      lane.copies.clear();
      renew(lane);
    }
}

int threads_of_the_os(const Launch &launch, int64_t n_blocks) {
#ifdef PE_CHECKED
  (void)launch, (void)n_blocks;
  return 1; /* shadow memory has no locks, and reports are the same every time */
#else
  static const int most = [] {
    const char *said = std::getenv("PYENGINE_EMULATED_THREADS");
    return std::max(1, said ? std::atoi(said) : int(std::thread::hardware_concurrency()));
  }();
  const int64_t lanes = n_blocks * launch.block.x * launch.block.y * launch.block.z;
  return int(std::clamp<int64_t>(std::min(lanes / LANES_WORTH_A_THREAD, n_blocks), 1, most));
#endif
}

bool refuse(const std::string &why) {
  error = why;
  return false;
}

}  // namespace

/* -- what kernels call ------------------------------------------------------------------------------------------------------------ */

__attribute__((noinline)) void barrier(const char *word) {
  Lane *lane = current;
  lane->at_barrier = true;
  lane->site = __builtin_return_address(0);
  lane->word = word;
  lane->warp->ready &= ~(1u << lane->lane);
  machine->events[int(Event::barrier)] += lane->index == 0;
  leave(lane);
}

__attribute__((noinline)) void collective(const char *word, uint32_t mask, void *deposit, Combine combine, bool orders) {
  meet({word, mask, deposit, combine, orders, false, __builtin_return_address(0)});
}

__attribute__((noinline)) void whole_warp(const char *word, void *deposit, Combine combine) {
  meet({word, ~0u, deposit, combine, false, true, __builtin_return_address(0)});
}

__attribute__((noinline)) const void *here() { return __builtin_return_address(0); }

__attribute__((noinline)) void copy_later(void *shared, const void *source, int bytes, int bytes_zeroed) {
  Lane *lane = current;
  const void *site = __builtin_return_address(0);
  if (bytes) touched(source, bytes, Access::read, site);
  copy_started(shared, bytes + bytes_zeroed, site);
  lane->copies.push_back({shared, source, bytes, bytes_zeroed, lane->copy_groups, site});
}

void commit_copies() { current->copy_groups++; }

void wait_copies(int groups_left) {
  Lane *lane = current;
  auto landed = [&](const Copy &c) {
    if (c.group >= lane->copy_groups - groups_left) return false;
    copy_ended(c.shared, c.bytes + c.bytes_zeroed, c.site);
    std::memcpy(c.shared, c.source, c.bytes);
    std::memset(static_cast<char *>(c.shared) + c.bytes, 0, c.bytes_zeroed);
    return true;
  };
  lane->copies.erase(std::remove_if(lane->copies.begin(), lane->copies.end(), landed), lane->copies.end());
}

void fault(const void *site, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Lane *lane = current;
  fail(*lane->block, lane, site, text);
  current = nullptr;
  emu_switch(&lane->stack_pointer, machine->scheduler);
  std::abort(); /* not reached: a launch that failed resumes nobody */
}

void count(Event event) { machine->events[int(event)]++; }

/* -- launches ----------------------------------------------------------------------------------------------------------------------- */

bool launch(const Launch &l) {
  std::lock_guard<std::mutex> hold(launching);
  const int64_t n_threads = int64_t(l.block.x) * l.block.y * l.block.z, n_blocks = int64_t(l.grid.x) * l.grid.y * l.grid.z;
  if (n_threads < 1 || n_threads > MAX_THREADS)
    return refuse("kernel " + name_of(l.kernel) + ": " + std::to_string(n_threads) + " threads in a block, of 1 to 1024");
  if (n_blocks < 1) return refuse("kernel " + name_of(l.kernel) + ": no blocks in the grid");
  if (l.shared_bytes > MAX_SHARED)
    return refuse("kernel " + name_of(l.kernel) + ": " + std::to_string(l.shared_bytes) + " bytes of shared memory");
  static std::vector<std::unique_ptr<Machine>> machines;
  const int n = threads_of_the_os(l, n_blocks);
  while (int(machines.size()) < n) machines.push_back(std::make_unique<Machine>());
  stop = false;
  begin_launch(l, serials);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> others;
  for (int i = 1; i < n; i++) others.emplace_back([&, i] { run_blocks(*machines[i], l, next, n_blocks); });
  run_blocks(*machines[0], l, next, n_blocks);
  for (std::thread &t : others) t.join();
  for (int i = 0; i < n; i++) end_launch(machines[i]->events);
  for (int i = 0; i < n; i++) std::fill(std::begin(machines[i]->events), std::end(machines[i]->events), 0);
  return !stop;
}

const std::string &last_error() { return error; }

}  // namespace emu
