"""The Hugging Face hub: lists a repository, and fetches a file of it so that it can be trusted.

The list, addresses and the user's token come from huggingface_hub. Bytes are received here, because the
library starts a file anew after an interruption: a partial file is taken up where it ended, and its
checksum is that of the hub's own list, or it is thrown away.

Owner: the store. Blocking, one transfer at a time; ^C (KeyboardInterrupt) leaves the partial file whole.
Not here: which file is meant (repository), where it goes (store), progress bars (shell).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from kernel.errors import LlmosError, ModelNotFound, NotPermitted, TimedOut
from llmos.repository import HubFile, Repository, read_repository

if TYPE_CHECKING:
    from httpx2 import Response

Progress = Callable[[str, int, int], None]
"""Told the file, the bytes that are here, and the bytes in all."""

DEFAULT_ENDPOINT = "https://huggingface.co"
CHUNK_BYTES = 1 << 18
PROGRESS_WORTH_BYTES = 1 << 20  # an attempt that got so much further does not count as a failure
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})


class PullFailed(LlmosError):
    """The hub did not give what was asked for; trying again may help."""


class Hub:
    """A hub at an address: HF_ENDPOINT's, or Hugging Face's own."""

    def __init__(
        self, endpoint: str = "", *, stall_s: float = 20.0, attempts: int = 4, backoff_s: float = 1.0
    ) -> None:
        self.endpoint = (endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._host = urlsplit(self.endpoint).netloc or self.endpoint
        self.stall_s = stall_s
        self.attempts = attempts
        self.backoff_s = backoff_s

    def repository(self, name: str) -> Repository:
        """What a repository has. Raises ModelNotFound, NotPermitted, TimedOut, PullFailed."""
        _quieten()
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name="llmos")
        failures = 0
        while True:
            try:
                with self._told(name):
                    info = api.model_info(name, files_metadata=True, timeout=self.stall_s)
                    return read_repository(name, info.sha, info.siblings)
            except _Passing as reason:
                failures += 1
                self._rest(failures, reason)

    def fetch(self, repository: Repository, file: HubFile, stream: BinaryIO, progress: Progress) -> None:
        """Receive what is missing of a file at the end of `stream`, and check the whole of it.

        Raises as `repository`; then what was received stays, unless it was wrong.
        """
        _quieten()
        transfer = _Transfer(self, repository, file, stream, progress)
        failures = 0
        while not transfer.complete:
            before = transfer.done_bytes
            try:
                with self._told(repository.name):
                    transfer.receive()
            except _Passing as reason:
                failures = 0 if transfer.done_bytes - before >= PROGRESS_WORTH_BYTES else failures
                failures += 1
                self._rest(failures, reason)
        transfer.verify()

    def _rest(self, failures: int, reason: _Passing) -> None:
        """Wait before another attempt. Raises what the failure means if it was the last one."""
        if failures >= self.attempts:
            raise reason.error from None
        time.sleep(self.backoff_s * 2 ** (failures - 1))

    @contextmanager
    def _told(self, repository: str) -> Iterator[None]:
        """What goes wrong on the way, in the user's words: LlmosError for good, _Passing for now."""
        from httpx2 import HTTPError, TimeoutException
        from huggingface_hub.errors import HfHubHTTPError

        host = self._host
        try:
            yield
        except HfHubHTTPError as error:
            raise self.refusal(repository, error.response) from None
        except TimeoutException:
            raise _Passing(TimedOut(f"{host} sent nothing for {self.stall_s:g} s", _AGAIN)) from None
        except (HTTPError, ConnectionError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise _Passing(PullFailed(f"the connection to {host} failed: {why}", _AGAIN)) from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise PullFailed(f"{host} sent an answer that makes no sense", _detail(error)) from None

    def refusal(self, repository: str, response: Response) -> Exception:
        """What an answer that is none means: LlmosError, or _Passing."""
        host, code = self._host, response.status_code
        said = response.headers.get("X-Error-Code", "")
        if code in _RETRIED:
            return _Passing(PullFailed(f"{host} answered {code} {response.reason_phrase}", _AGAIN))
        if said == "GatedRepo" or code == 403:
            hint = f"accept its terms at {self.endpoint}/{repository}, and set HF_TOKEN"
            return NotPermitted(f"{repository} is open only to those who were let in", hint)
        if code in (401, 404):  # the hub answers 401 for what it does not have, to who has not logged in
            return ModelNotFound(
                f"{host} has no {repository}, or it is private", "HF_TOKEN opens private ones"
            )
        return PullFailed(f"{host} answered {code} {response.reason_phrase}")


_AGAIN = "try again: a `pull` goes on where it ended"


class _Passing(Exception):
    """A failure that may be over at the next attempt."""

    def __init__(self, error: LlmosError) -> None:
        super().__init__(error.message)
        self.error = error


class _Transfer:
    """One file on its way. The stream's end is where it goes on."""

    def __init__(
        self, hub: Hub, repository: Repository, file: HubFile, stream: BinaryIO, progress: Progress
    ) -> None:
        self._hub = hub
        self._repository = repository
        self._file = file
        self._stream = stream
        self._progress = progress
        self._restart()
        if stream.seek(0, os.SEEK_END) <= file.size_bytes:
            self._take_up()
        else:
            stream.truncate(0)

    @property
    def complete(self) -> bool:
        return self.done_bytes == self._file.size_bytes

    def _restart(self) -> None:
        self.done_bytes = 0
        self._hash = self._file.hasher()

    def _take_up(self) -> None:
        """Count what an earlier transfer left."""
        self._stream.seek(0)
        while chunk := self._stream.read(CHUNK_BYTES):
            self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.done_bytes += len(chunk)
        self._progress(self._file.path, self.done_bytes, self._file.size_bytes)

    def receive(self) -> None:
        """One request. Returns with the file complete, raises _Passing for a body that was cut."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(
            self._repository.name,
            self._file.path,
            revision=self._repository.commit,
            endpoint=self._hub.endpoint,
        )
        headers = build_hf_headers(library_name="llmos") | {"Accept-Encoding": "identity"}
        if self.done_bytes:
            headers["Range"] = f"bytes={self.done_bytes}-"
        with get_session().stream("GET", url, headers=headers, timeout=self._hub.stall_s) as response:
            if response.is_error:
                raise self._hub.refusal(self._repository.name, response)
            self._position(response)
            for chunk in response.iter_raw():
                self._write(chunk)
        if not self.complete:
            raise _Passing(PullFailed(f"the hub cut {self._file.path} short", _AGAIN))

    def _position(self, response: Response) -> None:
        """Go on where the answer does: after what is here, or at the beginning."""
        begins = response.headers.get("Content-Range", "")
        if response.status_code == 206 and begins.startswith(f"bytes {self.done_bytes}-"):
            self._stream.seek(self.done_bytes)
            return
        if response.status_code != 200:
            raise PullFailed(
                f"the hub answered {response.status_code} {begins[:40]!r} to a request for bytes"
            )
        self._restart()
        self._stream.seek(0)
        self._stream.truncate()

    def _write(self, chunk: bytes) -> None:
        if self.done_bytes + len(chunk) > self._file.size_bytes:
            self._discard()
            raise PullFailed(f"the hub sent more of {self._file.path} than it has")
        self._stream.write(chunk)
        self._count(chunk)

    def verify(self) -> None:
        """Raises PullFailed, and drops what was received, if it is not what the hub's list says."""
        if self._hash.hexdigest() != self._file.digest:
            self._discard()
            message = f"{self._file.path} arrived damaged: its checksum is not the hub's"
            raise PullFailed(message, "nothing was kept; `pull` again fetches it anew")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _discard(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()


def _quieten() -> None:
    """What the library logs, our errors say."""
    from huggingface_hub import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _detail(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
