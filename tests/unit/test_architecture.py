"""The house rules, read from the source: layers, torch, the filesystem, pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import distckpt

# A module imports only from rows with lower numbers. ``__init__`` is exempt: it hands
# names out lazily.
LAYERS = {
    -2: {"errors"},
    -1: {"_version", "arrays", "collector", "durations", "instances", "value_hints"}
    | {"value_tags", "value_types"},
    0: {"boxes", "dtypes", "few_open", "generators", "identity", "locations"}
    | {"names", "near", "parts", "paths", "stamp", "step_watch", "strict_json"}
    | {"trainable", "value_encoder", "words"},
    1: {"calls", "charts", "elements", "events", "line", "messages", "modules"}
    | {"per_rank", "policy", "preemption", "record", "rendezvous", "restore_names"}
    | {"selection", "sharding", "terminal", "torch_versions", "values"},
    2: {"clock", "gate", "layout", "mismatch", "remarks", "retention", "state_dicts"}
    | {"wrapper_tensors"},
    3: {"arena", "choice", "files", "liveness", "manifest", "shard_header"}
    | {"tensor_paths", "tensors", "worker"},
    4: {"known", "lookout", "near_paths", "read_plan", "sinks", "taken", "waiting"},
    5: {"comm", "exchange_plan", "leaves", "restore_plan", "run_directory"},
    6: {"agree", "flight", "groups", "history", "leases", "mailbox"}
    | {"module_loading", "node", "probe", "shard_file", "state"},
    7: {"cadence", "janitor", "marked_nodes", "module_node", "optimizers", "report"}
    | {"ring", "run_checks", "watching"},
    8: {"chief", "doctor", "frozen_node", "optimizer_node", "readers", "schedulers"},
    9: {"prune", "requests", "session", "stored_tensor", "tracked", "verify"},
    10: {"loading", "object_types", "opened", "repair"},
    11: {"capture", "diff"},
    12: {"checkpoint", "own_file", "replica_digests"},
    13: {"pretrained", "save_state", "snapshot"},
    14: {"asking", "claim", "construct", "exchange", "replicas", "savable"},
    15: {"restore", "save_plan"},
    16: {"commit"},
    17: {"background", "cli_paths"},
    18: {"cli_bench", "cli_completion", "cli_diff", "cli_repair", "cli_report"}
    | {"cli_requests", "cli_transfer", "cli_watch", "save"},
    19: {"cli", "manager"},
}
# Those of the packages ``formats`` and ``storage`` stand between these: the same numbers.
FORMATS = {
    0: {"pickle_tree"},
    1: {"foreign", "optimizers", "pickle_read", "pickle_write"},
    2: {"dcp_metadata", "import_names"},
    4: {"placing", "safetensors_file", "zip_file"},
    5: {"torch_save"},
    6: {"torch_load"},
    7: {"dcp_directory"},
    8: {"import_source"},
    10: {"dcp_verify", "dcp_write"},
    11: {"dcp_names", "export_names", "import_run"},
    12: {"export"},
}
STORAGE = {
    1: {"store"},
    2: {"lock", "memory_store", "posix"},
    3: {"posix_findings"},
    4: {"posix_store"},
}
PACKAGES = {"formats": FORMATS, "storage": STORAGE}
for package, rows in PACKAGES.items():
    for layer, row in rows.items():
        LAYERS[layer] |= {f"{package}.{module}" for module in row}

# ``bench`` stands above all rows. One module runs it, and imports it only then.
RUNS_BENCH = "cli_bench"

# What the command and the crash tests need answers at once: importing torch takes seconds.
TORCH_FREE = {
    *{
        "_version",
        "errors",
        "paths",
        "strict_json",
        "dtypes",
        "boxes",
        "identity",
        "values",
    },
    *{"record", "stamp"},
    *{"layout", "files", "messages", "manifest", "policy", "state", "shard_file"},
    *{"retention", "remarks", "gate", "clock", "choice"},
    *{"shard_header", "probe", "line", "liveness", "worker", "waiting"},
    *{"calls", "read_plan", "exchange_plan", "collector", "restore_names"},
    *{"readers", "janitor", "verify", "chief", "cli", "sharding"},
    *{"selection", "stored_tensor", "opened", "names", "few_open"},
    *{"terminal", "cli_transfer", "cli_repair", "repair", "doctor"},
    *{"cli_paths", "cli_diff", "diff", "elements", "cli_watch", "watching"},
    *{"cli_completion", "cli_bench", "cli_requests", "cli_report", "events", "sinks"},
    *{"mailbox", "leases", "lookout", "requests", "prune", "charts", "history"},
    *{"report", "torch_versions", "locations", "durations", "mismatch", "words"},
    *{"run_directory", "run_checks", "step_watch", "near", "near_paths", "state_dicts"},
    *{"arrays", "instances", "value_types", "value_hints", "value_tags", "value_encoder"},
    *{f"formats.{module}" for row in FORMATS.values() for module in row},
    *{f"storage.{module}" for row in STORAGE.values() for module in row},
}

# Of ``os``, what touches no file, and of ``os.path``, what only handles names.
PLAIN_OS = {
    *{"path", "sep", "curdir", "fspath", "PathLike", "environ", "getpid", "urandom"},
    *{"register_at_fork", "kill", "setpriority", "PRIO_PROCESS", "strerror"},
}
PLAIN_OS_PATH = {"join", "dirname", "basename", "split", "abspath", "realpath", "normpath"}
PLAIN_OS_PATH |= {"expanduser", "expandvars"}
# Modules that touch files by themselves.
FILE_MODULES = {"shutil", "tempfile", "pathlib", "glob", "fcntl", "mmap", "io", "fileinput"}
FILE_MODULES |= {"zipfile", "tarfile"}
# Only ever given a view of a file that storage has opened; or makes names of files alone.
ON_OPENED_FILES = {
    "formats.zip_file": {"import of zipfile"},
    "value_types": {"import of pathlib"},
}

# What has a place in a store, or opens one; ``storage`` itself left out.
USE_A_STORE = {"run_directory", "files", "state", "mailbox", "leases", "history", "probe"}

# Modules, and calls of torch, that pickle.
PICKLING_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}
PICKLING_CALLS = {
    *{"torch.load", "torch.save"},
    *{"all_gather_object", "gather_object", "broadcast_object_list"},
    *{"scatter_object_list", "send_object_list", "recv_object_list"},
}

FOLDER = Path(distckpt.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for pattern in ("*.py", "formats/*.py", "storage/*.py")
    for path in FOLDER.glob(pattern)
    if path.stem != "__init__"
)
LAYER_OF = {module: layer for layer, row in LAYERS.items() for module in row}


@cache
def parse(module):
    return ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text())


@cache
def nodes_of(tree):
    return list(ast.walk(tree))


@cache
def imports_of(tree):
    """Return every imported name, dotted: ``from a import b`` is ``a.b``."""
    found = set()
    for node in nodes_of(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports_of(module):
    """Return the modules of the package that a module imports, anywhere in it."""
    dotted = (name.split(".") for name in imports_of(parse(module)))
    own = [parts[1:] for parts in dotted if parts[0] == "distckpt" and len(parts) > 1]
    found = {".".join(parts[: 2 if parts[0] in PACKAGES else 1]) for parts in own}
    return found - {"bench"} if module == RUNS_BENCH else found


def dotted_name(node):
    """Return ``a.b.c`` for such an expression; "" for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


@cache
def uses_of(tree):
    """Return every dotted name that the code uses, with its line."""
    return [
        (dotted_name(node), node.lineno)
        for node in nodes_of(tree)
        if isinstance(node, (ast.Attribute, ast.Name))
    ]


def file_uses_of(tree):
    """Find what touches the filesystem."""
    found = []
    for name, line in uses_of(tree):
        parts = name.split(".")
        is_plain = (
            parts[0] != "os"
            or len(parts) == 1
            or (parts[1] in PLAIN_OS and parts[1] != "path")
            or (parts[1] == "path" and (len(parts) == 2 or parts[2] in PLAIN_OS_PATH))
        )
        if not is_plain or name == "open":
            found.append(f"line {line}: {name}")
    found += [
        f"import of {name}"
        for name in imports_of(tree)
        if name.split(".")[0] in FILE_MODULES or name.startswith("os.")
    ]
    return found


def pickling_in(tree):
    """Find what pickles."""
    found = [
        f"import of {name}"
        for name in imports_of(tree)
        if name.split(".")[0] in PICKLING_MODULES or name in PICKLING_CALLS
    ]
    for name, line in uses_of(tree):
        if name in PICKLING_CALLS or name.split(".")[-1] in PICKLING_CALLS:
            found.append(f"line {line}: {name}")
    return found


# Each rule is one test of all modules, because hundreds of tests take seconds to collect
# and to report. What it finds it lists by module.


def test_modules_stand_in_the_table_of_layers():
    """Whoever adds a module says where it belongs."""
    missing = [module for module in MODULES if module not in LAYER_OF]
    assert not missing, f"add {missing} to LAYERS in this file"


def test_table_of_layers_names_each_module_once_and_no_other():
    """The table is the truth about the folder."""
    rows = [module for row in LAYERS.values() for module in row]
    assert sorted(rows) == MODULES


def test_modules_import_only_from_lower_layers():
    """Who reads a module needs to know only what is below it."""
    wrong = [
        f"{module} (layer {LAYER_OF.get(module)}) imports {other}"
        for module in MODULES
        for other in sorted(own_imports_of(module))
        if LAYER_OF.get(other, 99) >= LAYER_OF.get(module, -2)
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_free_modules_import_only_torch_free_ones():
    """The fresh interpreter below only shows that there is some; this names it."""
    wrong = {module: own_imports_of(module) - TORCH_FREE for module in TORCH_FREE}
    assert not any(wrong.values()), {m: found for m, found in wrong.items() if found}


def test_torch_free_modules_in_a_fresh_interpreter_do_not_import_torch():
    """Neither directly nor through anything that they import."""
    imports = "; ".join(f"import distckpt.{module}" for module in sorted(TORCH_FREE))
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_bench_is_imported_only_when_it_is_run():
    """Whoever uses the library, or another command, has nothing to do with it."""
    own = {module: imports_of(parse(module)) for module in MODULES}
    using = {m for m, names in own.items() if any("distckpt.bench" in n for n in names)}
    assert using == {RUNS_BENCH}
    code = "import sys; import distckpt.cli; assert 'distckpt.bench' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_modules_touch_no_file_but_posix():
    """One module touches the filesystem; the lock file is filelock's."""
    found = {
        module: {*file_uses_of(parse(module))} - ON_OPENED_FILES.get(module, set())
        for module in MODULES
        if module != "storage.posix"
    }
    assert not any(found.values()), {m: uses for m, uses in found.items() if uses}


def test_at_most_eight_modules_use_a_store():
    """All others say what they mean (an attempt, a request) to one of these."""
    using = {
        module
        for module in MODULES
        if not module.startswith("storage.")
        and (
            any(name.startswith("distckpt.storage") for name in imports_of(parse(module)))
            or ("run_directory" in own_imports_of(module) and _uses_places(module))
        )
    }
    assert using == USE_A_STORE
    assert len(using) <= 8


def _uses_places(module):
    return any(name.endswith(".places") for name, _ in uses_of(parse(module)))


def test_names_in_a_run_directory_are_joined_in_one_module():
    """Others spell only what a user has given, or another program's files."""
    names = {"STATE_FILE", "RECORDS_DIRECTORY", "LOCK_FILE", "MANIFEST_FILE"}
    names |= {"REQUESTS_DIRECTORY", "LEASES_DIRECTORY", "EVENTS_DIRECTORY"}
    for module in set(MODULES) - {"run_directory"}:
        if module.startswith("storage."):
            continue
        for node in nodes_of(parse(module)):
            if isinstance(node, ast.Call) and dotted_name(node.func).endswith("path.join"):
                used = {dotted_name(a).rpartition(".")[2] for a in node.args}
                called = {
                    a.attr
                    for arg in node.args
                    for a in ast.walk(arg)
                    if isinstance(a, ast.Attribute)
                }
                assert not used & names, (module, node.lineno)
                assert not called & {"published", "pending", "trash"}, (module, node.lineno)


def test_modules_other_than_lock_do_not_use_filelock():
    """Safety comes from the records; the lock is a courtesy in one place."""
    using = [
        module
        for module in MODULES
        if any(name.split(".")[0] == "filelock" for name in imports_of(parse(module)))
    ]
    assert using == ["storage.lock"]


def test_modules_never_pickle():
    """No pickle on disk or between ranks: loading one runs what somebody wrote."""
    found = {module: pickling_in(parse(module)) for module in (*MODULES, "__init__")}
    assert not any(found.values()), {m: uses for m, uses in found.items() if uses}


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.open('x', 0)",
        "import os\nos.path.exists('x')",
        "from os import rename",
        "from os.path import isdir",
        "open('x')",
        "import shutil",
        "import zipfile",
        "from pathlib import Path",
        "def f():\n    import tempfile",
    ],
)
def test_rule_about_files_finds_what_touches_one(code):
    """The rule itself works."""
    assert file_uses_of(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "def f():\n    import dill",
    ],
)
def test_rule_about_pickle_finds_what_pickles(code):
    """The rule itself works."""
    assert pickling_in(ast.parse(code))
