"""Signs that a training is going wrong, and advice for each."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

RECENT = 100  # steps that a loss is compared with
SPIKE = 3.0  # standard deviations of these
IN_A_ROW = 2  # steps beyond them: one alone is a hard batch, as some of every thousand are
SMALLEST_SCALE = 1.0  # of the loss scaler; below it fp16 cannot hold the gradients


class Alarms:
    """Reports each sign once, and again only after it has disappeared.

    steadier: what helps against numbers that are not finite.
    """

    def __init__(self, grad_clip: float, steadier: str) -> None:
        self.grad_clip, self.steadier = grad_clip, steadier
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.clipped: deque[bool] = deque(maxlen=RECENT)
        self.told: set[str] = set()
        self.beyond = 0  # steps in a row

    def look(
        self, step: int, losses: list[float], norms: list[float], loss_scale: float | None, closed: Sequence[int] = ()
    ) -> Iterator[str]:
        """One line for every sign in the steps up to `step` since the last look; `closed`: layers of a closed rank gate."""
        spike, finite = None, [loss for loss in losses if math.isfinite(loss)]
        for loss in finite:
            if len(self.losses) == RECENT:
                mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
                self.beyond = self.beyond + 1 if loss > mean + SPIKE * deviation else 0
                if self.beyond >= IN_A_ROW:
                    spike = f"{loss:.3f} against {mean:.3f} +- {deviation:.3f} of the last {RECENT} steps"
            self.losses.append(loss)
        self.clipped.extend(norm > self.grad_clip for norm in norms)
        often = len(self.clipped) == RECENT and sum(self.clipped) > RECENT / 2
        jumped = f"the loss jumped by step {step}: {spike}; if it stays there, lower --learning-rate"
        yield from self._tell("spike", spike is not None, jumped)
        lost = len(losses) - len(finite)
        none = f"the loss was no finite number in {lost} of the steps to {step}; {self.steadier}"
        yield from self._tell("number", lost > 0, none)
        low = loss_scale is not None and loss_scale <= SMALLEST_SCALE
        yield from self._tell("scale", low, f"the loss scale fell to {loss_scale}; {self.steadier}")
        share = sum(self.clipped)
        yield from self._tell(
            "clipped", often, f"{share} of the last {RECENT} gradients were clipped; lower --learning-rate or raise --grad-clip"
        )

        layers = f"{'layers' if len(closed) > 1 else 'layer'} {', '.join(map(str, closed))}"
        few = f"the rank gate is closed in {layers}: only ranks that are always on are used there; lower --rank-penalty"
        yield from self._tell("gate", bool(closed), few)

    def _tell(self, sign: str, there: bool, text: str) -> Iterator[str]:
        if there and sign not in self.told:
            yield text
        (self.told.add if there else self.told.discard)(sign)
