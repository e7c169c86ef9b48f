"""What attention keeps for its backward pass, from the projections of queries, keys and values to that of outputs.

Free of torch. Counted in whole allocations, as memory is: where a kernel keeps a view of a joined projection, all of
the projection stays. `tests/planner/test_activation_bytes.py` holds the figures against allocations of real forward
passes, but those of kernels that only GPUs have (varlen, cudnn, flex): they are read from torch's sources.

b rows, T positions, a query heads and g key-value heads here (n = a / g), d their size.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.model_shape import ModelShape
from megatron.planner.forward_pass import ForwardPass, heads_here

BLOCK = 128
"""Queries of a block of `kernels/attention_blockwise.py`."""
KEPT_BY_BLOCKWISE, KEPT_BY_UNFUSED = 64 << 20, 256 << 20
"""Probabilities of a layer that those kernels keep at most; above they are made again."""
FUSED = ("flash", "sdpa", "varlen", "cudnn", "flex")
"""Kernels that keep queries, keys, values, their output, and a logarithm of a sum for each row of scores."""

Terms = dict[str, int]


@dataclass(frozen=True)
class _Inputs:
    """Where queries, keys and values lie when the kernel is called: of each the allocation's name, and how it lies.

    "rows": [b, T, g, n, d]; "heads": [b, g, T, n, d]; "packed": beside each other, [b, g, T, n + 2, d].
    """

    query: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    sizes: Terms


def attention_terms(shape: ModelShape, run: ForwardPass, slides: bool) -> Terms:
    """Bytes by what they are, of one layer. slides: it has the sliding window. "attended" is what the output projection
    reads, and often the kernel's own output too."""
    heads, groups = heads_here(shape, run.tensor)
    each = run.positions * shape.head_dim * run.narrow
    inputs = _inputs(shape, run, heads * each, groups * each)
    terms = _norms(shape, run, heads, groups)
    kept = {name: inputs.sizes[name] for name in terms if name in inputs.sizes}
    if run.recompute == "attention":
        own = {place[0] for place in (inputs.query, inputs.key, inputs.value)}
        kept |= {name: inputs.sizes[name] for name in own}
    elif run.recompute != "operations" or run.attention in FUSED:
        kept |= _kernel(shape, run, inputs, heads, groups)
        kept |= _scores(shape, run, heads, slides)
    return {**terms, **kept, "attended": 0 if run.fp8 else heads * each}


def _inputs(shape: ModelShape, run: ForwardPass, query: int, key: int) -> _Inputs:
    turned, normed, scaled = shape.rotary_dim > 0, shape.qk_norm != "none", shape.attention_multiplier > 0
    whole = {"query, key, value": query + 2 * key}
    if run.joined and turned and run.in_place and not (normed or scaled):
        place = ("query, key, value", "rows")
        return _Inputs(place, place, place, whole)
    lies = "heads" if turned else "rows"
    sizes = {"query": query, "key": key, "value": key}
    places = {name: (name, lies) for name in ("query", "key")} | {"value": ("value", "rows")}
    if run.joined:
        sizes |= whole
        places["value"] = ("query, key, value", "rows")
        if not (turned or normed or scaled):
            places["query"] = places["value"]
        if not (turned or normed):
            places["key"] = places["value"]
    elif normed:
        sizes |= {"query before its norm": query, "key before its norm": key}
    return _Inputs(places["query"], places["key"], places["value"], sizes)


def _norms(shape: ModelShape, run: ForwardPass, heads: int, groups: int) -> Terms:
    """What norms of queries and keys keep: names of allocations of `_Inputs` (0 here), statistics, widened weights."""
    if shape.qk_norm == "none":
        return {}
    names = ("query, key, value",) if run.joined else ("query before its norm", "key before its norm")
    rows = run.positions * (heads + groups if shape.qk_norm == "head" else 2)
    terms = dict.fromkeys(names, 0) | {"norms of query and key": rows * run.wide}
    if shape.norm_unit_offset:
        wide = 2 * shape.head_dim if shape.qk_norm == "head" else (heads + groups) * shape.head_dim
        terms["norms of query and key"] += wide * run.wide
    return terms


def _kernel(shape: ModelShape, run: ForwardPass, inputs: _Inputs, heads: int, groups: int) -> Terms:
    """Queries, keys, values, output and statistics as the kernel keeps them."""
    each = run.positions * shape.head_dim * run.narrow
    query, key, n = heads * each, groups * each, heads // groups
    places, sizes = (inputs.query, inputs.key, inputs.value), inputs.sizes
    if run.context > 1 and not run.gathers:
        groups //= run.context
        place = ("exchanged query, key, value", "packed")
        places, sizes = (place, place, place), {place[0]: query + 2 * key}
    elif run.gathers:
        key *= run.context
        place = ("gathered key, value", "packed")
        places, sizes = (inputs.query, place, place), {**inputs.sizes, place[0]: 2 * key}
    kept: Terms = {}
    for what, (name, lies), size, of_query in zip(
        ("query", "key", "value"), places, (query, key, key), (True, False, False), strict=True
    ):
        own = name == what
        if own or not _viewed(run, lies, of_query, n, groups, own):
            kept[what if own else f"{what} by itself"] = size
        else:
            kept[name] = sizes[name]
    if run.attention == "cudnn" and n > 1:
        for name in ("key", "value"):
            kept.pop(name, None)
            kept[f"{name} by itself"] = key * n
    if run.attention in FUSED:
        kept["log-sum-exp"] = run.positions * heads * run.wide
        # Its output lies as its queries do; what the projection reads is [b, T, heads], and a copy where that differs.
        if run.context > 1 or (run.attention != "varlen" and inputs.query[1] != "rows" and groups > 1):
            kept["output of the kernel"] = query
    return kept


def _viewed(run: ForwardPass, lies: str, of_query: bool, n: int, groups: int, own: bool) -> bool:
    """Whether the kernel keeps a view of what it is given; else a copy of its own."""
    one_batch = run.rows == 1 or groups == 1  # rows and groups are one dimension
    if run.attention in ("blockwise", "unfused"):
        if of_query and run.attention == "blockwise":
            return False  # it is scaled
        merged = one_batch or lies != "rows"
        if not of_query:
            return merged
        return merged and (lies == "heads" or n == 1 or (groups == 1 and own and lies == "rows"))
    if run.attention in ("varlen", "cudnn"):
        return lies == "rows" or (one_batch and (not of_query or groups == 1 or n == 1))
    return not of_query or lies == "rows" or groups == 1 or n == 1


def _scores(shape: ModelShape, run: ForwardPass, heads: int, slides: bool) -> Terms:
    """Probabilities that are kept, or a mask in the scores' dtype."""
    length, local = run.length, run.length // run.context if run.gathers else run.length
    here = heads if run.gathers else heads // run.context
    if run.attention == "unfused":
        size = run.rows * here * local * length * run.narrow
        return {"probabilities": size} if size <= KEPT_BY_UNFUSED else {}
    if run.attention == "blockwise":
        window = shape.sliding_window if slides and shape.window_bites(length) else length
        size = run.rows * here * _block_area(run, window) * run.narrow
        return {"probabilities": size} if size <= KEPT_BY_BLOCKWISE else {}
    if run.attention == "sdpa":
        # torch makes of a bool mask one in the scores' dtype, anew for each layer.
        return {"mask of scores": sdpa_mask_elements(run, slides and shape.window_bites(length)) * run.narrow}
    return {}


def sdpa_mask_elements(run: ForwardPass, windowed: bool) -> int:
    """Of SDPA's masks of a microbatch: none where causality says it all."""
    rows = run.rows if windowed or run.divided else 0
    if not run.gathers:
        return rows * run.length * run.length
    return sum((end - begin) * end * (rows or (1 if begin else 0)) for begin, end in query_runs(run))


def query_runs(run: ForwardPass) -> list[tuple[int, int]]:
    """Stretches of positions whose queries are on one rank, as (first, one after the last): all, or where keys are
    gathered the first of 2 c chunks and its mirror, which is context rank 0's."""
    if not run.gathers:
        return [(0, run.length)]
    each = run.length // (2 * run.context)
    return [(0, each), (run.length - each, run.length)]


def blocks_of(run: ForwardPass, window: int) -> list[tuple[int, int, int]]:
    """(first query, one after the last, first key) of each block, where a row is one document."""
    return [
        (start, min(start + BLOCK, end), max(0, start - window + 1))
        for begin, end in query_runs(run)
        for start in range(begin, end, BLOCK)
    ]


def _block_area(run: ForwardPass, window: int) -> int:
    return sum((end - start) * (end - first) for start, end, first in blocks_of(run, window))
