"""GPTQ beyond loading: calibration texts, quantizing, checkpoints, kernels.

`backends/gptq.py` puts these together. Importing any of them imports no torch; gptqmodel (6 s) even less.
"""
