"""A checkpoint as the state dict that a job with torch's DCP would have saved.

Keys are those of ``torch.distributed.checkpoint.state_dict``: a module's tensors by their
names in it, an optimizer's state by parameter. Its settings are spelled in both of torch's
ways: group by group, and for each parameter (``flatten_optimizer_state_dict``); a job reads
the one it asks for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from distckpt import names, strict_json
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.formats.dcp_metadata import Path
from distckpt.formats.dcp_write import Item
from distckpt.formats.optimizers import (
    CLASS,
    EMPTY_GROUPS,
    EXTRA,
    GROUP,
    SETTINGS,
    STATE,
    StoredOptimizer,
    find,
)
from distckpt.instances import children_of, is_namespace
from distckpt.near import did_you_mean
from distckpt.opened import OpenedCheckpoint
from distckpt.stored_tensor import StoredTensor
from distckpt.value_tags import Wrapper

_GROUPS = "param_groups"


def items_of(opened: OpenedCheckpoint, renamed: Mapping[str, str]) -> dict[str, Item]:
    """Name all tensors and plain values of the job.

    Args:
        opened: The checkpoint.
        renamed: New names of tracked objects, by their names in the checkpoint.

    Raises:
        ConfigError: Nothing in it has a name that is to be changed.
        UnsupportedError: Two things would have one name.
    """
    objects = {name.split("/")[0] for name in (*opened, *opened.plain_values)}
    unknown = sorted(renamed.keys() - objects)
    if unknown:
        hint = did_you_mean(unknown[0], objects)
        there = ", ".join(sorted(objects))
        msg = f"no {unknown[0]!r} to be renamed{hint} There are {there}."
        raise ConfigError(msg)
    items: dict[str, Item] = {}
    first_of: dict[str, str] = {}
    for path, value, is_second_way in _leaves(opened):
        path = (renamed.get(str(path[0]), path[0]), *path[1:])
        name = ".".join(map(str, path))
        known = items.get(name)
        if known is not None:
            if known.path != path and not is_second_way:
                msg = f"{opened.directory}: two things would be named {name!r} in DCP."
                raise UnsupportedError(msg)
            continue
        same_as = ""
        if isinstance(value, StoredTensor):
            row = opened.manifest.assignment.rows[value.name]
            first = first_of.setdefault(row.same_as or row.name, name)
            same_as = "" if first == name else first
        items[name] = Item(path, value, same_as)
    return items


def _leaves(opened: OpenedCheckpoint) -> Iterator[tuple[Path, Any, bool]]:
    """Walk paths and what is there; and whether torch spells it otherwise, too."""
    wrappers = {n for n, v in opened.plain_values.items() if isinstance(v, Wrapper)}
    found = find(opened.plain_values, {*opened, *wrappers})
    path_of: dict[str, Path] = {}
    settings: set[str] = set()
    for optimizer in found:
        start = names.keys_of(optimizer.path)
        path_of[f"{optimizer.path}/{EXTRA}"] = start
        settings.add(f"{optimizer.path}/{CLASS}")
        for full, short in optimizer.parameters.items():
            path_of[f"{optimizer.path}/{STATE}/{full}"] = (*start, STATE, short)
            settings.add(f"{optimizer.path}/{SETTINGS}/{full}")
    # Those inside a plain value come with it, where it has them.
    inside = {t.name for v in opened.plain_values.values() for t in _tensors_in(v)}
    for name, tensor in opened.items():
        if name not in inside:
            yield _path(name, path_of), tensor, False
    for name, value in opened.plain_values.items():
        is_empty_group = any(name.startswith(f"{o.path}/{EMPTY_GROUPS}/") for o in found)
        # What a tensor is that is made of others, DCP has no place for; these it has.
        is_plain = not isinstance(value, Wrapper)
        if name not in settings and not is_empty_group and is_plain:
            for path, leaf in _flattened(_path(name, path_of), value):
                yield path, leaf, False
    for optimizer in found:
        yield from _settings(opened, optimizer)


def _path(name: str, path_of: Mapping[str, Path]) -> Path:
    outer, rest = names.split_inner(name)
    inner = names.keys_of(rest.removeprefix("/")) if rest else ()
    parent, _, last = outer.rpartition("/")
    if parent in path_of:
        return (*path_of[parent], names.key_of(last), *inner)
    return (*names.keys_of(outer), *inner)


def _settings(
    opened: OpenedCheckpoint, optimizer: StoredOptimizer
) -> Iterator[tuple[Path, Any, bool]]:
    """Walk an optimizer's settings, group by group and parameter by parameter.

    Parameters with equal settings make a group, where their group's number is not stored.
    """
    start = names.keys_of(optimizer.path)
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for full, short in optimizer.parameters.items():
        name = f"{optimizer.path}/{SETTINGS}/{full}"
        text = strict_json.dumps(opened.manifest.values[name])
        values = {k: v for k, v in opened.plain_values[name].items() if k != GROUP}
        groups.setdefault(text, (values, []))[1].append(short)
    listed = [*groups.values()]
    prefix = f"{optimizer.path}/{EMPTY_GROUPS}/"
    listed += [(v, []) for n, v in opened.plain_values.items() if n.startswith(prefix)]
    for index, (values, parameters) in enumerate(listed):
        for path, leaf in _flattened((*start, _GROUPS, index), values):
            yield path, leaf, False
        yield (*start, _GROUPS, index, "params"), parameters, False
    for values, parameters in listed:
        for short in parameters:
            for path, leaf in _flattened((), values):
                key = ".".join(map(str, (_GROUPS, short, *path)))
                yield (*start, key), leaf, True


def _flattened(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    """Walk the leaves of a value as DCP does: of dicts, and of lists with some inside."""
    if type(value) is deque:
        value = list(value)
    elif is_namespace(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flattened((*path, str(key)), item)
    elif isinstance(value, (list, tuple)) and _is_walked(value):
        for index, item in enumerate(value):
            yield from _flattened((*path, index), item)
    else:
        yield path, value


def _tensors_in(value: Any) -> Iterator[StoredTensor]:
    if isinstance(value, StoredTensor):
        yield value
    elif not isinstance(value, Wrapper):
        for _, item in children_of(value):
            yield from _tensors_in(item)


def _is_walked(value: Any) -> bool:
    if isinstance(value, (dict, StoredTensor)) or is_namespace(value):
        return True
    return isinstance(value, (list, tuple, deque)) and any(map(_is_walked, value))
