#include "permutation.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include <pybind11/numpy.h>

#include "bindings.h"
#include "wide.h"

namespace py = pybind11;

namespace stagemix {
namespace {

std::uint64_t ceiling_root(std::uint64_t size) {
  std::uint64_t root = static_cast<std::uint64_t>(std::sqrt(static_cast<double>(size)));
  while (root * root < size) ++root;
  while (root > 1 && (root - 1) * (root - 1) >= size) --root;
  return root;
}

int rounds_for(std::uint64_t size) {
  if (size <= 256) return 24;
  return size <= 65536 ? 12 : 6;
}

// A number below `side`, from the other half and the round's key.
STAGEMIX_INLINE std::uint64_t shift(std::uint64_t half, std::uint64_t key, std::uint64_t side) {
  std::uint64_t word = (half ^ key) * 0xFF51AFD7ED558CCDULL;
  word ^= word >> 32;
  word *= 0xC4CEB9FE1A85EC53ULL;
  return ((word >> 32) * side) >> 32;
}

// (half + amount) mod side and (half - amount) mod side, where both are below side: of the two unsigned candidates
// the smaller.
STAGEMIX_INLINE std::uint64_t add(std::uint64_t half, std::uint64_t amount, std::uint64_t side) {
  return std::min(half + amount, half + amount - side);
}
STAGEMIX_INLINE std::uint64_t subtract(std::uint64_t half, std::uint64_t amount, std::uint64_t side) {
  return std::min(half - amount, half - amount + side);
}

}  // namespace

Permutation::Permutation(std::uint64_t size, std::uint64_t key) : size_(size) {
  if (size == 0 || size > kLargestOrder) throw std::invalid_argument("a permutation needs 1 <= n <= 2^62");
  right_ = ceiling_root(size);
  left_ = (size + right_ - 1) / right_;
  rounds_ = rounds_for(size);
  for (int round = 0; round < rounds_; ++round) {
    keys_[round] = mix64(key + static_cast<std::uint64_t>(round + 1) * kGolden);
  }
}

template <bool kInverse>
std::uint64_t Permutation::once(std::uint64_t index) const {
  std::uint64_t left = index / right_;
  std::uint64_t right = index - left * right_;
  for (int round = 0; round < rounds_; round += 2) {
    if (kInverse) {
      right = subtract(right, shift(left, keys_[rounds_ - 1 - round], right_), right_);
      left = subtract(left, shift(right, keys_[rounds_ - 2 - round], left_), left_);
    } else {
      left = add(left, shift(right, keys_[round], left_), left_);
      right = add(right, shift(left, keys_[round + 1], right_), right_);
    }
  }
  return left * right_ + right;
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  std::uint64_t image = once<false>(index);
  while (image >= size_) image = once<false>(image);
  return image;
}

// Rounds outside, elements inside: the elements are independent, so that their multiplications overlap.
template <bool kInverse>
STAGEMIX_INLINE void Permutation::batch_body(std::uint64_t start, std::uint64_t count, std::uint64_t* results) const {
  std::uint64_t left[kBatch] = {};
  std::uint64_t right[kBatch] = {};
  std::uint64_t row = start / right_;
  std::uint64_t column = start - row * right_;
  for (std::uint64_t i = 0; i < count; ++i) {
    left[i] = row;
    right[i] = column;
    if (++column == right_) {
      column = 0;
      ++row;
    }
  }
  for (int round = 0; round < rounds_; round += 2) {
    const std::uint64_t first = keys_[kInverse ? rounds_ - 1 - round : round];
    const std::uint64_t second = keys_[kInverse ? rounds_ - 2 - round : round + 1];
    for (std::uint64_t i = 0; i < kBatch; ++i) {
      if (kInverse) {
        right[i] = subtract(right[i], shift(left[i], first, right_), right_);
        left[i] = subtract(left[i], shift(right[i], second, left_), left_);
      } else {
        left[i] = add(left[i], shift(right[i], first, left_), left_);
        right[i] = add(right[i], shift(left[i], second, right_), right_);
      }
    }
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t result = left[i] * right_ + right[i];
    while (result >= size_) result = once<kInverse>(result);
    results[i] = result;
  }
}

template <bool kInverse>
void Permutation::batch(std::uint64_t start, std::uint64_t count, std::uint64_t* results) const {
  batch_body<kInverse>(start, count, results);
}

template <bool kInverse>
STAGEMIX_AVX512 void Permutation::batch_wide(std::uint64_t start, std::uint64_t count, std::uint64_t* results) const {
  batch_body<kInverse>(start, count, results);
}

template <bool kInverse>
void Permutation::batches(std::uint64_t start, std::uint64_t count, std::uint64_t* results, bool portable) const {
  static const bool wide = has_avx512();
  while (count > 0) {
    const std::uint64_t now = std::min(count, kBatch);
    if (wide && !portable) {
      batch_wide<kInverse>(start, now, results);
    } else {
      batch<kInverse>(start, now, results);
    }
    start += now;
    results += now;
    count -= now;
  }
}

void Permutation::range(std::uint64_t start, std::uint64_t count, std::uint64_t* images, bool portable) const {
  batches<false>(start, count, images, portable);
}

void Permutation::inverse_range(std::uint64_t start, std::uint64_t count, std::uint64_t* indices,
                                bool portable) const {
  batches<true>(start, count, indices, portable);
}

void bind_permutation(py::module_& module) {
  using Words = py::array_t<std::uint64_t, py::array::c_style>;
  module.def(
      "permute_one",
      [](std::uint64_t index, std::uint64_t size, std::uint64_t key) {
        const Permutation permutation(size, key);
        if (index >= size) throw std::invalid_argument("the index is not below n");
        return permutation(index);
      },
      py::arg("index"), py::arg("n"), py::arg("key"));
  module.def(
      "permute",
      [](const Words& indices, std::uint64_t size, std::uint64_t key) {
        const Permutation permutation(size, key);
        if (indices.ndim() != 1) throw std::invalid_argument("a flat array is needed");
        const auto count = static_cast<std::uint64_t>(indices.size());
        py::array_t<std::int64_t> images(indices.size());
        const std::uint64_t* from = indices.data();
        std::int64_t* to = images.mutable_data();
        for (std::uint64_t i = 0; i < count; ++i) {
          if (from[i] >= size) throw std::invalid_argument("an index is not below n");
          to[i] = static_cast<std::int64_t>(permutation(from[i]));
        }
        return images;
      },
      py::arg("indices").noconvert(), py::arg("n"), py::arg("key"));
  module.def(
      "permute_range",
      [](std::uint64_t start, std::uint64_t count, std::uint64_t size, std::uint64_t key, bool inverse,
         bool portable) {
        const Permutation permutation(size, key);
        if (start > size || count > size - start) throw std::invalid_argument("the range is not within n");
        py::array_t<std::uint64_t> images(static_cast<py::ssize_t>(count));
        std::uint64_t* to = images.mutable_data();
        {
          py::gil_scoped_release release;
          if (inverse) {
            permutation.inverse_range(start, count, to, portable);
          } else {
            permutation.range(start, count, to, portable);
          }
        }
        return images.attr("view")("int64");
      },
      py::arg("start"), py::arg("count"), py::arg("n"), py::arg("key"), py::arg("inverse") = false,
      py::arg("portable") = false);
  module.def(
      "hashes_below",
      [](std::uint64_t base, std::uint64_t count, std::uint64_t threshold) {
        py::array_t<bool> below(static_cast<py::ssize_t>(count));
        bool* to = below.mutable_data();
        {
          py::gil_scoped_release release;
          for (std::uint64_t i = 0; i < count; ++i) to[i] = mix64(base + (i + 1) * kGolden) < threshold;
        }
        return below;
      },
      py::arg("base"), py::arg("count"), py::arg("threshold"));
}

}  // namespace stagemix
