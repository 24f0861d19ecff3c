// program.cu: a compiled graph: fill in run-time axes, launch one kernel after another, or replay what was recorded.
#include <cstdio>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../table.h"
#include "state.h"

extern const pe_kernel_entry PE_NAME(kernels)[];

namespace {

constexpr size_t MOST_GRAPHS = 64;       // held at once: a bucket of rows each; one takes some 100 kB of the host for a model of 32 layers
constexpr size_t MOST_SEEN = 4096;       // keys remembered as seen once

const pe_kernel_entry *kernel_of(const char *op) {
  for (const pe_kernel_entry *k = PE_NAME(kernels); k->name; k++)
    if (strcmp(op, k->name) == 0) return k;
  return nullptr;
}

int64_t value_of(pe_card_axis a, const int64_t *dims) { return a.dim < 0 || !dims ? a.scale : a.scale * dims[a.dim]; }

// A tensor with its run-time axes filled in; without dims, as large as `scale` says.
pe_tensor resolved(const pe_card_tensor &t, const int64_t *dims) {
  pe_tensor out{};
  out.data = reinterpret_cast<void *>(t.address);
  out.dtype = t.dtype;
  out.ndim = t.ndim;
  for (int d = 0; d < t.ndim; d++) {
    out.shape[d] = value_of(t.shape[d], dims);
    out.stride[d] = value_of(t.stride[d], dims);
  }
  return out;
}

// A step: its kernel and its arguments in the form that kernels take.
struct Step {
  const pe_kernel_entry *kernel;
  std::string params;
  std::vector<const pe_tensor *> tensors;
  std::vector<int32_t> start, count;
  pe_args args{};
  uint64_t scratch;
  int64_t scratch_bytes;
  double seconds = 0;

  Step(const pe_card_node &node, const pe_tensor *all)
      : kernel(kernel_of(node.op)), params(node.params, static_cast<size_t>(node.params_bytes)), scratch(node.scratch),
        scratch_bytes(node.scratch_bytes) {
    const int32_t *id = node.tensors;
    for (int32_t i = 0; i < node.n_in + node.n_out; i++) {
      start.push_back(static_cast<int32_t>(tensors.size()));
      count.push_back(node.count[i]);
      for (int32_t k = 0; k < node.count[i]; k++) tensors.push_back(all + *id++);
    }
    args = {tensors.data(), start.data(), count.data(), node.n_in, node.n_out};
  }
};

// What a run depends on: where it begins, and its dims.
using Key = std::vector<int64_t>;

struct Graph {
  Key key;
  cudaGraphExec_t exec;
};

}  // namespace

struct pe_card_program {
  pe_card_queue *queue;
  std::vector<pe_card_tensor> spec;
  std::vector<pe_tensor> tensors;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<pe_card_transfer> sends, fetches;
  int32_t n_dims;
  pe_fault *faults;                      // [steps]
  bool profiled = false;
  std::vector<cudaEvent_t> clocks;       // [steps + 1] while profiled
  std::list<Graph> graphs;               // the one used last comes first
  std::map<Key, std::list<Graph>::iterator> found;
  std::map<Key, int> seen;
  int64_t replayed = 0;

  int32_t transfer(const std::vector<pe_card_transfer> &list, bool sending, const int64_t *dims, int32_t first);
  int32_t launch(const int64_t *dims, int32_t first, pe_card_outcome *outcome);
  int32_t record(const Key &key, const int64_t *dims, int32_t first, pe_card_outcome *outcome, cudaGraphExec_t *exec);
  int32_t start(const int64_t *dims, int32_t first, pe_card_outcome *outcome);
  int32_t measure(int32_t first);
  void forget(std::list<Graph>::iterator graph);
};

int32_t pe_card_program::transfer(const std::vector<pe_card_transfer> &list, bool sending, const int64_t *dims, int32_t first) {
  for (const pe_card_transfer &t : list) {
    int64_t bytes = t.bytes;
    for (int32_t i = 0; i < t.n_dims; i++) bytes *= dims[t.dims[i]];
    if (bytes == 0 || first >= t.last) continue;
    const uint64_t to = sending ? t.device : t.host, from = sending ? t.host : t.device;
    PE_TRY(cudaMemcpyAsync(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), static_cast<size_t>(bytes),
                           sending ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, queue->stream));
  }
  return PE_OK;
}

// Put everything that a run does into the queue.
int32_t pe_card_program::launch(const int64_t *dims, int32_t first, pe_card_outcome *outcome) {
  if (const int32_t status = transfer(sends, true, dims, first)) return status;
  for (size_t i = 0; i < spec.size(); i++) tensors[i] = resolved(spec[i], dims);
  for (size_t i = static_cast<size_t>(first); i < steps.size(); i++) {
    Step &step = *steps[i];
    pe::Queue here{queue->stream, faults + i, queue->codebooks, queue->capability, queue->multiprocessors};
    pe_stream s{0, 1, reinterpret_cast<char *>(step.scratch), step.scratch_bytes, nullptr, &here, outcome->message};
    if (profiled) PE_TRY(cudaEventRecord(clocks[i], queue->stream));
    outcome->node = static_cast<int32_t>(i);
    if (const pe_status status = step.kernel->run(&step.args, step.params.data(), &s)) return status;
    PE_TRY(cudaGetLastError());
  }
  if (profiled) PE_TRY(cudaEventRecord(clocks[steps.size()], queue->stream));
  outcome->node = -1;
  return transfer(fetches, false, dims, first);
}

// Record a run instead of doing it.
int32_t pe_card_program::record(const Key &key, const int64_t *dims, int32_t first, pe_card_outcome *outcome, cudaGraphExec_t *exec) {
  cudaGraph_t graph = nullptr;
  PE_TRY(cudaStreamBeginCapture(queue->stream, cudaStreamCaptureModeThreadLocal));
  const int32_t status = launch(dims, first, outcome);
  const cudaError_t ended = cudaStreamEndCapture(queue->stream, &graph);
  if (status) {
    if (graph) cudaGraphDestroy(graph);
    return status;
  }
  if (ended) return pe::failed("cudaStreamEndCapture", ended);
  const cudaError_t made = cudaGraphInstantiate(exec, graph, 0);
  cudaGraphDestroy(graph);
  if (made) return pe::failed("cudaGraphInstantiate", made);
  if (graphs.size() == MOST_GRAPHS) forget(std::prev(graphs.end()));
  graphs.push_front({key, *exec});
  found[key] = graphs.begin();
  return PE_OK;
}

void pe_card_program::forget(std::list<Graph>::iterator graph) {
  cudaGraphExecDestroy(graph->exec);
  found.erase(graph->key);
  graphs.erase(graph);
}

// Put a run into the queue: launch by launch the first time that these dims come, as a graph from the second time on.
int32_t pe_card_program::start(const int64_t *dims, int32_t first, pe_card_outcome *outcome) {
  if (profiled) return launch(dims, first, outcome);
  Key key(dims, dims + n_dims);
  key.push_back(first);
  cudaGraphExec_t exec = nullptr;
  if (const auto known = found.find(key); known != found.end()) {
    graphs.splice(graphs.begin(), graphs, known->second);
    exec = known->second->exec;
  } else {
    if (seen.size() == MOST_SEEN) seen.clear();
    if (seen[key]++ == 0) return launch(dims, first, outcome);
    if (const int32_t status = record(key, dims, first, outcome, &exec)) return status;
    seen.erase(key);
  }
  replayed++;
  PE_TRY(cudaGraphLaunch(exec, queue->stream));
  return PE_OK;
}

// Add the time of each step of the run that is over.
int32_t pe_card_program::measure(int32_t first) {
  for (size_t i = static_cast<size_t>(first); i < steps.size(); i++) {
    float ms = 0;
    PE_TRY(cudaEventElapsedTime(&ms, clocks[i], clocks[i + 1]));
    steps[i]->seconds += 1e-3 * static_cast<double>(ms);
  }
  return PE_OK;
}

int64_t pe_card_layout(void) {
  return static_cast<int64_t>(((((sizeof(pe_card_facts) * 1000 + sizeof(pe_card_tensor)) * 1000 + sizeof(pe_card_node)) * 1000 +
                                sizeof(pe_card_transfer)) * 1000 + sizeof(pe_card_outcome)));
}

int64_t pe_card_fault_bytes(int32_t n_nodes) { return static_cast<int64_t>(sizeof(pe_fault)) * n_nodes; }

int32_t pe_card_program_new(pe_card_queue *queue, const pe_card_tensor *tensors, int32_t n_tensors, const pe_card_node *nodes,
                            int32_t n_nodes, int32_t n_dims, const pe_card_transfer *sends, int32_t n_sends,
                            const pe_card_transfer *fetches, int32_t n_fetches, uint64_t faults, pe_card_program **out) {
  std::unique_ptr<pe_card_program> p(new pe_card_program{});
  p->queue = queue;
  p->spec.assign(tensors, tensors + n_tensors);
  p->tensors.resize(p->spec.size());
  p->sends.assign(sends, sends + n_sends);
  p->fetches.assign(fetches, fetches + n_fetches);
  p->n_dims = n_dims;
  p->faults = reinterpret_cast<pe_fault *>(faults);
  for (int32_t i = 0; i < n_nodes; i++) {
    p->steps.push_back(std::make_unique<Step>(nodes[i], p->tensors.data()));
    if (!p->steps.back()->kernel) {
      snprintf(pe::message, sizeof pe::message, "no kernel for op '%s'", nodes[i].op);
      return PE_NO_KERNEL;
    }
  }
  queue->users++;
  *out = p.release();
  return PE_OK;
}

int32_t pe_card_program_free(pe_card_program *program) {
  cudaSetDevice(program->queue->device);
  cudaStreamSynchronize(program->queue->stream);
  while (!program->graphs.empty()) program->forget(program->graphs.begin());
  for (cudaEvent_t clock : program->clocks) cudaEventDestroy(clock);
  pe_card_queue *queue = program->queue;
  delete program;
  return pe_card_queue_free(queue);
}

int32_t pe_card_program_run(pe_card_program *program, const int64_t *dims, int32_t first, pe_card_outcome *outcome) {
  pe_card_program &p = *program;
  *outcome = pe_card_outcome{};
  outcome->node = -1;
  PE_TRY(cudaSetDevice(p.queue->device));
  const int32_t status = p.start(dims, first, outcome);
  const cudaError_t waited = cudaStreamSynchronize(p.queue->stream);   // also for what was launched before a step refused
  if (status) return status;
  if (waited) return pe::failed("a kernel", waited);
  for (size_t i = static_cast<size_t>(first); i < p.steps.size(); i++) {
    const pe_fault fault = p.faults[i];
    if (fault.status == PE_OK) continue;
    memset(static_cast<void *>(p.faults), 0, sizeof(pe_fault) * p.steps.size());
    outcome->node = static_cast<int32_t>(i);
    outcome->seen = 1;
    outcome->value = fault.value;
    outcome->limit = fault.limit;
    return fault.status;
  }
  return p.profiled ? p.measure(first) : PE_OK;
}

int32_t pe_card_program_profile(pe_card_program *program, int32_t on) {
  PE_TRY(cudaSetDevice(program->queue->device));
  for (auto &step : program->steps) step->seconds = 0;
  while (on && program->clocks.size() < program->steps.size() + 1) {
    cudaEvent_t clock;
    PE_TRY(cudaEventCreate(&clock));
    program->clocks.push_back(clock);
  }
  program->profiled = on != 0;
  return PE_OK;
}

int32_t pe_card_program_seconds(const pe_card_program *program, double *seconds) {
  for (const auto &step : program->steps) *seconds++ = step->seconds;
  return PE_OK;
}

int32_t pe_card_program_graphs(const pe_card_program *program, int64_t *replayed, int32_t *held) {
  *replayed = program->replayed;
  *held = static_cast<int32_t>(program->graphs.size());
  return PE_OK;
}

int64_t pe_card_scratch(const pe_card_tensor *tensors, int32_t n_tensors, const pe_card_node *node) {
  std::vector<pe_tensor> all;
  for (int32_t i = 0; i < n_tensors; i++) all.push_back(resolved(tensors[i], nullptr));
  const Step step(*node, all.data());
  if (!step.kernel) return -1;
  return step.kernel->scratch ? step.kernel->scratch(&step.args, step.params.data(), 1) : 0;
}
