"""The fixed words of the page, in English and Japanese. What records and tables say stays as they say it."""

from collections.abc import Callable

from phase1.tables.screen import ClaimWords, claim

Words = Callable[[str], str]
JAPANESE = {
    "pass": "合格",
    "fail": "不合格",
    "inconclusive": "判定不能",
    "report": "評価レポート",
    "verdicts": "判定",
    "warnings": "警告",
    "memory": "メモリ",
    "throughput": "スループット",
    "perplexity": "パープレキシティ",
    "training": "学習",
    "changes": "前回からの変化",
    "environment": "環境",
    "commands": "再現手順",
    "data": "データ",
    "check": "項目",
    "verdict": "判定",
    "value": "値",
    "limit": "基準",
    "why": "根拠",
    "fact": "内容",
    "model": "モデル",
    "metric": "指標",
    "old": "前回",
    "new": "今回",
    "change": "変化",
    "measured": "実測",
    "estimated": "推定",
    "emulated": "エミュレーション",
    "no result": "結果なし",
    "notes": "注記",
    "samples": "生成例",
    "settings": "設定",
    "no checks": "判定する項目がありません。",
    "missing": "このフォルダーにない結果",
    "no plot": "図なし",
    "also": "下位フォルダーにある結果（このページには含まれません）",
    "written": "作成日時",
    "nothing in common": "両方にある数値はありません。",
    ", ": "、",
    "{} of {} checks pass": "{1} 項目中 {0} 項目が合格",
    "{} failed": "不合格 {}",
    "{} undecided": "判定不能 {}",
    "a plot of numbers in the tables": "表にある数値のグラフ",
    "every table as CSV, every result file as JSON": "すべての表（CSV）と結果ファイル（JSON）",
}
ENGLISH = {
    "report": "Phase 1 report",
    "commands": "how to repeat",
    "missing": "not in this folder",
    "also": "further results in folders below, not on this page",
}
CLAIMS = {
    "reduction_50_percent": "Transformer に対するメモリ削減",
    "one_sequence_trains": "1 系列の学習が可能",
    "scaling_linear": "ステップ時間が T に対して線形",
    "decode_constant": "生成速度が文脈長によらず一定",
    "r_squared": "直線の R²",
    "a_a_no_difference": "同一モデル 2 つに差がない",
    "control_rejected": "二次のモデルを検出できる",
    "fits_vram_limit": "エンジンが --vram-limit に収まる",
}


def english(key: str) -> str:
    """The words of `key`; a heading begins with a capital."""
    return ENGLISH.get(key, key)


def japanese(key: str) -> str:
    return JAPANESE[key]


JAPANESE_CLAIMS = ClaimWords(
    CLAIMS,
    size=lambda gb: f"エンジンが {gb} GB のカードに収まる",
    card=lambda name: f"エンジンが {name} に収まる",
    perplexity=lambda model, mean: f"{model}：パープレキシティ{'（シード平均）' if mean else ''}",
)


def claim_in(language: str, name: str) -> str:
    """What the check `name` claims."""
    return claim(name) if language == "en" else claim(name, JAPANESE_CLAIMS)
