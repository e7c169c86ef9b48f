// The order of one epoch: a sparse cumulative sum over its permuted pieces, and the walk from a stream
// position to spans of documents. megatron/data/piece_table.py defines it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "parallel.h"
#include "permutation.h"
#include "piece_table.h"

namespace py = pybind11;

namespace stagemix {
namespace {

constexpr std::uint64_t kStride = Permutation::kBatch;  // pieces between two entries of the sparse sums

using Sums = py::array_t<std::uint64_t, py::array::c_style>;

// The table and what keeps the memory of its lengths alive.
struct BoundTable {
  std::vector<py::array> owners;
  std::unique_ptr<PieceTable> table;
};

FileLengths file_lengths(const py::array& lengths, std::uint64_t holdout) {
  if (lengths.ndim() != 1 || !(lengths.flags() & py::array::c_style)) {
    throw std::invalid_argument("lengths must be flat and contiguous");
  }
  const bool wide = py::isinstance<py::array_t<std::int64_t>>(lengths);
  if (!wide && !py::isinstance<py::array_t<std::int32_t>>(lengths)) {
    throw std::invalid_argument("lengths must be int32 or int64");
  }
  return {lengths.data(), wide, static_cast<std::uint64_t>(lengths.size()), holdout};
}

BoundTable make_table(const std::vector<py::array>& lengths, const std::vector<std::uint64_t>& holdouts,
                      std::uint64_t first, std::uint64_t last, std::uint64_t threshold, std::uint64_t piece_tokens,
                      unsigned threads) {
  if (lengths.size() != holdouts.size()) throw std::invalid_argument("one holdout base is needed for each file");
  std::vector<FileLengths> files;
  for (std::size_t i = 0; i < lengths.size(); ++i) files.push_back(file_lengths(lengths[i], holdouts[i]));
  BoundTable bound{lengths, nullptr};
  py::gil_scoped_release release;
  bound.table = std::make_unique<PieceTable>(std::move(files), first, last, threshold, piece_tokens, threads);
  return bound;
}

// Adds the lengths of pieces begin .. end - 1 to the groups of 32 places that the permutation puts them in. Going
// through the pieces in their own order reads the lengths in sequence, and scatters into an array that is 32 times
// smaller than the one that going through the places would gather from.
void scatter(const PieceTable& table, const Permutation& permutation, std::uint64_t begin, std::uint64_t end,
             std::uint64_t* groups) {
  std::uint64_t places[kStride];
  while (begin < end) {
    const std::uint64_t now = std::min(kStride, end - begin);
    permutation.inverse_range(begin, now, places);
    for (std::uint64_t i = 0; i < now; ++i) groups[places[i] / kStride] += table.piece(begin + i).length;
    begin += now;
  }
}

// Tokens before piece 0, 32, 64, … of the permuted order.
Sums sparse_sums(const BoundTable& bound, std::uint64_t key, unsigned threads) {
  const PieceTable& table = *bound.table;
  const std::uint64_t pieces = table.piece_count();
  const std::uint64_t entries = (pieces + kStride - 1) / kStride;
  Sums sums(static_cast<py::ssize_t>(entries));
  std::uint64_t* out = sums.mutable_data();
  if (entries == 0) return sums;
  py::gil_scoped_release release;
  const Permutation permutation(pieces, key);
  // Each thread sums into an array of its own; together they take at most 1 GiB.
  const auto affordable = static_cast<unsigned>(std::min<std::uint64_t>(1024, (1ULL << 27) / entries));
  threads = std::max(1U, std::min(threads, affordable));
  std::vector<std::vector<std::uint64_t>> parts(threads);
  in_parallel(pieces, threads, [&](unsigned part, std::uint64_t begin, std::uint64_t end) {
    parts[part].assign(entries, 0);
    scatter(table, permutation, begin, end, parts[part].data());
  });
  std::uint64_t before = 0;
  for (std::uint64_t entry = 0; entry < entries; ++entry) {
    out[entry] = before;
    for (const auto& part : parts) before += part[entry];
  }
  return sums;
}

class EpochOrder {
 public:
  EpochOrder(const BoundTable& bound, std::int64_t epoch, std::uint64_t key, Sums sums)
      : table_(*bound.table), epoch_(epoch), permutation_(std::max<std::uint64_t>(table_.piece_count(), 1), key),
        sums_(std::move(sums)) {
    entries_ = static_cast<std::uint64_t>(sums_.size());
    if (sums_.ndim() != 1 || entries_ != (table_.piece_count() + kStride - 1) / kStride ||
        (entries_ > 0 && sums_.data()[0] != 0)) {
      throw std::invalid_argument("the sparse sums do not belong to these pieces");
    }
  }

  // Rows (epoch, document, start, end) of `count` tokens from `start` on, both within a block of the epoch whose
  // windows are permuted by `block_key`; rows also end where a sample of `cut` tokens does, of which `phase`
  // tokens came before.
  py::array_t<std::int64_t> rows(std::uint64_t offset, std::uint64_t length, std::uint64_t window,
                                 std::uint64_t block_key, std::uint64_t start, std::uint64_t count, std::uint64_t cut,
                                 std::uint64_t phase) const {
    const std::uint64_t tokens = table_.epoch_tokens();
    if (offset > tokens || length > tokens - offset || start > length || count > length - start) {
      throw std::invalid_argument("the range is not within the block, or the block not within the epoch");
    }
    if (window == 0 || cut == 0 || phase >= cut) throw std::invalid_argument("window and cut must be positive");
    const std::uint64_t whole = length / window;
    const Permutation windows(std::max<std::uint64_t>(whole, 1), block_key);
    std::vector<std::int64_t> out;
    out.reserve(32);
    while (count > 0) {
      const std::uint64_t place = start / window;
      const std::uint64_t inside = start - place * window;
      const std::uint64_t now = std::min(std::min(window - inside, count), cut - phase);
      const std::uint64_t source = place < whole ? windows(place) : place;
      walk(offset + source * window + inside, now, out);
      start += now;
      count -= now;
      phase = phase + now == cut ? 0 : phase + now;
    }
    const auto found = static_cast<py::ssize_t>(out.size() / 4);
    py::array_t<std::int64_t> result({found, static_cast<py::ssize_t>(4)});
    if (!out.empty()) std::memcpy(result.mutable_data(), out.data(), out.size() * sizeof(std::int64_t));
    return result;
  }

 private:
  // Appends the spans of `count` tokens of the permuted pieces from `start` on.
  void walk(std::uint64_t start, std::uint64_t count, std::vector<std::int64_t>& out) const {
    const std::uint64_t* sums = sums_.data();
    const std::uint64_t pieces = table_.piece_count();
    const auto entry = static_cast<std::uint64_t>(std::upper_bound(sums, sums + entries_, start) - sums) - 1;
    if (entry >= entries_ || sums[entry] > start) throw std::runtime_error("the epoch index is not sorted");
    std::uint64_t before = sums[entry];
    std::uint64_t ids[kStride];
    for (std::uint64_t next = entry * kStride; count > 0; next += kStride) {
      if (next >= pieces) throw std::runtime_error("the epoch index contradicts the lengths of its documents");
      const std::uint64_t group = std::min(kStride, pieces - next);
      permutation_.range(next, group, ids);
      for (std::uint64_t i = 0; i < group; ++i) table_.prefetch(ids[i]);
      for (std::uint64_t i = 0; i < group && count > 0; ++i) {
        const Piece piece = table_.piece(ids[i]);
        if (piece.length > start - before) {
          const std::uint64_t from = piece.start + (start - before);
          const std::uint64_t now = std::min(piece.length - (start - before), count);
          for (const std::uint64_t field : {static_cast<std::uint64_t>(epoch_), piece.document, from, from + now}) {
            out.push_back(static_cast<std::int64_t>(field));
          }
          start += now;
          count -= now;
        }
        before += piece.length;
      }
    }
  }

  const PieceTable& table_;
  std::int64_t epoch_;
  Permutation permutation_;
  Sums sums_;
  std::uint64_t entries_;
};

}  // namespace

void bind_epoch_index(py::module_& module) {
  py::class_<BoundTable>(module, "PieceTable")
      .def(py::init(&make_table), py::arg("lengths"), py::arg("holdouts"), py::arg("first"), py::arg("last"),
           py::arg("threshold"), py::arg("piece_tokens"), py::arg("threads"))
      .def_property_readonly("epoch_tokens", [](const BoundTable& bound) { return bound.table->epoch_tokens(); })
      .def_property_readonly("piece_count", [](const BoundTable& bound) { return bound.table->piece_count(); })
      .def("sparse_sums", &sparse_sums, py::arg("key"), py::arg("threads"));
  py::class_<EpochOrder>(module, "EpochOrder")
      .def(py::init<const BoundTable&, std::int64_t, std::uint64_t, Sums>(), py::keep_alive<1, 2>(), py::arg("table"),
           py::arg("epoch"), py::arg("key"), py::arg("sums").noconvert())
      .def("rows", &EpochOrder::rows, py::arg("offset"), py::arg("length"), py::arg("window"), py::arg("block_key"),
           py::arg("start"), py::arg("count"), py::arg("cut"), py::arg("phase"));
}

}  // namespace stagemix
