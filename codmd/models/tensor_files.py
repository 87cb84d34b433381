"""Tensors in files of unknown origin, opened without running their code and read one at a time.

Nothing is loaded before it is asked for: files are memory-mapped, so that a network of 57 GB needs the memory of one
tensor (and page cache that the system may take back).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codmd.atomic import replacing
from codmd.files import read_json

from .fingerprint import fingerprint

INDEX = "diffusion_pytorch_model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
NETWORKS = ("generator", "generator_ema", "student", "model", "state_dict", "module", "ema")
"""Where a checkpoint dictionary keeps the network that samples, in the order they are looked for."""


class TensorFile(Mapping[str, Tensor]):
    """Name to tensor, read when looked up; `shapes` are known without reading."""

    def __init__(self, shapes: Mapping[str, torch.Size], read: Mapping[str, Any]) -> None:
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Renamed(Mapping[str, Tensor]):
    """Other names for tensors that are still read one at a time.

    Args:
        names: new name to the name in `tensors`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(Mapping[str, Tensor]):
    """Several mappings of tensors, still read one at a time; of a name that two have, the first counts."""

    def __init__(self, *parts: Mapping[str, Tensor]) -> None:
        self._parts = {name: part for part in reversed(parts) for name in part}

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@contextmanager
def open_tensors(path: str | os.PathLike[str], network: str = "") -> Iterator[TensorFile]:
    """Opens a .safetensors file, an index of several, a PyTorch file, or a diffusers folder.

    Args:
        network: which entry of a checkpoint dictionary holds the network; "" takes the first of `NETWORKS`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file, and that it is truncated, carries code, or holds no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    with ExitStack() as stack:
        if path.is_dir():
            yield stack.enter_context(open_safetensors(_folder_files(path)))
        elif path.name.endswith(INDEX_SUFFIX):
            yield stack.enter_context(open_safetensors(_indexed_files(path)))
        elif path.suffix == ".safetensors":
            yield stack.enter_context(open_safetensors([path]))
        elif path.suffix in TORCH_SUFFIXES:
            yield _in_memory(_network(_load_pickle(path), path, network))
        else:
            expected = ", ".join((".safetensors", INDEX_SUFFIX, *TORCH_SUFFIXES))
            raise ValueError(f"{path}: unknown kind of file; expected {expected}, or a diffusers folder")


@contextmanager
def open_safetensors(paths: Sequence[Path]) -> Iterator[TensorFile]:
    """Shards of one network.

    Raises:
        ValueError: naming the file that cannot be read, or has a weight that an earlier one has, too.
    """
    shapes, read = {}, {}
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
            for name in file.keys():  # noqa: SIM118
                if name in shapes:
                    raise ValueError(f"{path}: weight {name!r} stands in an earlier shard, too")
                shapes[name] = torch.Size(file.get_slice(name).get_shape())
                read[name] = lambda file=file, name=name: file.get_tensor(name)
        yield TensorFile(shapes, read)


def folder_fingerprint(folder: Path) -> str:
    """Of all safetensors in a folder.

    Raises:
        ValueError: naming the file that cannot be read.
    """
    with open_safetensors(sorted(folder.glob("*.safetensors"))) as tensors:
        return fingerprint(tensors)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, all or nothing.

    Args:
        metadata: of one entry where the bytes must repeat; several come in another order every time.

    Raises:
        OSError: it cannot be written; names the file.
    """
    try:
        with replacing(path) as partial:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def _folder_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise FileNotFoundError(f"{folder}: holds neither {SINGLE} nor {INDEX}")


def _indexed_files(index: Path) -> list[Path]:
    """The shards that a safetensors index lists, in its folder."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index: {error!r}") from error
    if outside:
        raise ValueError(f"{index}: lists {outside[0]!r}; expected files beside it")
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name}: missing, though {index.name} lists it")
    return [index.parent / name for name in names]


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # a damaged pickle or archive fails in any way
        if code := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) (\S+)", str(error)):
            raise ValueError(
                f"{path}: refused, because it carries code: loading it would call {code[1]}. Only tensors, numbers, "
                "strings, lists and dictionaries are read; ask its author for a safetensors file"
            ) from error
        raise ValueError(f"{path}: truncated, or not a PyTorch file ({_first_line(error)})") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _network(content: Any, path: Path, network: str) -> dict[str, Tensor]:
    """The state dictionary inside `content`, however often it is wrapped."""
    if network:
        if not isinstance(content, Mapping) or network not in content:
            found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"{path}: has no network {network!r}; it holds {found}")
        content = content[network]
    while isinstance(content, Mapping):  # whatever stands beside the network: counters, other networks
        inner = next((name for name in NETWORKS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors under any of {', '.join(NETWORKS)}")
    return tensors


def _in_memory(tensors: dict[str, Tensor]) -> TensorFile:
    read = {name: (lambda value=value: value) for name, value in tensors.items()}
    return TensorFile({name: value.shape for name, value in tensors.items()}, read)
