"""`shotless verify`: are score caches and stores what was written, and what this run would capture? No model is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import CorruptError, MismatchError, ShotlessError

if TYPE_CHECKING:
    from pipeline.files import Folders
    from pipeline.params import Params


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
    checked = {cache: _verify(cache, params, folders, repair) for cache in caches or params.teachers}
    damaged = [cache for cache, (intact, _) in checked.items() if not intact]
    for folder, identity in stores(folders.work).items():
        store = None if identity is None else Store(folders.work, identity)
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


def _verify(cache: str, params: "Params", folders: "Folders", repair: bool) -> tuple[bool, bool]:
    """Check one cache and print what was found; returns whether it is intact, and whether it is of this run's params."""
    from pathlib import Path

    from pipeline.cache.folder import cache_faults, cache_manifest, check_belongs, described_task, repair_cache
    from pipeline.cache.store import Store
    from pipeline.models.folders import load_tokens
    from pipeline.params import pick
    from pipeline.schema import read_contexts, read_examples
    from pipeline.task import Task
    from pipeline.teachers.capture import content_free

    name = cache.rstrip("/").rpartition("/")[2]
    teacher, task = pick("teachers", params.teachers, name), Task(params.task)
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
        wanted = {"model": teacher.model, "cache": teacher.cache.model_dump(mode="json"), "task": described_task(task)}
        check_belongs(manifest, wanted, folder)
    except MismatchError as error:
        print(f"{name}: {error}")
        return not faults, False
    return not faults, True
