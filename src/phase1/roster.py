"""Every model that a run compares: what it changes, and the key it has in a result file."""

from dataclasses import fields
from typing import Any, Literal

from phase1.config import YOUNGER, ModelConfig, Ranked, Shape
from phase1.factory import pinned, split

TRANSFORMER: dict[str, Any] = {"mixer": "attention", "embedding": "dense", "copy_head": False}
ROLES: dict[str, dict[str, Any]] = {
    "baseline": TRANSFORMER | {"loss": "materialized", "checkpointing": False},
    "baseline_optimized": TRANSFORMER | {"loss": "chunked", "checkpointing": True},
    "baseline_fast": TRANSFORMER | {"loss": "chunked", "checkpointing": False},
    "phase1": {"mixer": "ar_ssm", "embedding": "htt", "copy_head": True, "loss": "chunked", "checkpointing": True},
}
"""The models a run compares, by the key they have in a result file (docs/design.md, "Definitions")."""

TRANSFORMERS = tuple(role for role in ROLES if role != "phase1")
"""Roles that the engine is compared with, each fast or small in its own way."""

COMPILED = frozenset({"baseline_fast"})
"""Roles that are compiled on a GPU, whatever --compile says: the fastest a Transformer can be made with a flag."""

CONTROLS: dict[str, dict[str, Any]] = {
    "quadratic_control": ROLES["baseline_optimized"] | {"attention": "math"},
    "baseline_again": ROLES["baseline"],
    "engine_again": ROLES["phase1"],
}
"""Models that test the measurement, not the engine: one that is quadratic beyond doubt, and second copies."""


def model_config(role: str, shape: Shape, **overrides: Any) -> ModelConfig:
    """The model of `role` with the sizes of `shape` (ranks too, where `shape` has them)."""
    sizes = {f.name: getattr(shape, f.name) for f in fields(Ranked) if hasattr(shape, f.name)}
    return ModelConfig(**(sizes | (ROLES | CONTROLS)[role] | overrides))


Variant = Literal[
    "ar_ssm_dense", "ar_ssm_dense_no_copy", "attention_htt", "no_gate", "no_copy", "equal_parameters",
    "transformer_copy", "transformer_start", "transformer_start_copy", "transformer_fair", "transformer_fair_copy",
]  # fmt: skip

START: dict[str, Any] = {"dense_start": "statistics"}
FAIR: dict[str, Any] = START | {"attention_qk_norm": True, "attention_conv": True, "attention_gate": True}
RIVALS: dict[str, dict[str, Any]] = {
    "transformer_copy": {"copy_head": True},
    "transformer_start": START,
    "transformer_start_copy": START | {"copy_head": True},
    "transformer_fair": FAIR,
    "transformer_fair_copy": FAIR | {"copy_head": True},
}
"""What Transformers have that the baseline lacks: the engine's start, and all that AR-SSM's block has and attention lacks."""


OWN: dict[str, Any] = TRANSFORMER | START | {"loss": "chunked", "checkpointing": False}
"""The config that a user's own model gets: the same table and start for all, and no part that only the engine has."""


def own_models(named: tuple[str, ...], shape: Shape, taken: tuple[str, ...] = (), **ranks: int) -> dict[str, ModelConfig]:
    """What --model names, by NAME, each with the sizes of `shape`, `ranks` and the hash of its source.

    taken: names that mean something else. Raises ValueError for one of them, one that is there twice, or no such module.
    """
    models: dict[str, ModelConfig] = {}
    for text in named:
        name, reference = split(text)
        if name in taken or name in models or name.startswith("phase1_"):
            raise ValueError(f"--model needs names of its own, each once; got {name}; write NAME={reference}")
        sizes = {f.name: getattr(shape, f.name) for f in fields(Ranked) if hasattr(shape, f.name)}
        models[name] = ModelConfig(**(sizes | ranks | OWN | {"model": pinned(reference)}))
    return models


def sources(models: dict[str, ModelConfig]) -> dict[str, str] | None:
    """The users' own among `models`, with the hashes of their sources: what else a result depends on; None if there is none."""
    return {name: config.model for name, config in models.items() if config.model is not None} or None


def report_key(config: ModelConfig) -> str:
    """The key of a model in a perplexity report; `transformer` is one that no run of a comparison makes."""
    if config.model is not None:
        return split(config.model)[0]
    if (config.mixer, config.embedding) == ("attention", "dense"):
        extras = {name: getattr(config, name) for name in FAIR | {"copy_head": True}}
        plain = {name: YOUNGER.get(name, False) for name in extras}
        if extras == plain:
            return "baseline"
        return next((key for key, own in RIVALS.items() if plain | own == extras), "transformer")
    if config.mixer == "attention":
        return "attention_htt"
    if config.embedding == "dense":
        return "ar_ssm_dense" if config.copy_head else "ar_ssm_dense_no_copy"
    return f"phase1_htt{config.htt_rank}_ar{config.ar_ssm_max_rank}"


def repetition(key: str) -> tuple[str, str]:
    """The plain part of a perplexity result's key, and its `_seed…` or nothing: models of one repetition belong together."""
    plain, mark, seed = key.partition("_seed")
    return plain, mark + seed
