"""Parameter groups, and their optimizer: AdamW, or Muon for the matrices of blocks and AdamW for the rest."""

from typing import Any

import torch
from torch import Tensor, nn

from phase1.config import TrainConfig
from phase1.training.muon import Muon

KEPT = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}  # between steps, of every parameter


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers as one, so that a step whose gradients overflow is skipped by both or by none.

    Where AdamW is fused, a loss scaler leaves the word on that on the device (`found_inf`), and the host waits for nothing.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        groups = [*muon.param_groups, *adamw.param_groups]  # the same ones: a new rate is one of the parts
        super().__init__(groups, {"fused": adamw.defaults["fused"]})  # then zero_grad takes all gradients at once
        self.parts = (muon, adamw)
        self._share()
        self._step_supports_amp_scaling = all(group["fused"] for group in adamw.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts see these groups and this state, which loading replaces."""
        muon, adamw = self.parts
        count = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        muon.state = adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert getattr(self, "grad_scale", None) is None, "gradients are unscaled before they are clipped"
        for part in self.parts:
            part.found_inf = getattr(self, "found_inf", None)  # type: ignore[union-attr]
            part.step()


def make_optimizer(model: nn.Module, config: TrainConfig, device_type: str) -> torch.optim.Optimizer:
    """AdamW (fused on CUDA) for all of `model`; or Muon for the matrices of the blocks and AdamW for the rest."""
    groups = parameter_groups(model, config)
    taken: list[dict[str, Any]] = []
    if config.optimizer == "muon":
        inner = model.get_submodule("blocks") if hasattr(model, "blocks") else model
        blocks = {id(parameter) for parameter in inner.parameters()}
        matrices, *others = groups
        inside = [parameter for parameter in matrices["params"] if id(parameter) in blocks]
        outside = [parameter for parameter in matrices["params"] if id(parameter) not in blocks]
        taken = [matrices | {"params": inside}]
        groups = [matrices | {"params": outside}, *others]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=device_type == "cuda")
    if not taken:
        return adamw
    return MuonAdamW(Muon(taken, lr=config.learning_rate, dtype=torch.float16 if device_type == "cuda" else None), adamw)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Three groups: matrices of linear layers (weight decay), the token table (no decay, rate times `table_learning_rate`), and
    the rest, which are norms, biases, scales and taps of any shape (no decay)."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # of users' own models
    matrices: list[Tensor] = []
    table: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        of_table = name.startswith("embedding.") and parameter.ndim >= 2 or id(parameter) in tables
        of_linear = id(parameter) in linear and id(parameter) not in tables  # a tied table is a table
        (matrices if of_linear else table if of_table else rest).append(parameter)
    return [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": table, "weight_decay": 0.0, "lr_scale": config.table_learning_rate},
        {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def described_groups(model: nn.Module) -> str:
    """How many parameters are in each of the groups."""
    counts = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, TrainConfig())]
    return "{:,} parameters of matrices, which decay, {:,} of tables, at their own rate, {:,} of the rest".format(*counts)


def kept(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """For every parameter, the names of the tensors that `optimizer` keeps between steps."""
    parts = optimizer.parts if isinstance(optimizer, MuonAdamW) else (optimizer,)
    return {p: KEPT[type(part).__name__] for part in parts for group in part.param_groups for p in group["params"]}
