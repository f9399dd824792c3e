"""The guides' table of cards: the preset of each and the largest batch that trains, from records of `--card NAME --fit`."""

from collections.abc import Sequence
from typing import Final

from phase1.machine.cards import card_for
from phase1.presets import PRESETS
from phase1.records.schema import MemoryResult, Report
from phase1.tables.memory import sizes_of

WORDS: Final = {
    "en": {
        "head": "| card | `--preset` | Transformer | Transformer, same tricks | engine | engine, in pieces |\n"
        "|---|---|---:|---:|---:|---:|",
        "about": "Largest batch of {t:,} tokens a sequence that trains, estimated ([longest sequences](results.md"
        "#memory-of-a-training-step)). How long training takes is not known for these cards: none has been measured.",
        "none": "none; `--card {card} --fit`",
    },
    "ja": {
        "head": "| カード | `--preset` | Transformer | 同じ工夫を加えた Transformer | エンジン | エンジン、区間ごと |\n"
        "|---|---|---:|---:|---:|---:|",
        "about": "1 系列 {t:,} トークンで学習できる最大のバッチ（推定。"
        "[最長の系列](../results.md#memory-of-a-training-step)）。"
        "これらのカードではまだ測定していないため、学習にかかる時間は分かっていません。",
        "none": "なし。`--card {card} --fit`",
    },
}
SHOWN: Final = ("baseline", "baseline_optimized", "phase1", "phase1_pieces")


def your_card(reports: Sequence[Report[MemoryResult]], language: str) -> str:
    """The table as Markdown; a card of no preset has the flags that say what fits it."""
    words = WORDS[language]
    rows = [[str(report.run["card_name"]), _preset(report, words), *_batches(report)] for report in reports]
    about = words["about"].format(t=reports[0].run["seq_length"])
    return "\n".join([about, "", words["head"], *(f"| {' | '.join(row)} |" for row in rows)])


def _preset(report: Report[MemoryResult], words: dict[str, str]) -> str:
    card = card_for(str(report.run["card"]))
    mine = [name for name in PRESETS if name != "smoke" and card_for(name) == card]
    return f"`{mine[0]}`" if mine else words["none"].format(card=card.key)


def _batches(report: Report[MemoryResult]) -> list[str]:
    """Of each model; n/a where it was not searched."""
    batches = (sizes_of(report.results[role].fit if role in report.results else [])[0] for role in SHOWN)
    return ["n/a" if batch is None else str(batch) for batch in batches]
