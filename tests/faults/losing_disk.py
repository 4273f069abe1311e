"""A disk that forgets what was not synced, laid under a process from inside: for tests of power cuts.

The rule is harder than that of a real file system: a file's bytes survive only if the file was synced after them, a name only if its
folder was synced after it was made, changed or removed, and of everything else any part may survive or not, each name by itself.
"""

import os
import random
import shutil
from pathlib import Path


class LosingDisk:
    """Watches `folder` from now on; what is there now is on disk."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._synced_bytes: dict[int, bytes] = {}
        self._synced_names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._kept_open: list[int] = []  # so that no inode is given to another file
        for path in [folder, *folder.rglob("*")]:
            self._note(path)
        self._fsync = os.fsync
        os.fsync = self.fsync

    def fsync(self, handle: int) -> None:
        """In the place of `os.fsync`."""
        self._note(Path(f"/proc/self/fd/{handle}").readlink(), handle)

    def _note(self, path: Path, handle: int | None = None) -> None:
        kept = os.open(path, os.O_RDONLY) if handle is None else os.open(f"/proc/self/fd/{handle}", os.O_RDONLY)
        self._kept_open.append(kept)
        number = os.fstat(kept).st_ino
        if path.is_dir():
            self._synced_names[number] = _names(path)
        else:
            self._synced_bytes[number] = _bytes(kept)

    def cut(self, worst: bool) -> None:
        """The power is gone: `folder` becomes what a new start would find. `worst`: nothing that was not synced survives."""
        now = {path.stat().st_ino: _names(path) for path in [self._folder, *self._folder.rglob("*")] if path.is_dir()}
        bytes_now = {path.stat().st_ino: path.read_bytes() for path in self._folder.rglob("*") if path.is_file()}
        tree = self._surviving(self._folder.stat().st_ino, now, bytes_now, worst)
        for entry in self._folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _write(tree, self._folder)

    def _surviving(self, folder, now, bytes_now, worst):
        synced, present, tree = self._synced_names.get(folder, {}), now.get(folder, {}), {}
        for name in sorted({*synced, *present}):
            old, new = synced.get(name), present.get(name)
            chosen = old if worst or old == new or self._random.random() < 0.5 else new
            if chosen is not None:
                number, is_folder = chosen
                is_file = not is_folder
                tree[name] = self._content(number, bytes_now, worst) if is_file else self._surviving(number, now, bytes_now, worst)
        return tree

    def _content(self, number, bytes_now, worst):
        synced = self._synced_bytes.get(number, b"")
        present = bytes_now.get(number, synced)
        if worst or synced == present:
            return synced
        cut = self._random.randrange(len(present) + 1)
        return self._random.choice([synced, present, present[:cut], present[:cut] + bytes(len(present) - cut)])


def _names(folder: Path) -> dict[str, tuple[int, bool]]:
    with os.scandir(folder) as entries:
        return {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}


def _bytes(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size, 0)


def _write(tree, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            _write(content, folder / name)
        else:
            (folder / name).write_bytes(content)
