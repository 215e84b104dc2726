"""lakeFS's one address: the API's stand-in behind `/api/`, a real S3 server as its gateway behind all else."""

import hashlib
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from support.lakefs_stand_in import LakeFSStandIn
from support.seaweed import SeaweedServer


class LakeFSGateway:
    """A TCP line to both servers; S3 signatures hold, for nothing of a request is changed.

    `lakefs://repository/ref/path` is bucket `repository`, key `ref/path`. The two servers do not know each other: what
    lies under a branch is told to the stand-in before each change of the API, and what a commit, branch or tag holds
    is copied to where it is read before the change is answered. A deleted file is one with an empty checksum.
    """

    def __init__(self, stand_in: LakeFSStandIn, storage: SeaweedServer) -> None:
        """Listen on a port of its own."""
        self._stand_in = stand_in
        self._objects = storage.client()
        addresses = (stand_in.environment["LAKECTL_SERVER_ENDPOINT_URL"], storage.endpoint)
        self._api, self._storage = (("127.0.0.1", urlsplit(address).port or 0) for address in addresses)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        """Method and path of all requests that came, in order."""
        self.before_answer: Callable[[str], None] = lambda request: None
        """Called with each request to the API when it is done, but before its client knows."""
        self._contents: dict[str, bytes] = {}
        self._shown: dict[tuple[str, str], str] = {}
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            data = client.recv(1 << 16)
            to_api = b" /api/" in data.partition(b"\r\n")[0]
            with socket.create_connection(self._api if to_api else self._storage) as server:
                asked: list[str] = []
                threading.Thread(target=self._reply, args=(server, client, asked), daemon=True).start()
                while data:
                    # Nobody pipelines: a request begins where data begins.
                    if found := re.match(rb"(PUT|GET|POST|DELETE|HEAD) (\S+) HTTP/1.1\r\n", data):
                        request = b" ".join(found.groups()).decode()
                        self.requests.append(request)
                        if to_api:
                            asked.append(request)
                            if not request.startswith("GET"):
                                self._stage()
                    server.sendall(data)
                    data = client.recv(1 << 16)

    def _reply(self, server: socket.socket, client: socket.socket, asked: list[str]) -> None:
        try:
            while data := server.recv(1 << 16):
                if asked:
                    self._show()
                    self.before_answer(asked.pop())
                client.sendall(data)
        except ConnectionError:
            pass
        finally:
            # Who waits for a reply must learn that none comes.
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _stage(self) -> None:
        """Tell the stand-in what lies under each branch."""
        for name, repository in self._stand_in.repositories.items():
            for branch, head in repository.branches.items():
                root = f"{name}/{branch}/"
                found = self._objects.cat(self._objects.find(root))
                for path, content in found.items():
                    self._contents[hashlib.sha256(content).hexdigest()] = content
                    self._stand_in.stage(name, branch, path.removeprefix(root), content)
                deleted = {path: "" for path in repository.commits[head].files if root + path not in found}
                repository.staged.setdefault(branch, {}).update(deleted)

    def _show(self) -> None:
        """Put what each commit, branch and tag holds where it is read."""
        for name, repository in self._stand_in.repositories.items():
            refs = {**{id_: id_ for id_ in repository.commits}, **repository.branches, **repository.tags}
            for ref, id_ in refs.items():
                if self._shown.get((name, ref)) == id_:
                    continue
                files = {f"{name}/{ref}/{path}": sha256 for path, sha256 in repository.commits[id_].files.items()}
                self._objects.pipe({path: self._contents[sha256] for path, sha256 in files.items() if sha256})
                for path in (path for path, sha256 in files.items() if not sha256):
                    self._objects.rm_file(path)
                self._shown[name, ref] = id_
