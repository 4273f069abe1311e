"""A trained folder is held against the hashes it carries; what differs is named, and nothing else."""

import json
import shutil

import pytest
from conftest import PROJECT
from pipeline.models.provenance import check_provenance
from serving_world import TEMPLATE, VERBALISERS, make_student, shotless

from pipeline.errors import MismatchError, UsageError
from pipeline.evaluation.predict import predict_student
from pipeline.params import TaskParams
from pipeline.serving.student import open_student
from pipeline.task import Task

TASK = TaskParams(template=TEMPLATE, verbalisers=VERBALISERS)
ALL = ["weights or config", "tokenizer", "template, verbalisers or labels"]


@pytest.fixture
def folder(tmp_path, model_folder):
    return make_student(tmp_path / "artifacts" / "students" / "cd", model_folder("llama"))


def change_provenance(folder, **entries):
    file = folder / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | entries), "utf-8")


def of_weights(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}), "utf-8")


def of_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"padding": None}, indent=7), "utf-8")


def of_task(folder):
    change_provenance(folder, template="{text} It was")


def test_a_folder_as_training_left_it_is_taken_wherever_it_lies(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "elsewhere")
    found = check_provenance(tmp_path / "elsewhere")
    assert (found.name, found.task) == ("cd", TASK)
    found.check_task(TASK)


@pytest.mark.parametrize(("change", "what"), list(zip([of_weights, of_tokenizer, of_task], ALL, strict=True)))
@pytest.mark.parametrize("use", [lambda folder, work: open_student(folder), lambda folder, work: evaluate(folder, work)])
def test_a_changed_file_is_refused_by_everything_that_asks_a_student_and_alone_is_named(tmp_path, folder, change, what, use):
    change(folder)
    with pytest.raises(MismatchError) as caught:
        use(folder, tmp_path / "work")
    text = str(caught.value)
    assert [name for name in ALL if f"\n  {name}: sha256 " in text] == [what]
    assert "dvc repro" in text


def evaluate(folder, work):
    """With params.yaml's template changed along with the folder's, so that it is the folder itself that is held against its hashes."""
    template = json.loads((folder / "provenance.json").read_text("utf-8"))["template"]
    return predict_student("cd", {"": folder}, Task(TASK.model_copy(update={"template": template})), {}, work, 1)


def test_all_that_differs_is_named_at_once(folder):
    for change in (of_weights, of_tokenizer, of_task):
        change(folder)
    with pytest.raises(MismatchError) as caught:
        check_provenance(folder)
    assert all(name in str(caught.value) for name in ALL)


def test_a_provenance_without_its_hashes_cannot_be_checked(folder):
    file = folder / "provenance.json"
    entries = json.loads(file.read_text("utf-8"))
    del entries["tokenizer_sha256"]
    file.write_text(json.dumps(entries), "utf-8")
    with pytest.raises(UsageError, match=r"no entry 'tokenizer_sha256'.*dvc repro"):
        check_provenance(folder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"template": "{text} It was"}, "template"), ({"verbalisers": dict(reversed(VERBALISERS.items()))}, "verbalisers")],
)
def test_another_task_than_in_training_is_refused_and_the_order_of_labels_counts(folder, changes, what):
    with pytest.raises(MismatchError, match=f"trained with {what} .*params.yaml has"):
        check_provenance(folder).check_task(TASK.model_copy(update=changes))


@pytest.mark.parametrize("command", [["predict", "--input", "x.jsonl"], ["serve"], ["monitor", "--inputs", "x.jsonl"]])
def test_a_students_name_stands_for_the_task_of_params_yaml_and_its_path_for_itself(tmp_path, folder, command):
    (tmp_path / "x.jsonl").write_text('{"text": "a warm film"}\n', "utf-8")
    shutil.copyfile(PROJECT / "params.yaml", tmp_path / "params.yaml")
    refused = shotless(tmp_path, *command, "--student", "cd", check=False)
    assert refused.returncode == 2
    assert "artifacts/students/cd: trained with verbalisers" in refused.stderr
    if command[0] == "predict":
        assert shotless(tmp_path, *command, "--student", "artifacts/students/cd", "--threads", "1").returncode == 0
