"""What becomes of the memory of a step whose update was clipped.

A bad batch has a huge gradient. Clipping cuts its update to one small step; but what the update left out waits in the
error-feedback memory, unclipped, and would fill the next steps. So a step whose update was cut more than usual, to a
part f of what is usual, counts as that part of a step: of what it adds to the memory and takes from it, only f is kept.
A training that is clipped in every step is treated as one that is not: what waits is cut in its turn, when it is sent.
"""


# How many times more than usual an update has to be cut to be one of a bad batch.
SPIKE = 2.0


def after_clipping(factor: float, usual: float | None) -> tuple[float, float]:
    """Which part of a step counts, and what is usual from now on.

    Args:
        factor: what the update was multiplied by between its exchange and its step, 0 or more: 1 where nobody clipped.
        usual: of the steps before; None in the first one.

    Returns:
        (f, the usual factor): the memory becomes (1 - f) times the old one plus f times the new one, with f = 1 but for
        a bad batch; what is usual comes nearer to this step's factor by its root, at most by the root of SPIKE.
    """
    if not usual:
        return 1.0, factor
    ratio = factor / usual
    return (ratio if ratio * SPIKE < 1 else 1.0), usual * min(max(ratio, 1 / SPIKE), SPIKE) ** 0.5
