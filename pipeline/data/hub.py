"""Models and data files on the Hugging Face hub, at a pinned commit.

Of a model only safetensors, configuration and tokenizer files at the top of its repository are taken: no pickles, no Python files, no other
formats of the same weights. The list of files is read before anything is downloaded, so a repository without safetensors costs one
request. The trade-off: a model kept in a subfolder of its repository cannot be named; download it and give it as a local folder.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import huggingface_hub
from huggingface_hub import errors

from pipeline.data.local import MODEL_FILES, RECORD
from pipeline.errors import UsageError, choices
from pipeline.params import HubOrigin

T = TypeVar("T")


def download_model(origin: HubOrigin, folder: Path) -> None:
    """Download a model repository's safetensors, configuration and tokenizer into `folder`.

    Raises UsageError where the repository has no safetensors, does not exist, is gated, or cannot be reached.
    """
    names = _ask(origin, lambda: huggingface_hub.list_repo_files(origin.repo, revision=origin.revision))
    top = [name for name in names if "/" not in name]
    if not any(name.endswith(".safetensors") for name in top):
        weights = [name for name in names if PurePosixPath(name).suffix in {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".safetensors"}]
        raise UsageError(
            f"{origin.repo}@{origin.revision[:8]}: no *.safetensors at the top of the repository; its weights are: {choices(weights[:8])}. "
            "Pickled weights can run code and are never loaded: choose a revision with safetensors, or name a GGUF file with `file`."
        )
    _ask(
        origin,
        lambda: huggingface_hub.snapshot_download(
            origin.repo, revision=origin.revision, local_dir=folder, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*", RECORD]
        ),
    )


def download_file(origin: HubOrigin, folder: Path, repo_type: str) -> Path:
    """Download the one file that `origin.file` names into `folder`; `repo_type` is "model" or "dataset"."""
    file = origin.file
    if file is None:
        raise UsageError(f"{origin.repo}: name the data file with `file`; it is a path in the dataset repository.")
    return Path(
        _ask(
            origin,
            lambda: huggingface_hub.hf_hub_download(origin.repo, file, repo_type=repo_type, revision=origin.revision, local_dir=folder),
        )
    )


def _ask(origin: HubOrigin, request: Callable[[], T]) -> T:
    """Make a request; the hub's many errors become one message each with its next step."""
    name = f"{origin.repo}@{origin.revision[:8]}"
    try:
        return request()
    except errors.GatedRepoError:
        raise UsageError(f"{name}: access to this repository must be asked for on its page; then log in with `hf auth login`.") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"{name}: no such repository on the hub, or a private one; check `repo`, or log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(
            f"{name}: the repository has no commit {origin.revision}; copy it from 'Files and versions' on its page."
        ) from None
    except errors.LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but raised where the hub was not reached
        raise _unreachable(name, error) from None
    except errors.EntryNotFoundError:
        raise UsageError(f"{name}: no file {origin.file!r} in this commit; check `file` on the repository's page.") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name}: not a repository's name ({error}); write `owner/name`.") from None
    except (errors.HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> UsageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(
        f"{name}: the Hugging Face hub cannot be reached ({reason}). Check the network and `HF_HUB_OFFLINE`, or download the files "
        "elsewhere and use `source: local`."
    )
