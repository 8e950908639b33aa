"""The files of launch/ that a user copies and edits: tests copy and edit them, too."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from distckpt.readers import read_record
from distckpt.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TEMPLATES = ("one_host.sh", "hosts.sh", "slurm.sbatch", "kubernetes.yaml")
# For the place of the environment: what is installed here.
INSTALLED = f"cd {shlex.quote(str(ROOT))}\nexport PATH={Path(sys.executable).parent}:$PATH"
# A place is the paragraph below its mark; remarks stand first.
PLACE = re.compile(
    r"^ *# EDIT (\d) of (\d): (?:.*\n)(?: *# .*\n)*(?P<content>(?:.+\n)+)", re.M
)


def edited(name: str, folder: Path, *contents: str) -> Path:
    """Copy a file, with other contents in its places; returns the copy."""
    text = (LAUNCH / name).read_text()
    places = [*PLACE.finditer(text)]
    for place, content in reversed([*zip(places, contents, strict=True)]):
        text = f"{text[: place.start('content')]}{content}\n{text[place.end('content') :]}"
    copy = folder / name
    copy.write_text(text)
    copy.chmod(0o755)
    return copy


def small_program(folder: Path, steps: int) -> str:
    """Return what the place of the program shall have: a small job for a CPU."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(os.urandom(50_000))
    size = "--width 32 --layers 1 --interval 10 --strategy fsdp"
    where = f"--directory {folder}/run --text {text} --steps {steps}"
    return (
        "run=gpt\ngrace=60\n"
        f'program=(launch/train.py {where} {size} --grace-period-seconds "$grace")'
    )


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint of that job."""
    record = read_record(RunDirectory.at(str(folder / "run")))
    assert record is not None
    return record.live[-1].step
