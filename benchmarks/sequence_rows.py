"""The rows of sequence_ops.py: operators of sequence layers, each with its operands and its definition."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, CHANNELS, WINDOW = 8, 64, 64  # H, P and w: a model 512 wide
SCORES_BYTES = 2e10  # of T x T scores that a row may make
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """B texts of T positions, R ranks (key channels)."""

    B: int
    T: int
    R: int


@dataclass(frozen=True)
class Row:
    """One operator: `load` imports it, what it returns maps operands to y (B, T, H, P); `define` is the same in float64.

    values: the operand that is 0 where nothing is to be remembered; None where a late part depends on all of the text.
    ranked: whether its cost depends on R.
    """

    name: str
    what: str
    operands: Callable[[Size, str, torch.dtype], Inputs]
    load: Callable[[], Callable[[Inputs], Tensor]]
    define: Callable[[Inputs], Tensor]
    values: str | None = None
    ranked: bool = True
    refuse: Callable[[Size], str] = lambda size: ""
    only_rank: int | None = None  # where compiling for every size takes longer than it is worth


# Operands: (B, T, H, ·) for every row, log decays in float32.


def draw(size: Size, device: str, dtype: torch.dtype, channels: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return (torch.randn(size.B, size.T, HEADS, channels, device=device) * std + mean).to(dtype).requires_grad_()


def decays(size: Size, device: str, channels: int = 1) -> Tensor:
    """Log decays of memories from tens to thousands of positions."""
    shape = (size.B, size.T, HEADS, channels) if channels > 1 else (size.B, size.T, HEADS)
    return (-F.softplus(torch.randn(shape, device=device) - 4.0)).requires_grad_()


def linear_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    q, k = (draw(size, device, dtype, size.R, std=size.R**-0.25) for _ in range(2))
    return {"q": q, "k": k, "v": draw(size, device, dtype, CHANNELS), "g": decays(size, device)}


def gla_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    return linear_operands(size, device, dtype) | {"g": decays(size, device, size.R)}


def delta_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    beta = torch.rand(size.B, size.T, HEADS, device=device).to(dtype).requires_grad_()
    return linear_operands(size, device, dtype) | {"beta": beta}


def kda_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    return delta_operands(size, device, dtype) | {"g": decays(size, device, size.R)}


def ssd_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    dt = F.softplus(torch.randn(size.B, size.T, HEADS, device=device) - 3.0).requires_grad_()
    A = -torch.linspace(0.3, 2.0, HEADS, device=device).requires_grad_().detach()
    C, B = (draw(size, device, dtype, size.R, std=size.R**-0.25) for _ in range(2))
    return {"x": draw(size, device, dtype, CHANNELS), "dt": dt, "A": A.requires_grad_(), "B": B, "C": C}


def attention_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    return {name: draw(size, device, dtype, CHANNELS) for name in ("q", "k", "v")}


def window_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    q, k = (draw(size, device, dtype, size.R) for _ in range(2))
    return {"q": q, "k": k, "v": draw(size, device, dtype, CHANNELS)}


def core_operands(size: Size, device: str, dtype: torch.dtype, windowed: bool = True) -> Inputs:
    """Of this package's core: those of far and near part, in memory as its kernels take them, (B, H, T, ·)."""
    names = ("u", "v", "q", "k") if windowed else ("u", "v")
    x = {name: draw(size, device, dtype, size.R) for name in names} | {"x": draw(size, device, dtype, CHANNELS)}
    x |= {"dt": F.softplus(torch.randn(size.B, size.T, HEADS, device=device) - 3.0), "g": decays(size, device)}
    per_head = {"scale": torch.full((HEADS, CHANNELS), 0.25, device=device), "skip": torch.ones(HEADS, device=device)}
    x = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in x.items()}
    return {name: tensor.detach().requires_grad_() for name, tensor in (x | per_head).items()}


def whole_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    """Of this package's whole mixer between its projections, as its kernels' own check draws them."""
    from phase1.ops.ar_ssm import self_check

    proj, p = self_check.operands(size.B, size.T, HEADS, size.R, CHANNELS, 64, 4, dtype, torch.device(device))
    return {"proj": proj} | {name: tensor for name, tensor in p._asdict().items() if tensor is not None}


# Definitions, in float64 on a few hundred positions: T x T matrices, or one position after the other.


def decay_matrix(g: Tensor) -> Tensor:
    """(B, T, H) log decays -> (B, H, T, T) lower triangular products of decays after s up to t."""
    total = g.transpose(1, 2).cumsum(-1)
    later = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool, device=g.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()


def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bthr,bshr,bhts,bshp->bthp", q, k, decay_matrix(g), v)


def define_linear(x: Inputs) -> Tensor:
    return linear(x["q"], x["k"], x["v"], x["g"])


def define_gla(x: Inputs) -> Tensor:
    S, out = torch.zeros_like(x["k"][:, 0, :, :, None] * x["v"][:, 0, :, None]), []
    for t in range(x["q"].shape[1]):
        S = S * x["g"][:, t, :, :, None].exp() + x["k"][:, t, :, :, None] * x["v"][:, t, :, None]
        out.append(torch.einsum("bhr,bhrp->bhp", x["q"][:, t], S))
    return torch.stack(out, 1)


def define_delta(x: Inputs) -> Tensor:
    """Gated DeltaNet and KDA: S = a (S - beta k (kᵀ a S - v)), keys and queries of norm 1, the decay a number or a vector."""
    q, k = (unit(x[name]) for name in ("q", "k"))
    g = x["g"] if x["g"].ndim == 4 else x["g"][..., None]
    S, out = torch.zeros_like(k[:, 0, :, :, None] * x["v"][:, 0, :, None]), []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, :, None].exp()
        error = x["v"][:, t] - torch.einsum("bhr,bhrp->bhp", k[:, t], S)
        S = S + (x["beta"][:, t, :, None] * k[:, t])[..., None] * error[:, :, None]
        out.append(torch.einsum("bhr,bhrp->bhp", q[:, t], S))
    return torch.stack(out, 1)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def define_ssd(x: Inputs) -> Tensor:
    return linear(x["C"], x["B"], x["x"] * x["dt"][..., None], x["dt"] * x["A"])


def define_attention(x: Inputs, window: int | None = None) -> Tensor:
    t = torch.arange(x["q"].shape[1], device=x["q"].device)
    hidden = (t[None] > t[:, None]) | (t[None] <= t[:, None] - (window or len(t) + 1))
    scores = torch.einsum("bthr,bshr->bhts", x["q"], x["k"]) * x["q"].shape[-1] ** -0.5
    return torch.einsum("bhts,bshp->bthp", scores.masked_fill(hidden, -torch.inf).softmax(-1), x["v"])


def define_window(x: Inputs) -> Tensor:
    return define_attention(x, WINDOW)


def define_core(x: Inputs) -> Tensor:
    far = linear(x["u"], x["v"], x["x"] * x["dt"][..., None], x["g"])
    y = far * torch.rsqrt(far.square().mean(-1, keepdim=True) + 1e-5) * x["scale"] + x["skip"][:, None] * x["x"]
    return y + define_attention({"q": x["q"], "k": x["k"], "v": x["x"]}, WINDOW) if "q" in x else y


def define_whole(x: Inputs) -> Tensor:
    from phase1.ops.ar_ssm import Parameters, ar_ssm_reference

    p = Parameters(**{name: x.get(name) for name in Parameters._fields})  # type: ignore[arg-type]
    return ar_ssm_reference(x["proj"], p, window=WINDOW, memory=1000.0)[0].unflatten(-1, (HEADS, -1))


# This package's operators.


def load_core() -> Callable[[Inputs], Tensor]:
    from phase1.ops.ar_ssm.core import core_backward, core_forward

    class Core(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *operands: Tensor) -> Tensor:
            window = WINDOW if operands[2].shape[2] else 0
            core = core_forward(*operands, None, window, 1e-5)
            ctx.save_for_backward(*operands, core.y, core.states, core.lse, *([] if core.total is None else [core.total]))
            ctx.window, ctx.kind, ctx.count = window, type(core), len(operands)
            return core.y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            operands, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
            core = ctx.kind(*saved, *[None] * (4 - len(saved)))
            g = core_backward(dy.contiguous(), None, *operands, None, core, ctx.window, 1e-5)
            sums = g.scale_and_skip.sum(0)
            scale, skip = operands[-2:]
            near = (g.q, g.k) if ctx.window else (None, None)
            d_scale, d_skip = sums[: scale.numel()].view_as(scale), sums[scale.numel() :].view_as(skip)
            return g.u, g.v, *near, g.x, g.dt, g.log_a, d_scale, d_skip

    def run(x: Inputs) -> Tensor:
        u, v, values, dt, g = (x[name].transpose(1, 2).contiguous() for name in ("u", "v", "x", "dt", "g"))
        near = [x[name].transpose(1, 2).contiguous() if name in x else u[:, :, :0] for name in ("q", "k")]
        return Core.apply(u, v, *near, values, dt, g, x["scale"], x["skip"])

    return run


def load_whole() -> Callable[[Inputs], Tensor]:
    from phase1.ops.ar_ssm import Parameters, fused_ar_ssm

    def run(x: Inputs) -> Tensor:
        p = Parameters(**{name: x.get(name) for name in Parameters._fields})  # type: ignore[arg-type]
        return fused_ar_ssm(x["proj"], p, window=WINDOW, memory=1000.0)[0].unflatten(-1, (HEADS, -1))

    return run


def load_far() -> Callable[[Inputs], Tensor]:
    from phase1.ops.semiseparable import semiseparable

    return lambda x: semiseparable(x["q"], x["k"], x["v"], x["g"])[0]


def load_near() -> Callable[[Inputs], Tensor]:
    from phase1.ops.window_attention import window_attention

    return lambda x: window_attention(x["q"], x["k"], x["v"], window=WINDOW, past=0)


# Peers.


def fla(module: str, name: str, **options: Any) -> Callable[[], Callable[[Inputs], Tensor]]:
    """A function of fla, whose arguments have the names of the operands."""

    def load() -> Callable[[Inputs], Tensor]:
        function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        return lambda x: function(**x, **options)[0]

    return load


def load_delta_by_kda() -> Callable[[Inputs], Tensor]:
    chunk_kda = importlib.import_module("fla.ops.kda").chunk_kda

    def run(x: Inputs) -> Tensor:
        g = x["g"][..., None].expand(*x["g"].shape, x["k"].shape[-1]).contiguous()
        return chunk_kda(**(x | {"g": g}), scale=1.0, use_qk_l2norm_in_kernel=True)[0]

    return run


def load_ssd() -> Callable[[Inputs], Tensor]:
    """mamba_ssm's Triton code, without its package's __init__, which asks for compiled extensions."""
    spec = importlib.machinery.PathFinder.find_spec("mamba_ssm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mamba_ssm'")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("mamba_ssm", package)
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda x: scan(x["x"], x["dt"], x["A"], x["B"], x["C"], 128)


def sdpa(backend: str) -> Callable[[], Callable[[Inputs], Tensor]]:
    def load() -> Callable[[Inputs], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kind = getattr(SDPBackend, backend)

        def run(x: Inputs) -> Tensor:
            q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run

    return load


def flex(window: int | None) -> Callable[[], Callable[[Inputs], Tensor]]:
    def load() -> Callable[[Inputs], Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention

        def run(x: Inputs) -> Tensor:
            q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
            return compiled(q, k, v, block_mask=block_mask(q.shape[2], window, str(q.device))).transpose(1, 2)

        return run

    return load


@cache
def block_mask(T: int, window: int | None, device: str) -> Any:
    """Causal, over `window` positions or all: written down, since PyTorch would make it from T x T truth values."""
    from torch.nn.attention.flex_attention import BlockMask

    block, w = 128, window or T
    assert w <= 128 or window is None
    n = -(-T // block)
    i = torch.arange(n, device=device, dtype=torch.int32)
    j = i[None].expand(n, n)
    if window is None:  # blocks before the diagonal are full, those on it are half full
        partial, full = (torch.ones_like(i), i[:, None].expand(n, n)), (i, j)
    else:  # the two blocks that a window of at most one block reaches
        before = torch.where(j == 0, (i[:, None] - 1).clamp(min=0), torch.where(j == 1, i[:, None], 0))
        partial, full = (torch.minimum(i + 1, torch.full_like(i, 2)), torch.where(i[:, None] == 0, j * 0, before)), (None, None)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < w)

    def shaped(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[None, None].contiguous()

    blocks = [shaped(tensor) for tensor in (*partial, *full)]
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(T, T))


def scores_too_large(size: Size) -> str:
    needed = 3 * 4 * size.B * HEADS * size.T**2
    return f"T x T scores of about {needed / 1e9:.0f} GB" if needed > SCORES_BYTES else ""


def rows() -> Sequence[Row]:
    simple, delta, scaled = "decayed linear attention, one decay a head", "delta rule, one decay a head", {"scale": 1.0}
    unit_keys = {"scale": 1.0, "use_qk_l2norm_in_kernel": True}

    def simple_gla(form: str, refuse: Callable[[Size], str] = lambda size: "") -> Row:
        function = fla("simple_gla", f"{form}_simple_gla", **scaled)
        return Row(f"fla simple_gla {form}", simple, linear_operands, function, define_linear, "v", refuse=refuse)

    def attention(
        name: str, load: Callable[[], Callable[[Inputs], Tensor]], refuse: Callable[[Size], str] = lambda size: ""
    ) -> Row:
        return Row(name, "attention", attention_operands, load, define_attention, ranked=False, refuse=refuse)

    gla, kda = fla("gla", "chunk_gla", **scaled), fla("kda", "chunk_kda", **unit_keys)
    gated_delta = fla("gated_delta_rule", "chunk_gated_delta_rule", **unit_keys)
    return [
        Row("phase1 core", "far + window + norm + skip", core_operands, load_core, define_core, "x"),
        Row("phase1 core, far alone", "far + norm + skip", far_operands, load_core, define_core, "x"),
        Row("phase1 whole", "conv + gates + rotation + core + gated norm", whole_operands, load_whole, define_whole),
        Row("phase1 far, PyTorch", simple, linear_operands, load_far, define_linear, "v"),
        Row("phase1 window, PyTorch", "window", window_operands, load_near, define_window),
        simple_gla("fused_chunk"),
        simple_gla("chunk"),
        simple_gla("parallel", lambda size: "its work grows with T x T" if size.T > 40_000 else ""),
        Row("fla gla chunk", "decayed linear attention, a decay a channel", gla_operands, gla, define_gla, "v", only_rank=32),
        Row("fla kda chunk", "delta rule, a decay a channel", kda_operands, kda, define_delta, "v", only_rank=32),
        Row("fla gated delta chunk", delta, delta_operands, gated_delta, define_delta, "v", only_rank=32),
        Row("fla gated delta by kda", delta, delta_operands, load_delta_by_kda, define_delta, "v", only_rank=32),
        Row("mamba2 ssd", simple, ssd_operands, load_ssd, define_ssd, "x"),
        Row("flex_attention window", "window", window_operands, flex(WINDOW), define_window, only_rank=32),
        attention("sdpa flash", sdpa("FLASH_ATTENTION")),
        attention("sdpa cudnn", sdpa("CUDNN_ATTENTION")),
        attention("sdpa efficient", sdpa("EFFICIENT_ATTENTION")),
        attention("sdpa math", sdpa("MATH"), scores_too_large),
        attention("flex_attention", flex(None)),
    ]


def far_operands(size: Size, device: str, dtype: torch.dtype) -> Inputs:
    return core_operands(size, device, dtype, windowed=False)
