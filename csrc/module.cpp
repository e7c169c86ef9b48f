// The extension module: every hot loop over integers that Python would be slow at.
// Each has a twin in Python that defines it; see megatron/data.
//
// All files are one translation unit: pybind11's headers take far longer to compile than the loops.
#include "bindings.h"

#include "batch_digest.cpp"
#include "epoch_index.cpp"
#include "gather.cpp"
#include "index_checks.cpp"
#include "mixture.cpp"
#include "mixture_seek.cpp"
#include "permutation.cpp"
#include "piece_table.cpp"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native loops of megatron.data: permutations, epoch indexes, the mixture stream.";
  stagemix::bind_permutation(module);
  stagemix::bind_epoch_index(module);
  stagemix::bind_mixture(module);
  stagemix::bind_index_checks(module);
  stagemix::bind_gather(module);
  stagemix::bind_batch_digest(module);
}
