"""Text from a decoder: sampling, the cache's two programs, and words as they come."""

from fw.generation.decode import Decoder, decode
from fw.generation.sampling import Sampling, choose, controls
from fw.generation.speculate import speculate
from fw.generation.text import generate

__all__ = ["Decoder", "Sampling", "choose", "controls", "decode", "generate", "speculate"]
