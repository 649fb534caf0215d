"""“Propose a recipe”: from what was measured to a variant of the list, with the real engine; refusals."""

from __future__ import annotations

import pytest
import sample

from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.engines import get_engine
from comparator.fidelity import sensitivity as measuring

pytest.importorskip("gradio")

from comparator.ui.build import build_ui
from comparator.ui.panel import variants
from comparator.ui.panel.variants import with_added
from comparator.ui.tabs import recipe
from comparator.ui.tabs.sensitivity import Measurement


def test_a_recipe_comes_into_the_list(two_layers) -> None:
    wanted = Measurement(str(two_layers), resolve("nf4"), resolve("bf16"), "kind")
    with pytest.raises(UserError, match="not been measured yet"):
        recipe.proposed(wanted, 100)
    parts = measuring.measure(
        get_engine(), wanted.model, wanted.variant, wanted.reference, by="kind", tokens=16
    )
    recipe.measured.put((wanted.model, wanted.variant, wanted.reference, wanted.by), parts)
    with pytest.raises(UserError, match="with nothing kept"):
        recipe.proposed(wanted, 1)
    made = recipe.proposed(wanted, 65)
    assert made.bytes <= 65e6 and made.variant.method == "nf4" and made.kept
    picked = with_added(variants.picked(8), made.variant.notation, 8)
    assert made.variant.notation in picked["on"]
    assert made.variant.notation in recipe.summary_line(made)
    get_engine().unload()


def test_a_public_server_proposes_nothing(tmp_path) -> None:
    ids = {b.elem_id for b in build_ui(Settings(data_dir=tmp_path, public=True)).blocks.values()}
    assert "recipe-run" not in ids and "parts-run" in ids
    assert "recipe-run" in {b.elem_id for b in build_ui(Settings(data_dir=tmp_path)).blocks.values()}


def test_the_sample_is_refused_where_it_has_no_layers_to_keep() -> None:
    wanted = Measurement(sample.comparison().model, resolve("gptq"), resolve("bf16"), "kind")
    with pytest.raises(UserError, match="cannot keep"):
        recipe.proposed(wanted, 100)
