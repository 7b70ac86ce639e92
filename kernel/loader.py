"""Loading: opens a model's engine, off the dispatcher's thread, and opens it again when its worker died.

Owner: the kernel. Lock: the process table's, never held while a driver loads.
Not here: which file a name means (the catalog), when there is room (admission), what follows (residency).
"""

import contextlib
import threading
from collections.abc import Callable

from kernel.clock import Clock
from kernel.config import KernelConfig
from kernel.device import EngineHost
from kernel.errors import AdmissionRefused, Interrupted, KernelFault, LlmosError, ModelInvalid
from kernel.models import Model

Log = Callable[[str, str, str], None]  # level, source, text


class Loader:
    """Turns a model record into an open engine."""

    def __init__(
        self,
        config: KernelConfig,
        clock: Clock,
        log: Log,
        done: Callable[[Model, EngineHost | None, LlmosError | None], None],
        *,
        threaded: bool,
    ) -> None:
        self.config = config
        self.clock = clock
        self.log = log
        self.done = done
        self.threaded = threaded

    def load(self, model: Model, delay_s: float = 0.0) -> None:
        """Open the engine; `done` hears of it. Its memory has been claimed."""
        if not self.threaded:
            self._open(model, delay_s)
            return
        name = f"load {model.name}"
        try:
            threading.Thread(target=self._open, args=(model, delay_s), name=name, daemon=True).start()
        except RuntimeError as error:  # no more threads
            self.done(model, None, AdmissionRefused(f"loading {model.name} failed: {error}"))

    def reload(self, model: Model) -> None:
        """Open a model again after its worker died, later each time.

        Raises KernelFault (quarantine) when it died too often in too short a time.
        """
        now_s, window_s = self.clock.now_s(), self.config.restart_window_s
        recent = [at_s for at_s in model.restarts_s if now_s - at_s < window_s]
        if len(recent) >= self.config.restarts_max:
            raise KernelFault(
                f"the worker of {model.name} died {len(recent) + 1} times in {window_s:.0f} s: quarantined",
                f"`dmesg` tells why; `unload {model.name}` lifts the quarantine",
            )
        model.restarts_s.append(now_s)
        self.load(model, self.config.restart_backoff_s * 2 ** len(recent))

    def _open(self, model: Model, delay_s: float) -> None:
        """On a thread of its own."""
        if delay_s:
            self.clock.sleep(delay_s)
        host, error = None, None
        began_s = self.clock.now_s()
        try:
            self._identify(model)
            host = model.driver.open(
                model.info,
                model.device,
                model.options,
                lambda fraction: self._progress(model, fraction),
                lambda level, text: self.log(level, model.name, text),
            )
            if model.cancelled:
                raise Interrupted(f"loading {model.name} was cancelled")
            model.usage.load_s = self.clock.now_s() - began_s
        except LlmosError as caught:
            error = caught
        except Exception as caught:  # a driver's bug must not leave its processes waiting for ever
            error = KernelFault(f"loading {model.name} failed: {type(caught).__name__}: {caught}")
        if error is not None and host is not None:
            host.shutdown()
        self.done(model, host if error is None else None, error)

    @staticmethod
    def _identify(model: Model) -> None:
        """Its processes have tokens of one file: another is not opened for them. Raises ModelInvalid."""
        from kernel.checkpoint import model_digest  # deferred: hashing

        digest = ""
        with contextlib.suppress(LlmosError):  # the driver says it better
            digest = model_digest(model.info.path)
        if digest and digest != (model.digest or digest):
            raise ModelInvalid(
                f"{model.info.path} is not the file any more that {model.name} was loaded from",
                f"`load {model.name}` loads what is there now",
            )
        model.digest = model.digest or digest

    @staticmethod
    def _progress(model: Model, fraction: float) -> bool:
        model.progress = fraction
        return not model.cancelled
