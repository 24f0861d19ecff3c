/* engine.cpp: fibres, warps and blocks (engine.h says what they promise). */
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <thread>

#include "check.h"
#include "switch.h"

namespace emu {
thread_local Lane *current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {
constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 16 << 10, MAX_SHARED = 256 << 10;
constexpr int64_t LANES_WORTH_A_THREAD = 2048; /* fewer in a launch are run by the caller alone: starting a thread takes 20 us */

std::string error;                        /* of the last launch that failed */
std::atomic<bool> stop;
std::atomic<uint32_t> serials{1};         /* of blocks: 0 is nobody, in the past of a word of memory */

/* -- switching between lanes -------------------------------------------------------------------------------------------------- */
/* The lane cannot go on: the next ready one of its warp does, or the scheduler. Comes back when it was chosen again. */
void leave(Lane *lane) {
  const uint32_t ready = lane->warp->ready;
  current = ready ? lane->warp->lanes[__builtin_ctz(ready)] : nullptr;
  emu_switch(&lane->stack_pointer, current ? current->stack_pointer : lane->block->scheduler);
}

void fail(const Lane &lane, const std::string &what, const void *site) {
  Block &b = *lane.block;
  b.failed = true;
  if (stop.exchange(true)) return;
  error = "kernel " + name_of(b.launch->kernel) + ", block " + b.index.text() + ", thread " + lane.thread.text() + ": " + what +
          ", at " + describe_code(site);
}

/* -- collectives -------------------------------------------------------------------------------------------------------------------- */
bool meets(const Lane &lane, const Lane &other) { return other.word == lane.word && other.mask == lane.mask; }

/* Finish the collective that this lane waits for, if all others have come. */
bool complete(Lane *lane) {
  Warp *warp = lane->warp;
  const uint32_t expected = lane->whole ? lane->mask : lane->mask & warp->present & ~warp->done;
  if (expected & ~warp->arrived) return false;
  void *deposits[WARP] = {};
  for (uint32_t rest = expected; rest; rest &= rest - 1) {
    const Lane *other = warp->lanes[__builtin_ctz(rest)];
    if (!meets(*lane, *other)) return false;
    deposits[other->lane] = other->deposit;
  }
  warp->arrived &= ~expected;
  warp->ready |= expected;
  count(Event::collective);
  warp_met(*warp, expected, lane->orders);
  current->quiet = true;
  if (lane->combine) lane->combine(deposits, expected);
  current->quiet = false;
  return true;
}

std::string with_mask(const Lane &lane) {
  char text[32];
  return std::snprintf(text, sizeof text, " with mask %08x", lane.mask), text;
}

/* A warp has no lane that could go on, but some wait for others in its collective: say who does not come. */
void report_stuck(const Warp &warp) {
  const Lane &lane = *warp.lanes[__builtin_ctz(warp.arrived)];
  std::string who = "the block has no more lanes in this warp";
  for (int i = 0; i < WARP; i++) {
    const Lane &other = *warp.lanes[i];
    const bool arrived = warp.arrived >> i & 1, done = warp.done >> i & 1;
    if (!(lane.mask & warp.present & 1u << i) || (arrived && meets(lane, other))) continue;
    who = "lane " + std::to_string(i);
    who += done ? " has returned" : std::string(" waits at ") + other.word + (arrived ? with_mask(other) : "") + " at " + describe_code(other.site);
    if (!done || lane.whole) break;
  }
  fail(lane, lane.word + with_mask(lane) + ": not all lanes come, " + who, lane.site);
}

/* -- running a block ------------------------------------------------------------------------------------------------------------ */
void lane_main() {
  for (;;) { /* one block a turn */
    Lane *lane = current;
    Warp *warp = lane->warp;
    lane->block->launch->body();
    warp->ready &= ~(1u << lane->lane);
    warp->done |= 1u << lane->lane;
    lane->block->n_done++;
    if (warp->arrived) complete(warp->lanes[__builtin_ctz(warp->arrived)]);
    leave(lane);
  }
}

/* Give lanes fresh stacks. Where one begins differs a little from lane to lane: 128 KB apart, the lines that all lanes use
 * would fall into the same sets of the cache. */
void renew(Block &b) {
  for (Lane &lane : b.lanes) {
    lane.stack_end = lane.stack + STACK_BYTES - lane.index * 320 % 4096 / 64 * 64;
    lane.stack_pointer = new_stack(lane.stack_end, lane_main);
  }
  b.failed = false;
}

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
  b.before.clear();
  for (int i = 0; i < b.n_threads; i++) {
    Lane &lane = b.lanes[i];
    lane.thread = launch.block.at(i);
    lane.quiet = lane.fenced = false;
    lane.copy_groups = 0;
    lane.copies.clear();
  }
  together(b);
}

/* No lane can go on: all that have not returned wait at a barrier, which must be one line; a compiler may have doubled that. */
void open_barrier(Block &b) {
  const Lane *first = nullptr;
  for (int i = 0; i < b.n_threads; i++) {
    Lane &lane = b.lanes[i];
    if (lane.warp->done >> lane.lane & 1) continue;
    if (!first) first = &lane;
    if (CHECKED && lane.site != first->site && describe_code(lane.site) != describe_code(first->site))
      return fail(lane, std::string("a divergent ") + lane.word + ", while thread " + std::to_string(first->index) +
                  " waits at another one at " + describe_code(first->site), lane.site);
    lane.warp->ready |= 1u << lane.lane;
  }
  b.epoch++;
  together(b);
}

void run_block(Block &b) {
  while (!b.failed && b.n_done < b.n_threads) {
    for (int w = 0; w < b.n_warps && !b.failed; w++) {
      Warp &warp = b.warps[w];
      if (warp.ready) {
        current = warp.lanes[__builtin_ctz(warp.ready)];
        emu_switch(&b.scheduler, current->stack_pointer);
      }
      if (warp.arrived && !b.failed) report_stuck(warp);
    }
    if (!b.failed && b.n_done < b.n_threads) open_barrier(b);
  }
  current = nullptr;
  b.events[int(Event::block)] += !b.failed;
}

void run_blocks(Block &b, const Launch &launch, std::atomic<int64_t> &next, int64_t n_blocks) {
  for (int64_t number; !stop && (number = next.fetch_add(1)) < n_blocks;) {
    begin(b, launch, number);
    run_block(b);
  }
  if (b.failed) renew(b); /* the stacks stand in the middle of a kernel */
}

/* In the checked form one: shadow memory has no locks, and reports are the same every time. */
int threads_of_the_os(int64_t n_lanes, int64_t n_blocks) {
  const int64_t most = std::max<int64_t>(1, number_from("PYENGINE_EMULATED_THREADS", std::thread::hardware_concurrency()));
  return CHECKED ? 1 : int(std::clamp<int64_t>(std::min(n_lanes / LANES_WORTH_A_THREAD, n_blocks), 1, most));
}
}  // namespace

Block::Block() {
  constexpr size_t STRIDE = STACK_BYTES + GUARD_BYTES, SHARED = MAX_SHARED + 2 * GUARD_BYTES;
  void *pages = mmap(nullptr, STRIDE * MAX_THREADS + SHARED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) std::abort(); /* no address space is left, and nobody could be told */
  shared = static_cast<char *>(pages) + STRIDE * MAX_THREADS + GUARD_BYTES;
  for (int i = 0; i < MAX_THREADS; i++) {
    Lane &lane = lanes[i];
    lane.index = i;
    lane.lane = i % WARP;
    lane.block = this;
    lane.warp = &warps[i / WARP];
    lane.warp->lanes[lane.lane] = &lane;
    char *guard = static_cast<char *>(pages) + i * STRIDE;
    mprotect(guard, GUARD_BYTES, PROT_NONE);
    lane.stack = guard + GUARD_BYTES;
  }
  renew(*this);
}

/* -- what kernels call ------------------------------------------------------------------------------------------------------------ */
__attribute__((noinline)) void barrier(const char *word) {
  Lane *lane = current;
  lane->word = word;
  lane->site = SITE;
  lane->warp->ready &= ~(1u << lane->lane);
  if (lane->index == 0) count(Event::barrier);
  leave(lane);
}

__attribute__((noinline)) void collective(const char *word, uint32_t mask, void *deposit, Combine combine, bool orders, bool whole) {
  Lane *lane = current;
  const uint32_t bit = 1u << lane->lane;
  if (!(mask & bit)) fault(SITE, "%s with mask %08x, which lacks the caller's own lane %d", word, mask, lane->lane);
  lane->word = word;
  lane->site = SITE;
  lane->mask = mask;
  lane->deposit = deposit;
  lane->combine = combine;
  lane->orders = orders;
  lane->whole = whole;
  lane->warp->arrived |= bit;
  lane->warp->ready &= ~bit;
  if (!complete(lane)) leave(lane);
}

__attribute__((noinline)) void copy_later(void *shared, const void *source, int bytes, int bytes_zeroed) {
  const void *site = SITE;
  if (bytes) touched(source, bytes, Access::read, site);
  copy_started(shared, bytes + bytes_zeroed, site);
  current->copies.push_back({shared, source, bytes, bytes_zeroed, current->copy_groups, site});
}

void wait_copies(int groups_left) {
  std::vector<Copy> &copies = current->copies;
  for (; !copies.empty() && copies[0].group < current->copy_groups - groups_left; copies.erase(copies.begin())) {
    const Copy &c = copies[0];
    copy_ended(c.shared, c.bytes + c.bytes_zeroed, c.site);
    std::memcpy(c.shared, c.source, c.bytes);
    std::memset(static_cast<char *>(c.shared) + c.bytes, 0, c.bytes_zeroed);
  }
}

void fault(const void *site, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail(*current, text, site ? site : SITE);
  emu_switch(&current->stack_pointer, current->block->scheduler);
  std::abort(); /* not reached: a launch that failed resumes nobody */
}

void count(Event event) { current->block->events[int(event)]++; }
void commit_copies() { current->copy_groups++; }
const std::string &last_error() { return error; }

bool launch(const Launch &l) {
  std::lock_guard<std::mutex> hold(busy);
  const int64_t n_threads = int64_t(l.block.x) * l.block.y * l.block.z, n_blocks = int64_t(l.grid.x) * l.grid.y * l.grid.z;
  if (n_threads < 1 || n_threads > MAX_THREADS || n_blocks < 1 || l.shared_bytes > MAX_SHARED) {
    error = "kernel " + name_of(l.kernel) + ": " + std::to_string(n_blocks) + " blocks of " + std::to_string(n_threads) + " threads (1 to 1024) with " +
            std::to_string(l.shared_bytes) + " bytes of shared memory (at most 262144)";
    return false;
  }
  static std::vector<std::unique_ptr<Block>> blocks;
  const int n = threads_of_the_os(n_blocks * n_threads, n_blocks);
  while (int(blocks.size()) < n) blocks.push_back(std::make_unique<Block>());
  stop = false;
  begin_launch(l, serials);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> others;
  for (int i = 1; i < n; i++) others.emplace_back([&, i] { run_blocks(*blocks[i], l, next, n_blocks); });
  run_blocks(*blocks[0], l, next, n_blocks);
  for (std::thread &t : others) t.join();
  end_launch(*blocks[0]);
  return !stop;
}
}  // namespace emu
