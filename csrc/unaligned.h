// Numbers at places of a file that need not be multiples of their size: the arrays of an `.idx` begin at byte 34.
#pragma once

#include <cstdint>
#include <cstring>

namespace stagemix {

// The number `index` places behind `data`; compiles to one plain load.
template <class Number>
Number load(const void* data, std::uint64_t index) {
  Number number;
  std::memcpy(&number, static_cast<const char*>(data) + index * sizeof(Number), sizeof(Number));
  return number;
}

}  // namespace stagemix
