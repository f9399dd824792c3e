"""Settings of a model, its text and its training, as frozen dataclasses: the one place a default is written."""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

from phase1.factory import split
from phase1.text import printable_name


def option(
    default: Any,
    help: str,
    *,
    spellings: tuple[str, ...] = (),
    switch: tuple[str, Any, Any] | None = None,
    affects_results: bool = True,
    is_prose: bool = False,
) -> Any:
    """A field that is also a command-line flag: one line holds its name, default and help.

    spellings: other flags that mean the same.
    switch: the name of the flag that this was when it was on or off, and what it is with --NAME and with --no-NAME.
    affects_results: false for a setting that changes no number of a report, so that --resume accepts another value.
    is_prose: true for a text that is never a path, in which ~ is no home folder.
    """
    more = {"spellings": spellings, "switch": switch, "affects_results": affects_results, "is_prose": is_prose}
    return field(default=default, metadata={"help": help} | more)


def argument(help: str) -> Any:
    """A field that is given by its place on the command line, and has no default."""
    return field(metadata={"help": help, "positional": True})


LARGEST: Final = 10**15  # value of any setting; a larger one is a typing error, and overflows some library's numbers
LARGEST_VOCABULARY: Final = 10**7  # forty times that of any published model; libraries allocate for it at once


def flag_of(name: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def with_home(value: Any) -> Any:
    """`value` with a leading ~ or ~user expanded, in a path or NAME=PATH, also inside a tuple."""
    if isinstance(value, tuple):
        return tuple(map(with_home, value))
    if not isinstance(value, str) or "~" not in value:
        return value
    name, path = re.fullmatch(r"(\w+=)?(.*)", value, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return name + os.path.expanduser(path)


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError where one is not; of a setting that may be None the message says that leaving it out is."""
    optional = {setting.name for setting in fields(config) if setting.default is None}
    for name in names:
        value = getattr(config, name)
        remedy = "give a positive number" + (", or leave it out" if name in optional else "")
        for item in value if isinstance(value, tuple) else (value,):
            if not 0 < item < math.inf:
                raise ValueError(f"{flag_of(name)} must be greater than 0; got {item}; {remedy}")


def require_not_negative(config: Any, *names: str) -> None:
    """Raise ValueError for a setting below 0; None is none."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < 0:
            raise ValueError(f"{flag_of(name)} must be 0 or more; got {value}; raise it")


def require_sampling(settings: Any) -> None:
    """Raise ValueError where --temperature, --top-k or --top-p of a draw is out of range."""
    if not settings.temperature < math.inf:
        raise ValueError(f"--temperature must be a finite number; got {settings.temperature}; try 0.8")
    require_not_negative(settings, "temperature")
    if settings.top_k is not None:
        require_positive(settings, "top_k")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1; got {settings.top_p}; try 0.9")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs. Every class checks its own fields in `__post_init__` and calls super, so bases can be combined."""

    def __post_init__(self) -> None:
        """Raise ValueError (expected, got, remedy) for a value out of range; subclasses call super first."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.metadata.get("is_prose"):
                continue
            value = with_home(value)
            object.__setattr__(self, setting.name, value)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int | float) and not abs(item) <= LARGEST:
                    limit, other = ("at least -10^15", "larger") if item < 0 else ("at most 10^15", "smaller")
                    limit = limit if isinstance(item, int) or math.isfinite(item) else f"a finite number of {limit}"
                    raise ValueError(f"{flag_of(setting.name)} must be {limit}; got {item!r:.40}; give a {other} one")
                if isinstance(item, str) and item.startswith("~") and item != setting.default:  # a default has a substitute
                    expected = f"{flag_of(setting.name)} must be a path that this system knows"
                    raise ValueError(f"{expected}; got {item}, no home folder; give the whole path")
                if (choices := _choices(setting.type)) and not any(type(item) is type(c) and item == c for c in choices):
                    expected = f"{flag_of(setting.name)} must be one of {', '.join(map(str, choices))}"
                    raise ValueError(f"{expected}; got {item!r:.80}; correct it")


def _choices(kind: Any) -> tuple[Any, ...]:
    """All values that a field of type `kind`, or an item of it, may have; none where these are not counted."""
    if kind in (bool, NoneType):
        return (True, False) if kind is bool else (None,)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) is tuple:
        return _choices(get_args(kind)[0])
    parts = [_choices(part) for part in get_args(kind)] if get_origin(kind) in (UnionType, Union) else []
    return tuple(itertools.chain(*parts)) if all(parts) else ()


C = TypeVar("C", bound=Config)


@dataclass(frozen=True, kw_only=True)
class ModelShape(Config):
    """The sizes that engine and baseline share, and the engine's settings that no run sweeps."""

    vocab_size: int = option(50257, "V, rows of the token table; at least the tokenizer's vocabulary")
    d_model: int = option(512, "D, width of the residual stream; a multiple of --n-heads")
    n_layers: int = option(8, "L, blocks of mixer and MLP")
    n_heads: int = option(8, "H, heads of the mixer")
    ar_ssm_min_rank: int = option(4, "ranks of U and V that the rank gate cannot switch off")
    ar_ssm_window: int = option(64, "w, width of the sliding window of the local part; 0 leaves only the diagonal")
    ar_ssm_memory: int = option(512, "M, positions within which the state fades to 1/e or less, whatever the input")
    copy_window: int = option(2048, "tokens that the copy head can point to: the newest ones, the current one included")
    row_norm: float = option(1.0, "norm of a row of the token table at the start; the plain Transformer of a run has its own")
    input_scale: float | None = option(
        None, "factor of the rows where they enter the blocks; by default sqrt(D), in the plain Transformer of a run 1"
    )
    logit_scale: float = option(1.0, "factor of the logits, before the output bias")
    learnt_logit_scale: bool = option(False, "learn the factor of the logits, starting from --logit-scale")
    rank_penalty: float = option(1e-2, "weight of the L1 term on the rank gate in the training loss")
    htt_dense_rows: int = option(1024, "K, most frequent tokens, a dense row each; falling ranks up to row 16 K, then the tail")
    htt_groups: int = option(512, "rows of the grid of the tail's tensor train, a group of similar tokens each")
    htt_output: Literal["flat", "two_level"] = option(
        "flat",
        "softmax over an HTT table: flat, over all rows; two_level, over rows up to 16 K and groups, then inside a group",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "vocab_size", "d_model", "n_layers", "n_heads")
        require_positive(self, "ar_ssm_min_rank", "ar_ssm_memory", "copy_window", "htt_groups", "row_norm")
        require_not_negative(self, "logit_scale", "ar_ssm_window", "rank_penalty", "htt_dense_rows")
        if self.input_scale is not None:
            require_positive(self, "input_scale")
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"--vocab-size must be at most {LARGEST_VOCABULARY:,}; got {self.vocab_size:,}; lower it")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"--d-model must be a multiple of 2 x --n-heads={2 * self.n_heads} (rotary pairs); got {self.d_model}; "
                f"try {max(1, self.d_model // (2 * self.n_heads)) * 2 * self.n_heads}"
            )


def check_ranks(shape: ModelShape, ar_ssm_max_rank: int, htt_rank: int) -> None:
    """Raise ValueError if a rank does not fit the shape."""
    for flag, rank in (("--ar-ssm-max-rank", ar_ssm_max_rank), ("--htt-rank", htt_rank)):
        if not 0 < rank <= shape.d_model:
            raise ValueError(f"{flag} must be between 1 and --d-model={shape.d_model}; got {rank}; give a smaller rank")
    if ar_ssm_max_rank % 2:
        raise ValueError(f"--ar-ssm-max-rank must be even (rotary pairs); got {ar_ssm_max_rank}; try {ar_ssm_max_rank + 1}")
    if shape.ar_ssm_min_rank > ar_ssm_max_rank:
        raise ValueError(
            f"--ar-ssm-min-rank must be at most the AR-SSM rank {ar_ssm_max_rank}; got {shape.ar_ssm_min_rank}; lower it"
        )


@dataclass(frozen=True, kw_only=True)
class EngineShape(ModelShape):
    """A shape with one AR-SSM rank and one HTT rank."""

    ar_ssm_max_rank: int = option(32, "R, columns of U and V per head: the rank that is stored and computed")
    htt_rank: int = option(16, "r: every rank of the table is proportional to it; the tail's tensor train has 2 x r terms")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self, self.ar_ssm_max_rank, self.htt_rank)


Recompute = Literal["none", "selective", "block"]


def recompute_option(switch: str, whose: str) -> Any:
    """--recompute, for the activations of `whose`; `switch` is its name when there were two choices."""
    what = "none; all but large matrix products (selective); all of every block (block): each slower and smaller than the last"
    help = f"which activations of {whose} are computed again in the backward pass: {what}"
    return option("block", help, switch=(switch, "block", "none"))


HTT_FORM = "coordinates"
"""Name of the table's structure. It is hashed into `config_id`, so that a checkpoint of an older structure with the same sizes
gets another id."""

YOUNGER: dict[str, Any] = {
    "dense_start": "random",
    "attention_qk_norm": False,
    "attention_conv": False,
    "attention_gate": False,
    "row_norm": 1.0,
    "input_scale": None,
    "logit_scale": 1.0,
    "learnt_logit_scale": False,
    "htt_output": "flat",
    "model": None,
}
"""Settings added after the published results, with the value that all models had before, which is left out of their ids."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EngineShape):
    """One model. Engine and baseline differ in the fields below and in nothing else."""

    mixer: Literal["ar_ssm", "attention"] = option("ar_ssm", "sequence layer of every block")
    embedding: Literal["htt", "dense"] = option("htt", "token table, tied to the output")
    dense_start: Literal["random", "statistics"] = option(
        "random", "start of a dense table: random rows, or vectors and biases from statistics of the text, as an HTT table has"
    )
    copy_head: bool = option(True, "mix the output's distribution with a pointer to earlier tokens of the text")
    loss: Literal["chunked", "materialized"] = option("chunked", "cross-entropy by chunks of tokens, or of all logits at once")
    recompute: Recompute = recompute_option("checkpointing", "each block")
    attention: Literal["fused", "math"] = option("fused", "attention kernel: the fastest, or one that keeps all T x T scores")
    attention_qk_norm: bool = option(False, "attention: RMS-normalise queries and keys, and scale queries by learnt factors")
    attention_conv: bool = option(False, "attention: causal convolution of 4 taps on queries, keys and values")
    attention_gate: bool = option(False, "attention: multiply its result by the SiLU of a projection, then normalise")
    model: str | None = option(
        None, "a model of your own, [NAME=]package.module:factory, in place of this one; it gets the settings that it asks for"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None:
            object.__setattr__(self, "model", split(self.model)[1])
        if self.embedding == "htt" and not self.htt_groups <= self.vocab_size - self.htt_dense_rows:
            raise ValueError(
                f"--htt-dense-rows + --htt-groups must be at most --vocab-size={self.vocab_size}; "
                f"got {self.htt_dense_rows} + {self.htt_groups}; lower one of them"
            )
        if self.embedding == "htt" and self.htt_output == "two_level" and self.vocab_size <= 16 * self.htt_dense_rows:
            raise ValueError(
                f"--htt-output two_level needs rows past 16 x --htt-dense-rows={self.htt_dense_rows}; "
                f"got --vocab-size={self.vocab_size}; lower --htt-dense-rows"
            )

    @property
    def config_id(self) -> str:
        """Twelve hex digits of the SHA-256 of every field this model uses: equal ids mean equal models."""
        unused: tuple[str, ...] = ("ar_ssm_", "rank_penalty") if self.mixer == "attention" else ("attention_",)
        unused += ("htt_",) if self.embedding == "dense" else ("dense_start",)
        unused += () if self.copy_head else ("copy_",)
        unused = () if self.model else unused  # who knows what a factory uses
        every = {name: value for name, value in asdict(self).items() if (name, value) not in YOUNGER.items()} | {
            "htt_form": HTT_FORM
        }
        every["checkpointing"] = every.pop("recompute") == "block"  # its name when there were two choices
        if self.recompute == "selective":
            every["recompute"] = self.recompute
        if (self.mixer, self.attention) != ("attention", "math"):
            every.pop("attention", None)
        return content_id({name: value for name, value in every.items() if not name.startswith(unused)})


def present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model as files of earlier versions have them, by their present names."""
    present = dict(settings)
    if isinstance(present.get("checkpointing"), bool) and "recompute" not in present:
        present["recompute"] = "block" if present.pop("checkpointing") else "none"
    return present


def flags(config: Config) -> str:
    """The command line that gives `config`: positional arguments, and every flag that is not at its default."""
    words: list[str] = []
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.metadata.get("positional"):
            words += map(shlex.quote, value if isinstance(value, tuple) else (value,))
        elif value != with_home(setting.default):
            flag = setting.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *(shlex.quote(str(v)) for v in (value if isinstance(value, tuple) else (value,)))]
    return " ".join(words)


def to_toml(config: Config, origins: dict[str, str] | None = None) -> str:
    """The file that `--config` reads: every flag that has a value, with the origin of the value as a comment."""
    lines = []
    for setting in fields(config):
        value, origin = getattr(config, setting.name), (origins or {}).get(setting.name)
        key = setting.name.replace("_", "-")
        line = f"# {key} has no value" if value is None else f"{key} = {_toml(value)}"
        lost = "" if line == printable_name(line) else f"not UTF-8, so not as it was: give --{key} itself"
        notes = "; ".join(note for note in (origin, lost) if note)
        lines.append(printable_name(line + (f"  # {notes}" if notes else "")))
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """`value` as TOML: JSON's notation for numbers, strings, booleans and lists, with DEL escaped."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def part_of(cls: type[C], run: Config) -> C:
    """The fields of `run` that make up a `cls`."""
    return cls(**{f.name: getattr(run, f.name) for f in fields(cls)})


def content_id(content: Any) -> str:
    """Twelve hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which text, and how it becomes tokens."""

    dataset_name: str = option(
        "wikitext",
        "wikitext, c4 (both from the Hugging Face hub), builtin (offline), or a path: a text file, "
        "or a folder with train/valid/test as .txt, .md, .jsonl or .gpt2.bin, each also as .xz",
    )
    dataset_config: str | None = option(
        None, "configuration of a hub data set; by default wikitext-103-raw-v1 of wikitext, en of c4, the only one of others"
    )
    tokenizer: str = option(
        "auto",
        "auto, gpt2, a folder with tokenizer.json, or bpe (train a BPE of --vocab-size on the training text); "
        "auto is bpe for builtin and for a --vocab-size below GPT-2's 50,257, and gpt2 otherwise",
    )
    cache_dir: str = option("~/.cache/phase1", "where trained tokenizers and tokenised text are kept")
    offline: bool = option(
        False, "open no network connection: a hub data set must be in the local cache", affects_results=False
    )


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Config):
    """What a training shows and records while it runs, and when it stops early; none of it changes a step."""

    eval_every: int | None = option(None, "steps between losses on the valid split; 0 is never, by default 20 times a run")
    eval_tokens: int | None = option(
        None, "tokens that each of these losses is of; by default a 500th of --train-tokens, 2,048 at least"
    )
    sample_every: int = option(0, "steps between texts that the model writes, into samples.txt; 0 is never")
    prompt: str = option("", "beginning of these texts; by default that of a document", is_prose=True)
    max_hours: float | None = option(None, "hours of training, of all sessions, after which it saves a checkpoint and stops")
    keep_best: bool = option(False, "keep the weights of the lowest loss on the valid split too, in best/ of the folder")
    patience: int | None = option(None, "losses on the valid split in a row without a new lowest that end the training")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "trackers that also get losses, speeds and samples"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "eval_every", "sample_every")
        for name in ("eval_tokens", "max_hours", "patience"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if self.eval_every == 0 and (self.keep_best or self.patience is not None):
            raise ValueError("--keep-best and --patience need losses on the valid split; got --eval-every 0; leave it out")


Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How a model is trained; the same for every model of a comparison."""

    train_tokens: int = option(90_000_000, "tokens every model is trained on, in the same order; a shorter text repeats")
    train_batch_size: int = option(64, "windows of T tokens per optimizer step")
    micro_batch_size: int = option(8, "windows per forward/backward; larger is faster, the result the same up to rounding")
    piece_length: int | None = option(
        None,
        "tokens of a sequence at a time, for sequences of any length: exact gradients, in the memory of one piece; whole "
        "sequences by default, and always with attention",
    )
    learning_rate: float = option(6e-3, "peak of the schedule: linear warm-up, then --schedule")
    table_learning_rate: float = option(3.0, "learning rate of the token table, as a multiple of the others'")
    optimizer: Optimizer = option("muon", "AdamW, or Muon for the matrices of blocks and AdamW for the rest")
    schedule: Literal["cosine", "linear"] = option("linear", "learning rate after the warm-up: cosine to a tenth, or line to 0")
    warmup_steps: int = option(100, "optimizer steps of linear warm-up, at most a tenth of the run")
    weight_decay: float = option(0.1, "decay of the matrices of linear layers; token table, norms, scales and taps have none")
    grad_clip: float = option(1.0, "largest norm of the gradient of all parameters")
    seed: int = option(0, "seed of initial weights and of the order of windows")
    compile: bool = option(False, "torch.compile the loss and prove its gradients (needs a working Triton; takes a minute)")
    cuda_graphs: bool = option(False, "launch each micro batch as two CUDA graphs: faster where the host limits the GPU")
    precision: Literal["auto", "fp16", "bf16", "fp32"] = option("auto", "autocast type; auto is fp16 on CUDA, fp32 on the CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "train_tokens", "train_batch_size", "micro_batch_size", "learning_rate", "table_learning_rate", "grad_clip"
        )
        if self.piece_length is not None:
            require_positive(self, "piece_length")
        require_not_negative(self, "seed", "warmup_steps", "weight_decay")
        if self.train_batch_size % self.micro_batch_size and self.micro_batch_size < self.train_batch_size:
            raise ValueError(
                f"--micro-batch-size must divide --train-batch-size={self.train_batch_size}; got {self.micro_batch_size}; "
                "give a divisor"
            )
