"""A small hub on the loopback: what huggingface_hub asks for to make a repository, write a commit, list it and read it.

It stands for huggingface.co in tests of pushing and pulling. Files that it wants by LFS come by its own batch and PUT;
the hub's newer way, Xet, is another service and is not here.
"""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants


class FakeHub:
    """Repositories, each a list of commits `(sha, {name: content})`; `requests` are those that came, in order."""

    def __init__(self):
        self.repositories, self.large, self.requests, self.refuses_writing = {}, {}, [], False
        self.url = ""

    def commit(self, repository, files):
        """Add a commit on top of the last one; returns its sha."""
        commits = self.repositories.setdefault(repository, [])
        content = {**(commits[-1][1] if commits else {}), **files}
        sha = hashlib.sha1(
            json.dumps(sorted((name, _sha256(data)) for name, data in content.items())).encode()
        ).hexdigest()
        commits.append((sha, content))
        return sha

    def files(self, repository, revision="main"):
        commits = self.repositories.get(repository, [])
        found = [pair for pair in commits if revision in ("main", pair[0])]
        return found[-1] if found else None

    def answer(self, method, path, body):
        """Status, headers and body."""
        self.requests.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        if method == "POST":
            if self.refuses_writing:
                return 403, {}, {"error": "no write access"}
            return self._write(parts, body)
        if method == "PUT":
            self.large[parts[-1]] = body
            return 200, {}, b""
        if parts[:2] == ["api", "models"]:
            return self._list(parts)
        return self._read(parts)

    def _write(self, parts, body):
        asked = [json.loads(line) for line in body.splitlines()] if parts[-2] == "commit" else json.loads(body)
        if parts == ["api", "repos", "create"]:
            repository = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(repository, [])
            return 200, {}, {"url": f"{self.url}/{repository}"}
        if parts == ["api", "validate-yaml"]:
            return 200, {}, {}
        if parts[-1] == "batch":
            return 200, {}, {"transfer": "basic", "objects": [self._large_action(each) for each in asked["objects"]]}
        repository = "/".join(parts[2:4])
        if parts[4] == "preupload":
            return 200, {}, {"files": [_upload_mode(file) for file in asked["files"]]}
        added = {}
        for entry in asked:
            value = entry["value"]
            if entry["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                added[value["path"]] = self.large[value["oid"]]
        sha = self.commit(repository, added)
        return 200, {}, {"commitUrl": f"{self.url}/{repository}/commit/{sha}", "commitOid": sha}

    def _large_action(self, wanted):
        href = f"{self.url}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def _list(self, parts):
        repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        if (found := self.files(repository, revision)) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        sha, content = found
        if len(parts) > 4 and parts[4] == "tree":
            return 200, {}, [_tree_entry(name, data) for name, data in content.items()]
        return 200, {}, {"id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in content]}

    def _read(self, parts):
        repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if (found := self.files(repository, revision)) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        sha, content = found
        if name not in content:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, {"error": "Entry not found"}
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{_sha256(content[name])}"'}, content[name]


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _upload_mode(file):
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _tree_entry(name, content):
    entry = {"type": "file", "path": name, "size": len(content), "oid": _sha256(content)[:40]}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self):
            length = int(self.headers.get("Content-Length", 0))
            method = "GET" if self.command == "HEAD" else self.command
            status, headers, content = hub.answer(method, urlsplit(self.path).path, self.rfile.read(length))
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815  (as the class wants them)

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def serving_hub(monkeypatch, tmp_path):
    """A `FakeHub` at work, which huggingface_hub takes for the hub, with an empty cache."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    # What the variables HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_DISABLE_XET and HF_HUB_OFFLINE set as the library is loaded.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_token", lambda: None)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
