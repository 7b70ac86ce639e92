"""Writes small GGUF models with random weights: llama architecture, byte-level vocabulary.

For tests and benchmarks, which need models of a given size with nothing to download. Equal
arguments give equal bytes.
Not here: real models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import BinaryIO, Final, Literal

import numpy as np
import numpy.typing as npt

CHATML: Final = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS: Final = ("<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>")
ALIGNMENT: Final = 32

DType = Literal["F32", "F16", "Q8_0"]
Floats = npt.NDArray[np.float32]
_TYPES: Final[dict[DType, int]] = {"F32": 0, "F16": 1, "Q8_0": 8}
_FILE_TYPES: Final[dict[DType, int]] = {"F32": 0, "F16": 1, "Q8_0": 7}
_Meta = str | int | float | bool | Sequence[str] | Sequence[int]


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
    tensors = list(_tensors(recipe))
    metadata = _metadata(recipe)
    with path.open("wb") as out:
        out.write(b"GGUF" + pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            out.write(_text(key) + _value(value))
        _write_table(out, tensors, recipe.dtype)
        source = np.random.default_rng(recipe.seed)
        for _, dims, scale in tensors:
            _pad(out)
            out.write(_weights(source, dims, scale, recipe.dtype))
        _pad(out)


def _vocabulary(recipe: Recipe) -> tuple[list[str], list[int]]:
    """Tokens and their types: specials (3, control), bytes, the one merge, then words nothing encodes to."""
    symbols = byte_symbols()
    tokens = [*SPECIALS, *symbols, symbols[0] * 2]
    if recipe.vocabulary < len(tokens):
        raise ValueError(f"a vocabulary has at least {len(tokens)} tokens")
    tokens += [f"~{number}" for number in range(recipe.vocabulary - len(tokens))]
    return tokens, [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))


def _metadata(recipe: Recipe) -> dict[str, _Meta]:
    tokens, types = _vocabulary(recipe)
    metadata: dict[str, _Meta] = {
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
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{tokens[4]} {tokens[4]}"],  # an empty list does not load
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": recipe.add_bos,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if recipe.chat_template:
        metadata["tokenizer.chat_template"] = recipe.chat_template
    return metadata


def _tensors(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, dimensions (outermost first), standard deviation; 0 marks a norm, which is all ones."""
    width, ffn, kv_width = recipe.width, recipe.ffn, recipe.kv_heads * recipe.head_width
    yield "token_embd.weight", (recipe.vocabulary, width), 1.0
    for layer in range(recipe.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (width,), 0.0
        yield block + "attn_q.weight", (width, width), width**-0.5
        yield block + "attn_k.weight", (kv_width, width), width**-0.5
        yield block + "attn_v.weight", (kv_width, width), width**-0.5
        yield block + "attn_output.weight", (width, width), width**-0.5
        yield block + "ffn_norm.weight", (width,), 0.0
        yield block + "ffn_gate.weight", (ffn, width), width**-0.5
        yield block + "ffn_up.weight", (ffn, width), width**-0.5
        yield block + "ffn_down.weight", (width, ffn), ffn**-0.5
    yield "output_norm.weight", (width,), 0.0
    yield "output.weight", (recipe.vocabulary, width), 3 * width**-0.5


def _write_table(out: BinaryIO, tensors: list[tuple[str, tuple[int, ...], float]], dtype: DType) -> None:
    offset = 0
    for name, dims, scale in tensors:
        kind: DType = dtype if scale else "F32"
        out.write(_text(name) + pack("<I", len(dims)) + pack(f"<{len(dims)}Q", *reversed(dims)))
        out.write(pack("<IQ", _TYPES[kind], offset))
        weights = int(np.prod(dims))
        size = {"F32": weights * 4, "F16": weights * 2, "Q8_0": weights // 32 * 34}[kind]
        offset += -(-size // ALIGNMENT) * ALIGNMENT


def _weights(source: np.random.Generator, dims: tuple[int, ...], scale: float, dtype: DType) -> bytes:
    if not scale:
        return np.ones(dims, np.float32).tobytes()
    weights = source.standard_normal(dims, np.float32) * np.float32(scale)
    if dtype == "F32":
        return weights.tobytes()
    return weights.astype(np.float16).tobytes() if dtype == "F16" else _q8_0(weights)


def _q8_0(weights: Floats) -> bytes:
    """Blocks of 32: a 16-bit scale, then 32 signed bytes."""
    blocks = weights.reshape(-1, 32)
    steps = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    packed = np.empty(len(blocks), np.dtype([("step", "<f2"), ("weights", "i1", 32)]))
    packed["step"] = steps[:, 0]
    packed["weights"] = np.rint(blocks / np.where(steps == 0, 1, steps))
    return packed.tobytes()


def _pad(out: BinaryIO) -> None:
    out.write(b"\0" * (-out.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode()
    return pack("<Q", len(raw)) + raw


def _value(value: _Meta) -> bytes:
    if isinstance(value, bool):
        return pack("<I?", 7, value)
    if isinstance(value, int):
        return pack("<II", 4, value)
    if isinstance(value, float):
        return pack("<If", 6, value)
    if isinstance(value, str):
        return pack("<I", 8) + _text(value)
    if isinstance(value[0], int):
        return pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return pack("<IIQ", 9, 8, len(value)) + b"".join(_text(str(item)) for item in value)
