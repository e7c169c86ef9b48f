"""What one rank's forward pass of one microbatch keeps for its backward pass, in bytes, layer by layer.

Free of torch. Kept is what is still allocated when the forward pass has returned, parameters, gradients and the
microbatch itself left out. `tests/planner/test_activation_bytes.py` compares each figure with the allocations of real
forward passes, to the byte.

Beside Megatron-LM's closed form, s b h (34 + 5 a s / h) bytes a layer in 16 bits (Korthikanti et al., arXiv 2205.05198,
equation 1), a GPT layer of ours keeps, in units of s b h:

    there                                   here
    input of the first norm          2      2, and its statistics
    input of query, key, value       2      2
    query, key (2 a product)     2 + 2      4
    value                            2      2
    scores' softmax, its dropout's mask and result: 5 a s / h
                                            nothing but a number for each row of scores (flash): 4 a / h;
                                            unfused 2 a s / h: dropout of scores does not exist
    input of the output projection   2      2
    mask of the attention's dropout  1      0: it is made again from what it drops (`kernels/dropout.py`)
    input of the second norm         2      2, and its statistics
    input of the first MLP product   2      2
    input of GeLU                    8      8
    input of the second MLP product  8      8
    mask of the MLP's dropout        1      0
    ------------------------------------------------------------------------------------
    sum                             34     32

With RMSNorm, a gate and fewer key-value heads the same list gives a Llama: gate and up beside the product of both, 6 f,
or 8 f where an eager definition keeps the activated gate too, instead of 4 f.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from megatron.config.model_shape import ModelShape
from megatron.planner.attention_bytes import FUSED, Terms, attention_terms, blocks_of, sdpa_mask_elements
from megatron.planner.forward_pass import ForwardPass, heads_here

CHUNK_ROWS = 1024
"""Rows whose logits exist at once on a CPU (`kernels/cross_entropy.py`)."""
CHUNK_BYTES = 1 << 30
"""Of logits that exist at once on a GPU, in whole 1024 rows."""
_SOFTMAX_ELEMENTS = {"cpu": 1 << 20, "gpu": 1 << 27}
"""Elements that the eager loss widens at once (`kernels/vocabulary_softmax.py`)."""


@lru_cache(maxsize=4096)
def layer_bytes(shape: ModelShape, run: ForwardPass, slides: bool = False) -> int:
    """One layer's, its input among it; slides: it has the sliding window."""
    return sum(layer_terms(shape, run, slides).values())


def layer_terms(shape: ModelShape, run: ForwardPass, slides: bool = False) -> Terms:
    """`layer_bytes` by what they are."""
    stream = run.residual_positions * shape.hidden_size * run.narrow
    if run.recompute == "full":
        return {"input": stream}
    if run.recompute == "operations":
        return {"input": stream, **_products(shape, run)}
    terms: Terms = {}
    terms |= _entered(shape, run, "attention", "input")
    terms |= attention_terms(shape, run, slides)
    terms |= _left(shape, run, "attention")
    second = "input" if shape.parallel_block else "input of the MLP"
    terms |= _entered(shape, run, "MLP", second)
    terms |= _mlp(shape, run)
    terms |= _left(shape, run, "MLP")
    if run.fp8:
        terms["casts"] = _casts(shape, run)
    return {name: size for name, size in terms.items() if size}


def _statistics(shape: ModelShape, run: ForwardPass, last: bool = False) -> int:
    """Of one norm: a number a row (LayerNorm: two), and the weight widened where 1 is added to it; of the last one also
    weight and bias times what logits are multiplied by."""
    numbers, vectors = 1 if shape.norm == "rmsnorm" else 2, int(shape.norm_unit_offset)
    if last and shape.logit_multiplier != 1:
        vectors = 2 if shape.norm == "layernorm" else 1
    return run.wide * (run.residual_positions * numbers + shape.hidden_size * vectors)


def _entered(shape: ModelShape, run: ForwardPass, part: str, name: str) -> Terms:
    """The residual stream under `name`, its norm, and what the projections of a part read."""
    stream = run.residual_positions * shape.hidden_size * run.narrow
    gathered = run.split and run.sequence and run.tensor > 1
    whole = run.positions * shape.hidden_size * run.narrow
    if shape.shared_norm and part == "MLP":  # attention's norm is kept already
        return {f"gathered for {part}": whole} if gathered and not run.fp8 else {}
    if shape.norms_before:
        read = 0 if run.fp8 else whole if gathered else stream
        return {name: stream, f"norm before {part}": _statistics(shape, run), f"normed for {part}": read}
    if gathered:
        return {f"gathered for {part}": whole}
    return {} if run.fp8 else {name: stream}


def _left(shape: ModelShape, run: ForwardPass, part: str) -> Terms:
    """The norm and the dropout behind a part."""
    stream = run.residual_positions * shape.hidden_size * run.narrow
    terms: Terms = {}
    if shape.norms_after:
        terms = {f"output of {part}": stream, f"norm after {part}": _statistics(shape, run)}
    if shape.hidden_dropout:
        terms[f"dropout of {part}"] = 8 * run.rows
    return terms


def _mlp(shape: ModelShape, run: ForwardPass) -> Terms:
    inner = run.positions * (shape.intermediate_size // run.tensor) * run.narrow
    product = 0 if run.fp8 else inner
    if not shape.gated_mlp:
        return {"up": inner, "activated": product}
    return {"gate": inner, "up": inner, "activated gate": 0 if run.lean else inner, "activated": product}


def _casts(shape: ModelShape, run: ForwardPass) -> int:
    """Of inputs of products in 8 bits: one a linear map, transposed, filled up to 16 rows, and its scale."""
    padded = -(-run.positions // 16) * 16
    inputs = (3 + 1 + shape.gated_mlp) * shape.hidden_size
    inputs += shape.num_attention_heads * shape.head_dim + shape.intermediate_size
    return inputs * padded + 4 * (3 + 1 + shape.gated_mlp + 2)


def _products(shape: ModelShape, run: ForwardPass) -> Terms:
    """Outputs of products with weights, which policy "operations" keeps, and of fused attention. Joined projections
    write into memory of their own and so are made again."""
    if run.fp8:
        return {}
    heads, groups = heads_here(shape, run.tensor)
    each = run.positions * run.narrow
    inner, whole = shape.intermediate_size // run.tensor * each, shape.hidden_size * each
    terms = {"output of attention": whole, "output of MLP": whole}
    if not run.joined:
        terms["query, key, value"] = (heads + 2 * groups) * shape.head_dim * each
    if not (run.joined and shape.gated_mlp):
        terms["up and gate"] = inner * (2 if shape.gated_mlp else 1)
    if run.attention in FUSED and run.attention != "flex":
        terms["output of the kernel"] = heads * shape.head_dim * each
        terms["log-sum-exp"] = run.positions * heads * run.wide
    return terms


def stage_terms(
    shape: ModelShape, run: ForwardPass, layers: range, first: bool, last: bool, recomputed: int | None = None
) -> Terms:
    """What one pipeline stage keeps of one microbatch, its input among it. recomputed: so many first layers, None: all.

    "first" is what the embedding keeps, "last norm" and "loss" what those do, "shared" what all layers have in common:
    angles and masks.
    """
    own = len(layers) if recomputed is None else min(recomputed, len(layers))
    plain = run if run.recompute == "none" else _without_recompute(run)
    sliding = [shape.slides(number) for number in layers]
    total = 0
    for part, how in ((sliding[:own], run), (sliding[own:], plain)):
        slides = sum(part)
        total += slides * layer_bytes(shape, how, True) if slides else 0
        total += (len(part) - slides) * layer_bytes(shape, how, False) if len(part) > slides else 0
    shared = shared_bytes(shape, run if own else plain, any(sliding), not all(sliding))
    terms = {"layers": total, "shared": shared}
    if first:
        terms["first"] = embedding_bytes(shape, run)
    if last:
        terms["last norm"] = stream_bytes(shape, run) + _statistics(shape, run, last=True)
        terms["loss"] = loss_kept_bytes(shape, run)
    return terms


@lru_cache(maxsize=65536)
def stage_bytes(
    shape: ModelShape, run: ForwardPass, layers: range, first: bool, last: bool, recomputed: int | None = None
) -> int:
    """The sum of `stage_terms` but for the loss, whose peak is counted by itself."""
    terms = stage_terms(shape, run, layers, first, last, recomputed)
    return sum(terms.values()) - terms.get("loss", 0)


def stream_bytes(shape: ModelShape, run: ForwardPass) -> int:
    """Hidden states between layers."""
    return run.residual_positions * shape.hidden_size * run.narrow


@lru_cache(maxsize=1024)
def _without_recompute(run: ForwardPass) -> ForwardPass:
    return replace(run, recompute="none")


@lru_cache(maxsize=4096)
def shared_bytes(shape: ModelShape, run: ForwardPass, some_slide: bool = False, some_do_not: bool = True) -> int:
    """Angles of rotary positions, masks, and positions of dropout: once a microbatch and stage. Masks where a row is
    one document; documents within rows make masks of whole blocks."""
    local = run.length // run.context
    tables = 2 * run.rows * local * shape.rotary_dim * run.narrow
    total = 0
    kinds = []
    if some_do_not or not shape.sliding_pattern:
        kinds.append(run.length)
    if some_slide and shape.sliding_pattern:
        kinds.append(shape.sliding_window)
    if shape.sliding_window and not shape.sliding_pattern:
        kinds = [shape.sliding_window]
    total += tables * len(kinds)
    for window in kinds:
        total += _mask_bytes(shape, run, min(window, run.length))
    if shape.hidden_dropout:
        total += 8 * local
    return total


def _mask_bytes(shape: ModelShape, run: ForwardPass, window: int) -> int:
    queries = run.length // run.context if run.gathers else run.length
    if run.attention == "unfused":
        return 2 * 4 * run.rows * queries
    if run.attention == "blockwise":
        triangles = {}
        bands = 0
        for start, end, first in blocks_of(run, window):
            if window >= end and not run.divided:
                triangles[end - start] = (end - start) ** 2
            else:
                bands += run.rows * (end - start) * (end - first)
        return run.narrow * (sum(triangles.values()) + bands)
    if run.attention == "sdpa" and run.recompute != "none":  # else each layer's own is all that is left
        return sdpa_mask_elements(run, window < run.length)
    return 0


def embedding_bytes(shape: ModelShape, run: ForwardPass) -> int:
    """What the look-ups of words and positions keep besides their output."""
    local = run.rows * (run.length // run.context)
    total = 9 * local if run.tensor > 1 else 8 * local if run.context > 1 else 0
    if shape.position_embedding == "learned":
        total += 8 * local
    if shape.hidden_dropout:
        total += 8 * run.rows
    return total


def loss_kept_bytes(shape: ModelShape, run: ForwardPass) -> int:
    """What the loss keeps: the gradients of hidden states and of the head's weight, which are computed forward; under a
    split backward pass hidden states, and the slopes of all logits."""
    whole = run.positions * shape.hidden_size * run.narrow
    words = shape.padded_vocab_size // run.tensor
    head = run.positions * words * run.narrow if run.split else words * shape.hidden_size * run.narrow
    return whole + head + run.wide


@lru_cache(maxsize=4096)
def loss_peak_bytes(shape: ModelShape, run: ForwardPass) -> int:
    """The most that the last norm's output and the loss hold at once, beside the last norm's input and statistics."""
    words, hidden = shape.padded_vocab_size // run.tensor, shape.hidden_size
    whole = run.positions * hidden * run.narrow
    gathered = whole if run.sequence and run.tensor > 1 else 0
    normed = run.residual_positions * hidden * run.narrow
    rows = run.positions if run.split else min(run.positions, chunk_rows(words, run))
    softmax = _softmax_bytes(rows, words, run)
    if run.split:
        return normed + gathered + run.positions * words * run.narrow + softmax
    several = run.positions > rows
    gradient = words * hidden * (run.wide if several else run.narrow)
    buffer = rows * words * run.narrow
    # On a CPU a product that is added to a wide sum is made first, and widened.
    added = (
        words * hidden * (run.narrow + run.wide) if several and run.device == "cpu" and run.narrow != run.wide else 0
    )
    rounded = words * hidden * run.narrow if several and run.narrow != run.wide else 0
    return normed + gathered + whole + gradient + max(buffer + max(softmax, added), rounded)


def chunk_rows(words: int, run: ForwardPass) -> int:
    """Rows whose logits exist at once."""
    if run.device == "cpu":
        return CHUNK_ROWS
    return max(1, CHUNK_BYTES // (run.narrow * words * 1024)) * 1024


def _softmax_bytes(rows: int, words: int, run: ForwardPass) -> int:
    if run.lean_loss:
        return 0
    part = min(rows, max(1, _SOFTMAX_ELEMENTS[run.device] // words))
    if run.narrow == run.wide:
        times = 2 if part < rows and run.tensor == 1 else 1  # those of the part before live on
    elif run.tensor > 1:
        times = 1
    else:
        times = 3 if run.device == "cpu" else 2
    return times * part * words * run.wide


@lru_cache(maxsize=4096)
def backward_bytes(shape: ModelShape, run: ForwardPass, last: bool, weight: bool, reduced: int) -> int:
    """Short-lived tensors at the start of a backward pass, when almost everything is still kept: of the last norm; of
    the topmost layer's MLP, whose activations are made again first where it recomputes; or of the layer below, beside
    the gradients of the topmost that are being reduced.

    weight: the gradient of the MLP's output projection is a tensor of its own, and is not added to one that is there.
    reduced: bytes of a layer's gradients on their way to the other data ranks.
    """
    stream = run.residual_positions * shape.hidden_size
    inner = run.positions * (shape.intermediate_size // run.tensor)
    wide = 3 if run.narrow == run.wide else 5
    norm = stream * (run.narrow if run.lean else wide * run.wide) if last else 0
    mlp = run.narrow * (stream + inner * (2 if shape.gated_mlp else 1))
    if weight:
        mlp += shape.intermediate_size // run.tensor * shape.hidden_size * run.narrow
    kept = layer_bytes(shape, run)
    again = layer_bytes(shape, _without_recompute(run)) - kept if run.recompute != "none" else 0
    return max(norm, again + mlp + max(0, reduced - kept))


def loss_gradient_bytes(shape: ModelShape, run: ForwardPass, begun: bool) -> int:
    """Of what the loss keeps, that which is there when the topmost layer runs backward: hidden states' gradient, and
    that of the head's weight where there is none yet that it is added to."""
    whole = run.positions * shape.hidden_size * run.narrow
    return whole if begun else loss_kept_bytes(shape, run)


def embedding_backward_bytes(shape: ModelShape, run: ForwardPass) -> int:
    """Of the embedding, whose gradient is summed wide and rounded."""
    words = shape.padded_vocab_size // run.tensor * shape.hidden_size
    rounded = 0 if run.narrow == run.wide else run.narrow
    return words * (run.wide + rounded) + run.positions * shape.hidden_size * run.wide


@lru_cache(maxsize=4096)
def pending_bytes(shape: ModelShape, run: ForwardPass, layers: int) -> int:
    """What a stage holds of a microbatch between both halves of a split backward pass, besides its activations: the
    gradients of its linear maps' and norms' outputs, and of the stream between them."""
    heads, groups = heads_here(shape, run.tensor)
    outputs = (heads + 2 * groups) * shape.head_dim
    outputs += (2 if shape.gated_mlp else 1) * (shape.intermediate_size // run.tensor)
    streams = (2 + shape.norms_a_layer) * run.residual_positions * shape.hidden_size
    return layers * run.narrow * (run.positions * outputs + streams)
