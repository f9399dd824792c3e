"""phase1: a causal language model of linear cost, and the suite that measures it honestly.

What other programs use is imported from here, for example `from phase1 import load_model`. Each name loads its module, and
PyTorch if that needs it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phase1.config import ModelConfig, TrainConfig
    from phase1.generation import Decoder, load
    from phase1.machine.cards import card_for
    from phase1.measure.memory.case import MemoryCase
    from phase1.measure.memory.estimate.estimate import estimate_memory
    from phase1.model import LanguageModel
    from phase1.records.schema import Report, read_report
    from phase1.roster import Key
    from phase1.stats.perplexity_ratio import paired_ratio_interval
    from phase1.stats.scaling import fit_scaling
    from phase1.training.checkpoint import load_model

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "Key",
    "LanguageModel",
    "MemoryCase",
    "ModelConfig",
    "Report",
    "TrainConfig",
    "card_for",
    "estimate_memory",
    "fit_scaling",
    "load",
    "load_model",
    "paired_ratio_interval",
    "read_report",
]

_HOMES = {
    "ModelConfig": "config",
    "TrainConfig": "config",
    "Decoder": "generation",
    "load": "generation",
    "card_for": "machine.cards",
    "MemoryCase": "measure.memory.case",
    "estimate_memory": "measure.memory.estimate.estimate",
    "LanguageModel": "model",
    "Report": "records.schema",
    "read_report": "records.schema",
    "Key": "roster",
    "paired_ratio_interval": "stats.perplexity_ratio",
    "fit_scaling": "stats.scaling",
    "load_model": "training.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phase1' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"phase1.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
