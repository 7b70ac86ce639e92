"""Damaged and made-up headers: each is refused in one line, or reads to sizes that fit the file.

The short form changes thousands of headers in pure Python. The soak really loads what was accepted, each
in a child process, and none may die of it.
"""

import contextlib
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import pack

import pytest
import zoo
from zoo import Size

from drivers.llamacpp import deadly, header
from drivers.llamacpp.driver import LlamaCppDriver
from drivers.llamacpp.header import Header
from drivers.llamacpp.writer import write_model
from kernel.device import EngineOptions
from kernel.errors import ModelInvalid

SMALL = Size(width=32, layers=2, heads=2, kv_heads=1, head=16, ffn=64, context_tokens=256)
OPTIONS = EngineOptions(256, 1, 1)
WHOLE = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    1 << 15,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 63,
    (1 << 64) - 1,
)
EXTREMES = [pack("<Q", each) for each in WHOLE] + [
    pack("<f", each) for each in (float("nan"), -1.0, float("inf"))
]
PROBE = Path(__file__).with_name("load_probe.py")


@dataclass
class Specimen:
    """A good file, changed in place and put back: only its header is ever written."""

    path: Path
    head: bytes
    fields: list[tuple[int, int]]  # where the reader takes how many bytes

    def change(self, source: random.Random) -> None:
        """One to four fields, or bytes anywhere."""
        bad = bytearray(self.head)
        for _ in range(source.choice((1, 1, 1, 2, 4))):
            if source.random() < 0.7:
                at, size = source.choice(self.fields)
                extreme = source.choice(EXTREMES)[: min(size, 8)]
                patch = extreme if source.random() < 0.7 else source.randbytes(min(size, 4))
            else:
                at = source.randrange(len(bad))
                patch = source.choice((source.randbytes(1), source.randbytes(4), b"\0", b"\xff", b"\x80"))
            bad[at : at + len(patch)] = patch
        self.write(bytes(bad[: len(self.head)]))

    def write(self, head: bytes) -> None:
        with self.path.open("r+b") as file:
            file.write(head)


def specimens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Specimen]:
    found = []
    take = header._Reader.take
    fields: list[tuple[int, int]] = []

    def listening(reader: header._Reader, size: int) -> bytes:
        fields.append((reader.at, size))
        return take(reader, size)

    for kind in zoo.KEEPERS:
        path = zoo.write(folder, kind, SMALL)
        fields.clear()
        with monkeypatch.context() as patch:
            patch.setattr(header._Reader, "take", listening)
            end = header.read(path).data_offset
        found.append(Specimen(path, path.read_bytes()[:end], [field for field in fields if field[1]]))
    return found


def accepted(path: Path) -> Header | None:
    """Read it; it may be refused, and nothing else may happen."""
    driver = LlamaCppDriver()
    try:
        model = driver.inspect(path)
        expected = driver.estimate(model, OPTIONS, driver.devices()[-1])
        head = header.read(path)
        deadly.check_vocabulary(head)
    except ModelInvalid as refusal:
        assert refusal.exit_code == 126
        assert refusal.message and "\n" not in refusal.message and len(refusal.message) < 500
        return None
    room_bytes = head.file_bytes - head.data_offset
    assert all(0 <= each.offset <= each.offset + each.size_bytes <= room_bytes for each in head.tensors)
    assert 0 < expected.weights_bytes <= 2 * sum(each.size_bytes for each in head.tensors)
    return head


@pytest.mark.parametrize("seed", range(6))
def test_changed_headers_are_refused_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    source, kinds = random.Random(seed), specimens(tmp_path, monkeypatch)
    verdicts = Counter[bool]()
    for _ in range(1000):
        specimen = source.choice(kinds)
        specimen.change(source)
        verdicts[accepted(specimen.path) is not None] += 1
    assert min(verdicts[True], verdicts[False]) > 50  # else the changes are too wild, or too mild
    for specimen in kinds:
        specimen.write(specimen.head)
        assert accepted(specimen.path) is not None


def test_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for specimen in specimens(tmp_path, monkeypatch):
        sizes = sorted({at for at, _ in specimen.fields[::7]}, reverse=True)
        for size in sizes:
            os.truncate(specimen.path, size)
            assert accepted(specimen.path) is None


def _claims() -> Iterator[tuple[str, bytes]]:
    """Headers that promise far more than there is, or than anybody needs."""
    text = lambda raw: pack("<Q", len(raw)) + raw  # noqa: E731
    start = lambda tensors, entries: b"GGUF" + pack("<IQQ", 3, tensors, entries)  # noqa: E731
    yield "entries", start(0, (1 << 63) - 1)
    yield "tensors", start(1 << 62, 0)
    yield "a key", start(0, 1) + pack("<Q", 1 << 33)
    yield "a text", start(0, 1) + text(b"k") + pack("<IQ", 8, 1 << 33)
    yield "strings", start(0, 1) + text(b"k") + pack("<IIQ", 9, 8, 1 << 32)
    yield "kept strings", start(0, 1) + text(b"tokenizer.ggml.tokens") + pack("<IIQ", 9, 8, 1 << 32)
    yield "numbers", start(0, 2) + text(b"k") + pack("<IIQ", 9, 0, 1 << 32)
    yield "arrays in arrays", start(0, 1) + text(b"k") + pack("<IIQ", 9, 9, 1 << 32)
    yield "dimensions", start(1, 0) + text(b"t") + pack("<I4QIQ", 4, *[1 << 32] * 4, 0, 0)
    yield "empty keys", start(0, 1 << 16)
    yield "tensors without names", start(1 << 16, 0)


@pytest.mark.parametrize("what", dict(_claims()))
def test_what_a_header_claims_costs_nothing(tmp_path: Path, what: str) -> None:
    """In a file that has room for it: 64 GiB, all of it a hole."""
    path = tmp_path / "giant.gguf"
    path.write_bytes(dict(_claims())[what])
    os.truncate(path, 1 << 36)
    tracemalloc.start()
    try:
        for strings in (frozenset[str](), frozenset({"tokenizer.ggml.tokens"})):
            with contextlib.suppress(ModelInvalid):
                header.read(path, strings)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def changed(path: Path, key: bytes, value: bytes) -> Path:
    """The file with the value after a metadata key (and its type) overwritten."""
    blob = bytearray(path.read_bytes())
    at = blob.index(pack("<Q", len(key)) + key) + 8 + len(key) + 4
    blob[at : at + len(value)] = value
    path.write_bytes(blob)
    return path


@pytest.mark.parametrize(
    ("kind", "key", "value", "reason"),
    [  # each was found by loading changed files: llama.cpp aborts
        ("phi3", b"phi3.rope.dimension_count", pack("<I", 1 << 31), "rope.dimension_count"),
        ("falcon-h1", b"falcon-h1.rope.dimension_count", pack("<I", 33), "rope.dimension_count"),
        ("falcon-h1", b"falcon-h1.rope.dimension_count", pack("<I", 0), "rope.dimension_count"),  # hangs
        ("gemma2", b"gemma2.rope.dimension_count", pack("<I", 1), "rope.dimension_count"),
        ("qwen3", b"qwen3.rope.dimension_count", pack("<I", 2), "rope.dimension_count"),
        ("qwen3", b"qwen3.attention.value_length", pack("<I", 64), "values of 64"),
        ("deepseek2", b"deepseek2.rope.dimension_count", pack("<I", 48), "rope.dimension_count"),
        ("deepseek2", b"deepseek2.attention.key_length", pack("<I", 1), "rope.dimension_count|key_length"),
        ("deepseek2", b"deepseek2.attention.head_count_kv", pack("<I", 4), "key_length"),
        ("jamba", b"jamba.ssm.inner_size", pack("<I", 0), "inner_size"),
        ("granitehybrid", b"granitehybrid.embedding_length", pack("<I", 1), "inner_size"),
        ("qwen3next", b"qwen3next.ssm.inner_size", pack("<I", 64), "inner_size"),
        ("mamba2", b"mamba2.ssm.time_step_rank", pack("<I", 0), "inner_size"),
        ("gpt-oss", b"gpt-oss.attention.value_length", pack("<I", 1), "values of 1"),
        ("mixtral", b"llama.expert_used_count", pack("<I", 5), "experts"),
        ("olmoe", b"olmoe.expert_used_count", pack("<I", 0), "experts"),
        ("llama", b"llama.attention.layer_norm_rms_epsilon", pack("<f", float("inf")), "epsilon"),
    ],
)
def test_what_llama_cpp_would_die_of(
    tmp_path: Path, kind: str, key: bytes, value: bytes, reason: str
) -> None:
    with pytest.raises(ModelInvalid, match=reason):
        LlamaCppDriver().inspect(changed(zoo.write(tmp_path, kind), key, value))


@pytest.mark.parametrize("numbers", [[1, 2, 3], list(range(2000))])
def test_a_vocabulary_of_numbers(tmp_path: Path, numbers: list[int]) -> None:
    metadata, tensors = zoo.model("llama", SMALL)
    write_model(tmp_path / "odd.gguf", {**metadata, "tokenizer.ggml.tokens": numbers}, tensors)
    with pytest.raises(ModelInvalid, match="no vocabulary"):
        LlamaCppDriver().inspect(tmp_path / "odd.gguf")
    with pytest.raises(ModelInvalid, match="no vocabulary"):
        deadly.check_vocabulary(header.read(tmp_path / "odd.gguf"))


@pytest.mark.parametrize(("heads", "reason"), [(0, "no layer has attention"), (2, "no layer is recurrent")])
def test_hybrids_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, reason: str
) -> None:
    monkeypatch.setattr(zoo, "_some_attention", lambda size: [heads] * size.layers)
    with pytest.raises(ModelInvalid, match=reason):
        LlamaCppDriver().inspect(zoo.write(tmp_path, "jamba"))


def test_a_token_that_occurs_twice(tmp_path: Path) -> None:
    path = zoo.write(tmp_path, "llama")
    deadly.check_vocabulary(header.read(path))
    blob = bytearray(path.read_bytes())
    at = blob.index(pack("<Q", 2) + b"~1" + pack("<Q", 2) + b"~2")
    blob[at + 9 : at + 10] = b"2"
    path.write_bytes(blob)
    with pytest.raises(ModelInvalid, match="occur twice"):
        deadly.check_vocabulary(header.read(path))


@pytest.mark.soak
def test_what_is_accepted_never_kills_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 32)
    source, kinds = random.Random(seed), specimens(tmp_path, monkeypatch)
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    probe = subprocess.Popen(
        [sys.executable, PROBE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert probe.stdin and probe.stdout
    deaths = []
    for _ in range(100_000):
        specimen = source.choice(kinds)
        specimen.change(source)
        if accepted(specimen.path) is None:
            continue
        print(specimen.path, file=probe.stdin, flush=True)
        verdict = probe.stdout.readline().strip()
        if verdict not in ("ok", "refused"):
            kept = tmp_path / f"death-{len(deaths)}.gguf"
            kept.write_bytes(specimen.path.read_bytes())
            deaths.append((verdict, kept))
    probe.stdin.close()
    assert probe.wait() == 0
    assert deaths == [], f"seed {seed}"
