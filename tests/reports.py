"""Reports as the commands write them, small: three models, four lengths; and what tests do with them."""

from pathlib import Path
from typing import Any

from phase1.cli import main
from phase1.records.schema import (
    FILES,
    Check,
    Dataset,
    Measurement,
    MemoryResult,
    Parameters,
    PerplexityResult,
    Report,
    ThroughputResult,
    write_report,
)
from phase1.stats.scaling import fit_scaling

ENVIRONMENT = {"device": "cuda", "gpu": "NVIDIA Test 10GB", "gpu_memory_bytes": 10 * 10**9, "cpu": "Test CPU", "cpu_cores": 2}
SIZES = {"vocab_size": 50257, "d_model": 512, "n_layers": 8, "n_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "baseline": SIZES | {"mixer": "attention", "embedding": "dense", "loss": "materialized", "checkpointing": False},
    "baseline_optimized": SIZES | {"mixer": "attention", "embedding": "dense", "loss": "chunked", "checkpointing": True},
    "baseline_fast": SIZES | {"mixer": "attention", "embedding": "dense", "loss": "chunked", "checkpointing": False},
    "phase1": SIZES | {"mixer": "ar_ssm", "embedding": "htt", "loss": "chunked", "checkpointing": True},
}
MODELS["phase1_pieces"] = MODELS["phase1"]
PARAMETERS = {
    "baseline": Parameters(total=51_000_000, embedding=25_731_584, mixer=8_400_000, mlp=16_800_000),
    "baseline_optimized": Parameters(total=51_000_000, embedding=25_731_584, mixer=8_400_000, mlp=16_800_000),
    "baseline_fast": Parameters(total=51_000_000, embedding=25_731_584, mixer=8_400_000, mlp=16_800_000),
    "phase1": Parameters(total=28_500_000, embedding=2_900_000, mixer=8_700_000, mlp=16_800_000),
}
PARAMETERS["phase1_pieces"] = PARAMETERS["phase1"]


def common(role: str, **changes: Any) -> dict[str, Any]:
    """What a result of every kind has."""
    return {
        "model_name": role,
        "config": MODELS[role],
        "config_id": f"id-{role}",
        "status": "ok",
        "basis": "measured",
        "parameters": PARAMETERS[role],
    } | changes


def failed(role: str, status: str = "oom") -> dict[str, Any]:
    return common(role, status=status, parameters=None, detail="out of memory; try --batch-size 2")


def memory_result(role: str, peak: int, **changes: Any) -> MemoryResult:
    breakdown = {"parameters": peak // 10, "activations": peak // 2, "logits_loss": peak - peak // 10 - peak // 2}
    return MemoryResult(
        **common(role),
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + 100_000_000,
        outside_allocator_bytes=400_000_000,
        peak_forward_bytes=peak - 50,
        peak_backward_bytes=peak,
        peak_optimizer_bytes=peak // 2,
        breakdown=breakdown,
    ).model_copy(update=changes)


def memory_report(**changes: Any) -> Report[MemoryResult]:
    results = {
        "baseline": memory_result("baseline", 9_260_000_000),
        "baseline_optimized": memory_result("baseline_optimized", 3_400_000_000, memory_reduction_percent=63.3),
        "phase1": memory_result("phase1", 2_310_000_000, memory_reduction_percent=75.05),
    }
    checks = [
        Check(name="fits_8gb", value=2.81e9, limit=7.2e9, status="pass", detail="measured: reserved bytes"),
        Check(name="fits_10gb", value=2.81e9, limit=9.0e9, status="pass", detail="measured: reserved bytes"),
        Check(name="reduction_50_percent", value=75.05, limit=50.0, status="pass", detail="measured: percent"),
    ]
    fields = {
        "kind": "memory",
        "environment": ENVIRONMENT,
        "command": "phase1 memory",
        "run": {"batch_size": 4, "seq_length": 2048},
        "results": results,
        "checks": checks,
    }
    return Report[MemoryResult](**(fields | changes))


def measurement(seq_length: int, seconds: float, **changes: Any) -> Measurement:
    ms = 1000 * seconds
    return Measurement(
        seq_length=seq_length,
        batch_size=4,
        forward_time_ms=ms * 0.3,
        backward_time_ms=ms * 0.6,
        optimizer_time_ms=ms * 0.1,
        total_time_ms=ms,
        tokens_per_second=4 * seq_length / seconds,
        samples_per_second=4 / seconds,
        peak_allocated_bytes=seq_length * 1_000_000,
        step_times_ms=[ms] * 5,
        status="ok",
    ).model_copy(update=changes)


def throughput_result(role: str, seconds: list[float], lengths: tuple[int, ...] = (512, 1024, 2048, 4096)) -> ThroughputResult:
    return ThroughputResult(
        **common(role),
        measurements=[measurement(n, s) for n, s in zip(lengths, seconds)],
        scaling=fit_scaling(lengths, seconds),
        excluded_seconds=12.0,
    )


def throughput_report(**changes: Any) -> Report[ThroughputResult]:
    results = {
        "baseline": throughput_result("baseline", [0.020, 0.046, 0.116, 0.328]),
        "phase1": throughput_result("phase1", [0.021, 0.041, 0.081, 0.161]),
    }
    oom = {"status": "oom", "total_time_ms": None, "tokens_per_second": None, "detail": "out of memory; try --batch-size 2"}
    results["baseline"].measurements[3] = measurement(4096, 1.0, **oom)
    fields = {
        "kind": "throughput",
        "environment": ENVIRONMENT,
        "command": "phase1 throughput",
        "run": {"batch_size": 4, "seq_lengths": (512, 1024, 2048, 4096)},
        "results": results,
        "checks": [Check(name="scaling_linear", value=1.0, limit=None, status="pass", detail="linear")],
    }
    return Report[ThroughputResult](**(fields | changes))


def perplexity_result(role: str, perplexity: float, **changes: Any) -> PerplexityResult:
    return PerplexityResult(
        **common(role),
        perplexity=perplexity,
        bits_per_byte=1.21,
        word_perplexity=perplexity**1.3,
        avg_loss=3.6,
        token_count=250_000,
        byte_count=1_100_000,
        word_count=200_000,
        trained_tokens=90_000_000,
        train_seconds=900.0,
        dataset=Dataset(name="wikipedia", split="valid", sha256="ab" * 32),
        protocol_hash="0123456789ab",
    ).model_copy(update=changes)


def perplexity_report(**changes: Any) -> Report[PerplexityResult]:
    verdict = {"ppl_degradation_percent": 6.2, "degradation_ci95": (5.4, 7.0), "passes_5_percent_threshold": False}
    results = {
        "baseline": perplexity_result("baseline", 34.9),
        "phase1_htt16_ar32": perplexity_result("phase1", 37.06, effective_rank=21.5, **verdict),
    }
    fields = {
        "kind": "perplexity",
        "environment": ENVIRONMENT,
        "command": "phase1 perplexity",
        "run": {"seq_length": 512},
        "results": results,
        "checks": [Check(name="phase1_htt16_ar32_within_5_percent", value=6.2, limit=5.0, status="fail", detail="percent")],
    }
    return Report[PerplexityResult](**(fields | changes))


def all_reports() -> dict[str, Report[Any]]:
    return {"memory": memory_report(), "throughput": throughput_report(), "perplexity": perplexity_report()}


def write_all(folder: Path) -> Path:
    """A result file of every kind in `folder`."""
    for kind, report in all_reports().items():
        write_report(report, folder / FILES[kind])
    return folder


def make_tables(results: Path, *flags: str) -> int:
    """Exit code of `phase1 tables`; the tables go to the folder `out` beside the results."""
    return main(["tables", "--results-dir", str(results), "--out-dir", str(results.parent / "out"), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    """What every file of `folder` holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_one_line(text: str) -> None:
    """A message: one line of printable characters."""
    assert text.endswith("\n") and text[:-1].isprintable(), text
