"""Tensors in one safetensors file, or in several with an index, as Hugging Face's libraries write them.

Up to a size all are in one file, such as `model.safetensors`. Above it they are in `model-00001-of-00003.safetensors`
and so on, and `model.safetensors.index.json` says in which file each of them is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST_FILE = 5 * 10**9
"""Largest size of a file in bytes, unless one tensor is larger."""
SUFFIX = ".safetensors"


def index_name(name: str) -> str:
    """Return the name of the index of several files, from the name of the one file in their place.

    Examples:
        >>> index_name("model.safetensors")
        'model.safetensors.index.json'
    """
    return f"{name}.index.json"


def files_of(name: str, there: Iterable[str]) -> list[str]:
    """Return which of some files have the tensors that `name` stands for: that file itself, or several and their index.

    Examples:
        >>> files_of("model.safetensors", ["model.json", "model.safetensors"])
        ['model.safetensors']
    """
    pattern = re.compile(rf"{re.escape(name.removesuffix(SUFFIX))}-\d{{5}}-of-\d{{5}}{re.escape(SUFFIX)}")
    return sorted(file for file in there if file in (name, index_name(name)) or pattern.fullmatch(file))


def split_files(name: str, sizes: Mapping[str, int], largest: int = LARGEST_FILE) -> dict[str, list[str]]:
    """Return the names of the tensors in each file, by its name; below `largest` there is one.

    Args:
        name: of the file, where there is one.
        sizes: bytes of each tensor.
        largest: bytes of tensors that a file has at most, unless one tensor has more.

    Examples:
        >>> split_files("model.safetensors", {"a": 4, "b": 4, "c": 8}, largest=8)
        {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
    """
    groups: list[list[str]] = [[]]
    size = 0
    for tensor in sorted(sizes):
        if groups[-1] and size + sizes[tensor] > largest:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += sizes[tensor]
    if len(groups) == 1:
        return {name: groups[0]}
    stem = name.removesuffix(SUFFIX)
    return {f"{stem}-{i:05d}-of-{len(groups):05d}{SUFFIX}": group for i, group in enumerate(groups, 1)}


def index_text(files: Mapping[str, Iterable[str]], sizes: Mapping[str, int]) -> str:
    """Return the text of the index of several files, from the names of the tensors in each and the sizes of all.

    Examples:
        >>> json.loads(index_text({"1.safetensors": ["a"], "2.safetensors": ["b"]}, {"a": 4, "b": 8}))
        {'metadata': {'total_size': 12}, 'weight_map': {'a': '1.safetensors', 'b': '2.safetensors'}}
    """
    placed = {tensor: file for file, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def save_weights(
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    largest: int = LARGEST_FILE,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors as float32 into a folder, in place of those that were saved there by the same name.

    Args:
        name: of the file, where one is enough.
        largest: bytes of tensors that a file has at most, unless one tensor has more.
        metadata: of each file.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(Path(folder), "model.safetensors", {"a": torch.ones(2), "b": torch.ones(3)}, largest=8)
        ...     sorted(path.name[:8] for path in Path(folder).iterdir())
        ['model-00', 'model-00', 'model.sa']
    """
    sizes = {tensor: 4 * values.numel() for tensor, values in tensors.items()}
    files = split_files(name, sizes, largest)
    for earlier in files_of(name, [path.name for path in folder.iterdir()]):
        (folder / earlier).unlink()
    for file, inside in files.items():
        group = {tensor: tensors[tensor].detach().float().cpu().contiguous() for tensor in inside}
        save_file(group, folder / file, metadata)
    if len(files) > 1:
        (folder / index_name(name)).write_text(index_text(files, sizes))


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file of a folder, or of several with their index, by name.

    Their values are read from the mapped files when they are used. A copy takes memory, and they themselves take none.

    Args:
        name: of the file, where it is one.

    Raises:
        ValueError: a file is missing or damaged, or the index names other tensors than the files have.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(Path(folder), "model.safetensors", {"a": torch.ones(2), "b": torch.ones(3)}, largest=8)
        ...     len(list(Path(folder).iterdir())), read_weights(Path(folder), "model.safetensors")["a"].tolist()
        (3, [1.0, 1.0])
    """
    if (folder / name).exists() or not (folder / index_name(name)).exists():
        return _read_file(folder / name)
    placed = _read_index(folder / index_name(name))
    found: dict[str, Tensor] = {}
    for file in sorted(set(placed.values())):
        inside = _read_file(folder / file)
        listed = {tensor for tensor, place in placed.items() if place == file}
        if differing := sorted(listed ^ inside.keys()):
            where = "is not there" if differing[0] in listed else "is there, and not in the index"
            raise ValueError(
                f"{folder / file} is not the file of {index_name(name)}: tensor {differing[0]} {where}; copy or save "
                "all of them again"
            )
        found |= inside
    return found


def tensors_digest(tensors: Mapping[str, Tensor], *first: str) -> str:
    """Return the SHA-256 over tensors by name and value, and over some text before them.

    Examples:
        >>> a, b = torch.zeros(2), torch.ones(2)
        >>> tensors_digest({"a": a, "b": b}) == tensors_digest({"b": b, "a": a})
        True
        >>> tensors_digest({"a": a, "b": b}) == tensors_digest({"a": b, "b": a})
        False
    """
    found = hashlib.sha256("".join(first).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor, from an index.

    Raises:
        ValueError: it is damaged, or leads out of its folder.
    """
    try:
        placed = {str(tensor): str(file) for tensor, file in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): copy or save it again") from error
    for file in placed.values():
        if "/" in file or "\\" in file or not file.endswith(SUFFIX):
            raise ValueError(f"{path} names {file!r}, which is no safetensors file beside it: it cannot be used")
    return placed


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no weights: {path.name} is missing") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or save it again") from error
