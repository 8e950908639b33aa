"""Write a checkpoint in another program's format: streamed, read again, put in place whole.

What is held of a tensor is a piece of a few MiB, whatever the format. Nothing stands under
the target's name before all of it was written, synced, read again and compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distckpt import files, strict_json
from distckpt.errors import ChecksumError, ConfigError, UnsupportedError
from distckpt.formats import (
    dcp_names,
    dcp_write,
    pickle_write,
    safetensors_file,
    torch_load,
    torch_save,
)
from distckpt.formats.dcp_directory import DcpDirectory
from distckpt.formats.dcp_metadata import DcpTensor
from distckpt.formats.export_names import Chosen, choose
from distckpt.formats.foreign import (
    DCP,
    HUGGINGFACE,
    SAFETENSORS,
    TORCH,
    Advance,
    Tensor,
    Watched,
    compare,
)
from distckpt.formats.placing import Placing
from distckpt.names import split_inner
from distckpt.opened import OpenedCheckpoint
from distckpt.stored_tensor import StoredTensor

# Hugging Face's readers ask for it.
_METADATA = {"format": "pt"}
_HF_INDEX = "model.safetensors.index.json"
_HF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json")
# A tokenizer's files may have dozens of MiB; weights are never copied.
_MAX_CONFIG_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """What is exported, and how.

    Attributes:
        tracked_object: Only what is below this name, without it; None for all.
        patterns: Only names that one of these matches; all if empty.
        max_shard_bytes: Of huggingface: largest size of the tensors of one file.
        config: Of huggingface: a file, or a directory of files, to be copied beside.
        renamed: Of dcp: new names of tracked objects.
    """

    tracked_object: str | None = None
    patterns: Sequence[str] = ()
    max_shard_bytes: int = 5_000_000_000
    config: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written.

    Attributes:
        num_tensors: How many tensors, by all their names.
        num_values: How many plain values.
        size_bytes: Bytes of the tensors; tied ones count once.
    """

    num_tensors: int
    num_values: int
    size_bytes: int


def export(
    opened: OpenedCheckpoint, target: str, to: str, options: Options, advance: Advance
) -> Exported:
    """Write a checkpoint in another format.

    After return the target is durable and was read again; after an error nothing is there.

    Args:
        opened: The checkpoint.
        target: A file (safetensors, torch) or a directory; nothing may be there.
        to: One of ``foreign.EXPORTED``.
        options: What, and how.
        advance: Told how many bytes of tensors were written, and read again.

    Raises:
        ConfigError: The target is there, or there is nothing to export.
        UnsupportedError: The format has no place for something chosen.
        FormatError: The checkpoint's bytes, or those that were written, are wrong.
        StorageError: They cannot be read or written.
    """
    if to == DCP:
        return _export_dcp(opened, target, options, advance)
    tracked_object = options.tracked_object
    if to == HUGGINGFACE and tracked_object is None:
        tracked_object = "model"
    if options.config is not None and not files.exists(os.path.realpath(options.config)):
        msg = f"{options.config}: no such file or directory to copy from."
        raise ConfigError(msg)
    chosen = choose(opened, tracked_object, options.patterns)
    check = torch_save.check_writable if to == TORCH else safetensors_file.check_writable
    for name, tensor in chosen.tensors.items():
        check(tensor.dtype, name)
        outer, inner = split_inner(tensor.name)
        if inner and to == HUGGINGFACE:
            msg = (
                f"tensor {outer!r} is made of others (of a quantized weight, say), which "
                "nothing of Hugging Face's would read; choose other tensors with --only, "
                "or export to safetensors, torch or dcp."
            )
            raise UnsupportedError(msg)
    with Placing(target) as placing:
        if to == TORCH:
            _write_torch(placing.path, chosen, advance)
        elif to == SAFETENSORS:
            # What the safetensors package notes of tied tensors, too.
            metadata = {**_METADATA, **chosen.tied}
            _write_safetensors(placing.path, chosen.tensors, metadata, advance)
        else:
            _write_huggingface(placing.path, chosen, options, advance)
    num_names = len(chosen.tensors) + (len(chosen.tied) if to == TORCH else 0)
    return Exported(num_names, 0, chosen.size_bytes)


def size_to_write(opened: OpenedCheckpoint, to: str, options: Options) -> int:
    """Return how many bytes of tensors an export will write."""
    if to == DCP:
        items = dcp_names.items_of(opened, options.renamed).values()
        values = [item.value for item in items if not item.same_as]
        return sum(v.size_bytes for v in values if isinstance(v, StoredTensor))
    tracked_object = options.tracked_object or ("model" if to == HUGGINGFACE else None)
    return choose(opened, tracked_object, options.patterns).size_bytes


def _write_safetensors(
    path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], advance: Advance
) -> None:
    watched = {name: Watched(tensor, advance) for name, tensor in tensors.items()}
    safetensors_file.write(path, watched, metadata)
    facts = {name: one.facts() for name, one in watched.items()}
    with files.OpenFile(path) as file:
        compare(path, safetensors_file.read(file), facts, advance)


def _write_torch(path: str, chosen: Chosen, advance: Advance) -> None:
    watched = {name: Watched(tensor, advance) for name, tensor in chosen.tensors.items()}
    key_of = {name: str(index) for index, name in enumerate(watched)}
    names = {name: name for name in watched} | chosen.tied
    tree = {
        name: torch_save.stored_tensor(watched[own].dtype, watched[own].shape, key_of[own])
        for name, own in names.items()
    }
    with files.NewFile(path) as file:
        storages = {key_of[name]: one for name, one in watched.items()}
        file.finish(torch_save.write(file, 0, tree, storages))
    facts = {name: watched[own].facts() for name, own in names.items()}
    with files.OpenFile(path) as opened:
        compare(path, torch_load.read(opened, 0, opened.size_bytes), facts, advance)


def _write_huggingface(
    directory: str, chosen: Chosen, options: Options, advance: Advance
) -> None:
    files.make_directory(directory)
    parts = _files_of(chosen.tensors, options.max_shard_bytes)
    for file, tensors in parts.items():
        _write_safetensors(os.path.join(directory, file), tensors, _METADATA, advance)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": chosen.size_bytes},
            "weight_map": {name: file for file, own in parts.items() for name in own},
        }
        path = os.path.join(directory, _HF_INDEX)
        files.write_new_file(path, strict_json.dumps(index).encode())
    if options.config is not None:
        _copy_config(os.path.realpath(options.config), directory)


def _files_of(
    tensors: Mapping[str, StoredTensor], max_bytes: int
) -> dict[str, dict[str, StoredTensor]]:
    """Divide tensors among files as ``save_pretrained`` does, in their order."""
    files: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.size_bytes > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.size_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    count = len(files)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": f for i, f in enumerate(files, 1)}


def _copy_config(source: str, directory: str) -> None:
    """Copy a file, or the files of a directory that are no weights; links are followed."""
    paths = [source]
    if files.is_directory(source):
        names = files.list_directory(source)
        paths = [os.path.join(source, n) for n in names if not n.endswith(_HF_WEIGHTS)]
    for path in paths:
        real = os.path.realpath(path)
        if not files.is_directory(real):
            data = files.read_file(real, _MAX_CONFIG_BYTES)
            files.write_new_file(os.path.join(directory, os.path.basename(path)), data)


def _export_dcp(
    opened: OpenedCheckpoint, target: str, options: Options, advance: Advance
) -> Exported:
    if options.tracked_object is not None or options.patterns:
        msg = "a DCP checkpoint is exported as a whole: a job loads what it asks for."
        raise ConfigError(msg)
    items = dcp_names.items_of(opened, options.renamed)
    size = 0
    num_tensors = 0
    for name, item in items.items():
        if isinstance(item.value, StoredTensor):
            torch_save.check_writable(item.value.dtype, name)
            num_tensors += 1
            size += 0 if item.same_as else item.value.size_bytes
    with Placing(target) as placing:
        facts = dcp_write.write(placing.path, items, advance)
        with DcpDirectory(placing.path) as written:
            own = {n: written.tensor(n) for n, e in written.entries.items() if n in facts}
            # Tied ones were written once; they are read once.
            once = {
                n: facts[n] for n, item in items.items() if n in facts and not item.same_as
            }
            compare(placing.path, {n: own[n] for n in once}, once, advance)
            for name, entry in written.entries.items():
                if not isinstance(entry, DcpTensor):
                    _compare_value(written, name, items[name].value)
    return Exported(num_tensors, len(items) - num_tensors, size)


def _compare_value(written: DcpDirectory, name: str, value: object) -> None:
    expected, found = (torch_save.to_tree(one) for one in (value, written.value(name)))
    if pickle_write.dumps(found) != pickle_write.dumps(expected):
        msg = (
            f"{written.path}: {name!r} reads as {found!r:.100}, expected {expected!r:.100}."
        )
        raise ChecksumError(msg)
