"""The first table of docs/results.md and both READMEs: five rows that say what the engine is worth, from the records."""

from pathlib import Path
from typing import Any

from phase1.records.collect import read_reports
from phase1.records.schema import MemoryResult, PerplexityResult, Report, Result, ThroughputResult
from phase1.roster import ENGINE_ROLES, TRANSFORMERS, Key
from phase1.tables.rows import benchmark

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "head": "| | Transformer | the engine's strongest rival \\* | engine |\n|---|---:|---:|---:|",
        "conditions": "Measured on {card}: width {d_model}, {n_layers} layers, vocabulary {vocab_size:,}, {tokens:,} "
        "training tokens of {train}, seeds {seeds}{link}.",
        "link": " ([every table, command and interval](docs/results.md), [targets met and missed](docs/results.md#targets))",
        "memory": "peak memory of a training step, {b} × {t:,} tokens (GB)",
        "in pieces": ", in pieces {}",
        "speed": "training speed at {t} tokens (thousand tokens/s)",
        "linear": "does the time grow in proportion to the length?",
        "parameters": "parameters (of these in the token table)",
        "perplexity": "perplexity of {text}",
        "linear_": "**yes** (T^{exponent:.2f})",
        "not linear_": "no",
        "inconclusive_": "undecided",
        "million": "{total:.1f}M ({table:.1f}M)",
        "comma": ", ",
        "tricks": "\\* A Transformer too, another one in each row. Memory and time: activations recomputed, loss "
        "in chunks, as in the engine of these rows. Speed: the fastest that there is; it and the engine compiled, nothing "
        "recomputed, for which the engine needs more memory than it. Time: `phase1 throughput` as documented, not compiled; a "
        "step takes T to that power, 1 in the long run and less where part of it is the same at every length. Parameters and "
        "perplexity: started from the same statistics, with AR-SSM's convolution, gate and normed queries, and with the "
        "engine's copy head.",
    },
    "ja": {
        "head": "| | Transformer | 最も強い比較相手 \\* | エンジン |\n|---|---:|---:|---:|",
        "conditions": "{card} での実測：幅 {d_model}、{n_layers} 層、語彙 {vocab_size:,}、"
        "{train} の {tokens:,} トークンで学習、シード {seeds}{link}。",
        "link": "（[すべての表、コマンド、信頼区間](docs/results.md)、[目標とその成否](docs/results.md#targets)）",
        "memory": "学習 1 ステップのピークメモリ、{b} × {t:,} トークン（GB）",
        "in pieces": "、区間ごとの学習で {}",
        "speed": "学習速度、系列長 {t} トークン（千トークン/秒）",
        "linear": "時間は系列長に比例するか",
        "parameters": "パラメータ数（うちトークンテーブル）",
        "perplexity": "{text} のパープレキシティ",
        "linear_": "**はい**（T^{exponent:.2f}）",
        "not linear_": "いいえ",
        "inconclusive_": "判定不能",
        "million": "{total:.1f}M（{table:.1f}M）",
        "comma": "、",
        "tricks": "\\* これも Transformer で、行ごとに異なる。メモリと時間：エンジンと同じく活性を再計算し、"
        "損失を分割して計算したもの。速度：最も速いもの。エンジンとともにコンパイルし、再計算なし。このときエンジンのメモリは"
        "これより多い。時間：文書どおりの `phase1 throughput` の結果で、コンパイルなし。"
        "1 ステップの時間は T のこの指数乗で、長い系列では 1 に近づき、系列長によらない時間がある間は 1 より小さくなる。"
        "パラメータ数とパープレキシティ：同じ統計から学習を始め、AR-SSM の畳み込み、ゲート、クエリの正規化と、"
        "エンジンのコピーヘッドを加えたもの。M は百万。",
    },
}
TEXTS = {"wikitext103": "WikiText-103", "wikipedia": "English Wikipedia"}
MODELS = ("baseline", "transformer_fair_copy", "phase1")  # of the columns, where parameters and perplexity are compared


def summary(root: Path, listed: dict[str, Any], language: str, link: bool = True) -> str:
    """The table, what it was measured on and what its second column is, as Markdown.

    listed: the records by row (`memory`, `speed`, `linear`, `perplexity`), each relative to results/; `speed` is a throughput
        report or a record of benchmarks/steps.py.
    """
    words = WORDS[language]
    memory, linear, perplexity = (_report(root, listed[name]) for name in ("memory", "linear", "perplexity"))
    rows = [
        _memory(memory, words),
        speed_row(benchmark(root / "results" / listed["speed"]), words),
        _linear(linear, words),
        _parameters(perplexity, words),
        _perplexity(perplexity, words),
    ]
    engine = _of(perplexity, "phase1")[0]
    seeds = words["comma"].join(str((r.training or {}).get("seed", "?")) for r in _of(perplexity, "phase1"))
    sizes = {name: engine.config[name] for name in ("d_model", "n_layers", "vocab_size")}
    train = engine.trained_on.name if engine.trained_on else "?"
    more = {
        "card": memory.environment.get("gpu"),
        "tokens": engine.trained_tokens,
        "seeds": seeds,
        "train": TEXTS.get(train, train),
    }
    conditions = words["conditions"].format(**sizes, **more, link=words["link"] if link else "")
    return "\n".join([conditions, "", words["head"], *("| " + " | ".join(row) + " |" for row in rows), "", words["tricks"]])


def _report(root: Path, name: str) -> Report[Any]:
    (report,) = read_reports(root / "results" / name).values()
    return report


def _memory(report: Report[MemoryResult], words: dict[str, str]) -> list[str]:
    label = words["memory"].format(b=report.run["batch_size"], t=report.run["seq_length"])
    peaks = [report.results[role].peak_allocated_bytes for role in ("baseline", "baseline_optimized", "phase1")]
    cells = [_three_digits(peak / 1e9) if peak else "–" for peak in peaks]
    pieces = report.results.get("phase1_pieces")
    if pieces is not None and pieces.peak_allocated_bytes:
        cells[-1] += words["in pieces"].format(_three_digits(pieces.peak_allocated_bytes / 1e9))
    return [label, *cells]


def speed_row(content: Any, words: dict[str, str]) -> list[str]:
    """At the shortest, a middle and the longest length at which all were measured."""
    columns = _speeds_of_report(content) if "kind" in content else _speeds_of_steps(content)
    known = [set(column) for column in columns if column]
    lengths = sorted(set.intersection(*known))
    shown = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    label = words["speed"].format(t=" / ".join(f"{T:,}" for T in shown))
    best = {T: max(column.get(T, 0.0) for column in columns) for T in shown}
    return [label, *(" / ".join(_thousands(column[T], best[T]) for T in shown) if column else "–" for column in columns)]


def _thousands(speed: float, best: float) -> str:
    return f"**{speed / 1e3:,.0f}**" if speed == best else f"{speed / 1e3:,.0f}"


def _speeds_of_report(content: dict[str, Any]) -> list[dict[int, float]]:
    """Tokens/s by length: of the baseline, of the fastest other Transformer, of the engine."""

    def speeds(role: str) -> dict[int, float]:
        found = content["results"].get(role, {}).get("measurements", [])
        return {m["seq_length"]: m["tokens_per_second"] for m in found if m["status"] == "ok"}

    others = [speeds(role) for role in TRANSFORMERS if role != "baseline"]
    fastest = {T: max(s.get(T, 0.0) for s in others) for T in sorted(set().union(*others))}
    return [speeds("baseline"), fastest, next(filter(None, map(speeds, ENGINE_ROLES)), {})]


def _speeds_of_steps(content: Any) -> list[dict[int, float]]:
    """The same of steps.json, which has the fastest Transformer alone; the engine is the one of the default output."""
    rows = [row for row in (content["rows"] if isinstance(content, dict) else content) if "htt_output" not in row["settings"]]
    fastest = {r["seq_length"]: r["tokens_per_s"] for r in rows if r["role"] in TRANSFORMERS}
    return [{}, fastest, {r["seq_length"]: r["tokens_per_s"] for r in rows if r["role"] == "phase1"}]


def _linear(report: Report[ThroughputResult], words: dict[str, str]) -> list[str]:
    found = [report.results.get(role) for role in ("baseline", "baseline_optimized", "phase1")]
    scalings = [result.scaling if result else None for result in found]
    return [words["linear"], *(words[f"{s.verdict}_"].format(exponent=s.exponent) if s else "–" for s in scalings)]


def _of(report: Report[PerplexityResult], plain: str) -> list[PerplexityResult]:
    """The results of one model, a seed each; `phase1` is the first engine of the report."""
    names = [Key.parse(key).model for key in report.results]
    wanted = next(name for name in names if name.startswith("phase1")) if plain == "phase1" else plain
    return [result for name, result in zip(names, report.results.values()) if name == wanted]


def _parameters(perplexity: Report[Any], words: dict[str, str]) -> list[str]:
    return [words["parameters"], *(_millions(_of(perplexity, model)[0], words) for model in MODELS)]


def _millions(result: Result, words: dict[str, str]) -> str:
    assert result.parameters is not None
    return words["million"].format(total=result.parameters.total / 1e6, table=result.parameters.embedding / 1e6)


def _perplexity(perplexity: Report[Any], words: dict[str, str]) -> list[str]:
    models = [_of(perplexity, model) for model in MODELS]
    dataset = models[0][0].dataset
    label = words["perplexity"].format(text=TEXTS.get(dataset.name, dataset.name) if dataset else "")
    return [label, *(words["comma"].join(f"{r.perplexity:.1f}" for r in results) for results in models)]


def _three_digits(number: float) -> str:
    return f"{number:.3g}"
