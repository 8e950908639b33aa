"""Hard errors on real ranks, by the operating system itself, in every step.

In a save, a restore and a claim, on the chief and on another rank: one error for all,
nothing is lost, nothing is left or leaked, and once the cause is gone the next one works.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import faults
import power
import pytest
import torch
import torch.distributed as dist
from faults import Fault, Injected
from harness import run_ranks, values_of
from outcome_helpers import (
    LoggedTexts,
    Trap,
    assert_all_whole,
    leftovers,
    make_checkpoint,
    outcome,
    state_of,
    train,
    tree_of,
)

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    PerRank,
    readers,
    save,
)
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix

_SMALL_BYTES, _BIG_BYTES = 2**15, 2**22
_SHORT_SECONDS = 1.5


@dataclass(frozen=True)
class Case:
    """A fault, when it begins, and what must come of it.

    Attributes:
        name: For the test's name.
        fault: What happens.
        texts: What is said of a rank that failed, beside the reason.
        kind: The error's class on all ranks; "ok" for none.
        at: ``"before"`` the call; once it is ``"begun"``, when a save has a pending
            directory but no shard file, and a restore its plan; in ``"user code"``, a
            tracked object's ``state_dict()``, which runs into it itself; or while the
            manager is made (``"construct"``).
        until: What the library logs when the cause goes away; otherwise when the call
            has ended.
        victims: On which rank, one after the other, or all ``together``.
        failed: Who is in the table of failures: the ``"victim"``, ``"all"``, or the
            victim and perhaps others (``"some"``), or ``"nobody"``.
        disk: Options of a small tmpfs, or ``"quota"``.
        big_ranks: Who has much to save.
        leaves: How many entries cannot be removed at once.
        left_for_claim: Whether they may stay until the next claim, not the next save.
        restores: Which checkpoint is restored while it lasts; 0 for none.
        then_restores: Which one afterwards.
        timeout_seconds: The manager's deadline.
        touched: Whether a restore that failed leaves a mixture.
        num_checkpoints: How many there are.
        staging: How an asynchronous save copies; "" for one that is not.
    """

    name: str
    fault: Fault
    texts: tuple[str, ...] = ()
    kind: str = "SaveFailed"
    at: str = "begun"
    until: str = ""
    victims: tuple[int, ...] = (0, 1)
    together: bool = False
    world_size: int = 2
    failed: str = "victim"
    disk: str = ""
    big_ranks: tuple[int, ...] = ()
    leaves: int = 0
    left_for_claim: bool = False
    restores: int = 0
    then_restores: int = 3
    timeout_seconds: float = 20.0
    touched: bool = False
    num_checkpoints: int = 3
    staging: Literal["", "eager", "lazy"] = ""

    @property
    def strikes(self) -> list[tuple[int, ...]]:
        """The ranks that it happens on, for each time that it happens."""
        return [self.victims] if self.together else [(rank,) for rank in self.victims]


def _each(cases: list[Case], by_default: str) -> Any:
    """Play all cases: those named by default, the others in class full."""
    names = by_default.split()
    assert {*names} <= {case.name for case in cases}
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case, id=case.name, marks=() if case.name in names else pytest.mark.full
            )
            for case in cases
        ],
    )


@pytest.fixture
def place(scratch, small_disk, tmp_path) -> Iterator[Any]:
    """Choose a run directory where a case can happen, or skip: ``place(case)``."""
    with ExitStack() as stack:

        def choose(case: Case) -> str:
            if case.fault.missing():
                pytest.skip(case.fault.missing())
            folder = scratch
            if case.disk == "quota":
                try:
                    folder = stack.enter_context(faults.disk_with_quota(str(tmp_path)))
                except faults.CannotMount as error:
                    pytest.skip(str(error))
            elif case.disk:
                folder = small_disk(case.disk)
            stack.callback(faults.unmount_below, folder)
            os.chmod(folder, 0o755)  # for a rank that is not root for a while
            return os.path.join(folder, "run")

        yield choose


# What the ranks do


def _open_something():
    with open(os.devnull, "rb"):
        pass


class Log(LoggedTexts):
    """What the library logs, and what is to be done when it says something."""

    def __init__(self):
        super().__init__()
        self.actions = {}

    def emit(self, record):
        super().emit(record)
        for text in [text for text in self.actions if text in self.texts[-1]]:
            self.actions.pop(text)()


class Rank:
    """One rank with things to save, and what there is to see of it."""

    def __init__(self, rank: int, directory: str, case: Case) -> None:
        self.rank, self.directory, self.case = rank, directory, case
        self.logged = Log()
        self.trap = Trap()
        size = _BIG_BYTES if rank in case.big_ranks else _SMALL_BYTES
        self.own = torch.zeros(size, dtype=torch.uint8)
        self.checkpoint = make_checkpoint(trap=self.trap, own=PerRank(self.own))
        if rank in case.victims:
            case.fault.prepare()

    def manager(self, **more: Any) -> CheckpointManager:
        timeout = timedelta(seconds=self.case.timeout_seconds)
        arguments = {"max_to_keep": 2, "timeout": timeout, **more}
        return CheckpointManager(self.checkpoint, self.directory, **arguments)

    def train(self) -> None:
        train(self.checkpoint)
        self.own.fill_(int(self.checkpoint.step) * 10 + self.rank)

    def state(self) -> Any:
        state = state_of(self.checkpoint)
        del state["save_counter"]
        return state, self.own[0].item(), self.own[-1].item()

    @contextmanager
    def struck(self, victims: tuple[int, ...]) -> Iterator[None]:
        """Let the fault begin when it should, if it is for this rank; end it behind."""
        is_victim, at, decide = self.rank in victims, self.case.at, save.decide_and_plan

        def strike():
            self.trap.on_save = self.trap.on_load = None
            if is_victim:
                self.case.fault.begin(self.directory, self.rank)
                if at == "user code":
                    _open_something()

        def decide_then_strike(*arguments):
            planned = decide(*arguments)
            save.decide_and_plan = decide
            strike()
            dist.barrier()  # nobody has written anything when it begins
            return planned

        if at == "begun":
            self.trap.on_load, save.decide_and_plan = strike, decide_then_strike
        elif at == "user code":
            self.trap.on_save = self.trap.on_load = strike
        else:
            strike()
        if is_victim and self.case.until:
            self.logged.actions[self.case.until] = self.case.fault.end
        try:
            yield
        finally:
            self.trap.on_save = self.trap.on_load = None
            save.decide_and_plan = decide
            if is_victim and not self.case.until:
                self.case.fault.end()

    def resources(self, expected: Any = None) -> Any:
        """List open files and count threads; one that ended may take a moment to go."""
        deadline = time.monotonic() + 2
        while True:
            # The chief keeps the lock, also of a directory that it could not claim.
            files = [name for name in faults.open_files() if not name.endswith("/.lock")]
            num_threads = faults.num_threads()
            if expected is None or time.monotonic() > deadline:
                return files, num_threads
            if files == expected[0] and num_threads <= expected[1]:
                return expected
            time.sleep(0.01)

    def trees(self) -> dict[str, Any]:
        """Read every committed checkpoint."""
        record = readers.read_record(RunDirectory.at(self.directory))
        names = [entry.attempt.published for entry in record.committed]
        return {name: tree_of(os.path.join(self.directory, name)) for name in names}

    def unlisted(self) -> list[str]:
        """Name what is in the run directory and belongs to nothing, at one time."""
        dist.barrier()
        found = faults.unlisted(self.directory)
        dist.barrier()
        return found


def _fail_saves(rank: int, directory: str, case: Case) -> list[dict[str, Any]]:
    """Save twice; run into the fault and save again, for each victim."""
    me = Rank(rank, directory, case)
    manager = me.manager()
    for _ in range(2):
        me.train()
        manager.save()
    told = [_fail_a_save(me, manager, victims) for victims in case.strikes]
    manager.close()
    expected = me.state()
    me.train()
    with me.manager() as manager:
        manager.restore_or_initialize()
        manager.sync()
        assert me.state() == expected
        told[-1]["left at last"] = me.unlisted()
    return told


def _fail_a_save(
    me: Rank, manager: CheckpointManager, victims: tuple[int, ...]
) -> dict[str, Any]:
    manager.sync()
    dist.barrier()
    trees, lists = me.trees(), manager.checkpoints
    counter = me.checkpoint.save_counter
    newest = readers.latest_checkpoint(me.directory)
    before = me.resources()
    dist.barrier()
    me.train()
    with me.struck(victims):
        first = outcome(_save, manager, me.case.staging)
        manager.sync()  # what goes on behind it meets the fault too
    dist.barrier()
    seen = {
        "first": first,
        "counted": me.checkpoint.save_counter - counter,
        "same lists": manager.checkpoints == lists,
        "same newest": readers.latest_checkpoint(me.directory) == newest,
        "logged": list(me.logged.texts),
    }
    after = me.trees()
    seen["changed"] = [name for name in trees if after.get(name) != trees[name]]
    seen["left"] = me.unlisted()
    found = me.resources(before)
    seen["leaked"] = "" if found == before else f"{before} -> {found}"
    dist.barrier()
    me.logged.texts.clear()
    seen["next"] = outcome(manager.save)
    manager.sync()
    seen["left after"] = me.unlisted()
    return seen


def _save(manager: CheckpointManager, staging: str) -> str | None:
    """Save; if behind the caller, until its outcome is there."""
    if not staging:
        return manager.save()
    path = manager.save(options=CheckpointOptions(enable_async=True, staging=staging))
    manager.sync()
    return path


# Saves


def _of_shard(calls: str, **how: Any) -> Injected:
    return Injected(calls, "{pending}/rank-0000{rank}-of-00002.safetensors", **how)


def _of_manifest(calls: str) -> Injected:
    return Injected(calls, "{pending}/manifest.json")


_WRITES = "pwritev,pwritev2,pwrite64"
_LSTATS = "lstat,newfstatat,statx"
_CHIEF = (0,)
_BEGIN = {"at": "before", "victims": _CHIEF}
_INODES = {**_BEGIN, "disk": "nr_inodes=100"}
_UNKNOWN = {"kind": "OutcomeUnknown", "victims": _CHIEF}
_WELL = {"kind": "ok", "victims": _CHIEF}

SAVES = [
    # S1: the user's own code
    Case("user", faults.Descriptors(), ("OSError",), at="user code", victims=(1,)),
    # S2: the pending directory
    Case("mkdir", Injected("mkdir"), ("mkdir", ".pending"), **_BEGIN),
    Case("may-not-mkdir", faults.Permission(), ("mkdir", ".pending"), **_BEGIN),
    Case("read-only-mkdir", faults.ReadOnly(), ("mkdir", ".pending"), **_BEGIN),
    Case("inodes-for-nothing", faults.NoInodes(0), ("mkdir", ".pending"), **_INODES),
    Case("no-descriptor", faults.Descriptors(), ("open", "rank"), leaves=1, **_BEGIN),
    # S5: shard files
    Case("shard-open", _of_shard("openat"), ("open", ".safetensors")),
    Case("shard-write", _of_shard(_WRITES), ("write", ".safetensors")),
    Case("shard-fsync", _of_shard("fsync"), ("fsync", ".safetensors")),
    Case("pending-fsync", Injected("fsync", "{pending}"), ("fsync", ".pending")),
    Case("shard-reserve", _of_shard("fallocate"), ("fallocate", ".safetensors")),
    Case("file-size", faults.FileSize(20_000), ("fallocate", ".safetensors")),
    Case("permission", faults.Permission(), ("open", ".safetensors"), victims=(1,)),
    Case("permission-chief", faults.Permission(), ("open",), victims=_CHIEF, leaves=1),
    Case("descriptors", faults.Descriptors(), ("open", ".safetensors"), victims=(1,)),
    Case("descriptors-chief", faults.Descriptors(), ("open",), victims=_CHIEF, leaves=1),
    Case("read-only", faults.ReadOnlyHere(), ("open", ".safetensors"), victims=(1,)),
    Case("read-only-chief", faults.ReadOnlyHere(), ("open",), victims=_CHIEF, leaves=1),
    Case(
        "read-only-for-all",
        faults.ReadOnly(),
        ("open",),
        victims=(1,),
        failed="all",
        leaves=1,
    ),
    Case(
        "full",
        faults.FullDisk(),
        ("fallocate", "needed, ", "inodes are free there"),
        failed="all",
        disk="size=16m",
    ),
    Case(
        "full-for-one",
        faults.FullDisk(2**20),
        ("fallocate",),
        victims=(1,),
        failed="some",
        disk="size=32m",
        big_ranks=(1,),
    ),
    Case(
        "full-for-chief",
        faults.FullDisk(2**20),
        ("fallocate",),
        victims=_CHIEF,
        failed="some",
        disk="size=32m",
        big_ranks=(0,),
    ),
    Case(
        "quota",
        faults.Quota(),
        ("fallocate",),
        failed="all",
        disk="quota",
        big_ranks=(0, 1),
    ),
    Case(
        "inodes-for-pending",
        faults.NoInodes(1),
        ("open",),
        at="before",
        failed="all",
        disk="nr_inodes=100",
    ),
    Case("short-write", _of_shard("pwritev,pwritev2", result=0, when="1"), kind="ok"),
    Case(
        "interrupted",
        _of_shard(f"openat,fsync,{_WRITES}", error="EINTR", when="1"),
        kind="ok",
    ),
    Case("one-of-four", faults.Permission(), ("open",), victims=(2,), world_size=4),
    Case(
        "two-of-four",
        faults.Several({1: faults.Permission(), 3: faults.FileSize(999)}),
        (".safetensors",),
        victims=(1, 3),
        together=True,
        world_size=4,
    ),
    # S7: the commit
    Case("manifest-open", _of_manifest("openat"), ("open", "manifest"), victims=_CHIEF),
    Case("manifest-write", _of_manifest(_WRITES), ("write", "manifest"), victims=_CHIEF),
    Case("manifest-fsync", _of_manifest("fsync"), ("fsync", "manifest"), victims=_CHIEF),
    Case("publish", Injected("rename", "{pending}"), ("rename",), victims=_CHIEF),
    Case(
        "published-fsync",
        Injected("fsync", "{directory}", when="1"),
        ("fsync", "/run"),
        victims=_CHIEF,
    ),
    Case(
        "record-lstat", Injected(_LSTATS, "{record}"), ("lstat", ".state"), victims=_CHIEF
    ),
    Case("inodes-for-shards", faults.NoInodes(3), ("open", "manifest"), **_INODES),
    Case("inodes-for-manifest", faults.NoInodes(4), ("open", ".tmp"), **_INODES),
    Case(
        "link",
        Injected("link,linkat", "{record}"),
        ("link", ".state"),
        leaves=1,
        left_for_claim=True,
        **_UNKNOWN,
    ),
    Case(
        "inodes-for-record",
        faults.NoInodes(5),
        ("link", ".state"),
        leaves=1,
        left_for_claim=True,
        kind="OutcomeUnknown",
        **_INODES,
    ),
    # The record is there: what it releases waits for the next one.
    Case(
        "state-fsync",
        Injected("fsync", "{state}"),
        ("fsync", ".state"),
        leaves=1,
        **_UNKNOWN,
    ),
    Case(
        "state-list",
        Injected("getdents64", "{state}"),
        ("list", ".state"),
        leaves=1,
        **_UNKNOWN,
    ),
    # S9: behind the commit
    Case("copy-rename", Injected("rename", when="2"), ("state file", "rename"), **_WELL),
    Case("trash-rename", Injected("rename", "{oldest}"), ("cleaning",), leaves=1, **_WELL),
    Case("trash-unlink", Injected("unlinkat", "{trash}"), ("cleaning",), leaves=1, **_WELL),
    Case("immutable", faults.Immutable(), ("cleaning",), leaves=1, **_WELL),
]


_BEHIND = {
    **dict.fromkeys(("shard-open", "shard-write", "read-only", "full-for-one"), "eager"),
    **dict.fromkeys(("short-write", "shard-fsync", "file-size", "two-of-four"), "lazy"),
    **dict.fromkeys(("manifest-write", "state-fsync", "link"), "lazy"),
}
ASYNC_SAVES = [
    replace(case, name=f"{case.name}-{_BEHIND[case.name]}", staging=_BEHIND[case.name])
    for case in SAVES
    if case.name in _BEHIND
]


# Each step, and each kind of fault, is in one of the others.
@_each(
    SAVES + ASYNC_SAVES,
    "shard-write shard-write-eager full link link-lazy trash-rename",
)
def test_hard_error_in_a_save_fails_it_alike_and_harms_nothing(place, case):
    """One error and table on all ranks, older checkpoints as they were, no leak."""
    directory = place(case)
    results = values_of(run_ranks(_fail_saves, case.world_size, directory, case))
    assert_all_whole(directory)
    for index, victims in enumerate(case.strikes):
        told = [result[index] for result in results]
        for rank, seen in enumerate(told):
            label = f"rank {rank}, on {victims}: {seen}"
            _check_alike(case, victims, rank, [one["first"] for one in told])
            assert seen["leaked"] == "", label
            assert len(seen["left"]) == case.leaves, label
            assert seen["next"].kind == "ok", label
            assert seen["left after"] == [] or case.left_for_claim, label
            assert seen["next"].text == told[0]["next"].text, label
            if case.kind == "ok":
                assert seen["counted"] == 1 and not seen["same newest"], label
                assert len(seen["changed"]) == 1, label  # released
                for text in case.texts if rank == 0 else ():
                    assert text in " ".join(seen["logged"]), label
            else:
                assert seen["same lists"], label
                assert seen["counted"] == (case.kind == "OutcomeUnknown"), label
                in_record = case.kind == "OutcomeUnknown" and not case.left_for_claim
                assert seen["same newest"] != in_record, label
                assert len(seen["changed"]) == in_record, label
    for result in results:
        assert result[-1]["left at last"] == []


def _check_alike(
    case: Case, victims: tuple[int, ...], rank: int, firsts: list[Any]
) -> None:
    """Check what one rank was told against the case, and against the others."""
    first, everyone = firsts[rank], {*range(len(firsts))}
    assert first.kind == case.kind, first
    assert first.text == firsts[0].text and first.failures == firsts[0].failures
    assert first.net_seconds < 10, first
    if first.kind == "ok":
        return
    for text in (case.fault.reason, *case.texts):
        assert text in first.text, (text, first)
    if case.failed == "nobody":
        return
    culprits = {*victims}
    if first.kind in ("SaveFailed", "RestoreFailed"):
        failed = {*first.failures}
        assert culprits <= failed <= everyone, first
        assert case.failed != "victim" or failed == culprits, first
        assert case.failed != "all" or failed == everyone, first
        texts = case.texts if first.kind == "SaveFailed" else ()
        for text in (case.fault.reason, *texts):
            assert all(text in failure for failure in first.failures.values()), first
        culprits = failed
    assert bool(first.cause) == (rank in culprits), first


# Restores


def _fail_restores(rank: int, directory: str, case: Case) -> list[dict[str, Any]]:
    """Save, run into the fault while restoring, and restore again; for each victim."""
    return [
        _fail_a_restore(rank, f"{directory}-{victims[0]}", case, victims)
        for victims in case.strikes
    ]


def _fail_a_restore(
    rank: int, directory: str, case: Case, victims: tuple[int, ...]
) -> dict[str, Any]:
    me = Rank(rank, directory, case)
    manager = me.manager(max_to_keep=None, init_fn=lambda: me.own.fill_(0))
    states = {0: me.state()}
    for number in range(1, case.num_checkpoints + 1):
        me.train()
        manager.save()
        states[number] = me.state()
    manager.sync()
    trees = me.trees()
    me.train()
    live = me.state()
    before = me.resources()
    dist.barrier()
    with me.struck(victims):
        first = outcome(manager.restore_or_initialize)
    seen = {
        "first": first,
        "has": [number for number, state in states.items() if state == me.state()],
        "as before": me.state() == live,
        "refused": outcome(manager.save) if case.touched else None,
    }
    found = me.resources(before)
    seen["leaked"] = "" if found == before else f"{before} -> {found}"
    dist.barrier()
    seen["then"] = outcome(manager.restore_or_initialize)
    seen["then has"] = [n for n, state in states.items() if state == me.state()]
    dist.barrier()
    seen["same trees"] = me.trees() == trees
    me.train()
    seen["next"] = outcome(manager.save)
    manager.sync()
    seen["left"] = me.unlisted()
    manager.close()
    return seen


def _reading(name: str, **how: Any) -> Injected:
    return Injected("preadv,preadv2,pread64", "{newest}/" + name, **how)


_SHARD = "rank-0000{rank}-of-00002.safetensors"
_READ = {"at": "before", "kind": "ok"}
_ONCE = {**_READ, "victims": _CHIEF, "until": "trying once more"}
_RAISES = {"at": "before", "kind": "RestoreFailed", "failed": "nobody"}
# More than is read at once: a file's header takes two reads, and its data several.
_BIG = {"big_ranks": (0, 1)}

RESTORES = [
    # R2: the manifest
    Case("manifest-once", _reading("manifest.json"), restores=3, **_ONCE),
    Case("manifest", _reading("manifest.json"), restores=2, **_READ),
    # R3: the files
    Case("open", Injected("openat", "{newest}/" + _SHARD), restores=2, **_READ),
    Case("header", _reading(_SHARD), restores=2, **_READ),
    Case("may-not-read", faults.Unreadable(), restores=2, **_READ),
    Case("missing", faults.Missing(), restores=2, **_READ),
    Case("hidden", faults.Hidden(), restores=2, **_READ),
    Case("truncated", faults.Truncated(), restores=2, then_restores=2, **_READ),
    Case("truncated-here", faults.TruncatedHere(), restores=2, victims=(1,), **_READ),
    Case("descriptors", faults.Descriptors(), **_RAISES),
    # R4: the bytes
    Case("data-once", _reading(_SHARD, when="3+"), restores=3, **_BIG, **_ONCE),
    Case("data", _reading(_SHARD, when="3+"), restores=2, **_BIG, **_READ),
    Case(
        "data-of-the-only-one",
        _reading(_SHARD, when="3+"),
        ("mixture",),
        touched=True,
        then_restores=1,
        num_checkpoints=1,
        **_BIG,
        **_RAISES,
    ),
    # R5: the user's own code
    Case(
        "load-state-dict",
        faults.Descriptors(),
        ("undefined",),
        at="user code",
        kind="RestoreFailed",
        touched=True,
    ),
]


@pytest.mark.covers("restore: unreadable")
@_each(RESTORES, "manifest-once truncated")
def test_hard_error_in_a_restore_is_survived_or_told_alike(place, case):
    """All ranks fall back to the same checkpoint, or raise the same; then all is well."""
    directory = place(case)
    results = values_of(run_ranks(_fail_restores, 2, directory, case))
    for index, victims in enumerate(case.strikes):
        told = [result[index] for result in results]
        path = f"{directory}-{victims[0]}/ckpt-"
        for rank, seen in enumerate(told):
            label = f"rank {rank}, on {victims}: {seen}"
            first = seen["first"]
            _check_alike(case, victims, rank, [one["first"] for one in told])
            if case.kind == "ok":
                assert first.text == f"{path}{case.restores}", label
                assert seen["has"] == [case.restores], label
            else:
                assert seen["as before"] or case.touched, label
            if case.touched:
                assert seen["refused"].kind == "RestoreFailed", label
                assert "Restore successfully before saving" in seen["refused"].text
            assert seen["leaked"] == "", label
            assert seen["then"].text == f"{path}{case.then_restores}", label
            assert seen["then has"] == [case.then_restores], label
            assert seen["next"].text == f"{path}{case.then_restores + 1}", label
            assert seen["same trees"] or case.name == "truncated", label
            assert seen["left"] == [], label
        assert_all_whole(f"{directory}-{victims[0]}")


# Claims


def _fail_claims(rank: int, directory: str, case: Case) -> list[dict[str, Any]]:
    """Save, run into the fault while claiming anew, and claim again; for each victim."""
    return [
        _fail_a_claim(rank, f"{directory}-{victims[0]}", case, victims)
        for victims in case.strikes
    ]


def _fail_a_claim(
    rank: int, directory: str, case: Case, victims: tuple[int, ...]
) -> dict[str, Any]:
    me = Rank(rank, directory, case)
    with me.manager() as manager:
        for _ in range(2):
            me.train()
            manager.save()
    saved, trees = me.state(), me.trees()
    me.train()
    live = me.state()
    if case.at == "construct":
        with me.struck(victims):
            first = outcome(me.manager)
        manager = me.manager()
    else:
        manager = me.manager()
        before = me.resources()
        dist.barrier()
        with me.struck(victims):
            first = outcome(manager.restore_or_initialize)
        found = me.resources(before)
        assert found == before, f"{before} -> {found}"
    seen = {"first": first, "as before": me.state() == live}
    seen["same trees"] = me.trees() == trees
    seen["left"] = me.unlisted()
    seen["then"] = outcome(manager.restore_or_initialize)
    assert me.state() == saved
    manager.sync()
    seen["left after"] = me.unlisted()
    me.train()
    seen["next"] = outcome(manager.save)
    manager.close()
    with me.manager() as manager:
        assert manager.restore_or_initialize() == seen["next"].text
        manager.sync()
        seen["left at last"] = me.unlisted()
    return seen


_REFUSED = {"at": "before", "kind": "StorageError"}
_C1 = {**_REFUSED, "victims": _CHIEF}
_C2 = {**_REFUSED, "victims": (1,)}

CLAIMS = [
    Case(
        "construct",
        Injected("getdents64", "{state}"),
        ("list",),
        at="construct",
        victims=_CHIEF,
        kind="StorageError",
    ),
    # C1: the chief's probes
    Case("read-only", faults.ReadOnly(), ("open", ".state"), **_C1),
    Case("permission", faults.Permission(), ("open", ".state"), **_C1),
    Case("descriptors", faults.Descriptors(), ("list",), **_C1),
    Case("little-room", faults.LittleRoom(), disk="size=4m", failed="nobody", **_C1),
    Case("inodes", faults.NoInodes(0), ("open", ".state"), disk="nr_inodes=100", **_C1),
    Case("list", Injected("getdents64", "{state}"), ("list", ".state"), **_C1),
    Case("read", Injected("preadv,preadv2", "{newest_record}"), ("read", ".json"), **_C1),
    Case("link", Injected("link,linkat"), ("no hard links", "link"), **_C1),
    Case("link-fsync", Injected("fsync", when="1"), ("fsync", ".tmp"), **_C1),
    Case("probe-fsync", Injected("fsync", when="2"), ("fsync", ".probe"), **_C1),
    # C2: the other ranks' probes
    Case("elsewhere", faults.Elsewhere(), ("rank 1",), **_C2),
    Case("read-only-here", faults.ReadOnlyHere(), ("rank 1: open", ".probe"), **_C2),
    Case("permission-here", faults.Permission(), ("rank 1: open", ".probe"), **_C2),
    Case("descriptors-here", faults.Descriptors(), ("rank 1: open", ".probe"), **_C2),
    Case("fsync-here", Injected("fsync"), ("rank 1: fsync", ".probe"), **_C2),
    Case(
        "unlink-here",
        Injected("unlink"),
        ("rank 1: unlink", ".probe"),
        leaves=1,
        left_for_claim=True,
        **_C2,
    ),
    # C3: the record
    Case(
        "record-link",
        Injected("link,linkat", "{record}"),
        ("link", ".json"),
        at="before",
        **_UNKNOWN,
    ),
    Case(
        "record-fsync",
        Injected("fsync", "{state}"),
        ("fsync", ".state"),
        at="before",
        **_UNKNOWN,
    ),
]


@pytest.mark.covers("claim: C1", "claim: C2", "claim: C3")
@_each(CLAIMS, "read elsewhere record-link")
def test_hard_error_in_a_claim_is_told_alike_and_the_next_one_works(place, case):
    """Nothing is claimed, touched or left; the same manager claims once it can."""
    directory = place(case)
    results = values_of(run_ranks(_fail_claims, 2, directory, case))
    for index, victims in enumerate(case.strikes):
        told = [result[index] for result in results]
        path = f"{directory}-{victims[0]}/ckpt-"
        for rank, seen in enumerate(told):
            label = f"rank {rank}: {seen}"
            _check_alike(case, victims, rank, [one["first"] for one in told])
            assert seen["as before"] and seen["same trees"], label
            assert len(seen["left"]) == case.leaves, label
            assert seen["then"].text == f"{path}2", label
            assert seen["left after"] == [] or case.left_for_claim, label
            assert seen["next"].text == f"{path}3", label
            assert seen["left at last"] == [], label


# A filesystem that stops, or does not answer


def _save_on_a_bad_disk(rank: int, directory: str, case: Case) -> dict[str, Any]:
    """Save until the disk goes bad, try everything on it, and come back when it is well."""
    me = Rank(rank, directory, case)
    manager = me.manager()
    for _ in range(2):
        me.train()
        manager.save()
    saved = me.state()
    manager.sync()
    before = me.resources()
    dist.barrier()
    me.train()
    seen = {}
    with me.struck(case.victims):
        seen["first"] = outcome(manager.save)
        seen["again"] = outcome(manager.save)
        dist.barrier()
    seen["latest"] = manager.latest_checkpoint
    if case.name == "stopped":
        # As after a reboot: nothing of it is mounted or open.
        manager.close()
        dist.barrier()
        if rank == 0:
            case.fault.disk.switch_on()
        dist.barrier()
        manager = me.manager()
        assert manager.restore_or_initialize() == seen["latest"]
        assert me.state() == saved
        me.train()
    else:
        seen["late"] = outcome(manager.sync)
        found = me.resources(before)
        seen["leaked"] = "" if found == before else f"{before} -> {found}"
    seen["next"] = outcome(manager.save)
    saved = me.state()
    manager.sync()
    seen["left after"] = me.unlisted()
    seen["closed"] = outcome(manager.close)
    me.train()
    with me.manager() as manager:
        seen["restored"] = manager.restore_or_initialize()
        assert me.state() == saved
        manager.sync()
        seen["left at last"] = me.unlisted()
    return seen


@pytest.fixture
def disk(tmp_path) -> Iterator[power.Disk]:
    """Mount a filesystem of one's own, or skip."""
    try:
        with power.mounted_disk(str(tmp_path / "image"), str(tmp_path / "disk")) as disk:
            yield disk
    except power.NoPowerSwitch as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("at", [pytest.param("before", marks=pytest.mark.full), "begun"])
def test_disk_that_stops_fails_all_ranks_and_is_used_again_after_a_mount(disk, at):
    """A filesystem that has shut itself down: all fail alike, and nothing is lost."""
    failed = "victim" if at == "before" else "all"
    case = Case("stopped", faults.Stopped(disk), at=at, victims=(0,), failed=failed)
    directory = os.path.join(disk.path, "run")
    results = values_of(run_ranks(_save_on_a_bad_disk, 2, directory, case))
    firsts = [seen["first"] for seen in results]
    for rank, seen in enumerate(results):
        _check_alike(case, (0,), rank, firsts)
        assert seen["again"].kind == "SaveFailed", seen
        _check_came_back(seen, directory)
    assert_all_whole(directory)


@pytest.mark.parametrize("at", [pytest.param("before", marks=pytest.mark.full), "begun"])
def test_disk_that_hangs_ends_in_time_and_is_used_again_when_it_answers(disk, at):
    """A frozen filesystem: all are told at the deadline; then the same manager goes on."""
    case = Case(
        "frozen", faults.Frozen(), at=at, victims=(1,), timeout_seconds=_SHORT_SECONDS
    )
    directory = os.path.join(disk.path, "run")
    try:
        results = run_ranks(_save_on_a_bad_disk, 2, directory, case, timeout=30)
    finally:
        faults.thaw(disk.path)
    told = values_of(results)
    for seen in told:
        for one in (seen["first"], seen["again"]):
            assert one.kind == "StorageTimeout", one
            assert "did not come back" in one.text and ".pending" in one.text
            assert one.net_seconds < _SHORT_SECONDS + 2, one
        assert seen["first"].text == told[0]["first"].text
        assert seen["late"].kind == "ok" and seen["leaked"] == "", seen
        _check_came_back(seen, directory)
    assert_all_whole(directory)


def _check_came_back(seen: dict[str, Any], directory: str) -> None:
    assert seen["latest"] == f"{directory}/ckpt-2", seen
    assert seen["next"].text == f"{directory}/ckpt-3", seen
    assert seen["left after"] == [], seen
    assert seen["closed"].kind == "ok", seen
    assert seen["restored"] == f"{directory}/ckpt-3", seen
    assert seen["left at last"] == [], seen


@pytest.mark.covers("waiting: its filesystem hangs")
def test_disk_that_hangs_on_one_rank_fails_that_rank_on_all(disk, scratch):
    """The others, and the chief's cleaning up, do not hang with it."""
    case = Case(
        "hangs",
        faults.FrozenHere(disk.path),
        ("open", ".safetensors"),
        victims=(1,),
        timeout_seconds=_SHORT_SECONDS,
    )
    if case.fault.missing():
        pytest.skip(case.fault.missing())
    directory = os.path.join(scratch, "run")
    try:
        results = run_ranks(_fail_saves, 2, directory, case, timeout=30)
    finally:
        faults.thaw(disk.path)
    told = [result[0] for result in values_of(results)]
    for rank, seen in enumerate(told):
        _check_alike(case, (1,), rank, [one["first"] for one in told])
        assert seen["first"].net_seconds < _SHORT_SECONDS + 2, seen
        assert seen["leaked"] == "" and seen["left"] == [] and seen["same lists"], seen
        assert seen["next"].text == f"{directory}/ckpt-3", seen
    assert_all_whole(directory)


def _hang_in_the_commit(rank: int, directory: str, operation: str) -> dict[str, Any]:
    """Freeze the disk right before one step of the commit; thaw it; save again."""
    checkpoint = Checkpoint(weights=torch.ones(1000) * 7)
    manager = CheckpointManager(
        checkpoint, directory, max_to_keep=None, timeout=timedelta(seconds=_SHORT_SECONDS)
    )
    manager.save()
    manager.sync()
    dist.barrier()
    disk = os.path.dirname(directory)
    if rank == 0:
        real = getattr(posix, operation)

        def freeze_first(source: str, target: str) -> None:
            setattr(posix, operation, real)
            faults.freeze(disk)
            real(source, target)

        setattr(posix, operation, freeze_first)
    seen: dict[str, Any] = {"first": outcome(manager.save), "again": outcome(manager.save)}
    dist.barrier()
    if rank == 0:
        faults.thaw(disk)
    dist.barrier()
    seen["next"] = outcome(manager.save)
    seen["lists"] = manager.checkpoints
    manager.sync()
    seen["closed"] = outcome(manager.close)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        seen["restored"] = manager.restore_or_initialize()
        manager.sync()
        seen["left"] = leftovers(directory)
    return seen


@pytest.mark.parametrize(
    "operation", [pytest.param("rename", marks=pytest.mark.full), "link"]
)
def test_commit_that_hangs_is_of_unknown_outcome_and_turns_up(disk, operation):
    """Nobody calls it failed: when the disk answers again the commit goes through."""
    directory = os.path.join(disk.path, "run")
    try:
        results = run_ranks(_hang_in_the_commit, 2, directory, operation, timeout=30)
    finally:
        faults.thaw(disk.path)
    told = values_of(results)
    for seen in told:
        assert seen["first"].kind == "OutcomeUnknown", seen
        assert seen["first"].text == told[0]["first"].text
        assert f"{operation} " in seen["first"].text and "unknown" in seen["first"].text
        assert seen["first"].net_seconds < _SHORT_SECONDS + 1, seen
        assert seen["again"].kind == "StorageTimeout", seen
        # The number of the one that hung is not given to another.
        assert seen["next"].text == f"{directory}/ckpt-3", seen
        assert seen["lists"] == [f"{directory}/ckpt-{n}" for n in (1, 2, 3)], seen
        assert seen["closed"].kind == "ok", seen
        assert seen["restored"] == f"{directory}/ckpt-3" and seen["left"] == [], seen
    assert_all_whole(directory)
