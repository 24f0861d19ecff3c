/* runtime.h: the part of the CUDA runtime that csrc/cuda uses, with NVIDIA's names, types and meanings, for emulated devices.
 *
 * Every operation is done before its function returns, in the order of the calls. A stream that is being captured notes its
 * operations instead, for cudaGraphLaunch. PYENGINE_EMULATED_DEVICES is the number of devices (2), PYENGINE_EMULATED_MEMORY the
 * bytes of each (8 GiB), PYENGINE_EMULATED_SM the compute capability they report (80), PYENGINE_EMULATED_DRIVER what the driver can do.
 */
#ifndef PE_EMULATE_RUNTIME_H
#define PE_EMULATE_RUNTIME_H

#include <chrono>
#include <cstdio>
#include <tuple>
#include <utility>

#include "check.h"

#define EMU_ERRORS(X)                                                                                                         \
  X(cudaSuccess, 0, "no error") X(cudaErrorInvalidValue, 1, "invalid argument") X(cudaErrorMemoryAllocation, 2, "out of memory") \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                                       \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected") X(cudaErrorInvalidDevice, 101, "invalid device ordinal")    \
  X(cudaErrorLaunchFailure, 719, emu::last_error().c_str()) /* what the last kernel that failed did wrong */                  \
  X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")
#define EMU_ERROR(name, number, text) name = number,
enum cudaError_t { EMU_ERRORS(EMU_ERROR) };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };

struct cudaDeviceProp { char name[256]; int major, minor, multiProcessorCount; };

namespace emu {
/* All streams of one capture share the list: a graph is the operations in the order in which they were noted. */
using Operations = std::vector<std::function<cudaError_t()>>;
struct Stream { std::shared_ptr<Operations> capture; };
using Clock = std::chrono::steady_clock;

inline thread_local cudaError_t last_status = cudaSuccess;
inline thread_local int device = 0;

inline int n_devices() { return int(number_from("PYENGINE_EMULATED_DEVICES", 2)); }
inline int compute_capability() { return int(number_from("PYENGINE_EMULATED_SM", 80)); }

/* Programming Guide, "Technical specifications per compute capability": shared memory of one block, where it asks for > 48 KiB. */
inline size_t most_shared_bytes() {
  const int sm = compute_capability();
  return size_t(sm == 75 ? 64 : sm == 80 ? 163 : sm == 90 || sm == 100 ? 227 : 99) << 10;
}

inline cudaError_t note(cudaError_t e) { return e ? last_status = e : e; }
inline cudaError_t needs(bool holds, cudaError_t otherwise = cudaErrorInvalidValue) { return note(holds ? cudaSuccess : otherwise); }

inline cudaError_t perform(Stream *stream, std::function<cudaError_t()> operation) {
  if (!stream || !stream->capture) return note(operation());
  stream->capture->push_back(std::move(operation));
  return cudaSuccess;
}

inline cudaError_t new_memory(void **memory, int device, size_t bytes) {
  return needs((*memory = bytes ? allocate(device, bytes) : nullptr) || !bytes, cudaErrorMemoryAllocation);
}
/* Whether these bytes, if they begin in an allocation, stay within it, and whether that is a device's, if it must be (1) or must not (0). */
inline bool fits(const void *memory, size_t bytes, int on_device) {
  const Region *r = allocation(memory);
  if (on_device >= 0 && on_device != (r && r->device != HOST)) return false;
  return !r || bytes <= r->end - reinterpret_cast<uintptr_t>(memory);
}
inline cudaError_t wrote(void *memory, size_t bytes) {
  if (Region *r = allocation(memory)) r->wrote(reinterpret_cast<uintptr_t>(memory), bytes);
  return cudaSuccess;
}

/* A launch of a kernel with the values of its parameters. */
template <class... P> Launch bind(void (*kernel)(P...), Index3 grid, Index3 block, size_t shared_bytes, std::decay_t<P>... values) {
  auto bound = std::make_shared<const std::tuple<std::decay_t<P>...>>(values...);
  auto body = [kernel, at = bound.get()] { std::apply(kernel, *at); };
  return {reinterpret_cast<const void *>(kernel), grid, block, shared_bytes, body, bound.get(), sizeof *bound, bound, {}};
}

/* By kernel, what cudaFuncSetAttribute allowed. */
inline std::map<const void *, size_t> allowed_shared;

/* What cudaLaunchKernel does. A grid is at most 2^31 - 1 x 65535 x 65535 blocks. */
inline cudaError_t enqueue(Stream *stream, Launch l) {
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  if (threads < 1 || threads > MAX_THREADS || l.block.z > 64 || !l.grid.x || !l.grid.y || !l.grid.z || l.grid.x >> 31 || l.grid.y >> 16 ||
      l.grid.z >> 16)
    return note(cudaErrorInvalidConfiguration);
  std::unique_lock<std::mutex> hold(busy);
  if (l.shared_bytes > std::max<size_t>(48 << 10, allowed_shared[l.kernel])) return note(cudaErrorInvalidValue);
  hold.unlock();
  return perform(stream, [l = std::move(l)] { return launch(l) ? cudaSuccess : cudaErrorLaunchFailure; });
}
}  // namespace emu

using cudaStream_t = emu::Stream *;
using cudaEvent_t = emu::Clock::time_point *;
using cudaGraph_t = emu::Operations *;
using cudaGraphExec_t = emu::Operations *;

inline cudaError_t cudaGetDeviceCount(int *n) { return emu::needs((*n = emu::n_devices()) > 0, cudaErrorNoDevice); }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emu::n_devices()) return emu::note(cudaErrorInvalidDevice);
  emu::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
  const int sm = emu::compute_capability();
  *p = {{}, sm / 10, sm % 10, 4};
  std::snprintf(p->name, sizeof p->name, "Emulated GPU %d", device);
  return emu::needs(device >= 0 && device < emu::n_devices(), cudaErrorInvalidDevice);
}
inline cudaError_t cudaDriverGetVersion(int *version) {
  return *version = int(emu::number_from("PYENGINE_EMULATED_DRIVER", 13000)), cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *total = emu::device_bytes();
  return *left = *total - emu::device_bytes_used(emu::device), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_status, cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t error) {
#define EMU_TEXT(name, number, text) error == name ? text :
  return EMU_ERRORS(EMU_TEXT) "unrecognized error code";
}

inline cudaError_t cudaMalloc(void **memory, size_t bytes) { return emu::new_memory(memory, emu::device, bytes); }
inline cudaError_t cudaFree(void *memory) { return emu::needs(!memory || emu::release(memory)); }
inline cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) { return emu::new_memory(memory, emu::HOST, bytes); }
inline cudaError_t cudaFreeHost(void *memory) { return cudaFree(memory); }

inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
  static constexpr int TO[] = {0, 1, 0, 1, -1}, FROM[] = {0, 0, 1, 1, -1}; /* by kind */
  if (bytes && !(emu::fits(to, bytes, TO[kind]) && emu::fits(from, bytes, FROM[kind]))) return emu::note(cudaErrorInvalidValue);
  return emu::perform(stream, [=] { return std::memmove(to, from, bytes), emu::wrote(to, bytes); });
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) { return cudaMemcpyAsync(to, from, bytes, kind); }
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                                     cudaStream_t stream = nullptr) {
  cudaError_t e = emu::needs(width <= to_pitch && width <= from_pitch);
  for (size_t i = 0; i < height && !e; i++)
    e = cudaMemcpyAsync(static_cast<char *>(to) + i * to_pitch, static_cast<const char *>(from) + i * from_pitch, width, kind, stream);
  return e;
}
inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream = nullptr) {
  if (bytes && !emu::fits(to, bytes, 1)) return emu::note(cudaErrorInvalidValue);
  return emu::perform(stream, [=] { return std::memset(to, byte, bytes), emu::wrote(to, bytes); });
}
inline cudaError_t cudaMemset(void *to, int byte, size_t bytes) { return cudaMemsetAsync(to, byte, bytes); }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return *stream = new emu::Stream, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return emu::needs(!stream || !stream->capture, cudaErrorStreamCaptureUnsupported); }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || stream->capture) return emu::note(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<emu::Operations>();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = stream && stream->capture ? new emu::Operations(*std::exchange(stream->capture, nullptr)) : nullptr;
  return emu::needs(*graph);
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return *event = new emu::Clock::time_point, cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = nullptr) { return *event = emu::Clock::now(), cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  return *ms = std::chrono::duration<float, std::milli>(*end - *begin).count(), cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long = 0) {
  return *exec = new emu::Operations(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return emu::perform(stream, [exec] {
    cudaError_t e = cudaSuccess;
    for (size_t i = 0; i < exec->size() && !e; i++) e = (*exec)[i]();
    return e;
  });
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }

template <class F> cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute, int bytes) {
  std::lock_guard<std::mutex> hold(emu::busy);
  if (size_t(bytes) > emu::most_shared_bytes()) return emu::note(cudaErrorInvalidValue);
  emu::allowed_shared[reinterpret_cast<const void *>(kernel)] = size_t(bytes);
  return cudaSuccess;
}
#endif
