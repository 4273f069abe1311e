"""`shotless verify`: are score caches and stores what was written, and what this run would capture? No model is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import CorruptError, MismatchError

if TYPE_CHECKING:
    from pipeline.files import Folders
    from pipeline.params import Params, TeacherParams
    from pipeline.task import Task


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

    params, folders = load_params(), Folders.here()
    damaged, others = [], []
    for cache in caches or params.teachers:
        intact, belongs = _verify(cache, params, folders, repair)
        damaged += [] if intact else [cache]
        others += [] if belongs else [cache]
    for folder, _, identity in stores(folders.work):
        faults = [f"{folder}/identity.json: damaged. The teacher's next run writes it again."] if identity is None else []
        faults += Store(folders.work, identity).faults() if identity is not None else []
        print("".join(f"store: {fault}\n" for fault in faults), end="")
        if identity is not None and faults and repair:
            with Store(folders.work, identity).lock():  # sets damaged files aside
                pass
        elif faults:
            damaged.append("the store")
    if damaged:
        step = "`shotless verify --repair` writes shards again from the store and sets damaged files of the store aside."
        raise CorruptError(f"damaged: {', '.join(dict.fromkeys(damaged))}. {step}")
    if others:
        raise MismatchError(f"not of this run's params: {', '.join(others)}. `dvc repro` captures them again.")


def _verify(cache: str, params: "Params", folders: "Folders", repair: bool) -> tuple[bool, bool]:
    """Check one cache and print what was found; returns whether it is intact, and whether it is of this run's params."""
    from pathlib import Path

    from pipeline.cache.folder import check_belongs, described_task
    from pipeline.cache.store import Store
    from pipeline.cache.verify import check_cache, repair_cache
    from pipeline.params import pick
    from pipeline.task import Task

    name = cache.rstrip("/").rpartition("/")[2]
    teacher = pick("teachers", params.teachers, name)
    task = Task(params.task).of_input_tokens() if teacher.scores == "input_tokens" else Task(params.task)
    folder = cache if "://" in cache else folders.artifacts / "teachers" / name
    found = check_cache(folder)
    print("".join(f"{name}: {fault}\n" for fault in found.faults), end="")
    if repair and found.damaged and isinstance(folder, Path) and found.manifest is not None:
        repair_cache(folder, found, _keys(teacher, task, folders), Store(folders.work, found.manifest["identity"]))
        print(f"{name}: written again, with the bytes that the manifest says: {', '.join(found.damaged)}")
        found = check_cache(folder)
    belongs = True
    if found.manifest is not None:
        try:
            check_belongs(
                found.manifest,
                {"model": teacher.model, "cache": teacher.cache.model_dump(mode="json"), "task": described_task(task)},
                folder,
            )
        except MismatchError as error:
            print(f"{name}: {error}")
            belongs = False
        if not found.faults:
            size = sum(file["bytes"] for file in found.manifest["files"].values())
            print(f"{name}: {sum(found.manifest['shards'].values()):,} rows, {size:,} bytes, all intact")
    return not found.faults, belongs


def _keys(teacher: "TeacherParams", task: "Task", folders: "Folders") -> list[tuple[str, str, str]]:
    """context_id, example_id and prompt_sha of what a capture asks, in its order. The tokenizer is loaded, the model is not."""
    from pipeline.models.folders import load_tokenizer
    from pipeline.schema import read_contexts, read_examples
    from pipeline.task import TaskTokens
    from pipeline.teachers.capture import content_free

    data = folders.artifacts / "data"
    examples = [*content_free(task), *read_examples(data / "transfer.parquet", task.fields)]
    tokens = TaskTokens(task, load_tokenizer(folders.artifacts / teacher.model))
    return [
        (context.context_id, example.example_id, prompt.prompt_sha)
        for context in read_contexts(data / "contexts" / f"{teacher.contexts}.parquet")
        for example, prompt in zip(examples, tokens.prompts(context, examples), strict=True)
    ]
