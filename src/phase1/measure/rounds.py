"""Rounds, in which every model takes one step: who goes when, and the ratios of steps of one round."""

from collections.abc import Sequence

from phase1.measure.intervals import speed_ratio
from phase1.record import Measurement


def round_order(names: Sequence[str], number: int) -> list[str]:
    """Who goes when in round `number`: in n rounds (2n for odd n) each has every place, and follows every other, equally often.

    A step after a heavy one may meet a lower clock or a colder cache. In one fixed order that would always be the same model's
    loss, and it looks like a difference. Source: Williams 1949, "Experimental designs balanced for residual effects".
    """
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]  # 0, 1, n - 1, 2, n - 2, ...
    order = [names[(place + number) % n] for place in zigzag]
    return order[::-1] if n % 2 and number // n % 2 else order


def with_ratios(measurements: Sequence[Measurement], baseline: Sequence[Measurement]) -> list[Measurement]:
    """`measurements` with ratio and interval wherever the baseline took its steps in the same rounds."""
    found = []
    for m in measurements:
        if pair := rounds_of(m, baseline):
            ratio, interval = speed_ratio(*pair)
            m = m.model_copy(update={"ratio_to_baseline": ratio, "ratio_ci95": None if m in baseline else interval})
        found.append(m)
    return found


def rounds_of(m: Measurement, others: Sequence[Measurement]) -> tuple[list[float], list[float]] | None:
    """Step times of `m`, and those of the same rounds in `others`; None where there are none."""
    for other in others:
        if (other.seq_length, other.batch_size) == (m.seq_length, m.batch_size):
            same = m.step_times_ms and len(m.step_times_ms) == len(other.step_times_ms)
            return (m.step_times_ms, other.step_times_ms) if same else None
    return None
