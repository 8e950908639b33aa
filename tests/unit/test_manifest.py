"""A manifest is checked as a whole before anything is read by it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_helpers import CHAIN, DIGEST, TABLE, make_attempt

from distckpt import strict_json, values
from distckpt.errors import FormatError, ManifestError, NewerFormatError
from distckpt.layout import SHARDED, SPLIT, WHOLE, Row, Table
from distckpt.manifest import Manifest, Shard
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.sharding import Sharding, mesh_of

MAX_EXAMPLES = examples(80)


def make_manifest(**fields):
    """Make a valid manifest of two ranks."""
    defaults = {
        "attempt": make_attempt(1000, epoch=3),
        "chain": CHAIN,
        "step": 1000,
        "created": 1_700_000_000.25,
        "shards": (Shard(8192, DIGEST, 0), Shard(4096, DIGEST, 1)),
        "layouts": (Table(TABLE), Table(TABLE[:1])),
        "values": {"epoch": 3, "lr": values.encode(float("inf"))},
    }
    return Manifest(**{**defaults, **fields})


SAMPLE = make_manifest()
TREE = json.loads(SAMPLE.encode())


def encode_tree(tree):
    """Spell a tree as a manifest is spelled, with the right checksum, if that can be."""
    if not isinstance(tree, dict) or not isinstance(tree.get("layouts"), list):
        return json.dumps(tree).encode()
    spelled = {key: json.dumps(value) for key, value in tree.items() if key != "checksum"}
    spelled["layouts"] = "[\n" + ",\n".join(map(encode_table, tree["layouts"])) + "\n]"
    if isinstance(tree.get("values"), list):
        spelled["values"] = strict_json.lines([json.dumps(v) for v in tree["values"]])
    body = "{\n" + ",\n".join(f'"{key}": {text}' for key, text in spelled.items())
    checksum = tree.get("checksum")
    if checksum == TREE["checksum"]:
        checksum = digest(body.encode())
    return f'{body},\n"checksum": {json.dumps(checksum)}\n}}\n'.encode()


def encode_table(table):
    """Spell a table as tables are spelled, if it is one."""
    if not isinstance(table, dict):
        return json.dumps(table)
    texts = []
    for key, items in table.items():
        text = json.dumps(items, separators=(",", ":"))
        if isinstance(items, list):
            text = strict_json.lines([json.dumps(i, separators=(",", ":")) for i in items])
        texts.append(f"{json.dumps(key)}:{text}")
    return "{" + ",".join(texts) + "}"


_rows = st.builds(
    Row,
    name=st.text(min_size=1, max_size=5),
    dtype=st.sampled_from(["float32", "bits16", "bool"]),
    shape=st.lists(st.integers(0, 100), max_size=3).map(tuple),
    kind=st.sampled_from([SPLIT, WHOLE]),
    same_as=st.just(""),
    sharding=st.none(),
)
_shardings = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True).map(
    lambda ranks: Sharding(mesh_of((len(ranks),), ranks), ("S0",))
)
_rows |= st.builds(
    Row,
    name=st.text(min_size=1, max_size=5),
    dtype=st.just("float32"),
    shape=st.just((8, 3)),
    kind=st.just(SHARDED),
    same_as=st.just(""),
    sharding=_shardings,
)
_tables = st.lists(_rows, max_size=4, unique_by=lambda row: row.name).map(Table)
_plain = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)


@st.composite
def manifests(draw):
    """Draw any valid manifest."""
    layouts = draw(st.lists(_tables, min_size=1, max_size=3).map(tuple))
    shards = st.builds(
        Shard,
        size_bytes=st.integers(1, 2**63 - 1),
        header=st.text("0123456789abcdef", min_size=32, max_size=32),
        layout=st.integers(0, len(layouts) - 1),
    )
    plain = draw(st.dictionaries(st.text(max_size=4), _plain, max_size=4))
    return make_manifest(
        attempt=Attempt(
            "ckpt", draw(st.integers(-99, 99)), draw(st.integers(1, 9)), "0" * 8
        ),
        step=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        created=draw(st.floats(allow_nan=False, allow_infinity=False)),
        shards=tuple(draw(st.lists(shards, min_size=1, max_size=4))),
        layouts=layouts,
        values={path: values.encode(value) for path, value in plain.items()},
    )


@settings(max_examples=MAX_EXAMPLES)
@given(manifest=manifests())
def test_manifest_encoded_and_decoded_is_the_same(manifest):
    """What the chief wrote is what every reader sees."""
    assert Manifest.decode(manifest.encode()) == manifest


def _decodes_or_refuses(data):
    """Decode, plan and print, as readers do: only our own errors may come out."""
    try:
        manifest = Manifest.decode(data)
        list(manifest.assignment.rows.values())
        return [values.decode(value) for value in manifest.values.values()]
    except FormatError:
        return None


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(data=st.binary(max_size=100))
def test_arbitrary_bytes_are_a_format_error(data):
    """Nothing but our own error comes out."""
    _decodes_or_refuses(data)


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(data=st.data())
def test_manifest_with_a_piece_replaced_is_valid_or_a_format_error(data):
    """Cut, doubled, overwritten: one kind of error."""
    whole = SAMPLE.encode()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 12)))
    middle = data.draw(
        st.binary(max_size=4) | st.text('0123456789[]{},":-$', max_size=6).map(str.encode)
    )
    _decodes_or_refuses(whole[:start] + middle + whole[stop:])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(list(TREE)), inner, max_size=2
        )
    ),
    max_leaves=6,
)


def _paths_in(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _paths_in(value, (*path, key))
        else:
            yield (*path, key)


def _replace(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = _replace(tree[path[0]], path[1:], value)
    return copy


@settings(max_examples=examples(3) * MAX_EXAMPLES)
@given(path=st.sampled_from(list(_paths_in(TREE))), value=_json)
def test_manifest_with_any_value_anywhere_is_valid_or_a_format_error(path, value):
    """Whatever JSON stands in a field, one kind of error comes out."""
    _decodes_or_refuses(encode_tree(_replace(TREE, path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), []),
        (("format",), 0),
        (("format",), True),
        (("format",), 1.0),
        (("path",), "ckpt-1"),
        (("path",), "../ckpt-1.e1-0a0b0c0d"),
        (("path",), None),
        (("chain",), "short"),
        (("chain",), "x" * 16),
        (("step",), 1.5),
        (("step",), True),
        (("created",), 1),
        (("world_size",), 3),
        (("world_size",), 2.0),
        (("shards",), []),
        (("shards",), {}),
        (("shards", 0), []),
        (("shards", 0), {}),
        (("shards", 0), [8192, DIGEST]),
        (("shards", 0), [8192, DIGEST, 0, 0]),
        (("shards", 0, 0), 0),
        (("shards", 0, 0), -1),
        (("shards", 0, 0), 2**63),
        (("shards", 0, 0), 8192.0),
        (("shards", 0, 1), "x"),
        (("shards", 0, 1), "x" * 32),
        (("shards", 0, 1), None),
        (("shards", 0, 2), 2),
        (("shards", 0, 2), -1),
        (("shards", 0, 2), True),
        (("layouts",), None),
        (("layouts",), {}),
        (("layouts",), []),
        (("layouts", 0), None),
        (("layouts", 0), []),
        (("layouts", 0), {"shardings": [], "rows": [], "more": []}),
        (("layouts", 0, "rows"), None),
        (("layouts", 0, "rows", 0), ["w", "float32", [1]]),
        (("layouts", 0, "rows", 0, 2), [10**4000, 10**4000]),
        (("layouts", 0, "rows", 0, 3), "sharded"),
        (("layouts", 0, "rows", 1, 0), "model/weight"),
        (("metrics",), None),
        (("metrics",), []),
        (("metrics",), {"loss": 1}),
        (("metrics",), {"loss": None}),
        (("metrics",), {"": 1.0}),
        (("metrics",), {"a" * 65: 1.0}),
        (("metrics",), {f"{number}": 1.0 for number in range(33)}),
        (("metrics",), {"$dict": [[1, 1.0]]}),
        (("metadata",), None),
        (("metadata",), []),
        (("metadata",), {"a": {"$new": 1}}),
        (("values",), {}),
        (("values", 0), [3]),
        (("values", 0, 1), ["epoch", "epoch"]),
        (("values", 0, 1), [3]),
        (("values", 0, 0), {"$new": 1}),
    ],
    ids=repr,
)
def test_manifest_with_this_value_is_refused(path, value):
    """Everything that a reader relies on is checked first."""
    assert Manifest.decode(encode_tree(TREE)) == SAMPLE
    with pytest.raises(ManifestError):
        Manifest.decode(encode_tree(_replace(TREE, path, value)))


@pytest.mark.parametrize(
    "tree",
    [{**TREE, "more": 1}, {k: v for k, v in TREE.items() if k != "step"}],
    ids=["more", "less"],
)
def test_manifest_with_other_fields_is_refused(tree):
    """A field that we do not know is not ignored."""
    with pytest.raises(ManifestError, match="fields"):
        Manifest.decode(encode_tree(tree))


def test_manifest_without_shards_cannot_be_made():
    """What readers refuse is never written."""
    with pytest.raises(ManifestError):
        make_manifest(shards=())


def test_manifest_writes_an_equal_value_once():
    """A thousand parameters with the same settings take a thousand names, not values."""
    many = {f"optimizer/param_groups/lr/{i}": 0.123456789 for i in range(1000)}
    assert make_manifest(values=many).encode().count(b"0.123456789") == 1


def test_manifest_tells_values_apart_that_only_python_calls_equal():
    """True is not 1 is not 1.0, also after grouping."""
    plain = {"a": 1, "b": True, "c": 1.0, "d": -0.0, "e": 0.0}
    found = Manifest.decode(make_manifest(values=plain).encode()).values
    assert repr(found) == repr({**plain})


def test_manifest_grows_with_ranks_and_tensors_not_their_product():
    """Ranks that share a table share its text."""
    table = Table(Row(f"t{i:04}", "float32", (4,), SPLIT) for i in range(1000))

    def size(world_size):
        shards = (Shard(4096, DIGEST, 0),) * world_size
        return len(make_manifest(shards=shards, layouts=(table,)).encode())

    assert size(1000) - size(1) < 1000 * 64


def test_manifest_size_is_that_of_all_its_files():
    """The command shows it."""
    assert SAMPLE.size_bytes == 8192 + 4096


def test_manifest_names_the_shard_file_of_a_rank():
    """Names follow from rank and world size."""
    assert SAMPLE.shard_file(1) == "rank-00001-of-00002.safetensors"


def test_manifest_with_a_replaced_field_is_checked_again():
    """No way around the checks."""
    with pytest.raises(ManifestError):
        dataclasses.replace(SAMPLE, shards=(Shard(1, DIGEST, 7),))


def test_manifest_with_any_byte_changed_is_refused():
    """Also in a copy without records, a value that was changed is not taken."""
    data = SAMPLE.encode()
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1
        # A first field that names a format which does not exist yet: refused, too.
        is_number = index in (len('{\n"format": "'), data.index(b'",\n"version"') - 1)
        with pytest.raises(NewerFormatError if is_number else ManifestError):
            Manifest.decode(bytes(changed))


def test_mesh_with_a_rank_that_has_no_file_is_found_before_anything_is_read():
    """How many ranks there are stands beside the tables."""
    placed = Sharding(mesh_of((2,), [1, 2]), ("S0",))
    table = Table([Row("w", "float32", (4,), SHARDED, "", placed)])
    manifest = make_manifest(layouts=(table, table))
    assert Manifest.decode(manifest.encode()) == manifest
    with pytest.raises(ManifestError, match="'w' lies on rank 2, and there are 2 ranks"):
        _ = manifest.assignment


def test_rows_of_one_mesh_hold_it_once():
    """Ten thousand ranks in no regular order would else be a list in each row."""
    ranks = [*range(1, 10_000), 0]
    row = Row(
        "w", "float32", (8,), SHARDED, "", Sharding(mesh_of((10_000,), ranks), ("R",))
    )
    tables = [Table([row.named(f"w{i}"), row.named("v")]) for i in range(20)]
    read = [Table.from_text(table.text) for table in tables]
    assert len({id(row.sharding.mesh) for table in read for row in table}) == 1


def test_manifest_with_a_known_table_is_read_without_reading_that():
    """Each save's manifest holds the same tables."""
    first, second = (Manifest.decode(make_manifest(step=step).encode()) for step in (1, 2))
    for one, other in zip(first.layouts, second.layouts, strict=True):
        assert one is other
    assert first.assignment is second.assignment


def test_manifest_with_a_name_that_looks_like_its_own_text_is_read_as_it_was_written():
    """Tables are cut out of the text; nothing that users choose can move the cut."""
    names = ['\n"layouts": [\n', '\n],\n"values": ', ",\n{", "]}", "\u2028\x85", '"']
    table = Table(Row(name, "uint8", (1,), SPLIT) for name in names)
    manifest = make_manifest(
        layouts=(table, Table()), values={name: name for name in names}
    )
    assert Manifest.decode(manifest.encode()) == manifest
