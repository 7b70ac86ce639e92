"""Eviction: which models make room, and when.

A model with nothing to run is evicted when its memory is asked for: the one that costs least to reload, per
byte and by how soon it is expected to be used again. While that is sooner than `patience` times its load, it
counts as in use. What is in use goes on; but who has waited `patience` times what his own load costs gets the
idle ones all the same, and those that are to make room take nobody new, so that they run dry.
Owner: admission. Lock: the process table's, held by the caller of every method.
Not here: who asks (admission), how a model is closed (residency), what one is worth (models).
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kernel.memory import Asks
from kernel.models import Model, ModelState

if TYPE_CHECKING:
    from kernel.admission import Ticket
    from kernel.kernel import Kernel


class Eviction:
    """The choice of victims."""

    def __init__(self, kernel: "Kernel") -> None:
        self.kernel = kernel

    def room(self, short: Asks, ticket: "Ticket") -> list[Model] | None:
        """The idle models whose memory would do, besides those that are going; None if they are too few."""
        chosen: list[Model] = []
        now_s = self.kernel.clock.now_s()
        for pool, amount in short.items():
            missing = amount - sum(m.held_bytes() for m in self._on(pool) if m.state is ModelState.EVICTING)
            idle = [m for m in self._ranked(pool) if not len(m.queue) and m is not ticket.model]
            if self._patience_spent(ticket) < 1.0:
                idle = [m for m in idle if m.usage.next_use_s(now_s) > self._patience_s(m)]
            victims = self._enough(idle, missing)
            if victims is None:
                return None
            chosen += victims
        return chosen

    def closes(self, model: Model, claimant: "Ticket", short: Asks) -> bool:
        """Whether a model takes nobody new: it is to run dry for a claimant who has waited too long."""
        pool = claimant.model.device.pool
        if model.device.pool != pool or model.state is not ModelState.LOADED:
            return False
        turns = min(self._patience_spent(claimant), self._had(model))
        if turns < 1.0:
            return False
        ranked = self._ranked(pool)
        victims = self._enough(ranked, short.get(pool, 0)) or ranked
        more = [m for m in ranked if m not in victims][: int(turns) - 1]  # one may never run dry
        return model in victims or model in more

    def _patience_s(self, model: Model) -> float:
        return max(self.kernel.config.patience * model.reload_s(), 1e-9)

    def _patience_spent(self, ticket: "Ticket") -> float:
        """1 and more: it has waited too long."""
        if not ticket.waits:
            return math.inf
        return (self.kernel.clock.now_s() - ticket.since_s) / self._patience_s(ticket.model)

    def _had(self, model: Model) -> float:
        """1 and more: it has been in memory long enough to have been worth its load."""
        return (self.kernel.clock.now_s() - model.opened_s) / self._patience_s(model)

    def _ranked(self, pool: str) -> list[Model]:
        """Loaded models that may be evicted, the one to go first first."""
        now_s = self.kernel.clock.now_s()
        loaded = [m for m in self._on(pool) if m.state is ModelState.LOADED and not m.pinned]
        return sorted(loaded, key=lambda m: m.keep_value(now_s))

    @staticmethod
    def _enough(models: list[Model], missing: int) -> list[Model] | None:
        """The first ones that hold so many bytes, without those that are not needed for it."""
        chosen: list[Model] = []
        for model in models:
            if missing <= 0:
                break
            chosen.append(model)
            missing -= model.held_bytes()
        for model in list(chosen):
            if missing + model.held_bytes() <= 0:
                missing += model.held_bytes()
                chosen.remove(model)
        return None if missing > 0 else chosen

    def _on(self, pool: str) -> Iterable[Model]:
        return (m for m in self.kernel.models.values() if m.device.pool == pool)
