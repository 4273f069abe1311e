"""`shotless init`: params for a user's own files, which a run then accepts; nothing overwritten unasked; wrong files named."""

import json
import shutil

import polars as pl
import pytest
from conftest import PROJECT
from ruamel.yaml import YAML
from serving_world import shotless

from pipeline.params import load_params
from pipeline.setup.estimate import ADAM_COPIES, PROCESS_BYTES, Trial, peak_bytes, token_work

OPTIONS = ["--labelled", "mine/labelled.csv", "--unlabelled", "mine/pile.jsonl", "--test", "mine/test.parquet"]
MAPPED = [*OPTIONS, "--field", "text=body", "--label-column", "urgency", "--verbaliser", "0=bad", "--verbaliser", "1=good"]


@pytest.fixture
def folder(tmp_path):
    """A project's folder with a user's files: texts in `body`, labels 0 and 1 in `urgency`."""
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    rows = [{"body": f"the service was late, number {n}", "urgency": n % 2} for n in range(40)]
    pl.DataFrame(rows).write_csv(mine / "labelled.csv")
    pl.DataFrame(rows[:20]).write_parquet(mine / "test.parquet")
    (mine / "pile.jsonl").write_text("".join(json.dumps({"body": f"cold food, table {n}"}) + "\n" for n in range(30)), "utf-8")
    return tmp_path


def test_what_is_written_is_accepted_and_names_the_users_files(folder):
    done = shotless(folder, "init", *MAPPED, "--force", "--template", r"Ticket: {text}\nUrgent:", "--per-label", "4")
    params = load_params(folder / "params.yaml")
    assert params.task.template == "Ticket: {text}\nUrgent:"
    assert dict(params.task.verbalisers) in ({"0": " bad", "1": " good"}, {"1": " good", "0": " bad"})
    assert params.data.sources["unlabelled"].label is None
    assert params.data.sources["labelled"].fields == {"text": "body"}
    assert params.contexts["orders"].demonstrations == 8
    assert "40 rows, 40 usable, 0 bad" in done.stdout
    assert "is not fetched yet" in done.stdout
    assert (folder / "params.yaml.old").read_text("utf-8") == (PROJECT / "params.yaml").read_text("utf-8")
    old = load_params(PROJECT / "params.yaml")
    assert (params.models, params.students, params.teachers) == (old.models, old.students, old.teachers)


def test_it_says_what_a_run_will_cost_where_the_model_is_there(folder, model_folder):
    shutil.copytree(model_folder("llama"), folder / "artifacts" / "models" / "smollm2")
    yaml = YAML(typ="safe", pure=True)
    raw = yaml.load((folder / "params.yaml").read_text("utf-8"))
    for student in raw["students"].values():
        student["layers"] = "0-1, 3"
    yaml.dump(raw, folder / "params.yaml")
    done = shotless(folder, "init", *MAPPED, "--output", "other.yaml")
    assert "smollm2 on 20 rows" in done.stdout
    assert "A full run takes about" in done.stdout
    assert "GB of memory" in done.stdout


def test_nothing_is_replaced_unless_told(folder):
    before = (folder / "params.yaml").read_text("utf-8")
    done = shotless(folder, "init", *MAPPED, check=False)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (folder / "params.yaml").read_text("utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (OPTIONS, "no column 'label'; the columns are: body, urgency. Name the right one with --label-column."),
        ([*OPTIONS, *MAPPED[8:]], "no column 'text'; the columns are: body, urgency. Name the right one with --field text=COLUMN."),
        (MAPPED[:-2], "label '1' is no word: say what a model should answer for each of them: --verbaliser 1=WORD"),
        ([*MAPPED, "--verbaliser", "2=maybe"], "--verbaliser 2=…: no such label"),
        ([*MAPPED, "--template", "no field"], "template names no field"),
        ([*MAPPED, "--per-label", "30"], "has 20 usable rows"),
        ([*MAPPED[:-6], "--label-column", "body"], "column 'body' has 40 different values"),
        (MAPPED[2:], "--labelled: missing"),
        (["--labelled", "mine/nope.csv", *MAPPED[2:]], "nope.csv: no such file"),
    ],
)
def test_what_cannot_work_is_named_and_writes_nothing(folder, arguments, said):
    done = shotless(folder, "init", *arguments, "--output", "new.yaml", check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (folder / "new.yaml").exists()


def test_bad_rows_beyond_the_limit_stop_it(folder):
    with (folder / "mine" / "pile.jsonl").open("a", encoding="utf-8") as file:
        file.write("not json\n" * 20)
    done = shotless(folder, "init", *MAPPED, "--output", "new.yaml", check=False)
    assert done.returncode == 2
    assert "20 of 50 rows of pile.jsonl cannot be used" in done.stderr


def test_work_is_counted_as_the_stages_do_it():
    params = load_params(PROJECT / "params.yaml")
    trial = Trial(1000.0, 30.0, 33.0, 10**6, 2 * 10**4, 30, "shared_prefix")
    work = token_work(params, trial, transfer=800, evaluated=600)
    assert work["teachers"] == 4 * (16 * 33 + 800 * 30) + 2 * 800 * 30
    assert work["training"] == pytest.approx(3 * 30 * (24 / 30 * (150 * 8 + 40 * 16) + 24 * 16))
    assert work["students"] == pytest.approx(2 * 600 * 30 * 24 / 30)
    assert work["baselines"] == 4 * (16 * 33 + 600 * 30) + 2 * 600 * 30
    assert peak_bytes(params, trial) == PROCESS_BYTES + 4 * ADAM_COPIES * 10**6  # the tuned teacher is whole
    cut = params.model_copy(update={"tunings": {}})
    assert peak_bytes(cut, trial) == PROCESS_BYTES + 4 * ADAM_COPIES * (10**6 - 6 * 2 * 10**4)


def test_every_param_that_a_stage_tracks_stands_in_what_is_written(folder):
    shotless(folder, "init", *MAPPED, "--force")
    yaml = YAML(typ="safe", pure=True)
    raw = yaml.load((folder / "params.yaml").read_text("utf-8"))
    stages = yaml.load((PROJECT / "dvc.yaml").read_text("utf-8"))["stages"]
    tracked = {key for stage in stages.values() for key in stage.get("do", stage)["params"] if "$" not in key}
    assert "task.template" in tracked
    for key in tracked:
        entry = raw
        for part in key.split("."):
            assert part in entry, f"dvc would stop at {key}"
            entry = entry[part]


def test_asking_again_keeps_the_first_params_and_bad_rows_are_shown(folder):
    with (folder / "mine" / "labelled.csv").open("a", encoding="utf-8") as file:
        file.write("more of it,0\n" + "".join(f"a clean table {n},1\n" for n in range(20)) + ",1\n")
    for _ in range(2):
        done = shotless(folder, "init", *MAPPED, "--force")
        assert "62 rows, 61 usable, 1 bad\n  line 63: body: empty\n" in done.stdout
        assert (folder / "params.yaml.old").read_text("utf-8") == (PROJECT / "params.yaml").read_text("utf-8")
