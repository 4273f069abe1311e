"""The stages source and prepare on a small task of a user's own: files, counts, rules, bytes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.examples import write_source
from pipeline.data.prepare import prepare
from pipeline.errors import UsageError
from pipeline.files import Folders, write_json
from pipeline.params import Params, parse_params
from pipeline.schema import examples_schema, read_contexts, read_examples, read_table
from pipeline.task import Task, TaskTokens

PROJECT = Path(__file__).resolve().parents[2]
Raw = dict[str, Any]


@pytest.fixture
def raw(tmp_path: Path, unlike: Callable[..., list[str]], model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Raw:
    """Params of a task with a csv, a jsonl and a tsv file, which are in the working folder, and so is the model."""
    monkeypatch.chdir(tmp_path)
    mine, others = unlike(60), unlike(30, seed=1)
    Path("demos.csv").write_text("review,stars\n" + "".join(f'"{t}",{i % 2}\n' for i, t in enumerate(mine[:20])), encoding="utf-8")
    pool = [*mine[20:], others[0].upper() + "!", mine[25], "  ", "x" * 3000]
    Path("pool.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pool), encoding="utf-8")
    Path("test.tsv").write_bytes("".join(f"{(-1) ** i * 2.5}\t{t}\r\n" for i, t in enumerate(others)).encode())
    shutil.copytree(model_folder(), "artifacts/models/tiny")
    demos = {"path": "demos.csv", "fields": {"text": "review"}, "label": {"column": "stars", "values": {"0": "negative", "1": "positive"}}}
    return {
        "task": {"template": "Review: {text}\nSentiment:", "verbalisers": {"negative": " negative", "positive": " positive"}},
        "models": {"tiny": {"path": "artifacts/models/tiny"}},
        "data": {
            "sources": {
                "demos": demos,
                "pool": {"path": "pool.jsonl", "label": None},
                "test": {"path": "test.tsv", "columns": ["rating", "text"], "label": {"column": "rating", "threshold": 1.0}},
            },
            "demonstrations": {"source": "demos", "per_label": 3},
            "transfer": {"source": "pool"},
            "evaluation": {"test": {"source": "test", "domain": "out", "per_label": 10}},
            "bad_rows_limit": 0.1,
        },
        "contexts": {"none": {"demonstrations": 0}, "orders": {"demonstrations": 4, "count": 3}, "unused": {"demonstrations": 2}},
        "teachers": {"few": {"model": "models/tiny", "contexts": "orders"}, "zero": {"model": "models/tiny", "contexts": "none"}},
        "targets": {"few": {"teachers": {"few": 1.0}}},
        "baselines": {"teacher": {"prompts": "targets/few", "contexts": "ensemble"}},
        "evaluation": {"reference": "teacher"},
    }


def run(raw: Raw) -> Params:
    """Both stages, in the working folder."""
    params = parse_params(raw)
    for name in params.data.sources:
        write_source(name, params, Folders.here())
    prepare(params, Folders.here())
    return params


def quarantine() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("artifacts/data/quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def counts() -> Raw:
    return json.loads(Path("metrics/prepare.json").read_text())


def test_a_users_own_files_become_examples_contexts_and_counts(raw: Raw, tokenizer: Any) -> None:
    run(raw)
    data = Path("artifacts/data")
    shown, learnt = (read_examples(data / f"{name}.parquet", ["text"]) for name in ("demonstrations", "transfer"))
    held_out = read_examples(data / "evaluation/test.parquet", ["text"])
    assert (len(shown), len(held_out)) == (6, 20)
    assert {example.label for example in learnt} == {None}
    assert {example.source for example in learnt} == {"pool"}
    lines = Path("test.tsv").read_text(encoding="utf-8").splitlines()
    assert all(lines[example.line - 1].endswith(example.fields["text"]) for example in held_out), "a line leads back to the file"
    contexts = read_contexts(data / "contexts/orders.parquet")
    assert [context.name for context in contexts] == ["orders/0", "orders/1", "orders/2"]
    assert {fields["text"] for context in contexts for fields, _ in context.demonstrations} <= {e.fields["text"] for e in shown}
    assert read_contexts(data / "contexts/none.parquet")[0].demonstrations == ()
    assert len(read_contexts(data / "contexts/unused.parquet")) == 1

    found = counts()
    pool = found["sources"]["pool"]
    assert (pool["rows"], pool["quarantined"], pool["exact_repeats_removed"]) == (44, {"empty": 1}, 1)
    removed = found["roles"]["transfer"]["copies_of_evaluation_removed"]["test"]
    assert found["roles"]["transfer"]["drawn"] == len(learnt) == 42 - removed
    assert found["roles"]["evaluation"]["test"]["labels"] == {"negative": 10, "positive": 10}
    assert [set(found["contexts"][name]["tokens"]) for name in ("orders", "unused")] == [{"orders/0", "orders/1", "orders/2"}, set()]
    assert found["contexts"]["none"]["tokens"] == {"none/0": 0}
    entries = [(entry["file"], entry["line"], entry["field"], entry["reason"]) for entry in quarantine()]
    assert entries[:1] == [("pool.jsonl", 43, "text", "empty")]
    assert len(entries) == 1 + removed
    assert found["cut"] == {reader: {"transfer": 1} for reader in ("tiny behind none", "tiny behind orders", "tiny")}
    assert all(len(entry["value"]) <= 80 for entry in quarantine())


def test_a_label_that_no_context_shows_is_said(raw: Raw, capsys: pytest.CaptureFixture[str]) -> None:
    raw["contexts"] = {"none": {"demonstrations": 0}, "one": {"demonstrations": 1}, "orders": {"demonstrations": 1, "count": 2}}
    run(raw)
    counted = json.loads(Path("metrics/prepare.json").read_text(encoding="utf-8"))["contexts"]
    ((_, answer),) = read_contexts(Path("artifacts/data/contexts/one.parquet"))[0].demonstrations
    absent = {name: entry["labels_not_shown"] for name, entry in counted.items()}
    assert absent == {"none": [], "one": [{"negative": "positive", "positive": "negative"}[answer]], "orders": []}
    assert "contexts one: none shows 1 of 2 labels (metrics/prepare.json names them)" in capsys.readouterr().out


def test_a_slice_reaches_the_evaluation_set_and_nothing_that_is_learnt_from(raw: Raw) -> None:
    raw["data"]["sources"]["test"]["slices"] = {"stars": "rating"}
    run(raw)
    held_out = read_examples(Path("artifacts/data/evaluation/test.parquet"), ["text"], ["stars"])
    assert {(example.label, example.slices["stars"]) for example in held_out} == {("positive", "2.5"), ("negative", "-2.5")}
    for name in ("demonstrations", "transfer"):
        table = read_table(Path(f"artifacts/data/{name}.parquet"), examples_schema(["text"]))
        assert table.column_names == examples_schema(["text"]).names


def test_a_copy_of_an_evaluation_text_in_the_pool_is_quarantined_with_its_original(raw: Raw) -> None:
    raw["data"]["evaluation"]["test"]["per_label"] = None
    run(raw)
    (entry,) = [entry for entry in quarantine() if "copy_of" in entry]
    assert (entry["file"], entry["line"], entry["reason"]) == ("pool.jsonl", 41, "near copy of evaluation.test")
    assert entry["copy_of"] == {"role": "evaluation.test", "source": "test", "line": 1, "similarity": 1.0}


CHAT = {"template": "<|end|>Review: {text}<|end|>Sentiment:", "verbalisers": {"negative": " negative", "positive": " positive"}}


@pytest.mark.parametrize("where", ["template", "instruction"])
def test_a_text_that_spells_a_control_token_is_set_aside_before_any_model_runs(raw: Raw, where: str) -> None:
    """In the pool and in the test file alike, if the template or an instruction uses control tokens itself; otherwise it is only text."""
    for file, text in (("pool.jsonl", '{"text": "Cannot open <|end|>, please help"}'), ("test.tsv", "2.5\tNo <|end|> in sight")):
        with Path(file).open("a", encoding="utf-8") as sink:
            sink.write(text + "\n")
    raw["data"]["evaluation"]["test"]["per_label"] = None
    run(raw)
    assert not [entry for entry in quarantine() if "control token" in entry["reason"]]
    assert counts()["roles"]["evaluation"]["test"]["drawn"] == 31
    if where == "template":
        raw["task"] = CHAT
    else:
        raw["contexts"]["orders"]["instruction"] = "<|end|>Judge these reviews."
    run(raw)
    found = [entry for entry in quarantine() if "control token" in entry["reason"]]
    assert [(entry["file"], entry["line"]) for entry in found] == [("pool.jsonl", 45), ("test.tsv", 31)]
    assert found[0]["value"] == "Cannot open <|end|>, please help"
    assert "holds <|end|>, a control token of this model" in found[0]["reason"]
    assert counts()["sources"]["pool"]["quarantined"] == {"empty": 1, "control token": 1}
    assert counts()["roles"]["evaluation"]["test"]["drawn"] == 30


@pytest.mark.slow
def test_a_long_text_is_read_in_windows_that_fit_every_context_and_copy_no_evaluation_text(raw: Raw, tokenizer: Any) -> None:
    held_out = Path("test.tsv").read_text(encoding="utf-8").splitlines()[0].partition("\t")[2]
    long = " ".join(f"chapter {number} of many" for number in range(400))
    with Path("pool.jsonl").open("a", encoding="utf-8") as sink:
        sink.write(json.dumps({"text": long}) + "\n" + json.dumps({"text": (held_out + " ") * 100}) + "\n")
    raw["data"]["evaluation"]["test"]["per_label"] = None
    raw["task"]["long_texts"] = "windows"
    run(raw)
    learnt = read_examples(Path("artifacts/data/transfer.parquet"), ["text"])
    windows = [example for example in learnt if example.line == 45]
    assert len(windows) > 4
    assert all(window.fields["text"] in long for window in windows)
    assert {word for window in windows for word in window.fields["text"].split()} >= set(long.split())
    tokens = TaskTokens(Task(parse_params(raw).task), tokenizer, 512)
    for context in read_contexts(Path("artifacts/data/contexts/orders.parquet")):
        assert not any(prompt.cut for prompt in tokens.prompts(context, learnt))
    assert not [example for example in learnt if example.line == 46], "a window of a text may be a copy that the whole text is not"
    assert len({example.example_id for example in learnt}) == len(learnt) == counts()["roles"]["transfer"]["drawn"]
    assert counts()["roles"]["transfer"]["texts"] < len(learnt)
    assert counts()["cut"] == {}


def test_a_pool_has_no_labels_is_counted_and_fits_every_model(raw: Raw, model_folder: Callable[..., Path]) -> None:
    """A model that teachers ask behind contexts is a student's base too: it reads the pool without them."""
    gold = Path("pool.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    Path("more.jsonl").write_text("".join(json.dumps(json.loads(line) | {"label": "negative"}) + "\n" for line in gold), encoding="utf-8")
    raw["data"]["sources"]["more"] = {"path": "more.jsonl"}
    raw["data"]["transfer"]["limit"] = 10
    run(raw)
    assert not Path("artifacts/data/pool.parquet").exists()
    before = Path("artifacts/data/transfer.parquet").read_bytes()
    assert "pool" not in counts()["roles"]
    raw["data"]["pool"] = {"source": "more"}
    raw["students"] = {"cd": {"base": "models/tiny", "learn_from": "targets/few", "steps": 1, "learning_rate": 1e-3}}
    raw["rounds"] = {"second": {"student": "cd"}}
    run(raw)
    texts = read_examples(Path("artifacts/data/pool.parquet"), ["text"])
    assert {(e.source, e.label) for e in texts} == {("more", None)}
    assert Path("artifacts/data/transfer.parquet").read_bytes() == before
    assert counts()["roles"]["pool"]["drawn"] == len(texts) == 30
    assert counts()["roles"]["pool"].keys() == counts()["roles"]["transfer"].keys()
    with Path("more.jsonl").open("a", encoding="utf-8") as sink:
        sink.write(json.dumps({"text": "long " * 390}) + "\n")
    config = Path("artifacts/models/tiny/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 380}))
    run(raw)
    assert counts()["cut"]["tiny"]["pool"] == 1
    raw["task"]["long_texts"] = "refuse"
    with pytest.raises(UsageError, match=r"the input on line \d+ of (pool|more) is too long: its text has .* fit artifacts/models/tiny"):
        run(raw)


OTHERS: dict[str, dict[str, Any]] = {
    "tuned": {"tuned": {"tuned": {"base": "models/other", "steps": 1, "learning_rate": 1e-3}}},
    "students": {"students": {"cd": {"base": "models/other", "learn_from": "targets/few", "steps": 1, "learning_rate": 1e-3}}},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_is_only_trained_reads_the_inputs_too(raw: Raw, model_folder: Callable[..., Path], kind: str) -> None:
    """Its control tokens and its limit are found before the teachers run, not after the training."""
    shutil.copytree(model_folder(), other := Path("artifacts/models/other"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_text((other / file).read_text().replace("<|end|>", "<filename>"))
    with Path("pool.jsonl").open("a", encoding="utf-8") as sink:
        sink.write('{"text": "Cannot open <filename>, please help"}\n')
    raw |= {"models": {**raw["models"], "other": {"path": str(other)}}, **OTHERS[kind]}
    raw["task"] = CHAT | {"template": CHAT["template"].replace("<|end|>", "<filename>")}
    run(raw)
    (entry,) = [entry for entry in quarantine() if "control token" in entry["reason"]]
    assert (entry["line"], entry["reason"].split()[:2]) == (45, ["holds", "<filename>,"])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    with pytest.raises(
        UsageError, match=r"is too long: its text has .* fit artifacts/models/other\. At least 16 must fit: take a shorter template"
    ):
        run(raw)


def test_demonstrations_that_do_not_fit_the_model_are_refused(raw: Raw) -> None:
    config = json.loads(Path("artifacts/models/tiny/config.json").read_text())
    Path("artifacts/models/tiny/config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    with pytest.raises(UsageError, match=r"contexts\.orders: context orders/0 does not fit artifacts/models/tiny, which takes 100 tokens"):
        run(raw)


def test_a_model_folder_that_is_not_there_is_named(raw: Raw) -> None:
    shutil.rmtree("artifacts/models/tiny")
    with pytest.raises(UsageError, match="artifacts/models/tiny: no such model folder"):
        run(raw)


def test_answers_of_the_pool_are_kept_only_if_they_are_what_students_learn(raw: Raw) -> None:
    Path("pool.jsonl").write_text("".join(json.dumps({"text": f"{i} question {i * 7919}", "reply": f"a{i}"}) + "\n" for i in range(30)))
    for name, column in (("demos", "review"), ("pool", "reply"), ("test", "text")):
        raw["data"]["sources"][name] |= {"completion": column, "label": None}
    raw["contexts"] = {"orders": {"demonstrations": 3}}
    for block in ("targets", "teachers"):
        raw[block] = {}
    raw["baselines"] = {"teacher": {"prompts": "models/tiny", "contexts": "each"}}
    for kind, expected in (("given", "a"), ("generated", "")):
        raw["task"] = {"template": "Q: {text}\nA:", "completion": {"source": kind}}
        run(raw)
        found = read_examples(Path("artifacts/data/transfer.parquet"), ["text"])
        assert {(example.completion or "")[:1] for example in found} == {expected}
        assert {example.label for example in found} == {None}


def test_a_source_that_was_not_read_is_named(raw: Raw) -> None:
    params = run(raw)
    shutil.rmtree("artifacts/sources/pool")
    with pytest.raises(UsageError, match=r"sources/pool/examples\.parquet: no such file"):
        prepare(params, Folders.here())


def contents(*folders: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_another_process_with_another_hash_seed_writes_the_same_bytes(raw: Raw) -> None:
    params = run(raw)
    written = ("artifacts/sources", "artifacts/data", "metrics")
    expected = contents(*written)
    for folder in written:
        shutil.rmtree(folder)
    write_json(params.model_dump(mode="json"), Path("artifacts/params.json"))
    stages = "from stages import prepare, source; [source.main(name) for name in ('demos', 'pool', 'test')]; prepare.main()"
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", stages], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(*written) == expected
    assert "drawn: 6 demonstrations" in done.stdout
