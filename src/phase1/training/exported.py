"""Folders that `phase1 export` wrote, read without transformers: they are checkpoints for whoever has nothing else."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file

from phase1.config import ModelConfig, present_settings
from phase1.files import read_json
from phase1.tensor_names import not_finite, with_present_names
from phase1.text import one_line
from phase1.trainable import Trainable, build
from phase1.training.checkpoint import INDEX, config_from, open_tensors, require_shapes

T = TypeVar("T")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREFIX = "model."  # of every tensor's name: the model is a part of the one that transformers sees
TOKENIZER_KEY = "phase1_tokenizer"  # in CONFIG: the fingerprint of the training's tokenizer


def is_exported(folder: Path) -> bool:
    """Whether a folder holds a model for transformers and no checkpoint."""
    return (folder / CONFIG).is_file() and not (folder / INDEX).exists()


def load_exported(folder: Path) -> tuple[Trainable, dict[str, Any]]:
    """The model, on the CPU, and of its facts `tokenizer` and `seq_length`, None where the folder does not say.

    Raises ValueError, one line, for a folder of another model and a damaged one.
    """
    try:
        content = read_json(folder / CONFIG)
    except ValueError as error:
        raise _misfit(folder, error) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "phase1":
        got = f"got model_type {kind!r:.40}; give a folder that phase1 export wrote"
        raise ValueError(f"{one_line(folder)} must hold a phase1 model; {got}")
    names = {field.name for field in fields(ModelConfig)}
    try:
        config = config_from(ModelConfig, {name: value for name, value in present_settings(content).items() if name in names})
        if config.model is not None:
            raise ValueError("it names a model of its own, and no file decides what code runs")
        with open_tensors(folder / WEIGHTS) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
        require_shapes(config, _of_model(shapes), CONFIG)
        tensors = _of_model(load_file(folder / WEIGHTS))
        if name := not_finite(tensors):
            raise ValueError(f"{name} is not finite")
        model = build(config)
        model.load_state_dict(tensors)
    except (ValueError, OSError, SafetensorError, TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise _misfit(folder, error) from error
    facts = {"tokenizer": (TOKENIZER_KEY, str), "seq_length": ("max_position_embeddings", int)}
    return model, {
        fact: value if type(value := content.get(key)) is kind_of else None for fact, (key, kind_of) in facts.items()
    }


def _of_model(tensors: dict[str, T]) -> dict[str, T]:
    """By the names that the model has for them in this version."""
    return with_present_names({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def _misfit(folder: Path, error: Exception) -> ValueError:
    reason = one_line(" ".join(str(error).split()))
    return ValueError(f"the exported model in {one_line(folder)} does not fit this version: {reason}; export it again")
