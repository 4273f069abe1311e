"""`shotless predict` as a user runs it: every format in and out, order, bounded windows, bad rows, the log, exit codes."""

import csv
import json
import os
import shutil
import threading
from pathlib import Path

import polars as pl
import pytest
from serving_world import PROJECT, TEXTS, VERBALISERS, choose, make_student, shotless, shotless_process

from pipeline.params import read_yaml, write_yaml
from pipeline.serving.files import Item, predict_items, writing
from pipeline.serving.predictor import Prediction, Predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """A project's folder with a student called cd."""
    root = tmp_path_factory.mktemp("project")
    make_student(root / "artifacts" / "students" / "cd", model_folder("llama"))
    choose(root)
    (root / "body.csv").write_text("body\na film\n", "utf-8")
    (root / "rows.jsonl").write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)), "utf-8")
    return root


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor(folder / "artifacts" / "students" / "cd", 1)


@pytest.mark.slow
def test_standard_input_to_standard_output_with_a_bad_row_between(folder):
    lines = [
        json.dumps({"text": "a warm film"}),
        "not json",
        "",
        json.dumps({"text": ""}),
        json.dumps({"body": "x"}),
        json.dumps({"text": "funny"}),
    ]
    done = shotless_process(folder, "predict", "--student", "cd", "--threads", "1", "--log", "log/used.jsonl", stdin="\n".join(lines))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 4, 5, 6]
    assert [row.get("error") for row in rows] == [None, "not JSON", "text: empty", "text: missing", None]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    assert rows[0]["confidence"] == max(rows[0]["probabilities"].values()) == rows[0]["probabilities"][rows[0]["label"]]
    assert done.stderr.strip() == "cd: 5 rows, 3 with an error (line 2: not JSON)"
    logged = [json.loads(line) for line in (folder / "log" / "used.jsonl").read_text("utf-8").splitlines()]
    assert [entry["fields"] for entry in logged] == [{"text": "a warm film"}, {}, {"text": ""}, {"text": None}, {"text": "funny"}]
    assert [entry.get("label") for entry in logged] == [row.get("label") for row in rows]
    assert {len(entry["student"]) for entry in logged} == {16}


@pytest.mark.slow
def test_if_no_row_has_an_answer_it_says_why_and_what_to_do(folder):
    done = shotless_process(folder, "predict", "--student", "cd", "--threads", "1", stdin='{"body": "x"}')
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "cd: 1 rows, 1 with an error (line 1: text: missing)",
        "No row has an answer. If a field has another column, name it: --field FIELD=COLUMN.",
    ]


@pytest.mark.slow
def test_every_output_format_holds_the_same_answers_in_order(folder):
    for form in ("jsonl", "csv", "parquet"):
        shotless(
            folder, "predict", "--student", "cd", "-i", "rows.jsonl", "-o", f"out.{form}", "--keep", "id", "--window", "3", "--threads", "1"
        )
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    table = pl.read_parquet(folder / "out.parquet")
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        sheet = list(csv.DictReader(file))
    assert [row["id"] for row in lines] == list(range(len(TEXTS)))
    assert table["id"].to_list() == [row["id"] for row in sheet] == [str(n) for n in range(len(TEXTS))]
    assert table["label"].to_list() == [row["label"] for row in sheet] == [row["label"] for row in lines]
    assert table["p_positive"].to_list() == pytest.approx([row["probabilities"]["positive"] for row in lines], abs=1e-12)
    assert [float(row["p_positive"]) for row in sheet] == pytest.approx(table["p_positive"].to_list(), abs=1e-12)
    assert set(table["error"].to_list()) == {None}
    assert not list(folder.glob(".out*"))


def test_every_output_format_says_which_text_was_cut(tmp_path):
    whole, cut = (Prediction("yes", 0.75, {"no": 0.25, "yes": 0.75}, cut=is_cut) for is_cut in (False, True))
    for form in ("jsonl", "csv", "parquet"):
        with writing(str(tmp_path / f"out.{form}"), form, ["no", "yes"], []) as write:
            write([(Item(1, {}), whole), (Item(2, {}), cut)])
    assert [json.loads(line).get("cut") for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()] == [None, True]
    assert [line.split(",")[-2] for line in (tmp_path / "out.csv").read_text("utf-8").splitlines()] == ["cut", "", "true"]
    assert pl.read_parquet(tmp_path / "out.parquet")["cut"].to_list() == [None, True]


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_every_input_format_is_read_and_columns_are_mapped(folder, form):
    frame = pl.DataFrame({"body": TEXTS})
    path = folder / f"in.{form}"
    if form == "parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if form == "tsv" else ",")
    done = shotless(folder, "predict", "--student", "cd", "-i", path.name, "--field", "text=body", "--threads", "1")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == [
        p.label for p in Predictor(folder / "artifacts/students/cd", 1).predict(TEXTS)
    ]


def test_windows_are_bounded_in_rows_and_characters_and_change_no_answer(predictor, monkeypatch):
    items = [Item(n, {"text": text}) for n, text in enumerate(TEXTS * 3)]
    taken = 0

    def counted():
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    stream = predict_items(predictor, counted(), window_rows=4)
    first = next(stream)
    assert (len(first), taken) == (4, 4)
    windows = [first, *stream]
    assert [item.line for window in windows for item, _ in window] == list(range(len(items)))
    whole = predictor.predict([item.fields for item in items])
    assert [p.label for window in windows for _, p in window] == [p.label for p in whole]
    monkeypatch.setattr("pipeline.serving.files.WINDOW_CHARS", 30)
    assert max(len(window) for window in predict_items(predictor, items, 1024)) < 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--student", "nope"], "there are: cd"),
        (["--student", "cd", "-i", "nope.jsonl"], "nope.jsonl: no such file"),
        (["--student", "cd", "-i", "rows.xls"], "does not end with one of"),
        (["--student", "cd", "-i", "rows.jsonl", "--input-format", "xml"], "'xml' is not one of"),
        (["--student", "cd", "-i", "rows.jsonl", "--field", "body=text"], "the student's fields are: text"),
        (["--student", "cd", "-i", "rows.jsonl", "--keep", "label"], "write --keep NAME=label"),
        (["--student", "cd", "-i", "rows.jsonl", "--keep", "id", "--keep", "id=text"], "asked for twice"),
        (["--student", "cd", "-i", "rows.jsonl", "--keep", "id="], "write COLUMN, or NAME=COLUMN"),
        (["--student", "cd", "-i", "body.csv", "--field", "text=body", "--keep", "gold=star"], "with --keep NAME=star"),
        (["--student", "cd", "--output-format", "parquet"], "--output: Parquet cannot be written to standard output"),
        (["--student", "cd", "-i", "body.csv"], "no column 'text'; the columns are: body. Name the right one with --field text=COLUMN"),
        (
            ["--student", "cd", "-o", "x.tsv"],
            "x.tsv: the name does not end with one of .csv, .jsonl, .ndjson, .parquet. Rename it",
        ),
    ],
)
def test_a_wrong_option_ends_with_2_and_what_to_do(folder, arguments, said):
    done = shotless(folder, "predict", *arguments, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_kept_column_that_utf8_cannot_hold_stops_nothing(folder, form):
    (folder / "odd.jsonl").write_text('{"id": "\\ud800", "text": "a film"}\n', "utf-8")
    shotless(folder, "predict", "--student", "cd", "--input", "odd.jsonl", "--keep", "id", "--output", f"odd.{form}", "--threads", "1")
    kept = {
        "jsonl": lambda file: json.loads(file.read_text("utf-8"))["id"],
        "csv": lambda file: pl.read_csv(file)["id"][0],
        "parquet": lambda file: pl.read_parquet(file)["id"][0],
    }[form](folder / f"odd.{form}")
    assert kept == ("\ud800" if form == "jsonl" else "\\ud800")


def test_a_pipe_is_read_as_a_file_is(folder):
    os.mkfifo(folder / "pipe.jsonl")
    logged = json.dumps({"time": "2026-01-01T00:00:00+00:00", "student": "f" * 16, "fields": {"text": "a warm film"}, "label": "x"})
    lines = f'{{"text": "a warm film"}}\n{logged}\n'  # the second is a line of a predictions log
    writer = threading.Thread(target=lambda: (folder / "pipe.jsonl").write_text(lines, "utf-8"))
    writer.start()
    done = shotless(folder, "predict", "--student", "cd", "--input", "pipe.jsonl", "--threads", "1")
    writer.join()
    one, other = map(json.loads, done.stdout.splitlines())
    assert (one["line"], other["line"]) == (1, 2)
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_the_chosen_student_needs_no_name_and_a_line_says_which_it_is(folder):
    done = shotless(folder, "predict", "--input", "rows.jsonl", "--threads", "1")
    assert done.stderr.splitlines()[0] == "cd is taken, the student that artifacts/best.json names"
    assert done.stderr.count("best.json") == 1
    named = shotless(folder, "predict", "--student", "cd", "--input", "rows.jsonl", "--threads", "1")
    assert (named.stdout, "best.json" in named.stderr) == (done.stdout, False)


COMMANDS = {
    "predict": [],
    "serve": [],
    "monitor": ["--inputs", "new.jsonl", "--reference", "new.jsonl"],
    "export": ["-o", "out"],
    "review": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_chosen_student_a_command_says_what_to_do(tmp_path, model_folder, command):
    shutil.copyfile(PROJECT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "new.jsonl").write_text("{}", "utf-8")
    (tmp_path / "artifacts" / "students" / "a").mkdir(parents=True)
    (tmp_path / "artifacts" / "students" / "a" / "manifest.json").write_text("{}", "utf-8")

    def refused(*arguments):
        done = shotless(tmp_path, command, *COMMANDS[command], *arguments, check=False)
        assert done.returncode == 2
        return done.stderr

    absent = "artifacts/best.json: no such file, so no student is chosen. Run `shotless run`, or give --student; there are: a."
    assert absent in refused()
    choose(tmp_path, None, a="its `held_back` is 0")
    assert "best.json: no student is chosen (a: its `held_back` is 0). Give --student; there are: a." in refused()
    choose(tmp_path, "gone")
    assert "--student: no student 'gone'; there are: a." in refused()
    assert "no student 'b'; there are: a." in refused("--student", "b")


def test_a_kept_column_is_renamed(folder):
    (folder / "labelled.jsonl").write_text('{"text": "a film", "label": "good"}\n', "utf-8")
    for form in ("jsonl", "csv", "parquet"):
        shotless(folder, "predict", "-i", "labelled.jsonl", "--keep", "gold=label", "-o", f"kept.{form}", "--threads", "1")
    read = {"jsonl": pl.read_ndjson, "csv": pl.read_csv, "parquet": pl.read_parquet}
    rows = {form: read[form](folder / f"kept.{form}").row(0, named=True) for form in read}
    assert {row["gold"] for row in rows.values()} == {"good"}
    assert {row["label"] for row in rows.values()} <= {"negative", "positive"}


@pytest.mark.slow
def test_numbers_that_json_lacks_become_null(folder):
    lines = ['{"text": "a film", "score": NaN, "more": [1, -Infinity]}', '{"text": "dull", "score": 0.5, "more": {"a": 1e999}}']
    (folder / "gaps.jsonl").write_text("\n".join(lines), "utf-8")
    pl.DataFrame({"text": ["a film", "dull"], "score": [float("nan"), 0.5], "more": [[1.0, float("-inf")], [2.0]]}).write_parquet(
        folder / "gaps.parquet"
    )
    for source, more in (("gaps.jsonl", [[1, None], {"a": None}]), ("gaps.parquet", [[1.0, None], [2.0]])):
        options = ["--keep", "score", "--keep", "more", "--log", f"{source}.log", "--threads", "1"]
        rows = [
            json.loads(line, parse_constant=pytest.fail) for line in shotless(folder, "predict", "-i", source, *options).stdout.splitlines()
        ]
        assert [row["score"] for row in rows] == [None, 0.5]
        assert [row["more"] for row in rows] == more
        for form, read in {"csv": pl.read_csv, "parquet": pl.read_parquet}.items():
            shotless(folder, "predict", "-i", source, "--keep", "score", "-o", f"gaps-out.{form}", "--threads", "1")
            assert read(folder / f"gaps-out.{form}")["score"].cast(pl.Float64).to_list() == [None, 0.5]


KEPT = {  # a value as the input has it → as JSON lines have it, as CSV and Parquet have it
    "NaN": (None, None),
    "-Infinity": (None, None),
    "1e400": (None, None),
    "[1, NaN]": ([1, None], "[1, null]"),
    '{"a": true, "b": Infinity}': ({"a": True, "b": None}, '{"a": true, "b": null}'),
    "true": (True, "true"),
    "12345678901234567890": (12345678901234567890, "12345678901234567890"),
    '"NaN"': ("NaN", "NaN"),
    '"Infinity\\u2028and \\"beyond\\""': ('Infinity\u2028and "beyond"', 'Infinity\u2028and "beyond"'),
}


def test_every_kept_value_is_json_that_every_parser_reads(folder):
    (folder / "kept.jsonl").write_text("".join(f'{{"text": "a film", "x": {value}}}\n' for value in KEPT), "utf-8")
    for form in ("jsonl", "csv", "parquet"):
        shotless(folder, "predict", "-i", "kept.jsonl", "--keep", "x", "-o", f"kept-out.{form}", "--threads", "1")
    lines = (folder / "kept-out.jsonl").read_text("utf-8").strip("\n").split("\n")
    assert [json.loads(line, parse_constant=pytest.fail)["x"] for line in lines] == [found for found, _ in KEPT.values()]
    texts = [text for _, text in KEPT.values()]
    assert pl.read_parquet(folder / "kept-out.parquet")["x"].to_list() == texts
    with (folder / "kept-out.csv").open(newline="", encoding="utf-8") as file:
        assert [row["x"] for row in csv.DictReader(file)] == [text or "" for text in texts]


def test_a_log_of_an_input_that_is_not_a_number_is_json(folder):
    (folder / "number.jsonl").write_text('{"text": NaN}\n{"text": "a film"}\n', "utf-8")
    shotless(folder, "predict", "-i", "number.jsonl", "--log", "number.log", "--threads", "1")
    logged = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "number.log").read_text("utf-8").splitlines()]
    assert [entry["fields"]["text"] for entry in logged] == [None, "a film"]


def test_it_ends_with_1_only_if_no_row_has_an_answer(folder):
    for lines, code in ((["x", '{"text": ""}'], 1), (["x", '{"text": "a film"}'], 0), ([], 0)):
        (folder / "some.jsonl").write_text("\n".join(lines), "utf-8")
        done = shotless(folder, "predict", "-i", "some.jsonl", "-o", "some.csv", "--threads", "1", check=False)
        assert done.returncode == code
        assert (folder / "some.csv").read_text("utf-8").count("\n") == 1 + len(lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_the_log_costs_no_answer(folder):
    (folder / "full.log").symlink_to("/dev/full")
    done = shotless(folder, "predict", "-i", "rows.jsonl", "-o", "all.jsonl", "--log", "full.log", "--window", "3", "--threads", "1")
    assert len((folder / "all.jsonl").read_text("utf-8").splitlines()) == len(TEXTS)
    assert done.stderr.count("warning:") == 1
    assert f"{len(TEXTS)} of them are not in full.log" in done.stderr


def test_a_name_is_refused_if_params_ask_something_else_and_its_path_is_not(folder, tmp_path):
    shutil.copytree(folder / "artifacts", tmp_path / "artifacts")
    params = read_yaml(PROJECT / "params.yaml")
    params["task"] |= {"template": "Text: {text}\nLabel:", "verbalisers": VERBALISERS}
    write_yaml(params, tmp_path / "params.yaml")
    rows = ["-i", str(folder / "rows.jsonl"), "--threads", "1"]
    refused = shotless(tmp_path, "predict", "--student", "cd", *rows, check=False)
    assert (refused.returncode, "'Text: {text}" in refused.stderr) == (2, True)
    shotless(tmp_path, "predict", "--student", "artifacts/students/cd", *rows)
