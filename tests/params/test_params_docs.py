"""docs/params.md lists every key, links lead somewhere, and every YAML block of the documents is one that `shotless check` and DVC take."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from dvc.repo import Repo
from ruamel.yaml import YAML
from small_project import small_params

from docs.params_page import page
from pipeline.params import Params, checked_params, parse_params, read_yaml, resolve, write_yaml
from pipeline.params.presets import merge

DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]


def blocks() -> list[Any]:
    """The fenced YAML blocks that are parts of params.yaml, by document and line."""
    found = []
    for file in DOCUMENTS:
        text = file.read_text("utf-8")
        for block in re.finditer(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            name = f"{file.name}:{text[: block.start()].count(chr(10)) + 1}"
            found.append(pytest.param(YAML(typ="safe", pure=True).load(block[1]), id=name))
    return found


def anchors(file: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_to_files_and_headings():
    links = [(file, link) for file in DOCUMENTS for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", file.read_text("utf-8"))]
    assert len(links) > 30
    for file, link in links:
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{file.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{file.name}: {link}"


def test_the_page_of_params_is_up_to_date_and_says_what_every_key_means():
    written = (PROJECT / "docs" / "params.md").read_text("utf-8")
    assert written == page(), "run `python -m docs.params_page`"
    assert "|  |" not in written, "a key without a docstring"


@pytest.mark.slow
def test_the_defaults_on_the_page_are_those_of_a_file_that_leaves_them_out(raw_params):
    section, defaults = "", {}
    for line in page().splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if (row := re.match(r"\| `(\w+)` \| .*? \| `(.*?)` \| ", line)) and "NAME" not in section:
            defaults[f"{section}.{row[1]}"] = json.loads(row[2])
    raw_params = {key: value for key, value in raw_params.items() if key not in {"runtime", "monitor"}}
    used = parse_params(raw_params).model_dump(mode="json")
    checked = 0
    for path, default in defaults.items():
        written, value = raw_params, used
        for key in path.split("."):
            written = (written or {}).get(key) if isinstance(written, dict) else None
            value = (value or {}).get(key) if isinstance(value, dict) else None
        if written is None and path.split(".")[0] != "task" and not isinstance(default, dict):
            assert value == default, path
            checked += 1
    assert checked > 15


def make_files(raw: dict[str, Any], folder: Path) -> None:
    """An empty file or folder for each local path; what is in them is the stages' business."""
    for entry in [*raw["models"].values(), *raw["data"]["sources"].values()]:
        if not entry["path"].startswith("downloads/"):
            path = folder / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


@pytest.mark.parametrize("block", blocks())
@pytest.mark.slow
def test_a_block_of_a_document_is_taken_by_check_and_by_dvc(project, block):
    assert set(block) <= set(Params.model_fields), "a block of YAML that is not of params.yaml: fence it as text"
    base = read_yaml(project / "params.yaml")
    raw = base | block if "task" in block else merge(base, block)
    write_yaml(raw, project / "params.yaml")
    make_files(raw, project)
    assert checked_params(project)
    assert untracked(project) == {}


@pytest.mark.parametrize("left_out", ["tuned", "downloads", "students"])
def test_a_block_that_params_leave_out_is_empty_for_dvc_too(project, left_out):
    raw = small_params()  # has neither `tuned` nor `downloads`
    raw.pop(left_out, None)
    write_yaml(raw, project / "params.yaml")
    make_files(raw, project)
    assert untracked(project) == {}


def untracked(project: Path) -> dict[str, set[str]]:
    """Stage → keys that dvc.yaml tracks for it and the resolved params lack; DVC would stop there."""
    resolve(project)
    repo = Repo(str(project))
    try:
        lacking = {
            stage.addressing: set(dep.params) - set(dep.read_params())
            for stage in repo.index.stages
            for dep in stage.deps
            if hasattr(dep, "params")
        }
    finally:
        repo.close()
    assert "params" not in lacking
    assert len(lacking) > 8
    return {name: keys for name, keys in lacking.items() if keys}
