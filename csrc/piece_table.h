// The pieces of a source: its documents, those longer than piece_tokens cut. megatron/data/piece_table.py defines it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "permutation.h"
#include "unaligned.h"

namespace stagemix {

// Tokens of each document of one file, in memory that outlives the table: a memory map usually, at any address.
struct FileLengths {
  const void* data;
  bool wide;                // int64 rather than int32
  std::uint64_t count;      // documents
  std::uint64_t holdout;    // the base of the held-out hash of this file
  std::uint64_t first = 0;  // number of its first document through the whole source

  std::int64_t at(std::uint64_t document) const {
    return wide ? load<std::int64_t>(data, document) : load<std::int32_t>(data, document);
  }
  const void* address(std::uint64_t document) const {
    return static_cast<const char*>(data) + document * (wide ? 8 : 4);
  }
};

struct Piece {
  std::uint64_t document;
  std::uint64_t start;
  std::uint64_t length;
};

class PieceTable {
 public:
  // Documents first .. last - 1 of the files in order. Throws std::invalid_argument for a negative length,
  // for a range outside the files, and for more than 2^62 tokens or pieces.
  PieceTable(std::vector<FileLengths> files, std::uint64_t first, std::uint64_t last, std::uint64_t holdout_threshold,
             std::uint64_t piece_tokens, unsigned threads);

  std::uint64_t epoch_tokens() const { return epoch_tokens_; }
  std::uint64_t piece_count() const { return piece_count_; }

  // Piece ids 0 .. documents - 1 are the documents' first pieces; the further pieces of long ones follow.
  Piece piece(std::uint64_t id) const {
    const std::uint64_t documents = last_ - first_;
    if (id < documents) {
      const std::uint64_t length = kept(first_ + id);
      return {first_ + id, 0, std::min(length, piece_tokens_)};
    }
    return further_piece(id - documents);
  }

  // Asks the memory for what piece(id) will read.
  void prefetch(std::uint64_t id) const {
#if defined(__GNUC__)
    if (id >= last_ - first_) return;
    const FileLengths& file = file_of(first_ + id);
    __builtin_prefetch(file.address(first_ + id - file.first));
#else
    (void)id;
#endif
  }

 private:
  const FileLengths& file_of(std::uint64_t document) const {
    std::size_t file = hints_[document >> hint_shift_];
    while (document - files_[file].first >= files_[file].count) ++file;
    return files_[file];
  }

  // Tokens of a document that are trained on: none of a held-out one.
  std::uint64_t kept(std::uint64_t document) const {
    const FileLengths& file = file_of(document);
    const std::uint64_t local = document - file.first;
    if (holdout_threshold_ != 0 && mix64(file.holdout + (local + 1) * kGolden) < holdout_threshold_) return 0;
    return static_cast<std::uint64_t>(file.at(local));
  }

  Piece further_piece(std::uint64_t number) const;
  void index_files();
  void scan(unsigned threads);

  std::vector<FileLengths> files_;
  std::uint64_t first_;
  std::uint64_t last_;
  std::uint64_t holdout_threshold_;
  std::uint64_t piece_tokens_;
  std::vector<std::uint32_t> hints_;  // document >> shift: the first file that can hold it
  unsigned hint_shift_ = 0;
  std::vector<std::uint64_t> long_documents_;
  std::vector<std::uint64_t> further_before_;  // further pieces of the long documents before each
  std::uint64_t epoch_tokens_ = 0;
  std::uint64_t piece_count_ = 0;
};

}  // namespace stagemix
