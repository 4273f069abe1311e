"""`benchmarks.hand_back` on a tiny project: every round's student holds back the same texts, and learns what was handed back."""

from contextlib import chdir

import pytest
from small_project import FILMS, make_project, small_params, write_lines, write_params

from benchmarks import hand_back
from pipeline.files import read_json, write_json
from pipeline.models.held_back import HELD_BACK, LEARNT
from pipeline.params import resolve
from pipeline.schema import Example, read_examples, read_table
from stages import model, prepare, source, targets, teacher

pytestmark = pytest.mark.slow

WORDS = ["cold", "late", "warm", "great", "terrible", "lifeless"]


@pytest.fixture
def project(tmp_path, model_folder, monkeypatch):
    """The project after its targets, with labelled texts that are in no role and costs that were not measured."""
    monkeypatch.setenv("SHOTLESS_WORK", str(tmp_path / ".work"))
    make_project(tmp_path, model_folder("llama"))
    gold = [{"text": f"{film}, {word}", "label": ("negative", "positive")[n % 2]} for n, film in enumerate(FILMS) for word in WORDS]
    write_lines(tmp_path / "mine" / "gold.jsonl", gold)
    raw = small_params()
    raw["data"]["near_copy"] = 1.0
    write_params(tmp_path, raw)
    with chdir(tmp_path):
        resolve()
        model.main("tiny")
        for name in ("pile", "gold"):
            source.main(name)
        prepare.main()
        teacher.main("few_shot")
        targets.main("few_shot")
        for name in ("cd", "teacher"):
            write_json({"latency_ms": 1.0}, tmp_path / "metrics" / "cost" / f"{name}.json")
        yield tmp_path


def test_three_rounds_hold_back_the_same_texts_and_learn_what_was_handed_back(project, monkeypatch):
    held, learnt, handed = [], [], set[str]()
    train, learn = hand_back.train_student, hand_back.learn

    def trained(name, params, folders):
        train(name, params, folders)
        folder = folders.artifacts / "students" / name
        held.append(set(read_table(folder / "held_back.parquet", HELD_BACK)["example_id"].to_pylist()))
        learnt.append(set(read_table(folder / "learnt.parquet", LEARNT)["example_id"].to_pylist()))
        assert handed <= learnt[-1]

    def learning(texts, *rest):
        handed.update(Example(example.fields).example_id for example, _ in texts)
        learn(texts, *rest)

    monkeypatch.setattr(hand_back, "train_student", trained)
    monkeypatch.setattr(hand_back, "learn", learning)
    hand_back.main("cd", "few_shot", "teacher", agree=0.1, rounds=3, arriving=6, steps=3, results=project / "found.json")
    rounds = read_json(project / "found.json")["rounds"]
    assert [one["round"] for one in rounds] == [1, 2, 3]
    assert held[0] == held[1] == held[2]
    assert handed
    transfer = {example.example_id for example in read_examples(project / "artifacts" / "data" / "transfer.parquet", ["text"])}
    assert held[0] < transfer
    assert not handed & transfer
