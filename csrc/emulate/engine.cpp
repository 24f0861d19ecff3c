/* engine.cpp: fibres, warps and blocks (engine.h says what they promise). */
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

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
  bool failed = false;
  uint64_t events[int(Event::n_events)] = {};

  Machine();
};

thread_local Machine *machine __attribute__((tls_model("initial-exec"))) = nullptr;

std::string error;                        /* of the last launch that failed */
std::mutex error_lock;
std::atomic<bool> stop;
std::atomic<uint32_t> serials{FIRST_SERIAL};

void lane_main();
bool complete(Lane *lane);

/* Give a lane a fresh stack. Where it begins differs a little from lane to lane: 128 KB apart, the lines that all lanes use
 * would fall into the same sets of the cache. */
void renew(Lane &lane) {
  lane.copies.clear();
  lane.stack_end = lane.stack + STACK_BYTES - lane.index * 320 % 4096 / 64 * 64;
  lane.stack_pointer = new_stack(lane.stack_end, lane_main);
}

Machine::Machine() {
  constexpr size_t STRIDE = STACK_BYTES + GUARD_BYTES, SHARED = MAX_SHARED + 2 * GUARD_BYTES;
  void *pages = mmap(nullptr, STRIDE * MAX_THREADS + SHARED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) std::abort(); /* no address space is left, and nobody could be told */
  for (int i = 0; i < MAX_THREADS; i++) {
    Lane &lane = lanes[i];
    lane.index = i;
    lane.lane = i % WARP;
    lane.block = &block;
    lane.warp = &warps[i / WARP];
    lane.warp->lanes[lane.lane] = &lane;
    char *guard = static_cast<char *>(pages) + i * STRIDE;
    mprotect(guard, GUARD_BYTES, PROT_NONE);
    lane.stack = guard + GUARD_BYTES;
    renew(lane);
  }
  block.shared = static_cast<char *>(pages) + STRIDE * MAX_THREADS + GUARD_BYTES;
  block.lanes = lanes;
  block.warps = warps;
  block.engine = {this, sizeof *this};
}

/* -- switching between lanes -------------------------------------------------------------------------------------------------- */

/* The lane cannot go on: the next ready one of its warp does, or the scheduler. Comes back when it was chosen again. */
void leave(Lane *lane) {
  const uint32_t ready = lane->warp->ready;
  current = ready ? lane->warp->lanes[__builtin_ctz(ready)] : nullptr;
  emu_switch(&lane->stack_pointer, current ? current->stack_pointer : machine->scheduler);
}

void lane_main() {
  for (;;) { /* one block a turn */
    Lane *lane = current;
    Warp *warp = lane->warp;
    lane->block->launch->body();
    warp->ready &= ~(1u << lane->lane);
    warp->done |= 1u << lane->lane;
    lane->block->n_done++;
    lane->copies.clear();
    if (warp->arrived) complete(warp->lanes[__builtin_ctz(warp->arrived)]);
    leave(lane);
  }
}

void fail(const Block &b, const Lane &lane, const std::string &what, const void *site) {
  std::lock_guard<std::mutex> hold(error_lock);
  machine->failed = true;
  if (stop.exchange(true)) return;
  error = "kernel " + name_of(b.launch->kernel) + ", block " + b.index.text() + ", thread " + lane.thread.text() + ": " + what + ", at " + describe_code(site);
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
  Lane *me = current;
  me->quiet = true;
  if (m.combine) m.combine(deposits, expected);
  me->quiet = false;
  return true;
}

void meet(const Meeting &meeting, const void *site) {
  Lane *lane = current;
  const uint32_t bit = 1u << lane->lane;
  if (!(meeting.mask & bit)) fault(site, "%s with mask %08x, which lacks the caller's own lane %d", meeting.word, meeting.mask, lane->lane);
  lane->meeting = meeting;
  lane->word = meeting.word;
  lane->site = site;
  lane->warp->arrived |= bit;
  lane->warp->ready &= ~bit;
  if (!complete(lane)) leave(lane);
}

std::string with_mask(const Meeting &m) {
  char text[32];
  return std::snprintf(text, sizeof text, " with mask %08x", m.mask), text;
}

/* A warp has no lane that could go on, but some wait for others in its collective: say who does not come. */
void report_stuck(const Block &block, const Warp &warp) {
  const Lane &lane = *warp.lanes[__builtin_ctz(warp.arrived)];
  const Meeting &m = lane.meeting;
  std::string who = "the block has no more lanes in this warp";
  for (int i = 0; i < WARP; i++) {
    const Lane &other = *warp.lanes[i];
    const bool arrived = warp.arrived >> i & 1, done = warp.done >> i & 1;
    if (!(m.mask & warp.present & 1u << i) || (arrived && other.meeting.word == m.word && other.meeting.mask == m.mask)) continue;
    who = "lane " + std::to_string(i);
    who += done ? " has returned" : std::string(" waits at ") + other.word + (arrived ? with_mask(other.meeting) : "") + " at " + describe_code(other.site);
    if (!done || m.whole) break;
  }
  fail(block, lane, m.word + with_mask(m) + ": not all lanes come, " + who, lane.site);
}

/* -- running a block ------------------------------------------------------------------------------------------------------------ */

void begin(Block &b, const Launch &launch, int64_t number) {
  b.launch = &launch;
  b.index = launch.grid.at(number);
  b.n_threads = int(launch.block.x * launch.block.y * launch.block.z);
  b.n_warps = (b.n_threads + WARP - 1) / WARP;
  b.n_done = b.epoch = 0;
  b.serial = serials.fetch_add(1);
  std::memset(b.shared, 0xff, launch.shared_bytes); /* as floats: NaN */
  for (int w = 0; w < b.n_warps; w++) {
    const int n = b.n_threads - w * WARP;
    b.warps[w].present = b.warps[w].ready = n >= WARP ? ~0u : (1u << n) - 1;
    b.warps[w].arrived = b.warps[w].done = 0;
  }
  for (int i = 0; i < b.n_threads; i++) {
    Lane &lane = b.lanes[i];
    lane.thread = launch.block.at(i);
    lane.at_barrier = lane.quiet = lane.fenced = false;
    lane.copy_groups = 0;
  }
  begin_block(b);
}

void open_barrier(Block &block) {
  const Lane *first = nullptr;
  for (int i = 0; i < block.n_threads; i++) {
    Lane &lane = block.lanes[i];
    if (!lane.at_barrier) continue;
    if (!first) first = &lane;
    if (!same_line(lane.site, first->site))
      return fail(block, lane, std::string("a divergent ") + lane.word + ", while thread " + std::to_string(first->index) +
                  " waits at another one at " + describe_code(first->site), lane.site);
    lane.at_barrier = false;
    lane.warp->ready |= 1u << lane.lane;
  }
  block.epoch++;
  barrier_opened(block);
}

void run_block(Machine &m) {
  Block &b = m.block;
  while (!m.failed && b.n_done < b.n_threads) {
    for (int w = 0; w < b.n_warps && !m.failed; w++) {
      Warp &warp = m.warps[w];
      if (warp.ready) {
        current = warp.lanes[__builtin_ctz(warp.ready)];
        emu_switch(&m.scheduler, current->stack_pointer);
      }
      if (warp.arrived && !m.failed) report_stuck(b, warp);
    }
    if (!m.failed && b.n_done < b.n_threads) open_barrier(b);
  }
  current = nullptr;
  if (!m.failed) end_block(b);
}

void run_blocks(Machine &m, const Launch &launch, std::atomic<int64_t> &next, int64_t n_blocks) {
  machine = &m;
  m.failed = false;
  for (int64_t number; !stop && (number = next.fetch_add(1)) < n_blocks;) {
    begin(m.block, launch, number);
    run_block(m);
  }
  if (m.failed) std::for_each(m.lanes, m.lanes + MAX_THREADS, renew); /* their stacks stand in the middle of a kernel */
}

/* In the checked form one: shadow memory has no locks, and reports are the same every time. */
int threads_of_the_os(int64_t n_lanes, int64_t n_blocks) {
  const char *said = std::getenv("PYENGINE_EMULATED_THREADS");
  const int64_t most = std::max(1, said ? std::atoi(said) : int(std::thread::hardware_concurrency()));
  return CHECKED ? 1 : int(std::clamp<int64_t>(std::min(n_lanes / LANES_WORTH_A_THREAD, n_blocks), 1, most));
}

}  // namespace

/* -- what kernels call ------------------------------------------------------------------------------------------------------------ */

__attribute__((noinline)) void barrier(const char *word) {
  Lane *lane = current;
  lane->at_barrier = true;
  lane->word = word;
  lane->site = SITE;
  lane->warp->ready &= ~(1u << lane->lane);
  machine->events[int(Event::barrier)] += lane->index == 0;
  leave(lane);
}

__attribute__((noinline)) void collective(const char *word, uint32_t mask, void *deposit, Combine combine, bool orders) {
  meet({word, mask, deposit, combine, orders, false}, SITE);
}
__attribute__((noinline)) void whole_warp(const char *word, void *deposit, Combine combine) {
  meet({word, ~0u, deposit, combine, false, true}, SITE);
}
__attribute__((noinline)) const void *here() { return SITE; }

__attribute__((noinline)) void copy_later(void *shared, const void *source, int bytes, int bytes_zeroed) {
  const void *site = SITE;
  if (bytes) touched(source, bytes, Access::read, site);
  copy_started(shared, bytes + bytes_zeroed, site);
  current->copies.push_back({shared, source, bytes, bytes_zeroed, current->copy_groups, site});
}

void commit_copies() { current->copy_groups++; }

void wait_copies(int groups_left) {
  std::vector<Copy> &copies = current->copies;
  size_t n = 0;
  for (; n < copies.size() && copies[n].group < current->copy_groups - groups_left; n++) {
    const Copy &c = copies[n];
    copy_ended(c.shared, c.bytes + c.bytes_zeroed, c.site);
    std::memcpy(c.shared, c.source, c.bytes);
    std::memset(static_cast<char *>(c.shared) + c.bytes, 0, c.bytes_zeroed);
  }
  copies.erase(copies.begin(), copies.begin() + n);
}

void fault(const void *site, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Lane *lane = current;
  fail(*lane->block, *lane, text, site);
  emu_switch(&lane->stack_pointer, machine->scheduler);
  std::abort(); /* not reached: a launch that failed resumes nobody */
}

void count(Event event) { machine->events[int(event)]++; }

bool launch(const Launch &l) {
  std::lock_guard<std::mutex> hold(busy);
  const int64_t n_threads = int64_t(l.block.x) * l.block.y * l.block.z, n_blocks = int64_t(l.grid.x) * l.grid.y * l.grid.z;
  if (n_threads < 1 || n_threads > MAX_THREADS || n_blocks < 1 || l.shared_bytes > MAX_SHARED) {
    error = "kernel " + name_of(l.kernel) + ": " + std::to_string(n_blocks) + " blocks of " + std::to_string(n_threads) + " threads (1 to 1024) with " +
            std::to_string(l.shared_bytes) + " bytes of shared memory (at most 262144)";
    return false;
  }
  static std::vector<std::unique_ptr<Machine>> machines;
  const int n = threads_of_the_os(n_blocks * n_threads, n_blocks);
  while (int(machines.size()) < n) machines.push_back(std::make_unique<Machine>());
  stop = false;
  begin_launch(l, serials);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> others;
  for (int i = 1; i < n; i++) others.emplace_back([&, i] { run_blocks(*machines[i], l, next, n_blocks); });
  run_blocks(*machines[0], l, next, n_blocks);
  for (std::thread &t : others) t.join();
  end_launch(machines[0]->events);
  std::fill(std::begin(machines[0]->events), std::end(machines[0]->events), 0);
  return !stop;
}

const std::string &last_error() { return error; }

}  // namespace emu
