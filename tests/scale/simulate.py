"""What one save and one restore of many ranks cost the chief, without those ranks.

The chief's own code runs as it is, on a temporary directory, with the votes of as many
simulated ranks as asked for; only gloo and the shard files are left out. CPU time is that
of this process, memory what Python allocates::

    python tests/scale/simulate.py --ranks 1000 10000 --tensors 1000
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from distckpt import layout, messages, readers, values
from distckpt.agree import Ran
from distckpt.capture import Tracked
from distckpt.chief import Chief
from distckpt.comm import _check_same_phase
from distckpt.commit import _ChiefsPart
from distckpt.events import Events
from distckpt.flight import Saving
from distckpt.identity import Identity
from distckpt.layout import SHARDED, SPLIT, Layouts, Row, Table
from distckpt.manifest import Manifest
from distckpt.messages import Phase, Vote
from distckpt.record import digest
from distckpt.remarks import NOTHING
from distckpt.retention import Retention
from distckpt.run_directory import RunDirectory
from distckpt.save import CheckpointOptions, Request, _begin
from distckpt.save_plan import SavePlan, _decide
from distckpt.save_state import SaveState
from distckpt.session import Session
from distckpt.sharding import Mesh, Sharding, mesh_of

# A block of a transformer: what of it, its shape, and how tensor parallelism cuts it.
_BLOCK = [
    ("attention.query", (8192, 8192), 0),
    ("attention.key", (1024, 8192), 0),
    ("attention.value", (1024, 8192), 0),
    ("attention.output", (8192, 8192), 1),
    ("mlp.gate", (28672, 8192), 0),
    ("mlp.up", (28672, 8192), 0),
    ("mlp.down", (8192, 28672), 1),
    ("norm.first", (8192,), None),
    ("norm.second", (8192,), None),
]
_NODE = 8
_STAGES = 8


# Layouts: the tables of all ranks, and which of them each rank has


@dataclass(frozen=True)
class Job:
    """How the tensors of a job lie on its ranks."""

    tables: list[Table]
    table_of_rank: list[int]


def _names(num_tensors: int) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    for index in range(num_tensors):
        block, part = divmod(index, len(_BLOCK))
        name, shape, dim = _BLOCK[part]
        yield f"model/layers.{block}.{name}.weight", shape, dim


def _table(
    num_tensors: int, mesh: Mesh, placements: Callable[[int | None], tuple[str, ...]]
) -> Table:
    return Table(
        Row(name, "float32", shape, SHARDED, "", Sharding(mesh, placements(dim)))
        for name, shape, dim in _names(num_tensors)
    )


def replicated(ranks: int, tensors: int) -> Job:
    """DDP: every rank has everything."""
    rows = (Row(name, "float32", shape, SPLIT) for name, shape, _ in _names(tensors))
    return Job([Table(rows)], [0] * ranks)


def fsdp(ranks: int, tensors: int) -> Job:
    """FSDP2 over all ranks."""
    mesh = mesh_of((ranks,), range(ranks))
    return Job([_table(tensors, mesh, lambda _: ("S0",))], [0] * ranks)


def hsdp(ranks: int, tensors: int) -> Job:
    """FSDP2 inside a node, replicated over the nodes."""
    mesh = mesh_of((ranks // _NODE, _NODE), range(ranks))
    return Job([_table(tensors, mesh, lambda _: ("R", "S0"))], [0] * ranks)


def tensor_parallel(ranks: int, tensors: int) -> Job:
    """Tensor parallelism inside a node, FSDP2 over the nodes."""
    mesh = mesh_of((ranks // _NODE, _NODE), range(ranks))

    def placements(dim: int | None) -> tuple[str, ...]:
        return {None: ("S0", "R"), 0: ("T0", "S0"), 1: ("S0", "S1")}[dim]

    return Job([_table(tensors, mesh, placements)], [0] * ranks)


def pipeline(ranks: int, tensors: int) -> Job:
    """Stages of a pipeline with tensors of their own, FSDP2 inside each."""
    size = ranks // _STAGES
    rows = fsdp(_STAGES, tensors).tables[0]
    each = -(-tensors // _STAGES)
    tables = []
    for stage in range(_STAGES):
        mesh = mesh_of((size,), range(stage * size, (stage + 1) * size))
        own = rows[stage * each : (stage + 1) * each]
        tables.append(
            Table(
                Row(row.name, row.dtype, row.shape, SHARDED, "", Sharding(mesh, ("S0",)))
                for row in own
            )
        )
    return Job(tables, [rank // size for rank in range(ranks)])


LAYOUTS = {
    "replicated": replicated,
    "FSDP2": fsdp,
    "HSDP": hsdp,
    "TP x FSDP2": tensor_parallel,
    "pipeline": pipeline,
}


# Measuring


@dataclass
class Costs:
    """What one save and one restore cost, in CPU seconds of the chief or of one rank."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    vote_bytes: int = 0
    answer_bytes: int = 0
    manifest_bytes: int = 0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the CPU time of a block; without the garbage collector, which others feed."""
        gc.disable()
        start = time.process_time()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.process_time() - start
        gc.enable()

    @contextmanager
    def traced(self, what: str) -> Iterator[None]:
        """Note the most memory that a block has at once."""
        gc.collect()
        tracemalloc.start()
        yield
        self.memory_bytes[what] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def _forget() -> None:
    """Make this process one that has read and planned nothing yet."""
    layout._decoded = layout._Decoded()
    layout._assignment_of.cache_clear()


class _Round:
    """One exchange: what ``comm`` does around the chief's decision."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def consult(
        self, votes: Sequence[Vote], decide: Callable[[Sequence[Vote]], dict[str, Any]]
    ) -> dict[str, Any]:
        with self._costs.timed("a rank's votes, all ranks together"):
            packed = [vote.pack() for vote in votes]
        with self._costs.timed("votes"):
            lengths = messages.detail_lengths(packed)
            assert not any(lengths)
            received = messages.unpack_votes(packed, [b""] * len(packed))
            _check_same_phase(received)
            answer = messages.encode_answer(decide(received))
        self._costs.vote_bytes += len(packed[0])
        self._costs.answer_bytes += max(512, len(answer))
        return messages.decode_answer(answer)


def _save(
    costs: Costs,
    session: Session,
    save_state: SaveState,
    simulated: Job,
    plain: dict[str, Any],
) -> None:
    """Play the two rounds of a save whose tables were exchanged before."""
    ranks = range(len(simulated.table_of_rank))
    tables, table_of_rank = simulated.tables, simulated.table_of_rank
    request = Request(1000, None, True, CheckpointOptions(), NOTHING)
    asked = request.vote(Phase.DECIDE)
    rounds = _Round(costs)
    votes = [asked._replace(digest_a=tables[index].digest) for index in table_of_rank]
    counter = save_state.tracked.save_counter
    begin = partial(_begin, session, Ran(lambda: request), counter)
    began = rounds.consult(votes, lambda votes: _decide(save_state, votes, begin))
    attempt = readers.paths.parse_published(began["attempt"])
    assert attempt is not None

    written = [
        Vote(Phase.WRITE, size_bytes=4096 + rank, digest_a=rank.to_bytes(16, "big"))
        for rank in ranks
    ]
    assert save_state.layouts is not None
    plan = SavePlan(save_state.layouts, plain)
    saving = Saving(attempt, 1000, NOTHING, ("simulated",), time.monotonic())
    part = _ChiefsPart(session, saving, plan)
    commit = part._commit

    def timed_apart(chief: Chief, votes: Sequence[Vote]) -> None:
        start = time.process_time()
        commit(chief, votes)
        seconds = time.process_time() - start
        costs.seconds["commit"] = costs.seconds.get("commit", 0.0) + seconds
        costs.seconds["votes"] = costs.seconds.get("votes", 0.0) - seconds

    part._commit = timed_apart  # type: ignore[method-assign]
    answer = rounds.consult(written, part.decide)
    session.take_changes(answer)
    save_state.tracked.save_counter += 1


def _restore_plan(manifest: Manifest, simulated: Job, rank: int) -> int:
    """Find the files of all that one rank of a job holds; returns how many pieces."""
    assignment = manifest.assignment
    found = 0
    for row in simulated.tables[simulated.table_of_rank[rank]]:
        box = None
        if row.sharding is not None:
            coordinate = row.sharding.coordinate_of(rank)
            assert coordinate is not None
            box = row.sharding.box_at(row.shape, coordinate)
        found += len(assignment.pieces_of(row.name, box))
    return found


def simulate(make: Callable[[int, int], Job], ranks: int, tensors: int) -> Costs:
    """Measure a first save, a second one like it, and restores on as many and half."""
    costs = Costs()
    simulated = make(ranks, tensors)
    settings = values.encode({"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8})
    names = [f"optimizer/settings/{name}" for name, _, _ in _names(tensors)]
    plain = {"step": 1000, **dict.fromkeys(names, settings)}
    key = simulated.tables[0].digest
    if len(simulated.tables) > 1:
        key = bytes.fromhex(
            digest(b"".join(simulated.tables[i].digest for i in simulated.table_of_rank))
        )
    rank = ranks // 2 + 1
    _forget()
    with costs.timed("first plan"):
        layouts = Layouts(key, simulated.tables, simulated.table_of_rank)
        layouts.assignment.pieces_of_rank(rank)
    with costs.timed("same plan"):
        layouts = Layouts(key, simulated.tables, simulated.table_of_rank)
        layouts.assignment.pieces_of_rank(rank)
    with tempfile.TemporaryDirectory() as directory:
        chief = Chief(
            RunDirectory.at(directory),
            checkpoint_name="ckpt",
            retention=Retention(3),
            identity=Identity("simulation", 0),
        )
        with closing(chief):
            chief.prepare_claim()
            chief.finish_claim()
            nobody: Any = None  # the votes are made up, no channel carries them
            session = Session(
                directory=RunDirectory.at(directory),
                decisions=nobody,
                commits=nobody,
                liveness=None,
                timeout_seconds=60.0,
                events=Events([lambda _: None]),
                chief=chief,
                claimed=True,
            )
            num_ranks = len(simulated.table_of_rank)
            save_state = SaveState(Tracked(), 0, num_ranks, layouts=layouts)
            _save(Costs(), session, save_state, simulated, plain)
            _save(costs, session, save_state, simulated, plain)
            with costs.traced("save"):
                _save(Costs(), session, save_state, simulated, plain)
            attempt = chief.latest
            assert attempt is not None
            chief.settle(60.0)
        path = os.path.join(directory, attempt.published, readers.paths.MANIFEST_FILE)
        with open(path, "rb") as file:
            data = file.read()
    costs.manifest_bytes = len(data)
    _forget()
    with costs.traced("restore"):
        _restore_plan(Manifest.decode(data), simulated, rank)
    _forget()
    with costs.timed("first decode"):
        manifest = Manifest.decode(data)
    with costs.timed("same decode"):
        manifest = Manifest.decode(data)
    with costs.timed("restore plan"):
        _restore_plan(manifest, simulated, rank)
    half = make(ranks // 2 // _NODE * _NODE, tensors)
    _forget()
    with costs.timed("restore plan on half the ranks"):
        _restore_plan(manifest, half, ranks // 4)
    return costs


def cheapest(
    make: Callable[[int, int], Job], ranks: int, tensors: int, repeats: int
) -> Costs:
    """Measure several times; of each time the least, for others use the machine too."""
    tries = [simulate(make, ranks, tensors) for _ in range(repeats)]
    for what in tries[0].seconds:
        tries[0].seconds[what] = min(one.seconds[what] for one in tries)
    return tries[0]


# Showing


_COLUMNS = (
    ("votes, us a rank", lambda c, n: f"{c.seconds['votes'] / n * 1e6:.1f}"),
    ("votes, B a rank", lambda c, n: f"{c.vote_bytes}"),
    ("first plan, ms", lambda c, n: f"{c.seconds['first plan'] * 1e3:.1f}"),
    ("same plan, ms", lambda c, n: f"{c.seconds['same plan'] * 1e3:.1f}"),
    ("commit, ms", lambda c, n: f"{c.seconds['commit'] * 1e3:.1f}"),
    ("manifest, kB", lambda c, n: f"{c.manifest_bytes / 1e3:.0f}"),
    ("first decode, ms", lambda c, n: f"{c.seconds['first decode'] * 1e3:.1f}"),
    ("same decode, ms", lambda c, n: f"{c.seconds['same decode'] * 1e3:.1f}"),
    ("restore plan, ms", lambda c, n: f"{c.seconds['restore plan'] * 1e3:.1f}"),
    (
        "on half, ms",
        lambda c, n: f"{c.seconds['restore plan on half the ranks'] * 1e3:.1f}",
    ),
    ("save, MB", lambda c, n: f"{c.memory_bytes['save'] / 1e6:.1f}"),
    ("restore, MB", lambda c, n: f"{c.memory_bytes['restore'] / 1e6:.1f}"),
)


def _fit(sizes: Sequence[tuple[int, int]], found: Sequence[float]) -> tuple[float, ...]:
    """Fit ``fixed + a * ranks + b * tensors``, relative errors counting alike."""
    rows = np.array([(1.0, *size) for size in sizes])
    wanted = np.array(found)
    weights = 1 / np.maximum(wanted, 1e-9)
    solved, *_ = np.linalg.lstsq(rows * weights[:, None], wanted * weights, rcond=None)
    return tuple(map(float, solved))


def main() -> None:
    """Print the costs of each layout and size, and how they grow."""
    parser = argparse.ArgumentParser(description="Costs of a save of many ranks.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--tensors", type=int, nargs="+", default=[1000])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    sizes = [(n, k) for n in asked.ranks for k in asked.tensors]
    print(f"| layout | ranks | tensors | {' | '.join(title for title, _ in _COLUMNS)} |")
    print("|---" * (3 + len(_COLUMNS)) + "|")
    by_layout: dict[str, list[Costs]] = {}
    for name in asked.layouts:
        for ranks, tensors in sizes:
            costs = cheapest(LAYOUTS[name], ranks, tensors, asked.repeats)
            by_layout.setdefault(name, []).append(costs)
            cells = " | ".join(show(costs, ranks) for _, show in _COLUMNS)
            print(f"| {name} | {ranks} | {tensors} | {cells} |", flush=True)
    if len(asked.ranks) < 2 or len(asked.tensors) < 2:
        return
    print("\n| layout | what | fixed | a rank | a tensor | off by |")
    print("|---" * 6 + "|")
    for name, all_costs in by_layout.items():
        for what in all_costs[0].seconds:
            found = [costs.seconds[what] * 1e6 for costs in all_costs]
            _print_fit(name, f"{what}, us", sizes, found)
        found = [float(costs.manifest_bytes) for costs in all_costs]
        _print_fit(name, "manifest, B", sizes, found)
        for what in all_costs[0].memory_bytes:
            found = [float(costs.memory_bytes[what]) for costs in all_costs]
            _print_fit(name, f"memory of {what}, B", sizes, found)


def _print_fit(
    name: str, what: str, sizes: Sequence[tuple[int, int]], found: Sequence[float]
) -> None:
    fixed, by_rank, by_tensor = _fit(sizes, found)
    off = max(
        abs((fixed + by_rank * ranks + by_tensor * tensors) / one - 1)
        for (ranks, tensors), one in zip(sizes, found, strict=True)
    )
    print(
        f"| {name} | {what} | {fixed:.0f} | {by_rank:.2f} | {by_tensor:.2f} | {off:.0%} |"
    )


if __name__ == "__main__":
    main()
