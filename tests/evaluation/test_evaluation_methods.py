"""The stages that evaluate and check a method, from files to files: metrics against the predictions, cost, risks."""

import numpy as np
import pyarrow as pa
import pytest
from method_world import LABELS, SETS, SHOTS, TIMED, World, figures_of, naive_scores, prompt_ids, raw_params, rows_of

from pipeline.teachers import scorer as scorer_module
from pipeline.errors import UsageError
from pipeline.evaluation import jobs as jobs_module
from pipeline.evaluation.check import check_student
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.jobs import FIGURES, Inputs, by_demonstrations
from pipeline.files import read_json
from pipeline.files import sha256_json
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.models.identity import weights_sha256
from pipeline.params import parse_params
from pipeline.schema import PREDICTIONS, examples, read_table, write_table


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    return World(tmp_path_factory.mktemp("evaluation"), model_folder("llama"), model_folder("llama", seed=1))


@pytest.fixture
def own_world(world, tmp_path):
    return world.copied(tmp_path / "copy")


def subject_of(world, tokenizer, asked, texts):
    """Weights and full prompts of what a method's cost is measured on, from the definition."""
    models = [
        [
            weights_sha256(world.artifacts / folder),
            [[prompt_ids(tokenizer, context, text) for context in contexts] for text in texts],
        ]
        for folder, contexts in asked
    ]
    return sha256_json(models)


@pytest.mark.parametrize(
    ("name", "kind", "asked"),
    [
        ("cd", "student", [("students/cd", [""])]),
        ("icl", "baseline", [("models/first", SHOTS[:1])]),  # the first context stands for the others
        ("teacher", "baseline", [("models/first", SHOTS), ("models/second", [""])]),
    ],
)
def test_evaluation_writes_predictions_metrics_and_cost(own_world, tokenizer, name, kind, asked):
    texts = [text for text, _ in SETS["near"][:TIMED]]
    figures = figures_of(subject_of(own_world, tokenizer, asked, texts))
    metrics, cost = own_world.evaluate(name, figures)
    table = read_table(own_world.artifacts / "predictions" / f"{name}.parquet", PREDICTIONS)
    assert (metrics["method"], metrics["kind"]) == (name, kind)
    assert metrics["subject"] == cost["measured"]["subject"] == figures["measured"]["subject"]
    assert cost == figures | ({} if kind == "student" else {"by_demonstrations": []})
    assert metrics["sets"] == evaluate_predictions(table, LABELS, resamples=50, seed=3)
    rows = table.to_pylist()
    for key, pairs in SETS.items():
        right = [row["predicted"] == row["label"] for row in rows if row["set"] == key]
        loss = [-np.log(row["probabilities"][LABELS.index(row["label"])] / sum(row["probabilities"])) for row in rows if row["set"] == key]
        assert metrics["sets"][key]["n"] == len(pairs)
        assert metrics["sets"][key]["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
        assert metrics["sets"][key]["log_loss"] == pytest.approx(np.mean(loss), abs=1e-5)


def test_evaluation_elsewhere_gives_the_same_bytes(world, own_world, tokenizer):
    subject = subject_of(world, tokenizer, [("students/cd", [""])], [text for text, _ in SETS["near"][:TIMED]])
    for place in (world, own_world):
        place.evaluate("cd", figures_of(subject))
    for file in ("artifacts/predictions/cd.parquet", "metrics/eval/cd.json"):
        assert (world.root / file).read_bytes() == (own_world.root / file).read_bytes()


def test_an_unknown_method_is_refused_with_the_choices(world):
    with pytest.raises(UsageError, match="no 'nobody'; choose one of: cd, icl, icl_mix, teacher"):
        evaluate("nobody", parse_params(raw_params()), world.artifacts, world.metrics, world.work)


def test_evaluation_breaks_the_predictions_down(own_world, tokenizer):
    subject = subject_of(own_world, tokenizer, [("students/cd", [""])], [text for text, _ in SETS["near"][:TIMED]])
    own_world.evaluate("cd", figures_of(subject))
    found = read_json(own_world.metrics / "detail" / "cd.json")
    assert found["method"] == "cd"
    assert {name: sum(b["n"] for b in entry["reliability"]) for name, entry in found["sets"].items()} == {"near": 4, "far": 3}
    assert {entry["dimension"] for entry in found["slices"]} == {"domain", "label", "length"}


def test_a_baseline_s_models_are_measured_behind_a_rising_number_of_demonstrations(own_world, tokenizer, monkeypatch):
    shown = rows_of([("a warm film", "positive"), ("bored", "negative"), ("so-so", "mixed")])
    file = own_world.artifacts / "data" / "demonstrations.parquet"
    write_table(pa.Table.from_pylist(shown, examples(("text",))), file)
    asked = []
    figures = dict.fromkeys(FIGURES, 1.0)
    monkeypatch.setattr(jobs_module, "measure", lambda job, _: asked.append(job) or figures)
    rows = [{"text": text} for text, _ in SETS["near"]]
    inputs = Inputs.of(own_world.task, rows, TIMED, 1)
    found = by_demonstrations(own_world.calibration("mix"), [0, 2, 5, 80], inputs, own_world.artifacts, own_world.work)
    one = [own_world.task.demonstration(row, row["label"]) for row in shown]
    contexts = {0: "", 2: "".join(one[:2]), 5: "".join(one + one[:2])}
    tokens = {count: len(tokenizer(text).input_ids) for count, text in contexts.items()}
    for model in ("models/first", "models/second"):
        mine = [row for row in found if row["model"] == model]
        assert [row["demonstrations"] for row in mine] == [0, 2, 5, 80]
        assert [row["context_tokens"] for row in mine[:3]] == list(tokens.values())
        assert [row.get("repeated", False) for row in mine] == [False, False, True, True]
        assert all(row.items() >= figures.items() for row in mine[:3])
        assert mine[3].keys() == {"model", "demonstrations", "context_tokens", "repeated", "too_long_for"}
        assert mine[3]["too_long_for"] == 512 < mine[3]["context_tokens"]
    prompts = [job.models[0].examples for job in asked]
    expected = [[[prompt_ids(tokenizer, text, row["text"])] for row in rows[:TIMED]] for text in contexts.values()]
    assert prompts == expected * 2
    packed = asked[1].models[0].packed
    assert packed.prefixes == [tokenizer(contexts[2]).input_ids]
    assert packed.queries == [prompt_ids(tokenizer, "", row["text"]) for row in rows]


def test_a_student_s_answers_to_swapped_and_shortened_texts_are_the_plain_forward_s(own_world, tokenizer):
    raw = raw_params()
    write_table(own_world.student(), own_world.artifacts / "predictions" / "cd.parquet")
    write_table(own_world.baseline("mix", ensemble=True), own_world.artifacts / "predictions" / "teacher.parquet")
    output = own_world.metrics / "risk" / "cd.json"
    check_student("cd", parse_params(raw), own_world.artifacts, output, own_world.work)
    found, folder = read_json(output), own_world.artifacts / "students" / "cd"
    frame = next(entry for entry in found["swaps"] if entry["name"] == "frame_3")
    assert (frame["texts"], frame["asked"]) == (7, 7)
    for shown in frame["examples"]:
        text = f"{shown['before']['text']} That is the whole text."
        assert shown["after"] == {"text": text}
        answer = LABELS.index(shown["answer_before"])
        for when, asked in (("p_before", shown["before"]["text"]), ("p_after", text)):
            expected = np.exp(naive_scores(folder, tokenizer, "", asked))[answer]
            assert shown[when] == pytest.approx(expected, abs=1e-4)
    ours, theirs = (
        {(row["set"], row["example_id"]): row["predicted"] for row in read_table(path, PREDICTIONS).to_pylist()}
        for path in (own_world.artifacts / "predictions" / f"{name}.parquet" for name in ("cd", "teacher"))
    )
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert found["disagreement"][0]["share"] == pytest.approx(len(differ) / 7, abs=1e-6)
    assert {(entry["set"], entry["example_id"]) for entry in found["attributions"]} == differ, "all are few enough to be shown"
    for entry in found["attributions"]:
        text, answer = entry["fields"]["text"], LABELS.index(entry["student"])
        for word in entry["words"]:
            without = " ".join(text.split()[: text[: word["start"]].count(" ")] + text.split()[text[: word["start"]].count(" ") + 1 :])
            p, q = (np.exp(naive_scores(folder, tokenizer, "", asked))[answer] for asked in (text, without))
            assert word["weight"] == pytest.approx(np.log(p / (1 - p)) - np.log(q / (1 - q)), abs=2e-3)


def test_checks_need_no_model_a_second_time(own_world, monkeypatch):
    write_table(own_world.student(), own_world.artifacts / "predictions" / "cd.parquet")
    write_table(own_world.baseline("mix", ensemble=True), own_world.artifacts / "predictions" / "teacher.parquet")
    first, second = own_world.metrics / "first.json", own_world.metrics / "second.json"
    check_student("cd", parse_params(raw_params()), own_world.artifacts, first, own_world.work)
    monkeypatch.setattr(scorer_module, "load_model", None)
    check_student("cd", parse_params(raw_params()), own_world.artifacts, second, own_world.work)
    assert first.read_bytes() == second.read_bytes()
