"""The report of a made-up run: numbers come from disk, the page needs nothing else, hostile text is escaped, missing files are named."""

import copy
import html
import itertools
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from pipeline.errors import CorruptError, UsageError
from pipeline.files import Folders, read_json, write_json
from pipeline.params import parse_params
from pipeline.report import charts, prose, tables
from pipeline.report.collect import collect, comparison, ranked
from pipeline.report.page import SECTIONS, build_report

VOID = {"meta", "br", "path", "line", "rect", "circle"}
PROJECT = Path(__file__).resolve().parents[2]


class Outline(HTMLParser):
    """Tags that are open, and every tag with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def rebuilt(params, root):
    """The page and the numbers of a run that a test has changed."""
    build_report(params, Folders.here(root), root)
    return (root / "report" / "index.html").read_text(encoding="utf-8"), read_json(root / "report" / "metrics.json")


def table_of(page, name):
    """The rows of a table on the page as lists of texts, without the small lines."""
    body = page.split(f'<table id="{name}">')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)]
    return [[re.sub(r"<[^>]+>", "", re.sub(r"<small>.*?</small>", "", cell)).strip() for cell in row] for row in rows]


def test_every_accuracy_on_disk_is_in_the_headline_and_in_the_json(root, page, found):
    rows = {row[0]: row for row in table_of(page, "headline")}
    document = read_json(root / "report" / "metrics.json")
    for method in document["methods"]:
        frame = pl.read_parquet(root / "artifacts" / "predictions" / f"{method}.parquet")
        for number, where in enumerate(document["sets"]):
            own = frame.filter(pl.col("set") == where)
            accuracy = (own["predicted"] == own["label"]).mean()
            assert document["methods"][method]["sets"][where]["accuracy"] == pytest.approx(accuracy, abs=1e-6)
            assert rows[method][1 + number].strip("★☆") == prose.percent(accuracy)
    assert "few_shot + zero_shot + tuned; not calibrated, weighted by the labels" in page
    assert "few_shot; batch_log calibration, one context at a time" in page
    assert document["methods"]["teacher"]["sets"]["movie"]["agreement"] == 1
    assert document["sets"] == {"movie": {"domain": "in", "n": 40}, "tweets": {"domain": "out", "n": 40}}
    assert document["methods"]["cd"]["cost"]["latency_ms"] == 31.0
    assert {row["set"] for row in document["comparisons"]} == {None}


def test_weights_that_no_label_could_choose_are_called_equal(found):
    file = "metrics/targets/mix.json"
    unjudged = {key: value for key, value in found.files[file].items() if key != "labelled"}
    assert prose.about(replace(found, files=found.files | {file: unjudged}), "teacher").endswith("; not calibrated, equal weights")


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(root, found, tmp_path):
    shutil.copytree(root, tmp_path / "again")
    before = (root / "report" / "index.html").read_bytes()
    rebuilt(found.params, tmp_path / "again")
    assert (tmp_path / "again" / "report" / "index.html").read_bytes() == before


def test_the_page_needs_nothing_else_and_serves_screen_readers(page):
    outline = Outline(page)
    assert outline.open == []
    assert len(page.encode()) < 300_000
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.findall(r"https?://(?!www\.w3\.org/)|url\(|@import| on\w+=", page)
    ids = [attributes["id"] for tag, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in outline.tags:
        for name in ("href", "aria-labelledby"):
            assert attributes.get(name, "#main").lstrip("#") in ids
        assert tag != "th" or attributes["scope"] in {"col", "row", "colgroup", "rowgroup"}
        assert tag != "svg" or (attributes["role"] == "img" and len(attributes["aria-label"]) > 20)
        assert "scroll" not in attributes.get("class", "").split() or attributes["tabindex"] == "0"
    headings = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h\d", tag)]
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_rows_have_as_many_cells_as_there_are_columns(page):
    for table in re.findall(r"<table.*?</table>", page, flags=re.DOTALL):
        rows = [re.findall(r"<t[hd]\b([^>]*)>", row) for row in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)]
        spans = [[re.search(r'colspan="(\d+)"', cell) for cell in row] for row in rows]
        assert len({sum(int(span.group(1)) if span else 1 for span in row) for row in spans}) == 1, table[:200]


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_enough_contrast_in_light_and_dark(scheme):
    css = (PROJECT / "pipeline/report/templates/page.css").read_text(encoding="utf-8")
    block = css.split("@media (prefers-color-scheme: dark)")[scheme].split("@media")[0]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))

    def luminance(name):
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return np.dot([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts], [0.2126, 0.7152, 0.0722])

    for text in ("ink", "muted", "student"):
        for ground in ("paper", "raised", "tint"):
            dark, light = sorted((luminance(text), luminance(ground)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_every_section_and_table_is_there_if_its_data_are(page):
    for anchor in SECTIONS:
        assert f'<h2 id="{anchor}">' in page
    for name in (
        "headline", "comparisons", "cost-table", "break-even", "calibration-table", "confusion", "slices", "swaps",
        "gaps", "disagreement", "targets", "caches", "students", "roles", "sources", "quarantined",
    ):  # fmt: skip
        assert f'<table id="{name}">' in page
    for number in ("5,310", "10,605", "1,200", "0.0012", "241", "4.3", "ab" * 32):  # of the made-up files
        assert number in page


def test_costs_of_another_model_are_not_shown_and_the_machine_is_named(page):
    rows = {row[0]: row for row in table_of(page, "cost-table")}
    assert rows["cd"][1:7] == ["26", "1", "31", "52", "81.2", "40.6"]
    assert rows["teacher"][3:7] == ["140", "–", "81.2", "–"]
    assert set(rows["icl"][1:]) == {"–"}
    assert "or of another model: <code>metrics/cost/icl.json</code>. Run <code>dvc repro -f -s cost report</code>" in page
    for fact in ("A made-up processor", "float32", "2 threads", "8 texts", "64 texts"):
        assert fact in page


def test_texts_that_do_not_fit_are_counted(page):
    counted = "<code>smollm2 behind orders</code>: 1,200 of transfer, 3 of evaluation.movie."
    assert f"<code>task.long_texts: head_tail</code> decides: {counted}" in page


def test_copies_kept_out_and_licences_are_shown(page):
    assert ["transfer set", "movie, amazon, tweets, editorials", "1,200", "11"] in table_of(page, "roles")
    assert all(row[1] == "MIT" for row in table_of(page, "sources")[1:])
    assert "<code>smollm2</code> Apache-2.0" in page


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("artifacts/predictions/cd.parquet", "evaluate@cd"),
        ("metrics/eval/icl.json", "baseline@icl"),
        ("metrics/compare.json", "compare"),
        ("artifacts/best.json", "select"),
        ("metrics/risk/pbft.json", "risk@pbft"),
        ("metrics/prepare.json", "prepare"),
    ],
)
def test_a_required_file_that_is_missing_is_named_with_its_stage(root, found, tmp_path, name, stage):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=rf"{name}: no such file.*dvc repro {stage}"):
        collect(found.params, Folders.here(tmp_path))


@pytest.mark.slow
def test_times_that_are_missing_are_named_on_the_page(root, found, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for folder in ("cost", "runtime"):
        shutil.rmtree(tmp_path / "metrics" / folder)
    page, document = rebuilt(found.params, tmp_path)
    for name in ("cost/cd", "cost/icl", "runtime/student-cd", "runtime/teacher-few_shot", "runtime/tuned-tuned"):
        assert f"<code>metrics/{name}.json</code>" in page
    assert "tune@tuned teacher@few_shot teacher@zero_shot teacher@tuned student@cd student@pbft report</code>" in page
    assert all(method["cost"] is None for method in document["methods"].values())
    assert all(set(row[2:]) == {"–"} for row in table_of(page, "break-even")[1:])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("metrics/prepare.json", "{", "not JSON"), ("artifacts/predictions/cd.parquet", "no table", "not readable as Parquet")],
)
def test_a_damaged_file_is_named(root, found, tmp_path, name, text, message):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CorruptError, match=message) as error:
        collect(found.params, Folders.here(tmp_path))
    assert Path(name).name in str(error.value)


@pytest.mark.slow
def test_hostile_text_is_escaped(raw, write_run, tmp_path):
    hostile = "<script>alert(1)</script> & {text}:"
    raw["task"]["template"] = hostile
    raw["downloads"]["reviews"]["licence"] = "<img src=x>"
    page, _ = rebuilt(write_run(raw, tmp_path, examples=10), tmp_path)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {text}:" in page
    assert "<b>" not in page
    assert "&lt;b&gt;&amp; bold&lt;/b&gt;" in page  # an evaluation text
    assert "&lt;i&gt;caf" in page  # a row that was set aside
    assert "Eve &lt;liked&gt; it" in page


@pytest.mark.slow
def test_a_run_without_students_leaves_their_sections_out(raw, write_run, tmp_path):
    raw["students"] = {}
    raw["data"]["evaluation"] = {"movie": raw["data"]["evaluation"]["movie"]}
    page, _ = rebuilt(write_run(raw, tmp_path, examples=10), tmp_path)
    assert "This run has no student" in page
    assert 'id="risks"' not in page
    assert 'id="training"' not in page


@pytest.mark.slow
def test_a_teacher_behind_a_server_and_in_chat_turns_is_called_so(raw, write_run, tmp_path):
    raw["servers"] = {"big": {"url": "http://127.0.0.1:1/v1", "model": "big", "tokenizer": "models/smollm2"}}
    raw["teachers"]["few_shot"]["model"] = "servers/big"
    raw["contexts"]["orders"]["format"] = "chat"
    params, folders = write_run(raw, tmp_path), Folders.here(tmp_path)
    file = folders.metrics / "fidelity" / "few_shot.json"
    figures = {"censored_labels": 0.25, "censored_rows": 0.5, "censored_mass": 0.01, "censored_mass_most": 0.04, "changed_answers": 0.0}
    write_json({"rows": 4800, "bytes_per_row": 96.0, "retained_mass": 0.9, "scored_again": 16, **figures}, file)
    build_report(params, folders, tmp_path)
    page = html.unescape((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "servers/big + smollm2: from prompt to 2 students" in page
    assert re.search(r"few_shot</code> \(chat\).{0,80}top k tail", page, re.DOTALL)
    said = re.sub(r"<[^>]+>", "", page)
    assert "few_shot (servers/big, 4 contexts of 16 demonstrations, in chat turns) + zero_shot (models/smollm2)" in said
    assert "of 25.0\u00a0% of its labels a bound alone is known, in 50.0\u00a0% of the rows" in page


@pytest.mark.slow
def test_a_student_of_several_seeds_has_their_mean_and_deviation(raw, write_run, tmp_path):
    raw["students"]["cd"]["seeds"] = [0, 1, 7]
    page, document = rebuilt(write_run(raw, tmp_path), tmp_path)
    frame = pl.read_parquet(tmp_path / "artifacts" / "predictions" / "cd.parquet").filter(pl.col("set") == "movie")
    each = frame.group_by("run").agg((pl.col("predicted") == pl.col("label")).mean().alias("right"))["right"].to_numpy()
    assert document["methods"]["cd"]["sets"]["movie"]["accuracy"] == pytest.approx(each.mean(), abs=1e-6)
    assert f"seeds\u00a0±\u00a0{prose.percent(float(each.std(ddof=1)))}" in page
    assert "seeds: 0, 1, 7" in (tmp_path / "artifacts/students/cd/README.md").read_text("utf-8").replace(" | ", ": ")


@pytest.mark.slow
def test_a_student_of_a_teacher_s_distributions_is_called_so(raw, write_run, tmp_path):
    raw["students"]["pbft"] = {"base": "models/smollm2", "learn_from": "teachers/few_shot", "steps": 5, "learning_rate": 1e-4}
    page, _ = rebuilt(write_run(raw, tmp_path, examples=10), tmp_path)
    card = (tmp_path / "artifacts" / "students" / "pbft" / "README.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert "distilled from the teacher few_shot’s distributions" in text
        assert "teachers/few_shot" not in text.replace("learn_from: teachers/few_shot", "")


def test_disagreements_are_the_most_confident_ones_of_each_kind(root, page):
    ours, theirs = (pl.read_parquet(root / "artifacts" / "predictions" / f"{name}.parquet").to_dicts() for name in ("cd", "teacher"))
    other = {row["example_id"]: row for row in theirs}
    surest = {}
    for row in ours:
        reference = other[row["example_id"]]
        key = (row["set"], row["predicted"] == row["label"])
        sure = max(row["probabilities"]) * max(reference["probabilities"])
        if row["predicted"] != reference["predicted"] and sure > surest.get(key, (0,))[0]:
            surest[key] = (sure, f"{row['predicted']}, {prose.percent(max(row['probabilities']), 0)} %")
    section = page.split('id="disagreements"')[1].split("</section>")[0]
    assert section.count("<article>") == len(surest) > 1
    for (where, right), (_, answer) in surest.items():
        article = section.split(f"{where} · student {'right' if right else 'wrong'}")[1].split("</article>")[0]
        assert f"<dt>cd</dt><dd>{answer}</dd>" in article


def test_confusion_counts_every_prediction_of_a_domain(root, found):
    table = tables.confusion(found)  # of cd, the best student, and teacher
    frame = pl.read_parquet(root / "artifacts" / "predictions" / "cd.parquet").filter(pl.col("set") == "tweets")
    for gold, row in zip(found.params.task.labels, table.bodies["Out of domain"], strict=True):
        own = frame.filter(pl.col("label") == gold)
        counts = [(own["predicted"] == label).sum() for label in found.params.task.labels]
        assert [cell.note for cell in row[1:3]] == [str(count) for count in counts]
        assert [float(cell.text) for cell in row[1:3]] == pytest.approx([100 * count / sum(counts) for count in counts], abs=0.051)


@pytest.mark.slow
def test_many_labels_have_their_confusions_and_scores_instead_of_a_grid(many):
    root, found = many
    frame = pl.read_parquet(root / "artifacts" / "predictions" / f"{ranked(found.document, 'student')[0]}.parquet")
    frame = frame.filter(pl.col("set") == "tweets")
    gold, said = frame["label"].to_list(), frame["predicted"].to_list()
    wrong = Counter((label, answer) for label, answer in zip(gold, said, strict=True) if label != answer)
    rows = tables.confusions(found).bodies["Out of domain"]
    assert [int(row[2].note) for row in rows] == [count for _, count in wrong.most_common(20)]
    for label, answer, cell, _ in rows:
        assert (int(cell.note), float(cell.text)) == (
            wrong[label, answer],
            pytest.approx(100 * int(cell.note) / gold.count(label), abs=0.051),
        )
    rows = tables.classes(found).bodies["Out of domain"]
    labels = [row[0] for row in rows]
    assert sorted(labels) == list(found.params.task.labels)
    shares, known = np.array(frame["probabilities"].to_list()), list(found.params.task.labels)
    precisions = [average_precision_score([g == label for g in gold], shares[:, known.index(label)]) for label in labels]
    scores = np.array([*precision_recall_fscore_support(gold, said, labels=labels, zero_division=0)[:3], precisions]).T
    assert np.array([[float(cell.text) for cell in row[2:6]] for row in rows]) == pytest.approx(100 * scores, abs=0.051)
    assert [int(row[1]) for row in rows] == [gold.count(label) for label in labels]
    missed = [sum(g == label != s for g, s in zip(gold, said, strict=True)) for label in labels]
    assert missed == sorted(missed, reverse=True)
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    assert [name for name in re.findall(r'<table id="([^"]+)">', page) if name.startswith(("conf", "cl"))] == ["confusions", "classes"]
    assert "By gold label" not in page
    assert "no context shows an example of 75 of 77 labels" in page


def test_two_labels_have_their_scores_if_one_is_rare_means_over_the_sets_that_have_it(found):
    assert tables.classes(found) is None
    document = copy.deepcopy(found.document)
    for own in document["sets"].values():
        own["domain"] = "out"
    for method in document["methods"].values():
        method["means"] = {"out": method["means"]["out"]}
        for where, own in method["sets"].items():
            own["per_label"]["positive"] = {"n": 5, "precision": 0.2, "recall": 0.4, "f1": 0.3, "average_precision": 0.75}
            own["per_label"]["negative"] = {"n": 0} if where == "movie" else {"n": 2, **dict.fromkeys(tables.LABEL_SCORES, 0.5)}
        method["sets"]["movie"]["per_label"]["positive"]["average_precision"] = 0.25
    rows = tables.classes(replace(found, document=document)).bodies["Out of domain"]
    assert [row[:2] for row in rows] == [["positive", "10"], ["negative", "2"]]
    assert [cell.text for cell in rows[0][2:6]] == ["20.0", "40.0", "30.0", "50.0"]
    assert [cell.text for cell in rows[1][2:]] == ["50.0"] * 8


def test_reliability_pools_the_sets_of_a_domain(found):
    rows = found.predictions["cd"].filter(pl.col("set") == "tweets")
    sure = np.array(rows["probabilities"].to_list()).max(axis=1)
    right = (rows["predicted"] == rows["label"]).to_numpy()
    drawn = re.findall(r"out of domain, confidence (\d+) %: (\d+) % right of (\d+)", charts.reliability(found, "cd"))
    bins = np.ceil(sure * 15).astype(int)
    expected = [
        (f"{100 * sure[bins == b].mean():.0f}", f"{100 * right[bins == b].mean():.0f}", str((bins == b).sum())) for b in np.unique(bins)
    ]
    assert drawn == expected


def test_a_student_s_bins_before_its_temperature_are_drawn_and_its_errors_stand_below_the_corrected_ones(root, found):
    table = tables.calibration(found)
    cell = next(row for row in table.bodies[""] if row[0] == "`cd`")[1]
    sets = [entry for name, entry in found.of("eval", "cd")["sets"].items() if found.document["sets"][name]["domain"] == "in"]
    before, chance = (100 * np.mean(own) for own in zip(*((one["uncorrected"]["ece"], one["ece_by_chance"]) for one in sets), strict=True))
    assert table.columns[1] == "ECE, %"
    assert cell.note == f"before {before:.1f}, by chance {chance:.1f}"
    drawn = [str(charts.reliability(found, name)).count('stroke-dasharray="1,3"') for name in ("cd", "pbft")]
    assert drawn == [2, 0]  # a line for each domain


def test_the_answered_share_is_that_of_answers_as_sure_as_the_threshold(root, found):
    ours, theirs = (found.predictions[name].filter(pl.col("set") == "tweets") for name in ("cd", "teacher"))
    rows = tables.answered(found).bodies["cd"]
    assert [row[0] for row in rows] == ["95%", "98%", "99%"]
    for promise, row in zip((0.95, 0.98, 0.99), rows, strict=True):
        said = {row["example_id"]: row["predicted"] for row in theirs.to_dicts()}
        kept = [own for own in ours.to_dicts() if max(own["probabilities"]) >= found.thresholds["cd"][promise]]
        agree = [own["predicted"] == said[own["example_id"]] for own in kept]
        right = [own["predicted"] == own["label"] for own in kept]
        assert row[4:7] == [f"{100 * share:.1f}" for share in (len(kept) / len(ours), np.mean(agree), np.mean(right))]
    assert found.thresholds["pbft"] == {}
    assert "pbft" not in tables.answered(found).bodies
    assert "promised 95%: " + rows[0][4] + " % answered" in charts.answered(found, "cd")


def test_a_comparison_reads_the_same_from_both_sides(found):
    row, turned = (comparison(found.document, *pair, "out") for pair in (("cd", "teacher"), ("teacher", "cd")))
    assert turned["difference"] == -row["difference"]
    assert turned["ci95"] == [-row["ci95"][1], -row["ci95"][0]]
    assert (turned["only_method_right"], turned["only_other_right"]) == (row["only_other_right"], row["only_method_right"])
    assert comparison(found.document, "cd", "nobody", "out") is None


def test_accuracy_is_drawn_against_latency_and_memory_of_every_measured_method(page, found):
    labels = re.findall(r'aria-label="Accuracy against (latency|peak memory): ([^"]*)"', page)
    assert [what for what, _ in labels] == ["latency", "latency", "peak memory", "peak memory"]  # in and out of domain
    for what, spoken in labels:
        costs = {one.split()[0]: one.rpartition(" at ")[2] for one in spoken.split("; ")}
        assert costs.keys() == found.document["methods"].keys() - {"icl"}, "the cost of icl is of another model"
        assert (costs["cd"], costs["teacher"]) == {"latency": ("31 ms", "140 ms"), "peak memory": ("911.0 MB", "1.8 GB")}[what]


@pytest.mark.parametrize(
    ("against", "cost_of"),
    [
        ("latency", lambda value: {"latency_ms": value, "peak_rss_bytes": 9}),
        ("peak memory", lambda value: {"latency_ms": 9, "peak_rss_bytes": value * 1e6}),
        ("peak memory", lambda value: {"peak_rss_bytes": 100 - value, "peak_device_bytes": 10_000 * value}),  # their sum counts
    ],
)
def test_nothing_on_the_frontier_is_beaten(against, cost_of):
    def method(cost, accuracy):
        return {"kind": "baseline", "cost": cost_of(cost), "means": {"out": {"accuracy": accuracy, "ci95": [0, 1]}}}

    pairs = [(10, 0.7), (20, 0.9), (20, 0.8), (30, 0.85), (40, 0.95), (5, 0.7)]
    methods = {str(pair): method(*pair) for pair in pairs} | {"unmeasured": method(1, 0.99) | {"cost": None}}
    rows, unbeaten = charts.frontier({"methods": methods}, "out", against)
    assert len(rows) == len(pairs)
    assert [row["method"] for row in unbeaten] == ["(5, 0.7)", "(20, 0.9)", "(40, 0.95)"]


BREAK_EVEN = {
    "runtime/teacher-few_shot": {"seconds": 50.0, "rows": 10, "rows_timed": 10},
    "runtime/teacher-zero_shot": {"seconds": 10.0, "rows": 10, "rows_timed": 10},
    "runtime/teacher-tuned": {"seconds": 6.0, "rows": 10, "rows_timed": 10},
    "runtime/tuned-tuned": {"seconds": 4.0, "resumed_at_step": 0},
    "runtime/student-cd": {"seconds": 30.0, "resumed_at_step": 0},
    "runtime/student-pbft": {"seconds": 5.0, "resumed_at_step": 0},
    "cost/cd": {"latency_ms": 50.0, "throughput": {"examples_per_second": 20.0}},
    "cost/pbft": {"latency_ms": 2000.0, "throughput": {"examples_per_second": 20.0}},
    "cost/teacher": {"latency_ms": 1050.0, "throughput": {"examples_per_second": 4.0}},
}


def break_even(found, changes):
    """Rows of the table by student, as texts, if these are the files of times."""
    own = {f"metrics/{name}.json": value for name, value in (BREAK_EVEN | changes).items() if value is not None}
    files = {name: value for name, value in found.files.items() if not name.startswith(("metrics/cost", "metrics/runtime"))}
    rows = tables.break_even(replace(found, files=files | own)).bodies[""]
    return {row[0].strip("`"): [getattr(cell, "text", cell) for cell in row[1:]] for row in rows}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["70", "30", "100", "500"]),  # 100 s / (1.05 s - 0.05 s), 100 s / (1/4 s - 1/20 s)
        ({"runtime/tuned-tuned": {"seconds": 904.0, "resumed_at_step": 0}}, ["970", "30", "1,000", "5,000"]),
        ({"runtime/teacher-few_shot": None}, ["–", "30", "–", "–"]),
        ({"runtime/teacher-few_shot": {"seconds": 50.0, "rows": 10, "rows_timed": 7}}, ["–", "30", "–", "–"]),
        ({"runtime/student-cd": {"seconds": 1.0, "resumed_at_step": 12}}, ["70", "–", "–", "–"]),
        ({"cost/teacher": None}, ["70", "30", "–", "–"]),
    ],
)
def test_what_was_spent_is_paid_back_by_whole_predictions_and_nothing_is_guessed(found, changes, expected):
    assert break_even(found, changes)["cd"] == expected


def test_a_student_of_labels_pays_for_no_teacher_and_a_slower_one_never_pays(found):
    assert break_even(found, {})["pbft"] == ["0", "5", "never", "25"]


@pytest.mark.parametrize(
    ("changes", "made_with"),
    [
        ({"learn_from": "teachers/few_shot", "ce_weight": 0.0}, {"teachers/few_shot"}),
        ({"learn_from": "teachers/tuned", "ce_weight": 0.0}, {"teachers/tuned", "tuned/tuned"}),
        ({"learn_from": "targets/few_shot", "base": "tuned/tuned"}, {"teachers/few_shot", "tuned/tuned"}),
        ({"learn_from": "targets/few_shot", "base": "students/second"}, {"teachers/few_shot", "teachers/zero_shot", "students/second"}),
    ],
)
def test_every_teacher_tuned_model_and_base_that_a_student_is_made_with_counts(raw, changes, made_with):
    raw["students"]["cd"] |= changes
    raw["students"]["second"] = raw["students"]["pbft"] | {"learn_from": "targets/zero_shot"}
    assert tables.makers("students/cd", parse_params(raw)) == made_with | {"students/cd"}


@pytest.mark.slow
def test_a_student_of_a_round_is_shown_with_its_teacher_texts_and_whole_cost(raw, write_run, tmp_path):
    raw["data"]["pool"] = {"source": "movie", "limit": 5000, "extra_sources": {"amazon": 9}}
    raw["rounds"] = {"second": {"student": "cd", "temperature": 0.5}}
    raw["students"]["small"] = raw["students"]["pbft"] | {"learn_from": "rounds/second"}
    params = write_run(raw, tmp_path)
    build_report(params, Folders.here(tmp_path), tmp_path)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert ["pool", "movie, amazon", "5,000", "3"] in table_of(page, "roles")
    (row,) = [row for row in table_of(page, "students") if row[0] == "small"]
    assert row[2] == "distilled from the answers of the student cd (round second)"
    assert "The transfer set and the pool have unlabelled texts from the sources of tweets." in page
    card = (tmp_path / "artifacts" / "students" / "small" / "README.md").read_text(encoding="utf-8")
    assert "| teacher | the student cd |" in card
    assert "| transfer examples | 6,200 |" in card
    others = {"teachers/few_shot", "teachers/zero_shot", "teachers/tuned", "tuned/tuned"}
    assert tables.makers("students/small", params) == others | {"students/small", "rounds/second", "students/cd"}
    found = collect(params, Folders.here(tmp_path))
    costs = {row[0]: row[1] for row in tables.break_even(found).bodies[""]}
    assert costs["`small`"] == f"{3 * 70.1 + 10 + 265.7 + 7:,.0f}"


def document_of(difference, interval, clear):
    """Numbers of a student and its teacher."""

    def method(kind, accuracy):
        entry = {"accuracy": accuracy, "ci95": [accuracy - 0.04, accuracy + 0.04], "predicted_shares": {"a": 0.95, "b": 0.05}}
        return {
            "kind": kind,
            "sets": {"s": entry},
            "means": {"out": entry | {"ece": 0.05, "ece_by_chance": 0.04, "agreement": 0.9}},
            "cost": None,
        }

    row = {"method": "cd", "other": "teacher", "domain": "out", "difference": difference, "ci95": interval, "clear": clear}
    return {
        "reference": "teacher",
        "sets": {"s": {"domain": "out", "n": 100}},
        "methods": {"teacher": method("baseline", 0.8), "cd": method("student", 0.8 + difference)},
        "comparisons": [row],
    }


@pytest.mark.parametrize(
    ("difference", "interval", "clear", "expected"),
    [
        (0.1, [0.05, 0.15], True, "10.0 points above `teacher` (95 % interval of the difference +5.0 to +15.0)"),
        (-0.1, [-0.15, -0.05], True, "10.0 points below `teacher` (95 % interval of the difference −15.0 to −5.0)"),
        (0.02, [-0.01, 0.05], False, "2.0 points above `teacher`"),
        (0.0, [-0.01, 0.01], False, "level with `teacher`"),
    ],
)
def test_findings_follow_the_numbers(difference, interval, clear, expected):
    lines = prose.findings(document_of(difference, interval, clear))
    assert expected in lines[0]
    assert ("not clearly better or worse than `teacher`" in lines[0]) == (not clear)
    off = "the confidence of `cd` is off by 5.0 points on average (expected calibration error), that of `teacher` by 5.0"
    assert f"Out of domain, {off}; a perfect one would seem off by 4.0 on as many texts." in lines
    assert any("answers `a` to 95.0 %" in line for line in lines)


@pytest.mark.parametrize("width", [100, 60])
def test_the_summary_has_the_means_and_the_page(root, found, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    tables.print_summary(root)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-2])) <= width
    assert all(name in text for name in found.document["methods"])
    assert prose.percent(found.document["methods"]["cd"]["means"]["out"]["accuracy"]) in text
    assert "index.html" in text.replace("\n", "")
    assert [line.split()[0] for line in text.splitlines() if " (chosen) " in line] == ["cd"]
    assert "held back, not by these sets" in text


def test_a_summary_without_a_report_says_how_to_get_one(tmp_path):
    with pytest.raises(UsageError, match="dvc repro --force --single-item report"):
        tables.print_summary(tmp_path)


def test_the_chosen_student_is_marked_with_what_it_was_chosen_by_and_its_rank(found, page):
    notes = {row[0].text: row[0].note for rows in tables.headline(found).bodies.values() for row in rows}
    assert [name for name, note in notes.items() if note.startswith("chosen; ")] == ["`cd`"]
    said = prose.chosen(found)
    assert "On the 225 texts that all candidates held back, the target set `mix` expects 83.1 % of its answers to be right" in said
    assert "(standard error 1.2). Evaluation sets had no say" in said
    accuracy = {name: found.document["methods"][name]["means"]["out"]["accuracy"] for name in ("cd", "pbft")}
    place = 1 + (accuracy["pbft"] > accuracy["cd"])
    assert f"number {place} out of domain of 2 students. Not candidates: `pbft`: it learns from labels alone." in said
    assert "<code>cd</code> is chosen: commands take it" in page


def test_a_choice_says_how_the_others_did_or_that_there_is_none(found):
    entry = {"score": 0.5, "standard_error": None, "parameters": 3}
    best = found.files["artifacts/best.json"]

    def said(**changes):
        return prose.chosen(replace(found, files=found.files | {"artifacts/best.json": best | changes}))

    assert "to be right (of `pbft` 40.0 %). Evaluation" in said(candidates={"cd": entry, "pbft": entry | {"score": 0.4}}, no_candidates={})
    none = said(student=None, candidates={})
    assert none == "No student is chosen for commands without `--student` (`pbft`: it learns from labels alone)."
    assert said(student=None, no_candidates={}) == "No student is chosen for commands without `--student`."


def test_free_text_has_its_own_tables_and_samples(free_text, write_run, tmp_path, capsys):
    params = write_run(free_text, tmp_path)
    page, document = rebuilt(params, tmp_path)
    evaluated = read_json(tmp_path / "metrics" / "eval" / "cd.json")["sets"]
    for where in params.data.evaluation:
        own = document["methods"]["cd"]["sets"][where]
        assert {key: own[key] for key in ("well_formed", "accuracy", "tokens")} == {
            key: evaluated[where][key] for key in ("well_formed", "accuracy", "tokens")
        }
        assert set(own["agreement"]) == {"text", "sentiment", "because"}
        assert "agreement" not in document["methods"]["teacher"]["sets"][where]
        assert prose.percent(own["well_formed"]) in page
    assert page.count("<article>") == 12
    assert "(ill-formed) what?" in page
    assert "<b>flat" not in page
    assert "cd − teacher" in page
    assert not (tmp_path / "artifacts/students/cd/README.md").exists()
    tables.print_summary(tmp_path)
    assert "well formed" in capsys.readouterr().out


def test_numbers_read_well():
    assert [prose.percent(x) for x in (0.8633, None, 1.0)] == ["86.3", "–", "100.0"]
    assert [prose.points(x) for x in (-0.021, 0.021, 0.0001, -0.0001)] == ["−2.1", "+2.1", "+0.0", "+0.0"]
    assert [prose.scaled(x) for x in (113_142_528, 1_700_000_000, 999, None)] == ["113.1 M", "1.7 B", "999", "–"]
    assert prose.scaled(452_570_112, "B") == "452.6 MB"
    assert [prose.milliseconds(x) for x in (4.84, 31.2, 1049.9, None)] == ["4.8", "31", "1,050", "–"]
    assert [prose.p_value(x) for x in (None, 0.0004, 0.25)] == ["–", "under 0.001", "0.250"]
    assert [prose.listed(names) for names in ([], ["a"], ["a", "b", "c"])] == ["–", "`a`", "`a`, `b` and `c`"]


def test_the_page_says_what_labels_and_shares_changed(page):
    text = " ".join(re.sub(r"<[^>]+>", "", page).split())
    assert "learnt from 16 labelled examples that its teachers had not seen" in text
    assert "0.61 nats, 75 % right before; 0.42 nats, 88 % right after" in text
    assert "negative 90.0 % (90.0 to 90.0), positive 10.0 % (10.0 to 10.0); the shares of its answers are far from that" in text
