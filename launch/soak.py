"""Train for a while under torchrun, kill workers at random, and see that nothing is lost.

A worker, sometimes the chief, gets SIGKILL in training, in a save, in a restore, or right
after a restart. torchrun restarts the job, which must go on from the newest checkpoint that
was acknowledged, or a newer one. Exits with 1 if anything was lost, or hung, or went wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TextIO

from distckpt import paths
from distckpt.readers import read_record
from distckpt.record import Entry
from distckpt.run_directory import RunDirectory
from distckpt.verify import verify_attempt

HERE = Path(__file__).parent
WORKER = HERE / "timed_train.py"
KEPT = 3
# So small that most of the time goes into what is looked at: saves and restarts.
SMALL = ["--steps", "1000000000", "--interval", "10", "--max-to-keep", str(KEPT)]
SMALL += ["--width", "64", "--layers", "2", "--context", "64", "--batch-size", "4"]
SMALL += ["--text", str(HERE.parent / "distckpt"), "--timeout-seconds", "30"]
# Longer than any wait that has a deadline; and than some restarts one after the other.
HUNG_SECONDS, STUCK_SECONDS = 60.0, 240.0

# When to kill: after which event, and how many seconds later at most. A kill in the restart
# that follows another kill makes that one longer, so these are rarer.
IN_RUNS = {"training": ("stepped", 5.0), "a save": ("saving", 0.06)}
IN_RESTARTS = {"a start": ("started", 4.0), "a restore": ("restoring", 0.1)}
IN_RESTARTS_SHARE, IN_RESTARTS_AT_MOST = 0.35, 2
PHASES = {
    "launcher, until the workers start": "started",
    "imports, process group": "connected",
    "model, data": "restoring",
    "claim, restore": "restored",
}


class Failed(Exception):
    """The job hangs, or ended by itself."""


@dataclass(frozen=True)
class Event:
    """What a worker tells: see timed_train.py."""

    name: str
    rank: int
    restart: int
    at: float
    text: str


@dataclass
class Kill:
    """One worker that was killed.

    Attributes:
        rank: Which.
        restart: How often the job had been restarted before.
        moment: When.
        at: The same, in seconds.
        detected: When the first of the others, or the launcher, reacted.
        back: The first training step afterwards.
        phases: What took how many seconds until then; empty if the next kill came first.
    """

    rank: int
    restart: int
    moment: str
    at: float
    detected: float = 0.0
    back: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


class Job:
    """One torchrun and its workers."""

    def __init__(self, directory: str, strategy: str, num_ranks: int, log: TextIO) -> None:
        self._arguments = ["--directory", directory, "--strategy", strategy, *SMALL]
        self._num_ranks = num_ranks
        self._log = log
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._agent: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.tail: deque[str] = deque(maxlen=40)

    def start(self, *more: str) -> None:
        """Start it; the events come from then on."""
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nproc-per-node", str(self._num_ranks), "--max-restarts", "1000000"]
        command += ["--monitor-interval", "0.1", "--master-port", str(_free_port())]
        self._agent = subprocess.Popen(
            [*command, str(WORKER), *self._arguments, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._events = queue.Queue()
        self._reader = threading.Thread(
            target=self._read, args=(self._agent, self._events), daemon=True
        )
        self._reader.start()

    def _read(
        self, agent: subprocess.Popen[str], events: queue.Queue[Event | None]
    ) -> None:
        assert agent.stdout is not None
        for line in agent.stdout:
            self._log.write(line)
            words = line.split(maxsplit=5)
            if len(words) >= 5 and words[0] == "time":
                _, name, rank, restart, at, *values = words
                text = values[0].strip() if values else ""
                events.put(Event(name, int(rank), int(restart), float(at), text))
            else:
                self.tail.append(line.rstrip())
        events.put(None)

    def next_event(self, until: float) -> Event | None:
        """Wait for the next event, but not beyond a time; None if there was none."""
        try:
            event = self._events.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None
        if event is None:
            msg = "torchrun ended by itself"
            raise Failed(msg)
        return event

    def workers(self) -> dict[int, int]:
        """Return the workers that are alive: their process ids by rank."""
        assert self._agent is not None
        pids = [
            int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()
        ]
        children = [pid for pid in pids if _parent_of(pid) == self._agent.pid]
        found = {_rank_of(pid): pid for pid in children}
        return {rank: pid for rank, pid in found.items() if rank is not None}

    def kill(self, pid: int) -> float:
        """Kill one worker; returns when."""
        assert self._agent is not None
        descriptor = os.pidfd_open(pid)
        try:
            # Between the two it cannot become another process's.
            if _parent_of(pid) != self._agent.pid:
                raise ProcessLookupError
            at = time.monotonic()
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
        return at

    def stop(self) -> None:
        """End it."""
        if self._agent is None or self._reader is None:
            return
        workers = self.workers()
        self._agent.terminate()
        try:
            self._agent.wait(20)
        except subprocess.TimeoutExpired:
            for pid in workers.values():
                with suppress(ProcessLookupError):
                    self.kill(pid)
            self._agent.kill()
            self._agent.wait()
        self._reader.join(10)
        self._agent = None

    def wait(self) -> int:
        """Wait until it has ended by itself; returns its exit status."""
        assert self._agent is not None
        try:
            return self._agent.wait(HUNG_SECONDS)
        except subprocess.TimeoutExpired as error:
            msg = "the last restore did not end"
            raise Failed(msg) from error


def _rank_of(pid: int) -> int | None:
    """Tell which rank a process is; None if it is none, or has ended."""
    with suppress(OSError):
        folder = Path(f"/proc/{pid}")
        is_worker = str(WORKER).encode() in (folder / "cmdline").read_bytes()
        for item in (folder / "environ").read_bytes().split(b"\0") if is_worker else ():
            name, _, value = item.partition(b"=")
            if name == b"RANK":
                return int(value)
    return None


def _stat(pid: int) -> list[str]:
    """Return a process's state, its parent, and more; empty if it has gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _parent_of(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[1]) if stat else None


def _is_running(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Soak:
    """One strategy's part of the whole, and what came of it."""

    def __init__(
        self, directory: Path, strategy: str, num_ranks: int, source: random.Random
    ) -> None:
        self.strategy = strategy
        self._directory = str(directory)
        self._num_ranks = num_ranks
        self._source = source
        self._started = 0.0
        self._log = directory.with_suffix(".log").open("w", buffering=1)
        self._job = Job(self._directory, strategy, num_ranks, self._log)
        self._restart = 0
        # In the newest restart: which ranks have come how far, and when.
        self._reached: dict[str, dict[int, Event]] = {}
        self._step_of: dict[int, int] = {}
        self._last_event = self._last_progress = 0.0
        self._restored_step = 0
        self.kills: list[Kill] = []
        self.num_restarts = 0
        self.num_verified = 0
        self.lost: list[str] = []
        self.hung: list[str] = []
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()

    @property
    def num_saved(self) -> int:
        """How many saves were acknowledged."""
        return len(self._step_of)

    def run(self, seconds: float) -> None:
        """Train and kill for so long; then restore once more and verify everything."""
        self._started = self._last_event = self._last_progress = time.monotonic()
        try:
            self._job.start()
            self._await(lambda: self._all("stepped"), math.inf)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                self._kill_one(deadline)
            self._job.stop()
            self._end()
        except Failed as error:
            self.hung.append(f"{error}; its last words:\n" + "\n".join(self._job.tail))
            self._say(f"FAILED: {self.hung[-1]}")
        finally:
            self._job.stop()
            self._log.close()

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"{self.strategy:4} {seconds:6.1f} s  {text}", flush=True)

    # Events

    def _all(self, name: str) -> bool:
        """Tell whether all ranks of the newest restart have come to an event."""
        return len(self._reached.get(name, {})) == self._num_ranks

    def _await(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Take events until something is so; False if the deadline came first."""
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._take_events(min(deadline, time.monotonic() + 0.02))
        return True

    def _take_events(self, until: float) -> None:
        event = self._job.next_event(until)
        now = time.monotonic()
        if event is not None:
            self._last_event = now
            if event.name in ("stepped", "saved"):
                self._last_progress = now
            self._take(event)
        if now - self._last_event > HUNG_SECONDS:
            msg = f"nothing has happened for {HUNG_SECONDS:.0f} s"
            raise Failed(msg)
        if now - self._last_progress > STUCK_SECONDS:
            msg = f"no training for {STUCK_SECONDS:.0f} s"
            raise Failed(msg)

    def _take(self, event: Event) -> None:
        if event.restart > self._restart:
            self._restart = event.restart
            self._reached = {}
            self.num_restarts += 1
        if event.name == "saved":
            step, path = event.text.split(maxsplit=1)
            self._step_of[_number(path)] = int(step)
        elif event.name == "failed":
            self._take_error(event)
        elif event.name == "left" and self.kills:
            self.kills[-1].detected = self.kills[-1].detected or event.at
        if event.restart == self._restart:
            self._take_of_this_restart(event)

    def _take_of_this_restart(self, event: Event) -> None:
        ranks = self._reached.setdefault(event.name, {})
        if event.rank in ranks:
            return
        ranks[event.rank] = event
        if event.name == "restored":
            self._check_restored(event)
        if len(ranks) == self._num_ranks:
            if event.name == "restored":
                self._check_disk()
            elif event.name == "stepped":
                self._note_restart()

    def _take_error(self, event: Event) -> None:
        self.errors[event.text] += 1
        if event.text.startswith("distckpt"):
            self.wrong.append(f"rank {event.rank}, restart {event.restart}: {event.text}")
            self._say(f"WRONG: {self.wrong[-1]}")

    def _fail(self, text: str) -> None:
        self.lost.append(text)
        self._say(f"LOST: {text}")

    def _note_restart(self) -> None:
        """The job is back: note what took how long."""
        back = min(event.at for event in self._reached["stepped"].values())
        waiting = [kill for kill in self.kills if not kill.back]
        for kill in waiting:
            kill.back = back
        if not waiting:
            return
        kill = waiting[-1]
        before = kill.detected or kill.at
        kill.phases["detection"] = before - kill.at
        for text, name in PHASES.items():
            at = max(event.at for event in self._reached[name].values())
            kill.phases[text], before = at - before, at
        kill.phases["first step"] = back - before
        self._say(
            f"back at step {self._restored_step}, {back - kill.at:.1f} s after the kill; "
            f"acknowledged until then: step {max(self._step_of.values(), default=0)}"
        )

    # What must be true

    def _check_restored(self, event: Event) -> None:
        """A restore must not go back behind what was acknowledged."""
        self._restored_step = int(event.text.split()[0])
        newest = max(self._step_of.values(), default=0)
        if self._restored_step < newest:
            self._fail(
                f"rank {event.rank} restored step {self._restored_step}, but step {newest} "
                "was acknowledged"
            )

    def _check_disk(self) -> None:
        """All that was acknowledged is listed, unless newer ones replaced it; and whole."""
        acknowledged = sorted(self._step_of)
        entries = self._committed()
        newest = sorted(entry.attempt.number for entry in entries)[-KEPT:]
        for number in acknowledged[-KEPT:]:
            dropped = len(newest) == KEPT and number < newest[0]
            if number not in newest and not dropped:
                self._fail(f"number {number} was acknowledged; listed are {newest}")
        for entry in entries:
            run = RunDirectory.at(self._directory)
            report = verify_attempt(run.attempt(entry.attempt), entry.manifest)
            # The job goes on meanwhile: what it has dropped since may be gone.
            if not report.ok and entry in self._committed():
                self._fail(f"number {entry.attempt.number}: {report.problems}")
            self.num_verified += 1

    def _committed(self) -> list[Entry]:
        record = read_record(RunDirectory.at(self._directory))
        return [] if record is None else list(record.committed)

    def _end(self) -> None:
        """Restore once more, and look at all that is there."""
        self._restart, self._reached = 0, {}
        self._job.start("--steps", "1")
        if not self._await(lambda: self._all("restored"), time.monotonic() + HUNG_SECONDS):
            msg = "the last restore did not end"
            raise Failed(msg)
        status = self._job.wait()
        if status != 0:
            msg = f"the last restore ended with exit status {status}"
            raise Failed(msg)
        listed = {entry.attempt.published for entry in self._committed()}
        for name in os.listdir(self._directory):
            unfinished = paths.parse_pending(name) or paths.parse_trash(name)
            unlisted = paths.parse_published(name) is not None and name not in listed
            if unfinished or unlisted:
                self._fail(f"left behind: {name}")
        command = [str(Path(sys.executable).with_name("distckpt")), "verify"]
        verified = subprocess.run([*command, self._directory], check=False)
        if verified.returncode != 0:
            self._fail(f"distckpt verify ended with {verified.returncode}")

    # Kills

    def _kill_one(self, deadline: float) -> None:
        moments = self._next_moments()
        moment = self._source.choice(sorted(moments))
        event_name, seconds = moments[moment]
        after = self.kills[-1].restart + 1 if self.kills else 0
        if moments is IN_RUNS:
            if not self._await(
                lambda: self._restart >= after and self._all("stepped"), deadline
            ):
                return
            self._reached.pop("saving", None)
        if not self._await(
            lambda: self._restart >= after and bool(self._reached.get(event_name)), deadline
        ):
            return
        self._await(lambda: False, time.monotonic() + self._source.uniform(0, seconds))
        workers = self._job.workers()
        if self._restart < after or not workers:
            return
        rank = self._source.choice(sorted(workers))
        try:
            at = self._job.kill(workers.pop(rank))
        except ProcessLookupError:
            return
        self.kills.append(Kill(rank, self._restart, moment, at))
        who = "rank 0, the chief," if rank == 0 else f"rank {rank}"
        self._say(f"kill {len(self.kills)}: {who} in {moment}, restart {self._restart}")
        self._wait_for_detection(self.kills[-1], workers)

    def _next_moments(self) -> dict[str, tuple[str, float]]:
        """Choose between kills in a run, and in the restart that is under way."""
        last = [kill.moment in IN_RESTARTS for kill in self.kills[-IN_RESTARTS_AT_MOST:]]
        may = bool(self.kills) and not all(last)
        return IN_RESTARTS if may and self._source.random() < IN_RESTARTS_SHARE else IN_RUNS

    def _wait_for_detection(self, kill: Kill, others: dict[int, int]) -> None:
        """Wait until another worker has noticed, or is ended by the launcher."""

        def is_detected() -> bool:
            if not kill.detected and not all(map(_is_running, others.values())):
                kill.detected = time.monotonic()
            return bool(kill.detected)

        if not others:
            kill.detected = kill.at
        self._await(is_detected, time.monotonic() + HUNG_SECONDS)


def _number(path: str) -> int:
    parsed = paths.parse_prefix(os.path.basename(path))
    assert parsed is not None
    return parsed[1]


# The whole


def report(soaks: Iterable[Soak]) -> bool:
    """Print what came of it; returns whether all is well."""
    every = list(soaks)
    kills = [kill for soak in every for kill in soak.kills]
    moments = Counter(kill.moment for kill in kills)
    chief = sum(kill.rank == 0 for kill in kills)
    by_moment = ", ".join(f"{number} in {moment}" for moment, number in moments.items())
    lost = [text for soak in every for text in soak.lost]
    hung = [text for soak in every for text in soak.hung]
    wrong = [text for soak in every for text in soak.wrong]
    print()
    print(f"kills                    {len(kills):6}  ({by_moment}; {chief} of the chief)")
    print(f"restarts                 {sum(soak.num_restarts for soak in every):6}")
    print(f"saves acknowledged       {sum(soak.num_saved for soak in every):6}")
    print(f"checkpoints verified     {sum(soak.num_verified for soak in every):6}")
    print(f"lost                     {len(lost):6}")
    print(f"hung                     {len(hung):6}")
    print(f"otherwise wrong          {len(wrong):6}")
    restarts = [kill for kill in kills if kill.phases]
    if restarts:
        print("\nfrom a kill to the first training step, in seconds:  median  longest")
        whole = [kill.back - kill.at for kill in restarts]
        phases = {"the whole restart": whole}
        for name in restarts[0].phases:
            phases[name] = [kill.phases[name] for kill in restarts]
        for name, seconds in phases.items():
            print(f"  {name:50} {median(seconds):6.2f}  {max(seconds):7.2f}")
        longest = max(kill.back - kill.at for kill in kills if kill.back)
        print(f"  {'with other kills on the way':50}         {longest:7.2f}")
    errors = Counter[str]()
    for soak in every:
        errors.update(soak.errors)
    for text, number in errors.most_common(5):
        print(f"an error that is not about a lost peer, {number} times: {text}")
    for text in [*lost, *hung, *wrong]:
        print(f"WRONG: {text}")
    return not [*lost, *hung, *wrong]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--strategy", choices=["ddp", "fsdp", "both"], default="both")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--directory", default="runs/soak", help="is emptied first")
    arguments = parser.parse_args()
    both = arguments.strategy == "both"
    strategies = ["ddp", "fsdp"] if both else [arguments.strategy]
    print(f"{arguments.minutes:g} minutes, {arguments.ranks} ranks, seed {arguments.seed}")
    # However this ends, torchrun and its workers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(arguments.directory)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = random.Random(arguments.seed)
    soaks = [Soak(folder / name, name, arguments.ranks, source) for name in strategies]
    for soak in soaks:
        soak.run(60 * arguments.minutes / len(soaks))
    sys.exit(0 if report(soaks) else 1)


if __name__ == "__main__":
    main()
