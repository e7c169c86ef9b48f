// The checks of an `.idx` file's arrays, in one pass over each. megatron/data/indexed_format.py defines them, and
// words the refusal: these only say whether there is something to refuse.
#include <atomic>
#include <stdexcept>

#include <pybind11/numpy.h>

#include "bindings.h"
#include "parallel.h"
#include "unaligned.h"

namespace py = pybind11;

namespace stagemix {
namespace {

template <class Number>
const void* flat(const py::array& array) {
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style) || !py::isinstance<py::array_t<Number>>(array)) {
    throw std::invalid_argument("a flat, contiguous array of the format's own type is needed");
  }
  return array.data();
}

// Bytes of `.bin` that the sequences cover; -1 unless each begins where the one before it ends, the first at 0, none
// has a negative length, and the sum fits.
std::int64_t covered_bytes(const py::array& sizes, const py::array& pointers, unsigned shift, unsigned threads) {
  const void* const size = flat<std::int32_t>(sizes);
  const void* const pointer = flat<std::int64_t>(pointers);
  const auto count = static_cast<std::uint64_t>(sizes.size());
  if (count == 0 || pointers.size() != sizes.size() || shift > 3 || threads == 0) {
    throw std::invalid_argument("sizes and pointers must be as many, at least one, and an item 1 to 8 bytes");
  }
  py::gil_scoped_release release;
  std::atomic<bool> sound{load<std::int64_t>(pointer, 0) == 0};
  in_parallel(count - 1, threads, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    std::uint64_t wrong = 0;  // its low bit after a mismatch, its sign bit after a negative number
    for (std::uint64_t i = begin; i < end; ++i) {
      const auto length = static_cast<std::uint64_t>(static_cast<std::int64_t>(load<std::int32_t>(size, i)));
      const std::uint64_t here = load<std::uint64_t>(pointer, i), next = load<std::uint64_t>(pointer, i + 1);
      wrong |= static_cast<std::uint64_t>(here + (length << shift) != next) | ((length | next) & (1ULL << 63));
    }
    if (wrong) sound = false;
  });
  const auto last = static_cast<std::int64_t>(load<std::int32_t>(size, count - 1));
  if (!sound || last < 0) return -1;
  const auto total = load<std::uint64_t>(pointer, count - 1) + (static_cast<std::uint64_t>(last) << shift);
  return total >> 63 ? -1 : static_cast<std::int64_t>(total);
}

// 0: the document index does not run from 0 to the sequence count, or goes back; 1: it does; 2: by ones.
int document_steps(const py::array& index, std::int64_t sequences, unsigned threads) {
  const void* const entry = flat<std::int64_t>(index);
  const auto count = static_cast<std::uint64_t>(index.size());
  if (count < 2 || threads == 0) throw std::invalid_argument("a document index has at least two entries");
  py::gil_scoped_release release;
  if (load<std::int64_t>(entry, 0) != 0 || load<std::int64_t>(entry, count - 1) != sequences) return 0;
  std::atomic<bool> sound{true}, ones{true};
  in_parallel(count - 1, threads, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    bool back = false, other = false;
    for (std::uint64_t i = begin; i < end; ++i) {
      const std::int64_t here = load<std::int64_t>(entry, i), next = load<std::int64_t>(entry, i + 1);
      back |= next < here;
      other |= static_cast<std::uint64_t>(next) != static_cast<std::uint64_t>(here) + 1;
    }
    if (back) sound = false;
    if (other) ones = false;
  });
  return sound ? (ones ? 2 : 1) : 0;
}

}  // namespace

void bind_index_checks(py::module_& module) {
  module.def("covered_bytes", &covered_bytes, py::arg("sizes"), py::arg("pointers"), py::arg("shift"),
             py::arg("threads"));
  module.def("document_steps", &document_steps, py::arg("index"), py::arg("sequences"), py::arg("threads"));
}

}  // namespace stagemix
