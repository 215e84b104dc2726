"""lakeFS's own client against a stand-in that keeps lakeFS's rules, every exchange checked by lakeFS's description."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import lakefs_stand_in
from support.lakefs_stand_in import DESCRIPTION, SECRET, LakeFSStandIn, Repository, ViolationError, description
from support.seaweed import BUCKET, KEYS, SeaweedServer, seaweed  # noqa: F401 - a fixture

from flows.config import PROJECT
from tasks.adapters import files, lakefs_repo
from tasks.adapters.files import StoreError, StoreUnavailableError, filesystem
from tasks.adapters.lakefs_repo import LakeFSRepo, parse_lakefs_url
from vzero_core.errors import ConfigError, InputError

needs_description = pytest.mark.skipif(
    not DESCRIPTION.exists(), reason=f"no {DESCRIPTION.name} beside the project: exchanges go unchecked against it"
)
METADATA = {"run": "small", "code": "0.1.0"}


@pytest.fixture
def lakefs(monkeypatch: pytest.MonkeyPatch) -> Iterator[LakeFSStandIn]:
    with LakeFSStandIn() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        stand_in.create("vision")
        yield stand_in


@pytest.fixture
def kept(lakefs: LakeFSStandIn) -> Repository:
    """What the stand-in keeps of the repository."""
    return lakefs.repositories["vision"]


@pytest.fixture
def repo(lakefs: LakeFSStandIn) -> LakeFSRepo:
    return LakeFSRepo("vision")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    monkeypatch.setattr(lakefs_repo, "_READ_TIMEOUT", 0.1)


def publish(repo: LakeFSRepo, stand_in: LakeFSStandIn, branch: str, content: bytes = b"weights") -> tuple[str, str]:
    """A run from its branch to its tag; the ids of its commit and of its merge."""
    repo.branch(branch, "main")
    stand_in.stage("vision", branch, "model/model.safetensors", content)
    commit = repo.commit(branch, f"outputs of {branch}", METADATA)
    merged = repo.merge(branch, "main", f"publish {branch}", {"digest": "abc"})
    repo.tag("champion", commit)
    return commit, merged


def test_a_run_from_its_input_to_its_tag(lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo) -> None:
    start = repo.pin("main")
    commit, merged = publish(repo, lakefs, "vzero-small-1")
    assert kept.branches == {"main": merged, "vzero-small-1": commit}
    assert kept.tags == {"champion": commit}
    made, merge = kept.commits[commit], kept.commits[merged]
    assert (made.parents, made.message, made.metadata) == ((start,), "outputs of vzero-small-1", METADATA)
    assert (merge.parents, merge.message, merge.metadata) == (
        (start, commit),
        "publish vzero-small-1",
        {"digest": "abc"},
    )
    assert list(made.files) == list(merge.files) == ["model/model.safetensors"]
    assert kept.commits[start].files == {}


def test_a_pin_stays_where_it_was_and_leaves_out_what_is_uncommitted(
    lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo
) -> None:
    lakefs.stage("vision", "main", "train.jsonl", b"1")
    pinned = repo.commit("main", "data", {})
    lakefs.stage("vision", "main", "train.jsonl", b"2")
    assert repo.pin("main") == repo.pin(pinned) == pinned
    newer = repo.commit("main", "more data", {})
    repo.tag("v1", pinned)
    assert repo.pin("main") == newer
    assert repo.pin(pinned) == repo.pin("v1") == pinned
    assert kept.commits[pinned].files != kept.commits[newer].files


def test_a_branch_that_is_there_stays_as_it_is(lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo) -> None:
    start = repo.pin("main")
    repo.branch("vzero-small-1", start)
    lakefs.stage("vision", "main", "train.jsonl", b"1")
    repo.commit("main", "data", {})
    repo.branch("vzero-small-1", "main")
    assert kept.branches["vzero-small-1"] == start


def test_with_nothing_written_a_commit_is_the_branch_s_head(
    lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo
) -> None:
    repo.branch("vzero-small-1", "main")
    assert repo.commit("vzero-small-1", "nothing", METADATA) == repo.pin("main")
    lakefs.stage("vision", "vzero-small-1", "model.txt", b"1")
    commit = repo.commit("vzero-small-1", "something", METADATA)
    # Another attempt writes the same bytes.
    lakefs.stage("vision", "vzero-small-1", "model.txt", b"1")
    assert repo.commit("vzero-small-1", "again", METADATA) == commit
    assert len(kept.commits) == 2


def test_a_commit_refused_for_another_reason_is_not_taken_for_an_empty_one(
    lakefs: LakeFSStandIn, repo: LakeFSRepo
) -> None:
    lakefs.stage("vision", "main", "train.jsonl", b"1")
    lakefs.refuse_next = [400]
    with pytest.raises(StoreError, match=r"commit to branch 'main' .* 400 \(not now\)"):
        repo.commit("main", "data", {})


def test_what_is_merged_already_is_not_merged_again(lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo) -> None:
    _, merged = publish(repo, lakefs, "vzero-small-1")
    assert repo.merge("vzero-small-1", "main", "again", {}) == merged
    lakefs.stage("vision", "main", "train.jsonl", b"1")
    head = repo.commit("main", "data", {})
    assert repo.merge("vzero-small-1", "main", "again", {}) == head
    assert kept.branches["main"] == head


def test_a_second_run_with_the_same_files_leaves_its_name(
    lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo
) -> None:
    repo.branch("vzero-second-1", "main")
    _, first = publish(repo, lakefs, "vzero-first-1")
    commit, second = publish(repo, lakefs, "vzero-second-1")
    assert kept.commits[second].parents == (first, commit)
    assert kept.commits[second].files == kept.commits[first].files


def test_a_tag_moves_and_comes_back_after_a_lost_move(
    lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo
) -> None:
    first, _ = publish(repo, lakefs, "vzero-first-1", b"1")
    second, _ = publish(repo, lakefs, "vzero-second-1", b"2")
    assert kept.tags == {"champion": second}
    # Refused by the server, look up, delete, and then the server is away.
    lakefs.refuse_next = [0, 0, 0, 401]
    with pytest.raises(StoreError, match="401"):
        repo.tag("champion", first)
    assert kept.tags == {}
    repo.tag("champion", first)
    assert kept.tags == {"champion": first}


def test_a_tag_that_is_right_is_not_touched(lakefs: LakeFSStandIn, repo: LakeFSRepo) -> None:
    commit, _ = publish(repo, lakefs, "vzero-first-1")
    # The first answers that there is such a tag, the second where it stands; a third request would fail.
    lakefs.refuse_next = [0, 0, 401]
    repo.tag("champion", commit)
    assert lakefs.refuse_next == [401]


@pytest.mark.parametrize("lost", range(5))
def test_a_change_whose_answer_is_lost_is_made_once(lakefs: LakeFSStandIn, kept: Repository, lost: int) -> None:
    # A run makes four changes: branch, commit, merge, tag. The answer to one is lost; the fifth time to all of them.
    repo = LakeFSRepo("vision")
    lakefs.lose_answers = [int(change == lost or lost == 4) for change in range(4)]
    commit, merged = publish(repo, lakefs, "vzero-small-1")
    assert kept.branches == {"main": merged, "vzero-small-1": commit}
    assert kept.tags == {"champion": commit}
    assert len(kept.commits) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_cannot_now_is_asked_again(lakefs: LakeFSStandIn, repo: LakeFSRepo, status: int) -> None:
    lakefs.refuse_next = [status]
    assert repo.pin("main") == lakefs.repositories["vision"].branches["main"]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_can_is_one_clear_error(lakefs: LakeFSStandIn, repo: LakeFSRepo, status: int) -> None:
    lakefs.refuse_next = [status] * 50
    with pytest.raises(StoreUnavailableError, match=f"must answer for lakefs://vision.*{status}"):
        repo.pin("main")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_is_one_clear_error(lakefs: LakeFSStandIn, repo: LakeFSRepo) -> None:
    lakefs.stop()
    with pytest.raises(StoreUnavailableError, match=r"must answer for lakefs://vision.*refused"):
        repo.pin("main")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_hangs_is_one_clear_error(lakefs: LakeFSStandIn, repo: LakeFSRepo) -> None:
    lakefs.hanging.set()
    with pytest.raises(StoreUnavailableError, match=r"must answer for lakefs://vision.*timed out"):
        repo.commit("main", "data", {})


def wrong_key(stand_in: LakeFSStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", "not-" + SECRET)
    LakeFSRepo("vision").pin("main")


def two_sides(stand_in: LakeFSStandIn, _: Any) -> None:
    repo = LakeFSRepo("vision")
    repo.branch("vzero-second-1", "main")
    publish(repo, stand_in, "vzero-first-1", b"1")
    publish(repo, stand_in, "vzero-second-1", b"2")


def protected(stand_in: LakeFSStandIn, _: Any) -> None:
    stand_in.stage("vision", "main", "train.jsonl", b"1")
    stand_in.repositories["vision"].protected.add("main")
    LakeFSRepo("vision").commit("main", "data", {})


def hooked(stand_in: LakeFSStandIn, _: Any) -> None:
    stand_in.repositories["vision"].hooked.add("main")
    publish(LakeFSRepo("vision"), stand_in, "vzero-small-1")


def dirty(stand_in: LakeFSStandIn, _: Any) -> None:
    stand_in.stage("vision", "main", "train.jsonl", b"1")
    publish(LakeFSRepo("vision"), stand_in, "vzero-small-1")


REFUSALS: list[tuple[Callable[[LakeFSStandIn, Any], object], str]] = [
    (wrong_key, r"know ref 'main' in repository 'vision', got 401 \(error authenticating request\); check the key"),
    (lambda *_: LakeFSRepo("nope").pin("main"), r"in repository 'nope', got 404 \(repository not found\); create it"),
    (lambda *_: LakeFSRepo("vision").pin("v9"), r"know ref 'v9' .* 404 \(commit not found\); create it"),
    (lambda *_: LakeFSRepo("vision").branch("new", "v9"), r"create branch 'new' from 'v9' .* 404 .*; create it"),
    (lambda *_: LakeFSRepo("vision").branch("vzero/a", "main"), r"create branch 'vzero/a' .* 400 .*letters, digits"),
    (lambda *_: LakeFSRepo("vision").commit("v9", "data", {}), r"commit to branch 'v9' .* 404 \(branch not found\)"),
    (lambda *_: LakeFSRepo("vision").merge("v9", "main", "m", {}), r"merge 'v9' into branch 'main' .* 404 "),
    (lambda *_: LakeFSRepo("vision").tag("champion", "v9"), r"let tag 'champion' name commit v9 .* 404 "),
    (protected, r"commit to branch 'main' .* 403 \(cannot commit to protected branch\); the branch is protected"),
    (two_sides, r"merge 'vzero-second-1' into branch 'main' .* 409 \(Conflict\); the same was changed from two sides"),
    (hooked, r"merge 'vzero-small-1' into branch 'main' .* 412 \(pre-merge hook aborted\); a hook"),
    (dirty, r"merge 'vzero-small-1' into branch 'main' .* 400 \(main: uncommitted changes.*or commit what"),
]


@pytest.mark.parametrize(("use", "message"), REFUSALS)
def test_a_refusal_is_one_clear_error(
    lakefs: LakeFSStandIn, monkeypatch: pytest.MonkeyPatch, use: Callable[..., object], message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        use(lakefs, monkeypatch)
    assert not isinstance(caught.value, ConnectionError)
    assert SECRET not in str(caught.value)


def test_a_conflict_leaves_the_branch_as_it_was(lakefs: LakeFSStandIn, kept: Repository, repo: LakeFSRepo) -> None:
    repo.branch("vzero-second-1", "main")
    commit, merged = publish(repo, lakefs, "vzero-first-1", b"1")
    with pytest.raises(StoreError, match="409"):
        publish(repo, lakefs, "vzero-second-1", b"2")
    assert kept.branches["main"] == merged
    assert kept.tags == {"champion": commit}


def test_what_is_not_lakefs_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>lakeFS</html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("LAKECTL_SERVER_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}/repositories")
        monkeypatch.setenv("LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", "secret")
        try:
            with pytest.raises(StoreError, match=r"must answer at \$LAKECTL_SERVER_ENDPOINT_URL.*http://host:8000"):
                LakeFSRepo("vision").pin("main")
        finally:
            server.shutdown()


# --- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", lakefs_repo._SETTINGS.values())
def test_what_the_environment_lacks_is_named(
    lakefs: LakeFSStandIn, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"repository 'vision' .* got no {missing}; set it in the environment"):
        LakeFSRepo("vision")


def test_the_key_is_in_no_log(
    lakefs: LakeFSStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = LakeFSRepo("vision")
    monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", "not-" + SECRET)
    wrong = LakeFSRepo("vision")
    # Making a client sets these to WARNING.
    for name in ("urllib3", "lakefs_sdk"):
        caplog.set_level(logging.DEBUG, name)
    caplog.set_level(logging.DEBUG)
    publish(right, lakefs, "vzero-small-1")
    with pytest.raises(StoreError):
        wrong.pin("main")
    assert {record.name.split(".")[0] for record in caplog.records} >= {"urllib3", "lakefs_sdk"}
    assert SECRET not in caplog.text
    assert lakefs_stand_in.authorization().removeprefix("Basic ") not in caplog.text


def test_lakectl_s_file_is_not_read(lakefs: LakeFSStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The client reads it with a loader that calls what the file says.
    (tmp_path / "lakectl.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    monkeypatch.setenv("LAKECTL_CONFIG_FILE", str(tmp_path / "lakectl.yaml"))
    monkeypatch.setattr("lakefs.config._LAKECTL_YAML_PATH", str(tmp_path / "lakectl.yaml"))
    LakeFSRepo("vision").pin("main")
    assert not (tmp_path / "made").exists()


def test_a_run_without_lakefs_does_not_import_it() -> None:
    code = "import sys, tasks.adapters.lakefs_repo; print([name for name in sys.modules if name.startswith('lakefs')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- URLs ---------------------------------------------------------------------------------------------------------


def test_a_url_is_split() -> None:
    assert parse_lakefs_url("lakefs://vision/main/train.jsonl") == ("vision", "main", "train.jsonl")
    assert parse_lakefs_url("lakefs://a-1/4f2c/a b/c?d#e/") == ("a-1", "4f2c", "a b/c?d#e/")
    assert parse_lakefs_url("lakefs://vision/main") == ("vision", "main", "")
    assert parse_lakefs_url("lakefs://vision/main/") == ("vision", "main", "")


@pytest.mark.parametrize(
    "url",
    [
        "s3://vision/main/train.jsonl",
        "lakefs://vision",
        "lakefs://vision//train.jsonl",
        "lakefs://vision/main//train.jsonl",
        "lakefs:///main/train.jsonl",
        "lakefs://Vision/main/train.jsonl",
        "lakefs://vi/main/train.jsonl",
        "lakefs://vision/my branch/train.jsonl",
        " lakefs://vision/main/train.jsonl",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="must be lakefs://repository/ref/path, got"):
        parse_lakefs_url(url)


REFS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1)
PATHS = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=["Cc"]), min_size=1).filter(
    lambda path: not path.startswith("/")
)


@given(repository=st.from_regex(r"[a-z0-9][a-z0-9-]{2,62}", fullmatch=True), ref=REFS, path=PATHS)
def test_a_url_and_its_parts_are_the_same(repository: str, ref: str, path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in lakefs_repo._SETTINGS.values():
            patch.setenv(name, "http://127.0.0.1:1")
        url = LakeFSRepo(repository).url(ref, path)
    assert parse_lakefs_url(url) == (repository, ref, path)


@pytest.mark.parametrize(("ref", "path"), [("main", "/a"), ("", "a"), ("my branch", "a"), ("v/1", "a")])
def test_what_cannot_stand_in_a_url_is_refused(repo: LakeFSRepo, ref: str, path: str) -> None:
    with pytest.raises(
        InputError, match=r"must be lakefs://repository/ref/path|a ref in a lakeFS URL must have no '/'"
    ):
        repo.url(ref, path)


# --- objects ------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_files_written_to_a_branch_are_what_its_commit_holds(
    lakefs: LakeFSStandIn,
    monkeypatch: pytest.MonkeyPatch,
    seaweed: SeaweedServer,  # noqa: F811
) -> None:
    """A real S3 server plays the gateway; what lies in it under the branch is told to the stand-in by the test."""
    kept = lakefs.create(BUCKET)
    repo = LakeFSRepo(BUCKET)
    monkeypatch.setenv("LAKECTL_SERVER_ENDPOINT_URL", seaweed.endpoint)
    monkeypatch.setenv("LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", KEYS["writer"])
    repo.branch("vzero-small-1", "main")
    for path in ("report.html", "model/config.json"):
        fs, at = filesystem(repo.url("vzero-small-1", path))
        fs.pipe_file(at, path.encode())
    plain = seaweed.client()
    for key in plain.find(f"{BUCKET}/vzero-small-1"):
        lakefs.stage(BUCKET, "vzero-small-1", key.removeprefix(f"{BUCKET}/vzero-small-1/"), plain.cat_file(key))
    commit = repo.commit("vzero-small-1", "outputs", METADATA)
    assert sorted(kept.commits[commit].files) == ["model/config.json", "report.html"]
    assert files.read_bytes(repo.url("vzero-small-1", "report.html")) == b"report.html"


# --- the check of the exchanges -----------------------------------------------------------------------------------


@needs_description
def test_every_operation_is_checked(lakefs: LakeFSStandIn, repo: LakeFSRepo) -> None:
    publish(repo, lakefs, "vzero-first-1", b"1")
    second, _ = publish(repo, lakefs, "vzero-second-1", b"2")
    assert repo.commit("vzero-second-1", "again", {}) == second
    assert set(lakefs.operations) == {
        "createBranch",
        "commit",
        "diffBranch",
        "getBranch",
        "getCommit",
        "diffRefs",
        "mergeIntoBranch",
        "createTag",
        "deleteTag",
    }


COMMITS = "/api/v1/repositories/vision/branches/main/commits"
LOOK_UP = "/api/v1/repositories/vision/commits/main"
DIFF = "/api/v1/repositories/vision/branches/main/diff"
COMMIT = {"id": "1", "parents": [], "committer": "a", "message": "m", "creation_date": 1, "meta_range_id": "2"}


@needs_description
@pytest.mark.parametrize(
    ("method", "path", "query", "kind", "body", "message"),
    [
        ("PUT", LOOK_UP, "", None, None, "no operation PUT"),
        ("GET", "/repositories/vision/commits/main", "", None, None, "answers below /api/v1"),
        ("GET", "/api/v1/repositories/vision/champions", "", None, None, "no operation GET"),
        ("GET", LOOK_UP, "force=true", None, None, "getCommit has no query parameter 'force'"),
        ("GET", LOOK_UP, "", None, {"message": "m"}, "getCommit has no body"),
        ("GET", DIFF, "amount=1001", None, None, "1001 is greater than the maximum"),
        ("GET", DIFF, "amount=some", None, None, "'some' is not of type 'integer'"),
        (
            "GET",
            "/api/v1/repositories/vision/refs/main/diff/a",
            "type=four_dot",
            None,
            None,
            "'four_dot' is not one of",
        ),
        ("GET", "/api/v1/repositories/vision/refs/main/objects", "", None, None, "needs the query parameter 'path'"),
        ("POST", COMMITS, "", "application/json", None, "is not of type|Expecting value"),
        ("POST", COMMITS, "", "application/json", {"metadata": {}}, "'message' is a required property"),
        ("POST", COMMITS, "", "application/json", {"message": "m", "metdata": {}}, "'metdata' was unexpected"),
        ("POST", COMMITS, "", "application/json", {"message": "m", "metadata": {"round": 1}}, "1 is not of type"),
        ("POST", COMMITS, "", "text/plain", {"message": "m"}, "must be one of"),
    ],
)
def test_a_wrong_request_is_refused(
    method: str, path: str, query: str, kind: str | None, body: Any, message: str
) -> None:
    sent = b"" if body is None else json.dumps(body).encode()
    with pytest.raises((ViolationError, json.JSONDecodeError), match=message):
        description().check_request(method, path, query, kind, sent)


@needs_description
@pytest.mark.parametrize(
    ("status", "kind", "body", "message"),
    [
        (418, "application/json", {"message": "m"}, "answer 418 is not described"),
        (404, "application/json", {"error": "m"}, "'message' is a required property|'error' was unexpected"),
        (404, "text/html", "not found", "must be one of"),
        (429, "application/json", {"message": "m"}, "has no body"),
        (200, "application/json", {**COMMIT, "parents": "1"}, "'1' is not of type 'array'"),
        (200, "application/json", {**COMMIT, "creation_date": "now"}, "'now' is not of type 'integer'"),
        (200, "application/json", {**COMMIT, "metadata": {"round": 1}}, "1 is not of type 'string'"),
        (200, "application/json", {**COMMIT, "comitter": "a"}, "'comitter' was unexpected"),
        (200, "application/json", {"id": "1"}, "is a required property"),
        (500, "application/json", {}, "'message' is a required property"),
    ],
)
def test_a_wrong_answer_is_refused(status: int, kind: str, body: Any, message: str) -> None:
    with pytest.raises(ViolationError, match=message):
        description().check_answer("GET", LOOK_UP, status, kind, json.dumps(body).encode())


@needs_description
def test_what_is_right_passes() -> None:
    assert description().check_request("GET", DIFF, "amount=1000&after=", None, b"") == "diffBranch"
    body = json.dumps({"message": "m", "metadata": METADATA}).encode()
    assert description().check_request("POST", COMMITS, "", "application/json", body) == "commit"
    description().check_answer("GET", LOOK_UP, 200, "application/json", json.dumps(COMMIT).encode())
    description().check_answer("GET", LOOK_UP, 429, None, b"")


@needs_description
def test_a_violation_in_the_server_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    described = lakefs_stand_in._described
    monkeypatch.setattr(lakefs_stand_in, "_described", lambda commit: {**described(commit), "committer": None})
    stand_in = LakeFSStandIn()
    for name, value in stand_in.environment.items():
        monkeypatch.setenv(name, value)
    stand_in.create("vision")
    with pytest.raises(ViolationError, match=r"getCommit, answer 200: \$.committer: None is not of type"), stand_in:
        LakeFSRepo("vision").pin("main")
