"""Where run directories lie: the contract of a store, and its implementations.

``store.py`` is the contract, ``posix.py`` the only module that touches files,
``posix_store.py`` the filesystem as a store, ``memory_store.py`` one in memory. What a run
directory has in its store is named by ``run_directory.py`` alone.
"""
