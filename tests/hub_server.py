"""A server on this machine that speaks as much of the hub's protocol as a download needs, and can misbehave.

Answers `GET /api/models/REPO[/revision/…]` and `HEAD|GET /REPO/resolve/REVISION/FILE`, the latter by way of
a redirect to `/cdn/…` as the real hub does for large files.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server has, what it shall do wrong, and what it was asked."""

    files: dict[str, bytes]
    repo: str = "org/repo"
    large: bool = True  # files are LFS objects, with a SHA-256; else plain git blobs
    statuses: list[int] = field(default_factory=list)  # answers to the next requests, before any is served
    error_code: str = ""  # X-Error-Code beside them
    cuts: list[int] = field(default_factory=list)  # the next bodies end after so many bytes
    stalls: list[int] = field(default_factory=list)  # the next bodies go silent after so many bytes
    damaged: bool = False  # one byte is not what it should be
    surplus: bytes = b""  # sent after the file
    ranges: bool = True  # Range is understood
    listing: object = None  # in place of the list of files
    chunk_s: float = 0.0  # rest after each 16 KiB
    asked: list[tuple[str, str]] = field(default_factory=list)  # path, Range
    agents: list[str] = field(default_factory=list)
    endpoint: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def served(self) -> list[str]:
        """The ranges asked for of the files themselves."""
        return [wanted for path, wanted in self.asked if path.startswith("/cdn/")]

    def list(self) -> object:
        if self.listing is not None:
            return self.listing
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT, "siblings": list(self._siblings())}

    def _siblings(self) -> Iterator[dict[str, object]]:
        for name, content in self.files.items():
            sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": sha1}
            if self.large:
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            yield sibling


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.served, unquote(urlsplit(self.path).path)
        hub.asked.append((path, self.headers.get("Range", "")))
        hub.agents.append(self.headers.get("User-Agent", ""))
        if hub.statuses:
            self._answer(hub.statuses.pop(0), b"no", {"X-Error-Code": hub.error_code})
        elif path in (f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"):
            self._answer(200, json.dumps(hub.list()).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self._redirect(path.split("/", 5)[5])
        elif path.startswith("/cdn/") and path[5:] in hub.files:
            self._file(hub.files[path[5:]])
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _redirect(self, name: str) -> None:
        content = self.served.files.get(name)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"/cdn/{name}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{digest}"',
            "ETag": f'"{digest}"',
        }
        self._answer(302, b"", headers)

    def _file(self, content: bytes) -> None:
        hub, wanted = self.served, self.headers.get("Range", "")
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and hub.ranges else 0
        body = bytearray(content[begin:] + hub.surplus)
        if hub.damaged and body:
            body[-1] ^= 1
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self._body(bytes(body))

    def _body(self, body: bytes) -> None:
        hub = self.served
        cut = hub.cuts.pop(0) if hub.cuts else None
        stall = hub.stalls.pop(0) if hub.stalls else None
        end = cut if cut is not None else stall if stall is not None else len(body)
        try:
            for at in range(0, end, 1 << 14):
                self.wfile.write(body[at : min(at + (1 << 14), end)])
                if hub.chunk_s:
                    time.sleep(hub.chunk_s)
        except OSError:  # who asked has gone
            self.close_connection = True
        if stall is not None:
            hub.closing.wait(30)
        if cut is not None or stall is not None:
            self.close_connection = True
