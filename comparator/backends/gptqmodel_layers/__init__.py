"""What the backends share whose layers are gptqmodel's: kernels, layer rows, adapters, checks of packed checkpoints.

Importing any of these imports no torch; gptqmodel (6 s) even less.
"""
