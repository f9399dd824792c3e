"""AR-SSM as what every peer is: a sequence layer in the same model, with a dense table and no copy head.

phase1 throughput --model ar_ssm=examples.peers.ar_ssm:ar_ssm
"""

from phase1.model import MIXERS, LanguageModel


def ar_ssm(config, statistics=None):
    return LanguageModel(config, statistics, MIXERS["ar_ssm"])
