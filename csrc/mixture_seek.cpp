// Seeking in the mixture stream without the steps before the goal.
//
// A sample of a source is a job: it may be done from its release on and is due by its deadline, and both follow from
// the target T_s alone. Fix slots v <= d, and call jobs with a deadline of at most d early. The stream does an early
// job whenever one waits, so the number of them that wait after slot n is the queue of Lindley's recursion,
//
//     waiting(n) = g(n) - min(0, min of g(m) over 1 <= m <= n),     g(m) = early jobs released by m, less m.
//
// By slot m, m + u jobs were released, where u = sum of (ceil T_s(m) - T_s(m)) is how many wait. Call a job late where
// it is due after v. The source of a late job that is released by m gives 1 - (T_s(m) - floor T_s(v)) to u, so that u
// is at least the number of late jobs, and g(m) >= 0, as long as
//
//     sum over sources of max(0, T_s(m) - floor T_s(v)) < 1.
//
// That sum grows with m; `safe_start(v)` is the last slot at which it holds. The minimum above then needs no slot up to
// there, and a run that starts there from any counts with u jobs waiting, every late one among them, has at v, and
// ever after, the same number of jobs done for each deadline as the stream itself.
//
// What may differ is which of several jobs with one deadline were done, since how a tie between classes was broken
// depends on the groups' counts. At safe_start(v) all late jobs wait, so that only ties broken since are in doubt: those
// of late jobs up to v, then those that involve a group whose count is unsure because of another doubt. A doubt ends
// where no job with that deadline waits, since as many of them are then done as in the stream itself. Once no doubt is
// left the counts are the stream's own.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "mixture.h"

namespace stagemix {

namespace {

// Deadlines whose ties may have been broken otherwise, each with the groups whose counts that makes unsure.
class Doubts {
 public:
  explicit Doubts(size_t groups) : unsure_(groups, 0) {}

  bool empty() const { return groups_.empty(); }
  bool about(int64_t deadline) const { return groups_.count(deadline) > 0; }
  bool unsure(int group) const { return unsure_[group] > 0; }

  void add(int64_t deadline, int group) {
    if (groups_[deadline].insert(group).second) ++unsure_[group];
  }

  // Ends the doubts about deadlines before `deadline`.
  void end_before(int64_t deadline) {
    while (!groups_.empty() && groups_.begin()->first < deadline) {
      for (int group : groups_.begin()->second) --unsure_[group];
      groups_.erase(groups_.begin());
    }
  }

 private:
  std::map<int64_t, std::set<int>> groups_;
  std::vector<int> unsure_;
};

}  // namespace

void MixtureStream::seek(int64_t goal) {
  if (goal == position_) return;
  const std::vector<int64_t> known = known_counts(goal);
  int64_t known_position = 0;
  for (int64_t count : known) known_position += count;
  // Doubts mostly end within a few turns of the sources; where they do not, look further back.
  int64_t back = 4 * static_cast<int64_t>(counts_.size());
  while (back < goal - known_position) {
    int64_t start = safe_start(goal - back);
    if ((goal - start) / 5 > back) {  // a long run should not be in vain
      back = (goal - start) / 5;
      start = safe_start(goal - back);
    }
    if (start <= known_position) break;
    restart(plausible_counts(start));
    if (settle(goal - back, goal)) return advance(goal);
    back = goal - start;
  }
  if (known != counts_) restart(known);
  advance(goal);
}

// The latest counts up to `goal` that are known without a step.
std::vector<int64_t> MixtureStream::known_counts(int64_t goal) const {
  const auto& segments = targets_.segments();
  std::vector<int64_t> counts(counts_.size(), 0);
  int64_t position = 0;
  if (segments.size() == 1) {  // after whole periods every count equals its target
    const int64_t periods = goal / targets_.denominator();
    position = periods * targets_.denominator();
    for (size_t s = 0; s < counts.size(); ++s) counts[s] = periods * segments[0].first[s];
  }
  return position_ <= goal && position_ >= position ? counts_ : counts;
}

// The latest slot at which a run may start from plausible counts and be right from `slot` on.
int64_t MixtureStream::safe_start(int64_t slot) const {
  std::vector<int64_t> due(counts_.size());
  for (size_t s = 0; s < due.size(); ++s) due[s] = targets_.whole_target(s, slot).first;
  const auto safe = [&](int64_t from) {
    const Segment& segment = targets_.segments()[targets_.segment_at(from)];
    const Wide sample = Wide{2} * targets_.denominator() * segment.length;
    Wide sum = 0;
    for (size_t s = 0; s < due.size(); ++s) {
      sum += std::max(Wide{0}, segment.numerator(s, from - segment.start) - sample * due[s]);
    }
    return sum < sample;
  };
  if (safe(slot)) return slot;
  int64_t low = slot - 1, high = slot;
  while (low > 0 && !safe(low)) {
    const int64_t stride = 2 * (slot - low);
    high = low;
    low = std::max(slot - stride, int64_t{0});
  }
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (safe(middle) ? low : high) = middle;
  }
  return low;
}

// Counts within one of every target that sum to `slot`, where jobs with later deadlines wait.
std::vector<int64_t> MixtureStream::plausible_counts(int64_t slot) const {
  std::vector<int64_t> counts(counts_.size());
  std::vector<std::pair<int64_t, size_t>> open;  // deadline, source
  int64_t done = slot;
  for (size_t s = 0; s < counts.size(); ++s) {
    const auto [whole, fraction] = targets_.whole_target(s, slot);
    counts[s] = whole;
    done -= whole;
    if (fraction) open.emplace_back(targets_.first_slot(s, whole + 1, /*above=*/false), s);
  }
  std::sort(open.begin(), open.end());
  for (int64_t i = 0; i < done; ++i) ++counts[open[i].second];
  return counts;
}

// Runs from the safe start of slot `late` until the counts are certain, at most to `goal`. False: they are not there.
bool MixtureStream::settle(int64_t late, int64_t goal) {
  broken_ties_.clear();
  note_ties_after_ = late;
  advance(late);
  note_ties_after_ = kNever;
  Doubts doubts(lags_.size());
  for (size_t s = 0; s < sources_.size(); ++s) {
    const Source& source = sources_[s];
    if (source.release <= position_ && broken_ties_.count(source.deadline)) doubts.add(source.deadline, links_[s].group);
    if (source.previous > position_ && broken_ties_.count(source.previous)) doubts.add(source.previous, links_[s].group);
  }
  std::vector<int> tied;
  while (!doubts.empty()) {
    const int64_t earliest = earliest_jobs(position_ + (position_ < goal), tied);
    doubts.end_before(earliest);
    if (position_ == goal) break;
    const auto differs = [&](int source) { return !eligible_.same_class(source, tied[0]); };
    const auto unsure = [&](int source) { return doubts.unsure(links_[source].group); };
    if (doubts.about(earliest) || (std::any_of(tied.begin(), tied.end(), differs) &&
                                   std::any_of(tied.begin(), tied.end(), unsure))) {
      for (int source : tied) doubts.add(earliest, links_[source].group);
    }
    advance(position_ + 1);
  }
  return doubts.empty();
}

// The earliest deadline of the jobs that wait and were released by a slot, and their sources.
int64_t MixtureStream::earliest_jobs(int64_t slot, std::vector<int>& sources) const {
  int64_t earliest = kNever;
  sources.clear();
  for (size_t s = 0; s < sources_.size(); ++s) {
    const Source& source = sources_[s];
    if (source.release > slot || source.deadline > earliest) continue;
    if (source.deadline < earliest) sources.clear();
    earliest = source.deadline;
    sources.push_back(static_cast<int>(s));
  }
  return earliest;
}

}  // namespace stagemix
