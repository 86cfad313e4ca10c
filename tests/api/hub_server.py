"""A stand-in for the Hugging Face Hub on this machine: the endpoints of downloads and uploads, and failures of them."""

import base64
import contextlib
import hashlib
import json
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
from huggingface_hub import file_download
from huggingface_hub.utils import _http

MAIN = "main"


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """The repositories, by name and revision, and how it misbehaves.

    Attributes:
        token: The token that private repositories ask for.
        large: Files that are kept as large ones, named by their sha256.
        failure: "", "slow", "truncated", "wrong content", "broken" or "down".
        requests: What was asked of it.
        plain: Other files, by path, as an ordinary web server has them.
    """

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    failure: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    plain: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""

    def add(self, name: str, folder: Path, revision: str = MAIN) -> None:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repositories.setdefault(name, {})[revision] = files

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        found = self.repositories.get(name, {})
        by_commit = {commit_of(files): files for files in found.values()}
        return found.get(revision, by_commit.get(revision))


def hash_of(path: str, content: bytes) -> tuple[str, bool]:
    """The name the Hub gives a content, and whether it is a large file."""
    if path.endswith((".bin", ".safetensors")):
        return hashlib.sha256(content).hexdigest(), True
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), False


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, content: object) -> None:
            self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

        def no(self, code: str, status: int) -> None:
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path))
            path = unquote(urlsplit(self.path).path).strip("/")
            if hub.failure == "broken":
                return self.answer(500)
            if path in hub.plain:
                return self.plain(hub.plain[path])
            parts = path.split("/")
            if path == "api/models":
                wanted = parse_qs(urlsplit(self.path).query).get("filter", [])
                assert wanted == ["adapters"]
                return self.json([self.about(name, MAIN) for name in hub.repositories])
            if parts[:2] == ["api", "models"]:
                name, rest = "/".join(parts[2:4]), parts[4:]
                revision = rest[1] if len(rest) > 1 else MAIN
                if self.refused(name, revision):
                    return None
                return self.json(self.tree(name, revision) if rest[:1] == ["tree"] else self.about(name, revision))
            if len(parts) > 4 and parts[2] == "resolve":
                return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            return self.answer(404)

        do_HEAD = do_GET

        def refused(self, name: str, revision: str) -> bool:
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if name in hub.gated and not known:
                self.no("GatedRepo", 403)
            elif name not in hub.repositories or (name in hub.private and not known):
                self.no("RepoNotFound", 401)
            elif hub.files(name, revision) is None:
                self.no("RevisionNotFound", 404)
            else:
                return False
            return True

        def about(self, name: str, revision: str) -> dict[str, object]:
            files = hub.files(name, revision)
            about = {"id": name, "sha": commit_of(files), "siblings": [{"rfilename": file} for file in files]}
            full = json.loads(files.get("adapter_config.json", b"{}"))
            return {**about, "tags": ["adapters"], "config": {"adapters": {"model_name": full.get("model_name")}}}

        def tree(self, name: str, revision: str) -> list[dict[str, object]]:
            rows = []
            for path, content in hub.files(name, revision).items():
                oid, large = hash_of(path, content)
                row = {"type": "file", "path": path, "size": len(content), "oid": oid[:40]}
                rows.append(row | ({"lfs": {"oid": oid, "size": len(content), "pointerSize": 100}} if large else {}))
            return rows

        def resolve(self, name: str, revision: str, file: str) -> None:
            if self.refused(name, revision):
                return None
            files = hub.files(name, revision)
            if file not in files:
                return self.no("EntryNotFound", 404)
            content = files[file]
            headers = {"ETag": f'"{hash_of(file, content)[0]}"', "X_Repo_Commit": commit_of(files)}
            if hub.failure == "wrong content" and file.endswith(".safetensors"):
                content = content[:-1] + bytes([content[-1] ^ 1])
            return self.send(content, headers)

        def plain(self, content: bytes) -> None:
            if hub.headers.get("needs token") and "Authorization" not in self.headers:
                return self.answer(401)
            return self.send(content, {key: value for key, value in hub.headers.items() if " " not in key})

        def send(self, content: bytes, headers: dict[str, str]) -> None:
            if self.command == "GET" and hub.failure == "slow":
                time.sleep(0.7)
            if self.command == "GET" and hub.failure == "truncated":
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.answer(200, content, **headers)

        def do_POST(self) -> None:
            hub.requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = urlsplit(self.path).path.strip("/").split("/")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.no("", 401)
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization', 'me')}/{asked['name']}"
                hub.repositories.setdefault(name, {MAIN: {}})
                return self.json({"url": f"{hub.url}/{name}", "name": name})
            if parts == ["api", "validate-yaml"]:
                return self.json({"errors": [], "warnings": []})
            name = "/".join(parts[2:4])
            if parts[4] == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                rows = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
                return self.json({"files": rows})
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    hub.repositories[name].setdefault(parts[5], {})[row["value"]["path"]] = content
            return self.json({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    return Handler


@contextlib.contextmanager
def running(patch: object, cache: Path) -> Iterator[Hub]:
    """A hub that answers on this machine, and that `huggingface_hub` takes for the Hub; nothing waits for long."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.2,
        "HF_HUB_ETAG_TIMEOUT": 0.3,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        patch.setattr(constants, name, value)
    for module in (_http, file_download):
        patch.setattr(module, "time", types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
    patch.delenv("HF_TOKEN", raising=False)
    patch.setenv("TORCH_HOME", str(cache / "torch"))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
