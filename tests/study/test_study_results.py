"""The page of results against predictions on disk: means over draws, differences, curves, and what has not been run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import PROJECT
from ruamel.yaml import YAML

from pipeline.errors import UsageError
from pipeline.files import write_json
from pipeline.params import Params, parse_params
from pipeline.schema import PREDICTIONS, write_table
from pipeline.study.plan import WORKSPACES, Part, StudyPlan, part_params
from pipeline.study.results import write_results

QUICK = {"evaluation": {"bootstrap": 50}}
PLAN = StudyPlan.model_validate(
    {
        "groups": {
            "main": {"title": "The main table", "set": QUICK, "draws": [0, 1, 2], "pairs": [["cd", "pbft"]], "slices": ["heuristic"]},
            "more": {"title": "More", "set": QUICK, "draws": [0], "table": False},
        },
        "curves": {"amount": {"title": "Amount", "x": "texts", "log": True, "lines": {"cd": {100: "more/cd", 800: "main/cd"}}}},
    }
)
EXAMPLES = 40
ROUNDED = 0.051
"""Half of the last digit shown."""


def right(method: str, draw: int, set_number: int, block: int) -> np.ndarray:
    """Which examples a made-up method gets right."""
    chance = {"cd": 0.9, "pbft": 0.7}.get(method, 0.8)
    return np.random.default_rng([*method.encode(), draw, set_number, block]).random(EXAMPLES) < chance


def finish(project: Path, part: Part) -> Params:
    """Write what a part that has finished leaves, made up."""
    raw = part_params(PLAN, part, PROJECT)
    params, folder = parse_params(raw), project / WORKSPACES / part.name
    folder.mkdir(parents=True)
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(raw, folder / "params.yaml")
    for method in [*params.baselines, *params.students]:
        each = method in params.baselines and params.baselines[method].contexts == "each"
        rows = []
        for s, name in enumerate(params.data.evaluation):
            for block in range(2 if each else 1):
                for n, hit in enumerate(right(method, part.draw, s, block)):
                    label, predicted = "positive", "positive" if hit else "negative"
                    p = 0.8 if hit else 0.2
                    rows.append([name, f"orders/{block}" if each else "", f"{n:064x}", label, predicted, [1 - p, p]])
        table = pa.Table.from_pylist([dict(zip(PREDICTIONS.names, row, strict=True)) for row in rows], PREDICTIONS)
        write_table(table, folder / "artifacts" / "predictions" / f"{method}.parquet")
        hits = right(method, part.draw, 1, 0)
        slices = [
            ("heuristic", "overlap", None, hits),
            ("heuristic", "overlap", "amazon", hits[:10]),
            ("heuristic", "constituent", "amazon", hits[10:]),
            ("length", "short", "amazon", hits[:5]),
        ]
        names = ("dimension", "slice", "set", "n", "accuracy")
        detail = [dict(zip(names, (*key, len(own), own.mean()), strict=True)) for *key, own in slices]
        write_json({"slices": detail}, folder / "metrics" / "detail" / f"{method}.json")
    (folder / "metrics" / "runtime").mkdir(parents=True)
    (folder / "metrics" / "compare.json").write_text("{}", encoding="utf-8")
    prepared = {"roles": {"transfer": {"drawn": 600}}}
    (folder / "metrics" / "prepare.json").write_text(json.dumps(prepared), encoding="utf-8")
    for n, teacher in enumerate(params.teachers):
        taken = {"seconds": 100.0 * (n + 1), "rows": 2400, "rows_timed": 2400}
        (folder / "metrics" / "runtime" / f"teacher-{teacher}.json").write_text(json.dumps(taken), encoding="utf-8")
    cost = {"seconds": 10.0 * (part.draw + 1), "peak_rss_bytes": 2_000_000_000, "resumed_at_step": 0}
    (folder / "metrics" / "runtime" / "student-cd.json").write_text(json.dumps(cost), encoding="utf-8")
    (folder / "seconds.txt").write_text("1800 2\n", encoding="utf-8")
    return params


@pytest.fixture
def page(tmp_path: Path) -> str:
    for name in ("params.yaml", "presets"):  # what the plan's params are made of
        (tmp_path / name).symlink_to(PROJECT / name)
    for part in (Part("main", 0), Part("main", 2), Part("more", 0)):
        finish(tmp_path, part)
    lacking = write_results(PLAN, tmp_path, "2 cores", tmp_path / "docs" / "results.md")
    assert lacking == ["main: draw 1"]
    return (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")


def row(page: str, name: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracies_are_means_over_finished_draws_with_their_deviation(page: str) -> None:
    for s in range(4):
        each = [right("cd", draw, s, 0).mean() for draw in (0, 2)]
        blocks = [right("icl", draw, s, block).mean() for draw in (0, 2) for block in range(2)]
        for name, values in (("cd", each), ("icl", blocks)):
            mean, _, spread = row(page, f"`{name}`")[1 + s].split(" [")[0].split()
            assert float(mean) == pytest.approx(100 * np.mean(values), abs=ROUNDED)
            assert float(spread) == pytest.approx(100 * np.std(values, ddof=1), abs=ROUNDED)
    assert row(page, "`cd`")[7:9] == ["20 s", "2.0 GB"]
    assert row(page, "`pbft`")[7:9] == ["–", "–"]


def test_differences_are_those_of_the_means(page: str) -> None:
    cells = row(page, "`cd` − `pbft`")
    differences = [np.mean([right("cd", d, s, 0).mean() - right("pbft", d, s, 0).mean() for d in (0, 2)]) for s in range(4)]
    for cell, value in zip(cells[1:], [*differences, np.mean(differences)], strict=True):
        assert float(cell.split()[0].replace("−", "-")) == pytest.approx(100 * value, abs=ROUNDED)


def test_slices_are_means_over_draws_in_a_table_of_their_own(page: str) -> None:
    assert row(page, "amazon, heuristic")[1:] == ["overlap (10)", "constituent (30)"]
    table = page[page.index("| amazon, heuristic |") :]
    for method in ("cd", "zero_shot"):
        for cell, own in zip(row(table, f"`{method}`")[1:], (np.s_[:10], np.s_[10:]), strict=True):
            assert float(cell) == pytest.approx(100 * np.mean([right(method, d, 1, 0)[own].mean() for d in (0, 2)]), abs=ROUNDED)
    assert ", length |" not in page


def test_agreement_is_with_the_reference_of_the_same_draw(page: str) -> None:
    shares = [np.mean(right("cd", d, s, 0) == right("teacher", d, s, 0)) for d in (0, 2) for s in range(4)]
    assert float(row(page, "`cd`")[5]) == pytest.approx(100 * np.mean(shares), abs=ROUNDED)


def test_curves_are_drawn_and_what_lacks_is_said(page: str, tmp_path: Path) -> None:
    assert '2.0 core hours on 2 cores: `make study PARTS="main-0 main-2"`.' in page
    assert "**Not run yet**: main: draw 1." in page
    assert "## More" not in page
    svg = (tmp_path / "docs" / "results" / "amount.svg").read_text(encoding="utf-8")
    assert "(results/amount.svg)" in page
    assert svg.startswith("<svg")
    assert "var(--" not in svg
    assert {"in domain", "out of domain", "texts"} <= set(re.findall(r">([^<>]+)</text>", svg))
    assert [line.split("|")[2].strip() for line in page.splitlines() if line.startswith("| cd |")] == ["100", "800"]


def test_the_cache_is_set_against_asking_anew(page: str) -> None:
    """Three teachers, 100 s, 200 s and 300 s for 600 texts; a student reads 150 steps of 8."""
    assert "The cache took 600 s of a draw and served 1 student." in page
    assert "would take 1,200 s for that, on average: the cache has paid for itself after 0.5 students." in page


def test_a_cache_that_dvc_restored_in_one_draw_has_the_time_of_the_others(page: str, tmp_path: Path) -> None:
    (tmp_path / WORKSPACES / "main-2" / "metrics" / "runtime" / "teacher-zero_shot.json").unlink()
    write_results(PLAN, tmp_path, "2 cores", tmp_path / "docs" / "results.md")
    assert "The cache took 600 s of a draw" in (tmp_path / "docs" / "results.md").read_text("utf-8")


def test_what_was_run_elsewhere_stays(page: str, tmp_path: Path) -> None:
    """Workspaces are gone, as on another machine; one draw of fewer is run there, and a group that was not run before."""
    output = tmp_path / "docs" / "results.md"
    shutil.rmtree(tmp_path / WORKSPACES)
    assert write_results(PLAN, tmp_path, "other", output) == ["main: draw 1"]
    assert output.read_text("utf-8") == page
    finish(tmp_path, Part("main", 1))
    assert write_results(PLAN, tmp_path, "other", output) == ["main: draw 1"]
    assert output.read_text("utf-8") == page
    for draw in (0, 2):
        finish(tmp_path, Part("main", draw))
    assert write_results(PLAN, tmp_path, "other", output) == []
    assert '3.0 core hours on other: `make study PARTS="main-0 main-1 main-2"`' in output.read_text("utf-8")


def test_a_training_that_was_taken_up_again_has_no_time(page: str, tmp_path: Path) -> None:
    assert row(page, "`cd`")[7:9] == ["20 s", "2.0 GB"]
    file = tmp_path / WORKSPACES / "main-2" / "metrics" / "runtime" / "student-cd.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"resumed_at_step": 70}), encoding="utf-8")
    write_results(PLAN, tmp_path, "2 cores", tmp_path / "docs" / "results.md")
    assert row((tmp_path / "docs" / "results.md").read_text("utf-8"), "`cd`")[7:9] == ["10 s", "2.0 GB"]


def test_figures_of_other_params_say_so(page: str, tmp_path: Path) -> None:
    changed = PLAN.model_copy(
        update={"groups": PLAN.groups | {"main": PLAN.groups["main"].model_copy(update={"set": QUICK | {"data": {"seed": 7}}})}}
    )
    said = "Its params were others than the plan's present ones."
    assert said not in page
    write_results(changed, tmp_path, "2 cores", tmp_path / "docs" / "results.md")
    assert (tmp_path / "docs" / "results.md").read_text("utf-8").count(said) == 2  # the table and the curve


def test_the_same_parts_give_the_same_bytes(page: str, tmp_path: Path) -> None:
    files = sorted(file for file in (tmp_path / "docs").rglob("*") if file.is_file())
    before = [file.read_bytes() for file in files]
    write_results(PLAN, tmp_path, "2 cores", tmp_path / "docs" / "results.md")
    assert before == [file.read_bytes() for file in files]


def test_without_a_finished_part_there_is_no_page(tmp_path: Path) -> None:
    (tmp_path / WORKSPACES / "main-0" / "metrics").mkdir(parents=True)
    with pytest.raises(UsageError, match="no part has finished; `make study` runs them"):
        write_results(PLAN, tmp_path, "2 cores", tmp_path / "results.md")


def test_a_method_that_is_not_there_is_named(tmp_path: Path) -> None:
    finish(tmp_path, Part("main", 0))
    raw: dict[str, Any] = PLAN.model_dump()
    raw["groups"]["main"]["pairs"] = (("cd", "nothing"),)
    with pytest.raises(UsageError, match=r"groups\.main\.pairs: no method 'nothing'; choose one of: cd, icl"):
        write_results(StudyPlan.model_validate(raw), tmp_path, "2 cores", tmp_path / "results.md")


def test_a_slice_that_is_not_there_is_named(tmp_path: Path) -> None:
    finish(tmp_path, Part("main", 0))
    raw: dict[str, Any] = PLAN.model_dump()
    raw["groups"]["main"]["slices"] = ("nothing",)
    with pytest.raises(UsageError, match=r"groups\.main\.slices: nothing is sliced by 'nothing'; choose one of: heuristic, length"):
        write_results(StudyPlan.model_validate(raw), tmp_path, "2 cores", tmp_path / "results.md")
