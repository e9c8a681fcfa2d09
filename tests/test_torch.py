"""Every op inside the rest of PyTorch: opcheck, compile, export, autocast, inference mode, checkpointing."""

from __future__ import annotations

import io

import pytest
import torch

import pykernels
from pykernels.testing import FLASH_ATTENTION, OPS, dtypes, run, serves, targets
from pykernels.testing.flash_attention import attention_case, decode_case

COMPILED = [
    (op, target) for op in OPS for target in targets(op.op, every_isa=False) if target.backend != "reference"
]
on_compiled = pytest.mark.parametrize(
    "op, target", [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in COMPILED]
)
TARGETS = list(dict.fromkeys(target for _, target in COMPILED))
on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)


DIFFERENTIABLE = [
    (op, target) for op, target in COMPILED if op.good.make(torch.float32, target.device).differentiable
]
on_differentiable = pytest.mark.parametrize(
    "op, target", [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in DIFFERENTIABLE]
)


def _registered() -> set[str]:
    return {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pykernels::")
    }


def test_every_registered_op_belongs_to_a_description():
    """So that opcheck below forgets none."""
    described = {
        name.format(backend=backend) for op in OPS for name in op.torch_ops for backend in op.op.backends
    }
    # Apart from the probe of `python -m pykernels info`, what tests define for kernels run on the host, and those
    # whose opcheck is in tests/ops/test_fft_conv_decode.py and test_fft_conv_spectrum.py.
    others = {name for name in _registered() - described if not name.endswith("_cuda_host")}
    assert others <= {"cuda_probe", "fft_conv_spectrum_cpu", "fft_conv_fwd_spectrum_cpu", "fft_conv_step_cpu"}
    assert {f"{name}_fwd_cpu" for name in ("flash_attention",)} <= _registered()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name():
    x = torch.randn(2, 8, 2, 16)
    for layout, message in ((torch.strided, "got a nested one"), (torch.jagged, "got layout torch.jagged")):
        with pytest.raises(TypeError, match=f"k must be a strided tensor, {message}"):
            pykernels.flash_attention(x, torch.nested.nested_tensor(list(x), layout=layout), x)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_on_meta_a_call_gives_shapes_dtypes_and_strides(op):
    """Gradients too: what plans and counts of models that have no memory ask for."""
    for dtype in (torch.float32, torch.bfloat16):
        sample = op.good.make(dtype, "cpu")
        results = []
        for device in ("cpu", "meta"):
            tensors = {name: x.detach().to(device) for name, x in sample.tensors().items()}
            args = sample.args | tensors
            leaves = [args[name].requires_grad_() for name in sample.differentiable]
            values = op.function(**args, **op.returns)
            values = values if isinstance(values, tuple) else (values,)
            gradients = torch.autograd.grad(sum(x.sum() for x in values), leaves, allow_unused=True) if leaves else ()
            results.append([*values, *gradients])
        for x, y in zip(*results, strict=True):
            assert y.is_meta and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@on_compiled
def test_opcheck(op, target):
    names = ("layout", "packed-causal-gqa", "no-append", "everything", "paged-odd")
    layouts = [case for case in op.cases if case.name.startswith(names)]
    assert len(layouts) >= 2
    checked = set()
    for case in [*layouts, op.good]:
        served = [dtype for dtype in (torch.float32, torch.bfloat16) if serves(op, case, target, dtype)]
        # What it looks at depends on the layout and on the dtype, not on their combination.
        for dtype in served if case is op.good else served[:1]:
            for name, args in op.calls(case.make(dtype, target.device), target.backend):
                torch.library.opcheck(getattr(torch.ops.pykernels, name).default, args)
                checked.add(name)
    assert checked == {name.format(backend=target.backend) for name in op.torch_ops}


@on_compiled
def test_fakes_know_shapes_dtypes_and_strides(op, target):
    """Under fake tensors every case gives what it gives for real."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in op.cases[::3]:
        for dtype in dtypes(op.op, target):
            if not serves(op, case, target, dtype):
                continue
            for name, args in op.calls(case.make(dtype, target.device), target.backend):
                torch_op = getattr(torch.ops.pykernels, name)
                real = torch_op(*args)
                with FakeTensorMode() as mode:
                    fake = torch_op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
                real, fake = ((x,) if isinstance(x, torch.Tensor) else x or () for x in (real, fake))
                for x, y in zip(real, fake, strict=True):
                    assert (x.shape, x.dtype, x.stride(), x.device) == (
                        y.shape,
                        y.dtype,
                        y.stride(),
                        y.device,
                    ), (name, case)


def _training_step(backend, **options):
    def step(q, k, v):
        out, lse = pykernels.flash_attention(q * 2, k, v, return_lse=True, backend=backend, **options)
        return out.sin().sum() + lse.sum()

    return step


@on_targets
def test_compile_with_dynamic_shapes_forward_and_backward(target):
    """One graph, compiled once, serves every length."""
    step = _training_step(target.backend, causal=True, window=(20, None))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens in (33, 70, 129):
        leaves = [
            x.requires_grad_()
            for x in attention_case(
                f"compile-{tokens}", batch=2, tq=tokens, tk=tokens + 5, heads_q=4, heads_k=2, head_dim=32
            )
            .make(torch.float32, target.device)
            .args.values()
        ]
        eager, fast = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(fast, eager)
        for ours, theirs in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(eager, leaves)):
            torch.testing.assert_close(ours, theirs)
            assert theirs.abs().max() > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@on_targets
def test_compile_packed_and_default_backend(target):
    """cu_seqlens as an input of the graph, the backend chosen inside it."""

    def function(q, k, v, cu_seqlens):
        return pykernels.flash_attention(q, k, v, cu_seqlens_q=cu_seqlens, causal=True) + 1

    case = attention_case("compile-packed", tq=50, head_dim=16, lengths_q=(20, 0, 30))
    q, k, v, cu_seqlens = case.make(torch.float32, target.device).args.values()
    torch._dynamo.reset()
    with pykernels.use_backend(target.backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v, cu_seqlens), function(q, k, v, cu_seqlens))
        other = torch.tensor([0, 50, 50, 50], dtype=torch.int32, device=target.device)
        torch.testing.assert_close(compiled(q, k, v, other), function(q, k, v, other))


@on_targets
def test_one_graph_trains_every_length_packed_and_with_a_bias(target):
    """Two inputs that nothing may compare to numbers: offsets, twice in the op, and a bias of some of the axes."""

    def step(x, cu_seqlens, bias):
        q, k, v = (x * 2).unbind(2)
        packed = pykernels.flash_attention(q, k, v, cu_seqlens_q=cu_seqlens, causal=True, backend=target.backend)
        return packed.square().sum() + pykernels.flash_attention(q, k, v, bias=bias, backend=target.backend).sin().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (33, 50):
        x = torch.randn(1, tokens, 3, 4, 16, device=target.device, requires_grad=True)
        bias = torch.randn(4, 1, tokens, device=target.device, requires_grad=True)
        cu_seqlens = torch.tensor([0, 20, 20, tokens], dtype=torch.int32, device=target.device)
        eager, fast = (torch.autograd.grad(f(x, cu_seqlens, bias), (x, bias)) for f in (step, compiled))
        for ours, theirs in zip(fast, eager):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert theirs.abs().max() > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@on_targets
def test_one_tensor_for_several_arguments_compiles(target):
    """Forward and backward, whatever op: Dynamo takes no tensor twice in an autograd.Function."""

    def step(x, u):
        once, B, weight = {"backend": target.backend}, u[:, :3], u[0, :, :3]
        attended = pykernels.flash_attention(x, x, x, **once) + pykernels.linear_attention(x, x, x, **once)
        scanned = pykernels.selective_scan(u, u, -weight.abs(), B, B, z=u, **once)
        convolved = pykernels.fft_conv(u, weight, pre_gate=u, post_gate=u, **once)
        return sum(y.square().sum() for y in (attended, scanned, convolved, pykernels.causal_conv1d(u, weight, **once)))

    torch._dynamo.reset()
    x, u = (torch.randn(*shape, device=target.device, requires_grad=True) for shape in ((1, 9, 2, 16), (2, 6, 12)))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(x, u), (x, u)) for f in (compiled, step))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert theirs.abs().max() > 0


@on_targets
def test_compile_decode_writes_the_cache(target):
    case = decode_case("compile-decode", lengths=(3, 7), capacity=12, new_tokens=1, head_dim=16)

    def step(args):
        out = pykernels.flash_attention_decode(**args, backend=target.backend)
        return out + args["k_cache"].nan_to_num().sum()

    torch._dynamo.reset()
    eager_args, fast_args = (dict(case.make(torch.float32, target.device).args) for _ in range(2))
    eager, fast = step(eager_args), torch.compile(step, fullgraph=True, backend="inductor")(fast_args)
    torch.testing.assert_close(fast, eager)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(fast_args[name], eager_args[name], rtol=0, atol=0, equal_nan=True)
    assert fast_args["k_cache"][0, 3].isfinite().all()


@on_targets
def test_bad_input_is_rejected_while_compiling(target):
    q, k, v = torch.randn(3, 1, 4, 2, 8, device=target.device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: pykernels.flash_attention(q, k, v, backend=target.backend),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match=r"k must have shape .*K=8.*7\]"):
        compiled(q, k[..., :7], v)


@on_targets
def test_export_and_reload(target):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return pykernels.flash_attention(
                q, k, v, causal=True, softcap=3.0, return_lse=True, backend=target.backend
            )

    def inputs(tokens):
        return tuple(
            attention_case(f"export-{tokens}", batch=2, tq=tokens, heads_q=4, heads_k=2, head_dim=24)
            .make(torch.float32, target.device)
            .args.values()
        )

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Attention(), inputs(40), dynamic_shapes=[{1: tokens}] * 3)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert f"pykernels.flash_attention_fwd_{target.backend}.default" in called
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for length in (40, 77):
        wanted = Attention()(*inputs(length))
        torch.testing.assert_close(reloaded(*inputs(length)), wanted, rtol=0, atol=0)
        assert wanted[0].abs().max() > 0


@on_targets
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_computes_in_the_autocast_dtype(target, dtype):
    sample = attention_case("autocast", tq=50, head_dim=32).make(torch.float32, target.device)
    leaves = [x.clone().requires_grad_() for x in sample.args.values()]
    with torch.autocast(target.device, dtype=dtype):
        out, lse = pykernels.flash_attention(*leaves, return_lse=True, backend=target.backend)
        assert (
            pykernels.flash_attention(*(x.double() for x in leaves), backend="reference").dtype == torch.float64
        )
    assert out.dtype == dtype and lse.dtype == torch.float32
    narrow = [x.to(dtype).requires_grad_() for x in sample.args.values()]
    wanted, wanted_lse = pykernels.flash_attention(*narrow, return_lse=True, backend=target.backend)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    for ours, theirs in zip(
        torch.autograd.grad(out.float().square().sum(), leaves),
        torch.autograd.grad(wanted.float().square().sum(), narrow),
    ):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float()) and ours.abs().max() > 0


@on_targets
def test_autocast_of_mixed_inputs(target):
    """As projections under autocast give them: some tensors narrow, some still wide."""
    q, k, v = (
        attention_case("autocast-mixed", tq=20, head_dim=16).make(torch.float32, target.device).args.values()
    )
    with pytest.raises(TypeError, match="k must have q's dtype"):
        pykernels.flash_attention(q.bfloat16(), k, v, backend=target.backend)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        mixed = pykernels.flash_attention(q.bfloat16(), k, v.bfloat16(), backend=target.backend)
    assert torch.equal(
        mixed, pykernels.flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=target.backend)
    )


@on_compiled
def test_inference_mode(op, target):
    case = op.good
    wanted = run(op, case.make(torch.float32, target.device), target.backend, grad=False)
    with torch.inference_mode():
        args = {**case.make(torch.float32, target.device).args, **op.returns}
        values = op.function(**args, backend=target.backend)
        values = values if isinstance(values, tuple) else (values,)
        assert all(x.is_inference() for x in values)
        for name, x in zip(op.outputs, values):
            assert torch.equal(x, wanted[name]) and x.abs().max() > 0
        for name in op.mutates:
            assert torch.equal(args[name].nan_to_num(), wanted[name].nan_to_num())


@on_targets
def test_activation_checkpointing(target):
    from torch.utils.checkpoint import checkpoint

    step = _training_step(target.backend, causal=True)
    sample = FLASH_ATTENTION.good.make(torch.float32, target.device)
    leaves = [x.requires_grad_() for x in sample.args.values()]
    plain = torch.autograd.grad(step(*leaves), leaves)
    for reentrant in (False, True):
        loss = checkpoint(step, *leaves, use_reentrant=reentrant)
        if reentrant:  # does not support torch.autograd.grad
            loss.backward()
            again = [x.grad for x in leaves]
        else:
            again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(x, y) for x, y in zip(again, plain))
    assert all(x.abs().max() > 0 for x in plain)


@on_targets
def test_saved_tensors_are_inputs_and_outputs_only(target):
    """What backward keeps alive is linear in the length: q, k, v, out, lse."""
    sizes = []
    leaves = [
        x.requires_grad_()
        for x in attention_case("saved", tq=64, head_dim=8).make(torch.float32, target.device).args.values()
    ]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        pykernels.flash_attention(*leaves, backend=target.backend)
    assert sorted(sizes) == sorted([64 * 2 * 8] * 4 + [64 * 2])


@on_targets
def test_deepcopy_pickle_and_hooks_see_plain_tensors(target):
    q, k, v = (
        x.requires_grad_() for x in FLASH_ATTENTION.good.make(torch.float32, target.device).args.values()
    )
    seen = []
    out = pykernels.flash_attention(q, k, v, backend=target.backend)
    out.register_hook(lambda gradient: seen.append(gradient) or gradient * 2)
    out.sum().backward()
    doubled, q.grad = q.grad, None
    pykernels.flash_attention(q, k, v, backend=target.backend).sum().backward()
    assert len(seen) == 1 and torch.allclose(doubled, 2 * q.grad) and q.grad.abs().max() > 0


# ---- Every differentiable op ----------------------------------------------------------------------------------------


def _function(op, target):
    """-> (a scalar function of the leaves, the leaves) for the op's good sample, all outputs returned and used."""
    sample = op.good.make(torch.float32, target.device)

    def loss(*leaves):
        args = {**sample.args, **op.returns, **dict(zip(sample.differentiable, leaves))}
        values = op.function(**args, backend=target.backend)
        return sum(x.sin().sum() for x in (values if isinstance(values, tuple) else (values,)))

    return loss, [sample.args[name].detach().clone().requires_grad_() for name in sample.differentiable]


@on_differentiable
def test_forward_mode_raises_rather_than_giving_zero_tangents(op, target):
    loss, leaves = _function(op, target)
    leaves = [x.detach() for x in leaves]
    for i, leaf in enumerate(leaves):
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(lambda x: loss(*leaves[:i], x, *leaves[i + 1:]), (leaf,), (torch.ones_like(leaf),))


@on_differentiable
def test_func_grad_and_checkpoint_give_autograds_gradients(op, target):
    from torch.utils.checkpoint import checkpoint

    loss, leaves = _function(op, target)
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    assert all(x.abs().max() > 0 for x in wanted)
    everything = tuple(range(len(leaves)))
    functional = torch.func.grad(loss, argnums=everything)(*(x.detach() for x in leaves))
    again = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for ours in (functional, again):
        assert all(torch.equal(x, y) for x, y in zip(ours, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the kernels in a loop
@on_differentiable
def test_vmap_gives_each_samples_gradients(op, target):
    """Of gradients taken inside of it, and of those that autograd takes through it."""
    loss, leaves = _function(op, target)
    stacked = [torch.stack([x.detach(), 0.5 * x.detach()]).requires_grad_() for x in leaves]
    samples = [torch.autograd.grad(loss(*(x[i] for x in stacked)), stacked) for i in range(2)]
    wanted = [x + y for x, y in zip(*samples)]
    inside = torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(len(leaves)))))(*(x.detach() for x in stacked))
    through = torch.autograd.grad(torch.func.vmap(loss)(*stacked).sum(), stacked)
    names = op.good.make(torch.float32, target.device).differentiable
    for name, *found, gradient in zip(names, inside, through, wanted):
        assert gradient.abs().amax(tuple(range(1, gradient.dim()))).min() > 0, name
        for x in found:
            torch.testing.assert_close(x, gradient, rtol=1e-5, atol=1e-5)


@on_compiled
def test_fake_tensors_go_through_the_public_function(op, target):
    """Offsets, lengths and decays are values, which nothing looks at there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in (op.good, *op.cases[::5]):
        if not serves(op, case, target, torch.float32):
            continue
        real, fake = (case.make(torch.float32, target.device).args for _ in range(2))
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in fake.items()}
            fake = op.function(**fake, **op.returns, backend=target.backend)
        real = op.function(**real, **op.returns, backend=target.backend)
        for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), case


@on_differentiable
def test_every_op_exports_and_reloads(op, target):
    loss, leaves = _function(op, target)
    leaves = tuple(x.detach() for x in leaves)

    class Module(torch.nn.Module):
        def forward(self, *leaves):
            return loss(*leaves)

    program = torch.export.export(Module(), leaves)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.endswith(f"_fwd_{target.backend}.default") for name in called), called
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(*leaves), loss(*leaves))
