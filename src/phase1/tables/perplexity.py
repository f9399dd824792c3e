"""The perplexity table."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from phase1.records.schema import PerplexityResult, Report
from phase1.roster import Key
from phase1.tables.common import CONFIG, MODEL, VERDICT, caption_of, failures_of, hardware_of, headline, provenance_of, setting
from phase1.tables.table import Cell, Column, Interval, Table

DEFINITIONS = (
    "Degradation: of perplexity, against the baseline of the same seed, from paired windows. "
    "Pareto: yes where no model of the same seed has both a smaller table and a lower perplexity."
)


def perplexity_comparison(report: Report[PerplexityResult], hardware: str | None = None) -> Table:
    """Quality of every trained model on the same targets, and its loss of quality against `baseline`."""
    columns = (
        MODEL,
        Column("Parameters"),
        Column("In the table"),
        Column("Trained on", "tokens"),
        Column("Perplexity"),
        Column("Bits per byte", "", 4),
        Column("Word perplexity"),
        Column("Degradation", "%"),
        Column("95 %", "%", interval=True),
        Column("Within 5 %"),
        Column("Effective rank", "", 1),
        Column("Pareto"),
        CONFIG,
    )
    best = pareto_front(report.results)
    rows = tuple(
        (key, *perplexity_cells(key, result), best.get(key), result.config_id) for key, result in report.results.items()
    )
    texts = {
        f"Scored: {r.token_count or 0:,} tokens of {r.dataset.name}, split {r.dataset.split}, sha256 {r.dataset.sha256[:12]}, "
        f"protocol {r.protocol_hash}."
        for r in report.results.values()
        if r.dataset
    }
    texts |= {text for r in report.results.values() if (text := _windows_text(r, report))}
    texts |= {f"No {name.replace('_', ' ')}: {why}." for r in report.results.values() for name, why in r.absent.items()}
    texts |= set(own_texts(report.results)) | set(early_texts(report.results))
    if groups := report.run.get("optimizer_groups"):
        texts.add(f"Optimizer groups of {groups}.")
    if len({r.protocol_hash for r in report.results.values() if r.protocol_hash}) > 1:
        texts.add("Different protocols: perplexities of different protocols are not comparable.")
    return Table(
        "perplexity_comparison",
        caption_of("Perplexity", report, hardware, setting(report, "T", "seq_length")),
        hardware or hardware_of(report),
        columns,
        rows,
        (*sorted(texts), DEFINITIONS, *failures_of(report)),
        provenance_of(report),
    )


def _windows_text(result: PerplexityResult, report: Report[PerplexityResult]) -> str:
    """The windows of scoring and training, if they differ."""
    T, stride, trained = (report.run.get("seq_length"), report.run.get("stride"), result.trained_seq_length)
    if trained in (None, T) and stride in (None, T):
        return ""
    windows = "side by side" if stride in (None, T) else f"stride {stride}"
    return f"Windows: T = {T}, {windows}; in training T = {'unknown' if trained is None else trained}."


def early_texts(results: Mapping[str, PerplexityResult]) -> Iterator[str]:
    """Each training that --patience has ended: its model could have learnt more."""
    for key, result in results.items():
        if result.ended_by is not None:
            whole = (result.training or {}).get("train_tokens")
            of = f" of {whole:,}" if isinstance(whole, int) else ""
            yield f"Training ended early, by --{result.ended_by}: {key}, after {result.trained_tokens or 0:,}{of} tokens."


def own_texts(results: Mapping[str, PerplexityResult]) -> Iterator[str]:
    """What a model and its baseline were asked for, where one of them is a user's own; what they are is in the columns."""
    sizes = {"vocab_size": "{} and {} tokens of vocabulary", "d_model": "width {} and {}", "n_layers": "{} and {} layers"}
    for key, result in ((Key.parse(text), result) for text, result in results.items()):
        baseline = results.get(str(key.baseline))
        if baseline is None or baseline is result or not any(side.config.get("model") for side in (result, baseline)):
            continue
        asked = (text.format(*(side.config.get(size) for side in (result, baseline))) for size, text in sizes.items())
        yield f"Asked of {key.model} and of baseline: {', '.join(asked)}."


class PerplexityCells(NamedTuple):
    """The cells between the model's name and its place on the Pareto front."""

    parameters: Cell
    table_parameters: Cell
    trained_tokens: Cell
    perplexity: Cell
    bits_per_byte: Cell
    word_perplexity: Cell
    degradation: Cell
    degradation_interval: Cell
    verdict: Cell
    effective_rank: Cell


def perplexity_cells(key: str, result: PerplexityResult) -> PerplexityCells:
    """Cells of a result; n/a where the model is untrained or has failed."""
    verdict = None if Key.parse(key).is_baseline else VERDICT[result.passes_5_percent_threshold]
    known = result.status == "ok" and not result.untrained
    return PerplexityCells(
        result.parameters.total if result.parameters else None,
        result.parameters.embedding if result.parameters else None,
        result.trained_tokens,
        headline(result, "UNTRAINED" if result.untrained else result.perplexity),
        result.bits_per_byte if known else None,
        result.word_perplexity if known else None,
        result.ppl_degradation_percent if known else None,
        Interval.of(result.degradation_ci95) if known else None,
        verdict,
        result.effective_rank,
    )


def pareto_front(results: Mapping[str, PerplexityResult]) -> dict[str, str]:
    """yes or no for every trained model: is any other of its seed better in size of the table and in perplexity?

    Ties in one of the two are decided by the other; a model is never beaten by its equal.
    """
    points = {
        key: (result.parameters.embedding, result.perplexity)
        for key, result in results.items()
        if result.parameters and result.perplexity is not None and not result.untrained
    }
    beaten = {
        key
        for key, (size, perplexity) in points.items()
        for other, (its_size, its_perplexity) in points.items()
        if Key.parse(other).seed == Key.parse(key).seed
        and its_size <= size
        and its_perplexity <= perplexity
        and (its_size, its_perplexity) != (size, perplexity)
    }
    return {key: "no" if key in beaten else "yes" for key in points}
