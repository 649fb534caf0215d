"""Decoding and scoring measured beside stock `generate` and a bare forward, in one run. Commands, not tests."""
