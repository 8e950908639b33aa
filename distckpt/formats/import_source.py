"""Other programs' files as one tree: dicts and lists with tensors and values in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

from distckpt import files
from distckpt.errors import (
    ConfigError,
    FormatError,
    UnsafeCheckpointError,
    UnsupportedError,
)
from distckpt.formats import safetensors_file, torch_load
from distckpt.formats.dcp_directory import DcpDirectory
from distckpt.formats.dcp_metadata import DcpTensor, Path
from distckpt.formats.foreign import DCP, SAFETENSORS, TORCH

_INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256 * 2**20
# How a zip archive begins.
_ARCHIVE = b"PK\3\4"


class Source:
    """What is imported; a context manager that keeps its files open.

    Nothing in them is run, whatever they hold (``pickle_read.py``).

    Args:
        path: A file or directory.
        kind: One of ``foreign.IMPORTED``.
        skip: Names, parts joined by dots, that are left out if one of these matches.

    Attributes:
        tree: Dicts, lists and tuples, with a ``foreign.Tensor`` or a plain value at each
            leaf.

    Raises:
        FormatError: It is not of that kind, or not safe to read.
        UnsupportedError: It holds what is neither a tensor nor a plain value.
        StorageError: It cannot be read.
    """

    def __init__(self, path: str, kind: str, skip: Sequence[str] = ()) -> None:
        self._stack = ExitStack()
        self._path = path
        self._skip = skip
        read: dict[str, Callable[[], Any]] = {
            SAFETENSORS: self._read_safetensors,
            TORCH: self._read_torch,
            DCP: self._read_dcp,
        }
        try:
            tree = read[kind]()
            if not isinstance(tree, dict) or not tree:
                msg = f"{path}: holds no dict with something in it; nothing to import."
                raise FormatError(msg)
        except BaseException:
            self._stack.close()
            raise
        self.tree: dict[Any, Any] = tree

    def _is_skipped(self, path: Path) -> bool:
        name = ".".join(map(str, path))
        return any(fnmatchcase(name, pattern) for pattern in self._skip)

    def _open(self, path: str) -> files.OpenFile:
        # Downloads are kept as links to where they really lie.
        return self._stack.enter_context(files.OpenFile(os.path.realpath(path)))

    def _read_safetensors(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in self._safetensors_files():
            tensors = safetensors_file.read(self._open(path))
            twice = found.keys() & tensors.keys()
            if twice:
                msg = f"{path}: tensor {min(twice)!r} stands in another file as well."
                raise FormatError(msg)
            found.update(tensors)
        return {name: t for name, t in found.items() if not self._is_skipped((name,))}

    def _safetensors_files(self) -> list[str]:
        if not files.is_directory(self._path):
            return [self._path]
        index = os.path.join(self._path, _INDEX)
        if files.exists(index):
            names = _files_in_index(index)
        else:
            every = files.list_directory(self._path)
            names = [name for name in every if name.endswith(".safetensors")]
        if not names:
            msg = f"{self._path}: no safetensors file is there."
            raise ConfigError(msg)
        return [os.path.join(self._path, name) for name in names]

    def _read_torch(self) -> Any:
        file = self._open(self._path)
        if file.read(0, len(_ARCHIVE)) != _ARCHIVE:
            # Before torch 1.6 they were a run of pickles.
            msg = (
                f"{self._path}: not an archive of torch.save's. Load it with torch, of "
                "version 1.6 or newer, if you trust it, and save it again."
            )
            raise FormatError(msg)
        tree = torch_load.read(file, 0, file.size_bytes)
        return self._without_skipped(tree, ())

    def _without_skipped(self, node: Any, path: Path) -> Any:
        if not isinstance(node, dict):
            return node
        kept = [(k, v) for k, v in node.items() if not self._is_skipped((*path, k))]
        return type(node)((k, self._without_skipped(v, (*path, k))) for k, v in kept)

    def _read_dcp(self) -> dict[Any, Any]:
        directory = self._stack.enter_context(DcpDirectory(self._path))
        tree: dict[Any, Any] = {}
        for name, entry in directory.entries.items():
            path = directory.paths[name]
            if self._is_skipped(path):
                continue
            is_tensor = isinstance(entry, DcpTensor)
            leaf = directory.tensor(name) if is_tensor else _value(directory, name)
            _put(tree, path, leaf, name)
        return {key: _with_lists(node) for key, node in tree.items()}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _files_in_index(path: str) -> list[str]:
    """Return the files that an index of Hugging Face's names."""
    data = files.read_file(os.path.realpath(path), _MAX_INDEX_BYTES)
    try:
        names = {*json.loads(data)["weight_map"].values()}
        are_files = all(name == os.path.basename(name) and name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"{path}: not an index of safetensors files: {error}"
        raise FormatError(msg) from error
    if not are_files:
        msg = f"{path}: names files that are not beside it: {sorted(names)[:5]}."
        raise FormatError(msg)
    return sorted(names)


def _value(directory: DcpDirectory, name: str) -> Any:
    try:
        return directory.value(name)
    except (UnsafeCheckpointError, UnsupportedError) as error:
        msg = f"{name!r}: {error} To leave it out: --skip '{name}'."
        raise type(error)(msg) from error


class _Branch(dict[Any, Any]):
    """A dict that stands for the keys on the way to several leaves."""


def _put(tree: dict[Any, Any], path: Path, leaf: Any, name: str) -> None:
    node = tree
    for key in path[:-1]:
        node = node.setdefault(key, _Branch())
        if not isinstance(node, _Branch):
            msg = f"DCP metadata: {name!r} lies below what is no branch."
            raise FormatError(msg)
    if path[-1] in node:
        msg = f"DCP metadata: {name!r} lies where something else does."
        raise FormatError(msg)
    node[path[-1]] = leaf


def _with_lists(node: Any) -> Any:
    """Make lists of the branches whose keys are positions."""
    if not isinstance(node, _Branch):
        return node
    items: Mapping[Any, Any] = {key: _with_lists(item) for key, item in node.items()}
    if {*map(type, items)} == {int}:
        return [item for _, item in sorted(items.items())]
    return dict(items)
