"""The Train tab in a real browser: from opening it to the adapter's columns beside the others'."""

from __future__ import annotations

import zipfile

import pytest
from ui.test_accessible import SIZES, sideways, violations

pytestmark = pytest.mark.browser

NAME = "sailor"  # no other test knows an adapter of this name
# More steps than anybody waits for: a second visitor finds it at work however fast the machine is, and ends it.
LONG = {
    "max-steps": 2000, "batch-size": 2, "accumulation": 1, "learning-rate": 0.005, "eval-every": 2,
    "sample-every": 2, "sample-tokens": 4,
}  # fmt: skip


def text(page, selector: str) -> str:
    return page.locator(selector).inner_text()


def until(page, selector: str, words: str, timeout_s: float = 60) -> str:
    """Wait for these words there; whatever stands there instead is the message."""
    from playwright.sync_api import TimeoutError

    try:
        page.wait_for_function(
            "([selector, words]) => document.querySelector(selector)?.innerText.includes(words)",
            arg=[selector, words],
            timeout=timeout_s * 1000,
        )
    except TimeoutError:
        raise AssertionError(f"{selector} never said “{words}”, but {text(page, selector)!r}") from None
    return text(page, selector)


def everywhere(page) -> None:
    """No serious axe-core violation and nothing sideways, in both sizes and colours."""
    for dark in (False, True):
        page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", dark)
        for size in SIZES.values():
            page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
            page.wait_for_timeout(500)  # plots fit themselves to the new width
            assert not sideways(page), f"{size}, dark {dark}"
            if dark is (size == SIZES["phone"]):  # each size once, each colour once: axe takes its time
                assert not violations(page), f"{size}, dark {dark}"
    page.set_viewport_size({"width": 1440, "height": 900})
    page.evaluate("() => document.body.classList.remove('dark')")


@pytest.mark.slow
def test_the_whole_path(visit, tmp_path):
    first = visit()
    page = first.page
    first.tab("Train")
    # The built-in example is there at once, as the model will see it, and so is what it would take.
    page.wait_for_selector(".train-sample", timeout=60_000)
    assert page.locator(".train-sample").count() == 5
    sample = page.locator(".train-sample .train-text").first
    assert "<|im_start|>user" in sample.locator(".masked").first.inner_text()
    assert (
        sample.locator(".trained").inner_text().removeprefix("trained on:").strip().startswith("Arr, matey!")
    )
    assert "29 for training, 3 held out" in text(page, "#train-preview")
    assert "326 K trainable parameters" in until(page, "#train-plan", "of memory")
    page.click("#train-more > button")
    page.wait_for_selector("#train-set-sample-tokens input")

    # What is wrong is said where one looks, and keeps nothing from being mended.
    page.locator("#train-set-rank input").fill("0")
    until(page, "#train-plan", "Rank (r) is 0.")
    page.locator("#train-set-rank input").fill("8")
    for name, value in LONG.items():
        page.locator(f"#train-set-{name} input").fill(str(value))
    page.locator("#train-name textarea, #train-name input").fill(NAME)
    until(page, "#train-plan", "2,000 steps")
    page.click("#train-run")
    until(page, "#train-progress", "Training.")
    first.page.close()  # a closed tab stops nothing

    second = visit()
    page = second.page
    until(page, "#training", f"Training {NAME}", 30)
    page.click("#training [data-tab]")
    page.wait_for_selector("#train-progress .train-tiles", timeout=30_000)
    # Training and comparing never share the device; who waits is told for whom.
    second.run(tokens=2, variants=("bf16",))
    waited = page.wait_for_function(
        "() => { const said = document.querySelector('#notice').innerText;"
        " return /training/.test(said) || !document.querySelector('#train-stop:not([disabled])') ? said : null; }",
        timeout=60_000,
    ).json_value()
    assert "a training is running, step" in waited or "the training of" in waited, waited
    page.wait_for_function(
        "() => Number(/Step ([0-9,]+) of/.exec(document.querySelector('#train-progress').innerText)?.[1]) >= 4",
        timeout=120_000,
    )
    page.click("#train-stop")
    until(page, "#train-progress", "The adapter trained so far is kept")
    assert "stopped early" in until(page, "#trained-about", NAME)
    second.finished()
    page.wait_for_selector("#trained-compare", timeout=30_000)
    assert not text(page, "#training").strip(), "the line above stays when nothing is trained any more"
    losses = page.locator('[data-table="loss"] tbody tr')
    assert losses.count() >= 4, "the table behind the curve lacks steps"
    curve = page.evaluate(
        "() => [...document.querySelectorAll('#tabs .js-plotly-plot')].map((p) => p.data.map((d) => d.name))"
    )
    assert ["loss", "evaluation loss"] in curve, f"the curve is not there: {curve}"
    assert page.locator(".train-answer").count() == 2 and "after step" in text(page, "#train-samples")
    assert page.locator("#adapters").get_by_label(NAME, exact=True).count() == 1, (
        "not listed among the adapters"
    )
    everywhere(page)

    # As a file.
    with page.expect_download() as download:
        page.click("#trained-zip")
    download.value.save_as(tmp_path / "a.zip")
    assert any(
        n.endswith("adapter_model.safetensors") for n in zipfile.ZipFile(tmp_path / "a.zip").namelist()
    )

    # On what was held back, with it and without.
    for box in page.locator("#trained-on input").all():
        box.set_checked(box.get_attribute("name") == "bf16")
    ticked = page.locator("#trained-on input:checked").evaluate_all("(boxes) => boxes.map((b) => b.name)")
    assert ticked == ["bf16"], f"the page ticked others again: {ticked}"
    page.click("#trained-evaluate")
    until(page, "#trained-told", "Done: 1 variant")
    assert "better" in text(page, '[data-table="evaluation"] tbody'), "the adapter does not help on bf16"

    # Compare now: variants × {none, it}.
    page.click("#trained-compare")
    page.wait_for_selector(f'.card[aria-label="nf4:dq + {NAME}"]', timeout=60_000)
    second.finished()
    assert second.states() == dict.fromkeys(("bf16", f"bf16 + {NAME}", "nf4:dq", f"nf4:dq + {NAME}"), "done")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#trained-delete")
    until(page, "#tabs", "No trained adapters yet")
    assert page.locator("#adapters").get_by_label(NAME, exact=True).count() == 0
    assert not second.complaints, second.complaints


def test_an_upload_names_its_columns_and_is_trained_to_the_end(visit, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        "asked,said\n" + "".join(f"Say {n},Aye <b>{n}</b>\n" for n in range(40)), encoding="utf-8"
    )
    visitor = visit()
    page = visitor.page
    visitor.tab("Train")
    page.wait_for_selector(".train-sample", timeout=60_000)
    with page.expect_file_chooser() as chooser:
        page.click("#train-upload")
    chooser.value.set_files(file)
    said = until(page, "#train-read", "asked")
    assert "mine.csv" in said and str(tmp_path) not in said
    for role, column in (("prompt", "asked"), ("completion", "said")):
        field = page.locator(f"#train-column-{role} textarea, #train-column-{role} input")
        field.fill(column)
        field.press("Enter")
    until(page, "#train-preview", "mine.csv")
    assert "36 for training, 4 held out" in text(page, "#train-preview")
    assert "Aye <b>" in page.locator(".train-text .trained").first.inner_text()
    page.locator("#train-name textarea, #train-name input").fill("mine")
    page.locator("#prompt textarea").fill("")  # no sample answer is asked for
    page.click("#train-more > button")
    page.wait_for_selector("#train-set-sample-tokens input")
    for name, value in {"max-steps": 3, "batch-size": 1, "accumulation": 1}.items():
        page.locator(f"#train-set-{name} input").fill(str(value))
    until(page, "#train-plan", "3 steps")
    page.click("#train-run")
    until(page, "#train-progress", "Done: 3 steps", 120)
    assert "stopped early" not in until(page, "#trained-about", "mine.csv")
    assert "No sample answer: the prompt was empty" in text(page, "#train-samples")
    assert page.locator("#train-run").is_enabled() and not page.locator("#train-stop").is_enabled()
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#trained-delete")
    # Not "No trained adapters yet": what another test left there is none of this one's business.
    page.wait_for_function("() => !document.querySelector('#trained-about')?.innerText.includes('mine.csv')")
    assert page.locator("#adapters").get_by_label("mine", exact=True).count() == 0
    assert not visitor.complaints, visitor.complaints
