/* where.cpp: from an address of code to a function, file and line, by the symbols that -g1 leaves in the library. */
#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <mutex>

#include "engine.h"

namespace emu {

namespace {

struct Place { std::string function, line; };

/* Frames of this folder, of device.h and of the C++ library stand between a kernel's line and what it calls. */
bool between(const std::string &line) {
  for (const char *part : {"/emulate/", "cuda/device.h", "/include/c++/"})
    if (line.find(part) != std::string::npos) return true;
  return line.empty() || line[0] == '?';
}

/* File and line of the code, of the innermost inlined function that is a kernel's own. */
Place find(const void *code, bool entry) {
  Dl_info info;
  if (!dladdr(code, &info) || !info.dli_fname) return {};
  const size_t offset = static_cast<const char *>(code) - static_cast<const char *>(info.dli_fbase) - (entry ? 0 : 1);
  char text[1024];
  std::snprintf(text, sizeof text, "addr2line -f -C -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  Place best, first;
  if (FILE *pipe = popen(text, "r")) {
    while (best.line.empty() && std::fgets(text, sizeof text, pipe)) {
      Place p;
      p.function = std::string(text).substr(0, std::string(text).find('\n'));
      if (!std::fgets(text, sizeof text, pipe)) break;
      p.line = std::string(text).substr(0, std::string(text).find_first_of(" \n"));
      if (first.line.empty()) first = p;
      if (!between(p.line)) best = p;
    }
    pclose(pipe);
  }
  if (best.line.empty()) best = first;
  if (best.line.empty()) { /* no addr2line */
    std::snprintf(text, sizeof text, "%s+0x%zx", info.dli_fname, offset);
    best = {text, text};
  }
  const size_t csrc = best.line.rfind("/csrc/");
  if (csrc != std::string::npos) best.line = best.line.substr(csrc + 1);
  return best;
}

const Place &cached(const void *code, bool entry) {
  static std::map<const void *, Place> known;
  static std::mutex lock;
  std::lock_guard<std::mutex> hold(lock);
  auto found = known.find(code);
  return found != known.end() ? found->second : known.emplace(code, find(code, entry)).first->second;
}

}  // namespace

std::string describe_code(const void *site) { return cached(site, false).line; }

/* "void (anonymous namespace)::rows<4>(float const*, int)" is rows<4>. */
std::string name_of(const void *kernel) {
  std::string name = cached(kernel, true).function;
  const std::string nameless = "(anonymous namespace)::";
  for (size_t at; (at = name.find(nameless)) != std::string::npos;) name.erase(at, nameless.size());
  int depth = 0;
  size_t begin = 0, end = 0;
  for (; end < name.size() && (depth || name[end] != '('); end++) {
    if (name[end] == '<') depth++;
    if (name[end] == '>') depth--;
    if (depth == 0 && name[end] == ' ') begin = end + 1;
  }
  return name.substr(begin, end - begin);
}

}  // namespace emu
