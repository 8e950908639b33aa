"""The table of element types agrees with itself, with numpy and with safetensors."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save

from distckpt import dtypes

WITH_COUNTERPART = [name for name in dtypes._DTYPES if dtypes.has_counterpart(name)]
WITHOUT = [name for name in dtypes._DTYPES if not dtypes.has_counterpart(name)]


@pytest.mark.parametrize("name", WITH_COUNTERPART)
def test_code_of_dtype_leads_back_to_it(name):
    """No two dtypes share a safetensors code."""
    assert dtypes.dtype_of_code(dtypes.safetensors_code(name)) == name


@pytest.mark.parametrize("name", WITH_COUNTERPART)
def test_code_has_the_size_of_its_dtype(name):
    """Bytes are counted the same way when writing and when reading."""
    code = dtypes.safetensors_code(name)
    assert dtypes.code_size_bytes(code) == dtypes.item_size_bytes(name)


@pytest.mark.parametrize("name", WITHOUT)
def test_dtype_without_counterpart_is_stored_as_bytes(name):
    """Any tool opens the file, though it sees bytes."""
    assert dtypes.safetensors_code(name) == "U8"


@pytest.mark.parametrize(
    "name", [n for n in dtypes._DTYPES if n in np.sctypeDict and hasattr(np, n)]
)
def test_dtype_that_numpy_has_is_of_the_same_size(name):
    """The sizes are the true ones."""
    assert dtypes.item_size_bytes(name) == np.dtype(name).itemsize


@pytest.mark.parametrize("name", ["bool", "uint16", "int64", "float32", "complex64"])
def test_dtype_that_numpy_has_gets_the_code_that_safetensors_writes(name):
    """Other tools see the true dtype."""
    ((_, tensor),) = deserialize(save({"x": np.zeros(1, name)}))
    assert dtypes.safetensors_code(name) == tensor["dtype"]


@pytest.mark.parametrize("name", ["", "float", "torch.float32", "quint8", "object"])
def test_unknown_dtype_is_not_known(name):
    """What cannot be viewed as bytes is refused by name."""
    assert not dtypes.is_known(name)


@pytest.mark.parametrize("code", ["", "f32", "F4", "F128", "float32"])
def test_unknown_code_has_no_size(code):
    """A shard file with an element type that we do not know is refused."""
    assert dtypes.code_size_bytes(code) is None
