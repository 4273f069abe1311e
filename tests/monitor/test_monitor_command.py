"""`shotless monitor` as a user runs it: exit codes, files, thresholds, the predictions log read back."""

import json
import re
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from conftest import PROJECT
from ruamel.yaml import YAML
from serving_world import VERBALISERS, make_student, shotless

from pipeline.files import example_id
from pipeline.params import MonitorParams
from pipeline.schema import examples, write_table

NOUNS = ["film", "plot", "picture", "actors", "minute", "mess", "service", "food"]
WORDS = ["a warm", "a dull, lifeless", "the strange", "every", "this little", "bored and", "funny", "late cold", "terrible", "I loved"]


def texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(f"{rng.choice(WORDS)} {rng.choice(NOUNS)}" for _ in range(1 + rng.poisson(2))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path, model_folder):
    """A project's folder: a student, a transfer set, params with light settings."""
    make_student(tmp_path / "artifacts" / "students" / "cd", model_folder("llama"))
    drawn = list(dict.fromkeys(texts(0, 150)))
    rows = [{"example_id": example_id({"text": t}), "label": None, "source": "s", "line": n, "text": t} for n, t in enumerate(drawn)]
    write_table(pa.Table.from_pylist(rows, examples(["text"])), tmp_path / "artifacts" / "data" / "transfer.parquet")
    yaml = YAML()
    params = yaml.load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["task"]["verbalisers"] = VERBALISERS
    params["monitor"] = {"permutations": 599, "min_accuracy": 0.5}
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    alike = [{"text": t} for t in dict.fromkeys(texts(1, 80))]
    other = [{"text": f"x great N/A x great {n} N/A x x x x x {t}"} for n, t in enumerate(texts(2, 60))]
    for name, lines in {"alike": alike, "other": other}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return tmp_path


def monitor(folder, *arguments, check=False):
    return shotless(folder, "monitor", "--student", "cd", "--threads", "1", *arguments, check=check)


def test_inputs_like_the_transfer_set_end_with_0_and_others_with_3(folder):
    well = monitor(folder, "--inputs", "alike.jsonl")
    assert well.returncode == 0, well.stdout + well.stderr
    assert "No alarm" in well.stdout
    document = json.loads((folder / "report" / "monitor.json").read_text("utf-8"))
    assert (document["due"], document["alarms"]) == (False, [])
    assert [test["name"] for test in document["tests"]] == ["length", "vocabulary", "embedding", "labels", "confidence"]
    [reference] = (folder / ".work" / "reference").glob("*.parquet")
    made = reference.stat().st_mtime_ns

    moved = monitor(folder, "--inputs", "other.jsonl")
    assert moved.returncode == 3
    assert "Retraining is due" in moved.stdout
    document = json.loads((folder / "report" / "monitor.json").read_text("utf-8"))
    assert document["due"]
    assert {"vocabulary", "length"} <= set(document["alarms"])
    assert reference.stat().st_mtime_ns == made  # made once
    page = (folder / "report" / "monitor.html").read_text("utf-8")
    assert "Retraining is due" in page
    assert not re.search(r"(src|href)=|https?://|<script", page)
    assert len(document["farthest"]) == 8


def test_confidence_is_held_against_the_evaluation_set_in_domain_where_it_is_large_enough(folder):
    monitor(folder, "--inputs", "alike.jsonl")
    assert "not learnt from" not in json.loads((folder / "report" / "monitor.json").read_text("utf-8"))["tests"][4]["then"]
    for name, count in {"movie": 60, "amazon": 60}.items():  # the second is out of domain
        drawn = list(dict.fromkeys(texts(7, count)))
        rows = [
            {"example_id": example_id({"text": t}), "label": "positive", "source": "s", "line": n, "text": t} for n, t in enumerate(drawn)
        ]
        write_table(pa.Table.from_pylist(rows, examples(["text"])), folder / "artifacts" / "data" / "evaluation" / f"{name}.parquet")
    monitor(folder, "--inputs", "alike.jsonl")
    assert re.search(
        r"of \d+ texts not learnt from", json.loads((folder / "report" / "monitor.json").read_text("utf-8"))["tests"][4]["then"]
    )
    assert len(list((folder / ".work" / "reference").glob("*.parquet"))) == 2


def test_a_predictions_log_is_read_back(folder):
    shotless(folder, "predict", "--student", "cd", "-i", "other.jsonl", "-o", "out.jsonl", "--log", "log/used.jsonl", "--threads", "1")
    direct = monitor(folder, "--inputs", "other.jsonl")
    tests = json.loads((folder / "report" / "monitor.json").read_text("utf-8"))["tests"]
    logged = monitor(folder, "--inputs", "log/used.jsonl")
    assert direct.returncode == logged.returncode == 3
    assert json.loads((folder / "report" / "monitor.json").read_text("utf-8"))["tests"] == tests


def test_accuracy_under_the_bound_is_an_alarm_and_over_it_is_none(folder):
    shotless(folder, "predict", "--student", "cd", "-i", "alike.jsonl", "-o", "out.parquet", "--keep", "text", "--threads", "1")
    rows = pl.read_parquet(folder / "out.parquet").select("text", pl.col("label").alias("gold"))
    rows.write_ndjson(folder / "right.jsonl")
    swap = {"negative": "positive", "positive": "negative"}
    rows.with_columns(pl.col("gold").replace_strict(swap)).write_ndjson(folder / "wrong.jsonl")
    assert monitor(folder, "--inputs", "right.jsonl", "--labels", "gold").returncode == 0
    wrong = monitor(folder, "--inputs", "wrong.jsonl", "--labels", "gold")
    assert wrong.returncode == 3
    document = json.loads((folder / "report" / "monitor.json").read_text("utf-8"))
    assert document["alarms"] == ["accuracy"]
    assert document["tests"][-1]["then"] == "at least 50.0% (monitor.min_accuracy)"


def test_the_bound_is_the_students_own_accuracy_out_of_domain_where_params_have_none(folder):
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text(encoding="utf-8"))
    del params["monitor"]["min_accuracy"]
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    (folder / "right.jsonl").write_text("".join(json.dumps({"text": t, "gold": "positive"}) + "\n" for t in texts(5, 30)), "utf-8")
    without = monitor(folder, "--inputs", "right.jsonl", "--labels", "gold")
    assert without.returncode == 2
    assert "set monitor.min_accuracy, or evaluate the student" in without.stderr
    (folder / "metrics" / "eval").mkdir(parents=True)
    sets = {"movie": {"accuracy": 0.1}, "tweets": {"accuracy": 0.9}, "amazon": {"accuracy": 0.8}}
    (folder / "metrics" / "eval" / "cd.json").write_text(json.dumps({"sets": sets}), "utf-8")
    monitor(folder, "--inputs", "right.jsonl", "--labels", "gold")
    test = json.loads((folder / "report" / "monitor.json").read_text("utf-8"))["tests"][-1]
    assert test["then"] == "at least 80.0% (85.0% on tweets, amazon, less 5%)"


def test_memory_over_its_limit_and_rows_with_errors_are_alarms_that_retraining_does_not_mend(folder):
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["monitor"]["max_memory_mb"] = 1
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    with (folder / "alike.jsonl").open("a", encoding="utf-8") as file:
        file.write("not json\n" * 5)
    done = monitor(folder, "--inputs", "alike.jsonl")
    assert done.returncode == 3
    document = json.loads((folder / "report" / "monitor.json").read_text("utf-8"))
    assert document["alarms"] == ["memory", "bad rows"]
    assert not document["due"]
    assert "not what retraining mends" in done.stdout


def test_a_reference_of_the_users_own_needs_no_params(folder):
    (folder / "params.yaml").unlink()
    shutil.rmtree(folder / "artifacts" / "data")
    without = monitor(folder, "--inputs", "alike.jsonl")
    assert without.returncode == 2
    assert "--reference" in without.stderr
    assert monitor(folder, "--inputs", "alike.jsonl", "--reference", "alike.jsonl").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inputs", "few.jsonl"], "2 usable inputs, and a comparison needs 20"),
        (["--inputs", "alike.jsonl", "--labels", "text"], "the student's are: negative, positive"),
        (["--inputs", "nope.jsonl"], "no such file"),
    ],
)
def test_what_cannot_be_compared_ends_with_2(folder, arguments, said):
    (folder / "few.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', "utf-8")
    done = monitor(folder, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_rate_that_the_permutations_cannot_reach_is_refused():
    with pytest.raises(ValueError, match="set 599 or more"):
        MonitorParams(permutations=300)
