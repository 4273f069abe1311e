"""What single sections show: examples of disagreement, reliability, confusion, cost; and how a page is put together from them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_files import shipped_params, write_run

from pipeline.errors import CorruptError
from pipeline.params import Params
from pipeline.report import costs, page, reliability, risks, sections, slices, tradeoffs
from pipeline.report.collect import Inputs, collect
from pipeline.report.disagreements import attributions, disagreements, shortened, voters
from pipeline.report.document import metrics_document
from pipeline.report.sections import Section, View
from pipeline.report.templating import make_environment


@pytest.fixture(scope="module")
def shipped() -> Params:
    return shipped_params(20)


@pytest.fixture(scope="module")
def root(shipped: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(shipped, folder, examples=60)
    return folder


@pytest.fixture(scope="module")
def inputs(shipped: Params, root: Path) -> Inputs:
    return collect(shipped, root)


@pytest.fixture(scope="module")
def document(inputs: Inputs) -> dict[str, Any]:
    return metrics_document(inputs)


@pytest.fixture
def view(document: dict[str, Any], inputs: Inputs) -> View:
    return View(document, inputs, make_environment(autoescape=True))


def test_a_section_is_one_more_function_in_the_list(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(given: View) -> Section:
        return Section("mine", "Mine", "A section of my own", sections.Markup(f"<p>{len(given.inputs.texts)} sets</p>"))

    monkeypatch.setattr(page, "SECTIONS", [sections.shows, lambda _: None, mine])
    text = page.render_page(view.document, view.inputs)
    assert '<a href="#mine">Mine</a>' in text
    assert '<h2 id="mine">A section of my own</h2>\n<p>4 sets</p>' in text
    assert 'id="results"' not in text


def test_every_section_has_an_address_of_its_own(view: View) -> None:
    built = [section for build in sections.SECTIONS if (section := build(view)) is not None]
    assert len({section.anchor for section in built}) == len(built) == len(sections.SECTIONS)


def test_examples_are_the_surest_disagreements_of_each_kind(inputs: Inputs, root: Path) -> None:
    rows = {name: pq.read_table(root / f"artifacts/predictions/{name}.parquet").to_pylist() for name in ("cd", "teacher", "icl_calibrated")}
    theirs = {(row["set"], row["example_id"]): row for row in rows["teacher"]}
    expected = {}
    for row in rows["cd"]:
        other = theirs[row["set"], row["example_id"]]
        if row["predicted"] != other["predicted"]:
            key = (row["set"], row["predicted"] == row["label"])
            sureness = max(row["probabilities"]) * max(other["probabilities"])
            if sureness > expected.get(key, (0,))[0]:
                expected[key] = (sureness, row["example_id"])
    found = disagreements(inputs, "cd", "teacher")
    assert {(one.where, one.student_is_right) for one in found} == set(expected)
    for one in found:
        example = expected[one.where, one.student_is_right][1]
        assert one.text == shortened(inputs.texts[one.where][example])
        votes = Counter(row["predicted"] for row in rows["icl_calibrated"] if (row["set"], row["example_id"]) == (one.where, example))
        told = {label: int(count) for label, count in (part.rsplit(" ", 1) for part in one.votes.split(", "))}
        assert told == votes


def test_contexts_that_vote_are_calibrated_and_the_reference_s_own(shipped: Params, inputs: Inputs) -> None:
    assert voters(inputs, "teacher") == "icl_calibrated"
    alone = {name: entry for name, entry in shipped.baselines.items() if entry.contexts != "each"}
    without = replace(inputs, params=shipped.model_copy(update={"baselines": alone}))
    assert voters(without, "teacher") is None
    assert all(one.votes == "" for one in disagreements(without, "cd", "teacher"))


def test_pieces_of_an_attributed_text_are_the_text_again(inputs: Inputs) -> None:
    (entry,) = attributions(inputs.risks["cd"])
    (pieces,) = entry["fields"]
    text = inputs.risks["cd"]["attributions"][0]["fields"]["text"]
    assert "".join(piece for piece, _ in pieces) == text
    assert {piece: kind for piece, kind in pieces if kind} == {"thin": "for", "drags": "against"}
    assert entry["words"] == "“thin” +1.25, “drags” −0.75, “plot” +0.10"


def test_bins_of_several_sets_are_those_of_their_rows_together() -> None:
    def entry(low: float, n: int, confidence: float, accuracy: float) -> dict[str, Any]:
        return {"low": low, "high": low + 0.1, "n": n, "confidence": confidence, "accuracy": accuracy}

    detail = {
        "sets": {
            "a": {"reliability": [entry(0.5, 10, 0.55, 0.6)]},
            "b": {"reliability": [entry(0.5, 30, 0.57, 1.0), entry(0.9, 5, 0.95, 0.8)]},
        }
    }
    first, second = reliability.pooled_bins(detail, ["a", "b"])
    assert first["n"] == 40
    assert first["confidence"] == pytest.approx((10 * 0.55 + 30 * 0.57) / 40)
    assert first["accuracy"] == pytest.approx((6 + 30) / 40)
    assert second["n"] == 5


def test_confusion_counts_every_prediction_of_a_domain(document: dict[str, Any], inputs: Inputs, root: Path) -> None:
    table = reliability.confusion(document, {"cd": inputs.detail["cd"]}, ["negative", "positive"])
    assert table is not None
    rows = [row for row in pq.read_table(root / "artifacts/predictions/cd.parquet").to_pylist() if row["set"] != "movie"]
    outside = table.bodies[1]
    assert outside.title == "Out of domain"
    for gold, row in zip(("negative", "positive"), outside.rows, strict=True):
        counts = [sum(r["label"] == gold and r["predicted"] == answer for r in rows) for answer in ("negative", "positive")]
        assert [cell.note for cell in row[1:]] == [str(count) for count in counts]
        assert [float(cell.text) for cell in row[1:]] == pytest.approx([100 * count / sum(counts) for count in counts], abs=0.051)
    assert reliability.confusion(document, {"cd": inputs.detail["cd"]}, [str(i) for i in range(13)]) is None


def test_slices_stand_beside_the_reference_with_their_sizes(inputs: Inputs) -> None:
    table = slices.slices(inputs.detail, ["cd", "teacher"])
    assert table is not None
    assert [body.title for body in table.bodies] == ["By gold label", "By length, in thirds of each set", "By heuristic"]
    assert [cell.text for cell in table.bodies[1].rows[2]] == ["long", "102", "72.0", "72.0", "102", "72.0", "72.0"]
    assert slices.slices({}, ["cd"]) is None


def test_nothing_on_the_frontier_is_beaten() -> None:
    rows = [{"latency": lat, "accuracy": acc} for lat, acc in [(10, 0.7), (20, 0.9), (20, 0.8), (30, 0.85), (40, 0.95), (5, 0.7)]]
    kept = tradeoffs.frontier(rows)
    beaten = [
        row for row in rows if any(o != row and o["latency"] <= row["latency"] and o["accuracy"] >= row["accuracy"] for o in rows)
    ]  # fmt: skip
    assert kept == sorted((row for row in rows if row not in beaten), key=lambda row: row["latency"])


def test_labels_lie_within_the_picture_and_not_on_each_other() -> None:
    points = [
        ("teacher", 255.0, 30.0),
        ("icl_ensemble", 245.0, 33.0),
        ("icl_calibrated", 160.0, 35.0),
        ("cd", 20.0, 40.0),
        ("zero", 22.0, 50.0),
    ]
    placed = tradeoffs.place_labels(points, 270, 215)
    boxes = []
    for (text, _, _), (x, y, align) in zip(points, placed, strict=True):
        size = len(text) * tradeoffs.LETTER
        left = {"left": x, "center": x - size / 2, "right": x - size}[align]
        assert left >= -0.01
        assert left + size <= 270.01
        boxes.append((left, y - 7, left + size, y + 7))
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        for j, (_, x, y) in enumerate(points):
            assert i == j or not (one[0] < x < one[2] and one[1] < y < one[3])


def test_a_count_of_demonstrations_that_does_not_fit_has_a_row_and_no_point(inputs: Inputs) -> None:
    table = costs.by_demonstrations(inputs, "teacher")
    assert table is not None
    assert [(row[0].text, row[3].text, row[0].note) for row in table.bodies[0].rows][-2:] == [
        ("16", "424", "demonstrations used again to fill it"),
        ("32", "–", "no room: the model takes 2,048 tokens"),
    ]
    charts = tradeoffs.context_charts(inputs.cost["teacher"]["by_demonstrations"], "cd", inputs.cost["cd"])
    assert list(charts) == ["Latency", "Peak memory"]
    assert "student cd, level: 31 ms" in charts["Latency"]
    assert "32 demonstrations" not in charts["Latency"]


def test_what_never_pays_says_so(inputs: Inputs) -> None:
    table = costs.break_even(inputs)
    assert table is not None
    assert [cell.text for cell in table.bodies[0].rows[0]] == ["cd", "70", "266", "199", "never"]


def test_seconds_that_nobody_kept_are_a_dash_and_a_sentence(view: View) -> None:
    why = "metrics/runtime/teacher-few_shot.json: no such file; `dvc repro -f -s teacher@few_shot` writes it"
    unknown = {"one_by_one": {"predictions": None, "saved_seconds": 3.3}, "batched": None}
    entry = {"capture_seconds": {"few_shot": None}, "training_seconds": 265.7, "missing": [why], **unknown}
    lost = replace(view.inputs, break_even={"reference": "teacher", "students": {"cd": entry, "pbft": entry}})
    table = costs.break_even(lost)
    assert table is not None
    assert [cell.text for cell in table.bodies[0].rows[0]] == ["cd", "–", "266", "–", "–"]
    body = sections.cost(View(view.document, lost, view.environment)).body
    assert body.count("<code>dvc repro -f -s teacher@few_shot</code>") == 1


def test_only_answers_that_changed_are_shown_as_flipped(inputs: Inputs) -> None:
    (entry,) = risks.flipped(inputs.risks["cd"])
    assert (entry["before"], entry["after"], entry["answers"]) == ("Ann <liked> it", "Eve <liked> it", "negative → positive")


def test_mcnemar_stands_where_it_was_computed(view: View) -> None:
    text = sections.accuracy(view).body
    assert "alone right 40 and 33 times" in text
    without = View(view.document, replace(view.inputs, compare=None), view.environment)
    assert "McNemar" not in sections.accuracy(without).body


def test_a_quarantine_that_cannot_be_read_is_named(shipped: Params, root: Path, tmp_path: Path) -> None:
    for part in ("predictions", "data"):
        (tmp_path / "artifacts").mkdir(exist_ok=True)
        (tmp_path / "artifacts" / part).symlink_to(root / "artifacts" / part)
    assert len(collect(shipped, tmp_path).quarantined) == 2
    (tmp_path / "artifacts" / "data").unlink()
    (tmp_path / "artifacts" / "data").mkdir()
    (tmp_path / "artifacts" / "data" / "quarantine.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptError, match=r"quarantine\.jsonl: not JSON lines"):
        collect(shipped, tmp_path)
