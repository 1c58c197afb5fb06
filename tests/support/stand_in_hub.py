"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP interface as pushing and loading take.

Large files go by Git LFS, as on the hub: their content is put to an address of its own, and a commit names its digest.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pt2", ".onnx", ".png")
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories with all their commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[Files]] = {}
        """By name, the files of each commit."""
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        """What was put by LFS, by SHA-256."""
        self.down = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, name: str, revision: str) -> tuple[str, Files] | None:
        """The name and the files of a branch's last commit, or of a commit; None where there is none."""
        commits = self.repositories.get(name, [])
        named = {digest_of(files): files for files in commits}
        if revision == "main" and named:
            return list(named.items())[-1]
        return (revision, named[revision]) if revision in named else None


def digest_of(files: Files) -> str:
    """The name of a commit of these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """Within, a hub without repositories."""
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    routes: ClassVar = {
        "POST": {
            r"/api/repos/create": "create",
            r"/api/validate-yaml": "validate",
            r"/api/models/(.+)/preupload/(.+)": "preupload",
            r"/(.+)\.git/info/lfs/objects/batch": "batch",
            r"/api/models/(.+)/commit/(.+)": "commit",
        },
        "PUT": {r"/objects/(\w+)": "put"},
        "GET": {
            r"/api/models/([^/]+/[^/]+)": "about",
            r"/api/models/(.+)/revision/(.+)": "about",
            r"/api/models/(.+)/tree/([^/]+)": "tree",
            r"/(.+)/resolve/([^/]+)/(.+)": "resolve",
        },
        "HEAD": {r"/(.+)/resolve/([^/]+)/(.+)": "resolve"},
    }

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        path = unquote(urlsplit(self.path).path)
        if self.server.down:
            return self._say(503, {"error": "down for repairs"})
        for pattern, name in self.routes[self.command].items():
            if found := re.fullmatch(pattern, path):
                return getattr(self, f"_{name}")(*found.groups())
        self._say(404, {"error": f"no such route: {self.command} {path}"})

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, code: int, content: Any, **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self._say(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    # ---------------------------------------------------------------------------------------------------- pushing

    def _create(self) -> None:
        if "Authorization" not in self.headers:
            return self._say(401, {"error": "Invalid username or password."})
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = {"url": f"{self.server.address}/{name}"}
        if name in self.server.repositories:
            return self._say(409, {"error": "You already created this model repo", **address})
        self.server.repositories[name] = [{".gitattributes": b""}]
        if asked.get("visibility") == "private" or asked.get("private"):  # as later and earlier clients ask
            self.server.private.add(name)
        self._say(200, address)

    def _validate(self) -> None:
        front = json.loads(self.body)["content"].partition("---\n")[2]
        self._say(200, {"errors": [], "warnings": [] if front else [{"message": "no front matter"}]})

    def _preupload(self, name: str, _: str) -> None:
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self._say(200, {"files": modes})

    def _batch(self, _: str) -> None:
        def action(wanted: dict[str, Any]) -> dict[str, Any]:
            return {**wanted, "actions": {"upload": {"href": f"{self.server.address}/objects/{wanted['oid']}"}}}

        wanted = json.loads(self.body)["objects"]
        self._say(200, {"transfer": "basic", "objects": list(map(action, wanted))})

    def _put(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.server.objects[digest] = self.body
        self._say(200, {})

    def _commit(self, name: str, _: str) -> None:
        commits = self.server.repositories[name]
        files = dict(commits[-1])
        for line in self.body.splitlines():
            value, kind = json.loads(line)["value"], json.loads(line)["key"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        digest = digest_of(files)
        self._say(200, {"commitUrl": f"{self.server.address}/{name}/commit/{digest}", "commitOid": digest})

    # ---------------------------------------------------------------------------------------------------- loading

    def _about(self, name: str, revision: str = "main") -> None:
        if name not in self.server.repositories:
            return self._missing("RepoNotFound")
        found = self.server.commit_of(name, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        names, private = [{"rfilename": path} for path in found[1]], name in self.server.private
        self._say(200, {"id": name, "sha": found[0], "siblings": names, "tags": [], "private": private, "downloads": 0})

    def _tree(self, name: str, revision: str) -> None:
        found = self.server.commit_of(name, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in found[1].items()
        ]
        self._say(200, files)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self.server.commit_of(name, revision)
        if found is None or path not in found[1]:
            return self._missing("EntryNotFound")
        content = found[1][path]
        self._say(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=found[0])
