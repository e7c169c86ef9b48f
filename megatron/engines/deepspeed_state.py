"""Masters and optimizer state inside DeepSpeed: written, restored and reset without its own checkpoints.

DeepSpeed's state access (safe_get_full_*, safe_set_full_*) gathers whole tensors and leaves the step count and the
copies that compute to the caller. Here each rank reads and writes the runs that it holds, nothing is sent, and the zero
state is made at the start, so that a fresh engine can be restored without a step of pretence.

What is used of DeepSpeed's insides was tried at the version that requirements/run.txt pins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorShard, TensorSource
from megatron.config.errors import CheckpointError
from megatron.config.schema import OptimizerSection
from megatron.engines.deepspeed_pieces import Piece
from megatron.engines.held import check_names
from megatron.optim.build import check_state_names, state_keys


class DeepSpeedState:
    """What one rank holds of weights and optimizer state. began: whether an update has been made or restored."""

    def __init__(
        self,
        engine: Any,
        zero_stage: int,
        optimizer: OptimizerSection,
        pieces: Sequence[Piece],
        whole: Mapping[str, Tensor],
        refresh_copies: Callable[[], None],
    ) -> None:
        """engine: what deepspeed.initialize gave. whole: all parameters of the model, without memory.
        refresh_copies: casts the masters into what computes, where DeepSpeed does not (ZeRO 0)."""
        self._engine = engine
        self._stage = zero_stage
        self._inner = engine.basic_optimizer
        self._section = optimizer
        self._pieces = list(pieces)
        self._whole = whole
        self._refresh_copies = refresh_copies
        # DeepSpeed's CPU Adam counts steps in Python and powers of the betas in C++.
        self._on_host = hasattr(self._inner, "ds_opt_adam")
        self.began = False
        self._begin()

    def model_state(self) -> dict[str, list[TensorShard]]:
        """Float32 masters, each rank's runs as boxes: live views."""
        return {piece.name: shards for piece in self._pieces if (shards := piece.shards())}

    def load_model_state(self, source: TensorSource) -> None:
        """Copies weights in; nothing is changed where anything does not fit."""
        check_names(self._whole, source)
        for piece in self._pieces:
            _check(source, piece.name, piece, "weight")
        for piece in self._pieces:
            piece.read(source, piece.name)
        self._refresh()

    def optimizer_state(self) -> dict[str, list[TensorShard]]:
        """ "<parameter>/<key>"; empty before the first update."""
        state: dict[str, list[TensorShard]] = {}
        for piece in self._pieces if self.began else ():
            for key in self._keys(piece):
                shards = piece.shards(key)
                if shards:
                    state[f"{piece.name}/{key}"] = shards
            if self._counts(piece) and piece.begins:
                steps = torch.tensor(float(self._steps()), dtype=torch.float32)
                state[f"{piece.name}/step"] = [TensorShard.whole(steps)]
        return state

    def load_optimizer_state(self, source: TensorSource) -> None:
        """Takes over moments and the step count, of which DeepSpeed keeps one for all parameters."""
        names = set(source.names())
        check_state_names(names, self._whole, self._section)
        if not names:
            self.reset_optimizer()
            return
        for piece in self._pieces:
            for key in self._keys(piece):
                _check(source, f"{piece.name}/{key}", piece, "optimizer state")
        steps = {float(source.read(f"{p.name}/step", (), ())) for p in self._pieces if self._counts(p)}
        if len(steps) > 1:
            raise CheckpointError(
                f"optimizer state has different step counts ({', '.join(f'{n:g}' for n in sorted(steps))}): DeepSpeed "
                'keeps one for all parameters; resume with parallel.engine = "torch"'
            )
        for piece in self._pieces:
            for key in self._keys(piece):
                piece.read(source, f"{piece.name}/{key}", key)
        self._set_steps(int(steps.pop()) if steps else 0)
        self.began = True

    def reset_optimizer(self) -> None:
        """Zeroes moments and step count, which to AdamW and SGD are those of a first step."""
        with torch.no_grad():
            for state in self._inner.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()
        self._set_steps(0)
        self.began = False

    def _keys(self, piece: Piece) -> list[str]:
        return [key for key in state_keys(self._section, piece.name, len(piece.local)) if key != "step"]

    def _counts(self, piece: Piece) -> bool:
        return "step" in state_keys(self._section, piece.name, len(piece.local))

    def _begin(self) -> None:
        """Makes zero state of the tensors that the inner optimizer updates."""
        if self._stage == 3:
            updated = list(self._engine.optimizer.fp32_partitioned_groups_flat)
        else:
            updated = [tensor for group in self._inner.param_groups for tensor in group["params"]]
        for tensor in updated:
            keys = state_keys(self._section, "", 1)
            state: dict[str, Any] = {key: torch.zeros_like(tensor.detach()) for key in keys if key != "step"}
            if "step" in keys:
                state["step"] = 0 if self._on_host else torch.zeros((), dtype=torch.float32, device=tensor.device)
            if state:
                self._inner.state[tensor] = state
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> int:
        return int(next(iter(self._inner.state.values()))["step"])

    def _set_steps(self, steps: int) -> None:
        for state in self._inner.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(float(steps))
            elif "step" in state:
                state["step"] = steps
        if self._on_host and steps:
            # The C++ side's powers of the betas go on by one product a step and are made anew where the count jumps.
            # An update of nothing brings them to where the undisturbed run has them, to the last bit.
            (first, second), nothing = self._section.betas, [torch.zeros(1) for _ in range(4)]
            update = self._inner.ds_opt_adam.adam_update
            update(self._inner.opt_id, steps, 0.0, first, second, 1.0, 0.0, True, *nothing)

    def _refresh(self) -> None:
        """Brings the weights that compute up to the masters."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            self._refresh_copies()
        elif self._stage < 3:
            optimizer.update_lp_params()
        else:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._gather_persistent()

    def after_dropped_step(self) -> None:
        """ZeRO 3 lets go of all weights before a step, and forgets, where it drops the step, to gather those that are
        to stay gathered: its order of fetching would then fail ("tracing error") in the next backward pass."""
        if self._stage == 3:
            self._gather_persistent()

    def _gather_persistent(self) -> None:
        persistent = self._engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def _check(source: TensorSource, name: str, piece: Piece, what: str) -> None:
    shape, dtype = tuple(source.shape(name)), source.dtype(name)
    if shape != piece.shape or torch.promote_types(dtype, torch.float32) != torch.float32:
        raise CheckpointError(
            f"{what} {name} is {dtype} {list(shape)}, the model needs torch.float32 {list(piece.shape)}"
        )
