"""Every model that a run compares: what it changes, and its key in a result file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from phase1.config import YOUNGER, EngineShape, ModelConfig, ModelShape
from phase1.factory import NAME, pinned, split

SMALL: dict[str, Any] = {"row_norm": 0.02 * 512**0.5, "input_scale": 1.0}
"""The start of rows at random that trains best: GPT-2's, a standard deviation of 0.02 at the documented width."""

TRANSFORMER: dict[str, Any] = {"mixer": "attention", "embedding": "dense", "copy_head": False} | SMALL
ROLES: dict[str, dict[str, Any]] = {
    "baseline": TRANSFORMER | {"loss": "materialized", "recompute": "none"},
    "baseline_optimized": TRANSFORMER | {"loss": "chunked", "recompute": "block"},
    "baseline_fast": TRANSFORMER | {"loss": "chunked", "recompute": "none"},
    "phase1": {"mixer": "ar_ssm", "embedding": "htt", "copy_head": True, "loss": "chunked", "recompute": "block"},
}
"""The models that memory and throughput compare, by their key in a result file (docs/design.md, "Definitions")."""

TRANSFORMERS = tuple(role for role in ROLES if role != "phase1")
"""The roles that the engine is compared with: the plain Transformer, the small one and the fast one."""

FAST = {"phase1_fast": ROLES["phase1"] | {"recompute": "none"}}
"""The engine as `baseline_fast` is the Transformer: throughput measures it too on a GPU, where both are compiled."""

PIECES = {"phase1_pieces": ROLES["phase1"]}
"""The engine that trains in pieces of PIECE_LENGTH tokens of every sequence: memory measures it too."""

PIECE_LENGTH = 256
"""Shorter ones take no less: what is then left are the states between them, and what the loss of all needs."""

COMPILED = frozenset({"baseline_fast", *FAST})
"""Roles that are compiled on a GPU, whatever --compile says: the fastest that flags make a model."""

ENGINE_ROLES = (*FAST, "phase1")
"""Roles of the engine, the fastest first."""

CONTROLS: dict[str, dict[str, Any]] = {
    "quadratic_control": ROLES["baseline_optimized"] | {"attention": "math"},
    "baseline_again": ROLES["baseline"],
    "engine_again": ROLES["phase1"],
}
"""Models that test the measurement, not the engine: one that is certainly quadratic, and second copies of two others."""


def model_config(role: str, shape: ModelShape, **overrides: Any) -> ModelConfig:
    """The model of `role` with the sizes of `shape`, and its ranks if it has any."""
    sizes = {f.name: getattr(shape, f.name) for f in fields(EngineShape) if hasattr(shape, f.name)}
    return ModelConfig(**(sizes | (ROLES | FAST | PIECES | CONTROLS)[role] | overrides))


START: dict[str, Any] = {"dense_start": "statistics", "row_norm": 1.0, "input_scale": None}
FAIR: dict[str, Any] = START | {"attention_qk_norm": True, "attention_conv": True, "attention_gate": True}


@dataclass(frozen=True)
class Entry:
    """A further model of a perplexity comparison: `change` of the config of `base`."""

    base: Literal["baseline", "phase1"]
    change: Mapping[str, Any] | Callable[[ModelConfig], Mapping[str, Any]]
    judged: bool = False  # by a limit of checks/limits.py; a model without is a reference for others


VARIANTS: dict[str, Entry] = {
    "ar_ssm_dense": Entry("phase1", {"embedding": "dense"} | START, judged=True),
    "ar_ssm_dense_no_copy": Entry("phase1", {"embedding": "dense", "copy_head": False} | START),
    "attention_htt": Entry("phase1", {"mixer": "attention"}, judged=True),
    "no_gate": Entry("phase1", lambda engine: {"ar_ssm_min_rank": engine.ar_ssm_max_rank}),
    "no_copy": Entry("phase1", {"copy_head": False}),
    "equal_parameters": Entry("phase1", {}, judged=True),  # and as many layers as fit: measure/perplexity/candidates.py
    "transformer_copy": Entry("baseline", {"copy_head": True}),
    "transformer_start": Entry("baseline", START),
    "transformer_start_copy": Entry("baseline", START | {"copy_head": True}),
    "transformer_fair": Entry("baseline", FAIR),
    "transformer_fair_copy": Entry("baseline", FAIR | {"copy_head": True}),
}
"""The choices of --variants. A Transformer here has what the baseline lacks: the engine's copy head, its start, or (fair) all
that AR-SSM's block has and attention lacks."""

if TYPE_CHECKING:
    Variant = str
else:
    Variant = Literal[tuple(VARIANTS)]

RIVALS: dict[str, dict[str, Any]] = {
    name: {what: value for what, value in entry.change.items() if what not in SMALL}
    for name, entry in VARIANTS.items()
    if entry.base == "baseline" and not callable(entry.change)
}
"""The Transformers among the variants, by what they have that the baseline lacks."""

_CHOICES = (get_args(get_type_hints(ModelConfig)[setting]) for setting in ("mixer", "embedding"))
PAIRS = tuple(f"{mixer}_{embedding}" for mixer, embedding in product(*_CHOICES))
"""What a model is called that is neither the engine nor a Transformer: its mixer and its token table."""

OWN: dict[str, Any] = TRANSFORMER | START | {"loss": "chunked", "recompute": "none"}
"""The config that a user's own model gets: the same table and start for all, and no part that only the engine has."""


def own_models(named: tuple[str, ...], shape: ModelShape, taken: tuple[str, ...] = (), **ranks: int) -> dict[str, ModelConfig]:
    """What --model names, by NAME, each with the sizes of `shape`, `ranks` and the hash of its source.

    taken: names that mean something else. Raises ValueError for one of them, one that is there twice, or no such module.
    """
    models: dict[str, ModelConfig] = {}
    for text in named:
        name, reference = split(text)
        if name in taken or name in models or name.startswith("phase1_"):
            raise ValueError(f"--model needs names of its own, each once; got {name}; write NAME={reference}")
        sizes = {f.name: getattr(shape, f.name) for f in fields(EngineShape) if hasattr(shape, f.name)}
        models[name] = ModelConfig(**(sizes | ranks | OWN | {"model": pinned(reference)}))
    return models


def may_be_own(name: str) -> bool:
    """Whether a user may call a model so: no name of an engine, which has its ranks in it."""
    return re.fullmatch(NAME, name) is not None and not name.startswith("phase1")


def sources(models: dict[str, ModelConfig]) -> dict[str, str] | None:
    """The users' own among `models`, with the hashes of their sources: what else a result depends on; None if there is none."""
    return {name: config.model for name, config in models.items() if config.model is not None} or None


@dataclass(frozen=True)
class Key:
    """The name of a model in a report, `baseline`, `phase1_htt16_ar32_seed1` or `no_gate`: parsed here and nowhere else."""

    name: str  # a role, a variant, a control, or what a user calls a model
    htt_rank: int | None = None  # of an engine in a perplexity report, which may sweep ranks
    ar_ssm_rank: int | None = None
    seed: int | None = None  # of a repetition; the first training of a run has none

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The key that `str` gives back as `text`; text of no special form is a name."""
        name, seed = re.fullmatch(r"(.*?)(?:_seed(0|[1-9]\d{0,8}))?", text, re.DOTALL).groups()  # type: ignore[union-attr]
        repetition = None if seed is None else int(seed)
        if ranks := re.fullmatch(r"phase1_htt([1-9]\d{0,8})_ar([1-9]\d{0,8})", name):
            return cls("phase1", int(ranks[1]), int(ranks[2]), repetition)
        return cls(name, seed=repetition)

    @classmethod
    def of(cls, config: ModelConfig) -> "Key":
        """The key of `config` in a perplexity report; `transformer` is one that no run of a comparison makes."""
        if config.model is not None:
            return cls(split(config.model)[0])
        if (config.mixer, config.embedding) == ("attention", "dense"):
            extras = {name: getattr(config, name) for name in FAIR | {"copy_head": True} if name not in SMALL}
            plain = {name: YOUNGER.get(name, False) for name in extras}
            if extras == plain:
                return cls("baseline")
            return cls(next((name for name, change in RIVALS.items() if plain | change == extras), "transformer"))
        if (config.mixer, config.embedding) == ("ar_ssm", "htt"):
            return cls("phase1", config.htt_rank, config.ar_ssm_max_rank)
        if (config.mixer, config.embedding) == ("ar_ssm", "dense") and not config.copy_head:
            return cls("ar_ssm_dense_no_copy")
        return cls(f"{config.mixer}_{config.embedding}")  # one of PAIRS

    def __str__(self) -> str:
        return self.model + ("" if self.seed is None else f"_seed{self.seed}")

    @property
    def model(self) -> str:
        """The key without its seed: what the trainings of one model have in common."""
        return self.name if self.ranks is None else f"{self.name}_htt{self.htt_rank}_ar{self.ar_ssm_rank}"

    @property
    def ranks(self) -> tuple[int, int] | None:
        """HTT rank and AR-SSM rank, if the key has them."""
        return None if self.htt_rank is None or self.ar_ssm_rank is None else (self.htt_rank, self.ar_ssm_rank)

    @property
    def is_engine(self) -> bool:
        return self.name == "phase1"

    @property
    def is_baseline(self) -> bool:
        """Whether this is one of the Transformers that the engine is compared with, or a second copy of one."""
        return self.name in (*TRANSFORMERS, "baseline_again")

    @property
    def baseline(self) -> "Key":
        """The baseline that this model is compared with in quality: the one of the same seed."""
        return Key("baseline", seed=self.seed)
