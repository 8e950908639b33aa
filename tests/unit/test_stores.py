"""The contract of a store, which every implementation keeps; with errors at every verb.

A new implementation adds itself to ``MAKERS``.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from unit_helpers import make_attempt

from distckpt import state
from distckpt.boxes import whole
from distckpt.chief import Chief
from distckpt.errors import (
    DistckptError,
    FencedError,
    OutcomeUnknown,
    StorageError,
    UnsafeCheckpointError,
)
from distckpt.identity import Identity
from distckpt.janitor import Janitor
from distckpt.layout import WHOLE, Piece, Row, Table
from distckpt.leases import Lease, Leases
from distckpt.mailbox import PIN, Request, collect, post
from distckpt.manifest import Shard
from distckpt.readers import open_shard, read_manifest
from distckpt.retention import Retention
from distckpt.run_directory import RunDirectory
from distckpt.shard_file import Entry, write
from distckpt.storage.memory_store import MemoryStore
from distckpt.storage.posix_store import PosixStore
from distckpt.storage.store import Created, Creation, Place, Store
from distckpt.verify import verify_attempt

MAKERS = {"posix": PosixStore, "memory": MemoryStore}
ATTEMPT = make_attempt(3)
MOST = 2**20


@pytest.fixture(params=MAKERS)
def store(request):
    return MAKERS[request.param]()


@pytest.fixture
def folder(store, tmp_path):
    """Return the name of a run directory that is there."""
    name = str(tmp_path / "run")
    store.make_folder(name)
    return name


@pytest.fixture
def name(folder):
    return f"{folder}/file"


def cause_of(error):
    return type(error.value.__cause__)


# Small files


def test_created_file_has_its_bytes(store, folder, name):
    made = store.create(name, b"mine", f"{folder}/scratch")
    assert made.outcome is Created.MADE
    assert store.read(name, MOST) == b"mine"
    assert store.names(folder) == ["file"]


def test_name_that_is_taken_is_not_created_again(store, folder, name):
    store.create(name, b"theirs", f"{folder}/one")
    made = store.create(name, b"mine", f"{folder}/other")
    assert made.outcome is Created.TAKEN and made.error is not None
    assert store.read(name, MOST) == b"theirs"
    assert store.names(folder) == ["file"]


def test_file_that_has_these_very_bytes_was_created(store, folder, name):
    """So an answer that was lost is no failure: the bytes tell whose it is."""
    store.create(name, b"mine", f"{folder}/one")
    assert store.create(name, b"mine", f"{folder}/other").outcome is Created.MADE


def test_file_in_a_folder_that_is_not_there_is_not_created(store, folder):
    with pytest.raises(StorageError) as error:
        store.create(f"{folder}/no/file", b"", f"{folder}/no/scratch")
    assert cause_of(error) is FileNotFoundError


def test_of_many_who_create_one_name_one_succeeds(store, folder):
    """And all readers see its bytes, whole."""
    for number in range(20):
        name, found = f"{folder}/{number}", []
        barrier = threading.Barrier(4)

        def create(data, name=name, found=found, barrier=barrier):
            barrier.wait()
            made = store.create(name, data, f"{name}-{data[0]}.scratch")
            found.append((data, made.outcome))

        some = [bytes([i]) * 5000 for i in range(4)]
        threads = [threading.Thread(target=create, args=(data,)) for data in some]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made = [data for data, outcome in found if outcome is Created.MADE]
        assert len(found) == 4 and len(made) == 1
        assert {outcome for _, outcome in found} == {Created.MADE, Created.TAKEN}
        assert store.read(name, MOST) == made[0]


def test_file_is_replaced(store, folder, name):
    for data in (b"old", b"new"):
        store.replace(name, data, f"{folder}/{data.decode()}")
        assert store.read(name, MOST) == data
    assert store.names(folder) == ["file"]


def test_written_file_must_be_new(store, folder, name):
    store.write(name, b"first")
    with pytest.raises(StorageError) as error:
        store.write(name, b"second")
    assert cause_of(error) is FileExistsError
    assert store.read(name, MOST) == b"first"


def test_notes_are_appended(store, folder, name):
    for data in (b"a", b"b\n", b"c"):
        store.note(name, data)
    assert store.read(name, MOST) == b"ab\nc"


def test_removed_files_are_gone_and_may_be_gone_already(store, folder):
    for name in "abc":
        store.write(f"{folder}/{name}", b"")
    store.remove(folder, ["a", "x", "b"])
    assert store.names(folder) == ["c"]
    store.remove(folder, ["c", "a"], durable=True)
    assert store.names(folder) == []


def test_file_that_is_not_there_is_not_read(store, folder, name):
    for verb in (lambda: store.read(name, MOST), lambda: store.open(name)):
        with pytest.raises(StorageError) as error:
            verb()
        assert cause_of(error) is FileNotFoundError
        assert error.value.path == name and error.value.operation


def test_larger_file_than_expected_is_not_read(store, folder, name):
    store.write(name, b"12345")
    assert store.read(name, 5) == b"12345"
    with pytest.raises(StorageError, match="5 bytes, more than 4"):
        store.read(name, 4)


def test_folder_is_not_read(store, folder):
    for verb in (lambda: store.read(folder, MOST), lambda: store.open(folder)):
        with pytest.raises(UnsafeCheckpointError, match="not a regular file"):
            verb()


# Looking


def test_names_are_told_apart(store, folder, name):
    assert not store.exists(name) and not store.is_folder(name)
    store.write(name, b"")
    assert store.exists(name) and not store.is_folder(name)
    assert store.exists(folder) and store.is_folder(folder)
    assert store.link_target(name) is None and store.link_target(f"{folder}/no") is None


def test_names_in_a_folder_are_sorted_and_no_others(store, folder):
    for name in ("b", "a", ".hidden", "größe"):
        store.write(f"{folder}/{name}", b"")
    store.make_folder(f"{folder}/c/d")
    assert store.names(folder) == sorted(["b", "a", ".hidden", "größe", "c"])
    assert store.names(f"{folder}/c") == ["d"]
    assert store.names(f"{folder}/none") == []


def test_folder_is_made_with_its_parents_and_may_be_there(store, folder):
    for _ in range(2):
        store.make_folder(f"{folder}/a/b/c")
        assert store.is_folder(f"{folder}/a/b/c") and store.is_folder(f"{folder}/a")
    store.write(f"{folder}/file", b"")
    with pytest.raises(StorageError):
        store.make_folder(f"{folder}/file/below")


def test_stamp_changes_when_a_file_is_refreshed(store, folder, name):
    for verb in (store.stamp, store.refresh):
        with pytest.raises(StorageError) as error:
            verb(name)
        assert cause_of(error) is FileNotFoundError
    store.write(name, b"kept")
    before = store.stamp(name)
    assert store.stamp(name) == before
    while store.stamp(name) == before:  # as fine as the clock of the store
        store.refresh(name)
    assert store.read(name, MOST) == b"kept"


def test_store_keeps_two_writers_apart_and_leaves_nothing(store, folder):
    store.check_create(folder, f"{folder}/one", f"{folder}/other")
    assert store.names(folder) == []


def test_store_is_examined_and_tried_out(store, folder):
    names = (f".probe-{number}" for number in range(100))
    found = [*store.examine(folder), *store.try_out(folder, names)]
    assert found and all(finding.what for finding in found)
    assert {finding.verdict for finding in found} <= {"ok", "warning"}
    assert store.names(folder) == []


def test_owner_is_acquired_and_released(store, folder):
    owner = store.owner(folder)
    assert owner.acquire(0)
    owner.release()
    assert store.owner(folder).acquire(0)
    store.owner(folder).release()


def test_room_is_told(store, folder):
    room = store.room(folder)
    assert room.size_bytes is None or room.size_bytes > 0


# Attempts


def write_shard(store, folder, name="rank-0", data=b"shard", **options):
    options = {"size_bytes": 0, "is_image": False, **options}
    with store.new_shard(folder, ATTEMPT, name, **options) as file:
        file.write_at(2, [memoryview(data[2:3]), data[3:]])
        file.write_at(0, [data[:2]])
        file.finish(len(data))


def test_attempt_is_not_visible_before_it_is_published(store, folder):
    published = f"{folder}/{ATTEMPT.published}"
    store.begin(folder, ATTEMPT)
    write_shard(store, folder)
    assert not store.exists(published)
    assert ATTEMPT.published not in store.names(folder)
    assert store.unfinished(store.names(folder)) == [ATTEMPT]
    store.publish(folder, ATTEMPT, b"manifest")
    assert store.names(folder) == [ATTEMPT.published]
    assert store.names(published) == ["manifest.json", "rank-0"]
    assert store.read(f"{published}/rank-0", MOST) == b"shard"
    assert store.read(f"{published}/manifest.json", MOST) == b"manifest"
    assert store.unfinished(store.names(folder)) == []


def test_attempt_cannot_be_begun_twice_or_written_before(store, folder):
    with pytest.raises(StorageError):
        write_shard(store, folder)
    store.begin(folder, ATTEMPT)
    with pytest.raises(StorageError):
        store.begin(folder, ATTEMPT)
    write_shard(store, folder)
    with pytest.raises(StorageError):
        write_shard(store, folder)


def test_shard_that_was_not_finished_cannot_be_taken_for_one(store, folder):
    """Its writer died: it has not voted, so nobody publishes."""
    store.begin(folder, ATTEMPT)
    with suppress(RuntimeError), store.new_shard(folder, ATTEMPT, "f", 100, False) as file:
        file.write_at(0, [b"half"])
        raise RuntimeError
    assert store.clear(folder, ATTEMPT)
    assert store.names(folder) == []


def test_image_is_written_at_once(store, folder):
    store.begin(folder, ATTEMPT)
    image = np.full(2 * 4096 + 4096, 7, np.uint8)
    start = -image.ctypes.data % 4096
    part = memoryview(image)[start : start + 2 * 4096]
    with store.new_shard(folder, ATTEMPT, "image", 5000, True) as file:
        file.write_at(0, [part])
        file.finish(5000)
    store.publish(folder, ATTEMPT, b"")
    with store.open(f"{folder}/{ATTEMPT.published}/image") as opened:
        assert opened.size_bytes == 5000
        assert opened.read(0, 9000) == b"\7" * 5000


def test_discarded_attempt_is_gone(store, folder):
    store.begin(folder, ATTEMPT)
    write_shard(store, folder)
    store.publish(folder, ATTEMPT, b"")
    assert not store.clear(folder, ATTEMPT)
    store.discard(folder, ATTEMPT)
    assert store.names(folder) == []
    with pytest.raises(StorageError):
        store.discard(folder, ATTEMPT)


@pytest.mark.parametrize("is_own", [True, False])
def test_cleared_attempt_cannot_be_published_by_its_writer(store, folder, is_own):
    store.begin(folder, ATTEMPT)
    write_shard(store, folder)
    assert store.clear(folder, ATTEMPT, is_own=is_own)
    assert not store.clear(folder, ATTEMPT)
    for late in (
        lambda: write_shard(store, folder, "rank-1"),
        lambda: store.publish(folder, ATTEMPT, b""),
    ):
        with pytest.raises(StorageError):
            late()
    assert store.names(folder) == []


# Reading


@pytest.fixture
def opened(store, folder, name):
    store.write(name, bytes(range(256)) * 40)
    with store.open(name) as source:
        yield source


def test_open_file_is_read_by_offset(opened, name):
    content = bytes(range(256)) * 40
    assert (opened.path, opened.size_bytes) == (name, len(content))
    opened.expect_in_order()
    buffer = bytearray(100)
    assert opened.read_into(5000, memoryview(buffer)) == 100
    assert buffer == content[5000:5100]
    assert opened.read(10_200, 100) == content[10_200:]
    assert opened.read_into(10_230, memoryview(buffer)) == 10
    assert opened.read(20_000, 10) == b""


def test_open_file_is_read_in_pieces(opened):
    content, pieces = bytes(range(256)) * 40, []
    buffer = bytearray(1000)

    def have(piece):
        pieces.append(bytes(piece))

    assert opened.read_in_pieces(100, memoryview(buffer), 300, have) == 1000
    assert [len(piece) for piece in pieces] == [300, 300, 300, 100]
    assert b"".join(pieces) == bytes(buffer) == content[100:1100]
    pieces.clear()
    assert opened.read_in_pieces(10_000, memoryview(buffer), 100, have) == 240
    assert b"".join(pieces) == content[10_000:10_200]


def test_open_file_is_read_into_several_buffers(opened):
    content = bytes(range(256)) * 40
    buffers = [bytearray(size) for size in (1, 0, 300, 7)]
    assert opened.read_vector(11, [*map(memoryview, buffers)]) == 308
    assert b"".join(buffers) == content[11:319]
    assert opened.read_vector(10_140, [*map(memoryview, buffers)]) == 100


def test_open_file_is_read_on_when_its_name_is_gone(store, folder, opened):
    store.remove(folder, ["file"])
    assert opened.read(0, 3) == b"\0\1\2"


# The protocol on a store


ROW = Row("weight", "int64", (100,), WHOLE)
TABLE = Table((ROW,))


class Inline(Janitor):
    """Deletes at once, so that verbs come in one order."""

    def _submit(self, task):
        with suppress(StorageError):
            task()


def make_chief(directory):
    return Chief(
        directory,
        checkpoint_name="ckpt",
        retention=Retention(2),
        identity=Identity("job", 0),
        janitor=Inline(directory),
    )


def claim(chief):
    try:
        chief.prepare_claim()
        chief.finish_claim()
    except DistckptError:
        chief.abandon_claim()
        raise


def save(chief, directory, number):
    """Save a tensor whose elements are the number."""
    attempt = chief.begin(number, 0)
    try:
        data = np.full(100, number, np.int64)
        entry = Entry(Piece(ROW, whole(ROW.shape), 0), lambda: memoryview(data).cast("B"))
        written = write(
            directory.new_shard(attempt, 0, 1),
            [entry],
            attempt=attempt.published,
            rank=0,
            world_size=1,
            per_rank_values={},
        )
    except StorageError:
        chief.abandon(attempt)
        raise
    shards = [Shard(written.size_bytes, written.header, 0)]
    chief.commit(attempt, step=number, shards=shards, layouts=[TABLE], values={})


def read(directory):
    """Return the numbers that are committed, each with all its bytes right."""
    head = state.read_head(directory)
    entries = () if head is None else head.record.live
    for entry in entries:
        attempt = directory.attempt(entry.attempt)
        assert verify_attempt(attempt, entry.manifest).ok
        manifest = read_manifest(attempt, entry.manifest)
        with open_shard(attempt, manifest, 0) as reader:
            (stored,) = reader.header.entries.values()
            found = np.zeros(100, np.int64)
            reader.read_into(stored, 0, memoryview(found).cast("B"))
        assert (found == entry.attempt.number).all()
    return [entry.attempt.number for entry in entries]


def assert_nothing_is_left_over(directory):
    head = state.read_head(directory)
    names = {entry.attempt.published for entry in head.record.committed}
    there = [name for name in directory.names() if name[0] != "." and name != "checkpoint"]
    assert {*there} == names
    assert directory.unfinished(directory.names()) == []
    assert not [name for name in directory.places.records.names() if name[0] == "."]


def test_job_saves_drops_and_goes_on(store, tmp_path):
    directory = RunDirectory(Place(store, str(tmp_path / "run")))
    first = make_chief(directory)
    claim(first)
    for number in (1, 2, 3):
        save(first, directory, number)
        assert read(directory) == [1, 2, 3][max(0, number - 2) : number]
    second = make_chief(directory)
    claim(second)
    with pytest.raises(FencedError):
        save(first, directory, 4)
    post(directory, Request(PIN, "me", second.checkpoints[0]))
    lease = Lease(directory, second.checkpoints[-1], 60.0)
    assert Leases(directory).hold(second.checkpoints[-1])
    save(second, directory, 4)
    lease.release()
    assert read(directory) == [2, 3, 4]
    assert collect(directory) == ([], {})
    assert state.read_copy(directory) == state.read_head(directory).record
    assert_nothing_is_left_over(directory)


VERBS = sorted(
    name
    for name in (*Store.__abstractmethods__, *("write_at", "finish", "read_into"))
    if name != "unfinished"
)
REFUSED, LOST = "refused", "answer lost"


class Faulty(Store):
    """Another store, one of whose verbs fails once: before it is done, or after it.

    Attributes:
        verbs: The verbs so far.
    """

    def __init__(self, store, index=-1, how=REFUSED):
        self._store, self._index, self._how = store, index, how
        self.verbs = []

    def run(self, name, verb, *arguments, **options):
        """Run one verb, or fail it."""
        self.verbs.append(name)
        if len(self.verbs) - 1 != self._index:
            return verb(*arguments, **options)
        msg = f"{name}: no answer"
        error = StorageError(msg, operation=name, path="x", errno=5)
        if self._how == LOST:
            verb(*arguments, **options)
            if name == "create":  # which says so, if it does not know
                return Creation(Created.UNKNOWN, error)
        raise error from OSError(5, "EIO")


def _delegated(name):
    def verb(self, *arguments, **options):
        found = self.run(name, getattr(self._store, name), *arguments, **options)
        return _File(found, self) if name in ("open", "new_shard") else found

    return verb


for _name in Store.__abstractmethods__:
    setattr(Faulty, _name, _delegated(_name))
Faulty.__abstractmethods__ = frozenset()


class _File:
    """A file of a faulty store."""

    def __init__(self, file, store):
        self._file, self._store = file, store

    def __getattr__(self, name):
        found = getattr(self._file, name)
        if name not in ("write_at", "finish", "read_into"):
            return found
        return lambda *arguments: self._store.run(name, found, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.__exit__(*exception)


def _life(directory):
    """Claim, and save four times; returns what was acknowledged, and what may be there."""
    acknowledged, unknown = [], []
    chief = make_chief(directory)
    claim(chief)
    for number in (1, 2, 3, 4):
        try:
            save(chief, directory, number)
        except OutcomeUnknown:
            unknown.append(number)
        except StorageError:
            continue
        else:
            acknowledged.append(number)
    return acknowledged, unknown


@pytest.mark.full
@pytest.mark.parametrize("how", [REFUSED, LOST])
@pytest.mark.parametrize("kind", MAKERS)
def test_error_at_any_verb_harms_only_that_save(kind, how, tmp_path, report_figures):
    """Acknowledged checkpoints stay, whole; the next claim and save put all in order."""
    one = Faulty(MAKERS[kind]())
    _life(RunDirectory(Place(one, str(tmp_path / "without"))))
    failed = 0
    for index in range(len(one.verbs)):
        plain = MAKERS[kind]()
        name = str(tmp_path / f"run-{index}")
        faulty = Faulty(plain, index, how)
        try:
            acknowledged, unknown = _life(RunDirectory(Place(faulty, name)))
        except DistckptError:
            acknowledged, unknown = [], []  # the claim has failed
            failed += 1
        directory = RunDirectory(Place(plain, name))
        after = [n for n in read(directory) if n not in unknown]
        assert after == acknowledged[-2:][-len(after) :], (index, faulty.verbs[index])
        assert len(after) >= min(2 - len(unknown), len(acknowledged)), index
        chief = make_chief(directory)
        claim(chief)
        save(chief, directory, 9)
        assert read(directory)[-1] == 9
        assert {*acknowledged[-1:]} <= {*read(directory), *unknown} or unknown
        save(chief, directory, 10)
        assert read(directory) == [9, 10]
        assert_nothing_is_left_over(directory)
    report_figures(f"{kind}, {how}: {len(one.verbs)} verbs, {failed} claims failed")
    assert {*one.verbs} >= {"create", "replace", "begin", "new_shard", "publish", "discard"}


def test_every_verb_of_the_contract_is_tried_or_tested():
    """A new verb needs a test here."""
    text = Path(__file__).read_text()
    for verb in VERBS:
        assert f".{verb}(" in text or f'"{verb}"' in text, verb


def test_memory_that_is_full_refuses_at_once(tmp_path):
    store = MemoryStore(max_size_bytes=5000)
    store.make_folder("/run")
    store.begin("/run", ATTEMPT)
    assert store.room("/run").size_bytes == 5000
    with pytest.raises(StorageError) as error:
        store.new_shard("/run", ATTEMPT, "f", 5001, False)
    assert error.value.errno == 28
    store.write("/run/x", bytes(4000))
    assert store.room("/run").size_bytes == 1000
    with pytest.raises(StorageError, match="No space left"):
        store.write("/run/y", bytes(1001))
