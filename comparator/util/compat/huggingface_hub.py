"""Parts of huggingface_hub without a public switch; written for huggingface_hub 2.4."""

from __future__ import annotations

import contextlib
import sys

WRITTEN_FOR = "2.4"
PIECE_BYTES = 2**20


def download_in_small_pieces() -> None:
    """Have files arrive in pieces of 1 MiB, a tenth of the library's own: Stop and progress wait for each."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES


def abort_xet_downloads() -> None:
    """What huggingface_hub itself does on Ctrl-C: Xet downloads outside Python, where no exception reaches it."""
    if "hf_xet" in sys.modules:
        with contextlib.suppress(Exception):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()
