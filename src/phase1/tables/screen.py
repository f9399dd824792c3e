"""The last screen of a command: the question, the answer with its reason, what to do next, and where the files are."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from phase1.records.schema import Check, MemoryResult, PerplexityResult, Report, ThroughputResult
from phase1.roster import ENGINE_ROLES, Key
from phase1.tables.common import hardware_of
from phase1.text import one_line

LINES = 25
WIDTH = 110
ROWS = 6  # of models, before the rest is only counted
WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE"}
TITLES = {
    "baseline": "Transformer",
    "baseline_optimized": "Transformer, small",
    "baseline_fast": "Transformer, fast",
    "phase1": "engine",
    "phase1_fast": "engine, fast",
    "phase1_pieces": "engine, in pieces",
}
"""What people read in place of a key; small: checkpointing and chunked loss; fast: chunked loss, compiled on a GPU."""
_CLAIMS = {
    "reduction_50_percent": "engine's memory below the Transformer's",
    "one_sequence_trains": "one sequence trains",
    "scaling_linear": "step time linear in T",
    "decode_constant": "generation as fast after any context",
    "r_squared": "R² of the straight line",
    "a_a_no_difference": "two copies of one model agree",
    "control_rejected": "a quadratic model is found out",
    "fits_vram_limit": "engine fits --vram-limit",
}


@dataclass(frozen=True)
class Screen:
    """`numbers` are lines of their own; `steps` are pairs of a step that did not run, and why (of a pipeline)."""

    question: str
    numbers: Sequence[str] = ()
    checks: Sequence[Check] = ()
    next: Sequence[str] = ()
    files: Sequence[Path | str] = ()
    failed_steps: Sequence[tuple[str, str]] = field(default=())
    answer: str | None = None  # where no check gives it


def text(screen: Screen) -> str:
    """The screen as at most LINES lines; if there are more, failed and undecided checks come first."""
    head = [*_wrap(screen.question, "")]
    failed = [line for name, why in screen.failed_steps for line in _wrap(f"{name} did not run: {why}", "")]
    verdict = [_verdict(screen)] if screen.checks or screen.failed_steps or screen.answer else []
    tail = [*(f"next  {one_line(step, 1000)}" for step in screen.next[:3]), *_files(screen.files)]  # to copy: not wrapped
    room = LINES - len(head) - len(failed) - len(verdict) - len(tail) - 2
    numbers = _shortened(
        [one_line(line, 2 * WIDTH) for line in screen.numbers], max(2, room - min(len(_checks(screen.checks, room)), room - 2))
    )
    checks = _checks(screen.checks, room - len(numbers))
    blocks = [[*head, *failed], numbers, [*checks, *verdict], tail]
    lines = [line for block in blocks if block for line in (*block, "")][:-1]
    if len(lines) > LINES:  # blank lines are the first to go
        lines = [line for line in lines if line][:LINES]
    return "\n".join(lines)


def _verdict(screen: Screen) -> str:
    statuses = [check.status for check in screen.checks]
    counts = [statuses.count(status) for status in ("pass", "fail", "inconclusive")]
    word = "FAIL" if counts[1] or screen.failed_steps else "INCONCLUSIVE" if counts[2] else "PASS"
    if not statuses:
        return one_line(screen.answer or word, 5 * WIDTH)
    said = f"{word}: {counts[0]} of {len(statuses)} checks pass"
    others = [f"{count} {name}" for count, name in zip(counts[1:], ("failed", "undecided")) if count]
    return f"{said}, {', '.join(others)}" if others else said


def _checks(checks: Sequence[Check], room: int) -> list[str]:
    """A line of each check, those that do not pass first and with their reason."""
    order = sorted(checks, key=lambda check: ("fail", "inconclusive", "pass").index(check.status))
    blocks = []
    for check in order:
        value, limit = values_of(check)
        line = f"{WORDS[check.status]:<13} {one_line(claim(check.name)):<44.44} {value:>12} {limit}".rstrip()
        why = _wrap(check.detail, "              ")[:2] if check.status != "pass" else []
        blocks.append([line, *why])
    lines: list[str] = []
    for index, block in enumerate(blocks):
        left = len(blocks) - index
        if len(lines) + len(block) + (left > 1) > max(room, 1):
            return [*lines, f"... and {left} more, {_count(order[index:])}: in the files"]
        lines += block
    return lines


def _count(checks: Iterable[Check]) -> str:
    statuses = [check.status for check in checks]
    return ", ".join(f"{statuses.count(status)} {WORDS[status]}" for status in WORDS if status in statuses)


class ClaimWords(NamedTuple):
    """The names of checks in one language."""

    fixed: Mapping[str, str]  # of checks that have one name
    size: Callable[[str], str]  # fits a card of so many GB
    card: Callable[[str], str]  # fits the card of that name
    perplexity: Callable[[str, bool], str]  # of a model; whether it is the mean of seeds


ENGLISH_CLAIMS = ClaimWords(
    _CLAIMS,
    size=lambda gb: f"engine fits {'an' if gb == '8' else 'a'} {gb} GB card",
    card=lambda name: f"engine fits the {name}",
    perplexity=lambda model, mean: f"{model_title(model)}: perplexity{', mean of seeds' if mean else ''}",
)


def claim(name: str, words: ClaimWords = ENGLISH_CLAIMS) -> str:
    """The name of a check in words."""
    if name in words.fixed:
        return words.fixed[name]
    if found := re.fullmatch(r"fits_(\d+)gb", name):
        return words.size(found[1])
    if name.startswith("fits_"):
        return words.card(name.removeprefix("fits_").replace("_", " "))
    if found := re.fullmatch(r"(\w+?)(_mean_of_seeds)?_within_(-?[\d.]+)_percent", name):
        return words.perplexity(found[1], bool(found[2]))
    return name.replace("_", " ")


def model_title(key: str) -> str:
    """The name of a model in words."""
    parsed = Key.parse(key)
    words = TITLES.get(parsed.model, parsed.model.replace("_", " "))
    if parsed.ranks:
        words = f"engine, HTT {parsed.htt_rank} / AR-SSM {parsed.ar_ssm_rank}"
    return words if parsed.seed is None else f"{words}, seed {parsed.seed}"


def values_of(check: Check) -> tuple[str, str]:
    """Value and limit in the unit of the check."""
    if check.name.startswith("fits_"):
        return _with_unit(check.value, 1e-9, "GB", 2), f"limit {_with_unit(check.limit, 1e-9, 'GB', 2)}"
    if check.name == "one_sequence_trains":  # the largest batch
        return _with_unit(check.value, 1, "", 0), f"least {_with_unit(check.limit, 1, '', 0)}"
    percent = "percent" in check.name or check.name == "a_a_no_difference"
    unit, digits = ("%", 1) if percent else ("", 3)
    word = "over" if check.name in ("reduction_50_percent", "r_squared") else "limit"
    limit = "" if check.limit is None else f"{word} {_with_unit(check.limit, 1, unit, 2)}"
    return _with_unit(check.value, 1, unit, digits), limit


def _with_unit(value: float | None, factor: float, unit: str, digits: int) -> str:
    if value is None:
        return "n/a"
    number = f"{value * factor:,.{digits}f}"
    return f"{number} {unit}".rstrip()


def _wrap(text: str, prefix: str) -> list[str]:
    later = " " * len(prefix)
    return textwrap.wrap(one_line(text, 600), WIDTH, initial_indent=prefix, subsequent_indent=later) or [prefix]


def _shortened(lines: list[str], room: int) -> list[str]:
    return lines if len(lines) <= room else [*lines[: room - 1], f"... and {len(lines) - room + 1} more lines: in the files"]


def _files(files: Sequence[Path | str]) -> list[str]:
    """The files as one line: their folder, then their names."""
    folders: dict[str, list[str]] = {}
    for path in map(Path, files):
        folders.setdefault(str(path.parent), []).append(path.name)
    lines = []
    for folder, names in folders.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(one_line(f"files {folder}/: {shown}", 2 * WIDTH))
    return lines[:4]


FITS = f" {'batch':>8} {'longest':>12}"


def memory_numbers(report: Report[MemoryResult]) -> list[str]:
    """Peak, need and saving of every model; and the largest sizes that train, where they were searched."""
    fitted = any(result.fit for result in report.results.values())
    lines = [f"{'':<24} {'peak':>10} {'with context':>14} {'below the Transformer':>22}" + FITS * fitted]
    for key, result in report.results.items():
        peak, reserved, outside = result.peak_allocated_bytes, result.peak_reserved_bytes, result.outside_allocator_bytes
        needed = result.estimated_needed_bytes if reserved is None or outside is None else reserved + outside
        saving = "" if result.memory_reduction_percent is None else f"{result.memory_reduction_percent:.1f} %"
        over = {"ok": "", "oom": "does not fit", "error": "failed"}[result.status]
        numbers = f"{_with_unit(peak, 1e-9, 'GB', 2):>10} {_with_unit(needed, 1e-9, 'GB', 2):>14} {saving:>22}"
        lines.append(f"{model_title(key):<24} {numbers}{_fits(result) if fitted else ''} {over}".rstrip())
    lines += [_ranks(key, result.peak_by_rank_bytes) for key, result in report.results.items() if result.peak_by_rank_bytes]
    if fitted:
        lines.append(
            f"batch: the largest of {report.run.get('seq_length'):,} tokens that trains; longest: sequence at a batch of 1"
        )
    return lines


def _ranks(key: str, peaks: Sequence[int]) -> str:
    """The peak of every rank, or the least and the largest of many."""
    shown = [f"{peak / 1e9:.2f}" for peak in (peaks if len(peaks) <= 8 else (min(peaks), max(peaks)))]
    return f"{model_title(key) + ', by rank':<32} {(' ' if len(peaks) <= 8 else ' to ').join(shown)} GB"


def _fits(result: MemoryResult) -> str:
    words = {"batch_size": "", "seq_length": ""}  # nothing where it was not searched
    for fit in result.fit:
        size = fit.batch_size if fit.searched == "batch_size" else fit.seq_length
        more = ">= " if size == fit.bound or fit.detail else ""
        words[fit.searched] = "none" if size is None else f"{more}{size:,}"
    return f" {words['batch_size']:>8} {words['seq_length']:>12}"


def throughput_numbers(report: Report[ThroughputResult]) -> list[str]:
    """Tokens per second of every model over the lengths, and the engine's ratio to the fastest Transformer of each."""
    lengths = sorted({m.seq_length for result in report.results.values() for m in result.measurements})
    shown = lengths if len(lengths) <= 6 else [*lengths[:3], *lengths[-3:]]
    lines = [f"{'tokens/s at T =':<24}" + "".join(f"{length:>12,}" for length in shown)]
    for key, result in report.results.items():
        speeds = {m.seq_length: m for m in result.measurements}
        lines.append(f"{model_title(key):<24}" + "".join(f"{_speed(speeds.get(length)):>12}" for length in shown))
    engine = next((report.results[role] for role in ENGINE_ROLES if role in report.results), None)
    lines += _together(engine.measurements[-1:] if engine else [], report)
    ratios = {m.seq_length: m for m in engine.measurements if m.ratio_to_fastest is not None} if engine else {}
    if ratios:
        cells = [f"{ratios[n].ratio_to_fastest:.2f} x" if n in ratios else "n/a" for n in shown]
        lines.append(f"{'engine / fastest':<24}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _together(measurements: Sequence[Any], report: Report[ThroughputResult]) -> list[str]:
    """What several GPUs make of one, of the engine at its longest length."""
    ranks = "GPUs" if report.environment.get("device") == "cuda" else "processes"
    return [
        f"engine on {report.environment.get('world_size')} {ranks} at T = {m.seq_length:,}: {100 * m.scaling_efficiency:.1f} % "
        f"of as many times one, {m.tokens_per_second_per_gpu:,.0f} tokens/s each, communication "
        f"{m.communication_time_ms:.2f} of {m.total_time_ms:.2f} ms"
        for m in measurements
        if m.scaling_efficiency is not None
    ]


def decoding_numbers(report: Report[ThroughputResult]) -> list[str]:
    """Tokens per second of generation after every context, where they were measured."""
    found = {key: result.decoding for key, result in report.results.items() if result.decoding is not None}
    contexts = sorted({point.context for decoding in found.values() for point in decoding.points})
    if not contexts:
        return []
    shown = contexts if len(contexts) <= 6 else [*contexts[:3], *contexts[-3:]]
    lines = [f"{'generated/s after':<24}" + "".join(f"{context:>12,}" for context in shown)]
    for key, decoding in found.items():
        speeds = {point.context: f"{point.decode_tokens_per_second:,.0f}" for point in decoding.points}
        lines.append(f"{model_title(key):<24}" + "".join(f"{speeds.get(context, ''):>12}" for context in shown))
    return lines


def _speed(m: Any) -> str:
    if m is None:
        return ""
    return f"{m.tokens_per_second:,.0f}" if m.tokens_per_second else {"oom": "OOM"}.get(m.status, "failed")


def perplexity_numbers(report: Report[PerplexityResult]) -> list[str]:
    """Perplexity, bits per byte and size of the table of every model."""
    lines = [f"{'':<36} {'perplexity':>11} {'bits/byte':>10} {'vs Transformer':>15} {'table':>9}"]
    for key, result in report.results.items():
        value = {"oom": "OOM", "error": "FAIL"}.get(result.status, "")
        if result.status == "ok":
            value = "UNTRAINED" if result.untrained else f"{result.perplexity:,.2f}"
        known = result.status == "ok" and not result.untrained
        change = "" if result.ppl_degradation_percent is None else f"{result.ppl_degradation_percent:+.2f} %"
        size = f"{result.parameters.embedding / 1e6:.2f}M" if result.parameters else ""
        bits = f"{result.bits_per_byte:.3f}" if known and result.bits_per_byte is not None else ""
        lines.append(f"{model_title(key):<36.36} {value:>11} {bits:>10} {change:>15} {size:>9}")
    untrained = [model_title(key) for key, result in report.results.items() if result.untrained]
    if untrained:
        lines.append(f"UNTRAINED, no better than the unigram entropy: {', '.join(untrained)}; more --train-tokens")
    return lines


def conditions(report: Report[Any]) -> str:
    """The hardware, whether numbers are measured or estimated, and the pieces in which the engine trains, if any."""
    pieces = report.run.get("piece_length")
    return hardware_of(report) + (f", engine in pieces of {pieces:,}" if pieces else "")
