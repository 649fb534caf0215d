"""bitsandbytes: LLM.int8() and the 4-bit types nf4 and fp4. Importing this imports no torch."""

from comparator.backends.bnb.backend import BitsAndBytes

__all__ = ["BitsAndBytes"]
