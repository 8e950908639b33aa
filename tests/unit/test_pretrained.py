"""A warm start: modules begin with what is in a checkpoint of any kind."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_helpers import save

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFound,
    ConfigError,
    FormatError,
    MismatchError,
    RestoreOptions,
    UnsupportedError,
    from_pretrained,
    readers,
)


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embedding = nn.Embedding(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embedding.weight


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def start(directory, init_fn, saves=True, **objects):
    """Make a new job; return its checkpoint and what it restored."""
    checkpoint = Checkpoint(**objects)
    with CheckpointManager(checkpoint, directory, 1, init_fn=init_fn) as manager:
        restored = manager.restore_or_initialize()
        if saves:
            manager.save()
    return checkpoint, restored


def as_checkpoint(folder, model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return save(folder / "base", model=model, optimizer=optimizer, epoch=7)


def as_run(folder, model):
    as_checkpoint(folder, model)
    return str(folder / "base")


def _state(model):
    """Return what ``save_pretrained`` would write: of tied tensors the first."""
    return {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}


def as_file(folder, model):
    save_file(_state(model), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_directory(folder, model):
    os.mkdir(folder / "hf")
    save_file(_state(model), folder / "hf" / "model.safetensors", {"format": "pt"})
    return folder / "hf"


def as_indexed_directory(folder, model):
    os.mkdir(folder / "hf")
    state = _state(model)
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / "hf" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "hf"


SOURCES = [as_checkpoint, as_run, as_file, as_directory, as_indexed_directory]


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__)
def source(request):
    return request.param


def test_modules_begin_with_it_and_nothing_else_does(tmp_path, source):
    """The optimizer, the counter and plain values are those of a new job."""
    base = Tied()
    path = source(tmp_path, base)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    live, restored = start(
        tmp_path / "new", from_pretrained(path), model=model, optimizer=optimizer, epoch=0
    )
    assert restored is None and same(model, base)
    assert model.head.weight is model.embedding.weight
    assert live.epoch == 0 and optimizer.param_groups[0]["lr"] == 0.5
    assert live.save_counter == 1


def test_a_run_that_has_a_checkpoint_wins(tmp_path, source):
    """The source is not even looked at, so it may be gone by then."""
    path = source(tmp_path, Tied())
    first = Tied()
    start(tmp_path / "new", from_pretrained(path), model=first)
    with torch.no_grad():
        first.embedding.weight.add_(1)
    start(tmp_path / "new", None, model=first)
    again = Tied()
    gone = from_pretrained(tmp_path / "not there")
    _, restored = start(tmp_path / "new", gone, model=again)
    assert restored is not None and not same(again, Tied())


def test_a_source_that_is_named_and_missing_is_an_error(tmp_path):
    """Never a silent start from scratch."""
    init_fn = from_pretrained(tmp_path / "not there")
    with pytest.raises(CheckpointNotFound):
        start(tmp_path / "new", init_fn, model=Tied())


def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path, source):
    """Strict, as every restore."""
    path = source(tmp_path, Tied(width=5))
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match=r"\[6, 5\]") as caught:
        start(tmp_path / "new", from_pretrained(path), model=model)
    assert "model/norm.running_mean" in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_parts_and_other_names_can_be_taken(tmp_path):
    """From a file, by the names of the file; from a checkpoint, by those of its tree."""
    base = Tied()
    file = as_file(tmp_path, base)

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(6, 4)
            self.fresh = nn.Linear(2, 2)

    for path, prefix in ((file, ""), (as_checkpoint(tmp_path, base), "model/")):
        model = Other()
        options = RestoreOptions(
            include=f"{prefix}tokens.*", rename={f"{prefix}embedding.": f"{prefix}tokens."}
        )
        start(tmp_path / f"new{prefix[:1]}", from_pretrained(path, options), model=model)
        assert torch.equal(model.tokens.weight, base.embedding.weight)


class Packed(nn.Module):
    """What it keeps is not what its state dict has."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(3, 3)
        self.packed = torch.ones(4)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}unpacked"] = self.packed * 2


@pytest.mark.parametrize("has_it", [True, False])
def test_what_a_state_dict_makes_anew_is_refused_by_name(tmp_path, has_it):
    """Filling it would change nothing in the module, whether the file has it or not."""
    base = Packed()
    state = {k: v for k, v in base.state_dict().items() if has_it or k != "unpacked"}
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    model = Packed()
    with pytest.raises(MismatchError, match="model/unpacked: made anew") as caught:
        start(tmp_path / "a", from_pretrained(path), model=model)
    assert "1 difference:" in str(caught.value)
    init_fn = from_pretrained(path, RestoreOptions(exclude="unpacked"))
    with pytest.raises(UnsupportedError, match="every save would fail"):
        start(tmp_path / "b", init_fn, saves=False, model=model)
    assert torch.equal(model.plain.weight, base.plain.weight)


def test_a_run_is_looked_up_once(tmp_path, monkeypatch):
    """Else a job that goes on there could change what is meant in between."""
    base = Tied()
    path = as_run(tmp_path, base)
    real, asked = readers.locate_newest, []

    def locate(path):
        asked.append(path)
        return real(path)

    monkeypatch.setattr(readers, "locate_newest", locate)
    model = Tied()
    start(tmp_path / "new", from_pretrained(path), model=model)
    assert same(model, base) and asked == [path]


def test_the_module_that_a_file_is_for_must_be_clear(tmp_path):
    """With two of them, the caller says so."""
    base = Tied()
    path = as_file(tmp_path, base)
    teacher, student = Tied(), Tied()
    with pytest.raises(ConfigError, match=r"\['student', 'teacher'\].*tracked_as"):
        start(tmp_path / "a", from_pretrained(path), teacher=teacher, student=student)
    init_fn = from_pretrained(path, tracked_as="teacher")
    start(tmp_path / "b", init_fn, teacher=teacher, student=student)
    assert same(teacher, base) and not same(student, base)


def test_a_broken_file_is_an_error_that_names_it(tmp_path):
    """Cut off, or no safetensors file at all."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match="weights"):
        start(tmp_path / "new", from_pretrained(path), model=Tied())


def test_a_module_without_ties_begins_with_a_file(tmp_path):
    """All its tensors are read in one go."""
    base, model = nn.Linear(3, 3), nn.Linear(3, 3)
    path = tmp_path / "weights.safetensors"
    save_file(base.state_dict(), path)
    start(tmp_path / "run", from_pretrained(path), model=model)
    assert torch.equal(model.weight, base.weight)
