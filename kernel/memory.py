"""The ledger: every byte that LLMOS holds, by pool, owner and kind; and shares of processors, which it counts
in thousandths.

Owner: the kernel. Lock: `MemoryLedger.lock`, after the process table's in the lock order.
Not here: who is let in and who makes room (admission), what is swapped.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kernel.errors import AdmissionRefused
from kernel.snapshot import ClaimView, PoolView, ShareClaim, ShareView
from kernel.units import human_bytes

Asks = Mapping[str, int]
"""Pool name to amount: bytes, or thousandths of a processor."""

Claim = tuple[str, str, Mapping[str, int]]
"""Pool, owner, amounts by kind."""

OTHERS = "other programs"


@dataclass(frozen=True, slots=True)
class Resources:
    """Processors to share out. `gpus` None: as many as the devices that are GPUs."""

    cpus: int = 0
    gpus: int | None = None


@dataclass(slots=True)
class Pool:
    """A place with room: amounts are bytes, or (`counted`) thousandths of a processor.

    `available` measures what the machine still has, other programs considered; `resident`, how much of what
    is in use, as that meter counts, is ours (None: all that we have claimed).
    """

    name: str
    capacity: int
    reserve: int = 0
    available: Callable[[], int] | None = None
    resident: Callable[[], int] | None = None
    counted: bool = False
    claims: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def ours(self) -> int:
        return sum(self.claims.values())

    def others(self) -> int:
        """What other programs hold, as measured. What we hold unclaimed counts as theirs."""
        if self.available is None:
            return 0
        ours = self.ours
        if self.resident is not None:
            ours = min(ours, self.resident())
        return max(0, self.capacity - self.available() - ours)

    def free(self) -> int:
        """What can still be admitted."""
        return max(0, self.capacity - self.reserve - self.ours - self.others())

    def view(self) -> PoolView:
        others = self.others()
        claims = [ClaimView(owner, kind, size) for (owner, kind), size in self.claims.items()]
        if others:
            claims.append(ClaimView(OTHERS, "other", others))
        used = self.ours + others
        free = max(0, self.capacity - self.reserve - used)
        return PoolView(self.name, self.capacity, used, free, tuple(claims), self.reserve)

    def share_view(self) -> ShareView:
        claims = tuple(ShareClaim(owner, amount) for (owner, _), amount in self.claims.items())
        return ShareView(self.name, self.capacity, self.ours, self.capacity - self.ours, claims)

    def say(self, amount: int) -> str:
        """ "1.5 KiB", "0.5 gpus"."""
        if not self.counted:
            return human_bytes(amount)
        return f"{amount / 1000:g} {self.name if amount != 1000 else self.name.removesuffix('s')}"

    def drop(self, owner: str) -> int:
        keys = [key for key in self.claims if key[0] == owner]
        return sum(self.claims.pop(key) for key in keys)

    def who_holds(self) -> str:
        """ "held by nano 1.2 GiB, process 7 0.5 GiB"; "" if nobody does."""
        held: dict[str, int] = {}
        for (owner, _), amount in self.claims.items():
            held[owner] = held.get(owner, 0) + amount
        if others := self.others():
            held[OTHERS] = others
        largest = sorted(held.items(), key=lambda item: -item[1])[:4]
        return "held by " + ", ".join(f"{owner} {self.say(size)}" for owner, size in largest) if held else ""


class MemoryLedger:
    """All pools."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pools: dict[str, Pool] = {}  # guarded by lock

    def add_pool(self, pool: Pool) -> None:
        """A pool that is there already stays."""
        with self.lock:
            self._pools.setdefault(pool.name, pool)

    def claim(self, pool: str, owner: str, sizes: Mapping[str, int]) -> None:
        """Set aside amounts by kind, all or none. Raises AdmissionRefused, naming what is short."""
        self.claim_all([(pool, owner, sizes)])

    def claim_all(self, claims: Iterable[Claim]) -> None:
        """Set aside in several pools, for several owners: all or none. Raises AdmissionRefused."""
        claims = list(claims)
        with self.lock:
            sums: dict[str, int] = {}
            for pool, owner, sizes in claims:
                sums[pool] = sums.get(pool, 0) + sum(sizes.values())
                self._check(self._place(pool, owner), owner, sums[pool])
            for pool, owner, sizes in claims:
                held = self._pools[pool].claims
                for kind, size in sizes.items():
                    held[owner, kind] = held.get((owner, kind), 0) + size

    def short(self, asks: Asks) -> dict[str, int]:
        """What is missing now, by pool; empty if all of it is free."""
        with self.lock:
            missing = {pool: amount - self._free(pool) for pool, amount in asks.items()}
        return {pool: amount for pool, amount in missing.items() if amount > 0}

    def check_possible(self, asks: Asks, owner: str) -> None:
        """Raises AdmissionRefused if this could not be had even if nobody of us held anything."""
        with self.lock:
            for pool, amount in asks.items():
                place = self._place(pool, owner)
                most = place.capacity - place.reserve
                if amount > most:
                    raise AdmissionRefused(
                        f"{owner} needs {self._on(place, amount)}, {place.say(amount - most)} more than "
                        "can ever be free",
                        place.who_holds(),
                    )

    def refusal(self, asks: Asks, owner: str) -> AdmissionRefused | None:
        """Why it cannot be had now; None if it can."""
        with self.lock:
            try:
                for pool, amount in asks.items():
                    self._check(self._place(pool, owner), owner, amount)
            except AdmissionRefused as refused:
                return refused
        return None

    def correct(self, pool: str, owner: str, sizes: Mapping[str, int]) -> None:
        """Replace an owner's claims by what was measured. Never refuses: the bytes are taken already."""
        with self.lock:
            self._pools[pool].drop(owner)
            self._pools[pool].claims.update({(owner, kind): size for kind, size in sizes.items()})

    def release(self, pool: str, owner: str, kind: str | None = None) -> int:
        """Give back what an owner holds in a pool, all of it or of one kind; returns how much."""
        with self.lock:
            place = self._pools[pool]
            return place.drop(owner) if kind is None else place.claims.pop((owner, kind), 0)

    def release_kind(self, owner: str, kind: str) -> int:
        """Give back what an owner holds of one kind, in every pool; returns how much was held."""
        with self.lock:
            return sum(pool.claims.pop((owner, kind), 0) for pool in self._pools.values())

    def held(self, owner: str) -> dict[str, dict[str, int]]:
        """What an owner holds: pool to kind to amount."""
        with self.lock:
            found: dict[str, dict[str, int]] = {}
            for pool in self._pools.values():
                for (whose, kind), amount in pool.claims.items():
                    if whose == owner:
                        found.setdefault(pool.name, {})[kind] = amount
            return found

    def owners(self) -> set[str]:
        with self.lock:
            return {owner for pool in self._pools.values() for owner, _ in pool.claims}

    def say(self, pool: str, amount: int) -> str:
        """ "513.0 MiB on gpu0", "0.5 cpus"."""
        with self.lock:
            return self._on(self._place(pool, "it"), amount)

    def free_bytes(self, pool: str) -> int:
        """What can still be admitted to a pool."""
        with self.lock:
            return self._pools[pool].view().free_bytes

    def has_pool(self, pool: str) -> bool:
        with self.lock:
            return pool in self._pools

    def views(self) -> tuple[PoolView, ...]:
        with self.lock:
            return tuple(pool.view() for pool in self._pools.values() if not pool.counted)

    def shares(self) -> tuple[ShareView, ...]:
        with self.lock:
            return tuple(pool.share_view() for pool in self._pools.values() if pool.counted)

    def check_integrity(self) -> None:
        """No claim is negative, no processor is promised twice, and what is shown adds up to the last byte.

        Raises AssertionError.
        """
        with self.lock:
            for pool in self._pools.values():
                assert all(amount >= 0 for amount in pool.claims.values()), pool.claims
                if pool.counted:
                    assert pool.ours <= pool.capacity, pool
                    continue
                view = pool.view()
                assert view.used_bytes == sum(claim.size_bytes for claim in view.claims), view
                spare = view.capacity_bytes - view.reserve_bytes - view.used_bytes
                assert view.free_bytes == max(0, spare), view

    # With the lock held

    def _place(self, pool: str, owner: str) -> Pool:
        place = self._pools.get(pool)
        if place is None:
            raise AdmissionRefused(f"{owner} needs {pool}, and this machine has none")
        return place

    def _free(self, pool: str) -> int:
        return self._pools[pool].free() if pool in self._pools else 0

    @staticmethod
    def _on(place: Pool, amount: int) -> str:
        return place.say(amount) if place.counted else f"{place.say(amount)} on {place.name}"

    def _check(self, place: Pool, owner: str, amount: int) -> None:
        missing = amount - place.free()
        if missing > 0:
            raise AdmissionRefused(
                f"{owner} needs {self._on(place, amount)}, {place.say(missing)} more than is free",
                place.who_holds(),
            )
