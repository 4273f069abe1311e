"""params.yaml as typed, frozen objects: `task`, `data` and `methods` have the blocks, `methods` the checks too, `reading` the file."""

from pipeline.params.data import ContextParams, DataParams, Download, HubDownload, LabelRule, PypiDownload, ServerParams, SourceParams
from pipeline.params.methods import (
    DEMONSTRATIONS_FILE,
    CacheParams,
    Calibration,
    LoraParams,
    MonitorParams,
    Params,
    RuntimeParams,
    StudentParams,
    TargetParams,
    TunedParams,
    TuningParams,
)
from pipeline.params.reading import (
    checked_params,
    load_params,
    parse_params,
    pick,
    read_yaml,
    resolve,
    resolved_params,
    write_yaml,
    yaml_text,
)
from pipeline.params.task import LEAST_TOKENS, CompletionParams, Format, FormParams, TaskParams
