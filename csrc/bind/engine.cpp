// engine.cpp: pyengine._engine. Objects with a lifetime for Python: memory, thread pools, programs. Kernels and other flat
// functions are called through cffi.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "../cpu/pack.h"
#include "../gen/declarations.h"
#include "../guard.h"
#include "../cpu/isa.h"
#include "../cpu/program.h"
#include "../host/system.h"

namespace py = pybind11;

namespace {

#if defined(PE_ASAN)
std::map<char *, int64_t> buffers;        // all that there are, and their sizes; under the interpreter's lock
constexpr size_t BORDER = 4096;           // poisoned, before and behind a buffer
#else
constexpr size_t BORDER = 0;
#endif

// Anonymous zeroed memory. Huge pages are for what is used in full; a cache that fills slowly must not take 2 MiB for each head
// at its first token.
class Buffer {
 public:
  Buffer(int64_t nbytes, bool huge_pages) : nbytes_(nbytes) {
    if (nbytes < 0) throw std::invalid_argument("Buffer: negative size");
    if (nbytes == 0) return;
    char *p = static_cast<char *>(pe_pages_new(mapped(), huge_pages));
    if (!p) throw std::bad_alloc();
    data_ = p + BORDER;
#if defined(PE_ASAN)
    __asan_poison_memory_region(p, mapped());
    __asan_unpoison_memory_region(data_, static_cast<size_t>(nbytes));
    buffers[data_] = nbytes;
#endif
  }
  ~Buffer() {
    if (!data_) return;
#if defined(PE_ASAN)
    buffers.erase(data_);
    __asan_unpoison_memory_region(data_ - BORDER, mapped());
#endif
    pe_pages_free(data_ - BORDER, mapped());
  }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  char *data() const { return data_; }
  int64_t nbytes() const { return nbytes_; }

 private:
  size_t mapped() const { return static_cast<size_t>(nbytes_) + 2 * BORDER; }

  char *data_ = nullptr;
  int64_t nbytes_;
};

// A team of threads. Programs that share it run one after the other, whichever thread they come from; a child of fork, which has
// none of the threads, gets a team of its own when it first runs something.
class Pool {
 public:
  explicit Pool(int n) : pool_(n >= 1 && n <= 1024 ? pe_pool_new(n) : nullptr), owner_(pe_process_id()) {
    if (!pool_) throw std::invalid_argument("Pool: cannot make " + std::to_string(n) + " threads");
  }
  ~Pool() {
    py::gil_scoped_release release;
    if (owner_ == pe_process_id()) pe_pool_free(pool_);
  }
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;
  int size() const { return pe_pool_size(pool_); }

  // Call work(pe_pool *) when nobody else uses the team, without the interpreter's lock.
  template <class Work>
  auto run(Work work) {
    renew();
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> turn(*busy_);
    return work(pool_);
  }

 private:
  void renew() {                                              // under the interpreter's lock, so by one thread
    if (owner_ == pe_process_id()) return;
    pe_pool *fresh = pe_pool_new(pe_pool_size(pool_));
    if (!fresh) throw std::runtime_error("Pool: this child of fork cannot make threads");
    pool_ = fresh;                                            // the parent's team is memory without threads: it is left alone
    busy_.release();                                          // its lock may be held by a thread that is not here
    busy_ = std::make_unique<std::mutex>();
    owner_ = pe_process_id();
  }

  pe_pool *pool_;
  int64_t owner_;
  std::unique_ptr<std::mutex> busy_ = std::make_unique<std::mutex>();
};

const pe_isa &isa_of(const std::string &name) {
  for (const pe_isa *i = pe_isas; i->name; i++)
    if (name == i->name) return *i;
  throw std::invalid_argument("this build has no instruction set '" + name + "'");
}

const pe_kernel_entry *kernel_of(const std::string &isa, const std::string &op) {
  return pe_isa_kernel(&isa_of(isa), op.c_str());
}

using Axis = std::pair<int64_t, int32_t>;  // scale, and number of a run-time axis or -1: program.h's pe_axis
using Ids = std::vector<std::vector<int32_t>>;  // of each argument, the numbers of its tensors: one, none or several

// What Python says of a tensor, a dict with these names: where it lies, and how. Strides are in bytes.
struct TensorSpec {
  int32_t base = 0;
  int64_t offset = 0;
  int32_t dtype = 0;
  std::vector<Axis> shape, strides;
};

// And of a node, likewise. Arguments are in the order of the op's declaration.
struct NodeSpec {
  std::string op;
  Ids inputs, outputs;
  std::string params;  // the bytes of pe_<op>_params
  int64_t scratch_offset = 0, scratch_bytes = 0;
};

}  // namespace

namespace pybind11::detail {

// A name as Python keeps it, made once: looking it up is then a comparison of addresses.
#define PE_KEY(name) ([] { static PyObject *key = PyUnicode_InternFromString(name); return key; }())

// Fields of a dict by their names. Every one must be there, and nothing else.
class Fields {
 public:
  Fields(handle dict, const char *what) : dict_(dict), what_(what), left_(PyDict_Size(dict.ptr())) {}
  template <class T>
  void take(PyObject *name, T &to) {
    PyObject *value = PyDict_GetItemWithError(dict_.ptr(), name);
    if (!value) throw std::invalid_argument(std::string(what_) + ": no '" + PyUnicode_AsUTF8(name) + "'");
    to = handle(value).cast<T>();
    left_--;
  }
  void end() const {
    if (left_) throw std::invalid_argument(std::string(what_) + ": a name that it does not have");
  }

 private:
  handle dict_;
  const char *what_;
  Py_ssize_t left_;
};

template <>
struct type_caster<TensorSpec> {
  PYBIND11_TYPE_CASTER(TensorSpec, const_name("TensorSpec"));
  bool load(handle src, bool) {
    if (!PyDict_Check(src.ptr())) return false;
    Fields f(src, "tensor");
    f.take(PE_KEY("base"), value.base);
    f.take(PE_KEY("offset"), value.offset);
    f.take(PE_KEY("dtype"), value.dtype);
    f.take(PE_KEY("shape"), value.shape);
    f.take(PE_KEY("strides"), value.strides);
    f.end();
    return true;
  }
};

template <>
struct type_caster<NodeSpec> {
  PYBIND11_TYPE_CASTER(NodeSpec, const_name("NodeSpec"));
  bool load(handle src, bool) {
    if (!PyDict_Check(src.ptr())) return false;
    Fields f(src, "node");
    f.take(PE_KEY("op"), value.op);
    f.take(PE_KEY("inputs"), value.inputs);
    f.take(PE_KEY("outputs"), value.outputs);
    f.take(PE_KEY("params"), value.params);
    f.take(PE_KEY("scratch_offset"), value.scratch_offset);
    f.take(PE_KEY("scratch_bytes"), value.scratch_bytes);
    f.end();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

pe_program_tensor tensor_of(const TensorSpec &spec) {
  if (spec.shape.size() > PE_MAX_DIMS || spec.strides.size() != spec.shape.size())
    throw std::invalid_argument("tensor: too many axes");
  pe_program_tensor t{};
  t.base = spec.base;
  t.offset = spec.offset;
  t.dtype = spec.dtype;
  t.ndim = static_cast<int32_t>(spec.shape.size());
  for (size_t d = 0; d < spec.shape.size(); d++) {
    t.shape[d] = {spec.shape[d].first, spec.shape[d].second};
    t.stride[d] = {spec.strides[d].first, spec.strides[d].second};
  }
  return t;
}

// Arguments of one node in the form that kernels take.
struct Arguments {
  std::vector<const pe_tensor *> tensors;
  std::vector<int32_t> start, count;
  pe_args args{};

  Arguments(const NodeSpec &node, const pe_tensor *all, int32_t n_all) {
    for (const Ids *side : {&node.inputs, &node.outputs})
      for (const auto &arg : *side) {
        start.push_back(static_cast<int32_t>(tensors.size()));
        count.push_back(static_cast<int32_t>(arg.size()));
        for (int32_t id : arg) {
          if (id < 0 || id >= n_all) throw std::invalid_argument("node: tensor number out of range");
          tensors.push_back(all + id);
        }
      }
    args = {tensors.data(), start.data(), count.data(), static_cast<int32_t>(node.inputs.size()),
            static_cast<int32_t>(node.outputs.size())};
  }
};

class Program {
 public:
  Program(const std::string &isa, const std::vector<TensorSpec> &tensors, const std::vector<NodeSpec> &nodes, int32_t n_bases,
          int32_t n_dims)
      : n_dims_(n_dims), bases_(static_cast<size_t>(n_bases)), counters_(nodes.size() * PE_COUNTER_STRIDE + 8) {
    for (const auto &t : tensors) {
      spec_.push_back(tensor_of(t));
      pe_tensor resolved{};
      resolved.dtype = spec_.back().dtype;
      resolved.ndim = spec_.back().ndim;
      tensors_.push_back(resolved);
      if (spec_.back().base < 0 || spec_.back().base >= n_bases) throw std::invalid_argument("tensor: no such memory");
      for (int d = 0; d < resolved.ndim; d++)
        if (spec_.back().shape[d].dim >= n_dims || spec_.back().stride[d].dim >= n_dims) throw std::invalid_argument("tensor: no such dim");
    }
    std::unordered_map<std::string, const pe_kernel_entry *> kernels;  // an op is looked up once
    for (const NodeSpec &node : nodes) {
      const auto [found, fresh] = kernels.try_emplace(node.op, nullptr);
      if (fresh) found->second = kernel_of(isa, node.op);
      const pe_kernel_entry *kernel = found->second;
      if (!kernel) throw std::invalid_argument("no kernel for op '" + node.op + "' on " + isa);
      arguments_.push_back(std::make_unique<Arguments>(node, tensors_.data(), static_cast<int32_t>(tensors_.size())));
      params_.push_back(std::make_unique<std::string>(node.params));
      nodes_.push_back({kernel->run, arguments_.back()->args, params_.back()->data(), node.scratch_offset, node.scratch_bytes, 0.0});
    }
    program_.spec = spec_.data();
    program_.tensors = tensors_.data();
    program_.n_tensors = static_cast<int32_t>(tensors_.size());
    program_.nodes = nodes_.data();
    program_.n_nodes = static_cast<int32_t>(nodes_.size());
    program_.bases = bases_.data();
    program_.n_bases = n_bases;
    char *c = reinterpret_cast<char *>(counters_.data());
    program_.counters = reinterpret_cast<int64_t *>(c + (64 - reinterpret_cast<uintptr_t>(c) % 64) % 64);
  }

  void bind(int32_t base, uint64_t address) {
    char *at = bases_.at(static_cast<size_t>(base)) = reinterpret_cast<char *>(address);
#if defined(PE_ASAN)
    auto next = buffers.upper_bound(at);
    if (next == buffers.begin()) return;
    const auto &[start, nbytes] = *--next;
    if (at >= start + nbytes) return;                         // a mapped file
    for (const pe_memory &m : memories_)
      if (m.start == start) return;
    memories_.push_back({start, nbytes});
    program_.memories = memories_.data();
    program_.n_memories = static_cast<int32_t>(memories_.size());
#else
    (void)at;
#endif
  }

  // (status, number of the node that failed, message)
  std::tuple<int32_t, int32_t, std::string> run(Pool &pool, const std::vector<int64_t> &dims, int32_t first) {
    if (static_cast<int32_t>(dims.size()) != n_dims_) throw std::invalid_argument("run: wrong number of dims");
    if (first < 0 || first > program_.n_nodes) throw std::invalid_argument("run: no such node");
    return pool.run([&](pe_pool *team) -> std::tuple<int32_t, int32_t, std::string> {
      int32_t status = pe_program_run(&program_, team, dims.data(), first);
      return {status, program_.failed_node, program_.message};
    });
  }

  void profile(bool on) {
    program_.profile = on;
    for (auto &n : nodes_) n.seconds = 0;
  }

  std::vector<double> seconds() const {
    std::vector<double> out;
    for (const auto &n : nodes_) out.push_back(n.seconds);
    return out;
  }

 private:
  int32_t n_dims_;
  std::vector<pe_program_tensor> spec_;
  std::vector<pe_tensor> tensors_;
  std::vector<std::unique_ptr<Arguments>> arguments_;
  std::vector<std::unique_ptr<std::string>> params_;
  std::vector<pe_program_node> nodes_;
  std::vector<char *> bases_;
  std::vector<pe_memory> memories_;
  std::vector<int64_t> counters_;
  pe_program program_{};
};

// Working memory of a node's kernel for tensors of these sizes: -1 if there is no such kernel.
int64_t scratch_bytes(const std::string &isa, const NodeSpec &node, const std::vector<TensorSpec> &tensors, int32_t n_threads) {
  const pe_kernel_entry *kernel = kernel_of(isa, node.op);
  if (!kernel) return -1;
  if (!kernel->scratch) return 0;
  std::vector<pe_tensor> resolved;
  for (const auto &spec : tensors) {
    pe_program_tensor t = tensor_of(spec);
    pe_tensor r{};
    r.dtype = t.dtype;
    r.ndim = t.ndim;
    for (int d = 0; d < t.ndim; d++) {
      r.shape[d] = t.shape[d].scale;
      r.stride[d] = t.stride[d].scale;
    }
    resolved.push_back(r);
  }
  Arguments a(node, resolved.data(), static_cast<int32_t>(resolved.size()));
  return kernel->scratch(&a.args, node.params.data(), n_threads);
}

struct PackJob {
  int32_t dtype;
  const void *src;
  int64_t n, k, groups, next;
  void *dst;
  int32_t status;
};

void pack_member(void *context, int, int) {
  auto *job = static_cast<PackJob *>(context);
  const int64_t step = 16;                                                            // 256 rows: some 100 kB
  for (;;) {
    int64_t begin = __atomic_fetch_add(&job->next, step, __ATOMIC_RELAXED);
    if (begin >= job->groups) return;
    int64_t end = begin + step < job->groups ? begin + step : job->groups;
    pe_status status = pe_pack_groups(job->dtype, job->src, job->n, job->k, begin, end, job->dst);
    if (status != PE_OK) __atomic_store_n(&job->status, static_cast<int32_t>(status), __ATOMIC_RELAXED);
  }
}

void pack(Pool &pool, int32_t dtype, uint64_t src, int64_t n, int64_t k, uint64_t dst) {
  PackJob job{dtype, reinterpret_cast<const void *>(src), n, k, (n + 15) / 16, 0, reinterpret_cast<void *>(dst), PE_OK};
  pool.run([&](pe_pool *team) { pe_pool_run(team, pack_member, &job); });
  if (job.status != PE_OK) throw std::runtime_error("pack: status " + std::to_string(job.status));
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "Memory, threads and programs of pyengine's CPU backend.";
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<int64_t, bool>(), py::arg("nbytes"), py::arg("huge_pages"))
      .def_property_readonly("nbytes", &Buffer::nbytes)
      .def_property_readonly("address", [](const Buffer &b) { return reinterpret_cast<uint64_t>(b.data()); })
      .def_buffer([](Buffer &b) {
        return py::buffer_info(b.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {b.nbytes()}, {int64_t{1}});
      });
  py::class_<Pool>(m, "Pool").def(py::init<int>(), py::arg("n_threads")).def_property_readonly("size", &Pool::size);
  py::class_<Program>(m, "Program")
      .def(py::init<const std::string &, const std::vector<TensorSpec> &, const std::vector<NodeSpec> &, int32_t, int32_t>(),
           py::arg("isa"), py::arg("tensors"), py::arg("nodes"), py::arg("n_bases"), py::arg("n_dims"))
      .def("bind", &Program::bind, py::arg("base"), py::arg("address"))
      .def("run", &Program::run, py::arg("pool"), py::arg("dims"), py::arg("first") = 0)
      .def("profile", &Program::profile, py::arg("on"))
      .def("seconds", &Program::seconds);
  m.def("scratch_bytes", &scratch_bytes, py::arg("isa"), py::arg("node"), py::arg("tensors"), py::arg("n_threads"));
  m.def("pack", &pack, py::arg("pool"), py::arg("dtype"), py::arg("src"), py::arg("n"), py::arg("k"), py::arg("dst"));
  py::dict declarations;                    // for what declarations the kernels were compiled: a library may be older than they are
#define PE_DECLARED(name, fingerprint) declarations[#name] = uint32_t{fingerprint};
  PE_DECLARATIONS(PE_DECLARED)
  m.attr("declarations") = declarations;
#if defined(PE_ASAN)
  m.attr("SANITIZED") = true;
#else
  m.attr("SANITIZED") = false;
#endif
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const pe_isa *i = pe_isas; i->name; i++)
      if (i->supported()) names.emplace_back(i->name);
    return names;
  });
  m.def("kernels", [](const std::string &isa) {
    std::vector<std::string> names;
    const pe_isa &i = isa_of(isa);
    for (const pe_kernel_entry *k = i.others ? i.others : i.kernels; k->name; k++) names.emplace_back(k->name);
    return names;
  });
}
