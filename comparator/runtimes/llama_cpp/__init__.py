"""Columns executed by llama.cpp, in a child process of their own: a GGUF file as it is."""

from comparator.runtimes.llama_cpp.runtime import LlamaCpp

__all__ = ["LlamaCpp"]
