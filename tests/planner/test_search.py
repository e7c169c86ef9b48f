"""The search against every layout by force; the nearest layout against all that are nearer; published layouts."""

from __future__ import annotations

from functools import cache

import pytest
from planner.layouts_by_force import Forced, every, place, workload
from planner.published_rows import ROWS, Row

from megatron.config.layout_checks import BatchShape
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.planner.layout_fit import Place, floor_bytes, memory_of, needed_bytes, telling_ranks, time_of
from megatron.planner.nearest import KEYS, nearest, settings
from megatron.planner.search import Family, Fewest, any_fits, family_of, fewest_processes, rounded, search
from megatron.planner.search_space import Choice, Workload, accepted, choices, recompute_kinds, simplicity

TIGHT, WIDE = 9.0, 60.0
PROCESSES = 8


@cache
def forced(data_shard: str = "none") -> list[Forced]:
    return every(workload(data_shard=data_shard), PROCESSES, place(WIDE))


def ranking(found: list[Forced], capacity: float) -> list[tuple[Family, float]]:
    """The families of those that fit, with their fastest steps, the fastest family first."""
    best: dict[Family, tuple[object, ...]] = {}
    for one in found:
        if one.needed <= capacity:
            key = (rounded(one.step.total), *simplicity(one.choice))
            family = family_of(one.choice)
            best[family] = min(best.get(family, key), key)
    ordered = sorted(best.items(), key=lambda item: item[1])
    return [(family, key[0]) for family, key in ordered]  # type: ignore[misc]


@pytest.mark.parametrize("gigabytes", [6.0, TIGHT, 14.0, WIDE])
def test_the_ranking_is_that_of_every_layout(gigabytes: float) -> None:
    where = place(gigabytes)
    expected = ranking(forced(), where.capacity)
    result = search(workload(), PROCESSES, where, top=10_000)
    assert [(family_of(one.choice), one.seconds) for one in result.best] == expected
    for top in (1, 4, 10):
        few = search(workload(), PROCESSES, where, top=top)
        assert [one.choice for one in few.best] == [one.choice for one in result.best[:top]]
    print(f"{gigabytes} GB: {len(expected)} families fit, of {result.looked} layouts looked at")


def test_what_it_says_of_a_layout_is_what_the_parts_say() -> None:
    by_choice = {(one.choice.section, one.choice.rows): one for one in forced()}
    for one in search(workload(), PROCESSES, place(TIGHT), top=100).best:
        other = by_choice[one.choice.section, one.choice.rows]
        assert (one.needed, one.step) == (other.needed, other.step)


def test_where_nothing_fits_the_nearest_misses_need_least() -> None:
    where = place(3.0)
    result = search(workload(), PROCESSES, where, misses=4)
    least: dict[Family, int] = {}
    for one in forced():
        least[family_of(one.choice)] = min(least.get(family_of(one.choice), one.needed), one.needed)
    assert not result.best and min(least.values()) > where.capacity
    assert [one.needed for one in result.misses] == sorted(least.values())[:4]


def test_bounds_from_below_are_bounds() -> None:
    """By which the search leaves layouts out: bytes without activations, and steps without recompute."""
    work, where = workload(), place(WIDE)
    fewest: dict[ParallelSection, int] = {}
    for one in forced():
        plain = one.choice.with_recompute(("none", "attention", None))
        assert floor_bytes(work, plain) <= one.needed
        assert time_of(work, plain, where).total <= one.step.total * (1 + 1e-12)
        fewest[one.choice.section] = 0
    assert len(fewest) > 500


def test_of_alike_pipeline_ranks_the_telling_ones_are_the_fullest() -> None:
    work = workload(batch=64, layers=16)
    seen = 0
    for choice in choices(work, 32, 4):
        if choice.section.pipeline < 4 or choice.section.tensor > 1 or not accepted(work, choice):
            continue
        for each in (choice, *(choice.with_recompute(kind) for kind in recompute_kinds(choice.section))):
            sizes = [memory_of(work, each, rank, work.main).total for rank in range(each.section.pipeline)]
            count = work.main.global_batch_size // each.layout.data // each.rows
            told = telling_ranks(work.shape, each.section, count)
            assert max(sizes[rank] for rank in told) == max(sizes), each
            seen += 1
    assert seen > 200


def changed(choice: Choice, work: Workload) -> tuple[int, ...]:
    """Places in the order of docs/parallel.md of what is another than in the config."""
    order = ("data_shard", "data_replicate", "micro_batch_size", "recompute", "tensor", "pipeline", "context")
    assert order == tuple(KEYS)
    now, then = work.section, choice.section
    differs = {
        "data_shard": now.data_shard != then.data_shard,
        "data_replicate": now.data_replicate != then.data_replicate,
        "micro_batch_size": work.train.micro_batch_size != choice.rows,
        "recompute": (now.recompute, now.recompute_policy, now.recompute_layers)
        != (then.recompute, then.recompute_policy, then.recompute_layers),
        "tensor": (now.tensor, now.sequence) != (then.tensor, then.sequence),
        "pipeline": (now.pipeline, now.schedule, now.virtual) != (then.pipeline, then.schedule, then.virtual),
        "context": now.context != then.context,
    }
    return tuple(number for number, name in enumerate(order) if differs[name])


@pytest.mark.parametrize("gigabytes", [4.5, 6.0, TIGHT, 14.0])
@pytest.mark.parametrize(
    "now",
    [
        {},
        {"rows": 4, "data_shard": "full"},
        {"tensor": 2, "sequence": True, "rows": 2},
        {"pipeline": 2, "schedule": "interleaved", "data_shard": "full"},
        {"recompute": "full", "rows": 2},
    ],
    ids=str,
)
def test_no_layout_that_fits_is_nearer(now: dict[str, object], gigabytes: float) -> None:
    work, where = workload(**dict(now)), place(gigabytes)
    found = nearest(work, PROCESSES, where)
    fitting = [one for one in forced(work.section.data_shard) if one.needed <= where.capacity]
    if not fitting:
        assert found is None
        return
    expected = min((len(changed(one.choice, work)), changed(one.choice, work)) for one in fitting)
    assert found is not None
    places = changed(found.found.choice, work)
    assert (len(places), places) == expected
    assert tuple(list(KEYS)[number] for number in places) == found.changes
    alike = [one.step.total for one in fitting if changed(one.choice, work) == places]
    assert found.found.seconds == rounded(min(alike))


def test_the_fewest_processes_over_which_something_fits() -> None:
    work = workload(batch=8)
    needed = {n: min((one.needed for one in every(work, n, place(WIDE))), default=10**12) for n in (1, 2, 4, 8)}
    for gigabytes in (5.0, 6.0, 7.5, 9.0):
        where = place(gigabytes)
        for number, least in needed.items():
            assert any_fits(work, number, where) == (least <= where.capacity)
        smallest = next((number for number in (2, 4, 8) if needed[number] <= where.capacity), None)
        if smallest is not None:
            assert fewest_processes(work, 1, where) == Fewest(smallest, exact=True)


def test_more_memory_never_makes_the_best_worse_and_more_processes_never_make_nothing_fit() -> None:
    work = workload(batch=32)
    for processes in (2, 4, 8, 16):
        best = [search(work, processes, place(size), top=1).best for size in (4, 6, 9, 14, 30, 60)]
        times = [found[0].seconds if found else float("inf") for found in best]
        assert times == sorted(times, reverse=True)
    for size in (4, 6, 9, 14):
        fits = [any_fits(work, processes, place(size)) for processes in (1, 2, 4, 8, 16)]
        assert fits == sorted(fits)


def test_settings_say_every_key_that_differs() -> None:
    work = workload()
    for one in search(work, PROCESSES, place(TIGHT), top=50).best:
        words = dict(word.split("=") for word in settings(one.choice, work.section, 1))
        keys = {key.removeprefix("parallel."): value for key, value in words.items() if key.startswith("parallel.")}
        kinds = {"true": True, "false": False}
        given = {key: kinds.get(value, int(value) if value.isdigit() else value) for key, value in keys.items()}
        assert ParallelSection(**{**work.section.model_dump(), **given}) == one.choice.section
        assert int(words.get("train.micro_batch_size", "1")) == one.choice.rows


# -- published layouts ------------------------------------------------------------------------------------------------

MEGATRON = [row for row in ROWS if row.source == "Megatron-LM"]


def published(row: Row) -> tuple[Workload, Choice]:
    section, layout = row.layout()
    train = TrainSection(global_batch_size=row.batch, micro_batch_size=row.micro, precision="bf16")
    batches = (BatchShape(row.length, row.batch),)
    work = Workload(row.shape(), ParallelSection(), train, OptimizerSection(), batches, batches)
    return work, Choice(section, layout, row.micro)


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: row.name)
def test_published_layouts_fit(row: Row) -> None:
    work, choice = published(row)
    where = Place(row.device)
    needed = needed_bytes(work, choice)
    print(f"{row.name:5} {needed / 1e9:6.1f} GB of {where.capacity / 1e9:.1f}")
    assert accepted(work, choice)
    assert needed <= where.capacity
    assert any(one == choice for one in choices(work, row.gpus, row.device.processes_per_node))


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.soak if row.gpus > 400 else ()) for row in MEGATRON],
    ids=lambda row: row.name,
)
def test_the_best_is_no_slower_than_the_published_layout(row: Row) -> None:
    work, choice = published(row)
    where = Place(row.device)
    result = search(work, row.gpus, where, top=1)
    theirs, ours = time_of(work, choice, where).total, result.best[0].seconds
    words = " ".join(settings(result.best[0].choice, work.section, row.micro))
    print(f"{row.name:5} theirs {theirs:.3f} s, best {ours:.3f} s of {result.looked:,}: {words}")
    if needed_bytes(work, choice) <= where.capacity:
        assert ours <= rounded(theirs)
