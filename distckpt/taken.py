"""Plain values of a checkpoint, made again with the classes and tensors of live ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from distckpt import instances, torch_versions, wrapper_tensors
from distckpt.arrays import Form
from distckpt.collector import collector_paused
from distckpt.errors import FormatError, UnsupportedError
from distckpt.tensor_paths import live_tensors
from distckpt.value_tags import NOTHING, Wrapper
from distckpt.values import Decoder, Live

_logger = logging.getLogger(__name__)


class LiveValue:
    """The value that is in the place of one of the checkpoint: asked for when needed.

    Args:
        name: Its name, for messages.
        ask: Returns it; may run user code. None: there is none.
    """

    def __init__(self, name: str, ask: Callable[[], Any] | None) -> None:
        self._name = name
        self._ask = ask

    @cached_property
    def _asked(self) -> Any:
        return NOTHING if self._ask is None else self._ask()

    @cached_property
    def value(self) -> Any:
        """It; ``NOTHING`` if there is none, or if user code fails to say it."""
        try:
            return self._asked
        except Exception as error:
            # Some objects have no state before they are given one.
            _logger.warning(
                "%s: asked for what it has now, it fails with %s: %s; the classes of "
                "instances in it are not known",
                self._name,
                type(error).__name__,
                error,
            )
            return NOTHING

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors in it, by name; whatever user code raises is raised.

        Without them tensors could come back in another layout than they have now.
        """
        return live_tensors(self._asked, self._name)

    @cached_property
    def classes(self) -> dict[str, type]:
        """The classes of instances in it, by name."""
        return {} if self.value is NOTHING else instances.classes_in(self.value)


class Taken:
    """A plain value of the checkpoint, which is made when its tensors are filled.

    Args:
        name: Its name, for messages.
        encoded: It, as it is stored.
        tensors: Those in it, by their names in the checkpoint.
        live: What is in its place now, if it has instances of classes.
    """

    def __init__(
        self,
        name: str,
        encoded: Any,
        tensors: Mapping[str, torch.Tensor],
        live: LiveValue | None,
    ) -> None:
        self._name = name
        self._encoded = encoded
        self._tensors = tensors
        self._live = live
        self._has_warned = False

    def value(self) -> Any:
        """Make it; each time new containers, with the same tensors."""
        maker = _Maker(self._name, self._tensors, self._live)
        live = self._live.value if self._live else NOTHING
        with collector_paused():
            value = maker.decode(self._encoded, live)
        if maker.unknown and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "%s: no object of class %s is there that could tell how to make one; plain "
                "values take its place",
                self._name,
                ", ".join(sorted(maker.unknown)),
            )
        return value

    def problems(self) -> Iterator[str]:
        """Say what of it cannot be made; no tensor is made of others for that."""
        maker = _Maker(self._name, self._tensors, self._live, makes_tensors=False)
        maker.decode(self._encoded, self._live.value if self._live else NOTHING)
        return (f"{self._name}: {problem}" for problem in maker.found)


class _Maker(Decoder):
    """Makes a value again, with its tensors and with the classes of live objects.

    Attributes:
        unknown: Names of classes of which no live object is there.
        found: What cannot be made.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        live: LiveValue | None,
        makes_tensors: bool = True,
    ) -> None:
        self._name = name
        self.unknown: set[str] = set()
        self.found: list[str] = []
        self._tensors = tensors
        self._live = live
        self._makes_tensors = makes_tensors

    def tensor(self, name: str) -> Any:
        return self._tensors[name]

    def array(self, form: Form, name: str) -> Any:
        # In the tensor's memory, which is filled by the time that anybody looks at it.
        memory = self._tensors[name].numpy()
        if memory.nbytes != form.size_bytes:
            msg = f"tensor {name!r} is no array of {form.dtype} {list(form.shape)}"
            raise FormatError(msg)
        return form.array_of(memory)

    def of_torch(self, kind: str, body: Any) -> Any:
        try:
            return torch_versions.described(kind, body)
        except UnsupportedError as error:
            self.found.append(str(error))
            return body

    def kind_of(self, class_name: str) -> Any:
        kind = self._live.classes.get(class_name) if self._live else None
        if kind is None:
            self.unknown.add(class_name)
        return kind

    def cannot_rebuild(self, class_name: str, error: ValueError) -> None:
        self.found.append(f"a {class_name} cannot be made again: {error}")

    def wrapper(self, wrapper: Wrapper, live: Live) -> Any:
        parts = {
            attribute: self.wrapper(part, getattr(live, attribute, NOTHING))
            if isinstance(part, Wrapper)
            else self._tensors[part.name]
            for attribute, part in wrapper.inner.items()
        }
        if any(part is None for part in parts.values()):
            return None  # what is found says why
        unknown, self.unknown = self.unknown, set()
        kind, context = self._class_and_context(wrapper, live, parts)
        lacking, self.unknown = self.unknown, unknown
        reason = ""
        if kind is None:
            reason = "this process has no such class; import the library that has it"
        elif lacking:
            names = ", ".join(sorted(lacking))
            reason = f"no object of class {names} is there that could tell how to make one"
        if reason:
            self.found.append(
                f"a {wrapper.class_name} cannot be made: {reason}, or have the tensor made "
                "before restoring (for an optimizer, by one step)"
            )
            return None
        if not self._makes_tensors:
            return NOTHING
        return wrapper_tensors.made(kind, wrapper, context, parts)

    def _class_and_context(
        self, wrapper: Wrapper, live: Live, parts: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        encoded = wrapper.context
        if self._makes_tensors:
            encoded = wrapper_tensors.context_on(wrapper, parts)
        if wrapper_tensors.is_wrapper(live):
            kind: Any = type(live)
            here = wrapper_tensors.flattened(self._name, live).wrapper
            if not wrapper_tensors.difference(here, wrapper):
                return kind, live.__tensor_flatten__()[1]
        kind = wrapper_tensors.loaded_class(wrapper.class_name)
        return kind, self.decode(encoded)
