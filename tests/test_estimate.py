"""What a model will take, told from its header: against what llama.cpp takes, for many architectures."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from struct import pack

import pytest
import zoo
from ggufs import NANO, open_quietly, solo
from zoo import Size

from drivers.llamacpp import confirm, header, parts
from drivers.llamacpp.driver import LlamaCppDriver
from drivers.llamacpp.estimate import ALL_LAYERS, Setup, by_device
from drivers.llamacpp.shape import shape
from kernel.device import DeviceInfo, EngineOptions, Prompt
from kernel.errors import ModelInvalid

NEAR = 0.05  # of the total
OPTIONS = EngineOptions(context_tokens=1024, sequences=4, threads=1)
CPU = DeviceInfo("cpu", "cpu", "", 1 << 40)


def total(path: Path, setup: Setup) -> int:
    host, gpu = by_device(header.read(path), setup)
    return host.total_bytes + gpu.total_bytes


def measured(path: Path, setup: Setup) -> int:
    return sum(confirm.measure(str(path), setup).values())


@pytest.mark.parametrize("kind", zoo.KEEPERS)
def test_estimate_is_near_what_an_engine_takes_and_the_engine_runs(tmp_path: Path, kind: str) -> None:
    path, driver = zoo.write(tmp_path, kind), LlamaCppDriver()
    expected = driver.estimate(driver.inspect(path), OPTIONS, CPU)
    engine = open_quietly(path, OPTIONS)
    try:
        info = engine.info
        taken = info.weights_bytes + info.kv_bytes + info.compute_bytes
        assert expected.total_bytes == pytest.approx(taken, rel=NEAR)
        assert expected.weights_bytes == pytest.approx(info.weights_bytes, rel=0.001)
        assert expected.kv_bytes == pytest.approx(info.kv_bytes, rel=0.01, abs=20_000)  # told in MiB to 0.01
        tokens, _, finish = solo(engine, Prompt("hello", max_tokens=4))
        assert len(tokens) == 4 and finish == "length"
    finally:
        engine.shutdown()


SETUPS = {
    "a long window": (Size(width=128, heads=8, layers=6), Setup(8192, 2, 128)),
    "wide layers": (Size(width=128, ffn=1024), Setup(256, 1, 512)),
    "many seats, many tokens": (Size(width=64, vocabulary=8_000, layers=2), Setup(256, 16, 128)),
    "short sliding windows": (Size(layers=6), Setup(2048, 2, 128, full_windows=False)),
    "8-bit keys and values": (
        Size(width=128, ffn=512, heads=2, kv_heads=1),
        Setup(4096, 2, 256, key_type="Q8_0", value_type="Q8_0", flash=True),
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_estimate_is_near_in_other_setups(tmp_path: Path, name: str) -> None:
    size, setup = SETUPS[name]
    far = {}
    for kind in zoo.KEEPERS:
        if kind == "deepseek2" and setup.flash:
            continue  # its rows of keys are no multiple of a block of 8-bit numbers
        path = zoo.write(tmp_path, kind, size)
        error = total(path, setup) / measured(path, setup) - 1
        if abs(error) > NEAR:
            far[kind] = f"{error:+.1%}"
    assert far == {}


def test_repacked_weights_count_twice(tmp_path: Path) -> None:
    path = zoo.write(tmp_path, "mixtral", dtype="Q4_0")
    driver = LlamaCppDriver()
    expected = driver.estimate(driver.inspect(path), OPTIONS, CPU)
    engine = open_quietly(path, OPTIONS)
    assert expected.weights_bytes == pytest.approx(engine.info.weights_bytes, abs=10_000)
    assert expected.weights_bytes > 1.9 * header.read(path).weights_bytes
    engine.shutdown()


def test_heads_of_their_own_size(tmp_path: Path) -> None:
    form = shape(header.read(zoo.write(tmp_path, "qwen3", Size(width=64, heads=4, kv_heads=2, head=48))))
    assert form.kv_bytes_per_token == 4 * 2 * (48 + 48) * 2  # layers, heads, key and value, 16 bits


def test_heads_by_layer_and_state_by_layer(tmp_path: Path) -> None:
    form = shape(header.read(zoo.write(tmp_path, "jamba")))
    assert [layer.key_width for layer in form.layers] == [0, 32, 0, 32]
    assert [layer.state_width for layer in form.layers] == [128 * (16 + 3), 0, 128 * (16 + 3), 0]


def test_compressed_keys_are_values_too(tmp_path: Path) -> None:
    form = shape(header.read(zoo.write(tmp_path, "deepseek2")))
    assert {(layer.key_width, layer.value_width) for layer in form.layers} == {(32 + 16, 0)}


def test_a_sliding_layer_keeps_its_window_and_a_pass(tmp_path: Path) -> None:
    path = zoo.write(tmp_path, "gemma2", Size(sliding_tokens=300, layers=4, kv_heads=2, head=32))
    setup = Setup(4096, 3, 128, full_windows=False)
    token_bytes = 2 * 2 * 32 * 2  # key and value, heads, width, 16 bits
    host, _ = by_device(header.read(path), setup)
    assert host.kv_bytes == 3 * 2 * (4096 + 512) * token_bytes  # 300 + 128 tokens, in steps of 256
    whole, _ = by_device(header.read(path), replace(setup, full_windows=True))
    assert whole.kv_bytes == 3 * 4 * 4096 * token_bytes


def test_layers_go_to_the_gpu_from_the_last_one_on(tmp_path: Path) -> None:
    head = header.read(zoo.write(tmp_path, "llama", Size(layers=6)))
    whole, none = by_device(head, Setup(1024, 4, 128))
    assert none.total_bytes == 0
    layer = sum(tensor.size_bytes for tensor in head.tensors if tensor.name.startswith("blk.0."))
    output = sum(tensor.size_bytes for tensor in head.tensors if tensor.name.startswith("output"))
    for layers in range(8):
        host, gpu = by_device(head, Setup(1024, 4, 128, gpu_layers=layers))
        on_gpu = max(0, layers - 1)
        assert gpu.kv_bytes == whole.kv_bytes // 6 * on_gpu
        assert gpu.weights_bytes == layer * on_gpu + output * (layers > 0)
        assert host.weights_bytes + gpu.weights_bytes == whole.weights_bytes
        assert host.kv_bytes + gpu.kv_bytes == whole.kv_bytes
    host, gpu = by_device(head, Setup(1024, 4, 128, gpu_layers=ALL_LAYERS))
    assert host.kv_bytes == 0 and host.weights_bytes == head.tensors[0].size_bytes  # the embeddings


def test_the_dry_run_says_what_an_engine_takes() -> None:
    driver = LlamaCppDriver()
    said = driver.confirm(driver.inspect(NANO), OPTIONS, CPU)
    engine = open_quietly(NANO, OPTIONS)
    info = engine.info
    assert said.weights_bytes == info.weights_bytes
    assert said.kv_bytes == info.kv_bytes
    assert said.compute_bytes == pytest.approx(info.compute_bytes, abs=20_000)  # told in MiB to 0.01
    engine.shutdown()


def test_what_llama_cpp_refuses_and_what_it_dies_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = bytearray(NANO.read_bytes())
    at = blob.index(b"token_embd.weight")
    blob[at : at + 5] = b"tokex"  # all is well with the header, but for a tensor's name
    (tmp_path / "bad.gguf").write_bytes(blob)
    head, setup = header.read(tmp_path / "bad.gguf"), Setup(512, 1, 128)
    with pytest.raises(ModelInvalid, match=r"refuses it.*token_embd"):
        confirm.confirm(head, setup, {})
    dies = "import os, signal, sys; print('GGML_ASSERT(x) failed', file=sys.stderr, flush=True); os.abort()"
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _c, **how: run([sys.executable, "-c", dies], **how))
    with pytest.raises(ModelInvalid, match=r"dies of it \(SIGABRT\): GGML_ASSERT"):
        confirm.confirm(head, setup, {})


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    return list(zoo.write_split(tmp_path, "qwen3", 3))


def test_a_split_model_is_its_parts_together(tmp_path: Path, split: list[Path]) -> None:
    whole, driver = zoo.write(tmp_path, "qwen3"), LlamaCppDriver()
    one, three = driver.inspect(whole), driver.inspect(split[0])
    assert (three.parameters, three.kv_bytes_per_token) == (one.parameters, one.kv_bytes_per_token)
    assert three.file_bytes == sum(path.stat().st_size for path in split)
    assert driver.estimate(three, OPTIONS, CPU) == driver.estimate(one, OPTIONS, CPU)
    engine, engine_of_parts = open_quietly(whole, OPTIONS), open_quietly(split[0], OPTIONS)
    prompt = Prompt("hello", max_tokens=8)
    assert solo(engine, prompt) == solo(engine_of_parts, prompt)
    assert engine_of_parts.info.weights_bytes == engine.info.weights_bytes
    engine.shutdown()
    engine_of_parts.shutdown()


def test_a_part_is_missing(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(ModelInvalid, match=r"part 2 of 3 is missing: qwen3-00002-of-00003\.gguf"):
        LlamaCppDriver().inspect(split[0])


def test_a_part_is_cut_off(split: list[Path]) -> None:
    split[2].write_bytes(split[2].read_bytes()[:-5000])
    with pytest.raises(ModelInvalid, match=r"00003-of-00003.*truncated"):
        LlamaCppDriver().inspect(split[0])


def test_a_later_part_is_no_model(split: list[Path]) -> None:
    with pytest.raises(ModelInvalid, match="part 2 of a model in 3 files"):
        LlamaCppDriver().inspect(split[1])


def test_the_first_part_under_another_name(tmp_path: Path, split: list[Path]) -> None:
    split[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelInvalid, match="part 1 of a model in 3 files") as refusal:
        LlamaCppDriver().inspect(tmp_path / "model.gguf")
    assert "NAME-00001-of-00003.gguf" in refusal.value.hint


def test_parts_of_another_model(split: list[Path]) -> None:
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(ModelInvalid, match="not part 2 of a model"):
        LlamaCppDriver().inspect(split[0])
    split[1].write_bytes(split[0].read_bytes().replace(pack("<IH", 2, 0), pack("<IH", 2, 1), 1))
    with pytest.raises(ModelInvalid, match=r"do not hold \d+ different tensors"):
        parts.read(split[0])
