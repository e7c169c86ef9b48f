// The extension module: every hot loop over integers that Python would be slow at.
// Each has a twin in Python that defines it; see megatron/data.
#include "bindings.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native loops of megatron.data: permutations, epoch indexes, the mixture stream.";
  stagemix::bind_permutation(module);
  stagemix::bind_epoch_index(module);
  stagemix::bind_mixture(module);
  stagemix::bind_index_checks(module);
  stagemix::bind_gather(module);
  stagemix::bind_batch_digest(module);
}
