"""What a restore will do on one rank, decided before a byte of a live object is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distckpt import tensors, torch_versions, values, wrapper_tensors
from distckpt.dtypes import FLOATS
from distckpt.errors import (
    DistckptError,
    MismatchError,
    RestoreFailed,
)
from distckpt.known import KnownTensor, KnownTensors
from distckpt.layout import ONE, SHARDED, SPLIT, WHOLE, Row
from distckpt.mismatch import NO_MATCH, NOT_HERE, mismatch
from distckpt.names import split_inner
from distckpt.near import near_names
from distckpt.restore_names import Names
from distckpt.taken import LiveValue, Taken
from distckpt.value_tags import Wrapper

_Item = TypeVar("_Item")


class Saved:
    """What a checkpoint has to offer, and what of it was asked for.

    Args:
        rows: Tensors by name.
        encoded: Plain values by name.
        names: What of it is restored, and what that is called here: all names below are
            those, but for the rows' own.
        knows_ties: Whether rows say which tensors share memory. A rank's own tensors
            are stored one by one, tied or not.
        knows_kinds: Whether values say which of them are the states of objects. Format 1
            does not.

    Raises:
        MismatchError: Two names of the checkpoint are called the same here.
    """

    def __init__(
        self,
        rows: Mapping[str, Row],
        encoded: Mapping[str, Any],
        names: Names,
        knows_ties: bool = True,
        knows_kinds: bool = True,
    ) -> None:
        self.names = names
        self.knows_ties = knows_ties
        self.knows_kinds = knows_kinds
        # Also what is not selected by itself: it may be part of a value that is.
        self._every_row = rows if names.are_all else _renamed(rows, names)
        self._every_value = encoded if names.are_all else _renamed(encoded, names)
        self.rows = self._every_row if names.are_all else _selected(self._every_row, names)
        self._values = (
            self._every_value if names.are_all else _selected(self._every_value, names)
        )
        self._taken: set[str] = set()

    @cached_property
    def _below(self) -> dict[str, list[str]]:
        below: dict[str, list[str]] = {}
        for name in (*self.rows, *self._values):
            below.setdefault(name.rpartition("/")[0], []).append(name)
        return below

    def names_below(self, path: str) -> list[str]:
        """Return the names directly below a path, tensors first, in saved order."""
        return self._below.get(path, [])

    def names_under(self, prefix: str) -> list[str]:
        """Return all names that begin so."""
        return [n for n in (*self.rows, *self._values) if n.startswith(prefix)]

    def take_row(self, name: str) -> Row | None:
        """Return a tensor's row and note that somebody wants it."""
        self._taken.add(name)
        return self.rows.get(name)

    def take_part(self, saved: str) -> tuple[str, Row | None]:
        """Return what a tensor in a plain value is called here, and its row.

        Args:
            saved: Its name in the checkpoint.
        """
        name = self.names.here(saved)
        self._taken.add(name)
        return name, self._every_row.get(name)

    def take_parts(self, wrapper: Wrapper) -> None:
        """Note that somebody knows of the tensors that another one is made of."""
        for part in wrapper.inner.values():
            if isinstance(part, Wrapper):
                self.take_parts(part)
            else:
                self.take_part(part.name)

    def take_value_and_parts(self, name: str) -> None:
        """Note that somebody knows of a tensor that is made of others, and of these."""
        self._taken.add(name)
        wrapper = self.wrapper(name)
        if wrapper is not None:
            self.take_parts(wrapper)

    def any_row(self, name: str) -> Row | None:
        """Return a tensor's row, whether it was asked for or not."""
        return self._every_row.get(name)

    def take_rows(self, names: Iterable[str]) -> None:
        """Note that somebody wants these tensors."""
        self._taken.update(names)

    def has_value(self, name: str) -> bool:
        """Tell whether there is a plain value of this name."""
        return name in self._values

    def class_of(self, name: str) -> str | None:
        """Return the class of the object that a value is the state of.

        Returns:
            None for a plain value; empty if the checkpoint does not tell.
        """
        return values.class_of_state(self._values[name]) if self.knows_kinds else ""

    def any_value(self, name: str) -> Any:
        """Return a plain value, whether it is selected or not; None if there is none."""
        return values.decode(self._every_value.get(name))

    def take_values(self, names: Iterable[str]) -> None:
        """Note that something wants these plain values."""
        self._taken.update(names)

    def take_encoded(self, name: str) -> Any:
        """Return a plain value as it is stored."""
        self._taken.add(name)
        return self._values[name]

    def wrapper(self, name: str) -> Wrapper | None:
        """Return what a tensor that is made of others is; None if this is no such one."""
        return values.wrapper_of(self._values.get(name))

    def repeats(self, name: str, other: str) -> bool:
        """Tell whether a plain value is another one's again, without tensors; then take it.

        Nearly always the settings of thousands of parameters are one group's.
        """
        if self._values[name] == self._values[other]:
            self._taken.add(name)
            return True
        return False

    def same_value(self, one: str, other: str, but: str) -> bool:
        """Tell whether two plain values are the same, down to the tensors in them.

        Compared as they are stored: the tensors are not read yet, and NaN equals NaN.

        Args:
            one: Name of a value.
            other: Name of another one.
            but: Key of an item that is not compared.
        """
        first, second = (
            {key: item for key, item in value.items() if key != but}
            if isinstance(value, dict)
            else value
            for value in (self._values[one], self._values[other])
        )
        return bool(self._without_names(first) == self._without_names(second))

    def number_in_value(self, name: str, key: str) -> int | None:
        """Return a number among the items of a plain value; None if there is none."""
        value = self._values[name]
        item = value.get(key) if isinstance(value, dict) else None
        return item if type(item) is int else None

    def _without_names(self, encoded: Any) -> Any:
        if isinstance(encoded, list):
            return [self._without_names(item) for item in encoded]
        if not isinstance(encoded, dict):
            return encoded
        if "$tensor" in encoded:
            row = self._every_row.get(self.names.here(encoded["$tensor"]))
            # A rank's own tensors do not tell which of them were one.
            return ["$tensor", row and self.knows_ties and (row.same_as or row.name)]
        return {key: self._without_names(item) for key, item in encoded.items()}

    def left_over(self) -> list[str]:
        """Return the names that nothing has asked for."""
        every = (*self.rows, *self._values)
        return [
            name for name in every if name not in self._taken and self.names.needs(name)
        ]

    def not_matched(self) -> list[str]:
        """Say of each pattern that has matched nothing so far which names are near."""
        patterns = self.names.never_matched()
        every = [*self._every_row, *self._every_value] if patterns else []
        return [
            f"{pattern}: {NO_MATCH}, neither in the checkpoint nor "
            f"here; near names are {', '.join(near_names(pattern, every, least=0))}"
            for pattern in patterns
        ]


@dataclass(slots=True)
class RestorePlan:
    """What a restore will do on this rank, decided before a byte is touched.

    Attributes:
        saved: What the checkpoint has to offer.
        known: What is known of the live tensors from earlier.
        reads: Tensors to be filled in place, by their names in the checkpoint.
        finishers: What to do once all ranks have read everything.
        problems: How checkpoint and live objects do not fit; one sentence each.
    """

    saved: Saved
    known: KnownTensors
    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    finishers: list[Callable[[], None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _names: dict[object, str] = field(default_factory=dict)
    _new: dict[object, torch.Tensor] = field(default_factory=dict)

    def selects(self, name: str) -> bool:
        """Tell whether what is called so here is restored at all."""
        return self.saved.names.selects(name)

    def finish(self, path: str, body: Callable[[], object]) -> None:
        """Do something once all ranks have read everything.

        Args:
            path: Of the tracked object, which an error of user code then names.
            body: Does it; its result is of no interest.
        """
        self.finishers.append(partial(_named, path, body))

    def read_into(
        self, name: str, tensor: torch.Tensor, owner: torch.Tensor | None = None
    ) -> None:
        """Fill what this rank holds of a live tensor, if the checkpoint's fits.

        It may lie on the ranks otherwise than when it was saved.

        Args:
            name: Its name.
            tensor: Itself, or a view of it.
            owner: The tensor that it is a view of.
        """
        if not self.selects(name):
            return
        if wrapper_tensors.is_wrapper(tensor):
            self._read_parts(name, tensor)
            return
        known = self.known.describe(name, tensor)
        identity = known.identity if owner is None else tensors.identity_of(owner)
        self._read_into(name, tensor, known, identity)

    def read_described(
        self,
        names: Sequence[str],
        live: Sequence[torch.Tensor],
        known: Sequence[KnownTensor],
    ) -> None:
        """Fill tensors that are described already, all at once where nothing is special."""
        if not self.saved.names.are_all:
            for name, tensor, one in zip(names, live, known, strict=True):
                if self.selects(name):
                    self._read_into(name, tensor, one, one.identity)
            return
        rows = [*map(self.saved.rows.get, names)]
        identities = {one.identity for one in known}
        is_simple = (
            len(identities) == len(names)  # no two of them are one tensor
            and None not in identities
            and self._names.keys().isdisjoint(identities)
            and all(map(_fits, rows, known))
        )
        if is_simple:
            self.saved.take_rows(names)
            # Its own name, which is another one in a file of safetensors'.
            saved_names = [row.name for row in rows if row is not None]
            self.reads.update(zip(saved_names, live, strict=True))
            self._names.update(
                (one.identity, name) for one, name in zip(known, names, strict=True)
            )
            return
        for name, tensor, one in zip(names, live, known, strict=True):
            self._read_into(name, tensor, one, one.identity)

    def _read_into(
        self, name: str, tensor: torch.Tensor, known: KnownTensor, identity: object
    ) -> None:
        row = self.saved.take_row(name)
        if row is None:
            kind = self._kind_of(name)
            self.problems.append(f"{name}: a tensor here, {kind} in the checkpoint")
        elif not _fits(row, known) and not self._can_convert(row, known):
            self.problems.append(
                f"{name}: {row.dtype} {list(row.shape)} in the checkpoint, "
                f"{known.dtype} {list(known.shape)} here{torch_versions.lacks(row.dtype)}"
            )
        elif not self._is_read_already(name, row, identity):
            self.reads[row.name] = tensor

    def _read_parts(self, name: str, tensor: torch.Tensor) -> None:
        """Fill the tensors that a live one is made of, if it was saved as one like it."""
        here, inner = wrapper_tensors.flattened(name, tensor)
        saved = self.saved.wrapper(name)
        if saved is None:
            row = self.saved.take_row(name)
            there = f"{row.dtype} {list(row.shape)}" if row else self._kind_of(name)
            self.problems.append(
                f"{name}: a {here.class_name} here, {there} in the checkpoint"
            )
            return
        self.saved.take_values([name])
        reason = wrapper_tensors.difference(here, saved)
        if reason:
            self.saved.take_value_and_parts(name)
            self.problems.append(f"{name}: {reason}")
            return
        for inner_name, part in inner.items():
            self.read_into(inner_name, part)

    def _kind_of(self, name: str) -> str:
        """Say what the checkpoint has where a tensor is wanted and none is."""
        saved = self.saved.wrapper(name)
        if saved is not None:
            self.saved.take_value_and_parts(name)
            return f"a {saved.class_name}, which is made of other tensors,"
        return "a plain value" if self.saved.has_value(name) else "not there"

    def _can_convert(self, row: Row, known: KnownTensor) -> bool:
        return (
            self.saved.names.cast
            and row.shape == known.shape
            and {row.dtype, known.dtype} <= FLOATS
        )

    def _is_read_already(self, name: str, row: Row, identity: object) -> bool:
        """Read memory that has two names once, if the checkpoint says so too."""
        if identity is None or not self.saved.knows_ties:
            return False
        first = self._names.setdefault(identity, name)
        if first == name:
            return False
        other = self.saved.rows[first]
        if (row.same_as or row.name) != (other.same_as or other.name):
            self.problems.append(
                f"{name}: the same memory as {first} here, two tensors in the checkpoint"
            )
        return True

    def read_beside(
        self,
        name: str,
        parameter: torch.Tensor,
        device: torch.device,
        *,
        is_count: bool = False,
    ) -> torch.Tensor:
        """Allocate what an optimizer keeps for a parameter, to be filled.

        Beside a sharded parameter, what has its shape lies where it does. A step count is
        a plain tensor there, too.

        Args:
            name: Its name.
            parameter: The live parameter.
            device: Where a plain tensor belongs.
            is_count: Whether optimizers keep it as a plain tensor beside any parameter.
        """

        def allocate(row: Row, dtype: torch.dtype) -> torch.Tensor | None:
            if not tensors.is_sharded(parameter) or _is_plain(row, parameter, is_count):
                is_alike = row.shape == tuple(parameter.shape)
                is_there = device == parameter.device and not (
                    tensors.is_sharded(parameter) or wrapper_tensors.is_wrapper(parameter)
                )
                if is_alike and is_there:
                    # As torch makes it, with the parameter's memory format.
                    return tensors.empty_like(parameter, dtype)
                return tensors.empty_plain(row.shape, dtype, device)
            if row.shape == tuple(parameter.shape):
                return tensors.empty_like(parameter, dtype)
            if row.sharding is None or row.sharding.is_replicated:
                # Of another shape than the parameter: every rank has all of it, as of
                # what torch makes from a sharded gradient (``new_zeros``).
                return tensors.empty_replicated(parameter, row.shape, dtype)
            return None

        return self._read_new(name, self.saved.take_row(name), allocate, device)

    def check_shape_of_state(
        self, name: str, parameter_name: str, parameter: torch.Tensor
    ) -> None:
        """Report state that has the shape of its parameter in the checkpoint, not here.

        Args:
            name: The state's name.
            parameter_name: The parameter's.
            parameter: The live parameter.
        """
        row, of = self.saved.rows.get(name), self.saved.any_row(parameter_name)
        if row is None or of is None or of.shape == tuple(parameter.shape):
            return
        # Factored moments have ones where the parameter has more.
        if _spans(row.shape, of.shape) and not _spans(row.shape, tuple(parameter.shape)):
            self.problems.append(
                f"{name}: {row.dtype} {list(row.shape)} in the checkpoint, for a parameter "
                f"that is {list(parameter.shape)} here; exclude {parameter_name!r}"
            )

    def read_for_loading(
        self,
        name: str,
        like: torch.Tensor | None,
        device: torch.device | None,
    ) -> torch.Tensor:
        """Allocate a tensor as it was saved, to be filled and given to ``load_state_dict``.

        Args:
            name: Its name.
            like: A live tensor to take the layout of; None: a plain tensor.
            device: Where a plain one belongs.
        """

        def allocate(row: Row, dtype: torch.dtype) -> torch.Tensor:
            if (
                like is not None
                and tensors.is_sharded(like)
                and row.shape == tuple(like.shape)
            ):
                return tensors.empty_like(like, dtype)
            return tensors.empty_plain(row.shape, dtype, device or "cpu")

        return self._read_new(name, self.saved.take_row(name), allocate, device)

    def read_whole(self, name: str) -> torch.Tensor:
        """Allocate a plain tensor for one of the checkpoint, to be filled."""

        def allocate(row: Row, dtype: torch.dtype) -> torch.Tensor:
            return tensors.empty_plain(row.shape, dtype)

        row = self.saved.take_row(name)
        if row is None:
            self.missing(name, "a tensor")
            return tensors.empty_plain((0,), torch.uint8)
        return self._read_new(name, row, allocate, None)

    def _read_like_live(
        self, saved_name: str, live: LiveValue, device: torch.device | None
    ) -> torch.Tensor:
        """Allocate a tensor inside a plain value; sharded, if one lies there so now.

        However it was saved: the averages that one process keeps of a plain model become
        those of a sharded one. What another tensor is made of lies where it does now.
        """
        name, saved = self.saved.take_part(saved_name)
        is_part = bool(split_inner(name)[1])

        def allocate(row: Row, dtype: torch.dtype) -> torch.Tensor | None:
            own = None
            if row.kind == SHARDED or is_part or tensors.any_sharded():
                own = live.tensors.get(name)
            if own is not None and tensors.is_sharded(own):
                is_known = False
                if row.shape == tuple(own.shape):
                    return tensors.empty_like(own, dtype)
            else:
                is_known = own is not None or not _in_a_job()
            if row.kind == SHARDED and not is_known:
                return None
            where = None
            if is_part:
                where = device if own is None else own.device
            return tensors.empty_plain(row.shape, dtype, where or "cpu")

        return self._read_new(name, saved, allocate, device if is_part else None)

    def _read_new(
        self,
        name: str,
        row: Row | None,
        allocate: Callable[[Row, torch.dtype], torch.Tensor | None],
        where: object,
    ) -> torch.Tensor:
        if row is None:
            msg = f"{name}: a value refers to this tensor, and it is not there."
            raise MismatchError(msg)
        # What was one tensor when it was saved becomes one again.
        key = (row.same_as or row.name, where) if self.saved.knows_ties else row.name
        tensor = self._new.get(key)
        if tensor is None:
            tensor = allocate(row, torch_versions.dtype_of_name(row.dtype, row.name))
            if tensor is None:
                self.problems.append(
                    f"{name}: {row.dtype} {list(row.shape)}, {row.kind} in the checkpoint, "
                    "nothing here that tells how it should lie on the ranks; have it made "
                    "before restoring (for an optimizer, by one step)"
                )
                return tensors.empty_plain((0,), torch.uint8)
            self._new[key] = self.reads[row.name] = tensor
        return tensor

    def take_value(
        self,
        name: str,
        live: Callable[[], Any] | None = None,
        device: torch.device | None = None,
    ) -> Taken:
        """Take a plain value, to be made once its tensors are filled.

        Args:
            name: Its name.
            live: Returns the value that is in its place now. It may run user code; called
                only if the value has instances of classes, or tensors one of which was
                saved sharded or may be sharded here.
            device: Where the parts of a tensor belong that is made of others, and is not
                there yet.
        """
        encoded = self.saved.take_encoded(name)
        found = values.survey(encoded)
        live_value = LiveValue(name, live)
        parts = {
            saved_name: self._read_like_live(saved_name, live_value, device)
            for saved_name in found.tensors
        }
        taken = Taken(name, encoded, parts, live_value if found.has_instances else None)
        if found.has_instances or found.has_torch:
            self.problems += taken.problems()
        return taken

    def missing(self, name: str, what: str, there: str = "not there") -> None:
        """Note that the checkpoint lacks something."""
        self.problems.append(f"{name}: {what} here, {there} in the checkpoint")

    def unclaimed(self) -> list[str]:
        """Say what nothing on this rank has a use for: names, and patterns of options."""
        return [*unexpected(self.saved.left_over()), *self.saved.not_matched()]

    def raise_problems(self, what: str) -> None:
        """Raise ``MismatchError`` listing every problem, if there is any.

        What nobody here has asked for is listed too, but is no problem by itself:
        another rank may track it.
        """
        if self.problems:
            raise mismatch(what, [*self.problems, *self.unclaimed()])


def _renamed(by_name: Mapping[str, _Item], names: Names) -> dict[str, _Item]:
    renamed: dict[str, _Item] = {}
    saved_as: dict[str, str] = {}
    for saved, item in by_name.items():
        here = names.here(saved)
        if here in renamed:
            msg = (
                f"rename: {saved_as[here]!r} and {saved!r} of the checkpoint would both be "
                f"called {here!r}."
            )
            raise MismatchError(msg)
        renamed[here], saved_as[here] = item, saved
    return renamed


def _selected(by_name: Mapping[str, _Item], names: Names) -> dict[str, _Item]:
    return {name: item for name, item in by_name.items() if names.selects(name)}


def _fits(row: Row | None, known: KnownTensor) -> bool:
    return row is not None and row.dtype == known.dtype and row.shape == known.shape


def _spans(shape: Sequence[int], of: Sequence[int]) -> bool:
    """Tell whether a shape has as many dimensions as another, each as long or 1."""
    if len(shape) != len(of):
        return False
    return all(length in (1, other) for length, other in zip(shape, of, strict=True))


def _named(path: str, body: Callable[[], object]) -> None:
    try:
        body()
    except DistckptError:
        raise
    except Exception as error:
        msg = f"{path}: {type(error).__name__}: {error}"
        raise RestoreFailed(msg) from error


def _in_a_job() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_plain(row: Row, parameter: torch.Tensor, is_count: bool) -> bool:
    """Tell whether what was saved is a plain tensor beside a sharded parameter, too."""
    if row.kind in (WHOLE, ONE):
        # Saved beside a sharded one. With more elements it cannot be kept beside one that
        # is cut: there, each rank's would be another part.
        return prod(row.shape) <= 1 or not tensors.is_cut(parameter)
    if row.kind == SPLIT and not row.shape:
        # Saved beside a plain one. Where all has no dimensions, only the key tells.
        return parameter.dim() > 0 or is_count
    return False


def unexpected(names: Iterable[str]) -> list[str]:
    """Say of each name that the checkpoint has it and the live objects do not."""
    return [f"{name}: {NOT_HERE}" for name in names]
