"""Keeps gptqmodel and optimum out of the terminal."""

from __future__ import annotations

import logging


def silence() -> None:
    """Call before gptqmodel is imported: it prints a banner, and a line or a bar for every layer, to stdout.

    With the "comparator" logger at DEBUG (the command line's --verbose) everything is left as it is.
    """
    if logging.getLogger("comparator").isEnabledFor(logging.DEBUG):
        return
    for name in ("optimum", "optimum.gptq.quantizer", "gptqmodel", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from logbar import LogBar
    except ImportError:
        return
    LogBar.shared().setLevel(logging.ERROR)
