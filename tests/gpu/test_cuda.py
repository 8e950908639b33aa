"""CUDA tensors: in one process, sharded over NCCL, on ranks that share a device.

With ``DISTCKPT_GPU_TESTS_DEVICE=cpu`` the same tests run on the CPU: that tries the tests
themselves where there is no device.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, CheckpointManager, CheckpointOptions, PerRank, RngState

DEVICE = os.environ.get("DISTCKPT_GPU_TESTS_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(
        ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool),
]


def _manager(checkpoint, directory):
    return CheckpointManager(checkpoint, directory, max_to_keep=None)


def _save(directory, **objects):
    with _manager(Checkpoint(**objects), directory) as manager:
        return manager.save()


def _restore(directory, path, **objects):
    with _manager(Checkpoint(**objects), directory) as manager:
        assert manager.restore_or_initialize() == path


def _raw(tensor):
    """Return a tensor's bytes, row-major; a plain one's, or those of this rank's part."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    # As bytes first: not every dtype can be copied with strides on every device.
    size = tensor.element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = tensor.detach().view(integers[size]).cpu().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy())


def _filled(dtype, device):
    """Make a matrix whose bytes are all different, as far as the dtype lets them."""
    if dtype is torch.bool:
        return (torch.arange(48, device=device) % 3 == 0).view(6, 8)
    size = 48 * torch.empty(0, dtype=dtype).element_size()
    pattern = (torch.arange(size, device=device) * 41 % 251).to(torch.uint8)
    return pattern.view(dtype).view(6, 8)


def _views(device):
    """Make matrices of every dtype: contiguous, transposed, with gaps, without elements."""
    made = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        full = _filled(dtype, device)
        made[f"{name}.full"] = full
        made[f"{name}.transposed"] = full.t()
        made[f"{name}.gaps"] = full[1:, ::2]
        made[f"{name}.empty"] = full[:0]
    return made


def _cleared(tensors, device):
    """Make tensors of the same shapes with other memory, full of zeros."""
    made = {}
    for name, tensor in tensors.items():
        *outer, last = tensor.shape
        size = (*outer, last * tensor.element_size())
        zeros = torch.zeros(size, dtype=torch.uint8, device=device)
        made[name] = zeros.view(tensor.dtype)
    return made


@pytest.mark.parametrize(
    ("source", "target"), [(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)]
)
def test_tensors_of_a_device_come_back_bit_for_bit(tmp_path, source, target):
    """Every dtype and every way to lie in memory, also to another device."""
    saved = _views(source)
    live = _cleared(saved, target)
    path = _save(str(tmp_path), tensors=saved)
    _restore(str(tmp_path), path, tensors=live)
    for name, tensor in saved.items():
        assert live[name].device.type == target
        assert _raw(live[name]) == _raw(tensor), name


def test_view_with_gaps_on_a_device_is_restored_in_place(tmp_path):
    """What lies between its elements stays as it is."""
    path = _save(str(tmp_path), x=torch.arange(12.0, device=DEVICE).view(3, 4))
    whole = torch.full((3, 8), -1.0, device=DEVICE)
    _restore(str(tmp_path), path, x=whole[:, ::2])
    assert torch.equal(whole[:, ::2], torch.arange(12.0, device=DEVICE).view(3, 4))
    assert (whole[:, 1::2] == -1).all()


def _model(seed, device=DEVICE):
    torch.manual_seed(seed)
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 5)
    return nn.Sequential(*layers).to(device)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}
if ON_CUDA:
    OPTIMIZERS["capturable"] = lambda p: torch.optim.AdamW(p, lr=0.05, capturable=True)


def _train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6, device=DEVICE)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _assert_alike(model, optimizer, other, other_optimizer):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert _raw(mine) == _raw(theirs)
        state, expected = optimizer.state[mine], other_optimizer.state[theirs]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].device == value.device, key
            assert type(state[key]) is type(value), key
            assert _raw(state[key]) == _raw(value), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fresh_optimizer_on_a_device_trains_on_bit_for_bit(tmp_path, name):
    """State is allocated where the optimizer wants it; the device's generator is set."""
    model = _model(0)
    optimizer = OPTIMIZERS[name](model.parameters())
    _train(model, optimizer, 2)
    objects = {"model": model, "optimizer": optimizer, "rng": PerRank(RngState())}
    path = _save(str(tmp_path), **objects)
    losses = _train(model, optimizer, 2)

    live = _model(1)
    live_optimizer = OPTIMIZERS[name](live.parameters())
    objects = {"model": live, "optimizer": live_optimizer, "rng": PerRank(RngState())}
    _restore(str(tmp_path), path, **objects)
    assert _train(live, live_optimizer, 2) == losses
    _assert_alike(live, live_optimizer, model, optimizer)


# Many ranks


def _join(rank, world_size, rendezvous, backend, device):
    if ON_CUDA:
        torch.cuda.set_device(device)
        torch.zeros(1, device=DEVICE)  # from here on nobody chooses another device
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


def _sharded(seed, world_size):
    model = _model(seed)
    mesh = init_device_mesh(DEVICE, (world_size,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def _fsdp_over_nccl(rank, world_size, rendezvous, directory):
    _join(rank, world_size, rendezvous, "cpu:gloo,cuda:nccl" if ON_CUDA else "gloo", rank)
    model, optimizer = _sharded(0, world_size)
    torch.manual_seed(2 + rank)
    _train(model, optimizer, 2)
    path = _save(directory, model=model, optimizer=optimizer, rng=PerRank(RngState()))
    saved = _in_full(model, optimizer)
    losses = _train(model, optimizer, 2)
    live, live_optimizer = _sharded(1, world_size)
    _restore(directory, path, model=live, optimizer=live_optimizer, rng=PerRank(RngState()))
    assert _train(live, live_optimizer, 2) == losses
    _assert_alike(live, live_optimizer, model, optimizer)
    dist.destroy_process_group()
    return path, saved


def _in_full(model, optimizer):
    """Return all that is trained, each tensor in full, as plain numbers by name."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in {"": parameter, **optimizer.state[parameter]}.items():
            # Torch puts together right what one dimension of a mesh cuts.
            full = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{name}/{key}"] = full.tolist()
    return found


def test_fsdp_over_nccl_trains_on_bit_for_bit(tmp_path):
    """One rank on each device; then the whole model in one process, on the CPU."""
    world_size = torch.cuda.device_count() if ON_CUDA else 2
    ((path, saved), *_) = values_of(
        run_ranks(
            _fsdp_over_nccl,
            world_size,
            world_size,
            str(tmp_path / "rendezvous"),
            str(tmp_path / "run"),
            process_group=False,
        )
    )
    live = _model(1, "cpu")
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.05)
    Checkpoint(model=live, optimizer=optimizer).restore(path)
    assert _in_full(live, optimizer) == saved


def _on_one_device(rank, world_size, rendezvous, directory):
    _join(rank, world_size, rendezvous, "cpu:gloo,cuda:gloo" if ON_CUDA else "gloo", 0)
    model, optimizer = _sharded(0, world_size)
    # Gradients without a backward pass: gloo has not all that FSDP2 asks of a device.
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    optimizer.step()
    path = _save(directory, model=model, optimizer=optimizer)
    live, live_optimizer = _sharded(1, world_size)
    _restore(directory, path, model=live, optimizer=live_optimizer)
    _assert_alike(live, live_optimizer, model, optimizer)
    dist.barrier()
    return path


def test_ranks_that_share_a_device_restore_their_own_parts(tmp_path):
    """Three ranks over gloo, uneven parts; one process puts them together on the CPU."""
    (path, *_) = values_of(
        run_ranks(
            _on_one_device,
            3,
            3,
            str(tmp_path / "rendezvous"),
            str(tmp_path / "run"),
            process_group=False,
        )
    )
    expected = _model(0, "cpu")
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.05)
    for index, parameter in enumerate(expected.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    optimizer.step()
    live = _model(1, "cpu")
    live_optimizer = torch.optim.AdamW(live.parameters(), lr=0.05)
    Checkpoint(model=live, optimizer=live_optimizer).restore(path)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(live.state_dict()[name], value)


@pytest.mark.parametrize("staging", ["eager", "lazy"])
def test_asynchronous_save_holds_what_was_there_at_the_call(tmp_path, staging):
    """Everything changes at the earliest moment, in the same stream, without waiting."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)), nn.BatchNorm1d(2048))
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    options = CheckpointOptions(enable_async=True, staging=staging)
    batch = torch.randn(16, 2048, device=DEVICE)
    model(batch).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with _manager(checkpoint, str(tmp_path / "run")) as manager:
        for _ in range(5):
            model(batch).sum().backward()  # still in the stream when the save begins
            expected = {name: value.clone() for name, value in model.state_dict().items()}
            path = manager.save(options=options)
            model(batch).sum().backward()  # changes the buffers
            optimizer.step()  # waits, if it must
            manager.sync()
            copy = nn.Sequential(
                *(nn.Linear(2048, 2048) for _ in range(8)), nn.BatchNorm1d(2048)
            )
            other = torch.optim.AdamW(copy.parameters())
            Checkpoint(model=copy, optimizer=other).restore(path)
            saved = copy.state_dict()
            for name, value in expected.items():
                assert _raw(saved[name]) == _raw(value), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("staging", ["eager", "lazy"])
def test_asynchronous_save_of_two_devices_waits_for_both(tmp_path, staging):
    """The copies from the one that is not current are in a stream of its own, too."""
    devices = [torch.device("cuda", index) for index in (0, 1)]
    model = nn.ModuleList(nn.Linear(4096, 4096, device=device) for device in devices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = CheckpointOptions(enable_async=True, staging=staging)
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with _manager(checkpoint, str(tmp_path / "run")) as manager:
        for _ in range(5):
            for layer, device in zip(model, devices, strict=True):
                layer(torch.randn(256, 4096, device=device)).sum().backward()
            expected = {name: value.clone() for name, value in model.state_dict().items()}
            path = manager.save(options=options)
            optimizer.step()
            manager.sync()
            copy = nn.ModuleList(nn.Linear(4096, 4096) for _ in devices)
            other = torch.optim.SGD(copy.parameters(), lr=0.1)
            Checkpoint(model=copy, optimizer=other).restore(path)
            saved = copy.state_dict()
            for name, value in expected.items():
                assert _raw(saved[name]) == _raw(value), name
