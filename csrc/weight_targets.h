// A stage's targets in exact integers: the twin of SourceTarget in megatron/data/weight_function.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace stagemix {

using Wide = __int128;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max() - 2;  // later than every slot

inline Wide floor_divide(Wide dividend, Wide divisor) {  // divisor > 0, dividend >= 0
  constexpr Wide narrow = std::numeric_limits<int64_t>::max();
  if (dividend <= narrow && divisor <= narrow) {
    return static_cast<uint64_t>(dividend) / static_cast<uint64_t>(divisor);
  }
  return dividend / divisor;
}

// Weights of every source from slot `start` to slot `end`: constant, or linear.
struct Segment {
  int64_t start;
  int64_t end;     // kNever: for ever
  int64_t length;  // factor of the common denominator: end - start, or 1 where the segment has no end
  std::vector<int64_t> first;
  std::vector<int64_t> last;
  std::vector<Wide> bases;  // target at the start, times 2 * denominator
  bool constant;            // for every source

  // The target of a source at `offset` samples into the segment, times 2 * denominator * length.
  Wide numerator(size_t source, int64_t offset) const {
    const Wide linear = (bases[source] + Wide{2} * first[source] * offset) * length;
    return linear + Wide{last[source] - first[source]} * offset * offset;
  }
};

class WeightTargets {
 public:
  using Row = std::tuple<int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;  // start, end, first, last

  WeightTargets(int64_t denominator, size_t sources, const std::vector<Row>& rows) : denominator_(denominator) {
    if (denominator < 1 || denominator > (int64_t{1} << 60) || sources == 0 || rows.empty()) {
      throw std::invalid_argument("a mixture needs a denominator from 1 to 2^60, sources and segments");
    }
    std::vector<Wide> base(sources, 0);
    int64_t expected = 0;
    for (const auto& [start, end, first, last] : rows) {
      const bool endless = end < 0;
      if (first.size() != sources || last.size() != sources) {
        throw std::invalid_argument("a segment needs one weight for each source");
      }
      if (start != expected) throw std::invalid_argument("a segment does not start where the one before it ends");
      if (!endless && end <= start) throw std::invalid_argument("a segment ends where it starts");
      for (const auto& weights : {first, last}) check_sum(weights);
      Segment segment{start, endless ? kNever : end, endless ? 1 : end - start, first, last, base, first == last};
      if (endless && !segment.constant) throw std::invalid_argument("a ramp needs an end");
      if (endless != (&rows.back() == &rows[segments_.size()])) {
        throw std::invalid_argument("the last segment, and no other, must hold for ever");
      }
      for (size_t s = 0; s < sources; ++s) base[s] += (Wide{first[s]} + last[s]) * segment.length;
      expected = end;
      segments_.push_back(std::move(segment));
    }
  }

  int64_t denominator() const { return denominator_; }
  const std::vector<Segment>& segments() const { return segments_; }

  // The number of the segment that holds a slot as PlainMixture's `at` does: a boundary belongs to the later one.
  size_t segment_at(int64_t slot) const {
    const auto after = std::upper_bound(segments_.begin(), segments_.end(), slot,
                                        [](int64_t value, const Segment& part) { return value < part.start; });
    return static_cast<size_t>(after - segments_.begin()) - 1;
  }

  // The whole samples of a source's target at a slot, and whether there is a fraction above them.
  std::pair<int64_t, bool> whole_target(size_t source, int64_t slot) const {
    const Segment& segment = segments_[segment_at(slot)];
    // A source that does not change needs no common denominator, so that most divisions stay short.
    const bool flat = segment.first[source] == segment.last[source];
    const int64_t offset = slot - segment.start;
    const Wide scale = Wide{2} * denominator_ * (flat ? 1 : segment.length);
    const Wide numerator = flat ? segment.bases[source] + Wide{2} * segment.first[source] * offset
                                : segment.numerator(source, offset);
    const Wide whole = floor_divide(numerator, scale);
    return {static_cast<int64_t>(whole), whole * scale != numerator};
  }

  // The smallest slot whose target is above (or: at least) `whole`, kNever where there is none.
  int64_t first_slot(size_t source, int64_t whole, bool above) const {
    const Wide wanted = Wide{2} * denominator_ * whole;
    // Targets only grow, so that the segment is found by bisection over the targets at the segments' ends.
    const auto found = std::partition_point(segments_.begin() + 1, segments_.end(), [&](const Segment& next) {
      return above ? next.bases[source] <= wanted : next.bases[source] < wanted;
    });
    const Segment& segment = *(found - 1);
    if (segment.first[source] != segment.last[source]) return ramp_slot(segment, source, wanted, above);
    const int64_t weight = segment.first[source];
    if (weight == 0) return kNever;
    const Wide missing = wanted - segment.bases[source];
    const Wide slot = above ? floor_divide(missing, Wide{2} * weight) + 1
                            : floor_divide(missing + Wide{2} * weight - 1, Wide{2} * weight);
    return segment.start + static_cast<int64_t>(slot);
  }

 private:
  void check_sum(const std::vector<int64_t>& weights) const {
    Wide sum = 0;
    for (int64_t weight : weights) {
      if (weight < 0) throw std::invalid_argument("a weight is negative");
      sum += weight;
    }
    if (sum != denominator_) throw std::invalid_argument("weights do not sum to the denominator");
  }

  int64_t ramp_slot(const Segment& segment, size_t source, Wide wanted, bool above) const {
    const Wide scaled = wanted * segment.length;
    const auto holds = [&](int64_t offset) {
      const Wide numerator = segment.numerator(source, offset);
      return above ? numerator > scaled : numerator >= scaled;
    };
    if (holds(0)) return segment.start;
    int64_t low = 0, high = segment.length;  // holds at high, not at low
    // The quadratic's root in floating point is near; what is exact is the search around it.
    const double slope = static_cast<double>(segment.first[source]) * static_cast<double>(segment.length);
    const double missing =
        static_cast<double>(wanted - segment.bases[source]) * static_cast<double>(segment.length);
    const double change = static_cast<double>(segment.last[source] - segment.first[source]);
    const double divisor = slope + std::sqrt(std::max(0.0, slope * slope + change * missing));
    const double root = divisor > 0 ? missing / divisor : 0;
    int64_t probe = root < static_cast<double>(high) ? static_cast<int64_t>(root) + 1 : high - 1;
    for (int64_t stride = 1; stride < 16 && high - low > 1; stride *= 2) {
      probe = std::min(std::max(probe, low + 1), high - 1);
      const bool held = holds(probe);
      (held ? high : low) = probe;
      probe += held ? -stride : stride;
    }
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (holds(middle) ? high : low) = middle;
    }
    return segment.start + high;
  }

  int64_t denominator_;
  std::vector<Segment> segments_;
};

}  // namespace stagemix
