#include "piece_table.h"

#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace stagemix {

PieceTable::PieceTable(std::vector<FileLengths> files, std::uint64_t first, std::uint64_t last,
                       std::uint64_t holdout_threshold, std::uint64_t piece_tokens, unsigned threads)
    : files_(std::move(files)),
      first_(first),
      last_(last),
      holdout_threshold_(holdout_threshold),
      piece_tokens_(piece_tokens) {
  if (piece_tokens == 0 || piece_tokens > kLargestOrder) throw std::invalid_argument("piece_tokens is out of range");
  index_files();
  scan(std::max(threads, 1U));
}

void PieceTable::index_files() {
  std::uint64_t documents = 0;
  for (FileLengths& file : files_) {
    file.first = documents;
    documents += file.count;
  }
  if (first_ > last_ || last_ > documents) throw std::invalid_argument("the slice is not within the files");
  while ((documents >> hint_shift_) > 4096) ++hint_shift_;
  std::uint32_t file = 0;
  for (std::uint64_t bucket = 0; bucket <= (documents >> hint_shift_); ++bucket) {
    while (file + 1 < files_.size() && (bucket << hint_shift_) >= files_[file].first + files_[file].count) ++file;
    hints_.push_back(file);
  }
}

void PieceTable::scan(unsigned threads) {
  struct Part {
    std::uint64_t tokens = 0;
    std::uint64_t further = 0;
    std::vector<std::uint64_t> documents;
    std::vector<std::uint64_t> before;
  };
  std::vector<Part> parts(threads);
  in_parallel(last_ - first_, threads, [&](unsigned number, std::uint64_t begin, std::uint64_t end) {
    Part part;
    for (std::uint64_t document = first_ + begin; document < first_ + end; ++document) {
      const std::uint64_t length = kept(document);
      if (length > kLargestOrder || (part.tokens += length) > kLargestOrder) {
        throw std::invalid_argument("document " + std::to_string(document) +
                                    " has a negative length, or the source more than 2^62 tokens");
      }
      if (length <= piece_tokens_) continue;
      part.documents.push_back(document);
      part.before.push_back(part.further);
      part.further += (length - 1) / piece_tokens_;
    }
    parts[number] = std::move(part);
  });
  std::uint64_t further = 0;
  for (const Part& part : parts) {
    long_documents_.insert(long_documents_.end(), part.documents.begin(), part.documents.end());
    for (const std::uint64_t before : part.before) further_before_.push_back(further + before);
    further += part.further;
    epoch_tokens_ += part.tokens;
    if (epoch_tokens_ > kLargestOrder) throw std::invalid_argument("the source has more than 2^62 tokens");
  }
  piece_count_ = last_ - first_ + further;
}

Piece PieceTable::further_piece(std::uint64_t number) const {
  const auto after = std::upper_bound(further_before_.begin(), further_before_.end(), number);
  const auto row = static_cast<std::size_t>(after - further_before_.begin()) - 1;
  const std::uint64_t document = long_documents_[row];
  const std::uint64_t start = (number - further_before_[row] + 1) * piece_tokens_;
  const FileLengths& file = file_of(document);
  const auto length = static_cast<std::uint64_t>(file.at(document - file.first));
  return {document, start, std::min(length - start, piece_tokens_)};
}

}  // namespace stagemix
