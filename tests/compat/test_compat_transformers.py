"""pykernels.compat.transformers: models compute what they compute without us, within the error budget of attention.

The reference is the model in float64, the yardstick the unpatched model in the same dtype: outputs may be off by twice
its error and four units in the last place, and so may the worst of a model's many gradients by its worst.
"""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.4")

from pykernels.compat import transformers as compat  # noqa: E402

functions = transformers.masking_utils

VOCABULARY = 64
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **SMALL,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, sliding_window=4)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**DECODER, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            **SMALL,
            vocab_size=VOCABULARY,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            initializer_range=0.3,
        )
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            **SMALL,
            image_size=8,
            patch_size=2,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            initializer_range=0.3,
        )
    ),
}
# As wide as models that people run, of one layer.
WIDE_LAYER = {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.05}
WIDE_ENCODER = {**WIDE_LAYER, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
WIDE_DECODER = {**WIDE_LAYER, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
                "num_key_value_heads": 4, "head_dim": 64}
WIDE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE_DECODER)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**WIDE_DECODER, sliding_window=32)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**{**WIDE_DECODER, "num_attention_heads": 4, "head_dim": 256}, sliding_window=32,
                                  attn_logit_softcapping=50.0, query_pre_attn_scalar=256)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**WIDE_DECODER, "head_dim": 128})),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**WIDE_ENCODER)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**WIDE_ENCODER, image_size=96)),
}
DECODERS = ("llama", "mistral", "gemma2", "qwen3")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (9, 4, 7)


def reference_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """By the definition. (In float64 Transformers' eager attention, makes NaN of padding.)"""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        hidden = ~attention_mask
        empty = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden, -torch.inf).masked_fill(empty, 0)
        return (scores.softmax(-1).masked_fill(empty, 0) @ value).transpose(1, 2), None
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def reference_mask(*args, **kwargs):
    return transformers.masking_utils.sdpa_mask(
        *args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


@pytest.fixture(autouse=True, scope="module")
def _enabled():
    transformers.AttentionInterface.register("definition", reference_attention)
    transformers.AttentionMaskInterface.register("definition", reference_mask)
    with compat.enable():
        yield
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        del interface._global_mapping["definition"]


@functools.cache
def model(
    name: str, dtype: torch.dtype = torch.float32, attention: str = "pykernels", source: torch.dtype | None = None
):
    """A randomly initialised model, "llama" or "llama wide"; `source` is the dtype its weights are rounded to before
    they become `dtype`."""
    torch.manual_seed(0)
    kind, _, width = name.partition(" ")
    made = (WIDE if width else MODELS)[kind]().to(source or dtype).to(dtype).eval()
    made.set_attn_implementation(attention)
    return made


def unpatched(name: str, dtype: torch.dtype):
    return model(name, dtype, "eager")


def inputs(name: str, padding: str | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    if padding is None:
        return {"input_ids": ids}
    place = torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (place < lengths if padding == "right" else place >= max(LENGTHS) - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def result(made, arguments: dict[str, Tensor], grad: bool = False, through=None, **more) -> dict[str, Tensor]:
    """Logits of the tokens that are no padding and, if asked for, each parameter's gradient, all in float64."""
    made.zero_grad(set_to_none=True)
    arguments = {key: x.to(made.dtype) if x.is_floating_point() else x for key, x in arguments.items()}
    out = (made if through is None else through)(**arguments, **more)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    if "attention_mask" in arguments:
        out = out[arguments["attention_mask"].bool()]
    results = {"out": out.detach().double()}
    if grad:
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (out * weights.to(out.dtype)).sum().backward()
        results |= {key: x.grad.double() for key, x in made.named_parameters() if x.grad is not None}
    return results


def check(name: str, dtype: torch.dtype, arguments: dict[str, Tensor], grad: bool = False, **more) -> None:
    expected = result(model(name, torch.float64, "definition", dtype), arguments, grad, **more)
    yardstick = result(unpatched(name, dtype), arguments, grad, **more)
    actual = result(model(name, dtype), arguments, grad, **more)
    assert actual.keys() == expected.keys() and len(actual) > (10 if grad else 0)
    # Softmax does not feel a bias of all keys: its gradient is 0, and what comes is the rounding of others.
    scale = {key: x.abs().max() for key, x in expected.items()}
    of_keys = {key for key in scale if key.endswith(("key.bias", "k_proj.bias"))}
    assert all((x < 1e-9 * max(scale.values())) == (key in of_keys) for key, x in scale.items())
    scale |= dict.fromkeys(of_keys, max(scale.values()))
    errors, allowed = (
        {key: float((x[key] - expected[key]).abs().max() / scale[key]) for key in expected} for x in (actual, yardstick)
    )
    assert max(allowed.values()) < 32 * torch.finfo(dtype).eps  # else it would bound nothing
    assert errors["out"] <= 2 * allowed["out"] + 4 * torch.finfo(dtype).eps
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2 * max(allowed.values()) + 4 * torch.finfo(dtype).eps, (worst, errors[worst])
    assert expected["out"].abs().max() > 0.1


CASES = [(name, padding) for name in MODELS for padding in (None, "left", "right") if not (name == "vit" and padding)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_logits_and_gradients(name, padding, dtype):
    check(name, dtype, inputs(name, padding), grad=True)


@pytest.mark.parametrize("name", WIDE)
def test_a_realistic_width(name):
    if name == "vit":
        arguments = {"pixel_values": torch.randn(2, 3, 96, 96)}
    else:
        mask = torch.ones(2, 43, dtype=torch.long)
        mask[1, :9] = 0
        arguments = {"input_ids": torch.randint(2, VOCABULARY, (2, 43)) * mask, "attention_mask": mask}
    try:
        check(f"{name} wide", torch.float32, arguments, grad=True)
    finally:
        model.cache_clear()


@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences(name):
    """Positions that start anew separate the sequences of a row."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0, 1], list(range(9))])
    arguments = {**inputs(name), "position_ids": positions}
    check(name, torch.float32, arguments, grad=True, use_cache=False)
    packed, plain = (result(model(name), x, use_cache=False)["out"] for x in (arguments, inputs(name)))
    assert float((packed - plain)[:2].abs().max()) > 0.1 and float((packed - plain)[2].abs().max()) < 1e-4


def test_packed_by_offsets():
    ids, cu_seqlens = inputs("llama")["input_ids"][:1], torch.tensor([0, 4, 9], dtype=torch.int32)
    whole = torch.cat([model("llama")(ids[:, a:b]).logits for a, b in ((0, 4), (4, 9))], 1)
    attention = model("llama").model.layers[0].self_attn
    hidden = torch.randn(1, 9, 32)
    angles = model("llama").model.rotary_emb(hidden, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    out, _ = attention(hidden, angles, attention_mask=None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
    parts = [
        attention(hidden[:, a:b], tuple(x[:, a:b] for x in angles), attention_mask=None)[0] for a, b in ((0, 4), (4, 9))
    ]
    torch.testing.assert_close(out, torch.cat(parts, 1))
    whole_row = model("llama")(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False)
    torch.testing.assert_close(whole_row.logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_by_offsets_beside_a_cache(name):
    """What Transformers' collator for packed training gives; with a cache the mask does not know of it."""
    ids, positions = inputs(name)["input_ids"][:1], torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]])
    offsets = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 6, 9], dtype=torch.int32))
    with torch.no_grad():
        out = model(name)(ids, position_ids=positions, use_cache=True, **offsets).logits
        parts = torch.cat([model(name)(ids[:, a:b]).logits for a, b in ((0, 6), (6, 9))], 1)
        torch.testing.assert_close(out, parts, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="cu_seq_lens_q must come with one row of tokens"):
            model(name)(ids.expand(2, -1), **offsets)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name, dtype, cache):
    """Past the window, from rows padded on the left. In bfloat16 logits may tie, and then the rows part."""
    theirs, ours = (
        made.generate(
            **inputs(name, "left"),
            max_new_tokens=9,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for made in (unpatched(name, dtype), model(name, dtype))
    )
    logits, new = torch.stack(theirs.logits, 1).double(), theirs.sequences[:, 9:]
    assert new.shape == (3, 9) and len(set(new.flatten().tolist())) > 3
    for row, (a, b) in enumerate(zip(new.tolist(), ours.sequences[:, 9:].tolist())):
        part = next((t for t in range(9) if a[t] != b[t]), None)
        if part is not None:
            gap = logits[row, part, a[part]] - logits[row, part, b[part]]
            assert dtype == torch.bfloat16 and gap <= 4 * torch.finfo(dtype).eps * logits[row, part].abs().max()


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_after_a_prompt_padded_on_the_right(name):
    """Padding stays in the cache, between a row's tokens."""
    arguments, results = inputs(name, "right"), []
    mask, ids = arguments["attention_mask"], torch.randint(2, VOCABULARY, (3, 3))
    with torch.no_grad():
        for made in (unpatched(name, torch.float32), model(name)):
            cache, logits = transformers.DynamicCache(config=made.config), []
            made(**arguments, past_key_values=cache)
            for t in range(3):
                seen = torch.cat((mask, mask.new_ones(3, t + 1)), 1)
                logits.append(
                    made(
                        ids[:, t : t + 1],
                        attention_mask=seen,
                        position_ids=seen.sum(1, keepdim=True) - 1,
                        past_key_values=cache,
                    ).logits
                )
            results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_prompt_in_chunks(name):
    """A cache that holds tokens, and several more at once."""
    made, arguments = model(name), inputs(name, "left")
    with torch.no_grad():
        cache, parts = transformers.DynamicCache(config=made.config), []
        for first, last in ((0, 5), (5, 8), (8, 9)):
            positions = (arguments["attention_mask"].cumsum(1) - 1).clamp(min=0)
            parts.append(
                made(
                    arguments["input_ids"][:, first:last],
                    attention_mask=arguments["attention_mask"][:, :last],
                    position_ids=positions[:, first:last],
                    past_key_values=cache,
                ).logits
            )
        whole = unpatched(name, torch.float32)(**arguments, position_ids=positions).logits
    kept = arguments["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[kept], whole[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_autocast(name):
    """Queries, keys and values come in different dtypes then."""
    made, arguments = model(name), inputs(name, "left")
    logits, lengths = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for made in (unpatched(name, torch.float32), model(name)):
            logits.append(made(**arguments).logits[arguments["attention_mask"].bool()].float())
            lengths.append(made.generate(**inputs(name), max_new_tokens=3, do_sample=False).shape)
    assert lengths[0] == lengths[1] and float((logits[1] - logits[0]).abs().max() / logits[0].abs().max()) < 5e-2


def test_one_token_under_autocast():
    mask, (q, k, v) = compat._make_mask(2, 1, 5, 4), (torch.randn(2, 2, n, 8) for n in (1, 5, 5))
    expected, _ = compat._attention(torch.nn.Identity(), q, k, v, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = compat._attention(torch.nn.Identity(), q, k, v.bfloat16(), mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=3e-2)


def test_beams():
    tokens = [
        made.generate(**inputs("llama", "left"), max_new_tokens=5, num_beams=2, do_sample=False)
        for made in (unpatched("llama", torch.float32), model("llama"))
    ]
    assert torch.equal(*tokens)


def test_activation_checkpointing():
    arguments = inputs("mistral", "left")
    expected = result(model("mistral"), arguments, grad=True)
    made = copy.deepcopy(model("mistral")).train()
    getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()
    for key, x in result(made, arguments, grad=True, use_cache=False).items():
        torch.testing.assert_close(x, expected[key], rtol=1e-5, atol=1e-6)


def test_func_grad_and_inference_mode():
    made, arguments = model("mistral"), inputs("mistral", "left")
    expected = result(made, arguments, grad=True, use_cache=False)

    def loss(parameters):
        out = torch.func.functional_call(made, parameters, kwargs={**arguments, "use_cache": False}).logits
        out = out[arguments["attention_mask"].bool()]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return (out * weights.to(out.dtype)).sum()

    found = torch.func.grad(loss)({key: x.detach() for key, x in made.named_parameters()})
    assert len(found) == len(expected) - 1
    for key, x in found.items():
        scale = max(1, float(expected[key].abs().max()))
        torch.testing.assert_close(x.double(), expected[key], rtol=1e-4, atol=1e-5 * scale, msg=key)
    with torch.inference_mode():
        out = made(**arguments).logits[arguments["attention_mask"].bool()]
    torch.testing.assert_close(out.double(), expected["out"], rtol=1e-5, atol=1e-6)


WIDTHS = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
OTHERS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**DECODER, sliding_window=4)),
    # Keys and values of different sizes.
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**DECODER, "num_key_value_heads": 4, "head_dim": 8},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            first_k_dense_replace=2,
        )
    ),
    # Windows that are not causal.
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SMALL,
            vocab_size=VOCABULARY,
            local_attention=4,
            global_attn_every_n_layers=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    # A learned bias of all scores, in all three kinds of attention.
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    ),
    # Attention to other tokens.
    "bart": lambda: transformers.BartModel(transformers.BartConfig(**WIDTHS)),
    "whisper": lambda: transformers.WhisperModel(
        transformers.WhisperConfig(**WIDTHS, num_mel_bins=8, max_source_positions=10)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    torch.manual_seed(0)
    made, arguments = OTHERS[name]().eval(), inputs("llama", None if name == "whisper" else "left")
    if name == "whisper":
        arguments = {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": arguments["input_ids"]}
    if name == "t5":
        if not made._can_set_attn_implementation():
            pytest.skip("in this version of Transformers the model has an attention of its own")
        arguments["decoder_input_ids"] = inputs("llama")["input_ids"]
    made.set_attn_implementation("eager")
    expected = result(made, arguments, grad=True)
    made.set_attn_implementation("pykernels")
    actual = result(made, arguments, grad=True)
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, rtol=1e-4, atol=1e-5 * max(1, float(x.abs().max())), msg=key)
    assert expected["out"].abs().max() > 0.1


@pytest.mark.parametrize("padding", (None, "left", "right"))
def test_sinks(padding):
    """GPT-OSS: a learned sink per head, alternating windows, experts."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**DECODER, sliding_window=4, num_local_experts=2, num_experts_per_tok=2)
    made, arguments = transformers.GptOssForCausalLM(config), inputs("llama", padding)
    for name, x in made.named_parameters():
        if name.endswith("sinks"):
            x.data.normal_()
    made.set_attn_implementation("eager")
    expected = result(made, arguments, grad=True)
    made.set_attn_implementation("pykernels")
    actual = result(made, arguments, grad=True)
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, rtol=1e-4, atol=1e-5 * max(1, float(x.abs().max())), msg=key)
    sinks = [x for key, x in expected.items() if key.endswith("sinks")]
    assert len(sinks) == config.num_hidden_layers and all(x.abs().max() > 0 for x in sinks)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_position_biases_while_generating(cache):
    torch.manual_seed(0)
    made, outs = OTHERS["t5"]().eval(), []
    if not made._can_set_attn_implementation():
        pytest.skip("in this version of Transformers the model has an attention of its own")
    for attention in ("eager", "pykernels"):
        made.set_attn_implementation(attention)
        outs.append(
            made.generate(
                **inputs("llama", "left"),
                min_new_tokens=7,
                max_new_tokens=7,
                do_sample=False,
                cache_implementation=cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    theirs, ours = (torch.stack(out.logits) for out in outs)
    assert float(theirs.diff(dim=0).abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def weights_of(mask, dropout: float, **options) -> tuple[Tensor, Tensor]:
    """Attention's weights with and without dropout, [B, H, Tq, Tk], as it applies them to values of one-hot rows."""
    q, k = torch.randn(2, 4, 9, 8, dtype=torch.float64), torch.randn(2, 2, 9, 8, dtype=torch.float64)
    v = torch.eye(9, dtype=torch.float64).expand(2, 2, -1, -1)
    return tuple(
        compat._attention(torch.nn.Identity(), q, k, v, mask, dropout=p, **options)[0].transpose(1, 2)
        for p in (0.0, dropout)
    )


@pytest.mark.parametrize("kind", ("causal", "padded", "packed", "elements"))
def test_dropout_in_training(kind):
    """A weight is kept, and larger, or gone."""
    mask = {
        "causal": lambda: compat._make_mask(2, 9, 9),
        "padded": lambda: compat._make_mask(2, 9, 9, attention_mask=torch.arange(9) >= torch.tensor([[3], [0]])),
        "packed": lambda: compat._make_mask(
            2, 9, 9, mask_function=functions.and_masks(
                functions.causal_mask_function,
                functions.packed_sequence_mask_function(torch.tensor([[0] * 4 + [1] * 5, [0] * 9])),
            ),
        ),
        "elements": lambda: torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(),
    }[kind]()
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64) if kind == "elements" else None
    whole, dropped = weights_of(mask, 0.25, position_bias=bias)
    seen, kept = whole > 0, dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert not dropped[~seen].any() and 0.6 < float(kept[seen].double().mean()) < 0.9


def test_models_drop_in_training_alone():
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, attention_dropout=0.5))
    made.set_attn_implementation("pykernels")
    arguments = inputs("llama", "left")
    outs = []
    for training in (False, False, True, True):
        made.train(training)
        torch.manual_seed(3)
        outs.append(result(made, arguments, grad=True))
    for key in outs[0]:
        assert torch.equal(outs[0][key], outs[1][key]) and torch.equal(outs[2][key], outs[3][key])
    assert float((outs[0]["out"] - outs[2]["out"]).abs().max()) > 0.1


# ---- Who uses it -----------------------------------------------------------------------------------------------------


def registered() -> tuple[dict, dict]:
    return tuple(
        dict(x._global_mapping) for x in (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    )


def test_enable_and_disable(_enabled):
    now = registered()
    compat.disable()
    before = registered()
    assert "pykernels" not in before[0] and "pykernels" not in before[1]
    with pytest.raises(KeyError, match="pykernels"):
        model("llama")(**inputs("llama"))
    with pytest.raises(ValueError, match="pykernels"):
        MODELS["llama"]().set_attn_implementation("pykernels")
    compat.disable()
    assert registered() == before
    compat.enable()
    compat.enable()
    assert registered() == now
    compat.disable()
    assert registered() == before
    compat.enable()


def test_in_place_of_another(monkeypatch):
    """Models that exist and use sdpa use ours; sdpa itself is still there, and comes back."""
    compat.disable()
    before = registered()
    made, arguments = MODELS["llama"]().eval(), inputs("llama", "left")
    assert made.config._attn_implementation == "sdpa"
    expected = result(made, arguments)["out"]
    calls, original = [], compat.flash_attention
    monkeypatch.setattr(
        compat, "flash_attention", lambda *args, **options: calls.append(1) or original(*args, **options)
    )
    with compat.enable(replace=["sdpa"]):
        torch.testing.assert_close(result(made, arguments)["out"], expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 2
        made.set_attn_implementation("sdpa_original")
        assert torch.equal(result(made, arguments)["out"], expected) and len(calls) == 2
        made.set_attn_implementation("sdpa")
    assert registered() == before
    assert torch.equal(result(made, arguments)["out"], expected) and len(calls) == 2
    compat.enable()


@pytest.mark.parametrize(
    ("replace", "error", "words"),
    (
        ("sdpa", TypeError, "replace must be a list of names, got 'sdpa'"),
        (["eager "], ValueError, "replace must hold names out of .*sdpa.*, got 'eager '"),
        (["pykernels"], ValueError, "got 'pykernels'"),
    ),
)
def test_enable_raises(replace, error, words):
    """And leaves all as it is."""
    before = registered()
    with pytest.raises(error, match=words):
        compat.enable(replace)
    assert registered() == before and "pykernels" in before[0]


# ---- What is not served ----------------------------------------------------------------------------------------------


def call(**options):
    x = torch.randn(1, 2, 3, 8)
    return compat._attention(torch.nn.Identity(), x, x, x, **{"attention_mask": None, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    (
        (
            {"attention_mask": torch.ones(1, 3, dtype=torch.bool)},
            r"attention_mask must be None, made by pykernels, or \[B, H or 1, Tq, Tk\].* got torch.bool \[1, 3\]",
        ),
        ({"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.long)}, "attention_mask must be .* got torch.int64"),
        ({"attention_mask": torch.ones(1, 1, 3, 4)}, r"bias must be broadcastable to .* got shape \[1, 1, 3, 4\]"),
        ({"dropout": 1.0}, "dropout_p must be"),
        ({"s_aux": torch.zeros(3)}, "sinks must have shape"),
        ({"position_bias": torch.zeros(1, 3, 3, 3)}, "bias must be broadcastable"),
        ({"cache": object()}, "a paged cache is not served"),
        ({"output_attentions": True}, "output_attentions must be False"),
    ),
)
def test_calls_that_cannot_be_served(options, words):
    with pytest.raises(ValueError, match=words):
        call(**options)


def test_causal_queries_of_other_keys_need_a_mask():
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="attention_mask must be given for 3 causal queries of 5 keys"):
        compat._attention(torch.nn.Identity(), x, *[torch.randn(1, 2, 5, 8)] * 2, None)


def test_keys_that_are_not_the_masks():
    mask = compat._make_mask(2, 3, 5, 2)
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 4, 8)
    with pytest.raises(ValueError, match="attention_mask must be for 2 rows, 3 queries and 4 keys, got 2, 3 and 5"):
        compat._attention(torch.nn.Identity(), q, k, k, mask)


def test_offsets_beside_padding_cannot_be_served():
    window = functions.sliding_window_causal_mask_function(3)
    mask = compat._make_mask(1, 5, 5, mask_function=window, attention_mask=torch.tensor([[1, 0, 1, 1, 1]]))
    x, offsets = torch.randn(1, 2, 5, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must come with one row of tokens, no padding"):
        compat._attention(torch.nn.Identity(), x, x, x, mask, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    mask = compat._make_mask(
        2, 4, 4, mask_function=functions.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))
    )
    with pytest.raises(ValueError, match="position_bias with packed sequences must come with one row, got 2"):
        compat._attention(torch.nn.Identity(), *[torch.randn(2, 2, 4, 8)] * 3, mask, position_bias=torch.zeros(4, 4))


PADDING = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
PATTERNS = {
    "chunks": lambda: functions.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "blocks": lambda: functions.or_masks(
        functions.causal_mask_function, functions.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, -1]] * 2))
    ),
    "of one's own": lambda: lambda b, h, q, k: (k <= q) & (k % 2 == b),
    "window over padding": lambda: functions.sliding_window_causal_mask_function(3),
    "packed over padding": lambda: functions.and_masks(
        functions.causal_mask_function, functions.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 0, 1, 1]] * 2))
    ),
}


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", PATTERNS)
def test_other_patterns_are_served_element_by_element(name, padded):
    """With a bias of the scores besides."""
    function, padding = PATTERNS[name](), PADDING.bool() if padded else None
    booleans = dense(2, 6, 6, 0, 0, function, padding)
    mask = compat._make_mask(2, 6, 6, 0, 0, function, padding)
    q, k, v = (torch.randn(2, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    bias = None if name == "packed over padding" and not padded else torch.randn(1, 2, 6, 6, dtype=torch.float64)
    out, _ = compat._attention(torch.nn.Identity(), q, k, v, mask, position_bias=bias)
    scores = (q @ k.mT * 8**-0.5 + (0 if bias is None else bias)).masked_fill(~booleans[:, None], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("additive", (False, True))
def test_masks_given_by_the_user(additive):
    """[B, 1, Tq, Tk] to the model: what the same mask is to the unpatched model; a row that sees nothing excepted."""
    mask = torch.rand(3, 1, 9, 9) < 0.6
    mask |= torch.eye(9, dtype=torch.bool)
    if additive:
        mask = torch.where(mask, torch.randn(3, 1, 9, 9), torch.finfo(torch.float32).min)
    ids, results = inputs("llama")["input_ids"], []
    for attention in ("sdpa", "pykernels"):
        results.append(result(model("llama", attention=attention), {"input_ids": ids}, grad=True, attention_mask=mask))
    for key, x in results[0].items():
        torch.testing.assert_close(results[1][key], x, rtol=1e-4, atol=1e-5 * max(1, float(x.abs().max())), msg=key)


def test_a_mask_is_no_tensor_of_booleans():
    mask = compat._make_mask(2, 3, 5, 2, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    assert tuple(mask.shape) == (2, 1, 3, 5) and "Mask" in repr(mask)
    assert mask.to("cpu", torch.float32) is mask and mask.to(torch.zeros(1)) is mask
    moved = mask.to(device="meta")
    tensors = moved.lengths, moved.valid, *moved.cu_seqlens, *moved.queries, *moved.visible
    assert {x.device.type for x in tensors} == {"meta"}
    assert (moved.keys, moved.left, moved.right, moved.shape) == (5, None, 0, mask.shape)
    for use in (
        lambda: mask & True,
        lambda: mask[:, :, :1],
        lambda: torch.where(mask, 1.0, 0.0),
        lambda: mask.sum(),
        lambda: mask.dtype,
        lambda: mask + 1.0,
        lambda: mask.to_dense(),
    ):
        with pytest.raises((TypeError, AttributeError)):
            use()
    with pytest.raises(
        AttributeError, match="asks its attention mask for dtype, but masks of pykernels have no elements"
    ):
        mask.dtype  # noqa: B018


def dense(batch: int, q_length: int, kv_length: int, q_offset: int, kv_offset: int, function, padding) -> Tensor:
    """Transformers' own booleans."""
    return transformers.masking_utils.sdpa_mask(
        batch, q_length, kv_length, q_offset, kv_offset, function, padding, allow_is_causal_skip=False
    )[:, 0]


# Queries, keys, the first query's and the first key's position: a prompt, what follows, static caches, a cache of a
# window.
GEOMETRIES = (6, 6, 0, 0), (3, 6, 3, 0), (1, 6, 5, 0), (6, 10, 0, 0), (2, 10, 4, 0), (2, 5, 6, 3)


@pytest.mark.parametrize("padding", (None, "left", "right"))
@pytest.mark.parametrize(
    ("pattern", "geometry"),
    (
        *((pattern, geometry) for pattern in ("causal", "window") for geometry in GEOMETRIES),
        *((pattern, GEOMETRIES[0]) for pattern in ("bidirectional", "bidirectional-window")),
    ),
)
def test_masks_say_what_transformers_masks_say(pattern, geometry, padding):
    """Attention through a Mask is attention through the booleans, for real queries; every geometry that caches make."""
    q_length, kv_length, q_offset, kv_offset = geometry
    function = {
        "causal": functions.causal_mask_function,
        "bidirectional": functions.bidirectional_mask_function,
        "window": functions.sliding_window_causal_mask_function(3),
        "bidirectional-window": functions.sliding_window_bidirectional_mask_function(2),
    }[pattern]
    seen, real = q_offset + q_length, None
    if padding is not None:
        real = torch.ones(3, seen, dtype=torch.bool)
        real[1, :2] = padding == "right"
        real[1, -2:] = padding == "left"
        real[2] = False  # a row without tokens
        real[2, -1 if padding == "left" else 0] = True
    booleans = dense(3, q_length, kv_length, q_offset, kv_offset, function, real)
    mask = compat._make_mask(3, q_length, kv_length, q_offset, kv_offset, function, real)
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64) for n in (q_length, kv_length, kv_length))
    out, none = compat._attention(torch.nn.Identity(), q, k, v, mask)
    assert none is None and out.shape == (3, q_length, 2, 8)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~booleans[:, None], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)
    if real is not None and pattern != "bidirectional":
        kept = real[:, q_offset:]
        assert not out[~kept].any()
        out, expected = out[kept], expected[kept]
    torch.testing.assert_close(out, expected)


# ---- One graph -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_booleans(monkeypatch):
    """No mask is made element by element."""
    monkeypatch.setattr(functions, "sdpa_mask", None)


def compiled_of(name: str) -> tuple:
    """A model of one layer, itself and compiled."""
    torch.manual_seed(0)
    made = copy.deepcopy(model(name))
    del (made.encoder.layer if name == "bert" else made.model.layers)[1:]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return made, torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "padding"), (("llama", None), ("mistral", None), ("mistral", "left"), ("bert", "right"))
)
def test_compiles_whole_for_every_length(name, padding, no_booleans):
    """Forward and backward. Without padding of positions, which a graph can't tell from those of packed sequences."""
    made, compiled = compiled_of(name)
    more = {} if name == "bert" else {"use_cache": False}
    for tokens in (9, 7):
        places, arguments = torch.arange(tokens), {"input_ids": torch.randint(2, VOCABULARY, (3, tokens))}
        if padding is None:
            arguments["position_ids"] = places.repeat(3, 1)
            arguments["position_ids"][1, 4:] -= 4
        else:
            mask = (places >= 2 if padding == "left" else places < tokens - 2).long().repeat(3, 1)
            mask[1] = 1
            arguments["attention_mask"] = mask
        wanted = result(made, arguments, grad=True, **more)
        found = result(made, arguments, grad=True, through=compiled, **more)
        largest = max(float(x.abs().max()) for x in wanted.values())
        for key, x in wanted.items():
            torch.testing.assert_close(found[key], x, rtol=1e-4, atol=1e-6 * largest, msg=key)
    assert graphs() == 1


@pytest.mark.parametrize("name", ("llama", "mistral"))
def test_compiles_whole_with_a_cache(name, no_booleans):
    """Prompts into growing caches; then tokens out of a static one, of whose length a graph sees nothing."""
    made, compiled = compiled_of(name)
    with torch.no_grad():
        for tokens in (9, 7):
            ids = torch.randint(2, VOCABULARY, (3, tokens))
            torch.testing.assert_close(compiled(ids).logits, made(ids).logits, rtol=1e-4, atol=1e-4)
    assert graphs() == 1
    caches = [transformers.StaticCache(config=made.config, max_cache_len=16) for _ in range(2)]
    named = "cache" if "cache" in inspect.signature(type(made.model).forward).parameters else "past_key_values"
    with torch.no_grad():
        for cache in caches:
            made(ids, **{named: cache})
        for token in ids[:, :3].split(1, 1):
            expected, out = (f(token, **{named: cache}) for f, cache in zip((made, compiled), caches))
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_other_patterns_compile_element_by_element():
    """And padding beside a static cache, and a bias beside padding."""
    q, k, v = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    chunks = torch.zeros(2, dtype=torch.long)

    def attend(q, k, v, offset, real, bias):
        parts = []
        function = functions.chunked_causal_mask_function(4, chunks)
        parts.append(compat._attention(torch.nn.Identity(), q, k, v, compat._make_mask(2, 6, 6, 0, 0, function))[0])
        mask = compat._make_mask(2, 2, 6, offset, 0, functions.causal_mask_function, real)
        parts.append(compat._attention(torch.nn.Identity(), q[:, :, :2], k, v, mask)[0])
        window = functions.sliding_window_causal_mask_function(3)
        mask = compat._make_mask(2, 6, 6, 0, 0, window, real)
        parts.append(compat._attention(torch.nn.Identity(), q, k, v, mask, position_bias=bias)[0])
        return parts

    arguments = q, k, v, torch.tensor(3), PADDING.bool(), torch.randn(1, 2, 6, 6)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
    torch._dynamo.reset()
    real = [torch.ones(2, 6, dtype=torch.bool), PADDING.bool()[:, 3:5], PADDING.bool()]
    for out, expected, of in zip(compiled, attend(*arguments), real):
        torch.testing.assert_close(out[of], expected[of])


def test_activation_checkpointing_compiles_whole(no_booleans):
    made, compiled = compiled_of("mistral")
    arguments = inputs("mistral", "left")
    expected = result(made, arguments, grad=True, use_cache=False)
    made.train().gradient_checkpointing_enable()
    for key, x in result(made, arguments, grad=True, use_cache=False, through=compiled).items():
        torch.testing.assert_close(x, expected[key], rtol=1e-4, atol=1e-5 * max(1, float(expected[key].abs().max())))


def test_static_caches_in_a_graph_take_no_dropout():
    def attend(x, offset):
        return compat._attention(torch.nn.Identity(), x, x, x, compat._make_mask(1, 3, 3, offset), dropout=0.1)[0]

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(attend, fullgraph=True, backend="eager")(torch.randn(1, 2, 3, 8), torch.tensor(0))


def check_exports(folder, models: dict[str, torch.nn.Module], ops: dict[str, str]) -> None:
    """Into a fresh process that knows of pykernels what registers its ops, and nothing of Transformers."""

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    tokens, wanted = torch.export.Dim("tokens", min=3, max=64), {}
    ids = torch.randint(2, VOCABULARY, (2, 14))
    for name, made in models.items():
        with torch.no_grad():
            program = torch.export.export(Logits(made), (ids[:, :9].contiguous(),), dynamic_shapes=({1: tokens},))
            wanted[name] = made(ids).logits
        calls = {str(node.target).split(".")[1] for node in program.graph.nodes if "pykernels" in str(node.target)}
        assert calls == {f"{op}_fwd_cpu" for op in ops[name].split()}
        torch.export.save(program, folder / f"{name}.pt2")
    torch.save((ids, wanted), folder / "wanted.pt")
    child = """
import pathlib, sys, torch
import pykernels
folder = pathlib.Path(sys.argv[1])
ids, wanted = torch.load(folder / "wanted.pt")
for name, logits in wanted.items():
    out = torch.export.load(folder / f"{name}.pt2").module()(ids)
    torch.testing.assert_close(out, logits, rtol=1e-4, atol=1e-4)
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", child, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exports_and_reloads_in_a_fresh_process(tmp_path, no_booleans):
    check_exports(tmp_path, {"mistral": compiled_of("mistral")[0]}, {"mistral": "flash_attention"})


def test_generation_with_compiled_steps():
    """As `generate` compiles them on a GPU: masks come from outside the graph, which serves all steps."""
    made, _ = compiled_of("llama")
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
    arguments = {**inputs("llama", "left"), "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected, eager, steps = made.generate(**arguments), made.forward, []

    @functools.wraps(eager)
    def forward(*args, **named):
        alone = named["input_ids"].shape[1] == 1
        steps.append(alone)
        return (compiled if alone else eager)(*args, **named)

    made.forward = forward
    assert torch.equal(made.generate(**arguments), expected)
    assert sum(steps) == 5 and graphs() <= 2
