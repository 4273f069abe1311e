"""The report on a made-up run: every number comes from predictions, the page stands alone, and nothing is invented where a file lacks."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_files import shipped_params, write_predictions, write_run
from rich.console import Console

from pipeline.errors import CorruptError, UsageError
from pipeline.files import sha256_file
from pipeline.params import Params, parse_params
from pipeline.report.build import build_report
from pipeline.report.findings import findings
from pipeline.report.summary import print_summary
from pipeline.report.formatting import percent, points, scaled

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "line", "rect"}


@pytest.fixture(scope="module")
def shipped() -> Params:
    return shipped_params()


@pytest.fixture(scope="module")
def run(shipped: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(shipped, root, examples=60)
    build_report(shipped, root)
    return root


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))


class Outline(HTMLParser):
    """What a reader of the markup needs: open tags, headings, ids, links, tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @property
    def ids(self) -> list[str | None]:
        return [attributes["id"] for _, attributes in self.attributes if "id" in attributes]


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_the_same_inputs_give_the_same_bytes(run: Path, shipped: Params, tmp_path: Path) -> None:
    shutil.copytree(run / "artifacts", tmp_path / "artifacts", ignore=shutil.ignore_patterns("README.md"))
    shutil.copytree(run / "metrics", tmp_path / "metrics")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    build_report(shipped, tmp_path)
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path not in before)
    cards = [f"artifacts/students/{name}/README.md" for name in ("cd", "pbft")]
    assert written == [*cards, "report/index.html", "report/metrics.json"]
    for path in written:
        assert sha256_file(run / path) == sha256_file(tmp_path / path), path


def test_every_accuracy_is_that_of_the_predictions_on_disk(run: Path, document: dict[str, Any], page: str) -> None:
    for name, method in document["methods"].items():
        rows = pq.read_table(run / "artifacts" / "predictions" / f"{name}.parquet").to_pylist()
        for set_name, found in method["sets"].items():
            right = [row["label"] == row["predicted"] for row in rows if row["set"] == set_name]
            assert found["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
            assert percent(found["accuracy"]) in page


def test_metrics_json_has_the_agreed_shape(document: dict[str, Any], shipped: Params) -> None:
    assert document["reference"] == "teacher"
    assert document["sets"]["movie"] == {"domain": "in", "n": 60}
    assert list(document["methods"]) == [*shipped.baselines, *shipped.students]
    for name, method in document["methods"].items():
        assert method["kind"] == ("student" if name in shipped.students else "baseline")
        assert list(method["sets"]) == list(shipped.data.evaluation)
        for found in method["sets"].values():
            assert {"accuracy", "ci95", "macro_f1", "log_loss", "brier", "ece", "agreement", "n"} <= set(found)
            assert ("contexts" in found) == (name in {"icl", "icl_calibrated"})
    assert all(found["agreement"] == 1 for found in document["methods"]["teacher"]["sets"].values())
    assert document["methods"]["cd"]["cost"]["parameters"] == 113_142_528


def test_the_page_needs_nothing_from_outside(page: str, outline: Outline) -> None:
    assert len(page.encode()) < 300_000
    tags = {tag for tag, _ in outline.attributes}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    for tag, attributes in outline.attributes:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    assert not re.search(r"url\(|@import", page)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page)


def test_the_page_is_well_formed_and_links_find_their_targets(outline: Outline) -> None:
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    for _, attributes in outline.attributes:
        for name in ("href", "aria-labelledby"):
            if name in attributes:
                assert str(attributes[name]).lstrip("#") in outline.ids


def test_the_page_serves_keyboard_and_screen_reader(outline: Outline, page: str) -> None:
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False))
    html = dict(outline.attributes)["html"]
    assert html["lang"] == "en"
    assert page.count("<table") == page.count("<caption") > 5
    for tag, attributes in outline.attributes:
        if tag == "th":
            assert attributes.get("scope") in {"col", "row", "colgroup", "rowgroup"}
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 20
        if "scroll" in (attributes.get("class") or "").split():
            assert attributes["tabindex"] == "0"
    assert page.index('class="skip"') < page.index("<header")


def test_rows_have_as_many_cells_as_there_are_columns(page: str) -> None:
    for table in re.findall(r"<table.*?</table>", page, flags=re.DOTALL):
        widths = set()
        for row in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL):
            cells = re.findall(r"<t[hd]\b([^>]*)>", row)
            widths.add(sum(int(m.group(1)) if (m := re.search(r'colspan="(\d+)"', cell)) else 1 for cell in cells))
        assert len(widths) == 1, table[:200]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str) -> None:
    css = (Path(__file__).resolve().parents[2] / "pipeline/report/templates/page.css").read_text(encoding="utf-8")
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    block = light if scheme == "light" else dark
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block.split("@media")[0]))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for text in ("ink", "muted", "student"):
        for ground in ("paper", "raised", "tint"):
            a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)


def test_a_cost_of_another_model_or_none_is_not_shown(page: str, document: dict[str, Any]) -> None:
    assert document["methods"]["icl"]["cost"] is None
    assert document["methods"]["icl_ensemble"]["cost"] is None
    assert "<code>icl</code><small>measured on another model</small>" in page
    assert "<code>icl_ensemble</code><small>not measured</small>" in page
    assert "<code>dvc repro -f -s baseline@icl baseline@icl_ensemble report</code>" in page


def test_predictions_alone_give_a_report_that_says_what_is_missing(shipped: Params, tmp_path: Path) -> None:
    write_predictions(shipped, tmp_path, examples=30)
    build_report(shipped, tmp_path)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for told in (
        "Counts not found",
        "No calibration record found",
        "No curve found for",
        "No confidence bins found for <code>cd</code>, <code>pbft</code>, <code>teacher</code>; "
        "<code>dvc repro -f -s evaluate@cd evaluate@pbft baseline@teacher report</code>",
        "No counts by label and slice found",
        "<code>dvc repro -f -s baseline@teacher report</code> measures it",
        "<code>dvc repro -f -s compare report</code> counts it",
        "Not checked: <code>cd</code>, <code>pbft</code>; <code>dvc repro check@cd check@pbft report</code>",
        "<code>dvc repro prepare</code> writes them",
    ):
        assert told in page
    assert "113.1 M" not in page
    assert all(m["cost"] is None for m in json.loads((tmp_path / "report" / "metrics.json").read_text())["methods"].values())


def test_missing_predictions_and_broken_files_are_named(shipped: Params, tmp_path: Path) -> None:
    write_predictions(shipped, tmp_path, examples=10)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "prepare.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptError, match=r"prepare\.json: not JSON"):
        build_report(shipped, tmp_path)
    (tmp_path / "artifacts" / "predictions" / "cd.parquet").unlink()
    with pytest.raises(UsageError, match=r"cd\.parquet: no such file.*dvc repro evaluate@cd"):
        build_report(shipped, tmp_path)


def test_copies_kept_out_and_leaks_are_shown(page: str) -> None:
    row = re.search(r'<th scope="row">transfer set</th>(.*?)</tr>', page, flags=re.DOTALL)
    assert row is not None
    assert re.findall(r"<td[^>]*>([^<]*)", row.group(1)) == ["movie, amazon, tweets, editorials", "1,200", "7"]
    assert "written: <strong>0</strong>" in page


def test_text_from_params_is_escaped(raw_params: dict[str, Any], tmp_path: Path) -> None:
    raw_params["task"]["template"] = "<script>alert(1)</script> & {text}:"
    raw_params["evaluation"]["bootstrap"] = 20
    params = parse_params(raw_params)
    write_run(params, tmp_path, examples=10)
    build_report(params, tmp_path)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {text}:" in page


def test_other_shapes_of_runs_have_a_report_too(raw_params: dict[str, Any], tmp_path: Path) -> None:
    """No student and one set; then many sets, all out of domain."""
    raw_params["evaluation"]["bootstrap"] = 20
    raw_params["students"] = {}
    raw_params["data"]["evaluation"] = {"movie": raw_params["data"]["evaluation"]["movie"]}
    params = parse_params(raw_params)
    write_run(params, tmp_path, examples=10)
    build_report(params, tmp_path)
    assert "This run has no student" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    raw_params["data"]["evaluation"] = {f"set-{i}": {"source": "amazon", "domain": "out"} for i in range(9)}
    params = parse_params(raw_params)
    write_run(params, tmp_path, examples=10)
    build_report(params, tmp_path)
    assert len((tmp_path / "report" / "index.html").read_bytes()) < 300_000
    console = Console(width=100, record=True, highlight=False)
    print_summary(tmp_path / "report", console)
    assert max(map(len, console.export_text().splitlines())) <= 100


def test_a_student_of_several_seeds_has_their_mean_and_deviation(raw_params: dict[str, Any], tmp_path: Path) -> None:
    raw_params["evaluation"]["bootstrap"] = 20
    raw_params["students"]["cd"]["seeds"] = [0, 1, 7]
    params = parse_params(raw_params)
    write_run(params, tmp_path, examples=40)
    build_report(params, tmp_path)
    rows = pq.read_table(tmp_path / "artifacts" / "predictions" / "cd.parquet").to_pylist()
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    headline = page.split('id="headline"')[1].split("</table>")[0].split("<code>cd</code>")[1].split("</tr>")[0]
    for name in params.data.evaluation:
        of_set = [row for row in rows if row["set"] == name]
        accuracies = [
            np.mean([row["label"] == row["predicted"] for row in of_set if row["context_id"] == f"seed {seed}"]) for seed in (0, 1, 7)
        ]
        assert f"{percent(float(np.mean(accuracies)))}<small>" in headline
        assert f"seeds ± {percent(float(np.std(accuracies, ddof=1)))}" in headline


def test_the_summary_shows_methods_and_sets_within_100_columns(run: Path, document: dict[str, Any]) -> None:
    console = Console(width=100, record=True, highlight=False)
    print_summary(run / "report", console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for name in [*document["methods"], *document["sets"], "mean out"]:
        assert name in text
    assert percent(document["methods"]["cd"]["sets"]["tweets"]["accuracy"]) in text
    assert "index.html" in text


def test_a_summary_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dvc repro report"):
        print_summary(tmp_path)


def _document(difference: float, interval: list[float], clear: bool) -> dict[str, Any]:
    def method(kind: str, accuracy: float) -> dict[str, Any]:
        entry = {"accuracy": accuracy, "ci95": [accuracy - 0.04, accuracy + 0.04], "predicted_shares": {"a": 0.5, "b": 0.5}}
        return {"kind": kind, "sets": {"s": entry}, "means": {"out": entry | {"ece": 0.05, "agreement": 0.9}}, "cost": None}

    return {
        "reference": "teacher",
        "sets": {"s": {"domain": "out", "n": 100}},
        "methods": {"teacher": method("baseline", 0.8), "cd": method("student", 0.8 + difference)},
        "comparisons": [{"method": "cd", "other": "teacher", "domain": "out", "difference": difference, "ci95": interval, "clear": clear}],
    }


@pytest.mark.parametrize(
    ("difference", "interval", "clear", "expected"),
    [
        (0.1, [0.05, 0.15], True, "It is 10.0 points above `teacher` (95 % interval of the difference +5.0 to +15.0)."),
        (-0.1, [-0.15, -0.05], True, "It is 10.0 points below `teacher` (95 % interval of the difference −15.0 to −5.0)."),
        (0.02, [-0.01, 0.05], False, "−1.0 to +5.0: this run does not tell them apart)."),
        (0.0, [-0.01, 0.01], False, "It is level with `teacher`"),
    ],
)
def test_findings_follow_the_numbers(difference: float, interval: list[float], clear: bool, expected: str) -> None:
    assert expected in findings(_document(difference, interval, clear))[0]


def test_the_summary_and_page_mark_every_best_of_a_column(document: dict[str, Any], page: str) -> None:
    for set_name in document["sets"]:
        values = [m["sets"][set_name]["accuracy"] for m in document["methods"].values()]
        assert percent(max(values)) in page
    assert page.count('aria-label="best of all:"') >= len(document["sets"]) + 1


@pytest.mark.parametrize(("value", "text"), [(0.8633, "86.3"), (None, "–"), (1.0, "100.0")])
def test_percentages(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_numbers_read_well() -> None:
    assert [points(x) for x in (-0.021, 0.021, 0.0001, -0.0001)] == ["−2.1", "+2.1", "0.0", "0.0"]
    assert [scaled(x) for x in (113_142_528, 1_700_000_000, 999, None)] == ["113.1 M", "1.7 B", "999", "–"]
    assert scaled(452_570_112, "B") == "452.6 MB"
