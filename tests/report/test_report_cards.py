"""Model cards: in the students' folders, true to the numbers, with code that runs, and invisible to DVC."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DVC, PROJECT
from report_files import shipped_params, write_run

from pipeline.report.build import build_report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(shipped_params(), root, examples=20)
    build_report(shipped_params(), root)
    return root


def card_of(run: Path, student: str) -> str:
    return (run / "artifacts" / "students" / student / "README.md").read_text(encoding="utf-8")


def test_the_cards_code_runs_on_a_plain_model_folder(run: Path, model_folder: Any) -> None:
    """The snippet loads with transformers alone, and its probabilities are those of the definition."""
    card = card_of(run, "cd")
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert code is not None
    folder = model_folder("llama")
    source = code.group(1).replace("artifacts/students/cd", str(folder))
    scope: dict[str, Any] = {}
    exec(source, scope)
    found = scope["probabilities"](text="a warm film")
    assert list(found) == ["negative", "positive"]
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    tokenizer, model = scope["tokenizer"], scope["model"]
    prompt = tokenizer("Review: a warm film\nSentiment:").input_ids
    expected = []
    for verbaliser in (" negative", " positive"):
        ids, total = list(prompt), 0.0
        for token in tokenizer(verbaliser).input_ids:
            with torch.no_grad():
                total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        expected.append(total)
    assert list(found.values()) == pytest.approx(torch.tensor(expected).softmax(0).tolist(), abs=1e-4)


def test_a_card_says_what_was_learnt_from_and_under_which_licence(run: Path) -> None:
    cd, pbft = (card_of(run, name) for name in ("cd", "pbft"))
    assert cd.startswith("---\nlicense: apache-2.0\n")
    assert "6 contexts, up to 16 demonstrations" in cd
    assert "teacher's answers" in cd
    assert "16 labelled demonstrations" in pbft
    assert "teacher's answers" not in pbft
    assert "Data `movie`: MIT." in cd


def test_a_card_names_the_limits_that_were_measured(run: Path) -> None:
    card = card_of(run, "cd")
    limits = card[card.index("## Limits") : card.index("## Metrics")]
    assert re.search(r"least often right on `\w+`: [\d.]+ %", limits)
    assert "Its weakest slice is length “long”, in domain: 72.0 % of 102 examples." in limits
    assert "A swap that should not matter (first names by others of the same gender) flipped 1 of 23 answers." in limits
    assert "contractions" not in limits


def test_dvc_does_not_see_a_card(tmp_path: Path) -> None:
    """A card in a stage's output changes neither its hash nor its files, and a checkout leaves it where it is."""
    shutil.copy(PROJECT / ".dvcignore", tmp_path)
    student = tmp_path / "artifacts" / "students" / "cd"
    stage = "stages:\n  student:\n    cmd: mkdir -p artifacts/students/cd && echo {} > artifacts/students/cd/config.json\n"
    (tmp_path / "dvc.yaml").write_text(f"{stage}    outs: [artifacts/students/cd]\n", encoding="utf-8")
    for command in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([*DVC, *command], cwd=tmp_path, check=True)
    (student / "README.md").write_text("a card", encoding="utf-8")
    assert subprocess.run([*DVC, "status", "-q"], cwd=tmp_path, check=False).returncode == 0
    (student / "config.json").write_text("changed", encoding="utf-8")
    subprocess.run([*DVC, "checkout", "-q", "--force"], cwd=tmp_path, check=True)
    assert (student / "config.json").read_text(encoding="utf-8") == "{}\n"
    assert (student / "README.md").read_text(encoding="utf-8") == "a card"
