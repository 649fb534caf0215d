"""A server on the internet: limits, other people's history, local paths, the password, other sites' pages."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sample

from comparator.core.settings import Settings
from comparator.store import open_store
from comparator.ui.admission import Admission, owner_of
from comparator.ui.origin_guard import OwnOrigin

KEY = "() => document.querySelector('#visitor input, #visitor textarea').value"


def owned(visitor) -> str:
    visitor.page.wait_for_function(f"() => ({KEY})().length >= 22", timeout=20_000)
    return visitor.page.evaluate(KEY)


def notice(visitor, words: str) -> str:
    visitor.page.wait_for_function(
        f"() => document.querySelector('#notice').innerText.includes({json.dumps(words)})", timeout=60_000
    )
    return visitor.text("#notice")


def answer(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.browser
def test_a_public_server(serve, open_at, tmp_path):
    server = serve(COMPARATOR_PUBLIC="1", COMPARATOR_REQUESTS_PER_MINUTE="2", COMPARATOR_MAX_NEW_TOKENS="16")
    first, second = open_at(server.url), open_at(server.url)
    assert owned(first) != owned(second)
    assert not first.page.locator("#unload-all").is_visible(), "one visitor could unload what others use"
    first.tab("Train")
    first.page.wait_for_selector("#train-refused >> text=Training is disabled here", timeout=30_000)
    assert not first.page.locator("#train-run").count(), (
        "a visitor could take the device from everybody for hours"
    )

    # What would read this machine's files is refused before anything runs, and is not counted.
    first.page.locator("#model input").fill("/etc")
    first.page.keyboard.press("Enter")
    first.page.wait_for_function(
        "() => /not accepted as a model/.test(document.querySelector('#facts').innerText)"
    )
    first.page.click("#run")
    notice(first, "not accepted as a model")
    first.page.locator("#model input").fill("smollm2-135m")
    first.page.keyboard.press("Enter")
    first.run(tokens=17, variants=("bf16",))
    notice(first, "COMPARATOR_MAX_NEW_TOKENS")

    first.run(tokens=2, prompt="Say hello to the ostrich", variants=("bf16",))
    first.finished()
    first.page.wait_for_selector("#share-link")
    link = first.page.evaluate("() => document.querySelector('#share-link').dataset.copyLink")

    first.tab("History")
    first.page.wait_for_selector("ul.history > li", timeout=30_000)
    assert "ostrich" in first.text("ul.history")
    second.tab("History")
    second.page.wait_for_function(
        "() => /visible only in this browser/.test(document.querySelector('#history').innerText)"
    )
    # The link is for everybody; renaming and deleting are not, whatever a browser is made to send.
    third = open_at(link)
    third.page.wait_for_selector("#recording section", timeout=60_000)
    assert "ostrich" in third.text("#recording")
    stored = next((tmp_path / "data").rglob("*.meta.json")).read_text()
    assert owned(first) not in stored, "the key of a visitor is kept where others could read it"

    # The third within a minute is refused. On a busy machine a minute may pass between two of them.
    for number in range(6):
        first.run(tokens=1, prompt=f"Say hello again, {number}", variants=("bf16",))
        if first.page.locator("#notice .bad").count():
            break
        first.finished()
    assert "Try again in" in notice(first, "COMPARATOR_REQUESTS_PER_MINUTE")

    # Pages of other sites are turned away, ours and programs are not.
    config = server.url + "config"
    assert answer(config) == 200 and answer(config, Origin=server.url.rstrip("/")) == 200
    assert answer(config, Origin="https://evil.example") == 403
    assert answer(config, Origin="null") == 403


@pytest.mark.browser
def test_a_password_stands_before_everything(with_password, browser):
    server, data = with_password
    with open_store(Settings(data_dir=data)) as store:
        id = store.save(sample.comparison())
    assert answer(server.url + "config") == 401
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{server.url}?c={id}")
    page.get_by_label("username").fill("ada")
    page.get_by_label("password").fill("lovelace")
    page.get_by_role("button", name="Login").click()
    page.wait_for_selector("#recording section", timeout=60_000)
    assert "CPU (2 cores)" in page.locator("#recording").inner_text(), "the link is forgotten by the login"
    context.close()
    assert "lovelace" not in server.said()


# ---------------------------------------------------------------- without a server


def test_a_visitors_history_is_theirs(tmp_path):
    desk = Admission(Settings(data_dir=tmp_path, public=True))
    mine, theirs = "a" * 48, "b" * 48
    kept = desk.save(sample.comparison(), mine)
    assert desk.holds(kept.id) and [e.id for e in desk.store.search("", mine)] == [kept.id]
    assert desk.store.search("", theirs) == [] == desk.store.search("", None)
    for change in (desk.store.delete, lambda id, owner: desk.store.rename(id, "x", owner)):
        with pytest.raises(Exception, match="belongs to someone else"):
            change(kept.id, theirs)


def test_what_was_deleted_long_ago_goes_when_the_app_starts_and_nobody_visits(tmp_path):
    settings = Settings(data_dir=tmp_path, public=True)
    with open_store(settings) as store:
        old, new = (store.save(sample.comparison(), "me") for _ in range(2))
        for id, when in ((old, "2026-01-01T00:00:00+00:00"), (new, datetime.now(UTC).isoformat())):
            store.delete(id, "me")
            store.folder.write_sidecar(id, replace(store.folder.read_sidecar(id), deleted_at=when))
    desk = Admission(settings)
    desk.open_in_background()
    until = time.monotonic() + 20
    while store.folder.document_path(old).exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not store.folder.document_path(old).exists() and desk.holds(new)
    desk.store.close()


@pytest.mark.parametrize("key", [None, "", "short", "x" * 65, "../" * 10, 5, ["a" * 30], "ä" * 30])
def test_what_is_no_key_is_nobody(key):
    assert owner_of(key) is None


def test_a_comparison_that_cannot_be_saved_is_shown_without_a_link(tmp_path, monkeypatch):
    from comparator.core.errors import UserError

    desk = Admission(Settings(data_dir=tmp_path))

    def full(*_, **__):
        raise UserError("The disk is full.", "Free some space.")

    monkeypatch.setattr(desk.store, "save", full)
    before = sample.comparison()
    assert desk.save(before, None) is before and not desk.holds(before.id)


@pytest.mark.parametrize(
    "headers, behind_proxy, foreign",
    [
        ({}, False, False),
        ({"origin": "http://here:7860", "host": "here:7860"}, False, False),
        ({"origin": "https://here", "host": "here"}, False, False),
        ({"origin": "https://here", "host": "here:443"}, False, False),
        ({"origin": "https://HERE", "host": "here"}, False, False),
        ({"origin": "https://there", "host": "here"}, False, True),
        ({"origin": "https://here.evil", "host": "here"}, False, True),
        ({"origin": "http://here:1", "host": "here"}, False, True),
        ({"origin": "null", "host": "here"}, False, True),
        ({"origin": "https://[", "host": "here"}, False, True),
        ({"origin": "https://out", "host": "in", "x-forwarded-host": "out"}, True, False),
        ({"origin": "https://out", "host": "in", "x-forwarded-host": "out"}, False, True),
    ],
)
def test_whose_page_asks(headers, behind_proxy, foreign):
    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    assert OwnOrigin(None, behind_proxy)._foreign(scope) is foreign


@pytest.mark.browser
@pytest.mark.slow
def test_each_visitor_trains_for_themselves(serve, open_at, tmp_path):
    server = serve(COMPARATOR_PUBLIC="1", COMPARATOR_TRAINING="1", COMPARATOR_MAX_TRAINING_S="600")
    first, second = open_at(server.url), open_at(server.url)
    page = first.page
    first.tab("Train")
    page.wait_for_selector(".train-sample", timeout=120_000)
    page.click("#train-more > button")
    for name, value in {
        "max-steps": 1,
        "batch-size": 1,
        "accumulation": 1,
        "max-length": 128,
        "sample-tokens": 1,
    }.items():
        page.locator(f"#train-set-{name} input").fill(str(value))
    page.locator("#train-name textarea, #train-name input").fill("mine")
    page.click("#train-run")
    page.wait_for_function(
        "() => /mine-[0-9a-f]{8}/.test(document.querySelector('#trained-about')?.innerText || '')",
        timeout=240_000,
    )
    name = next(p.name for p in (tmp_path / "data" / "adapters").iterdir() if p.name.startswith("mine-"))
    assert page.locator("#adapters").get_by_label(name, exact=True).count() == 1
    second.tab("Train")
    second.page.wait_for_selector(".train-sample", timeout=120_000)
    assert name not in second.page.content(), "another visitor sees what was trained"
    page.reload()
    page.wait_for_function(
        "(name) => document.querySelector('#adapters').innerText.includes(name)", arg=name, timeout=60_000
    )
