"""A small HTTP server that stands in for lakeFS, and a check of every exchange against lakeFS's own API description.

It knows the nine operations that the client uses, and answers as lakeFS's source does: statuses, rules for names,
what counts as a change. It has no S3 gateway: `stage` does what a file written there does.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from flows.config import PROJECT

DESCRIPTION = PROJECT.parent / "shared" / "lakefs-openapi.yml"
KEY, SECRET = "AKIAVZEROSTANDIN", "stand-in/secret+key="
_BASE = "/api/v1"
_JSON = "application/json"


class ViolationError(AssertionError):
    """A request or an answer that lakeFS's description does not allow."""


class ApiDescription:
    """lakeFS's OpenAPI file, as a judge of requests and answers."""

    def __init__(self, path: Path) -> None:
        self.document = yaml.safe_load(path.read_text())
        _close(self.document["components"]["schemas"])
        resource = DRAFT202012.create_resource(self.document)
        self._registry: Registry[Any] = Registry().with_resource("lakefs:", resource)

    def operation(self, method: str, path: str) -> dict[str, Any]:
        """Find what a method and a path, percent-encoded, ask for."""
        base = self.document["servers"][0]["url"]
        if not path.startswith(base):
            raise ViolationError(f"lakeFS answers below {base}, got {path}")
        parts = path.removeprefix(base).split("/")
        matches = [
            (template, item)
            for template, item in self.document["paths"].items()
            if method.lower() in item
            and len(template.split("/")) == len(parts)
            and all(
                ours == theirs or theirs[:1] == "{" for ours, theirs in zip(parts, template.split("/"), strict=True)
            )
        ]
        if not matches:
            raise ViolationError(f"lakeFS has no operation {method} {path}")
        # A name in the path counts before a parameter.
        _, item = min(matches, key=lambda match: match[0].count("{"))
        parameters = [
            self._resolve(entry) for entry in item.get("parameters", []) + item[method.lower()].get("parameters", [])
        ]
        return {**item[method.lower()], "parameters": parameters}

    def check_request(self, method: str, path: str, query: str, kind: str | None, body: bytes) -> str:
        """Check a request and give its operation's id."""
        operation = self.operation(method, path)
        name = operation["operationId"]
        declared = {entry["name"]: entry for entry in operation["parameters"] if entry["in"] == "query"}
        given = dict(parse_qsl(query, keep_blank_values=True))
        for parameter in given.keys() - declared.keys():
            raise ViolationError(f"{name} has no query parameter {parameter!r}")
        for parameter, entry in declared.items():
            if parameter in given:
                self._check(_typed(given[parameter], entry["schema"]), entry["schema"], f"{name}, {parameter}")
            elif entry.get("required"):
                raise ViolationError(f"{name} needs the query parameter {parameter!r}")
        wanted = operation.get("requestBody")
        if wanted is None:
            if body:
                raise ViolationError(f"{name} has no body, got {body!r}")
        elif body or wanted.get("required"):
            self._check_content(wanted["content"], kind, body, f"{name}, body")
        return str(name)

    def check_answer(self, method: str, path: str, status: int, kind: str | None, body: bytes) -> None:
        """Check an answer to a request."""
        operation = self.operation(method, path)
        where = f"{operation['operationId']}, answer {status}"
        # The file's keys are numbers, but for `default`, which speaks of the server's own failures.
        answer = operation["responses"].get(status) or (status >= 500 and operation["responses"]["default"])
        if not answer:
            raise ViolationError(f"{where} is not described")
        content = self._resolve(answer).get("content")
        if content is not None:
            self._check_content(content, kind, body, where)
        elif body:
            raise ViolationError(f"{where} has no body, got {body!r}")

    def _check_content(self, content: dict[str, Any], kind: str | None, body: bytes, where: str) -> None:
        if kind not in content:
            raise ViolationError(f"{where} must be one of {sorted(content)}, got {kind}")
        value = json.loads(body) if kind == _JSON else body.decode()
        self._check(value, content[kind]["schema"], where)

    def _check(self, value: Any, schema: dict[str, Any], where: str) -> None:
        # References inside a schema count from the whole file.
        validator = Draft202012Validator(_absolute(schema), registry=self._registry)
        for error in validator.iter_errors(value):
            raise ViolationError(f"{where}: {error.json_path}: {error.message}")

    def _resolve(self, entry: dict[str, Any]) -> dict[str, Any]:
        reference = entry.get("$ref")
        if reference is None:
            return entry
        return dict(self._registry.resolver("lakefs:").lookup(f"lakefs:{reference}").contents)


@cache
def description() -> ApiDescription:
    """Read lakeFS's description, once."""
    return ApiDescription(DESCRIPTION)


def _close(schemas: dict[str, Any]) -> None:
    """Let no object have fields beyond its description's: else a misspelt one would pass. None used is composed."""
    for schema in schemas.values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)


def _absolute(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "$ref": f"lakefs:{schema['$ref']}"} if "$ref" in schema else schema


def _typed(text: str, schema: dict[str, Any]) -> Any:
    """A query parameter is text; read it as what it should be, or leave it to fail."""
    if schema["type"] == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if schema["type"] == "integer" and re.fullmatch(r"-?\d+", text):
        return int(text)
    return text


def authorization() -> str:
    """The header that a client with the right key sends."""
    return "Basic " + base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer that is an error: its status and what lakeFS's Error schema holds."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Commit:
    id: str
    parents: tuple[str, ...]
    message: str
    metadata: dict[str, str]
    files: dict[str, str]
    """Path to checksum."""
    created: int


@dataclass
class Repository:
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    staged: dict[str, dict[str, str]] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    """Branches that take merges, but neither files nor commits."""
    hooked: set[str] = field(default_factory=set)
    """Branches whose pre-commit and pre-merge hooks refuse."""


class LakeFSStandIn:
    """The server, in a thread of its own; leaving its context fails where any exchange was not lakeFS's."""

    def __init__(self) -> None:
        self.description = description() if DESCRIPTION.exists() else None
        self.repositories: dict[str, Repository] = {}
        self.operations: list[str] = []
        """Operations asked for, in order; empty without the description."""
        self.violations: list[str] = []
        self.refuse_next: list[int] = []
        """Statuses with which the next requests are refused before anything is done; 0 lets one pass."""
        self.lose_answers: list[int] = []
        """Of the next changes: 1 where the change is made, but the connection closed without an answer."""
        self.hanging = threading.Event()
        """While it is set, connections stay open for seconds and nothing answers."""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def environment(self) -> dict[str, str]:
        """What lakectl and the client read."""
        return {
            "LAKECTL_SERVER_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "LAKECTL_CREDENTIALS_ACCESS_KEY_ID": KEY,
            "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": SECRET,
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.violations:
            raise ViolationError("; ".join(self.violations))

    def stop(self) -> None:
        """Stop listening; the address answers no more."""
        self.hanging.clear()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def create(self, name: str) -> Repository:
        """Make a repository with a first commit on `main`."""
        repository = self.repositories[name] = Repository()
        repository.branches["main"] = _add(repository, (), "Repository created", {}, {})
        return repository

    def stage(self, name: str, branch: str, path: str, content: bytes) -> None:
        """Do what writing a file through the S3 gateway does."""
        repository = self.repositories[name]
        if branch in repository.protected:
            raise Refusal(403, "cannot write to protected branch")
        repository.staged.setdefault(branch, {})[path] = hashlib.sha256(content).hexdigest()

    def answer(self, method: str, path: str, query: str, given: str, body: Any) -> tuple[int, str | None, Any]:
        """Give status, media type and value of an answer."""
        with self._lock:
            try:
                if self.refuse_next and (status := self.refuse_next.pop(0)):
                    raise Refusal(status, "not now")
                if given != authorization():
                    raise Refusal(401, "error authenticating request")
                for route_method, pattern, handler in _ROUTES:
                    match = re.fullmatch(_BASE + pattern, path)
                    if match is not None and route_method == method:
                        name, *values = [unquote(part) for part in match.groups()]
                        if name not in self.repositories:
                            raise Refusal(404, "repository not found")
                        return handler(self.repositories[name], *values, body or {}, dict(parse_qsl(query)))
                raise ViolationError(f"the stand-in does not know {method} {path}")
            except Refusal as refusal:
                if refusal.status == 429:
                    return 429, None, None
                return refusal.status, _JSON, {"message": str(refusal)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body go out apart; else the second waits for the first to be acknowledged.
    disable_nagle_algorithm = True

    def __init__(self, stand_in: LakeFSStandIn, *args: Any) -> None:
        self._stand_in = stand_in
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        """A test's output is no place for an access log."""

    def _serve(self) -> None:
        stand_in, url = self._stand_in, urlsplit(self.path)
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if stand_in.hanging.is_set():
            # Not for ever, else a client without a timeout hangs the test instead of failing it.
            deadline = time.monotonic() + 5.0
            while stand_in.hanging.is_set() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.close_connection = True
            return
        try:
            if stand_in.description is not None:
                kind = self.headers.get("Content-Type")
                stand_in.operations.append(
                    stand_in.description.check_request(self.command, url.path, url.query, kind, sent)
                )
            given = self.headers.get("Authorization", "")
            value = json.loads(sent) if sent else None
            status, kind, answer = stand_in.answer(self.command, url.path, url.query, given, value)
            content = b"" if kind is None else answer.encode() if kind != _JSON else json.dumps(answer).encode()
            if stand_in.description is not None:
                stand_in.description.check_answer(self.command, url.path, status, kind, content)
        except Exception as error:
            # Told to the test by the context manager: this thread's exceptions reach nobody.
            stand_in.violations.append(f"{type(error).__name__}: {error}")
            status, kind, content = 422, _JSON, b'{"message": "not in the description"}'
        if self.command != "GET" and stand_in.lose_answers and stand_in.lose_answers.pop(0):
            self.close_connection = True
            return
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = do_PUT = _serve  # noqa: N815 - the base class's names


# --- what lakeFS does ---------------------------------------------------------------------------------------------

Answer = tuple[int, str | None, Any]


def _add(
    repository: Repository, parents: tuple[str, ...], message: str, metadata: dict[str, str], files: dict[str, str]
) -> str:
    content = json.dumps([parents, message, metadata, files, len(repository.commits)])
    id_ = hashlib.sha256(content.encode()).hexdigest()
    repository.commits[id_] = Commit(id_, parents, message, metadata, files, int(time.time()))
    return id_


def _branch(repository: Repository, name: str) -> str:
    if name not in repository.branches:
        raise Refusal(404, "branch not found")
    return repository.branches[name]


def _commit(repository: Repository, ref: str) -> Commit:
    id_ = repository.branches.get(ref) or repository.tags.get(ref) or ref
    if id_ not in repository.commits:
        raise Refusal(404, "commit not found")
    return repository.commits[id_]


def _changes(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """Paths that differ, and how."""
    return {
        path: "added" if path not in before else "removed" if path not in after else "changed"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def _ancestors(repository: Repository, id_: str) -> list[str]:
    """The commit and all before it."""
    found = [id_]
    for one in found:
        found += [parent for parent in repository.commits[one].parents if parent not in found]
    return found


def _merge_base(repository: Repository, one: str, other: str) -> Commit:
    """The common ancestor that is not behind another one."""
    common = set(_ancestors(repository, one)) & set(_ancestors(repository, other))
    behind = {parent for id_ in common for parent in repository.commits[id_].parents}
    return repository.commits[min(common - behind)]


def _staged_changes(repository: Repository, branch: str) -> dict[str, str]:
    files = repository.commits[_branch(repository, branch)].files
    return _changes(files, {**files, **repository.staged.get(branch, {})})


def _diff_list(changes: dict[str, str], query: dict[str, str]) -> Answer:
    after, amount = query.get("after", ""), int(query.get("amount", 100))
    paths = [path for path in changes if path > after]
    page = paths[:amount]
    pagination = {
        "has_more": len(paths) > len(page),
        "next_offset": page[-1] if len(paths) > len(page) else "",
        "results": len(page),
        "max_per_page": 1000,
    }
    results = [{"type": changes[path], "path": path, "path_type": "object"} for path in page]
    return 200, _JSON, {"pagination": pagination, "results": results}


def _get_branch(repository: Repository, name: str, _: Any, __: Any) -> Answer:
    return 200, _JSON, {"id": name, "commit_id": _branch(repository, name)}


def _create_branch(repository: Repository, body: Any, _: Any) -> Answer:
    name = body["name"]
    if not re.fullmatch(r"\w[-\w]*", name):
        raise Refusal(400, "argument branch: branch id: invalid value: validation error")
    if name in repository.branches:
        raise Refusal(409, "branch already exists: not unique")
    repository.branches[name] = _commit(repository, body["source"]).id
    return 201, "text/html", repository.branches[name]


def _diff_branch(repository: Repository, branch: str, _: Any, query: dict[str, str]) -> Answer:
    return _diff_list(_staged_changes(repository, branch), query)


def _create_commit(repository: Repository, branch: str, body: Any, _: Any) -> Answer:
    head = repository.commits[_branch(repository, branch)]
    if branch in repository.protected:
        raise Refusal(403, "cannot commit to protected branch")
    if branch in repository.hooked:
        raise Refusal(412, "pre-commit hook aborted")
    if not _staged_changes(repository, branch) and not body.get("allow_empty"):
        raise Refusal(400, "commit: no changes")
    files = {**head.files, **repository.staged.pop(branch, {})}
    id_ = repository.branches[branch] = _add(repository, (head.id,), body["message"], body.get("metadata") or {}, files)
    return 201, _JSON, _described(repository.commits[id_])


def _get_commit(repository: Repository, ref: str, _: Any, __: Any) -> Answer:
    return 200, _JSON, _described(_commit(repository, ref))


def _described(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.id,
        "parents": list(commit.parents),
        "committer": "stand-in",
        "message": commit.message,
        "creation_date": commit.created,
        "meta_range_id": hashlib.sha256(json.dumps(commit.files, sort_keys=True).encode()).hexdigest(),
        "metadata": commit.metadata,
    }


def _diff_refs(repository: Repository, left: str, right: str, _: Any, query: dict[str, str]) -> Answer:
    before, after = _commit(repository, left), _commit(repository, right)
    if query.get("type", "three_dot") == "three_dot":
        before = _merge_base(repository, before.id, after.id)
    return _diff_list(_changes(before.files, after.files), query)


def _merge(repository: Repository, source: str, into: str, body: Any, _: Any) -> Answer:
    ours, theirs = repository.commits[_branch(repository, into)], _commit(repository, source)
    if into in repository.hooked:
        raise Refusal(412, "pre-merge hook aborted")
    if _staged_changes(repository, into):
        raise Refusal(400, f"{into}: uncommitted changes (dirty branch)")
    base = _merge_base(repository, ours.id, theirs.id)
    our_changes, their_changes = _changes(base.files, ours.files), _changes(base.files, theirs.files)
    if any(ours.files.get(path) != theirs.files.get(path) for path in our_changes.keys() & their_changes.keys()):
        return 409, _JSON, {"reference": ""}
    files = {**ours.files, **{path: theirs.files[path] for path in their_changes}}
    if files == ours.files and not body.get("allow_empty"):
        raise Refusal(400, "no changes")
    parents = (ours.id, theirs.id)
    id_ = repository.branches[into] = _add(
        repository, parents, body.get("message", ""), body.get("metadata") or {}, files
    )
    return 200, _JSON, {"reference": id_}


def _create_tag(repository: Repository, body: Any, _: Any) -> Answer:
    if body["id"] in repository.tags:
        raise Refusal(409, "tag already exists: not unique")
    repository.tags[body["id"]] = _commit(repository, body["ref"]).id
    return 201, _JSON, {"id": body["id"], "commit_id": repository.tags[body["id"]]}


def _delete_tag(repository: Repository, name: str, _: Any, __: Any) -> Answer:
    if repository.tags.pop(name, None) is None:
        raise Refusal(404, "tag not found")
    return 204, None, None


_ONE = "([^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", f"/repositories/{_ONE}/branches/{_ONE}", _get_branch),
    ("POST", f"/repositories/{_ONE}/branches", _create_branch),
    ("GET", f"/repositories/{_ONE}/branches/{_ONE}/diff", _diff_branch),
    ("POST", f"/repositories/{_ONE}/branches/{_ONE}/commits", _create_commit),
    ("GET", f"/repositories/{_ONE}/commits/{_ONE}", _get_commit),
    ("GET", f"/repositories/{_ONE}/refs/{_ONE}/diff/{_ONE}", _diff_refs),
    ("POST", f"/repositories/{_ONE}/refs/{_ONE}/merge/{_ONE}", _merge),
    ("POST", f"/repositories/{_ONE}/tags", _create_tag),
    ("DELETE", f"/repositories/{_ONE}/tags/{_ONE}", _delete_tag),
]
