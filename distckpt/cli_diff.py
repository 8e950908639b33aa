"""The command ``distckpt diff``: like diff(1), it ends with 1 if there is a difference."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from distckpt import values
from distckpt.cli_paths import LOCAL_PATH, complete_checkpoint
from distckpt.errors import DistckptError
from distckpt.terminal import (
    EXIT_OK,
    Progress,
    echo,
    fail,
    json_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from distckpt.diff import Difference, Name, TensorPair, ValuePair
    from distckpt.opened import OpenedCheckpoint

_EXIT_DIFFERENT = 1
_MAX_VALUE_LENGTH = 40
_MAX_RANKS = 4
_MOVED, _NAME = "moved", "name"


@click.command(name="diff")
@click.argument("first", metavar="A", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@click.argument("second", metavar="B", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@click.option("--names-only", is_flag=True, help="Compare the manifests; read no tensors.")
@click.option(
    "--sort",
    type=click.Choice((_MOVED, _NAME)),
    default=_MOVED,
    show_default=True,
    help="What has moved farthest first, or by name.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Show only so many tensors.")
@json_option
def diff_command(
    first: str, second: str, names_only: bool, sort: str, limit: int | None, as_json: bool
) -> None:
    """Say how two checkpoints differ, and how far tensors moved.

    A and B are checkpoints, also of different runs, layouts and dtypes; a run directory
    means its newest. Of each tensor that is different: how many of its elements are, the
    largest distance of two of them, and the length (L2) of the difference over that of A.

    What checksums show to be equal is not read. What is read is verified.

    Exit codes: 0 equal; 1 different; 2 wrong usage; 3 one of them is not there, cannot be
    read, or is damaged.
    """
    from distckpt import opened

    try:
        with opened.open(first) as one, opened.open(second) as other:
            found = _compare(one, other, names_only)
    except DistckptError as error:
        fail(error)
    tensors = sorted(found.tensors, key=lambda pair: pair.name)
    if sort == _MOVED:
        tensors.sort(key=lambda pair: pair.far, reverse=True)
    shown = tensors[:limit]
    if as_json:
        sides = {"a": _side_to_json(first, one), "b": _side_to_json(second, other)}
        print_json({"equal": found.is_equal, **sides, **_to_json(found, shown)})
    else:
        for letter, path, side in (("A", first, one), ("B", second, other)):
            echo(f"{letter}  {path}{_which(path, side)}")
        _print_difference(found, shown, names_only)
    sys.exit(EXIT_OK if found.is_equal else _EXIT_DIFFERENT)


def _compare(
    one: OpenedCheckpoint, other: OpenedCheckpoint, names_only: bool
) -> Difference:
    from distckpt import diff

    if names_only:
        return diff.compare_names(one, other)
    with Progress("comparing") as progress:
        return diff.compare(one, other, progress.begin)


# For people


def _which(path: str, side: OpenedCheckpoint) -> str:
    prefix = side.manifest.attempt.prefix
    parts = [] if os.path.basename(path) == prefix else [prefix]
    parts += [] if side.step is None else [f"step {side.step}"]
    return f"  ({', '.join(parts)})" if parts else ""


def _print_difference(
    found: Difference, shown: Sequence[TensorPair], names_only: bool
) -> None:
    in_one = zip("AB", found.tensors_in_one, found.values_in_one, strict=True)
    for letter, tensors, plain in in_one:
        for what, names in (("tensor", tensors), ("value", plain)):
            for name in sorted(names):
                echo(f"only in {letter}: {what} {_spelled(name)}")
    if shown:
        print_table(
            ["tensor", "dtype", "shape", "differ", "max |a-b|", "|a-b|/|a|", ""],
            [_row(pair) for pair in shown],
            right=("differ", "max |a-b|", "|a-b|/|a|"),
        )
    if len(shown) < len(found.tensors):
        echo(f"Shown are {len(shown)} of {len(found.tensors)} tensors that differ.")
    if found.values:
        print_table(["value", "A", "B"], list(_value_rows(found.values)))
    echo(_summary(found, names_only))


def _row(pair: TensorPair) -> list[str]:
    distance = pair.distance
    figures = ["", "", ""]
    remarks = []
    if distance is not None:
        share = distance.num_differing / max(1, distance.num_elements)
        relative = "" if distance.relative is None else f"{distance.relative:.3g}"
        if distance.largest is None:
            remarks.append("no numbers")
        elif distance.relative is None:
            remarks.append("was zero")
        largest = "" if distance.largest is None else f"{distance.largest:.6g}"
        figures = [_percent(share), largest, relative]
        for num, what in (
            (distance.num_new_nan, "NaN"),
            (distance.num_new_infinite, "infinite"),
        ):
            if num:
                remarks.append(f"{num} newly {what}")
    shapes = ["x".join(map(str, shape)) or "scalar" for shape in pair.shapes]
    return [
        _spelled(pair.name),
        " -> ".join(dict.fromkeys(pair.dtypes)),
        " -> ".join(dict.fromkeys(shapes)),
        *figures,
        ", ".join(remarks),
    ]


def _percent(share: float) -> str:
    """Spell a share so that only none is 0 % and only all is 100 %."""
    percent = min(max(100 * share, 0.01), 99.99) if 0 < share < 1 else 100 * share
    return f"{percent:.4g}%"


def _spelled(name: Name) -> str:
    if not name.ranks:
        return name.text
    some = ", ".join(map(str, name.ranks[:_MAX_RANKS]))
    more = f", ... ({len(name.ranks)})" if len(name.ranks) > _MAX_RANKS else ""
    return f"{name.text} (of rank{'s' * (len(name.ranks) > 1)} {some}{more})"


def _value_rows(pairs: Iterable[ValuePair]) -> Iterable[list[str]]:
    """Take names together that changed alike: optimizers have settings for each tensor."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for pair in pairs:
        key = tuple(json.dumps(encoded) for encoded in pair.encoded)
        alike.setdefault(key, []).append(_spelled(pair.name))
    for key, names in alike.items():
        first = min(names)
        more = f", ... ({len(names)} alike)" if len(names) > 1 else ""
        one, other = (values.decode(json.loads(text)) for text in key)
        if type(one) is dict and type(other) is dict:
            one, other = _without_common(one, other), _without_common(other, one)
        yield [f"{first}{more}", _shortened(one), _shortened(other)]


def _without_common(one: dict[Any, Any], other: dict[Any, Any]) -> dict[Any, Any]:
    """Leave out what stands in both: settings have many fields, and few change."""
    return {
        key: value
        for key, value in one.items()
        if key not in other or repr(other[key]) != repr(value)
    }


def _shortened(value: Any) -> str:
    text = repr(value)
    if len(text) <= _MAX_VALUE_LENGTH:
        return text
    return f"{text[: _MAX_VALUE_LENGTH - 3]}..."


def _summary(found: Difference, names_only: bool) -> str:
    compared = "not compared: the tensors' values; " if names_only else ""
    equal = _count(found.num_equal_tensors, found.num_equal_values)
    if found.is_equal:
        return f"{compared}equal: {equal}"
    parts = [f"different: {_count(len(found.tensors), len(found.values))}"]
    in_one = zip("AB", found.tensors_in_one, found.values_in_one, strict=True)
    for letter, tensors, plain in in_one:
        if tensors or plain:
            parts.append(f"only in {letter}: {_count(len(tensors), len(plain))}")
    return f"{compared}{'; '.join(parts)}; equal: {equal}"


def _count(num_tensors: int, num_values: int) -> str:
    tensors = f"{num_tensors} tensor{'s' * (num_tensors != 1)}"
    return f"{tensors}, {num_values} plain value{'s' * (num_values != 1)}"


# For scripts


def _side_to_json(path: str, side: OpenedCheckpoint) -> dict[str, Any]:
    return {
        "path": path,
        "attempt": side.manifest.attempt.published,
        "step": side.step,
        "created": side.created,
        "world_size": side.world_size,
    }


def _to_json(found: Difference, shown: Iterable[TensorPair]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for what, in_one in (
        ("tensors", found.tensors_in_one),
        ("values", found.values_in_one),
    ):
        for letter, names in zip("ab", in_one, strict=True):
            tree[f"{what}_only_in_{letter}"] = [_name_to_json(name) for name in names]
    return {
        **tree,
        "num_equal_tensors": found.num_equal_tensors,
        "num_equal_values": found.num_equal_values,
        "num_different_tensors": len(found.tensors),
        "tensors": [_tensor_to_json(pair) for pair in shown],
        "values": [
            {**_name_to_json(pair.name), "a": pair.encoded[0], "b": pair.encoded[1]}
            for pair in found.values
        ],
    }


def _name_to_json(name: Name) -> dict[str, Any]:
    return {"name": name.text, "ranks": list(name.ranks) or None}


def _tensor_to_json(pair: TensorPair) -> dict[str, Any]:
    tree = {
        **_name_to_json(pair.name),
        "dtypes": list(pair.dtypes),
        "shapes": [list(shape) for shape in pair.shapes],
    }
    distance = pair.distance
    if distance is None:
        return tree
    return {
        **tree,
        "num_elements": distance.num_elements,
        "num_differing": distance.num_differing,
        "largest": _finite(distance.largest),
        "relative": _finite(distance.relative),
        "num_new_nan": distance.num_new_nan,
        "num_new_infinite": distance.num_new_infinite,
    }


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None
