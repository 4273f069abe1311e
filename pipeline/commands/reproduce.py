"""`dvc repro`, watched: what is done, what runs and what is left is shown, and everything that is printed goes to a log.

DVC and its stages print into one pipe: DVC names the stage that it comes to, a stage's meters say how far it is (`progress.read_meter`).
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from pipeline.errors import ShotlessError
from pipeline.files import Folders
from pipeline.progress import Reading, read_meter
from pipeline.setup.estimate import SECONDS_A_STAGE, prepared_work

SECONDS_BETWEEN_LINES = 30.0
RUNNING = re.compile(r"Running stage '(.+)':")
PASSED = re.compile(r"Stage '(.+)' (?:didn't change|is cached)")
ERROR = re.compile(r"error: |Traceback ")
LINES_OF_ERROR = 40


def due_stages(workspace: Path, targets: Sequence[str]) -> tuple[list[str], int]:
    """The stages that `dvc repro` runs if all outputs come out different, in its order; and how many there are.

    Nothing is run; artifacts/params.json is up to date (`params.resolve`).
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import plan_repro

    due: dict[Any, str] = {}
    try:
        with contextlib.chdir(workspace), warnings.catch_warnings(), Repo() as repo, repo.lock:
            warnings.simplefilter("ignore", DeprecationWarning)  # DVC's own, in pygtrie
            graph = repo.index.graph  # an edge leads to what a stage depends on
            wanted = plan_repro(graph, [stage for target in targets for stage in repo.stage.collect(target)])
            for stage in wanted:
                needs = (other for other in graph.successors(stage) if other.addressing != "params")  # whose file was just written
                if not due.keys().isdisjoint(needs) or stage.status():
                    due[stage] = stage.addressing
    except DvcException as error:
        raise ShotlessError(f"{workspace / 'dvc.yaml'}: {error}") from None
    return list(due.values()), len(wanted)


class Watch:
    """What is known of a run, from the lines that DVC and the stages print. `work` gives the texts that stages pass through a model."""

    def __init__(self, due: Sequence[str], total: int, work: Callable[[], dict[str, float]]) -> None:
        self.left = dict.fromkeys(due)  # with the stage that runs
        self.total = total
        self.stage = ""  # the one that runs
        self.printed: list[str] = []  # by it, without its meters' lines
        self.reading: Reading | None = None  # of its meter
        self.started = self._since = time.monotonic()
        self._work_of, self._work = work, dict[str, float]()
        self._done, self._spent = 0.0, 0.0  # work of the stages that ended, and their seconds for it

    def read(self, line: str) -> str | None:
        """Take note of a line. Returns what ended with it in words: a stage, or nothing."""
        if found := RUNNING.match(line):
            ended, self.stage = self.end(), found[1]
            self._work = self._work or self._work_of()
            return ended
        if found := PASSED.match(line):
            ended = self.end()
            self.left.pop(found[1], None)
            return ended
        if reading := read_meter(line):
            self.reading = reading
        elif line:
            self.printed.append(line)
        return None

    def end(self) -> str | None:
        """The stage that ran is done. Returns that in words, or None if none ran."""
        stage, seconds = self.stage, time.monotonic() - self._since
        self.left.pop(stage, None)
        if work := self._work.get(stage):
            self._done, self._spent = self._done + work, self._spent + max(seconds - SECONDS_A_STAGE, 1.0)
        self.stage, self.printed, self.reading, self._since = "", [], None, time.monotonic()
        return f"{stage}: {duration(seconds)}" if stage else None

    @property
    def now(self) -> str:
        """What runs, in words."""
        return f"{self.stage or 'dvc'}{f'  {self.reading.text}' if self.reading else ''}"

    @property
    def whole(self) -> str:
        """Done, time left and what is to do, in words."""
        left = self.seconds_left()
        kinds = Counter(stage.partition("@")[0] for stage in self.left if stage != self.stage)
        to_do = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items())
        time_left = f", about {max(1, round(left / 60))} min left" if left is not None else ""
        return f"{self.total - len(self.left)} of {self.total} stages{time_left}" + (f"; to do: {to_do}" if to_do else "")

    def seconds_left(self) -> float | None:
        """The same work as in `shotless init`'s estimate, at the rate of the stages that ended; None before any did."""
        if not self._done:
            return None
        seconds = {stage: SECONDS_A_STAGE + self._work.get(stage, 0.0) * self._spent / self._done for stage in self.left}
        gone = min(time.monotonic() - self._since, seconds.get(self.stage, 0.0))
        return sum(seconds.values()) - gone


def duration(seconds: float) -> str:
    """`251.3` → `4 min 11 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def reproduce(workspace: Path, project: Path, targets: Sequence[str] = ()) -> None:
    """Run `dvc repro` in a workspace, with this Python and the project's `.work`, and show how it goes.

    artifacts/params.json is up to date (`params.resolve`). Raises ShotlessError with the error of the stage that failed.
    """
    due, total = due_stages(workspace, targets)
    if not due:
        print(f"Nothing to run: all {total} stages are up to date.")
        return
    work = Folders.here(project).work.resolve()
    log = work / "logs" / time.strftime("%Y-%m-%dT%H-%M-%S.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    watch, console = Watch(due, total, lambda: prepared_work(workspace)), Console(stderr=True)

    def say(text: str | None) -> None:
        if text:
            console.print(Text(text), soft_wrap=True)

    say(f"{len(due)} of {total} stages to run; all that they print is in {shown(log)}")
    environment = os.environ | {"SHOTLESS_PYTHON": sys.executable, "SHOTLESS_WORK": str(work), "PYTHONUNBUFFERED": "1"}
    note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True))
    with (
        log.open("w", encoding="utf-8") as file,
        Progress(BarColumn(24), note, console=console, disable=not console.is_terminal, transient=True) as bar,
        running([sys.executable, "-m", "dvc", "repro", *targets], workspace, environment) as (process, lines),
    ):
        whole, now, said = bar.add_task("", total=total, note=""), bar.add_task("", note=""), time.monotonic()
        while (line := next(lines)) is not None:
            file.write(line)
            file.flush()
            ended, reading = watch.read(line.rstrip()), watch.reading
            say(ended)
            bar.update(whole, completed=total - len(watch.left), note=watch.whole)
            bar.update(now, completed=reading.done if reading else 0, total=reading.total if reading else None, note=watch.now)
            if ended:
                said = time.monotonic()
            elif bar.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(f"… {watch.now}; {watch.whole}")
        if process.wait() == 0:
            say(watch.end())
    if process.returncode:
        _fail(watch, log)
    say(f"Done in {duration(time.monotonic() - watch.started)}; all that the stages printed is in {shown(log)}")


def shown(path: Path) -> Path:
    """A path as it is shortest from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _fail(watch: Watch, log: Path) -> NoReturn:
    """Raise what the stage that failed said; if it named no error, all that it and DVC said."""
    first = next((number for number, line in enumerate(watch.printed) if ERROR.match(line)), None)
    said = watch.printed if first is None else [line for line in watch.printed[first:] if not line.startswith("ERROR: failed to reproduce")]
    error = "\n".join(said[-LINES_OF_ERROR:]).removeprefix("error: ")
    where = f"{watch.stage}: " if watch.stage else ""
    raise ShotlessError(
        f"{where}{error}\nWhat is done stays done: the next run goes on from there. All that was printed is in {shown(log)}"
    )


@contextlib.contextmanager
def running(
    command: Sequence[str], folder: Path, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], Iterator[str | None]]]:
    """A process in this block, and the lines that it and its children print: `""` after a second without one, None at the end.

    All of them end with the block, also if this process is told to end.
    """

    def end(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    process = subprocess.Popen(  # noqa: S603  names of stages
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        encoding="utf-8", errors="backslashreplace", start_new_session=True,
    )  # fmt: skip
    queue: SimpleQueue[str | None] = SimpleQueue()

    def fill() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                queue.put(line)
        queue.put(None)

    def lines() -> Iterator[str | None]:
        while True:
            try:
                yield queue.get(timeout=1.0)
            except Empty:  # a daemon that a stage has left may hold the pipe
                yield "" if process.poll() is None else None

    reader = Thread(target=fill, daemon=True)
    reader.start()
    try:
        yield process, lines()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        reader.join(timeout=1.0)
        for number, handler in before.items():
            signal.signal(number, handler)
