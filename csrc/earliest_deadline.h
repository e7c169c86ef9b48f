// Which source has the earliest deadline: a winner tree over classes, each class with a winner tree of its own.
//
// A class is what no lag can order: the sources of one group, or sources alone in their groups whose weights are equal
// everywhere (with equal deadlines they have equal counts, hence equal lags). Inside a class a tie goes to the name;
// between classes the caller decides. A node is one word, the deadline above the source's number, so that a path is
// walked by minima alone, without a branch on the deadlines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "weight_targets.h"

namespace stagemix {

class EarliestDeadline {
 public:
  // Deadlines are told apart from one slot to kReach slots after the base; all others are called strange.
  static constexpr int kSourceBits = 24;
  static constexpr int64_t kReach = (int64_t{1} << (64 - kSourceBits)) - 3;

  // classes: for each, its sources by number, ascending.
  explicit EarliestDeadline(const std::vector<std::vector<int>>& classes, size_t sources) : places_(sources) {
    if (sources >= size_t{1} << kSourceBits) throw std::invalid_argument("a mixture has fewer than 2^24 sources");
    const size_t top = power_of_two(classes.size());
    size_t next = 2 * top;
    for (size_t c = 0; c < classes.size(); ++c) {
      const size_t width = classes[c].size() > 1 ? power_of_two(classes[c].size()) : 0;
      for (size_t rank = 0; rank < classes[c].size(); ++rank) {
        places_[classes[c][rank]] = {static_cast<uint32_t>(top + c), static_cast<uint32_t>(width + rank), next};
      }
      next += 2 * width;
    }
    nodes_.resize(next);
    clear(0);
  }

  // Takes every source out; deadlines count from `base` from now on.
  void clear(int64_t base) {
    base_ = base;
    std::fill(nodes_.begin(), nodes_.end(), kAbsent);
  }

  void insert(int source, int64_t deadline) {
    const int64_t slots = std::min(std::max(deadline - base_, int64_t{0}), kReach + 1);
    put(source, static_cast<uint64_t>(slots) << kSourceBits | static_cast<uint64_t>(source));
  }

  void remove(int source) { put(source, kAbsent); }

  bool same_class(int a, int b) const { return places_[a].top == places_[b].top; }

  // The first source of a class that has the earliest deadline.
  int winner() const { return static_cast<int>(source_of(nodes_[1])); }

  // Whether the winner's deadline is one that the words cannot tell, or there is no winner.
  bool strange() const { return (nodes_[1] >> kSourceBits) - 1 >= static_cast<uint64_t>(kReach); }

  // Whether another class has the winner's deadline too.
  bool tied() const {
    const uint64_t winner = nodes_[1];
    bool equal = false;
    for (uint32_t i = places_[source_of(winner)].top; i > 1; i >>= 1) equal |= same_deadline(nodes_[i ^ 1], winner);
    return equal;
  }

  // Calls visit(source) with the first source of every class that has the winner's deadline.
  template <class Visit>
  void each_tied(Visit&& visit) const {
    visit(winner());
    descend(places_[winner()].top, 1, visit);
  }

 private:
  struct Place {
    uint32_t top;   // its class's leaf in the tree over classes
    uint32_t leaf;  // its own leaf in its class's tree; 0 where the class has no other source
    size_t tree;    // where its class's tree begins
  };
  static constexpr uint64_t kAbsent = ~uint64_t{0};

  static uint64_t source_of(uint64_t node) { return node & ((uint64_t{1} << kSourceBits) - 1); }
  static bool same_deadline(uint64_t a, uint64_t b) { return ((a ^ b) >> kSourceBits) == 0; }

  static size_t power_of_two(size_t least) {
    size_t width = 1;
    while (width < least) width *= 2;
    return width;
  }

  void put(int source, uint64_t node) {
    const Place& place = places_[source];
    if (place.leaf != 0) node = climb(&nodes_[place.tree], place.leaf, node);
    climb(nodes_.data(), place.top, node);
  }

  static uint64_t climb(uint64_t* tree, uint32_t leaf, uint64_t node) {
    tree[leaf] = node;
    for (uint32_t i = leaf; i > 1; i >>= 1) {
      node = std::min(node, tree[i ^ 1]);
      tree[i >> 1] = node;
    }
    return node;
  }

  template <class Visit>
  void descend(uint32_t leaf, uint32_t stop, Visit& visit) const {
    for (uint32_t i = leaf; i != stop; i >>= 1) {
      const uint64_t sibling = nodes_[i ^ 1];
      if (!same_deadline(sibling, nodes_[1])) continue;
      visit(static_cast<int>(source_of(sibling)));
      descend(places_[source_of(sibling)].top, i ^ 1, visit);
    }
  }

  std::vector<Place> places_;
  std::vector<uint64_t> nodes_;  // the tree over classes first: node i has children 2i and 2i + 1, node 1 is the root
  int64_t base_ = 0;
};

}  // namespace stagemix
