"""The DVC stages: each file is one thin command that reads params and calls one function of `pipeline`."""

import os

# Read at import by libraries that the stages bring in: their bars would break up the stages' own lines.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
