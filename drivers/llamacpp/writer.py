"""Writes GGUF models with random weights and a byte-level vocabulary.

For tests and benchmarks, which need models of a given size with nothing to download. Equal
arguments give equal bytes. A `Recipe` is a llama; `write_model` takes any metadata and tensors.
Not here: real models, other architectures (the tests' zoo).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import BinaryIO, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

CHATML: Final = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS: Final = ("<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>")
ALIGNMENT: Final = 32

DType = Literal["F32", "F16", "Q8_0", "Q4_0"]
Floats = npt.NDArray[np.float32]
_TYPES: Final[dict[DType, int]] = {"F32": 0, "F16": 1, "Q8_0": 8, "Q4_0": 2}
_FILE_TYPES: Final[dict[DType, int]] = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_0": 2}
Metadata = dict[str, str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[bool]]


class Draft(NamedTuple):
    """A tensor to be written: dimensions outermost first. `spread` 0: every weight is `fill`, and F32."""

    name: str
    dims: tuple[int, ...]
    spread: float = 0.0  # standard deviation
    fill: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters of a random model. `vocabulary` counts all tokens; at least 261."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 160
    vocabulary: int = 288
    context_tokens: int = 512
    dtype: DType = "Q8_0"
    chat_template: str = CHATML
    add_bos: bool = False
    seed: int = 0

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def write_random(path: Path, recipe: Recipe) -> None:
    """Write the model that `recipe` describes. A 60 M parameter model takes a few seconds."""
    write_model(path, _metadata(recipe), list(_tensors(recipe)), recipe.dtype, recipe.seed)


def write_model(
    path: Path, metadata: Metadata, tensors: Sequence[Draft], dtype: DType = "Q8_0", seed: int = 0
) -> None:
    """Write one file."""
    with path.open("wb") as out:
        _write(out, b"", metadata, tensors, dtype, np.random.default_rng(seed))


def write_parts(
    path: Path, parts: int, metadata: Metadata, tensors: Sequence[Draft], dtype: DType = "Q8_0", seed: int = 0
) -> list[Path]:
    """Write a model as so many files beside `path`, as llama-gguf-split does: the first has all metadata."""
    source = np.random.default_rng(seed)
    each = -(-len(tensors) // parts)
    paths = [path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}.gguf") for part in range(parts)]
    for part, name in enumerate(paths):
        split = _text("split.no") + pack("<IH", 2, part) + _text("split.count") + pack("<IH", 2, parts)
        split += _text("split.tensors.count") + pack("<Ii", 5, len(tensors))
        with name.open("wb") as out:
            own = tensors[part * each : (part + 1) * each]
            _write(out, split, {} if part else metadata, own, dtype, source)
    return paths


def _write(
    out: BinaryIO,
    split: bytes,
    metadata: Metadata,
    tensors: Sequence[Draft],
    dtype: DType,
    source: np.random.Generator,
) -> None:
    """`split`: three metadata entries, written already."""
    out.write(b"GGUF" + pack("<IQQ", 3, len(tensors), len(metadata) + 3 * bool(split)) + split)
    for key, value in metadata.items():
        out.write(_text(key) + _value(value))
    _write_table(out, tensors, dtype)
    for tensor in tensors:
        _pad(out)
        out.write(_weights(source, tensor, dtype))
    _pad(out)


def vocabulary(size: int, add_bos: bool = False) -> Metadata:
    """Specials (control tokens), bytes, the one merge, then words that nothing encodes to."""
    symbols = byte_symbols()
    tokens = [*SPECIALS, *symbols, symbols[0] * 2]
    if size < len(tokens):
        raise ValueError(f"a vocabulary has at least {len(tokens)} tokens")
    tokens += [f"~{number}" for number in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (size - len(SPECIALS)),
        "tokenizer.ggml.merges": [f"{tokens[4]} {tokens[4]}"],  # an empty list does not load
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _metadata(recipe: Recipe) -> Metadata:
    metadata: Metadata = {
        "general.architecture": "llama",
        "general.name": "random",
        "general.file_type": _FILE_TYPES[recipe.dtype],
        "llama.vocab_size": recipe.vocabulary,
        "llama.context_length": recipe.context_tokens,
        "llama.embedding_length": recipe.width,
        "llama.block_count": recipe.layers,
        "llama.feed_forward_length": recipe.ffn,
        "llama.attention.head_count": recipe.heads,
        "llama.attention.head_count_kv": recipe.kv_heads,
        "llama.attention.key_length": recipe.head_width,
        "llama.attention.value_length": recipe.head_width,
        "llama.rope.dimension_count": recipe.head_width,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **vocabulary(recipe.vocabulary, recipe.add_bos),
    }
    if recipe.chat_template:
        metadata["tokenizer.chat_template"] = recipe.chat_template
    return metadata


def _tensors(recipe: Recipe) -> Iterator[Draft]:
    width, ffn, kv_width = recipe.width, recipe.ffn, recipe.kv_heads * recipe.head_width
    yield Draft("token_embd.weight", (recipe.vocabulary, width), 1.0)
    for layer in range(recipe.layers):
        block = f"blk.{layer}."
        yield Draft(block + "attn_norm.weight", (width,))
        yield Draft(block + "attn_q.weight", (width, width), width**-0.5)
        yield Draft(block + "attn_k.weight", (kv_width, width), width**-0.5)
        yield Draft(block + "attn_v.weight", (kv_width, width), width**-0.5)
        yield Draft(block + "attn_output.weight", (width, width), width**-0.5)
        yield Draft(block + "ffn_norm.weight", (width,))
        yield Draft(block + "ffn_gate.weight", (ffn, width), width**-0.5)
        yield Draft(block + "ffn_up.weight", (ffn, width), width**-0.5)
        yield Draft(block + "ffn_down.weight", (width, ffn), ffn**-0.5)
    yield Draft("output_norm.weight", (width,))
    yield Draft("output.weight", (recipe.vocabulary, width), 3 * width**-0.5)


def _type(tensor: Draft, dtype: DType) -> DType:
    """Rows that are no multiple of a block stay F32."""
    blocks = dtype in ("Q8_0", "Q4_0")
    return dtype if tensor.spread and not (blocks and tensor.dims[-1] % 32) else "F32"


def _write_table(out: BinaryIO, tensors: Sequence[Draft], dtype: DType) -> None:
    offset = 0
    for tensor in tensors:
        kind, dims = _type(tensor, dtype), tensor.dims
        out.write(_text(tensor.name) + pack("<I", len(dims)) + pack(f"<{len(dims)}Q", *reversed(dims)))
        out.write(pack("<IQ", _TYPES[kind], offset))
        weights = int(np.prod(dims))
        blocks = weights // 32
        size = {"F32": weights * 4, "F16": weights * 2, "Q8_0": blocks * 34, "Q4_0": blocks * 18}[kind]
        offset += -(-size // ALIGNMENT) * ALIGNMENT


def _weights(source: np.random.Generator, tensor: Draft, dtype: DType) -> bytes:
    if not tensor.spread:
        return np.full(tensor.dims, tensor.fill, np.float32).tobytes()
    weights = source.standard_normal(tensor.dims, np.float32) * np.float32(tensor.spread)
    kind = _type(tensor, dtype)
    if kind == "F32":
        return weights.tobytes()
    if kind == "F16":
        return weights.astype(np.float16).tobytes()
    return _q8_0(weights) if kind == "Q8_0" else _q4_0(weights)


def _q8_0(weights: Floats) -> bytes:
    """Blocks of 32: a 16-bit scale, then 32 signed bytes."""
    blocks = weights.reshape(-1, 32)
    steps = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    packed = np.empty(len(blocks), np.dtype([("step", "<f2"), ("weights", "i1", 32)]))
    packed["step"] = steps[:, 0]
    packed["weights"] = np.rint(blocks / np.where(steps == 0, 1, steps))
    return packed.tobytes()


def _q4_0(weights: Floats) -> bytes:
    """Blocks of 32: a 16-bit scale, then 4 bits each, counted from -8: the first half in the low ones."""
    blocks = weights.reshape(-1, 32)
    steps = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    levels = np.rint(blocks / np.where(steps == 0, 1, steps)).astype(np.uint8) + np.uint8(8)
    packed = np.empty(len(blocks), np.dtype([("step", "<f2"), ("weights", "u1", 16)]))
    packed["step"] = steps[:, 0]
    packed["weights"] = levels[:, :16] | levels[:, 16:] << 4
    return packed.tobytes()


def _pad(out: BinaryIO) -> None:
    out.write(b"\0" * (-out.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode()
    return pack("<Q", len(raw)) + raw


def _value(value: str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[bool]) -> bytes:
    if isinstance(value, bool):
        return pack("<I?", 7, value)
    if isinstance(value, int):
        return pack("<II", 4, value)
    if isinstance(value, float):
        return pack("<If", 6, value)
    if isinstance(value, str):
        return pack("<I", 8) + _text(value)
    if isinstance(value[0], bool):
        return pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
    if isinstance(value[0], int):
        return pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return pack("<IIQ", 9, 8, len(value)) + b"".join(_text(str(item)) for item in value)
