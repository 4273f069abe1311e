"""A running server, asked as a teacher behind it is: `python -m benchmarks.server_engine PROMPTS.json URL MODEL`, figures to stdout."""

import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from pipeline.files import Folders
from pipeline.params import ServerParams, TaskParams
from pipeline.schema import Prompt
from pipeline.task import Task, TextTokens
from pipeline.teachers.engines import LABELS_ONLY
from pipeline.teachers.scorer import Job
from pipeline.teachers.server_meeting import ask_server
from pipeline.teachers.server_rows import ServerBackend


def main() -> None:
    """Print seconds and label log-probabilities; the server's memory is not this process'."""
    prompts = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    whole = [Prompt((), request=prompts["context"] + query) for query in prompts["queries"]]
    task = Task(TaskParams(template="{text}", verbalisers={label.strip(): label for label in prompts["labels"]}))
    with tempfile.TemporaryDirectory() as scratch:
        folders = Folders.here(Path(scratch))
        ask_server("measured", ServerParams(url=sys.argv[2], model=sys.argv[3]), folders)
        backend = ServerBackend(folders.artifacts / "servers" / "measured", TextTokens(task), LABELS_ONLY)
        backend.open(whole[:1])
        start = time.perf_counter()
        rows = pa.concat_tables(table for table, _ in backend.score([Job(whole, ())]))
        seconds = time.perf_counter() - start
        backend.close()
    found = dict(zip(rows["prompt_sha"].to_pylist(), rows["label_logprobs"].to_pylist(), strict=True))
    in_order = [dict(zip(task.labels, found[prompt.prompt_sha], strict=True)) for prompt in whole]
    answers = [[row[label.strip()] for label in prompts["labels"]] for row in in_order]
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": None, "answers": answers}))


if __name__ == "__main__":
    main()
