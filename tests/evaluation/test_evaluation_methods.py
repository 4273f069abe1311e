"""Students and baselines on evaluation sets, from files to files: predictions against full prompts, metrics against the predictions."""

import copy
import functools
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT
from ruamel.yaml import YAML

from pipeline.engine import scorer as scorer_module
from pipeline.ensemble import Combination
from pipeline.errors import MismatchError, UsageError
from pipeline.evaluation import evaluate as evaluate_module
from pipeline.evaluation import jobs as jobs_module
from pipeline.evaluation.check import check_student
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.jobs import FIGURES, Inputs, by_demonstrations
from pipeline.evaluation.predict import combination_of, predict_baseline, predict_student, read_sets, teacher_contexts
from pipeline.files import read_json, read_sealed_json
from pipeline.hashing import context_id, example_id, sha256_json
from pipeline.metrics import evaluate_predictions
from pipeline.models.identity import weights_sha256
from pipeline.models.loading import load_model
from pipeline.params import parse_params
from pipeline.schema import CONTEXTS, PREDICTIONS, examples, read_table, write_table
from pipeline.student.runs import Places, train_student
from pipeline.targets.build import build_targets
from pipeline.tasks import Task
from pipeline.teacher.capture import capture

TEMPLATE = "Review: {text}\nSentiment:"
VERBALISERS = {"negative": " bad", "mixed": " so-so", "positive": " good"}  # the second has several tokens
LABELS = list(VERBALISERS)
SHOTS = ["Review: a warm film\nSentiment: good\n\n", "Review: bored\nSentiment: bad\n\nReview: I loved it\nSentiment: good\n\n"]
CONTEXTS_OF = {"shots": SHOTS, "none": [""]}
TRANSFER = ["a warm and funny film", "a dull, lifeless mess", "funny", "strange little picture", "the plot goes nowhere"]
SETS = {  # one text stands in both
    "near": [("I loved every minute", "positive"), ("the actors seem bored", "negative"), ("so-so", "mixed"), ("a film", "mixed")],
    "far": [("cold food, late service", "negative"), ("a film", "positive"), ("great", "positive")],
}
TIMED = 2


def rows_of(pairs):
    return [
        {"example_id": example_id({"text": text}), "label": label, "source": "s", "line": line, "text": text}
        for line, (text, label) in enumerate(pairs, 1)
    ]


class World:
    """An artifacts folder with two teachers' targets, a student and two evaluation sets, made by the stages' own functions."""

    def __init__(self, root, first, second):
        self.root, self.artifacts, self.metrics, self.work = root, root / "artifacts", root / "metrics", root / "work"
        for name, folder in {"first": first, "second": second}.items():
            shutil.copytree(folder, self.artifacts / "models" / name)
        schema = examples(("text",))
        for name, pairs in SETS.items():
            write_table(pa.Table.from_pylist(rows_of(pairs), schema), self.artifacts / "data" / "evaluation" / f"{name}.parquet")
        transfer = self.artifacts / "data" / "transfer.parquet"
        write_table(pa.Table.from_pylist(rows_of([(text, None) for text in TRANSFER]), schema), transfer)
        for name, texts in CONTEXTS_OF.items():
            rows = [
                {"context_id": context_id(text), "name": f"{name}/{n}", "text": text, "example_ids": [], "tokens": 1}
                for n, text in enumerate(texts)
            ]
            write_table(pa.Table.from_pylist(rows, CONTEXTS), self.artifacts / "data" / "contexts" / f"{name}.parquet")
        params, places = parse_params(raw_params()), Places(self.artifacts, self.metrics, self.work)
        self.task = Task(params.task)
        for name, teacher in params.teachers.items():
            contexts = self.artifacts / "data" / "contexts" / f"{teacher.contexts}.parquet"
            scores = self.artifacts / "scores" / name
            capture(name, self.artifacts / teacher.model, contexts, transfer, scores, self.task, teacher.cache, "float32", self.work, 1)
        texts = read_table(transfer, examples(["text"]))
        for name, target in params.targets.items():
            output, metrics = self.artifacts / "targets" / name, self.metrics / f"{name}.json"
            build_targets(name, target, params.teachers, self.task, texts, self.artifacts / "scores", output, metrics)
        train_student("cd", params.students["cd"], self.task, places, 1)

    def calibration(self, name):
        return read_sealed_json(self.artifacts / "targets" / name / "calibration.json")

    def sets(self):
        return read_sets(self.artifacts / "data" / "evaluation", list(SETS), self.task)

    def student(self, task=None):
        return predict_student("cd", {"": self.artifacts / "students" / "cd"}, task or self.task, self.sets(), self.work, 1)

    def baseline(self, targets, ensemble):
        return predict_baseline("base", self.calibration(targets), ensemble, self.task, self.sets(), self.artifacts, self.work, 1)

    def evaluate(self, name, figures, raw=None, metrics=None):
        """Run the stage with the cost figures of `figures`' subject at hand; measuring anything else fails."""
        parsed = parse_params(raw or raw_params())
        metrics = metrics or self.metrics
        known = {figures["measured"]["subject"]: figures}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate_module, "measure", lambda job, _: copy.deepcopy(known[job.subject]))
            evaluate(name, parsed, self.artifacts, metrics, self.work)
        return read_json(metrics / "eval" / f"{name}.json"), read_json(metrics / "cost" / f"{name}.json")


def raw_params() -> dict[str, Any]:
    """The shipped params with this file's task, models, teachers, targets, student and baselines."""
    shipped = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    model = next(iter(shipped["models"].values()))
    source = shipped["data"]["demonstrations"]["source"]
    few = {"model": "models/first", "contexts": "shots", "cache": {"top_k": 4}}
    return copy.deepcopy(
        shipped
        | {
            "task": {"template": TEMPLATE, "verbalisers": VERBALISERS},
            "models": {"first": model, "second": model},
            "data": shipped["data"] | {"evaluation": {name: {"source": source, "domain": "in", "per_label": 4} for name in SETS}},
            "contexts": {
                "shots": {"demonstrations": 2, "count": 2, "tokenizer": "models/first"},
                "none": {"demonstrations": 0, "tokenizer": "models/first"},
            },
            "tunings": {},
            "teachers": {
                "few": few,
                "few_second": few | {"model": "models/second"},
                "zero": {"model": "models/second", "contexts": "none", "cache": {"top_k": 4}},
            },
            "targets": {
                "few": {"teachers": {"few": 1.0}, "calibration": "batch", "temperature": 1.5},
                "mix": {"teachers": {"few": 3.0, "zero": 1.0}, "calibration": "contextual", "temperature": 0.7},
                "geometric": {"teachers": {"zero": 1.0, "few": 1.0}, "calibration": "none", "average": "log_probability"},
                "two_models": {"teachers": {"few": 1.0, "few_second": 1.0}, "calibration": "none"},
            },
            "students": {
                "cd": {"base": "models/first", "layers": "0, 2-3", "learn_from": "targets/mix", "steps": 2, "learning_rate": 1e-3},
            },
            "baselines": {
                "icl": {"prompts": "targets/few", "contexts": "each"},
                "icl_mix": {"prompts": "targets/mix", "contexts": "each"},
                "teacher": {"prompts": "targets/mix", "contexts": "ensemble"},
            },
            "evaluation": {"reference": "teacher", "bootstrap": 50, "seed": 3, "cost_examples": TIMED, "cost_demonstrations": []},
            "runtime": {"threads": 1},
        }
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    return World(tmp_path_factory.mktemp("evaluation"), model_folder("llama"), model_folder("llama", seed=1))


@pytest.fixture
def own_world(world, tmp_path):
    """A copy of the world, at another place, which a test may spoil."""
    shutil.copytree(world.root, tmp_path / "copy")
    own = copy.copy(world)
    own.root, own.artifacts, own.metrics, own.work = (tmp_path / "copy" / name for name in ("", "artifacts", "metrics", "work"))
    return own


def figures_of(subject, **values):
    return {"measured": {"subject": subject, "examples": TIMED}, "latency_ms": 1.5, **values}


def prompt_ids(tokenizer, context, text):
    return tokenizer(context).input_ids + tokenizer(TEMPLATE.format(text=text)).input_ids


@functools.cache
def loaded(folder):
    return load_model(folder)


@torch.no_grad()
def naive_scores(folder, tokenizer, context, text):
    """Log-probabilities of the labels' tokens behind one full prompt, normalised over the labels: [L]."""
    model, prompt, scores = loaded(folder), prompt_ids(tokenizer, context, text), []
    for verbaliser in VERBALISERS.values():
        ids, total = tokenizer(verbaliser).input_ids, 0.0
        for place, token in enumerate(ids):
            total += float(model(torch.tensor([prompt + ids[:place]])).logits[0, -1].double().log_softmax(-1)[token])
        scores.append(total)
    return np.array(scores) - np.log(np.exp(scores).sum())


def naive_calibrated(world, tokenizer, target, folder, context, text):
    """One context's answer to one text, calibrated as the params say, from nothing but full prompts."""
    scored = [naive_scores(folder, tokenizer, context, seen) for seen in {"batch": TRANSFER, "contextual": ["N/A"]}[target["calibration"]]]
    offsets = np.mean(scored, 0) - np.mean(scored)
    p = np.exp((naive_scores(folder, tokenizer, context, text) - offsets) / target["temperature"])
    return p / p.sum()


def assert_predictions(table, expected):
    """`expected`: rows of set, context, text, gold label and probabilities, in order."""
    assert table.schema.equals(PREDICTIONS)
    rows = table.to_pylist()
    assert len(rows) == len(expected)
    for row, (name, context, text, label, probabilities) in zip(rows, expected, strict=True):
        assert (row["set"], row["context_id"]) == (name, context)
        assert (row["example_id"], row["label"]) == (example_id({"text": text}), label)
        assert np.log(row["probabilities"]) == pytest.approx(np.log(probabilities), abs=1e-3)
        assert row["predicted"] == LABELS[int(np.argmax(row["probabilities"]))]


def test_a_student_s_predictions_are_those_of_the_plain_forward_on_the_bare_query(world, tokenizer):
    folder = world.artifacts / "students" / "cd"
    expected = [
        (name, "", text, label, np.exp(naive_scores(folder, tokenizer, "", text))) for name, pairs in SETS.items() for text, label in pairs
    ]
    assert_predictions(world.student(), expected)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"template": "{text} It was"}, "template"),
        ({"verbalisers": VERBALISERS | {"positive": " great"}}, "verbalisers"),
        ({"verbalisers": {"negative": " bad", "positive": " good"}}, "verbalisers"),
    ],
)
def test_a_student_of_another_template_or_other_verbalisers_is_refused_with_both(world, changes, what):
    task = Task(world.task.params.model_copy(update=changes))
    with pytest.raises(MismatchError) as caught:
        world.student(task)
    for part in (str(world.artifacts / "students" / "cd"), f"trained with {what}", repr(changes[what]), "run `dvc repro`"):
        assert part in str(caught.value)


def test_every_context_on_its_own_is_calibrated_by_itself(world, tokenizer):
    target = raw_params()["targets"]["few"]
    folder = world.artifacts / "models" / "first"
    expected = [
        (name, context_id(context), text, label, naive_calibrated(world, tokenizer, target, folder, context, text))
        for name, pairs in SETS.items()
        for context in SHOTS
        for text, label in pairs
    ]
    assert_predictions(world.baseline("few", ensemble=False), expected)


def test_contexts_of_several_teachers_are_each_answered_by_their_own_model(world, tokenizer):
    target = raw_params()["targets"]["mix"]
    asked = [("first", SHOTS[0]), ("first", SHOTS[1]), ("second", "")]
    expected = [
        (name, context_id(context), text, label, naive_calibrated(world, tokenizer, target, folder, context, text))
        for name, pairs in SETS.items()
        for folder, context in ((world.artifacts / "models" / model, context) for model, context in asked)
        for text, label in pairs
    ]
    assert_predictions(world.baseline("mix", ensemble=False), expected)


def test_the_ensemble_is_the_weighted_mean_of_the_calibrated_answers(world, tokenizer):
    target = raw_params()["targets"]["mix"]
    asked = [("first", SHOTS[0], 3 / 8), ("first", SHOTS[1], 3 / 8), ("second", "", 1 / 4)]
    expected = []
    for name, pairs in SETS.items():
        for text, label in pairs:
            each = [naive_calibrated(world, tokenizer, target, world.artifacts / "models" / m, context, text) for m, context, _ in asked]
            expected.append((name, "", text, label, sum(weight * p for (*_, weight), p in zip(asked, each, strict=True))))
    assert_predictions(world.baseline("mix", ensemble=True), expected)


def test_an_ensemble_of_log_probabilities_is_the_geometric_mean(world, tokenizer):
    asked = [("second", "", 0.5), ("first", SHOTS[0], 0.25), ("first", SHOTS[1], 0.25)]
    expected = []
    for name, pairs in SETS.items():
        for text, label in pairs:
            p = np.exp(sum(w * naive_scores(world.artifacts / "models" / model, tokenizer, context, text) for model, context, w in asked))
            expected.append((name, "", text, label, p / p.sum()))
    assert_predictions(world.baseline("geometric", ensemble=True), expected)


def test_the_ensemble_of_the_transfer_set_would_be_the_targets(world):
    """Baselines and targets are made by the same arithmetic from the same calibration."""
    sets = {"transfer": [row | {"label": LABELS[0]} for row in rows_of([(text, None) for text in TRANSFER])]}
    table = predict_baseline("base", world.calibration("mix"), True, world.task, sets, world.artifacts, world.work, 1)
    targets = read_table(world.artifacts / "targets" / "mix" / "targets.parquet", pa.schema([PREDICTIONS.field("probabilities")]))
    assert np.allclose(table["probabilities"].to_pylist(), targets["probabilities"].to_pylist(), atol=1e-6)


def test_no_prediction_is_lost_where_two_models_answer_in_the_same_contexts(world):
    """Either every (model, context) has its rows, or such a baseline is refused."""
    raw = raw_params()
    raw["baselines"]["icl_two_models"] = {"prompts": "targets/two_models", "contexts": "each"}
    try:
        parse_params(raw)
        table = world.baseline("two_models", ensemble=False)
    except UsageError:
        return
    assert len(table) == 2 * len(SHOTS) * sum(map(len, SETS.values()))


def test_an_example_in_two_sets_is_answered_alike_and_asked_once(own_world):
    shutil.rmtree(own_world.work)
    rows = own_world.student().to_pylist()
    shared = [row["probabilities"] for row in rows if row["example_id"] == example_id({"text": "a film"})]
    assert len(shared) == 2
    assert shared[0] == shared[1]
    files = own_world.work.glob("scores/*/part-*.parquet")
    assert sum(pq.read_metadata(file).num_rows for file in files) == len({text for pairs in SETS.values() for text, _ in pairs})


def test_a_second_evaluation_needs_no_model(world, monkeypatch):
    tables = [world.student(), world.baseline("mix", ensemble=True)]
    monkeypatch.setattr(scorer_module, "load_model", None)
    assert [world.student(), world.baseline("mix", ensemble=True)] == tables


def test_baselines_share_the_scores_of_the_same_prompts(own_world, monkeypatch):
    own_world.baseline("mix", ensemble=True)
    monkeypatch.setattr(scorer_module, "load_model", None)
    own_world.baseline("few", ensemble=False)
    own_world.baseline("geometric", ensemble=True)


def test_a_context_that_is_no_longer_there_is_named(own_world):
    path = own_world.artifacts / "data" / "contexts" / "shots.parquet"
    write_table(read_table(path, CONTEXTS).slice(0, 1), path)
    with pytest.raises(MismatchError, match=rf"shots\.parquet: context {context_id(SHOTS[1])[:12]} of target set 'mix' is not in it"):
        own_world.baseline("mix", ensemble=True)


def test_contexts_come_in_the_calibration_s_order(own_world):
    calibration = own_world.calibration("mix")
    calibration["contexts"].reverse()
    assert [row["text"] for row in teacher_contexts(calibration, "few", own_world.artifacts)] == SHOTS[::-1]


def test_a_teacher_that_is_no_longer_the_calibrated_one_is_refused(own_world, model_folder):
    shutil.rmtree(own_world.artifacts / "models" / "first")
    shutil.copytree(model_folder("llama", seed=2), own_world.artifacts / "models" / "first")
    with pytest.raises(MismatchError, match=r"targets/mix/calibration\.json was not made by this run's teacher"):
        own_world.baseline("mix", ensemble=True)


def test_the_combination_is_what_the_calibration_says():
    calibration = {
        "average": "log_probability",
        "temperature": 0.5,
        "contexts": [{"offsets_nats": [0.25, -0.25], "weight": 0.75}, {"offsets_nats": [0.0, 0.0], "weight": 0.25}],
        "by_source": {"tweets": [[1.0, -1.0], [0.5, -0.5]]},
    }
    found = combination_of(calibration, "movie")
    assert isinstance(found, Combination)
    assert found.offsets.tolist() == [[0.25, -0.25], [0.0, 0.0]]
    assert found.weights.tolist() == [0.75, 0.25]
    assert (found.average, found.temperature) == ("log_probability", 0.5)
    assert combination_of(calibration, "tweets").offsets.tolist() == [[1.0, -1.0], [0.5, -0.5]]


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
