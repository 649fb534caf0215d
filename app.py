"""Settings → page → server. `make run` starts this."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def main() -> None:
    from comparator.core.errors import UserError
    from comparator.core.settings import get_settings
    from comparator.util import error_log

    try:
        settings = get_settings()
    except UserError as problem:
        sys.exit(str(problem))
    error_log.setup()
    from comparator.deploy import restart, space, zerogpu  # noqa: F401 - zerogpu before anything that imports torch

    space.prepare(settings)  # on a Space: the built-in model's package; elsewhere nothing
    from comparator.engines import get_engine
    from comparator.ui.admission import Admission
    from comparator.ui.build import build_ui, launch_options
    from comparator.ui.http_guard import new_token

    admission = Admission(settings)
    demo = build_ui(settings, admission)
    token = new_token(settings)
    try:
        _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(settings, token))
    except OSError:  # Gradio's way of saying that the port is taken
        sys.exit(
            f"Nothing can be served on {settings.host}:{settings.port}; another program may be using that port. "
            "Set COMPARATOR_PORT to another one, or to 0 for any that is free."
        )
    query = f"?token={token}" if token else ""
    print(f"Quant Comparator is at {address}{query} (Ctrl+C ends it)", flush=True)
    if token:
        print(
            "Other machines can reach it, so it asks for that token once; from there put this machine's name in place of "
            "localhost. COMPARATOR_AUTH=user:password has a login instead.",
            flush=True,
        )
    sys.setswitchinterval(0.001)  # the model's thread waits at most so long for one that draws the page
    admission.open_in_background()
    restart.when_damaged(get_engine().queue)
    get_engine().start()  # torch and transformers load behind the page that is already up
    demo.block_thread()


if __name__ == "__main__":
    main()
