"""Storage of run directories: the contract of a store, and its implementations.

``store.py`` is the contract, ``posix.py`` the only module that touches files,
``posix_store.py`` the filesystem as a store, ``memory_store.py`` one in memory. Only
``run_directory.py`` knows the names in a run directory.
"""
