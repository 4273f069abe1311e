"""params.yaml as typed, frozen objects.

The file is read with ruamel (YAML 1.2, as DVC reads it: `1e-4` is a float) and checked as a whole: an unknown key, a wrong type, a name
that points nowhere are named with their path and the choices there are. Every stage reads the whole file and is handed the part it needs.
"""

from pipeline.params.base import DEMONSTRATIONS_FILE
from pipeline.params.data import ContextParams, DataParams, HubOrigin, LabelRule, LocalOrigin, Origin, PypiOrigin, SourceParams
from pipeline.params.evaluation import BaselineParams, EvaluationParams, MonitorParams, RuntimeParams
from pipeline.params.loading import load_params, parse_params, pick
from pipeline.params.root import Params
from pipeline.params.task import CompletionParams, FormParams, TaskParams
from pipeline.params.teaching import CacheParams, Calibration, TargetParams, TeacherParams
from pipeline.params.training import AlsoParams, LoraParams, StudentParams, TunedTeacherParams, TuningParams

__all__ = [
    "DEMONSTRATIONS_FILE",
    "AlsoParams",
    "BaselineParams",
    "CacheParams",
    "Calibration",
    "CompletionParams",
    "ContextParams",
    "DataParams",
    "EvaluationParams",
    "FormParams",
    "HubOrigin",
    "LabelRule",
    "LocalOrigin",
    "LoraParams",
    "MonitorParams",
    "Origin",
    "Params",
    "PypiOrigin",
    "RuntimeParams",
    "SourceParams",
    "StudentParams",
    "TargetParams",
    "TaskParams",
    "TeacherParams",
    "TunedTeacherParams",
    "TuningParams",
    "load_params",
    "parse_params",
    "pick",
]
