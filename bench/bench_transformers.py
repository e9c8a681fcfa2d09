"""Transformers' models as they are and with `pykernels.compat.transformers`: forward, training step, generation.

A few layers of each model's true width, with a vocabulary cut in proportion, so that a case takes seconds. The whole
models, Mamba-130M and a Llama of 16 layers, are extra cases, which take minutes:

    python -m bench.run -k "transformers and whole"
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import testing

from .kit import DTYPES, Call, Case, Expected, Peer, devices_and_threads

Places = Sequence[tuple[str, int]]
# name -> (model, direction, tokens of the prompt, tokens after it), (the same for the whole model)
WORK = {
    "mamba-fwd": (("mamba", "fwd", 256, 0), ("mamba", "fwd", 1024, 0)),
    "mamba-train": (("mamba", "fwd+bwd", 64, 0), ("mamba", "fwd+bwd", 256, 0)),
    "mamba-generate": (("mamba", "step", 128, 8), ("mamba", "step", 1024, 64)),
    "llama-prefill": (("llama", "fwd", 1024, 0), ("llama", "fwd", 1024, 0)),
}
LAYERS = {"mamba": (2, 24), "llama": (2, 16)}  # measured by default, and of the whole model
WIDTH = {"mamba": 768, "llama": 1024}
WEIGHTS = {"mamba": 6 * 768**2 + 1536 * 80, "llama": 1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 2816}  # of a layer


def _vocabulary(model: str, layers: int) -> int:
    return {"mamba": 50280, "llama": 32000}[model] * layers // LAYERS[model][1]


def _config(model: str, layers: int):
    import transformers

    sizes = {"hidden_size": WIDTH[model], "num_hidden_layers": layers, "vocab_size": _vocabulary(model, layers)}
    if model == "mamba":
        return transformers.MambaConfig(**sizes)
    return transformers.LlamaConfig(**sizes, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4)


@functools.lru_cache(maxsize=1)
def _models(model: str, layers: int, dtype: torch.dtype, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """-> (as it is, on pykernels), with the same weights."""
    import transformers

    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(_config(model, layers)).to(device, dtype).eval()
    return plain, copy.deepcopy(plain)


class _Switch:
    """Turns our functions on and off between calls, in microseconds: `enable` looks for every model that there is."""

    def __init__(self) -> None:
        from pykernels.compat import transformers as compat

        self._compat = compat
        compat.enable()
        self._routed = [(cells, before, [cells[name].cell_contents for name in compat._ROUTE])
                        for cells, before in compat._routed]

    def set(self, on: bool) -> None:
        for cells, before, ours in self._routed:
            for name, value in zip(self._compat._ROUTE, ours if on else before):
                cells[name].cell_contents = value

    def close(self) -> None:
        self.set(True)
        self._compat.disable()


@functools.cache
def _without_attention() -> str:
    """The name, in Transformers, of an attention that gives back its queries."""
    import transformers

    name = "bench_none"
    transformers.AttentionInterface.register(name, lambda module, query, *_, **__: (query.transpose(1, 2), None))
    transformers.AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


class Model:
    """A model's case; `op` says which of our backends there are."""

    def __init__(self, case: Case, work: tuple[str, str, int, int], layers: int) -> None:
        self.case, (self.model, self.direction, self.prompt, self.new) = case, work
        self.op = testing.FLASH_ATTENTION.op if self.model == "llama" else testing.SELECTIVE_SCAN.op
        self.plain, self.patched = _models(self.model, layers, DTYPES[case.dtype], case.device)
        vocabulary = self.plain.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, vocabulary, (1, self.prompt + self.new), generator=generator).to(case.device)
        self.switch = _Switch()
        if self.model == "llama":
            self.patched.set_attn_implementation("pykernels")

    def close(self) -> None:
        self.switch.close()

    def _run(self, model: torch.nn.Module) -> tuple[Tensor, ...]:
        if self.direction == "fwd+bwd":
            model.train()
            model.zero_grad(set_to_none=True)
            out = model(self.ids, labels=self.ids, use_cache=False)
            out.loss.backward()
            return out.logits[0, -8:].detach(), next(model.parameters()).grad
        model.eval()
        with torch.no_grad():
            if self.direction == "fwd":
                return (model(self.ids, use_cache=False).logits[0, -8:],)
            # Generation with the tokens given, so that all candidates are asked for the same.
            out = model(self.ids[:, :self.prompt], use_cache=True, logits_to_keep=1)
            cache = {name: out[name] for name in ("cache_params", "past_key_values") if out.get(name) is not None}
            logits = []
            for t in range(self.prompt, self.prompt + self.new):
                logits.append(model(self.ids[:, t:t + 1], use_cache=True, **cache).logits[0, -1])
            return (torch.stack(logits),)

    @staticmethod
    def _outputs(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(("logits", "dembedding"), results))

    def ours(self, backend: str) -> Call:
        def run() -> tuple[Tensor, ...]:
            self.switch.set(True)
            with pykernels.use_backend(backend):
                return self._run(self.patched)

        return Call(run, self._outputs)

    def theirs(self) -> Call:
        def run() -> tuple[Tensor, ...]:
            self.switch.set(False)
            return self._run(self.plain)

        return Call(run, self._outputs)

    def beside(self, backend: str) -> Callable[[], object]:
        """The model without its attention: what no attention, however fast, can go below."""
        bare = copy.deepcopy(self.plain)
        bare.set_attn_implementation(_without_attention())
        return functools.partial(self._run, bare)

    def expected(self) -> Expected:
        """The unpatched model in float64 (beside what it computes in float32 whatever its dtype), and as it is."""
        self.switch.set(False)
        results = self._outputs(self._run(copy.deepcopy(self.plain).double())), self._outputs(self._run(self.plain))
        return Expected(*({name: x.detach().clone() for name, x in result.items()} for result in results),
                        lambda name, x: x, "last tokens' logits, gradient of the embedding")


def _missing(case: Case) -> str | None:
    return None


PEER = Peer("transformers", "transformers", _missing, lambda problem, case: {"unpatched": problem.theirs()})


def _case(name: str, work: tuple[str, str, int, int], layers: int, dtype: str, device: str, threads: int) -> Case:
    """Its work is that of the weights alone."""
    whole = layers == LAYERS[work[0]][1]
    model, direction, prompt, new = work
    flops = 2 * (prompt + new) * (layers * WEIGHTS[model] + WIDTH[model] * _vocabulary(model, layers))
    shape = f"{'whole ' * whole}{model} {layers} layers T{prompt}" + (f"+{new}" if new else "")
    limits = ("bf16 tile", "bf16 dot", "bf16", "fp32") if dtype == "bf16" else ("fp32",)
    return Case("transformers", shape, name, dtype, direction, device, threads,
                flops * (3 if direction == "fwd+bwd" else 1), limits,
                beside="the model without attention" if model == "llama" else None, extra=whole)


def cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    """The grid, on all threads: whole models are what people run."""
    device, threads = places[-1]
    for whole, (name, works), dtype in itertools.product((False, True), WORK.items(), ("fp32", "bf16")):
        work = works[whole]
        layers = LAYERS[work[0]][whole]
        yield _case(name, work, layers, dtype, device, threads), (work, layers)


CASES = list(cases(devices_and_threads()))


@pytest.mark.parametrize(("case", "arguments"), CASES, ids=[case.id for case, _ in CASES])
def bench_transformers(case: Case, arguments: tuple, measure) -> None:
    pytest.importorskip("transformers", minversion="5.17")
    problem = Model(case, *arguments)
    with contextlib.closing(problem):
        measure(case, problem, [PEER])
