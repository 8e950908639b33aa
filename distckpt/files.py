"""Files that a user names, outside of run directories: on this machine's filesystem.

Files in a run directory are reached by ``run_directory.py``, in any store.
"""

from __future__ import annotations

from distckpt.storage.posix import (
    NewFile,
    OpenFile,
    append_to_file,
    exists,
    is_directory,
    list_directory,
    make_directories,
    make_directory,
    read_file,
    remove_file,
    remove_tree,
    rename_new,
    replace_file,
    room,
    sync_directory,
    write_new_file,
)
from distckpt.storage.store import Buffer

__all__ = [
    "Buffer",
    "NewFile",
    "OpenFile",
    "append_to_file",
    "exists",
    "free_bytes",
    "is_directory",
    "list_directory",
    "make_directories",
    "make_directory",
    "read_file",
    "remove_file",
    "remove_tree",
    "rename_new",
    "replace_file",
    "sync_directory",
    "write_new_file",
]


def free_bytes(path: str) -> int:
    """Return how many bytes this user may still write to a filesystem."""
    return room(path).size_bytes or 0
