from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfcompress.errors import ConfigError, RecipeError
from hfcompress.methods.registry import method_of, methods
from hfcompress.methods.training import TrainingConfig
from hfcompress.recipe import Recipe, Step, load_recipe, parse_recipe
from hfcompress.recipe.document import MAX_BYTES
from hfcompress.recipe.fields import describe_fields

ROOT = Path(__file__).resolve().parent.parent

GOOD = """\
name: quickstart
model: demo/minilm-l6
task: demo/movie-reviews
seed: 42
max_length: 64
evaluation: {batch_size: 32, speed_batch_size: 8, speed_sequence_length: 128, speed_repeats: 20}
push: {repo: org/name, private: true}
steps:
  - name: teach
    training: {epochs: 2, learning_rate: 5e-5, batch_size: 32}
  - structured_pruning: {heads: 0.5, neurons: 0.4}
    distillation: {temperature: 2.0}
    training: {epochs: 3, learning_rate: 1e-4}
  - low_rank: {keep: 0.6}
    calibration: 128
  - quantization: {weights: int8, embeddings: int8}
"""
HEAD = "name: a\nmodel: org/base\ntask: sst2\nsteps:\n"


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return str(caught.value)


def with_line(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def test_a_good_recipe_is_read_whole() -> None:
    recipe = parse_recipe(GOOD, "r.yaml")
    teach, prune, factorise, quantize = recipe.steps
    assert (recipe.name, recipe.model, recipe.task, recipe.data) == ("quickstart", *_MODEL_AND_TASK, None)
    assert (teach.name, teach.methods) == ("teach", ())
    assert teach.training == TrainingConfig(epochs=2, learning_rate=5e-5, batch_size=32)
    assert sorted(prune.name.split("+")) == ["distillation", "structured_pruning"]
    assert prune.training is not None and prune.training.learning_rate == 1e-4
    assert (factorise.training, factorise.calibration) == (None, 128)
    assert [method_of(config).name for config in quantize.methods] == ["quantization"]
    assert recipe.push is not None and recipe.push.private


_MODEL_AND_TASK = ("demo/minilm-l6", "demo/movie-reviews")


def test_the_order_of_keys_in_a_step_does_not_matter() -> None:
    turned = with_line(
        "structured_pruning: {heads: 0.5, neurons: 0.4}\n    distillation: {temperature: 2.0}",
        "distillation: {temperature: 2.0}\n    structured_pruning: {heads: 0.5, neurons: 0.4}",
    )
    assert parse_recipe(turned, "r.yaml") == parse_recipe(GOOD, "r.yaml")


def test_to_dict_is_json_and_reads_back_as_the_same_recipe() -> None:
    recipe = parse_recipe(GOOD, "r.yaml")
    values = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
    assert values["steps"][1]["structured_pruning"]["heads"] == 0.5
    assert parse_recipe(yaml.safe_dump(values), "again.yaml") == recipe


def test_a_part_without_fields_takes_its_defaults() -> None:
    recipe = parse_recipe(HEAD + "  - low_rank:\n", "r.yaml")
    (step,) = recipe.steps
    assert step.methods == (methods()["low_rank"].config(),)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("+0.25", 0.25), ("5.e-1", 0.5), ("0.5 # half", 0.5)],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    recipe = parse_recipe(
        HEAD + f"  - training: {{epochs: 1, learning_rate: {text}}}\n".replace(" # half}", "}"), "r.yaml"
    )
    assert recipe.steps[0].training is not None
    assert recipe.steps[0].training.learning_rate == value


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "on",
        "yes",
        "0123",
        "0x10",
        "0o17",
        "1_000",
        "2026-01-01",
        "1:30",
        "'8'",
        ".inf",
        "1e999",
        "1.5.2",
    ],
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text: str) -> None:
    said = error_of(with_line("seed: 42", f"seed: {text}"))
    assert said == f"r.yaml:4: seed: should be a valid integer, not {text.strip(chr(39))!r}"


@pytest.mark.parametrize("text", ["yes", "on", "'true'", "1"])
def test_only_true_and_false_are_booleans(text: str) -> None:
    assert "push.private: should be a valid boolean" in error_of(with_line("private: true", f"private: {text}"))


def test_true_is_no_number() -> None:
    assert "max_length: should be a valid integer, not True" in error_of(
        with_line("max_length: 64", "max_length: true")
    )


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    bad = (
        GOOD.replace("name: quickstart", "name: Quick start")
        .replace("seed: 42", "sead: 42")
        .replace("repo: org/name", "repo: name")
        .replace("heads: 0.5", "heads: 1.5")
        .replace("keep: 0.6", "keeep: 0.6")
        .replace("weights: int8", "weights: int9")
    )
    lines = error_of(bad).splitlines()
    assert lines[0] == "6 problems in r.yaml:"
    starts = [line.strip().split(": ")[:2] for line in lines[1:]]
    assert starts == [
        ["r.yaml:1", "name"],
        ["r.yaml:4", "sead"],
        ["r.yaml:7", "push.repo"],
        ["r.yaml:11", "steps.structured_pruning.heads"],
        ["r.yaml:14", "steps.low_rank.keeep"],
        ["r.yaml:16", "steps.quantization.weights"],
    ]
    assert "did you mean 'seed'?" in lines[2] and "did you mean 'keep'?" in lines[5]
    assert "should be less than" in lines[4] and "not 1.5" in lines[4]
    assert "int8" in lines[6] and "'int9'" in lines[6]


TYPOS = {
    "": "nam:name naem:name modle:model modell:model taks:task tsak:task dta:data datas:data sed:seed "
    "sede:seed "
    "max_lenght:max_length maxlength:max_length evalution:evaluation evaluaton:evaluation "
    "pus:push step:steps",
    "evaluation": "batchsize:batch_size batch_sise:batch_size speed_repeat:speed_repeats "
    "speed_batchsize:speed_batch_size speed_seqence_length:speed_sequence_length",
    "push": "rep:repo repos:repo privat:private",
    "step": "nmae:name trainig:training traning:training calibraton:calibration lowrank:low_rank "
    "low_rnk:low_rank "
    "quantisation:quantization quantizaton:quantization distilation:distillation destillation:distillation "
    "structured_prunning:structured_pruning structural_pruning:structured_pruning",
    "low_rank": "kep:keep keeps:keep",
    "structured_pruning": "head:heads neuron:neurons",
    "distillation": "temprature:temperature temperatur:temperature",
    "training": "epoch:epochs learning_rat:learning_rate learningrate:learning_rate batch_szie:batch_size",
}
PARTS = {
    "": "",
    "evaluation": "evaluation: {KEY: 1}\n",
    "push": "push: {KEY: 1, repo: a/b}\n",
    "step": "steps:\n  - KEY: 1\n",
    "low_rank": "steps:\n  - low_rank: {KEY: 1}\n",
    "structured_pruning": "steps:\n  - structured_pruning: {KEY: 1}\n",
    "distillation": "steps:\n  - distillation: {KEY: 1}\n    training: {epochs: 1}\n",
    "training": "steps:\n  - training: {KEY: 1}\n",
}
TYPO_CASES = [(part, *pair.split(":")) for part, pairs in TYPOS.items() for pair in pairs.split()]


@pytest.mark.parametrize(("part", "typo", "right"), TYPO_CASES)
def test_a_typo_gets_the_nearest_right_name(part: str, typo: str, right: str) -> None:
    text = PARTS[part].replace("KEY", typo) or f"{typo}: 1\n"
    assert re.search(rf"{typo}: unknown field; did you mean '{right}'\? allowed: .*\b{right}\b", error_of(text))


def test_there_are_enough_typos() -> None:
    assert len(TYPO_CASES) >= 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", r"r.yaml:2: seed: is given twice \(first in line 1\)"),
        ("steps:\n  - low_rank: &x {keep: 0.5}\n", r"r.yaml:2: steps.low_rank: an anchor \(&x\)"),
        ("name: a\nmodel: *x\n", r"r.yaml:2: model: an alias \(\*x\)"),
        ("push:\n  <<: {repo: a/b}\n", r"r.yaml:2: push.<<: a merge key"),
        ("seed: !!int '3'\n", r"r.yaml:1: seed: a tag \(tag:yaml.org,2002:int\)"),
        (
            "name: !!python/object/apply:os.system ['true']\n",
            r"r.yaml:1: name: a tag \(tag:yaml.org,2002:python",
        ),
        ("model: https://host/model\n", r"r.yaml:1: model: a URL is not allowed"),
        ("data: file:///etc\n", r"r.yaml:1: data: a URL is not allowed"),
        ('name: "a\\0b"\n', r"r.yaml:1: name: holds a character that cannot be printed"),
        ("? {a: b}\n: c\n", r"r.yaml:1: a key must be a plain name"),
        ("name: a\n---\nname: b\n", r"r.yaml:2: holds a second document"),
        ("name: [a\nmodel: b\n", r"r.yaml:2: is not YAML: while parsing a flow sequence"),
        ("name: a\n\tmodel: b\n", r"r.yaml:2: is not YAML"),
        ('name: "\\UFFFFFFFF"\n', r"r.yaml:1: is not YAML"),
        ("steps:\n  - name: *a\nb: [\n", r"r.yaml:2: steps.0.name: an alias"),
        ("name: \x07\n", r"r.yaml: is not YAML"),
        ("a: " + "[" * 40, r"r.yaml:1: is nested more than 16 levels"),
        ("a: " + "[" * 200_000, r"r.yaml:1: is nested more than 16 levels"),
        ("#" * (MAX_BYTES + 1), r"r.yaml: is larger than 1024 KiB"),
        ("", r"r.yaml: is empty; a recipe needs"),
        ("# only a comment\n", r"r.yaml: is empty"),
        ("- a\n", r"r.yaml:1: should hold `key: value` lines"),
        ("just text\n", r"r.yaml:1: should hold `key: value` lines"),
    ],
)
def test_what_yaml_allows_and_a_recipe_does_not(text: str, said: str) -> None:
    assert re.search(said, error_of(text))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: quickstart", "name: ../up", "name: should be lower-case letters"),
        ("name: quickstart", "name: .hidden", "name: should be lower-case letters"),
        (
            "demo/minilm-l6",
            "demo/minilm-l7",
            "model: there is no such demo model; did you mean 'demo/minilm-l6'?",
        ),
        ("demo/minilm-l6", "a/b/c", "model: should be demo/..., a Hub id"),
        ("demo/minilm-l6", "a/..", "model: should be demo/..., a Hub id"),
        ("demo/minilm-l6", "./nowhere", "model: the folder ./nowhere is not there or holds no config.json"),
        ("demo/movie-reviews", "sst-2", "did you mean 'sst2'?"),
        ("seed: 42", "seed: -1", "seed: should be greater than or equal to 0, not -1"),
        ("seed: 42", "data: /nowhere/at/all", "data: there is no folder /nowhere/at/all"),
        ("seed: 42", "data: ''", "data: should name a local folder"),
        ("name: teach", "name: te.ach", "steps.te.ach.name: should be lower-case letters"),
        ("name: teach", "name: low_rank", "another step is called 'low_rank'"),
        ("name: teach", "name: 3", "name: should be a valid string, not 3"),
        ("{keep: 0.6}", "0.6", "steps.low_rank: should hold fields ("),
        ("  - quantization: {weights: int8, embeddings: int8}", "  - 3", "steps[3]: should hold methods ("),
        ("calibration: 128", "calibration: 0", "calibration: should be greater than or equal to 1, not 0"),
        (
            "evaluation: {batch_size: 32,",
            "evaluation: {batch_size: 0,",
            "evaluation.batch_size: should be greater",
        ),
        ("epochs: 2, ", "epochs: 0, ", "steps.teach.training.epochs: should be greater than 0, not 0"),
    ],
)
def test_a_wrong_value_is_explained(old: str, new: str, said: str) -> None:
    assert said in error_of(with_line(old, new))


def test_missing_fields_are_all_named() -> None:
    said = error_of("seed: 1\n")
    for field in ("name", "model", "task", "steps"):
        assert f"{field}: is required" in said


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[]", "steps: should hold at least one step"),
        ("{}", "steps: should be a list of steps"),
        ("[{}]", "the step is empty"),
        ("[{name: a}]", "the step is empty"),
        ("[{quantization: }, {low_rank: }]", "steps.low_rank: needs float weights"),
        ("[{quantization: }, {structured_pruning: {heads: 0.5}}]", "quantized by step 'quantization'"),
        ("[{quantization: }, {name: b, quantization: }]", "steps.b.quantization: needs float weights"),
        (
            "[{quantization: }, {training: {epochs: 1}}]",
            "move the training before it, or add `qlora` to the step",
        ),
        ("[{quantization: }, {distillation: , training: {epochs: 1}}]", "add `qlora` to the step"),
        ("[{distillation: }]", "steps.distillation: works only in training; add `training:"),
        ("[{low_rank: , training: {epochs: 1}}]", "steps.low_rank: works at once and not in training"),
        ("[{structured_pruning: {heads: 0.5, importance: l0}}]", "importance 'l0' exists only in training"),
        (
            "[{structured_pruning: {heads: 0.5, importance: fisher}, training: {epochs: 1}}]",
            "importance 'fisher' exists only without training",
        ),
        (
            "[{structured_pruning: {latency: 0.5, importance: l0}, training: {epochs: 1}}]",
            "'l0' cannot work towards a latency target",
        ),
        (
            "[{unstructured_pruning: {importance: wanda}, training: {epochs: 1}}]",
            "importance 'wanda' exists only without training",
        ),
        ("[{low_rank: }, {low_rank: }]", "another step is called 'low_rank'"),
        ("[{vocabulary: , width_pruning: {remove: 0.5}}]", "which width_pruning may read; give it a step of its own"),
        (
            "[{structured_pruning: {heads: 0.5}, quantization_aware: , training: {epochs: 1}}]",
            "cannot pack layers in the training that makes them smaller",
        ),
    ],
)
def test_an_impossible_order_is_refused(steps: str, said: str) -> None:
    assert said in error_of(HEAD.replace("steps:\n", f"steps: {steps}\n"))


def test_a_late_order_problem_is_found_beside_a_wrong_value() -> None:
    said = error_of(HEAD + "  - quantization: {weights: int9}\n  - low_rank: {keep: 7}\n")
    assert said.startswith("3 problems")
    assert "needs float weights" in said and "int9" in said and "less than" in said


def test_a_recipe_made_in_python_obeys_the_same_order() -> None:
    late = methods()["low_rank"].config()
    quantize = methods()["quantization"].config()
    steps = (Step(name="q", methods=(quantize,)), Step(name="l", methods=(late,)))
    with pytest.raises(ConfigError, match="needs float weights"):
        Recipe(name="a", model="org/base", task="sst2", steps=steps)
    assert Recipe(name="a", model="org/base", task="sst2", steps=steps[::-1]).steps == steps[::-1]


def test_quantizing_comes_last_among_methods_of_one_step() -> None:
    (step,) = parse_recipe(HEAD + "  - {quantization: , low_rank: }\n", "r.yaml").steps
    assert [method_of(config).name for config in step.methods] == ["low_rank", "quantization"]


def test_overrides_address_methods_steps_and_plain_fields() -> None:
    recipe = parse_recipe(
        GOOD,
        "r.yaml",
        [
            "seed=7",
            "evaluation.batch_size=16",
            "steps.low_rank.keep=4e-1",
            "steps.low_rank.calibration=64",
            "steps.teach.training.epochs=1",
            "steps.structured_pruning.heads=0.25",
            "steps.distillation.temperature=4.0",
            "name=other",
        ],
    )
    teach, prune, factorise, _ = (step.to_dict() for step in recipe.steps)
    assert (recipe.seed, recipe.evaluation.batch_size, recipe.name) == (7, 16, "other")
    assert (factorise["low_rank"]["keep"], factorise["calibration"]) == (0.4, 64)
    assert teach["training"]["epochs"] == 1
    assert (prune["structured_pruning"]["heads"], prune["distillation"]["temperature"]) == (0.25, 4.0)


def test_an_override_can_mend_what_the_file_has_wrong() -> None:
    broken = with_line("keep: 0.6", "keep: 1.5")
    assert (
        parse_recipe(broken, "r.yaml", ["steps.low_rank.keep=0.5"]).steps[2]
        == parse_recipe(GOOD, "r.yaml", ["steps.low_rank.keep=0.5"]).steps[2]
    )


def test_an_override_can_add_a_part_that_was_left_out() -> None:
    recipe = parse_recipe(HEAD + "  - low_rank:\n", "r.yaml", ["push.repo=org/name", "steps.low_rank.keep=0.3"])
    assert recipe.push is not None and recipe.push.repo == "org/name"
    assert recipe.to_dict()["steps"][0]["low_rank"]["keep"] == 0.3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "steps.low_rank.keep=1.5",
            "--set steps.low_rank.keep=1.5: steps.low_rank.keep: should be less than",
        ),
        ("steps.low_rank.kep=0.5", "steps.low_rank.kep: unknown field; did you mean 'keep'?"),
        ("steps.low_rnk.keep=0.5", "no step is called 'low_rnk' or holds it; did you mean 'low_rank'?"),
        ("steps.teech.training.epochs=1", "did you mean 'teach'?"),
        ("sead=1", "--set sead=1: sead: unknown field; did you mean 'seed'?"),
        ("seed=no", "--set seed=no: seed: should be a valid integer, not 'no'"),
        ("seed.x=1", "seed holds no fields, so there is no 'x' in it"),
        ("steps=3", "steps: should be a list of steps"),
        ("seed", "should look like steps.low_rank.keep=0.4"),
        ("=1", "should look like steps.low_rank.keep=0.4"),
        ("seed..x=1", "should look like steps.low_rank.keep=0.4"),
        ("model=https://x", "a URL is not allowed"),
        ("data=!!python/name:os.system", "a tag"),
        ("steps.teach=3", "holds no fields"),
    ],
)
def test_a_wrong_override_is_a_problem_of_its_own(override: str, said: str) -> None:
    assert said in error_of(GOOD, override)


def test_an_ambiguous_override_names_the_steps() -> None:
    text = HEAD + "  - {name: a, low_rank: }\n  - {name: b, low_rank: }\n"
    assert "2 steps answer to 'low_rank' (a, b)" in error_of(text, "steps.low_rank.keep=0.5")
    recipe = parse_recipe(text, "r.yaml", ["steps.b.low_rank.keep=0.25"])
    assert [step.to_dict()["low_rank"]["keep"] for step in recipe.steps][1] == 0.25


def test_the_environment_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "s3cr3t")
    for text in ("$SECRET_OF_TEST", "${SECRET_OF_TEST}", "${oc.env:SECRET_OF_TEST}", "~/x"):
        assert "s3cr3t" not in error_of(with_line("demo/minilm-l6", f"'{text}'"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"name: a\nmodel: caf\xe9\n")
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 2))
    for name, said in {
        "quickstat.yaml": "no such file; did you mean",
        "gone/x.yaml": "no such file",
        ".": "is a folder, not a recipe",
        "latin.yaml": "latin.yaml:2: is not UTF-8 text",
        "big.yaml": "larger than",
        "nul\0.yaml": "cannot be read",
        "quickstart.yaml/x": "cannot be read",
    }.items():
        with pytest.raises(RecipeError, match=re.escape(said)):
            load_recipe(tmp_path / name)
    assert load_recipe(tmp_path / "quickstart.yaml").name == "quickstart"


def test_local_model_and_data_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = with_line("demo/minilm-l6", str(tmp_path)) + f"data: {tmp_path}\n"
    recipe = parse_recipe(text, "r.yaml")
    assert recipe.model == recipe.data == recipe.to_dict()["data"] == str(tmp_path)


RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in RECIPES:  # a recipe may begin with what another one makes
        result = tmp_path / "runs" / other.stem
        result.mkdir(parents=True)
        (result / "config.json").write_text("{}")
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.data is None, "a published recipe must not need a folder of one machine"


def test_fields_are_described_with_range_and_default() -> None:
    by_name = {entry["name"]: entry for entry in describe_fields(TrainingConfig)}
    assert by_name["batch_size"]["type"] == "int" and ">" in by_name["batch_size"]["allowed"]
    for method in methods().values():
        for entry in describe_fields(method.config):
            assert entry["description"], f"{method.name}.{entry['name']} tells nobody what it means"
            assert json.dumps(entry["default"]) is not None


_SCALARS = st.sampled_from(
    ["0", "1", "-1", "0.5", "1e-4", "true", "no", "null", "''", "x", "[]", "{}", "[1, 2]", "*a", "&a b",
     "!!x y", "http://x", "nan", "9" * 5000, '"\\0"', "[[[[", "%", "@", "`", "{a: b}", "- - -", "? a"]
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = GOOD
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        if draw(st.booleans()):
            values = [match.span(1) for match in re.finditer(r": ([^\n,{}]+)", text)]
            start, end = draw(st.sampled_from(values)) if values else (start, start)
            text = text[:start] + draw(_SCALARS) + text[end:]
        else:
            end = min(len(text), start + draw(st.integers(0, 12)))
            text = text[:start] + draw(st.text(max_size=6)) + text[end:]
    return text


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=mutated(),
    overrides=st.lists(
        st.text(max_size=20)
        | st.builds(
            "{}={}".format,
            st.sampled_from(
                [
                    "seed",
                    "steps.low_rank.keep",
                    "steps",
                    "steps.teach",
                    "push",
                    "evaluation.x.y",
                    "steps.teach.training",
                ]
            ),
            _SCALARS,
        ),
        max_size=2,
    ),
)
def test_no_mutation_raises_anything_but_a_recipe_error(text: str, overrides: list[str]) -> None:
    try:
        recipe = parse_recipe(text, "r.yaml", overrides)
    except RecipeError as error:
        str(error).encode()
    else:
        json.dumps(recipe.to_dict(), allow_nan=False)


DESCRIBED = """name: a
model: org/base
task:
  kind: token_classification
  data: org/data
  labels: [O, B-thing, I-thing]
steps:
  - training: {epochs: 1}
"""


def test_a_task_may_be_described() -> None:
    recipe = parse_recipe(DESCRIBED, "a.yaml", ["task.metrics=[overall_recall]", "task.config=small"])
    task = recipe.described_task
    assert (task.name, task.kind, task.columns, task.label) == ("data", "token_classification", ("tokens",), "ner_tags")
    assert task.metrics == ("overall_recall",) and (task.dataset, task.dataset_config) == ("org/data", "small")
    assert recipe.data_folder is None
    assert recipe.to_dict()["task"]["labels"] == ["O", "B-thing", "I-thing"]
    assert parse_recipe(json.dumps(recipe.to_dict()), "b.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("kind: token_classification", "kind: tagging"), 4, "task.kind: should be 'classification', "),
        (("data: org/data", "data: somewhere"), 5, r"task.data: should be a Hub id \(org/name\), or a folder"),
        (("data: org/data", "data: https://example.org/x"), 5, "task.data: a URL is not allowed"),
        (("data: org/data", "data: ./not-there"), 5, "task.data: there is no folder ./not-there"),
        (("data: org/data", "data: org/data\n  config: ../../etc"), 6, "task.config: should be letters"),
        (("labels: [O", "colums: [x]\n  labels: [O"), 6, "task.colums: unknown field; did you mean 'columns'"),
        (("[O, B-thing, I-thing]", "[O]"), 3, "needs the names of at least two labels"),
        (("[O, B-thing, I-thing]", "[O, A, A]"), 3, "each may be named once"),
        (
            ("  data", "  metrics: [./evil.py]\n  data"),
            3,
            "'./evil.py' is none of token_classification; allowed: overall_",
        ),
        (("token_classification", "causal_lm"), 3, "the answers of causal_lm are no labels"),
    ],
)
def test_a_wrong_description_of_a_task_is_refused_where_it_stands(
    change: tuple[str, str], line: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"a\.yaml:{line}: .*{message}"):
        parse_recipe(DESCRIBED.replace(*change), "a.yaml")
