"""A web server of files on loopback, with ranges, no listing, and faults to order."""

import base64
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class WebServer(ThreadingHTTPServer):
    """Server of the files below a folder.

    Attributes:
        requests: Method, name and byte range of every request.
        cut_after: By name, bytes after which each next answer ends too early, without an error; 0 sends all.
        stalled: Names of files whose answers stop before the last byte, until they are taken out.
        status: By name, the status that a file is refused with.
        sums: Whether answers have a Content-MD5.
        ranges: Whether ranges are given; else every answer is the whole file.
        sizes: Whether answers have a length.
        page: What is answered for names that do not exist; None: status 404.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests = folder, []
        self.cut_after, self.stalled, self.status = {}, set(), {}
        self.sums, self.ranges, self.sizes, self.page = False, True, True, None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def ranges_of(self, name):
        """Return the byte ranges of the GET requests of a file; empty texts for the whole file."""
        return [bytes_ for method, file, bytes_ in self.requests if (method, file) == ("GET", name)]


class Handler(BaseHTTPRequestHandler):
    """Handler of one request."""

    def log_message(self, *_):
        """Keep quiet."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, unquote(self.path.lstrip("/"))
        byte_range = self.headers.get("Range", "")
        server.requests.append((self.command, name, byte_range))
        file = server.folder / name
        status = server.status.get(name) or (200 if file.is_file() or server.page else 404)
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes() if file.is_file() else server.page
        etag, start, end = hashlib.sha1(content).hexdigest(), 0, len(content)
        if byte_range and server.ranges:
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or end) + 1, end), 206
        self.send_response(status)
        self.send_header("ETag", f'"{etag}"')
        if server.sizes:
            self.send_header("Content-Length", str(end - start))
        if server.sums:
            self.send_header("Content-MD5", base64.b64encode(hashlib.md5(content).digest()).decode())
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = server.cut_after.get(name)
        self.wfile.write(content[start:end][: cut or None][: -1 if name in server.stalled else None])
        if cut and cut < end - start:
            time.sleep(0.1)  # until the client has read it: what it has not is lost with the connection
        while name in server.stalled:
            time.sleep(0.02)
        self.close_connection = True
