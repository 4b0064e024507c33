"""The whole circle: a recipe is run and pushed, the repository is downloaded, and what came down is measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfcompress.errors import ConfigError
from hfcompress.recipe import PushConfig
from tests.loopback_hub import LoopbackHub
from tests.workshop import save_data, save_model

RECIPE = """
name: circle
model: {model}
task: sst2
data: {data}
max_length: 16
evaluation: {{batch_size: 16, speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 10, groups: [sentence]}}
push: {{repo: org/circle, private: true, tag: v1}}
steps:
  - name: fine_tune
    training: {{epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32}}
  - low_rank: {{keep: 0.6}}
    calibration: 16
  - quantization: {{weights: int8, embeddings: int8}}
"""
DOWNLOAD = "from huggingface_hub import snapshot_download\nsnapshot_download('org/circle', local_dir={place!r})"


def hfcompress(*arguments: object) -> str:
    given = [str(argument) for argument in arguments]
    return f"import sys, hfcompress_cli\nsys.argv[1:] = {given!r}\nhfcompress_cli.main()"


@pytest.mark.slow
def test_run_push_download_verify(hub: LoopbackHub, tmp_path: Path) -> None:
    save_model(tmp_path / "model", initializer_range=0.3)
    data = save_data(tmp_path / "data")
    (tmp_path / "circle.yaml").write_text(RECIPE.format(model=tmp_path / "model", data=data))
    run = hfcompress("run", tmp_path / "circle.yaml", "--output", tmp_path / "result", "--quiet")
    done = hub.run(run, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["org/circle"]
    assert repo.private and repo.tags == {"v1": repo.head.oid}
    result = {
        path.relative_to(tmp_path / "result").as_posix(): path.read_bytes()
        for path in (tmp_path / "result").rglob("*")
        if path.is_file()
    }
    assert {"README.md", "report.html", "report.json", "predictions.json", "pictures/quality.png"} <= set(result)
    left_out = set(result) - set(repo.head.files)
    assert left_out == set(), "everything that a run writes is for its readers"
    assert all(repo.head.files[name] == data for name, data in result.items())

    place = tmp_path / "downloaded"
    done = hub.run(DOWNLOAD.format(place=str(place)), tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    verify = hfcompress("verify", place, "--data", data, "--original", tmp_path / "model", "--quiet", "--json")
    done = hub.run(verify, tmp_path / "elsewhere")
    checks = json.loads(done.stdout)
    # Tiny models take microseconds, so their speed-up is anything on a busy machine: all else must hold.
    wrong = [check for check in checks["checks"] if check["state"] != "holds" and "speed-up" not in check["figure"]]
    assert wrong == [], done.stderr
    card = place / "README.md"
    card.write_text(card.read_text().replace("100.0%", "100.1%", 1))
    done = hub.run(verify, tmp_path / "elsewhere")
    assert done.returncode == 1
    assert {"README.md"} <= {
        check["figure"] for check in json.loads(done.stdout)["checks"] if check["state"] == "fails"
    }

    commits, sent = len(repo.commits), hub.calls["put"]
    done = hub.run(run, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert (len(repo.commits), hub.calls["put"]) == (commits, sent), "a rerun sends nothing"


@pytest.mark.slow
def test_the_command_pushes_to_a_branch_with_a_tag_or_as_a_pull_request(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path
) -> None:
    done = hub.run(hfcompress("push", checkpoint, "org/tiny", "--branch", "dev", "--tag", "v0.1"), tmp_path / "home")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["org/tiny"]
    assert repo.tags == {"v0.1": repo.refs["dev"]} and repo.refs["main"] != repo.refs["dev"]
    assert done.stdout.strip() == f"{hub.url}/org/tiny/commit/{repo.refs['dev']}"
    hub.add("else/tiny")
    done = hub.run(hfcompress("push", checkpoint, "else/tiny", "--pull-request"), tmp_path / "home")
    assert done.stdout.strip() == f"{hub.url}/else/tiny/discussions/1", done.stderr
    done = hub.run(hfcompress("push", checkpoint, "else/tiny"), tmp_path / "home")
    assert done.returncode != 0 and "write access" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["", "a b", "../x", "a..b", "refs/heads/x", "v1.lock", "v1.", "-x", "x" * 200])
def test_names_of_branches_and_tags_that_are_none(name: str) -> None:
    for field in ("branch", "tag"):
        with pytest.raises(ConfigError, match=field):
            PushConfig(repo="org/name", **{field: name})
    assert PushConfig(repo="org/name", branch="release-2", tag="v1.0").options()["revision"] == "release-2"


def test_a_pull_request_has_no_branch_and_no_tag() -> None:
    for other in ({"branch": "x"}, {"tag": "v1"}):
        with pytest.raises(ConfigError, match="pull request takes neither"):
            PushConfig(repo="org/name", pull_request=True, **other)
