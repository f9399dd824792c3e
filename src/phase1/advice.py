"""Advice for a run that is out of memory, which settings to lower, the least costly first; and what is hours of work."""

HOURS = 1e15  # floating-point operations that take hours on a CPU


def smaller(*, batch: tuple[str, int] | None = None, length: tuple[str, int] | None = None, more: tuple[str, ...] = ()) -> str:
    """Advice such as "try --batch-size 2, then --seq-length 1024": half of every (flag, value) above 1, then `more`."""
    steps = [f"{flag} {value // 2}" for flag, value in (pair for pair in (batch, length) if pair) if value > 1]
    return "try " + ", then ".join([*steps, *more] or ["a smaller --d-model or --n-layers"])
