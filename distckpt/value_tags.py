"""What plain values consist of, and what stands for it in a file; see ``values.py``."""

from __future__ import annotations

import math
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import methodcaller
from typing import Any, NamedTuple

MAX_DEPTH = 64
MAX_INT_BITS = 4096
_LARGEST_INT = 1 << MAX_INT_BITS
SCALARS = frozenset((type(None), bool, int, float, str))
_LARGE = 1000
WRAPPER = "$wrapper"
# What stands for the default of a ``defaultdict``; others are taken from a live one.
FACTORIES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (int, float, complex, bool, str, bytes, list, tuple, dict, set, frozenset)
}
FACTORIES |= {kind.__name__: kind for kind in (deque, Counter, OrderedDict)}
NO_FACTORY, OTHER_FACTORY = "None", "?"
NAMES_OF_FACTORIES = {kind: name for name, kind in FACTORIES.items()}

# Kinds of torch's own descriptions that can be stored, by the type's name in torch.
TORCH_KINDS = ("dtype", "device", "layout", "memory_format", "qscheme")
SIZE = "Size"


class _Nothing:
    """Stands for a live value that is not there."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING: Any = _Nothing()


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands in a tree of values for a tensor that is stored beside it."""

    name: str


class Wrapper(NamedTuple):
    """A tensor that is made of others (``__tensor_flatten__``), without their elements.

    Attributes:
        class_name: Of its class.
        context: What ``__tensor_flatten__`` says of it besides, encoded.
        shape: Its own shape.
        stride: Its own strides.
        dtype: Its own dtype, as torch calls it.
        requires_grad: Whether it does.
        inner: The tensors that it is made of, by attribute: names, or further wrappers.
    """

    class_name: str
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool
    inner: dict[str, TensorRef | Wrapper]

    @property
    def encoded(self) -> dict[str, Any]:
        """What stands in a file."""
        inner = {
            name: one.encoded if isinstance(one, Wrapper) else {"$tensor": one.name}
            for name, one in self.inner.items()
        }
        fields = [
            *(self.class_name, self.context, list(self.shape), list(self.stride)),
            *(self.dtype, self.requires_grad, inner),
        ]
        return {WRAPPER: fields}


def is_plain(value: object) -> bool:
    """Tell whether JSON has a value just as it is, down to its last item.

    That is so of most of what is large. It is found out level by level, in the
    interpreter's own loops: walking two million numbers one by one takes seconds.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        kinds = {*map(type, level)}
        if not are_exact(level, kinds):
            return False
        inner = kinds - SCALARS
        if not inner:
            return True
        if not inner <= {list, dict}:
            return False
        containers = level
        if len(kinds) > len(inner):
            containers = [item for item in level if type(item) in inner]
        if len({*map(id, containers)}) < len(containers):
            return False  # perhaps one that contains itself
        lists, dicts = containers, []
        if dict in inner:
            dicts = [item for item in containers if type(item) is dict]
            lists = [item for item in containers if type(item) is list]
            if not are_plain_keys(dicts):
                return False
        small = [item for item in lists if len(item) < _LARGE]
        if len(small) < len(lists):
            # A long list of scalars ends here; see is_large_and_flat.
            for items in lists:
                if len(items) >= _LARGE:
                    kinds = {*map(type, items)}
                    if not kinds <= SCALARS:
                        small.append(items)
                    elif not are_exact(items, kinds):
                        return False
            lists = small
        level = [*chain.from_iterable(lists)]
        level += chain.from_iterable(map(dict.values, dicts))
    return False


def is_large_and_flat(items: Sequence[Any]) -> bool:
    """Tell whether a list is long, and has no containers in it.

    Such a list is not put on one level with others, in which it would be walked again.
    """
    return len(items) >= _LARGE and are_scalars(items)


def are_exact(items: Sequence[Any], kinds: set[type]) -> bool:
    """Tell whether JSON has all the numbers among some items."""
    if int in kinds:
        numbers = items if kinds == {int} else [i for i in items if type(i) is int]
        try:
            array("q", numbers)
        except OverflowError:  # more than 64 bits
            if max(numbers) >= _LARGEST_INT or min(numbers) <= -_LARGEST_INT:
                return False
    if float in kinds:
        numbers = items if kinds == {float} else [i for i in items if type(i) is float]
        if not all(map(math.isfinite, numbers)):
            return False
    return True


is_tag = methodcaller("startswith", "$")


def are_plain_keys(dicts: Sequence[dict[Any, Any]]) -> bool:
    """Tell whether all keys of some dicts are strings, and none looks like a tag."""
    keys = [*chain.from_iterable(dicts)]
    return {*map(type, keys)} <= {str} and not any(map(is_tag, keys))


def are_all_exact(*lists: Sequence[Any]) -> bool:
    """Tell whether JSON has all items just as they are, without looking into any."""
    for items in lists:
        kinds = {*map(type, items)}
        if not (kinds <= SCALARS and are_exact(items, kinds)):
            return False
    return True


def are_scalars(items: Iterable[Any]) -> bool:
    """Tell whether no container is among some items of a tree of JSON."""
    return {*map(type, items)} <= SCALARS
