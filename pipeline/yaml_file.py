"""YAML as DVC reads it (1.2, so that `1e-4` is a float), and every fault of a file as one message.

Values alone are read: no tag makes an object. Aliases share what they stand for, so a file of them that would unfold to gigabytes is read
in no time; whoever shows or copies what was read has to bound it.
"""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UsageError


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises UsageError naming the file where it is not there, or is not UTF-8 or not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; run from the project's folder.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from None
    except RecursionError:
        raise UsageError(f"{path}: not valid YAML: nested deeper than can be read; take levels out.") from None
    except (
        YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
