"""The files of launch/ themselves: sound shell, sound manifests, few places to edit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_helpers import LAUNCH, PLACE, ROOT, TEMPLATES, edited

# What the manifests describe.
_KINDS = ("PersistentVolumeClaim", "JobSet")
# What there is nowhere: whoever copies a file must have put something else in its place.
_EXAMPLES = re.compile(r"/path/to|/shared|host-0|registry\.example|storageClassName")
_SHELL = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]


@cache
def _models() -> dict[str, Any]:
    """Import the definitions of Kubernetes and of JobSet; it takes 1.5 s."""
    from kubeflow_trainer_api.models.io_k8s_api_core_v1_persistent_volume_claim import (
        IoK8sApiCoreV1PersistentVolumeClaim,
    )
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import (
        JobsetV1alpha2JobSet,
    )

    models = (IoK8sApiCoreV1PersistentVolumeClaim, JobsetV1alpha2JobSet)
    return dict(zip(_KINDS, models, strict=True))


@pytest.mark.full
def test_shell_scripts_pass_shellcheck():
    checker = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([checker, *_SHELL], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", TEMPLATES)
def test_file_has_at_most_three_places_to_edit_and_no_other(name):
    text = (LAUNCH / name).read_text()
    places = [*PLACE.finditer(text)]
    numbers = [(int(place[1]), int(place[2])) for place in places]
    assert numbers == [(number, len(places)) for number in range(1, len(places) + 1)]
    assert 1 <= len(places) <= 3 and text.count("EDIT") == len(places)
    for example in _EXAMPLES.finditer(text):
        inside = any(p.start() <= example.start() < p.end() for p in places)
        assert inside, f"{example[0]} stands outside of the places"


@pytest.mark.parametrize("name", TEMPLATES)
def test_head_says_what_it_is_for_and_where_more_is_said(name):
    head = (LAUNCH / name).read_text().split("\n\n")[0]
    assert "marked" in head and "places" in head and "docs/launching.md" in head
    assert name in (ROOT / "docs" / "launching.md").read_text()


# The manifest


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def _flaws(kind: str, document: dict[str, Any]) -> list[str]:
    """Name what the definitions do not allow: types, fields, words."""
    from pydantic import ValidationError

    try:
        model = _models()[kind].from_dict(document)
    except ValidationError as error:
        return [str(error)]
    assert model is not None
    return [*_misunderstood(document, model.to_dict(), kind), *_wrong_words(model, kind)]


def _misunderstood(given: Any, understood: Any, path: str) -> Iterator[str]:
    """Name what a model has left out, or put in: fields unknown to it, or missing."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key in given.keys() | understood.keys():
            if key not in understood:
                yield f"{path}.{key}: there is no such field"
            elif key not in given:
                yield f"{path}.{key}: is missing"
            else:
                yield from _misunderstood(given[key], understood[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(understood, list):
        for index, (one, other) in enumerate(zip(given, understood, strict=True)):
            yield from _misunderstood(one, other, f"{path}[{index}]")
    elif given != understood:
        yield f"{path}: {given!r} is understood as {understood!r}"


def _wrong_words(value: Any, path: str) -> Iterator[str]:
    """Name words where a definition says in prose, and there alone, which it takes."""
    from pydantic import BaseModel

    if isinstance(value, list):
        for item in value:
            yield from _wrong_words(item, path)
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            inner = getattr(value, name)
            _, _, listed = (field.description or "").partition("Valid values are ")
            if (
                isinstance(inner, str)
                and listed
                and inner not in listed.partition(".")[0].split(", ")
            ):
                yield f"{path}.{name}: {inner!r} is none of {listed}"
            yield from _wrong_words(inner, f"{path}.{name}")


@pytest.mark.full  # of what imports the definitions
@pytest.mark.parametrize("kind", _KINDS)
def test_manifest_is_what_the_definitions_of_kubernetes_and_jobset_allow(manifests, kind):
    assert _flaws(kind, manifests[kind]) == []
    assert len(manifests) == len(_KINDS)


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "wrong", "flaw"),
    [
        ("backoffLimit: 0", "backoffLimits: 0", "no such field"),
        ("sizeLimit: 16Gi", "size: 16Gi", "no such field"),
        ("completionMode: Indexed", "completionMode: indexed", "enum values"),
        ("restartPolicy: Never", "restartPolicy: Rarely", "enum values"),
        ("RestartJobSetAndIgnoreMaxRestarts", "RestartAll", "none of"),
        ("replicas: 2", "replicas: two", "valid integer"),
        ("replicatedJob: workers, ", "", "is missing"),
    ],
)
def test_wrong_manifest_is_seen(right, wrong, flaw):
    text = (LAUNCH / "kubernetes.yaml").read_text()
    assert right in text
    documents = yaml.safe_load_all(text.replace(right, wrong))
    flaws = [flaw for document in documents for flaw in _flaws(document["kind"], document)]
    assert flaw in "".join(flaws)


def test_names_in_the_manifest_fit_each_other(manifests):
    spec = manifests["JobSet"]["spec"]
    (workers,) = spec["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "emptyDir" not in v]
    claim = manifests["PersistentVolumeClaim"]["metadata"]["name"]
    assert claims == [{"claimName": claim}]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert f"--directory={mounted['runs']}/gpt" in container["args"]
    assert spec["coordinator"]["replicatedJob"] == workers["name"]


# The numbers


def _number(pattern: str, text: str) -> int:
    (found,) = re.findall(pattern, text)
    return int(found)


def test_each_who_ends_the_job_waits_longer_than_who_is_to_end_before():
    for name in ("one_host.sh", "hosts.sh", "slurm.sbatch"):
        text = (LAUNCH / name).read_text()
        grace = _number(r"(?m)^grace=(\d+)", text)
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((grace + 10))" in text
    assert _number(r"--signal=B:USR1@(\d+)", text) >= grace + 60
    text = (LAUNCH / "kubernetes.yaml").read_text()
    grace = _number(r"--grace-period-seconds=(\d+)", text)
    torchrun = _number(r'TORCH_ELASTIC_SHUTDOWN_TIMEOUT, value: "(\d+)"', text)
    assert grace < torchrun < _number(r"terminationGracePeriodSeconds: (\d+)", text)


# What they start, with a program in torchrun's place that tells what it was given


@pytest.fixture
def installed(tmp_path: Path) -> str:
    told = '#!/bin/sh\nprintf \'%s\\n\' $$ "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"\n'
    (tmp_path / "torchrun").write_text(told)
    (tmp_path / "torchrun").chmod(0o755)
    return f"export PATH={shlex.quote(str(tmp_path))}:$PATH"


def _given(command: list[str], **environment: str) -> list[str]:
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert started.stdout is not None
    with started:
        pid, timeout, *given = started.stdout.read().splitlines()
    assert int(pid) == started.pid, "the very process that gets the signals"
    assert timeout == "70"
    return given


def _options(given: list[str]) -> dict[str, str]:
    return dict(zip(given[::2], given[1::2], strict=False))


def test_script_for_one_host_becomes_its_launcher(tmp_path, installed):
    program = "run=a\ngrace=60\nprogram=(train.py 'two words')"
    script = edited("one_host.sh", tmp_path, "processes=2", installed, program)
    given = _given([str(script)])
    assert given[-2:] == ["train.py", "two words"]
    options = _options(given)
    assert options["--nproc-per-node"] == "2" and options["--rdzv-id"] == "a"


def test_script_for_hosts_becomes_its_launcher(tmp_path, installed):
    hosts = "hosts=2:3\nfirst_host=there\nport=29400\nprocesses=2"
    program = "run=a\ngrace=60\nprogram=(train.py 'two words')"
    script = edited("hosts.sh", tmp_path, hosts, installed, program)
    given = _given([str(script)])
    assert given[-2:] == ["train.py", "two words"]
    options = _options(given)
    assert options["--nnodes"] == "2:3" and options["--rdzv-endpoint"] == "there:29400"
    assert "keep_alive_interval=5,keep_alive_max_attempt=3" in options["--rdzv-conf"]


@pytest.mark.parametrize("index", [0, 2])
def test_container_becomes_its_launcher(tmp_path, manifests, installed, index):
    (workers,) = manifests["JobSet"]["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    # What would come from the pod's labels.
    labels = {"RUN": "gpt", "HOSTS": "3", "HOST_INDEX": str(index), "FIRST_HOST": "gpt-0"}
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert labels.keys() == {name for name, value in variables.items() if value is None}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | labels
    given = _given([*container["command"], *container["args"]], **variables)
    assert given[-len(container["args"]) :] == container["args"]
    options = _options(given)
    assert options["--nnodes"] == "3" and options["--rdzv-endpoint"] == "gpt-0:29400"
    assert f"is_host={'true' if index == 0 else 'false'}," in options["--rdzv-conf"]
