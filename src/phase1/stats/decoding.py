"""Does a generated token cost the same whatever came before it? A verdict that admits when the data cannot tell."""

from collections.abc import Sequence

from phase1.records.schema import DecodePoint, Decoding
from phase1.stats.step_times import speed_ratio

DECODE_SPEED_LIMIT = 0.95  # tokens/s after the longest context over those after the shortest
MIN_SPAN = 8  # of the contexts


def judge(points: Sequence[DecodePoint]) -> Decoding:
    """The ratio of speeds at the longest and the shortest context, from steps of the same rounds, with its interval.

    constant: the whole interval is at least DECODE_SPEED_LIMIT, so that a measurement too noisy to see growth is not called
    constant; not constant: the whole interval is below it.
    """
    points = sorted(points, key=lambda point: point.context)
    ratio, interval = speed_ratio(points[-1].step_times_ms, points[0].step_times_ms)
    made = Decoding(points=points, speed_ratio=ratio, speed_ratio_ci95=interval, verdict="inconclusive")
    if points[-1].context < MIN_SPAN * points[0].context:
        return made.model_copy(update={"detail": f"the contexts must span {MIN_SPAN}x; give longer --decode-contexts"})
    if interval is None:
        return made.model_copy(update={"detail": "fewer than 5 rounds; raise --measure-steps"})
    if interval[0] >= DECODE_SPEED_LIMIT:
        return made.model_copy(update={"verdict": "constant"})
    if interval[1] < DECODE_SPEED_LIMIT:
        return made.model_copy(update={"verdict": "not constant"})
    low, high = interval
    return made.model_copy(update={"detail": f"the ratio is between {low:.3f} and {high:.3f}; raise --measure-steps"})
