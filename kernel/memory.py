"""The ledger: every byte that LLMOS holds, by pool, owner and kind.

Owner: the kernel. Lock: `MemoryLedger.lock`, after the process table's in the lock order.
Not here: swapping and victim choice.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kernel.errors import AdmissionRefused
from kernel.snapshot import ClaimView, PoolView


@dataclass(slots=True)
class Pool:
    """A place with room. `available` measures what the machine still has, other programs considered."""

    name: str
    capacity_bytes: int
    reserve_bytes: int = 0
    available: Callable[[], int] | None = None
    claims: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def ours_bytes(self) -> int:
        return sum(self.claims.values())

    def others_bytes(self) -> int:
        """Bytes that other programs hold, as measured; our own claims count in full even where unused."""
        if self.available is None:
            return 0
        return max(0, self.capacity_bytes - self.available() - self.ours_bytes)

    def view(self) -> PoolView:
        others = self.others_bytes()
        claims = [ClaimView(owner, kind, size) for (owner, kind), size in self.claims.items()]
        if others:
            claims.append(ClaimView("other programs", "other", others))
        used = self.ours_bytes + others
        free = max(0, self.capacity_bytes - self.reserve_bytes - used)
        return PoolView(self.name, self.capacity_bytes, used, free, tuple(claims))


def human_bytes(size_bytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class MemoryLedger:
    """All pools."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pools: dict[str, Pool] = {}  # guarded by lock

    def add_pool(self, pool: Pool) -> None:
        with self.lock:
            self._pools[pool.name] = pool

    def claim(self, pool: str, owner: str, sizes_bytes: dict[str, int]) -> None:
        """Set aside bytes by kind, all or none. Raises AdmissionRefused, naming the bytes short."""
        with self.lock:
            place = self._pools[pool]
            need = sum(sizes_bytes.values())
            short = need - place.view().free_bytes
            if short > 0:
                raise AdmissionRefused(
                    f"{owner} needs {human_bytes(need)} on {pool}, {human_bytes(short)} more than is free",
                    self._who_holds(place),
                )
            for kind, size in sizes_bytes.items():
                place.claims[owner, kind] = place.claims.get((owner, kind), 0) + size

    def correct(self, pool: str, owner: str, sizes_bytes: dict[str, int]) -> None:
        """Replace an owner's claims by what was measured. Never refuses: the bytes are taken already."""
        with self.lock:
            self._drop(self._pools[pool], owner)
            self._pools[pool].claims.update({(owner, kind): size for kind, size in sizes_bytes.items()})

    def release(self, pool: str, owner: str) -> int:
        """Give back all that an owner holds; returns the bytes."""
        with self.lock:
            return self._drop(self._pools[pool], owner)

    def free_bytes(self, pool: str) -> int:
        """What can still be admitted to a pool."""
        with self.lock:
            return self._pools[pool].view().free_bytes

    def has_pool(self, pool: str) -> bool:
        with self.lock:
            return pool in self._pools

    def views(self) -> tuple[PoolView, ...]:
        with self.lock:
            return tuple(pool.view() for pool in self._pools.values())

    def check_integrity(self) -> None:
        """No claim is negative or empty. Raises AssertionError."""
        with self.lock:
            for pool in self._pools.values():
                assert all(size >= 0 for size in pool.claims.values()), pool.claims

    @staticmethod
    def _drop(pool: Pool, owner: str) -> int:
        keys = [key for key in pool.claims if key[0] == owner]
        return sum(pool.claims.pop(key) for key in keys)

    @staticmethod
    def _who_holds(pool: Pool) -> str:
        held: dict[str, int] = {}
        for (owner, _), size in pool.claims.items():
            held[owner] = held.get(owner, 0) + size
        if others := pool.others_bytes():
            held["other programs"] = others
        largest = sorted(held.items(), key=lambda item: -item[1])[:4]
        return (
            "held by " + ", ".join(f"{owner} {human_bytes(size)}" for owner, size in largest) if held else ""
        )
