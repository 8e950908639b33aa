"""Every name has one spelling, and what is built is what is parsed."""

from __future__ import annotations

import string

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import paths
from distckpt.paths import Attempt

MAX_EXAMPLES = examples(100)

# Strings that look like names: properties of random text alone would show little.
_alphabet = st.sampled_from("ckpt0123456789abcdef.-_e" + "\n /\\\u0661")
_texts = st.lists(
    st.sampled_from(
        [
            "ckpt",
            "-",
            ".e",
            "0",
            "1",
            "12",
            "-3",
            "0a1b2c3d",
            ".",
            ".pending",
            ".trash",
            "rank-",
            "00001",
            "-of-",
            ".safetensors",
            ".json",
            ".tmp",
            ".probe-e",
        ]
    ),
    max_size=9,
).map("".join) | st.text(_alphabet, max_size=40)

_edge = string.ascii_letters + string.digits + "_"
_names = st.builds(
    lambda first, middle, last: first + middle + last,
    st.sampled_from(_edge),
    st.text(string.ascii_letters + string.digits + "._-", max_size=126),
    st.sampled_from(_edge + "."),
) | st.sampled_from(_edge)
_attempts = st.builds(
    Attempt,
    name=_names,
    number=st.integers(-(10**19) + 1, 10**19 - 1),
    epoch=st.integers(0, 10**19 - 1),
    attempt=st.text("0123456789abcdef", min_size=8, max_size=8),
)


@settings(max_examples=MAX_EXAMPLES)
@given(attempt=_attempts)
def test_attempt_built_and_parsed_is_the_same(attempt):
    """All three directory names of an attempt lead back to it."""
    parsed = (
        paths.parse_published(attempt.published),
        paths.parse_pending(attempt.pending),
        paths.parse_trash(attempt.trash),
    )
    assert parsed == (attempt, attempt, attempt)


@settings(max_examples=MAX_EXAMPLES)
@given(attempt=_attempts)
def test_prefix_built_and_parsed_is_the_same(attempt):
    """What users see leads back to name and number."""
    assert paths.parse_prefix(attempt.prefix) == (attempt.name, attempt.number)


@settings(max_examples=MAX_EXAMPLES)
@given(text=_texts)
def test_attempt_name_parsed_and_built_is_the_same(text):
    """No second spelling of a name is ever taken for it."""
    built = [
        getattr(parsed, kind)
        for kind, parse in (
            ("published", paths.parse_published),
            ("pending", paths.parse_pending),
            ("trash", paths.parse_trash),
        )
        if (parsed := parse(text)) is not None
    ]
    assert built in ([], [text])


@settings(max_examples=MAX_EXAMPLES)
@given(text=_texts)
def test_prefix_parsed_and_built_is_the_same(text):
    """A prefix has one spelling too."""
    parsed = paths.parse_prefix(text)
    assert parsed is None or f"{parsed[0]}-{parsed[1]}" == text


@settings(max_examples=MAX_EXAMPLES)
@given(number=st.integers(0, 10**20 - 1))
def test_record_file_built_and_parsed_is_the_same(number):
    """Records are found by number."""
    assert paths.parse_record_file(paths.record_file(number)) == number


@settings(max_examples=MAX_EXAMPLES)
@given(text=_texts)
def test_record_file_parsed_and_built_is_the_same(text):
    """A stray file is no record."""
    parsed = paths.parse_record_file(text)
    assert parsed is None or paths.record_file(parsed) == text


def test_shard_files_have_names_of_their_own():
    """Beyond 99,999 ranks the names grow and stay different."""
    assert paths.shard_file(7, 16) == "rank-00007-of-00016.safetensors"
    sizes = (1, 16, 10**6)
    names = {paths.shard_file(rank, size) for size in sizes for rank in range(3)}
    assert len(names) == 9


@pytest.mark.parametrize(
    "text",
    [
        "ckpt-1",
        "ckpt-1.e1",
        "ckpt-1.e1-0a0b0c0",
        "ckpt-1.e1-0a0b0c0d0",
        "ckpt-1.e1-0A0B0C0D",
        "ckpt-01.e1-0a0b0c0d",
        "ckpt--0.e1-0a0b0c0d",
        "ckpt-1.e01-0a0b0c0d",
        "ckpt-1.e-1-0a0b0c0d",
        "ckpt-+1.e1-0a0b0c0d",
        "ckpt-1_0.e1-0a0b0c0d",
        "ckpt-\u0661.e1-0a0b0c0d",
        "ckpt-1.e1-0a0b0c0d\n",
        " ckpt-1.e1-0a0b0c0d",
        ".ckpt-1.e1-0a0b0c0d",
        "../ckpt-1.e1-0a0b0c0d",
        "a/ckpt-1.e1-0a0b0c0d",
        "-1.e1-0a0b0c0d",
        "",
    ],
)
def test_published_name_that_is_none_parses_to_none(text):
    """What is not ours, or not our spelling, is never deleted."""
    assert paths.parse_published(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("ckpt-0", 0), ("ckpt--3", -3), ("ckpt-5-7", 7), ("a.b-c-12", 12), ("c-1--2", -2)],
)
def test_prefix_with_odd_number_gives_that_number(text, number):
    """Negative numbers and names with dashes are told apart."""
    assert paths.parse_prefix(text)[1] == number


@pytest.mark.parametrize("name", ["ckpt", "c", "a-b", "a.b", "x" * 128, "_", "1"])
def test_checkpoint_name_that_is_one_is_accepted(name):
    """Ordinary names are fine."""
    assert paths.is_checkpoint_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a-", "a/b", "a b", "ä", "x" * 129, "a\n", "a\0"]
)
def test_checkpoint_name_that_is_none_is_refused(name):
    """A name cannot leave the directory, hide, or blur where the number starts."""
    assert not paths.is_checkpoint_name(name)


def test_temporary_file_drawn_twice_differs():
    """No two writers ever share a temporary file."""
    assert paths.temporary_file(3) != paths.temporary_file(3)


def test_temporary_file_parsed_gives_its_epoch():
    """A sweep tells whose leftover it is."""
    assert paths.parse_temporary_file(paths.temporary_file(37)) == 37


@pytest.mark.parametrize("text", ["", ".e1-.tmp", ".e01-" + "0" * 16 + ".tmp", "x.tmp"])
def test_temporary_file_that_is_none_parses_to_none(text):
    """Other people's temporary files are not ours to sweep."""
    assert paths.parse_temporary_file(text) is None


def test_probe_file_parsed_gives_its_epoch():
    """A sweep tells whose probe it is."""
    assert paths.parse_probe_file(paths.probe_file(5, "0" * 16, 123456)) == 5


def test_probe_file_that_is_none_parses_to_none():
    """A probe without a rank is not ours."""
    assert paths.parse_probe_file(".probe-e5-" + "0" * 16) is None
