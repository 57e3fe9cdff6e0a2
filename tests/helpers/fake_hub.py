"""A hub on this machine that speaks enough of the real one's protocol for huggingface_hub, and misbehaves on request.

Two servers, as in reality: the hub answers /resolve and /api, and redirects requests for large (LFS) files to another
origin, which must never see a token. Each file has a list of faults, one for each request of its bytes; after them
everything works.
"""

import base64
import hashlib
import json
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

from kohaku_delta.hub import client

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_entitledAbcdefghijklmnopqrstuvwxyz"
STRANGER = "hf_strangerAbcdefghijklmnopqrstuvwxyz"


@dataclass
class File:
    data: bytes
    lfs: bool = True
    faults: list = field(
        default_factory=list
    )  # of the bytes: drop, short, long, corrupt, stall, whole, other, or a status: 429, 500, 503, 403
    answers: list = field(default_factory=list)  # statuses of /resolve before it works: 429, 503
    other: bytes | None = None  # what "other" sends
    claimed: int | None = None  # the size that the hub gives, if it is not the file's

    @property
    def etag(self) -> str:
        return (
            hashlib.sha256(self.data).hexdigest()
            if self.lfs
            else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()
        )


class Hub:
    """`with Hub() as hub`: hub.url is HF_ENDPOINT; hub.files maps "datasets/owner/name/file" or "owner/name/file" to
    File.
    """

    def __init__(self):
        self.files: dict[str, File] = {}
        self.gated: set[str] = set()  # "datasets/owner/name"
        self.elsewhere: tuple[int, str] | None = None  # status and Location of every answer: it is no hub
        self.renamed: dict[str, str] = {}  # old name → new name, both as above
        self.commit = REVISION  # what main points at
        self.stored: dict[str, bytes] = {}  # sha256 → bytes of large files that were uploaded
        self.commits: list[dict] = []  # of each: "summary" and "files" (path → bytes)
        self.upload_faults: list = []  # of the bytes of large files: a status, or drop
        self.commit_faults: list[int] = []  # statuses
        self.retry_after = "0"  # seconds, sent with each 429
        self.asked: list[tuple] = []  # (server, method, path, range, authorization)
        self.open = self.most = 0  # of the bytes: requests at work, and the most at once
        self.lock, self.release = threading.Lock(), threading.Event()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(kind)) for kind in (Resolver, Storage)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def _handler(self, kind):
        return type(kind.__name__, (kind,), {"hub": self})

    def __enter__(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, data: bytes, **how) -> File:
        self.files[name] = File(data, **how)
        return self.files[name]

    def requests(self, server: str = "storage") -> list[tuple]:
        return [request for request in self.asked if request[0] == server]


@contextmanager
def trust_fake_hub(monkeypatch):
    """A hub that huggingface_hub in this process takes for the real one; waits are short, and nobody is logged in."""
    with Hub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.5,
            "HF_TOKEN_PATH": "/nowhere",
            "HF_HUB_DISABLE_TELEMETRY": True,  # as connection.py has it in a process of its own
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(client, "LONGEST_WAIT", 0.02)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *words):
        pass

    def note(self, server: str):
        with self.hub.lock:
            self.hub.asked.append(
                (server, self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
            )

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = ""):
        waiting = {"Retry_After": self.hub.retry_after} if status == 429 else {}
        self.answer(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message=message, **waiting)

    def body(self) -> bytes:
        """The body of a request, also one that is sent in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, file: File, **headers):
        """The bytes of a file from the asked offset, with the fault that is due."""
        with self.hub.lock:
            fault = file.faults.pop(0) if file.faults else None
            self.hub.open += 1
            self.hub.most = max(self.hub.most, self.hub.open)
        try:
            self.send_with(fault, file, headers)
        finally:
            with self.hub.lock:
                self.hub.open -= 1

    def send_with(self, fault, file: File, headers: dict):
        if isinstance(fault, int):
            return self.refuse(fault)
        data = file.other if fault == "other" else file.data
        first, last, asked = 0, len(data), self.headers.get("Range")
        if asked and fault != "whole":
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), int(end) + 1 if end else len(data)
            if first >= len(data):
                return self.answer(416, Content_Range=f"bytes */{len(data)}")
        body = data[first:last]
        if fault == "corrupt":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        body = body[: len(body) // 2] if fault == "short" else body + b"more" if fault == "long" else body
        self.send_response(206 if asked and fault != "whole" else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked and fault != "whole":
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if fault in ("drop", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.hub.release.wait(10)
            self.close_connection = True
        elif isinstance(fault, float):  # slowly, in so many seconds
            for start in range(0, len(body), max(1, len(body) // 50)):
                self.wfile.write(body[start : start + max(1, len(body) // 50)])
                time.sleep(fault / 50)
        else:
            self.wfile.write(body)

    def handle(self):
        with suppress(ConnectionError, ValueError):
            super().handle()


class Storage(HubHandler):
    """The other origin: /<sha256>?signature."""

    def do_GET(self):
        self.note("storage")
        digest = urlsplit(self.path).path[1:]
        file = next((file for file in self.hub.files.values() if file.lfs and file.etag == digest), None)
        return self.send(file) if file else self.refuse(404)

    def do_PUT(self):
        """Takes a large file."""
        self.note("storage")
        with self.hub.lock:
            fault = self.hub.upload_faults.pop(0) if self.hub.upload_faults else None
        if fault == "drop":
            self.close_connection = True
            return None
        data = self.body()
        if fault:
            return self.refuse(fault)
        digest = urlsplit(self.path).path[1:]
        if hashlib.sha256(data).hexdigest() != digest:
            return self.refuse(400)
        self.hub.stored[digest] = data
        return self.answer(200)


class Resolver(HubHandler):
    """The hub itself."""

    def allowed(self, repo: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (TOKEN, STRANGER):
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repo in self.hub.gated and token != TOKEN:
            self.refuse(403 if token else 401, "GatedRepo", f"Access to {repo} is restricted.")
        elif not any(name.startswith(repo + "/") for name in self.hub.files):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def do_HEAD(self):
        self.do_GET()

    def do_CONNECT(self):
        self.note("hub")
        self.moved()

    def moved(self) -> bool:
        if self.hub.elsewhere:
            status, location = self.hub.elsewhere
            self.answer(status, **({"Location": location} if location else {}))
            return True
        for old, new in self.hub.renamed.items():
            if f"/{old}/" in self.path + "/":
                self.answer(307, Location=self.path.replace(old, new))
                return True
        return False

    def do_GET(self):
        self.note("hub")
        if self.moved():
            return None
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/"):
            repo = path.removeprefix("/api/").removeprefix("models/").split("/revision/")[0]
            return self.allowed(repo) and self.json(
                {"id": repo.removeprefix("datasets/"), "sha": self.hub.commit, "siblings": []}
            )
        repo, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not self.allowed(repo):
            return None
        if revision not in (REVISION, "main"):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        file = self.hub.files.get(f"{repo}/{name}")
        if file is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        with self.hub.lock:
            status = file.answers.pop(0) if file.answers else None
        if status:
            return self.refuse(status)
        commit = {"X_Repo_Commit": self.hub.commit}
        if file.lfs:
            linked = {
                "X_Linked_Size": str(file.claimed or len(file.data)),
                "X_Linked_ETag": f'"{file.etag}"',
                "Location": f"{self.hub.storage}/{file.etag}?signature=secret",
            }
            return self.answer(302, **linked, **commit)
        if self.command == "HEAD":
            self.send_response(200)
            for header, value in {
                "Content-Length": len(file.data),
                "ETag": f'"{file.etag}"',
                "X-Repo-Commit": self.hub.commit,
            }.items():
                self.send_header(header, str(value))
            return self.end_headers()
        return self.send(file, ETag=f'"{file.etag}"', **commit)

    def do_POST(self):
        self.note("hub")
        body = self.body().decode()
        if self.moved():
            return None
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        for part, take in (
            ("/preupload/", self.preupload),
            (".git/info/lfs/objects/batch", self.batch),
            ("/commit/", self.commit),
        ):
            if part in path:
                repo = path.partition(part)[0].removeprefix("/api/models/").removeprefix("/")
                return self.may_write(repo) and take(repo, body)
        repo, _, rest = path.removeprefix("/api/").removeprefix("models/").partition("/paths-info/")
        if not self.allowed(repo):
            return None
        if rest != REVISION:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        found = []
        for name in parse_qs(body)["paths"]:
            if file := self.hub.files.get(f"{repo}/{name}"):
                lfs = {"lfs": {"oid": file.etag, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
                found.append(
                    {"type": "file", "path": name, "size": len(file.data), "oid": "0" * 40 if file.lfs else file.etag}
                    | lfs
                )
        return self.json(found)

    def may_write(self, repo: str) -> bool:
        if not self.allowed(repo):
            return False
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403 if self.headers.get("Authorization") else 401, message="no write access")
            return False
        return True

    def preupload(self, repo: str, body: str):
        """Which of the files are large, and what there is of them."""
        found = []
        for each in json.loads(body)["files"]:
            file = self.hub.files.get(f"{repo}/{each['path']}")
            mode = "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular"
            oid = {"oid": file.etag} if file else {}
            found.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        return self.json({"files": found})

    def batch(self, repo: str, body: str):
        objects = []
        for each in json.loads(body)["objects"]:
            put = {"actions": {"upload": {"href": f"{self.hub.storage}/{each['oid']}?signature=secret"}}}
            objects.append(each | ({} if each["oid"] in self.hub.stored else put))
        return self.json({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, body: str):
        with self.hub.lock:
            fault = self.hub.commit_faults.pop(0) if self.hub.commit_faults else None
        if fault:
            return self.refuse(fault)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value, is_large = line["value"], line["key"] == "lfsFile"
            data = self.hub.stored[value["oid"]] if is_large else base64.b64decode(value["content"])
            files[value["path"]] = data
            self.hub.add(f"{repo}/{value['path']}", data, lfs=is_large)
        self.hub.commits.append({"summary": lines[0]["value"]["summary"], "files": files})
        return self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{REVISION}", "commitOid": REVISION})

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
