"""`shotless init`, `check`, `run`, `doctor`, `clean` and `verify`: what concerns the project as a whole."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import CorruptError, MismatchError, ShotlessError, UsageError

HEADER = "# Written by `shotless init`. `shotless check` names what is wrong; docs/params.md lists every key.\n\n"


def init(
    labelled: Annotated[Path | None, typer.Option(help="A file with texts and labels: demonstrations are drawn from it.")] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="A file with texts: students learn from the teachers' answers to them.")] = None,
    test: Annotated[Path | None, typer.Option(help="A file with texts and labels that nothing learns from.")] = None,
    template: Annotated[str | None, typer.Option(help=r"The prompt; {text} is the input, \n a new line.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, for a column of another name.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The column with the labels, by default `label`.")] = None,
    verbaliser: Annotated[list[str] | None, typer.Option(help="LABEL=WORD: what the model answers for a label.")] = None,
    per_label: Annotated[
        int | None, typer.Option(min=1, help="Labelled rows of each label; default: as many as there are, 32 at most.")
    ] = None,
    all_teachers: Annotated[
        bool, typer.Option("--all-teachers", help="Of many labels too; else more than 20 have teachers and students that are encoders.")
    ] = False,
    delimiter: Annotated[str | None, typer.Option(help="Between the columns of csv files; by default it is found.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text files; by default it is found.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file; the old one is kept as params.yaml.old.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the same, and write nothing.")] = False,
) -> None:
    """Write params.yaml for your own files, check it on them, and say what a run will cost. On a terminal it asks for what is missing."""
    asks = sys.stdin.isatty()
    if output.exists() and not (force or dry_run or asks):
        raise UsageError(f"{output} exists; --force replaces it and keeps the old one as {output}.old, --dry-run writes nothing.")
    files = {"--labelled": labelled, "--unlabelled": unlabelled, "--test": test}
    if not asks and (missing := [option for option, path in files.items() if path is None]):
        raise UsageError(f"{', '.join(missing)}: missing, and there is no terminal to ask on.")

    from pipeline.files import write_text
    from pipeline.params import read_yaml, yaml_text
    from pipeline.setup.new_task import Answers, ask, new_task

    answers = Answers(
        labelled=labelled or Path(typer.prompt("File with labelled texts")),
        unlabelled=unlabelled or Path(typer.prompt("File with unlabelled texts")),
        test=test or Path(typer.prompt("File with labelled texts for the test")),
        template=(template or "Text: {text}\nLabel:").replace("\\n", "\n"),
        verbalisers=_pairs(verbaliser or [], "--verbaliser"),
        fields=_pairs(field or [], "--field"),
        label_column=label_column or "label",
        per_label=per_label,
        all_teachers=all_teachers,
        delimiter=delimiter,
        encoding=encoding,
    )
    if asks:
        answers = ask(answers, template=template is None, label_column=label_column is None)
    raw, notes = new_task(read_yaml(Path("params.yaml")), answers)
    print("\n".join(notes))
    if dry_run:
        print("Nothing was written. Next: the same command without --dry-run")
        return
    if asks and not force:
        typer.confirm(f"Write {output}" + (f" (the old one is kept as {output}.old)" if output.exists() else ""), default=True, abort=True)
    text = HEADER + yaml_text(raw)
    if not output.exists() or output.read_text(encoding="utf-8") != text:  # asking twice keeps the first .old
        if output.exists():
            output.replace(output.with_name(f"{output.name}.old"))
        write_text(text, output)
    move = "" if output == Path("params.yaml") else f"mv {output} params.yaml && "
    print(f"{output} is written. Next: {move}shotless run")


def check() -> None:
    """Check params.yaml before anything runs: every key, value and name, the local files, the versions of the libraries."""
    from pipeline.params import checked_params
    from pipeline.setup.boundary import advice_on

    params = checked_params()
    print(f"params.yaml is in order: {params.summary}.")
    if advice := advice_on(params):
        print(f"note: {advice}")


def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages such as `prepare` or `teacher@few_shot`; default: all.")] = None,
    preset: Annotated[str | None, typer.Option(help="Lay presets/NAME.yaml over params.yaml, and run in runs/NAME.")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=2, help="Stages that run at once: two take the memory of two.")] = 2,
) -> None:
    """Check params.yaml, run what has changed, as `dvc repro` does, and print what was gained."""
    from pipeline.commands.reproduce import reproduce
    from pipeline.params import resolve
    from pipeline.params.presets import make_workspace

    workspace = Path() if preset is None else make_workspace(preset, Path())
    resolve(workspace)  # as the first stage does: which other stages are due follows from it
    reproduce(workspace, Path(), stages or [], jobs)
    if not stages:
        from pipeline.report.tables import print_summary

        print_summary(workspace)
        print(_next_steps(workspace))


def _next_steps(workspace: Path) -> str:
    """Three things to try after a run."""
    from pipeline.files import Folders, read_json

    folder = Folders.here(workspace).artifacts
    best = read_json(folder / "best.json")["student"]
    named = "" if workspace == Path() else f"--student {folder / 'students' / str(best)} "
    steps = [
        *([f"use it:          shotless predict {named}--input new.jsonl --output answers.jsonl"] if best else []),
        "another student: one more entry under `students` in params.yaml, and `shotless run`: only what is new runs",
        "your own data:   shotless init --labelled labelled.csv --unlabelled pile.jsonl --test test.csv --force",
    ]
    return "Next:\n" + "\n".join(f"  {step}" for step in steps)


def doctor() -> None:
    """Say what this machine has, which number format and engine a run will use, and what is missing. Ends with 1 if something is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipeline.setup.doctor import findings

    found = list(findings())
    table = Table(show_header=False, box=None, pad_edge=False)
    styles = {"ok": "", "note": "yellow", "missing": "bold red"}
    for name, value, state in found:
        table.add_row(Text(state, style=styles[state]), Text(name), Text(value))
    Console().print(table)
    if missing := [name for name, _, state in found if state == "missing"]:
        print(f"missing: {', '.join(missing)}")
        raise typer.Exit(1)
    print("Nothing is missing.")


def clean(
    everything: Annotated[bool, typer.Option("--all", help="Also the scores of this project's caches and rounds.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would go.")] = False,
) -> None:
    """Free what `.work` holds beyond this project's caches and rounds: scores of other models, unfinished trainings. Artifacts stay."""
    from pipeline.cache.store import stores
    from pipeline.files import Folders, read_json, sha256_json

    folders = Folders.here()
    made = ("teachers/*/manifest.json", "rounds/*/calibration.json")
    files = [path for name in made for path in (*folders.artifacts.glob(name), *Path("runs").glob(f"**/artifacts/{name}"))]
    used = {sha256_json(read_json(path)["identity"])[:32] for path in files}
    entries = {path: path.name for path in sorted(folders.work.glob("*")) if path.name not in {"scores", "servers"}}
    for folder, identity in stores(folders.work).items():
        if identity is None:
            entries[folder] = "scores, damaged"
        elif "server" in identity:
            entries[folder] = f"scores of {identity['server']['model']} behind a server"
        else:
            entries[folder] = f"scores of weights {identity['weights'][:12]}, {identity['dtype']}"
    going = {path: what for path, what in entries.items() if everything or path.name not in used}
    sizes = {path: sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) for path in going}
    for path, what in going.items():
        print(f"{sizes[path] / 1e6:>10,.1f} MB  {path}  {what}")
    kept = len(entries) - len(going)
    stay = f"; scores of {kept} caches and rounds stay (--all takes them too)" if kept else ""
    print(f"{sum(sizes.values()) / 1e6:>10,.1f} MB in all{stay}")
    if not yes:
        print("Nothing was deleted; --yes deletes it.")
        return
    for path in going:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    print("Deleted.")


def verify(
    caches: Annotated[
        list[str] | None, typer.Argument(help="Teachers, or URLs of their caches. Default: every teacher.", show_default=False)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Write damaged shards again from the store.")] = False,
) -> None:
    """Check score caches and the store. Exit code 1: something is damaged; 2: a cache is not of this run's params."""
    from pipeline.cache.store import Store, stores
    from pipeline.files import Folders
    from pipeline.params import load_params

    checked = {cache: _verify(cache, repair) for cache in caches or load_params().teachers}
    damaged = [cache for cache, (intact, _) in checked.items() if not intact]
    work = Folders.here().work
    for folder, identity in stores(work).items():
        store = None if identity is None else Store(work, identity)
        faults = {folder: f"{folder}/identity.json: damaged. The teacher's next run writes it again."} if store is None else store.faults()
        print("".join(f"store: {fault}\n" for fault in faults.values()), end="")
        if store is not None and faults and repair:
            with store.lock():  # sets damaged files aside
                pass
        elif faults:
            damaged.append(f"the store {folder}")
    if damaged:
        step = "`shotless verify --repair` writes shards again from the store and sets damaged files of the store aside."
        raise CorruptError(f"damaged: {', '.join(damaged)}. {step}")
    if others := [cache for cache, (_, belongs) in checked.items() if not belongs]:
        raise MismatchError(f"not of this run's params: {', '.join(others)}. `dvc repro` captures them again.")


def _verify(cache: str, repair: bool) -> tuple[bool, bool]:
    """Check one cache and print what was found; returns whether it is intact, and whether it is of this run's params."""
    from pipeline.cache.folder import cache_faults, cache_manifest, check_belongs, described_task, repair_cache
    from pipeline.cache.store import Store
    from pipeline.files import Folders
    from pipeline.models.trained import load_tokens
    from pipeline.params import load_params, pick
    from pipeline.schema import read_contexts, read_examples
    from pipeline.task import Task
    from pipeline.teachers.capture import content_free

    name = cache.rstrip("/").rpartition("/")[2]
    params, folders = load_params(), Folders.here()
    teacher = pick("teachers", params.teachers, name)
    task = Task(params.task, params.contexts[teacher.contexts].format)
    if teacher.scores == "input_tokens":
        task = task.of_input_tokens()
    folder = cache if "://" in cache else folders.artifacts / "teachers" / name
    try:
        manifest = cache_manifest(folder)
    except ShotlessError as error:
        print(f"{name}: {error}")
        return False, True
    faults = cache_faults(folder, manifest)
    print("".join(f"{name}: {fault}\n" for fault in faults.values()), end="")
    damaged = [shard for shard in manifest["shards"] if shard in faults]
    if repair and damaged and isinstance(folder, Path):
        data, tokens = folders.artifacts / "data", load_tokens(task, folders.artifacts / teacher.model)
        contexts = read_contexts(data / "contexts" / f"{teacher.contexts}.parquet")
        examples = [*content_free(task), *read_examples(data / "transfer.parquet", task.fields)]  # as a capture asks them
        keys = [
            (context.context_id, example.example_id, prompt.prompt_sha)
            for context in contexts
            for example, prompt in zip(examples, tokens.prompts(context, examples), strict=True)
        ]
        repair_cache(folder, manifest, damaged, keys, Store(folders.work, manifest["identity"]))
        print(f"{name}: written again, with the bytes that the manifest says: {', '.join(damaged)}")
        faults = cache_faults(folder, manifest)
    if not faults:
        size = sum(file["bytes"] for file in manifest["files"].values())
        print(f"{name}: {sum(manifest['shards'].values()):,} rows, {size:,} bytes, all intact")
    try:
        wanted = {"model": teacher.model, "cache": params.kept_of(name).model_dump(mode="json"), "task": described_task(task)}
        check_belongs({"format": "plain", **manifest}, {**wanted, "format": task.format}, folder)
    except MismatchError as error:
        print(f"{name}: {error}")
        return not faults, False
    return not faults, True


def _pairs(entries: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for entry in entries:
        key, _, value = entry.partition("=")
        if not key or not value:
            raise UsageError(f"{option} {entry}: write it as NAME=VALUE.")
        pairs[key] = value
    return pairs
