"""The bytes a model will take on each device, from its header alone.

Weights and caches are exact, as llama.cpp's loader and memory modules allocate them. Compute memory is
that of the largest forward pass, which llama.cpp reserves when a context is made: its inputs, and what
is alive at once in the widest of its phases (attention scores, feed-forward, experts, recurrence,
logits). The widths come from the tensor table, so that an architecture needs no entry here.
Not here: how an engine is laid out (layout.py), asking llama.cpp itself (confirm.py).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from drivers.llamacpp.header import GGML_TYPES, Header, Tensor, type_number
from drivers.llamacpp.layout import Layout, chunk_tokens
from drivers.llamacpp.shape import Layer, Shape, shape
from kernel.device import Estimate

ALL_LAYERS: Final = 1 << 20
_SLIDING_STEP_TOKENS: Final = 256  # a sliding window's cells are padded to this
_REPACKED: Final = {  # copied into another layout at the load, by kind of processor
    "x86": frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"}),
    "arm": frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"}),
}
_ROWS_STEP: Final = 8  # only matrices with a multiple of so many rows are
_TIME_MIX_WIDTHS: Final = 10  # measured: an RWKV layer holds so many rows of the model's width at once

Rows = Mapping[str, int]  # of each matrix in a layer, by its name in the layer: numbers it makes of a token


@dataclass(frozen=True, slots=True)
class Setup:
    """What a context is made with."""

    window_tokens: int  # of each seat
    seats: int
    chunk_tokens: int  # of one forward pass
    key_type: str = "F16"
    value_type: str = "F16"
    flash: bool = False  # flash attention: keeps no scores, and takes quantised values
    full_windows: bool = True  # layers with a sliding window cache all tokens, so a sequence can be cut
    gpu_layers: int = 0  # the last so many layers, the output counting as one, are on the GPU


def setup_of(layout: Layout) -> Setup:
    """The largest slab that this driver's engines make (slab.py)."""
    seats = max(1, layout.pool_tokens // layout.window_tokens)
    chunk = chunk_tokens(layout.window_tokens, seats, layout.on_gpu)
    gpu_layers = ALL_LAYERS if layout.on_gpu else 0
    return Setup(layout.window_tokens, seats, chunk, flash=layout.on_gpu, gpu_layers=gpu_layers)


def estimate(header: Header, layout: Layout) -> Estimate:
    """All of it, for the engine that this driver opens."""
    host, gpu = by_device(header, setup_of(layout))
    slab = Estimate(
        host.weights_bytes + gpu.weights_bytes,
        host.kv_bytes + gpu.kv_bytes,
        host.compute_bytes + gpu.compute_bytes,
    )
    return of_all_slabs(slab, layout)


def of_all_slabs(slab: Estimate, layout: Layout) -> Estimate:
    """From an estimate for the largest slab: all of them share the KV tokens that the layout has."""
    tokens = setup_of(layout).seats * layout.window_tokens
    return replace(slab, kv_bytes=slab.kv_bytes * layout.pool_tokens // tokens)


def by_device(header: Header, setup: Setup) -> tuple[Estimate, Estimate]:
    """What the host takes, and what the GPU does."""
    form = shape(header)
    total = len(form.layers)
    first = max(0, total + 1 - setup.gpu_layers)  # on the GPU
    weights, cache = [0, 0], [0, 0]
    for tensor in header.tensors:
        if _is_on_gpu(tensor, first, total):
            weights[1] += tensor.size_bytes
        else:
            weights[0] += tensor.size_bytes * (2 if _is_repacked(tensor) else 1)
    for index, size in enumerate(_cache_bytes(form, setup)):
        cache[index >= first] += size
    compute = _compute_bytes(header, form, setup)
    logits = 4 * form.vocabulary * setup.seats
    return (
        Estimate(weights[0], cache[0], logits + (compute if first else 0)),
        Estimate(weights[1], cache[1], compute if first <= total else 0),
    )


def _is_on_gpu(tensor: Tensor, first: int, layers: int) -> bool:
    """Layers from `first` on are; the output is the one after the last; the input never is."""
    block = _block(tensor)
    if block is not None:
        return block >= first
    return first <= layers and tensor.name.startswith("output")


def _block(tensor: Tensor) -> int | None:
    block, dot, _ = tensor.name.removeprefix("blk.").partition(".")
    return int(block) if dot and tensor.name.startswith("blk.") and block.isdecimal() else None


def repacked_bytes(header: Header) -> int:
    """Second copies of weights, in the order that the processor likes."""
    return sum(tensor.size_bytes for tensor in header.tensors if _is_repacked(tensor))


def _is_repacked(tensor: Tensor) -> bool:
    family = "arm" if os.uname().machine in ("arm64", "aarch64") else "x86"
    return (
        GGML_TYPES[tensor.type][0] in _REPACKED[family]
        and len(tensor.dims) >= 2
        and tensor.dims[1] % _ROWS_STEP == 0
        and not tensor.name.startswith(("token_embd", "position_embd"))  # are looked up, not multiplied
    )


def _cells(setup: Setup, form: Shape, slides: bool) -> int:
    """Tokens that a seat has room for in a layer's cache."""
    if not slides or setup.full_windows:
        return setup.window_tokens
    need = min(setup.window_tokens, form.sliding_tokens + setup.chunk_tokens)
    return -(-need // _SLIDING_STEP_TOKENS) * _SLIDING_STEP_TOKENS


def _cache_bytes(form: Shape, setup: Setup) -> Iterator[int]:
    """Of each layer, for all seats."""
    values = {layer.value_width for layer in form.layers if layer.key_width}
    widest = max(values, default=0)
    for layer in form.layers:
        value = layer.value_width if setup.flash or len(values) < 2 or not layer.value_width else widest
        cells = _cells(setup, form, layer.slides)
        token = _bytes(setup.key_type, layer.key_width) + _bytes(setup.value_type, value)
        yield setup.seats * (cells * token + 4 * layer.state_width)


def _bytes(kind: str, count: int) -> int:
    _, block, size = GGML_TYPES[type_number(kind)]
    return count // block * size


def _compute_bytes(header: Header, form: Shape, setup: Setup) -> int:
    """Of the largest forward pass: its inputs and its widest phase, or the logits after it."""
    tokens = min(setup.seats * setup.window_tokens, setup.chunk_tokens)
    tokens = -(-tokens // setup.seats) * setup.seats
    rows = _rows(header)
    widest = max(_layer(form, setup, layer, rows.get(at, {}), tokens) for at, layer in enumerate(form.layers))
    logits = form.vocabulary * min(tokens, setup.seats) + 2 * tokens * form.width
    return max(_inputs(form, setup, tokens) + 4 * widest, 4 * logits)


def _layer(form: Shape, setup: Setup, layer: Layer, rows: Rows, tokens: int) -> int:
    """Numbers alive at once in the widest phase of a layer; residual and norm are in each of them."""
    attention = _attention(form, setup, layer, rows, tokens) if layer.key_width else 0
    work = max(attention, _feed_forward(form, rows), _recurrence(form, rows))
    state = layer.state_width * (1 if "ssm_in" in rows else 2)  # old and new
    return tokens * (2 * form.width + work) + setup.seats * state


def _rows(header: Header) -> dict[int, dict[str, int]]:
    """By layer and name, the numbers that a matrix makes of a token; that `ffn_down` takes of one."""
    found: dict[int, dict[str, int]] = {}
    for tensor in header.tensors:
        block = _block(tensor)
        if block is not None and len(tensor.dims) > 1:
            name = tensor.name.partition(".")[2].partition(".")[2]
            found.setdefault(block, {})[name.removesuffix(".weight")] = tensor.dims[
                not name.startswith("ffn_down")
            ]
    return found


def _inputs(form: Shape, setup: Setup, tokens: int) -> int:
    """Embeddings, tokens, positions, and for each kind of cache a mask and where values go."""
    size = tokens * (4 * form.width + 4 + 4 + 8)
    for slides in (False, True):
        layers = [layer for layer in form.layers if layer.key_width and layer.slides == slides]
        if layers:
            mask = (2 if setup.flash else 4) * _cells(setup, form, slides)
            places = 8 if setup.flash else 8 * max(layer.value_width for layer in layers)
            size += tokens * (mask + places)
    return size


def _attention(form: Shape, setup: Setup, layer: Layer, rows: Rows, tokens: int) -> int:
    """Of a token: queries, keys, values, and the scores of all cells."""
    cells = 0 if setup.flash else _cells(setup, form, layer.slides)
    made = sum(rows.get(name, 0) for name in ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a"))
    made += 2 * rows.get("attn_q_b", 0) + 2 * rows.get("attn_kv_a_mqa", 0)
    latent = rows.get("attn_k_b", 0)  # width of compressed keys, which are turned round to be the values
    turned = max(3 * layer.heads * latent, setup.seats * cells * latent // (2 * tokens))
    return made + turned + cells * layer.heads


def _feed_forward(form: Shape, rows: Rows) -> int:
    """Up, gate (that may be one matrix) and their product; of each expert that computes the token."""
    up, gate, down = (rows.get(name, 0) for name in ("ffn_up", "ffn_gate", "ffn_down"))
    dense = up + gate + (down if up + gate > down else 0)  # without a gate, in place
    fused = rows.get("ffn_gate_up_exps", 0) * 3 // 2
    return max(dense, form.experts_used * (3 * rows.get("ffn_up_exps", 0) + fused))


def _recurrence(form: Shape, rows: Rows) -> int:
    """Projections, the convolution and its input, and what the state says."""
    if "time_mix_key" in rows:
        return rows.get("time_mix_w1", 0) + _TIME_MIX_WIDTHS * form.width
    if "shortconv.in_proj" in rows:
        return rows["shortconv.in_proj"] + 2 * form.width
    mixed = rows.get("ssm_conv1d", 0)
    if "ssm_in" in rows:
        return rows["ssm_in"] + 3 * mixed
    return rows.get("attn_qkv", 0) + rows.get("attn_gate", 0) + 2 * mixed if mixed else 0
