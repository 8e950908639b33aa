"""Compare the newest checkpoints of two runs bit for bit: parameters, optimizer, RNG, ...

    python launch/compare.py runs/one runs/other

Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from typing import Any

from distckpt import latest_checkpoint, strict_json
from distckpt.readers import locate, open_shard, read_manifest


def contents_of(directory: str) -> tuple[str, dict[str, tuple[str, bytes]]]:
    """Read all tensors and plain values of a run's newest checkpoint, by unique name."""
    latest = latest_checkpoint(directory)
    if latest is None:
        sys.exit(f"compare: {directory} has no checkpoint")
    located = locate(latest)
    manifest = read_manifest(located.directory, located.manifest_digest)
    contents: dict[str, tuple[str, bytes]] = {
        name: ("value", _text(value)) for name, value in manifest.values.items()
    }
    for rank in range(manifest.world_size):
        with open_shard(located.directory, manifest, rank) as reader:
            for name, value in reader.header.per_rank_values.items():
                contents[f"{name} (rank {rank})"] = ("value", _text(value))
            for key, stored in reader.header.entries.items():
                data = bytearray(stored.size_bytes)
                reader.read_into(stored, 0, memoryview(data))
                contents[f"{key} (rank {rank})"] = (stored.dtype, bytes(data))
    return latest, contents


def _text(value: Any) -> bytes:
    return strict_json.dumps(value).encode()


def main() -> None:
    """Print one line for each tracked object, and what differs."""
    parser = argparse.ArgumentParser(description="Compare two runs bit for bit.")
    parser.add_argument("one")
    parser.add_argument("other")
    arguments = parser.parse_args()
    path_one, one = contents_of(arguments.one)
    path_other, other = contents_of(arguments.other)
    print(f"comparing {path_one} with {path_other}")
    same: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    differing = []
    for name in sorted({*one, *other}):
        if one.get(name) == other.get(name):
            tracked = name.split("/")[0].split(" ")[0]
            same[tracked][0] += 1
            same[tracked][1] += len(one[name][1])
        else:
            differing.append(name)
    for tracked, (count, size_bytes) in same.items():
        print(f"  {tracked:13} {count:4} entries, {size_bytes:10,} bytes identical")
    for name in differing:
        print(f"  DIFFERS: {name}")
    if differing:
        sys.exit(1)
    print("bit-identical")


if __name__ == "__main__":
    main()
