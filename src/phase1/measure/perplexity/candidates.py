"""Which models a perplexity run trains or loads, and what each is called in its report."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from phase1.config import ModelConfig
from phase1.roster import RIVALS, ROLES, START, Variant, model_config, own_models, repetition, report_key
from phase1.runs import PerplexityRun
from phase1.trainable import build
from phase1.training.checkpoint import model_config_of, read_index, require_model

_NAME = re.compile(rf"(baseline|transformer|phase1_htt\d+_ar\d+|{'|'.join(get_args(Variant))})(_seed\d+)?")
_ENGINES = ("no_gate", "no_copy", "equal_parameters")  # variants that a report would call phase1_...


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its key in the report, and where it is, or how to make it."""

    key: str
    config: ModelConfig
    seed: int
    checkpoint: Path | None = None


def candidates(run: PerplexityRun) -> list[Candidate]:
    """What --checkpoint names, and nothing else; without it baseline, every rank pair and the variants, once per seed.

    Raises ValueError for a wrong name or path, or one that is there twice.
    """
    ranks = {"htt_rank": run.test_htt_ranks[0], "ar_ssm_max_rank": run.test_ar_ssm_ranks[0]}
    own = own_models(run.model, run, taken=(*get_args(Variant), "phase1", "transformer"), **ranks)
    if run.checkpoint:
        given = {candidate.key: candidate for candidate in (_given(argument, own) for argument in run.checkpoint)}
        if len(given) < len(run.checkpoint):
            raise ValueError(f"--checkpoint must name every model once; got {' '.join(run.checkpoint)}; use _seed1 and so on")
        return list(given.values())
    pairs = [(r, R) for r in run.test_htt_ranks for R in run.test_ar_ssm_ranks]
    engine = {"checkpointing": run.gradient_checkpointing}
    engines = [model_config("phase1", run, htt_rank=r, ar_ssm_max_rank=R, **engine) for r, R in pairs]
    configs = {"baseline": replace(engines[0], **ROLES["baseline"])} if run.baseline else {}  # it uses no rank
    configs |= {report_key(config): config for config in engines if run.engine}
    configs |= {name: variant(name, engines[0]) for name in run.variants}
    configs |= own
    seeds = range(run.seed, run.seed + run.repeats)
    return [Candidate(seeded(key, seed, run.seed), config, seed) for seed in seeds for key, config in configs.items()]


def variant(name: Variant, engine: ModelConfig) -> ModelConfig:
    """Engine or baseline with one thing changed; `equal_parameters` is the deepest engine no larger than the baseline."""
    if name == "ar_ssm_dense":
        return replace(engine, embedding="dense", **START)
    if name == "ar_ssm_dense_no_copy":
        return replace(engine, embedding="dense", copy_head=False, **START)
    if name == "attention_htt":
        return replace(engine, mixer="attention")
    if name == "no_gate":
        return replace(engine, ar_ssm_min_rank=engine.ar_ssm_max_rank)
    if name == "no_copy":
        return replace(engine, copy_head=False)
    if name in RIVALS:
        return replace(engine, **(ROLES["baseline"] | RIVALS[name]))
    shallow = parameter_count(replace(engine, n_layers=1))
    layer = parameter_count(replace(engine, n_layers=2)) - shallow
    n_layers = 1 + (parameter_count(replace(engine, **ROLES["baseline"])) - shallow) // layer
    if n_layers < 1:
        raise ValueError("--variants equal_parameters: an engine of one layer is larger than the baseline; raise --d-model")
    return replace(engine, n_layers=n_layers)


def parameter_count(config: ModelConfig) -> int:
    """Of the whole model, without making it."""
    with torch.device("meta"):
        return build(config).parameter_counts()["total"]


def seeded(key: str, seed: int, first: int) -> str:
    """The key of a repetition: the first has the plain one."""
    return key if seed == first else f"{key}_seed{seed}"


def _given(argument: str, own: dict[str, ModelConfig]) -> Candidate:
    name, separator, path = argument.partition("=")
    if name in own:
        index = read_index(path)
        require_model(path, config := model_config_of(index), own[name].model)
        return Candidate(name, config, index["train_config"].get("seed", 0), Path(path))
    if Path(argument).exists() and not (separator and _NAME.fullmatch(name)):  # a folder: the model says what it is
        index = read_index(argument)
        require_model(argument, config := ModelConfig(**index["model_config"]), None)
        return Candidate(report_key(config), config, index["train_config"].get("seed", 0), Path(argument))
    if separator and Path(path).exists() and (theirs := model_config_of(read_index(path)).model):
        own_model = f"{name}={theirs.partition('@')[0]}"
        raise ValueError(f"--checkpoint {argument}: a model of {theirs} is there; give --model {own_model} too")
    if not separator or not _NAME.fullmatch(name):
        expected = "NAME as in a report (baseline, phase1_htt{r}_ar{R}, a variant, each with or without _seed{n})"
        raise ValueError(f"--checkpoint must be a folder, or NAME=PATH with {expected}; got {argument!r}; correct it")
    index = read_index(path)
    config, plain = model_config_of(index), repetition(name)[0]
    found = report_key(config)
    if plain != found and not (plain in _ENGINES and found.startswith("phase1")):
        raise ValueError(f"--checkpoint {name}={path}: the model there is {found}; use that name")
    return Candidate(name, config, index["train_config"].get("seed", 0), Path(path))
