// The mixture stream: chairman assignment by earliest deadline, in exact integers.
// megatron/data/mixture.py defines the rule and the terms; this file equals its PlainMixture at every position.
//
// A source with c samples given becomes eligible at the first slot t with target(t) > c (its release), and its next
// sample is due by the first slot with target(t) >= c + 1 (its deadline). Eligible sources wait in one heap for each
// group, ordered by deadline and then by name; the others wait in one heap ordered by release. A step looks at the
// top of each group only, and works out how far a group is behind only where deadlines tie.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace {

using Wide = __int128;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int64_t kSnapshotEvery = int64_t{1} << 22;

struct Segment {
  int64_t start;
  int64_t end;     // -1: for ever
  int64_t length;  // factor of the common denominator: end - start, or 1 where the segment has no end
  std::vector<int64_t> first;
  std::vector<int64_t> last;
  std::vector<Wide> bases;  // target at the start, times 2 * denominator
  bool constant;

  // The target of a source at `offset` samples into the segment, times 2 * denominator * length.
  Wide numerator(int source, int64_t offset) const {
    const Wide linear = (bases[source] + Wide{2} * first[source] * offset) * length;
    return linear + Wide{last[source] - first[source]} * offset * offset;
  }
};

Wide floor_divide(Wide dividend, Wide divisor) {  // divisor > 0, dividend >= 0
  if (dividend <= Wide{kNever} && divisor <= Wide{kNever}) {
    return static_cast<uint64_t>(dividend) / static_cast<uint64_t>(divisor);
  }
  return dividend / divisor;
}

class MixtureStream {
 public:
  using SegmentRow = std::tuple<int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

  MixtureStream(int64_t denominator, std::vector<int> groups, const std::vector<SegmentRow>& rows,
                std::vector<int64_t> counts)
      : denominator_(denominator), groups_(std::move(groups)), counts_(std::move(counts)) {
    const size_t sources = groups_.size();
    if (denominator_ < 1 || sources == 0 || rows.empty() || counts_.size() != sources) {
      throw std::invalid_argument("a mixture needs a denominator, sources, segments and one count for each source");
    }
    std::vector<Wide> base(sources, 0);
    for (const auto& [start, end, first, last] : rows) {
      if (first.size() != sources || last.size() != sources) {
        throw std::invalid_argument("a segment needs one weight for each source");
      }
      Segment segment{start, end, end < 0 ? 1 : end - start, first, last, base, first == last};
      if (segment.length < 1) throw std::invalid_argument("a segment ends where it starts");
      if (end < 0 && !segment.constant) throw std::invalid_argument("a ramp needs an end");
      for (size_t s = 0; s < sources; ++s) base[s] += Wide{first[s] + last[s]} * segment.length;
      segments_.push_back(std::move(segment));
    }
    if (segments_.back().end >= 0) throw std::invalid_argument("the last segment must hold for ever");
    int groups_count = 0;
    for (int group : groups_) {
      if (group < 0) throw std::invalid_argument("a group number is negative");
      groups_count = std::max(groups_count, group + 1);
    }
    ready_.resize(groups_count);
    members_.resize(groups_count);
    for (size_t s = 0; s < sources; ++s) members_[groups_[s]].push_back(static_cast<int>(s));
    for (int64_t count : counts_) {
      if (count < 0) throw std::invalid_argument("a count is negative");
    }
    restart(counts_);
  }

  int64_t position() const { return position_; }
  const std::vector<int64_t>& counts() const { return counts_; }

  py::array_t<int32_t> take(int64_t samples) {
    if (samples < 0) throw std::invalid_argument("a negative number of samples");
    py::array_t<int32_t> result(samples);
    int32_t* out = result.mutable_data();
    py::gil_scoped_release release;
    for (int64_t i = 0; i < samples; ++i) out[i] = step();
    return result;
  }

  void seek(int64_t target) {
    if (target < 0) throw std::invalid_argument("a negative position");
    py::gil_scoped_release release;
    if (target < position_) {
      auto after = snapshots_.upper_bound(target);
      restart(after == snapshots_.begin() ? std::vector<int64_t>(counts_.size(), 0) : std::prev(after)->second);
    }
    if (jump_to_whole(target)) return;
    if (segments_.size() == 1) jump_to_whole(target / denominator_ * denominator_);
    while (position_ < target) {
      if (!jump_periods(target)) advance(std::min(target, position_ + kSnapshotEvery));
    }
  }

 private:
  struct Later {  // orders heaps so that the smallest (slot, source) is on top
    bool operator()(const std::pair<int64_t, int>& a, const std::pair<int64_t, int>& b) const { return a > b; }
  };
  using Heap = std::vector<std::pair<int64_t, int>>;

  static void push(Heap& heap, int64_t key, int source) {
    heap.emplace_back(key, source);
    std::push_heap(heap.begin(), heap.end(), Later());
  }

  static int pop(Heap& heap) {
    std::pop_heap(heap.begin(), heap.end(), Later());
    const int source = heap.back().second;
    heap.pop_back();
    return source;
  }

  void restart(std::vector<int64_t> counts) {
    counts_ = std::move(counts);
    position_ = 0;
    for (int64_t count : counts_) position_ += count;
    hints_.assign(counts_.size(), 0);
    deadlines_.assign(counts_.size(), kNever);
    waiting_.clear();
    for (auto& heap : ready_) heap.clear();
    segment_ = 0;
    for (size_t s = 0; s < counts_.size(); ++s) schedule(static_cast<int>(s));
  }

  // Works out release and deadline of a source's next sample and queues it.
  void schedule(int source) {
    const int64_t release = first_slot(source, counts_[source], /*above=*/true);
    if (release == kNever) return;
    deadlines_[source] = first_slot(source, counts_[source] + 1, /*above=*/false);
    if (release <= position_ + 1) {
      push(ready_[groups_[source]], deadlines_[source], source);
    } else {
      push(waiting_, release, source);
    }
  }

  // The smallest slot whose target is above (or: at least) `whole`. Counts only grow, so the search starts at the
  // segment where the last release lay.
  int64_t first_slot(int source, int64_t whole, bool above) {
    size_t k = hints_[source];
    const Wide wanted = Wide{2} * denominator_ * whole;
    for (; k + 1 < segments_.size(); ++k) {
      const Wide at_end = segments_[k + 1].bases[source];
      if (above ? at_end > wanted : at_end >= wanted) break;
    }
    if (above) hints_[source] = k;
    const Segment& segment = segments_[k];
    if (segment.first[source] == segment.last[source]) {
      const int64_t weight = segment.first[source];
      if (weight == 0) return kNever;
      const Wide missing = wanted - segment.bases[source];
      const Wide slot = above ? floor_divide(missing, Wide{2} * weight) + 1
                              : floor_divide(missing + Wide{2} * weight - 1, Wide{2} * weight);
      return segment.start + static_cast<int64_t>(slot);
    }
    const Wide scaled = wanted * segment.length;
    const auto holds = [&](int64_t offset) {
      const Wide numerator = segment.numerator(source, offset);
      return above ? numerator > scaled : numerator >= scaled;
    };
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

  // How far a group is behind its target at a slot, times the denominator that all sources share there.
  Wide lag(int group, int64_t slot) const {
    const Segment& segment = segments_[segment_];
    const Wide scale = Wide{2} * denominator_ * segment.length;
    Wide sum = 0;
    for (int source : members_[group]) {
      sum += segment.numerator(source, slot - segment.start) - scale * counts_[source];
    }
    return sum;
  }

  int32_t step() {
    const int64_t slot = position_ + 1;
    while (segment_ + 1 < segments_.size() && segments_[segment_ + 1].start <= slot) ++segment_;
    while (!waiting_.empty() && waiting_.front().first <= slot) {
      const int source = pop(waiting_);
      push(ready_[groups_[source]], deadlines_[source], source);
    }
    int best = -1;
    Wide best_lag = 0;
    bool lag_known = false;
    for (int group = 0; group < static_cast<int>(ready_.size()); ++group) {
      if (ready_[group].empty()) continue;
      if (best < 0 || ready_[group].front().first < ready_[best].front().first) {
        best = group;
        lag_known = false;
      } else if (ready_[group].front().first == ready_[best].front().first) {
        if (!lag_known) best_lag = lag(best, slot);
        lag_known = true;
        const Wide other = lag(group, slot);
        if (other > best_lag ||
            (other == best_lag && ready_[group].front().second < ready_[best].front().second)) {
          best = group;
          best_lag = other;
        }
      }
    }
    if (best < 0) throw std::logic_error("no source is eligible: the weights do not sum to one");
    const int source = pop(ready_[best]);
    ++counts_[source];
    ++position_;
    schedule(source);
    return source;
  }

  // Where every target is whole, each count must equal its target.
  bool jump_to_whole(int64_t target) {
    if (target < position_) return false;
    size_t k = 0;
    while (k + 1 < segments_.size() && segments_[k + 1].start <= target) ++k;
    const Wide scale = Wide{2} * denominator_ * segments_[k].length;
    std::vector<int64_t> counts(counts_.size());
    for (size_t s = 0; s < counts.size(); ++s) {
      const Wide numerator = segments_[k].numerator(static_cast<int>(s), target - segments_[k].start);
      if (numerator % scale != 0) return false;
      counts[s] = static_cast<int64_t>(numerator / scale);
    }
    restart(std::move(counts));
    return true;
  }

  void advance(int64_t target) {
    while (position_ < target) step();
    if (segments_.size() > 1) snapshots_[position_] = counts_;
  }

  // In a constant segment the order repeats once a whole period has changed the counts by just the weights. Near a
  // segment's end deadlines look into the next one, so three periods before it are stepped through.
  bool jump_periods(int64_t target) {
    size_t k = 0;
    while (k + 1 < segments_.size() && segments_[k + 1].start <= position_) ++k;
    const Segment& segment = segments_[k];
    const int64_t reach = segment.end < 0 ? target : std::min(target, segment.end - 3 * denominator_);
    if (!segment.constant || reach - position_ < 2 * denominator_) return false;
    const std::vector<int64_t> before = counts_;
    advance(position_ + denominator_);
    for (size_t s = 0; s < counts_.size(); ++s) {
      if (counts_[s] - before[s] != segment.first[s]) return true;  // progress was made; the next call tries again
    }
    const int64_t periods = (reach - position_) / denominator_;
    std::vector<int64_t> counts = counts_;
    for (size_t s = 0; s < counts.size(); ++s) counts[s] += periods * segment.first[s];
    restart(std::move(counts));
    return true;
  }

  int64_t denominator_;
  std::vector<int> groups_;
  std::vector<int64_t> counts_;
  std::vector<Segment> segments_;
  int64_t position_ = 0;
  size_t segment_ = 0;              // the segment that holds the slot being filled
  std::vector<size_t> hints_;       // for each source, the segment of its last release
  std::vector<int64_t> deadlines_;  // of each source's next sample
  Heap waiting_;
  std::vector<Heap> ready_;
  std::vector<std::vector<int>> members_;
  std::map<int64_t, std::vector<int64_t>> snapshots_;
};

}  // namespace

namespace stagemix {

void bind_mixture(py::module_& module) {
  py::class_<MixtureStream>(module, "MixtureStream",
                            "Chairman assignment over sources; see megatron.data.mixture for the rule.")
      .def(py::init<int64_t, std::vector<int>, const std::vector<MixtureStream::SegmentRow>&, std::vector<int64_t>>(),
           py::arg("denominator"), py::arg("groups"), py::arg("segments"), py::arg("counts"))
      .def_property_readonly("position", &MixtureStream::position)
      .def_property_readonly("counts", &MixtureStream::counts)
      .def("take", &MixtureStream::take, py::arg("samples"))
      .def("seek", &MixtureStream::seek, py::arg("position"));
}

}  // namespace stagemix
