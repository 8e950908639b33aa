"""Each mutant of the protocol is killed by a test of the default command, or is listed."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, is_found

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed_where_it_is_said_to_be(name: str):
    """By default; those that only class full kills are marked so in mutants.py."""
    assert is_found(name, in_full=False) != MUTANTS[name].only_in_full
    if MUTANTS[name].only_in_full:
        assert is_found(name, in_full=True)
