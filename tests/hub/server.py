"""A Hub on this machine: it answers the requests of the real client, for models and data sets alike.

`LocalHub` holds repositories with branches and commits, large files by their digest, and who has which token. What was
asked and how many bytes arrived is counted; `trouble` makes answers fail.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = 1 << 16
"""Files of so many bytes are sent apart from the commit, as weights are on the Hub."""

PIECE = 1 << 16


@dataclass
class Repository:
    """Branches, each a list of commits, the last one newest; a commit is path -> content."""

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The name and the files of a commit, by its name or by its branch; None where there is neither."""
        if revision in self.branches:
            files = self.branches[revision][-1]
            return make_commit_name(files), files
        commits = [files for branch in self.branches.values() for files in branch]
        return next(((revision, files) for files in commits if make_commit_name(files) == revision), None)


def make_commit_name(files: dict[str, bytes]) -> str:
    """Forty digits, as git has them."""
    return hashlib.sha1(repr(sorted((name, blob(data)) for name, data in files.items())).encode()).hexdigest()


def blob(data: bytes) -> str:
    """What git calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LocalHub:
    """Everything that the server knows.

    Attributes:
        address: what `HF_ENDPOINT` is.
        repositories: `models/owner/name` or `datasets/owner/name` -> it.
        accounts: token -> who it is of: `name`, `orgs`, `role`.
        objects: digest -> content of a large file.
        asked: `METHOD path` of every request.
        arrived: digest -> bytes of it that came in, in all tries.
        trouble: is called with each request before it is answered; returns True where it has answered itself.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.arrived: Counter[str] = Counter()
        self.trouble: Callable[[Any], bool] | None = None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a model's branch."""
        found = self.repositories[f"models/{name}"].at(revision)
        assert found is not None
        return found[1]

    def commits(self, name: str, revision: str = "main") -> int:
        """How many commits a model's branch has, besides the empty first one."""
        return len(self.repositories[f"models/{name}"].branches[revision]) - 1

    @contextmanager
    def running(self) -> Iterator["LocalHub"]:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()


class Answers(BaseHTTPRequestHandler):
    """One connection; `hub` is whose it is."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - as the standard library calls them

    # What every answer has

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/")
        self.hub.asked.append(f"{self.command} /{path}")
        if self.hub.trouble is not None and self.hub.trouble(self):
            return
        words = path.split("/")
        if words[0] == "objects":
            self.receive_object(words[1])
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if words[0] == "api":
            self.answer_api(words[1:], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer_upload_request(json.loads(body))
        elif "resolve" in words:
            where = words.index("resolve")
            key = "/".join(words[:where] if words[0] == "datasets" else ["models", *words[:where]])
            self.send_file(key, words[where + 1], "/".join(words[where + 2 :]))
        else:
            self.refuse(404, "EntryNotFound", "there is nothing")

    def send(self, body: bytes, headers: dict[str, str] | None = None, code: int = 200) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, content: Any, code: int = 200) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"}, code)

    def refuse(self, code: int, error: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": error, "X-Error-Message": message, "Content-Type": "application/json", **(headers or {})},
            code,
        )

    def account(self) -> dict[str, Any] | None:
        """Who asks, by the token."""
        return self.hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, owner: str) -> bool:
        found = self.account()
        return found is not None and found["role"] == "write" and owner in (found["name"], *found["orgs"])

    def repository(self, key: str) -> Repository | None:
        """It, or None after a refusal: private ones are hidden from strangers."""
        found = self.hub.repositories.get(key)
        if found is None or (found.private and self.account() is None):
            self.refuse(401 if self.account() is None else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    # The API

    def answer_api(self, words: list[str], body: bytes) -> None:
        if words == ["whoami-v2"]:
            self.answer_whoami()
        elif words == ["validate-yaml"]:
            self.say({"errors": [], "warnings": []})
        elif words[0] == "repos":
            self.make_or_delete(words[1], json.loads(body))
        elif words[0] in ("models", "datasets") and len(words) >= 3:
            self.answer_repository("/".join(words[:3]), words[3:], body)
        else:
            self.refuse(404, "EntryNotFound", "there is nothing")

    def answer_whoami(self) -> None:
        found = self.account()
        if found is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        orgs = [{"name": name, "roleInOrg": "write"} for name in found["orgs"]]
        access = {"accessToken": {"role": found["role"], "displayName": "tests"}}
        self.say({"type": "user", "name": found["name"], "orgs": orgs, "auth": access})

    def make_or_delete(self, verb: str, wanted: dict[str, Any]) -> None:
        found = self.account()
        owner = wanted.get("organization") or (found or {}).get("name", "")
        if not self.may_write(owner):
            self.refuse(403, "", f"You don't have the rights to create a model under the namespace {owner}")
            return
        key = f"{wanted.get('type', 'model')}s/{owner}/{wanted['name']}"
        if verb == "delete":
            self.hub.repositories.pop(key)
            self.say({})
        elif key in self.hub.repositories:
            self.refuse(409, "", "You already created this model repo")
        else:
            self.hub.repositories[key] = Repository(private=wanted.get("visibility") == "private")
            self.say({"url": f"{self.hub.address}/{owner}/{wanted['name']}", "id": f"{owner}/{wanted['name']}"})

    def answer_repository(self, key: str, words: list[str], body: bytes) -> None:
        if (found := self.repository(key)) is None:
            return
        verb, revision = (*words, "", "")[:2]
        if verb == "branch":
            if revision in found.branches:
                self.refuse(409, "", "Reference already exists")
                return
            found.branches[revision] = [found.branches["main"][-1]]
            self.say({})
            return
        commit = found.at(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif verb in ("preupload", "commit") and not self.may_write(key.split("/")[1]):
            self.refuse(403, "", "You don't have write access to this repository")
        elif verb == "preupload":
            modes = [self.mode(one, commit[1]) for one in json.loads(body)["files"]]
            self.say({"files": modes})
        elif verb == "commit":
            self.receive_commit(key, revision, body)
        elif verb == "tree":
            self.say(
                [tree_entry(path, data) for path, data in commit[1].items() if path.startswith("/".join(words[2:]))]
            )
        else:
            siblings = [{"rfilename": path} for path in commit[1]]
            name = key.partition("/")[2]
            self.say({"id": name, "sha": commit[0], "private": found.private, "siblings": siblings})

    def mode(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        """How a file is to be sent, and what lies there already."""
        old = files.get(asked["path"])
        large = asked["size"] >= LARGE or asked["path"].endswith(".safetensors")
        digest = None if old is None else hashlib.sha256(old).hexdigest() if large else blob(old)
        mode = "lfs" if large else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": digest}

    def receive_commit(self, key: str, revision: str, body: bytes) -> None:
        branch = self.hub.repositories[key].branches[revision]
        files = dict(branch[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        branch.append(files)
        name = make_commit_name(files)
        address = f"{self.hub.address}/{key.removeprefix('models/')}/commit/{name}"
        self.say({"commitUrl": address, "commitOid": name, "success": True})

    # Large files

    def answer_upload_request(self, wanted: dict[str, Any]) -> None:
        objects = []
        for one in wanted["objects"]:
            there = one["oid"] in self.hub.objects
            actions = {} if there else {"actions": {"upload": {"href": f"{self.hub.address}/objects/{one['oid']}"}}}
            objects.append({**one, **actions})
        self.send(
            json.dumps({"transfer": "basic", "objects": objects}).encode(),
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def receive_object(self, digest: str) -> None:
        """Read it piece by piece, counting; it is there once it is complete."""
        left, pieces = int(self.headers["Content-Length"]), []
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                return
            left -= len(piece)
            pieces.append(piece)
            with self.hub.lock:
                self.hub.arrived[digest] += len(piece)
        content = b"".join(pieces)
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.objects[digest] = content
        self.send(b"", {"ETag": digest})

    # Downloads

    def send_file(self, key: str, revision: str, path: str) -> None:
        if (found := self.repository(key)) is None:
            return
        commit = found.at(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", "no such revision")
        elif path not in commit[1]:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit[0]})
        else:
            self.send_range(commit[1][path], {"X-Repo-Commit": commit[0]})

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that is asked for."""
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes", **headers}
        if not (asked := self.headers.get("Range")):
            self.send(content, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), int(last) + 1 if last else len(content)
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        self.send(content[start:stop], headers, 206)


def tree_entry(path: str, data: bytes) -> dict[str, Any]:
    """What a listing says of a file."""
    entry = {"type": "file", "oid": blob(data), "size": len(data), "path": path}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
