"""What visitors learn of what is in memory."""

from __future__ import annotations

from comparator.core.state import EngineState, Resident
from comparator.ui.panel import residents


def test_in_public_others_models_are_counted_and_not_named():
    state = EngineState(
        "CPU", None, None, None, residents=(Resident("h", "somebody/secret", "nf4", 5, "cpu"),)
    )
    assert "somebody/secret" in residents.render(state)
    said = residents.render(state, public=True)
    assert "1 variant " in said and "secret" not in said and "nf4" not in said
