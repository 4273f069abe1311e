"""Flipped bits, cut and zeroed files, files of another run: each is found before anything of it is used, or changes nothing that is."""

import copy as copying
import shutil
from pathlib import Path

import pytest
import torch
from faults_world import LARGER, REFUSED, WORKED, count, dice, met
from report_files import shipped_params, write_metrics, write_predictions
from stage_world import DAMAGE, copy, damage
from student_naive import tuning

from pipeline.cache.folder import read_cache
from pipeline.cache.rows import read_sealed
from pipeline.cache.store import Store, _read_plan
from pipeline.data.prepare import raw_file
from pipeline.errors import ShotlessError
from pipeline.files import read_json, read_sealed_json
from pipeline.models.identity import check_fetched, weights_sha256
from pipeline.report.build import build_report
from pipeline.schema import CONTEXTS, PREDICTIONS, TARGETS, examples, read_table
from pipeline.serving.student import open_student
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.optimizer import adamw

TIMES = 3 * LARGER
"""Of each kind of damage to each file."""


def table(schema):
    return lambda file: read_table(file, schema).to_pylist()


def fetched_model(file):
    check_fetched(file.parent, weights_sha256(file.parent))
    return {name: sha256 for name, sha256 in read_json(file.parent / "source.json")["files"].items() if not name.startswith("tokenizer")}


def opened_store(file):
    return Store.at(file.parent).folder.name


FILES = {  # where in a finished project, and how it is read
    "artifacts/data/transfer.parquet": table(examples(("text",))),
    "artifacts/data/demonstrations.parquet": table(examples(("text",))),
    "artifacts/data/evaluation/*.parquet": table(examples(("text",))),
    "artifacts/data/contexts/*.parquet": table(CONTEXTS),
    "artifacts/targets/few_shot/targets.parquet": table(TARGETS),
    "artifacts/targets/few_shot/calibration.json": read_sealed_json,
    "artifacts/scores/few_shot/*": lambda file: (read_cache(file.parent).rows.to_pylist(), read_cache(file.parent).manifest),
    "artifacts/raw/pile/pile.jsonl": lambda file: raw_file(file.parents[2], "pile").read_bytes(),
    "artifacts/models/tiny/model.safetensors": fetched_model,
    "artifacts/models/tiny/config.json": fetched_model,
    "artifacts/students/cd/*.json": lambda file: open_student(file.parent),
    "artifacts/students/cd/model.safetensors": lambda file: open_student(file.parent),
    ".work/scores/*/part-*.parquet": read_sealed,
    ".work/scores/*/plans/*.parquet": _read_plan,
    ".work/scores/*/engine.json": read_sealed_json,
    ".work/scores/*/times/*.json": read_sealed_json,
    ".work/scores/*/fingerprint.json": opened_store,
}


def same(one, other):
    """Equal, where students that were opened are compared by what they are made of."""
    if hasattr(one, "weights_sha256"):
        return (one.weights_sha256, one.tokenizer_sha256, one.task) == (other.weights_sha256, other.tokenizer_sha256, other.task)
    return one == other


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("place", FILES)
def test_a_damaged_file_is_refused_or_reads_as_before(trained, tmp_path, place, kind):
    random, read = dice(f"{place} {kind}"), FILES[place]
    folder = copy(trained, tmp_path / "project")
    files = sorted(folder.glob(place))
    assert files, place
    for _ in range(TIMES):
        file = random.choice(files)
        whole, before = file.read_bytes(), read(file)
        damage(file, kind, random)
        found = []
        said = met("a damaged file of a run", lambda file=file, found=found: found.append(read(file)))
        if said is None:
            assert same(found[0], before), f"{file} was damaged, and was read as something else"
            assert file.suffix == ".json", f"{file} was damaged, and was read"  # a changed space, or what nothing is taken from
        else:
            assert file.name in said or str(file.parent) in said or "the store" in said, said
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_predictions_reach_no_report(tmp_path, kind):
    params, random = shipped_params(20), dice(f"predictions {kind}")
    write_predictions(params, tmp_path, 12)
    write_metrics(params, tmp_path)
    for _ in range(TIMES):
        file = random.choice(sorted((tmp_path / "artifacts" / "predictions").iterdir()))
        whole = file.read_bytes()
        damage(file, kind, random)
        with pytest.raises(ShotlessError, match=file.name):
            build_report(params, tmp_path)
        file.write_bytes(whole)
        count("a damaged file of a run", REFUSED)
    assert not (tmp_path / "report").exists()


def test_predictions_of_one_method_do_not_pass_for_another_s(tmp_path):
    params = shipped_params(20)
    write_predictions(params, tmp_path, 12)
    folder = tmp_path / "artifacts" / "predictions"
    shutil.copy(folder / "pbft.parquet", folder / "cd.parquet")
    with pytest.raises(ShotlessError, match=r"cd\.parquet: was written as predictions/pbft\.parquet"):
        read_table(folder / "cd.parquet", PREDICTIONS)
    count("a file swapped with another run's", REFUSED)


SWAPPED = {  # files that another run left under the same name → the stage that would read them
    "artifacts/scores/few_shot/part-00000.parquet": ("stages.targets", "few_shot"),
    "artifacts/scores/few_shot/manifest.json": ("stages.targets", "few_shot"),
    "artifacts/targets/few_shot/targets.parquet": ("stages.student", "cd"),
    "artifacts/targets/few_shot/calibration.json": ("stages.student", "cd"),
    "artifacts/data/transfer.parquet": ("stages.targets", "few_shot"),
    "artifacts/students/cd/model.safetensors": ("shotless", "predict", "--student", "cd", "-i", "mine/gold.jsonl"),
    "artifacts/students/cd/provenance.json": ("shotless", "predict", "--student", "cd", "-i", "mine/gold.jsonl"),
    "artifacts/raw/pile/pile.jsonl": ("stages.prepare",),
    "artifacts/models/tiny/model.safetensors": ("stages.teacher", "few_shot"),
}


@pytest.fixture(scope="module")
def other(tmp_path_factory, trained, stages, model_folder):
    """A run of another model, other texts and another temperature."""
    from small_project import OLD, small_params, write_lines, write_params

    folder = tmp_path_factory.mktemp("other") / "project"
    shutil.copytree(trained / "mine", folder / "mine")
    shutil.copytree(model_folder("llama", seed=5), folder / "mine" / "model", dirs_exist_ok=True)
    write_lines(folder / "mine" / "pile.jsonl", [{"text": f"{text} twice"} for text in OLD])
    raw = small_params()
    raw["targets"]["few_shot"]["temperature"] = 0.5
    write_params(folder, raw)
    for stage in ("fetch", "prepare", "teacher few_shot", "targets few_shot", "student cd"):
        stages.good(folder, *f"stages.{stage}".split())
    return folder


@pytest.mark.parametrize("place", SWAPPED)
def test_a_file_of_another_run_is_refused_with_a_message(trained, other, stages, tmp_path, place):
    folder = copy(trained, tmp_path / "project")
    shutil.copyfile(other / place, folder / place)
    assert stages.run(folder, *SWAPPED[place]).message
    count("a file swapped with another run's", REFUSED)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_leaves_the_model_as_it_is(tiny_model, tmp_path, kind, capsys):
    random, model = dice(f"checkpoint {kind}"), tiny_model("llama")
    model.requires_grad_(True)
    optimizer = adamw(model, tuning())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint = Checkpoint(tmp_path, "student-cd", "0123456789abcdef00")
    checkpoint.save(model, optimizer, [1.0, 0.5])
    [file] = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    fresh = tiny_model("llama", seed=1).requires_grad_(True)
    assert checkpoint.load(copying.deepcopy(fresh), adamw(copying.deepcopy(fresh), tuning()))[0] == [1.0, 0.5]
    for _ in range(TIMES):
        damage(file, kind, random)
        loaded = copying.deepcopy(fresh)
        losses, others = checkpoint.load(loaded, adamw(loaded, tuning()))
        assert (losses, others) == ([], {})
        assert all(torch.equal(one, two) for one, two in zip(loaded.parameters(), fresh.parameters(), strict=True))
        assert "training starts again" in capsys.readouterr().err or kind == "flipped bit"  # in the fingerprint: another training's
        count("a damaged checkpoint", WORKED)
        file.write_bytes(whole)


def test_verify_finds_every_damage_and_mends_it_to_the_same_bytes(trained, stages, tmp_path):
    random = dice("verify")
    for _ in range(2 * LARGER):
        folder = copy(trained, tmp_path / "project")
        before = {file.name: file.read_bytes() for file in (folder / "artifacts/scores/few_shot").iterdir()}
        files = [*folder.glob("artifacts/scores/few_shot/*"), *folder.glob(".work/scores/*/*.parquet"), *folder.glob(".work/scores/*/*/*")]
        for file in random.sample(files, 2):
            damage(Path(file), random.choice(DAMAGE), random)
        assert stages.run(folder, "shotless", "verify").message
        stages.good(folder, "shotless", "verify", "--repair")
        assert {file.name: file.read_bytes() for file in (folder / "artifacts/scores/few_shot").iterdir()} == before
        stages.good(folder, "shotless", "verify")
        count("two damaged files, `verify --repair`", WORKED)
