"""Which student is chosen: scores by hand, ties, what is no candidate, and what is too slow by a made-up clock."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.evaluation import select as module
from pipeline.evaluation.select import select_student
from pipeline.files import read_json, read_manifest, write_manifest
from pipeline.models.held_back import HELD_BACK
from pipeline.schema import TARGETS, Example, write_examples, write_table

TEXTS = [Example({"text": text}, source="s", line=n) for n, text in enumerate(("a film", "so-so", "bored", "late", "funny"), 1)]
IDS = [example.example_id for example in TEXTS]
MIX = dict(zip(IDS, [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4]], strict=True))
"""The reference's targets: negative, mixed, positive."""
STUDENT = {"base": "models/first", "learn_from": "targets/mix", "steps": 2, "learning_rate": 1e-3}


@pytest.fixture
def chosen(world):
    """`chosen(students, within_ms)`: what best.json says of students given as (changes of params, id → label said, parameters)."""
    targets = [{"example_id": one, "probabilities": shares, "agreement": 1.0} for one, shares in MIX.items()]
    write_table(pa.Table.from_pylist(targets, TARGETS), world.artifacts / "targets" / "mix" / "targets.parquet")
    write_examples(TEXTS, ("text",), world.artifacts / "data" / "transfer.parquet")

    def choose(students, within_ms=None):
        world.raw["students"] = {name: STUDENT | changes for name, (changes, _, _) in students.items()}
        world.raw["select"] = {"within_ms": within_ms}
        for name, (_, said, parameters) in students.items():
            if said is not None:
                world.train(name, 4)
                folder = world.artifacts / "students" / name
                own = [[0.5, 0.2, 0.3]] * len(said)  # of the student's own target set, which does not judge
                rows = [
                    (one, np.roll([-0.1, -3.0, -4.0], label), shares, 0.5) for (one, label), shares in zip(said.items(), own, strict=True)
                ]
                table = pa.Table.from_pylist([dict(zip(HELD_BACK.names, row, strict=True)) for row in rows], HELD_BACK)
                write_table(table, folder / "held_back.parquet")
                about = {key: value for key, value in read_manifest(folder).items() if key != "files"}
                write_manifest(folder, about | {"counts": {"parameters": parameters}})
        select_student(world.params, world.folders)
        return read_json(world.artifacts / "best.json")

    return choose


def test_the_score_is_what_the_reference_s_targets_give_to_the_answers_on_the_texts_in_common(chosen, world):
    world.raw["rounds"] = {"second": {"student": "one"}}
    world.raw["data"]["pool"] = {"source": "movie"}
    world.raw["data"]["transfer"] = {"source": "movie", "limit": 5}
    first, second, third, fourth, _ = IDS
    found = chosen(
        {
            "one": ({}, {first: 0, second: 1, third: 1, fourth: 2}, 9),
            "other": ({"learn_from": "targets/few"}, {third: 0, first: 0, fourth: 0}, 8),
            "small": ({"learn_from": "rounds/second"}, {fourth: 2, "of the pool": 0, third: 0, first: 2}, 7),
        }
    )
    by_hand = {"one": [0.7, 0.1, 0.5], "other": [0.7, 0.8, 0.2], "small": [0.1, 0.8, 0.5]}  # of first, third and fourth
    assert list(found["candidates"]) == ["other", "small", "one"]
    for name, shares in by_hand.items():
        own = found["candidates"][name]
        assert own["score"] == pytest.approx(sum(shares) / 3, abs=1e-6)
        variance = sum((share - sum(shares) / 3) ** 2 for share in shares) / 2
        assert own["standard_error"] == pytest.approx((variance / 3) ** 0.5, abs=1e-6)
    assert [found[key] for key in ("student", "targets", "texts", "no_candidates")] == ["other", "mix", 3, {}]
    assert {name: own["parameters"] for name, own in found["candidates"].items()} == {"one": 9, "other": 8, "small": 7}
    assert not (world.metrics / "runtime" / "select.json").exists(), "nothing was timed"


@pytest.mark.parametrize(("sizes", "expected"), [((9, 8, 1), "b"), ((8, 9, 1), "a"), ((8, 8, 1), "a")])
def test_of_equal_scores_the_student_of_fewer_parameters_is_chosen(chosen, sizes, expected):
    first, second, *_ = IDS
    # 0.7 + 0.1 + … in another order is another float
    answers = {"a": dict(zip(IDS, (0, 1, 0, 2, 2), strict=True)), "b": dict(zip(reversed(IDS), (2, 2, 0, 1, 0), strict=True))}
    answers["worse"] = answers["a"] | {first: 2, second: 0}
    found = chosen({name: ({}, said, size) for (name, said), size in zip(answers.items(), sizes, strict=True)})
    assert found["student"] == expected


def test_one_candidate_is_the_best_and_one_text_has_no_standard_error(chosen):
    found = chosen({"alone": ({}, {IDS[2]: 1}, 3)})
    assert found["student"] == "alone"
    assert found["candidates"] == {"alone": {"score": 0.1, "standard_error": None, "parameters": 3}}


def test_what_holds_nothing_back_is_no_candidate_and_a_run_without_any_goes_on(chosen):
    students = {
        "labels": ({"learn_from": "data/demonstrations.parquet"}, None, 0),
        "cache": ({"learn_from": "teachers/few"}, None, 0),
        "all": ({"held_back": 0.0}, None, 0),
    }
    reasons = {
        "labels": "it learns from labels alone",
        "cache": "it learns from a teacher's cache, not from a target set or a round",
        "all": "its `held_back` is 0",
    }
    nothing = {"student": None, "targets": "mix", "texts": 0, "candidates": {}, "no_candidates": reasons}
    assert chosen(students, within_ms=5) == nothing
    assert chosen(students | {"cd": ({}, {IDS[0]: 0}, 3)}) | {"candidates": {}} == nothing | {"student": "cd", "texts": 1}
    assert chosen({}) == nothing | {"no_candidates": {}}


def test_no_text_in_common_leaves_no_candidate(chosen):
    found = chosen({"a": ({}, {IDS[0]: 0}, 3), "b": ({}, {IDS[1]: 0}, 3)}, within_ms=5)
    reason = "the candidates (a, b) held back no text in common that targets/mix has"
    assert [found[key] for key in ("student", "texts", "no_candidates")] == [None, 0, {"a": reason, "b": reason}]


def test_free_text_has_no_candidate(world):
    world.answer_freely()
    select_student(world.params, world.folders)
    found = read_json(world.artifacts / "best.json")
    assert (found["student"], found["no_candidates"].keys()) == (None, {"several"})


@pytest.fixture
def clock(monkeypatch):
    """A made-up time for each student, and the texts that it was asked."""
    times, asked = {"good": 30.0, "fair": 20.0, "poor": 5.0}, []

    def measured(name, models, task, examples, timed, threads):
        asked.append((name, models[0].folder.name, [example.example_id for example in examples], timed, threads))
        return {"latency_ms": times[name]}

    monkeypatch.setattr(module, "measured_apart", measured)
    return asked


STUDENTS = {
    name: ({}, dict(zip(IDS, said, strict=True)), 3)
    for name, said in {"poor": (1, 0, 1, 0, 0), "good": (0, 1, 0, 2, 2), "fair": (0, 1, 0, 2, 1)}.items()
}


def test_a_student_above_the_limit_drops_out_and_times_stay_out_of_the_output(chosen, clock, world, monkeypatch):
    assert chosen(STUDENTS)["student"] == "good"
    assert clock == []
    monkeypatch.setattr(module, "MOST_TIMED", 4)
    found = chosen(STUDENTS, within_ms=20)
    assert (found["student"], list(found["candidates"])) == ("fair", ["fair", "poor"])
    assert found["no_candidates"] == {"good": "it is slower than select.within_ms"}
    assert clock == [(name, name, sorted(IDS)[:4], 4, 1) for name in STUDENTS]
    times = {"latency_ms": {"poor": 5.0, "good": 30.0, "fair": 20.0}, "texts": 4, "threads": 1}
    assert read_json(world.metrics / "runtime" / "select.json") == times


def test_if_none_is_quick_enough_the_quickest_is_named_with_its_time(chosen, clock, world):
    said = r"select\.within_ms: 4\.5, and no student .*'poor', takes 5 ms a text .*Raise the limit, or add a student with fewer `layers`"
    with pytest.raises(UsageError, match=said):
        chosen(STUDENTS, within_ms=4.5)
    assert not (world.artifacts / "best.json").exists()
    assert read_json(world.metrics / "runtime" / "select.json")["latency_ms"]["poor"] == 5.0


@pytest.mark.slow
def test_a_student_is_timed_in_a_process_of_its_own(chosen, world):
    assert chosen({"cd": ({}, {IDS[0]: 0}, 3)}, within_ms=1e9)["student"] == "cd"
    assert read_json(world.metrics / "runtime" / "select.json")["latency_ms"]["cd"] > 0


def test_a_damaged_student_and_one_of_another_task_are_refused(chosen, world):
    chosen(STUDENTS)
    world.train("fair", 4, task=world.params.task.model_copy(update={"template": "Other: {text}"}))
    with pytest.raises(MismatchError, match=r"fair: trained with task\.template"):
        select_student(world.params, world.folders)
    (world.artifacts / "students" / "good" / "held_back.parquet").write_bytes(b"no table")
    with pytest.raises(CorruptError, match=r"held_back\.parquet"):
        select_student(world.params, world.folders)
