"""A model of the Hub without its weights: config.json, and the safetensors headers by range requests → `Checkpoint`.

Enough to say what every method would hold. Some kB per file of weights are read; nothing else is downloaded.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.sources import (
    architectures,
    consistency,
    counting,
    folder,
    hub,
    hub_problems,
    isolated,
    weights,
)
from comparator.sources.checkpoint import Checkpoint, Progress
from comparator.sources.hub_files import Listing, endpoint, fetch, in_background
from comparator.sources.hub_login import login
from comparator.sources.safetensors_header import MOST_BYTES, remote_tensor

NOTE = "Its headers were read; its weights were not downloaded."
_DEADLINE_S = 60.0
_MOST_FILES = 400
_FIRST_BYTES = 100_000  # nearly every header is shorter
_AT_ONCE = 8
_MOST_KNOWN = 8  # models, of a few hundred kB each
_known: dict[tuple[str, str], Checkpoint] = {}


def open_headers(repo: str, revision: str | None, progress: Progress) -> Checkpoint:
    """As `hub.open_repo`, of headers alone: its `path` holds config.json and no weights. Raises `UserError`."""
    source = f"{repo}@{revision}" if revision else repo
    progress(None, f"asking the Hub for {source}")
    listing = hub.list_repo(repo, revision, progress)
    key = (repo, listing.commit)
    if key not in _known:
        opened = _read(listing, source, progress)
        while len(_known) >= _MOST_KNOWN:
            _known.pop(next(iter(_known)))
        _known[key] = opened
    return _known[key]


def _read(listing: Listing, source: str, progress: Progress) -> Checkpoint:
    chosen = hub.first_weights(listing, source)
    names = [n for n in ("config.json", "quantize_config.json", chosen) if n in listing.files]
    path = fetch(listing, [n for n in names if n.endswith(".json")], progress, "")
    config = folder.read_config(path, source)
    architectures.check_causal_lm(config, source)
    shards = hub.shards_of(path, chosen)
    if absent := [s for s in shards if s not in listing.files]:
        raise UserError(
            f"{source} is missing {len(absent)} of its {len(shards)} weight files: {absent[0]} …",
            "Its author has to upload it.",
        )
    if len(shards) > _MOST_FILES:
        raise UserError(
            f"{source} has {len(shards):,} weight files, and the headers of {_MOST_FILES} are read at most.",
            "Download it, and name its folder.",
        )
    stored = _headers(listing, shards, source, progress)
    consistency.check(source, config, folder.quantization_of(path, config), [s.info for s in stored])
    if isolated.needed(listing.commit):  # what is planned builds the model without weights
        isolated.open_first(path, source, progress, isolated.CONFIG, isolated.beside)
    explicit = bool(
        config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings")
    )
    tied = counting.tied(config, stored, same=lambda head, embedding: explicit)  # the bytes are not here
    return folder.described(path, source, config, stored, tied, revision=listing.commit, note=NOTE)


def _header(listing: Listing, name: str, token: str | bool | None) -> dict[str, Any]:
    """A file's header, by one range request or two. `huggingface_hub` has this too: it multiplies shapes of any numbers,
    which held every thread for minutes, takes headers of 100 MB, and reads whatever the server sends."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(listing.repo, name, revision=listing.commit, endpoint=endpoint())
    begin = _range(url, 0, _FIRST_BYTES, token)
    size = int.from_bytes(begin[:8], "little")
    if size > MOST_BYTES:
        raise UserError(
            f"The header of {name} of {listing.repo} has {size / 1e6:,.0f} MB; at most {MOST_BYTES / 1e6:,.0f} MB are read.",
            "Download the model, and name its folder.",
        )
    if size > len(begin) - 8:
        begin += _range(url, len(begin), size + 8 - len(begin), token)
    try:
        header = json.loads(begin[8 : 8 + size], parse_int=_size)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(
            f"The header of {name} of {listing.repo} is damaged.", "Its author has to upload it again."
        )
    return header


def _range(url: str, start: int, length: int, token: str | bool | None) -> bytes:
    """At most `length` bytes, whatever the server sends."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=token) | {"range": f"bytes={start}-{start + length - 1}"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=_DEADLINE_S) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            data += piece
            if len(data) >= length:
                break
    return bytes(data[:length])


def _size(digits: str) -> int:
    """Numbers of any length are not what a header has; `remote_tensor` refuses what this makes of them."""
    return int(digits) if len(digits) < 20 else -1


def _headers(listing: Listing, shards: list[str], source: str, progress: Progress) -> list[weights.Stored]:
    """Every tensor of the files, read in threads. Raises `UserError`."""
    done: list[str] = []

    token = login()  # the visitor's: threads of a pool do not know whose

    def read(name: str) -> list[weights.Stored]:
        header = _header(listing, name, token)
        file = Path(source) / name
        try:
            tensors = [
                remote_tensor(file, key, t["dtype"], t["shape"])
                for key, t in header.items()
                if key != "__metadata__"
            ]
        except (KeyError, TypeError):
            raise UserError(
                f"The header of {name} of {source} is damaged.", "Its author has to upload it again."
            ) from None
        if sum(t.bytes for t in tensors) > listing.files[name]:
            raise UserError(
                f"{name} of {source} is smaller than its header says.", "Its author has to upload it again."
            )
        done.append(name)
        return [weights.Stored(tensor, file, 0) for tensor in tensors]

    def work() -> list[weights.Stored]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [stored for part in pool.map(read, shards) for stored in part]

    def report(_fraction: float | None, _message: str) -> None:
        progress(len(done) / len(shards), f"reading headers of {source}: {len(done)} of {len(shards)} files")

    try:
        return in_background(work, report, _DEADLINE_S)
    except Stopped:
        raise
    except Exception as error:
        raise hub_problems.explain(error, listing.repo, None) from None
