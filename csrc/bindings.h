// What each source file adds to the extension module megatron.data._native.
#pragma once

#include <pybind11/pybind11.h>

namespace stagemix {

void bind_permutation(pybind11::module_& module);
void bind_epoch_index(pybind11::module_& module);
void bind_mixture(pybind11::module_& module);
void bind_index_checks(pybind11::module_& module);
void bind_gather(pybind11::module_& module);
void bind_batch_digest(pybind11::module_& module);

}  // namespace stagemix
