"""`shotless monitor` as a user runs it: exit codes, files, thresholds, label rules, the predictions log read back."""

import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
from serving_world import PROJECT, TEMPLATE, VERBALISERS, choose, hold_back, make_student, seal, shotless

from pipeline.monitor.sample import answer
from pipeline.params import MonitorParams, TaskParams, read_yaml, write_yaml
from pipeline.schema import Example, write_examples
from pipeline.serving.files import Item
from pipeline.serving.predictor import Predictor
from pipeline.task import Task

NOUNS = ["film", "plot", "picture", "actors", "minute", "mess", "service", "food"]
WORDS = ["a warm", "a dull, lifeless", "the strange", "every", "this little", "bored and", "funny", "late cold", "terrible", "I loved"]


def texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(f"{rng.choice(WORDS)} {rng.choice(NOUNS)}" for _ in range(1 + rng.poisson(2))) for _ in range(count)]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_data(folder, name, drawn, label=None):
    rows = [Example({"text": text}, label, source="s", line=n) for n, text in enumerate(dict.fromkeys(drawn))]
    write_examples(rows, ["text"], folder / "artifacts" / "data" / f"{name}.parquet")


def change(folder, **blocks):
    """Change blocks of params.yaml."""
    params = read_yaml(folder / "params.yaml")
    write_yaml(params | blocks, folder / "params.yaml")


@pytest.fixture
def folder(tmp_path, model_folder):
    """A project's folder: a student, a transfer set, params with light settings."""
    make_student(tmp_path / "artifacts" / "students" / "cd", model_folder("llama"))
    choose(tmp_path)
    write_data(tmp_path, "transfer", texts(0, 150))
    params = read_yaml(PROJECT / "params.yaml")
    params["task"]["verbalisers"] = VERBALISERS
    write_yaml(params | {"monitor": {"permutations": 699, "min_accuracy": 0.5}}, tmp_path / "params.yaml")
    write_rows(tmp_path / "alike.jsonl", [{"text": t} for t in dict.fromkeys(texts(1, 80))])
    write_rows(tmp_path / "other.jsonl", [{"text": f"x great N/A x great {n} N/A x x x x x {t}"} for n, t in enumerate(texts(2, 60))])
    return tmp_path


def monitor(folder, *arguments):
    return shotless(folder, "monitor", "--threads", "1", *arguments, check=False)


def document(folder):
    return json.loads((folder / "report" / "monitor.json").read_text("utf-8"))


@pytest.mark.slow
def test_inputs_like_the_transfer_set_end_with_0_and_others_with_3(folder):
    well = monitor(folder, "--inputs", "alike.jsonl")
    assert well.returncode == 0, well.stdout + well.stderr
    assert "No alarm" in well.stdout
    found = document(folder)
    assert (found["due"], found["alarms"]) == (False, [])
    assert [test["name"] for test in found["tests"]] == ["length", "vocabulary", "embedding", "labels", "confidence"]

    moved = monitor(folder, "--inputs", "other.jsonl")
    assert moved.returncode == 3
    assert "Retraining is due" in moved.stdout
    found = document(folder)
    assert found["due"]
    assert {"vocabulary", "length"} <= set(found["alarms"])
    assert len(found["farthest"]) == 8
    page = (folder / "report" / "monitor.html").read_text("utf-8")
    assert "Retraining is due" in page
    assert not re.search(r"(src|href)=|https?://|<script", page)


@pytest.mark.slow
def test_confidence_is_compared_with_the_evaluation_set_in_domain_if_it_is_large_enough(folder):
    monitor(folder, "--inputs", "alike.jsonl")
    assert "not learnt from" not in document(folder)["tests"][4]["then"]
    for name, seed in {"movie": 7, "amazon": 8}.items():  # the second is out of domain
        write_data(folder, f"evaluation/{name}", texts(seed, 60), "positive")
    monitor(folder, "--inputs", "alike.jsonl")
    known = int(re.search(r"of (\d+) texts not learnt from", document(folder)["tests"][4]["then"])[1])
    assert 20 <= known <= 60


@pytest.mark.slow
def test_a_predictions_log_is_read_back(folder):
    shotless(folder, "predict", "-i", "other.jsonl", "-o", "out.jsonl", "--log", "log/used.jsonl", "--threads", "1")
    direct = monitor(folder, "--inputs", "other.jsonl")
    tests = document(folder)["tests"]
    logged = monitor(folder, "--inputs", "log/used.jsonl")
    assert direct.returncode == logged.returncode == 3
    assert document(folder)["tests"] == tests


@pytest.mark.slow
def test_a_fall_of_the_answered_share_is_an_alarm_by_a_promise_and_by_a_log_that_says_what_was_answered(folder):
    student = folder / "artifacts" / "students" / "cd"
    held = Predictor(student, 1, keep_states=True).predict(list(dict.fromkeys(texts(5, 300))))
    sure = np.quantile([one.confidence for one in held], 0.3)
    scores = [np.log(list(one.probabilities.values())) for one in held]
    targets = [[0.9, 0.1] if (own[0] > own[1]) == (max(own) > np.log(sure)) else [0.1, 0.9] for own in scores]  # it agrees if it is sure
    hold_back(student, list(zip(scores, targets, [1.0] * len(held), strict=True)), [(str(n), one.state) for n, one in enumerate(held)])

    monitor(folder, "--inputs", "alike.jsonl")
    assert len(document(folder)["tests"]) == 5
    assert monitor(folder, "--inputs", "alike.jsonl", "--agree", "0.9").returncode == 0
    [*_, test] = document(folder)["tests"]
    assert (test["name"], test["of"], test["smallest"]) == ("answered", "answers", 0.1)
    least = Predictor(student, 1, agree=0.9).threshold.confidence
    alike = Predictor(student, 1).predict([json.loads(line)["text"] for line in (folder / "alike.jsonl").read_text("utf-8").splitlines()])
    then, now = (np.mean([one.confidence >= least for one in own]) for own in (held, alike))
    assert (test["then"], test["now"]) == (f"{then:.1%} of {len(held)} held-back texts", f"{now:.1%} of {len(alike)}")

    found = dict.fromkeys(texts(6, 400))
    answers = zip(found, Predictor(student, 1).predict(list(found)), strict=True)
    unsure = sorted(answers, key=lambda pair: pair[1].confidence)
    write_rows(folder / "unsure.jsonl", [{"text": text} for text, _ in [*unsure[:60], *unsure[-15:]]])
    assert monitor(folder, "--inputs", "unsure.jsonl", "--agree", "0.9").returncode == 3
    by_promise = document(folder)
    assert by_promise["due"]
    assert "answered" in by_promise["alarms"]
    shotless(folder, "predict", "-i", "unsure.jsonl", "-o", "out.jsonl", "--agree", "0.9", "--log", "used.jsonl", "--threads", "1")
    assert monitor(folder, "--inputs", "used.jsonl").returncode == 3
    by_log = document(folder)["tests"][-1]
    assert (by_log["name"], by_log["now"], by_log["alarm"]) == ("answered", by_promise["tests"][-1]["now"], True)
    (folder / "used.jsonl").write_text((folder / "used.jsonl").read_text("utf-8").replace('"student": "', '"student": "another'), "utf-8")
    monitor(folder, "--inputs", "used.jsonl")
    assert len(document(folder)["tests"]) == 5
    refused = monitor(folder, "--inputs", "alike.jsonl", "--agree", "0.999")
    assert (refused.returncode, "99.9% cannot be promised" in " ".join(refused.stderr.split())) == (2, True)


def test_all_rows_are_counted_and_the_drawn_ones_are_kept(folder):
    student = folder / "artifacts" / "students" / "cd"
    seal(student, Task(TaskParams(template=TEMPLATE, verbalisers=VERBALISERS, long_texts="refuse")))
    predictor = Predictor(student, 1, keep_states=True)

    def items():
        for line in range(3000):
            yield Item(
                line, {"text": f"a film {line} {'x ' * 600}" if line % 3 else f"a film {line}"}, {}, "not JSON" if line % 10 == 9 else None
            )

    found = answer(predictor, items(), "many", MonitorParams(max_rows=90))
    assert found.rows == 3000
    too_long = 90 - len(found)  # 2 of 3 rows; only those that were drawn are found out
    assert found.bad == 300 + too_long
    assert 40 < too_long < 80
    assert {int(text.split()[2]) % 3 for text in found.texts} == {0}


@pytest.mark.slow
def test_accuracy_under_the_bound_is_an_alarm(folder):
    shotless(folder, "predict", "-i", "alike.jsonl", "-o", "out.jsonl", "--keep", "text", "--keep", "gold=text", "--threads", "1")
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    swap = {"negative": "positive", "positive": "negative"}
    write_rows(folder / "right.jsonl", [{"text": row["text"], "gold": row["label"]} for row in rows])
    write_rows(folder / "wrong.jsonl", [{"text": row["text"], "gold": swap[row["label"]]} for row in rows])
    assert monitor(folder, "--inputs", "right.jsonl", "--labels", "gold").returncode == 0
    wrong = monitor(folder, "--inputs", "wrong.jsonl", "--labels", "gold")
    assert wrong.returncode == 3
    assert document(folder)["alarms"] == ["accuracy"]
    assert document(folder)["tests"][-1]["then"] == "at least 50.0% (monitor.min_accuracy)"


def spellings(rule, values):
    """(label rule, value of a negative and of a positive row)."""
    return pytest.param(rule, *values, id=str(values))


@pytest.mark.parametrize(
    ("rule", "negative", "positive"),
    [
        spellings({"column": "urgency", "values": {"1": "positive", "0": "negative"}}, (0, 1)),
        spellings({"column": "urgency", "values": {"1": "positive", "0": "negative"}}, ("0", " 1 ")),
        spellings({"column": "urgency", "values": {"true": "positive", "false": "negative"}}, (False, True)),
        spellings({"column": "urgency", "threshold": 1.0}, (-2.5, "3")),
        spellings({"column": "label"}, ("negative", " positive")),  # no source has this column
    ],
)
@pytest.mark.slow
def test_gold_labels_are_read_by_the_label_rule_of_the_source_with_that_column(folder, rule, negative, positive):
    data = read_yaml(folder / "params.yaml")["data"]
    data["sources"]["movie"]["label"] = rule
    change(folder, data=data)
    shotless(folder, "predict", "-i", "alike.jsonl", "-o", "out.jsonl", "--keep", "text", "--threads", "1")
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    written = {"negative": negative, "positive": positive}
    gold = [{"text": row["text"], "urgency": written[row["label"]]} for row in rows]
    write_rows(folder / "gold.jsonl", [*gold[5:], *({**row, "urgency": None} for row in gold[:5])])
    done = monitor(folder, "--inputs", "gold.jsonl", "--labels", "urgency")
    assert done.returncode == 0, done.stderr
    assert document(folder)["tests"][-1]["now"] == f"100.0% of {len(gold) - 5} labelled"


@pytest.mark.slow
def test_rules_that_differ_for_one_column_are_refused_unless_evaluation_sets_agree(folder):
    data = read_yaml(folder / "params.yaml")["data"]
    data["sources"]["amazon"]["label"] = {"column": "rating", "threshold": 2.0}
    change(folder, data=data)
    write_rows(folder / "gold.jsonl", [{"text": text, "rating": 3} for text in texts(5, 30)])
    refused = monitor(folder, "--inputs", "gold.jsonl", "--labels", "rating")
    assert (refused.returncode, "different label rules" in refused.stderr) == (2, True)
    del data["evaluation"]["amazon"]
    change(folder, data=data)
    assert monitor(folder, "--inputs", "gold.jsonl", "--labels", "rating").returncode in {0, 3}
    assert document(folder)["tests"][-1]["now"].endswith("of 30 labelled")


@pytest.mark.parametrize(
    ("value", "said"),
    [(["billing", "refund"], "several labels in a row are not supported"), ({"a": 1}, "several labels"), ("neutral", "neutral"), (7, "7")],
)
def test_what_is_not_a_label_ends_with_2_and_its_line(folder, value, said):
    write_rows(folder / "gold.jsonl", [{"text": text, "gold": "positive"} for text in texts(5, 30)] + [{"text": "a film", "gold": value}])
    done = monitor(folder, "--inputs", "gold.jsonl", "--labels", "gold")
    assert done.returncode == 2
    assert "gold.jsonl, line 31: " in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_bound_is_the_students_own_accuracy_out_of_domain_if_params_have_none(folder):
    change(folder, monitor={"permutations": 699})
    write_rows(folder / "gold.jsonl", [{"text": text, "gold": "positive"} for text in texts(5, 30)])
    none = monitor(folder, "--inputs", "gold.jsonl", "--labels", "gold")
    assert (none.returncode, "set monitor.min_accuracy" in none.stderr) == (2, True)
    (folder / "metrics" / "eval").mkdir(parents=True)
    sets = {"movie": 0.99, "tweets": 0.9, "amazon": 0.8}
    (folder / "metrics" / "eval" / "cd.json").write_text(json.dumps({"sets": {name: {"accuracy": a} for name, a in sets.items()}}), "utf-8")
    monitor(folder, "--inputs", "gold.jsonl", "--labels", "gold")
    assert document(folder)["tests"][-1]["then"] == "at least 80.0% (85.0% on tweets, amazon, less 5%)"

    shutil.copytree(folder / "artifacts" / "students" / "cd", folder / "elsewhere" / "cd")  # the same name, and not the same student
    foreign = monitor(folder, "--inputs", "gold.jsonl", "--labels", "gold", "--student", "elsewhere/cd")
    assert (foreign.returncode, "set monitor.min_accuracy" in foreign.stderr) == (2, True)


def test_memory_over_its_limit_and_rows_with_errors_are_alarms_that_retraining_does_not_mend(folder):
    change(folder, monitor={"permutations": 699, "max_memory_mb": 1})
    with (folder / "alike.jsonl").open("a", encoding="utf-8") as file:
        file.write("not json\n" * 5)
    done = monitor(folder, "--inputs", "alike.jsonl")
    assert done.returncode == 3
    assert document(folder)["alarms"] == ["memory", "bad rows"]
    assert not document(folder)["due"]
    assert "not what retraining mends" in done.stdout


def test_a_reference_of_the_users_own_needs_no_params(folder):
    (folder / "params.yaml").unlink()
    shutil.rmtree(folder / "artifacts" / "data")
    without = monitor(folder, "--inputs", "alike.jsonl")
    assert without.returncode == 2
    assert "--reference" in without.stderr
    frame = pl.read_ndjson(folder / "alike.jsonl").rename({"text": "body"})
    frame.write_csv(folder / "alike.csv")
    assert monitor(folder, "--inputs", "alike.csv", "--reference", "alike.csv", "--field", "text=body").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inputs", "few.jsonl"], "few.jsonl: 2 inputs can be used, and a comparison needs 20"),
        (["--inputs", "alike.jsonl", "--labels", "gold"], "none of the rows that were drawn from alike.jsonl has a label"),
        (["--inputs", "nope.jsonl"], "no such file"),
        (["--inputs", "alike.jsonl", "--reference", "nope.jsonl"], "nope.jsonl: no such file to compare with"),
    ],
)
def test_what_cannot_be_compared_ends_with_2(folder, arguments, said):
    write_rows(folder / "few.jsonl", [{"text": "a"}, {"text": "b"}])
    done = monitor(folder, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_rate_that_the_permutations_cannot_reach_is_refused():
    with pytest.raises(ValueError, match="set 699 or more"):
        MonitorParams(permutations=300)
