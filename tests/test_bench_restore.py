"""`bench restore` on a model of nothing: what it times really happens."""

from pathlib import Path

import pytest

from drivers.llamacpp.writer import Recipe
from plugins.benchmarks import restore
from tests import ggufs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ggufs.write(tmp_path_factory.mktemp("model"), Recipe(context_tokens=2048))


def test_every_size_is_prefilled_restored_and_swapped(model: Path) -> None:
    told: list[str] = []
    small, large = restore.measure(model, (64, 512), 1, told.append)
    assert (small.prompt_tokens, large.prompt_tokens) == (64, 512)
    assert large.file_bytes > 3 * small.file_bytes, "a file without KV state"
    assert min(large.prefill_s.least, large.restore_s.least, large.swap_s.least, large.save_s.least) > 0.0
    assert len(told) == 3
