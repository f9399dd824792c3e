"""Checkpoints: safetensors for tensors, JSON for the rest, complete or absent at any moment."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from phase1.config import ModelConfig, TrainConfig
from phase1.files import atomic_write, read_json
from phase1.model import LanguageModel
from phase1.text import one_line
from phase1.training.optimizers import kept
from phase1.training.step import TrainState

INDEX = "checkpoint.json"  # written last; names the tensor files that belong together
_FACTS: dict[str, tuple[type, ...]] = {
    "data": (dict,), "tokenizer": (str,), "seq_length": (int,), "trained_tokens": (int,), "train_seconds": (int, float),
    "loss": (int, float), "finished": (bool,),
}  # fmt: skip
_DATA = {"name", "split", "sha256"}
SMALL = 100_000_000  # elements of a model that is made at once
_TENSOR_FILE = re.compile(r"(model|training|tokens)-\d{8,20}\.safetensors")  # of the checkpoint's own folder, no other


def save_checkpoint(
    folder: Path | str, state: TrainState, facts: dict[str, Any], *, resumable: bool = True, token_order: Tensor | None = None
) -> None:
    """Write model and `facts` (JSON: data, protocol, seconds...), what resuming needs if `resumable`, and `token_order`.

    `token_order` (V,) integers: all ids by falling frequency in the tokens of the training, for losses by frequency.

    The tensor files carry the step in their names and the index that names them is replaced last, so a crash
    leaves the previous checkpoint whole. Files of older steps are removed afterwards.
    """
    folder = Path(folder)
    files = {"model": f"model-{state.step:08d}.safetensors"}
    atomic_write(folder / files["model"], save(_on_cpu(state.model.state_dict())))
    if resumable:
        files["training"] = f"training-{state.step:08d}.safetensors"
        atomic_write(folder / files["training"], save(_on_cpu(_optimizer_tensors(state))))
    if token_order is not None:
        files["tokens"] = f"tokens-{state.step:08d}.safetensors"
        atomic_write(folder / files["tokens"], save({"order": token_order}))
    index = {
        "format": 1,
        "step": state.step,
        "model_config": asdict(state.model.config),
        "train_config": asdict(state.config),
        "scaler": state.scaler.state_dict(),
        "files": files,
        "facts": facts,
    }
    atomic_write(folder / INDEX, json.dumps(index, indent=2, allow_nan=False).encode())
    for old in folder.glob("*.safetensors"):
        if old.name not in files.values():
            old.unlink()


def read_index(folder: Path | str) -> dict[str, Any]:
    """The index of a checkpoint; ValueError, one line, if there is none or it is not one of ours."""
    path = Path(folder) / INDEX
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"no checkpoint in {folder}: {INDEX} is {error}; train one with `phase1 train`") from error
    objects = ("model_config", "train_config", "scaler", "files", "facts")
    if (
        not isinstance(index, dict)
        or index.get("format") != 1
        or type(index.get("step")) is not int
        or not all(isinstance(index.get(name), dict) for name in objects)
        or not all(isinstance(name, str) and _TENSOR_FILE.fullmatch(name) for name in index["files"].values())
    ):
        raise ValueError(f"{path} is not a checkpoint of format 1; train again, or use the version that wrote it")
    try:
        ModelConfig(**index["model_config"])
    except TypeError as error:
        raise _misfit(folder, error) from error
    return index


def training_facts(folder: Path | str, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` of a checkpoint that `phase1 train` or `phase1 perplexity` wrote; ValueError, one line, where they are not."""
    data = facts.get("data")
    wrong = [name for name, kind in _FACTS.items() if type(facts.get(name)) not in kind]
    wrong += ["skipped_steps"] * (type(facts.get("skipped_steps", 0)) is not int)  # earlier versions did not count them
    if isinstance(data, dict) and (data.keys() != _DATA or not all(isinstance(value, str) for value in data.values())):
        wrong.append("data")
    if wrong:
        expected = f"{INDEX} must say {', '.join(_FACTS)} of the training"
        raise ValueError(f"{one_line(folder)}: {expected}; got none or no such value for {', '.join(wrong)}; train again")
    return facts


def load_model(folder: Path | str) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, on the CPU, and its facts. Raises ValueError for a missing or foreign one."""
    index = read_index(folder)
    config = ModelConfig(**index["model_config"])
    try:
        _require_shapes(config, _shapes(folder, index))
        model = LanguageModel(config)
    except (TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise _misfit(folder, error) from error
    _load_weights(folder, index, model)
    return model, index["facts"]


def load_token_order(folder: Path | str) -> Tensor | None:
    """(V,) ids by falling frequency in training; None for an unfinished checkpoint or one of an earlier version."""
    index = read_index(folder)
    if "tokens" not in index["files"]:
        return None
    order = _tensors(folder, index, "tokens").get("order")
    every_id = torch.arange(ModelConfig(**index["model_config"]).vocab_size)
    if order is None or not torch.equal(order.long().sort().values, every_id):
        raise _misfit(folder, ValueError(f"the token order must hold 0 to {len(every_id) - 1} once each"))
    return order


def resume(folder: Path | str, state: TrainState) -> dict[str, Any]:
    """Put `state` exactly where the checkpoint left it and return its facts; ValueError if it is damaged or differs."""
    index = read_index(folder)
    check_configs(folder, index, state.model.config, state.config)
    if "training" not in index["files"]:
        raise ValueError(f"the checkpoint in {folder} holds no optimizer state; it can be evaluated, not resumed")
    _load_weights(folder, index, state.model)
    try:
        _restore_optimizer(state, _tensors(folder, index, "training"))
    except KeyError as error:
        raise _misfit(folder, error) from error
    state.scaler.load_state_dict(index["scaler"])
    state.step = index["step"]
    return index["facts"]


def _shapes(folder: Path | str, index: dict[str, Any]) -> dict[str, list[int]]:
    """The shape of every tensor of the model, from the header of its file; no tensor is read."""
    try:
        with safe_open(Path(folder) / index["files"]["model"], framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
    except (KeyError, OSError, SafetensorError) as error:
        raise _misfit(folder, error) from error


def _require_shapes(config: ModelConfig, shapes: dict[str, list[int]]) -> None:
    """Raise RuntimeError where a model of `config` has other tensors than `shapes`, before any memory is taken for it."""
    elements = sum(math.prod(shape) for shape in shapes.values())
    limits = {"n_layers": len(shapes), "vocab_size": elements, "d_model": elements}
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            raise RuntimeError(f"{INDEX} says {name} = {getattr(config, name)}, more than the tensor file holds")
    with _no_memory(config):
        wanted = {name: list(tensor.shape) for name, tensor in LanguageModel(config).state_dict().items()}
    for name in (*wanted, *shapes):
        if wanted.get(name) != shapes.get(name):
            raise RuntimeError(f"{name} must be {wanted.get(name)} by {INDEX}; got {shapes.get(name)} in the tensor file")


@contextlib.contextmanager
def _no_memory(config: ModelConfig) -> Iterator[None]:
    """Models made inside take no memory, or little: tensors without contents take PyTorch a second of imports."""
    D, V, groups = config.d_model, config.vocab_size, config.htt_groups
    block = D * (16 * D + 4 * config.n_heads * config.ar_ssm_max_rank)  # at most
    tail = 2 * config.htt_rank * (groups * math.isqrt(D) + D * math.ceil(V / groups))
    if V * D + config.n_layers * block + tail < SMALL:
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.device("meta"):
            yield


def _load_weights(folder: Path | str, index: dict[str, Any], model: LanguageModel) -> None:
    try:
        model.load_state_dict(_tensors(folder, index, "model"))
    except RuntimeError as error:
        raise _misfit(folder, error) from error


def _tensors(folder: Path | str, index: dict[str, Any], part: str) -> dict[str, Tensor]:
    try:
        return load_file(Path(folder) / index["files"][part])
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise _misfit(folder, error) from error


def _misfit(folder: Path | str, error: Exception) -> ValueError:
    reason = one_line(str(error).partition("\n")[0])
    return ValueError(f"the checkpoint in {folder} does not fit this version: {reason}; train again")


def check_configs(folder: Path | str, index: dict[str, Any], model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError, naming the flags, if the checkpoint is of another model or training; unused settings may differ.

    Also where its tensors are not those of `model`: an earlier version may have made another model of the same settings.
    """
    if ModelConfig(**index["model_config"]).config_id == model.config_id:
        index["model_config"] = asdict(model)
    for name, mine in (("model_config", model), ("train_config", train)):
        defaults = {field.name: field.default for field in fields(mine)}  # of settings that are younger than the checkpoint
        different = sorted(k for k, v in asdict(mine).items() if index[name].get(k, defaults[k]) != v)
        if different:
            flags = ", ".join("--" + key.replace("_", "-") for key in different)
            raise ValueError(f"the checkpoint in {folder} was made with other {flags}; use those, or another --out-dir")
    try:
        _require_shapes(model, _shapes(folder, index))
    except RuntimeError as error:
        raise _misfit(folder, error) from error


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    names = kept(state.optimizer)
    for name, parameter in state.model.named_parameters():
        for key in names[parameter]:
            state.optimizer.state[parameter][key] = tensors[f"{name}:{key}"].to(parameter.device)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
