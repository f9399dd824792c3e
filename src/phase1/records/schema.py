"""The result schema, and the one way a result file is written and read."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from phase1.files import atomic_write, read_json
from phase1.records.migrate import SCHEMA_VERSION, migrated
from phase1.roster import FAST, PIECES, Key
from phase1.text import one_line

FILES = {
    "memory": "phase1_memory_validation.json",
    "throughput": "phase1_throughput_benchmark.json",
    "perplexity": "phase1_perplexity_validation.json",
}

Kind = Literal["memory", "throughput", "perplexity"]
Status = Literal["ok", "oom", "error"]
Basis = Literal["measured", "estimated", "emulated"]
Verdict = Literal["linear", "not linear", "inconclusive"]
ComplexityOrder = Literal["O(N)", "O(N log N)", "O(N^2)"]


def _plain_json(value: Any) -> Any:
    """`value` as it reads back from JSON: tuples become lists, and a value that JSON cannot hold is refused."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not plain JSON ({error})") from error


JsonObject = Annotated[dict[str, Any], BeforeValidator(_plain_json)]
Interval = Annotated[tuple[float, float], Field(strict=False)]  # a JSON list on reading; its numbers stay strict


class _Record(BaseModel):
    """Strict types (an int may stand for a float), no unknown field, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Check(_Record):
    """One claim: `value` against `limit`, both in the unit that `detail` names."""

    name: str
    value: float | None
    limit: float | None
    status: Literal["pass", "fail", "inconclusive"]
    detail: str = ""

    @classmethod
    def below(cls, name: str, value: float | None, limit: float, detail: str) -> Self:
        """Pass if `value` < `limit`; inconclusive without a value."""
        return cls._judged(name, value, limit, detail, value is not None and value < limit)

    @classmethod
    def at_most(cls, name: str, value: float | None, limit: float, detail: str) -> Self:
        """Pass if `value` <= `limit`; inconclusive without a value."""
        return cls._judged(name, value, limit, detail, value is not None and value <= limit)

    @classmethod
    def above(cls, name: str, value: float | None, limit: float, detail: str) -> Self:
        """Pass if `value` > `limit`; inconclusive without a value."""
        return cls._judged(name, value, limit, detail, value is not None and value > limit)

    @classmethod
    def undecided(cls, name: str, detail: str, limit: float | None = None, value: float | None = None) -> Self:
        """A claim that cannot be judged; `detail` says why and what would decide it."""
        return cls(name=name, value=value, limit=limit, status="inconclusive", detail=detail)

    @classmethod
    def _judged(cls, name: str, value: float | None, limit: float, detail: str, passes: bool) -> Self:
        if value is None:
            return cls.undecided(name, detail, limit)
        return cls(name=name, value=value, limit=limit, status="pass" if passes else "fail", detail=detail)


class Execution(_Record):
    """How a step ran, as seen while it did."""

    device: str
    precision: str = Field(description="type of most matrix products")
    attention: str | None = Field(default=None, description="cudnn, flash, efficient or math; None without attention")
    kernels: str = Field(description="triton or torch: of the loss and other operators with a kernel of their own")
    compiled: bool
    cuda_graphs: bool
    piece_length: int | None = Field(default=None, description="tokens of a sequence at a time; None: whole sequences")
    optimizer: str | None = Field(default=None, description="adamw or muon; None, in older records: adamw")
    otherwise: list[str] = Field(default_factory=list, description="what ran otherwise than asked")


class Parameters(_Record):
    """Numbers of trained values; `total` includes the norms, which no other field counts."""

    total: int
    embedding: int
    mixer: int
    mlp: int
    copy_head: int = 0


class Result(_Record):
    """What every model of a report has; the fields of a failed result may be None."""

    model_name: str
    config: JsonObject
    config_id: str
    status: Status
    basis: Basis
    parameters: Parameters | None = None
    detail: str = Field(default="", description="of a failed result: the message, and the sizes to try next")

    def _needed(self) -> dict[str, Any]:
        """The fields that a result with status ok has."""
        return {"parameters": self.parameters}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "ok":
            missing = [name for name, value in self._needed().items() if value is None]
            if missing:
                raise ValueError(f"a result with status ok has {' and '.join(missing)}; got none")
        elif not self.detail:
            raise ValueError(f"a result with status {self.status} says why in detail; got an empty one")
        return self


class FitProbe(_Record):
    """Whether a training step of one size ran; `needed_bytes` is reserved memory and what is outside the allocator."""

    batch_size: int
    seq_length: int
    status: Status
    needed_bytes: int | None = None
    detail: str = ""


class Fit(_Record):
    """The largest size that trains: of one of the two sizes, at a fixed value of the other.

    status: ok where `batch_size` and `seq_length` are the answer; oom where not even the smallest size trains; error where a
        probe failed for another reason (`detail`) and the search ended there.
    """

    searched: Literal["batch_size", "seq_length"]
    status: Status
    batch_size: int | None = None
    seq_length: int | None = None
    step: int = Field(description="the searched size is a multiple of it; one step more does not train, unless at the bound")
    bound: int = Field(description="the search goes no further: an answer equal to it is a lower limit")
    limit_bytes: int | None = Field(description="of the card, for allocator and all else; None where a whole card was used")
    basis: Basis
    probes: list[FitProbe] = Field(description="every size that was tried, in order")
    detail: str = ""


class MemoryTimeline(_Record):
    """Live bytes by part at some instants of a step, counted in allocations and frees; the peak is one of the instants."""

    events: int = Field(description="allocations and frees of the whole step")
    phase_begins: dict[str, int] = Field(description="events before the forward, backward and optimizer phase")
    at: list[int] = Field(description="events before each instant")
    parts: dict[str, list[int]] = Field(description="bytes of each part at each instant")

    @model_validator(mode="after")
    def _one_value_per_instant(self) -> Self:
        if wrong := [name for name, values in self.parts.items() if len(values) != len(self.at)]:
            raise ValueError(f"every part of a timeline has {len(self.at)} values, one per instant; {wrong[0]!r:.80} has not")
        return self


class MemoryResult(Result):
    """Peaks of one training step, in bytes; reduction against the `baseline` of the same report, in percent."""

    peak_allocated_bytes: int | None = None
    peak_by_rank_bytes: list[int] | None = Field(default=None, description="of several GPUs, each; the largest is the peak")
    peak_reserved_bytes: int | None = None
    outside_allocator_bytes: int | None = Field(default=None, description="CUDA context and libraries, from the driver")
    peak_forward_bytes: int | None = None
    peak_backward_bytes: int | None = None
    peak_optimizer_bytes: int | None = None
    breakdown: dict[str, int] = Field(
        default_factory=dict, description="parts of peak_allocated_bytes; with unattributed_bytes they sum to it"
    )
    unattributed_bytes: int | None = Field(default=None, description="what the parts leave of the peak; may be negative")
    fragmentation_bytes: int | None = Field(default=None, description="peak_reserved_bytes - peak_allocated_bytes")
    top_modules: dict[str, int] = Field(default_factory=dict, description="bytes alive at the peak by module, largest first")
    timeline: MemoryTimeline | None = None
    assumptions: str | None = Field(default=None, description="of an estimate: the card it is for")
    memory_reduction_percent: float | None = None
    estimated_peak_bytes: int | None = Field(default=None, description="of a model that ran out of memory: its peak, estimated")
    estimated_needed_bytes: int | None = Field(
        default=None, description="that, reserved and with what is outside the allocator"
    )
    ran: Execution | None = Field(default=None, description="how the steps ran; none of an estimate")
    fit: list[Fit] = Field(default_factory=list, description="largest sizes that train, where --fit asked for them")

    def _needed(self) -> dict[str, Any]:
        return super()._needed() | {"peak_allocated_bytes": self.peak_allocated_bytes}


class Measurement(_Record):
    """Step times of one model at one length: medians of the parts, and every raw step time."""

    seq_length: int
    batch_size: int = Field(description="sequences of a step; of every GPU's step where there are several")
    forward_time_ms: float | None = None
    backward_time_ms: float | None = None
    optimizer_time_ms: float | None = None
    communication_time_ms: float | None = Field(default=None, description="of several GPUs: the sum of gradients, and the wait")
    total_time_ms: float | None = Field(default=None, description="of several GPUs that of the slowest")
    tokens_per_second: float | None = Field(default=None, description="of all GPUs")
    tokens_per_second_per_gpu: float | None = Field(default=None, description="of several GPUs: tokens_per_second over them")
    one_gpu_tokens_per_second: float | None = Field(
        default=None, description="of one of several GPUs without the others, with the same batch, in the same rounds"
    )
    scaling_efficiency: float | None = Field(
        default=None, description="tokens/s per GPU of all together over those of one alone, from pairs of one round"
    )
    scaling_efficiency_ci95: Interval | None = Field(default=None, description="of scaling_efficiency; none under 5 rounds")
    samples_per_second: float | None = None
    tokens_per_second_ci95: Interval | None = Field(default=None, description="of the median; none under 5 steps")
    ratio_to_baseline: float | None = Field(default=None, description="tokens/s over the baseline's, from pairs of one round")
    ratio_ci95: Interval | None = Field(default=None, description="of ratio_to_baseline; none under 5 rounds")
    fastest: str | None = Field(default=None, description="the Transformer with the most tokens/s at this length")
    ratio_to_fastest: float | None = Field(
        default=None, description="tokens/s over those of `fastest`, from pairs of one round"
    )
    ratio_to_fastest_ci95: Interval | None = None
    ran: Execution | None = Field(default=None, description="how the steps ran; none in records of earlier versions")
    launch_time_ms: float | None = Field(default=None, description="median; until the host had launched the step, CUDA only")
    model_flops: int | None = Field(default=None, description="matrix products of one step, nothing computed twice")
    achieved_flops_per_second: float | None = Field(default=None, description="model_flops over the median step")
    mfu: float | None = Field(default=None, description="achieved_flops_per_second over the card's peak, a share")
    optimizer_bytes_per_second: float | None = Field(
        default=None, description="20 bytes per parameter, the least that a step with one moment moves, over optimizer_time_ms"
    )
    bandwidth_utilization: float | None = Field(
        default=None, description="optimizer_bytes_per_second over the card's bandwidth, a share"
    )
    peak_allocated_bytes: int | None = Field(default=None, description="of a step; with CUDA graphs, of one before the capture")
    peak_by_rank_bytes: list[int] | None = Field(default=None, description="of several GPUs, each; the largest is the peak")
    step_times_ms: list[float] = Field(default_factory=list, description="in the order of the rounds, which models share")
    status: Status
    detail: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "ok" and (self.total_time_ms is None or self.tokens_per_second is None):
            raise ValueError("a measurement with status ok has total_time_ms and tokens_per_second; got none")
        return self


class Scaling(_Record):
    """How step time grows with the sequence length (`phase1.stats.scaling.fit_scaling`)."""

    complexity_order: ComplexityOrder | None = None
    r_squared: float | None = Field(default=None, description="of the least-squares line t = a + b T")
    scaling_coefficient: float | None = Field(default=None, description="b of that line, seconds per position")
    exponent: float | None = Field(default=None, description="slope of log t against log T over the top octaves")
    exponent_ci95: Interval | None = None
    quadratic_share: float | None = Field(default=None, description="c T^2 / t at the longest T, of t = a + b T + c T^2")
    verdict: Verdict
    detail: str = ""


class DecodePoint(_Record):
    """The cost of one more token after `context` tokens, B = 1."""

    context: int
    prefill_tokens_per_second: float = Field(description="of the tokens from the context before to this, in pieces")
    decode_tokens_per_second: float = Field(description="1 over the median step")
    decode_tokens_per_second_ci95: Interval | None = None
    state_bytes: int = Field(description="all that later tokens need of the context")
    step_times_ms: list[float] = Field(description="in the order of the rounds, which contexts and models share")


class Decoding(_Record):
    """Generation over contexts, shortest first (`phase1.stats.decoding.judge`)."""

    points: list[DecodePoint]
    speed_ratio: float = Field(description="tokens/s at the longest context over those at the shortest")
    speed_ratio_ci95: Interval | None = None
    verdict: Literal["constant", "not constant", "inconclusive"]
    detail: str = ""


class ThroughputResult(Result):
    """Training throughput over sequence lengths, shortest first."""

    measurements: list[Measurement] = Field(default_factory=list)
    scaling: Scaling | None = None
    decoding: Decoding | None = Field(default=None, description="generation, where --decode asked for it")
    excluded_seconds: float | None = Field(default=None, description="compilation, autotuning and warm-up, in no number above")
    peak_basis: str = Field(default="", description="the card's peaks behind mfu, or why there are none")
    warnings: list[str] = Field(default_factory=list, description="what makes the times doubtful, and what to do")

    def _needed(self) -> dict[str, Any]:
        measured = [m for m in self.measurements if m.status == "ok"]
        return super()._needed() | {"a measurement with status ok": measured or None}


class Dataset(_Record):
    """The scored text; `sha256` is that of its tokens, so equal digests mean equal targets."""

    name: str
    split: str
    sha256: str


class LossPart(_Record):
    """Mean loss of the targets whose context or frequency rank is from `first` to `last`, both included."""

    first: int
    last: int
    tokens: int
    avg_loss: float = Field(description="nats per target token")


class PerplexityResult(Result):
    """Perplexity of one trained model; degradation against the `baseline` of the same report, in percent."""

    perplexity: float | None = None
    bits_per_byte: float | None = None
    word_perplexity: float | None = None
    avg_loss: float | None = Field(default=None, description="nats per target token")
    token_count: int | None = None
    byte_count: int | None = None
    word_count: int | None = None
    absent: dict[str, str] = Field(default_factory=dict, description="numbers that the scored text does not have, and why")
    trained_tokens: int | None = None
    skipped_steps: int | None = Field(default=None, description="of the training: gradients overflowed, nothing was learnt")
    ended_by: Literal["patience"] | None = Field(
        default=None,
        description="patience: --patience ended the training early; null: it did not, or is of an earlier version",
    )
    trained_on: Dataset | None = Field(default=None, description="the training text")
    trained_seq_length: int | None = Field(default=None, description="T in training; run.seq_length is that of the scoring")
    train_seconds: float | None = None
    training: JsonObject | None = Field(default=None, description="settings of the training run: rates, seed, batch...")
    weights_sha256: str | None = Field(default=None, description="of the checkpoint's file of weights: which ones were scored")
    kernels: str | None = Field(
        default=None, description="triton or torch, as of Execution, while the model was scored; none in older records"
    )
    otherwise: list[str] = Field(default_factory=list, description="what ran otherwise than asked")
    dataset: Dataset | None = None
    protocol_hash: str | None = None
    untrained: bool = Field(default=False, description="the model has not beaten the unigram entropy: no verdict")
    unsound: str = Field(
        default="", description="what is wrong with a user's model that may not be scored: no number of it means anything"
    )
    unigram_loss: float | None = Field(default=None, description="nats per token: entropy of the split's token frequencies")
    effective_rank: float | None = Field(default=None, description="mean over tokens of the sum of rank gates")
    ppl_degradation_percent: float | None = None
    degradation_ci95: Interval | None = None
    passes_5_percent_threshold: bool | None = None
    window_nll_nats: list[float] | None = Field(default=None, description="summed loss of every window, in order")
    window_tokens: list[int] | None = Field(default=None, description="targets of every window, in order")
    loss_by_position: list[LossPart] | None = Field(default=None, description="by tokens of the window before the target")
    loss_by_band: list[LossPart] | None = Field(default=None, description="by frequency rank of the target in training, from 0")
    loss_by_band_detail: str = Field(default="", description="why there is no loss_by_band")
    token_order_sha256: str | None = Field(default=None, description="of the ranks in loss_by_band: equal ones are comparable")

    def _needed(self) -> dict[str, Any]:
        return super()._needed() | {name: getattr(self, name) for name in ("perplexity", "trained_tokens", "protocol_hash")}

    @model_validator(mode="after")
    def _no_untrained_verdict(self) -> Self:
        if self.untrained and self.passes_5_percent_threshold is not None:
            raise ValueError("an untrained model has no verdict; got passes_5_percent_threshold; leave it out")
        return self


R = TypeVar("R", bound=Result)


class Ablation(_Record):
    """A model that differs from that of `from_role` in one component, and what that changes of the peak."""

    name: str
    from_role: str
    peak_allocated_bytes: int | None = None
    change_bytes: int | None = Field(default=None, description="against the peak of from_role; negative is a saving")
    detail: str = ""


class Report(_Record, Generic[R]):
    """One result file: the models of one run, its conditions, and the checks it made."""

    schema_version: Literal[3] = SCHEMA_VERSION
    kind: Kind
    created_utc: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    environment: dict[str, str | int | float | bool | None]
    command: str
    warnings: list[str] = Field(default_factory=list, description="what disturbed the whole run, and what to do")
    run: JsonObject = Field(default_factory=dict, description="the settings of the run, such as batch_size")
    results: dict[str, SerializeAsAny[R]]
    checks: list[Check] = Field(default_factory=list)
    ablation: list[Ablation] = Field(default_factory=list, description="memory: one component changed at a time")

    @model_validator(mode="after")
    def _results_of_this_kind(self) -> Self:
        expected = RESULTS[self.kind]
        if foreign := [type(result).__name__ for result in self.results.values() if not isinstance(result, expected)]:
            raise ValueError(f"results of kind {self.kind} are {expected.__name__}; got {foreign[0]}")
        if unknown := [key for key in self.results if not _is_key(key, self.kind)]:
            engine = "phase1_htt{rank}_ar{rank}" if self.kind == "perplexity" else "phase1"
            raise ValueError(f"a {self.kind} result is called baseline or {engine}; got {unknown[0]!r:.80}")
        return self


RESULTS: dict[str, type[Result]] = {"memory": MemoryResult, "throughput": ThroughputResult, "perplexity": PerplexityResult}
REPORTS: dict[str, type[Report[Any]]] = {
    "memory": Report[MemoryResult],
    "throughput": Report[ThroughputResult],
    "perplexity": Report[PerplexityResult],
}


def _is_key(text: str, kind: str) -> bool:
    """Whether a result of a report of `kind` can have this key: that of an engine, or another name, of a user's model too."""
    key = Key.parse(text)
    if text in FAST or text in PIECES:
        return kind == ("throughput" if text in FAST else "memory")
    if key.is_engine:
        return (key.ranks is not None) == (kind == "perplexity") and (kind == "perplexity" or key.seed is None)
    return re.fullmatch(r"(?!phase1)[a-z][a-z0-9_]{0,63}", text) is not None


def exit_code(checks: Iterable[Check]) -> int:
    """0 when all pass, 1 when one fails, 3 when none fails and one is inconclusive."""
    statuses = {check.status for check in checks}
    return 1 if "fail" in statuses else 3 if "inconclusive" in statuses else 0


def write_report(report: Report[Any], path: Path | str) -> None:
    """Write `report` as strict JSON. Raises ValueError where it holds NaN or infinity, OSError where it cannot be written."""
    try:
        text = json.dumps(report.model_dump(), indent=2, ensure_ascii=False, allow_nan=False)
        data = (text + "\n").encode()
    except ValueError as error:
        expected = "expected a report of finite numbers and valid text"
        raise ValueError(f"{one_line(path)}: {expected}; got {one_line(error)}; any old file is kept") from error
    atomic_write(path, data)


@overload
def read_report(path: Path | str, kind: Literal["memory"]) -> Report[MemoryResult]: ...
@overload
def read_report(path: Path | str, kind: Literal["throughput"]) -> Report[ThroughputResult]: ...
@overload
def read_report(path: Path | str, kind: Literal["perplexity"]) -> Report[PerplexityResult]: ...
def read_report(path: Path | str, kind: Kind) -> Report[Any]:
    """The report of `kind` at `path`, migrated where it is of an older schema version.

    Raises:
        ValueError: one line that names the file, what was expected, what it holds and the remedy, where the file is
            missing, unreadable, not strict JSON, of another program or kind, of a newer schema, or breaks the schema.
    """
    try:
        return _parse(read_json(path), kind)
    except _Newer as error:
        expected = f"expected schema_version up to {SCHEMA_VERSION}"
        raise ValueError(f"{one_line(path)}: {expected}; got {error}; update phase1") from error
    except ValueError as error:
        remedy = f"run phase1 {kind} again or move the file away"
        raise ValueError(f"{one_line(path)}: expected a phase1 {kind} report; got {one_line(error)}; {remedy}") from error


class _Newer(ValueError):
    """A report of a later version of this program."""


def _parse(content: Any, kind: Kind) -> Report[Any]:
    if not isinstance(content, dict) or "schema_version" not in content or "kind" not in content:
        raise ValueError("JSON without schema_version and kind, the file of another program")
    version = content["schema_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"schema_version {version!r:.40}")
    if version > SCHEMA_VERSION:
        raise _Newer(version)
    if content["kind"] != kind:
        raise ValueError(f"a report of kind {content['kind']!r:.40}")
    try:
        return REPORTS[kind].model_validate(migrated(content, version))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "report"
        raise ValueError(f"{first['msg'].removeprefix('Value error, ')} at {where} ({error.error_count()} in all)") from error
