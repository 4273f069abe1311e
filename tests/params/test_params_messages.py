"""What params.yaml refuses, and that the message names the place, the value and the choices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.params import load_params, parse_params

Raw = dict[str, Any]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def message(raw: Any) -> str:
    with pytest.raises(UsageError) as error:
        parse_params(raw)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_shipped_file_is_valid_and_frozen(raw_params: Raw) -> None:
    params = parse_params(raw_params)
    assert params.data.sources["amazon"].origin.licence == "MIT", "YAML merge keys carry the origin over"
    with pytest.raises(ValueError, match="frozen"):
        params.data.seed = 1  # type: ignore[misc]


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "params.yaml").read_text(encoding="utf-8")
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("learning_rate: 5e-5", "learning_rate: 1e-4"), encoding="utf-8")
    assert load_params(path).students["cd"].learning_rate == 1e-4


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda raw: raw, ["params.yaml: lr: unknown key", "students", "teachers"]),
        (lambda raw: raw["students"]["cd"], ["students.cd.lr: unknown key", "learning_rate"]),
        (lambda raw: raw["data"]["sources"]["movie"], ["data.sources.movie.lr: unknown key", "columns"]),
        (lambda raw: raw["data"]["sources"]["movie"]["label"], ["data.sources.movie.label.lr: unknown key", "threshold"]),
        (lambda raw: raw["data"]["sources"]["movie"]["origin"], ["data.sources.movie.origin.lr: unknown key", "member"]),
        (lambda raw: raw["models"]["smollm2"], ["models.smollm2.lr: unknown key", "member"]),
        (lambda raw: raw["data"]["evaluation"]["movie"], ["data.evaluation.movie.lr: unknown key", "domain"]),
    ],
)
def test_an_unknown_key_is_named_with_the_keys_there_are(raw_params: Raw, place: Callable[[Raw], Raw], expected: list[str]) -> None:
    place(raw_params)["lr"] = 1
    found = message(raw_params)
    assert all(part in found for part in expected), found


def test_names_that_are_also_keys_or_kinds_of_origin_keep_their_place(raw_params: Raw) -> None:
    raw_params["models"]["local"] = {"source": "local", "path": "m", "lr": 1}
    raw_params["data"]["sources"]["hub"] = {**raw_params["data"]["sources"]["movie"], "lr": 1}
    raw_params["teachers"]["model"] = {"model": "models/smollm2", "contexts": "none", "lr": 1}
    found = message(raw_params)
    assert "models.local.lr: unknown key; there are: licence, obtain, path, sha256, source" in found
    assert "data.sources.hub.lr: unknown key; there are: columns, completion, fields" in found
    assert "teachers.model.lr: unknown key; there are: cache, contexts, dtype, model" in found


def test_all_faults_are_named_at_once(raw_params: Raw) -> None:
    raw_params["students"]["cd"]["steps"] = "many"
    raw_params["data"]["seed"] = 0.5
    del raw_params["students"]["pbft"]["base"]
    found = message(raw_params)
    assert "students.cd.steps: input should be a valid integer, found 'many'" in found
    assert "data.seed" in found
    assert "students.pbft.base: missing" in found
    assert len(found.splitlines()) == 3


def test_a_number_where_a_text_belongs_is_told_to_be_quoted(raw_params: Raw) -> None:
    raw_params["models"]["smollm2"]["version"] = 0.1
    assert "models.smollm2.version: input should be a valid string, found 0.1; put it in quotes" in message(raw_params)


@pytest.mark.parametrize("source", [None, "pipy"])
def test_an_origin_without_a_known_kind_names_the_kinds(raw_params: Raw, source: str | None) -> None:
    raw_params["models"]["smollm2"] = {"package": "x"} | ({} if source is None else {"source": source})
    found = message(raw_params)
    assert "models.smollm2.source" in found
    assert "hub, local, pypi" in found


def test_a_hub_name_without_a_commit_is_refused(raw_params: Raw) -> None:
    raw_params["models"]["smollm2"] = {"source": "hub", "repo": "owner/name", "licence": "MIT"}
    assert "models.smollm2.revision: missing" in message(raw_params)
    raw_params["models"]["smollm2"]["revision"] = "main"
    found = message(raw_params)
    assert "revision 'main' of owner/name is not a commit" in found
    raw_params["models"]["smollm2"]["revision"] = COMMIT
    assert parse_params(raw_params).models["smollm2"].licence == "MIT"


@pytest.mark.parametrize("member", ["/etc/passwd", "a/../../b"])
def test_an_inner_path_cannot_leave_its_archive(raw_params: Raw, member: str) -> None:
    raw_params["models"]["smollm2"]["member"] = [member]
    assert "leaves the folder" in message(raw_params)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw["data"]["transfer"].update(source="films"), "data.transfer.source: no 'films'; choose one of: amazon"),
        (lambda raw: raw["data"]["evaluation"]["movie"].update(source="x"), "data.evaluation.movie.source: no 'x'"),
        (lambda raw: raw["teachers"]["few_shot"].update(contexts="x"), "teachers.few_shot.contexts: no 'x'; choose one of: none, orders"),
        (lambda raw: raw["teachers"]["few_shot"].update(model="smollm2"), "teachers.few_shot.model: no 'smollm2'"),
        (lambda raw: raw["targets"]["mix"]["teachers"].update(x=1.0), "targets.mix.teachers: no 'x'"),
        (lambda raw: raw["students"]["cd"].update(learn_from="mix"), "students.cd.learn_from: no 'mix'; choose one of: data/"),
        (lambda raw: raw["baselines"]["icl"].update(prompts="targets/x"), "baselines.icl.prompts: no 'targets/x'"),
        (lambda raw: raw["evaluation"].update(reference="cd"), "evaluation.reference: no 'cd'"),
        (lambda raw: raw["contexts"]["none"].update(tokenizer="students/cd"), "contexts.none.tokenizer: no 'students/cd'"),
        (lambda raw: raw["data"]["sources"]["movie"].update(fields={"txt": "text"}), "data.sources.movie.fields: no 'txt'"),
    ],
)
def test_a_name_that_points_nowhere_is_named_with_its_choices(raw_params: Raw, change: Callable[[Raw], None], expected: str) -> None:
    change(raw_params)
    assert expected in message(raw_params)


@pytest.mark.parametrize(
    ("change", "circle"),
    [
        (lambda raw: raw["students"]["cd"].update(base="students/cd"), "students.cd, students.cd"),
        (
            lambda raw: raw["teachers"].update(second={"model": "students/cd", "contexts": "none"}),
            "students.cd, teachers.second, targets.mix, students.cd: each",
        ),
    ],
)
def test_what_would_have_to_be_there_before_itself_is_refused(raw_params: Raw, change: Callable[[Raw], None], circle: str) -> None:
    change(raw_params)
    told = message(raw_params)
    assert circle in told
    assert "source: local" in told


def test_a_student_that_learns_the_labels_may_teach(raw_params: Raw) -> None:
    raw_params["students"]["tuned"] = {
        "base": "models/smollm2", "learn_from": "data/demonstrations.parquet", "steps": 1, "learning_rate": 1e-5,
    }  # fmt: skip
    raw_params["teachers"]["second"] = {"model": "students/tuned", "contexts": "none"}
    assert "second" in parse_params(raw_params).teachers


def test_a_demonstration_set_too_small_for_a_context_is_refused(raw_params: Raw) -> None:
    raw_params["contexts"]["orders"]["demonstrations"] = 20
    assert "contexts.orders.demonstrations: 20 asked for, and data.demonstrations.per_label draws only 16" in message(raw_params)


def test_a_label_without_a_verbaliser_is_refused(raw_params: Raw) -> None:
    raw_params["data"]["sources"]["movie"]["label"] = {"column": "rating", "values": {"1": "good", "0": "negative"}}
    found = message(raw_params)
    assert "data.sources.movie.label: good has no verbaliser" in found
    assert "negative, positive" in found


def test_a_role_that_needs_labels_refuses_a_source_without(raw_params: Raw) -> None:
    raw_params["data"]["sources"]["movie"]["label"] = None
    assert "has no labels" in message(raw_params)


def test_two_label_rules_at_once_are_refused(raw_params: Raw) -> None:
    raw_params["data"]["sources"]["movie"]["label"] = {"column": "rating", "threshold": 1.0, "values": {"a": "positive"}}
    assert "not both" in message(raw_params)


def test_columns_are_for_files_that_can_lack_a_header(raw_params: Raw) -> None:
    raw_params["data"]["sources"]["movie"]["format"] = "jsonl"
    assert "`columns` is for a csv or tsv file" in message(raw_params)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Review:", "names no field"),
        ("Review: {text!r}", "not a plain field name"),
        ("Review: {0}", "not a plain field name"),
        ("Review: {text", "template"),
        ("Review: {label}", "reserved"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(raw_params: Raw, template: str, expected: str) -> None:
    raw_params["task"]["template"] = template
    assert expected in message(raw_params)


@pytest.mark.parametrize("name", ["Few Shot", "a/b", "", "-x"])
def test_names_are_slugs(raw_params: Raw, name: str) -> None:
    raw_params["teachers"][name] = raw_params["teachers"]["few_shot"]
    assert "as DVC stages need" in message(raw_params)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"task: [", "not valid YAML"),
        (b"task: 1\ntask: 2\n", "task"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"", "expected a mapping"),
        (b"- 1\n", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_params_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        load_params(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_params(tmp_path / "params.yaml")


def test_each_context_of_teachers_that_share_contexts_is_refused(raw_params):
    raw_params["teachers"]["again"] = {"model": "models/smollm2", "contexts": "none"}
    raw_params["targets"]["both"] = {"teachers": {"zero_shot": 1.0, "again": 1.0}}
    raw_params["baselines"]["both"] = {"prompts": "targets/both", "contexts": "each"}
    with pytest.raises(UsageError, match=r"baselines\.both\.contexts: `each`, and teachers of 'targets/both' share the contexts none"):
        parse_params(raw_params)
    raw_params["baselines"]["both"]["contexts"] = "ensemble"
    parse_params(raw_params)


@pytest.mark.parametrize("name", ["label", "length", "domain"])
def test_a_slice_that_every_evaluation_has_cannot_be_named_again(raw_params: Raw, name: str) -> None:
    raw_params["data"]["sources"]["movie"]["slices"] = {name: "rating", "mine": "id"}
    assert f"data.sources.movie: slices: every evaluation has a slice {name} of its own" in message(raw_params)
