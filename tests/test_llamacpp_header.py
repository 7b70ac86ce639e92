"""Reading GGUF headers: right values from good files, one clear error from bad ones, nothing else."""

import os
import random
from pathlib import Path
from struct import pack

import pytest
import zoo
from ggufs import NANO, write

from drivers.llamacpp import header, layout
from drivers.llamacpp.driver import LlamaCppDriver
from drivers.llamacpp.writer import Recipe
from kernel.device import EngineOptions
from kernel.errors import ModelInvalid, ModelNotFound


def inspect(path: Path, blob: bytes) -> None:
    """Write and read a file; it may be refused, and nothing else may happen."""
    path.write_bytes(blob)
    try:
        LlamaCppDriver().inspect(path)
    except ModelInvalid as refusal:
        assert refusal.message and "\n" not in refusal.message
        assert len(refusal.message) < 500


def test_good_header(tmp_path: Path) -> None:
    path = write(tmp_path, Recipe(width=96, layers=3, heads=6, kv_heads=2, vocabulary=300, dtype="F16"))
    model = LlamaCppDriver().inspect(path)
    assert (model.format, model.architecture, model.quantization) == ("gguf", "llama", "F16")
    assert model.kv_bytes_per_token == 3 * 2 * (16 + 16) * 2
    assert model.file_bytes == path.stat().st_size
    assert model.parameters == 2 * 300 * 96 + 96 + 3 * (2 * 96 + 2 * 96 * 96 + 2 * 32 * 96 + 3 * 96 * 160)


def test_vocabulary_is_stepped_over_unless_asked() -> None:
    skipped = header.read(NANO).metadata["tokenizer.ggml.tokens"]
    assert isinstance(skipped, header.Skipped) and skipped.items == 1024
    tokens = header.read(NANO, frozenset({"tokenizer.ggml.tokens"})).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple) and tokens[:4] == ("<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>")


def test_windows_of_the_file_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, Recipe(vocabulary=3000))
    whole = header.read(path)
    for window in (16, 61, 1000):
        monkeypatch.setattr(header, "WINDOW_BYTES", window)
        assert header.read(path) == whole


def test_options_decide_the_layout() -> None:
    head = header.read(NANO)
    chosen = layout.decide(head, EngineOptions(), free_bytes=1 << 40, cores=8)
    assert chosen == layout.Layout(window_tokens=512, seats=64, threads=1, kv_tokens=64 * 512)
    seat_bytes = 512 * 2048
    assert layout.decide(head, EngineOptions(), free_bytes=4 * 3 * seat_bytes, cores=8).seats == 3
    assert layout.decide(head, EngineOptions(), free_bytes=0, cores=8).seats == 1
    assert layout.decide(head, EngineOptions(300, 2, 5), 1 << 40, 8) == layout.Layout(512, 2, 5)


def test_a_long_window_does_not_take_memory_for_many_long_sequences(tmp_path: Path) -> None:
    long = header.read(write(tmp_path, Recipe(context_tokens=131_072)))
    kv_bytes = layout.DEFAULT_KV_TOKENS * 2 * 2 * (16 + 16) * 2
    plenty, tight = 100 * kv_bytes, 4 * kv_bytes
    assert layout.decide(long, EngineOptions(), plenty, 2) == layout.Layout(131_072, 64, 1, 131_072)
    assert layout.decide(long, EngineOptions(32_768), plenty, 2) == layout.Layout(32_768, 64, 1, 65_536)
    assert layout.decide(long, EngineOptions(), tight, 2) == layout.Layout(65_536, 64, 1, 65_536)
    assert layout.decide(long, EngineOptions(), 0, 2) == layout.Layout(4096, 4, 1, 4096)
    assert layout.decide(long, EngineOptions(8192, 8), 0, 2) == layout.Layout(8192, 8, 1)  # as was asked for
    for options in (EngineOptions(), EngineOptions(32_768), EngineOptions(8192, 8)):
        decided = layout.decide(long, options, plenty, 2)
        assert layout.decide(long, decided.options, tight, 2) == decided  # the worker decides the same


@pytest.mark.parametrize(("architecture", "movable"), [("qwen3", True), ("gemma3", False), ("mamba", False)])
def test_where_kv_cannot_be_moved_all_seats_are_alike(
    tmp_path: Path, architecture: str, movable: bool
) -> None:
    head = header.read(zoo.write(tmp_path, architecture, zoo.Size(context_tokens=32_768)))
    decided = layout.decide(head, EngineOptions(), 1 << 40, 2)
    alike, shared = layout.Layout(4096, 16, 1), layout.Layout(32_768, 64, 1, 65_536)
    assert decided == (shared if movable else alike)


def test_truncated_anywhere(tmp_path: Path) -> None:
    blob = NANO.read_bytes()
    for size in [*range(0, 200, 7), 1000, 20_000, 40_000, len(blob) // 2, len(blob) - 1]:
        (tmp_path / "cut.gguf").write_bytes(blob[:size])
        with pytest.raises(ModelInvalid):
            LlamaCppDriver().inspect(tmp_path / "cut.gguf")


@pytest.mark.parametrize("seed", range(8))
def test_mutated_headers_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    blob = NANO.read_bytes()
    header_bytes = header.read(NANO).data_offset
    extremes = [b"\xff" * 8, b"\0" * 8, pack("<Q", 1 << 63), pack("<Q", 1 << 31), pack("<Q", 1 << 16)]
    for _ in range(60):
        bad = bytearray(blob)
        for _ in range(source.choice((1, 1, 3, 20))):
            at = source.randrange(header_bytes if source.random() < 0.5 else 1500)
            patch = source.choice([*extremes, source.randbytes(1), source.randbytes(4)])
            bad[at : at + len(patch)] = patch
        inspect(tmp_path / "bad.gguf", bytes(bad[: len(blob)]))


def test_random_bytes(tmp_path: Path) -> None:
    source = random.Random(1)
    for size in (0, 3, 4, 23, 24, 25, 1000, 100_000):
        for start in (b"", b"GGUF", b"GGUF" + pack("<IQQ", 3, 5, 5)):
            inspect(tmp_path / "noise.gguf", start + source.randbytes(size))


def replaced(tmp_path: Path, key: bytes, value: bytes) -> Path:
    """The shipped model with the value after a metadata key (and its type) overwritten."""
    blob = bytearray(NANO.read_bytes())
    at = blob.index(pack("<Q", len(key)) + key) + 8 + len(key) + 4
    blob[at : at + len(value)] = value
    (tmp_path / "edited.gguf").write_bytes(blob)
    return tmp_path / "edited.gguf"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [  # what the native loader dies of, or what lies about memory
        (b"llama.block_count", pack("<I", 0), "block_count"),
        (b"llama.block_count", pack("<I", 513), "block_count"),
        (b"llama.attention.layer_norm_rms_epsilon", pack("<f", float("nan")), "epsilon"),
        (b"llama.attention.layer_norm_rms_epsilon", pack("<f", -1), "epsilon"),
        (b"llama.context_length", pack("<I", 0), "context_length"),
        (b"llama.attention.head_count_kv", pack("<I", 1 << 30), "head_count_kv"),
    ],
)
def test_deadly_values_are_refused(tmp_path: Path, key: bytes, value: bytes, reason: str) -> None:
    with pytest.raises(ModelInvalid, match=reason):
        LlamaCppDriver().inspect(replaced(tmp_path, key, value))


def test_things_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        header.read(tmp_path / "absent.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")  # opening one for reading would wait for ever
    for path in (tmp_path / "pipe.gguf", tmp_path, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(ModelInvalid):
            header.read(path)
