"""What a header says of a model: its hyper-parameters, checked, and what the kernel is told of it.

Not here: reading the file (header.py), what the shape means for memory (estimate.py).
"""

import math
from dataclasses import dataclass
from typing import Final

from drivers.llamacpp.header import GGML_TYPES, Header, Skipped, Value
from kernel.device import ModelInfo
from kernel.errors import ModelInvalid

MAX_LAYERS: Final = 512  # more make the native loader abort


@dataclass(frozen=True, slots=True)
class Shape:
    """The hyper-parameters that memory depends on; 0 where an architecture has none."""

    architecture: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: tuple[int, ...]  # per layer
    key_length: int
    value_length: int
    context_tokens: int
    vocabulary: int

    @property
    def kv_bytes_per_token(self) -> int:
        """At 16-bit keys and values."""
        return 2 * sum(self.kv_heads) * (self.key_length + self.value_length)


class _Keys:
    """Typed look-ups in the metadata; a value of the wrong kind is the file's fault."""

    def __init__(self, header: Header, architecture: str) -> None:
        self._metadata = header.metadata
        self._prefix = architecture + "."

    def whole(self, key: str, low: int, high: int, default: int = 0) -> int:
        return self._whole(key, self._metadata.get(self._prefix + key, default), low, high, default)

    def per_layer(self, key: str, layers: int, high: int, default: int) -> tuple[int, ...]:
        value = self._metadata.get(self._prefix + key, default)
        if not isinstance(value, tuple):
            return (self._whole(key, value, 0, high, default),) * layers
        if len(value) < layers:
            raise ModelInvalid(f"{self._prefix}{key} lists {len(value)} of {layers} layers")
        return tuple(self._whole(key, item, 0, high, default) for item in value[:layers])

    def _whole(self, key: str, value: Value, low: int, high: int, default: int) -> int:
        if not isinstance(value, int) or (not low <= value <= high and value != default):
            raise ModelInvalid(f"{self._prefix}{key} is {value!r}; expected {low} to {high}")
        return value


def shape(header: Header) -> Shape:
    """Read and check the hyper-parameters. Raises ModelInvalid for what the native loader would die of."""
    architecture = _architecture(header)
    keys = _Keys(header, architecture)
    layers = keys.whole("block_count", 1, MAX_LAYERS, default=-1)
    width = keys.whole("embedding_length", 1, 1 << 20, default=-1)
    context = keys.whole("context_length", 1, 1 << 30, default=-1)
    if -1 in (layers, width, context):
        raise ModelInvalid(f"{header.path}: block_count, embedding_length or context_length is missing")
    heads = max(keys.per_layer("attention.head_count", layers, 1 << 16, default=0))
    head_width = width // heads if heads else 0
    _check_norm(header, architecture)
    return Shape(
        architecture,
        layers,
        width,
        max(keys.per_layer("feed_forward_length", layers, 1 << 24, default=0)),
        heads,
        keys.per_layer("attention.head_count_kv", layers, 1 << 16, default=heads),
        keys.whole("attention.key_length", 1, 1 << 16, head_width),
        keys.whole("attention.value_length", 1, 1 << 16, head_width),
        context,
        _vocabulary(header),
    )


def _architecture(header: Header) -> str:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isprintable() or not architecture:
        raise ModelInvalid(f"{header.path}: no general.architecture")
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelInvalid(f"{header.path}: holds a {str(kind)[:40]!r}, not a model")
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        hint = "join the parts with `llama-gguf-split --merge`"
        raise ModelInvalid(f"{header.path}: one of {parts} parts of a model", hint)
    return architecture


def _check_norm(header: Header, architecture: str) -> None:
    """A norm epsilon that is no number loads, and aborts the process at the first decode."""
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        epsilon = header.metadata.get(f"{architecture}.attention.{key}", 1e-5)
        if not isinstance(epsilon, float) or not math.isfinite(epsilon) or epsilon < 0:
            raise ModelInvalid(f"{architecture}.attention.{key} is {epsilon!r}")


def _vocabulary(header: Header) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Skipped) and tokens.items:
        return tokens.items
    if isinstance(tokens, tuple) and tokens:
        return len(tokens)
    raise ModelInvalid(f"{header.path}: no vocabulary")


def model_info(header: Header) -> ModelInfo:
    """The header in the kernel's words."""
    form = shape(header)
    return ModelInfo(
        path=header.path,
        format="gguf",
        architecture=form.architecture,
        file_bytes=header.file_bytes,
        parameters=sum(tensor.weights for tensor in header.tensors),
        context_tokens=form.context_tokens,
        quantization=_quantization(header),
        kv_bytes_per_token=form.kv_bytes_per_token,
    )


def _quantization(header: Header) -> str:
    """The type that most weights have."""
    weights: dict[int, int] = {}
    for tensor in header.tensors:
        weights[tensor.type] = weights.get(tensor.type, 0) + tensor.weights
    if not weights:
        raise ModelInvalid(f"{header.path}: no tensors")
    return GGML_TYPES[max(weights, key=lambda kind: weights[kind])][0]
