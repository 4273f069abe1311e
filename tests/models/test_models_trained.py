"""A trained folder is compared with its manifest; what differs is named, and nothing else."""

import json
import shutil

import pytest

from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.files import write_manifest
from pipeline.models.folders import load_tokenizer, model_files
from pipeline.models.trained import about_trained, open_trained
from pipeline.params import CompletionParams, TaskParams
from pipeline.task import Task, TaskTokens

TASK = TaskParams(template="Review: {text}\nSentiment:", verbalisers={"positive": " good", "negative": " bad"})


def make(source, folder, params=TASK):
    shutil.copytree(source, folder)
    tokens = TaskTokens(Task(params), load_tokenizer(folder))
    write_manifest(folder, about_trained(folder.name, tokens, {"steps": 7}), [file.name for file in model_files(folder)])
    return folder


@pytest.fixture
def folder(tmp_path, model_folder):
    return make(model_folder("llama"), tmp_path / "students" / "cd")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_a_folder_as_training_left_it_is_taken_wherever_it_is(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("a card", "utf-8")
    found = open_trained(tmp_path / "elsewhere")
    assert (found.name, found.task.params, found.manifest["steps"]) == ("cd", TASK, 7)
    assert found.manifest["labels"] == ["negative", "positive"]
    assert found.manifest["completions"] == dict(zip(["negative", "positive"], found.tokens.completions, strict=True))
    found.check_task(TASK)


def test_a_student_of_free_text_has_no_labels(tmp_path, model_folder):
    params = TaskParams(template="{text} =", completion=CompletionParams(max_tokens=9))
    found = open_trained(make(model_folder("llama"), tmp_path / "free", params))
    assert (found.task.params, found.manifest["labels"], found.manifest["completions"]) == (params, [], {})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("change", ["edited", "cut", "gone"])
def test_every_file_that_differs_is_named_and_no_other(folder, name, change):
    path = folder / name
    data = path.read_bytes()
    path.unlink() if change == "gone" else path.write_bytes(data[:-1] + (b" " if change == "edited" else b""))
    with pytest.raises(CorruptError) as caught:
        open_trained(folder)
    assert [file.name for file in model_files(folder) if f"{file}: " in str(caught.value)] == ([name] if change != "gone" else [])
    assert f"{path}: {'missing' if change == 'gone' else ''}" in str(caught.value)
    assert "dvc repro" in str(caught.value)


def test_a_folder_without_a_manifest_is_not_a_student(model_folder):
    with pytest.raises(UsageError, match=r"manifest\.json: no such file.* Is .* a student's folder"):
        open_trained(model_folder("llama"))


@pytest.mark.parametrize("entry", ["task", "name", "completions"])
def test_a_manifest_that_lacks_an_entry_is_refused(folder, entry):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest[entry]
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(CorruptError, match=f"not a trained model's manifest .*{entry}"):
        open_trained(folder)


def test_a_student_of_an_earlier_version_is_to_be_trained_again(folder):
    task = json.loads((folder / "manifest.json").read_text("utf-8"))["task"]
    edit(folder / "manifest.json", task=task | {"max_chars": 2000})
    with pytest.raises(MismatchError, match=r"another version of shotless \(task\.max_chars: Extra inputs .* again with `dvc repro`"):
        open_trained(folder)


def test_a_library_that_gives_a_verbaliser_other_ids_is_refused(folder):
    completions = json.loads((folder / "manifest.json").read_text("utf-8"))["completions"]
    edit(folder / "manifest.json", completions=completions | {"positive": [1, 2]})
    with pytest.raises(MismatchError, match=r"verbaliser of 'positive' into \[.*and it was trained with \[1, 2\]"):
        open_trained(folder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"template": "{text} It was"}, "template"), ({"verbalisers": {"positive": " good", "negative": " so"}}, "verbalisers")],
)
def test_another_task_than_in_training_is_refused(folder, changes, what):
    with pytest.raises(MismatchError, match=rf"trained with task\.{what} .*params\.yaml has"):
        open_trained(folder).check_task(TASK.model_copy(update=changes))


def test_the_order_of_the_labels_does_not_matter(folder):
    open_trained(folder).check_task(TASK.model_copy(update={"verbalisers": dict(reversed(TASK.verbalisers.items()))}))
