"""A server on loopback that answers as it is told: a list of answers per request, in turn."""

import contextlib
import http.server
import json
import threading


class Planned(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.lock = plan, [], threading.Lock()
        self.at_work = self.most_at_work = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append((self.path, body, dict(self.headers)))
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        try:
            self.answer(*server.plan(number, self.path, body))
        finally:
            with server.lock:
                server.at_work -= 1

    def answer(self, status, data, headers=None, cut=None):
        """`cut`: the connection ends after so many bytes of the answer."""
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(raw[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def planned(plan):
    """A running server whose answer to request number n (path, body) is `plan(n, path, body)`."""
    server = Planned(plan)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
