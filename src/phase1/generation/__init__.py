"""Text from a trained model, one token at a time, with a state that does not grow."""

from phase1.generation.decoder import Decoder, load, state_bytes
from phase1.generation.sampling import Sampling
from phase1.generation.stream import continuation, text_of

__all__ = ["Decoder", "Sampling", "continuation", "load", "state_bytes", "text_of"]
