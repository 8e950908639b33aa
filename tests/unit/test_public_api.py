"""The public names and signatures: a change here is a change for every user."""

import builtins
import inspect
import subprocess
import sys
from datetime import timedelta

import distckpt

NAMES = [
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointNotFound",
    "CheckpointOptions",
    "CheckpointState",
    "ChecksumError",
    "ConfigError",
    "CorruptStateError",
    "Decision",
    "Desync",
    "DirectoryInUseError",
    "DistckptError",
    "Event",
    "FencedError",
    "FormatError",
    "ManagerBroken",
    "ManifestError",
    "MismatchError",
    "NewerFormatError",
    "OneRank",
    "OpenedCheckpoint",
    "OutcomeUnknown",
    "Parts",
    "PeerLost",
    "PeerTimeout",
    "PerGroup",
    "PerRank",
    "RanksFailed",
    "Replicated",
    "RestoreFailed",
    "RestoreOptions",
    "RngState",
    "SaveFailed",
    "ShardFileError",
    "StorageError",
    "StorageTimeout",
    "StoredTensor",
    "TensorNotFound",
    "Trainable",
    "UnsafeCheckpointError",
    "UnsupportedError",
    "add_metrics",
    "best",
    "checkpoints_iterator",
    "every",
    "from_pretrained",
    "get_checkpoint_state",
    "init_process_group",
    "latest",
    "latest_checkpoint",
    "on_request",
    "on_signal",
    "pin",
    "request_save",
    "unpin",
]


# ``from distckpt import *`` leaves it out: Python has one of its own.
NOT_BY_STAR = ["open"]


def _parameters(function):
    return [
        (name, "required" if p.default is p.empty else p.default)
        for name, p in inspect.signature(function).parameters.items()
        if name != "self"
    ]


def test_public_names_are_these():
    """Nothing is added to or taken from the public names by accident."""
    assert distckpt.__all__ == NAMES
    assert sorted(NAMES) == NAMES


def test_dir_has_the_public_names_and_nothing_that_was_imported_for_them():
    """What completion offers in a notebook."""
    found = [name for name in dir(distckpt) if not name.startswith("__")]
    assert found == sorted([*NAMES, *NOT_BY_STAR])
    assert "__version__" in dir(distckpt)


def test_star_hides_nothing_of_pythons():
    found = {}
    exec("from distckpt import *", found)
    del found["__builtins__"]
    assert {*found} == {*NAMES}
    assert not {*found} & {*dir(builtins)}
    assert distckpt.open is not open


def test_annotations_are_those_that_a_caller_knows():
    """help() shows them as they are written: no alias of an inner module."""
    for name in [*NAMES, *NOT_BY_STAR]:
        thing = getattr(distckpt, name)
        functions = [thing] if inspect.isfunction(thing) else []
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            functions = [f for f in vars(thing).values() if inspect.isfunction(f)]
        for function in functions:
            if function.__name__.startswith("_") and function.__name__ != "__init__":
                continue
            for parameter in inspect.signature(function).parameters.values():
                text = str(parameter.annotation)
                assert "readers." not in text and "Path" not in text.replace("PathLike", "")
                assert text != "Which", (name, parameter)


def test_every_public_name_can_be_imported_and_is_documented():
    """Each lazy name leads somewhere, to something with a docstring."""
    for name in [*NAMES, *NOT_BY_STAR]:
        assert getattr(distckpt, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    """Lazy names do not hide misspellings."""
    assert not hasattr(distckpt, "CheckpointManger")


def test_the_managers_arguments_are_tensorflows_then_ours_by_keyword():
    """Names, order and defaults of tf.train.CheckpointManager (2.16)."""
    parameters = _parameters(distckpt.CheckpointManager.__init__)
    assert parameters[:8] == [
        ("checkpoint", "required"),
        ("directory", "required"),
        ("max_to_keep", "required"),
        ("keep_checkpoint_every_n_hours", None),
        ("checkpoint_name", "ckpt"),
        ("step_counter", None),
        ("checkpoint_interval", None),
        ("init_fn", None),
    ]
    assert parameters[8:] == [
        ("process_group", None),
        ("timeout", timedelta(minutes=5)),
        ("takeover", False),
        ("read_replicated", "auto"),
        ("replicas", "sampled"),
        ("on_event", ()),
    ]
    signature = inspect.signature(distckpt.CheckpointManager)
    for name, _ in parameters[8:]:
        assert signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_managers_methods_and_properties_are_these():
    """The public face of the manager."""
    public = {n for n in vars(distckpt.CheckpointManager) if not n.startswith("_")}
    assert public == {
        "checkpoint",
        "checkpoint_interval",
        "checkpoints",
        "close",
        "directory",
        "last_decision",
        "latest_checkpoint",
        "restore",
        "restore_or_initialize",
        "save",
        "should_stop",
        "sync",
        "wait_staged",
    }
    assert _parameters(distckpt.CheckpointManager.save) == [
        ("checkpoint_number", None),
        ("check_interval", True),
        ("options", None),
        ("metrics", None),
        ("metadata", None),
    ]


def test_readers_arguments_are_tensorflows():
    """Names and defaults of the module functions."""
    assert _parameters(distckpt.checkpoints_iterator) == [
        ("directory", "required"),
        ("min_interval_secs", 0),
        ("timeout", None),
        ("timeout_fn", None),
        ("lease_seconds", 60.0),
    ]
    assert _parameters(distckpt.latest_checkpoint) == [
        ("directory", "required"),
        ("strict", False),
    ]
    assert _parameters(distckpt.get_checkpoint_state) == [("directory", "required")]


def test_reading_a_directory_does_not_import_torch():
    """An evaluation script's look at a run directory costs no 3 seconds."""
    code = (
        "import sys, distckpt; distckpt.latest_checkpoint('/nonexistent'); "
        "distckpt.checkpoints_iterator; distckpt.CorruptStateError; distckpt.open; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_error_is_an_exception_of_ours():
    """``except DistckptError`` catches all, and ``except Exception`` as well."""
    for name in NAMES:
        value = getattr(distckpt, name)
        if isinstance(value, type) and issubclass(value, BaseException):
            assert issubclass(value, distckpt.DistckptError), name
    assert issubclass(distckpt.DistckptError, Exception)
    assert issubclass(distckpt.ConfigError, ValueError)
    assert issubclass(distckpt.UnsupportedError, TypeError)
    assert issubclass(distckpt.StorageError, OSError)
    assert issubclass(distckpt.TensorNotFound, KeyError)
