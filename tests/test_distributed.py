"""Data parallelism: two processes on the CPU over gloo take the step that one takes alone, mixers and whole models."""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib.metadata
import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
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
DIM, TOKENS, PROCESSES, VOCABULARY = 16, 12, 2, 32


class Mixers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_mixer(name, DIM, TOKENS) for name in MIXERS)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.layers:
            x = x + mixer(x)
        return x


class Logits(nn.Module):
    """Of a model of Transformers, zeros where the ids are padding, 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = model.base_model.layers

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        return self.model(ids, attention_mask=mask.long(), use_cache=False).logits * mask[..., None]


def step(model: nn.Module, x: Tensor) -> None:
    """The loss is a mean over the batch, as gradients are means over the processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(x).square().mean().backward()
    optimizer.step()


def compare(model: nn.Module, data: Tensor, rank: int, patched: Callable = contextlib.nullcontext) -> None:
    """A step of the model alone, and those of its copies in parallel, `patched`."""
    own, mesh = data.chunk(PROCESSES)[rank], init_device_mesh("cpu", (PROCESSES,))
    parallel, sharded = DistributedDataParallel(copy.deepcopy(model)), copy.deepcopy(model)
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    step(model, data)
    for wrapped, parameters in ((parallel, parallel.module.parameters), (sharded, sharded.parameters)):
        with patched():
            step(wrapped, own)
        for old, expected, p in zip(before, model.parameters(), parameters(), strict=True):
            p = p.full_tensor() if isinstance(p, DTensor) else p
            assert not torch.equal(expected, old)
            torch.testing.assert_close(p.detach() - old, expected.detach() - old, rtol=1e-3,
                                       atol=1e-3 * float((expected - old).detach().abs().max()))


def compare_mixers(rank: int) -> None:
    torch.manual_seed(0)
    compare(Mixers(), torch.randn(2 * PROCESSES, TOKENS, DIM), rank)


def compare_models_of_transformers(rank: int) -> None:
    """Mamba, Mamba-2, and one with attention besides, from padded rows; alone they are unpatched."""
    import transformers

    from pykernels.compat import transformers as compat

    common = {"vocab_size": VOCABULARY, "hidden_size": DIM, "num_hidden_layers": 2, "initializer_range": 0.3}
    mamba, mamba_2 = {**common, "state_size": 8}, {"num_heads": 4, "head_dim": 8, "n_groups": 2}
    hybrid = {**common, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "mamba_n_heads": 4,
              "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]}
    for make in (
        lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**mamba)),
        lambda: transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**mamba, **mamba_2)),
        lambda: transformers.BambaForCausalLM(transformers.BambaConfig(**hybrid)),
    ):
        torch.manual_seed(0)
        model, ids = Logits(make().train()), torch.randint(1, VOCABULARY, (2 * PROCESSES, TOKENS))
        ids[1, :4], ids[2, :7] = 0, 0
        compare(model, ids, rank, lambda: compat.enable(replace=["sdpa"]))


def work(rank: int, store: str, of_transformers: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES,
                            timeout=datetime.timedelta(minutes=5))
    try:
        compare_mixers(rank)
        if of_transformers:
            compare_models_of_transformers(rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # gloo's threads live on after the group, and one that drops a tensor while the interpreter is being taken down
    # aborts the process: leave without taking it down. An assertion that failed has left by its exception.
    sys.stderr.flush()
    os._exit(0)


def has_scans_in_transformers() -> bool:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) >= (5, 17)


def test_two_processes_step_as_one(tmp_path):
    of_transformers = has_scans_in_transformers()
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), of_transformers), nprocs=PROCESSES)
