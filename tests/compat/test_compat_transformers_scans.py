"""pykernels.compat.transformers in models with scans and convolutions: they compute what they compute without us.

The reference is the unpatched model in float64, through and through; the yardstick the unpatched model in the same
dtype: outputs may be off by twice its error and four units in the last place, and so may the worst of a model's many
gradients by its worst. Errors are relative and in the root mean square: between two models that round differently, the
largest of many elements says little.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys

import pytest
import torch
from test_compat_transformers import (
    DECODER,
    LENGTHS,
    VOCABULARY,
    WIDE_DECODER,
    check_exports,
    reference_attention,
    reference_mask,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers.integrations import hub_kernels  # noqa: E402

from pykernels.compat import causal_conv1d, mamba_ssm  # noqa: E402
from pykernels.compat import transformers as compat  # noqa: E402

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MAMBA = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4,
         "initializer_range": 0.3}
HYBRID = {**DECODER, "hidden_size": 64}
OF_MAMBA_2 = {"mamba_n_heads": 16, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}
MODELS = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)),
    "falcon_mamba": lambda: transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**MAMBA)),
    "jamba": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(**HYBRID, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4,
                                 expert_layer_offset=3, num_experts=2, mamba_d_state=8, mamba_dt_rank=4)
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**{**MAMBA, "time_step_rank": "auto"}, num_heads=16, head_dim=8, n_groups=2,
                                  chunk_size=4)
    ),
    "bamba": lambda: transformers.BambaForCausalLM(
        transformers.BambaConfig(**HYBRID, **OF_MAMBA_2, attn_layer_indices=[1])
    ),
}
# As wide as models that people run, of one layer of each kind.
WIDE_MAMBA = {**TOKENS, "num_hidden_layers": 1, "initializer_range": 0.05}
WIDE_MAMBA_2 = {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128}
WIDE_HYBRID = {**WIDE_DECODER, "num_hidden_layers": 2}
del WIDE_HYBRID["head_dim"]
WIDE = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**WIDE_MAMBA, hidden_size=768)),
    "falcon_mamba": lambda: transformers.FalconMambaForCausalLM(
        transformers.FalconMambaConfig(**WIDE_MAMBA, hidden_size=768)
    ),
    "jamba": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(**WIDE_HYBRID, attn_layer_period=2, attn_layer_offset=1, num_experts=1)
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**WIDE_MAMBA, hidden_size=768, num_heads=24, n_groups=1)
    ),
    "bamba": lambda: transformers.BambaForCausalLM(
        transformers.BambaConfig(**WIDE_HYBRID, **WIDE_MAMBA_2, attn_layer_indices=[1])
    ),
}
DTYPES = (torch.float32, torch.bfloat16)


class Exact(TorchFunctionMode):
    """Models compute some things in float32, whatever their dtype; here it is float64."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def _definition():
    transformers.AttentionInterface.register("definition", reference_attention)
    transformers.AttentionMaskInterface.register("definition", reference_mask)
    yield
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        del interface._global_mapping["definition"]


@pytest.fixture(autouse=True)
def _nothing_stays():
    before = hub_kernels.use_kernel_forward_from_hub
    yield
    assert not compat._routed and not compat._scanning and hub_kernels.use_kernel_forward_from_hub is before


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32, source: torch.dtype | None = None):
    """A randomly initialised model, "mamba" or "mamba wide"; `source` is the dtype its weights are rounded to before
    they become `dtype`."""
    torch.manual_seed(0)
    kind, _, width = name.partition(" ")
    made = (WIDE if width else MODELS)[kind]()
    with torch.no_grad():
        for key, x in made.named_parameters():
            if key.endswith(("dt_bias", "dt_proj.bias")):  # steps of about 1: states are felt, and forgotten
                x.copy_(torch.randn_like(x))
    return made.to(source or dtype).to(dtype).eval()


def inputs(padding: str | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    if padding is None:
        return {"input_ids": ids}
    place, lengths = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    mask = (place < lengths if padding == "right" else place >= max(LENGTHS) - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def attend(made, attention: str):
    if hasattr(made.config, "num_attention_heads") and made.config.model_type in ("jamba", "bamba"):
        made.set_attn_implementation(attention)
    return made


def result(made, arguments: dict[str, Tensor], train: bool) -> dict[str, Tensor]:
    """Logits of the tokens that are no padding and each parameter's gradient, in float64."""
    made.zero_grad(set_to_none=True)
    made.train(train)
    out = made(**arguments, use_cache=not train).logits
    made.eval()
    if "attention_mask" in arguments:
        out = out[arguments["attention_mask"].bool()]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    return {"out": out.detach().double(),
            **{key: x.grad.double() for key, x in made.named_parameters() if x.grad is not None}}


@functools.cache
def unpatched(name: str, dtype: torch.dtype, padding: str | None, train: bool):
    """-> reference, yardstick"""
    arguments, exact = inputs(padding), attend(model(name, torch.float64, dtype), "definition")
    with Exact():
        reference = result(exact, arguments, train)
    return reference, result(attend(model(name, dtype), "eager"), arguments, train)


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], yardstick: dict[str, Tensor], dtype: torch.dtype):
    assert actual.keys() == expected.keys() and len(actual) > 10
    errors, allowed = (
        {key: float((x[key] - y).norm() / y.norm()) for key, y in expected.items()} for x in (actual, yardstick)
    )
    eps = torch.finfo(dtype).eps
    assert max(allowed.values()) < (1e-4 if dtype == torch.float32 else 0.25)  # else it would bound nothing
    assert errors["out"] <= 2 * allowed["out"] + 4 * eps
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2 * max(allowed.values()) + 4 * eps, (worst, errors[worst])
    assert expected["out"].abs().max() > 0.1


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("padding", (None, "left", "right"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, dtype, padding, train):
    expected, yardstick = unpatched(name, dtype, padding, train)
    with compat.enable():
        actual = result(attend(model(name, dtype), "pykernels"), inputs(padding), train)
    check(actual, expected, yardstick, dtype)


@pytest.mark.parametrize("name", WIDE)
def test_a_realistic_width(name):
    mask = torch.ones(2, 43, dtype=torch.long)
    mask[1, :9] = 0
    arguments = {"input_ids": torch.randint(2, VOCABULARY, (2, 43)) * mask, "attention_mask": mask}
    name = f"{name} wide"
    try:
        exact = attend(model(name, torch.float64, torch.float32), "definition")
        with Exact():
            expected = result(exact, arguments, False)
        yardstick = result(attend(model(name), "eager"), arguments, False)
        with compat.enable():
            actual = result(attend(model(name), "pykernels"), arguments, False)
    finally:
        model.cache_clear()
    check(actual, expected, yardstick, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generation(name, dtype):
    """From rows padded on the left. In bfloat16 logits may tie, and then the rows part."""

    def generated(attention: str):
        return attend(model(name, dtype), attention).generate(
            **inputs("left"), max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_logits=True)

    theirs = generated("eager")
    with compat.enable():
        ours = generated("pykernels")
    logits, new = torch.stack(theirs.logits, 1).double(), theirs.sequences[:, 9:]
    assert new.shape == (3, 9) and len(set(new.flatten().tolist())) > 3
    for row, (a, b) in enumerate(zip(new.tolist(), ours.sequences[:, 9:].tolist())):
        part = next((t for t in range(9) if a[t] != b[t]), None)
        if part is not None:
            gap = logits[row, part, a[part]] - logits[row, part, b[part]]
            assert dtype == torch.bfloat16 and gap <= 4 * torch.finfo(dtype).eps * logits[row, part].abs().max()


@pytest.mark.parametrize("name", ("mamba", "mamba2", "bamba"))
def test_autocast_beams_and_checkpointing(name):
    arguments, results = inputs("left"), []
    for context in (contextlib.nullcontext, compat.enable):
        with context():
            made = copy.deepcopy(attend(model(name), "eager"))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                low = made(**arguments).logits[arguments["attention_mask"].bool()].double()
            beams = made.generate(**arguments, max_new_tokens=4, num_beams=2, do_sample=False)
            made.gradient_checkpointing_enable()
            results.append((low, beams, result(made, arguments, train=True)))
    (low, beams, gradients), (our_low, our_beams, our_gradients) = results
    exact = unpatched(name, torch.float32, "left", False)[0]["out"]
    assert 0 < (our_low - exact).abs().max() <= 2 * (low - exact).abs().max()
    assert torch.equal(our_beams, beams)
    for key, x in gradients.items():
        torch.testing.assert_close(our_gradients[key], x, rtol=1e-3, atol=1e-5 * float(x.abs().max() + 1), msg=key)


OTHERS = {
    "zamba2": lambda: transformers.Zamba2ForCausalLM(
        transformers.Zamba2Config(
            **TOKENS, hidden_size=32, num_hidden_layers=3,
            layers_block_type=["linear_attention", "hybrid", "linear_attention"], mamba_d_state=8, n_mamba_heads=8,
            mamba_ngroups=2, num_attention_heads=4, num_mem_blocks=1, chunk_size=4, intermediate_size=48,
        )
    ),
    "falcon_h1": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(**HYBRID, **OF_MAMBA_2, mamba_d_ssm=128)
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(**HYBRID, **OF_MAMBA_2, layer_types=["mamba", "attention"],
                                            num_local_experts=0, shared_intermediate_size=48)
    ),
    "lfm2": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**{**DECODER, "head_dim": 8}, layer_types=["conv", "full_attention"])
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    torch.manual_seed(0)
    made = OTHERS[name]()
    made.set_attn_implementation("eager")
    arguments, generated = inputs("left"), []
    expected = result(made, arguments, train=False)
    generated.append(made.generate(**arguments, max_new_tokens=5, do_sample=False))
    with compat.enable():
        assert compat._routed
        actual = result(made, arguments, train=False)
        generated.append(made.generate(**arguments, max_new_tokens=5, do_sample=False))
    assert torch.equal(*generated)
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, rtol=1e-3, atol=1e-5 * max(1, float(x.abs().max())), msg=key)


# ---- Who is served ---------------------------------------------------------------------------------------------------


def held(name: str) -> dict[str, tuple]:
    """What the wrappers in a model's module hold."""
    module = sys.modules[f"transformers.models.{name}.modeling_{name}"]
    functions = [x for x in vars(module).values() if getattr(x, "__code__", None) is compat._WRAPPER]
    variables = [dict(zip(x.__code__.co_freevars, (cell.cell_contents for cell in x.__closure__))) for x in functions]
    return {x["func_name"]: tuple(x[key] for key in compat._ROUTE) for x in variables}


@pytest.mark.parametrize("name", MODELS)
def test_every_function_is_routed_and_comes_back(name):
    model(name)
    before = held(name)
    with compat.enable():
        now = held(name)
        assert now.keys() == before.keys() and len(now) >= 4
        for function, (implementation, parameters, is_new, exported) in now.items():
            assert exported.__wrapped__ is implementation
            assert is_new and implementation is not before[function][0]
            if function not in ("mamba_inner_fn", "mamba_split_conv1d_scan_combined"):
                ours = getattr(causal_conv1d, function, None) or getattr(mamba_ssm, function)
                assert getattr(implementation, "__wrapped__", implementation) is ours
                assert parameters[0] in ("x", "u", "state") and "kwargs" not in parameters
        compat.enable()
        assert held(name).keys() == now.keys()
    assert held(name) == before


def test_models_imported_later():
    name = "transformers.models.zamba.modeling_zamba"
    assert name not in sys.modules
    with compat.enable():
        importlib.import_module(name)
        assert all(is_new for _, _, is_new, _ in held("zamba").values())
    assert not any(is_new for _, _, is_new, _ in held("zamba").values())


def test_functions_that_are_made_modules(monkeypatch):
    """As by the package `kernels`, where that is installed, to exchange their forward functions later."""

    def made_module(layer_name: str):
        def decorator(function):
            class Function(torch.nn.Module):
                kernel_layer_name = layer_name

                def forward(self, *args, **kwargs):
                    return function(*args, **kwargs)

            return Function()

        return decorator

    def slow(x, weight, bias=None, activation=None, **kwargs):
        raise AssertionError("the model's own function")

    monkeypatch.setattr(hub_kernels, "use_kernel_forward_from_hub", made_module)
    x, weight = torch.randn(2, 3, 7), torch.randn(3, 4)
    factory = hub_kernels.use_kernel_func_from_hub_with_fallback
    before = factory("causal_conv1d_fn", "causal_conv1d")(slow)
    with compat.enable():
        after = factory("causal_conv1d_fn", "causal_conv1d")(slow)
        for function in (before, after):
            assert isinstance(function, torch.nn.Module) and function.kernel_layer_name == "causal_conv1d_fn"
            out = function(x, weight, activation="silu", an_option_of_the_slow_one=True)
            assert torch.equal(out, causal_conv1d.causal_conv1d_fn(x, weight, activation="silu"))
    for function in (before, after):
        with pytest.raises(AssertionError, match="the model's own function"):
            function(x, weight)


@pytest.mark.parametrize("name", ("mamba2", "bamba"))
def test_packed_sequences(name):
    """Unpatched models refuse them without mamba_ssm. (What Mamba-2's head is given does not reach its layers.)"""
    made, ids = attend(model(name), "eager"), inputs()["input_ids"][:1]
    body = made.backbone if name == "mamba2" else made.model
    packed = {"seq_idx": torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32), "use_cache": False}
    if name == "bamba":
        packed["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad(), pytest.raises(ValueError, match="can't keep packed sequences apart"):
        body(ids, **packed)
    with compat.enable(), torch.no_grad():
        attend(made, "pykernels")
        out = body(ids, **packed).last_hidden_state
        parts = [body(ids[:, a:b], use_cache=False).last_hidden_state for a, b in ((0, 4), (4, 9))]
        torch.testing.assert_close(out, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served():
    with compat.enable():
        attend(model("jamba"), "pykernels")
        convolution = sys.modules["transformers.models.jamba.modeling_jamba"].causal_conv1d_fn
        with pytest.raises(ValueError, match="seq_idx must be None, got a tensor: the scan of modeling_jamba takes"):
            convolution(torch.randn(1, 4, 3), torch.randn(4, 4), seq_idx=torch.zeros(1, 3, dtype=torch.int32))
        made = transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA, hidden_act="gelu"))
        with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
            made(**inputs())
    assert made(**inputs()).logits.isfinite().all()


def test_an_unknown_way_of_finding_kernels(monkeypatch):
    monkeypatch.setattr(compat, "_WRAPPER", None)
    with pytest.raises(RuntimeError, match="calls the functions of mamba_ssm and causal_conv1d in a way"):
        compat.enable()


def test_compiled_models_follow():
    """A compiled model notices `enable` and `disable`."""
    made, arguments = attend(model("mamba2"), "eager"), inputs()
    compiled, calls = torch.compile(made, backend="aot_eager"), []
    with torch.no_grad():
        expected = made(**arguments, use_cache=False).logits
        for context in (contextlib.nullcontext, compat.enable, contextlib.nullcontext):
            with context():
                calls.append(compiled(**arguments, use_cache=False).logits)
                assert torch.equal(calls[-1], made(**arguments, use_cache=False).logits)
    for out in calls:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("mamba", "mamba2"))
def test_compiles_whole_for_every_length(name):
    """Forward and backward, in one graph."""
    made = copy.deepcopy(attend(model(name), "eager"))
    del made.backbone.layers[1:]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compat.enable():
        compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (9, 6):
            ids, results = torch.randint(2, VOCABULARY, (2, tokens)), []
            for f in (made, compiled):
                logits = f(ids, use_cache=False).logits
                results.append((logits, *torch.autograd.grad(logits.square().sum(), list(made.parameters()))))
            for x, y in zip(*results):
                torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exports_and_reloads_in_a_fresh_process(tmp_path):
    """Where an original is installed, Transformers exports its own slow functions in its stead; not so ours."""
    ops = {"mamba": "causal_conv1d selective_scan", "bamba": "causal_conv1d linear_attention flash_attention"}
    with compat.enable():
        check_exports(tmp_path, {name: attend(model(name), "pykernels") for name in ops}, ops)
