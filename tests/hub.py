"""A small Hub on loopback, for the real client: repositories, commits, branches, pull requests and large files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_loopback"
LARGE = (".safetensors", ".bin", ".pt", ".pth")  # kept as large files, whatever their size
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


@dataclass
class Commit:
    """A state of a repository: its files by path, each as the SHA-256 of what it holds."""

    message: str
    parent: str | None
    files: dict[str, str]


@dataclass
class Repo:
    """A repository's commits by their ids, and where its branches and pull requests are."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, commit: Commit) -> str:
        oid = hashlib.sha1(repr((len(self.commits), commit)).encode()).hexdigest()
        self.commits[oid] = commit
        self.refs[ref] = oid
        return oid


class Hub(ThreadingHTTPServer):
    """
    The Hub's part of what `huggingface_hub` does with models, but for Xet: the client needs `HF_HUB_DISABLE_XET=1`.

    Used as a context manager, it serves at `url`. Whoever sends `TOKEN` may write everywhere and read private models.

    Args:
        folder (`Path`):
            Where the contents of all files are kept, under their SHA-256.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder = folder
        self.repos: dict[str, Repo] = {}
        self.unknown: list[str] = []  # requests that no route is for
        # By repository, and by "uploads" for large files: what happens to the next of them: "", "refuse" or "hang up"
        self.failures: dict[str, list[str]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision."""
        repo = self.repos[repo_id]
        commit = repo.commits[repo.refs.get(revision, revision)]
        return {path: (self.folder / sha).read_bytes() for path, sha in commit.files.items()}

    def log(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first, without the one that made the repository."""
        repo = self.repos[repo_id]
        commit, commits = repo.commits[repo.refs.get(revision, revision)], []
        while commit.parent:
            commits.append(commit)
            commit = repo.commits[commit.parent]
        return commits

    def keep(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.folder / sha).write_bytes(content)
        return sha

    def oid(self, path: str, sha: str) -> str:
        """What the Hub calls a file's content: git's SHA-1, or the SHA-256 of a large file."""
        if path.endswith(LARGE):
            return sha
        content = (self.folder / sha).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def next_failure(self, of: str) -> str:
        with self.lock:
            failures = self.failures.get(of)
            return failures.pop(0) if failures else ""


class Refusal(Exception):
    """An answer other than what was asked for: a status, and the code by which the client knows the reason."""

    def __init__(self, status: int, code: str = "", **answer: Any):
        self.status, self.code, self.answer = status, code, answer


def route(methods: str, pattern: str) -> Callable:
    """Registers a handler, which takes the pattern's groups; REPO, REV and PATH are groups."""
    for name, group in {"REPO": "([^/]+/[^/]+?)", "REV": "([^/]+)", "PATH": "(.+)"}.items():
        pattern = pattern.replace(name, group)

    def register(handle: Callable) -> Callable:
        ROUTES.extend((method, re.compile(pattern), handle) for method in methods.split("|"))
        return handle

    return register


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.left = int(self.headers.get("Content-Length", 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, handle in ROUTES:
            found = pattern.fullmatch(url.path)
            if found and method == self.command:
                try:
                    handle(self, *(group and unquote(group) for group in found.groups()))
                except Refusal as refusal:
                    self.answer(refusal.answer, refusal.status, {"X-Error-Code": refusal.code})
                return
        self.server.unknown.append(f"{self.command} {self.path}")
        self.answer({}, 404)

    do_HEAD = do_GET = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        content, self.left = self.rfile.read(self.left), 0
        return content

    def hang_up(self) -> None:
        """Ends the connection in the middle of what the client sends."""
        self.rfile.read(self.left // 2)
        self.close_connection = True

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.body()
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.server.repos.get(repo_id)
        if write and not known:
            raise Refusal(401)
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound")
        return repo

    def commit(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return oid, repo.commits[oid]

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        fields = json.loads(self.body())
        repo_id = f"{fields['organization'] or 'user'}/{fields['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            raise Refusal(409, url=url)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401)
        repo = Repo(fields.get("visibility") == "private" or fields.get("private", False))
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
        repo.add("main", Commit("initial commit", None, {".gitattributes": self.server.keep(attributes.encode())}))
        self.server.repos[repo_id] = repo
        self.answer({"url": url})

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        self.answer({"errors": [], "warnings": []})

    @route("GET", "/api/models/REPO(?:/revision/REV)?")
    def info(self, repo_id: str, revision: str | None) -> None:
        repo = self.repo(repo_id)
        oid, commit = self.commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        self.answer({"id": repo_id, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})

    @route("GET", "/api/models/REPO/tree/REV(?:/PATH)?")
    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        _, commit = self.commit(self.repo(repo_id), revision)
        prefix, entries = f"{folder}/" if folder else "", {}
        for path, sha in commit.files.items():
            inner = path.removeprefix(prefix)
            if path.startswith(prefix) and "/" in inner and self.query.get("recursive") != ["true"]:
                path = prefix + inner.split("/")[0]
                entries[path] = {"type": "directory", "path": path, "oid": sha}
            elif path.startswith(prefix):
                size = (self.server.folder / sha).stat().st_size
                large = {"lfs": {"oid": sha, "size": size, "pointerSize": 130}} if path.endswith(LARGE) else {}
                entries[path] = {
                    "type": "file",
                    "path": path,
                    "size": size,
                    "oid": self.server.oid(path, sha),
                    **large,
                }
        if folder and not entries:
            raise Refusal(404, "EntryNotFound")
        self.answer(list(entries.values()))

    @route("POST", "/api/models/REPO/branch/REV")
    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id, write=True)
        if branch in repo.refs:
            raise Refusal(409)
        repo.refs[branch], _ = self.commit(repo, json.loads(self.body()).get("startingPoint", "main"))
        self.answer({})

    @route("POST", "/api/models/REPO/preupload/REV")
    def preupload(self, repo_id: str, revision: str) -> None:
        _, commit = self.commit(self.repo(repo_id, write=True), revision)
        files = []
        for path in (file["path"] for file in json.loads(self.body())["files"]):
            oid = self.server.oid(path, commit.files[path]) if path in commit.files else None
            mode = "lfs" if path.endswith(LARGE) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    @route("POST", "/REPO\\.git/info/lfs/objects/batch")
    def batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        objects = json.loads(self.body())["objects"]
        for entry in objects:
            if not (self.server.folder / entry["oid"]).exists():
                href = f"{self.server.url}/objects/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/objects/REV")
    def upload(self, sha: str) -> None:
        if self.server.next_failure("uploads"):
            return self.hang_up()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != sha:
            raise Refusal(400)
        self.server.keep(content)
        return self.answer({})

    @route("POST", "/objects/REV/verify")
    def verify(self, sha: str) -> None:
        self.answer({}, 200 if (self.server.folder / sha).exists() else 404)

    @route("POST", "/api/models/REPO/commit/REV")
    def add_commit(self, repo_id: str, ref: str) -> None:
        failure = self.server.next_failure(repo_id)
        if failure == "hang up":
            return self.hang_up()
        lines = [json.loads(line) for line in self.body().splitlines()]
        if failure:
            raise Refusal(500)
        with self.server.lock:
            repo = self.repo(repo_id, write=True)
            parent, before = self.commit(repo, ref)
            commit = Commit(lines[0]["value"]["summary"], parent, dict(before.files))
            for value, key in ((line["value"], line["key"]) for line in lines[1:]):
                if key == "file":
                    commit.files[value["path"]] = self.server.keep(base64.b64decode(value["content"]))
                elif key == "lfsFile" and (self.server.folder / value["oid"]).exists():
                    commit.files[value["path"]] = value["oid"]
                elif key == "deletedFile":
                    del commit.files[value["path"]]
                else:
                    raise Refusal(400)
            answer = {}
            if "create_pr" in self.query:
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
            oid = repo.add(ref, commit)
        return self.answer({"commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", **answer})

    @route("GET|HEAD", "/REPO/resolve/REV/PATH")
    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        oid, commit = self.commit(self.repo(repo_id), revision)
        headers = {"X-Repo-Commit": oid}
        if path not in commit.files:
            return self.answer({}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        sha = commit.files[path]
        content = (self.server.folder / sha).read_bytes()
        headers["ETag"] = f'"{self.server.oid(path, sha)}"'
        if path.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        return self.answer(content, 200, headers)
