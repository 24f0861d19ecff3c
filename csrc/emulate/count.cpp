/* count.cpp: see count.h. */
#ifdef PE_CHECKED

#include "count.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>

#include "check.h"

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

/* The requests of one line by one warp that wait for more lanes. */
struct Line {
  bool shared = false;
  Access access = Access::read;
  size_t bytes = 0;
  uintptr_t allocation = 0;
  uint32_t meeting = 0;                     /* the numbers below hold since this meeting of the warp */
  uint32_t done[WARP];                      /* accesses by lane */
  std::vector<Request> open;
};

struct Requests {                           /* of one warp */
  std::unordered_map<uint64_t, Line> lines;
  struct { uint64_t key; Line *line; } recent[64] = {};
  std::vector<Line *> waiting;              /* lines with open requests */
  uint32_t meeting = 1;
};
Requests *requests[MAX_THREADS / WARP];

/* Passes over the banks that some lanes need, each `words` words. */
int passes(const Request &r, int first, int n_lanes, int words) {
  uint32_t wanted[WARP * 4];
  int n = 0, worst = 0;
  for (int i = first; i < first + n_lanes; i++)
    for (int w = 0; r.lanes >> i & 1 && w < words; w++) wanted[n++] = r.at[i] + uint32_t(w);
  std::sort(wanted, wanted + n);
  n = int(std::unique(wanted, wanted + n) - wanted);
  int by_bank[32] = {};
  for (int i = 0; i < n; i++) worst = std::max(worst, ++by_bank[wanted[i] % 32]);
  return worst;
}

void close(const Line &line, const Request &r) {
  const bool load = line.access == Access::read;
  pe_emulated_counts &sum = counting->sum;
  pe_emulated_traffic add = {1, int64_t(line.bytes) * __builtin_popcount(r.lanes), 0, 0};
  if (line.shared) {
    const int together = line.bytes <= 4 ? 32 : line.bytes == 8 ? 16 : 8;
    for (int first = 0; first < WARP; first += together) {
      const int n = passes(r, first, together, line.bytes <= 4 ? 1 : int(line.bytes / 4));
      add.sectors += n;
      add.conflicts += n ? n - 1 : 0;
    }
  } else {
    uint32_t sectors[WARP];
    int n = 0;
    for (int i = 0; i < WARP; i++)
      if (r.lanes >> i & 1) sectors[n++] = r.at[i] / 8;
    std::sort(sectors, sectors + n);
    add.sectors = std::unique(sectors, sectors + n) - sectors;
  }
  auto plus = [&add](pe_emulated_traffic &t) {
    t.requests += add.requests;
    t.bytes += add.bytes;
    t.sectors += add.sectors;
    t.conflicts += add.conflicts;
  };
  plus(line.shared ? (load ? sum.shared_loads : sum.shared_stores) : (load ? sum.loads : sum.stores));
  if (!line.shared) plus((load ? counting->loads : counting->stores)[line.allocation]);
}

/* A line that reads several allocations (by a pointer that a table holds) is one for each. */
Line &line_of(Requests &all, const void *site, bool shared, Access access, uintptr_t allocation) {
  const uint64_t key = (uintptr_t(site) << 1 | shared) ^ (allocation >> 8) * 0x9e3779b97f4a7c15u;
  auto &recent = all.recent[(key ^ key >> 7) % 64];
  if (recent.key == key) return *recent.line;
  recent = {key, &all.lines[key]};
  recent.line->shared = shared;
  recent.line->access = access;
  recent.line->allocation = allocation;
  return *recent.line;
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

void count_access(const Lane &lane, bool shared, uintptr_t at, size_t bytes, Access access, const void *site, const Region *region) {
  Requests *&all = requests[lane.index / WARP];
  if (!all) all = new Requests;
  if (access == Access::atomic) counting->sum.atomics++;
  Line &line = line_of(*all, site, shared, access, region ? region->begin : 0);
  if (line.meeting != all->meeting) {
    line.meeting = all->meeting;
    std::memset(line.done, 0, sizeof line.done);
  }
  line.bytes = bytes;
  const size_t number = line.done[lane.lane]++;
  if (line.open.empty()) all->waiting.push_back(&line);
  while (line.open.size() <= number) line.open.emplace_back();
  Request &r = line.open[number];
  r.at[lane.lane] = uint32_t((at - (line.allocation & ~uintptr_t(31))) / 4);
  r.lanes |= 1u << lane.lane;
}

void count_launch(const Launch &launch) {
  counting = &counts[launch.kernel];
  pe_emulated_counts &sum = counting->sum;
  sum.launches++;
  sum.threads = std::max<int64_t>(sum.threads, int64_t(launch.block.x) * launch.block.y * launch.block.z);
  sum.shared_bytes = std::max<int64_t>(sum.shared_bytes, int64_t(launch.shared_bytes));
  for (Requests *all : requests)
    if (all) {
      all->waiting.clear(); /* of a launch that failed */
      all->lines.clear();
      for (auto &recent : all->recent) recent = {};
    }
}

void count_different(int64_t loads, int64_t stores) {
  counting->sum.different_loads += loads;
  counting->sum.different_stores += stores;
}

void count_events(const uint64_t (&events)[int(Event::n_events)]) {
  pe_emulated_counts &sum = counting->sum;
  sum.barriers += int64_t(events[int(Event::barrier)]);
  sum.collectives += int64_t(events[int(Event::collective)]);
  sum.mma += int64_t(events[int(Event::mma)]);
  sum.dp4a += int64_t(events[int(Event::dp4a)]);
}

void end_block(Block &block) {
  count_together(block);
  counting->sum.blocks++;
}

void count_together(Block &block) {
  for (int w = 0; w < block.n_warps; w++)
    if (requests[w]) close_all(*requests[w]);
}

void count_together(Warp &warp, uint32_t mask) {
  Requests *all = requests[warp.lanes[0]->index / WARP];
  if (all && mask == (warp.present & ~warp.done)) close_all(*all);
}

}  // namespace emu

/* -- for Python ------------------------------------------------------------------------------------------------------------------------ */

#define EXPORT __attribute__((visibility("default")))

namespace {
std::pair<const void *const, emu::Counts> &number(int32_t i) { return *std::next(emu::counts.begin(), i); }
}  // namespace

extern "C" {
EXPORT void pe_emulated_reset(void) { emu::counts.clear(); }
EXPORT int32_t pe_emulated_kernels(void) { return int32_t(emu::counts.size()); }
EXPORT void pe_emulated_kernel(int32_t i, char *name, int32_t name_bytes, pe_emulated_counts *out) {
  std::snprintf(name, size_t(name_bytes), "%s", emu::name_of(number(i).first).c_str());
  *out = number(i).second.sum;
}
EXPORT void pe_emulated_buffer(int32_t i, uint64_t address, pe_emulated_traffic *loads, pe_emulated_traffic *stores) {
  const emu::Region *region = emu::region_of(address, 1);
  const uintptr_t begin = region ? region->begin : uintptr_t(address); /* of an earlier launch: where its buffer began */
  *loads = number(i).second.loads[begin];
  *stores = number(i).second.stores[begin];
}
}

#endif
