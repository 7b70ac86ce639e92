"""What a header says of a model: its hyper-parameters, checked, and the state that each layer keeps.

The rules are those of llama.cpp's loader (llama-hparams.cpp, load_hparams in llama-model.cpp and
models/*.cpp of the pinned version), for every architecture it knows. What the metadata leave open, the
tensor table tells: a layer is recurrent if it has the tensors of a recurrent layer.
Not here: reading the file (header.py), values that are refused (deadly.py), memory (estimate.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from drivers.llamacpp import deadly
from drivers.llamacpp.header import GGML_TYPES, Header, Skipped
from drivers.llamacpp.keys import MAX_LAYERS, Keys
from kernel.device import ModelInfo
from kernel.errors import ModelInvalid

_RECURRENT: Final = ("ssm_", "time_mix_", "shortconv.")  # tensors that only a recurrent layer has
_EVERY_LAYER_BOTH: Final = frozenset({"falcon-h1"})  # attention and recurrence in one layer


class _Sliding(NamedTuple):
    """How an architecture's layers slide: all but the last (or first) of each `period` of them."""

    period: int = 0  # 0: the file lists the layers
    dense_first: bool = False
    tokens: int = 0  # the window, if the file does not tell


_SLIDING: Final[Mapping[str, _Sliding]] = {  # the rest have full attention in every layer
    "afmoe": _Sliding(4),
    "cohere2": _Sliding(4),
    "cohere2moe": _Sliding(4, dense_first=True),
    "deepseek4": _Sliding(1),
    "dflash": _Sliding(),
    "dots3note": _Sliding(),
    "exaone-moe": _Sliding(4, tokens=128),
    "exaone4": _Sliding(4),
    "gemma2": _Sliding(2, tokens=4096),
    "gemma3": _Sliding(6),
    "gemma3n": _Sliding(5),
    "gemma4": _Sliding(),
    "gpt-oss": _Sliding(2),
    "granite_swa": _Sliding(),
    "laguna": _Sliding(4, dense_first=True),
    "lfm2": _Sliding(1),
    "llama4": _Sliding(4, tokens=8192),
    "maple": _Sliding(),
    "mellum": _Sliding(4),
    "mimo2": _Sliding(),
    "muse-glimmer": _Sliding(4),
    "olmo2": _Sliding(4),
    "plamo3": _Sliding(8),
    "smallthinker": _Sliding(4, dense_first=True),
    "spark2_5": _Sliding(),
    "step35": _Sliding(),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps; 0 where it has none of it."""

    heads: int  # of attention
    key_width: int  # cached numbers per token
    value_width: int
    state_width: int  # 32-bit numbers per sequence, whatever its length
    slides: bool = False  # sees the last `Shape.sliding_tokens` only


@dataclass(frozen=True, slots=True)
class Shape:
    """The hyper-parameters that memory depends on."""

    architecture: str
    width: int
    context_tokens: int
    vocabulary: int
    sliding_tokens: int  # 0: no layer slides
    experts_used: int
    layers: tuple[Layer, ...]  # that compute; not those that only draft tokens

    @property
    def kv_bytes_per_token(self) -> int:
        """At 16-bit keys and values."""
        return 2 * sum(layer.key_width + layer.value_width for layer in self.layers)


def shape(header: Header) -> Shape:
    """Read and check the hyper-parameters. Raises ModelInvalid for what the native loader would die of."""
    keys = Keys(header)
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelInvalid(f"{header.path}: holds a {str(kind)[:40]!r}, not a model")
    count = keys.whole("block_count", 1, MAX_LAYERS, default=-1)
    width = keys.whole("embedding_length", 1, 1 << 20, default=-1)
    context = keys.whole("context_length", 1, 1 << 30, default=-1)
    if -1 in (count, width, context):
        raise ModelInvalid(f"{header.path}: block_count, embedding_length or context_length is missing")
    experts = deadly.check(header, keys, count)
    trunk = count - keys.whole("nextn_predict_layers", 0, count - 1)
    sliding_tokens, slides = _sliding(keys, count)
    layers = _layers(header, keys, width, count, slides)[:trunk]
    attends, recurs = any(layer.key_width for layer in layers), any(layer.state_width for layer in layers)
    deadly.check_kinds(keys.architecture, attends, recurs)
    vocabulary = _vocabulary(header)
    return Shape(keys.architecture, width, context, vocabulary, sliding_tokens, experts, layers)


def _sliding(keys: Keys, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The tokens that sliding layers see, and which layers slide."""
    architecture = keys.architecture
    rule = _SLIDING.get(architecture)
    tokens = keys.whole("attention.sliding_window", 0, 1 << 30, default=rule.tokens if rule else 0)
    if rule is None or not tokens or (architecture == "exaone4" and layers != 64):
        return 0, (False,) * layers
    if architecture in ("llama4", "smallthinker"):
        tokens = rule.tokens or 4096  # whatever the file says
    listed = keys.flags("attention.sliding_window_pattern", layers)
    if listed is not None:
        return tokens, listed
    period = keys.whole("attention.sliding_window_pattern", 0, MAX_LAYERS, default=rule.period)
    full = 0 if rule.dense_first else period - 1
    return tokens, tuple(period < 2 or layer % period != full for layer in range(layers))


def _layers(
    header: Header, keys: Keys, width: int, count: int, slides: tuple[bool, ...]
) -> tuple[Layer, ...]:
    heads = keys.per_layer("attention.head_count", count, 1 << 16, default=0)
    kv_heads = heads
    if "attention.head_count_kv" in keys:
        kv_heads = keys.per_layer("attention.head_count_kv", count, 1 << 16, default=0)
    recurrent = _recurrent(header)
    cached = _cached_layers(keys, count)
    state = _state_width(keys, width, max(heads)) if recurrent else 0
    key, value = _head_widths(keys, width // heads[0] if heads[0] else 0, "")
    narrow = _head_widths(keys, key, "_swa", value)
    compressed = "attention.key_length_mla" in keys and "attention.value_length_mla" in keys
    indexer = keys.whole("attention.indexer.key_length", 0, 1 << 16)
    layers = []
    for index in range(count):
        attends = index < cached and (index not in recurrent or keys.architecture in _EVERY_LAYER_BOTH)
        own = kv_heads[index] if attends else 0
        wide = narrow if slides[index] else (key, value)
        layers.append(
            Layer(
                heads[index] if attends or index >= cached else 0,
                wide[0] * own + (indexer if own else 0),
                0 if compressed else wide[1] * own,
                state if index in recurrent else 0,
                slides[index],
            )
        )
    return tuple(layers)


def _recurrent(header: Header) -> frozenset[int]:
    """The layers with tensors of a recurrent layer."""
    found = set()
    for tensor in header.tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        if rest.startswith(_RECURRENT) and block.isdecimal():
            found.add(int(block))
    return frozenset(found)


def _cached_layers(keys: Keys, layers: int) -> int:
    """Layers from here on take the keys and values of earlier ones."""
    if keys.architecture == "gemma3n":
        return min(layers, 20)
    shared = keys.whole("attention.shared_kv_layers", 0, layers) if keys.architecture == "gemma4" else 0
    return layers - shared


def _head_widths(keys: Keys, default_key: int, suffix: str, default_value: int = -1) -> tuple[int, int]:
    key = keys.whole("attention.key_length" + suffix, 1, 1 << 16, default_key)
    default = default_key if default_value < 0 else default_value
    return key, keys.whole("attention.value_length" + suffix, 1, 1 << 16, default)


def _state_width(keys: Keys, width: int, heads: int) -> int:
    """Numbers that a recurrent layer keeps of a sequence: convolution and state."""
    limit = 1 << 24
    conv = max(0, keys.whole("ssm.conv_kernel", 0, 1 << 10) - 1)
    if head := keys.whole("wkv.head_size", 0, limit):
        return width * (keys.whole("token_shift_count", 0, 16, default=2) + head)
    if kernel := keys.whole("shortconv.l_cache", 0, 1 << 10):
        return width * (kernel - 1)
    if head := keys.whole("kda.head_dim", 0, limit):
        return heads * head * (3 * (conv or 3) + head)
    inner, state = keys.whole("ssm.inner_size", 0, limit), keys.whole("ssm.state_size", 0, limit)
    return conv * (inner + 2 * keys.whole("ssm.group_count", 0, limit) * state) + inner * state


def _vocabulary(header: Header) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Skipped) and tokens.is_text and tokens.items:
        return tokens.items
    if isinstance(tokens, tuple) and tokens and isinstance(tokens[0], str):
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
