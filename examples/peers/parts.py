"""What parts of a block are worth: AR-SSM with another layer in every fourth place, attention with one part of AR-SSM's block.

    phase1 perplexity --model wide=examples.peers.parts:wide hybrid=examples.peers.parts:hybrid
"""

from dataclasses import replace
from itertools import count

from phase1.model import MIXERS, LanguageModel

AR_SSM = {"mixer": "ar_ssm"}
FAIR = {"attention_qk_norm": True, "attention_conv": True, "attention_gate": True}


def model(config, statistics, usual, fourth=None):
    """With the mixer that `usual` says, and in every fourth layer the one that `fourth` does."""
    layer = count(1)

    def mixer(c):
        c = replace(c, **(usual if next(layer) % 4 or fourth is None else fourth))
        return MIXERS[c.mixer](c)

    return LanguageModel(config, statistics, mixer)


def transformer(config, statistics=None):
    """All of the Transformer: what the parts are added to."""
    return model(config, statistics, {})


def wide(config, statistics=None):
    """Still of a cost that is linear in T: windows of 512, not 64."""
    return model(config, statistics, AR_SSM, AR_SSM | {"ar_ssm_window": 512})


def hybrid(config, statistics=None):
    """A quarter of the layers is attention: their cost grows with T x T."""
    return model(config, statistics, AR_SSM, {"mixer": "attention"} | FAIR)


def qk_norm(config, statistics=None):
    return model(config, statistics, {"attention_qk_norm": True})


def conv(config, statistics=None):
    return model(config, statistics, {"attention_conv": True})


def gate(config, statistics=None):
    return model(config, statistics, {"attention_gate": True})
