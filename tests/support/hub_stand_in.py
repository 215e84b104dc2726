"""A small HTTP server that stands in for the Hugging Face hub: repositories with commits and tags, in memory.

It knows the operations that an upload uses, and answers as the hub's client expects. Files that end in `.safetensors`
go the way of large files (LFS), the others stand in the commit itself.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "hf_StandInTokenThatMayWrite"
READER = "hf_StandInTokenThatMayOnlyRead"


@dataclass
class Commit:
    """A commit, with all files as they are after it."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """What the hub keeps of a repository."""

    visibility: str
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, tag: str) -> dict[str, bytes]:
        """Files of the commit that a tag names."""
        [commit] = [commit for commit in self.commits if commit.oid == self.tags[tag]]
        return commit.files


class HubStandIn:
    """A hub on a port of this machine."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        """Method and path of every request, in order."""
        self.fault: Callable[[str], int | None] = lambda request: None
        """Says of a request which status it gets instead of an answer; 0: it is done, and the answer lost."""
        self._large: dict[str, bytes] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in._serve(self, "GET")

            def do_POST(self) -> None:
                stand_in._serve(self, "POST")

            def do_PUT(self) -> None:
                stand_in._serve(self, "PUT")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, expression: str) -> int:
        """Requests that an expression matches."""
        return sum(re.search(expression, request) is not None for request in self.requests)

    def _serve(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = f"{method} {handler.path}"
        self.requests.append(request)
        fate = self.fault(request)
        if fate:
            status, answer = fate, {"error": "so it was asked for"}
        else:
            token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, answer = self._answer(method, handler.path.partition("?")[0], body, token)
        if fate == 0:
            handler.close_connection = True
            return
        content = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        if path.startswith("/storage/"):
            # Signed: it asks for no token.
            self._large[path.removeprefix("/storage/")] = body
            return 200, {}
        if token not in (TOKEN, READER):
            return 401, {"error": "Invalid credentials in Authorization header"}
        if method == "POST" and token != TOKEN:
            return 403, {"error": "Forbidden: you must use a write token to upload to a repository."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return (
                (200, {}) if "---" in json.loads(body)["content"] else (400, {"errors": [{"message": "no metadata"}]})
            )
        if found := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(\.git/info/lfs/objects/batch|/[\w/.-]+)?", path):
            repository = self.repositories.get(found[1])
            if repository is None:
                return 404, {"error": "Repository not found"}
            return self._repository(found[1], repository, method, found[2] or "", body)
        return 404, {"error": f"no such operation: {method} {path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        # The hub's first commit.
        first = Commit("0" * 40, "initial commit", {".gitattributes": b"*.safetensors filter=lfs"})
        self.repositories[name] = Repository(wanted.get("visibility", "public"), [first])
        return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}

    def _repository(
        self, name: str, repository: Repository, method: str, operation: str, body: bytes
    ) -> tuple[int, Any]:
        head = repository.commits[-1]
        if method == "GET":
            if operation == "/refs":
                tags = [
                    {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
                    for name, oid in repository.tags.items()
                ]
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": head.oid}
                return 200, {"tags": tags, "branches": [main], "converts": []}
            if operation.startswith("/tree/main"):
                files = [
                    {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                    for path, content in sorted(head.files.items())
                ]
                return 200, files
            siblings = [{"rfilename": path} for path in sorted(head.files)]
            return 200, {"id": "x/y", "sha": head.oid, "siblings": siblings, "private": True, "tags": []}
        if operation == "/preupload/main":
            return 200, {"files": [self._mode(head, wanted) for wanted in json.loads(body)["files"]]}
        if operation == ".git/info/lfs/objects/batch":
            return 200, {
                "transfer": "basic",
                "objects": [self._place(wanted) for wanted in json.loads(body)["objects"]],
            }
        if operation == "/commit/main":
            return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        if found := re.fullmatch(r"/tag/([0-9a-f]{40})", operation):
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                return 409, {"error": "Tag already exists"}
            repository.tags[tag] = found[1]
            return 200, {}
        return 404, {"error": f"no such operation: {method} {operation}"}

    def _mode(self, head: Commit, wanted: dict[str, Any]) -> dict[str, Any]:
        path = wanted["path"]
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        known = head.files.get(path)
        oid = None
        if known is not None:
            oid = hashlib.sha256(known).hexdigest() if mode == "lfs" else _oid(known)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self._large:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.url}/storage/{wanted['oid']}"}}}

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = dict(repository.commits[-1].files)
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._large[value["oid"]]
                if hashlib.sha256(content).hexdigest() != value["oid"]:
                    return 400, {"error": "the large file is not what it was said to be"}
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{len(repository.commits)}{sorted(files)}".encode()).hexdigest()
        repository.commits.append(Commit(oid, header["summary"], files))
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


def _oid(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
