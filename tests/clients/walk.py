"""The walk over real libraries: each object's own ``load_state_dict`` against distckpt's.

Run it in the environment of the libraries (``launch/clients_env.sh`` makes it):

    .venv-clients/bin/python tests/clients/walk.py                          all rows
    .venv-clients/bin/python tests/clients/walk.py AdamW                    some of them
    .venv-clients/bin/python tests/clients/walk.py --write docs/clients.md  the page

For each row objects are trained. Fresh ones take their state dicts by their own
``load_state_dict``; other fresh ones are restored from a checkpoint. Compared are all
tensors and plain attributes that can be reached from both, then what both compute in three
further steps, then again all tensors and attributes. A row that compares nothing fails.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
# Rows say what they compute by numbers of this machine only, and never on a device.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
from reach import Bits, bits_of, count, differences, reach
from table import RIGHT, Bundle, Row

from distckpt import Checkpoint, CheckpointManager, PerRank
from distckpt.errors import DistckptError

TABLES = (
    "rows_optimizers",
    "rows_schedulers",
    "rows_modules",
    "rows_hugging_face",
    "rows_quantized",
    "rows_data",
    "rows_trainers",
    "rows_wrappers",
)
FURTHER = 3
NOT_RUN = "not run"
_IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Longer messages are cut in the table.
_MESSAGE = 300


@dataclass
class Result:
    """What became of a row.

    Attributes:
        library, name, expected: As in the row.
        verdict: "right", "refused ...", "other: ..." or "not run: ...".
        is_expected: Whether it is what the row expects.
        tensors: How many were compared.
        attributes: How many plain ones were compared.
        goes_on: Whether the reference computes what the saved objects compute next: a
            library's own protocol may lose something, too.
        seconds: How long it took.
    """

    library: str
    name: str
    expected: str
    verdict: str = ""
    is_expected: bool = False
    tensors: int = 0
    attributes: int = 0
    goes_on: bool | None = None
    seconds: float = 0.0


def rows() -> list[Row]:
    """Return all rows, in the order of the table."""
    return [row for name in TABLES for row in importlib.import_module(name).ROWS]


def play(row: Row) -> Result:
    """Play one row."""
    result = Result(row.library, row.name, row.expected)
    began = time.monotonic()
    try:
        with _one_rank() if row.ranks else tempfile.TemporaryDirectory():
            result.verdict = _verdict(row, result)
    except ImportError as error:
        result.verdict = f"{NOT_RUN}: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        result.verdict = f"other: {type(error).__name__}: {_short(error)} ({place})"
    result.seconds = time.monotonic() - began
    result.is_expected = row.is_expected(result.verdict)
    return result


def _verdict(row: Row, result: Result) -> str:
    saved = row.make(0)
    row.train(saved, range(row.before))
    reference, own_error = None, None
    try:
        reference = _made_again(row) if row.exact else _loaded_by_itself(row, saved)
    except ImportError:
        raise
    except Exception as error:
        own_error = f"{type(error).__name__}: {_short(error)}"
    before = reach(_tracked(saved))
    # In memory: what the disk takes to sync is not the question here.
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder:
        try:
            with CheckpointManager(
                Checkpoint(**_tracked(saved)), folder + "/run", 1
            ) as manager:
                manager.save()
        except DistckptError as error:
            return f"refused at the save: {_short(error)}"
        if changed := differences(before, reach(_tracked(saved))):
            return f"other: the save has changed {changed[0]}"
        ours = _fresh(row)
        checkpoint = Checkpoint(**_tracked(ours))
        try:
            with CheckpointManager(checkpoint, folder + "/run", 1) as manager:
                if manager.restore_or_initialize() is None:
                    return "other: nothing was restored"
        except DistckptError as error:
            return f"refused at the restore: {_short(error)}"
    for name in _tracked(ours):
        ours[name] = getattr(checkpoint, name)
    if reference is None:
        return f"other: restored, where its own load_state_dict fails: {own_error}"
    return _compare(row, result, saved, reference, ours)


def _compare(
    row: Row, result: Result, saved: Bundle, reference: Bundle, ours: Bundle
) -> str:
    expected = reach(_tracked(reference))
    result.tensors, result.attributes = count(expected)
    found = [] if row.lazy else differences(expected, reach(_tracked(ours)))
    if found:
        return _other("restored", found)
    steps = range(row.before, row.before + FURTHER)
    torch.manual_seed(7)
    expected_outputs = row.train(reference, steps)
    torch.manual_seed(7)
    outputs = row.train(ours, steps)
    for step, (one, other) in enumerate(zip(expected_outputs, outputs, strict=True)):
        if not _is_same(one, other):
            return f"other: computes something else in step {step + 1}"
    if found := differences(reach(_tracked(reference)), reach(_tracked(ours))):
        return _other("after three further steps", found)
    torch.manual_seed(7)
    as_saved = row.train(saved, steps)
    result.goes_on = all(map(_is_same, as_saved, expected_outputs))
    if not (result.tensors or expected_outputs) or not (result.tensors + result.attributes):
        return "other: nothing was compared"
    return RIGHT


def _other(when: str, found: list[str]) -> str:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"other: {when}: {found[0]}{more}"


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        kind = f"{one.dtype} {one.shape}"
        other_kind = f"{other.dtype} {other.shape}"
        return Bits(kind, bits_of(one)) == Bits(other_kind, bits_of(other))
    return not differences(reach(one), reach(other))


def _tracked(bundle: Bundle) -> Bundle:
    return {name: value for name, value in bundle.items() if not name.startswith("_")}


def _fresh(row: Row) -> Bundle:
    """Make objects of another seed, so that what is not restored shows."""
    bundle = row.make(1)
    if row.warm:
        row.train(bundle, range(50, 50 + row.warm))
    return bundle


# The reference


def _made_again(row: Row) -> Bundle:
    bundle = row.make(0)
    row.train(bundle, range(row.before))
    return bundle


def _loaded_by_itself(row: Row, saved: Bundle) -> Bundle:
    """Make fresh objects, and let each load its own state dict, through a file."""
    states = {name: _state_of(value) for name, value in _tracked(saved).items()}
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    states = torch.load(file, weights_only=False)
    bundle = _fresh(row)
    for name, value in _tracked(bundle).items():
        bundle[name] = _loaded(value, states[name])
    return bundle


def _state_of(value: Any) -> Any:
    if isinstance(value, PerRank):
        return _state_of(value.value)
    if isinstance(value, dict) and not hasattr(value, "state_dict"):
        return {key: _state_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_state_of(item) for item in value]
    return value.state_dict() if hasattr(value, "state_dict") else value


def _loaded(value: Any, state: Any) -> Any:
    if isinstance(value, PerRank):
        value.value = _loaded(value.value, state)
    elif isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.copy_(state)
    elif hasattr(value, "load_state_dict"):
        value.load_state_dict(state)
    elif isinstance(value, dict):
        for key in [*value]:
            value[key] = _loaded(value[key], state[key])
    elif isinstance(value, list):
        value[:] = map(_loaded, value, state)
    else:
        return state
    return value


@contextmanager
def _one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MESSAGE else text[: _MESSAGE - 4] + " ..."


# The table

HEAD = """# Real objects of real libraries

Each row is saved and restored by distckpt and by the object's own `load_state_dict`, and
both results are compared: all tensors and plain attributes that can be reached, then three
further steps. After `launch/clients_env.sh`, this makes the page:
`.venv-clients/bin/python tests/clients/walk.py --write docs/clients.md`. Class `full` of
the tests holds it true.

- **right**: nothing differs from what the object's own protocol gives.
- **refused**: an error names the object, at the save or at the restore.
- **other** would be anything else; there is none.

The columns say how many tensors and how many plain attributes were compared. The last one
says whether the restored objects compute what the saved ones compute next: "no" means that
the library's own state dict leaves something out, so nobody can restore it from that.

"""


def page(results: list[Result]) -> str:
    """Return the page of documentation, in Markdown."""
    text = HEAD + f"Versions: {versions()}.\n"
    for library in dict.fromkeys(result.library for result in results):
        text += f"\n## {library}\n\n"
        text += "| object | result | tensors | attributes | goes on as saved |\n"
        text += "|---|---|---|---|---|\n"
        for result in results:
            if result.library == library:
                text += _line(result)
    return text


def _line(result: Result) -> str:
    refused = result.verdict.startswith("refused")
    numbers = ["", ""] if refused else [str(result.tensors), str(result.attributes)]
    goes_on = {True: "yes", False: "no", None: ""}[result.goes_on]
    # Neither a path of this run nor Markdown within a message.
    verdict = re.sub(r"/(tmp|dev/shm)/\S+/run", "run", result.verdict).replace("|", "\\|")
    verdict = verdict.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")
    return "| " + " | ".join([result.name, verdict, *numbers, goes_on]) + " |\n"


def versions() -> str:
    """Return the versions of all libraries of the table."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in (
        *("torch", "transformers", "peft", "torchao", "bitsandbytes", "schedulefree"),
        *("torchdata", "torchmetrics", "torchtitan", "accelerate", "lightning", "timm"),
    ):
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join(found)


def main() -> int:
    """Play rows; returns how many have another verdict than expected."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="of the names of rows to play")
    parser.add_argument("--write", type=Path, help="write the table to this page")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for row in rows():
        if arguments.part.lower() in f"{row.library}: {row.name}".lower():
            result = play(row)
            results.append(result)
            mark = "  " if result.is_expected else "! "
            print(
                f"{mark}{row.library}: {row.name}: {result.verdict}"
                f" [{result.tensors} tensors, {result.attributes} attributes,"
                f" goes on: {result.goes_on}, {result.seconds:.2f} s]",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results]))
    if arguments.write:
        arguments.write.write_text(page(results))
    wrong = sum(not result.is_expected for result in results)
    print(f"{len(results)} rows, {wrong} with another verdict than expected")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
