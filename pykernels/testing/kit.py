"""How an op is described, run, and compared with its definition in float64."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .targets import DTYPES, Target, poisoned_memory, use_threads


@dataclasses.dataclass(frozen=True)
class Sample:
    """The keyword arguments of one call, tensors included."""

    args: Mapping[str, Any]
    differentiable: tuple[str, ...] = ()  # names of the arguments that take a gradient

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The sample with `function` applied to its floating-point tensors."""
        args = {
            name: function(x) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self.args.items()
        }
        return Sample(args, self.differentiable)

    def replace(self, **args: Any) -> Sample:
        return Sample({**self.args, **args}, self.differentiable)

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.args.items() if isinstance(x, Tensor)}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A named way to make a sample; the same values for every dtype and device, up to rounding."""

    name: str
    make: Callable[[torch.dtype, str], Sample]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    needs: frozenset[str] = frozenset()  # options that not every backend of the op serves, as in backends.Query
    sizes: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"head_dim": 64, "value_dim": 64})

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class BadInput:
    """Arguments that change a good sample into one that must be rejected, how, and with what words."""

    name: str
    args: Mapping[str, Any]
    exception: type[Exception]
    match: str  # regular expression; names the argument

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """All that the kits know about one public function."""

    function: Callable
    op: backends.Op
    outputs: tuple[str, ...]  # what it returns when every return_* option is on
    returns: Mapping[str, Any]  # those options
    mutates: tuple[str, ...]  # arguments overwritten in place
    cases: tuple[Case, ...]  # ordinary calls: shapes, options, layouts
    extremes: tuple[Case, ...]  # calls at the edges that still must meet the error budget
    good: Case  # what `bad_inputs` change
    bad_inputs: Callable[[], Iterable[BadInput]]
    torch_ops: tuple[
        str, ...
    ]  # the ops of torch.ops.pykernels behind it, "{backend}" where the backend's name stands
    calls: Callable[
        [Sample, str], Iterable[tuple[str, tuple]]
    ]  # (sample, backend) -> (name of the torch op, its arguments)
    timing: Case  # what `verify` times
    peer: Callable[
        [Sample], Callable[..., Tensor] | None
    ]  # PyTorch's own path as a function of the tensors in `args`

    @property
    def name(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return self.name


def serves(op: Description, case: Case, target: Target, dtype: torch.dtype) -> bool:
    """Whether the target serves the case in `dtype`, by what the op itself says of its backends."""
    query = backends.Query(target.device, dtype, case.sizes, case.needs)
    choice = backends.choose(op.op, query, target.backend, backends.environment())
    return dtype in case.dtypes and choice.backend is not None


def seed(name: str) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(name.encode())


def _clone(x: Tensor) -> Tensor:
    """A copy with the same strides, so that in-place functions meet the layout of the sample."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
    return x.new_zeros(extent).as_strided(x.shape, x.stride()).copy_(x)


def cotangents(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random gradient for each output, the same values for every dtype up to rounding."""
    result = {}
    for name, x in outputs.items():
        generator = torch.Generator().manual_seed(seed(name))
        result[name] = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
    return result


def run(
    op: Description, sample: Sample, backend: str, *, grad: bool | Mapping[str, Tensor] = True
) -> dict[str, Tensor]:
    """Calls the function -> {output: value, overwritten argument: value, "d" + argument: gradient}.

    `grad` may hold the outputs' cotangents; True takes those of `cotangents`; outputs it leaves out get none.
    """
    args = {**sample.args, **op.returns, "backend": backend}
    args |= {name: _clone(args[name]) for name in op.mutates}
    wanted = sample.differentiable if grad is not False else ()
    args |= {name: args[name].detach().requires_grad_() for name in wanted}
    with torch.set_grad_enabled(bool(wanted)), torch.random.fork_rng():
        torch.manual_seed(0)  # what a call draws is the same on every backend
        values = op.function(**args)
    outputs = dict(zip(op.outputs, values if isinstance(values, tuple) else (values,), strict=True))
    result = {name: x.detach() for name, x in outputs.items()} | {name: args[name] for name in op.mutates}
    if wanted:
        given = cotangents(outputs) if grad is True else grad
        gradients = torch.autograd.grad(
            [outputs[name] for name in given],
            [args[name] for name in wanted],
            list(given.values()),
            materialize_grads=True,
        )
        result |= {"d" + name: x for name, x in zip(wanted, gradients)}
    return result


def _both(
    op: Description, sample: Sample, through: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's values in float64 and in the sample's own dtype, from the same inputs and cotangents."""
    with use_threads(1):  # these are small: on several threads most of the time would be waiting for each other
        plain = run(op, sample, "reference", grad=False)
        given = cotangents({name: plain[name] for name in through})
        plain = run(op, sample, "reference", grad=given)
        wide = {name: x.double() for name, x in given.items()}
        return run(op, sample.map(Tensor.double), "reference", grad=wide), plain


@functools.lru_cache(maxsize=512)
def expected(
    op: Description, case: Case, dtype: torch.dtype, device: str = "cpu", through: tuple[str, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(reference, yardstick): the definition in float64 on the inputs rounded to `dtype`, and in `dtype` itself.

    `through` names the outputs that get a cotangent (None: all). In float64 the two would be one, so there the
    yardstick's errors are those of float32, scaled to float64's precision.
    """
    through = op.outputs if through is None else through
    reference, yardstick = _both(op, case.make(dtype, device), through)
    if dtype == torch.float64:
        wide, narrow = _both(op, case.make(torch.float32, device), through)
        share = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        errors = {
            name: (narrow[name].double() - x).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            for name, x in wide.items()
        }
        yardstick = {name: x + share * errors[name] for name, x in reference.items()}
    for name, x in reference.items():
        if not torch.equal(yardstick[name].isfinite(), x.isfinite()):
            raise ValueError(
                f"{op} {case}: {name} leaves the range of {dtype} in the plain composition: that is no yardstick"
            )
    return reference, yardstick


@dataclasses.dataclass(frozen=True)
class Error:
    """The error of one tensor, max|delta| / max|reference|, beside what it may be."""

    tensor: str
    error: float
    budget: float
    problem: str | None = (
        None  # what no budget excuses: a wrong shape or dtype, NaN or infinity at the wrong place
    )

    @property
    def ok(self) -> bool:
        return self.problem is None and self.error <= self.budget

    def __str__(self) -> str:
        text = f"{self.tensor}: error {self.error:.2e}, budget {self.budget:.2e}"
        return text if self.problem is None else f"{text}, {self.problem}"


def _distance(actual: Tensor, reference: Tensor) -> tuple[float, float, str | None]:
    """-> (max|actual - reference|, max|reference|) over finite values, and what is wrong with the others."""
    actual = actual.double()
    finite = reference.isfinite()
    problem = None
    if not torch.equal(actual[~finite].nan_to_num(nan=0.5), reference[~finite].nan_to_num(nan=0.5)):
        problem = "NaN or infinity expected elsewhere"
    elif not actual[finite].isfinite().all():
        problem = f"{int((~actual[finite].isfinite()).sum())} values are NaN or infinite"
    if not finite.any():
        return 0.0, 0.0, problem
    return (
        float((actual - reference)[finite].abs().nan_to_num(nan=torch.inf).max()),
        float(reference[finite].abs().max()),
        problem,
    )


def compare(name: str, actual: Tensor, reference: Tensor, yardstick: Tensor) -> Error:
    """The error, and its budget: twice the yardstick's, 4 ulp of the compute dtype, one rounding of the output."""
    for what in ("shape", "dtype", "device"):
        came, wanted = getattr(actual, what), getattr(yardstick, what)
        if came != wanted:
            return Error(name, torch.inf, 0.0, f"its {what} is {came}, not {wanted}")
    error, largest, problem = _distance(actual, reference)
    plain, _, _ = _distance(yardstick, reference)
    compute = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    output = torch.finfo(actual.dtype)
    # Below the normal range a rounding has a fixed size; smallest_normal * eps is the smallest subnormal.
    ulp = compute.eps * max(largest, compute.smallest_normal)
    rounding = output.eps * max(largest, output.smallest_normal) / 2
    if largest == 0.0:  # exact zeros are demanded
        return Error(name, 0.0 if error == 0.0 else torch.inf, 0.0, problem)
    return Error(name, error / largest, (2 * plain + 4 * ulp + rounding) / largest, problem)


def check(
    op: Description,
    case: Case,
    dtype: torch.dtype,
    target: Target,
    through: tuple[str, ...] | None = None,
    **options: Any,
) -> list[Error]:
    """Runs a case on a target and compares every output and gradient with the float64 reference.

    Memory is poisoned: what is allocated starts as NaN, and the cpu kernels' scratch holds what a call on NaN left
    in it. `through` names the outputs that get a cotangent (None: all); `options` are further arguments of the
    function, such as deterministic=True.
    """
    reference, yardstick = expected(op, case, dtype, target.device, through)
    sample = case.make(dtype, target.device).replace(**options)
    given = cotangents({name: yardstick[name] for name in (op.outputs if through is None else through)})
    with target.active(), poisoned_memory():
        if target.backend == "cpu":
            run(op, sample.map(lambda x: torch.full_like(x, torch.nan)), target.backend)
        actual = run(op, sample, target.backend, grad=given)
    return [compare(name, actual[name], reference[name], yardstick[name]) for name in reference]
