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

#include "check.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>

#include "count.h"

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
struct Split { Cell bytes[3]; };

constexpr int PAGE = 4096, CELLS = PAGE / 4, SECTORS = PAGE / 32;

/* What a launch did with a page of global memory: its cells, and a bit for each sector that it read, that it wrote. */
struct Page {
  Cell *cells;
  uint64_t read[SECTORS / 64], written[SECTORS / 64];
};

/* The cells of one launch. They are used again by the next one: old records are known by their serials. */
struct History {
  std::unordered_map<uintptr_t, Page> pages;
  std::vector<std::unique_ptr<Cell[]>> blocks;
  size_t blocks_used = 0;
  std::vector<std::unique_ptr<Split[]>> splits;
  size_t splits_used = 0;
  std::unique_ptr<Cell[]> shared{new Cell[(256 << 10) / 4]()};
  uintptr_t last_page = 0;
  Page *last = nullptr;
  uint32_t first_serial = FIRST_SERIAL;   /* of the launch */
  std::map<uintptr_t, std::vector<bool>> released; /* by atomic: the blocks that are ordered before who uses it next */
  std::vector<bool> seen;                 /* blocks that are ordered before the one that runs */
};
History history;

/* -- cells ---------------------------------------------------------------------------------------------------------------------- */

Page &page_of(uintptr_t at) {
  History &h = history;
  const uintptr_t number = at / PAGE;
  if (number == h.last_page) return *h.last;
  Page &page = h.pages[number];
  if (!page.cells) {
    if (h.blocks_used == h.blocks.size()) h.blocks.emplace_back(new Cell[CELLS]());
    page.cells = h.blocks[h.blocks_used++].get();
  }
  h.last_page = number;
  h.last = &page;
  return page;
}

Cell *split(Cell &cell) {
  History &h = history;
  constexpr size_t N = 1024;
  if (!cell.split || cell.split_launch != h.first_serial) {
    if (h.splits_used == h.splits.size() * N) h.splits.emplace_back(new Split[N]());
    cell.split = uint32_t(++h.splits_used);
    cell.split_launch = h.first_serial;
    Split &s = h.splits[(cell.split - 1) / N][(cell.split - 1) % N];
    for (Cell &byte : s.bytes) byte = cell;
  }
  return h.splits[(cell.split - 1) / N][(cell.split - 1) % N].bytes;
}

/* Do something with each cell of these bytes. */
template <class Do> inline void each_cell(bool shared, uintptr_t at, size_t bytes, Do &&act) {
  for (const uintptr_t end = at + bytes; at < end;) {
    const uintptr_t word = at & ~uintptr_t(3);
    Cell &cell = shared ? history.shared[word / 4] : page_of(word).cells[word % PAGE / 4];
    if (word == at && end - at >= 4 && !(cell.split && cell.split_launch == history.first_serial)) {
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
  const Index3 size = lane.block->launch->block, grid = lane.block->launch->grid;
  const uint32_t t = uint32_t(r.thread());
  char text[120];
  const int n = std::snprintf(text, sizeof text, "thread (%u,%u,%u)", t % size.x, t / size.x % size.y, t / size.x / size.y);
  if (r.serial != lane.block->serial) {
    const uint32_t b = r.serial - history.first_serial;
    std::snprintf(text + n, sizeof text - n, " of block (%u,%u,%u)", b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
  }
  return text;
}

std::string place(bool shared, uintptr_t at) {
  if (shared) return "shared memory at offset " + std::to_string(at);
  const Region *r = region_of(at, 1);
  return r ? r->what + " at offset " + std::to_string(at - r->begin) : "memory";
}

void report_race(const Lane &lane, bool shared, uintptr_t at, Access access, const Record &r, bool wrote, const void *site) {
  const std::string how = r.under_way() ? "an asynchronous copy to it by " : wrote ? (r.atomic() ? "an atomic access by " : "the write by ") : "the read by ";
  const char *why = r.under_way() ? " that is still under way" : r.serial != lane.block->serial ? ", which nothing orders" : ", with no barrier between";
  fault(site, "a race: it %s %s after %s%s at %s%s", verb(access), place(shared, at).c_str(), how.c_str(), thread_text(lane, r).c_str(),
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

/* Check an access against the past of its bytes, and add it. */
void follow(const Lane &lane, bool shared, uintptr_t at, size_t bytes, Access access, const void *site, Region *region,
            bool under_way = false) {
  const Record now = record(lane, access, site, under_way ? Record::UNDER_WAY : 0);
  if (access != Access::write && region && region->written && !region->was_written(at, bytes))
    fault(site, "%s %zu bytes of %s that nobody wrote", verb(access), bytes, place(false, at).c_str());
  each_cell(shared, at, bytes, [&](Cell &cell, uintptr_t where) {
    if (!(cell.write.atomic() && access == Access::atomic) && !ordered(cell.write, lane, shared))
      report_race(lane, shared, where, access, cell.write, true, site);
    if (access != Access::read)
      for (const Record &r : cell.reads)
        if (!ordered(r, lane, shared)) report_race(lane, shared, where, access, r, false, site);
    if (access != Access::write && shared && cell.write.serial != lane.block->serial)
      fault(site, "%s %zu bytes of shared memory at offset %zu that no thread of this block has written so far", verb(access), bytes, size_t(at));
    if (access == Access::read) remember_read(cell, now);
    else cell.write = now;
  });
  if (access != Access::read && region && region->written) region->wrote(at, bytes);
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

/* The library of the kernels: its constants may be read. */
bool in_library(uintptr_t at) {
  static const std::pair<uintptr_t, uintptr_t> range = [] {
    std::pair<uintptr_t, uintptr_t> r{reinterpret_cast<uintptr_t>(&in_library), 0};
    dl_iterate_phdr([](dl_phdr_info *info, size_t, void *out) {
      auto &r = *static_cast<std::pair<uintptr_t, uintptr_t> *>(out);
      uintptr_t begin = UINTPTR_MAX, end = 0;
      for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD) {
          begin = std::min<uintptr_t>(begin, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
          end = std::max<uintptr_t>(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
        }
      if (r.first < begin || r.first >= end) return 0;
      r = {begin, end};
      return 1;
    }, &r);
    return r;
  }();
  return at >= range.first && at < range.second;
}

[[noreturn]] void report_outside(const Lane &lane, uintptr_t at, size_t bytes, Access access, const void *site) {
  const Block &b = *lane.block;
  const char *does = verb(access);
  const intptr_t in_shared = intptr_t(at - reinterpret_cast<uintptr_t>(b.shared));
  if (in_shared > -4096 && in_shared < (512 << 10))
    fault(site, "out of bounds: %s %zu bytes at offset %td of %zu bytes of shared memory", does, bytes, in_shared, b.launch->shared_bytes);
  for (int i = 0; i < b.n_threads; i++)
    if (at - reinterpret_cast<uintptr_t>(b.lanes[i].stack) < size_t(b.lanes[i].stack_end - b.lanes[i].stack))
      fault(site, "%s a local variable of thread %d", does, i);
  if (in_library(at)) fault(site, "%s a constant", does);
  const Region *near = region_near(at);
  if (!near) fault(site, "out of bounds: %s %zu bytes at %#zx, which is no memory of the device", does, bytes, size_t(at));
  fault(site, "out of bounds: %s %zu bytes at offset %td of %s of %zu bytes", does, bytes, intptr_t(at - near->begin), near->what.c_str(),
        size_t(near->end - near->begin));
}

void access_memory(const Lane &lane, uintptr_t at, size_t bytes, Access access, const void *site) {
  const Block &b = *lane.block;
  const uintptr_t in_shared = at - reinterpret_cast<uintptr_t>(b.shared);
  const bool shared = in_shared < b.launch->shared_bytes && bytes <= b.launch->shared_bytes - in_shared;
  Region *region = nullptr;
  if (!shared) {
    if (access == Access::read) {
      const uintptr_t in_arguments = at - reinterpret_cast<uintptr_t>(b.launch->arguments);
      if (in_arguments < b.launch->argument_bytes) return;
      if (in_library(at)) return;
    }
    region = region_of(at, bytes);
    if (!region) report_outside(lane, at, bytes, access, site);
  }
  if (at & (bytes - 1)) fault(site, "misaligned: %s %zu bytes at %s", verb(access), bytes, place(shared, shared ? in_shared : at).c_str());
  count_access(lane, shared, shared ? in_shared : at, bytes, access, site, region);
  if (!shared) {
    Page &page = page_of(at);
    const size_t sector = at % PAGE / 32;
    (access == Access::read ? page.read : page.written)[sector / 64] |= uint64_t(1) << sector % 64;
    if (access == Access::atomic) order_blocks(lane, at);
  }
  follow(lane, shared, shared ? in_shared : at, bytes, access, site, region);
}

bool inside(uintptr_t at, const void *begin, size_t bytes) { return at - reinterpret_cast<uintptr_t>(begin) < bytes; }

/* What a lane may touch without anybody looking: its stack, and what the engine keeps about it. */
inline bool own(const Lane &lane, uintptr_t at) {
  return inside(at, lane.stack, size_t(lane.stack_end - lane.stack)) || inside(at, &current, sizeof current) ||
         inside(at, lane.block->engine.begin, lane.block->engine.bytes) || inside(at, lane.block->launch, sizeof(Launch));
}

/* Accesses of any size and alignment: as pieces that are aligned to their sizes. */
void access_pieces(uintptr_t at, size_t bytes, Access access, const void *site) {
  const Lane *lane = current;
  if (!lane || lane->quiet || own(*lane, at)) return;
  while (bytes) {
    size_t piece = 16;
    while (piece > bytes || at & (piece - 1)) piece /= 2;
    access_memory(*lane, at, piece, access, site);
    at += piece;
    bytes -= piece;
  }
}

inline void access_whole(const void *address, size_t bytes, Access access, const void *site) {
  const Lane *lane = current;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (lane && !lane->quiet && !own(*lane, at)) access_memory(*lane, at, bytes, access, site);
}

}  // namespace

/* -- what the engine tells ----------------------------------------------------------------------------------------------------------- */

void begin_launch(const Launch &launch, uint32_t first_serial) {
  History &h = history;
  h.pages.clear();
  h.released.clear();
  h.blocks_used = h.splits_used = 0;
  h.last_page = 0;
  h.first_serial = first_serial;
  choose_regions(launch);
  count_launch(launch);
}

void end_launch(const uint64_t (&events)[int(Event::n_events)]) {
  int64_t read = 0, written = 0;
  for (const auto &[number, page] : history.pages)
    for (int i = 0; i < SECTORS / 64; i++) {
      read += __builtin_popcountll(page.read[i]);
      written += __builtin_popcountll(page.written[i]);
    }
  count_different(read, written);
  count_events(events);
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

void touched(const void *address, size_t bytes, Access access, const void *site) { access_whole(address, bytes, access, site); }

__attribute__((noinline)) void touch(const void *address, size_t bytes, Access access) {
  access_whole(address, bytes, access, __builtin_return_address(0));
}

void copy_started(void *shared, int bytes, const void *site) {
  const Lane &lane = *current;
  const uintptr_t at = static_cast<char *>(shared) - lane.block->shared;
  if (at >= lane.block->launch->shared_bytes || size_t(bytes) > lane.block->launch->shared_bytes - at)
    report_outside(lane, reinterpret_cast<uintptr_t>(shared), bytes, Access::write, site);
  if (at & (bytes - 1)) fault(site, "misaligned: an asynchronous copy of %d bytes to shared memory at offset %zu", bytes, size_t(at));
  count_access(lane, true, at, bytes, Access::write, site, nullptr);
  follow(lane, true, at, bytes, Access::write, site, nullptr, true);
}

void copy_ended(void *shared, int bytes, const void *site) {
  const Lane &lane = *current;
  const Record now = record(lane, Access::write, site);
  each_cell(true, static_cast<char *>(shared) - lane.block->shared, bytes, [&](Cell &cell, uintptr_t) { cell.write = now; });
}

bool same_line(const void *site, const void *other) { return site == other || describe_code(site) == describe_code(other); }

}  // namespace emu

/* -- what the compiler calls ------------------------------------------------------------------------------------------------------------ */

#define SITE __builtin_return_address(0)
#define WHOLE(n)                                                                                              \
  void __tsan_read##n(void *at) { emu::access_whole(at, n, emu::Access::read, SITE); }                        \
  void __tsan_write##n(void *at) { emu::access_whole(at, n, emu::Access::write, SITE); }
#define PIECES(n)                                                                                             \
  void __tsan_unaligned_read##n(void *at) { emu::access_pieces(uintptr_t(at), n, emu::Access::read, SITE); }  \
  void __tsan_unaligned_write##n(void *at) { emu::access_pieces(uintptr_t(at), n, emu::Access::write, SITE); }
/* Those of the C++ library, in host code. Kernels' atomics do not come here: cuda.h. */
#define ATOMICS(n, T)                                                                                         \
  T __tsan_atomic##n##_load(const volatile T *at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }      \
  void __tsan_atomic##n##_store(volatile T *at, T v, int) { __atomic_store_n(at, v, __ATOMIC_SEQ_CST); }      \
  T __tsan_atomic##n##_exchange(volatile T *at, T v, int) { return __atomic_exchange_n(at, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##n##_fetch_add(volatile T *at, T v, int) { return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##n##_fetch_sub(volatile T *at, T v, int) { return __atomic_fetch_sub(at, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##n##_fetch_or(volatile T *at, T v, int) { return __atomic_fetch_or(at, v, __ATOMIC_SEQ_CST); }     \
  T __tsan_atomic##n##_fetch_and(volatile T *at, T v, int) { return __atomic_fetch_and(at, v, __ATOMIC_SEQ_CST); }   \
  int __tsan_atomic##n##_compare_exchange_strong(volatile T *at, T *e, T v, int, int) {                       \
    return __atomic_compare_exchange_n(at, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                           \
  int __tsan_atomic##n##_compare_exchange_weak(volatile T *at, T *e, T v, int, int) {                         \
    return __atomic_compare_exchange_n(at, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
WHOLE(1) WHOLE(2) WHOLE(4) WHOLE(8) WHOLE(16)
PIECES(2) PIECES(4) PIECES(8) PIECES(16)
void __tsan_read_range(void *at, unsigned long n) { emu::access_pieces(uintptr_t(at), n, emu::Access::read, SITE); }
void __tsan_write_range(void *at, unsigned long n) { emu::access_pieces(uintptr_t(at), n, emu::Access::write, SITE); }
ATOMICS(8, unsigned char) ATOMICS(16, unsigned short) ATOMICS(32, unsigned) ATOMICS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
}

#endif
