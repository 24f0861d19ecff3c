/* count.cpp: what kernels ask of memory (-DPE_CHECKED).
 *
 * Accesses of the lanes of a warp by the same line, the n-th of each lane since they last met, are one request, as a card would issue
 * it. A request to global memory costs the 32-byte sectors that it touches; one to shared memory one pass over 32 banks of 4 bytes
 * for 32 lanes of up to 4 bytes, 16 lanes of 8 or 8 lanes of 16, and one more for each further word that a bank must give.
 * Python reads the counts by the flat functions at the end: bench/gpu/counts.py.
 */
#ifdef PE_CHECKED

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "check.h"

extern "C" {
struct pe_emulated_traffic {
  int64_t requests;        /* of warps */
  int64_t bytes;           /* that threads asked for */
  int64_t sectors;         /* of 32 bytes, by request; of shared memory: passes */
  int64_t conflicts;       /* passes of shared memory beyond the first */
};
struct pe_emulated_counts {
  int64_t launches, blocks, barriers, collectives, mma, dp4a, atomics; /* barriers by block, collectives by warp, dp4a by thread */
  pe_emulated_traffic loads, stores, shared_loads, shared_stores;
  int64_t threads, shared_bytes;             /* of a block, the largest */
  int64_t different_loads, different_stores; /* sectors that a launch touched at least once, over all launches */
};
}

namespace emu {
namespace {

struct Counts {
  pe_emulated_counts sum = {};
  std::map<uintptr_t, pe_emulated_traffic> loads, stores; /* by where the allocation begins */
};

std::map<const void *, Counts> counts;      /* by kernel */
Counts *counting = nullptr;                 /* of the launch that runs */

struct Request {
  uint32_t lanes = 0;
  uint32_t at[WARP];                        /* in 4 bytes, from the sector where the allocation begins, or shared memory */
};

/* The requests of one line by one warp that wait for more lanes. A line that reads several allocations is one for each. */
struct Line {
  bool shared;
  Access access;
  size_t bytes;
  uintptr_t allocation;
  uint32_t meeting;                         /* done[] holds since this meeting of the warp */
  uint32_t done[WARP];                      /* accesses by lane */
  std::vector<Request> open;
};

struct Requests {                           /* of one warp */
  std::unordered_map<uint64_t, Line> lines;
  struct { uint64_t key; Line *line; } recent[64] = {};
  std::vector<Line *> waiting;              /* with open requests */
  uint32_t meeting = 1;
};
std::unique_ptr<Requests> requests[MAX_THREADS / WARP];

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
  const bool load = line.access == Access::read;
  pe_emulated_counts &sum = counting->sum;
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
  plus(line.shared ? (load ? sum.shared_loads : sum.shared_stores) : (load ? sum.loads : sum.stores));
  if (!line.shared) plus((load ? counting->loads : counting->stores)[line.allocation]);
}

Line &line_of(Requests &all, const void *site, bool shared, Access access, uintptr_t allocation) {
  const uint64_t key = (uintptr_t(site) << 1 | shared) ^ (allocation >> 8) * 0x9e3779b97f4a7c15u;
  auto &recent = all.recent[(key ^ key >> 7) % 64];
  if (recent.key == key) return *recent.line;
  auto [at, is_new] = all.lines.try_emplace(key);
  if (is_new) at->second = {shared, access, 0, allocation, 0, {}, {}};
  recent = {key, &at->second};
  return at->second;
}

void close_all(Requests &all) {
  for (Line *line : all.waiting) {
    for (const Request &r : line->open) close(*line, r);
    line->open.clear();
  }
  all.waiting.clear();
  all.meeting++;
}

}  // namespace

void count_launch(const Launch &l) {
  counting = &counts[l.kernel];
  pe_emulated_counts &sum = counting->sum;
  sum.launches++;
  sum.threads = std::max<int64_t>(sum.threads, int64_t(l.block.x) * l.block.y * l.block.z);
  sum.shared_bytes = std::max<int64_t>(sum.shared_bytes, int64_t(l.shared_bytes));
  for (auto &of_warp : requests) of_warp.reset();
}

void count_access(const Lane &lane, bool shared, uintptr_t at, size_t bytes, Access access, const void *site, const Region *region) {
  auto &all = requests[lane.index / WARP];
  if (!all) all = std::make_unique<Requests>();
  if (access == Access::atomic) counting->sum.atomics++;
  Line &line = line_of(*all, site, shared, access, region ? region->begin : 0);
  if (line.meeting != all->meeting) {
    line.meeting = all->meeting;
    std::memset(line.done, 0, sizeof line.done);
  }
  line.bytes = bytes;
  const size_t number = line.done[lane.lane]++;
  if (line.open.empty()) all->waiting.push_back(&line);
  if (line.open.size() <= number) line.open.resize(number + 1);
  line.open[number].at[lane.lane] = uint32_t((at - (line.allocation & ~uintptr_t(31))) / 4);
  line.open[number].lanes |= 1u << lane.lane;
}

void count_together(Block &block) {
  for (int w = 0; w < block.n_warps; w++)
    if (requests[w]) close_all(*requests[w]);
}

void count_together(Warp &warp, uint32_t mask) {
  auto &all = requests[warp.lanes[0]->index / WARP];
  if (all && mask == (warp.present & ~warp.done)) close_all(*all);
}

void end_block(Block &block) {
  count_together(block);
  counting->sum.blocks++;
}

void count_end(Events events, int64_t sectors_read, int64_t sectors_written) {
  pe_emulated_counts &sum = counting->sum;
  sum.barriers += int64_t(events[int(Event::barrier)]);
  sum.collectives += int64_t(events[int(Event::collective)]);
  sum.mma += int64_t(events[int(Event::mma)]);
  sum.dp4a += int64_t(events[int(Event::dp4a)]);
  sum.different_loads += sectors_read;
  sum.different_stores += sectors_written;
}

}  // namespace emu

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
  *loads = counts.loads[begin];
  *stores = counts.stores[begin];
}

#endif
