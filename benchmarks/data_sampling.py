"""Rows 3 to 7 of the data benchmark: indexes, second arms, the blend, resuming, reading samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_measure import Figure, MeasurementFailed, Row, in_turns
from data_setup import Setup, both, gathered

SEQ_LENGTH = 2048


def index(setup: Setup) -> Row:
    """Row 3: the index of one source, built and published, one epoch and three."""
    documents = setup.sizes.documents
    prefix, warm = str(setup.work / f"web-{documents}"), str(setup.work / "web-1000")
    made = setup.ours("synthesise", {"lengths": [[prefix, documents, 0], [warm, 1000, 0]]})
    tokens = made.values["tokens"][prefix]
    row = Row(
        "index", f"index of {documents:,} documents, {tokens / 1e9:.1f}B tokens, sequence {SEQ_LENGTH}, published"
    )

    def arguments(side: str, epochs: int) -> dict[str, Any]:
        cache = str(setup.fresh(f"cache-{side}"))
        shape = {"tokens": tokens, "epochs": epochs, "seq_length": SEQ_LENGTH}
        return {"prefix": prefix, "warm": warm, "cache": cache, **shape}

    for epochs in (1, 3):
        taken = in_turns(
            setup.sides(
                lambda n, epochs=epochs: setup.ours("index", arguments("ours", epochs)),  # type: ignore[misc]
                lambda n, epochs=epochs: setup.theirs("index", arguments("peer", epochs)),  # type: ignore[misc]
            ),
            setup.repeat,
        )
        row.note_loads(taken)
        name = f"{epochs} epoch{'s' if epochs > 1 else ''}"
        goal = "≥ 2.5x" if epochs == 1 else ""
        row.figures += [
            Figure(f"{name}: open, build, publish", "s", *both(taken, "seconds"), goal),
            Figure(f"{name}: of this, opening and checking the file", "s", *both(taken, "open_seconds")),
            Figure(f"{name}: bytes on disk", "MB", *both(taken, "bytes", 1e-6), "≥ 50x" if epochs == 1 else ""),
            Figure(f"{name}: memory over what was resident", "MB", *both(taken, "memory_mb")),
        ]
    row.remarks.append("imports and a first small build are not counted on either side; .idx in the page cache")
    row.remarks.append(
        "Megatron-LM: BlendedMegatronDatasetBuilder over GPTDataset, document, sample and shuffle index saved; "
        "ours: every epoch's own index saved; opening checks the .idx and takes its fingerprint, a hash of all of it"
    )
    return row


def second_arm(setup: Setup) -> Row:
    """Row 4: another arm of an ablation over the same sources, with other weights and another horizon."""
    documents = setup.sizes.arm_documents
    prefixes = [str(setup.work / f"web-{documents}-{seed}") for seed in (1, 2)]
    setup.ours("synthesise", {"lengths": [[prefix, documents, seed] for seed, prefix in enumerate(prefixes, 1)]})
    batch = setup.sizes.batch
    samples = documents // 5 // batch * batch
    row = Row(
        "second-arm", f"the second arm of a study: two sources of {documents:,} documents, other weights, horizon"
    )

    def arguments(side: str) -> dict[str, Any]:
        return {
            "prefixes": prefixes, "cache": str(setup.fresh(f"cache-{side}")), "folder": str(setup.work / "run"),
            "batch": batch,
            "first": {"weights": [0.8, 0.2], "samples": samples},
            "second": {"weights": [0.5, 0.5], "samples": samples + samples // 2 // batch * batch},
        }  # fmt: skip

    taken = in_turns(
        setup.sides(
            lambda n: setup.ours("second_arm", arguments("ours")),
            lambda n: setup.theirs("second_arm", arguments("peer")),
        ),
        setup.repeat,
    )
    row.note_loads(taken)
    row.figures = [
        Figure("first arm, to its first batch", "s", *both(taken, "first_seconds")),
        Figure("second arm, to its first batch", "s", *both(taken, "seconds")),
        Figure("index files that the second arm wrote", "", *both(taken, "files_added"), "no build"),
        Figure("their size", "MB", *both(taken, "bytes_added", 1e-6), "0"),
    ]
    row.checks.append("ours: name, inode, size and time of every file in the cache are the same after the second arm")
    row.remarks.append("Megatron-LM to its built datasets, ours to a global batch of samples with their pieces")
    return row


def units_of(sources: int) -> list[int]:
    """Random weights as parts of a million that sum to it, each at least one."""
    generator = random.Random(sources)
    cuts = sorted(generator.sample(range(1, 10**6), sources - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, 10**6], strict=True)]


def blend(setup: Setup) -> Row:
    """Row 5: which source gives which sample."""
    samples, far = setup.sizes.blend_samples, setup.sizes.far
    row = Row(
        "blend", f"blend of {samples:.0e} samples, and any of {far:.0e} samples".replace("e+0", "e").replace("e+", "e")
    )
    goals = {2: "≤ 20 ns", 8: "≤ 40 ns", 64: "≤ 60 ns"}
    for sources in setup.sizes.blend_sources:
        units = units_of(sources)
        ours = {"units": units, "samples": samples, "far": far, "batch": setup.sizes.batch}
        peer = {"samples": samples, "weights": [unit / 10**6 for unit in units]}
        taken = in_turns(
            setup.sides(
                lambda n, a=ours: setup.ours("blend", a),  # type: ignore[misc]
                lambda n, a=peer: setup.theirs("blend", a),  # type: ignore[misc]
            ),
            setup.repeat,
        )
        row.note_loads(taken)
        seconds, name = gathered(taken, "peer", "seconds"), f"{sources} sources"
        running = [value / samples * 1e9 for value in seconds], gathered(taken, "ours", "ns_a_sample")
        row.figures += [
            Figure(f"{name}: before the first sample", "s", seconds, gathered(taken, "ours", "first_seconds")),
            Figure(f"{name}: a sample, running on", "ns", *running, goals.get(sources, "")),
            Figure(f"{name}: memory", "MB", *both(taken, "memory_mb"), "O(sources)"),
        ]
        row.figures += [_seek(setup, row, units, ramp) for ramp in (False, True)]
    row.checks += [
        "ours: after every seek each source's count is within one sample of its target, in exact fractions",
        "ours: a stage walked to sample 123,457 and one sought there have the same counts and go on alike",
    ]
    row.remarks.append(
        f"ours takes batches of {setup.sizes.batch}, as training does; seeks are from a newly opened stage, the "
        "slowest of several places; Megatron-LM's build_blending_indices fills its two arrays whole before the first "
        "sample"
    )
    return row


def _seek(setup: Setup, row: Row, units: Sequence[int], ramp: bool) -> Figure:
    far = setup.sizes.far
    generator = random.Random(1)
    places = [1, *sorted(generator.randrange(far) for _ in range(3)), far - 1]
    arguments = {"units": units, "far": far, "places": places, "ramp": ramp}
    what = f"{len(units)} sources: seek to any of {far:.0e} samples, {'a ramp' if ramp else 'constant'}".replace(
        "e+", "e"
    )
    goal = "< 1 s" if ramp else "< 0.1 s"
    try:
        outcomes = {"ours": [setup.ours("seek", arguments, limit=60) for _ in range(setup.repeat)]}
    except MeasurementFailed as error:
        row.failed = row.failed or str(error)
        return Figure(what, "s", [], [], goal)
    row.note_loads(outcomes)
    return Figure(what, "s", [], gathered(outcomes, "ours", "seconds"), goal)


def resume(setup: Setup) -> Row:
    """Row 6: the position after very many samples."""
    at, batch, documents = setup.sizes.resume_at, setup.sizes.batch, setup.sizes.arm_documents
    at = at // batch * batch
    prefixes = [str(setup.work / f"web-{documents}-{seed}") for seed in (1, 2)]
    arrays = [str(setup.work / f"blend-{at}-{kind}.npy") for kind in ("int16", "int64")]
    warm, cache = str(setup.work / "web-1000"), str(setup.fresh("cache-ours"))
    lengths = [[prefix, documents, seed] for seed, prefix in enumerate(prefixes, 1)] + [[warm, 1000, 0]]
    wanted = [[path, at, kind] for path, kind in zip(arrays, ("int16", "int64"), strict=True)]
    setup.ours("synthesise", {"lengths": lengths, "arrays": wanted if setup.peer else []})
    ours = {
        "prefixes": prefixes, "warm": warm, "cache": cache, "folder": str(setup.work / "run"),
        "ledger": str(setup.work / "ledger.json"), "at": at, "batch": batch,
    }  # fmt: skip
    setup.ours("make_ledger", ours)
    peer = {"sources": arrays[0], "numbers": arrays[1], "at": at, "batch": batch}
    taken = in_turns(
        setup.sides(lambda n: setup.ours("resume", ours), lambda n: setup.theirs("resume", peer)), setup.repeat
    )
    row = Row("resume", f"resume at sample {at:,}, two sources")
    row.note_loads(taken)
    row.figures = [
        Figure("to the next global batch", "s", *both(taken, "seconds"), "< 1 s"),
        Figure("of this, opening the files of the sources", "s", [], gathered(taken, "ours", "open_seconds")),
        Figure("memory over what was resident, peak", "MB", *both(taken, "memory_mb")),
        Figure("memory of its own: document tables of the sources", "MB", [], gathered(taken, "ours", "tables_mb")),
        Figure("memory of its own: mixture, cursors, a batch", "MB", [], gathered(taken, "ours", "own_mb"), "< 10 MB"),
        Figure("index of the blend on disk", "GB", gathered(taken, "peer", "gigabytes"), [0.0 for _ in taken["ours"]]),
    ]
    if setup.peer is not None:
        _without_cache(setup, row, at)
    row.remarks += [
        "Megatron-LM's two arrays are sparse files of the right size, mapped as BlendedDataset maps them on a cache "
        "hit; the entries of one batch are read, its sources' own files and indexes are not opened",
        "ours opens both sources with their checks and fingerprints, reads the ledger, and looks up a batch's pieces",
    ]
    return row


def _without_cache(setup: Setup, row: Row, at: int) -> None:
    """What must come before its mapping, on one rank: the arrays built. Extrapolated, and said so."""
    share = min(1.0, setup.sizes.blend_samples / at)
    built = setup.theirs("blend", {"samples": round(share * at), "weights": [0.8, 0.2]})
    row.note_loads({"peer": [built]})
    row.figures += [
        Figure("its index built: linear from a part", "s", [built.values["seconds"] / share]),
        Figure("memory of that", "MB", [built.values["memory_mb"] / share]),
    ]
    row.remarks.append(
        f"the index was built for {share:.0%} of the samples; its time and memory are that divided by it"
    )


def read(setup: Setup) -> Row:
    """Row 7: one sample of 2048 tokens, warm."""
    documents = setup.sizes.read_documents
    prefixes = [str(setup.work / f"tokens-{documents}-{seed}") for seed in (1, 2)]
    setup.ours("synthesise", {"lengths": [], "tokens": [[p, documents, seed] for seed, p in enumerate(prefixes, 1)]})
    batch = min(setup.sizes.batch, 100)
    count = setup.sizes.read_samples // batch * batch or batch

    def arguments(side: str) -> dict[str, Any]:
        return {
            "prefixes": prefixes, "count": count, "rounds": 3, "batch": batch,
            "cache": str(Path(setup.fresh(f"cache-{side}"))), "folder": str(setup.work / "run"),
        }  # fmt: skip

    taken = in_turns(
        setup.sides(lambda n: setup.ours("read", arguments("ours")), lambda n: setup.theirs("read", arguments("peer"))),
        setup.repeat,
    )
    row = Row("read", f"one sample of {SEQ_LENGTH} tokens, two sources, one process, warm")
    row.note_loads(taken)

    def of(side: str, way: str) -> list[float]:
        return [outcome.values["seconds"][way] * 1e6 for outcome in taken.get(side, [])]

    ours, whole = of("ours", "read"), of("ours", "mixture, cursor, look-up, read")
    row.figures = [
        Figure(
            "GPTDataset, no mask; ours with source id and bounds", "µs", of("peer", "single, no mask"), ours, "≤ 6 µs"
        ),
        Figure(
            "BlendedDataset, no mask; ours with mixture, cursors and look-up",
            "µs",
            of("peer", "blended, no mask"),
            whole,
        ),
        Figure("the same with document bounds (cu_seqlens)", "µs", of("peer", "blended, cu_seqlens"), whole),
        Figure(
            "the same with its default mask, kept from sample to sample",
            "µs",
            of("peer", "blended, default mask"),
            whole,
        ),
        Figure("the same through its DataLoader", "µs", of("peer", "blended, default mask, DataLoader"), whole),
    ]
    row.remarks.append(
        "Megatron-LM's defaults: create_attention_mask on, reset_position_ids, reset_attention_mask and eod_mask_loss "
        "off; its DataLoader here in the same process, batches of 8"
    )
    return row
