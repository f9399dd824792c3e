"""The models that a perplexity run trains or loads, and their keys in its report."""

from dataclasses import dataclass, replace
from pathlib import Path

from phase1.config import ModelConfig
from phase1.roster import PAIRS, ROLES, VARIANTS, Key, may_be_own, model_config, own_models
from phase1.runs import PerplexityRun
from phase1.trainable import parameter_count
from phase1.training.checkpoint import model_config_of, read_index, require_model

ENGINES = ("no_gate", "no_copy", "equal_parameters")
"""Variants whose config alone does not tell them from the engine: `Key.of` calls them phase1_htt{r}_ar{R}."""


@dataclass(frozen=True)
class ScoredModel:
    """A model to evaluate: its key in the report, its config and seed, and its checkpoint if it is already trained."""

    key: str
    config: ModelConfig
    seed: int
    checkpoint: Path | None = None


def candidates(run: PerplexityRun) -> list[ScoredModel]:
    """The models that --checkpoint names; without it the baseline, every pair of ranks and the variants, once per seed.

    Raises ValueError for a wrong name or path, or a name that is there twice.
    """
    ranks = {"htt_rank": run.test_htt_ranks[0], "ar_ssm_max_rank": run.test_ar_ssm_ranks[0]}
    own = own_models(run.model, run, taken=(*VARIANTS, "phase1", "transformer"), **ranks)
    if run.checkpoint:
        given = {model.key: model for model in (_given(argument, own) for argument in run.checkpoint)}
        if len(given) < len(run.checkpoint):
            got = " ".join(run.checkpoint)
            raise ValueError(f"--checkpoint must name every model once; got {got}; give names, first=FOLDER second=FOLDER")
        return list(given.values())
    pairs = [(r, R) for r in run.test_htt_ranks for R in run.test_ar_ssm_ranks]
    engines = [model_config("phase1", run, htt_rank=r, ar_ssm_max_rank=R, recompute=run.recompute) for r, R in pairs]
    configs = {"baseline": replace(engines[0], **ROLES["baseline"])} if run.baseline else {}  # it uses no rank
    configs |= {str(Key.of(config)): config for config in engines if run.engine}
    configs |= {name: variant(name, engines[0]) for name in run.variants}
    configs |= own
    seeds = range(run.seed, run.seed + run.repeats)
    return [ScoredModel(_repeated(key, seed, run.seed), config, seed) for seed in seeds for key, config in configs.items()]


def variant(name: str, engine: ModelConfig) -> ModelConfig:
    """The model called `name` in `VARIANTS`; `equal_parameters` is the deepest engine no larger than the baseline."""
    entry = VARIANTS[name]
    if name == "equal_parameters":
        return replace(engine, n_layers=_layers_of_equal_size(engine))
    base = replace(engine, **ROLES["baseline_fast"]) if entry.base == "baseline" else engine  # its loss, faster
    return replace(base, **(entry.change(base) if callable(entry.change) else entry.change))


def _layers_of_equal_size(engine: ModelConfig) -> int:
    shallow = parameter_count(replace(engine, n_layers=1))
    layer = parameter_count(replace(engine, n_layers=2)) - shallow
    n_layers = 1 + (parameter_count(replace(engine, **ROLES["baseline"])) - shallow) // layer
    if n_layers < 1:
        raise ValueError("--variants equal_parameters: an engine of one layer is larger than the baseline; raise --d-model")
    return n_layers


def _repeated(key: str, seed: int, first: int) -> str:
    """The key of a repetition: that of the first has no seed."""
    return str(replace(Key.parse(key), seed=None if seed == first else seed))


def _given(argument: str, own: dict[str, ModelConfig]) -> ScoredModel:
    name, separator, path = argument.partition("=")
    if name in own:
        index = read_index(path)
        require_model(path, config := model_config_of(index), own[name].model)
        return ScoredModel(name, config, index["train_config"].get("seed", 0), Path(path))
    key = Key.parse(name)
    is_key = bool(separator) and (key.name in ("baseline", "transformer", *VARIANTS, *PAIRS) or key.ranks is not None)
    if Path(argument).exists() and not is_key:  # a folder: the model says what it is
        index = read_index(argument)
        require_model(argument, config := model_config_of(index), None)
        return ScoredModel(str(Key.of(config)), config, index["train_config"].get("seed", 0), Path(argument))
    if separator and Path(path).exists() and (theirs := model_config_of(read_index(path)).model):
        own_model = f"{name}={theirs.partition('@')[0]}"
        raise ValueError(f"--checkpoint {argument}: a model of {theirs} is there; give --model {own_model} too")
    if separator and may_be_own(name) and not is_key and Path(path).exists():  # a name of the user's own
        index = read_index(path)
        return ScoredModel(name, model_config_of(index), index["train_config"].get("seed", 0), Path(path))
    if not is_key:
        expected = "NAME of small letters, digits and _, or as in a report (baseline, phase1_htt{r}_ar{R}, a variant)"
        raise ValueError(f"--checkpoint must be a folder, or NAME=PATH with {expected}; got {argument!r}; correct it")
    index = read_index(path)
    config = model_config_of(index)
    found = Key.of(config)
    if key.model != found.model and not (key.name in ENGINES and found.is_engine):
        raise ValueError(f"--checkpoint {name}={path}: the model there is {found}; use that name")
    return ScoredModel(name, config, index["train_config"].get("seed", 0), Path(path))
