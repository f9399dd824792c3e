"""lm-eval on exported models: `python -m phase1.lm_eval run --model phase1 --model_args pretrained=FOLDER --tasks ...`.

Takes what lm-eval's own command takes, whose versions with plug-ins find the model `phase1` by themselves. Needs
`pip install 'lm-eval[hf]'`; nothing else of this package imports it.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

import phase1.hf  # registers the folder's model  # noqa: F401
from phase1.ops.cross_entropy import IGNORE

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("phase1.lm_eval needs a package; run `pip install 'lm-eval[hf]'`") from error

Window = tuple[int, list[int], list[int]]
"""Number of the text, inputs and targets."""


@register_model("phase1")
class Phase1LM(HFLM):
    """lm-eval's `hf`, with whole texts scored as `phase1 perplexity` scores them: the same losses, summed in float64."""

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of each text, in lm-eval's windows: side by side, the last one moved back until it is full."""
        windows = [(i, *window) for i, request in enumerate(requests) for window in self._windows(request.args[0])]
        totals = [0.0] * len(requests)
        for batch in self._batches(windows):
            inputs, targets = (torch.tensor([window[k] for window in batch], device=self.device) for k in (1, 2))
            nll, _ = self.model.model.nll(inputs, targets)
            for (text, *_), nats in zip(batch, nll.double().sum(1).tolist()):
                totals[text] -= nats
        return totals

    def _batches(self, windows: list[Window]) -> Iterator[list[Window]]:
        """At most `batch_size` windows of one length each: nothing is padded."""
        size = self.batch_size if isinstance(self.batch_size, int) else 1
        for _, same in groupby(windows, lambda window: len(window[1])):
            rest = list(same)
            yield from (rest[i : i + size] for i in range(0, len(rest), size))

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Inputs and targets of every window of a text, IGNORE where a target is of an earlier window."""
        found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        pairs = [make_disjoint_window(window) for window in found]
        return [([*given, *said][:-1], [IGNORE] * (len(given) - 1) + list(said)) for given, said in pairs]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
