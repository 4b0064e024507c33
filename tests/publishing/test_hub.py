from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from transformers import AutoModelForSequenceClassification

from hfcompress import LowRankConfig, compress
from hfcompress.errors import CheckpointError, ConfigError, HubError
from hfcompress.evaluation.report import Report
from hfcompress.publishing.contents import collect
from hfcompress.publishing.hub import Upload, push
from hfcompress.publishing.model_card import write_card
from tests.loopback_hub import TOKEN, LoopbackHub

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SERVER_ERRORS = (429, 500, 502, 503, 504)

# huggingface_hub's own upload of large files trips over it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

LOADED = """
from hfcompress.publishing.hub import push
url = push({directory!r}, "org/tiny", private=True)
import json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("org/tiny")
tokenizer = AutoTokenizer.from_pretrained("org/tiny")
batch = tokenizer(["a good film", "dully bad"], padding=True, return_tensors="pt")
with torch.no_grad():
    print(json.dumps([url, model(**batch).logits.tolist()]))
"""


@pytest.fixture(autouse=True)
def _without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def upload(hub: LoopbackHub, token: str | bool = TOKEN, **options: object) -> Upload:
    values = {"repo_id": "org/tiny", "waits": (0.0, 0.0), **options}
    return Upload(api=HfApi(endpoint=hub.url, token=token), **values)  # type: ignore[arg-type]


def test_pushed_then_loaded_gives_the_same_logits(
    hub: LoopbackHub, checkpoint: Path, report: Report, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoTokenizer

    (checkpoint / "README.md").unlink()
    write_card(checkpoint, report)
    report.save(checkpoint / "report.json")
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    done = hub.run(LOADED.format(directory=str(checkpoint)), tmp_path / "home")
    assert done.returncode == 0, done.stderr
    url, logits = json.loads(done.stdout.splitlines()[-1])

    repo = hub.repos["org/tiny"]
    assert url == f"{hub.url}/org/tiny/commit/{repo.head.oid}"
    assert repo.private
    wanted = FILES | {"report.json", ".eval_results/mrpc.yaml"}
    assert set(repo.head.files) == wanted | {".gitattributes"}
    assert all(repo.head.files[name] == (checkpoint / name).read_bytes() for name in wanted)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    batch = AutoTokenizer.from_pretrained(checkpoint)(["a good film", "dully bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.tolist() == logits


def test_a_second_push_makes_no_commit(hub: LoopbackHub, checkpoint: Path) -> None:
    first = upload(hub).send(collect(checkpoint))
    assert not hub.repos["org/tiny"].private
    assert upload(hub).send(collect(checkpoint)) == first
    assert hub.calls["commit"] == hub.calls["preupload"] == 1
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert upload(hub, message="new card").send(collect(checkpoint)) != first
    assert [commit.message for commit in hub.repos["org/tiny"].commits][1:] == ["Upload model", "new card"]
    assert hub.calls["put"] == 1


def test_weights_of_an_earlier_push_go_other_files_stay(hub: LoopbackHub, checkpoint: Path) -> None:
    hub.add("org/tiny").commit({"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}, "old")
    upload(hub).send(collect(checkpoint))
    assert set(hub.repos["org/tiny"].head.files) == FILES | {"notes.md"}


def test_a_secret_stops_everything(hub: LoopbackHub, checkpoint: Path) -> None:
    (checkpoint / "report.json").write_text(json.dumps({"login": TOKEN}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"report\.json") as caught:
        push(checkpoint, "org/tiny")
    assert TOKEN not in str(caught.value)
    assert not hub.calls


FETCHED = """
from pathlib import Path
from hfcompress.errors import CheckpointError
from hfcompress.pipeline import find_model
from hfcompress.publishing.hub import push
push(Path({directory!r}), "org/tiny")
try:
    print(find_model("org/tiny", progress=False))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_fetched_is_held_to_its_digests(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, damaged: bool
) -> None:
    compress(AutoModelForSequenceClassification.from_pretrained(checkpoint), [LowRankConfig(rank=8)]).save_pretrained(
        checkpoint
    )
    if damaged:
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = hub.run(FETCHED.format(directory=str(checkpoint)), tmp_path / "home")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert ("is not what was saved" in done.stdout) == damaged
    assert (
        damaged
        or (Path(said[-1]) / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    )


def test_without_a_login(hub: LoopbackHub, checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "from hfcompress.errors import HubError\nfrom hfcompress.publishing.hub import push\n"
        f"try:\n    push({str(checkpoint)!r}, 'org/tiny')\nexcept HubError as error:\n    print(error)\n"
    )
    done = hub.run(code, tmp_path / "home", token=None)
    assert "hf auth login" in done.stdout, done.stderr
    assert not hub.calls


def test_a_login_that_is_refused(hub: LoopbackHub, checkpoint: Path) -> None:
    with pytest.raises(HubError, match=r"\(401\)") as caught:
        upload(hub, "hf_" + "x" * 34).send(collect(checkpoint))
    assert "hf auth login" in caught.value.hint
    assert hub.calls.total() <= 2


def test_no_write_access(hub: LoopbackHub, checkpoint: Path) -> None:
    hub.add("else/tiny")
    for name in ("else/tiny", "else/new"):
        with pytest.raises(HubError, match=rf"may not write to {name} \(403\)") as caught:
            upload(hub, repo_id=name).send(collect(checkpoint))
        assert "write access" in caught.value.hint
    assert hub.calls["create"] == 1
    assert hub.calls["commit"] == 0


@pytest.mark.parametrize("status", [401, 403])
def test_refusals_are_not_tried_again(hub: LoopbackHub, checkpoint: Path, status: int) -> None:
    hub.fail("commit", status, times=9)
    with pytest.raises(HubError, match=str(status)):
        upload(hub).send(collect(checkpoint))
    assert hub.calls["commit"] == 1


@pytest.mark.parametrize("status", SERVER_ERRORS)
@pytest.mark.parametrize("endpoint", ["create", "info", "commit"])
def test_passing_troubles_are_outlasted(hub: LoopbackHub, checkpoint: Path, endpoint: str, status: int) -> None:
    hub.fail(endpoint, status, times=2)
    upload(hub).send(collect(checkpoint))
    assert set(hub.repos["org/tiny"].head.files) >= FILES
    assert len(hub.repos["org/tiny"].commits) == 2


def test_a_listing_that_fails_once(hub: LoopbackHub, checkpoint: Path) -> None:
    hub.fail("tree", 503)
    upload(hub).send(collect(checkpoint))
    assert set(hub.repos["org/tiny"].head.files) >= FILES


@pytest.mark.parametrize("status", [429, 503])
def test_lasting_troubles_are_told(hub: LoopbackHub, checkpoint: Path, status: int) -> None:
    hub.fail("commit", status, times=99)
    with pytest.raises(HubError, match=f"answered {status} until the last of 3 tries"):
        upload(hub).send(collect(checkpoint))
    assert hub.calls["commit"] == 3
    assert len(hub.repos["org/tiny"].commits) == 1


def test_the_asked_wait_is_kept(hub: LoopbackHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("hfcompress.publishing.hub.time.sleep", waited.append)
    for asked in ("7", "86400", "Fri, 31 Dec 1999 23:59:59 GMT"):
        hub.fail("commit", 429, Retry_After=asked)
        (checkpoint / "README.md").write_text(f"---\ntags: [{asked!r}]\n---\n", encoding="utf-8")
        upload(hub, waits=(0.5,)).send(collect(checkpoint))
    assert waited == [7.0, 60.0, 0.5]


@pytest.mark.parametrize("status", [500, 503])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: LoopbackHub, checkpoint: Path, status: int) -> None:
    hub.fail("commit", status, late=True)
    url = upload(hub).send(collect(checkpoint))
    assert hub.calls["commit"] == 1
    assert len(hub.repos["org/tiny"].commits) == 2
    assert url.endswith(hub.repos["org/tiny"].head.oid)


def test_a_newer_commit_is_not_overwritten(hub: LoopbackHub, checkpoint: Path) -> None:
    repo = hub.add("org/tiny")
    hub.before["commit"] = lambda: repo.commit({"README.md": b"theirs"}, "theirs")
    with pytest.raises(HubError, match="newer commit"):
        upload(hub).send(collect(checkpoint))
    assert repo.head.message == "theirs"
    assert hub.calls["commit"] == 1


def test_a_newer_commit_between_two_tries_is_not_overwritten(hub: LoopbackHub, checkpoint: Path) -> None:
    repo = hub.add("org/tiny")
    hub.fail("commit", 503)
    hub.before["commit"] = lambda: repo.commit({"README.md": b"theirs"}, "theirs")
    with pytest.raises(HubError, match="newer commit"):
        upload(hub).send(collect(checkpoint))
    assert repo.head.message == "theirs"


def test_nobody_listens(hub: LoopbackHub, checkpoint: Path) -> None:
    nowhere = Upload(api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN), repo_id="org/tiny", waits=(0.0,))
    with pytest.raises(HubError, match="failed"):
        nowhere.send(collect(checkpoint))


def test_a_public_repository_is_not_taken_for_private(hub: LoopbackHub, checkpoint: Path) -> None:
    hub.add("org/tiny", private=False)
    with pytest.raises(HubError, match="is public; nothing was uploaded"):
        upload(hub, private=True).send(collect(checkpoint))
    assert hub.calls["preupload"] == 0


def test_a_branch_is_made(hub: LoopbackHub, checkpoint: Path) -> None:
    for _ in range(2):
        upload(hub, revision="v2").send(collect(checkpoint))
    repo = hub.repos["org/tiny"]
    branch = repo.at("v2")
    assert branch is not None and set(branch.files) >= FILES
    assert set(repo.head.files) == {".gitattributes"}
    assert len(repo.commits) == 2


def test_a_pull_request(hub: LoopbackHub, checkpoint: Path) -> None:
    repo = hub.add("else/tiny")
    assert upload(hub, repo_id="else/tiny", create_pr=True).send(collect(checkpoint)).endswith("/discussions/1")
    assert hub.calls["create"] == 0
    request = repo.at("refs/pr/1")
    assert request is not None and set(request.files) >= FILES
    assert repo.head.message == "initial commit"


def test_a_pull_request_is_not_opened_twice(hub: LoopbackHub, checkpoint: Path) -> None:
    repo = hub.add("org/tiny")
    hub.fail("commit", 503, late=True)
    with pytest.raises(HubError, match="503"):
        upload(hub, create_pr=True).send(collect(checkpoint))
    assert [ref for ref in repo.refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_pull_request_to_nothing(hub: LoopbackHub, checkpoint: Path) -> None:
    with pytest.raises(HubError, match=r"\(404\)"):
        upload(hub, create_pr=True).send(collect(checkpoint))


def test_files_that_the_repository_ignores_are_told(hub: LoopbackHub, checkpoint: Path) -> None:
    hub.add("org/tiny").commit({".gitignore": b"model.safetensors"}, "ignore")
    with pytest.raises(HubError, match=r"model\.safetensors") as caught:
        upload(hub).send(collect(checkpoint))
    assert ".gitignore" in caught.value.hint


def test_a_card_that_the_hub_refuses(hub: LoopbackHub, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("---\nforbidden: true\n---\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="'forbidden' is not allowed"):
        upload(hub).send(collect(checkpoint))
    assert len(hub.repos["org/tiny"].commits) == 1


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "org/ti ny", "org/..", "", "../x"])
def test_names_that_are_none(checkpoint: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="repo_id"):
        push(checkpoint, name)


def test_all_wrong_arguments_at_once(checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        push(checkpoint, "tiny", create_pr=True, revision="v2", commit_message=f"with {TOKEN}")
    assert [problem.path for problem in caught.value.problems] == [
        ("repo_id",),
        ("revision",),
        ("commit_message",),
    ]
    assert TOKEN not in str(caught.value)
