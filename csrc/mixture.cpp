// One step of the mixture stream.
//
// Sources that wait for their release lie in a wheel of buckets, one for each slot modulo the wheel's size; the others
// lie in a winner tree by deadline. A source's next deadline follows from its last by additions (constant weights) or
// by one square root and an exact check (ramps); near a segment's end it is searched for.
#include "mixture.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <utility>

#include "bindings.h"

namespace py = pybind11;

namespace stagemix {

namespace {

// What one sample is in the units of a ramp stays below this, so that twice as much fits into 64 bits.
constexpr Wide kFormulaLimit = Wide{1} << 62;

std::vector<std::vector<int>> tie_classes(const std::vector<int>& groups, const WeightTargets& targets) {
  std::map<int, std::vector<int>> members;
  for (size_t s = 0; s < groups.size(); ++s) {
    if (groups[s] < 0) throw std::invalid_argument("a group number is negative");
    members[groups[s]].push_back(static_cast<int>(s));
  }
  std::vector<std::vector<int>> classes;
  std::map<std::vector<int64_t>, std::vector<int>> alone;  // by weights
  for (auto& [group, sources] : members) {
    if (sources.size() > 1) {
      classes.push_back(std::move(sources));
      continue;
    }
    std::vector<int64_t> weights;
    for (const Segment& segment : targets.segments()) {
      weights.push_back(segment.first[sources[0]]);
      weights.push_back(segment.last[sources[0]]);
    }
    alone[weights].push_back(sources[0]);
  }
  for (auto& [weights, sources] : alone) {
    std::sort(sources.begin(), sources.end());
    classes.push_back(std::move(sources));
  }
  return classes;
}

}  // namespace

MixtureStream::MixtureStream(int64_t denominator, std::vector<int> groups, const std::vector<WeightTargets::Row>& rows,
                             std::vector<int64_t> counts)
    : targets_(denominator, groups.size(), rows),
      sources_(groups.size()),
      links_(groups.size()),
      eligible_(tie_classes(groups, targets_), groups.size()) {
  if (counts.size() != groups.size()) throw std::invalid_argument("a mixture needs one count for each source");
  for (int64_t count : counts) {
    if (count < 0) throw std::invalid_argument("a count is negative");
  }
  for (size_t s = 0; s < groups.size(); ++s) links_[s].group = groups[s];
  lags_.resize(static_cast<size_t>(*std::max_element(groups.begin(), groups.end())) + 1);
  // Wide enough that sources which wait for longer than a turn cost a fraction of a look each slot.
  size_t buckets = 64;
  while (buckets < 4 * groups.size()) buckets *= 2;
  wheel_.resize(buckets);
  wheel_mask_ = static_cast<int64_t>(buckets) - 1;
  restart(std::move(counts));
}

void MixtureStream::restart(std::vector<int64_t> counts) {
  counts_ = std::move(counts);
  position_ = 0;
  for (int64_t count : counts_) position_ += count;
  for (GroupLag& group : lags_) group.count = 0;
  for (size_t s = 0; s < counts_.size(); ++s) lags_[links_[s].group].count += counts_[s];
  for (size_t s = 0; s < counts_.size(); ++s) {
    sources_[s].deadline = counts_[s] > 0 ? targets_.first_slot(s, counts_[s], /*above=*/false) : 0;
    plan_by_search(static_cast<int>(s));
  }
  renew(position_ + 1);
}

// Makes ready for the slots from `slot` on.
void MixtureStream::renew(int64_t slot) {
  const Segment& segment = targets_.segments()[targets_.segment_at(slot)];
  enter_segment(segment);
  queue_all();
  renewal_ = std::min(segment.end, position_ + EarliestDeadline::kReach / 2);
}

void MixtureStream::queue_all() {
  eligible_.clear(position_);
  std::fill(wheel_.begin(), wheel_.end(), -1);
  for (size_t s = 0; s < counts_.size(); ++s) schedule(static_cast<int>(s));
}

// Queues a source whose next sample was planned.
inline void MixtureStream::schedule(int source) {
  const Source& next = sources_[source];
  if (next.release <= position_ + 1) {
    eligible_.insert(source, next.deadline);
  } else if (next.release != kNever) {
    int32_t& bucket = wheel_[next.release & wheel_mask_];
    links_[source].next = bucket;
    bucket = source;
  }
}

// Works out release and deadline of the sample after the one that was just given.
inline void MixtureStream::plan_by_formula(int source) {
  Source& s = sources_[source];
  int64_t slots, excess;
  if (!links_[source].ramp) {
    excess = s.excess + s.bend;
    const int64_t spare = -static_cast<int64_t>(excess >= s.rise);
    excess -= s.rise & spare;
    slots = s.stride + spare;
    if (s.deadline > s.formula_end - slots) return plan_by_search(source);
  } else {
    if (!ramp_stride(s, slots)) return plan_by_search(source);
    excess = static_cast<int64_t>(Wide{slots} * (s.rise + s.bend * slots) + s.excess - s.stride);
    s.rise += 2 * s.bend * slots;
  }
  // The next sample may be given once the target is above what was due at the last deadline.
  s.release = s.deadline + (s.excess == 0);
  s.previous = s.deadline;
  s.deadline += slots;
  s.excess = excess;
}

// The slots from a deadline to the next inside a ramp; false where they lead out of it or rounding got in the way.
inline bool MixtureStream::ramp_stride(const Source& s, int64_t& slots) const {
  const int64_t missing = s.stride - s.excess;
  const double rise = static_cast<double>(s.rise);
  const double need = static_cast<double>(missing);
  const double root = std::sqrt(std::max(0.0, rise * rise + 4.0 * static_cast<double>(s.bend) * need));
  const double guess = 2.0 * need / (rise + root);
  const int64_t room = s.formula_end - s.deadline;
  if (!(guess < static_cast<double>(room))) return false;
  const auto gives = [&](int64_t count) { return Wide{count} * (s.rise + Wide{s.bend} * count) >= missing; };
  slots = static_cast<int64_t>(guess);  // the answer is this or the next
  slots += !gives(slots);
  return slots >= 1 && slots <= room && gives(slots) && !gives(slots - 1);
}

void MixtureStream::plan_by_search(int source) {
  Source& s = sources_[source];
  s.previous = s.deadline;
  s.release = targets_.first_slot(source, counts_[source], /*above=*/true);
  s.deadline = s.release == kNever ? kNever : targets_.first_slot(source, counts_[source] + 1, /*above=*/false);
  set_formula(source);
}

// From here on deadlines follow from the last one, as long as they stay in its segment.
void MixtureStream::set_formula(int source) {
  Source& s = sources_[source];
  s.formula_end = -1;
  links_[source].ramp = false;
  s.excess = s.rise = s.bend = 0;
  s.stride = 0;
  if (s.deadline == kNever) return;
  const Segment& segment = targets_.segments()[targets_.segment_at(s.deadline - 1)];
  const int64_t offset = s.deadline - segment.start;
  const int64_t first = segment.first[source], last = segment.last[source];
  const Wide due = Wide{2} * targets_.denominator() * (counts_[source] + 1);
  if (first == last) {
    const int64_t sample = 2 * targets_.denominator(), rise = 2 * first;
    s.excess = static_cast<int64_t>(segment.bases[source] + Wide{rise} * offset - due);
    s.rise = rise;
    s.stride = (sample + rise - 1) / rise;
    s.bend = s.stride * rise - sample;
  } else {
    const Wide sample = Wide{2} * targets_.denominator() * segment.length;
    if (sample >= kFormulaLimit) return;
    links_[source].ramp = true;
    s.excess = static_cast<int64_t>(segment.numerator(source, offset) - due * segment.length);
    s.bend = last - first;
    s.rise = static_cast<int64_t>(Wide{2} * first * segment.length + Wide{2} * s.bend * offset);
    s.stride = static_cast<int64_t>(sample);
  }
  s.formula_end = segment.end;
}

void MixtureStream::enter_segment(const Segment& segment) {
  segment_start_ = segment.start;
  const int64_t length = segment.constant ? 1 : segment.length;
  scale_ = Wide{2} * targets_.denominator() * length;
  for (GroupLag& group : lags_) group.base = group.slope = group.bend = 0;
  for (size_t s = 0; s < sources_.size(); ++s) {
    GroupLag& group = lags_[links_[s].group];
    group.base += segment.bases[s] * length;
    group.slope += Wide{2} * segment.first[s] * length;
    group.bend += segment.last[s] - segment.first[s];
  }
}

inline Wide MixtureStream::lag(int group, int64_t offset) const {
  const GroupLag& g = lags_[group];
  return g.base + (g.slope + Wide{g.bend} * offset) * offset - scale_ * g.count;
}

// Among classes with the earliest deadline: the group furthest behind, then the name that sorts first.
int MixtureStream::settle_tie(int64_t slot) {
  const int64_t offset = slot - segment_start_;
  int best = eligible_.winner();
  Wide best_lag = lag(links_[best].group, offset);
  eligible_.each_tied([&](int source) {
    const Wide other = lag(links_[source].group, offset);
    if (other > best_lag || (other == best_lag && source < best)) {
      best = source;
      best_lag = other;
    }
  });
  if (sources_[best].deadline > note_ties_after_) broken_ties_.insert(sources_[best].deadline);
  return best;
}

// The rule by a look at every source, for deadlines that the tree cannot tell apart.
int MixtureStream::search_all(int64_t slot) {
  int best = -1;
  Wide best_lag = 0;
  for (size_t s = 0; s < sources_.size(); ++s) {
    if (sources_[s].release > slot) continue;
    const Wide other = lag(links_[s].group, slot - segment_start_);
    if (best < 0 || sources_[s].deadline < sources_[best].deadline ||
        (sources_[s].deadline == sources_[best].deadline && other > best_lag)) {
      best = static_cast<int>(s);
      best_lag = other;
    }
  }
  if (best < 0) throw std::logic_error("no source is eligible: the counts are not those of this stage");
  if (sources_[best].deadline > note_ties_after_) broken_ties_.insert(sources_[best].deadline);
  return best;
}

int32_t MixtureStream::step() {
  const int64_t slot = position_ + 1;
  if (slot >= renewal_) renew(slot);
  int32_t& bucket = wheel_[slot & wheel_mask_];
  if (bucket >= 0) {
    int32_t later = -1;
    for (int32_t source = bucket; source >= 0;) {
      const int32_t next = links_[source].next;
      if (sources_[source].release == slot) {
        eligible_.insert(source, sources_[source].deadline);
      } else {
        links_[source].next = later;
        later = source;
      }
      source = next;
    }
    bucket = later;
  }
  int source = eligible_.winner();
  if (eligible_.strange()) {
    source = search_all(slot);
  } else if (eligible_.tied()) {
    source = settle_tie(slot);
  }
  ++counts_[source];
  ++lags_[links_[source].group].count;
  position_ = slot;
  plan_by_formula(source);
  if (sources_[source].release > slot + 1) eligible_.remove(source);
  schedule(source);
  return source;
}

void MixtureStream::advance(int64_t goal) {
  seek_steps_ += goal - position_;
  while (position_ < goal) step();
}

void bind_mixture(py::module_& module) {
  const auto take = [](MixtureStream& stream, int64_t samples) {
    if (samples < 0) throw std::invalid_argument("a negative number of samples");
    py::array_t<int32_t> result(samples);
    int32_t* out = result.mutable_data();
    py::gil_scoped_release release;
    stream.take(samples, out);
    return result;
  };
  const auto seek = [](MixtureStream& stream, int64_t position) {
    if (position < 0) throw std::invalid_argument("a negative position");
    py::gil_scoped_release release;
    stream.seek(position);
  };
  py::class_<MixtureStream>(module, "MixtureStream",
                            "Chairman assignment over sources; see megatron.data.mixture for the rule.")
      .def(py::init<int64_t, std::vector<int>, const std::vector<WeightTargets::Row>&, std::vector<int64_t>>(),
           py::arg("denominator"), py::arg("groups"), py::arg("segments"), py::arg("counts"))
      .def_property_readonly("position", &MixtureStream::position)
      .def_property_readonly("counts", &MixtureStream::counts)
      .def_property_readonly("seek_steps", &MixtureStream::seek_steps, "Steps that seeks have taken so far.")
      .def("take", take, py::arg("samples"))
      .def("seek", seek, py::arg("position"));
}

}  // namespace stagemix
