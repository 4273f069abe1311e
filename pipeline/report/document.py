"""`report/metrics.json`: every number of quality on the page, computed from the predictions on disk.

Besides the metrics of each method on each evaluation set it holds means over domains and paired comparisons. Comparisons grow with the
number of methods, not with its square: each student against the reference, and the best student of a domain against everyone.
"""

from typing import Any

from pipeline import metrics
from pipeline.report.collect import Inputs, Json

COST_KEYS = (
    "prompt_tokens", "latency_ms", "latency_p95_ms", "throughput", "peak_rss_bytes", "parameters", "weights_bytes", "disk_bytes",
    "forward_passes",
)  # fmt: skip


def metrics_document(inputs: Inputs) -> Json:
    """The report's numbers as a JSON-able dict in a fixed order.

    `reference`; `sets` {name: domain, n}; `methods` {name: kind, sets {name: metrics with `agreement`}, means {"in"|"out": accuracy, ci95,
    agreement, ece}, cost or None}; `comparisons` [{method, other, domain, difference, ci95, clear}]. Raises what
    `metrics.evaluate_predictions` and `metrics.agreement` raise.
    """
    params = inputs.params
    reference = params.evaluation.reference
    methods = {name: _method(inputs, name) for name in inputs.predictions}
    sizes = methods[reference]["sets"]
    return {
        "reference": reference,
        "sets": {name: {"domain": entry.domain, "n": sizes[name]["n"]} for name, entry in params.data.evaluation.items()},
        "methods": methods,
        "comparisons": _comparisons(inputs, methods),
    }


def sets_of(document: Json, domain: str) -> list[str]:
    """The evaluation sets of a domain ("in" or "out"), in order."""
    return [name for name, entry in document["sets"].items() if entry["domain"] == domain]


def best(document: Json, domain: str, kind: str | None = None) -> list[str]:
    """The methods with the highest mean accuracy over a domain, of one kind or of all; several where they tie, none without methods."""
    means = {
        name: method["means"][domain]["accuracy"]
        for name, method in document["methods"].items()
        if domain in method["means"] and kind in {None, method["kind"]}
    }
    return [name for name, value in means.items() if value == max(means.values())]


def ranked_students(document: Json) -> list[str]:
    """Students by mean accuracy out of domain (in domain where there is nothing else), the best first."""
    domain = "out" if sets_of(document, "out") else "in"
    students = {name: method["means"][domain]["accuracy"] for name, method in document["methods"].items() if method["kind"] == "student"}
    return sorted(students, key=lambda name: -students[name])


def comparison_of(document: Json, method: str, other: str, domain: str) -> Json | None:
    """The comparison of two methods over a domain, where it was made."""
    wanted = (method, other, domain)
    return next((c for c in document["comparisons"] if (c["method"], c["other"], c["domain"]) == wanted), None)


def _method(inputs: Inputs, name: str) -> Json:
    params, table = inputs.params, inputs.predictions[name]
    settings = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    found = metrics.evaluate_predictions(table, list(params.task.verbalisers), **settings)
    agreement = metrics.agreement(table, inputs.predictions[params.evaluation.reference])
    sets = {set_name: found[set_name] | {"agreement": agreement[set_name]} for set_name in params.data.evaluation}
    means: Json = {}
    for domain in ("in", "out"):
        members = [set_name for set_name, entry in params.data.evaluation.items() if entry.domain == domain]
        if members:
            average = {key: sum(sets[member][key] for member in members) / len(members) for key in ("agreement", "ece")}
            means[domain] = metrics.rounded(metrics.mean_accuracy(table, members, **settings) | average)
    cost = inputs.cost.get(name)
    kept = None if cost is None else {key: cost[key] for key in COST_KEYS if key in cost}
    return {"kind": inputs.kind(name), "sets": sets, "means": means, "cost": kept}


def _comparisons(inputs: Inputs, methods: Json) -> list[Json]:
    params = inputs.params
    settings = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    found: list[Json] = []
    for domain in ("in", "out"):
        members = [name for name, entry in params.data.evaluation.items() if entry.domain == domain]
        for method, other in _pairs(params.evaluation.reference, methods, domain) if members else []:
            difference = metrics.compare(inputs.predictions[method], inputs.predictions[other], members, **settings)
            found.append({"method": method, "other": other, "domain": domain, **difference})
    return found


def _pairs(reference: str, methods: Json, domain: str) -> list[tuple[str, str]]:
    students = [name for name, method in methods.items() if method["kind"] == "student"]
    pairs: dict[tuple[str, str], Any] = {(name, reference): None for name in students}
    if students:
        top = max(students, key=lambda name: methods[name]["means"][domain]["accuracy"])
        pairs |= {(top, other): None for other in methods if other != top}
    return list(pairs)
