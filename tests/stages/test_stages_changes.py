"""What `dvc repro` runs after each thing that a result depends on has changed. Read from DVC, over a lock as after a run."""

import os
import re
import subprocess
import sys

import pytest
from conftest import DVC
from small_project import write_lines

from pipeline.commands.reproduce import due_stages
from pipeline.params import reading

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")]  # DVC's own, in pygtrie
LAST = {"select", "cost", "compare", "report"}


def of(name, *kinds):
    return {f"{kind}@{name}" for kind in kinds}


def test_nothing_runs_after_nothing_changed(dag):
    assert dag.changed() == set()


def test_what_a_run_calls_due_is_what_dvc_runs(dag):
    due, total = due_stages(dag.folder, [])
    assert not due
    dag.change(MORE["a student"][0])
    due, more = due_stages(dag.folder, [])
    assert set(due) - {"params"} == dag.after(dag.changed())
    assert due["evaluate@more"] == {"params", "student@more"}
    assert more == total + 3
    assert due_stages(dag.folder, ["targets@mix"])[0] == {"params": set()}, "what a target does not need is not due"


def test_a_row_added_to_a_local_file_runs_its_source_and_what_follows(dag):
    with (dag.folder / "my" / "pile.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    assert dag.changed() == {"source@pile"}
    after = dag.after({"source@pile"})
    assert {"prepare", "teacher@few_shot", "targets@mix", "student@cd", "evaluate@cd", *LAST} <= after
    assert not any(name.startswith(("download@", "model@")) or name == "source@gold" for name in after)


def test_a_local_model_that_changed_is_taken_again(dag):
    (dag.folder / "my" / "model" / "config.json").write_text('{"a": 1}', "utf-8")
    assert dag.changed() == {"model@tiny"}
    assert {"prepare", "tune@tuned", "student@cd"} <= dag.after({"model@tiny"})


def test_a_default_that_changed_in_code_runs_what_depends_on_it(dag):
    file = dag.folder / "pipeline" / "params" / "methods.py"
    text = file.read_text("utf-8")
    assert "warmup: Fraction = 0.1\n" in text
    file.write_text(text.replace("warmup: Fraction = 0.1\n", "warmup: Fraction = 0.2\n"), "utf-8")
    dag.resolve_with_own_code()
    assert dag.changed() == {"tune@tuned", "student@cd", "student@pbft", "student@small", *LAST}


def test_the_order_of_labels_runs_nothing(dag):
    dag.change(lambda raw: raw["task"].update(verbalisers=dict(reversed(raw["task"]["verbalisers"].items()))))
    assert dag.changed() == set()


@pytest.mark.parametrize(
    ("library", "first"),
    [
        (
            "torch",
            {
                "model@tiny",
                "model@big",
                "prepare",
                "tune@tuned",
                "teacher@few_shot",
                "student@cd",
                "evaluate@cd",
                "baseline@each",
                "risk@cd",
            },
        ),
        ("polars", {"source@pile", "source@gold", "prepare", "targets@mix", "evaluate@cd", "risk@cd", "compare"}),
        ("vl-convert-python", {"report"}),
    ],
)
def test_another_version_of_a_library_runs_what_it_computes(dag, monkeypatch, library, first):
    real = reading.version
    monkeypatch.setattr(reading, "version", lambda name: "99.0" if name == library else real(name))
    constraints = dag.folder / "constraints.txt"
    constraints.write_text(re.sub(rf"(?m)^{library}==.*$", f"{library}==99.0", constraints.read_text("utf-8")), "utf-8")
    reading.resolve(dag.folder)
    changed = dag.changed()
    assert first <= changed
    assert not any(name.startswith("download@") for name in changed)
    if library == "vl-convert-python":
        assert changed == first
    if library == "polars":
        assert not any(name.startswith(("model@", "teacher@", "student@", "tune@")) for name in changed)


MORE = {
    "a source": (
        lambda raw: raw["data"]["sources"].update(more={"path": "my/more.jsonl", "label": None}),
        {"source@more", "prepare", "report"},
    ),
    "a model": (lambda raw: raw["models"].update(more={"path": "my/model"}), {"model@more", "report"}),
    "a teacher": (
        lambda raw: raw["teachers"].update(more={"model": "models/tiny", "contexts": "orders"}),
        {"teacher@more", "prepare", "report"},
    ),
    "a target set": (lambda raw: raw["targets"].update(more={"teachers": {"tuned": 1.0}}), {"targets@more", "report"}),
    "a round": (lambda raw: raw["rounds"].update(more={"student": "pbft"}), {"round@more", "report"}),
    "a student": (
        lambda raw: raw["students"].update(more=raw["students"]["cd"] | {"seed": 1}),
        {*of("more", "student", "evaluate", "risk"), *LAST},
    ),
    "a student of a round": (
        lambda raw: raw["students"].update(more=raw["students"]["small"] | {"seed": 1}),
        {*of("more", "student", "evaluate", "risk"), *LAST},
    ),
    "a baseline": (
        lambda raw: raw["baselines"].update(more={"prompts": "targets/plain", "contexts": "ensemble"}),
        {"baseline@more", *LAST},
    ),
    "a download": (lambda raw: raw["downloads"].update(more=raw["downloads"]["model"]), {"download@more", "report"}),
}


@pytest.mark.parametrize("what", MORE)
def test_one_more_costs_only_itself(dag, what):
    write_lines(dag.folder / "my" / "more.jsonl", [{"text": "more"}])
    change, expected = MORE[what]
    dag.change(change)
    assert dag.changed() == expected


def test_a_source_may_have_any_name_and_be_a_folder_of_any_name(dag):
    paths = {"007": "my/ö {x} $y.d", "true": "my/[0] & 'q';.d", "no": "my/${name}"}
    stages = {f"source@{name}" for name in paths}
    for path in paths.values():
        (dag.folder / path).mkdir()
        write_lines(dag.folder / path / "part-0.jsonl", [{"text": "more"}])
    dag.change(lambda raw: raw["data"]["sources"].update({n: {"path": p, "format": "jsonl", "label": None} for n, p in paths.items()}))
    assert dag.changed() == {*stages, "prepare", "report"}
    environment = os.environ | {"SHOTLESS_PYTHON": sys.executable}
    subprocess.run([*DVC, "repro", "--single-item", *sorted(stages)], cwd=dag.folder, env=environment, check=True)
    assert dag.changed() == {"prepare", "report"}
    for path in paths.values():
        write_lines(dag.folder / path / "part-1.jsonl", [{"text": "and more"}])
    assert dag.changed() == {*stages, "prepare", "report"}


EDITS = {
    "a student's learning rate": (lambda raw: raw["students"]["cd"].update(learning_rate=1e-4), {"student@cd", *LAST}),
    "a student's seeds": (lambda raw: raw["students"]["cd"].update(seeds=[0, 1]), {*of("cd", "student", "evaluate", "risk"), *LAST}),
    "a teacher's cache": (lambda raw: raw["teachers"]["few_shot"].update(cache={"top_k": 4}), {"teacher@few_shot", "report"}),
    "a target set's temperature": (lambda raw: raw["targets"]["mix"].update(temperature=0.5), {"targets@mix", "report"}),
    "a round's temperature": (lambda raw: raw["rounds"]["second"].update(temperature=0.5), {"round@second", "report"}),
    "the pool": (lambda raw: raw["data"]["pool"].update(limit=1), {"prepare", "report"}),
    "a baseline's contexts": (lambda raw: raw["baselines"]["each"].update(contexts="ensemble"), {"baseline@each", *LAST}),
    "a tuned teacher's steps": (lambda raw: raw["tuned"]["tuned"].update(steps=3), {"tune@tuned", "report"}),
    "a label's threshold": (
        lambda raw: raw["data"]["sources"]["gold"]["label"].update(threshold=0.5),
        {"source@gold", "prepare", "report"},
    ),
    "a slice": (lambda raw: raw["data"]["sources"]["gold"].update(slices={"stars": "stars"}), {"source@gold", "prepare", "report"}),
    "a context's number": (lambda raw: raw["contexts"]["orders"].update(count=1), {"prepare", "report"}),
    "the examples of risk checks": (
        lambda raw: raw["evaluation"].update(risk_examples=3),
        {"risk@cd", "risk@pbft", "risk@small", "compare", "report"},
    ),
    "the texts of the cost table": (lambda raw: raw["evaluation"].update(cost_examples=3), {"cost", "compare", "report"}),
    "the limit of the choice": (lambda raw: raw.update(select={"within_ms": 5}), {"select", "report"}),
    "the threads": (lambda raw: raw.update(runtime={"threads": 1}), set()),
    "the monitor": (lambda raw: raw.update(monitor={"max_rows": 100}), set()),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_costs_only_what_depends_on_it(dag, what):
    change, expected = EDITS[what]
    dag.change(change)
    assert dag.changed() == expected


def test_other_texts_in_the_pool_run_its_rounds_and_their_students_alone(dag):
    (dag.folder / "artifacts/data/pool.parquet").write_text("other texts", "utf-8")
    assert dag.changed() == {"prepare", "round@second", "report"}  # the first for its outs, which it would write again
    assert dag.after({"round@second"}) == {"round@second", *of("small", "student", "evaluate", "risk"), *LAST}


def test_no_evaluation_reaches_the_choice_of_the_student(dag):
    assert "select" in dag.after({"student@cd"}) & dag.after({"targets@mix"})
    assert not any("select" in dag.after({stage}) for stage in ("evaluate@cd", "risk@cd", "baseline@teacher", "compare"))
    (dag.folder / "artifacts/data/evaluation/test.parquet").write_text("other texts", "utf-8")
    assert "select" not in dag.changed()


def test_nothing_behind_the_cache_starts_a_teacher(dag):
    for stages in ({"student@cd"}, {"targets@mix"}, {"baseline@each"}, {"risk@cd"}):
        assert not any(name.startswith(("teacher@", "tune@", "prepare")) for name in dag.after(stages))


@pytest.mark.parametrize(
    ("file", "runs", "not_runs"),
    [
        ("pipeline/students/train.py", "student@cd", "teacher@few_shot"),
        ("pipeline/evaluation/metrics.py", "evaluate@cd", "student@cd"),
        ("pipeline/report/page.py", "report", "compare"),
        ("pipeline/teachers/scorer.py", "teacher@few_shot", "student@cd"),
        ("pipeline/teachers/scorer.py", "round@second", "student@small"),
        ("pipeline/data/roles.py", "prepare", "download@model"),
        ("pipeline/targets/build.py", "targets@mix", "teacher@few_shot"),
        ("pipeline/serving/server.py", None, "student@cd"),
    ],
)
def test_changed_code_runs_the_stages_of_its_folder(dag, file, runs, not_runs):
    path = dag.folder / file
    path.write_text((path.read_text("utf-8") if path.exists() else "") + "# changed\n", "utf-8")
    changed = dag.changed()
    assert not_runs not in changed
    assert runs in changed if runs else changed == set()
