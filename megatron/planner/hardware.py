"""Accelerators that a plan can be made for, and what share of a data sheet a training step reaches.

An accelerator's figures are its maker's. An `Efficiency` is what programs get of them: published by others, or fitted
to published training runs, as each field says. `measured_efficiency` replaces all of it by one run's own ratio.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.config.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One device of a cluster.

    memory_bytes: of the device. A GPU reports some 6 % more than the gigabytes on its data sheet, which are what stands
    here: the difference is about what a CUDA context and NCCL's buffers take.
    peak_flops: dense operations a second in bf16, a multiplication and an addition being two. fp32_flops: in float32,
    without TF32, which torch does not use unasked.
    memory_bandwidth: bytes a second. link_bandwidth: bytes a second that a device sends to others of its node, in one
    direction. network_bandwidth: that it sends to other nodes. processes_per_node: devices that share a node.
    sources: where the figures are from, in words.
    products, attention: shares of peak_flops that large matrix products, and fused attention over long sequences, reach
    in training, both passes together; they are the default of `Efficiency`.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    processes_per_node: int
    sources: str
    products: float = 0.73
    attention: float = 0.36

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "sources") and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"accelerator {self.name}: {field.name} = {value} must be a number above 0")
            if field.name in ("products", "attention") and value > 1:
                raise ConfigError(f"accelerator {self.name}: {field.name} = {value} is a share, at most 1")

    def operations(self, precision: str) -> float:
        """Operations a second at most of matrix products in "fp64", "fp32", or anything else as bf16. fp64: half of
        float32's, as on all devices here."""
        return {"fp64": self.fp32_flops / 2, "fp32": self.fp32_flops}.get(precision, self.peak_flops)


@dataclass(frozen=True)
class Efficiency:
    """What a training step gets of an accelerator. Shares are of the data sheet's figures, between 0 and 1.

    "Fitted": chosen, one number for all, so that the rows of tests/planner/published_rows.py that say `fitted` come out
    (Megatron-LM's H100 and llm-foundry's A100 ones); docs/planner.md has what the others then give.

    products: of peak operations, by matrix products whose sizes are all large; fitted. The most that others have
        published of an H100 in bf16 is 794 of 989 TFLOP/s, in products alone.
    half_size: a product [m, k] x [k, n] takes 1 + half_size (1/m + 1/k + 1/n) times as long as that share gives;
        fitted.
    attention: of peak operations, by fused attention, both passes; fitted. On an H100 FlashAttention 3 was published
        with 685 TFLOP/s forward and 539 backward, FlashAttention 2 with 333 and 318. attention_half_length: attention
        over T positions takes 1 + attention_half_length / T times as long; fitted.
    memory: of memory bandwidth, by elementwise operations; fitted. Copies were published with 4.3 of 4.8 TB/s.
    links, network: of bandwidth within a node and between nodes, by collectives of large messages; fitted.
    latency: seconds that a collective takes besides, for each doubling of its ranks; an assumption.
    overlap: share of communication beside computation that really is hidden, since both want the same device; fitted.
    layer_launch: seconds in which the host launches one layer's forward and backward pass: no layer is faster. An
        assumption, of about 80 launches of 5 microseconds.
    step: what the predicted time of a step is multiplied by at last; 1, or measured.
    words: where this is from.
    """

    products: float = 0.73
    half_size: float = 150.0
    attention: float = 0.36
    attention_half_length: float = 600.0
    memory: float = 0.70
    links: float = 0.85
    network: float = 0.92
    latency: float = 10e-6
    overlap: float = 0.9
    layer_launch: float = 400e-6
    step: float = 1.0
    words: str = "the planner's own, fitted to published runs"

    def __post_init__(self) -> None:
        for name in ("products", "attention", "memory", "links", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"efficiency {name} = {getattr(self, name)} must be a share above 0, at most 1")
        for name in ("half_size", "attention_half_length", "latency", "overlap", "layer_launch"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"efficiency {name} = {getattr(self, name)} must be a number, and not negative")
        if self.overlap > 1:
            raise ConfigError(f"efficiency overlap = {self.overlap} is a share, at most 1")
        if not 0 < self.step < math.inf:
            raise ConfigError(f"efficiency step = {self.step} must be a number above 0")


@lru_cache(maxsize=64)
def default_efficiency(accelerator: Accelerator) -> Efficiency:
    """What training is expected to get of an accelerator where nothing was measured."""
    return Efficiency(products=accelerator.products, attention=accelerator.attention)


_GB = 10**9
_GIGABITS = 1e9 / 8

HARDWARE: MappingProxyType[str, Accelerator] = MappingProxyType(
    {
        "a100-40": Accelerator(
            "A100 SXM 40 GB",
            memory_bytes=40 * _GB,
            peak_flops=312e12,
            fp32_flops=19.5e12,
            memory_bandwidth=1.555e12,
            link_bandwidth=300e9,
            network_bandwidth=200 * _GIGABITS,
            processes_per_node=8,
            sources="nvidia.com/en-us/data-center/a100 (NVLink: 600 GB/s both ways); network as of a DGX A100, 8 x 200 "
            "Gb/s: an assumption about your cluster",
            products=0.76,
            attention=0.48,
        ),
        "a100": Accelerator(
            "A100 SXM 80 GB",
            memory_bytes=80 * _GB,
            peak_flops=312e12,
            fp32_flops=19.5e12,
            memory_bandwidth=2.039e12,
            link_bandwidth=300e9,
            network_bandwidth=200 * _GIGABITS,
            processes_per_node=8,
            sources="nvidia.com/en-us/data-center/a100 (NVLink: 600 GB/s both ways); network as of a DGX A100, 8 x 200 "
            "Gb/s: an assumption about your cluster",
            products=0.76,
            attention=0.48,
        ),
        "h100": Accelerator(
            "H100 SXM 80 GB",
            memory_bytes=80 * _GB,
            peak_flops=989e12,
            fp32_flops=67e12,
            memory_bandwidth=3.35e12,
            link_bandwidth=450e9,
            network_bandwidth=400 * _GIGABITS,
            processes_per_node=8,
            sources="nvidia.com/en-us/data-center/h100 (bf16 without sparsity: half of what is printed; NVLink: 900 "
            "GB/s both ways); network as of a DGX H100, 8 x 400 Gb/s: an assumption about your cluster",
        ),
        "h200": Accelerator(
            "H200 SXM 141 GB",
            memory_bytes=141 * _GB,
            peak_flops=989e12,
            fp32_flops=67e12,
            memory_bandwidth=4.8e12,
            link_bandwidth=450e9,
            network_bandwidth=400 * _GIGABITS,
            processes_per_node=8,
            sources="nvidia.com/en-us/data-center/h200 (bf16 without sparsity: half of what is printed; NVLink: 900 "
            "GB/s both ways); network as of a DGX H200, 8 x 400 Gb/s: an assumption about your cluster",
        ),
        "b200": Accelerator(
            "B200 180 GB",
            memory_bytes=180 * _GB,
            peak_flops=2250e12,
            fp32_flops=80e12,
            memory_bandwidth=8e12,
            link_bandwidth=900e9,
            network_bandwidth=400 * _GIGABITS,
            processes_per_node=8,
            sources="nvidia.com/en-us/data-center/dgx-b200 and docs.nvidia.com/dgx/dgxb200-user-guide, an eighth of a "
            "DGX B200 (1,440 GB, 64 TB/s, NVLink 14.4 TB/s both ways, 8 x 400 Gb/s); operations as of HGX B200 at "
            "1,000 W, glennklockwood.com/garden/processors/B200; network: an assumption about your cluster; shares "
            "reached: an H100's, since no published bf16 run was found to fit them to",
        ),
    }
)
"""By the name that --hardware takes."""


def find_accelerator(name: str) -> Accelerator:
    """One of `HARDWARE`, or the one that a file ending in .toml describes (`read_accelerator`). Raises ConfigError."""
    if name.endswith(".toml"):
        return read_accelerator(Path(name))
    if (found := HARDWARE.get(name.lower())) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), HARDWARE, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"--hardware {name!r} is unknown: {hint}There are {', '.join(HARDWARE)}; or name a .toml file with "
        f"{', '.join(field.name for field in fields(Accelerator))}"
    )


def read_accelerator(path: Path) -> Accelerator:
    """An accelerator of one's own: a TOML file with its fields, or with like = "h100" and what is different.

    Sizes are plain numbers in bytes and bytes or operations a second. Raises ConfigError that names the file, the key,
    its value and what is needed.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the accelerator cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    like = given.pop("like", None)
    if like is not None and like not in HARDWARE:
        raise ConfigError(f"{path}: like = {like!r} is unknown: set one of {', '.join(HARDWARE)}, or leave it out")
    kinds = {field.name: str(field.type) for field in fields(Accelerator)}
    for key, value in given.items():
        _check_field(path, key, value, kinds)
    if like is not None:
        return _made(path, {**vars(HARDWARE[like]), "name": path.stem, "sources": str(path), **given})
    given = {"name": path.stem, "sources": str(path), **given}
    if missing := [name for name in kinds if name not in given]:
        raise ConfigError(
            f'{path} lacks {", ".join(missing)}: say them, or set like = "h100" and say what is different'
        )
    return _made(path, given)


def _check_field(path: Path, key: str, value: Any, kinds: dict[str, str]) -> None:
    if key not in kinds:
        near = difflib.get_close_matches(key, [*kinds, "like"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{path}: {key} is unknown: {hint}There are like, {', '.join(kinds)}")
    wanted: tuple[type, ...] = {"str": (str,), "int": (int,)}.get(kinds[key], (int, float))
    if not isinstance(value, wanted) or isinstance(value, bool):
        words = {"str": "words", "int": "a whole number"}.get(kinds[key], "a number")
        raise ConfigError(f"{path}: {key} = {value!r} must be {words}")


def _made(path: Path, given: dict[str, Any]) -> Accelerator:
    try:
        return Accelerator(**given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def with_network(accelerator: Accelerator, gigabits: float) -> Accelerator:
    """The same on a network of so many gigabits a second and device."""
    return replace(accelerator, network_bandwidth=gigabits * _GIGABITS)
