"""Make the golden run directories of one format: by real jobs, with the values beside.

    PYTHONPATH=tests/multiprocess python tests/golden/make.py tests/golden/format-2

makes each directory of ``CASES`` as ``<target>/<case>/``, and next to it
``<case>.expected.json`` with all that must be read from it. Expected values are taken from
the objects in memory before they are saved (``described.py``). The list that each
checkpoint must be in is written down here. No expected value is read from a checkpoint.

The directories of a format are made once, at the commit that ``made.json`` names, and
never again: they stand for the files that jobs of that version have left on disks. So the
script refuses a target that is there already. (While a format is provisional, each change
of it removes them first, and makes them anew.) It uses the public API and the command.
States that these cannot reach are made by killing processes and by changing bytes of files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from cases import SAVED, build, seed_all, train
from click.testing import CliRunner
from described import (
    SUMS,
    as_plain,
    describe,
    describe_own,
    merged,
    part,
    spelled,
    spelled_tensor,
    sums_of,
)
from harness import run_ranks, values_of

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    Replicated,
    best,
    every,
    latest,
)

ROOT = Path(__file__).resolve().parents[2]
MADE = "made.json"
EXPECTED = ".expected.json"
LIVE, KEPT, BAD, RELEASING = "live", "kept", "bad", "releasing"
MISSING = "missing"
# No host's name in what is checked in.
HOST = "golden"
WAIT_SECONDS = 60.0
FROZEN = (
    "Made once, at this commit, and never to be made again: these are the files that jobs "
    "of this version have left."
)
PROVISIONAL = (
    "Made anew for each change of the format while it is provisional: remove the folder "
    "first. Frozen when the format's number is a plain integer."
)
HIGHEST = 9 * 10**18  # a number of as many digits as a name may have


# On the ranks of a job


# Case and object.
_COPIES = {("fsdp-over-tp", "model"), ("meshes", "tensors")}


class Job:
    """One job in a run directory, as a rank of it sees it.

    Args:
        directory: The run directory, relative.
        max_to_keep: As of ``CheckpointManager``, which takes ``more``, too.
    """

    def __init__(self, directory, max_to_keep=None, *, restart=0, **more):
        random.seed(0)
        socket.gethostname = lambda: HOST
        os.environ["TORCHELASTIC_RUN_ID"] = "golden"
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
        self.directory = directory
        self.case = os.path.basename(directory)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        seed_all(SAVED + 10 * self.rank)
        self.objects = build(self.case, SAVED, as_job=dist.is_initialized())
        # On separate meshes there are copies: of what tensor parallelism has left alone.
        tracked = {
            name: Replicated(one) if (self.case, name) in _COPIES else one
            for name, one in self.objects.items()
        }
        self.checkpoint = Checkpoint(**tracked)
        self.name = more.get("checkpoint_name", "ckpt")
        self.step = self.objects.get("step")
        if self.step is not None:
            more["step_counter"] = self.step
        self.manager = CheckpointManager(self.checkpoint, directory, max_to_keep, **more)

    def train(self):
        """Give the optimizers state."""
        train(self.case, self.objects)

    def at(self, step):
        """Set the step, and change the state so that each checkpoint has another."""
        self.step.fill_(step)
        if "weight" in self.objects:
            self.objects["weight"].fill_(step / 8)

    def save(self, number=None, *, metrics=None, metadata=None, options=None):
        """Save, after a note of what is in memory."""
        counter = self.checkpoint.save_counter + 1
        prefix = f"{self.name}-{counter if number is None else number}"
        tracked = {name: getattr(self.checkpoint, name) for name in self.objects}
        mine = (describe(tracked).to_parts(), describe_own(tracked).to_parts())
        parts = [mine]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
        if self.rank == 0:
            tensors, same_as, values = merged([shared for shared, _ in parts])
            note = {
                "step": None if self.step is None else int(self.step),
                "world_size": len(parts),
                "metrics": spelled({k: float(v) for k, v in (metrics or {}).items()}),
                "metadata": spelled(metadata or {}),
                "tensors": tensors,
                "same_as": same_as,
                "values": {**values, "save_counter": spelled(counter)},
                "per_rank": [_own_part(own) for _, own in parts],
            }
            if self.case == "classes":
                note["plain"] = _plain_values(tracked)
            _write_json(_notes(self.directory) / f"{prefix}.json", note)
        path = self.manager.save(
            number, metrics=metrics, metadata=metadata, options=options
        )
        assert path == os.path.join(self.directory, prefix), (path, prefix)
        return path

    def close(self):
        """Close the manager; all is on the disk."""
        self.manager.close()


def _plain_values(tracked):
    """Spell what a reader without these objects has, where that is something else."""
    found = {}
    for name, value in tracked.items():
        if not isinstance(value, (torch.Tensor, torch.nn.Module)):
            plain = spelled(as_plain(value))
            if plain != spelled(value):
                found[part(name)] = plain
    return found


def _own_part(own):
    tensors, _, values = own
    spelled_tensors = {
        name: spelled_tensor(dtype, shape, data)
        for name, (dtype, shape, data, _) in tensors.items()
    }
    return {"tensors": spelled_tensors, "values": values}


def _notes(directory):
    return Path("notes", os.path.basename(directory))


def _write_json(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    # One line an entry: a difference shows what differs.
    path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


def _die_at(matches):
    """Kill this process at the first of Python's audit events that a function wants."""

    def hook(event, arguments):
        if matches(event, arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _await_path(path):
    deadline = time.monotonic() + WAIT_SECONDS
    while not os.path.exists(path):
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


def save_once(rank, directory, arguments):
    """Save what one training has made."""
    job = Job(directory)
    job.train()
    job.save(**arguments)
    job.close()


def save_twice(rank, directory, arguments):
    """Save before there is optimizer state, and after it."""
    job = Job(directory)
    job.save(**arguments)
    job.train()
    job.save(**arguments)
    job.close()


def save_asynchronously(rank, directory):
    """Save eagerly, then lazily."""
    job = Job(directory)
    job.train()
    job.save(options=CheckpointOptions(enable_async=True))
    job.manager.sync()
    job.train()
    options = CheckpointOptions(enable_async=True, staging="lazy")
    job.save(options=options, metrics={"loss": 0.5})
    job.manager.sync()
    job.close()


def retain(rank, directory):
    """Keep two, and preserve one for every second and a half: in two jobs."""
    job = Job(directory, 2, keep_checkpoint_every_n_hours=1.5 / 3600)
    for step in range(1, 7):
        job.at(step)
        job.save()
        time.sleep(1.0)
    job.close()
    job = Job(directory, 3, restart=1)
    job.manager.restore_or_initialize()
    job.at(7)
    job.save()
    job.close()


RULES = latest(1) | best(2, "loss", mode="min") | every(steps=100)


def follow_rules(rank, directory):
    """Keep by rules, pin, and leave requests that no commit has taken up."""
    job = Job(directory, RULES, checkpoint_name="net.v2")
    losses = {50: 3.0, 100: 1.0, 150: 2.0, 200: 5.0, 250: float("nan"), 300: 0.5}
    for step, loss in losses.items():
        job.at(step)
        if step == 300:
            distckpt.pin(os.path.join(directory, "net.v2-5"))
        job.save(metrics={"loss": loss, "step/ü": step})
    job.close()
    time.sleep(0.01)
    for ask in (
        lambda: distckpt.pin(os.path.join(directory, "net.v2-1")),
        lambda: distckpt.unpin(os.path.join(directory, "net.v2-5")),
        lambda: distckpt.add_metrics(os.path.join(directory, "net.v2-4"), {"loss": 0.25}),
        lambda: distckpt.request_save(directory),
    ):
        ask()
        time.sleep(0.01)  # their order is that of their times


def read_and_die(rank, directory, began, until):
    """Read the newest checkpoint, and be killed meanwhile."""
    socket.gethostname = lambda: HOST
    for _ in distckpt.checkpoints_iterator(directory):
        Path(began).touch()
        _await_path(until)
        os.kill(os.getpid(), signal.SIGKILL)


def write_history(rank, directory, restart):
    """Commit more often than there are records, in three jobs."""
    job = Job(directory, 3, restart=restart)
    job.manager.restore_or_initialize()
    for step in {0: range(1, 41), 1: range(41, 69), 2: ()}[restart]:
        job.at(step)
        job.save()
    if restart == 2:
        for step, number in ((69, -3), (70, HIGHEST), (71, HIGHEST), (72, None)):
            job.at(step)
            job.save(number)
    job.close()


def save_some(rank, directory, steps, max_to_keep=None, restart=0):
    """Restore what is there, and save at each of some steps."""
    job = Job(directory, max_to_keep, restart=restart)
    job.manager.restore_or_initialize()
    for step in steps:
        job.at(step)
        job.save()
    job.close()


def die_in_a_save(rank, directory, began, until):
    """Drop what somebody reads; then rank 1 is killed before it writes its file."""
    job = Job(directory, 1)
    job.at(1)
    job.save()
    Path(f"{began}.asked").touch()
    _await_path(began)
    job.at(2)
    job.save()

    def matches(event, arguments):
        path = str(arguments[0]) if event == "open" and arguments else ""
        if rank != 1 or ".pending" not in path or "rank-00001" not in path:
            return False
        folder, name = os.path.split(path)
        _await_path(os.path.join(folder, name.replace("00001", "00000", 1)))
        time.sleep(0.5)  # the other rank's file is written by then
        return True

    _die_at(matches)
    job.at(3)
    try:
        job.save()
    finally:
        Path(until).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_commit(rank, directory):
    """Be killed when the checkpoint is published and its record has no name yet."""
    job = Job(directory)
    job.at(1)
    job.save()
    job.manager.sync()
    _die_at(lambda event, arguments: event == "os.link")
    job.at(2)
    job.save()


def die_before_the_copy(rank, directory):
    """Be killed when a commit is recorded, and the copy for people is not written yet."""
    job = Job(directory, 1)
    job.at(1)
    job.save()
    job.manager.sync()

    def matches(event, arguments):
        return event == "os.rename" and os.path.basename(arguments[1]) == "checkpoint"

    _die_at(matches)
    job.at(2)
    job.save()


def die_in_a_claim(rank, directory):
    """Be killed before what a claim tries the filesystem with is removed."""
    job = Job(directory, 1, restart=1)

    def matches(event, arguments):
        return event == "os.remove" and ".probe-" in str(arguments[0])

    _die_at(matches)
    job.manager.restore_or_initialize()


def die_in_a_deletion(rank, directory):
    """Be killed when one of two files is deleted."""
    job = Job(directory, 1)
    job.at(1)
    job.save()
    job.manager.sync()
    removed = []

    def matches(event, arguments):
        if event != "os.remove" or not str(arguments[0]).startswith(("rank-", "manifest")):
            return False
        removed.append(arguments[0])
        return len(removed) == 2

    _die_at(matches)
    job.at(2)
    job.save()
    job.manager.sync()


def command(rank, *arguments):
    """Run the command."""
    from distckpt import cli

    socket.gethostname = lambda: HOST
    result = CliRunner().invoke(cli.main, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


# In this process: one function a directory


def _run(function, world_size, *arguments):
    results = run_ranks(function, world_size, *arguments, process_group=world_size > 1)
    return values_of(results)


def _run_killed(function, world_size, *arguments):
    results = run_ranks(function, world_size, *arguments, process_group=world_size > 1)
    assert [r.exit_code for r in results] == [-signal.SIGKILL] * world_size, results


def _saved_once(world_size, **arguments):
    def make(directory):
        _run(save_once, world_size, directory, arguments)
        return {"lists": {"ckpt-1": LIVE}}

    return make


def _values(directory):
    metadata = {
        "git": "1234abc",
        "tags": ("a", 1),
        "nested": {"of": [1, {2: None}], "bytes": b"\x00"},
        "größe": float("inf"),
    }
    metrics = {"loss": 0.25, "nan": float("nan"), "inf": float("inf"), "count": 3}
    _run(save_once, 1, directory, {"metrics": metrics, "metadata": metadata})
    return {"lists": {"ckpt-1": LIVE}}


def _saved_twice(directory):
    _run(save_twice, 1, directory, {})
    return {"lists": {"ckpt-1": LIVE, "ckpt-2": LIVE}}


def _asynchronous(directory):
    _run(save_asynchronously, 2, directory)
    return {"lists": {"ckpt-1": LIVE, "ckpt-2": LIVE}}


def _missing(directory):
    """Remove a checkpoint as somebody does who knows nothing of the records."""
    _run(save_some, 1, directory, [1, 2, 3])
    (removed,) = Path(directory).glob("ckpt-2.e*")
    shutil.rmtree(removed)
    _run(save_some, 1, directory, [4], None, 1)
    lists = dict.fromkeys(("ckpt-1", "ckpt-2", "ckpt-3", "ckpt-4"), LIVE)
    return {"lists": lists | {"ckpt-2": MISSING}, "epoch": 2}


def _retention(directory):
    _run(retain, 1, directory)
    lists = dict.fromkeys(("ckpt-2", "ckpt-4"), KEPT)
    lists |= dict.fromkeys(("ckpt-5", "ckpt-6", "ckpt-7"), LIVE)
    return {
        "lists": lists,
        "epoch": 2,
        "rules": ["max_to_keep=3"],
        "history": {"num_claims": 2, "num_commits": 7, "num_deleted": 2},
    }


def _rules(directory):
    _run(follow_rules, 1, directory)
    reader = threading.Thread(
        target=_run_killed, args=(read_and_die, 1, directory, "rules.began", "rules.until")
    )
    reader.start()
    _await_path("rules.began")
    Path("rules.until").touch()
    reader.join()
    newest, low, hundreds = map(str, RULES.parts)
    return {
        "lists": dict.fromkeys((f"net.v2-{n}" for n in (1, 2, 4, 5, 6)), LIVE),
        "rules": [newest, low, hundreds],
        "kept_by": {
            "net.v2-1": [hundreds],
            "net.v2-2": [low, hundreds],
            "net.v2-4": [hundreds],
            "net.v2-5": ["pinned"],
            "net.v2-6": [newest, low, hundreds],
        },
        "best_loss": "net.v2-4",
        "requests": ["pin of net.v2-1", "unpin of net.v2-5", "metrics of net.v2-4", "save"],
        "leases": ["net.v2-6"],
        # What the next commit takes up.
        "pinned_after": ["net.v2-1"],
        "metrics_after": {"net.v2-4": {"loss": 0.25, "step/ü": 200.0}},
    }


def _history(directory):
    for restart in range(3):
        _run(write_history, 1, directory, restart)
    lists = dict.fromkeys(("ckpt--3", f"ckpt-{HIGHEST}", "ckpt-72"), LIVE)
    return {
        "lists": lists,
        "epoch": 3,
        "rules": ["max_to_keep=3"],
        "num_records": 64,
        "history": {"num_claims": 3, "num_commits": 72, "num_deleted": 69},
    }


def _bad(directory):
    _run(save_some, 1, directory, [1, 2, 3])
    _flip(_shard(directory, "ckpt-3"))
    # The restore falls back to the second, so the number is used again.
    _run(save_some, 1, directory, [4, 5], None, 1)
    _flip(_shard(directory, "ckpt-4"))
    lists = [("ckpt-1", LIVE), ("ckpt-2", LIVE), ("ckpt-3", BAD)]
    return {
        "lists": [*lists, ("ckpt-3", LIVE), ("ckpt-4", LIVE)],
        "damaged": ["ckpt-4"],
        "history": {"num_claims": 2, "num_commits": 5, "num_deleted": 0},
        "epoch": 2,
    }


def _crashed_save(directory):
    began, until = "crashed.began", "crashed.until"

    def read():
        _await_path(f"{began}.asked")
        _run_killed(read_and_die, 1, directory, began, until)

    reader = threading.Thread(target=read)
    reader.start()
    _run_killed(die_in_a_save, 2, directory, began, until)
    reader.join()
    return {
        "lists": {"ckpt-1": RELEASING, "ckpt-2": LIVE},
        "leases": ["ckpt-1"],
        "rules": ["max_to_keep=1"],
        "left_over": [".ckpt-3.e1-", "ckpt-1.e1-"],
    }


def _crashed_commit(directory):
    _run_killed(die_in_a_commit, 1, directory)
    return {
        "lists": {"ckpt-1": LIVE},
        "unrecorded": ["ckpt-2"],
        "left_over": ["ckpt-2.e1-", "1 temporary file"],
    }


def _crashed_copy(directory):
    _run_killed(die_before_the_copy, 1, directory)
    _run_killed(die_in_a_claim, 1, directory)
    return {
        "lists": {"ckpt-1": RELEASING, "ckpt-2": LIVE},
        "rules": ["max_to_keep=1"],
        "left_over": [".probe-e2-", "ckpt-1.e1-", "1 temporary file"],
        # The file for people knows of the first alone.
        "copy_is_behind": True,
    }


def _crashed_deletion(directory):
    _run_killed(die_in_a_deletion, 1, directory)
    return {
        "lists": {"ckpt-1": RELEASING, "ckpt-2": LIVE},
        "rules": ["max_to_keep=1"],
        "left_over": [".ckpt-1.e1-"],
    }


def _pruned(directory):
    _run(save_some, 1, directory, [1, 2, 3, 4, 5])
    keep = "latest(1) | every(steps=3)"
    _run(command, 1, "prune", directory, "--keep", keep, "--yes")
    lists = dict.fromkeys(("ckpt-1", "ckpt-3", "ckpt-5"), LIVE)
    return {"lists": lists, "action": "prune", "epoch": 2}


def _repaired(directory):
    _run(save_some, 1, directory, [1, 2, 3])
    records = sorted(Path(directory, ".state").glob("*.json"))
    _flip(records[-1])
    _flip(_shard(directory, "ckpt-2"))
    _run(command, 1, "repair", directory, "--yes")
    return {
        "lists": {"ckpt-1": LIVE, "ckpt-2": BAD, "ckpt-3": LIVE},
        "action": "repair",
        "epoch": 2,
    }


def _copied(directory):
    """Copy the checkpoint of another directory, and nothing of its records."""
    Path(directory).mkdir()
    (source,) = Path("runs/fsdp").glob("ckpt-1.*")
    shutil.copytree(source, Path(directory, source.name))
    shutil.copytree("notes/fsdp", "notes/copied")
    return {
        "lists": {},
        "unrecorded": ["ckpt-1"],
        "left_over": ["ckpt-1.e1-"],
        "has_records": False,
    }


def _imported(directory):
    """Save with torch, and import that."""
    kind = os.path.basename(directory).partition("-")[2]
    source = f"source-{kind}"
    _run(save_foreign, 1, directory, source)
    arguments = ["import", source, "--from", kind, "--output", directory, "--step", "5"]
    if kind == "safetensors":
        arguments += ["--object", "model", "--number", "1"]
    _run(command, 1, *arguments)
    return {"lists": {"ckpt-1": LIVE}}


def save_foreign(rank, directory, source):
    """Save as other programs do, and note what is in memory."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import get_state_dict

    case = os.path.basename(directory)
    objects = build(case, SAVED, as_job=False)
    train(case, objects)
    model = objects["model"]
    if case == "imported-safetensors":
        save_file(dict(model.state_dict()), source)
    else:
        own, optimizer = get_state_dict(model, objects["optimizer"])
        state = {"model": own, "optimizer": optimizer}
        if case == "imported-dcp":
            dcp.save(state, checkpoint_id=source, no_dist=True)
        else:
            torch.save(state, source)
    tensors, same_as, values = merged([describe(objects).to_parts()])
    note = {
        "step": 5,
        "world_size": 1,
        "metrics": spelled({}),
        "metadata": spelled({}),
        "tensors": tensors,
        "same_as": same_as,
        "values": {**values, "save_counter": spelled(1)},
        "per_rank": [{"tensors": {}, "values": {}}],
    }
    _write_json(_notes(directory) / "ckpt-1.json", note)


CASES = {
    "values": _values,
    "classes": _saved_once(1),
    "missing": _missing,
    "dtypes": _saved_once(1),
    "modules": _saved_twice,
    "optimizers": _saved_twice,
    "replicated": _saved_once(3, options=CheckpointOptions(validate_replicas=True)),
    "fsdp": _saved_once(4, metrics={"loss": 1.5}),
    "fsdp-async": _asynchronous,
    "hsdp": _saved_once(4),
    "tensor-parallel": _saved_once(2),
    "fsdp-over-tp": _saved_once(4),
    "meshes": _saved_once(4),
    "retention": _retention,
    "rules": _rules,
    "history": _history,
    "bad": _bad,
    "crashed-save": _crashed_save,
    "crashed-commit": _crashed_commit,
    "crashed-copy": _crashed_copy,
    "crashed-deletion": _crashed_deletion,
    "pruned": _pruned,
    "repaired": _repaired,
    "copied": _copied,
    "imported-torch": _imported,
    "imported-safetensors": _imported,
    "imported-dcp": _imported,
}


def _shard(directory, prefix):
    """Return the first shard file of the newest attempt of a number."""
    found = Path(directory).glob(f"{prefix}.e*/rank-00000-*.safetensors")
    return max(found, key=lambda path: path.stat().st_mtime)


def _flip(path):
    """Change one bit of a file: of a shard file, of the tensors in it."""
    data = bytearray(path.read_bytes())
    data[-1 if path.suffix == ".safetensors" else len(data) // 2] ^= 1
    path.write_bytes(data)


def expected_of(case, found):
    """Put together what must be read from one directory."""
    lists = [*dict(found["lists"]).items()]
    if isinstance(found["lists"], list):
        lists = found["lists"]  # one number twice
    notes = Path("notes", case)
    wanted = {prefix for prefix, _ in lists}
    wanted |= {*found.get("unrecorded", ())}
    checkpoints = {
        path.stem: json.loads(path.read_text())
        for path in notes.glob("*.json")
        if path.stem in wanted
    }
    assert checkpoints.keys() == wanted, case
    return {
        "action": "commit",
        "epoch": 1,
        "rules": [],
        "damaged": [],
        "left_over": [],
        "unrecorded": [],
        "has_records": True,
        **found,
        "lists": lists,
        "checkpoints": checkpoints,
    }


def _commit():
    """Return the commit of the library; refuses one that was changed since."""
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "distckpt"], check=True)
    log = [*git, "log", "-1", "--format=%H", "--", "distckpt"]
    return subprocess.run(log, check=True, capture_output=True, text=True).stdout.strip()


def _formats(folder):
    """Return the formats that records and manifests say they have."""
    found = set()
    for path in (*folder.rglob("manifest.json"), *folder.rglob(".state/*.json")):
        for line in path.read_bytes().splitlines():
            if line.startswith(b'"format":'):
                found.add(json.loads(line.partition(b":")[2].strip(b" ,")))
    return sorted(found, key=str)


def main():
    """Make all directories of one format in a folder that is not there yet."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("target", type=Path, help="for example tests/golden/format-2")
    parser.add_argument("--only", nargs="*", default=[*CASES], help="to try it out")
    arguments = parser.parse_args()
    target = arguments.target.resolve()
    assert not target.exists(), f"{target} was made already; it is never made again"
    commit = _commit()
    # In memory. Events and errors have absolute paths, of there.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        os.chdir(scratch)
        os.mkdir("runs")
        made = {}
        for case in arguments.only:
            started = time.monotonic()
            made[case] = expected_of(case, CASES[case](f"runs/{case}"))
            print(f"{case}: {time.monotonic() - started:.1f} s", flush=True)
        target.mkdir(parents=True)
        for case, expected in made.items():
            shutil.copytree(f"runs/{case}", target / case)
            _write_json(target / f"{case}{EXPECTED}", expected)
        formats = _formats(target)
        about = {
            "note": PROVISIONAL
            if any("provisional" in str(f) for f in formats)
            else FROZEN,
            "commit": commit,
            "format": formats,
            "distckpt": distckpt_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        _write_json(target / MADE, about)
        _write_json(target / SUMS, sums_of(target))
        os.chdir("/")


def distckpt_version():
    """Return the version of the library that is installed."""
    from importlib.metadata import version

    return version("distckpt")


if __name__ == "__main__":
    main()
