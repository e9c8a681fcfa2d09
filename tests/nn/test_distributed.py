"""Mixers under data parallelism: two processes on the CPU over gloo take the step that one takes alone."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pykernels import _library
from pykernels.nn import MIXERS, make_mixer

pytestmark = pytest.mark.skipif(
    _library.error() is not None or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs the native library and gloo",
)
DIM, TOKENS, PROCESSES = 16, 12, 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(make_mixer(name, DIM, TOKENS) for name in MIXERS)

    def forward(self, x):
        for mixer in self.mixers:
            x = x + mixer(x)
        return x


def model_and_data() -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randn(2 * PROCESSES, TOKENS, DIM)


def step(model: nn.Module, x: torch.Tensor) -> None:
    """The loss is a mean over the batch, as gradients are means over the processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(x).square().mean().backward()
    optimizer.step()


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES,
                            timeout=datetime.timedelta(minutes=5))
    try:
        alone, data = model_and_data()
        own = data.chunk(PROCESSES)[rank]
        parallel = DistributedDataParallel(copy.deepcopy(alone))
        sharded = copy.deepcopy(alone)
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for mixer in sharded.mixers:
            fully_shard(mixer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        before = [p.detach().clone() for p in alone.parameters()]
        step(alone, data)
        for wrapped, parameters in ((parallel, parallel.module.parameters), (sharded, sharded.parameters)):
            step(wrapped, own)
            for old, expected, p in zip(before, alone.parameters(), parameters(), strict=True):
                p = p.full_tensor() if isinstance(p, DTensor) else p
                assert not torch.equal(expected, old)
                torch.testing.assert_close(p.detach() - old, expected.detach() - old, rtol=1e-3,
                                           atol=1e-3 * float((expected - old).abs().max()))
    finally:
        dist.destroy_process_group()


def test_two_processes_step_as_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=PROCESSES)
