"""GGUF models on an NVIDIA GPU, where this machine and its build of llama.cpp have one.

With LLMOS_TEST_GPU=1 the tests of the engine itself (test_llamacpp*.py) run on the GPU as well (ggufs.py).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ggufs import NANO, write

from drivers.host import HostSensors
from drivers.llamacpp import gpus
from drivers.llamacpp.driver import LlamaCppDriver
from drivers.llamacpp.engine import open_engine_on_gpu
from drivers.llamacpp.writer import Recipe
from kernel.clock import RealClock
from kernel.device import EngineOptions, Sampling
from kernel.errors import AdmissionRefused, UsageError
from kernel.kernel import Kernel, Parts
from kernel.snapshot import ProcessView
from kernel.spec import ProcessSpec
from kernel.syscall import Syscalls
from llmos.paths import find_paths
from llmos.store import Store

GREEDY = Sampling(temperature=0)
MIB = 1 << 20

needs_gpu = pytest.mark.skipif(not gpus.gpus(), reason="no GPU that llama.cpp was built for")


@contextmanager
def system(options: EngineOptions = EngineOptions()) -> Iterator[Syscalls]:  # noqa: B008
    driver = LlamaCppDriver()
    kernel = Kernel(Parts(RealClock(), {".gguf": driver}, Store(find_paths()), options=options))
    try:
        yield Syscalls(kernel)
    finally:
        kernel.check_integrity()
        kernel.shutdown()


def ended(kernel: Syscalls, pid: int) -> ProcessView:
    view = kernel.wait(pid, 120)
    assert view is not None and view.exit_code == 0, view
    return view


def free_bytes() -> int:
    (device, *_) = gpus.gpus()
    return gpus.free_bytes(device)


class Nvml:
    """Two cards, of which a program holds 2 GiB of the second."""

    NVMLError = OSError  # what it raises

    @staticmethod
    def nvmlDeviceGetCount() -> int:  # noqa: N802
        return 2

    @staticmethod
    def nvmlDeviceGetHandleByIndex(index: int) -> int:  # noqa: N802
        return index

    @staticmethod
    def nvmlDeviceGetUUID(card: int) -> bytes:  # noqa: N802
        return (b"GPU-aaa", b"GPU-bbb")[card]

    @staticmethod
    def nvmlDeviceGetName(card: int) -> str:  # noqa: N802
        return f"card {card}"

    @staticmethod
    def nvmlDeviceGetMemoryInfo(card: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=8 << 30, free=(8 - 2 * card) << 30)


def test_every_card_is_a_device_with_a_pool_that_knows_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [device.name for device in LlamaCppDriver().devices()] == ["cpu", "gpu0", "gpu1"]
    assert [device.name for device in LlamaCppDriver("none").devices()] == ["cpu"]
    with system() as kernel:
        free = {pool.name: pool.free_bytes for pool in kernel.snapshot().pools}
        assert (free["gpu0"], free["gpu1"]) == (8 << 30, 6 << 30)
        on_cpu, on_gpu = (kernel.inspect(str(NANO), device=name)[1] for name in ("cpu", "gpu1"))
        assert on_gpu.weights_bytes == on_cpu.weights_bytes
        assert on_gpu.compute_bytes != on_cpu.compute_bytes, "flash attention, and larger chunks"
        with pytest.raises(UsageError, match="no device gpu7"):
            kernel.inspect(str(NANO), device="gpu7")


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, "gpu0 gpu1"),
        ("", ""),
        ("1", "gpu1"),
        ("GPU-a", "gpu0"),
        ("1,0", "gpu0 gpu1"),
        ("1, 0", "gpu0 gpu1"),
    ],
)
def test_cards_that_the_user_hid_are_not_used(
    allowed: str | None, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert [device.name for device in gpus.gpus()] == names.split()


@pytest.mark.parametrize(
    ("lost", "names"),
    [
        ("nvmlDeviceGetCount", ""),
        ("nvmlDeviceGetHandleByIndex", "gpu1"),
        ("nvmlDeviceGetUUID", "gpu1"),
        ("nvmlDeviceGetName", "gpu1"),
        ("nvmlDeviceGetMemoryInfo", "gpu1"),
    ],
)
def test_a_card_that_does_not_answer_is_none(lost: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(index: int = 0) -> object:
        if index == 0:
            raise Nvml.NVMLError("GPU is lost")
        return answers(index)

    monkeypatch.setattr(gpus, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = gpus.gpus()
    answers = getattr(Nvml, lost)
    monkeypatch.setattr(Nvml, lost, staticmethod(ask))
    assert [device.name for device in gpus.gpus()] == names.split()
    assert gpus.free_bytes(first) == 0 and gpus.environment(first) == {"CUDA_VISIBLE_DEVICES": ""}
    assert gpus.free_bytes(second) == (6 << 30 if names else 0)


def test_a_worker_sees_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, second = gpus.gpus()
    assert gpus.environment(second) == {"CUDA_VISIBLE_DEVICES": "GPU-bbb"}
    assert gpus.environment(LlamaCppDriver().devices()[0]) == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_gpu_that_llama_cpp_was_not_built_for_is_refused() -> None:
    if gpus.gpus():
        pytest.skip("it was")
    with pytest.raises(AdmissionRefused, match="finds no GPU"):
        open_engine_on_gpu(str(NANO), EngineOptions(), None, lambda _: True, lambda _level, _line: None)


@needs_gpu
def test_a_model_goes_to_the_gpu_and_says_what_it_says_on_the_cpu() -> None:
    prompts = (
        "list the files here",
        "show what runs",
        "make job 3 less important",
        "how much memory is free",
    )
    with system() as kernel:
        said = {}
        for device in ("gpu0", "cpu"):
            view = kernel.load(str(NANO), device=device)
            kernel.wait_load(str(NANO))
            pid = kernel.spawn(ProcessSpec(str(NANO), prompts, sampling=GREEDY, max_tokens=40))
            ended(kernel, pid)
            said[view.device] = kernel.read(pid, 0).text
            kernel.reap(pid)
            kernel.unload(str(NANO))
    assert list(said) == ["gpu0", "cpu"]
    assert said["gpu0"] == said["cpu"] != ""


@needs_gpu
def test_the_ledger_knows_what_the_gpu_holds(tmp_path: Path) -> None:
    """The estimate, the ledger and the card itself, with 1 GiB of KV; CUDA itself takes some memory too."""
    path = write(tmp_path, Recipe(width=512, layers=8, heads=8, kv_heads=8, ffn=1792, vocabulary=8000))
    before = free_bytes()
    with system(EngineOptions(context_tokens=4096, sequences=16)) as kernel:
        kernel.load(str(path), device="gpu0")
        view = kernel.wait_load(str(path))
        assert view is not None and view.engine is not None
        estimate = kernel.inspect(str(path), device="gpu0")[1]
        pool = next(pool for pool in kernel.snapshot().pools if pool.name == "gpu0")
        ours = sum(claim.size_bytes for claim in pool.claims if claim.owner != "other programs")
        taken = before - free_bytes()
    print(json.dumps({"estimate": estimate.total_bytes, "ledger": ours, "card": taken}))
    assert abs(estimate.total_bytes - ours) < 0.05 * ours
    assert ours < taken < ours + 1024 * MIB
    assert free_bytes() > before - 64 * MIB, "the card has its memory back"


@needs_gpu
def test_the_dry_run_counts_as_the_header_does(tmp_path: Path) -> None:
    path = write(tmp_path, Recipe(width=512, layers=8, heads=8, kv_heads=4, ffn=1792, vocabulary=8000))
    options = EngineOptions(context_tokens=4096, sequences=4)
    with system() as kernel:
        expected = kernel.inspect(str(path), options, "gpu0")[1].total_bytes
        said = kernel.confirm(str(path), options, "gpu0").total_bytes
    assert abs(expected - said) < 0.05 * said


@needs_gpu
def test_both_devices_work_at_the_same_time(tmp_path: Path) -> None:
    path = write(tmp_path, Recipe(width=256, layers=4, heads=4, kv_heads=4, ffn=512, vocabulary=8000))
    spec = ProcessSpec("", ("hello",), sampling=Sampling(temperature=0, ignore_eos=True), max_tokens=200)
    with system() as kernel:
        kernel.load(str(path), device="gpu0")
        kernel.load(str(NANO), device="cpu")
        for model in (path, NANO):
            kernel.wait_load(str(model))
        pids = [kernel.spawn(replace(spec, model=str(model))) for model in (path, NANO)]
        on_gpu, on_cpu = (ended(kernel, pid) for pid in pids)
    overlap_s = min(v.started_s + v.elapsed_s for v in (on_gpu, on_cpu)) - max(
        v.started_s for v in (on_gpu, on_cpu)
    )
    assert overlap_s > 0
    assert on_gpu.device_s > 0 < on_cpu.device_s


@needs_gpu
def test_an_exact_job_says_the_same_in_company() -> None:
    def spec(seed: int, exact: bool) -> ProcessSpec:
        sampling = Sampling(temperature=1.2, seed=seed, ignore_eos=True, exact=exact)
        return ProcessSpec(str(NANO), (f"rename file {seed} to b",), sampling=sampling, max_tokens=60)

    with system(EngineOptions(context_tokens=512, sequences=8)) as kernel:
        kernel.load(str(NANO), device="gpu0")
        alone = kernel.spawn(spec(1, exact=True))
        ended(kernel, alone)
        crowd = [kernel.spawn(spec(seed, exact=False)) for seed in range(2, 9)]
        beside = kernel.spawn(spec(1, exact=True))
        for pid in (*crowd, beside):
            ended(kernel, pid)
        assert kernel.read(beside, 0).text == kernel.read(alone, 0).text


@needs_gpu
def test_a_checkpoint_goes_from_one_device_to_the_other(tmp_path: Path) -> None:
    """KV made on the GPU is not what the CPU would have computed, but it is a valid beginning."""
    spec = ProcessSpec(str(NANO), ("list the files here",), sampling=GREEDY, max_tokens=30)
    with system() as kernel:
        kernel.load(str(NANO), device="gpu0")
        pid = kernel.spawn(spec)
        ended(kernel, pid)
        text = kernel.read(pid, 0).text
        kernel.reap(pid)
        sleeper = kernel.spawn(ProcessSpec(str(NANO), (), program="chat", sampling=GREEDY, max_tokens=30))
        kernel.say(sleeper, "list the files here")
        while kernel.process(sleeper).items_done < 1:
            pass
        kernel.save(sleeper, tmp_path / "c.ckpt")
        kernel.hang_up(sleeper)
        assert ended(kernel, sleeper).exit_code == 0
        kernel.reap(sleeper)
        kernel.unload(str(NANO))
        kernel.load(str(NANO), device="cpu")
        kernel.wait_load(str(NANO))
        again = kernel.restore(tmp_path / "c.ckpt")
        kernel.say(again, "list the files here")
        kernel.hang_up(again)
        ended(kernel, again)
        assert text in kernel.read(again, 0).text


@needs_gpu
def test_the_sensors_see_the_card() -> None:
    (sample, *_) = HostSensors().sample().gpus
    (device, *_) = gpus.gpus()
    assert sample.name == device.description and sample.memory_total_bytes == device.memory_bytes
    assert sample.memory_used_bytes > 0 and sample.temperature_c is not None and sample.power_w is not None


def test_without_a_build_for_it_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus._nvml.cache_clear()
    try:
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", os.fspath(tmp_path))
        assert gpus.gpus() == ()
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "libggml-cuda.so").touch()
        assert not gpus._has_cuda(), "it is not looked for where we happen to be"
    finally:
        gpus._nvml.cache_clear()
