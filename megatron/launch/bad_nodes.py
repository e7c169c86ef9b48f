"""OUTPUT/bad_nodes.json: hosts on which a run failed, and which of them are left out when it is started again.

    {"excluded": {host: {"reason", "time", "until", "failures"}},
     "suspected": {host: [{"time", "attempt", "code", "reason", "at_once"}, …]},
     "given": {job: [hosts that were added to the job's ExcNodeList]}}

"suspected" is what was seen; "excluded" follows from it, and is written out for people. Failures are forgotten after
`days`: nodes are repaired.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import ConfigError

BAD_NODES = "bad_nodes.json"
DAYS = 7.0
EXCLUDE_AFTER = 2
_DAY = 86400.0


@dataclass(frozen=True)
class NodeFailure:
    """One failure that a host is suspected of. time: unix seconds. at_once: it is broken until somebody repairs it."""

    time: float
    attempt: int
    code: int
    reason: str
    at_once: bool = False


@dataclass
class BadNodes:
    """What the file holds. suspected: by host, oldest first. given: by job, hosts that we added to its exclusions."""

    suspected: dict[str, list[NodeFailure]] = field(default_factory=dict)
    given: dict[str, list[str]] = field(default_factory=dict)

    def note(self, host: str, failure: NodeFailure) -> None:
        """Counts a failure; one of an attempt that is counted already is not counted twice."""
        known = self.suspected.setdefault(host, [])
        if all(one.attempt != failure.attempt for one in known):
            known.append(failure)

    def forget(self, now: float, days: float = DAYS) -> list[str]:
        """Drops failures older than `days`; gives the hosts of which nothing is left."""
        kept = {
            host: [one for one in failures if now - one.time < days * _DAY] for host, failures in self.suspected.items()
        }
        gone = sorted(host for host, failures in kept.items() if not failures)
        self.suspected = {host: failures for host, failures in kept.items() if failures}
        return gone

    def forgive(self, host: str) -> None:
        """Drops all that is known of a host. Raises ConfigError for one of which nothing is known."""
        if host not in self.suspected:
            known = ", ".join(sorted(self.suspected)) or "none"
            raise ConfigError(f"--forgive {host}: nothing is known against it; hosts with failures: {known}")
        del self.suspected[host]

    def excluded(self, after: int = EXCLUDE_AFTER) -> list[str]:
        """Hosts to leave out, the most certain first: broken ones, then by failures, then the latest."""
        worth = {host: (any(f.at_once for f in found), len(found), found[-1].time)
                 for host, found in self.suspected.items()}  # fmt: skip
        bad = [host for host, (at_once, count, _) in worth.items() if at_once or count >= after]
        return sorted(bad, key=lambda host: (*(-value for value in worth[host]), host))

    def to_json(self, after: int = EXCLUDE_AFTER, days: float = DAYS) -> dict[str, Any]:
        """The content of the file."""
        excluded = {}
        for host in self.excluded(after):
            found = self.suspected[host]
            excluded[host] = {
                "reason": found[-1].reason,
                "time": found[-1].time,
                "until": self._until(host, after, days),
                "failures": len(found),
            }
        suspected = {host: [asdict(one) for one in self.suspected[host]] for host in sorted(self.suspected)}
        return {"excluded": excluded, "suspected": suspected, "given": self.given}

    def _until(self, host: str, after: int, days: float) -> float:
        """When failures are forgotten to such a number that the host is used again."""
        found = self.suspected[host]
        enough = [one.time for one in found if one.at_once]
        if len(found) >= after:
            enough.append(sorted(one.time for one in found)[-after])
        return max(enough) + days * _DAY


def read_bad_nodes(output: Path) -> BadNodes:
    """What is known of hosts; nothing where the file is not there. Raises ConfigError for a damaged one."""
    path = output / BAD_NODES
    return _nodes_of(path, _record_of(path))


def _record_of(path: Path) -> Any:
    """The file's JSON; one that says nothing where it is not there. Raises ConfigError."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {"suspected": {}}
    except ValueError as error:
        raise _damaged(path, error) from None


def _nodes_of(path: Path, record: Any) -> BadNodes:
    """Raises ConfigError."""
    try:
        suspected = {
            str(host): [
                NodeFailure(
                    float(one["time"]),
                    int(one["attempt"]),
                    int(one["code"]),
                    str(one["reason"]),
                    one.get("at_once") is True,
                )  # fmt: skip
                for one in failures
            ]
            for host, failures in record["suspected"].items()
        }
        given = {str(job): [str(host) for host in hosts] for job, hosts in record.get("given", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    return BadNodes({host: failures for host, failures in suspected.items() if failures}, given)


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: not a list of bad nodes: {error!r:.120}: mend it, or remove it: all nodes are then used again"
    )


def write_bad_nodes(output: Path, nodes: BadNodes, after: int = EXCLUDE_AFTER, days: float = DAYS) -> None:
    """Replaces the file in one rename. OSError."""
    content = json.dumps(nodes.to_json(after, days), indent=1) + "\n"
    write_whole(output / BAD_NODES, content.encode())


def set_aside_damaged(output: Path) -> Path:
    """Moves a damaged file out of the way; its new path. OSError."""
    path = output / BAD_NODES
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    return aside


def excluded_hosts(output: str | Path, now: float | None = None) -> list[str]:
    """Hosts that the next submission of a run should leave out (sbatch --exclude), the most certain first: those that
    the last `requeue` excluded, and that are not forgotten since. [] where nothing is known.

    now: unix seconds. Raises ConfigError for a damaged bad_nodes.json.
    """
    path = Path(output) / BAD_NODES
    record = _record_of(path)
    _nodes_of(path, record)  # the whole file is to be sound
    try:
        until = {str(host): float(about["until"]) for host, about in record.get("excluded", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    at = time.time() if now is None else now
    return [host for host, end in until.items() if at < end]


def affordable(wanted: Iterable[str], usable: Collection[str], needed: int, required: Collection[str]) -> list[str]:
    """Those of `wanted`, in their order, that can be left out so that of the `usable` nodes as many as are `needed`
    stay. Nodes that the job asks for by name are `required`, and never left out."""
    left = set(usable)
    taken = []
    for host in wanted:
        if host in required:
            continue
        if host in left:
            if len(left) <= needed:
                continue
            left.discard(host)
        taken.append(host)
    return taken
