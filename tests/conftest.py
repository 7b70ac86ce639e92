"""Every test has a home of its own, and none runs a long campaign by accident."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before any test loads a native library: spinning OpenMP threads starve a machine that does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from kernel.kernel import Kernel


@pytest.fixture(autouse=True)
def llmos_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LLMOS_HOME that child processes inherit; the user's own LLMOS_* variables are out of sight."""
    for name in [name for name in os.environ if name.startswith("LLMOS_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "llmos-home"
    monkeypatch.setenv("LLMOS_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))  # where other programs keep models
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(autouse=True)
def integrity(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did to a kernel of its own, every invariant of every table holds at its end."""
    kernels: list[Kernel] = []
    boot = Kernel.__init__

    def booting(kernel: Kernel, *arguments: object) -> None:
        boot(kernel, *arguments)  # type: ignore[arg-type]
        kernels.append(kernel)

    monkeypatch.setattr(Kernel, "__init__", booting)
    yield
    for kernel in kernels:
        kernel.check_integrity()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soak tests run only where `-m` asks for them by name."""
    if "soak" in config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]
