"""A Hub repo → `Checkpoint`: what to download, with progress, Stop, and a clear word on every failure.

The small files come first, so that what cannot be used is refused before its weights are fetched. Files lie in the
Hugging Face cache as usual; HF_TOKEN and HF_HUB_OFFLINE are honoured.
"""

from __future__ import annotations

import os
import re
import threading
import time
from fnmatch import fnmatchcase
from pathlib import Path

from comparator.core.errors import Stopped, UserError
from comparator.core.settings import get_settings
from comparator.core.state import ModelFacts
from comparator.sources import architectures, folder, hub_problems, isolated, weights
from comparator.sources.checkpoint import Checkpoint, Progress
from comparator.sources.hub_files import (
    ASK_S,
    COMMIT,
    Listing,
    cache_dir,
    endpoint,
    fetch,
    in_background,
    remember_branch,
)
from comparator.sources.hub_login import login, logins_are_possible

_DEADLINE_S = 6.0  # that, and the name server, and a connection that is refused slowly
_LOOK_UP_S = 15.0  # for the small files that a form shows facts of
_REMEMBER_S = 600.0  # a branch is asked for its commit once in this time
_REMEMBER_FAILURE_S = 20.0
_SMALL = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.spm", "*.bpe",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_LARGEST_SMALL = 200 * 10**6  # tokenizers
_LARGEST_LOOKED_AT = 8 * 10**6  # a config has some kB; a tokenizer's may list added tokens
_LARGEST_INDEX = 32 * 10**6  # of names of tensors; those of models of 600B have 9 MB
_MOST_LISTINGS = 500
_MOST_LOOK_UPS = 8  # at once: each has a thread while a stranger's server answers
_looking_up = threading.BoundedSemaphore(_MOST_LOOK_UPS)
_listings: dict[tuple, tuple[float, Listing | UserError]] = {}
_searches: dict[tuple, tuple[float, list[str]]] = {}


def open_repo(repo: str, revision: str | None, progress: Progress) -> Checkpoint:
    """Raises `UserError`; `Stopped` within a second of progress raising it."""
    source = f"{repo}@{revision}" if revision else repo
    # A commit never changes; on a public server the Hub says whether this visitor may have it.
    is_commit = bool(revision and COMMIT.fullmatch(revision))
    if is_commit and not get_settings().public and (known := _whole_in_cache(repo, revision, source)):
        return known
    progress(None, f"asking the Hub for {source}")
    try:
        listing = list_repo(repo, revision, progress)
    except hub_problems.Unreachable as unreachable:
        return _from_cache(repo, revision, source, unreachable, progress)
    chosen = first_weights(listing, source)
    small = fetch(listing, _small_files(listing), progress, f"{source}: ")
    _refuse_early(small, listing, source)
    shards = shards_of(small, chosen)
    if absent := [s for s in shards if s not in listing.files]:
        raise UserError(
            f"{source} is missing {len(absent)} of its {len(shards)} weight files: {', '.join(absent[:3])}.",
            "Its author has to upload it; another revision (user/name@revision) may be complete.",
        )
    path = fetch(listing, shards, progress, f"downloading {source}: ")
    remember_branch(path, revision, listing.commit)
    return _opened(path, source, progress, listing.commit)


def look_up(repo: str, revision: str | None) -> ModelFacts:
    """What config, tokenizer and the Hub's own count tell, without the weights."""
    if not _looking_up.acquire(timeout=0.5):
        raise UserError(
            f"{repo} was not looked up: {_MOST_LOOK_UPS} other names are being looked up right now.",
            "Try again in a few seconds.",
        )
    try:
        return _look_up(repo, revision)
    finally:
        _looking_up.release()


def _look_up(repo: str, revision: str | None) -> ModelFacts:
    source = f"{repo}@{revision}" if revision else repo
    try:
        listing = list_repo(repo, revision, _silent)
    except hub_problems.Unreachable as unreachable:
        return _from_cache(repo, revision, source, unreachable, None).facts()
    names = [
        n
        for n in ("config.json", "tokenizer_config.json", "chat_template.jinja", "quantize_config.json")
        if n in listing.files
    ]
    first_weights(listing, source)
    if huge := [n for n in names if listing.files[n] > _LARGEST_LOOKED_AT]:
        raise UserError(
            f"{source}: {huge[0]} has {listing.files[huge[0]] / 1e6:,.0f} MB.",
            f"Such a file has a few kB; at most {_LARGEST_LOOKED_AT / 1e6:,.0f} MB are read.",
        )
    began_s = time.monotonic()

    def in_time(fraction: float | None, message: str) -> None:
        if time.monotonic() - began_s > _LOOK_UP_S:
            raise hub_problems.Unreachable(
                f"The Hub did not send {source}'s small files within {_LOOK_UP_S:g} s.", "Try again later."
            )

    path = fetch(listing, names, in_time, "")
    config = folder.read_config(path, source)
    quantization = folder.quantization_of(path, config)
    value = config.get("dtype") or config.get("torch_dtype")
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
    return ModelFacts(
        source=source,
        revision=listing.commit,
        architecture=architectures.check_causal_lm(config, source),
        parameters=listing.parameters,
        dtype=short.get(value, value) if isinstance(value, str) else None,
        context_length=folder.context_length(config),
        has_chat_template=folder.has_chat_template(path),
        vocab_size=folder.vocab_size(config),
        quantization=quantization,
        base_model=folder.base_model(path, config) if quantization else None,
    )


def in_cache(repo: str, revision: str | None) -> Checkpoint | None:
    """What an earlier download left, if it left the whole of it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir(), revision=revision or "main")
    return _whole_in_cache(repo, Path(found).parent.name, repo) if isinstance(found, str) else None


def search_hub(query: str, limit: int = 10) -> list[str]:
    """Names of text-generation models on the Hub that contain `query`, the most downloaded first.

    Two seconds at most; [] when the Hub cannot be reached, and for what is no part of a name.
    """
    query = query.strip()
    if len(query) < 2 or not re.fullmatch(r"[A-Za-z0-9._/ -]+", query):
        return []
    key = (query.lower(), limit, endpoint())
    if (known := _searches.get(key)) and time.monotonic() - known[0] < _REMEMBER_S:
        return list(known[1])
    parameters = {
        "search": query,
        "filter": ["text-generation", "safetensors"],
        "sort": "downloads",
        "direction": "-1",
        "limit": limit,
    }

    # Not within the two seconds: the first import alone can take them on a busy machine.
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers, get_session

    def ask() -> list[str]:
        base = endpoint() or huggingface_hub.constants.ENDPOINT
        answer = get_session().get(
            f"{base}/api/models", params=parameters, headers=build_hf_headers(token=login()), timeout=1.5
        )
        answer.raise_for_status()
        found = [str(m["id"]) for m in answer.json() if isinstance(m, dict) and m.get("id")][:limit]
        if len(_searches) > 500:
            _searches.clear()
        _searches[key] = (time.monotonic(), found)  # also when it comes too late: the next key press finds it
        return found

    try:
        return list(in_background(ask, _silent, 2.0))
    except Exception:
        return []  # a search that fails is no search: the field works without


def list_repo(repo: str, revision: str | None, progress: Progress) -> Listing:
    """Raises `Unreachable` (a `UserError`) when the Hub does not answer, other `UserError`s when it says no."""
    key = (repo, revision, endpoint(), _token_mark())
    if known := _listings.get(key):
        age_s = time.monotonic() - known[0]
        if isinstance(known[1], Listing) and age_s < _REMEMBER_S:
            return known[1]
        if isinstance(known[1], hub_problems.Unreachable) and age_s < _REMEMBER_FAILURE_S:
            raise hub_problems.Unreachable(known[1].problem, known[1].advice)

    def ask() -> Listing:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint(), token=login())
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=ASK_S)
        if getattr(info, "gated", None) and _is_for_visitors(repo):
            api.auth_check(repo, token=login())  # its files may lie here because somebody else may have them
        sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or [] if s.rfilename}
        counts = getattr(info, "safetensors", None)
        return Listing(repo, str(info.sha), sizes, getattr(counts, "total", None))

    try:
        found: Listing | UserError = in_background(ask, progress, _DEADLINE_S)
    except (Stopped, KeyboardInterrupt):
        raise
    except Exception as error:
        found = hub_problems.explain(error, repo, revision)
        if not isinstance(found, hub_problems.Unreachable):
            raise found from None
    while len(_listings) >= _MOST_LISTINGS:
        _listings.pop(next(iter(_listings)))
    _listings[key] = (time.monotonic(), found)
    if isinstance(found, UserError):
        raise found
    return found


def _is_for_visitors(repo: str) -> bool:
    """Whether a repo is what visitors chose, and not the model that this public server is for."""
    settings = get_settings()
    return settings.public and settings.model.partition("@")[0] != repo


def first_weights(listing: Listing, source: str) -> str:
    """The one file to start from: an index, or the only weights. Raises `UserError` before anything is fetched."""
    names = list(listing.files)
    top = [n for n in names if "/" not in n]
    if "config.json" not in top:
        raise folder.no_config(source, top)
    chosen = weights.choose(names)
    if not chosen:
        raise weights.no_weights(source, top)
    for name, most in (("config.json", _LARGEST_LOOKED_AT), (chosen[0], _LARGEST_INDEX)):
        if name.endswith(".json") and listing.files[name] > most:
            raise UserError(
                f"{source}: {name} has {listing.files[name] / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are read.",
                "Choose another model.",
            )
    return chosen[0]


def _small_files(listing: Listing) -> list[str]:
    return [
        n
        for n, size in listing.files.items()
        if ("/" not in n or n.startswith("additional_chat_templates/"))
        and any(fnmatchcase(n, p) for p in _SMALL)
        and size <= _LARGEST_SMALL
        and not (n.endswith(".index.json") and not n.endswith(".safetensors.index.json"))
    ]


def _refuse_early(path: Path, listing: Listing, source: str) -> None:
    config = folder.read_config(path, source)
    architectures.check_causal_lm(config, source)
    folder.check_tokenizer(path, [n for n in listing.files if "/" not in n], source)


def shards_of(path: Path, chosen: str) -> list[str]:
    return sorted(set(weights.index_of(path / chosen).values())) if chosen.endswith(".json") else [chosen]


def _whole_in_cache(repo: str, commit: str, source: str) -> Checkpoint | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir(), revision=commit)
    if not isinstance(found, str):
        return None
    if isolated.needed(commit) and not isolated.was_opened(Path(found).parent):
        return None  # it has to be opened elsewhere first, which takes a while
    try:
        return folder.inspect(Path(found).parent, source, revision=commit)
    except UserError:
        return None


def _opened(path: Path, source: str, progress: Progress, commit: str, note: str | None = None) -> Checkpoint:
    if isolated.needed(commit):
        isolated.open_first(path, source, progress)
    return folder.inspect(path, source, revision=commit, note=note)


def _from_cache(
    repo: str, revision: str | None, source: str, unreachable: UserError, progress: Progress | None
) -> Checkpoint:
    """What an earlier download left, when the Hub cannot be asked. Raises the Hub's problem if there is nothing, and
    without `progress` where opening it would take a while."""
    if logins_are_possible():
        raise unreachable  # who may have it cannot be told
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", cache_dir=cache_dir(), revision=revision or "main")
    if not isinstance(found, str):
        raise unreachable
    path = Path(found).parent
    if progress is None and isolated.needed(path.name) and not isolated.was_opened(path):
        raise unreachable
    note = f"The Hub could not be reached; this is the copy of commit {path.name[:7]} that was downloaded earlier."
    try:
        return _opened(path, source, progress or _silent, path.name, note)
    except UserError as problem:
        raise UserError(
            f"{unreachable.problem} The copy that was downloaded earlier is incomplete: {problem.problem}",
            unreachable.advice,
        ) from None


def _token_mark() -> int:
    """Tells one token from another, without keeping it."""
    return hash((os.environ.get("HF_TOKEN"), login()))


def _silent(fraction: float | None, message: str) -> None:
    pass
