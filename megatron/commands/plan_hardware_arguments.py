"""What `stagemix plan` may be told about hardware. Light: a plan without --hardware loads nothing of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """What the command line says of hardware. top: layouts that a search shows; None: no search. bandwidth: bytes a
    second that files are written with, all processes together; None: as a first start assumes."""

    hardware: str
    processes: int
    efficiency: Path | None
    top: int | None
    margin: float
    bandwidth: float | None


def add_hardware_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the hardware part."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--hardware",
        metavar="NAME",
        help="h100, h200, a100, a100-40, b200, or a .toml file that describes another: memory, step time, hours, disk",
    )
    group.add_argument("--nodes", type=int, metavar="N", help="instead of --processes: so many whole nodes of them")
    group.add_argument(
        "--efficiency", type=Path, metavar="RUN", help="plan with what this run on such hardware really took"
    )
    group.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=10,
        metavar="TOP",
        help="also the TOP (10) fastest layouts over all the processes, with the --set words that give each",
    )
    group.add_argument(
        "--memory-margin",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of each accelerator's memory that stays free (default %(default)g): for the allocator's gaps and what "
        "the planner does not know",
    )
    group.add_argument(
        "--disk-bandwidth",
        type=float,
        metavar="GB/S",
        help="that checkpoints are written with, all processes together (default: what is assumed of a node, times "
        "nodes)",
    )


def asked_of(parser: argparse.ArgumentParser, args: argparse.Namespace, processes: int) -> Asked | None:
    """The hardware arguments, checked; None without --hardware. processes: of the layout, unless --nodes says."""
    if args.hardware is None:
        for name in ("nodes", "efficiency", "search", "disk_bandwidth"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} needs --hardware, for example --hardware h100")
        return None
    if args.search is not None and args.search < 1:
        parser.error(f"--search {args.search}: at least one layout is to be shown")
    if not 0 <= args.memory_margin < 1:
        parser.error(f"--memory-margin {args.memory_margin:g}: it is a share of the memory, from 0 to below 1")
    if args.disk_bandwidth is not None and not 0 < args.disk_bandwidth < float("inf"):
        parser.error(f"--disk-bandwidth {args.disk_bandwidth:g}: gigabytes a second, above 0")
    if args.search is not None and args.processes is None and args.nodes is None:
        parser.error("--search needs to know over how many processes: say --processes or --nodes")
    bandwidth = args.disk_bandwidth * 1e9 if args.disk_bandwidth else None
    return Asked(args.hardware, processes, args.efficiency, args.search, args.memory_margin, bandwidth)


def processes_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int | None:
    """By --processes or --nodes; None where neither is said."""
    if args.nodes is None:
        return int(args.processes) if args.processes is not None else None
    if args.processes is not None:
        parser.error("--nodes and --processes both say how many processes there are: leave one out")
    if args.nodes < 1:
        parser.error(f"--nodes {args.nodes}: at least one is needed")
    if args.hardware is None:
        parser.error("--nodes needs --hardware, for example --hardware h100, which says how many processes a node has")
    from megatron.planner.hardware import find_accelerator

    return int(args.nodes) * find_accelerator(args.hardware).processes_per_node
