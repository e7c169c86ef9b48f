// A keyed bijection of {0 .. n-1} that is computed, not stored. megatron/data/permutation.py defines it.
#pragma once

#include <cstdint>

namespace stagemix {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15ULL;
constexpr std::uint64_t kLargestOrder = 1ULL << 62;

// The finaliser of splitmix64: a bijection of 64-bit words that mixes every bit into every other.
inline std::uint64_t mix64(std::uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ULL;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBULL;
  return word ^ (word >> 31);
}

class Permutation {
 public:
  static constexpr int kMostRounds = 24;
  static constexpr std::uint64_t kBatch = 32;

  // Throws std::invalid_argument unless 1 <= size <= 2^62.
  Permutation(std::uint64_t size, std::uint64_t key);

  std::uint64_t size() const { return size_; }

  // The image of one index below size.
  std::uint64_t operator()(std::uint64_t index) const;

  // The images of start .. start + count - 1, without a division for each; portable: without AVX-512.
  void range(std::uint64_t start, std::uint64_t count, std::uint64_t* images, bool portable = false) const;

  // The indices whose images are start .. start + count - 1.
  void inverse_range(std::uint64_t start, std::uint64_t count, std::uint64_t* indices, bool portable = false) const;

 private:
  template <bool kInverse>
  std::uint64_t once(std::uint64_t index) const;
  template <bool kInverse>
  void batch_body(std::uint64_t start, std::uint64_t count, std::uint64_t* results) const;
  template <bool kInverse>
  void batch(std::uint64_t start, std::uint64_t count, std::uint64_t* results) const;
  template <bool kInverse>
  void batch_wide(std::uint64_t start, std::uint64_t count, std::uint64_t* results) const;
  template <bool kInverse>
  void batches(std::uint64_t start, std::uint64_t count, std::uint64_t* results, bool portable) const;

  std::uint64_t size_;
  std::uint64_t left_;
  std::uint64_t right_;
  int rounds_;
  std::uint64_t keys_[kMostRounds];
};

}  // namespace stagemix
