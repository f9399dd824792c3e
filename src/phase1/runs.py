"""The settings of every command, as frozen dataclasses: a field is a flag, its default and its help."""

from dataclasses import dataclass
from typing import Literal

from phase1.config import (
    Config,
    DataConfig,
    EngineShape,
    ModelConfig,
    ModelShape,
    Recompute,
    TrainConfig,
    WatchConfig,
    argument,
    check_ranks,
    option,
    recompute_option,
    require_not_negative,
    require_positive,
    require_sampling,
)
from phase1.factory import split
from phase1.machine.cards import card_for
from phase1.presets import Preset
from phase1.roster import Variant

PIECES = option(
    None, "train the engine so many tokens of each sequence at a time, with exact gradients; whole sequences by default"
)


def _names(models: tuple[str, ...]) -> list[str]:
    return [split(text)[0] for text in models]


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Config):
    """Where results go."""

    out_dir: str = option("results/benchmarks", "folder of the result files", affects_results=False)
    resume: bool = option(
        False, "keep the finished cases of an interrupted run of the same config, code and data", affects_results=False
    )
    verbose: bool = option(False, "print every table, not only the answer", affects_results=False)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Config):
    """What the engine is compared with."""

    baseline: bool = option(True, "measure the Transformer baselines too")


OWN_HELP = (
    "models of your own beside the others, NAME=package.module:factory; as baseline=... one stands in for the Transformer that "
    "the rest is compared with"
)


@dataclass(frozen=True, kw_only=True)
class MemoryRun(EngineShape, ComparisonConfig, OutputConfig):
    """Peak memory of a training step: engine, FP16 Transformer and optimised Transformer, each in a fresh process."""

    batch_size: int = option(4, "B, sequences per step")
    seq_length: int = option(2048, "T, tokens per sequence")
    recompute: Recompute = recompute_option("gradient_checkpointing", "the engine")
    piece_length: int | None = PIECES
    vram_limit: str | None = option(None, "cap the GPU memory of each model, for example 8GB, 7.2GB, 8GiB or bytes")
    card: str | None = option(
        None,
        'hold every model to the usable bytes of that card, for example "RTX 4060", and check that it fits; list names all',
    )
    fit: bool = option(False, "find the largest batch at --seq-length and the longest sequence at a batch of 1 that train")
    dry_run: bool = option(False, "estimate without running anything, even if there is a GPU; without one it always estimates")
    model: tuple[str, ...] = option((), OWN_HELP + ", as phase1=... for the engine")
    ablate: bool = option(False, "also measure baseline and engine with one component changed at a time: which saves how much")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch_size", "seq_length")
        if self.piece_length is not None:
            require_positive(self, "piece_length")
        if self.card not in (None, "list"):
            card_for(str(self.card))
        if self.ablate and any(name in ("baseline", "phase1") for name in _names(self.model)):
            raise ValueError("--ablate changes parts of phase1's models; got --model in place of one; leave one of them out")
        if self.ablate and not self.baseline:
            raise ValueError("--ablate compares engine and baseline; got --no-baseline; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class ThroughputRun(EngineShape, ComparisonConfig, OutputConfig):
    """Training throughput over sequence lengths, and whether the time is linear in the length."""

    seq_lengths: tuple[int, ...] = option(
        (512, 1024, 2048, 4096), "T, the lengths to measure; a verdict needs 4 over 8x", spellings=("seq_length",)
    )
    batch_size: int = option(4, "B, sequences per step")
    warmup_steps: int = option(5, "steps before the measurement, per model and length")
    measure_steps: int = option(20, "measured steps, per model and length")
    saturate: bool = option(
        True, "on a GPU that waits for the host or is not full at the shortest length, measure larger batches than --batch-size"
    )
    compile: bool = option(
        False,
        "torch.compile every model; by default only baseline_fast, on a GPU; compilation is not in the times",
    )
    cuda_graphs: bool | None = option(
        None, "launch forward and backward as two CUDA graphs, so that the host does not limit the speed; by default on a GPU"
    )
    piece_length: int | None = PIECES
    save_plots: bool = option(False, "write phase1_throughput_comparison.png", affects_results=False)
    decode: bool = option(False, "also measure generation, B = 1: tokens/s and bytes of the state over --decode-contexts")
    decode_contexts: tuple[int, ...] = option(
        (1024, 4096, 16384, 65536, 131072), "tokens before the one that is generated; a verdict needs 8x"
    )
    model: tuple[str, ...] = option((), OWN_HELP + ", as phase1=... for the engine")
    a_a: bool = option(False, "measure a second copy of the baseline (of the engine with --no-baseline): they must not differ")
    quadratic_control: bool = option(
        False,
        "measure attention that keeps all T x T scores: it must be found not linear; slow, memory grows with T x T",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "seq_lengths", "batch_size", "measure_steps", "warmup_steps", "decode_contexts")
        if self.piece_length is not None:
            require_positive(self, "piece_length")
        if self.decode and any(name in ("baseline", "phase1") for name in _names(self.model)):
            raise ValueError("--decode generates with phase1's own models; got --model in place of one; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class PerplexityRun(ModelShape, DataConfig, TrainConfig, ComparisonConfig, OutputConfig):
    """Perplexity of trained models on one evaluation text, engine against the FP16 Transformer."""

    baseline_learning_rate: float = option(
        3e-3, "--learning-rate of models with attention whose queries and keys are not normed: they bear less"
    )
    recompute: Recompute = recompute_option("gradient_checkpointing", "the engine")
    max_samples: int | None = option(None, "windows of --seq-length tokens to evaluate; all by default")
    seq_length: int = option(512, "T, tokens per window in evaluation, and in the training of what is not trained yet")
    stride: int | None = option(None, "S: every window but the first scores only its last S tokens; T by default, side by side")
    batch_size: int = option(8, "windows per forward pass of the evaluation; does not change the result")
    test_htt_ranks: tuple[int, ...] = option((16,), "HTT ranks to test, each with every AR-SSM rank", spellings=("htt_rank",))
    test_ar_ssm_ranks: tuple[int, ...] = option((32,), "AR-SSM ranks to test", spellings=("ar_ssm_max_rank",))
    engine: bool = option(True, "train the engine, with every pair of ranks; without it --variants and --model are left")
    variants: tuple[Variant, ...] = option(
        (),
        "further models, with the first rank of each kind: the engine with a dense table that starts like its own, with and "
        "without copy head, with attention, with all ranks always on, without copy head, with as many layers as fit into the "
        "baseline; the Transformer with a copy head, with the engine's start, with all that AR-SSM's block has (fair)",
    )
    model: tuple[str, ...] = option((), OWN_HELP + "; trained with --learning-rate, as baseline with its own")
    repeats: int = option(1, "trainings of every model, with --seed, --seed + 1, ...: how much of a difference is chance")
    checkpoint: tuple[str, ...] = option(
        (),
        "folders of trained models: these are evaluated, and none is trained; NAME=PATH gives one another name in the report",
    )
    also_evaluate: tuple[str, ...] = option(
        (), "further data sets whose validation texts every model is scored on; reports in folders of their names in --out-dir"
    )
    gpus: tuple[str, ...] = option(
        (),
        "train the models side by side, each in a process of its own: all is one on every GPU, 0 0 1 two on the first at a "
        "time and one on the second; by default one after the other",
        affects_results=False,
    )
    checkpoint_dir: str = option("results/checkpoints", "trained models, by hash of config and data; reused by later runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "seq_length", "batch_size", "test_htt_ranks", "test_ar_ssm_ranks", "repeats")
        require_positive(self, "baseline_learning_rate")
        _names(self.model)
        if self.gpus != ("all",) and not all(gpu.isdecimal() for gpu in self.gpus):
            raise ValueError(f"--gpus must be all, or numbers of GPUs; got {' '.join(self.gpus)}; try --gpus all")
        if not (self.engine or self.baseline or self.variants or self.model or self.checkpoint):
            raise ValueError("--no-engine and --no-baseline leave no model; got no --variants and no --model; give one")
        for name in ("max_samples", "stride"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if self.stride is not None and self.stride > self.seq_length:
            raise ValueError(f"--stride must be at most --seq-length={self.seq_length}; got {self.stride}; lower it")
        for htt_rank in self.test_htt_ranks:
            for ar_ssm_rank in self.test_ar_ssm_ranks:
                check_ranks(self, ar_ssm_rank, htt_rank)


@dataclass(frozen=True, kw_only=True)
class TablesRun(Config):
    """Comparison tables from result files."""

    results_dir: str = option("results/benchmarks", "folder with the result files of the other three scripts")
    out_dir: str | None = option(None, "folder of the tables; tables in --results-dir by default")
    hardware: str | None = option(None, "name to print for the hardware; by default the one in the result files")
    formats: tuple[Literal["markdown", "csv", "latex"], ...] = option(("markdown", "csv", "latex"), "formats to write")
    results_page: bool = option(
        False, "in a checkout, instead of all else: write docs/results.md and the results in READMEs and guides from records"
    )
    verbose: bool = option(False, "print every table, not only what was written")


@dataclass(frozen=True, kw_only=True)
class ReportRun(Config):
    """One HTML page of the results in a folder: verdicts, plots, tables, how to repeat them."""

    results_dir: str = option("results/benchmarks", "folder of a pipeline, of result files or of a training")
    out: str | None = option(None, "file to write; report.html in --results-dir by default")
    against: str | None = option(None, "folder or result file of an earlier run: what has changed since")
    lang: Literal["en", "ja"] = option("en", "language of the page's own words")


@dataclass(frozen=True, kw_only=True)
class CurvesRun(Config):
    """Losses of several trainings over their tokens, in one plot."""

    folders: tuple[str, ...] = argument("folders of trainings, or of folders of them")
    out: str = option("results/curves.png", "file to write, .png or .svg")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.endswith((".png", ".svg")):
            raise ValueError(f"--out must end in .png or .svg; got {self.out}; rename it")


@dataclass(frozen=True, kw_only=True)
class CompareRun(Config):
    """Two runs against each other: what changed, and whether it breaks a limit."""

    old: str = argument("result file of the reference, or a folder of result files")
    new: str = argument("result file of the run to judge, or a folder of result files")
    fail_on: str | None = option(
        None,
        "limits NAME:+X%% or NAME:-X%%, separated by commas, on peak, tokens_per_second and perplexity; for example "
        "peak:+2%%,tokens_per_second:-5%%,perplexity:+1%%",
    )
    verbose: bool = option(False, "print every number of the two runs, not only the answer")


@dataclass(frozen=True, kw_only=True)
class TrainRun(ModelConfig, DataConfig, TrainConfig, WatchConfig):
    """Train one model and write its checkpoint; run it again with the same flags to resume."""

    seq_length: int = option(512, "T, tokens per window")
    out_dir: str = option("results/checkpoints/train", "folder of the checkpoint")
    shard: bool = option(False, "spread parameters, gradients and optimizer state over the GPUs of torchrun; same result")
    context_parallel: bool = option(
        False, "spread every sequence, in place of the windows of a batch, over the GPUs of torchrun; same result"
    )

    def __post_init__(self) -> None:
        own = None if self.model is None else split(self.model)[0]
        super().__post_init__()  # which leaves no name in `model`
        object.__setattr__(self, "_own", own)
        require_positive(self, "seq_length")
        if self.piece_length is not None and (self.mixer == "attention" or self.model is not None):
            other = "--mixer attention" if self.model is None else "--model"
            raise ValueError(f"--piece-length needs a state that does not grow; got {other}; leave one of them out")
        apart = self.compile or self.cuda_graphs or self.sample_every or self.piece_length is not None or self.model
        if self.shard and apart:
            expected = "--shard must be without --compile, --cuda-graphs, --sample-every, --piece-length and --model"
            raise ValueError(f"{expected}; got one of them; leave it out")
        if self.context_parallel and (self.mixer == "attention" or self.model is not None):
            other = "--mixer attention" if self.model is None else "--model"
            raise ValueError(f"--context-parallel needs a state that does not grow; got {other}; leave one of them out")
        if self.context_parallel and (self.shard or self.piece_length is not None or self.compile or self.cuda_graphs):
            expected = "--context-parallel must be without --shard, --piece-length, --compile, --cuda-graphs and --model"
            raise ValueError(f"{expected}; got one of them; leave it out")
        if self.model is not None and self.sample_every:
            raise ValueError("--sample-every writes with phase1's own models; got --model too; leave one of them out")

    @property
    def own_model(self) -> str | None:
        """What the user calls a model of their own; None for one of this package."""
        name: str | None = getattr(self, "_own")  # noqa: B009, it is no field, which would be a flag
        return name


@dataclass(frozen=True, kw_only=True)
class CheckModelRun(Config):
    """Whether a model of your own may be measured: causal, a loss in nats, learns, the same twice, any length and type."""

    own_model: str = argument("[NAME=]package.module:factory")
    vocab_size: int = option(256, "V that the factory gets")
    d_model: int = option(64, "width that the factory gets")
    n_layers: int = option(2, "layers that the factory gets")
    n_heads: int = option(4, "heads that the factory gets")
    seq_length: int = option(64, "T, tokens per sequence; shorter ones are tried too")
    verbose: bool = option(False, "print the numbers of every check, not only of those that fail")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "vocab_size", "d_model", "n_layers", "n_heads")
        if self.vocab_size < 2:
            raise ValueError(f"--vocab-size must be at least 2; got {self.vocab_size}; one token has nothing to predict")
        if self.seq_length < 8:
            raise ValueError(f"--seq-length must be at least 8; got {self.seq_length}; raise it")
        split(self.own_model)


@dataclass(frozen=True, kw_only=True)
class GenerateRun(Config):
    """Text from a trained model, printed as it comes."""

    checkpoint: str = option("results/checkpoints/train", "folder of the checkpoint, or one that phase1 export wrote")
    prompt: str | None = option(None, "text to go on from; without one the beginning of a document", is_prose=True)
    prompt_file: str | None = option(None, "file with the text to go on from, UTF-8; - is standard input")
    max_tokens: int = option(200, "tokens per sample; fewer where the model ends the document")
    samples: int = option(1, "texts to generate, each independent of the others")
    temperature: float = option(0.8, "below 1 likely tokens become likelier; 0 always takes the likeliest")
    top_k: int | None = option(None, "draw from the K likeliest tokens only")
    top_p: float | None = option(None, "draw from the fewest likeliest tokens whose probabilities sum to this")
    seed: int = option(0, "seed of the draws: the same text again on the same machine")
    copy_head: bool = option(True, "use the copy head, if the model has one")
    tokenizer: str | None = option(None, "gpt2 or a folder with tokenizer.json, for a checkpoint of an earlier version")
    precision: Literal["auto", "fp16", "bf16", "fp32"] = option("auto", "autocast type; auto is fp16 on CUDA, fp32 on the CPU")
    cuda_graphs: bool | None = option(
        None, "launch every step as one CUDA graph: faster; by default on a GPU, but with attention, whose state grows"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_tokens", "samples")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file are two texts to go on from; got both; leave one out")
        require_not_negative(self, "seed")
        require_sampling(self)


@dataclass(frozen=True, kw_only=True)
class ExportRun(Config):
    """A checkpoint as a folder for Hugging Face transformers."""

    checkpoint: str = option("results/checkpoints/train", "folder of the checkpoint")
    out_dir: str = option("results/export", "folder to write")
    tokenizer: str | None = option(None, "gpt2 or a folder with tokenizer.json, for a checkpoint of an earlier version")


@dataclass(frozen=True, kw_only=True)
class PipelineRun(ComparisonConfig, OutputConfig):
    """Memory, throughput, perplexity, tables and report, one after the other."""

    preset: Preset = option("rtx3080-10g", "sizes of every step")
    dataset_name: str | None = option(
        None,
        "data set of the perplexity step (see phase1 perplexity --help); wikitext, with --preset smoke builtin, by default",
    )
    dataset_config: str | None = option(None, "configuration of a hub data set")
    tokenizer: str = option("auto", "of the perplexity step: auto, gpt2, bpe or a folder with tokenizer.json")
    offline: bool = option(
        False, "open no network connection: a hub data set must be in the local cache", affects_results=False
    )


@dataclass(frozen=True, kw_only=True)
class DoctorRun(Config):
    """What a bug report needs: versions, GPU, driver, commit."""

    submit_file: str | None = option(
        None, "write the facts there too, as JSON without names of users, hosts and folders: to report that a card works"
    )
