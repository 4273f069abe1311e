"""Methods against each other, from their predictions on disk.

Every pair is compared on the same examples, twice: by a paired bootstrap of the difference, which is far sharper than asking whether two
intervals overlap, and by McNemar's exact test: could the examples that only one of the two gets right have fallen either way by the toss of
a coin? The p-values are of single pairs: of twenty pairs without a difference, one falls below 0.05.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl
import pyarrow as pa
from scipy.special import rel_entr
from scipy.stats import binomtest

from pipeline.errors import CorruptError
from pipeline.evaluation import free_text
from pipeline.evaluation.metrics import RIGHT, Json, frames, mean_interval, probabilities_of, rounded, scores_by_set
from pipeline.files import Folders, write_json
from pipeline.params import Params
from pipeline.schema import ANSWERS, PREDICTIONS, read_table

ALL_PAIRS_UP_TO = 12  # with more methods, whose pairs grow with their square, each is compared with the reference alone
SMALLEST_PROBABILITY = 1e-12  # replaces a probability of 0, for which KL would be infinite


def compare_methods(params: Params, folders: Folders) -> None:
    """Write metrics/compare.json: `reference`, `pairs` ("all" or "reference"), `to_reference` and `comparisons` of all methods.

    If answers are free text, `to_reference` is `free_text.agreement`, and a comparison is of one share: `what` ("well_formed", "accuracy").
    """
    names, reference, completion = [*params.students, *params.baselines], params.evaluation.reference, params.task.completion
    schema = PREDICTIONS if completion is None else ANSWERS
    tables = {name: read_table(folders.artifacts / "predictions" / f"{name}.parquet", schema) for name in names}
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()}
    bootstrap = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    every = len(names) <= ALL_PAIRS_UP_TO
    pairs = [(one, other) for one, other in combinations(names, 2) if every or reference in (one, other)]
    form = None if completion is None else completion.form
    answers = tables if completion is None else {name: free_text.parsed(table, form) for name, table in tables.items()}
    rows: list[Json] = []
    for share, right in ({None: RIGHT} if completion is None else free_text.shares_of(form)).items():
        scores = {name: scores_by_set(table, list(domains), right) for name, table in answers.items()}
        what = {} if share is None else {"what": share}
        rows += [what | row for pair in pairs for row in comparisons(*pair, scores, domains, **bootstrap)]
    close = {
        name: to_reference(table, tables[reference], params.task.labels, **bootstrap)
        if completion is None
        else free_text.agreement(table, tables[reference], form)
        for name, table in tables.items()
        if name != reference
    }
    document = {"reference": reference, "pairs": "all" if every else "reference", "to_reference": close, "comparisons": rows}
    write_json(document, folders.metrics / "compare.json")


def to_reference(table: pa.Table, reference: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, Json]:
    """How close a method's answers are to the reference's, for each evaluation set.

    `n` examples, `agreement` (share of equal answers), `agreement_ci95`, `kl_nats`, `kl_ci95`. KL is KL(reference ‖ method), what
    distillation minimises: a mean over examples and runs.
    """
    theirs, found = frames(reference, labels), {}
    for name, frame in frames(table, labels).items():
        other = frame.select("example_id").join(theirs[name], on="example_id", how="left", validate="m:1", maintain_order="left")
        target, ours = probabilities_of(other), probabilities_of(frame)
        kl = rel_entr(target, ours.clip(SMALLEST_PROBABILITY)).sum(axis=1)
        same = (frame["predicted"] == other["predicted"]).cast(pl.Float64)
        means = frame.select("example_id", agreement=same, kl_nats=pl.Series(kl)).group_by("example_id", maintain_order=True).mean()
        agreement, kl = means["agreement"].to_numpy(), means["kl_nats"].to_numpy()
        found[name] = {
            "n": means.height,
            "agreement": float(agreement.mean()),
            "agreement_ci95": mean_interval([agreement], resamples=resamples, seed=seed),
            "kl_nats": float(kl.mean()),
            "kl_ci95": mean_interval([kl], resamples=resamples, seed=seed),
        }
    return rounded(found)


def comparisons(
    method: str, other: str, scores: Mapping[str, Mapping[str, pl.DataFrame]], domains: Mapping[str, str], *, resamples: int, seed: int
) -> list[Json]:
    """The differences of two methods, `method` minus `other`, for each domain (`set` None) and each evaluation set.

    `scores[method][set]` is from `metrics.example_scores`. A row has `n` examples; `difference` in accuracy (over a domain, the mean over
    its sets), `ci95`, and `clear` if the interval excludes zero; `only_method_right`, `only_other_right` (examples of all its sets) and
    `mcnemar_p`, which are None if a method answers an example several times. Raises CorruptError if the examples differ.
    """
    pairs = {}
    for name, mine in scores[method].items():
        theirs = scores[other][name]
        pairs[name] = mine.join(theirs, on="example_id", suffix="_other", maintain_order="left")
        if not pairs[name].height == mine.height == theirs.height:
            raise CorruptError(f"predictions for set {name!r}: {method} and {other} answered different examples. Run `dvc repro`.")
    members = {domain: [name for name, own in domains.items() if own == domain] for domain in ("in", "out")}
    wheres = [(domain, name, [name] if name else own) for domain, own in members.items() if own for name in (None, *own)]
    rows = []
    for domain, where, sets in wheres:
        samples = [(pairs[name]["score"] - pairs[name]["score_other"]).to_numpy() for name in sets]
        low, high = mean_interval(samples, resamples=resamples, seed=seed, lowest=-1.0)
        row = {"method": method, "other": other, "domain": domain, "set": where, "n": sum(map(len, samples))}
        row |= {"difference": float(np.mean([sample.mean() for sample in samples])), "ci95": [low, high], "clear": low > 0 or high < 0}
        both = pl.concat([pairs[name] for name in sets]).select("score", "score_other").to_numpy()
        counts = int((both[:, 0] > both[:, 1]).sum()), int((both[:, 0] < both[:, 1]).sum())
        p_value = float(f"{binomtest(counts[0], max(1, sum(counts))).pvalue:.3g}")
        tested = (*counts, p_value) if np.isin(both, (0, 1)).all() else (None,) * 3
        rows.append(rounded(row) | dict(zip(("only_method_right", "only_other_right", "mcnemar_p"), tested, strict=True)))
    return rows
