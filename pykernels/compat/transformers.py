"""Attention, scans and convolutions of Hugging Face Transformers' models (5.4 or newer; scans 5.17) on our ops.

    pykernels.compat.transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="pykernels")
    model.set_attn_implementation("pykernels")                     or, for a model that is already there

`enable` registers two functions in Transformers under one name: attention, and what makes its masks. A mask here is
a `Mask`, which holds what the model asked for (causal or not, a window, padding, packed sequences) in terms of our ops
and has no elements. Padded batches are packed: padding is neither read nor computed. Any other pattern, and masks that
come as tensors, go to attention as they are, element by element. What our ops cannot do at all raises an error that
names it; the model's other implementations stay available.

All of this can be traced by `torch.compile(fullgraph=True)`, where nothing may depend on what is in a tensor: there
padding hides keys rather than being packed, and offsets of packed sequences have one entry for each token.

Models with scans and causal convolutions take these from mamba_ssm and causal_conv1d where they find them, else from
slow PyTorch code, each through a wrapper that Transformers makes when the model's module is imported. `enable` puts
`pykernels.compat.mamba_ssm` and `.causal_conv1d` into the wrappers that are there and those that come, `disable` takes
them out again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import types
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations import hub_kernels

from ..ops.flash_attention import flash_attention, flash_attention_decode
from . import causal_conv1d, mamba_ssm

__all__ = ["Mask", "disable", "enable"]

NAME = "pykernels"


# ---- What a mask asks for --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Pattern:
    """A query at position p sees keys p - left to p + right of its sequence; None is unbounded."""

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None  # [B, T], equal for tokens of one sequence, where several are packed in a row


def _telling(maker: Callable) -> Callable:
    """Has the functions that another makes tell what they hold: where Dynamo traces it, it shows no closure."""
    parameters = inspect.signature(maker).parameters
    names = tuple(parameters)
    gathers = parameters[names[0]].kind is inspect.Parameter.VAR_POSITIONAL

    @functools.wraps(maker)
    def make(*arguments, **named):
        function = maker(*arguments, **named)
        function.holds = {names[0]: arguments} if gathers else dict(zip(names, arguments), **named)
        return function

    return make


def _held(function: Callable) -> dict[str, object] | None:
    """The variables that a function made by another holds; None where that can't be seen."""
    told = getattr(function, "holds", None)
    if told is not None or torch.compiler.is_compiling():
        return told
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


# Transformers describes a mask as a function of indices, put together from these by their makers; a function's code
# tells which maker it comes from.
_CAUSAL = masking_utils.causal_mask_function.__code__
_BIDIRECTIONAL = masking_utils.bidirectional_mask_function.__code__
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_BIDIRECTIONAL_WINDOW = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(None).__code__
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # Transformers 5.4 has none
_REMAPPED = None if _remap is None else _remap(masking_utils.causal_mask_function, None).__code__


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _pattern(function: Callable) -> _Pattern | None:
    """What a mask function means; None for one whose meaning is not known to be ours."""
    code = getattr(function, "__code__", None)
    if code is _CAUSAL:
        return _Pattern(right=0)
    if code is _BIDIRECTIONAL:
        return _Pattern()
    if code not in (_WINDOW, _BIDIRECTIONAL_WINDOW, _PACKED, _REMAPPED, _AND) or (held := _held(function)) is None:
        return None
    if code is _WINDOW:
        return _Pattern(left=held["sliding_window"] - 1)
    if code is _BIDIRECTIONAL_WINDOW:
        return _Pattern(left=held["sliding_window"], right=held["sliding_window"])
    if code is _PACKED:
        return _Pattern(sequences=held["packed_sequence_mask"])
    if code is _REMAPPED:  # positions count up by one in a sequence, so that distances are those of the tokens
        return _pattern(held["mask_function"])
    result = _Pattern()
    for part in [_pattern(x) for x in held["mask_functions"]]:
        if part is None or (result.sequences is not None and part.sequences is not None):
            return None
        result = _Pattern(_smaller(result.left, part.left), _smaller(result.right, part.right),
                          part.sequences if result.sequences is None else result.sequences)
    return result


def _check_patterns() -> None:
    """Evaluates what the makers make, to notice a version of Transformers that means something else by them."""
    size, window = 9, 3
    q, k = torch.arange(size)[:, None], torch.arange(size)
    sequences = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    causal_window = masking_utils.sliding_window_causal_mask_function(window)
    in_sequences = causal_window if _remap is None else _remap(causal_window, positions)
    for function in (
        masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function, causal_window,
        masking_utils.sliding_window_bidirectional_mask_function(window),
        masking_utils.and_masks(masking_utils.packed_sequence_mask_function(sequences), in_sequences),
    ):
        pattern = _pattern(function)
        if pattern is None:
            raise RuntimeError(f"this version of Transformers ({transformers.__version__}) makes "
                               f"{function.__qualname__} in a way that pykernels does not know")
        expected = torch.ones(size, size, dtype=torch.bool)
        if pattern.left is not None:
            expected &= k >= q - pattern.left
        if pattern.right is not None:
            expected &= k <= q + pattern.right
        if pattern.sequences is not None:
            expected &= sequences[0][:, None] == sequences[0]
        if not torch.equal(function(0, 0, q, k).expand(size, size), expected):
            raise RuntimeError(f"this version of Transformers ({transformers.__version__}) means something by "
                               f"{function.__qualname__} that pykernels does not know")


class Mask(BlockMask):
    """What Transformers carries from a model to its attention layers in place of booleans [B, 1, Tq, Tk].

    Transformers passes on tensors and FlexAttention's BlockMask as they are; this is one by name alone. It has a shape
    and can move to another device; code that takes it for a tensor of booleans fails.
    """

    def __init__(self, shape: tuple[int, ...], left: int | None, right: int | None, keys: int | None,
                 lengths: Tensor, valid: Tensor | None = None, queries: tuple[Tensor, Tensor] | None = None,
                 visible: tuple[Tensor, Tensor] | None = None, cu_seqlens: tuple[Tensor, Tensor] | None = None) -> None:
        self._shape = shape
        self.left, self.right = left, right  # the window, as in `flash_attention`
        # Of the Tk keys, the first this many can be seen; the last of them is at the last query. None: lengths say.
        self.keys = keys
        self.lengths = lengths  # the same for each row, int32 [B]
        self.valid = valid  # bool [B, keys], False for padding; None if there is none
        self.cu_seqlens = cu_seqlens  # of queries and keys, where they are packed
        self.queries = queries  # (rows, columns) of the tokens that are packed; None: all, in order
        self.visible = visible  # and of the keys

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def to(self, *args, **kwargs) -> Mask:
        """The mask on another device; a dtype has no meaning here."""
        device = self.lengths.device
        for x in (*args, *kwargs.values()):
            if isinstance(x, (str, torch.device, Tensor)):
                device = x.device if isinstance(x, Tensor) else torch.device(x)
        if device == self.lengths.device:
            return self

        def moved(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (pair[0].to(device), pair[1].to(device))

        return Mask(self._shape, self.left, self.right, self.keys, self.lengths.to(device),
                    None if self.valid is None else self.valid.to(device), moved(self.queries), moved(self.visible),
                    moved(self.cu_seqlens))

    def contiguous(self, *args, **kwargs) -> Mask:
        """Itself: it is never changed, and has no layout."""
        return self

    clone = detach = contiguous

    def __repr__(self) -> str:
        return (f"Mask(shape={self._shape}, left={self.left}, right={self.right}, keys={self.keys}, "
                f"packed={self.cu_seqlens is not None})")

    __str__ = __repr__

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"this model asks its attention mask for {name}, but masks of pykernels have no elements; "
                             "use another attn_implementation for it")

    def __getitem__(self, index: object):
        raise TypeError("this model takes a part of its attention mask, but masks of pykernels have no elements; "
                        "use another attn_implementation for it")


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _make_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
               mask_function: Callable = masking_utils.causal_mask_function, attention_mask: Tensor | None = None,
               device: torch.device | str = "cpu", use_vmap: bool = False, **kwargs) -> Mask | Tensor:
    """What Transformers calls to make a mask. Query i is at position q_offset + i, key j at kv_offset + j.

    A `Mask`, or booleans [B, 1, Tq, Tk] for a pattern that it can't hold. Of `kwargs`, all say how other
    implementations build theirs (dtype, whether it may be left out, ...).
    """
    pattern = _pattern(mask_function)
    if isinstance(q_offset, Tensor) and not torch.compiler.is_compiling():  # of a static cache
        q_offset = int(q_offset)
    if pattern is not None:
        mask = _mask(pattern, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask,
                     torch.device(device))
        if mask is not None:
            return mask
    return masking_utils.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap,
        device=device)


def _mask(pattern: _Pattern, batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int,
          attention_mask: Tensor | None, device: torch.device) -> Mask | None:
    """None if no `Mask` can hold it."""
    left, right, sequences = pattern.left, pattern.right, pattern.sequences
    tracing, everything = torch.compiler.is_compiling(), (left, right) == (None, None)
    shape = (batch_size, 1, q_length, kv_length)
    if isinstance(q_offset, Tensor) and not everything:
        if right != 0 or sequences is not None or attention_mask is not None:
            return None
        lengths = (q_offset + (q_length - kv_offset)).to(device, torch.int32).expand(batch_size)
        return Mask(shape, left, right, None, lengths)
    if right == 0:
        keys = q_offset + q_length - kv_offset  # up to the last query's
    else:
        keys = kv_length
        if not everything and q_offset + q_length - kv_offset != keys:
            return None
    if not everything and not q_length <= keys <= kv_length:
        return None
    if not tracing and left is not None and left >= keys - 1:  # a graph serves more lengths without this question
        left = None
    mask = functools.partial(Mask, shape, left, right, keys,
                             torch.full((batch_size,), keys, dtype=torch.int32, device=device))
    valid = None
    if attention_mask is not None:
        valid = attention_mask.to(device=device, dtype=torch.bool)[:, kv_offset:kv_offset + keys]
        if valid.shape[1] < keys:  # keys that no one has said anything about are no tokens
            valid = torch.nn.functional.pad(valid, (0, keys - valid.shape[1]))
        if not tracing and bool(valid.all()):
            valid = None
    if sequences is not None:
        if valid is not None or not q_length == kv_length == keys:
            return None
        # [B, T] rows one after another; a sequence ends where its number changes, and with the row.
        starts = torch.ones_like(sequences, dtype=torch.bool)
        starts[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
        starts = starts.expand(batch_size, -1).flatten()
        total = batch_size * q_length
        if tracing:  # as if empty sequences came last, so that the number of all depends on no value
            starts = torch.where(starts, torch.arange(total, device=starts.device), total).sort().values
        else:
            starts = starts.nonzero().flatten()
        cu_seqlens = torch.cat((starts, starts.new_full((1,), total))).to(device, torch.int32)
        return mask(cu_seqlens=(cu_seqlens, cu_seqlens))
    if valid is None:
        return mask()
    if tracing:
        return mask(valid=valid)
    if left is not None or (right is not None and right != 0):
        # Distances in the packed rows are those of the positions only where a row's tokens lie together.
        places = torch.arange(keys, device=device)
        first = torch.where(valid, places, keys).amin(1)
        last = torch.where(valid, places, -1).amax(1)
        if bool(((last - first + 1).clamp(min=0) != valid.sum(1)).any()):
            return mask(valid=valid)
    counts = valid.sum(1)
    if everything:  # padded queries see what the others see, as with other implementations
        rows = torch.arange(batch_size, device=device).repeat_interleave(q_length)
        queries = rows, torch.arange(q_length, device=device).repeat(batch_size)
        of_queries = counts.new_full((batch_size,), q_length)
    else:
        computed = valid[:, keys - q_length:]
        queries, of_queries = computed.nonzero(as_tuple=True), computed.sum(1)
    return mask(valid=valid, queries=queries, visible=valid.nonzero(as_tuple=True),
                cu_seqlens=(_offsets(of_queries), _offsets(counts)))


# ---- Attention -------------------------------------------------------------------------------------------------------


def _biased(visible: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """One bias of a mask's elements, boolean or additive, and what the model adds to the scores."""
    if visible is None or position_bias is None:
        return position_bias if visible is None else visible
    if visible.dtype == torch.bool:
        return torch.where(visible, position_bias, -torch.inf)
    return position_bias + visible


def _attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask | Tensor | None,
               dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
               sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
               position_bias: Tensor | None = None, cache: object = None, output_attentions: bool | None = None,
               **kwargs) -> tuple[Tensor, None]:
    """What Transformers calls in each layer: query [B, Hq, Tq, K], key, value [B, Hk, Tk, .] -> out [B, Tq, Hq, V].

    A mask says all about who sees whom: a `Mask`, booleans (True: visible) or what is added to the scores. Without any,
    `is_causal` (or the module's), `sliding_window` and, for one row of packed sequences, cu_seq_lens_q and
    cu_seq_lens_k do. `position_bias` [.., Hq, Tq, Tk] is added to the scores too.
    """
    if cache is not None:
        raise ValueError(f"a paged cache is not served by pykernels, got {type(cache).__name__}; use another "
                         "attn_implementation")
    if output_attentions:
        raise ValueError("output_attentions must be False: the weights are never computed; "
                         "use attn_implementation='eager'")
    options = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, tokens = q.shape[:2]
    packed = {"cu_seqlens_q": kwargs.get("cu_seq_lens_q"), "cu_seqlens_k": kwargs.get("cu_seq_lens_k")}
    is_packed = packed["cu_seqlens_q"] is not None
    if not isinstance(attention_mask, Mask):
        causal, window = False, None
        if attention_mask is None:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            if causal and not is_packed and 1 < tokens != k.shape[1]:
                raise ValueError(f"attention_mask must be given for {tokens} causal queries of {k.shape[1]} keys, "
                                 "got None")
            if sliding_window is not None:
                window = (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)
        elif attention_mask.dim() != 4 or attention_mask.dtype not in (torch.bool, torch.float32, torch.float64,
                                                                       torch.bfloat16, torch.float16):
            raise ValueError("attention_mask must be None, made by pykernels, or [B, H or 1, Tq, Tk], boolean or added "
                             f"to the scores, got {attention_mask.dtype} {list(attention_mask.shape)}")
        return flash_attention(q, k, v, causal=causal, window=window, bias=_biased(attention_mask, position_bias),
                               dropout_p=dropout, **packed, **options), None

    mask = attention_mask
    if tuple(mask.shape) != (batch, 1, tokens, k.shape[1]):
        raise ValueError(f"attention_mask must be for {batch} rows, {tokens} queries and {k.shape[1]} keys, got "
                         f"{mask.shape[0]}, {mask.shape[2]} and {mask.shape[3]}: this model changes its keys after its "
                         "mask is made; use another attn_implementation")
    options["window"] = None if (mask.left, mask.right) == (None, None) else (mask.left, mask.right)
    by_row = mask.cu_seqlens is None or (mask.valid is not None and position_bias is not None)
    if is_packed and by_row:  # a mask does not know of sequences where a cache, still empty, is given
        if batch != 1 or k.shape[1] != tokens or mask.valid is not None:
            raise ValueError(f"cu_seq_lens_q must come with one row of tokens, no padding and no others cached, got "
                             f"{batch} rows, {tokens} tokens and {k.shape[1]} keys")
        return flash_attention(q, k, v, bias=position_bias, dropout_p=dropout, **packed, **options), None
    if by_row:
        visible = None if mask.valid is None else mask.valid[:, None, None]
        if mask.keys is None and (position_bias is not None or dropout > 0):
            raise ValueError("a static cache takes neither position_bias nor dropout in a compiled graph; leave the "
                             "model uncompiled, or use another attn_implementation")
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        # There are kernels for one token; but under autocast dtypes may differ, which flash_attention alone sees to.
        alone = tokens == 1 and dropout == 0 and not needs_grad and q.dtype == k.dtype == v.dtype
        if mask.keys is None or (alone and visible is None and position_bias is None):
            return flash_attention_decode(q, k, v, mask.lengths, causal=False, **options), None
        bias = _biased(visible, None if position_bias is None else position_bias[..., :mask.keys])
        return flash_attention(q, k[:, :mask.keys], v[:, :mask.keys], bias=bias, dropout_p=dropout, **options), None
    of_queries, of_keys = mask.cu_seqlens
    options |= {"cu_seqlens_q": of_queries, "cu_seqlens_k": of_keys, "dropout_p": dropout}
    if mask.queries is None:
        if position_bias is not None and batch != 1:
            raise ValueError(f"position_bias with packed sequences must come with one row, got {batch}; use another "
                             "attn_implementation")
        out = flash_attention(*(x.flatten(0, 1)[None] for x in (q, k, v)), bias=position_bias, **options)
        return out[0].unflatten(0, (batch, tokens)), None
    packed = flash_attention(q[mask.queries][None], k[mask.visible][None], v[mask.visible][None], **options)
    out = packed.new_zeros(batch, tokens, *packed.shape[2:])
    return out.index_put(mask.queries, packed[0]), None


# ---- Scans and convolutions ------------------------------------------------------------------------------------------

_VERSION = tuple(int(x) for x in transformers.__version__.split(".")[:2])
# Since Transformers 5.17 in a form that tells which function it is about.
_FACTORY = None if _VERSION < (5, 17) else getattr(hub_kernels, "use_kernel_func_from_hub_with_fallback", None)
# What a wrapper made by it holds, that says which function it calls: in a graph that is exported the last, with all the
# model's arguments, otherwise the first.
_ROUTE = ("implementation", "applicable_params", "is_new_implementation", "torch_function")


def _nested(code: types.CodeType, name: str) -> types.CodeType | None:
    """The code of a function defined inside another, at any depth."""
    for inner in (x for x in code.co_consts if isinstance(x, types.CodeType)):
        if inner.co_name == name:
            return inner
        if (found := _nested(inner, name)) is not None:
            return found
    return None


_WRAPPER = None if _FACTORY is None else _nested(_FACTORY.__code__, "wrapped")


def _not_fused(*args, **kwargs) -> None:
    """In training models first ask for their whole layer in one call, and go on by parts if nothing comes.

    They get nothing here: the parts are as fast, and a layer in one call does not mask padding between convolution and
    scan, and in Falcon-Mamba takes a norm elsewhere, so that its results are not the model's.
    """


@functools.wraps(mamba_ssm.mamba_chunk_scan_combined)
def _chunk_scan(x, dt, A, B, C, *args, **kwargs):
    """In float32 on a CPU, as Transformers' own; elsewhere in the model's dtype, as mamba_ssm's."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        x, B, C = x.float(), B.float(), C.float()
    return mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, *args, **kwargs)


_FUNCTIONS: dict[str, Callable] = {
    "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
    "mamba_chunk_scan_combined": _chunk_scan,
    "mamba_inner_fn": _not_fused,
    "mamba_split_conv1d_scan_combined": _not_fused,
    "selective_scan_fn": mamba_ssm.selective_scan_fn,
    "selective_state_update": mamba_ssm.selective_state_update,
}
_scanning: set[str] = set()  # modules of models whose scan takes no seq_idx
_routed: list[tuple[dict[str, types.CellType], list[object]]] = []  # wrappers' variables and what these held before


def _convolution(module: str) -> Callable:
    """causal_conv1d_fn for the models of a module."""

    @functools.wraps(causal_conv1d.causal_conv1d_fn)
    def causal_conv1d_fn(*args, **kwargs):
        if kwargs.get("seq_idx") is not None and module in _scanning:
            raise ValueError(f"seq_idx must be None, got a tensor: the scan of {module.rpartition('.')[2]} takes none, "
                             "so its states would pass from sequence to sequence")
        return causal_conv1d.causal_conv1d_fn(*args, **kwargs)

    return causal_conv1d_fn


def _passing(function: Callable, names: tuple[str, ...]) -> Callable:
    """The function, passed the named arguments that it takes."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **{name: value for name, value in kwargs.items() if name in names})

    return call


def _route(wrapper: types.FunctionType) -> None:
    """Has a wrapper call ours, if we have its function."""
    cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__))
    name, module = cells["func_name"].cell_contents, wrapper.__module__
    ours = _convolution(module) if name == "causal_conv1d_fn" else _FUNCTIONS.get(name)
    if ours is None:
        return
    if name == "selective_scan_fn":
        _scanning.add(module)
    _routed.append((cells, [cells[variable].cell_contents for variable in _ROUTE]))
    names = tuple(inspect.signature(ours).parameters)
    for variable, value in zip(_ROUTE, (ours, names, True, _passing(ours, names))):
        cells[variable].cell_contents = value


def _noticing(layer_name: str) -> Callable:
    """Stands in for the first decorator that Transformers puts around its wrappers, to see those that come."""
    decorate = _noticing.original(layer_name)

    def decorator(x):
        if getattr(x, "__code__", None) is _WRAPPER:
            _route(x)
        return decorate(x)

    return decorator


def _route_all() -> None:
    if _FACTORY is None:
        return
    if _WRAPPER is None or not {"func_name", *_ROUTE} <= set(_WRAPPER.co_freevars):
        raise RuntimeError(f"this version of Transformers ({transformers.__version__}) calls the functions of "
                           "mamba_ssm and causal_conv1d in a way that pykernels does not know")
    for x in gc.get_referrers(_WRAPPER):  # wherever models and other libraries keep them
        if isinstance(x, types.FunctionType):
            _route(x)
    _noticing.original = hub_kernels.use_kernel_forward_from_hub
    hub_kernels.use_kernel_forward_from_hub = _noticing


def _unroute_all() -> None:
    while _routed:
        cells, before = _routed.pop()
        for variable, value in zip(_ROUTE, before):
            cells[variable].cell_contents = value
    _scanning.clear()
    if hub_kernels.use_kernel_forward_from_hub is _noticing:
        hub_kernels.use_kernel_forward_from_hub = _noticing.original


# ---- Registration ----------------------------------------------------------------------------------------------------

_MAKERS = {name: getattr(masking_utils, name) for name in (
    "and_masks", "packed_sequence_mask_function", "remap_positions_for_packed_sequence",
    "sliding_window_bidirectional_overlay", "sliding_window_overlay") if hasattr(masking_utils, name)}
_INTERFACES = (AttentionInterface, _attention), (AttentionMaskInterface, _make_mask)
_before: list[tuple[type, str, Callable | None]] = []  # what was registered under the names that are ours now


def _set(interface: type, name: str, function: Callable | None) -> None:
    if function is None:
        interface._global_mapping.pop(name, None)
    else:
        interface.register(name, function)


class enable(contextlib.AbstractContextManager):
    """Registers our attention in Transformers, as `attn_implementation="pykernels"`, and serves all models' scans.

    Scans and causal convolutions (of Mamba, Mamba-2 and the many models with their layers, those that exist too) are
    ours from then on, on every device.

    Args:
        replace: names of implementations whose place ours takes, in models that exist too: "sdpa" is what most models
            use when nothing is asked for. Each stays available as "<name>_original".

    Holds until `disable`, or for a `with` block.

    Raises:
        TypeError, ValueError: `replace` is not a list of names, or one is not registered in Transformers.
        RuntimeError: this version of Transformers describes its masks, or finds its kernels, in another way.
    """

    def __init__(self, replace: tuple[str, ...] | list[str] = ()) -> None:
        if not isinstance(replace, (tuple, list)) or not all(isinstance(name, str) for name in replace):
            raise TypeError(f"replace must be a list of names, got {replace!r}")
        _check_patterns()
        known = set.intersection(*(set(interface._global_mapping) for interface, _ in _INTERFACES))
        known -= {NAME} | {name for _, name, original in _before if original is None}
        for name in replace:
            if name not in known:
                raise ValueError(f"replace must hold names out of {', '.join(sorted(known))}, got {name!r}")
        disable()
        _route_all()
        for name, maker in _MAKERS.items():
            setattr(masking_utils, name, _telling(maker))
        for interface, function in _INTERFACES:
            for name in (NAME, *dict.fromkeys(replace)):
                original = interface._global_mapping.get(name)
                _before.append((interface, name, original))
                if original is not None:
                    _before.append((interface, f"{name}_original", interface._global_mapping.get(f"{name}_original")))
                    _set(interface, f"{name}_original", original)
                _set(interface, name, function)

    def __exit__(self, *exc_info) -> None:
        disable()


def disable() -> None:
    """Undoes `enable`. Models that were loaded with attn_implementation="pykernels" need another one then."""
    while _before:
        _set(*_before.pop())
    for name, maker in _MAKERS.items():
        setattr(masking_utils, name, maker)
    _unroute_all()
