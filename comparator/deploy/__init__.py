"""Hugging Face Spaces, ZeroGPU and public servers: preparation, GPU calls and limits for visitors."""
