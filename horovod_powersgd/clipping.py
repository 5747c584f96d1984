"""What becomes of the memory of a step whose update was clipped.

A bad batch has a huge gradient. Clipping cuts its update to one small step; but what the update left out waits in the
error-feedback memory, unclipped, and would fill the next steps. So it is cut with the update, where the update was cut
more than usual. A training that is clipped in every step keeps its memory whole: each step's memory is cut in its turn,
when it is sent.
"""

from typing import Optional, Tuple

# How many times more than usual an update has to be cut to be one of a bad batch.
SPIKE = 2.0


def after_clipping(factor: float, usual: Optional[float]) -> Tuple[float, float]:
    """What a step's memory is multiplied by, and what is usual from now on.

    Args:
        factor: what the update was multiplied by between its exchange and its step, 0 or more: 1 where nobody clipped.
        usual: of the steps before; None in the first one.

    Returns:
        (of the memory, the usual factor), the latter nearer to this step's by its root, at most by the root of SPIKE.
    """
    if not usual:
        return 1.0, factor
    ratio = factor / usual
    return (ratio if ratio * SPIKE < 1 else 1.0), usual * min(max(ratio, 1 / SPIKE), SPIKE) ** 0.5
