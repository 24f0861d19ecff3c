/* check.cpp: every access of a kernel to memory, watched (-DPE_CHECKED).
 *
 * Kernels are compiled with -fsanitize=thread, which puts a call such as __tsan_read4(address) before each load and store; the
 * library that these calls belong to is not linked, they are the functions at the end of this file. For each access:
 *   bounds      it lies in the block's shared memory, or in an allocation of a device (red zones between them), in memory of the host
 *               that was pinned, in the arguments, in constants of the library (to read), or on the thread's own stack
 *   alignment   a vector is aligned to its size
 *   written     what is read was written: shared memory by this block, device memory by the host or any kernel
 *   races       of two accesses of which one writes, one comes before the other. In a block: in a thread by its order, between
 *               threads by a barrier, or in a warp by __syncwarp. Between blocks of a launch: never, but for atomics behind a
 *               __threadfence. Collectives such as shuffles order nothing (Programming Guide, "Warp shuffle functions").
 * Each 4 bytes have a cell that remembers the last write and two reads; where single bytes are used it is split into four.
 */
#ifdef PE_CHECKED

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "check.h"

/* Where the library that this is linked into begins and ends, by the linker. */
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

namespace emu {
namespace {

struct Record {                           /* an access of the past; fields are packed by hand, compilers store bit fields one by one */
  static constexpr uint32_t ATOMIC = 1u << 31, UNDER_WAY = 1u << 30, EPOCH = UNDER_WAY - 1;
  const void *site;
  uint32_t serial;                        /* of the block; 0: never */
  uint32_t epoch_and_kind;                /* barriers of the block before it; UNDER_WAY: a copy_later that has not landed */
  uint32_t thread_and_time;               /* 10 bits, 22 bits; time: __syncwarps of the thread in this epoch before it, plus 1 */

  bool atomic() const { return epoch_and_kind & ATOMIC; }
  bool under_way() const { return epoch_and_kind & UNDER_WAY; }
  bool same_epoch(uint32_t epoch) const { return ((epoch_and_kind ^ epoch) & EPOCH) == 0; }
  int thread() const { return int(thread_and_time & 1023); }
  int warp() const { return thread() / WARP; }
  uint32_t time() const { return thread_and_time >> 10; }
};

struct Cell {                             /* the past of 4 bytes, or of one */
  Record write, reads[2];                 /* reads[1]: one by another warp than reads[0], if there was one */
  uint32_t split, split_launch;           /* 1 + where the cells of its last three bytes are, in the launch of that serial */
};

constexpr int PAGE = 4096, CELLS = PAGE / 4, SECTORS = PAGE / 32;

/* What a launch did with a page of global memory: its cells, and a bit for each sector that it read, that it wrote. */
struct Page {
  Cell *cells;
  uint64_t read[SECTORS / 64], written[SECTORS / 64];
};

/* The past of one launch. Cells are used again by the next one: old records are known by their serials. */
struct History {
  std::unordered_map<uintptr_t, Page> pages;
  std::vector<std::unique_ptr<Cell[]>> blocks;
  size_t blocks_used;
  std::deque<std::array<Cell, 3>> splits;
  std::unique_ptr<Cell[]> shared{new Cell[(256 << 10) / 4]()};
  uintptr_t last_number;
  Page *last_page;
  uint32_t first_serial;                  /* of the launch */
  std::map<uintptr_t, std::vector<bool>> released; /* by atomic: the blocks that are ordered before who uses it next */
  std::vector<bool> seen;                 /* blocks that are ordered before the one that runs */
} history;

/* -- cells ---------------------------------------------------------------------------------------------------------------------- */

Page &page_of(uintptr_t at) {
  History &h = history;
  if (at / PAGE == h.last_number) return *h.last_page;
  Page &page = h.pages[at / PAGE];
  if (!page.cells) {
    if (h.blocks_used == h.blocks.size()) h.blocks.emplace_back(new Cell[CELLS]());
    page.cells = h.blocks[h.blocks_used++].get();
  }
  h.last_number = at / PAGE;
  return *(h.last_page = &page);
}

bool is_split(const Cell &cell) { return cell.split && cell.split_launch == history.first_serial; }

Cell *split(Cell &cell) {
  if (!is_split(cell)) {
    cell.split_launch = history.first_serial;
    cell.split = uint32_t(history.splits.size() + 1);
    history.splits.push_back({cell, cell, cell});
  }
  return history.splits[cell.split - 1].data();
}

/* Do something with each cell of these bytes. */
template <class Do> inline void each_cell(bool shared, uintptr_t at, size_t bytes, Do &&act) {
  for (const uintptr_t end = at + bytes; at < end;) {
    const uintptr_t word = at & ~uintptr_t(3);
    Cell &cell = shared ? history.shared[word / 4] : page_of(word).cells[word % PAGE / 4];
    if (word == at && end - at >= 4 && !is_split(cell)) {
      act(cell, at);
      at += 4;
      continue;
    }
    Cell *last_three = split(cell);
    for (; at < end && at < word + 4; at++) act(at == word ? cell : last_three[at - word - 1], at);
  }
}

/* -- order ------------------------------------------------------------------------------------------------------------------------ */

uint32_t time_of(const Lane &lane, int other) {
  const Warp &w = *lane.warp;
  return w.clock_epoch == lane.block->epoch + 1 ? w.clock[lane.lane][other] : lane.lane == other;
}

bool ordered(const Record &r, const Lane &lane, bool shared) {
  const Block &b = *lane.block;
  if (r.serial != b.serial) {
    if (shared || r.serial < history.first_serial) return true; /* of another time */
    const uint32_t n = r.serial - history.first_serial;
    return n < history.seen.size() && history.seen[n];
  }
  if (r.under_way()) return false;
  if (r.thread() == lane.index || !r.same_epoch(b.epoch)) return true;
  return r.warp() == lane.index / WARP && time_of(lane, r.thread() % WARP) >= r.time();
}

Record record(const Lane &lane, Access access, const void *site, uint32_t kind = 0) {
  if (access == Access::atomic) kind |= Record::ATOMIC;
  return {site, lane.block->serial, (lane.block->epoch & Record::EPOCH) | kind, uint32_t(lane.index) | time_of(lane, lane.lane) << 10};
}

/* -- messages --------------------------------------------------------------------------------------------------------------------- */

const char *verb(Access access) { return access == Access::read ? "reads" : access == Access::write ? "writes" : "changes atomically"; }

std::string thread_text(const Lane &lane, const Record &r) {
  const Launch &l = *lane.block->launch;
  const std::string block = r.serial == lane.block->serial ? "" : " of block " + l.grid.at(r.serial - history.first_serial).text();
  return "thread " + l.block.at(r.thread()).text() + block;
}

std::string region_text(const Region &r) {
  if (!self()->block->launch->ranges.empty()) return "a buffer";
  return r.device == HOST ? "pinned memory of the host" : "an allocation of device " + std::to_string(r.device);
}

/* Offsets are into the block's shared memory, or the region. */
std::string place(const Region *region, uintptr_t at) {
  return (region ? region_text(*region) : "shared memory") + " at offset " + std::to_string(region ? at - region->begin : at);
}

[[noreturn]] void report_race(const Lane &lane, const Region *region, uintptr_t at, Access access, const Record &r, bool wrote, const void *site) {
  const char *how = r.under_way() ? "an asynchronous copy to it by" : !wrote ? "the read by" : r.atomic() ? "an atomic access by" : "the write by";
  const char *why = r.under_way() ? " that is still under way" : r.serial != lane.block->serial ? ", which nothing orders" : ", with no barrier between";
  fault(site, "a race: it %s %s after %s %s at %s%s", verb(access), place(region, at).c_str(), how, thread_text(lane, r).c_str(),
        describe_code(r.site).c_str(), why);
}

/* -- one access ---------------------------------------------------------------------------------------------------------------------- */

void remember_read(Cell &cell, const Record &r) {
  Record &last = cell.reads[0], &other = cell.reads[1];
  const bool same_warp = last.serial == r.serial && last.warp() == r.warp();
  const bool useful = other.serial == r.serial && other.same_epoch(r.epoch_and_kind) && other.warp() != r.warp();
  if (!same_warp || (last.thread() != r.thread() && !useful)) other = last;
  last = r;
}

/* Check an access against the past of its bytes, and add it. In all that follows a region of null is shared memory. */
void follow(const Lane &lane, Region *region, uintptr_t at, size_t bytes, Access access, const void *site, uint32_t kind = 0) {
  const Record now = record(lane, access, site, kind);
  if (access != Access::write && region && !region->was_written(at, bytes))
    fault(site, "%s %zu bytes of %s that nobody wrote", verb(access), bytes, place(region, at).c_str());
  each_cell(!region, at, bytes, [&](Cell &cell, uintptr_t where) {
    if (!(cell.write.atomic() && access == Access::atomic) && !ordered(cell.write, lane, !region))
      report_race(lane, region, where, access, cell.write, true, site);
    for (const Record &r : cell.reads)
      if (access != Access::read && !ordered(r, lane, !region)) report_race(lane, region, where, access, r, false, site);
    if (access != Access::write && !region && cell.write.serial != lane.block->serial)
      fault(site, "%s %zu bytes of %s that no thread of this block has written so far", verb(access), bytes, place(region, at).c_str());
    if (access == Access::read) remember_read(cell, now);
    else cell.write = now;
  });
  if (access != Access::read && region) region->wrote(at, bytes);
}

/* Programming Guide, "Memory fence functions": who sees an atomic that another block changed behind a fence, and fences too, sees
 * what that block wrote before. */
void order_blocks(const Lane &lane, uintptr_t at) {
  if (!lane.fenced) return;
  std::vector<bool> &before = history.released[at], &seen = history.seen;
  seen.resize(std::max(seen.size(), before.size()));
  for (size_t i = 0; i < before.size(); i++) seen[i] = seen[i] || before[i];
  before = seen;
  const size_t me = lane.block->serial - history.first_serial;
  before.resize(std::max(before.size(), me + 1));
  before[me] = true;
}

bool inside(uintptr_t at, const void *begin, size_t bytes) { return at - reinterpret_cast<uintptr_t>(begin) < bytes; }
bool in_library(uintptr_t at) { return inside(at, &__ehdr_start, size_t(&_end - &__ehdr_start)); } /* with its constants */

/* What a lane may touch without anybody looking: its stack, and what the engine keeps about it. */
bool own(const Lane &lane, uintptr_t at) {
  return inside(at, lane.stack, size_t(lane.stack_end - lane.stack)) || inside(at, &current, sizeof current) ||
         inside(at, lane.block->engine.begin, lane.block->engine.bytes) || inside(at, lane.block->launch, sizeof(Launch));
}

[[noreturn]] void report_outside(const Block &b, uintptr_t at, size_t bytes, Access access, const void *site) {
  const char *does = verb(access);
  const intptr_t in_shared = intptr_t(at - reinterpret_cast<uintptr_t>(b.shared));
  if (in_shared > -4096 && in_shared < (512 << 10))
    fault(site, "out of bounds: %s %zu bytes at offset %td of %zu bytes of shared memory", does, bytes, in_shared, b.launch->shared_bytes);
  for (int i = 0; i < b.n_threads; i++)
    if (inside(at, b.lanes[i].stack, size_t(b.lanes[i].stack_end - b.lanes[i].stack))) fault(site, "%s a local variable of thread %d", does, i);
  if (in_library(at)) fault(site, "%s a constant", does);
  const Region *near = region_near(at);
  if (!near) fault(site, "out of bounds: %s %zu bytes at %#zx, which is no memory of the device", does, bytes, size_t(at));
  fault(site, "out of bounds: %s %zu bytes at offset %td of %s of %zu bytes", does, bytes, intptr_t(at - near->begin), region_text(*near).c_str(),
        size_t(near->end - near->begin));
}

void access_memory(const Lane &lane, uintptr_t at, size_t bytes, Access access, const void *site, uint32_t kind = 0) {
  const Block &b = *lane.block;
  Region *region = nullptr;
  if (inside(at, b.shared, b.launch->shared_bytes)) {
    if (!inside(at + bytes - 1, b.shared, b.launch->shared_bytes)) report_outside(b, at, bytes, access, site);
    at -= reinterpret_cast<uintptr_t>(b.shared);
  } else {
    if (access == Access::read && (inside(at, b.launch->arguments, b.launch->argument_bytes) || in_library(at))) return;
    region = region_of(at, bytes);
    if (!region || kind) report_outside(b, at, bytes, access, site);
    Page &page = page_of(at);
    const size_t sector = at % PAGE / 32;
    (access == Access::read ? page.read : page.written)[sector / 64] |= uint64_t(1) << sector % 64;
  }
  if (at & (bytes - 1)) fault(site, "misaligned: %s %zu bytes at %s", verb(access), bytes, place(region, at).c_str());
  count_access(lane, !region, at, bytes, access, site, region);
  if (access == Access::atomic && region) order_blocks(lane, at);
  follow(lane, region, at, bytes, access, site, kind);
}

/* What kernels' code does; whole: at once, as one vector; otherwise as pieces that are aligned to their sizes. */
void watch(const void *address, size_t bytes, Access access, const void *site, bool whole = true) {
  const Lane *lane = current;
  uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (!lane || lane->quiet || own(*lane, at)) return;
  for (size_t piece = whole ? bytes : 16; bytes; at += piece, bytes -= piece) {
    while (!whole && (piece > bytes || at & (piece - 1))) piece /= 2;
    access_memory(*lane, at, piece, access, site);
  }
}

}  // namespace

/* -- what the engine tells ----------------------------------------------------------------------------------------------------------- */

void begin_launch(const Launch &launch, uint32_t first_serial) {
  History &h = history;
  h.pages.clear();
  h.released.clear();
  h.splits.clear();
  h.blocks_used = h.last_number = 0;
  h.first_serial = first_serial;
  choose_regions(launch);
  count_launch(launch);
}

void end_launch(Events events) {
  int64_t read = 0, written = 0;
  for (const auto &[number, page] : history.pages)
    for (int i = 0; i < SECTORS / 64; i++) {
      read += __builtin_popcountll(page.read[i]);
      written += __builtin_popcountll(page.written[i]);
    }
  count_end(events, read, written);
}

void begin_block(Block &block) {
  history.seen.clear();
  for (int i = 0; i < block.n_warps; i++) block.warps[i].clock_epoch = 0;
}

void barrier_opened(Block &block) { count_together(block); }
void warp_met(const Block &block, Warp &warp, uint32_t mask, bool orders) {
  count_together(warp, mask);
  if (!orders) return;
  if (warp.clock_epoch != block.epoch + 1) { /* the first one of this epoch */
    warp.clock_epoch = block.epoch + 1;
    for (int i = 0; i < WARP; i++)
      for (int j = 0; j < WARP; j++) warp.clock[i][j] = i == j;
  }
  uint32_t latest[WARP] = {};
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    for (int j = 0; j < WARP; j++) latest[j] = std::max(latest[j], warp.clock[__builtin_ctz(rest)][j]);
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    std::memcpy(warp.clock[i], latest, sizeof latest);
    warp.clock[i][i]++;
  }
}

void touched(const void *address, size_t bytes, Access access, const void *site) { watch(address, bytes, access, site); }

__attribute__((noinline)) void touch(const void *address, size_t bytes, Access access) { watch(address, bytes, access, SITE); }

__attribute__((noinline)) void expect_constant(const void *address, size_t bytes) {
  const void *site = SITE;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const Region *region = region_of(at, bytes);
  if (region) each_cell(false, at, bytes, [&](Cell &cell, uintptr_t where) {
    if (cell.write.serial >= history.first_serial)
      fault(site, "reads %s, which this launch writes at %s, by a load that does not see it", place(region, where).c_str(),
            describe_code(cell.write.site).c_str());
  });
}

void copy_started(void *shared, int bytes, const void *site) {
  access_memory(*current, reinterpret_cast<uintptr_t>(shared), size_t(bytes), Access::write, site, Record::UNDER_WAY);
}

void copy_ended(void *shared, int bytes, const void *site) {
  const Record now = record(*current, Access::write, site);
  each_cell(true, static_cast<char *>(shared) - current->block->shared, size_t(bytes), [&](Cell &cell, uintptr_t) { cell.write = now; });
}

}  // namespace emu

/* -- what the compiler calls ------------------------------------------------------------------------------------------------------------ */

#define WATCHED(n)                                                               \
  void __tsan_read##n(void *at) { emu::watch(at, n, emu::Access::read, SITE); }  \
  void __tsan_write##n(void *at) { emu::watch(at, n, emu::Access::write, SITE); }
extern "C" {
void __tsan_init() {}
void __tsan_vptr_update(void **, void *) {}
WATCHED(1) WATCHED(2) WATCHED(4) WATCHED(8) WATCHED(16)
void __tsan_read_range(void *at, unsigned long n) { emu::watch(at, n, emu::Access::read, SITE, false); }
void __tsan_write_range(void *at, unsigned long n) { emu::watch(at, n, emu::Access::write, SITE, false); }
/* Atomics of the C++ library, in host code; those of kernels do not come here. */
unsigned __tsan_atomic32_load(const volatile unsigned *at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile unsigned *at, unsigned v, int) { __atomic_store_n(at, v, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_fetch_add(volatile unsigned *at, unsigned v, int) { return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_fetch_sub(volatile unsigned *at, unsigned v, int) { return __atomic_fetch_sub(at, v, __ATOMIC_SEQ_CST); }
}

#endif
