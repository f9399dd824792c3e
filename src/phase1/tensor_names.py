"""Names that tensors of a model have had, the one map with which older checkpoints and exports still load; and of bad ones."""

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T")

RENAMED: Final = {
    "mixer.project": "mixer.in_proj",
    "mixer.qkv": "mixer.in_proj",
    "mixer.out": "mixer.out_proj",
    "mixer.step_bias": "mixer.dt_bias",
    "mixer.log_rate": "mixer.A_log",
    "mixer.skip": "mixer.D",
    "mixer.rank_gate.out": "mixer.rank_gate.out_proj",
    "mlp.expand": "mlp.gate_up_proj",
    "mlp.out": "mlp.down_proj",
    "copy_head.qkk": "copy_head.qk_proj",
    "embedding.positions_of": "embedding.row_of_id",
}
"""Old names and present ones, of modules or of parameters, without the model around them."""


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor with NaN or infinity in it."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def pattern_of(name: str) -> str:
    """Matches `name` where it is whole parts of a tensor's name: in blocks.0.mixer.out.weight or ….weight:exp_avg."""
    return rf"(?<![^.]){re.escape(name)}(?![^.:])"


_OLD_NAME = re.compile("|".join(map(pattern_of, RENAMED)))


def present_name(name: str) -> str:
    """The name that this version gives to the tensor `name` of a file."""
    return _OLD_NAME.sub(lambda found: RENAMED[found[0]], name)


def with_present_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """`tensors` of a file by their present names. Raises ValueError if two of them are one."""
    renamed = {present_name(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        names = [present_name(name) for name in tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice, under two of the names that it has had")
    return renamed
