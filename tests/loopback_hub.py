"""A small Hub on 127.0.0.1 for tests: real HTTP, real commits, no mocks.

It speaks what huggingface_hub and transformers ask for when they create, upload, list and download
(without Xet), and can be told to fail. `HF_ENDPOINT` is read when huggingface_hub is imported, so
code that finds the Hub by itself runs in another process: see `LoopbackHub.run`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Put together here so that no file in the repository looks as if it held a token.
TOKEN = "hf_" + "t" * 34
LFS_SUFFIXES = (".safetensors", ".png")
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Commit:
    """One state of a repository: path -> bytes."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits in order, and where its branches and pull requests point."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, ref: str = "main", parent: str | None = None) -> Commit:
        oid = hashlib.sha1(repr((len(self.commits), message, sorted(files))).encode()).hexdigest()
        self.commits.append(Commit(oid, parent, message, files))
        self.refs[ref] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision) or self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def head(self) -> Commit:
        """The newest commit of the main branch."""
        commit = self.at("main")
        assert commit is not None
        return commit


@dataclass
class Fault:
    """What to do instead of answering, how many more times, and whether the work is done all the same."""

    status: int
    times: int
    late: bool
    headers: dict[str, str]


@dataclass
class Answer:
    """What goes back to the client."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def reply(value: object, status: int = 200) -> Answer:
    """Returns an answer in JSON."""
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def missing(code: str) -> Answer:
    """Returns the Hub's 404 for an entry, a revision or a repository."""
    return Answer(status=404, headers={"X-Error-Code": code})


class LoopbackHub:
    """The server and its state.

    Attributes:
        url: Where it listens.
        repos: Every repository by `ORG/NAME`.
        calls: How often each endpoint was asked, by the names in `ROUTES`.
        writers: The organizations that the token may write to.
        before: Functions that run before an endpoint answers, to meddle.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.writers = {"org"}
        self.before: dict[str, Callable[[], object]] = {}
        self._faults: dict[str, Fault] = {}
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, endpoint: str, status: int, times: int = 1, *, late: bool = False, **headers: str) -> None:
        """Makes the next `times` calls of an endpoint fail; `late` ones do their work before."""
        assert endpoint in {name for name, *_ in ROUTES}, endpoint
        self._faults[endpoint] = Fault(status, times, late, {k.replace("_", "-"): v for k, v in headers.items()})

    def run(self, code: str, home: Path, *, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a new process for which this is the Hub, logged in with `token`."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        env |= {"HF_TOKEN": token} if token else {}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)

    @contextmanager
    def serving(self) -> Iterator[LoopbackHub]:
        """Listens until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def answer(self, method: str, path: str, body: bytes, authorization: str | None) -> Answer:
        """Finds the endpoint and lets it answer, unless it is told to fail."""
        for name, verbs, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is None or method not in verbs:
                continue
            if meddle := self.before.pop(name, None):
                meddle()
            with self._lock:
                self.calls[name] += 1
                fault = self._faults.get(name)
                if fault is None or fault.times <= 0:
                    return self._guarded(name, method, endpoint, match, body, authorization)
                fault.times -= 1
                if fault.late:
                    self._guarded(name, method, endpoint, match, body, authorization)
                return Answer(b'{"error": "told to fail"}', fault.status, fault.headers)
        return Answer(f"no endpoint for {method} {path}".encode(), 404)

    def _guarded(
        self,
        name: str,
        method: str,
        endpoint: Callable[..., Answer],
        match: re.Match[str],
        body: bytes,
        authorization: str | None,
    ) -> Answer:
        groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        repo, trusted = groups.get("repo"), authorization == f"Bearer {TOKEN}"
        if not trusted and (authorization or name in WRITING or (repo in self.repos and self.repos[repo].private)):
            return Answer(b'{"error": "Invalid username or password."}', 401)
        if repo is not None and repo not in self.repos:
            return missing("RepoNotFound")
        proposes = name == "batch" or "create_pr=1" in match.string
        if name in WRITING and repo is not None and repo.split("/")[0] not in self.writers and not proposes:
            return Answer(b'{"error": "no write access"}', 403)
        return endpoint(self, body, **groups)

    def _create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        if asked["organization"] not in self.writers:
            return Answer(b'{"error": "no write access"}', 403)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return reply({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.add(name, private=asked.get("visibility") == "private")
        return reply({"url": f"{self.url}/{name}", "name": name})

    def add(self, name: str, *, private: bool = False) -> Repo:
        """Makes a repository as the Hub does: with a first commit that holds .gitattributes."""
        self.repos[name] = Repo(private)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.repos[name]

    def _validate(self, body: bytes) -> Answer:
        if "forbidden: true" in json.loads(body)["content"]:
            return reply({"errors": [{"message": "'forbidden' is not allowed"}], "warnings": []}, 400)
        return reply({"errors": [], "warnings": []})

    def _info(self, body: bytes, repo: str, rev: str = "main") -> Answer:
        commit = self.repos[repo].at(rev)
        if commit is None:
            return missing("RevisionNotFound")
        files = [{"rfilename": name} for name in sorted(commit.files)]
        return reply({"id": repo, "sha": commit.oid, "private": self.repos[repo].private, "siblings": files})

    def _branch(self, body: bytes, repo: str, rev: str) -> Answer:
        if rev in self.repos[repo].refs:
            return reply({"error": "Reference already exists"}, 409)
        self.repos[repo].refs[rev] = self.repos[repo].head.oid
        return reply({})

    def _tag(self, body: bytes, repo: str, rev: str) -> Answer:
        commit, name = self.repos[repo].at(rev), json.loads(body)["tag"]
        if commit is None:
            return missing("RevisionNotFound")
        if name in self.repos[repo].tags:
            return reply({"error": "Tag reference exists already"}, 409)
        self.repos[repo].tags[name] = commit.oid
        return reply({})

    def _refs(self, body: bytes, repo: str) -> Answer:
        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches = {name: oid for name, oid in self.repos[repo].refs.items() if not name.startswith("refs/")}
        return reply(
            {"branches": listed("heads", branches), "converts": [], "tags": listed("tags", self.repos[repo].tags)}
        )

    def _tree(self, body: bytes, repo: str, rev: str) -> Answer:
        commit = self.repos[repo].at(rev)
        if commit is None:
            return missing("RevisionNotFound")
        return reply([_entry(name, data) for name, data in sorted(commit.files.items())])

    def _preupload(self, body: bytes, repo: str, rev: str) -> Answer:
        commit = self.repos[repo].at(rev)
        if commit is None:
            return missing("RevisionNotFound")
        ignored = commit.files.get(".gitignore", b"").decode().split()
        files = []
        for name in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": name in ignored})
        return reply({"files": files})

    def _batch(self, body: bytes, repo: str) -> Answer:
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return reply({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return reply({"error": "the digest is wrong"}, 400)
        self.objects[oid] = body
        return reply({})

    def _commit(self, body: bytes, repo: str, rev: str, pr: str | None = None) -> Answer:
        there = self.repos[repo]
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines.pop(0)["value"]
        base = there.at(rev)
        if base is None:
            return missing("RevisionNotFound")
        if header.get("parentCommit") not in (None, base.oid) and not pr:
            return reply({"error": "The repository was updated; parent commit is stale"}, 412)
        files = dict(base.files)
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                del files[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in there.refs)
        done = there.commit(files, header["summary"], f"refs/pr/{number}" if pr else rev, base.oid)
        urls = {"commitUrl": f"{self.url}/{repo}/commit/{done.oid}", "commitOid": done.oid}
        return reply(urls | {"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if pr else urls)

    def _resolve(self, body: bytes, repo: str, rev: str, path: str) -> Answer:
        commit = self.repos[repo].at(rev)
        if commit is None:
            return missing("RevisionNotFound")
        if path not in commit.files:
            return Answer(status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        data = commit.files[path]
        entry = _entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        return Answer(data, 200, headers)


def _entry(name: str, data: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": git}
    if not name.endswith(LFS_SUFFIXES):
        return entry
    return entry | {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


WRITING = {"create", "branch", "tag", "preupload", "batch", "commit"}
ROUTES: tuple[tuple[str, tuple[str, ...], str, Callable[..., Answer]], ...] = (
    ("create", ("POST",), r"/api/repos/create", LoopbackHub._create),
    ("validate", ("POST",), r"/api/validate-yaml", LoopbackHub._validate),
    ("branch", ("POST",), rf"/api/models/{_REPO}/branch/(?P<rev>[^/]+)", LoopbackHub._branch),
    ("tag", ("POST",), rf"/api/models/{_REPO}/tag/(?P<rev>[^/]+)", LoopbackHub._tag),
    ("refs", ("GET",), rf"/api/models/{_REPO}/refs(\?.*)?", LoopbackHub._refs),
    (
        "preupload",
        ("POST",),
        rf"/api/models/{_REPO}/preupload/(?P<rev>[^/?]+)(\?.*)?",
        LoopbackHub._preupload,
    ),
    (
        "commit",
        ("POST",),
        rf"/api/models/{_REPO}/commit/(?P<rev>[^/?]+)(\?create_pr=(?P<pr>1))?",
        LoopbackHub._commit,
    ),
    ("tree", ("GET",), rf"/api/models/{_REPO}/tree/(?P<rev>[^/?]+)(\?.*)?", LoopbackHub._tree),
    ("info", ("GET",), rf"/api/models/{_REPO}(/revision/(?P<rev>[^/?]+))?(\?.*)?", LoopbackHub._info),
    ("batch", ("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub._batch),
    ("put", ("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", LoopbackHub._put),
    (
        "resolve",
        ("GET", "HEAD"),
        rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>[^?]+)(\?.*)?",
        LoopbackHub._resolve,
    ),
)


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output clean."""

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            path = url.path + (f"?{url.query}" if url.query else "")
            answer = hub.answer(self.command, path, body, self.headers.get("Authorization"))
            answer = self._part(answer)
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        def _part(self, answer: Answer) -> Answer:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None or answer.status != 200:
                return answer
            first, size = int(asked[1]), len(answer.body)
            last = min(int(asked[2] or size - 1), size - 1)
            headers = answer.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
            return Answer(answer.body[first : last + 1], 206, headers)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    return Handler
