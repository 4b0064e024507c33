"""Every endpoint of a push, failing with every status: the right end, the right words, no duplicate commit."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from hfcompress.errors import HFCompressError, HubError
from hfcompress.publishing.contents import collect
from hfcompress.publishing.hub import Upload
from tests.loopback_hub import TOKEN, LoopbackHub

# huggingface_hub's own upload of large files trips over it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ENDPOINTS = ("create", "info", "preupload", "batch", "put", "commit")
PASSING = (429, 500, 502, 503, 504)
LASTING = {
    400: "failed",
    401: "does not accept the login",
    403: "may not write",
    404: "is not on the Hub",
    409: "somebody else is changing",
    412: "newer commit",
    413: "of this size",
}
# huggingface_hub itself waits a second before it asks these again: a few stand for all in the quick runs.
PATIENT = ("preupload", "batch", "put")
WAITS = (0.0, 0.0)


@pytest.fixture(autouse=True)
def _without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def upload(hub: LoopbackHub) -> Upload:
    return Upload(api=HfApi(endpoint=hub.url, token=TOKEN), repo_id="org/tiny", waits=WAITS)


def assert_published_once(hub: LoopbackHub, checkpoint: Path) -> None:
    repo = hub.repos["org/tiny"]
    assert [commit.message for commit in repo.commits] == ["initial commit", "Upload model"]
    for content in collect(checkpoint):
        assert repo.head.files[content.name] == content.path.read_bytes()


def cells(statuses: tuple[int, ...]) -> list:
    return [
        pytest.param(
            endpoint,
            status,
            marks=[pytest.mark.slow] if endpoint in PATIENT and status in PASSING and status != 503 else [],
        )
        for endpoint in ENDPOINTS
        for status in statuses
    ]


@pytest.mark.parametrize(("endpoint", "status"), cells(PASSING))
def test_a_passing_fault_is_outlasted(hub: LoopbackHub, checkpoint: Path, endpoint: str, status: int) -> None:
    hub.fail(endpoint, status)
    upload(hub).send(collect(checkpoint))
    assert hub.calls["commit"] <= 2 and hub.calls["put"] <= 2
    assert_published_once(hub, checkpoint)


@pytest.mark.parametrize(("endpoint", "status"), cells(tuple(LASTING)))
def test_a_refusal_is_told_and_not_tried_again(hub: LoopbackHub, checkpoint: Path, endpoint: str, status: int) -> None:
    if (endpoint, status) == ("create", 409):
        # Somebody else of the organization made it a moment before: what was wanted is there.
        hub.before["create"] = lambda: hub.add("org/tiny")
        upload(hub).send(collect(checkpoint))
        assert_published_once(hub, checkpoint)
        return
    hub.fail(endpoint, status, times=99)
    with pytest.raises(HubError, match=LASTING[status]) as caught:
        upload(hub).send(collect(checkpoint))
    assert hub.calls[endpoint] == 1
    if status in (401, 403):
        assert "write access" in caught.value.hint and "hf auth login" in caught.value.hint
    if status not in (400, 412):
        assert f"({status})" in str(caught.value)
    assert "org/tiny" not in hub.repos or len(hub.repos["org/tiny"].commits) == 1

    # Once it passes, the same push goes on: what had arrived is not sent again, and a third has nothing to do.
    arrived = len(hub.objects)
    hub.fail(endpoint, status, times=0)
    upload(hub).send(collect(checkpoint))
    assert_published_once(hub, checkpoint)
    assert arrived == (endpoint == "commit")
    assert hub.calls["put"] == (2 if endpoint == "put" else 1)
    sent = hub.calls["put"], hub.calls["commit"]
    upload(hub).send(collect(checkpoint))
    assert sent == (hub.calls["put"], hub.calls["commit"])
    assert_published_once(hub, checkpoint)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 520])
@pytest.mark.parametrize("endpoint", ["create", "commit", "tag", "branch"])
def test_an_answer_lost_on_the_way_does_nothing_twice(
    hub: LoopbackHub, checkpoint: Path, endpoint: str, status: int
) -> None:
    hub.fail(endpoint, status, late=True)
    pushed = Upload(
        api=HfApi(endpoint=hub.url, token=TOKEN), repo_id="org/tiny", waits=WAITS, revision="v2", tag="v2.0"
    )
    pushed.send(collect(checkpoint))
    repo = hub.repos["org/tiny"]
    assert [commit.message for commit in repo.commits] == ["initial commit", "Upload model"]
    assert repo.refs["v2"] == repo.tags["v2.0"] == repo.commits[-1].oid


def test_a_tag_is_made_once_and_never_moved(hub: LoopbackHub, checkpoint: Path) -> None:
    def tagged(name: str) -> Upload:
        return Upload(api=HfApi(endpoint=hub.url, token=TOKEN), repo_id="org/tiny", waits=WAITS, tag=name)

    for _ in range(2):
        tagged("v1").send(collect(checkpoint))
    first = hub.repos["org/tiny"].head.oid
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    with pytest.raises(HFCompressError, match="tag v1, which names another commit; nothing was committed"):
        tagged("v1").send(collect(checkpoint))
    assert hub.repos["org/tiny"].head.oid == first
    tagged("v2").send(collect(checkpoint))
    assert hub.repos["org/tiny"].tags == {"v1": first, "v2": hub.repos["org/tiny"].head.oid}
