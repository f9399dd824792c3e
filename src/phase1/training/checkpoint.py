"""Checkpoints: safetensors for tensors, JSON for the rest, complete or absent at any moment."""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from phase1.config import Config, ModelConfig, TrainConfig, flag_of, present_settings
from phase1.device import steadier
from phase1.errors import Diverged
from phase1.files import atomic_write, open_plain, read_json, remove
from phase1.parallel import group
from phase1.parallel.parts import part_of, whole
from phase1.records.metrics import CHECKPOINT, MAX_CHECKPOINT_BYTES, PATIENCE
from phase1.tensor_names import not_finite, with_present_names
from phase1.text import one_line
from phase1.trainable import Trainable, build
from phase1.training.optimizers import kept
from phase1.training.step import TrainState, total_steps
from phase1.world import is_first

C = TypeVar("C", bound=Config)
T = TypeVar("T")

READS = 5  # of a checkpoint that a training replaces meanwhile
MOMENT = 0.2  # seconds in which another machine may still see the older index
SHOWN = 3  # settings that differ, with their values
INDEX = CHECKPOINT  # written last; names the tensor files that belong together
NO_DIFFERENCE: Final = {"micro_batch_size": TrainConfig.micro_batch_size, "piece_length": TrainConfig.piece_length}
"""Settings that change the result of a training by rounding alone, with the value that stands for all in identities: a training
that ran out of memory can continue with another value, and a finished one is not repeated."""
HOW: Final = ("attention", "compile", "cuda_graphs", "loss", "recompute")
"""Settings that say how a model is computed, not what: a training continues with others, which change it by rounding alone. Of
those that are the model's its checkpoint keeps the ones that it began with, by which results know it."""
MARK: Final = {"program": "phase1"}  # in the header of every tensor file, with its step
_FACTS: dict[str, tuple[type, ...]] = {
    "data": (dict,), "tokenizer": (str,), "seq_length": (int,), "trained_tokens": (int,), "train_seconds": (int, float),
    "loss": (int, float), "finished": (bool,),
}  # fmt: skip
_DATA = {"name", "split", "sha256"}
SMALL = 100_000_000  # elements up to which a model is simply made, to learn its shapes
_TENSOR_FILE = re.compile(r"(model|training|tokens)-\d{8,20}\.safetensors")  # of the checkpoint's own folder, no other


def save_checkpoint(
    folder: Path | str, state: TrainState, facts: dict[str, Any], *, resumable: bool = True, token_order: Tensor | None = None
) -> None:
    """Write model and `facts` (JSON: data, protocol, seconds...), what resuming needs if `resumable`, and `token_order`.

    `token_order` (V,) integers: all ids by falling frequency in the tokens of the training, for losses by frequency.

    The tensor files carry the step in their names and the index that names them is replaced last, so a crash
    leaves the previous checkpoint whole. Files of its own earlier saves are removed afterwards, and no other file.
    Every rank of a run calls it, and rank 0 writes; when it returns all is there.
    Raises Diverged, with nothing written, where a tensor holds a number that is not finite.
    """
    folder = Path(folder)
    parts = {"model": _on_cpu(state.model.state_dict())}
    if resumable:
        parts["training"] = _on_cpu(_optimizer_tensors(state))
    if token_order is not None:
        parts["tokens"] = {"order": token_order}
    if name := group.from_first(lambda: next(filter(None, map(not_finite, parts.values())), None)):
        raise Diverged(f"{name} is not finite at step {state.step}, nothing is saved; {steadier(state.device)}")
    if is_first():
        _write(folder, state, facts, parts)
    group.gate()


def _write(folder: Path, state: TrainState, facts: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
    older = _own_files(folder)
    files = {part: f"{part}-{state.step:08d}.safetensors" for part in parts}
    for part, tensors in parts.items():
        atomic_write(folder / files[part], save(tensors, MARK | {"step": str(state.step)}))
    index = {
        "format": 1,
        "step": state.step,
        "model_config": asdict(state.model.config) | state.begun_as,
        "train_config": asdict(state.config),
        "scaler": state.scaler.state_dict(),
        "files": files,
        "facts": facts,
    }
    atomic_write(folder / INDEX, json.dumps(index, indent=2, allow_nan=False).encode())
    for name in older - set(files.values()):
        remove(folder / name)


def _own_files(folder: Path) -> set[str]:
    """The tensor files that the index of `folder` names, and those with MARK that a killed save left there."""
    own = set()
    with contextlib.suppress(ValueError):  # no index yet
        own = set(read_index(folder)["files"].values())
    for path in folder.glob("*.safetensors"):
        if _TENSOR_FILE.fullmatch(path.name):
            with contextlib.suppress(OSError, SafetensorError), open_tensors(path) as file:
                if MARK.items() <= (file.metadata() or {}).items():
                    own.add(path.name)
    return own


def read_index(folder: Path | str) -> dict[str, Any]:
    """The index of a checkpoint; ValueError, one line, if there is none or another program wrote it.

    Every value has its type, the two configs are in range, and the tensor files are of the step that it says. What `facts`
    must hold, `training_facts` says.
    """
    path = Path(folder) / INDEX
    try:
        index = read_json(path, MAX_CHECKPOINT_BYTES)
    except ValueError as error:
        remedy = "train one with `phase1 train`"
        if Path(folder).is_file():
            remedy = "give the folder of the file"
        elif (Path(folder) / "config.json").is_file():
            remedy = "an export is there: give the checkpoint that it is of"
        raise ValueError(f"no checkpoint in {folder}: {INDEX} is {error}; {remedy}") from error
    objects = ("model_config", "train_config", "scaler", "files", "facts")
    if (
        not isinstance(index, dict)
        or index.get("format") != 1
        or type(index.get("step")) is not int
        or index["step"] < 0
        or not all(isinstance(index.get(name), dict) for name in objects)
        or not all(isinstance(name, str) and _TENSOR_FILE.fullmatch(name) for name in index["files"].values())
    ):
        raise ValueError(f"{path} is not a checkpoint of format 1; train again, or use the version that wrote it")
    index["model_config"] = present_settings(index["model_config"])
    for part, name in index["files"].items():
        if name != f"{part}-{index['step']:08d}.safetensors":
            raise _misfit(folder, ValueError(f"{INDEX} says step {index['step']} and names {name}"))
    try:
        config_from(ModelConfig, index["model_config"])
        _train_config_of(index)
    except ValueError as error:
        raise _misfit(folder, error) from error
    return index


def read_whole(folder: Path | str, read: Callable[[dict[str, Any]], T]) -> T:
    """What `read` makes of the index of a checkpoint and the files that it names; again where a training has saved meanwhile.

    A save puts its index in place of the older one and then removes the files which that one named.
    Raises the ValueError of `read` where the index is still the same, and one that says so where it never is.
    """
    for _ in range(READS):
        index = read_index(folder)
        files = index["files"]
        try:
            return read(index)
        except ValueError:
            if not all((Path(folder) / name).exists() for name in files.values()):
                time.sleep(MOMENT)
            if read_index(folder)["files"] == files:
                raise
    expected = f"the checkpoint in {one_line(folder)} must stay while it is read"
    raise ValueError(f"{expected}; got a training that saves all the time; read it again, or when that has ended")


def config_from(cls: type[C], content: dict[str, Any]) -> C:
    """The config that a file describes; ValueError, one line, for an unknown setting, a wrong type or a value out of range."""
    from pydantic import TypeAdapter, ValidationError

    if unknown := content.keys() - {field.name for field in fields(cls)}:
        raise ValueError(f"{min(unknown)!r:.80} is no setting of {cls.__name__}")
    try:
        config: C = TypeAdapter(cls).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{first['msg'].removeprefix('Value error, ')}{where and f' at {where}'}") from error
    return config


def _train_config_of(index: dict[str, Any]) -> TrainConfig:
    """How the model of an index was trained, without settings that this version does not have."""
    known = {field.name for field in fields(TrainConfig)}
    return config_from(TrainConfig, {name: value for name, value in index["train_config"].items() if name in known})


def model_config_of(index: dict[str, Any]) -> ModelConfig:
    """The model of an index that `read_index` gave."""
    return config_from(ModelConfig, index["model_config"])


def training_facts(folder: Path | str, index: dict[str, Any]) -> dict[str, Any]:
    """The facts in the index of a checkpoint that `phase1 train` or `phase1 perplexity` wrote, checked for consistency.

    Raises ValueError, one line, where a fact is missing or of a wrong type, or contradicts the step or the schedule.
    """
    facts = index["facts"]
    data = facts.get("data")
    wrong = [name for name, kind in _FACTS.items() if type(facts.get(name)) not in kind]
    wrong += ["skipped_steps"] * (type(facts.get("skipped_steps", 0)) is not int)  # earlier versions did not count them
    wrong += ["ended_by"] * (facts.get("ended_by") not in (None, PATIENCE))
    if isinstance(data, dict) and (data.keys() != _DATA or not all(isinstance(value, str) for value in data.values())):
        wrong.append("data")
    if wrong:
        expected = f"{INDEX} must say {', '.join(_FACTS)} of the training"
        raise ValueError(f"{one_line(folder)}: {expected}; got none or no such value for {', '.join(wrong)}; train again")
    step, seq_length = index["step"], facts["seq_length"]
    skipped = facts.get("skipped_steps", 0)
    if seq_length < 1 or facts["train_seconds"] < 0 or not math.isfinite(facts["loss"]) or not 0 <= skipped <= step:
        raise _misfit(folder, ValueError("seq_length, train_seconds, loss or skipped_steps is out of range"))
    config = _train_config_of(index)
    steps = total_steps(config, seq_length)
    tokens = step * config.train_batch_size * seq_length
    if step > steps or facts["finished"] != (step == steps) or facts["trained_tokens"] != tokens:
        says = f"step {step} of {steps}, {facts['trained_tokens']} tokens, {'' if facts['finished'] else 'not '}finished"
        raise _misfit(folder, ValueError(f"{INDEX} contradicts itself: {says}"))
    return facts


def load_model(folder: Path | str, model: str | None = None) -> tuple[Trainable, dict[str, Any]]:
    """The model of a checkpoint, on the CPU, and its facts. Raises ValueError for a missing or foreign one.

    model: `ModelConfig.model` that it must be of, from the command line: no file decides what code runs.
    """
    return read_whole(folder, lambda index: _model_of(folder, index, model))


def _model_of(folder: Path | str, index: dict[str, Any], model: str | None) -> tuple[Trainable, dict[str, Any]]:
    config = model_config_of(index)
    require_model(folder, config, model)
    try:
        require_shapes(config, _shapes(folder, index))
        loaded = build(config)
    except (TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise _misfit(folder, error) from error
    _load_weights(folder, index, loaded)
    return loaded, index["facts"]


def require_model(folder: Path | str, config: ModelConfig, model: str | None) -> None:
    """Raise ValueError unless a checkpoint of `config` is of the user's own `model`, or of this package's for None."""
    if config.model == model:
        return
    theirs = config.model or "a model of phase1"
    remedy = f"give --model NAME={config.model} to phase1 perplexity, and NAME={folder}" if config.model else "leave it out"
    if model is not None and config.model is not None:
        remedy = "go back to that source, or train again"
    raise ValueError(f"the checkpoint in {one_line(folder)} is of {theirs}; got {model or 'no --model'}; {remedy}")


def load_token_order(folder: Path | str) -> Tensor | None:
    """(V,) ids by falling frequency in training; None for an unfinished checkpoint or one of an earlier version."""
    return read_whole(folder, lambda index: _token_order_of(folder, index))


def _token_order_of(folder: Path | str, index: dict[str, Any]) -> Tensor | None:
    if "tokens" not in index["files"]:
        return None
    order = _tensors(folder, index, "tokens").get("order")
    every_id = torch.arange(model_config_of(index).vocab_size)
    if order is None or order.is_floating_point() or not torch.equal(order.long().sort().values, every_id):
        raise _misfit(folder, ValueError(f"the token order must hold 0 to {len(every_id) - 1} once each"))
    return order


def resume(folder: Path | str, state: TrainState) -> dict[str, Any]:
    """Put `state` exactly where the checkpoint left it and return its facts; ValueError if it is damaged or differs."""
    index = read_index(folder)
    begun_as = {name: index["model_config"][name] for name in HOW if name in index["model_config"]}
    check_configs(folder, index, state.model.config, state.config)
    if "training" not in index["files"]:
        raise ValueError(f"the checkpoint in {folder} holds no optimizer state; it can be evaluated, not resumed")
    _load_weights(folder, index, state.model)
    tensors = _tensors(folder, index, "training")
    try:
        _check_optimizer(state, index, tensors)
        _check_scaler(state.scaler.state_dict(), index["scaler"])
        _restore_optimizer(state, tensors)
    except (KeyError, ValueError) as error:
        raise _misfit(folder, error) from error
    state.scaler.load_state_dict(index["scaler"])
    state.step = index["step"]
    state.begun_as = begun_as
    return index["facts"]


def _shapes(folder: Path | str, index: dict[str, Any]) -> dict[str, list[int]]:
    """The shape of every tensor of the model, from the header of its file; no tensor is read."""
    try:
        with open_tensors(Path(folder) / index["files"]["model"]) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
        return with_present_names(shapes)
    except (KeyError, OSError, SafetensorError, ValueError) as error:
        raise _misfit(folder, error) from error


def open_tensors(path: Path) -> Any:
    """`safe_open` of a regular file; on a pipe it would wait for ever."""
    open_plain(path).close()
    return safe_open(path, framework="pt")


def require_shapes(config: ModelConfig, shapes: dict[str, list[int]], source: str = INDEX) -> None:
    """Raise RuntimeError where a model of `config` has other tensors than `shapes`, before any memory is taken for it.

    `source` is the file that the config is from.
    """
    elements = sum(math.prod(shape) for shape in shapes.values())
    limits = {"n_layers": len(shapes), "vocab_size": elements, "d_model": elements}
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            raise RuntimeError(f"{source} says {name} = {getattr(config, name)}, more than the tensor file holds")
    with _no_memory(config):
        wanted = {name: list(tensor.shape) for name, tensor in build(config).state_dict().items()}
    for name in (*wanted, *shapes):
        if wanted.get(name) != shapes.get(name):
            raise RuntimeError(f"{name} must be {wanted.get(name)} by {source}; got {shapes.get(name)} in the tensor file")


@contextlib.contextmanager
def _no_memory(config: ModelConfig) -> Iterator[None]:
    """Make models inside without much memory: small ones as usual, because the meta device takes a second to import."""
    D, V, groups = config.d_model, config.vocab_size, config.htt_groups
    block = D * (16 * D + 4 * config.n_heads * config.ar_ssm_max_rank)  # at most
    tail = 2 * config.htt_rank * (groups * math.isqrt(D) + D * math.ceil(V / groups))
    if V * D + config.n_layers * block + tail < SMALL:
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.device("meta"):
            yield


def _load_weights(folder: Path | str, index: dict[str, Any], model: Trainable) -> None:
    """Raises ValueError, one line, where a tensor does not fit, is not finite, or holds an index out of range."""
    tensors = _tensors(folder, index, "model")
    if name := not_finite(tensors):
        raise _misfit(folder, ValueError(f"{name} is not finite"))
    own = model.state_dict()
    try:
        model.load_state_dict({name: part_of(tensor, own[name]) if name in own else tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise _misfit(folder, error) from error


def _tensors(folder: Path | str, index: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The tensors of one file, by their present names. The file must be of the index's step, if it says one."""
    try:
        path = Path(folder) / index["files"][part]
        with open_tensors(path) as file:
            step = (file.metadata() or {}).get("step", str(index["step"]))
        if step != str(index["step"]):
            raise _misfit(folder, ValueError(f"{INDEX} says step {index['step']} and {path.name} step {step:.20}"))
        tensors = load_file(path)
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise _misfit(folder, error) from error
    try:
        return with_present_names(tensors)
    except ValueError as error:
        raise _misfit(folder, error) from error


def _misfit(folder: Path | str, error: Exception) -> ValueError:
    reason = one_line(" ".join(str(error).split()))
    return ValueError(f"the checkpoint in {one_line(folder)} does not fit this version: {reason}; train again")


def check_configs(folder: Path | str, index: dict[str, Any], model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError, naming the flags, if the checkpoint is of another model or training.

    Settings that are not used may differ, and those of HOW and NO_DIFFERENCE. Also raised where its tensors are not those of
    `model`: an earlier version may have made another model of the same settings.
    """
    if model_config_of(index).config_id == model.config_id:
        index["model_config"] = asdict(model)
    for name, mine in (("model_config", model), ("train_config", train)):
        defaults = {field.name: field.default for field in fields(mine)}  # of settings that are younger than the checkpoint
        theirs = defaults | index[name]
        different = sorted(k for k, v in asdict(mine).items() if k not in (*NO_DIFFERENCE, *HOW) and theirs[k] != v)
        if different:
            flags = ", ".join(f"{flag_of(key)} ({theirs[key]}, not {getattr(mine, key)})" for key in different[:SHOWN])
            more = f" and {len(different) - SHOWN} more" * (len(different) > SHOWN)
            raise ValueError(f"the checkpoint in {folder} was made with other {flags}{more}; use those, or another --out-dir")
    try:
        require_shapes(model, _shapes(folder, index))
    except RuntimeError as error:
        raise _misfit(folder, error) from error


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _check_optimizer(state: TrainState, index: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless every moment has its parameter's shape and finite numbers, and the step counts are the index's.

    Loss scaling skips the steps whose gradients overflow; without it the optimizer has made every step.
    """
    if name := not_finite(tensors):
        raise ValueError(f"{name} is not finite")
    shapes = {name: parameter.shape for name, parameter in state.model.named_parameters()}
    for name, tensor in tensors.items():
        of, _, key = name.rpartition(":")
        wanted = torch.Size() if key == "step" else shapes.get(of)
        if wanted != tensor.shape or not tensor.is_floating_point():
            raise ValueError(f"{name} must be {wanted and list(wanted)} floats; got {list(tensor.shape)} {tensor.dtype}")
        least = 0 if state.scaler.is_enabled() else index["step"]
        if key == "step" and not least <= tensor.item() <= index["step"]:
            raise ValueError(f"{INDEX} says step {index['step']}, {name} {tensor.item():g}")


def _check_scaler(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise ValueError unless `theirs` is a state of a loss scaler with our settings: its scale and tracker are free."""
    scale, tracker = theirs.get("scale"), theirs.get("_growth_tracker")
    fits = theirs == ours | ({"scale": scale, "_growth_tracker": tracker} if ours else {})
    if fits and ours:
        fits = isinstance(scale, float) and scale > 0 and type(tracker) is int and 0 <= tracker < ours["growth_interval"]
    if not fits:
        raise ValueError(f"the loss scaler must have {', '.join(ours) or 'no state'}, in range; got {theirs!r:.120}")


def _restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    names = kept(state.optimizer)
    for name, parameter in state.model.named_parameters():
        for key in names[parameter]:
            state.optimizer.state[parameter][key] = part_of(tensors[f"{name}:{key}"], parameter)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies, on rank 0; those that are spread over ranks are collected by all."""
    every = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in every if is_first()}
