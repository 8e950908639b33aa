"""Hold every byte of a checkpoint against the chain of trust.

Record -> manifest's digest -> headers' digests -> blocks' checksums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from distckpt import paths
from distckpt.errors import FormatError, StorageError
from distckpt.readers import open_shard, read_manifest
from distckpt.run_directory import AttemptDirectory

# Told how many bytes will be read; returns what is told when some were.
Begin: TypeAlias = Callable[[int], Callable[[int], object]]


@dataclass(slots=True)
class Report:
    """What verifying one attempt found.

    Attributes:
        directory: The attempt's directory.
        num_files: Shard files that it should have.
        size_bytes: Bytes of tensor data that were read and are right.
        problems: One sentence for each fault; empty if the checkpoint is whole.
        foreign: Names in the directory that do not belong to it; harmless.
        notes: What else is worth knowing; no fault.
        files_size_bytes: Bytes of its shard files, as ``list`` has them; 0: not known.
    """

    directory: str
    num_files: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files_size_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Tell whether every byte is the one that was written."""
        return not self.problems


def verify_attempt(
    directory: AttemptDirectory,
    manifest_digest: str | None,
    advance: Callable[[int], object] = lambda _: None,
) -> Report:
    """Read and verify everything that belongs to one attempt.

    Args:
        directory: The attempt's directory.
        manifest_digest: What the record says of its manifest; None skips that check.
        advance: Told how many bytes more are through.

    Returns:
        A report; faults of the checkpoint never raise.

    Raises:
        NewerFormatError: A newer version of distckpt wrote it.
    """
    report = Report(str(directory))
    try:
        manifest = read_manifest(directory, manifest_digest)
        assignment = manifest.assignment
        assert assignment is not None
    except (FormatError, StorageError) as error:
        report.problems.append(str(error))
        return report
    report.num_files = manifest.world_size
    report.files_size_bytes = manifest.size_bytes
    for rank in range(manifest.world_size):
        try:
            with open_shard(directory, manifest, rank) as reader:
                report.size_bytes += reader.verify(advance)
        except (FormatError, StorageError) as error:
            report.problems.append(str(error))
    expected = {manifest.shard_file(rank) for rank in range(manifest.world_size)}
    expected.add(paths.MANIFEST_FILE)
    report.foreign = [
        directory.path_of(name) for name in directory.names() if name not in expected
    ]
    return report
