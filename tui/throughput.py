"""Throughput: tokens a second over time, the batch, the queue."""

from collections.abc import Sequence

from tui.graph import braille
from tui.panel import GOOD, Line, Panel, fit, words
from tui.sanitise import one_line
from tui.units import rate_short


class Throughput(Panel):
    """All devices together."""

    def lines(self, width: int, height: int) -> Sequence[Line]:
        view, now = self.feed.view, self.feed.history[-1]
        recent = [sample.decode_tokens_per_s for sample in self.feed.history][-2 * width :]
        peak = max(recent)
        self.set_titles("³ throughput", one_line(f"{view.policy} · peak {rate_short(peak)}"))
        running = sum(device.running for device in view.devices)
        waiting = sum(device.runnable for device in view.devices)
        batch = max((device.batch for device in view.devices), default=0.0)
        decode, prefill = rate_short(now.decode_tokens_per_s), rate_short(now.prefill_tokens_per_s)
        below = [
            f"decode {decode}  prefill {prefill} t/s",
            f"batch {batch:.1f}  running {running}  queue {waiting}",
        ]
        graph = braille(recent, width, max(0, height - len(below)), peak)
        return [*((words(row, GOOD),) for row in graph), *((words(fit(text, width)),) for text in below)]
