"""What can be trained and measured: a model of this package, or one of the user's own."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1 import factory
from phase1.config import ModelConfig
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE
from phase1.vocabulary.statistics import TokenStatistics, TokenVectors

CONTRACT = "a torch.nn.Module with forward(ids) -> logits (B, T, V), or with loss(ids, targets) and nll(ids, targets)"
raised, defined, pass_on = factory.raised, factory.defined, factory.pass_on
WrongReference = factory.WrongReference


class WrongOutput(ValueError):
    """A user's module returns something else than its contract says, or ends the program."""


class OwnModel(nn.Module):
    """A user's module as a `Trainable`.

    `loss` and `nll` of the module are used where it has both, else the cross-entropy of the logits that its forward returns,
    itself or as `.logits` (transformers).
    """

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.scores_itself = all(callable(getattr(type(model), name, None)) for name in ("loss", "nll"))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        output = self._run(self.model, ids)
        logits = getattr(output, "logits", output)
        expected = (*ids.shape, self.config.vocab_size)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            what = f"forward must return logits {expected}, V = --vocab-size; got {got}"
            where = factory.defined(type(self.model).forward)
            raise WrongOutput(f"{self._flag}: {what}; {_remedy(logits, expected)}{where}")
        return logits

    def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """Mean nats of the targets (B, T) that are not -100, and what training adds to them: nothing."""
        if not self.scores_itself:
            return F.cross_entropy(_wide(self(ids)).flatten(0, 1), targets.flatten(), ignore_index=IGNORE), None
        loss = self._run(self.model.loss, ids, targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            where = factory.defined(getattr(type(self.model), "loss", None))
            raise WrongOutput(f"{self._flag}: loss must return one number; got {_described(loss)}; take the mean{where}")
        return loss, None

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.losses(ids, targets)[0]

    @torch.no_grad()
    def nll(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """(B, T) nats of each target, 0 where it is -100, and no rank."""
        if self.scores_itself:
            nll = self._run(self.model.nll, ids, targets)
        else:
            scores = _wide(self(ids)).flatten(0, 1)
            nll = F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORE, reduction="none").view(targets.shape)
        if not isinstance(nll, Tensor) or nll.shape != targets.shape:
            what = f"nll must return one number a target, {tuple(targets.shape)}; got {_described(nll)}"
            where = factory.defined(getattr(type(self.model), "nll", None))
            raise WrongOutput(f'{self._flag}: {what}; use reduction="none" and the shape of the targets{where}')
        return nll.where(targets != IGNORE, 0), None

    def parameter_counts(self) -> dict[str, int]:
        """Those of nn.Embedding are the table's; of mixers and MLPs nothing is known."""
        tables = {id(module.weight): module.weight.numel() for module in self.modules() if isinstance(module, nn.Embedding)}
        total = sum(parameter.numel() for parameter in self.parameters())
        return {"total": total, "embedding": sum(tables.values()), "mixer": 0, "mlp": 0, "copy_head": 0}

    def prove_kernels(self, dtype: torch.dtype) -> None:
        """Nothing to prove."""

    def _run(self, function: Any, *args: Tensor) -> Any:
        """What the user's function returns. Raises ValueError where it raises what is no Exception, SystemExit for example."""
        if torch.compiler.is_compiling():  # a compiler breaks its graph at what follows
            return function(*args)
        try:
            return function(*args)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            remedy = "raise an Exception where there is nothing to return"
            raise WrongOutput(f"{self._flag}: the model must return; got {raised(error)}; {remedy}") from error

    @property
    def _flag(self) -> str:
        return f"--model {self.config.model}"


Trainable = LanguageModel | OwnModel
"""What is trained and measured: a module with `config`, `losses`, `nll`, `parameter_counts` and `prove_kernels`."""


def build(config: ModelConfig, statistics: TokenStatistics | TokenVectors | None = None) -> Trainable:
    """A new model of `config`: one of this package, or what the factory that `config.model` names returns.

    The factory is called with those it names of vocab_size, d_model, n_layers, n_heads, config and statistics. It may return
    a `LanguageModel` of that same config, with a sequence layer of its own for example.
    Raises ValueError, one line, where it raises or returns something else.
    """
    if config.model is None:
        return LanguageModel(config, statistics)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads")}
    made: Any = factory.call(config.model, sizes | {"config": config, "statistics": statistics})
    flag = f"--model {config.model}"
    if isinstance(made, LanguageModel):
        if made.config != config:
            raise ValueError(f"{flag}: a LanguageModel must be of the factory's config; got another; pass it on as it is")
        return made
    if not isinstance(made, nn.Module):
        raise ValueError(f"{flag}: the factory must return {CONTRACT}; got {_described(made)}")
    has = [name for name in ("forward", "loss", "nll") if callable(_method(made, name))]
    if "forward" not in has and not OwnModel(made, config).scores_itself:
        got = f"{has[0]} alone" if has else f"{type(made).__name__} without them"
        where = factory.defined(_method(made, has[0]) if has else type(made).__init__)
        expected = "the model must have forward, or loss and nll"
        raise ValueError(f"{flag}: {expected}; got {got}; define what is missing{where}")
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise ValueError(f"{flag}: the model must have parameters that require gradients; got none; use nn.Parameter")
    return OwnModel(made, config)


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters of a model, counted without allocating it."""
    with torch.device("meta"):
        return build(config).parameter_counts()["total"]


def require_built(configs: Iterable[ModelConfig]) -> None:
    """Raise ValueError now, before any work, where a factory of one of them fails."""
    for config in configs:
        if config.model is not None:
            build(config)


def _method(module: nn.Module, name: str) -> Any:
    """That of its class; None where it is the forward that nn.Module raises an error in."""
    found = getattr(type(module), name, None)
    return None if found is nn.Module.forward else found


def _remedy(logits: Any, expected: tuple[int, ...]) -> str:
    """How what forward returned becomes logits (B, T, V)."""
    if not isinstance(logits, Tensor):
        return "return the logits alone, or an object with .logits"
    batch, length, vocab = expected
    if logits.shape == (batch, vocab, length):
        return "transpose the last two"
    if logits.shape == (length, batch, vocab):
        return "transpose the first two"
    if logits.shape[:-1] == (batch, length):
        return "make as many scores as the vocab_size that the factory gets"
    return "return a score of every token at every position"


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _described(thing: Any) -> str:
    return f"a tensor {tuple(thing.shape)}" if isinstance(thing, Tensor) else f"a {type(thing).__name__}"
