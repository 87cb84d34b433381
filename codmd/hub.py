"""Repositories of the Hugging Face Hub in the place of folders: `owner/name`, or `owner/name@revision`."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

REPOSITORY = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json", ".txt")
"""Endings of files: no repository's."""
INDEX = "model_index.json"
NETWORK = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json")
"""Of a repository that holds one network and no pipeline."""


def is_repository(source: str | os.PathLike[str]) -> bool:
    """Whether `source` can only mean a repository: it looks like one, and no such file or folder is here."""
    text = str(source)
    return bool(REPOSITORY.fullmatch(text)) and not text.endswith(FILES) and not Path(text).exists()


def local(source: str | os.PathLike[str], *parts: str) -> Path:
    """A path on this machine: `source` itself, or the snapshot of the repository that it names.

    What is missing is downloaded into huggingface_hub's cache, with a bar: safetensors and their descriptions, no
    pickles. With HF_HUB_OFFLINE=1 the cache alone answers.

    Args:
        parts: subfolders of a pipeline, such as "transformer"; none for its index alone.

    Raises:
        FileNotFoundError: there is no such repository or revision, it is not to be had, or it lacks the files.
    """
    found = REPOSITORY.fullmatch(str(source))
    if found is None or not is_repository(source):
        return Path(source)
    return _snapshot(found["repository"], found["revision"], parts)


def components(source: str | os.PathLike[str]) -> set[str]:
    """The parts of a pipeline that a folder or repository holds; empty for one that is none."""
    from codmd.files import read_json

    folder = local(source)
    if not is_repository(source):
        return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    return {name for name, kind in index.items() if isinstance(kind, list) and None not in kind}


@cache
def _snapshot(repository: str, revision: str | None, parts: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    inside = (f"{part}/*{ending}" for part in parts for ending in (".json", ".safetensors", ".model", ".txt"))
    patterns = [INDEX, *(NETWORK if parts else ()), *inside]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        reason = f"not whole in huggingface_hub's cache, and the Hub cannot be asked: {_first_line(error.__cause__)}"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except RepositoryNotFoundError:
        reason = "no file or folder here, and no repository of the Hub, unless it is private (hf auth login)"
    except HfHubHTTPError as error:
        reason = _first_line(error)
    raise FileNotFoundError(f"{repository}{f'@{revision}' if revision else ''}: {reason}")


def _first_line(error: BaseException | None) -> str:
    return (str(error or "").strip().splitlines() or [type(error).__name__])[0]


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository, which is made where there is none; its address.

    Raises:
        OSError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Written by codmd convert")
    except (OSError, ValueError) as error:
        raise OSError(f"--push {repository}: {_first_line(error)}; {folder} is complete") from error
    return str(address)
