"""The undocumented parts of huggingface_hub are where comparator/util/compat/huggingface_hub.py expects them."""

from __future__ import annotations

import inspect

from comparator.util.compat import huggingface_hub as compat


def test_downloads_arrive_in_pieces_of_this_size(monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE)  # puts it back
    compat.download_in_small_pieces()
    assert constants.DOWNLOAD_CHUNK_SIZE == compat.PIECE_BYTES
    assert "chunk_size=constants.DOWNLOAD_CHUNK_SIZE" in inspect.getsource(file_download.http_get), (
        "the size of a piece is set elsewhere: Stop waits longer; change download_in_small_pieces"
    )


def test_ending_downloads_that_do_not_run_is_harmless():
    from huggingface_hub.utils._xet import abort_xet_session

    assert not [p for p in inspect.signature(abort_xet_session).parameters.values() if p.default is p.empty]
    compat.abort_xet_downloads()
