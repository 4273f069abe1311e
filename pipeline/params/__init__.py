"""params.yaml as typed, frozen objects: `task`, `data` and `methods` have the blocks, `root` the checks, `reading` the file."""

from pipeline.params.data import ContextParams, DataParams, Download, HubDownload, LabelRule, ModelParams, PypiDownload, SourceParams
from pipeline.params.methods import (
    DEMONSTRATIONS_FILE,
    AuxiliaryParams,
    BaselineParams,
    CacheParams,
    Calibration,
    EvaluationParams,
    LoraParams,
    MonitorParams,
    RuntimeParams,
    StudentParams,
    TargetParams,
    TeacherParams,
    TunedParams,
    TuningParams,
)
from pipeline.params.reading import checked_params, load_params, parse_params, pick, read_yaml, resolve, resolved_params, write_yaml
from pipeline.params.root import Params
from pipeline.params.task import CompletionParams, FormParams, TaskParams

__all__ = [
    "DEMONSTRATIONS_FILE",
    "AuxiliaryParams",
    "BaselineParams",
    "CacheParams",
    "Calibration",
    "CompletionParams",
    "ContextParams",
    "DataParams",
    "Download",
    "EvaluationParams",
    "FormParams",
    "HubDownload",
    "LabelRule",
    "LoraParams",
    "ModelParams",
    "MonitorParams",
    "Params",
    "PypiDownload",
    "RuntimeParams",
    "SourceParams",
    "StudentParams",
    "TargetParams",
    "TaskParams",
    "TeacherParams",
    "TunedParams",
    "TuningParams",
    "checked_params",
    "load_params",
    "parse_params",
    "pick",
    "read_yaml",
    "resolve",
    "resolved_params",
    "write_yaml",
]
