"""What stands in the pages for readers can be typed, and says what it says there."""

from __future__ import annotations

import pytest
from pages import Block, blocks_of, run, type_in

# What somebody has who comes from Lightning: a file as its Trainer (2.6) writes it.
LIGHTNING = """# make_ckpt.py
import torch
from problem import make_model

model = make_model()
optimizer = torch.optim.AdamW(model.parameters())
state = {
    "epoch": 1,
    "global_step": 40,
    "pytorch-lightning_version": "2.6.6",
    "state_dict": {f"net.{name}": value for name, value in model.state_dict().items()},
    "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 2, "completed": 1}}}},
    "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_path": "last.ckpt"}},
    "optimizer_states": [optimizer.state_dict()],
    "lr_schedulers": [],
}
torch.save(state, "last.ckpt")
"""


@pytest.mark.full
@pytest.mark.timeout(
    1200
)  # where the commands are really typed, torch is imported for each
def test_every_block_of_the_tutorial_runs_and_prints_what_stands_there(tmp_path):
    """In order, in one folder; several ranks where the page says torchrun."""
    blocks = blocks_of("tutorial.md")
    assert {block.language for block in blocks} == {"python", "console"}
    for block in blocks:
        type_in(block, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_every_block_on_moving_over_runs_and_prints_what_stands_there(tmp_path):
    """All but the change to a loop of Fabric's, which launch/clients.sh runs."""
    blocks = blocks_of("migrating.md")
    assert [block.language for block in blocks].count("diff") == 1
    assert {block.language for block in blocks} == {"python", "console", "diff"}
    problem = blocks_of("tutorial.md")[0]
    for block in (problem, Block("python", LIGHTNING, "here")):
        type_in(block, tmp_path)
    run("python make_ckpt.py", tmp_path)
    for block in blocks:
        type_in(block, tmp_path)


def test_example_of_the_readme_runs_and_prints_what_stands_there(tmp_path):
    """Pasted and typed as it stands."""
    typed = [block for block in blocks_of("../README.md") if block.language]
    assert [block.language for block in typed] == ["python", "console"]
    for block in typed:
        type_in(block, tmp_path)


def test_example_of_the_readme_goes_on_with_the_same_batches_after_a_kill(tmp_path):
    """Weights and the order of the data are bit-identical, as the page says."""
    program = blocks_of("../README.md")[1].text
    told = program + (
        "with open('result', 'w') as file:\n"
        "    print(model.weight.tolist(), optimizer.state_dict(), file=file)\n"
    )
    # In the midst of an epoch of 40 batches, and off the interval of 20 saves.
    killed = told.replace(
        "            manager.save() ",
        "            import os\n"
        "            if step == 93 and not os.path.exists('was_killed'):\n"
        "                open('was_killed', 'w').close()\n"
        "                os.kill(os.getpid(), 9)\n"
        "            manager.save() ",
    )
    assert killed != told
    for name, text in {"whole": told, "killed": killed}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.py").write_text(text)
    assert run("python train.py", tmp_path / "whole") == "restored None at step 0\n"
    assert "Killed" in run("python train.py", tmp_path / "killed")
    said = run("python train.py", tmp_path / "killed")
    assert said == "restored runs/first/ckpt-5 at step 81\n"
    results = [(tmp_path / name / "result").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]
