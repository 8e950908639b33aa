"""Directories of a newer format, or with features that this version does not know."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from unit_helpers import (
    commit,
    flip_bit,
    make_chief,
    make_claimed,
    make_entry,
    make_record,
    make_saved,
    open_shard_at,
    record_path,
    save,
    write_attempt,
)

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointManager,
    NewerFormatError,
    __version__,
    chief,
    cli,
    paths,
    save_state,
    stamp,
    state,
)
from distckpt.errors import CorruptStateError, FencedError, ManifestError, ShardFileError
from distckpt.manifest import Manifest
from distckpt.record import Entry, Record, digest
from distckpt.run_directory import RunDirectory
from distckpt.shard_header import Draft
from distckpt.stamp import Stamp

VERSION = "7.3.1"
UNKNOWN_NEED = Stamp(version=VERSION, needs=("telepathy",))
UNKNOWN_NOTE = Stamp(version=VERSION, notes=("colour",))


def _with_stamp(stamp):
    return lambda data: replace(Record.decode(data), stamp=stamp).encode()


def _edited(data):
    # By hand: the checksum does not match any more.
    return data.replace(b'"format": "2-provisional.3"', b'"format": 3')


NEWER_RECORDS = {
    "format": _with_stamp(Stamp(3, VERSION)),
    "provisional-format": _with_stamp(Stamp("3-provisional.2", VERSION)),
    "format-by-hand": _edited,
    "feature": _with_stamp(UNKNOWN_NEED),
}


def _rewrite(path, change):
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(change(data))


def _tree_of(directory):
    """Return all names in a directory, with their bytes and times of change."""
    found = {}
    for folder, _, files in os.walk(directory):
        found[folder] = os.stat(folder).st_mtime_ns
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[path] = (os.stat(path).st_mtime_ns, file.read())
    return found


@pytest.fixture(params=NEWER_RECORDS)
def newer(request, run_dir):
    """Make a directory whose newest record is newer; with leftovers to be swept."""
    made = make_claimed(run_dir, keep=2)
    for number in (1, 2, 3):
        save(made, run_dir, number, step=number)
    made.begin(9, 0)  # a pending directory of a save that died
    made.close()
    _rewrite(record_path(run_dir, 4), NEWER_RECORDS[request.param])
    return run_dir


COMMANDS = [
    ["list"],
    ["show"],
    ["verify"],
    ["report", "--output", "OUTPUT"],
    ["watch", "--once"],
    ["doctor"],
    ["repair"],
    ["repair", "--yes"],
    ["prune", "--keep", "latest(1)"],
    ["prune", "--keep", "latest(1)", "--yes"],
    ["request-save", "--wait", "0"],
    ["export", "--to", "safetensors", "--output", "OUTPUT"],
    ["diff"],
    ["pin"],
    ["unpin"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_refuses_names_both_versions_and_changes_nothing(newer, tmp_path, command):
    """Also those that repair, prune and ask: each exits with 3."""
    before = _tree_of(newer)
    name, *options = [str(tmp_path / "out") if o == "OUTPUT" else o for o in command]
    path = newer if name not in ("pin", "unpin") else f"{newer}/ckpt-3"
    arguments = [path, path] if name == "diff" else [path]
    done = CliRunner().invoke(
        cli.main, [name, *arguments, *options], catch_exceptions=False
    )
    text = done.output
    assert done.exit_code == 3, text
    assert f"distckpt {__version__}" in text
    assert "format 3" in text or "'telepathy'" in text
    assert "reads formats 1 and 2" in text or VERSION in text
    assert not (tmp_path / "out").exists()
    assert _tree_of(newer) == before


@pytest.mark.parametrize(
    "call",
    [
        distckpt.latest_checkpoint,
        distckpt.get_checkpoint_state,
        distckpt.open,
        lambda path: next(distckpt.checkpoints_iterator(path)),
        lambda path: distckpt.pin(f"{path}/ckpt-3"),
        lambda path: distckpt.add_metrics(f"{path}/ckpt-3", {"loss": 1.0}),
        distckpt.request_save,
        lambda path: Checkpoint(x=1).restore(f"{path}/ckpt-3"),
        lambda path: CheckpointManager(Checkpoint(x=1), path, max_to_keep=1),
    ],
)
def test_library_refuses_and_changes_nothing(newer, call):
    """A reader, a request and a new job hear the same, and are no damage."""
    before = _tree_of(newer)
    with pytest.raises(NewerFormatError, match=r"00004\.json.*distckpt") as caught:
        call(newer)
    assert "repair" not in str(caught.value).partition("(If")[0]
    assert not isinstance(caught.value, distckpt.FormatError)
    assert _tree_of(newer) == before


def test_manager_that_was_made_before_does_not_claim(run_dir):
    """A newer job may claim between the constructor and the first call."""
    make_saved(run_dir)
    mine = make_chief(run_dir)
    _rewrite(record_path(run_dir, 2), NEWER_RECORDS["feature"])
    names = sorted(os.listdir(run_dir))
    with pytest.raises(NewerFormatError):
        mine.prepare_claim()
    assert sorted(os.listdir(run_dir)) == names


@pytest.mark.parametrize("is_written", [False, True], ids=["begin", "commit"])
def test_manager_is_fenced_by_a_claim_of_a_newer_version(run_dir, is_written):
    """A running job of this version hears that it is fenced, as by any other claim."""
    old = make_claimed(run_dir)
    saved = save(old, run_dir, 1)
    if is_written:
        attempt = old.begin(2, 0)
        shards = write_attempt(old, run_dir, attempt)
    newest = state.read_head(RunDirectory.at(run_dir))
    claim = replace(
        newest.record,
        number=newest.record.number + 1,
        previous=newest.digest,
        epoch=2,
        action="claim",
        stamp=UNKNOWN_NEED,
    )
    state.append(RunDirectory.at(run_dir), claim)
    with pytest.raises(FencedError, match=r"newer version of distckpt.*telepathy"):
        commit(old, attempt, shards) if is_written else old.begin(2, 0)
    old.close()
    assert os.path.isdir(os.path.join(run_dir, saved.published))


def test_copy_of_a_newer_record_beside_older_records_is_not_claimed(run_dir):
    """Records put back to an older state: what a newer version committed is kept."""
    saved = make_saved(run_dir)
    mine = make_chief(run_dir)
    _rewrite(os.path.join(run_dir, paths.STATE_FILE), NEWER_RECORDS["feature"])
    with pytest.raises(NewerFormatError, match=r"checkpoint: record.*telepathy"):
        mine.prepare_claim()
    assert os.path.isdir(saved.published)


def test_damaged_first_field_is_repaired_when_the_file_is_moved_away(run_dir, tmp_path):
    """The way out that the message names."""
    saved = make_saved(run_dir)
    path = record_path(run_dir, 2)
    flip_bit(path, len('{\n"format": "'))
    with pytest.raises(NewerFormatError, match="move it elsewhere and run"):
        state.read_head(RunDirectory.at(run_dir))
    shutil.move(path, tmp_path)
    done = CliRunner().invoke(cli.main, ["repair", run_dir, "--yes"])
    assert done.exit_code == 0, done.output
    assert distckpt.latest_checkpoint(run_dir) == saved.prefix


# Checkpoints


def test_published_attempt_of_a_newer_format_is_not_swept(run_dir):
    """A newer version died between publishing and committing it."""
    old = make_claimed(run_dir)
    save(old, run_dir, 1)
    attempt = old.begin(2, 0)
    write_attempt(old, run_dir, attempt)
    manifest = Manifest.decode(open_manifest(run_dir, 1)).encode()
    tree = json.loads(manifest)
    assert tree["needs"] == []
    os.rename(
        os.path.join(run_dir, attempt.pending), os.path.join(run_dir, attempt.published)
    )
    with open(os.path.join(run_dir, attempt.published, paths.MANIFEST_FILE), "wb") as file:
        file.write(manifest.replace(b'"needs": []', b'"needs": ["telepathy"]'))
    old.close()
    make_claimed(run_dir, restart=1).close()
    assert os.path.isdir(os.path.join(run_dir, attempt.published))


def open_manifest(directory, number):
    (name,) = (n for n in os.listdir(directory) if n.startswith(f"ckpt-{number}.e"))
    with open(os.path.join(directory, name, paths.MANIFEST_FILE), "rb") as file:
        return file.read()


@pytest.fixture
def copied(run_dir, tmp_path):
    """Make a copy without records whose manifest needs an unknown feature."""
    saved = make_saved(run_dir)
    copy = tmp_path / "ckpt-1.e1-0a0b0c0d"
    shutil.copytree(saved.published, copy)
    _rewrite(
        copy / paths.MANIFEST_FILE,
        lambda data: replace(Manifest.decode(data), stamp=UNKNOWN_NEED).encode(),
    )
    return copy


@pytest.mark.parametrize(
    "call",
    [distckpt.open, lambda path: Checkpoint(x=1).restore(path)],
    ids=["open", "restore"],
)
def test_manifest_that_needs_an_unknown_feature_is_refused(copied, call):
    """A checkpoint copied out of its run directory says it by itself."""
    with pytest.raises(NewerFormatError, match=r"manifest\.json: .*'telepathy'") as caught:
        call(copied)
    assert VERSION in str(caught.value)
    assert __version__ in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [["show"], ["verify"], ["export", "--to", "torch", "--output", "OUTPUT"]],
    ids=lambda command: command[0],
)
def test_command_on_such_a_manifest_exits_with_3(copied, tmp_path, command):
    """Neither "bad" nor a traceback."""
    name, *options = [str(tmp_path / "out") if o == "OUTPUT" else o for o in command]
    done = CliRunner().invoke(
        cli.main, [name, str(copied), *options], catch_exceptions=False
    )
    assert done.exit_code == 3, done.output
    assert "'telepathy'" in done.output


def test_restore_of_a_shard_that_needs_an_unknown_feature_does_not_fall_back(
    run_dir, monkeypatch
):
    """Training from an older checkpoint would lose what the newer one has."""
    step = torch.zeros(())
    with CheckpointManager(Checkpoint(step=step), run_dir, max_to_keep=None) as manager:
        manager.save()
        step += 1
        monkeypatch.setattr(save_state, "Draft", partial(Draft, written_by=UNKNOWN_NEED))
        manager.save()
    manager = CheckpointManager(Checkpoint(step=step), run_dir, max_to_keep=None)
    with manager, pytest.raises(NewerFormatError, match=r"safetensors: .*'telepathy'"):
        manager.restore_or_initialize()
    record = state.read_head(RunDirectory.at(run_dir)).record
    assert (len(record.live), record.bad) == (2, ())


def test_damaged_header_is_not_taken_for_a_newer_one(run_dir, caplog):
    """The manifest's digest decides before the header's own word."""
    saved = make_saved(run_dir)
    _rewrite(
        saved.shard(0), lambda data: data.replace(b"2-provisional.3", b"3-provisional.1")
    )
    with distckpt.open(saved.prefix) as opened, pytest.raises(distckpt.ChecksumError):
        opened["model/weight"].numpy()


# Notes


RED = (("colour", '"red"'), ("tags", '[1,{"a":null}]'))


def _noted_record():
    entry = replace(make_entry(1), unknown=RED)
    return make_record(live=(entry, make_entry(2)), last_preserved=1.0, stamp=UNKNOWN_NOTE)


def test_record_with_an_unknown_note_is_read_with_its_unknown_fields():
    """Fields of an entry are kept, also when they are encoded again."""
    record = _noted_record()
    assert b'"colour":"red","tags":[1,{"a":null}]' in record.encode()
    assert Record.decode(record.encode()) == record


def test_record_with_an_unknown_note_may_have_more_fields():
    """They are ignored; the checksum still counts."""
    data = _noted_record().encode()
    body, _, _ = data.rpartition(b',\n"checksum"')
    body += b',\n"mood": {"good": true}'
    whole = body + f',\n"checksum": "{digest(body)}"\n}}\n'.encode()
    assert Record.decode(whole) == _noted_record()
    for damaged in (whole.replace(b"true", b"null"), whole[:-1], whole + b"\n"):
        with pytest.raises(CorruptStateError, match=r"checksum|not a record"):
            Record.decode(damaged)


def test_unknown_fields_without_a_note_are_damage():
    """Nothing announces them."""
    record = replace(_noted_record(), stamp=stamp.CURRENT)
    with pytest.raises(CorruptStateError, match="entry"):
        Record.decode(record.encode())


def test_job_keeps_the_notes_and_unknown_fields_of_entries(run_dir):
    """An older version may run in between: it loses nothing that it does not know."""
    newer = make_claimed(run_dir)
    save(newer, run_dir, 1)
    newer.close()

    def noted(data):
        record = Record.decode(data)
        live = (replace(record.live[0], unknown=RED),)
        return replace(record, live=live, stamp=UNKNOWN_NOTE).encode()

    _rewrite(record_path(run_dir, 2), noted)
    older = make_claimed(run_dir, restart=1)
    save(older, run_dir, 2)
    older.close()
    record = state.read_head(RunDirectory.at(run_dir)).record
    assert record.stamp == Stamp(version=__version__, notes=("colour",))
    assert [entry.unknown for entry in record.live] == [RED, ()]


def test_manifest_and_header_with_unknown_notes_are_read(run_dir, monkeypatch):
    """More fields may follow those that are known."""
    made = make_claimed(run_dir)
    attempt = made.begin(1, 0)
    monkeypatch.setattr(
        "distckpt.shard_file.Draft", partial(_NotedDraft, written_by=UNKNOWN_NOTE)
    )
    shards = write_attempt(made, run_dir, attempt)
    monkeypatch.setattr(chief, "Manifest", partial(Manifest, stamp=UNKNOWN_NOTE))
    commit(made, attempt, shards)
    made.close()
    with distckpt.open(run_dir) as opened:
        for tensor in opened.values():
            tensor.numpy()
    done = CliRunner().invoke(cli.main, ["verify", run_dir], catch_exceptions=False)
    assert done.exit_code == 0, done.output


class _NotedDraft(Draft):
    """A header with a field that this version does not know."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self._ours = self._ours[:-1] + ',"mood":1}'


def test_manifest_with_more_fields_needs_a_note():
    """Without one they are damage."""
    from test_manifest import SAMPLE, TREE, encode_tree

    noted = {**TREE, **UNKNOWN_NOTE.fields, "mood": 1}
    assert Manifest.decode(encode_tree(noted)) == replace(SAMPLE, stamp=UNKNOWN_NOTE)
    with pytest.raises(ManifestError, match="fields"):
        Manifest.decode(encode_tree({**TREE, "mood": 1}))


# The stamp


BAD_STAMPS = {
    "no-format": {"number": 1},
    "zero": {"format": 0},
    "true": {"format": True},
    "negative": {"format": -1},
    "float": {"format": 2.0},
    "null": {"format": None},
    "word": {"format": "new"},
    "leading-zero": {"format": "02-provisional.1"},
    "other-digits": {"format": "٢-provisional.1"},
    "no-lists": {"format": "2-provisional.3"},
    "format-1-not-first": {"number": 1, "format": 1},
    "not-first": {"number": 1, **Stamp().fields},
    "other-order": dict(reversed(Stamp().fields.items())),
    "number-for-version": {**Stamp().fields, "version": 1},
    "empty-version": {**Stamp().fields, "version": ""},
    "control-characters": {**Stamp().fields, "version": "\x1b[31m"},
    "needs-text": {**Stamp().fields, "needs": "telepathy"},
    "needs-number": {**Stamp().fields, "needs": [1]},
    "needs-unsorted": {**Stamp().fields, "needs": ["b", "a"]},
    "needs-twice": {**Stamp().fields, "needs": ["a", "a"]},
    "needs-upper-case": {**Stamp().fields, "needs": ["A"]},
    "needs-many": {**Stamp().fields, "needs": sorted(f"n{i}" for i in range(65))},
    "notes-null": {**Stamp().fields, "notes": None},
}


@pytest.mark.parametrize("name", BAD_STAMPS)
def test_stamp_with_this_fault_is_none(name):
    """It is damage, and the caller's to refuse as such."""
    assert stamp.read_stamp(dict(BAD_STAMPS[name]), stamp.RECORD) is None


@pytest.mark.parametrize("kind", [stamp.RECORD, stamp.MANIFEST, stamp.SHARD_FILE])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"format": 2}, "format 2, written by another version of distckpt"),
        ({"format": 3, "version": "9.0"}, "format 3, written by distckpt 9.0"),
        ({"format": "3-provisional.7", "version": 9}, "format 3-provisional.7, written"),
        ({"format": 10**30}, "format 1000000"),
        ({**Stamp().fields, "needs": ["a", "b"]}, "needs 'a', 'b'"),
    ],
)
def test_newer_stamp_is_refused_with_both_versions(kind, fields, text):
    """The advice is that of the kind: only records can be repaired."""
    with pytest.raises(NewerFormatError, match=text) as caught:
        stamp.read_stamp(dict(fields), kind)
    said = str(caught.value)
    assert f"distckpt {__version__}" in said
    assert said.startswith(kind)
    assert ("repair" in said) == (kind == stamp.RECORD)


@pytest.mark.parametrize("each", [stamp.FIRST, stamp.CURRENT, UNKNOWN_NOTE])
def test_stamp_is_read_as_it_was_written(each):
    """And is taken out of the object."""
    tree = {**each.fields, "more": 1}
    assert stamp.read_stamp(tree, stamp.RECORD) == each
    assert tree == {"more": 1}


def test_shard_file_without_a_stamp_is_refused(tmp_path, run_dir):
    """As damage: nothing says that it is newer."""
    saved = make_saved(run_dir)
    path = tmp_path / "f"
    shutil.copy(saved.shard(0), path)
    _rewrite(path, lambda data: data.replace(b"2-provisional.3", b"2-previsional.1"))
    with pytest.raises(ShardFileError, match="without a format"):
        open_shard_at(path)


def test_entry_from_json_refuses_unknown_fields_by_default():
    """Only a record with an unknown note allows them."""
    tree = {**make_entry().to_json(), "colour": "red"}
    assert Entry.from_json(tree, allow_unknown=True).unknown == (("colour", '"red"'),)
    with pytest.raises(CorruptStateError):
        Entry.from_json(tree)
