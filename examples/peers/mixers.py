"""Sequence layers of flash-linear-attention in the model of this package: `pip install flash-linear-attention`, and a GPU.

    phase1 perplexity --model kda=examples.peers.mixers:kda gla=examples.peers.mixers:gla

Each gets as many heads as the engine, of D / H channels; the rest of the model is the engine's own, with a dense table.
"""

from unittest.mock import patch

import torch.nn.functional as F
from fla.layers import GatedDeltaNet, GatedLinearAttention, KimiDeltaAttention, gated_deltanet
from fla.ops.kda import chunk_kda
from torch import nn

from phase1.model import LanguageModel


class Mixer(nn.Module):
    """A layer of fla, x -> (y, ...), as a mixer: (x, state) -> (y, state, effective rank); no state is kept."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state=None):
        return self.layer(x)[0], None, None


def kda(config, statistics=None):
    heads = {"head_dim": config.d_model // config.n_heads, "num_heads": config.n_heads}
    return LanguageModel(config, statistics, lambda c: Mixer(KimiDeltaAttention(c.d_model, **heads)))


def gated_delta(config, statistics=None):
    heads = {"head_dim": config.d_model // config.n_heads, "num_heads": config.n_heads, "expand_v": 1}
    return LanguageModel(config, statistics, lambda c: Mixer(GatedDeltaNet(c.d_model, **heads)))


def gla(config, statistics=None):
    options = {"hidden_size": config.d_model, "num_heads": config.n_heads, "use_short_conv": True}
    return LanguageModel(config, statistics, lambda c: Mixer(GatedLinearAttention(**options)))


# fla refuses the gradients of Gated DeltaNet on Hopper with Triton 3.4 to 3.7.0, whose code for them is wrong. Its recurrence
# is that of Kimi Delta Attention, whose kernels are others, with one decay for all channels of a head.


def delta_by_kda(q, k, v, g, beta, A_log, dt_bias, use_gate_in_kernel, **options):
    g = -A_log.exp() * F.softplus(g.float() + dt_bias)
    return chunk_kda(q, k, v, g[..., None].expand(*g.shape, k.shape[-1]).contiguous(), beta, **options)


class GatedDeltaByKDA(Mixer):
    def forward(self, x, state=None):
        with patch.object(gated_deltanet, "chunk_gated_delta_rule", delta_by_kda):
            return super().forward(x)


def gated_delta_by_kda(config, statistics=None):
    heads = {"head_dim": config.d_model // config.n_heads, "num_heads": config.n_heads, "expand_v": 1}
    return LanguageModel(config, statistics, lambda c: GatedDeltaByKDA(GatedDeltaNet(c.d_model, **heads)))
