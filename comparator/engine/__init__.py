"""Resident models and the one thread that owns torch. `protocol.Engine` is the contract, `local.LocalEngine`
the engine of this process.
"""
