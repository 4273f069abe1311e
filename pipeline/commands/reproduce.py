"""A run, watched: DVC reproduces what is due, what is done and what runs is shown, and everything that is printed goes to a log.

On two cores and more two stages run at once, each on half of the cores: they use them better than one stage uses all. A stage that measures
time has the machine for itself. Each lane is a process (`commands/lane.py`); `dvc repro` gives the same, one by one.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from pipeline.commands.lane import ENDED, GPU, lane_command
from pipeline.errors import ShotlessError
from pipeline.files import Folders
from pipeline.models.process import cores
from pipeline.progress import Reading, read_meter
from pipeline.setup.estimate import SECONDS_A_STAGE, prepared_work

SECONDS_BETWEEN_LINES = 30.0
PASSED = re.compile(r"Stage '.+' (?:didn't change|is cached)")
ALONE = ("cost", "select")
"""Stages that measure time."""
LONG = ("tune", "teacher", "round", "student", "evaluate", "baseline", "risk")
ERROR = re.compile(r"error: |Traceback ")
LINES_OF_ERROR = 40


def due_stages(workspace: Path, targets: Sequence[str]) -> tuple[dict[str, set[str]], int]:
    """The stages that `dvc repro` runs if all outputs come out different, in its order, each with those of them that it waits for; and how
    many stages there are.

    Nothing is run; artifacts/params.json is up to date (`params.resolve`).
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import plan_repro

    due: dict[str, set[str]] = {}
    try:
        with contextlib.chdir(workspace), warnings.catch_warnings(), Repo() as repo, repo.lock:
            warnings.simplefilter("ignore", DeprecationWarning)  # DVC's own, in pygtrie
            graph = repo.index.graph  # an edge leads to what a stage depends on
            wanted = plan_repro(graph, [stage for target in targets for stage in repo.stage.collect(target)])
            for stage in wanted:
                waits = {other.addressing for other in graph.successors(stage)} & due.keys()
                if waits - {"params"} or stage.status():  # whose file was just written
                    due[stage.addressing] = waits
    except DvcException as error:
        raise ShotlessError(f"{workspace / 'dvc.yaml'}: {error}") from None
    return due, len(wanted)


@dataclass
class Lane:
    """A process that reproduces stages, and what the stage that runs has said."""

    process: subprocess.Popen[str]
    stage: str = ""
    printed: list[str] = field(default_factory=list)  # by the stage, without its meters' lines
    reading: Reading | None = None  # of its meter

    def start(self, stage: str, cores: Iterable[int]) -> None:
        """Reproduce a stage on some of the cores."""
        self.stage, self.printed, self.reading = stage, [], None
        assert self.process.stdin is not None
        self.process.stdin.write(f"{stage} {' '.join(map(str, cores))}\n")
        self.process.stdin.flush()

    @property
    def now(self) -> str:
        """What runs, in words."""
        return f"{self.stage}{f'  {self.reading.text}' if self.reading else ''}"


class Plan:
    """What is left of a run. `work` gives the texts that stages pass through a model, as far as they are known."""

    def __init__(self, due: Mapping[str, Collection[str]], total: int, work: Callable[[], dict[str, float]]) -> None:
        self.left = {stage: set(waits) for stage, waits in due.items()}  # with those that run
        self.total = total
        self.running = dict[str, float]()  # stage → when it was started
        self._work_of, self._work = work, dict[str, float]()
        self._done, self._spent = 0.0, 0.0  # work of the stages that ended, and their seconds for it

    def next(self) -> str | None:
        """The stage to start now: of those that wait for nothing, the one with most work in it and behind it; a stage of `ALONE` last."""
        ready = [stage for stage, waits in self.left.items() if not waits and stage not in self.running]
        shared = [stage for stage in ready if stage not in ALONE]
        if self.running.keys() & ALONE or (not shared and self.running):
            return None
        return max(shared or ready, key=self._work_behind, default=None)

    def _work_behind(self, stage: str) -> float:
        behind = [self._work_behind(other) for other, waits in self.left.items() if stage in waits]
        return self._work.get(stage, 0.0) + max(behind, default=0.0)

    def start(self, stage: str) -> None:
        """A stage runs."""
        self.running[stage] = time.monotonic()

    def end(self, stage: str) -> str:
        """A stage is done. Returns that in words."""
        seconds = time.monotonic() - self.running.pop(stage)
        del self.left[stage]
        for waits in self.left.values():
            waits.discard(stage)
        self._work = self._work or self._work_of()
        if work := self._work.get(stage):
            self._done, self._spent = self._done + work, self._spent + max(seconds - SECONDS_A_STAGE, 1.0)
        return f"{stage}: {duration(seconds)}"

    def whole(self, lanes: int) -> str:
        """Done, time left and what is to do, in words."""
        left = self.seconds_left(lanes)
        kinds = Counter(stage.partition("@")[0] for stage in self.left if stage not in self.running)
        to_do = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items())
        time_left = f", about {max(1, round(left / 60))} min left" if left is not None else ""
        return f"{self.total - len(self.left)} of {self.total} stages{time_left}" + (f"; to do: {to_do}" if to_do else "")

    def seconds_left(self, lanes: int) -> float | None:
        """The same work as in `shotless init`'s estimate, at the rate of the stages that ended; None before any did."""
        if not self._done:
            return None
        seconds = {stage: SECONDS_A_STAGE + self._work.get(stage, 0.0) * self._spent / self._done for stage in self.left}
        gone = sum(min(time.monotonic() - since, seconds[stage]) for stage, since in self.running.items())
        return (sum(seconds.values()) - gone) / lanes


def shares_of_cores(due: Mapping[str, Collection[str]], jobs: int) -> list[list[int]]:
    """The cores of each lane. With one lane none are named: it takes what this process has.

    There are two halves, unless there is only one core, a GPU to share, no way to bind a process to cores, or no two stages with much work
    that could run at once.
    """
    behind = dict[str, set[str]]()  # stage → all that it waits for
    for stage, waits in due.items():
        behind[stage] = set(waits).union(*(behind[other] for other in waits))
    long = [stage for stage in due if stage.partition("@")[0] in LONG]
    at_once = any(one not in behind[other] for place, other in enumerate(long) for one in long[:place])
    if jobs < 2 or not at_once or cores() < 2 or not hasattr(os, "sched_setaffinity") or GPU.exists():
        return [[]]
    allowed = sorted(os.sched_getaffinity(0))
    return [allowed[: len(allowed) // 2], allowed[len(allowed) // 2 :]]


def duration(seconds: float) -> str:
    """`251.3` → `4 min 11 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def reproduce(workspace: Path, project: Path, targets: Sequence[str] = (), jobs: int = 2) -> None:
    """Run what is due in a workspace, with this Python and the project's `.work`, and show how it goes; at most `jobs` stages at once.

    artifacts/params.json is up to date (`params.resolve`). Raises ShotlessError with the error of the stage that failed.
    """
    due, total = due_stages(workspace, targets)
    if not due:
        print(f"Nothing to run: all {total} stages are up to date.")
        return
    work = Folders.here(project).work.resolve()
    log = work / "logs" / time.strftime("%Y-%m-%dT%H-%M-%S.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    plan, console, started = Plan(due, total, lambda: prepared_work(workspace)), Console(stderr=True), time.monotonic()

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    say(f"{len(due)} of {total} stages to run; all that they print is in {shown(log)}")
    environment = os.environ | {"SHOTLESS_PYTHON": sys.executable, "SHOTLESS_WORK": str(work), "PYTHONUNBUFFERED": "1"}
    note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True))
    shares = shares_of_cores(due, jobs)
    every = [core for share in shares for core in share]
    with (
        log.open("w", encoding="utf-8") as file,
        Progress(BarColumn(24), note, console=console, disable=not console.is_terminal, transient=True) as bar,
        lanes_of(len(shares), workspace, environment) as (processes, lines),
    ):
        lanes, said = [Lane(process) for process in processes], time.monotonic()
        whole, *bars = [bar.add_task("", note="") for _ in (None, *lanes)]
        while plan.left:
            for lane, share in zip(lanes, shares, strict=True):
                if not lane.stage and (stage := plan.next()):
                    plan.start(stage)
                    lane.start(stage, every if stage in ALONE else share)
            number, line = next(lines)
            lane, ended = lanes[number], ""
            found = ENDED.match(line)
            if not found and line.strip():
                file.write(f"{lane.stage}: {line}" if len(lanes) > 1 else line)
                file.flush()
            if found and found[1] != "0":
                _fail(lane, log)
            elif found:
                ended, lane.stage = plan.end(lane.stage), ""
                if not any(map(PASSED.match, lane.printed)):
                    say(ended)
            elif reading := read_meter(line.rstrip()):
                lane.reading = reading
            elif line.strip():
                lane.printed.append(line.rstrip())
            bar.update(whole, completed=total - len(plan.left), total=total, note=plan.whole(len(lanes)))
            for own, one in zip(bars, lanes, strict=True):
                read = one.reading
                bar.update(
                    own, completed=read.done if read else 0, total=read.total if read else None, note=one.now, visible=bool(one.stage)
                )
            if ended:
                said = time.monotonic()
            elif bar.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(f"… {' | '.join(one.now for one in lanes if one.stage)}; {plan.whole(len(lanes))}")
    say(f"Done in {duration(time.monotonic() - started)}; all that the stages printed is in {shown(log)}")


def shown(path: Path) -> Path:
    """A path as it is shortest from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _fail(lane: Lane, log: Path) -> NoReturn:
    """Raise what the stage that failed said; if it named no error, all that it and DVC said."""
    first = next((number for number, line in enumerate(lane.printed) if ERROR.match(line)), None)
    said = lane.printed if first is None else [line for line in lane.printed[first:] if not line.startswith("ERROR: failed to reproduce")]
    error = "\n".join(said[-LINES_OF_ERROR:]).removeprefix("error: ")
    raise ShotlessError(
        f"{lane.stage}: {error}\nWhat is done stays done: the next run goes on from there. All that was printed is in {shown(log)}"
    )


@contextlib.contextmanager
def lanes_of(
    count: int, workspace: Path, environment: dict[str, str]
) -> Iterator[tuple[list[subprocess.Popen[str]], Iterator[tuple[int, str]]]]:
    """Processes of lanes in this block, and the lines that they and their children print, each with its lane's number; an empty line after
    a second without one.

    All of them end with the block, also if this process is told to end.
    """

    def end(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    pipes = TemporaryDirectory()
    processes = [
        subprocess.Popen(  # noqa: S603  this Python
            lane_command(Path(pipes.name) / str(number)), cwd=workspace, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="backslashreplace", start_new_session=True,
        )
        for number in range(count)
    ]  # fmt: skip
    queue: SimpleQueue[tuple[int, str]] = SimpleQueue()

    def fill(number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                queue.put((number, line))

    def lines() -> Iterator[tuple[int, str]]:
        while True:
            try:
                yield queue.get(timeout=1.0)
            except Empty:
                ended = [number for number, process in enumerate(processes) if process.poll() is not None]
                yield (ended[0], "lane: 1\n") if ended else (0, "")  # killed, perhaps for lack of memory

    readers = [Thread(target=fill, args=each, daemon=True) for each in enumerate(processes)]
    for reader in readers:
        reader.start()
    try:
        yield processes, lines()
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # what a killed lane has started is still there
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for reader in readers:
            reader.join(timeout=1.0)
        pipes.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)
