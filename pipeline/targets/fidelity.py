"""How much of the teacher's distribution a cache kept: figures that need nothing but the cache."""

import numpy as np

from pipeline.cache.folder import ScoreCache


def cache_fidelity(cache: ScoreCache) -> dict[str, float | int]:
    """Mass within the top k (mean, 1st percentile, smallest), mass on the verbalisers, and bytes a row, all from the rows themselves."""
    retained = 1.0 - cache.rows["tail_mass"].combine_chunks().flatten().to_numpy().astype(np.float64)
    labels = np.exp(np.array(cache.rows["label_logprobs"].to_pylist(), dtype=np.float64)).sum(-1)
    totals = cache.manifest["totals"]
    return {
        "rows": totals["rows"],
        "top_k": cache.manifest["fingerprint"]["cache"]["top_k"],
        "bytes_per_row": round(totals["bytes"] / max(totals["rows"], 1), 1),
        "retained_mass_mean": round(float(retained.mean()), 6),
        "retained_mass_p01": round(float(np.quantile(retained, 0.01)), 6),
        "retained_mass_min": round(float(retained.min()), 6),
        "verbaliser_mass_mean": round(float(labels.mean()), 6),
    }
