"""The table of losses by length of the context and by frequency of the target."""

from phase1.records.schema import LossPart, PerplexityResult, Report
from phase1.tables.common import caption_of, hardware_of, setting
from phase1.tables.table import Column, Table

CONTEXT, RANK = "tokens of context", "frequency rank"


def loss_comparison(report: Report[PerplexityResult], hardware: str | None = None) -> Table:
    """Mean nats per token of every model on the same groups of targets; no row where no result has them."""
    shown = comparable(report)
    contexts = {key: result.loss_by_position or [] for key, result in shown.items()}
    ranks = bands(shown)
    columns = (Column("By"), Column("From"), Column("To"), Column("Tokens"), *(Column(key, "nats", 3) for key in shown))
    rows = []
    for title, by_model in ((CONTEXT, contexts), (RANK, ranks)):
        for group in dict.fromkeys((p.first, p.last, p.tokens) for parts in by_model.values() for p in parts):
            losses = (_loss(by_model.get(key, []), group) for key in shown)
            rows.append((title, *group, *losses))
    notes = [
        "Context: tokens of the window before the target; the one token before the window is not counted.",
        "Frequency rank: of the target in the tokens of the training, from 0.",
        *(f"{key}: other targets, not shown" for key in report.results if _has_losses(report, key) and key not in shown),
        *(f"{key}: no losses by rank, {_why(shown[key])}" for key in shown if key not in ranks),
    ]
    caption = caption_of("Loss by context and frequency", report, hardware, setting(report, "T", "seq_length"))
    return Table("loss_comparison", caption, hardware or hardware_of(report), columns, tuple(rows), tuple(notes))


def comparable(report: Report[PerplexityResult]) -> dict[str, PerplexityResult]:
    """The trained models with losses by context that were scored as the first of them was."""
    found = {key: report.results[key] for key in report.results if _has_losses(report, key)}
    return {key: r for key, r in found.items() if r.protocol_hash == next(iter(found.values())).protocol_hash}


def bands(results: dict[str, PerplexityResult]) -> dict[str, list[LossPart]]:
    """Losses by rank of the models whose ranks are those of the first model that has any."""
    known = {key: result for key, result in results.items() if result.loss_by_band}
    order = next((result.token_order_sha256 for result in known.values()), None)
    return {key: result.loss_by_band or [] for key, result in known.items() if result.token_order_sha256 == order}


def _has_losses(report: Report[PerplexityResult], key: str) -> bool:
    result = report.results[key]
    return bool(result.loss_by_position) and not result.untrained


def _why(result: PerplexityResult) -> str:
    return result.loss_by_band_detail or "trained on other tokens, so its ranks are others"


def _loss(parts: list[LossPart], group: tuple[int, int, int]) -> float | None:
    return next((part.avg_loss for part in parts if (part.first, part.last, part.tokens) == group), None)
