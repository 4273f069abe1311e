"""What all params share: frozen, strict models, and the kinds of values that several of them take."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SLUG = re.compile(r"[a-z0-9][a-z0-9_-]*")
DEMONSTRATIONS_FILE = "data/demonstrations.parquet"


def _slug(name: str) -> str:
    if not SLUG.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of small letters, digits, '-' and '_', as DVC stages need")
    return name


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the folder it belongs in")
    return path


Name = Annotated[str, AfterValidator(_slug)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
InnerPath = Annotated[str, AfterValidator(_inside)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """Immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
