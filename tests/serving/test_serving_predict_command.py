"""`shotless predict` as a user runs it: every format in and out, order, bounded windows, bad rows, the log."""

import csv
import json
import os
import threading

import polars as pl
import pytest
from serving_world import TEXTS, make_student, shotless, shotless_process

from pipeline.serving.predictor import Predictor
from pipeline.serving.stream import Item, predict_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """A project's folder with a student called cd."""
    root = tmp_path_factory.mktemp("project")
    make_student(root / "artifacts" / "students" / "cd", model_folder("llama"))
    (root / "body.csv").write_text("body\na film\n", "utf-8")
    (root / "rows.jsonl").write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)), "utf-8")
    return root


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor(folder / "artifacts" / "students" / "cd", 1)


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
    assert done.stderr.strip() == "5 rows answered by cd, 3 of them with an error"
    logged = [json.loads(line) for line in (folder / "log" / "used.jsonl").read_text("utf-8").splitlines()]
    assert [entry["fields"] for entry in logged] == [{"text": "a warm film"}, {}, {"text": ""}, {"text": None}, {"text": "funny"}]
    assert [entry.get("label") for entry in logged] == [row.get("label") for row in rows]
    assert {len(entry["student"]) for entry in logged} == {16}


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

    stream = predict_stream(predictor, counted(), window_rows=4)
    first = next(stream)
    assert (len(first), taken) == (4, 4)
    windows = [first, *stream]
    assert [item.line for window in windows for item, _ in window] == list(range(len(items)))
    whole = predictor.predict([item.fields for item in items])
    assert [p.label for window in windows for _, p in window] == [p.label for p in whole]
    monkeypatch.setattr("pipeline.serving.stream.WINDOW_CHARS", 30)
    assert max(len(window) for window in predict_stream(predictor, items)) < 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--student", "nope"], "there are: cd"),
        (["--student", "cd", "-i", "nope.jsonl"], "nope.jsonl: no such file"),
        (["--student", "cd", "-i", "rows.xlsx"], "names no format"),
        (["--student", "cd", "-i", "rows.jsonl", "--input-format", "xml"], "choose one of: csv, jsonl, parquet, tsv"),
        (["--student", "cd", "-i", "rows.jsonl", "--field", "body=text"], "the student's fields are: text"),
        (["--student", "cd", "-i", "rows.jsonl", "--keep", "label"], "rename it"),
        (["--student", "cd", "--output-format", "parquet"], "name a file with --output"),
        (["--student", "cd", "-i", "body.csv"], "no column 'text'; the columns are: body. Name the right one with --field text=COLUMN"),
        (["--student", "cd", "-o", "x.tsv"], "tsv is read, not written"),
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
    writer = threading.Thread(target=lambda: (folder / "pipe.jsonl").write_text('{"text": "a warm film"}\n', "utf-8"))
    writer.start()
    done = shotless(folder, "predict", "--student", "cd", "--input", "pipe.jsonl", "--threads", "1")
    writer.join()
    assert json.loads(done.stdout)["line"] == 1
