// The mixture stream: chairman assignment by earliest deadline, in exact integers.
// megatron/data/mixture.py defines the rule and the terms; this equals its PlainMixture at every position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "earliest_deadline.h"
#include "weight_targets.h"

namespace stagemix {

class MixtureStream {
 public:
  // groups: the number of each source's group. counts: samples already given by each source.
  MixtureStream(int64_t denominator, std::vector<int> groups, const std::vector<WeightTargets::Row>& rows,
                std::vector<int64_t> counts);

  int64_t position() const { return position_; }
  const std::vector<int64_t>& counts() const { return counts_; }
  int64_t seek_steps() const { return seek_steps_; }

  void take(int64_t samples, int32_t* out) {
    for (int64_t i = 0; i < samples; ++i) out[i] = step();
  }

  void seek(int64_t goal);

 private:
  // A source's next sample. It becomes eligible at slot `release` and is due by slot `deadline`. While deadlines stay
  // within `formula_end`, the one after it follows from `excess`: what the target is above the count at the deadline,
  // in the units of the segment that holds the deadline.
  struct alignas(64) Source {
    int64_t release;
    int64_t deadline;
    int64_t previous;     // deadline of the sample before
    int64_t formula_end;  // -1: every deadline by search
    int64_t excess;
    int64_t rise;    // constant: growth of the target in a slot. Ramp: its derivative at the deadline
    int64_t bend;    // constant: what `stride` slots give beyond one sample. Ramp: half the second derivative
    int64_t stride;  // constant: the most slots between deadlines. Ramp: the units of one sample
  };
  struct Link {
    int32_t next;  // the next source in the same bucket of the wheel, or -1
    int32_t group;
    bool ramp;
  };
  // How far a group is behind, at `offset` slots into the current segment, is
  // base + (slope + bend * offset) * offset - scale_ * count.
  struct GroupLag {
    Wide base;
    Wide slope;
    int64_t bend;
    int64_t count;
  };
  void restart(std::vector<int64_t> counts);
  int32_t step();
  void schedule(int source);
  void plan_by_formula(int source);
  void plan_by_search(int source);
  void set_formula(int source);
  bool ramp_stride(const Source& source, int64_t& slots) const;
  void enter_segment(const Segment& segment);
  Wide lag(int group, int64_t offset) const;
  int settle_tie(int64_t slot);
  int search_all(int64_t slot);
  void queue_all();
  void renew(int64_t slot);

  std::vector<int64_t> known_counts(int64_t goal) const;
  int64_t safe_start(int64_t slot) const;
  std::vector<int64_t> plausible_counts(int64_t slot) const;
  bool settle(int64_t late, int64_t goal);
  int64_t earliest_jobs(int64_t slot, std::vector<int>& sources) const;
  void advance(int64_t goal);

  WeightTargets targets_;
  std::vector<int64_t> counts_;
  std::vector<Source> sources_;
  std::vector<Link> links_;
  std::vector<GroupLag> lags_;
  EarliestDeadline eligible_;
  std::vector<int32_t> wheel_;  // sources that wait, by release modulo its size; a power of two
  int64_t wheel_mask_ = 0;
  int64_t position_ = 0;
  int64_t segment_start_ = 0;  // of the segment that holds the slot being filled
  int64_t renewal_ = 0;        // the next slot that needs `renew`: another segment begins, or the tree another base
  Wide scale_ = 1;             // what one sample is in the units of `lags_`
  int64_t seek_steps_ = 0;
  int64_t note_ties_after_ = kNever;
  std::unordered_set<int64_t> broken_ties_;  // deadlines after `note_ties_after_` that more than one class had
};

}  // namespace stagemix
