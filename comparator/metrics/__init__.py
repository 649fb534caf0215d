"""Figures: latency from timestamps, memory from tensors and allocators, energy, fidelity, the environment."""
