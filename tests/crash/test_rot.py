"""Bytes rot, files are cut off, lost, swapped or added: found, and the right file named.

Every bit of every file of a small run directory is a point, and every length that a file
can be cut to; so are files that are missing, emptied, swapped, or do not belong there.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import campaign
import pytest
from campaign import Campaign, in_two_parts
from figures import Figures, Wrong, demand
from scenario import (
    SMALL_TABLE,
    Journal,
    Listing,
    all_saved_as,
    check_content,
    claim,
    make_chief,
    save,
)

from distckpt import paths, readers
from distckpt.errors import (
    CorruptStateError,
    FormatError,
    NewerFormatError,
    StorageError,
)
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import Report, verify_attempt

pytestmark = pytest.mark.timeout(1200)

SIZE = 2_000

FLIP, CUT, MISSING, EMPTY, LONGER = "flip", "cut", "missing", "emptied", "longer"
SWAPPED, FOREIGN = "swapped", "foreign"


@dataclass(frozen=True)
class Damage:
    """What happens to one file.

    Attributes:
        path: Of the file, in the run directory.
        what: What happens.
        where: Which bit, or how many bytes are left; else 0.
        other: The file that takes its place.
    """

    path: str
    what: str
    where: int = 0
    other: str = ""

    def do(self, directory: str) -> None:
        """Let it happen."""
        path = os.path.join(directory, self.path)
        if self.what == FLIP:
            with open(path, "r+b") as file:
                file.seek(self.where // 8)
                byte = file.read(1)[0] ^ 1 << self.where % 8
                file.seek(self.where // 8)
                file.write(bytes([byte]))
        elif self.what in (CUT, EMPTY):
            os.truncate(path, self.where)
        elif self.what == MISSING:
            os.unlink(path)
        elif self.what == LONGER:
            with open(path, "ab") as file:
                file.write(b"\0" * self.where)
        elif self.what == SWAPPED:
            shutil.copyfile(os.path.join(directory, self.other), path)
        else:
            with open(path, "xb") as file:
                file.write(b"not ours")


class Rot(Campaign[Damage]):
    """Two checkpoints of two ranks, their records, and all that can happen to one file."""

    name = "rot"
    about = "bit flips, truncations, missing, swapped and foreign files"

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Make the run directory."""
        with all_saved_as(SMALL_TABLE):
            self._make(scratch)
            yield

    def _make(self, scratch: str) -> None:
        self._template = os.path.join(scratch, "template")
        chief = make_chief(self._template)
        claim(chief)
        journal = Journal(os.path.join(scratch, "journal"), ())
        self._saved: Listing = tuple(
            save(chief, self._template, journal, seed) for seed in (1, 2)
        )
        journal.close()
        chief.close()
        self._files = {
            os.path.relpath(os.path.join(folder, name), self._template)
            for folder, _, names in os.walk(self._template)
            for name in names
        } - {paths.LOCK_FILE, paths.STATE_FILE}
        record = readers.read_record(RunDirectory.at(self._template))
        assert record is not None
        self._digests = {e.attempt.published: e.manifest for e in record.live}
        self.others, self._cuts = [*self._all_others()], [*self._all_cuts()]
        self._sizes = [(path, 8 * self._size(path)) for path in sorted(self._files)]

    def _size(self, path: str) -> int:
        return os.path.getsize(os.path.join(self._template, path))

    def _all_others(self) -> Iterator[Damage]:
        for path in sorted(self._files):
            yield from (Damage(path, MISSING), Damage(path, EMPTY))
            yield from (Damage(path, LONGER, size) for size in (1, 8, 4096))
            folder, name = os.path.split(path)
            yield Damage(os.path.join(folder, f"more-{name}"), FOREIGN)
            for other in sorted(self._files - {path}):
                if os.path.splitext(other)[1] == os.path.splitext(name)[1]:
                    yield Damage(path, SWAPPED, other=other)

    def _all_cuts(self) -> Iterator[Damage]:
        for path in sorted(self._files):
            size = self._size(path)
            # Every length of what is read as a whole, and around blocks of the rest.
            lengths = {*range(1, min(size, 6000))}
            lengths |= {n + d for n in range(0, size, 4096) for d in (-1, 0, 1)}
            yield from (Damage(path, CUT, n) for n in sorted(lengths) if 0 < n < size)

    def num_points(self) -> int:
        """Return how many there are: most of them bits."""
        return len(self.others) + len(self._cuts) + sum(bits for _, bits in self._sizes)

    def point(self, source: random.Random, index: int) -> Damage:
        """Return one."""
        # Bits would bury all else in a small sample.
        if index < len(self.others) or source.random() < 0.1:
            return self.others[index % len(self.others)]
        index -= len(self.others)
        if index < len(self._cuts) or source.random() < 0.2:
            return self._cuts[index % len(self._cuts)]
        index -= len(self._cuts)
        for path, bits in self._sizes:
            if index < bits:
                return Damage(path, FLIP, index)
            index -= bits
        raise AssertionError(index)

    def play(self, folder: str, point: Damage, figures: Figures) -> None:
        """Damage a copy, and look at it as a restore does."""
        directory = os.path.join(folder, "run")
        path = os.path.join(directory, point.path)
        if not os.path.exists(directory):
            shutil.copytree(self._template, directory)
        try:
            point.do(directory)
            figures.count(point.what)
            figures.check(point, lambda: self._check(directory, point))
        finally:
            if os.path.exists(path):
                os.unlink(path)
            if point.what != FOREIGN:
                shutil.copyfile(os.path.join(self._template, point.path), path)

    def _check(self, directory: str, point: Damage) -> None:
        folder, file = os.path.split(point.path)
        if folder == paths.RECORDS_DIRECTORY:
            self._check_record(directory, point, file)
            return
        for saved in self._saved:
            name = saved.published
            report = verify_attempt(
                AttemptDirectory.at(os.path.join(directory, name)), self._digests[name]
            )
            if name != folder:
                demand(Wrong, report.ok and not report.foreign, f"the other one: {report}")
            elif point.what == FOREIGN:
                demand(Wrong, report.ok and len(report.foreign) == 1, str(report))
            else:
                demand(Wrong, not report.ok, "not found by verify")
                demand(
                    Wrong, _names(report, os.path.join(directory, point.path)), str(report)
                )
        if point.what != FOREIGN:
            self._check_read(directory, point, folder)

    def _check_record(self, directory: str, point: Damage, name: str) -> None:
        number = paths.parse_record_file(name)
        newest = max(
            n
            for path in self._files
            if (n := paths.parse_record_file(os.path.basename(path))) is not None
        )
        if number is None or number < newest:
            readers.read_record(RunDirectory.at(directory))  # nobody reads it any more
            return
        is_missing = point.what == MISSING
        try:
            # The one before seems to be the newest then; the state file knows better.
            if is_missing:
                claim(make_chief(directory))
            found = readers.read_record(RunDirectory.at(directory))
        except (CorruptStateError, NewerFormatError) as error:
            demand(
                Wrong,
                isinstance(error, CorruptStateError) or self._is_in_format(point),
                f"taken for a newer version's: {error}",
            )
            demand(
                Wrong,
                is_missing or os.path.join(directory, point.path) in str(error),
                str(error),
            )
            demand(Wrong, "distckpt repair" in str(error), str(error))
        else:
            raise Wrong(f"taken for {found}")

    def _is_in_format(self, point: Damage) -> bool:
        """Tell whether a bit of a record's format flips.

        The format is read before the checksum, so this is taken for a newer version. The
        message names the file and `repair`: see decision 22.
        """
        if point.what != FLIP:
            return False
        with open(os.path.join(self._template, point.path), "rb") as file:
            content = file.read()
        begin = content.index(b'"format"')
        return begin <= point.where // 8 < content.index(b'"version"')

    def _check_read(self, directory: str, point: Damage, folder: str) -> None:
        """Read it, by way of the records' digests: nothing wrong may come out."""
        (saved,) = (saved for saved in self._saved if saved.published == folder)
        try:
            check_content(directory, saved)
        except (FormatError, StorageError) as error:
            text = f"{error} {error.__cause__}"
            demand(Wrong, os.path.join(directory, folder) in text, f"names nothing: {text}")
        else:
            raise Wrong("not found by reading all of it")
        (other,) = (saved for saved in self._saved if saved.published != folder)
        check_content(directory, other)


def _names(report: Report, path: str) -> bool:
    return any(path in problem for problem in report.problems)


CAMPAIGN = Rot()


# The last two: a file that is missing, and one that does not belong there.
@in_two_parts(SIZE, (*range(150), 278, 249))
def test_rot_is_found_and_the_right_file_named(
    scratch: str, report_figures: Callable[[str], None], indexes: Collection[int]
):
    """Before a byte of it could have come into a tensor; the other checkpoint is whole."""
    figures = campaign.run(CAMPAIGN, scratch, indexes)
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.tried == len(indexes)
    assert {FLIP, CUT, MISSING, SWAPPED, FOREIGN} <= set(figures.others)


def test_every_bit_of_a_records_format_is_found(scratch: str):
    """Some flips give another valid format. Each message names the file and `repair`."""
    figures = Figures()
    with CAMPAIGN.opened(scratch):
        newest = max(
            path for path in CAMPAIGN._files if path.startswith(paths.RECORDS_DIRECTORY)
        )
        points = [
            point
            for bit in range(8 * CAMPAIGN._size(newest))
            if CAMPAIGN._is_in_format(point := Damage(newest, FLIP, bit))
        ]
        for point in points:
            CAMPAIGN.play(scratch, point, figures)
    figures.demand_zeros()
    assert figures.others[FLIP] == len(points) > 8 * len('"format":1')


def test_manifests_that_change_places_are_found(scratch: str):
    """Each is valid by itself: only the record's digest tells."""
    with CAMPAIGN.opened(scratch):
        points = [
            point
            for point in CAMPAIGN.others
            if point.what == SWAPPED
            and point.path.endswith(paths.MANIFEST_FILE)
            and point.other.endswith(paths.MANIFEST_FILE)
        ]
        figures = campaign.play(CAMPAIGN, scratch, points)
    figures.demand_zeros()
    assert figures.tried == 2


@pytest.mark.full
def test_rot_that_no_checksum_covers_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch
):
    """The campaign itself: a reader that does not compare is found out."""
    from distckpt.shard_file import ShardReader

    monkeypatch.setattr(ShardReader, "_compare", lambda *_: None)
    figures = campaign.run(CAMPAIGN, scratch, range(200))
    report_figures(str(figures))
    assert figures.wrong or figures.torn
