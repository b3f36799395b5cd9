// Where in the sources an address of code is.
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "memory.h"

namespace emulation {

// "file:line" of an address, from the tool of binutils; the object and the offset where that is not there.
std::string place_of(const void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return "?";
  char command[1024], line[512] = "";
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof(command), "addr2line -s -e '%s' 0x%tx 2>/dev/null", info.dli_fname, offset);
  if (FILE* const answer = popen(command, "r")) {
    if (std::fgets(line, sizeof(line), answer) == nullptr) line[0] = 0;
    pclose(answer);
  }
  std::string place = line;
  while (!place.empty() && place.back() == '\n') place.pop_back();
  return place.empty() ? std::string(info.dli_fname) + "+" + std::to_string(offset) : place;
}

}  // namespace emulation
