"""`shotless verify`: caches and the row store against their checksums, their manifests, and this run's teacher and data."""

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import CorruptError, MismatchError, NotJsonError, ShotlessError, UsageError
from pipeline.params import Params, TeacherParams, load_params, pick

if TYPE_CHECKING:
    from pipeline.cache.check import Findings
    from pipeline.cache.fingerprint import Fingerprint
    from pipeline.cache.keys import Key, Request
    from pipeline.places import Place

ARTIFACTS = Path("artifacts")


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Teachers, or URLs of caches; default: all of params.yaml.", show_default=False)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Have damaged rows again: from the store, or scored anew.")] = False,
    rows: Annotated[Path | None, typer.Option(help="Write the keys of all damaged rows to this CSV file.")] = None,
) -> None:
    """Check score caches: every byte, row and fingerprint. Ends with 1 where something is damaged, 2 where a cache is another teacher's."""
    from pipeline.commands.students import quiet_libraries

    quiet_libraries()
    params = load_params()
    cases = [_case(name, params) for name in names or params.teachers]
    for case in cases:
        case.check()
    store_faults = _check_stores(cases)
    for case in cases:
        case.tell()
    print("\n".join(store_faults) or "row store: every part is in order")
    if rows is not None:
        _write_rows(cases, rows)
    if not store_faults and not any(case.findings.faults for case in cases):
        return
    if not repair:
        mismatch = not store_faults and all(fault.error is MismatchError for case in cases for fault in case.findings.faults)
        raise (MismatchError if mismatch else CorruptError)(_next_step(cases))
    for case in cases:
        case.repair()
    _check_stores(cases, set_aside=True)
    for case in cases:
        case.check()
        case.tell()
        if case.findings.faults:
            raise CorruptError(f"{case.folder}: still not in order; delete it and run `dvc repro teacher@{case.name}`.")


def _case(name: str, params: Params) -> "_Case":
    """A teacher's cache under artifacts, or one that lies at a URL in a folder of the teacher's name."""
    from pipeline.places import place

    where = place(name) if "://" in name else None
    teacher = name if where is None else where.name
    return _Case(teacher, pick("teachers", params.teachers, teacher), params, where)


@dataclass
class _Case:
    """One teacher's cache."""

    name: str
    teacher: TeacherParams
    params: Params
    place: "Place | None" = None
    """Where its cache lies, if not under artifacts."""
    notes: list[str] = field(default_factory=list)
    findings: "Findings" = field(init=False)
    request: "Request | None" = None
    fingerprint: "Fingerprint | None" = None
    in_store: int = 0
    """Damaged rows that the store holds."""

    @property
    def folder(self) -> "Place":
        return self.place or ARTIFACTS / "scores" / self.name

    @property
    def model(self) -> Path:
        return ARTIFACTS / self.teacher.model

    @property
    def inputs(self) -> tuple[Path, Path]:
        return ARTIFACTS / "data" / "contexts" / f"{self.teacher.contexts}.parquet", ARTIFACTS / "data" / "transfer.parquet"

    def check(self) -> None:
        """Find what is wrong; what is not here to be compared with is noted."""
        from pipeline.cache.check import check_cache
        from pipeline.cache.fingerprint import fingerprint_of
        from pipeline.cache.keys import Request
        from pipeline.models.loading import check_folder, load_tokenizer
        from pipeline.task import Task, TaskTokens
        from pipeline.teachers.capture import asked
        from pipeline.teachers.transfer import Joined

        self.notes, task = [], Task(self.params.task)
        try:
            contexts, free, transfer = asked(*self.inputs, task)
            self.request = Request([row["context_id"] for row in contexts], (query.example_id for query in Joined(free, transfer)))
        except UsageError as error:
            self.notes.append(f"rows are not compared with this run's data: {error}")
        try:
            check_folder(self.model)
            tokens = TaskTokens(task, load_tokenizer(self.model))
            self.fingerprint = fingerprint_of(self.model, tokens, self.teacher.cache, self.dtype)
        except UsageError as error:
            self.notes.append(f"the fingerprint is not compared with this run's teacher: {error}")
        self.findings = check_cache(self.folder, self.request, self.fingerprint)

    @property
    def dtype(self) -> str:
        """The number format: of the cache where params leave it to the machine, since the cache may come from another one."""
        from pipeline.cache.folder import read_manifest
        from pipeline.models.machine import default_device, fast_dtype

        if self.teacher.dtype != "auto":
            return self.teacher.dtype
        try:
            return str(read_manifest(self.folder)["fingerprint"]["dtype"])
        except ShotlessError:
            return fast_dtype(default_device())

    def tell(self) -> None:
        """Print what was found."""
        faults, totals = self.findings.faults, (self.findings.manifest or {}).get("totals")
        if not faults and totals:
            shards = len(self.findings.intact)
            print(f"{self.name}: {totals['rows']:,} rows in {shards} shard{'s' * (shards != 1)}, {totals['bytes']:,} bytes: in order")
        for fault in faults:
            print(f"{self.name}: {fault.what}")
            print("".join(f"  {line}\n" for line in _rows_in_words(fault.keys)), end="")
        if keys := self.findings.keys:
            print(f"{self.name}: {len(keys):,} rows to be had again: {self.in_store:,} are in the store, {len(keys) - self.in_store:,} not")
        for note in self.notes:
            print(f"{self.name}: {note}")

    def repair(self) -> None:
        """Give the store what intact shards hold, then capture: that scores the rows that neither has, and writes all shards again."""
        from pipeline.teachers.scorer import Scorer
        from pipeline.files import write_sealed_json
        from pipeline.task import Task
        from pipeline.teachers.capture import capture
        from pipeline.files import work_folder

        if not isinstance(self.folder, Path):
            raise UsageError(f"{self.folder}: --repair writes under {ARTIFACTS}; repair the cache there, then copy it to the URL.")
        if self.request is None or self.fingerprint is None:
            raise UsageError(f"{self.folder}: cannot be repaired here: {'; '.join(self.notes)}")
        task, manifest, work, threads = Task(self.params.task), self.findings.manifest, work_folder(), self.params.runtime.threads
        scorer = Scorer(self.model, task, self.teacher.cache, work, threads, self.fingerprint.dtype)
        with scorer.store.lock():
            for shard in manifest["shards"] if manifest else ():
                if self.folder / shard["file"] in self.findings.intact:
                    scorer.store.adopt(self.folder / shard["file"], shard["sha256"])
            engine = scorer.store.folder / "engine.json"
            if manifest and not engine.is_file():
                write_sealed_json(manifest["engine"], engine)
            missing = int(scorer.store.missing(self.request).sum())
        if missing and any(fault.error is MismatchError for fault in self.findings.faults):
            raise MismatchError(
                f"{self.folder}: {missing:,} rows would have to be scored for what is not damage but another teacher or other data; "
                f"if that is meant, run `dvc repro teacher@{self.name}`."
            )
        if not self.findings.faults:
            return
        before = manifest["shards"] if manifest else []
        capture(self.name, self.model, *self.inputs, self.folder, task, self.teacher.cache, self.fingerprint.dtype, work, threads)
        self._compare(before, missing)

    def _compare(self, before: list[dict[str, Any]], scored: int) -> None:
        from pipeline.cache.folder import read_manifest

        after = {shard["file"]: shard["sha256"] for shard in read_manifest(self.folder)["shards"]}
        other = [shard["file"] for shard in before if after.get(shard["file"]) != shard["sha256"]]
        same = "the bytes are those that the manifest named" if before else "there was no manifest to compare with"
        if other:
            same = (
                f"{', '.join(other)}: rows agree with the lost ones within rounding only, for they were scored in other batches, since the "
                "store's plans are gone; what was made from the old bytes counts as changed for DVC"
            )
        print(f"{self.name}: repaired; {scored:,} rows scored again; {same}")


def _check_stores(cases: list[_Case], set_aside: bool = False) -> list[str]:
    """What is wrong in the row store, all fingerprints; counts the damaged rows of each cache that it holds."""
    from pipeline.cache.fingerprint import Fingerprint
    from pipeline.cache.keys import KeyIndex
    from pipeline.cache.store import Store
    from pipeline.files import read_json
    from pipeline.files import work_folder

    faults = []
    for folder in sorted(work_folder().glob("scores/*")):
        try:
            store = Store.at(folder)
        except CorruptError as error:
            faults += [] if _of_another_version(folder) else [str(error)]
            continue
        index = KeyIndex()
        for number, (_, keys, error) in enumerate(store.scan()):
            if error is None:
                index.add(number, keys)
            else:
                lines = "".join(f"\n  {line}" for line in _rows_in_words(tuple(keys), "when next asked for"))
                faults.append(f"{error}{lines or ': its rows are scored again when next asked for'}")
        faults += store.damaged_plans()
        notes = store.damaged_notes()
        faults += [str(error) for _, error in notes]
        for case in cases:
            if case.fingerprint == Fingerprint.model_validate(read_json(folder / "fingerprint.json")):
                case.in_store = int((index.find(case.findings.keys)[:, 0] >= 0).sum())
        if set_aside:
            with store.lock():
                for note, _ in notes:
                    note.unlink()
    return faults


def _of_another_version(folder: Path) -> bool:
    """Whether a store was left by another version of this project, which no present fingerprint leads to."""
    from pipeline.files import read_json
    from pipeline.files import sha256_json

    try:
        return sha256_json(read_json(folder / "fingerprint.json"))[:32] == folder.name  # whole, and this version cannot read it
    except (OSError, NotJsonError):
        return False


def _rows_in_words(keys: "tuple[Key, ...]", when: str = "") -> list[str]:
    """A line for each context: how many rows, and the first examples."""
    lines = []
    for context, count in Counter(context for context, _ in keys).items():
        first = [example[:12] for other, example in keys if other == context][:3]
        more = f" and {count - len(first):,} more" if count > len(first) else ""
        lines.append(
            f"{count:,} rows to score again{' ' + when if when else ''} in context {context[:12]}: examples {', '.join(first)}{more}"
        )
    return lines


def _write_rows(cases: list[_Case], file: Path) -> None:
    from pipeline.files import replacing

    with replacing(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["teacher", "context_id", "example_id"])
        writer.writerows((case.name, *key) for case in cases for key in case.findings.keys)
    print(f"keys written to {file}")


def _next_step(cases: list[_Case]) -> str:
    wrong = [case.name for case in cases if case.findings.faults]
    if not wrong:
        return "the row store is damaged; `shotless verify --repair` sets it right."
    if all(fault.error is MismatchError for case in cases for fault in case.findings.faults):
        return f"not this run's: {', '.join(wrong)}; `dvc repro` captures what is lacking."
    return f"not in order: {', '.join(wrong)}; `shotless verify {' '.join(wrong)} --repair` sets it right, `dvc checkout` may too."
