"""The environment → Settings, read once. README lists every variable."""

from __future__ import annotations

import math
import os
import re
from functools import cache
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from comparator.core.endpoints import parse_endpoints
from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL


def _on_space() -> bool:
    return bool(os.environ.get("SPACE_ID"))


class Settings(BaseSettings):
    """Each field is the variable COMPARATOR_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="COMPARATOR_", extra="ignore")

    host: str = Field(default_factory=lambda: "0.0.0.0" if _on_space() else "127.0.0.1")
    port: int = Field(7860, ge=0, le=65535)
    cache_dir: Path = Path("~/.cache/quant-comparator")
    data_dir: Path = Path("~/.local/share/quant-comparator")
    memory_budget: str | None = Field(None, description="Bytes, or 12GiB; unset: what the device has free")
    model: str = BUILTIN_MODEL
    max_new_tokens: int = Field(1024, ge=1)
    max_prompt_tokens: int = Field(8192, ge=1)
    max_columns: int = Field(8, ge=1, le=32)
    repeats: int = Field(
        0, ge=0, le=100, description="Runs per variant if the request does not say; 0: automatic"
    )
    public: bool = Field(default_factory=_on_space)
    endpoints: str = Field("", description="NAME=ADDRESS of servers with OpenAI's API: docs/engines.md")
    ray_address: str | None = Field(None, description="auto, HOST:PORT or ray://HOST:PORT: docs/cluster.md")
    ray_without_token: bool = Field(False, description="Use a Ray cluster off this machine without a token")
    parallel: bool = Field(
        False, description="Run variants on different devices of a cluster at the same time"
    )

    training: bool | None = Field(
        None, description="Whether adapters are trained here; unset: unless this is a public installation"
    )

    # Saved comparisons; docs/space.md has the table.
    index_dir: Path | None = Field(None, description="Folder of the history's index; unset: the data folder")
    max_upload: str = Field("32MB", description="The largest comparison document that is opened")
    max_stored: str | None = Field(None, description="Bytes of saved comparisons; 5GB in public mode")
    max_downloads: str | None = Field(
        None, description="Bytes of models downloaded for visitors; 100GB in public mode"
    )
    purge_days: int = Field(
        7,
        ge=0,
        le=36_500,
        description="Days after which a deleted comparison is removed permanently; 0: never",
    )
    retention_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="Public mode: days for which comparisons without a name are kept; 0: forever",
    )
    hub_storage: str | None = Field(None, description="user/repo: a dataset repo that keeps a copy")

    # Limits; those that are None apply in public mode only, with the values of comparator/deploy/limits.py.
    allowed_hosts: str = Field("", description="Host names of the app, separated by commas; *: any")
    auth: SecretStr | None = Field(None, description="user:password, or several separated by commas")
    behind_proxy: bool = Field(default_factory=_on_space)
    requests_per_minute: int | None = Field(None, ge=1)
    requests_per_minute_total: int | None = Field(None, ge=1)
    max_tokens_per_comparison: int | None = Field(None, ge=1)
    max_evaluation_characters: int | None = Field(None, ge=1)
    max_evaluation_tokens: int | None = Field(None, ge=1)
    max_comparison_s: int | None = Field(None, ge=1)
    max_wait_s: int | None = Field(None, ge=1)
    max_training_s: int | None = Field(None, ge=1)
    max_training_characters: int | None = Field(None, ge=1)
    max_adapters: int | None = Field(None, ge=0)
    max_adapters_total: int | None = Field(None, ge=0)
    max_model_parameters: str | None = Field(None, description="135M, 8B, or a number")
    allowed_models: str = Field(
        "", description="Names separated by commas; user/* allows all repos of a user"
    )
    queue_size: int = Field(20, ge=1)

    def model_post_init(self, _context) -> None:
        self.cache_dir = self.cache_dir.expanduser().absolute()
        self.data_dir = self.data_dir.expanduser().absolute()
        if self.index_dir is not None:
            self.index_dir = self.index_dir.expanduser().absolute()

    @property
    def max_upload_bytes(self) -> int:
        return parse_bytes(self.max_upload)

    @property
    def max_downloads_bytes(self) -> int | None:
        text = self.max_downloads or ("100GB" if self.public else None)
        return parse_bytes(text) if text else None

    @property
    def budget_bytes(self) -> int | None:
        return None if not self.memory_budget else parse_bytes(self.memory_budget)


def parse_bytes(text: str) -> int:
    """`12GiB`, `500 MB`, `1073741824` → bytes. Raises `UserError` on anything else."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().lower().rstrip("bkimg").strip()
    unit = text.strip().lower()[len(number) :].strip()
    try:
        count = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):  # overflow: "inf"
        count = -1
    if count < 0:
        raise UserError(f"“{text}” is not an amount of memory.", "Write 12GiB, 500MB or a number of bytes.")
    return count


def parse_count(text: str) -> int:
    """`135M`, `8B`, `1.5e9` → a number. Raises `UserError` on anything else."""
    match = re.fullmatch(
        r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)\s*([kmbt]?)\s*", text, re.IGNORECASE | re.ASCII
    )
    if not match:
        raise UserError(f"“{text}” is not a number of parameters.", "Write 135M, 8B or a whole number.")
    unit = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[match[2].lower()]
    return math.floor(float(match[1]) * unit)


def parse_max_memory(text: str | None) -> dict[int | str, int] | None:
    """`0=6GiB,cpu=20GiB` → {0: bytes, "cpu": bytes}, accelerate's `max_memory`. Raises `UserError`."""
    if not text:
        return None
    limits: dict[int | str, int] = {}
    for part in text.split(","):
        name, equals, amount = part.strip().partition("=")
        if not equals or not (name == "cpu" or name.isdigit()):
            raise UserError(
                f"“{part}” is not a memory limit.", "Write 0=6GiB,cpu=20GiB: GPU number or cpu, an amount."
            )
        limits[int(name) if name.isdigit() else name] = parse_bytes(amount)
    return limits


@cache
def get_settings() -> Settings:
    """The settings of this process. Raises `UserError` naming the variable that is wrong."""
    try:
        settings = Settings()
        settings.budget_bytes  # noqa: B018 - parsed here, so that a typo is reported at the start
        settings.max_upload_bytes  # noqa: B018
        settings.max_downloads_bytes  # noqa: B018
        parse_endpoints(settings.endpoints)
        return settings
    except ValidationError as error:
        first = error.errors()[0]
        name = "COMPARATOR_" + str(first["loc"][0]).upper()
        raise UserError(
            f"{name} is “{first.get('input')}”: {first['msg'].lower()}.", "Correct or unset it."
        ) from None
