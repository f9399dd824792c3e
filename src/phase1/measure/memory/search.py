"""The largest size that fits, in few probes: each one is a training step in a process of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from phase1.records.schema import Status

GUIDED_PROBES = 8  # the first probes go where memory is predicted to run out; what they leave is halved
GROWTH = 16  # a guided probe goes at most so many times beyond the largest size that fits


@dataclass(frozen=True)
class Probe:
    """How a size ended; `needed_bytes` are the bytes of the card that it needs, if known."""

    status: Status
    needed_bytes: int | None = None
    detail: str = ""


def largest_size(
    probe: Callable[[int], Probe],
    start: int,
    bound: int,
    limit: int | None,
    known: Mapping[int, Probe] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[int, Probe]:
    """Probe sizes in 1..bound until the largest that fits is known: every probe, in order, after the `known` ones.

    Memory is taken to grow with the size. Where two sizes have told their bytes, the next probe is where the line through them
    meets `limit`; otherwise the size is doubled, or the interval halved. Ends with some n that fits and an n + 1 that does not
    (see `edge`), at a bound, at the first error, or where time is out before a further probe. At most
    GUIDED_PROBES + 1 + 2 log2(bound) probes.
    """
    probes = dict(known or {})
    missed = False
    for turn in range(2 * bound.bit_length() + GUIDED_PROBES + 2):
        low, high = edge(probes, bound)
        if high - low <= 1 or (turn and out_of_time()):
            return probes
        guess = None if missed or turn >= GUIDED_PROBES else _crossing(probes, limit)
        if guess is not None:
            size = min(guess, GROWTH * low) if low and high > bound else guess
        elif high > bound:
            size = 2 * low or start
        else:
            size = (low + high) // 2
        size = min(max(size, low + 1), high - 1)
        probes[size] = probe(size)
        if probes[size].status == "error":
            return probes
        missed = guess is not None and probes[size].needed_bytes is None  # by an unknown amount: the line would miss again
    raise AssertionError("the interval did not shrink")


def edge(probes: Mapping[int, Probe], bound: int) -> tuple[int, int]:
    """The largest size that fits below the smallest that does not (0 if none), and that one (bound + 1 if none)."""
    high = min((size for size, probe in probes.items() if probe.status == "oom"), default=bound + 1)
    return max((size for size, probe in probes.items() if probe.status == "ok" and size < high), default=0), high


def _crossing(probes: Mapping[int, Probe], limit: int | None) -> int | None:
    """The last size under `limit` on the line through two probes: the closest on each side of it, or on the one there is."""
    if limit is None:
        return None
    points = [(size, probe.needed_bytes) for size, probe in sorted(probes.items()) if probe.needed_bytes is not None]
    under = [point for point in points if point[1] <= limit]
    over = [point for point in points if point[1] > limit]
    pair = [*under[-1:], *over[:1]] if under and over else (under[-2:] or over[:2])
    if len(pair) < 2 or pair[1][1] <= pair[0][1]:
        return None
    (size, needed), (other, more) = pair
    return size + (limit - needed) * (other - size) // (more - needed)
