"""The part of the Hub's HTTP API that an upload and a download need: huggingface_hub's own code talks to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN, USER = "hf_of_the_test", "me"


@dataclass
class Repository:
    """Its commits, oldest first: each has all files; a repository begins with .gitattributes, as on the Hub."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors filter=lfs\n"}])

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.head.items()))).encode()).hexdigest()


@dataclass
class FakeHub:
    """What the server keeps. `refuse` maps a part of a path to the status that requests to it get."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    before_commit: Any = None

    def write(self, repo_id: str, folder: Path) -> Path:
        """The files of a repository's head, in a folder."""
        for name, content in self.repositories[repo_id].head.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


def metadata_errors(content: str) -> list[str]:
    """The rules of the Hub that concern a model's card, as far as its error messages tell them."""
    match = re.match(r"^\s*---\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    if match is None:
        return []
    data = yaml.safe_load(match[1])
    if not isinstance(data, dict):
        return ["metadata must be an object"]

    def listed(name: str) -> list[Any]:
        value = data.get(name, [])
        return value if isinstance(value, list) else [value]

    errors = [
        f'"{n}" must be a string' for n in ("license", "library_name", "pipeline_tag") if not isinstance(data.get(n, ""), str)
    ]
    errors += [f'"tags" must hold strings: {t!r}' for t in listed("tags") if not isinstance(t, str)]
    errors += [f'"language" has no valid code: {t!r}' for t in listed("language") if not re.fullmatch(r"[a-z-]{2,12}", str(t))]
    repo = r"[\w.-]{1,96}(/[\w.-]{1,96})?"
    errors += [
        f'"{n}" is no id: {i!r}' for n in ("base_model", "datasets") for i in listed(n) if not re.fullmatch(repo, str(i))
    ]
    relations = ("adapter", "merge", "quantized", "finetune")
    errors += ["bad base_model_relation"] if data.get("base_model_relation", "merge") not in relations else []
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys() or not {"type", "name"} <= result["dataset"].keys():
                errors.append("bad model-index")
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.hub.requests.append(f"{self.command} {path}")
        refused = next((status for part, status in self.hub.refuse.items() if part in f"{self.command} {path}"), None)
        if refused is not None:
            return self.reply({"error": "refused by the test"}, refused)
        for pattern, name in _ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return getattr(self, name)(body, **match.groupdict())
        self.hub.unknown.append(f"{self.command} {self.path}")
        return self.reply({"error": f"no such route: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def missing(self, code: str) -> None:
        self.reply({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self.may_write:
            return self.reply({"error": "Invalid username or password."}, 401)
        known = repo_id in self.hub.repositories
        if not known:
            self.hub.repositories[repo_id] = Repository(asked.get("visibility") == "private")
        return self.reply({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if known else 200)

    def info(self, body: bytes, repo_id: str) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        siblings = [{"rfilename": name} for name in sorted(repository.head)]
        return self.reply(
            {"id": repo_id, "sha": repository.sha, "private": repository.private, "tags": [], "siblings": siblings}
        )

    def tree(self, body: bytes, repo_id: str) -> None:
        files = sorted(self.hub.repositories[repo_id].head.items())
        sha = hashlib.sha1
        self.reply([{"type": "file", "path": n, "size": len(c), "oid": sha(c).hexdigest()} for n, c in files])

    def validate(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        self.reply({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, repo_id: str) -> None:
        if repo_id not in self.hub.repositories:
            return self.missing("RepoNotFound")
        large = (".safetensors", ".png", ".model")
        answer = [
            {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
            for file in json.loads(body)["files"]
        ]
        return self.reply({"files": answer})

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.hub.endpoint}/lfs-verify"}
            known = asked["oid"] in self.hub.blobs
            objects.append(asked if known else {**asked, "actions": {"upload": upload, "verify": verify}})
        self.reply({"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply({"error": "other content"}, 422)
        self.hub.blobs[oid] = body
        return self.reply({})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        self.reply({}, 200 if len(self.hub.blobs.get(asked["oid"], b"")) == asked["size"] else 404)

    def commit(self, body: bytes, repo_id: str) -> None:
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        repository = self.hub.repositories[repo_id]
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.head)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", repository.sha) != repository.sha:
                return self.reply({"error": "A commit has happened since. Please refresh and try again."}, 412)
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.reply({"error": "the content of an LFS file is missing"}, 400)
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if not self.may_write:
            return self.reply({"error": "no"}, 401)
        repository.commits.append(files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repository.sha}"
        return self.reply({"success": True, "commitOid": repository.sha, "commitUrl": url})

    def resolve(self, body: bytes, repo_id: str, name: str) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        if name not in repository.head:
            return self.missing("EntryNotFound")
        content = repository.head[name]
        etag = hashlib.sha256(content).hexdigest()
        return self.reply(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "none"})


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_ROUTES = {
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"GET /api/models/{_REPO}(/revision/[^/]+)?": "info",
    rf"GET /api/models/{_REPO}/tree/[^/]+": "tree",
    rf"POST /api/models/{_REPO}/preupload/main": "preupload",
    rf"POST /api/models/{_REPO}/commit/main": "commit",
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": "batch",
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": "put_blob",
    r"POST /lfs-verify": "verify",
    rf"(GET|HEAD) /{_REPO}/resolve/[^/]+/(?P<name>.+)": "resolve",
}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running server; `endpoint` is its address."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
