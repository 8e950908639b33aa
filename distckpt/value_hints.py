"""What to do about a value that cannot be stored, by its type."""

from __future__ import annotations

from collections.abc import Mapping

_ANYTHING = (
    "Give it a state_dict() and a load_state_dict(), or store its plain content. "
    "docs/values.md lists what can be stored."
)

# By a class among those that a value's type is derived from.
_OF_CLASSES = {
    "torch.utils.data.dataloader.DataLoader": (
        "A DataLoader does not know its position. torchdata's StatefulDataLoader does: "
        "from torchdata.stateful_dataloader import StatefulDataLoader; it takes the same "
        "arguments."
    ),
    "torch.nn.modules.module.Module": (
        "Track the module itself, by Checkpoint(model=...), or in a list or dict of "
        "tracked objects."
    ),
    "torch.optim.optimizer.Optimizer": (
        "Track the optimizer itself, by Checkpoint(optimizer=...), or in a list or dict of "
        "tracked objects."
    ),
    "torch._C.Generator": (
        "Store value.get_state(), a tensor, and give it to set_state(); for torch's own "
        "random numbers track distckpt.RngState()."
    ),
    "torch.Tensor": (
        "Track the tensor itself, or have it in a list, a dict or the like: no path leads "
        "to it here."
    ),
    "numpy.random._generator.Generator": (
        "Store value.bit_generator.state, a dict, and set it again."
    ),
    "numpy.random.mtrand.RandomState": "Store value.get_state(), and call set_state().",
    "random.Random": "Store value.getstate(), and call setstate().",
    "numpy.ndarray": "Store numpy.asarray(value): its class would be lost.",
    "pandas.core.generic.NDFrame": (
        "Store value.to_dict(), or its columns as arrays (value.to_numpy())."
    ),
    "array.array": "Store numpy.array(value), or value.tolist().",
    "re.Pattern": "Store value.pattern, and compile it again.",
    "omegaconf.base.Container": "Store OmegaConf.to_container(value).",
    "io.IOBase": "A file belongs to this process: store its name, and value.tell().",
    "_io._IOBase": "A file belongs to this process: store its name, and value.tell().",
    "datetime.datetime": "Store value.isoformat(), or a datetime of datetime's own class.",
}

# By the type itself.
_OF_TYPES = {
    "builtins.function": "Code is not stored: store a name, and take it from the program.",
    "builtins.module": "Code is not stored: store a name, and import it in the program.",
    "builtins.type": "A class is code: store its name, and take it from the program.",
    "builtins.memoryview": "Store bytes(value).",
    "builtins.mappingproxy": "Store dict(value).",
    "functools.partial": "Code is not stored: store its arguments, and make it again.",
    "_thread.lock": "A lock belongs to this process: leave it out, and make a new one.",
    "_thread.RLock": "A lock belongs to this process: leave it out, and make a new one.",
}
for _name in ("builtin_function_or_method", "method", "method_descriptor"):
    _OF_TYPES[f"builtins.{_name}"] = _OF_TYPES["builtins.function"]

# By what a value can do: the first that it has.
_OF_METHODS = {
    "model_dump": "Store value.model_dump().",
    "__attrs_attrs__": "Store attrs.asdict(value).",
    "to_dict": "Store value.to_dict().",
}


def hint_for(value: object) -> str:
    """Return what to do about a value that cannot be stored."""
    kind = type(value)
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    for name in names:
        if name in _OF_CLASSES:
            return _OF_CLASSES[name]
    if isinstance(value, type):
        return _OF_TYPES["builtins.type"]
    if names[0] in _OF_TYPES:
        return _OF_TYPES[names[0]]
    saves, loads = (
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )
    if saves and not loads:
        return (
            "It has a state_dict() and no load_state_dict(), so nothing could be given "
            "back to it. Give it one, or track what its state_dict() returns in an object "
            "of yours that has both."
        )
    if loads and not saves:
        return "It has a load_state_dict() and no state_dict(): give it both."
    if saves and loads:
        return (
            "Track it itself, by Checkpoint(name=...), or in a list or dict of tracked "
            "objects: here its class would be lost."
        )
    if hasattr(value, "__next__"):
        return (
            "It can be walked only once. For model.parameters(), track the module itself: "
            "Checkpoint(model=model). For the position in data, use an object with a "
            "state_dict(), such as torchdata's StatefulDataLoader."
        )
    for method, hint in _OF_METHODS.items():
        if hasattr(value, method):
            return hint
    for base in (dict, list, tuple, set, frozenset):
        if isinstance(value, base):
            return f"Its class would be lost: store {base.__name__}(value)."
    if isinstance(value, Mapping):
        return "Store dict(value)."
    if names[0] in ("builtins.dict_keys", "builtins.dict_values", "builtins.dict_items"):
        return "Store list(value)."
    return _ANYTHING
