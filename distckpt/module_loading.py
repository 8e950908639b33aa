"""What a module does when its state is loaded, and which of it must run at a restore.

A restore fills parameters and buffers in their own memory. ``nn.Module.load_state_dict`` of
plain modules does no more than that. Hooks and overridden loaders do: they rename, convert,
resize, and rebuild what is derived from the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from distckpt import modules
from distckpt.modules import CanonicalNames
from distckpt.names import escaped

# A restore in place loses nothing of the load code that is defined here. That is for state
# of old versions of torch, for names with a wrapper's prefix, and for FSDP2, whose
# parameters are put back when the state dict is taken.
_PLAIN = ("torch.nn.", "torch.distributed.")

# torch's name for what ``set_extra_state`` takes.
EXTRA_STATE = "_extra_state"


class Loading(NamedTuple):
    """The load code of a module's members that a restore must run.

    Attributes:
        scopes: Beginnings of the full names that hooks or loaders must see as they were
            saved: of all that is in the members that have them.
        has_post_hooks: Whether hooks are to run when all is loaded.
        is_overridden: Whether the module's own ``load_state_dict`` is another one.
    """

    scopes: tuple[str, ...]
    has_post_hooks: bool
    is_overridden: bool

    @property
    def must_run(self) -> bool:
        """Whether a restore in place is not all."""
        return bool(self.scopes) or self.has_post_hooks

    def covers(self, name: str) -> bool:
        """Tell whether an entry of the state dict is in one of the scopes."""
        return bool(self.scopes) and name.startswith(self.scopes)


def loading_of(path: str, module: nn.Module) -> Loading:
    """Look for load code of others than torch in a module.

    Args:
        path: Its path.
        module: Without wrappers around it.
    """
    scopes: list[str] = []
    has_post_hooks = False
    is_overridden = _is_overridden(module, "load_state_dict")
    canonical: Mapping[str, str] | None = None
    for raw, member in module.named_modules(remove_duplicate=False):
        if _sees_entries(member) or (not raw and is_overridden):
            canonical = canonical or CanonicalNames(module).of_members
            name = canonical[raw]
            scopes.append(f"{path}/{escaped(name)}." if name else f"{path}/")
        hooks = member._load_state_dict_post_hooks
        if hooks and any(map(_is_others, hooks.values())):
            has_post_hooks = True
    return Loading(tuple(scopes), has_post_hooks, is_overridden)


def _sees_entries(member: nn.Module) -> bool:
    if _is_overridden(member, "_load_from_state_dict"):
        return True
    hooks = member._load_state_dict_pre_hooks
    return bool(hooks) and any(map(_is_others, hooks.values()))


def _is_overridden(member: nn.Module, method: str) -> bool:
    if method in vars(member):
        return True
    for base in type(member).__mro__:
        if method in vars(base):
            return not _is_plain(base.__module__)
    return False


def _is_others(hook: Any) -> bool:
    """Tell whether a hook is defined elsewhere than in torch's plain modules."""
    # torch wraps hooks that take the module.
    function: Any = getattr(hook, "hook", hook)
    while isinstance(function, partial):
        function = function.func
    where = getattr(function, "__module__", None) or type(function).__module__
    return not _is_plain(str(where))


def _is_plain(module_name: str) -> bool:
    return module_name.startswith(_PLAIN)


def wrappers_hooks(module: nn.Module) -> list[Callable[[], object]]:
    """Return the load hooks of the wrappers around a module, as calls without arguments.

    Raises:
        LookupError: A wrapper has load code that must see names; its text says which.
    """
    calls: list[Callable[[], object]] = []
    for wrapper in modules.wrappers(module):
        if _sees_entries(wrapper) or _is_overridden(wrapper, "load_state_dict"):
            raise LookupError(type(wrapper).__name__)
        for hook in wrapper._load_state_dict_post_hooks.values():
            if _is_others(hook):
                # The type that torch calls them with.
                keys = nn.modules.module._IncompatibleKeys([], [])
                calls.append(partial(hook, wrapper, keys))
    return calls


def never_loaded(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the entries of a state dict that ``load_state_dict`` would not take.

    Args:
        module: Without wrappers around it.
        names: Of entries, without wrappers' prefixes.
    """
    if _is_overridden(module, "load_state_dict"):
        return []  # nothing tells without calling it
    own = modules.tensors_by_name(module)
    canonical = CanonicalNames(module).of_members
    members: dict[str, list[nn.Module]] = {}
    for raw, member in module.named_modules(remove_duplicate=False):
        members.setdefault(canonical[raw], []).append(member)
    lost = []
    for entry in names:
        name, _, last = entry.rpartition(".")
        if entry in own or (name in members and last == EXTRA_STATE):
            continue
        parents = [name for name in _above(entry) if name in members]
        if not any(_sees_entries(one) for name in parents for one in members[name]):
            lost.append(entry)
    return lost


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def versions_of(module: nn.Module, types: Iterable[type[nn.Module]]) -> dict[str, int]:
    """Return the versions of members' state dicts, where torch does not set them.

    torch passes them to ``_load_from_state_dict``, which may convert what is older.

    Args:
        module: Without wrappers around it.
        types: Of all members.
    """
    if not any(map(_has_version, {*types})):
        return {}
    canonical = CanonicalNames(module).of_members
    return {
        canonical[raw]: member._version
        for raw, member in module.named_modules()
        if _has_version(type(member))
    }


def metadata_of(
    module: nn.Module, versions: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """Make the ``_metadata`` of a state dict.

    Args:
        module: Without wrappers around it.
        versions: As ``versions_of`` returned them at the save; None: those of here.
    """
    canonical = CanonicalNames(module).of_members
    metadata: dict[str, dict[str, Any]] = {}
    for raw, member in module.named_modules():
        version = member._version
        if versions is not None and not _is_plain(type(member).__module__):
            version = versions.get(canonical[raw], nn.Module._version)
        metadata[raw] = {"version": version}
    return metadata


def _has_version(kind: type[nn.Module]) -> bool:
    return kind._version != nn.Module._version and not _is_plain(kind.__module__)


def key_maker(module: nn.Module, keys: Iterable[str]) -> Callable[[str], str]:
    """Return a function from names without wrappers' prefixes to keys of a state dict.

    Args:
        module: Without wrappers around it.
        keys: Of its state dict.
    """
    canonical = CanonicalNames(module)
    known = {canonical[key]: key for key in keys}
    raw_of: dict[str, str] = {}
    for raw, name in canonical.of_members.items():
        # Of two that have one name, torch's hooks have cleaned the shorter.
        if name not in raw_of or len(raw) < len(raw_of[name]):
            raw_of[name] = raw

    def key_of(name: str) -> str:
        if name in known:
            return known[name]
        parent, _, rest = name.rpartition(".")
        while parent not in raw_of:
            parent, _, part = parent.rpartition(".")
            rest = f"{part}.{rest}"
        raw = raw_of[parent]
        return f"{raw}.{rest}" if raw else rest

    return key_of
