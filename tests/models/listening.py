"""A service that listens on this machine: what it was asked, in order, and the answers that a test gives it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Listening:
    """`answer(body, headers)` gives (status, headers, body) of a request; a body is bytes, parts of them as they come, or becomes JSON."""

    def __init__(self, answer):
        self.answer, self.asked, self.paths = answer, [], []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(body)
                service.paths.append(self.path)
                status, headers, said = service.answer(body, self.headers)
                dripping = isinstance(said, Iterator)
                said = said if isinstance(said, bytes) or dripping else json.dumps(said).encode()
                self.send_response(status)
                for name, value in ({} if dripping else {"Content-Length": len(said)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked did not wait
                    for part in said if dripping else [said]:
                        self.wfile.write(part)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/score"

    def close(self):
        """Listen no longer."""
        self.server.shutdown()
        self.server.server_close()
