/* peers.h: how devices come to each other's memory in the emulator: all do, and copies need no leave, as with a driver that goes by the host. */
#ifndef PE_EMULATE_PEERS_H
#define PE_EMULATE_PEERS_H

#include <mutex>
#include <set>
#include <utility>

#include "runtime.h"

constexpr cudaError_t cudaErrorPeerAccessAlreadyEnabled = static_cast<cudaError_t>(704);

namespace emu {
inline std::set<std::pair<int, int>> peers; /* (device, whose memory it reaches) */
}

inline cudaError_t cudaDeviceCanAccessPeer(int *can, int own, int other) {
  const bool there = own >= 0 && own < emu::n_devices() && other >= 0 && other < emu::n_devices();
  return *can = there && own != other, emu::needs(there, cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceEnablePeerAccess(int other, unsigned) {
  std::lock_guard<std::mutex> hold(emu::busy);
  return emu::needs(emu::peers.emplace(emu::device, other).second, cudaErrorPeerAccessAlreadyEnabled);
}

#endif
