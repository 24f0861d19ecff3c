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
  for (const char *part : {"/emulate/", "cuda/device.h", "/include/c++/", "??"})
    if (line.find(part) != std::string::npos) return true;
  return false;
}

/* Of the innermost inlined function that is a kernel's own; without addr2line, where in which library the code is. */
Place find(const char *library, size_t offset) {
  char text[1024];
  std::snprintf(text, sizeof text, "%s+0x%zx", library, offset);
  Place first = {text, text};
  std::snprintf(text, sizeof text, "addr2line -f -C -i -e '%s' 0x%zx 2>/dev/null", library, offset);
  FILE *pipe = popen(text, "r");
  for (int n = 0; pipe && std::fgets(text, sizeof text, pipe); n++) {
    const std::string function(text, std::string(text).find('\n'));
    if (!std::fgets(text, sizeof text, pipe)) break;
    std::string line(text, std::string(text).find_first_of(" \n"));
    const bool found = !between(line);
    if (line[0] == '?') line = first.line; /* compiled without -g1 */
    if (const size_t csrc = line.rfind("/csrc/"); csrc != std::string::npos) line.erase(0, csrc + 1);
    if (found || n == 0) first = {function, line};
    if (found) break;
  }
  if (pipe) pclose(pipe);
  return first;
}

const Place &place(const void *code, bool entry) {
  static std::map<const void *, Place> known;
  static std::mutex lock;
  std::lock_guard<std::mutex> hold(lock);
  Place &p = known[code];
  Dl_info info = {};
  if (p.line.empty() && !(dladdr(code, &info) && info.dli_fname)) info = {"code", nullptr, nullptr, nullptr};
  if (p.line.empty()) p = find(info.dli_fname, size_t(static_cast<const char *>(code) - static_cast<const char *>(info.dli_fbase)) - !entry);
  return p;
}
}  // namespace

std::string describe_code(const void *site) { return place(site, false).line; }

/* "void (anonymous namespace)::rows<4>(float const*, int)" is rows<4>. */
std::string name_of(const void *kernel) {
  std::string name = place(kernel, true).function;
  const std::string nameless = "(anonymous namespace)::";
  for (size_t at; (at = name.find(nameless)) != std::string::npos;) name.erase(at, nameless.size());
  size_t begin = 0, end = 0;
  for (int depth = 0; end < name.size() && (depth || name[end] != '('); end++) {
    depth += (name[end] == '<') - (name[end] == '>');
    if (depth == 0 && name[end] == ' ') begin = end + 1;
  }
  return name.substr(begin, end - begin);
}
}  // namespace emu
