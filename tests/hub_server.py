"""A stand-in of the Hugging Face Hub on the loopback address: what huggingface_hub asks of it, out of memory.

It takes every uploaded file inside its commit, as the Hub does with small ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories of models.

    Attributes:
        files: repository to revision to path to content.
        asked: "METHOD path" of every request.
        url: where it answers.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.url = ""

    def add(self, repository: str, folder: Path, revision: str = "main") -> None:
        """Holds the files of a folder from now on."""
        content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.files.setdefault(repository, {})[revision] = content

    def fetched(self) -> set[str]:
        """Paths of all files whose content was asked for."""
        return {
            line.partition("/resolve/")[2].partition("/")[2]
            for line in self.asked
            if line.startswith("GET") and "/resolve/" in line
        }

    def commit(self, repository: str, revision: str) -> str:
        """The hash of a revision, of which the hash itself is one."""
        return next(
            sha
            for name in self.files[repository]
            if revision in (name, sha := hashlib.sha1(f"{repository}/{name}".encode()).hexdigest())
        )

    def at(self, repository: str, revision: str) -> dict[str, bytes]:
        """The files of a revision or a hash."""
        return next(
            files for name, files in self.files[repository].items() if revision in (name, self.commit(repository, name))
        )


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def reply(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        rest = path.removeprefix("/api/models").removeprefix(f"/{repository}").lstrip("/")
        if repository not in self.hub.files:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        kind, _, rest = rest.partition("/")
        revision, _, name = rest.partition("/")
        try:
            sha = self.hub.commit(repository, revision or "main")
        except StopIteration:
            self.reply({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
            return
        files = self.hub.at(repository, sha)
        if kind == "resolve":
            if name in files:
                etag = hashlib.sha1(files[name]).hexdigest()
                self.reply(files[name], X_Repo_Commit=sha, ETag=f'"{etag}"')
            else:
                self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif kind == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self.reply(listed)
        else:
            siblings = [{"rfilename": name} for name in files]
            self.reply(
                {
                    "_id": "0",
                    "id": repository,
                    "modelId": repository,
                    "sha": sha,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {path}")
        body = self.body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.files.setdefault(repository, {"main": {}})
            self.reply({"url": f"{self.hub.url}/{repository}", "id": repository, "name": repository})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self.reply({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            repository = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.hub.files[repository]["main"][value["path"]] = base64.b64decode(value["content"])
            address = f"{self.hub.url}/{repository}/commit/{'0' * 40}"
            self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})
        else:
            self.reply({"error": f"unknown: {path}"}, 501)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfOneHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
