"""The share of a step in which a pipeline's ranks wait, by each schedule's formula.

Taken of a step that ends for all ranks at once, as ours does with the gradient norm, and with stages of equal cost
whose forward pass, gradient of inputs and gradient of weights take equally long. `tests/planner/test_bubble.py` holds
the formulas against torch's own orders of actions, `benchmarks/pipeline_bubble.py` against the clock.
"""

from __future__ import annotations

from fractions import Fraction


def bubble_fraction(schedule: str, pipeline: int, virtual: int, microbatches: int) -> Fraction:
    """Idle time / whole time of a step, from 0 to below 1. microbatches: at least as many as pipeline ranks.

    With p ranks, m microbatches, v stages on a rank, in units of one of the three parts of one stage:
    1f1b (arXiv 2104.04473, section 2.2): a rank works 3 m and waits 3 (p - 1): (p - 1) / (m + p - 1).
    interleaved (2104.04473, section 2.2): works 3 v m, waits 3 (p - 1): (p - 1) / (v m + p - 1). torch gives the last
        rank v - 1 rounds of forward passes and each rank before it two more, as Megatron-LM does.
    zero-bubble (2401.10241, ZB-H1; torch's ScheduleInterleavedZeroBubble with one stage a rank): weight gradients fill
        all but (p - 1) (forward + inputs - weights): (p - 1) / (3 m + p - 1).
    zbv (2401.10241, section 6; torch's ScheduleZBVZeroBubble, whose order is fixed): no rank waits between its first
        and its last action, and the last rank starts p - 1 after the first: (p - 1) / (6 m + p - 1). The paper lets
        the first rank's next step begin meanwhile and so counts 0. With fewer than (3 p - 1) / 2 microbatches the
        order has gaps: 3 p - 1 - 2 m more.
    """
    if pipeline == 1:
        return Fraction(0)
    working, waiting = {
        "1f1b": (microbatches, pipeline - 1),
        "interleaved": (virtual * microbatches, pipeline - 1),
        "zero-bubble": (3 * microbatches, pipeline - 1),
        "zbv": (6 * microbatches, pipeline - 1 + max(0, 3 * pipeline - 1 - 2 * microbatches)),
    }[schedule]
    return Fraction(waiting, working + waiting)
