/* memory.cpp: the memory of emulated devices, what launches may use of it, and atomics that no sanitizer rewrites. */
#include <algorithm>

#include "check.h"

namespace emu {
std::mutex busy;

namespace {
constexpr size_t RED_ZONE = 4096;
using Regions = std::map<uintptr_t, Region>;            /* by first address */

Regions allocations, bound;                             /* bound: of a launch with ranges of its own */
Regions *usable = &allocations;                         /* by the launch that runs */
Region *last;                                           /* found by region_of */
std::map<int, size_t> used;                             /* bytes, by device */

Region *holding(Regions &regions, uintptr_t at) {
  auto next = regions.upper_bound(at);
  if (next == regions.begin() || at >= std::prev(next)->second.end) return nullptr;
  return &std::prev(next)->second;
}
}  // namespace

size_t device_bytes_used(int device) {
  std::lock_guard<std::mutex> hold(busy);
  return used[device];
}

void *allocate(int device, size_t bytes) {
  std::lock_guard<std::mutex> hold(busy);
  void *p = nullptr;
  if (device != HOST && (bytes > device_bytes() || used[device] > device_bytes() - bytes)) return nullptr;
  if (posix_memalign(&p, 256, bytes + 2 * RED_ZONE)) return nullptr;
  std::memset(p, 0xff, bytes + 2 * RED_ZONE);           /* as floats: NaN */
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + RED_ZONE;
  last = nullptr;
  allocations[at] = {at, at + bytes, device, std::vector<uint8_t>(CHECKED && device != HOST ? bytes : 0)};
  used[device] += bytes;
  return reinterpret_cast<void *>(at);
}

bool release(void *memory) {
  std::lock_guard<std::mutex> hold(busy);
  auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end()) return false;
  used[found->second.device] -= found->second.end - found->second.begin;
  last = nullptr;
  allocations.erase(found);
  std::free(static_cast<char *>(memory) - RED_ZONE);
  return true;
}

Region *allocation(const void *memory) {
  std::lock_guard<std::mutex> hold(busy);
  return holding(allocations, reinterpret_cast<uintptr_t>(memory));
}

void choose_regions(const Launch &launch) {
  last = nullptr;
  bound.clear();
  usable = launch.ranges.empty() ? &allocations : &bound;
  std::vector<Range> ranges = launch.ranges;
  std::sort(ranges.begin(), ranges.end(), [](const Range &a, const Range &b) { return a.begin < b.begin; });
  for (const Range &r : ranges) { /* buffers may be parts of each other */
    const uintptr_t begin = reinterpret_cast<uintptr_t>(r.begin), end = begin + r.bytes;
    if (!bound.empty() && begin < bound.rbegin()->second.end) bound.rbegin()->second.end = std::max(bound.rbegin()->second.end, end);
    else if (r.bytes) bound[begin] = {begin, end, HOST, {}};
  }
}

Region *region_of(uintptr_t at, size_t bytes) {
  if (!last || at < last->begin || at >= last->end) last = holding(*usable, at);
  return last && bytes <= last->end - at ? last : nullptr;
}

const Region *region_near(uintptr_t at) {
  auto away = [at](const auto &r) { return at < r.first ? r.first - at : at >= r.second.end ? at - r.second.end : 0; };
  auto best = std::min_element(usable->begin(), usable->end(), [&](const auto &a, const auto &b) { return away(a) < away(b); });
  return best == usable->end() || away(*best) >= 1 << 20 ? nullptr : &best->second;
}

template <class Bits> Bits swap_if(void *at, Bits expected, Bits desired) {
  __atomic_compare_exchange_n(static_cast<Bits *>(at), &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template uint32_t swap_if(void *, uint32_t, uint32_t);
template uint64_t swap_if(void *, uint64_t, uint64_t);
}  // namespace emu
