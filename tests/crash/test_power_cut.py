"""The power is cut at every call of the storage module, on real filesystems.

Claim, saves, retention and reading, synchronous and staged; what is not on the disk is lost
in three ways; half of the time the power goes again while somebody recovers.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import campaign
import pytest
from campaign import Campaign, in_two_parts
from figures import Figures, Hung, Wrong, demand
from power import EXT4, LOG_LOST, MODES, XFS, Cutter, Disk, mounted_disk
from scenario import HUNG, KILLED, Journal, Listing, in_child, read_text, recover
from storage_calls import BEFORE, MIDDLE, Killer, intercepted
from test_kill_every_call import Stage, _calls, _points

from distckpt import state
from distckpt.storage import posix

# Hundreds of crash points; a busy machine may take its time.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("power_switches")]

SIZE = 300
_SEED = 60
_KINDS = (EXT4, XFS)
# So many calls has a recovery at most; where there are fewer, the power does not go again.
_RECOVERY_CALLS = 90


@dataclass(frozen=True)
class Cut:
    """One cut, or two.

    Attributes:
        kind: The filesystem.
        mode: What is lost.
        staged: Whether saves are written as asynchronous ones are.
        index: Before which call.
        place: Or in the middle of it.
        name: The call.
        again: At which call of the recovery it goes again; None for never.
    """

    kind: str
    mode: int
    staged: bool
    index: int
    place: str
    name: str
    again: int | None


class PowerCuts(Campaign[Cut]):
    """Each state that a disk can be in, on each filesystem, lost in each way."""

    name = "power-cuts"
    about = "power cuts at every filesystem call, on ext4 and xfs, again in the recovery"

    def __init__(self, kinds: tuple[str, ...] = _KINDS, again: bool = True) -> None:
        self._kinds = kinds
        self._again = again

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Count the calls, and keep so few records that some are pruned, too."""
        kept, state._KEPT_RECORDS = state._KEPT_RECORDS, 4
        try:
            stage = Stage(scratch)
            # There, too, when a disk is mounted on it.
            os.makedirs(os.path.dirname(stage.directory))
            self._states = []
            for staged in (False, True):
                stage.clear()
                os.makedirs(os.path.dirname(stage.directory))
                calls = _calls(partial(stage.live, staged=staged))
                points = _points(calls, all_places=False)
                self._states += [(staged, *point) for point in points]
            yield
        finally:
            state._KEPT_RECORDS = kept

    def num_points(self) -> int:
        """Return how many there are; with a second cut, each may be played in many ways."""
        variants = len(self._kinds) * len(MODES)
        return len(self._states) * variants * (_RECOVERY_CALLS if self._again else 1)

    def point(self, source: random.Random, index: int) -> Cut:
        """Return one."""
        rest, which = divmod(index, len(self._states))
        staged, call, place, name = self._states[which]
        rest, mode = divmod(rest, len(MODES))
        kind = self._kinds[rest % len(self._kinds)]
        again = None
        if self._again and source.random() < 0.5:
            again = source.randrange(_RECOVERY_CALLS)
        return Cut(kind, MODES[mode], staged, call, place, name, again)

    @contextmanager
    def worker(self, folder: str) -> Iterator[None]:
        """Mount one disk of each kind, for all cuts of a worker."""
        self._stages: dict[str, tuple[Stage, Disk]] = {}
        with self._mounted(folder, list(self._kinds)):
            yield

    @contextmanager
    def _mounted(self, folder: str, kinds: list[str]) -> Iterator[None]:
        if not kinds:
            yield
            return
        mine = os.path.join(folder, kinds[0])
        os.mkdir(mine)
        stage = Stage(mine)
        image, path = os.path.join(mine, "image"), os.path.dirname(stage.directory)
        with mounted_disk(image, path, kinds[0]) as disk:
            self._stages[kinds[0]] = stage, disk
            with self._mounted(folder, kinds[1:]):
                yield

    def play(self, folder: str, point: Cut, figures: Figures) -> None:
        """Cut the power, come back, perhaps cut it again, and check."""
        stage, disk = self._stages[point.kind]
        stage.clear()
        # Else a cut that comes soon brings back what was there before.
        posix.sync_directory(disk.path)
        live = partial(stage.live, staged=point.staged)
        cutter = Cutter(point.index, point.place, disk=disk, mode=point.mode)

        def body() -> None:
            demand(Wrong, _cut(stage, cutter, live), "the power was not cut")
            disk.switch_on()
            listing = stage.check()
            if point.again is not None:
                listing = self._cut_again(stage, disk, point, listing, figures)
            stage.recover(listing, _SEED + 1)

        figures.count(point.kind)
        figures.check(point, body)

    def _cut_again(
        self, stage: Stage, disk: Disk, point: Cut, listing: Listing, figures: Figures
    ) -> Listing:
        """Cut the power while somebody recovers; returns what is listed then."""
        assert point.again is not None

        def come_back() -> None:
            stage.forget()
            journal = Journal(stage.journal, listing)
            try:
                recover(stage.directory, journal, _SEED)
            finally:
                journal.close()

        place = MIDDLE if point.again % 5 == 0 else BEFORE
        cutter = Cutter(point.again, place, disk=disk, mode=point.mode)
        if _cut(stage, cutter, come_back):
            figures.count("cut again")
            disk.switch_on()
        return stage.check()


def _cut(stage: Stage, cutter: Killer, body: Callable[[], None]) -> bool:
    """Run something in a process that dies with the power; False if it did not."""

    def die() -> None:
        with intercepted(cutter):
            body()

    status = in_child(die, stage.errors)
    if status == HUNG:
        raise Hung("nothing happens")
    demand(Wrong, status in (0, KILLED), read_text(os.path.dirname(stage.errors), "errors"))
    return status == KILLED


CAMPAIGN = PowerCuts()


@in_two_parts(SIZE, range(24))
def test_power_cuts_lose_nothing(
    scratch: str, report_figures: Callable[[str], None], indexes: Collection[int]
):
    """What was acknowledged is there after one cut or two, whole; and a job goes on."""
    figures = campaign.run(CAMPAIGN, scratch, indexes)
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.tried == len(indexes)
    assert min(figures.others[kind] for kind in _KINDS) > len(indexes) / 3
    assert figures.others["cut again"] > len(indexes) / 4


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("holds", ["namespace", "open-file"])
def test_disk_comes_back_after_a_cut_though_another_process_holds_it(
    tmp_path: Path, kind: str, holds: str
):
    """The tests' own disk: a container, a FUSE daemon or a scanner does not disturb it."""
    image, path = str(tmp_path / "image"), str(tmp_path / "disk")
    file = Path(path, "file")
    holder = ["unshare", "--mount", "sleep", "60"]
    if holds == "open-file":
        holder = ["tail", "-f", str(file)]
    if shutil.which(holder[0]) is None:
        pytest.skip(f"there is no {holder[0]} command here")
    with mounted_disk(image, path, kind) as disk:
        posix.write_new_file(str(file), b"synced")
        posix.sync_directory(path)
        process = subprocess.Popen(holder, stdout=subprocess.PIPE)
        try:
            _wait_until_held(process.pid, str(file) if holds == "open-file" else "")
            disk.cut(LOG_LOST)
            disk.switch_on()
            assert file.read_bytes() == b"synced"
            posix.write_new_file(f"{path}/another", b"written")
            assert process.poll() is None
        finally:
            process.kill()
            process.communicate()


def _wait_until_held(pid: int, file: str) -> None:
    """Wait until a process has a mount namespace of its own, or a file open."""
    mine = os.readlink("/proc/self/ns/mnt")
    while True:
        with suppress(FileNotFoundError):
            if file:
                folder = f"/proc/{pid}/fd"
                links = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
                is_held = file in links
            else:
                is_held = os.readlink(f"/proc/{pid}/ns/mnt") != mine
            if is_held:
                return
        time.sleep(0.01)


# The tests themselves: what is not synced must be found out.


@pytest.mark.full
def test_power_cut_without_file_fsync_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch
):
    """A file that is not synced is found out: the cuts are real."""
    monkeypatch.setattr(posix.os, "fsync", lambda descriptor: None)
    figures = campaign.run(PowerCuts(again=False), scratch, range(40))
    report_figures(str(figures))
    assert figures.lost or figures.torn or figures.unopenable


@pytest.mark.full
@pytest.mark.parametrize("kind", [EXT4, XFS])
def test_power_cut_without_directory_sync_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch, kind: str
):
    """A name that is not synced is found out, on each filesystem."""
    monkeypatch.setattr(posix, "sync_directory", lambda path: None)
    # On ext4 the next fsync of any file takes names along; this one comes at once.
    monkeypatch.setattr(state, "write_copy", lambda directory, head: None)
    figures = campaign.run(PowerCuts((kind,), again=False), scratch, range(60))
    report_figures(str(figures))
    assert figures.lost or figures.torn or figures.unopenable
