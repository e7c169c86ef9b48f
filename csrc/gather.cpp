// Samples read from memory-mapped token files into arrays. megatron/data/assembly.py defines it.
// Every place that is read is checked first, whatever the spans and the files say: an exception, never a read outside.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "unaligned.h"
#include "wide.h"

namespace py = pybind11;

namespace stagemix {
namespace {

constexpr std::int64_t kNoTarget = -100;

struct Span {
  std::int64_t document;
  std::int64_t start;
  std::int64_t end;
};

// One `.bin/.idx` pair, mapped. `index` is null where every document is one sequence.
struct TokenFile {
  const void* tokens;
  char kind;  // 'i' or 'u'
  std::uint64_t itemsize;
  std::uint64_t token_count;
  const void* sizes;
  const void* pointers;
  const void* index;
  std::uint64_t sequences;
  std::uint64_t documents;
  std::uint64_t first;  // number of its first document through all files
  const std::uint8_t* mask;  // one bit a token, lowest first; null: every token may be a target

  std::uint64_t sequence_start(std::uint64_t sequence) const {
    if (sequence > sequences) throw std::runtime_error("a document's sequences are not among those of its .idx");
    return sequence == sequences ? token_count : load<std::uint64_t>(pointers, sequence) / itemsize;
  }

  // First token of a document and the one after its last, both within the file.
  std::pair<std::uint64_t, std::uint64_t> range(std::uint64_t document) const {
    std::uint64_t begin, end;
    if (index == nullptr) {
      begin = sequence_start(document);
      end = begin + static_cast<std::uint64_t>(static_cast<std::int64_t>(load<std::int32_t>(sizes, document)));
    } else {
      begin = sequence_start(load<std::uint64_t>(index, document));
      end = sequence_start(load<std::uint64_t>(index, document + 1));
    }
    // They were checked when the file was opened; a file that was overwritten since is refused here.
    if (begin > end || end > token_count) throw std::runtime_error("an .idx file has changed since it was opened");
    return {begin, end};
  }
};

struct Outputs {
  std::int64_t* tokens;
  std::int64_t* targets;
  std::int32_t* documents;
  std::int64_t* positions;

  Outputs operator+(std::uint64_t places) const {
    return {tokens + places, targets + places, documents + places, positions + places};
  }
};

STAGEMIX_INLINE void number_places(const Outputs& to, std::uint64_t length, std::int32_t number) {
  std::int32_t* const documents = to.documents;
  std::int64_t* const positions = to.positions;
  for (std::uint64_t i = 0; i < length; ++i) documents[i] = number;
  for (std::uint64_t i = 0; i < length; ++i) positions[i] = static_cast<std::int64_t>(i);
}

// `length` ids, at least one, of which `targets` have one that follows: as many, or one fewer at a document's end.
template <class Token>
STAGEMIX_INLINE void write_body(const Token* from, std::uint64_t length, std::uint64_t targets, std::int32_t number,
                                const Outputs& to) {
  std::int64_t* const ids = to.tokens;
  std::int64_t* const following = to.targets;
  for (std::uint64_t i = 0; i < length; ++i) ids[i] = static_cast<std::int64_t>(from[i]);
  for (std::uint64_t i = 0; i < targets; ++i) following[i] = static_cast<std::int64_t>(from[i + 1]);
  following[length - 1] = targets < length ? kNoTarget : following[length - 1];
  number_places(to, length, number);
}
template <class Token>
void write_plain(const Token* from, std::uint64_t length, std::uint64_t targets, std::int32_t number,
                 const Outputs& to) {
  write_body(from, length, targets, number, to);
}
template <class Token>
STAGEMIX_AVX2 void write_avx2(const Token* from, std::uint64_t length, std::uint64_t targets, std::int32_t number,
                              const Outputs& to) {
  write_body(from, length, targets, number, to);
}

template <class Token>
void write_span(const TokenFile& file, std::uint64_t begin, std::uint64_t length, std::uint64_t targets,
                std::int32_t number, const Outputs& to) {
  static const bool wide = has_avx2();
  const Token* const from = static_cast<const Token*>(file.tokens) + begin;
  (wide ? write_avx2<Token> : write_plain<Token>)(from, length, targets, number, to);
}

void check_flat(const py::array& array, const char* name) {
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    throw std::invalid_argument(std::string(name) + " must be flat and contiguous");
  }
}

template <class Number>
const void* numbers(const py::array& array, const char* name) {
  check_flat(array, name);
  if (!py::isinstance<py::array_t<Number>>(array)) throw std::invalid_argument(std::string(name) + " has another type");
  return array.data();
}

// A span within its file: `length` ids from `begin` on, and whether its document goes on behind them.
struct Place {
  const TokenFile* file;
  std::uint64_t begin;
  std::uint64_t length;
  bool goes_on;
};

// Asks the memory for a span's ids, at most 4 KiB of them: the spans of a shuffled sample lie far apart, and waiting
// for one after the other takes longer than copying them.
void prefetch(const TokenFile& file, const Place& place) {
#if defined(__GNUC__)
  const char* const from = static_cast<const char*>(file.tokens) + place.begin * file.itemsize;
  const std::uint64_t bytes = std::min<std::uint64_t>(place.length * file.itemsize, 4096);
  for (std::uint64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
#else
  (void)file, (void)place;
#endif
}

// Takes away those of `count` targets whose bit is 0. The first is token `token` of the file.
void keep_marked(const std::uint8_t* mask, std::uint64_t token, std::uint64_t count, std::int64_t* targets) {
  for (std::uint64_t i = 0; i < count; ++i, ++token) {
    const bool marked = (mask[token >> 3] >> (token & 7)) & 1;
    targets[i] = marked ? targets[i] : kNoTarget;
  }
}

void write_tokens(const Place& place, std::uint64_t targets, std::int32_t number, const Outputs& to) {
  const TokenFile& file = *place.file;
  const bool is_signed = file.kind == 'i';
  switch (file.itemsize) {
    case 1:
      return is_signed ? write_span<std::int8_t>(file, place.begin, place.length, targets, number, to)
                       : write_span<std::uint8_t>(file, place.begin, place.length, targets, number, to);
    case 2:
      return is_signed ? write_span<std::int16_t>(file, place.begin, place.length, targets, number, to)
                       : write_span<std::uint16_t>(file, place.begin, place.length, targets, number, to);
    case 4:
      return write_span<std::int32_t>(file, place.begin, place.length, targets, number, to);
    default:
      return write_span<std::int64_t>(file, place.begin, place.length, targets, number, to);
  }
}

void write_place(const Place& place, std::int32_t number, const Outputs& to) {
  const std::uint64_t targets = place.length - (place.goes_on ? 0 : 1);
  write_tokens(place, targets, number, to);
  if (place.file->mask != nullptr) keep_marked(place.file->mask, place.begin + 1, targets, to.targets);
}

// (tokens, sizes int32, pointers int64, document index int64 or None), as megatron.data.indexed_dataset maps them.
using Arrays = std::tuple<py::array, py::array, py::array, py::object>;

// The files of a source in order, and what keeps their memory alive.
class TokenFiles {
 public:
  TokenFiles(std::vector<Arrays> files, std::vector<py::array> masks)
      : owners_(std::move(files)), masks_(std::move(masks)) {
    if (!masks_.empty() && masks_.size() != owners_.size()) {
      throw std::invalid_argument("as many masks as files are needed, or none");
    }
    for (const auto& [tokens, sizes, pointers, index] : owners_) {
      check_flat(tokens, "tokens");
      TokenFile file{};
      file.kind = tokens.dtype().kind();
      file.itemsize = static_cast<std::uint64_t>(tokens.itemsize());
      const bool known = file.kind == 'i' ? file.itemsize == 1 || file.itemsize == 2 || file.itemsize == 4 ||
                                                file.itemsize == 8
                                          : file.kind == 'u' && (file.itemsize == 1 || file.itemsize == 2);
      if (!known || tokens.dtype().byteorder() == '>') throw std::invalid_argument("tokens have an unknown type");
      if (reinterpret_cast<std::uintptr_t>(tokens.data()) % file.itemsize != 0) {
        throw std::invalid_argument("tokens must be aligned");
      }
      file.tokens = tokens.data();
      file.token_count = static_cast<std::uint64_t>(tokens.size());
      file.sizes = numbers<std::int32_t>(sizes, "sizes");
      file.pointers = numbers<std::int64_t>(pointers, "pointers");
      file.sequences = static_cast<std::uint64_t>(sizes.size());
      if (pointers.size() != sizes.size()) throw std::invalid_argument("sizes and pointers must be as many");
      file.documents = file.sequences;
      if (!index.is_none()) {
        const auto entries = py::cast<py::array>(index);
        file.index = numbers<std::int64_t>(entries, "the document index");
        if (entries.size() < 1) throw std::invalid_argument("a document index has at least one entry");
        file.documents = static_cast<std::uint64_t>(entries.size()) - 1;
      }
      if (!masks_.empty()) {
        const py::array& mask = masks_[files_.size()];
        file.mask = static_cast<const std::uint8_t*>(numbers<std::uint8_t>(mask, "a mask"));
        if (static_cast<std::uint64_t>(mask.size()) < (file.token_count + 7) / 8) {
          throw std::invalid_argument("a mask is shorter than its tokens");
        }
      }
      file.first = documents_;
      documents_ += file.documents;
      files_.push_back(file);
      firsts_.push_back(file.first);
    }
  }

  // Where a span, whose start is below its end, lies; the memory is asked for its ids.
  Place place(const Span& span) const {
    if (span.document < 0 || static_cast<std::uint64_t>(span.document) >= documents_) {
      throw std::out_of_range("document " + std::to_string(span.document) + " is not among the source's " +
                              std::to_string(documents_));
    }
    const auto document = static_cast<std::uint64_t>(span.document);
    const auto after = std::upper_bound(firsts_.begin(), firsts_.end(), document);
    const TokenFile& file = files_[static_cast<std::size_t>(after - firsts_.begin()) - 1];
    const auto [first, last] = file.range(document - file.first);
    const auto start = static_cast<std::uint64_t>(span.start), stop = static_cast<std::uint64_t>(span.end);
    if (stop > last - first) {
      throw std::out_of_range("tokens " + std::to_string(start) + ":" + std::to_string(stop) + " of document " +
                              std::to_string(document) + ", which has " + std::to_string(last - first) + " tokens");
    }
    const Place found{&file, first + start, stop - start, first + stop < last};
    prefetch(file, found);
    return found;
  }

 private:
  std::vector<Arrays> owners_;
  std::vector<py::array> masks_;
  std::vector<TokenFile> files_;
  std::vector<std::uint64_t> firsts_;
  std::uint64_t documents_ = 0;
};

// Spans of one sample: int64 [n, 4] of (epoch, document, start, end), or a sequence of such tuples.
void add_spans(const py::handle& sample, std::vector<Span>& spans) {
  if (py::isinstance<py::array>(sample)) {
    const auto rows = py::reinterpret_borrow<py::array>(sample);
    if (rows.ndim() != 2 || rows.shape(1) != 4 || !(rows.flags() & py::array::c_style) ||
        !py::isinstance<py::array_t<std::int64_t>>(rows)) {
      throw std::invalid_argument("spans must be int64 [n, 4], contiguous");
    }
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
      const auto row = 4 * static_cast<std::uint64_t>(i);
      spans.push_back({load<std::int64_t>(rows.data(), row + 1), load<std::int64_t>(rows.data(), row + 2),
                       load<std::int64_t>(rows.data(), row + 3)});
    }
    return;
  }
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(sample)) {
    if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != 4) {
      throw std::invalid_argument("a span is a tuple of (epoch, document, start, end)");
    }
    std::int64_t fields[3];
    for (int i = 0; i < 3; ++i) {
      fields[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(item.ptr(), i + 1));
      if (fields[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    spans.push_back({fields[0], fields[1], fields[2]});
  }
}

template <class Number>
Number* output(py::array& array, std::uint64_t places, const char* name) {
  // Its kind and size are compared, not its type object, which costs as much as reading a sample of 1,000 tokens.
  const py::dtype type = array.dtype();
  if (type.kind() != 'i' || static_cast<std::size_t>(type.itemsize()) != sizeof(Number) || type.byteorder() == '>' ||
      !(array.flags() & py::array::c_style) || !array.writeable() ||
      static_cast<std::uint64_t>(array.size()) != places ||
      reinterpret_cast<std::uintptr_t>(array.data()) % alignof(Number) != 0) {
    throw std::invalid_argument(std::string(name) + " is not a writable, contiguous array of the size of tokens");
  }
  return static_cast<Number*>(array.mutable_data());
}

// The places of one sample's spans.
void find_places(const TokenFiles& files, const Span* span, const Span* last, std::vector<Place>& places) {
  for (; span != last; ++span) {
    if (span->start < 0 || span->start >= span->end) throw std::invalid_argument("a span needs 0 <= start < end");
    places.push_back(files.place(*span));
  }
}

// One sample of `length` tokens. The ends of its spans are appended to `bounds`, counted from `before` on.
void write_sample(const Place* place, const Place* last, std::uint64_t length, Outputs to, std::uint64_t before,
                  std::vector<std::int32_t>& bounds) {
  std::uint64_t left = length;
  std::int32_t number = 0;
  for (; place != last; ++place) {
    if (place->length > left) throw std::invalid_argument("the spans of a sample are longer than the sample");
    write_place(*place, number++, to);
    to = to + place->length;
    left -= place->length;
    bounds.push_back(static_cast<std::int32_t>(before + length - left));
  }
  if (left == 0) return;
  std::fill_n(to.tokens, left, 0);
  std::fill_n(to.targets, left, kNoTarget);
  number_places(to, left, number);
  bounds.push_back(static_cast<std::int32_t>(before + length));
}

// Fills the arrays with one row for each sample; returns where the spans begin and end in all rows together: int32.
py::array_t<std::int32_t> gather(const std::vector<const TokenFiles*>& files, const py::sequence& samples,
                                 py::array tokens, py::array targets, py::array documents, py::array positions) {
  const auto rows = static_cast<std::uint64_t>(files.size());
  const auto places = static_cast<std::uint64_t>(tokens.size());
  if (rows == 0 || samples.size() != files.size() || places % rows != 0) {
    throw std::invalid_argument("as many samples as files are needed, and as many rows of tokens");
  }
  if (places > static_cast<std::uint64_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::invalid_argument("a batch of 2^31 places or more has no int32 bounds: use a smaller micro-batch");
  }
  const Outputs out{output<std::int64_t>(tokens, places, "tokens"), output<std::int64_t>(targets, places, "targets"),
                    output<std::int32_t>(documents, places, "document_ids"),
                    output<std::int64_t>(positions, places, "position_ids")};
  std::vector<Span> spans;
  std::vector<std::size_t> ends;
  spans.reserve(8 * rows);
  ends.reserve(rows);
  for (std::size_t row = 0; row < rows; ++row) {
    if (files[row] == nullptr) throw std::invalid_argument("a sample has no files");
    add_spans(samples[row], spans);
    ends.push_back(spans.size());
  }
  std::vector<std::int32_t> bounds;
  bounds.reserve(spans.size() + rows + 1);
  bounds.push_back(0);
  {
    py::gil_scoped_release release;
    std::vector<Place> found;
    found.reserve(spans.size());
    std::size_t begin = 0;
    for (std::size_t row = 0; row < rows; ++row) {
      find_places(*files[row], spans.data() + begin, spans.data() + ends[row], found);
      begin = std::exchange(ends[row], found.size());
    }
    const std::uint64_t each = places / rows;
    begin = 0;
    for (std::size_t row = 0; row < rows; ++row) {
      write_sample(found.data() + begin, found.data() + ends[row], each, out + row * each, row * each, bounds);
      begin = ends[row];
    }
  }
  return py::array_t<std::int32_t>(static_cast<py::ssize_t>(bounds.size()), bounds.data());
}

}  // namespace

void bind_gather(py::module_& module) {
  py::class_<TokenFiles>(module, "TokenFiles")
      .def(py::init<std::vector<Arrays>, std::vector<py::array>>(), py::arg("files"),
           py::arg("masks") = std::vector<py::array>{});
  module.def("gather", &gather, py::arg("files"), py::arg("samples"), py::arg("tokens"), py::arg("targets"),
             py::arg("document_ids"), py::arg("position_ids"));
}

}  // namespace stagemix
