/* check.cpp: every access of a kernel to memory, watched and counted (-DPE_CHECKED).
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
 *
 * Accesses of the lanes of a warp by the same line, the n-th of each lane since they last met, are one request, as a card would issue
 * it. A request to global memory costs the 32-byte sectors that it touches; one to shared memory one pass over 32 banks of 4 bytes
 * for 32 lanes of up to 4 bytes, 16 lanes of 8 or 8 lanes of 16, and one more for each further word that a bank must give.
 * Python reads the counts by the flat functions at the end: bench/gpu/counts.py.
 */
#ifdef PE_CHECKED

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <unordered_map>
#include <utility>

#include "check.h"

/* Where the library that this is linked into begins and ends, by the linker. */
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

struct pe_emulated_traffic {
  int64_t requests;        /* of warps */
  int64_t bytes;           /* that threads asked for */
  int64_t sectors;         /* of 32 bytes, by request; of shared memory: passes */
  int64_t conflicts;       /* passes of shared memory beyond the first */
};
struct pe_emulated_counts {
  int64_t launches;
  int64_t events[int(emu::Event::n_events)]; /* blocks; barriers of blocks, collectives and mma of warps, dp4a and atomics of threads */
  pe_emulated_traffic all[2][2];             /* loads, stores; of shared memory: loads, stores */
  int64_t threads, shared_bytes;             /* of a block, the largest */
  int64_t different[2];                      /* sectors that a launch loaded, stored at least once, over all launches */
};

namespace emu {
namespace {
struct Record {                           /* an access of the past */
  const void *site;
  uint32_t serial, epoch;                 /* of the block, 0: never; barriers of the block before it */
  uint32_t time;                          /* __syncwarps of the thread in this epoch before it, plus 1 */
  uint16_t thread;
  bool atomic, under_way;                 /* under_way: a copy_later that has not landed */

  int warp() const { return thread / WARP; }
};

struct Cell {                             /* the past of 4 bytes, or of one */
  Record write, reads[2];                 /* reads[1]: one by another warp than reads[0], if there was one */
  uint32_t split, split_launch;           /* where the cells of its last three bytes are, in the launch of that serial */
};

constexpr int PAGE = 4096;

/* What a launch did with a page of global memory; touched: a bit for each sector that it read, that it wrote. */
struct Page {
  Cell cells[PAGE / 4];
  uint64_t touched[2][PAGE / 32 / 64];
};

/* The past of one launch. Pages are used again by the next one: old records are known by their serials. */
struct History {
  std::vector<std::unique_ptr<Page>> all_pages;
  std::unordered_map<uintptr_t, Page *> pages;
  std::deque<std::array<Cell, 3>> splits;
  std::unique_ptr<Cell[]> shared{new Cell[(256 << 10) / 4]()};
  uintptr_t last_number;
  Page *last_page;
  uint32_t first_serial;                  /* of the launch */
  std::map<uintptr_t, std::set<uint32_t>> released; /* by atomic: the blocks that are ordered before who uses it next */
} history;

/* -- cells ---------------------------------------------------------------------------------------------------------------------- */
Page &page_of(uintptr_t at) {
  History &h = history;
  if (at / PAGE == h.last_number) return *h.last_page;
  Page *&page = h.pages[at / PAGE];
  if (!page) {
    if (h.pages.size() > h.all_pages.size()) h.all_pages.emplace_back(new Page());
    page = h.all_pages[h.pages.size() - 1].get();
    std::memset(page->touched, 0, sizeof page->touched);
  }
  h.last_number = at / PAGE;
  return *(h.last_page = page);
}

/* Do something with each cell of these bytes. */
template <class Do> inline void each_cell(bool shared, uintptr_t at, size_t bytes, Do &&act) {
  for (const uintptr_t end = at + bytes; at < end;) {
    const uintptr_t word = at & ~uintptr_t(3);
    Cell &cell = shared ? history.shared[word / 4] : page_of(word).cells[word % PAGE / 4];
    const bool is_split = cell.split_launch == history.first_serial;
    if (word == at && end - at >= 4 && !is_split) {
      act(cell, at);
      at += 4;
      continue;
    }
    if (!is_split) {
      history.splits.push_back({cell, cell, cell});
      cell.split = uint32_t(history.splits.size() - 1);
      cell.split_launch = history.first_serial;
    }
    Cell *last_three = history.splits[cell.split].data();
    for (; at < end && at < word + 4; at++) act(at == word ? cell : last_three[at - word - 1], at);
  }
}

/* -- order ------------------------------------------------------------------------------------------------------------------------ */
bool ordered(const Record &r, const Lane &lane, bool shared) {
  const Block &b = *lane.block;
  if (r.serial != b.serial) return shared || r.serial < history.first_serial /* of another time */ || b.before.count(r.serial);
  if (r.under_way) return false;
  if (r.thread == lane.index || r.epoch != b.epoch) return true;
  return r.warp() == lane.index / WARP && lane.warp->clock[lane.lane][r.thread % WARP] >= r.time;
}

Record record(const Lane &lane, Access access, const void *site, bool under_way = false) {
  const uint32_t time = lane.warp->clock[lane.lane][lane.lane];
  return {site, lane.block->serial, lane.block->epoch, time, uint16_t(lane.index), access == Access::atomic, under_way};
}

/* -- counts ---------------------------------------------------------------------------------------------------------------------- */
struct Counts {
  pe_emulated_counts sum = {};
  std::map<uintptr_t, pe_emulated_traffic> by_buffer[2]; /* loads, stores by where the allocation begins */
};

std::map<const void *, Counts> counts;      /* by kernel */
Counts *counting = nullptr;                 /* of the launch that runs */

struct Request {
  uint32_t lanes = 0;
  uint32_t at[WARP];                        /* in 4 bytes, from the sector where the allocation begins, or shared memory */
};

/* The requests of one line by one warp since its lanes last met. A line that reads several allocations is one for each. */
struct Line {
  bool shared, store;
  size_t bytes;
  uintptr_t allocation;
  uint32_t done[WARP];                      /* accesses by lane */
  std::vector<Request> open;
};

struct Requests {                           /* of one warp */
  std::unordered_map<uint64_t, Line> lines;
  struct { uint64_t key; Line *line; } recent[64] = {};
};
std::vector<Requests> requests(MAX_THREADS / WARP);

/* Passes over the banks for lanes [first, first + n_lanes), of `words` words each. */
int passes(const Request &r, int first, int n_lanes, int words) {
  uint32_t wanted[WARP * 4];
  int n = 0, worst = 0, by_bank[32] = {};
  for (int i = first; i < first + n_lanes; i++)
    for (int w = 0; r.lanes >> i & 1 && w < words; w++) wanted[n++] = r.at[i] + uint32_t(w);
  std::sort(wanted, wanted + n);
  n = int(std::unique(wanted, wanted + n) - wanted);
  for (int i = 0; i < n; i++) worst = std::max(worst, ++by_bank[wanted[i] % 32]);
  return worst;
}

void close(const Line &line, const Request &r) {
  pe_emulated_traffic add = {1, int64_t(line.bytes) * __builtin_popcount(r.lanes), 0, 0};
  if (line.shared) {
    const int words = line.bytes <= 4 ? 1 : int(line.bytes / 4), together = WARP / words;
    for (int first = 0; first < WARP; first += together) {
      const int n = passes(r, first, together, words);
      add.sectors += n;
      add.conflicts += n ? n - 1 : 0;
    }
  } else {
    uint32_t sectors[WARP], *end = sectors;
    for (int i = 0; i < WARP; i++)
      if (r.lanes >> i & 1) *end++ = r.at[i] / 8;
    std::sort(sectors, end);
    add.sectors = std::unique(sectors, end) - sectors;
  }
  auto plus = [&add](pe_emulated_traffic &t) {
    t = {t.requests + add.requests, t.bytes + add.bytes, t.sectors + add.sectors, t.conflicts + add.conflicts};
  };
  plus(counting->sum.all[line.shared][line.store]);
  if (!line.shared) plus(counting->by_buffer[line.store][line.allocation]);
}

void close_all(Requests &all) {
  for (const auto &[key, line] : all.lines)
    for (const Request &r : line.open) close(line, r);
  all.lines.clear();
  std::memset(all.recent, 0, sizeof all.recent);
}

/* region: null is shared memory; is_new: the launch did not touch its sector so before. */
void count_access(const Lane &lane, const Region *region, uintptr_t at, size_t bytes, Access access, bool is_new, const void *site) {
  const bool store = access != Access::read;
  counting->sum.different[store] += is_new;
  if (access == Access::atomic) count(Event::atomic);
  Requests &all = requests[lane.index / WARP];
  const uintptr_t allocation = region ? region->begin : 0;
  const uint64_t key = (uintptr_t(site) << 1 | !region) ^ (allocation >> 8) * 0x9e3779b97f4a7c15u;
  auto &recent = all.recent[(key ^ key >> 7) % 64];
  if (recent.key != key) {
    auto [found, is_new_line] = all.lines.try_emplace(key);
    if (is_new_line) found->second = {!region, store, 0, allocation, {}, {}};
    recent = {key, &found->second};
  }
  Line &line = *recent.line;
  line.bytes = bytes;
  const size_t number = line.done[lane.lane]++;
  if (line.open.size() <= number) line.open.resize(number + 1);
  line.open[number].at[lane.lane] = uint32_t((at - (line.allocation & ~uintptr_t(31))) / 4);
  line.open[number].lanes |= 1u << lane.lane;
}

/* -- messages --------------------------------------------------------------------------------------------------------------------- */
const char *verb(Access access) { return access == Access::read ? "reads" : access == Access::write ? "writes" : "changes atomically"; }

std::string region_text(const Region &r) {
  if (!self()->block->launch->ranges.empty()) return "a buffer";
  return r.device == HOST ? "pinned memory of the host" : "an allocation of device " + std::to_string(r.device);
}

/* Offsets are into the block's shared memory, or the region. */
std::string place(const Region *region, uintptr_t at) {
  return (region ? region_text(*region) : "shared memory") + " at offset " + std::to_string(region ? at - region->begin : at);
}

[[noreturn]] void report_race(const Lane &lane, const Region *region, uintptr_t at, Access access, const Record &r, bool wrote, const void *site) {
  const Launch &l = *lane.block->launch;
  const bool elsewhere = r.serial != lane.block->serial;
  const std::string block = elsewhere ? " of block " + l.grid.at(r.serial - history.first_serial).text() : "";
  const char *how = r.under_way ? "an asynchronous copy to it by" : !wrote ? "the read by" : r.atomic ? "an atomic access by" : "the write by";
  const char *why = r.under_way ? " that is still under way" : elsewhere ? ", which nothing orders" : ", with no barrier between";
  fault(site, "a race: it %s %s after %s thread %s%s at %s%s", verb(access), place(region, at).c_str(), how,
        l.block.at(r.thread).text().c_str(), block.c_str(), describe_code(r.site).c_str(), why);
}

/* -- one access ---------------------------------------------------------------------------------------------------------------------- */
void remember_read(Cell &cell, const Record &r) {
  Record &last = cell.reads[0], &other = cell.reads[1];
  const bool same_warp = last.serial == r.serial && last.warp() == r.warp();
  const bool useful = other.serial == r.serial && other.epoch == r.epoch && other.warp() != r.warp();
  if (!same_warp || (last.thread != r.thread && !useful)) other = last;
  last = r;
}

/* Check an access against the past of its bytes, and add it. In all that follows a region of null is shared memory. */
void follow(const Lane &lane, Region *region, uintptr_t at, size_t bytes, Access access, const void *site, bool under_way) {
  const Record now = record(lane, access, site, under_way);
  if (access != Access::write && region && !region->was_written(at, bytes))
    fault(site, "%s %zu bytes of %s that nobody wrote", verb(access), bytes, place(region, at).c_str());
  each_cell(!region, at, bytes, [&](Cell &cell, uintptr_t where) {
    if (!(cell.write.atomic && access == Access::atomic) && !ordered(cell.write, lane, !region))
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
  std::set<uint32_t> &released = history.released[at], &before = lane.block->before;
  before.insert(released.begin(), released.end());
  released = before;
  released.insert(lane.block->serial);
}

bool inside(uintptr_t at, const void *begin, size_t bytes) { return at - reinterpret_cast<uintptr_t>(begin) < bytes; }
bool in_library(uintptr_t at) { return inside(at, &__ehdr_start, size_t(&_end - &__ehdr_start)); } /* with its constants */

/* What a lane may touch without anybody looking: its stack, and what the engine keeps about it. */
bool own(const Lane &lane, uintptr_t at) {
  return inside(at, lane.stack, size_t(lane.stack_end - lane.stack)) || inside(at, &current, sizeof current) ||
         inside(at, lane.block, sizeof(Block)) || inside(at, lane.block->launch, sizeof(Launch));
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

void access_memory(const Lane &lane, uintptr_t at, size_t bytes, Access access, const void *site, bool under_way = false) {
  const Block &b = *lane.block;
  Region *region = nullptr;
  bool is_new = false;
  if (inside(at, b.shared, b.launch->shared_bytes)) {
    if (!inside(at + bytes - 1, b.shared, b.launch->shared_bytes)) report_outside(b, at, bytes, access, site);
    at -= reinterpret_cast<uintptr_t>(b.shared);
  } else {
    if (access == Access::read && (inside(at, b.launch->arguments, b.launch->argument_bytes) || in_library(at))) return;
    region = region_of(at, bytes);
    if (!region || under_way) report_outside(b, at, bytes, access, site);
    uint64_t &touched = page_of(at).touched[access != Access::read][at % PAGE / 32 / 64], sector = uint64_t(1) << at / 32 % 64;
    is_new = !(touched & sector);
    touched |= sector;
  }
  if (at & (bytes - 1)) fault(site, "misaligned: %s %zu bytes at %s", verb(access), bytes, place(region, at).c_str());
  count_access(lane, region, at, bytes, access, is_new, site);
  if (access == Access::atomic && region) order_blocks(lane, at);
  follow(lane, region, at, bytes, access, site, under_way);
}
}  // namespace

/* -- what the engine tells ----------------------------------------------------------------------------------------------------------- */
void begin_launch(const Launch &launch, uint32_t first_serial) {
  History &h = history;
  h.pages.clear();
  h.released.clear();
  h.splits.clear();
  h.last_number = 0;
  h.first_serial = first_serial;
  choose_regions(launch);
  for (Requests &of_warp : requests) of_warp = {};
  counting = &counts[launch.kernel];
  pe_emulated_counts &sum = counting->sum;
  sum.launches++;
  sum.threads = std::max<int64_t>(sum.threads, int64_t(launch.block.x) * launch.block.y * launch.block.z);
  sum.shared_bytes = std::max<int64_t>(sum.shared_bytes, int64_t(launch.shared_bytes));
}

void end_launch(Block &block) {
  for (Requests &of_warp : requests) close_all(of_warp);
  for (int i = 0; i < int(Event::n_events); i++) counting->sum.events[i] += int64_t(std::exchange(block.events[i], 0));
}

void together(Block &block) {
  for (int w = 0; w < block.n_warps; w++) {
    auto &clock = block.warps[w].clock;
    close_all(requests[w]);
    std::memset(clock, 0, sizeof clock);
    for (int i = 0; i < WARP; i++) clock[i][i] = 1;
  }
}

void warp_met(Warp &warp, uint32_t mask, bool orders) {
  if (mask == (warp.present & ~warp.done)) close_all(requests[warp.lanes[0]->index / WARP]);
  if (!orders) return;
  uint32_t latest[WARP] = {};
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    for (int j = 0; j < WARP; j++) latest[j] = std::max(latest[j], warp.clock[__builtin_ctz(rest)][j]);
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    std::memcpy(warp.clock[i], latest, sizeof latest);
    warp.clock[i][i]++;
  }
}

void touched(const void *address, size_t bytes, Access access, const void *site, bool whole) {
  const Lane *lane = current;
  uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (!lane || lane->quiet || own(*lane, at)) return;
  for (size_t piece = whole ? bytes : 16; bytes; at += piece, bytes -= piece) {
    while (!whole && (piece > bytes || at & (piece - 1))) piece /= 2;
    access_memory(*lane, at, piece, access, site);
  }
}

__attribute__((noinline)) void touch(const void *address, size_t bytes, Access access) { touched(address, bytes, access, SITE); }

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
  access_memory(*current, reinterpret_cast<uintptr_t>(shared), size_t(bytes), Access::write, site, true);
}

void copy_ended(void *shared, int bytes, const void *site) {
  const Record now = record(*current, Access::write, site);
  each_cell(true, static_cast<char *>(shared) - current->block->shared, size_t(bytes), [&](Cell &cell, uintptr_t) { cell.write = now; });
}
}  // namespace emu

/* -- what the compiler calls ------------------------------------------------------------------------------------------------------------ */
#define WATCHED(n)                                                                 \
  void __tsan_read##n(void *at) { emu::touched(at, n, emu::Access::read, SITE); }  \
  void __tsan_write##n(void *at) { emu::touched(at, n, emu::Access::write, SITE); }
extern "C" {
void __tsan_init() {}
void __tsan_vptr_update(void **, void *) {}
WATCHED(1) WATCHED(2) WATCHED(4) WATCHED(8) WATCHED(16)
void __tsan_read_range(void *at, unsigned long n) { emu::touched(at, n, emu::Access::read, SITE, false); }
void __tsan_write_range(void *at, unsigned long n) { emu::touched(at, n, emu::Access::write, SITE, false); }
/* Atomics of the C++ library, in host code; those of kernels do not come here. */
unsigned __tsan_atomic32_load(const volatile unsigned *at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile unsigned *at, unsigned v, int) { __atomic_store_n(at, v, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_fetch_add(volatile unsigned *at, unsigned v, int) { return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_fetch_sub(volatile unsigned *at, unsigned v, int) { return __atomic_fetch_sub(at, v, __ATOMIC_SEQ_CST); }
}

/* -- for Python ------------------------------------------------------------------------------------------------------------------------ */
#define EXPORT extern "C" __attribute__((visibility("default")))

/* Forget all counts; how many kernels were launched since; the counts of number i, with its name. */
EXPORT void pe_emulated_reset(void) { emu::counts.clear(); }
EXPORT int32_t pe_emulated_kernels(void) { return int32_t(emu::counts.size()); }
EXPORT void pe_emulated_kernel(int32_t i, char *name, int32_t name_bytes, pe_emulated_counts *out) {
  const auto &[kernel, counts] = *std::next(emu::counts.begin(), i);
  std::snprintf(name, size_t(name_bytes), "%s", emu::name_of(kernel).c_str());
  *out = counts.sum;
}
/* What kernel number i loaded and stored in the allocation that holds this address; all zero where that is nothing. */
EXPORT void pe_emulated_buffer(int32_t i, uint64_t address, pe_emulated_traffic *loads, pe_emulated_traffic *stores) {
  emu::Counts &counts = std::next(emu::counts.begin(), i)->second;
  const emu::Region *region = emu::region_of(address, 1);
  const uintptr_t begin = region ? region->begin : uintptr_t(address); /* of an earlier launch: where its buffer began */
  *loads = counts.by_buffer[0][begin];
  *stores = counts.by_buffer[1][begin];
}
#endif
