"""The bytes a model will take, from its header alone.

Not here: how an engine is laid out (layout.py), asking llama.cpp itself.
"""

from typing import Final

from drivers.llamacpp.header import GGML_TYPES, Header
from drivers.llamacpp.layout import CHUNK_TOKENS, Layout
from drivers.llamacpp.shape import shape
from kernel.device import Estimate

_REPACKED: Final = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL"})  # copied into another layout at load


def estimate(header: Header, layout: Layout) -> Estimate:
    """Bytes before the load; the compute buffer is right within about 15 %."""
    form = shape(header)
    kv_bytes = layout.seats * layout.window_tokens * form.kv_bytes_per_token
    chunk = max(CHUNK_TOKENS, layout.seats)
    logits = 4 * form.vocabulary * layout.seats
    work = max(logits, 4 * chunk * (4 * form.ffn + form.width))
    scores = 4 * chunk * layout.window_tokens * form.heads  # flash attention is off
    return Estimate(header.weights_bytes + _repacked_bytes(header), kv_bytes, logits + work + scores)


def _repacked_bytes(header: Header) -> int:
    return sum(
        tensor.size_bytes
        for tensor in header.tensors
        if GGML_TYPES[tensor.type][0] in _REPACKED
        and len(tensor.dims) == 2
        and tensor.name != "token_embd.weight"
    )
