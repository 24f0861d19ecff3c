/* runtime.cpp: the CUDA runtime of emulated devices (runtime.h says what there is). */
#include "runtime.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "check.h"

using Operation = std::function<cudaError_t()>;
using Operations = std::vector<Operation>;

/* All streams of one capture share the list: a graph of the emulator is the operations in the order they were noted. */
struct emu_stream { int device; std::shared_ptr<Operations> capture; };
struct emu_event { std::chrono::steady_clock::time_point time; bool recorded; std::shared_ptr<Operations> capture; };
struct emu_graph { std::shared_ptr<Operations> operations; };
struct emu_graph_exec { Operations operations; };

namespace {

thread_local cudaError_t last = cudaSuccess;
thread_local int device_now = 0;
std::mutex lock;
std::map<const void *, int> most_shared;                /* cudaFuncAttributeMaxDynamicSharedMemorySize by kernel */
std::string failure = "unspecified launch failure";     /* the text of cudaErrorLaunchFailure */

int number_from(const char *name, int otherwise) {
  const char *said = std::getenv(name);
  return said && *said ? std::atoi(said) : otherwise;
}
int n_devices() { return number_from("PYENGINE_EMULATED_DEVICES", 2); }
int compute_capability() { return number_from("PYENGINE_EMULATED_SM", 80); }

/* Programming Guide, table "Technical specifications per compute capability": shared memory of one block, at most, in KiB. */
int most_shared_bytes() {
  switch (compute_capability()) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 90: case 100: return 227 << 10;
    default: return 99 << 10;
  }
}
constexpr int SHARED_WITHOUT_ASKING = 48 << 10;

cudaError_t note(cudaError_t e) {
  if (e != cudaSuccess) last = e;
  return e;
}

cudaError_t perform(cudaStream_t stream, Operation operation) {
  if (stream && stream->capture) {
    stream->capture->push_back(std::move(operation));
    return cudaSuccess;
  }
  return note(operation());
}

cudaError_t run(const emu::Launch &launch) {
  if (emu::launch(launch)) return cudaSuccess;
  std::lock_guard<std::mutex> hold(lock);
  failure = emu::last_error();
  return cudaErrorLaunchFailure;
}

Operation copy(void *to, const void *from, size_t bytes) {
  return [=] {
    std::memmove(to, from, bytes);
    emu::host_wrote(to, bytes);
    return cudaSuccess;
  };
}

/* Whether the kind says what the pointers are. */
bool fits(const void *to, const void *from, cudaMemcpyKind kind) {
  const bool to_device = emu::device_of(to) >= 0, from_device = emu::device_of(from) >= 0;
  return kind == cudaMemcpyDefault || (to_device == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) &&
                                       from_device == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice));
}

}  // namespace

/* -- devices -------------------------------------------------------------------------------------------------------------------- */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = n_devices();
  return note(*count ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= n_devices()) return note(cudaErrorInvalidDevice);
  device_now = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) { *device = device_now; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
  if (device < 0 || device >= n_devices()) return note(cudaErrorInvalidDevice);
  std::memset(p, 0, sizeof *p);
  std::snprintf(p->name, sizeof p->name, "Emulated GPU %d", device);
  p->totalGlobalMem = emu::device_bytes();
  p->sharedMemPerBlock = SHARED_WITHOUT_ASKING;
  p->sharedMemPerBlockOptin = most_shared_bytes();
  p->sharedMemPerMultiprocessor = most_shared_bytes() + 1024;
  p->major = compute_capability() / 10;
  p->minor = compute_capability() % 10;
  p->multiProcessorCount = 4;
  p->warpSize = emu::WARP;
  p->maxThreadsPerBlock = emu::MAX_THREADS;
  p->l2CacheSize = 4 << 20;
  p->memoryBusWidth = 256;
  p->pciBusID = device + 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t e = cudaGetDeviceProperties(&p, device)) return e;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); return cudaSuccess;
  }
  return note(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = number_from("PYENGINE_EMULATED_DRIVER", 13000); return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *total = emu::device_bytes();
  *left = *total - emu::device_bytes_used(device_now);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { const cudaError_t e = last; last = cudaSuccess; return e; }
cudaError_t cudaPeekAtLastError() { return last; }

#define ERRORS(X)                                                                                                             \
  X(cudaSuccess, "no error") X(cudaErrorInvalidValue, "invalid argument") X(cudaErrorMemoryAllocation, "out of memory")       \
  X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                                          \
  X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version")                              \
  X(cudaErrorNoDevice, "no CUDA-capable device is detected") X(cudaErrorInvalidDevice, "invalid device ordinal")      \
  X(cudaErrorInvalidResourceHandle, "invalid resource handle") X(cudaErrorNotReady, "device not ready")                       \
  X(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled")                                                      \
  X(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped")                      \
  X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region")                            \
  X(cudaErrorLaunchFailure, failure.c_str()) X(cudaErrorNotSupported, "operation not supported")                              \
  X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")                                    \
  X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define TEXT(name, text) case name: return text;
    ERRORS(TEXT)
#undef TEXT
  }
  return "unrecognized error code";
}
const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(name, text) case name: return #name;
    ERRORS(NAME)
#undef NAME
  }
  return "unrecognized error code";
}

/* -- memory ----------------------------------------------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **memory, size_t bytes) {
  *memory = bytes ? emu::device_allocate(device_now, bytes) : nullptr;
  return note(bytes && !*memory ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaFree(void *memory) { return note(!memory || emu::device_free(memory) ? cudaSuccess : cudaErrorInvalidValue); }

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) {
  *memory = nullptr;
  if (bytes && posix_memalign(memory, 4096, bytes)) return note(cudaErrorMemoryAllocation);
  if (bytes) emu::host_pinned(*memory, bytes);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void **memory, size_t bytes) { return cudaHostAlloc(memory, bytes, 0); }
cudaError_t cudaFreeHost(void *memory) {
  if (memory && !emu::host_unpinned(memory)) return note(cudaErrorInvalidValue);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned) {
  return note(emu::host_pinned(memory, bytes) ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void *memory) { return note(emu::host_unpinned(memory) ? cudaSuccess : cudaErrorHostMemoryNotRegistered); }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (bytes && !fits(to, from, kind)) return note(cudaErrorInvalidValue);
  if (!emu::device_holds(to, bytes) || !emu::device_holds(from, bytes)) return note(cudaErrorInvalidValue);
  return perform(stream, copy(to, from, bytes));
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) { return cudaMemcpyAsync(to, from, bytes, kind, nullptr); }

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return note(cudaErrorInvalidValue);
  for (size_t row = 0; row < height; row++) {
    void *row_to = static_cast<char *>(to) + row * to_pitch;
    const void *row_from = static_cast<const char *>(from) + row * from_pitch;
    if (const cudaError_t e = cudaMemcpyAsync(row_to, row_from, width, kind, stream)) return e;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream) {
  if (bytes && (emu::device_of(to) < 0 || !emu::device_holds(to, bytes))) return note(cudaErrorInvalidValue);
  return perform(stream, [=] {
    std::memset(to, byte, bytes);
    emu::host_wrote(to, bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemset(void *to, int byte, size_t bytes) { return cudaMemsetAsync(to, byte, bytes, nullptr); }

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
  if (bytes && (emu::device_of(to) != to_device || emu::device_of(from) != from_device)) return note(cudaErrorInvalidValue);
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t bytes) {
  return cudaMemcpyPeerAsync(to, to_device, from, from_device, bytes, nullptr);
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = device != peer; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) { return note(peer < n_devices() ? cudaSuccess : cudaErrorInvalidDevice); }

/* -- streams, events, graphs ---------------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { *stream = new emu_stream{device_now, nullptr}; return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { delete stream; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return note(stream && stream->capture ? cudaErrorStreamCaptureUnsupported : cudaSuccess); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (stream && event->capture) stream->capture = event->capture;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || stream->capture) return note(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Operations>();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = nullptr;
  if (!stream || !stream->capture) return note(cudaErrorInvalidValue);
  *graph = new emu_graph{std::move(stream->capture)};
  stream->capture = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  *status = stream && stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { *event = new emu_event{{}, false, nullptr}; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { delete event; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->capture = stream ? stream->capture : nullptr;
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return note(event->capture ? cudaErrorStreamCaptureUnsupported : cudaSuccess); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  if (!begin->recorded || !end->recorded) return note(cudaErrorInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
  *exec = new emu_graph_exec{*graph->operations};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return perform(stream, [exec] {
    for (const Operation &operation : exec->operations)
      if (const cudaError_t e = operation(); e != cudaSuccess) return e;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { delete exec; return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete graph; return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, void *nodes, size_t *count) {
  *count = graph->operations->size();
  return note(nodes ? cudaErrorNotSupported : cudaSuccess);
}

/* -- launches ------------------------------------------------------------------------------------------------------------------------- */

cudaError_t emu::set_kernel_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > most_shared_bytes()) return note(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> hold(lock);
  most_shared[kernel] = value;
  return cudaSuccess;
}

/* Programming Guide, table of compute capabilities: a grid is at most 2^31 - 1 x 65535 x 65535 blocks. */
cudaError_t emu::enqueue(cudaStream_t stream, Launch launch) {
  const int64_t threads = int64_t(launch.block.x) * launch.block.y * launch.block.z;
  size_t most = SHARED_WITHOUT_ASKING;
  {
    std::lock_guard<std::mutex> hold(lock);
    if (auto said = most_shared.find(launch.kernel); said != most_shared.end() && size_t(said->second) > most) most = said->second;
  }
  if (threads < 1 || threads > MAX_THREADS || launch.block.z > 64 || !launch.grid.x || !launch.grid.y || !launch.grid.z ||
      launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
    return note(cudaErrorInvalidConfiguration);
  if (launch.shared_bytes > most) return note(cudaErrorInvalidValue);
  return perform(stream, [launch = std::move(launch)] { return run(launch); });
}
