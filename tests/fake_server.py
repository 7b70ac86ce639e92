"""A stand-in for llama.cpp's server: its command line and the part of its protocol that `bench` uses.

Run as a program. What it is to do wrong is in the prompt, or in its own file name.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPTIONS = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
SLOTS = int(OPTIONS.get("-np", "1"))
TOGETHER = threading.Barrier(SLOTS)
TOKEN_S = 0.002


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = {"model_path": OPTIONS["-m"], "total_slots": SLOTS} if self.path == "/props" else {}
        self._whole(200, body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, wanted = asked["prompt"], asked["n_predict"]
        if prompt == "refuse" or not (asked["stream"] and asked["ignore_eos"]):
            self._whole(400, {"error": {"message": "refused"}})
            return
        if prompt == "together":
            TOGETHER.wait(10)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(wanted):
            time.sleep(TOKEN_S)
            self._event({"content": f"~{number}\n\ndata: ", "stop": False})
            if prompt == "die":
                os._exit(9)
            if prompt == "hang up":
                self.close_connection = True
                return
        drawn = wanted - (prompt == "one less" or "less" in sys.argv[0])
        self._event({"stop": True, "tokens_evaluated": len(prompt), "tokens_predicted": drawn})
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, body: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(body).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _whole(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nobody reads it."""


if __name__ == "__main__":
    if "broken" in sys.argv[0]:
        sys.exit("no such quantisation")
    ThreadingHTTPServer((OPTIONS["--host"], int(OPTIONS["--port"])), Handler).serve_forever()
