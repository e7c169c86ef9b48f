// The digest of a batch's inputs: a sum of mixed (sample number, place, id). megatron/data/assembly.py defines it.
#include <stdexcept>

#include <pybind11/numpy.h>

#include "bindings.h"
#include "permutation.h"
#include "wide.h"

namespace py = pybind11;

namespace stagemix {
namespace {

STAGEMIX_INLINE std::uint64_t row_body(const std::int64_t* ids, std::uint64_t count, std::uint64_t base) {
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0; i < count; ++i) sum += mix64(mix64(base + i) ^ static_cast<std::uint64_t>(ids[i]));
  return sum;
}
std::uint64_t row(const std::int64_t* ids, std::uint64_t count, std::uint64_t base) {
  return row_body(ids, count, base);
}
STAGEMIX_AVX512 std::uint64_t row_wide(const std::int64_t* ids, std::uint64_t count, std::uint64_t base) {
  return row_body(ids, count, base);
}

using Words = py::array_t<std::uint64_t, py::array::c_style>;
using Ids = py::array_t<std::int64_t, py::array::c_style>;

std::uint64_t batch_digest(const Words& numbers, const Ids& tokens) {
  if (numbers.ndim() != 1 || tokens.ndim() != 2 || tokens.shape(0) != numbers.shape(0)) {
    throw std::invalid_argument("one row of tokens is needed for each sample number");
  }
  static const bool wide = has_avx512();
  const auto rows = static_cast<std::uint64_t>(tokens.shape(0)), places = static_cast<std::uint64_t>(tokens.shape(1));
  const std::uint64_t* const number = numbers.data();
  const std::int64_t* const ids = tokens.data();
  py::gil_scoped_release release;
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0; i < rows; ++i) {
    sum += (wide ? row_wide : row)(ids + i * places, places, number[i] * kGolden);
  }
  return sum;
}

}  // namespace

void bind_batch_digest(py::module_& module) {
  module.def("batch_digest", &batch_digest, py::arg("numbers"), py::arg("tokens").noconvert());
}

}  // namespace stagemix
