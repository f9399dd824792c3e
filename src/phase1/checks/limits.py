"""Every limit that the project claims to keep."""

from typing import Final

CARD_LIMITS: Final = {"fits_8gb": 7.2e9, "fits_10gb": 9.0e9}  # bytes, 90 % of the card (docs/design.md, "Definitions")
REDUCTION_LIMIT: Final = 50.0  # percent less peak memory than the baseline, at least
R_SQUARED_LIMIT: Final = 0.95  # of the line through the step times, at least
DEGRADATION_LIMIT: Final = 5.0  # percent more perplexity than the baseline
VARIANT_LIMITS: Final = {"ar_ssm_dense": 3.0, "equal_parameters": 0.0}  # percent, of variants with a claim of their own
GATE_LIMIT: Final = 1.0  # percent more perplexity than the engine with all ranks on
