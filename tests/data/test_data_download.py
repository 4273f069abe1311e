"""Downloads: what is written, what is refused, and what is said without a network. The index is a server here, the hub a stand-in."""

import hashlib
import http.server
import io
import random
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from pipeline.data import download as download_module
from pipeline.data.download import download
from pipeline.errors import UsageError
from pipeline.params import HubDownload, PypiDownload

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "rows-1.0-py3-none-any.whl"
Make = Callable[..., Path]


def wheel_with(members: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts, with these members, as bytes."""
    sink = io.BytesIO()
    metadata = {
        "rows-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: rows\nVersion: 1.0\n",
        "rows-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "rows-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (members | metadata).items():
            file.writestr(name, content)
    return sink.getvalue()


class Index:
    """A package index with one wheel; `body` is what it sends for it, `length` what it announces."""

    def __init__(self) -> None:
        self.body, self.length, self.status = b"", 0, 200
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def offer(self, body: bytes, length: int | None = None, status: int = 200) -> None:
        self.body, self.length, self.status = body, len(body) if length is None else length, status

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        is_wheel = request.path.endswith(".whl")
        body = self.body if is_wheel else f'<!DOCTYPE html><html><body><a href="/{NAME}">{NAME}</a></body></html>'.encode()
        request.send_response(self.status if is_wheel else 200)
        request.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
        request.send_header("Content-Length", str(self.length if is_wheel else len(body)))
        request.end_headers()
        request.wfile.write(body)
        request.close_connection = True


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index that pip asks in this test, and no other."""
    index = Index()
    host, port = index.server.server_address[:2]
    settings = {"CONFIG_FILE": "/dev/null", "INDEX_URL": f"http://{host}:{port}/simple", "EXTRA_INDEX_URL": "", "FIND_LINKS": ""}
    for name, value in (settings | {"NO_CACHE_DIR": "1", "RETRIES": "0", "RESUME_RETRIES": "0", "TIMEOUT": "1"}).items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("NO_PROXY", "*")
    yield index
    index.server.shutdown()
    index.thread.join()
    index.server.server_close()


def pypi(body: bytes, member: str, **changes: Any) -> PypiDownload:
    sha256 = hashlib.sha256(body).hexdigest()
    entry = {"source": "pypi", "package": "rows", "version": "1.0", "sha256": sha256, "member": member, "licence": "MIT"}
    return PypiDownload.model_validate(entry | changes)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# pip


@pytest.mark.slow
def test_a_member_of_a_release_is_copied(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = wheel_with({"rows/data/pile.jsonl": b"rows\r\n", "rows/other.txt": b"not asked for"})
    index.offer(body)
    (tmp_path / "downloads/mine").mkdir(parents=True)
    (tmp_path / "downloads/mine/stale").write_text("of an earlier download")
    download("mine", pypi(body, "rows/data/pile.jsonl"), tmp_path / "downloads/mine")
    assert files_below(tmp_path) == {"downloads/mine/pile.jsonl": b"rows\r\n"}, "nothing else, and no scratch files"
    assert "licence MIT" in capsys.readouterr().out


@pytest.mark.slow
def test_an_archive_in_a_release_is_unpacked_and_archives_in_it_are_not(
    index: Index, tmp_path: Path, make_tar: Make, make_zip: Make
) -> None:
    inmost = make_zip(tmp_path / "z", {"x": b"x"}).read_bytes()
    held = {"corpus/train.txt": b"rows", "corpus/more/test.txt": b"more", "corpus/inner.zip": inmost}
    for make in (make_tar, make_zip):
        body = wheel_with({"rows/corpus.pack": make(tmp_path / "pack", held).read_bytes()})
        index.offer(body)
        download("mine", pypi(body, "rows/corpus.pack"), tmp_path / "downloads/mine")
        assert files_below(tmp_path / "downloads") == {f"mine/{name}": content for name, content in held.items()}


@pytest.mark.slow
def test_a_bad_download_leaves_what_was_there_and_the_next_one_is_whole(index: Index, tmp_path: Path) -> None:
    body = wheel_with({"rows/pile.jsonl": bytes(range(256)) * 100})
    params, folder, half = pypi(body, "rows/pile.jsonl"), tmp_path / "downloads/mine", len(body) // 2
    index.offer(body)
    download("mine", params, folder)
    before = files_below(tmp_path)
    flipped = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
    for bad in ({"body": body[:half], "length": len(body)}, {"body": flipped}, {"body": b"no", "status": 404}):
        index.offer(**bad)
        with pytest.raises(UsageError, match=r"downloads\.mine: rows 1\.0 \(wheel\): "):
            download("mine", params, folder)
        assert files_below(tmp_path) == before
    index.offer(body)
    download("mine", params, folder)
    assert files_below(tmp_path) == before


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed(index: Index, tmp_path: Path) -> None:
    body = wheel_with({"rows/a": b"a"})
    index.offer(body)
    (tmp_path / ".mine/built").mkdir(parents=True)
    (tmp_path / ".mine/built/half").write_text("half")
    download("mine", pypi(body, "rows/a"), tmp_path / "mine")
    assert files_below(tmp_path) == {"mine/a": b"a"}


@pytest.mark.slow
def test_no_network_names_the_next_step(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        UsageError, match=r"(?s)downloads\.mine: rows 1\.0 \(wheel\): .* Check .* network.*pip said:\n  .*No matching distribution"
    ):
        download("mine", pypi(b"", "a"), tmp_path / "mine")


def fake_pip(monkeypatch: pytest.MonkeyPatch, stderr: str = "", leave: bytes | None = None) -> list[list[str]]:
    """Stand in for pip: fail with `stderr`, or leave a file of these bytes in --dest. Returns commands and requirements."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.extend([command, Path(command[command.index("--requirement") + 1]).read_text().split()])
        if leave is not None:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            (folder / "release.whl").write_bytes(leave)
        return subprocess.CompletedProcess(command, 0 if leave is not None else 1, None, stderr)

    monkeypatch.setattr(download_module.subprocess, "run", run)
    return calls


def test_pip_is_asked_for_the_pinned_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = wheel_with({"a": b"a"})
    params = pypi(body, "a")
    calls = fake_pip(monkeypatch, leave=body)
    download("mine", params, tmp_path / "mine")
    command, requirement = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert not any("index" in part or "://" in part for part in command), "which index is pip's own setting"
    assert requirement == ["rows==1.0", f"--hash=sha256:{params.sha256}"]


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n Expected sha256 aa\n  Got        bb", "Expected sha256 aa\n  Got        bb"),
        ("ERROR: No matching distribution found for rows==1.0", "Check `package`, `version`, `kind`, network"),
        ("/x/python: No module named pip", "No module named pip"),
    ],
)
def test_what_pip_says_becomes_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, expected: str) -> None:
    fake_pip(monkeypatch, stderr)
    with pytest.raises(UsageError, match=rf"(?s)rows 1\.0.*{expected}"):
        download("mine", pypi(b"", "a"), tmp_path / "mine")


# archives


def tar_info(name: str = "trap", **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def flipped(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def encrypted(path: Path) -> Path:
    """The archive with the bit set that says its first member is encrypted."""
    path.write_bytes(path.read_bytes().replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"))
    return path


NOISE = random.Random(0).randbytes(5000)
HOSTILE: dict[str, tuple[Callable[[Path, Make, Make], Path], str]] = {  # an archive, and what the message says of it
    "tar: a path that leaves its folder": (lambda p, tar, _: tar(p, {"../../out": b"x"}), "leaves the folder"),
    "tar: an absolute path": (lambda p, tar, _: tar(p, {"/tmp/canary": b"x"}), "leaves the folder"),
    "tar: a symlink": (lambda p, tar, _: tar(p, {}, [tar_info(type=tarfile.SYMTYPE, linkname="/etc/passwd")]), "not a plain file"),
    "tar: a hard link": (lambda p, tar, _: tar(p, {}, [tar_info(type=tarfile.LNKTYPE, linkname="/etc/passwd")]), "not a plain file"),
    "tar: a link inside": (lambda p, tar, _: tar(p, {"a": b"x"}, [tar_info(type=tarfile.SYMTYPE, linkname="a")]), "not a plain file"),
    "tar: a pipe": (lambda p, tar, _: tar(p, {}, [tar_info(type=tarfile.FIFOTYPE)]), "not a plain file"),
    "tar: a device": (lambda p, tar, _: tar(p, {}, [tar_info(type=tarfile.CHRTYPE)]), "not a plain file"),
    "tar: a bomb": (lambda p, tar, _: tar(p, {"a": bytes(3_000_000), "b": bytes(3_000_000)}), "refused as unsafe"),
    "tar.gz: cut": (lambda p, tar, _: cut(tar(p, {"a": NOISE})), "cannot be read as an archive"),
    "tar.xz: cut": (lambda p, tar, _: cut(tar(p, {"a": NOISE}, mode="w:xz")), "cannot be read as an archive"),
    "zip: a path that leaves its folder": (lambda p, _, zip_: zip_(p, {"../../out": b"x"}), "leaves the folder"),
    "zip: a path with backslashes": (lambda p, _, zip_: zip_(p, {"..\\..\\out": b"x"}), "leaves the folder"),
    "zip: an absolute path": (lambda p, _, zip_: zip_(p, {"/tmp/canary": b"x"}), "leaves the folder"),
    "zip: a symlink": (lambda p, _, zip_: zip_(p, {"trap": b"/etc/passwd"}, stat.S_IFLNK | 0o777), "not a plain file"),
    "zip: a bomb": (lambda p, _, zip_: zip_(p, {"a": bytes(3_000_000), "b": bytes(3_000_000)}), "refused as unsafe"),
    "zip: encrypted": (lambda p, _, zip_: encrypted(zip_(p, {"a": b"rows"})), "not a plain file"),
    "zip: damaged": (lambda p, _, zip_: flipped(zip_(p, {"a": NOISE})), "cannot be read as an archive"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_of_a_hostile_archive_is_unpacked(
    case: str, tmp_path: Path, make_tar: Make, make_zip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = HOSTILE[case]
    archive = make(tmp_path / "corpus.pack", make_tar, make_zip).read_bytes()
    (tmp_path / "corpus.pack").unlink()
    body = wheel_with({"rows/corpus.pack": archive})
    fake_pip(monkeypatch, leave=body)
    with pytest.raises(UsageError, match=rf"corpus\.pack: .*{said}"):
        download("mine", pypi(body, "rows/corpus.pack"), tmp_path / "one/two/mine")
    assert files_below(tmp_path) == {}
    assert not Path("/tmp/canary").exists()


def test_a_member_that_is_absent_is_named_with_the_nearest(tmp_path: Path, make_tar: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (wheel_with({"data/train.csv": b"x"}), make_tar(tmp_path / "t", {"data/train.csv": b"x"}).read_bytes()):
        fake_pip(monkeypatch, leave=body)
        with pytest.raises(UsageError, match=r"no 'data/trian.csv' in it.*nearest are: data/train.csv"):
            download("mine", pypi(body, "data/trian.csv"), tmp_path / "mine")


def test_a_release_that_is_not_an_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, leave=b"<html>log in to this network</html>")
    with pytest.raises(UsageError, match=r"release\.whl: not a zip or tar archive"):
        download("mine", pypi(b"<html>log in to this network</html>", "a"), tmp_path / "mine")


# the hub


class FakeHub:
    """A repository on the hub, as a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.asked = folder, set[tuple[str, str]]()
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list_repo_files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def list_repo_files(self, repo: str, *, repo_type: str, revision: str) -> list[str]:
        self.asked.add((repo_type, revision))
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def hf_hub_download(self, repo: str, file: str, *, repo_type: str, revision: str) -> str:
        self.asked.add((repo_type, revision))
        return str(self.folder / file)


def hub(**changes: Any) -> HubDownload:
    return HubDownload.model_validate({"source": "hub", "repo": "owner/name", "revision": COMMIT, "licence": "MIT"} | changes)


def test_a_model_on_the_hub_is_taken_at_its_commit_without_pickles_and_code(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder(), tmp_path / "hub")
    good = set(files_below(tmp_path / "hub"))
    for name in ("pytorch_model.bin", "modeling.py", "README.md"):
        (tmp_path / "hub" / name).write_bytes(b"not taken")
    (tmp_path / "hub/onnx").mkdir()
    (tmp_path / "hub/onnx/model.safetensors").write_bytes(b"not taken")
    fake = FakeHub(monkeypatch, tmp_path / "hub")
    download("mine", hub(), tmp_path / "downloads/mine")
    assert set(files_below(tmp_path / "downloads")) == {f"mine/{name}" for name in good}
    assert fake.asked == {("model", COMMIT)}


def test_listed_files_of_a_data_set_keep_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    for name in ("data/train[0].csv", "data/test.csv", "run.py"):
        (tmp_path / "hub" / name).write_text(name)
    fake = FakeHub(monkeypatch, tmp_path / "hub")
    download("mine", hub(kind="dataset", files=["data/train[0].csv"]), tmp_path / "downloads/mine")
    assert files_below(tmp_path / "downloads") == {"mine/data/train[0].csv": b"data/train[0].csv"}
    assert fake.asked == {("dataset", COMMIT)}
    with pytest.raises(UsageError, match=r"owner/name@01234567: no file other.csv in this commit"):
        download("mine", hub(kind="dataset", files=["data/test.csv", "other.csv"]), tmp_path / "downloads/mine")


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ([], ["README.json", "data/test-0.parquet", "data/train-0.parquet", "data/train-1.parquet"]),
        (["data/train-*.parquet"], ["data/train-0.parquet", "data/train-1.parquet"]),
        (["*.py", "data/test-0.parquet"], ["data/test-0.parquet", "run.py"]),
    ],
)
def test_a_data_set_is_taken_by_name_or_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], taken: list[str]
) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    for name in ("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet", "run.py", "README.md", "README.json"):
        (tmp_path / "hub" / name).write_text(name)
    FakeHub(monkeypatch, tmp_path / "hub")
    download("mine", hub(kind="dataset", files=files), tmp_path / "mine")
    assert list(files_below(tmp_path / "mine")) == taken
    with pytest.raises(UsageError, match=r"no file data/\*\.csv in this commit"):
        download("mine", hub(kind="dataset", files=["data/*.csv"]), tmp_path / "mine")
    shutil.rmtree(tmp_path / "hub/data")
    (tmp_path / "hub/README.json").unlink()
    with pytest.raises(UsageError, match=r"no file that ends with one of \.csv, .*; it has README.md, run.py"):
        download("mine", hub(kind="dataset"), tmp_path / "mine")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], r"no \*\.safetensors at the top.*onnx/model\.safetensors, pytorch_model\.bin.*never loaded"),
        (["pytorch_model.bin"], r"pytorch_model\.bin is not a safetensors.*never loaded"),
    ],
)
def test_pickles_are_refused_before_they_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], said: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["pytorch_model.bin", "onnx/model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(UsageError, match=said):
        download("mine", hub(files=files), tmp_path / "mine")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (errors.OfflineModeIsEnabled("offline mode is enabled"), r"cannot be reached \(offline mode"),
        (errors.LocalEntryNotFoundError("no connection, and not in the cache"), "cannot be reached"),
        (ConnectionError("no route"), r"cannot be reached \(no route\).*path of the folder"),
        (errors.HFValidationError("bad name"), "Write `owner/name`"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(UsageError, match=rf"downloads\.mine: owner/name@01234567: .*{expected}"):
        download("mine", hub(), tmp_path / "mine")


def test_the_real_hub_client_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client in its offline mode, which asks no one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="the Hugging Face hub cannot be reached"):
        download("mine", hub(kind="dataset", files=["data.csv"]), tmp_path / "mine")
