"""What one visitor may send, with many requests and with many bytes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("gradio")

import sample

from comparator.backends import calibration
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.core.state import ModelFacts
from comparator.deploy.limits import limits_of
from comparator.ui import visitor_quota
from comparator.ui.admission import Admission
from comparator.ui.gradio_compat import UPLOAD_PATH
from comparator.ui.visitor_quota import VisitorQuota


def statuses(
    count: int, path: str, quota: VisitorQuota, who: str = "1.2.3.4", length: int | None = 10
) -> list[int]:
    async def ask() -> int:
        answers = []

        async def send(message):
            answers.append(message)

        headers = [] if length is None else [(b"content-length", str(length).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": (who, 1)}
        await quota(scope, None, send)
        return answers[0]["status"]

    async def all_of_them() -> list[int]:
        return [await ask() for _ in range(count)]

    # In a thread of its own: a browser test of this process may have left an event loop running.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, all_of_them()).result()


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})


def test_uploads_have_a_quota_for_each_and_for_all(monkeypatch):
    quota = VisitorQuota(app, Settings(public=True, max_upload="10MB"))
    assert statuses(6, UPLOAD_PATH, quota, length=10_000_000) == [200] * 4 + [429] * 2
    assert statuses(5, UPLOAD_PATH, quota, "5.6.7.8", None)[-1] == 429, "no length is no way around"
    assert statuses(1, UPLOAD_PATH, quota, "9.9.9.9") == [200], "one visitor's uploads cost the others theirs"
    monkeypatch.setattr(visitor_quota, "UPLOAD_BYTES_TOTAL", 80_000_100)
    assert statuses(2, UPLOAD_PATH, quota, "8.8.8.8", length=10_000_000) == [429] * 2, "the disk fills up"
    monkeypatch.setattr(visitor_quota, "HOUR_S", -1.0)
    assert statuses(1, UPLOAD_PATH, quota) == [200], "what was deleted still counts"


def test_requests_have_a_limit_in_a_minute():
    quota = VisitorQuota(app, Settings(public=True))
    most = visitor_quota.POSTS_PER_MINUTE
    assert statuses(most + 1, "/gradio_api/queue/join", quota)[-2:] == [200, 429]
    assert statuses(1, "/gradio_api/queue/join", quota, "5.6.7.8") == [200]


def test_bytes_have_a_limit_in_a_minute():
    quota = VisitorQuota(app, Settings(public=True), most_body=8_000_000)
    join = "/gradio_api/queue/join"
    assert statuses(6, join, quota, length=8_000_000) == [200] * 5 + [429], (
        "kept lists of boxes fill the memory"
    )
    assert statuses(6, join, quota, "5.6.7.8", None) == [200] * 5 + [429], "no length is no way around"
    assert statuses(1, join, quota, "9.9.9.9") == [200]


def test_what_is_stored_has_a_limit_in_total(tmp_path, settings_env, monkeypatch):
    admission = Admission(Settings(public=True, data_dir=tmp_path, max_stored="1kB"))
    first = admission.save(sample.comparison(), None)
    assert admission.holds(first.id)
    page = admission.shown(first)
    assert page._comparison is None and page.comparison == first, "an open page holds the whole document"
    admission._measured_s = float("-inf")
    second = admission.save(sample.comparison(), None)
    assert not admission.holds(second.id), "the disk fills up"
    with pytest.raises(UserError, match="COMPARATOR_MAX_STORED"):
        admission.require_room()
    admission.store.close()

    settings_env(public=1)
    assert calibration.store(["a text of some words"], tmp_path)
    monkeypatch.setattr(calibration, "MOST_STORED_BYTES", 1)
    assert calibration.store(["a text of some words"], tmp_path), "it is there already"
    with pytest.raises(UserError, match="accepts no more"):
        calibration.store(["another text of some words"], tmp_path)


def test_a_model_of_unknown_size_is_refused_in_public():
    with pytest.raises(UserError, match="not known how many parameters"):
        limits_of(Settings(public=True)).check_size(ModelFacts("m/m", parameters=None))
    limits_of(Settings(public=False, max_model_parameters="9B")).check_size(
        ModelFacts("m/m", parameters=None)
    )
