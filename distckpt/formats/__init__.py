"""Checkpoints of other programs: read, written and verified; without torch.

``export.py`` and ``import_run.py`` are the ways in; ``cli_transfer.py`` calls them.
"""
