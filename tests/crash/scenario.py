"""What the crash tests do to a run directory, and what must be true of it afterwards.

Two ranks are simulated in one process; chief and shard files are the library's own.
"""

from __future__ import annotations

import gc
import json
import logging
import mmap
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from figures import Lost, Torn, demand

from distckpt import boxes, dtypes, paths, readers, shard_file, state
from distckpt.chief import Chief
from distckpt.errors import DistckptError, FencedError
from distckpt.identity import Identity
from distckpt.janitor import Janitor
from distckpt.layout import SPLIT, WHOLE, Assignment, Piece, Row, Table
from distckpt.manifest import Shard
from distckpt.paths import Attempt
from distckpt.record import Record
from distckpt.retention import Retention
from distckpt.run_directory import AttemptDirectory, NewShard, RunDirectory
from distckpt.shard_header import Draft, Outline
from distckpt.values import encode
from distckpt.verify import verify_attempt

WORLD_SIZE = 2
MAX_TO_KEEP = 2

_logger = logging.getLogger(__name__)


def _table(width: int) -> Table:
    """Make rows that are cut between the ranks, whole, shared, 0-dim, and without a
    counterpart in safetensors."""
    return Table(
        (
            Row("model/weight", "float32", (40, width), SPLIT),
            Row("model/head", "float32", (40, width), SPLIT, same_as="model/weight"),
            Row("model/running", "uint8", (130, width), WHOLE),
            Row("model/phase", "complex128", (3, 5), SPLIT),
            Row("step", "int64", (), WHOLE),
        )
    )


# Of several blocks.
TABLE = _table(1024)
ASSIGNMENT = Assignment([TABLE], [0] * WORLD_SIZE)
# The same in little, for what is done hundreds of thousands of times.
SMALL_TABLE = _table(32)
_OWN = Row("rng", "uint8", (100,), WHOLE)


@contextmanager
def all_saved_as(table: Table) -> Iterator[None]:
    """Save other tensors meanwhile."""
    global TABLE, ASSIGNMENT
    before = TABLE, ASSIGNMENT
    TABLE, ASSIGNMENT = table, Assignment([table], [0] * WORLD_SIZE)
    content.cache_clear()
    try:
        yield
    finally:
        TABLE, ASSIGNMENT = before
        content.cache_clear()


@lru_cache(maxsize=64)
def content(seed: int) -> dict[str, bytes]:
    """Make up the bytes of every tensor, and of what each rank has of its own."""
    source = random.Random(seed)
    tensors = {row.name: source.randbytes(row.size_bytes) for row in TABLE}
    tensors["model/head"] = tensors["model/weight"]
    own = {f"rng of {rank}": source.randbytes(100) for rank in range(WORLD_SIZE)}
    return tensors | own


def _bytes_of(piece: Piece, seed: int) -> bytes:
    item = dtypes.item_size_bytes(piece.row.dtype)
    data = content(seed)[piece.row.name]
    runs = boxes.contiguous_runs(piece.box, boxes.whole(piece.row.shape), piece.box)
    return b"".join(
        data[start * item : (start + length) * item] for start, _, length in runs
    )


class InlineJanitor(Janitor):
    """Runs each deletion at once in its caller, so that calls come in one order."""

    def _submit(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:
            _logger.warning("cleaning", exc_info=True)


def make_chief(directory: str, *, run: str = "job", threaded: bool = False) -> Chief:
    """Make a chief as a manager does."""
    return Chief(
        RunDirectory.at(directory),
        checkpoint_name="ckpt",
        retention=Retention(MAX_TO_KEEP),
        identity=Identity(run, 0),
        janitor=Janitor(RunDirectory.at(directory))
        if threaded
        else InlineJanitor(RunDirectory.at(directory)),
    )


def claim(chief: Chief) -> None:
    """Claim the directory as a manager does, all ranks answering well."""
    try:
        chief.prepare_claim()
        chief.finish_claim()
    except DistckptError:
        chief.abandon_claim()
        raise


def write_shards(
    directory: str,
    attempt: Attempt,
    seed: int,
    ranks: Iterable[int] = range(WORLD_SIZE),
    *,
    staged: bool = False,
) -> list[Shard]:
    """Write the shard files of some ranks; staged, as asynchronous saves do."""
    shards = []
    for rank in ranks:
        entries = [
            shard_file.Entry(piece, _loader(_bytes_of(piece, seed)))
            for piece in ASSIGNMENT.pieces_of_rank(rank)
        ]
        own = Piece(_OWN, boxes.whole(_OWN.shape), rank)
        data = content(seed)[f"rng of {rank}"]
        entries.append(shard_file.Entry(own, _loader(data), per_rank=True))
        write = _write_staged if staged else shard_file.write
        written = write(
            RunDirectory.at(directory).new_shard(attempt, rank, WORLD_SIZE),
            entries,
            attempt=attempt.published,
            rank=rank,
            world_size=WORLD_SIZE,
            per_rank_values={"seed": encode(seed, "seed")},
        )
        shards.append(Shard(written.size_bytes, written.header, 0))
    return shards


def _write_staged(
    target: NewShard, entries: Sequence[shard_file.Entry], **whose: Any
) -> shard_file.Written:
    ordered = sorted(entries, key=lambda entry: shard_file.order(entry.piece))
    outline = Outline([(entry.piece, entry.per_rank) for entry in ordered])
    draft = Draft(outline, **whose)
    image = memoryview(mmap.mmap(-1, shard_file.image_bytes(draft, outline)))
    start = draft.size_bytes
    for entry, size in zip(ordered, outline.sizes, strict=True):
        image[start : start + size] = entry.load()
        start += size
    return shard_file.write_image(target, image, draft, outline)


def _loader(data: bytes) -> Callable[[], memoryview]:
    return lambda: memoryview(data)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was committed, and the seed that its content came from."""

    published: str
    seed: int

    @property
    def prefix(self) -> str:
        """The name that users see."""
        attempt = paths.parse_published(self.published)
        assert attempt is not None
        return attempt.prefix


# The managed checkpoints, oldest first.
Listing = tuple[Saved, ...]


def after_commit(listing: Listing, saved: Saved) -> Listing:
    """Say what is managed after a commit: the model that the library is held against."""
    others = [other for other in listing if other.prefix != saved.prefix]
    return (*others, saved)[-MAX_TO_KEEP:]


class Journal:
    """Tells a survivor what a process had been promised before it died.

    A file outside the run directory, written with ``os.write`` before anything else is
    done: what a killed process wrote is there.
    """

    def __init__(self, path: str, listing: Listing) -> None:
        self._path = path
        self.listing = listing
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._write("acknowledged", listing)

    def committing(self, saved: Saved) -> None:
        """Note what a commit that is tried now would make of the listing."""
        self._write("tried", after_commit(self.listing, saved))

    def committed(self, saved: Saved) -> None:
        """Note that a commit was acknowledged."""
        self.listing = after_commit(self.listing, saved)
        self._write("acknowledged", self.listing)

    def _write(self, what: str, listing: Listing) -> None:
        entries = [[saved.published, saved.seed] for saved in listing]
        os.write(self._descriptor, (json.dumps([what, entries]) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    @staticmethod
    def possible(path: str) -> list[Listing]:
        """Return what may be managed: the acknowledged, and what was in flight."""
        acknowledged: Listing = ()
        tried: list[Listing] = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                what, entries = json.loads(line)
                listing = tuple(Saved(*entry) for entry in entries)
                if what == "tried":
                    tried = [listing]
                else:
                    acknowledged, tried = listing, []
        return [acknowledged, *tried]


def save(
    chief: Chief,
    directory: str,
    journal: Journal,
    seed: int,
    number: int | None = None,
    *,
    staged: bool = False,
) -> Saved:
    """Make one save, from the decision to the acknowledgement."""
    attempt = chief.begin(number, highest_number(journal.listing))
    try:
        shards = write_shards(directory, attempt, seed, staged=staged)
    except DistckptError:
        chief.abandon(attempt)
        raise
    saved = Saved(attempt.published, seed)
    journal.committing(saved)
    chief.commit(
        attempt,
        step=seed,
        shards=shards,
        layouts=[TABLE],
        values={"seed": encode(seed, "seed")},
    )
    journal.committed(saved)
    return saved


def highest_number(listing: Listing) -> int:
    """Return the save counter that belongs to a listing."""
    numbers = [paths.parse_prefix(saved.prefix) for saved in listing]
    return max((number[1] for number in numbers if number is not None), default=0)


def run(
    directory: str, journal: Journal, *, threaded: bool = False, staged: bool = False
) -> None:
    """Live a whole life: two managers, five saves, retention, a failure, reading."""
    first = make_chief(directory, threaded=threaded)
    claim(first)
    save(first, directory, journal, 1, staged=staged)
    save(first, directory, journal, 2, staged=staged)
    failed = first.begin(None, 2)
    write_shards(directory, failed, 99, ranks=[0])
    first.abandon(failed)
    save(first, directory, journal, 3, staged=staged)
    save(first, directory, journal, 4, number=2, staged=staged)
    second = make_chief(directory, threaded=threaded)
    claim(second)
    try:
        first.begin(None, 3)
    except FencedError:
        pass
    else:
        msg = "the older manager was not fenced"
        raise AssertionError(msg)
    save(second, directory, journal, 5, staged=staged)
    for saved in journal.listing:
        check_content(directory, saved)
    assert second.settle(10) and first.settle(10)
    first.close()
    second.close()


# After a crash


def check_content(directory: str, saved: Saved) -> None:
    """Read a checkpoint as a restore does and compare every byte."""
    located = readers.locate(os.path.join(directory, saved.prefix))
    demand(Torn, located.directory.name == saved.published, located)
    manifest = readers.read_manifest(located.directory, located.manifest_digest)
    demand(Torn, manifest.values == {"seed": encode(saved.seed, "seed")}, manifest)
    demand(Torn, manifest.world_size == WORLD_SIZE, manifest)
    num_found = 0
    for rank in range(manifest.world_size):
        with readers.open_shard(located.directory, manifest, rank) as reader:
            for stored in reader.header.entries.values():
                found = bytearray(stored.size_bytes)
                reader.read_into(stored, 0, memoryview(found))
                if stored.per_rank:
                    expected = content(saved.seed)[f"rng of {rank}"]
                else:
                    row = ASSIGNMENT.rows[stored.name]
                    expected = _bytes_of(Piece(row, stored.box, rank), saved.seed)
                    num_found += stored.size_bytes
                demand(Torn, found == expected, f"{reader.path}: {stored.key}")
    written = sum(row.size_bytes for row in TABLE if not row.same_as)
    demand(Torn, num_found == written, num_found)


def check_readable(
    directory: str, possible: Sequence[Listing], *, contiguous: bool = True
) -> Listing:
    """Check, only reading, that what may be listed is listed, whole and byte for byte.

    Args:
        directory: The run directory.
        possible: Any of them will do.
        contiguous: Whether the records that are kept must form one line.

    Returns:
        Which of the possible listings it is.

    Raises:
        Torn, Lost: It is not so.
        DistckptError: The directory cannot be read.
    """
    record = readers.read_record(RunDirectory.at(directory))
    entries = () if record is None else record.live
    names = [entry.attempt.published for entry in entries]
    matching = [some for some in possible if [s.published for s in some] == names]
    demand(Lost, bool(matching), f"listed {names}, possible {possible}")
    listing = matching[0]
    for entry, saved in zip(entries, listing, strict=True):
        path = os.path.join(directory, entry.attempt.published)
        report = verify_attempt(AttemptDirectory.at(path), entry.manifest)
        demand(Torn, report.ok and not report.foreign, report)
        check_content(directory, saved)
    prefixes = [os.path.join(directory, saved.prefix) for saved in listing]
    newest = prefixes[-1] if prefixes else None
    demand(Lost, readers.latest_checkpoint(directory) == newest, newest)
    seen = readers.get_checkpoint_state(directory)
    demand(
        Lost,
        (seen.all_model_checkpoint_paths if seen else []) == prefixes,
        f"{seen}, expected {prefixes}",
    )
    if record is not None:
        demand(Lost, not record.kept and not record.bad, record)
    if contiguous:
        _check_chain(directory)
    return listing


def _check_chain(directory: str) -> None:
    folder = os.path.join(directory, paths.RECORDS_DIRECTORY)
    numbers = sorted(
        number
        for name in _names_in(folder)
        if (number := paths.parse_record_file(name)) is not None
    )
    previous = None
    for number in numbers:
        head = state.read_numbered(RunDirectory.at(directory), number)
        if previous is not None:
            demand(Lost, number == previous.record.number + 1, numbers)
            demand(Lost, head.record.previous == previous.digest, f"{number} forks")
            demand(Lost, head.record.epoch >= previous.record.epoch, f"{number} epoch")
        previous = head


def recover(directory: str, journal: Journal, seed: int) -> None:
    """Come back after a crash: open, claim, sweep, save."""
    chief = make_chief(directory)
    expected = [saved.published for saved in journal.listing]
    found = [attempt.published for attempt in chief.checkpoints]
    demand(Lost, found == expected, f"chief has {found}, expected {expected}")
    claim(chief)
    save(chief, directory, journal, seed)
    assert chief.settle(10)
    record = readers.read_record(RunDirectory.at(directory))
    assert record is not None
    leftovers = [
        name for name in unlisted(directory, record) if _epoch_of(name) < record.epoch
    ]
    demand(Lost, not leftovers, f"left behind: {leftovers}")
    chief.close()


def claim_and_check_clean(directory: str) -> None:
    """Claim once more; then nothing at all may be there but what is listed."""
    chief = make_chief(directory)
    claim(chief)
    assert chief.settle(10)
    chief.close()
    record = readers.read_record(RunDirectory.at(directory))
    assert record is not None
    leftovers = unlisted(directory, record)
    demand(Lost, not leftovers, f"left behind: {leftovers}")


def unlisted(directory: str, record: Record) -> list[str]:
    """Name all that is in a run directory and belongs to nothing."""
    known = {paths.STATE_FILE, paths.RECORDS_DIRECTORY, paths.LOCK_FILE}
    known |= {paths.REQUESTS_DIRECTORY, paths.LEASES_DIRECTORY, paths.EVENTS_DIRECTORY}
    known |= {entry.attempt.published for entry in (*record.committed, *record.bad)}
    names = [name for name in _names_in(directory) if name not in known]
    records = _names_in(os.path.join(directory, paths.RECORDS_DIRECTORY))
    return names + [name for name in records if paths.parse_record_file(name) is None]


def _epoch_of(name: str) -> int:
    attempt = (
        paths.parse_published(name) or paths.parse_pending(name) or paths.parse_trash(name)
    )
    if attempt is not None:
        return attempt.epoch
    epochs = (paths.parse_temporary_file(name), paths.parse_probe_file(name))
    known = [epoch for epoch in epochs if epoch is not None]
    assert known, f"nobody knows what {name} is"
    return known[0]


def _names_in(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


# Processes

FAILED = 3
HUNG = -signal.SIGALRM
KILLED = -signal.SIGKILL
_PATIENCE_SECONDS = 300
_NUM_WORKERS = 2
_WORKER_SECONDS = 1500


def in_workers(
    scratch: str, jobs: Sequence[Any], work: Callable[[str, Any], Any]
) -> list[Any]:
    """Share jobs between two processes.

    Args:
        scratch: An empty directory.
        jobs: What is to be done, one after the other.
        work: Does one job in the directory of its worker; returns what JSON can carry.

    Returns:
        The results, in no order.
    """
    workers = []
    for index in range(_NUM_WORKERS):
        folder = os.path.join(scratch, f"worker-{index}")
        os.mkdir(folder)

        def body(folder: str = folder, mine: Sequence[Any] = jobs[index::_NUM_WORKERS]):
            results = [work(folder, job) for job in mine]
            with open(os.path.join(folder, "results"), "w", encoding="utf-8") as file:
                json.dump(results, file)

        errors = os.path.join(folder, "errors")
        workers.append((folder, start_child(body, errors, _WORKER_SECONDS)))
    statuses = [wait_for_child(pid) for _, pid in workers]
    results: list[Any] = []
    for (folder, _), status in zip(workers, statuses, strict=True):
        if status != 0:
            text = f"a worker ended with {status}\n" + read_text(folder, "errors")
            raise AssertionError(text)
        results += json.loads(read_text(folder, "results"))
    return results


def read_text(folder: str, name: str) -> str:
    """Read a text file; empty if there is none."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def in_child(body: Callable[[], None], errors: str) -> int:
    """Run something in a forked process that ends there, whatever happens.

    Args:
        body: What to run.
        errors: File for the traceback if it raises.

    Returns:
        0, the negative signal that ended it, or ``FAILED``.
    """

    def short() -> None:
        gc.disable()  # a collection would copy the whole parent, page by page
        body()

    return wait_for_child(start_child(short, errors, _PATIENCE_SECONDS))


def start_child(body: Callable[[], None], errors: str, limit_seconds: int) -> int:
    """Start something in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        gc.freeze()  # collections leave alone what the parent has, and share it
        logging.disable(logging.CRITICAL)  # nobody reads it, and there is much of it
        signal.alarm(limit_seconds)
        body()
        code = 0
    except BaseException:
        with open(errors, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def wait_for_child(pid: int) -> int:
    """Wait for a process; returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
