"""The Python of README and docs/ runs: blocks, and calls in the cells of tables.

The tutorial, README and the page on moving over are typed in whole by
``tests/multiprocess/test_pages.py``.
"""

from __future__ import annotations

import ast
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import distckpt
from distckpt import Checkpoint, CheckpointManager

# Of the number of workers, which the page takes from nowhere.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED_ELSEWHERE = {"README.md", "tutorial.md", "migrating.md"}
# Of another package, which is not installed here.
NOT_OURS = {"tf.train.Checkpoint(**objects)"}


class Snippet(NamedTuple):
    """Some Python, and where it stands."""

    page: str
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def _tokens(page: Path) -> Any:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks() -> Iterator[Snippet]:
    """Walk the fenced blocks of Python."""
    for page in PAGES:
        for token in _tokens(page):
            if token.type == "fence" and token.info.strip() in ("python", "pycon", "py"):
                yield Snippet(page.name, token.map[0] + 1, token.content)


def cells() -> Iterator[Snippet]:
    """Walk the code in cells of tables that calls something of distckpt's."""
    known = {*distckpt.__all__, "manager"}
    for page in PAGES:
        in_table = 0
        for token in _tokens(page):
            in_table += {"table_open": 1, "table_close": -1}.get(token.type, 0)
            for child in token.children or () if in_table else ():
                if child.type == "code_inline" and _calls(child.content, known):
                    yield Snippet(page.name, token.map[0] + 1, child.content)


def _calls(text: str, known: set[str]) -> bool:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        name in known
        for call in calls
        for name in (
            getattr(call, "id", None),
            getattr(call, "attr", None),
            getattr(getattr(call, "value", None), "id", None),
        )
    )


class Model(nn.Module):
    """Has the parts that the pages speak of."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 256)])
        self.wte = nn.Embedding(16, 4)
        self.head = nn.Linear(4, 2)
        self.backbone = nn.Linear(4, 4)


class Base(Model):
    """The same from another run, which calls a part otherwise."""

    def __init__(self):
        super().__init__()
        self.encoder = self.backbone
        del self.backbone


class Loader:
    """A data loader with a state."""

    def __init__(self):
        self.left = [3, 1, 2]

    def state_dict(self):
        return {"left": self.left}

    def load_state_dict(self, state):
        self.left = state["left"]


class Step:
    """A counter that comes to its end."""

    def __init__(self):
        self.value = 0

    def __int__(self):
        self.value += 1
        return self.value

    def __lt__(self, other):
        return int(self) < other


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """Return what a reader has at hand: a job with some checkpoints, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for _ in range(2):
        checkpoint = Checkpoint(**objects)
        with CheckpointManager(checkpoint, "runs/gpt", 3) as manager:
            manager.restore_or_initialize()
            manager.save(metrics={"val_loss": 0.5})
    base = Checkpoint(model=Base(), epoch=1)
    with CheckpointManager(base, "runs/base", 3) as manager:
        manager.save(checkpoint_number=9)
    save_file(model.state_dict(), "gpt2-hf")
    manager = CheckpointManager(
        checkpoint,
        "runs/gpt",
        distckpt.latest(3) | distckpt.best(1, "val_loss", mode="min"),
        checkpoint_interval=distckpt.every(steps=5),
        step_counter=Step(),
    )
    stages = [nn.ModuleDict({"a": nn.Linear(1, 1)}), nn.ModuleDict({"b": nn.Linear(1, 1)})]
    found = {
        **{name: getattr(distckpt, name) for name in distckpt.__all__},
        **objects,
        "distckpt": distckpt,
        "torch": torch,
        "signal": signal,
        "DataLoader": DataLoader,
        "dataset": [1, 2, 3],
        "checkpoint": checkpoint,
        "manager": manager,
        "loader": Loader(),
        "evaluate": lambda path: 0.25,
        "my_function": lambda event: None,
        "SummaryWriter": lambda: type("Writer", (), {"add_scalar": lambda *a, **k: None})(),
        "model_parts": stages,
        "optimizers": [torch.optim.SGD(stage.parameters()) for stage in stages],
        "loss": 0.3,
        "step": Step(),
        "last_step": 3,
        "train_step": lambda: None,
        "path": "runs/gpt/ckpt-2",
        "objects": objects,
        "x": 1,
        "mesh": mesh,
        "experts": nn.Linear(2, 2),
        "statistics": {"n": 1},
        "print": lambda *_: None,
    }
    # Else it would wait for further checkpoints for ever.
    found["distckpt"] = _Impatient(distckpt.checkpoints_iterator)
    yield found
    manager.close()
    dist.destroy_process_group()


class _Impatient:
    """The package, with an iterator that ends when there is nothing new."""

    def __init__(self, iterator):
        self._iterator = iterator

    def __getattr__(self, name):
        return getattr(distckpt, name)

    def checkpoints_iterator(self, directory):
        return self._iterator(directory, timeout=0)


# What stands on a page for something of the reader's.
MEANT = {
    "process_group": "None",
    "include": "'model'",
    "exclude": "'model/head'",
    "grace_period_seconds": "20",
    "file": "'stop'",
}


class _FillIn(ast.NodeTransformer):
    """Puts something in the place of each ellipsis among the arguments of a call."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if node.args and _is_ellipsis(node.args[0]):
            given = {keyword.arg for keyword in node.keywords}
            node.args = ast.parse("f(checkpoint, 'runs/other', 3)").body[0].value.args
            if "checkpoint_interval" in given:
                counter = ast.parse("f(step_counter=step)").body[0].value.keywords
                node.keywords += counter
        for keyword in node.keywords:
            if _is_ellipsis(keyword.value):
                keyword.value = ast.parse(MEANT[keyword.arg], mode="eval").body
        return node


def _is_ellipsis(node):
    return isinstance(node, ast.Constant) and node.value is ...


def _run(snippet, namespace):
    tree = ast.fix_missing_locations(_FillIn().visit(ast.parse(snippet.text)))
    exec(compile(tree, snippet.name, "exec"), namespace)
    return namespace


RUN_HERE = [block for block in blocks() if block.page not in TYPED_ELSEWHERE]


@pytest.mark.full
@pytest.mark.parametrize("block", RUN_HERE, ids=lambda block: block.name)
def test_block_runs(namespace, block):
    """With what the page says that a reader has."""
    before = set(namespace)
    found = _run(block, namespace)
    for name in set(found) - before:
        if isinstance(found[name], CheckpointManager):
            found[name].close()
    made = found["manager"]
    made.close()


CELLS = [cell for cell in cells() if cell.text not in NOT_OURS]


@pytest.mark.full
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.name} {cell.text}")
def test_call_in_a_table_runs(namespace, cell):
    """Arguments that the reader is to think of are filled in."""
    found = _run(cell, namespace)
    found["manager"].close()


def test_pages_have_python():
    """Nothing above would fail if none were found."""
    assert len(RUN_HERE) >= 10 and len(CELLS) >= 25
    assert {block.page for block in blocks()} >= TYPED_ELSEWHERE
