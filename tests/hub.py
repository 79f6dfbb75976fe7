"""A Hugging Face hub on the loopback, for the real clients: files out of a folder, faults on demand.

    with serve(folder) as hub:                  # models/ORG/NAME/..., datasets/ORG/NAME/...
        # cut the first two answers after that many bytes
        hub.fail("*/resolve/*/train.jsonl", after=10_000, times=2)
        hub.fail("/api/datasets/org/closed*", status=401, code="GatedRepo")
        # the clients read HF_ENDPOINT when they are imported
        subprocess.run(script, env=hub.environment(tmp_path))
        assert "/api/models/org/name/revision/main" in hub.requests

A folder NAME@REV is revision REV of NAME; NAME itself is `main`. Commits are hashes of the content, and are
revisions too.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
import urllib.parse

LFS = {".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".npz", ".gz", ".zst"}


@dataclasses.dataclass
class Rule:
    """What becomes of a request: see `Hub.fail`."""

    pattern: str = "*"
    status: int | None = None
    after: int | None = None
    times: int | None = None
    code: str = ""


class Hub:
    """What a test sees of the server. `requests` are the paths asked for, unquoted and without the query."""

    url: str

    def __init__(self, folder: pathlib.Path):
        self.folder, self.lock = pathlib.Path(folder), threading.Lock()
        self.requests: list[str] = []
        self.rules: list[Rule] = []

    def fail(self, pattern: str, **how) -> None:
        """Paths that match the pattern (of fnmatch) get `status` (with X-Error-Code `code`), or are cut
        `after` bytes of their body.

        Only the first `times` such requests, or all. Earlier rules go first.
        """
        self.rules.append(Rule(pattern, **how))

    def heal(self) -> None:
        self.rules.clear()

    def rule(self, path: str) -> Rule:
        """The one that this request falls under; it is counted."""
        with self.lock:
            self.requests.append(path)
            for rule in self.rules:
                if fnmatch.fnmatchcase(path, rule.pattern) and rule.times != 0:
                    rule.times = None if rule.times is None else rule.times - 1
                    return rule
        return Rule()

    def environment(self, cache: pathlib.Path) -> dict[str, str]:
        """The environment of a subprocess whose clients know this hub only, and keep what they load under
        `cache`.
        """
        theirs = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
        mine = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        disabled = ("DISABLE_TELEMETRY", "DISABLE_XET", "DISABLE_PROGRESS_BARS", "DISABLE_UPDATE_CHECK")
        mine |= {f"HF_HUB_{name}": "1" for name in disabled}
        mine |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
        mine |= {"HF_ENDPOINT": self.url, "HF_HOME": str(cache)}
        return mine | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    # ------------------------------------------------------------------ repositories
    def root(self, kind: str, name: str, revision: str) -> pathlib.Path | None:
        """The folder of a revision, given by name or commit; None if there is none."""
        folder = self.folder / kind / name
        for branch, root in branches(folder).items():
            if root.is_dir() and revision in (branch, commit(root)):
                return root
        return None


@contextlib.contextmanager
def serve(folder: pathlib.Path):
    hub = Hub(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Answer, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


# --------------------------------------------------------------------------------------------- what is served
def files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


def branches(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{revision: its folder} of a repository."""
    others = folder.parent.glob(f"{folder.name}@*")
    return {"main": folder} | {urllib.parse.unquote(root.name.partition("@")[2]): root for root in others}


def commit(root: pathlib.Path) -> str:
    lines = [f"{root.name} {name} {entry(name, path)['oid']}\n" for name, path in files(root).items()]
    return hashlib.sha1("".join(lines).encode()).hexdigest()


def entry(name: str, path: pathlib.Path) -> dict:
    """A file as `tree` and `paths-info` tell of it."""
    stat = path.stat()
    blob, sha256 = hashes(path, stat.st_size, stat.st_mtime_ns)
    lfs = {"lfs": {"oid": sha256, "size": stat.st_size, "pointerSize": 134}} if path.suffix in LFS else {}
    return {"type": "file", "oid": blob, "size": stat.st_size, "path": name, **lfs}


@functools.cache
def hashes(path: pathlib.Path, size: int, changed: int) -> tuple[str, str]:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), hashlib.sha256(content).hexdigest()


def tree(root: pathlib.Path, below: str, recursive: bool) -> list[dict]:
    """Files and folders below a path, "": the whole."""
    entries = {}
    for name, path in files(root).items():
        if below and not name.startswith(f"{below}/"):
            continue
        parents = [parent.as_posix() for parent in pathlib.PurePosixPath(name).parents]
        inside = [parent for parent in parents[-2::-1] if not below or parent.startswith(f"{below}/")]
        for folder in inside if recursive else inside[:1]:
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or not inside:
            entries[name] = entry(name, path)
    return list(entries.values())


def description(kind: str, name: str, root: pathlib.Path) -> dict:
    date = "2024-01-01T00:00:00.000Z"
    told = {"_id": "0" * 24, "id": name, "sha": commit(root), "author": name.partition("/")[0], "tags": []}
    told |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    told |= {"lastModified": date, "createdAt": date, "siblings": [{"rfilename": f} for f in files(root)]}
    return told | ({"modelId": name} if kind == "models" else {})


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query))
        # a quoted revision holds slashes
        parts = [urllib.parse.unquote(part) for part in raw.strip("/").split("/")]
        self.fault = self.hub.rule("/" + "/".join(parts))
        if self.fault.status:
            return self.refuse(self.fault.status, self.fault.code)
        if parts[0] == "api" and len(parts) >= 4:
            return self.api(parts[1], "/".join(parts[2:4]), *parts[4:])
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        if len(parts) >= 5 and parts[2] == "resolve":
            return self.file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.refuse(404, "")

    do_HEAD = do_POST = do_GET

    def api(self, kind: str, name: str, what: str = "revision", revision: str = "main", *below: str):
        if what == "resolve":
            return self.file(kind, name, revision, "/".join(below))
        if (root := self.revision(kind, name, revision)) is None:
            return
        if what == "revision":
            return self.json(description(kind, name, root))
        if what == "tree":
            entries = tree(root, "/".join(below), self.query.get("recursive", "").lower() in ("true", "1"))
            return self.json(entries) if entries or not below else self.refuse(404, "EntryNotFound")
        if what == "paths-info":
            wanted = urllib.parse.parse_qs(self.posted.decode()).get("paths", [])
            return self.json([e for e in tree(root, "", True) if e["path"] in wanted])
        self.refuse(404, "")

    def revision(self, kind: str, name: str, revision: str) -> pathlib.Path | None:
        root = self.hub.root(kind, name, revision)
        if root is not None:
            return root
        if any(of.is_dir() for of in branches(self.hub.folder / kind / name).values()):
            self.refuse(404, "RevisionNotFound")
        else:  # what the hub tells those without a token, who might be missing a private one
            self.refuse(401, "RepoNotFound")
        return None

    def file(self, kind: str, name: str, revision: str, file: str):
        if (root := self.revision(kind, name, revision)) is None:
            return
        path, head = files(root).get(file), {"X-Repo-Commit": commit(root)}
        if path is None:
            return self.refuse(404, "EntryNotFound", head)
        told = entry(file, path)
        etag = '"' + told.get("lfs", told)["oid"] + '"'
        head |= {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        head |= {"X-Linked-ETag": etag, "X-Linked-Size": str(told["size"])} if "lfs" in told else {}
        start, stop = 0, told["size"]
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = asked.groups()
            start = int(first) if first else max(stop - int(last), 0)
            stop = min(int(last) + 1, stop) if first and last else stop
            if start >= told["size"]:
                return self.send(416, b"", head | {"Content-Range": f"bytes */{told['size']}"})
            head["Content-Range"] = f"bytes {start}-{stop - 1}/{told['size']}"
        with path.open("rb") as content:
            content.seek(start)
            self.send(206 if asked else 200, content.read(stop - start), head)

    # ------------------------------------------------------------------ answers
    def json(self, content):
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, head: dict[str, str] | None = None):
        messages = dict(RepoNotFound="Repository not found", GatedRepo="Access to it is restricted")
        message = messages.get(code, code or "Sorry")
        head = {**(head or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send(status, json.dumps({"error": message}).encode(), head)

    def send(self, status: int, body: bytes, head: dict[str, str]):
        self.send_response(status)
        head = {"Content-Type": "application/json", **head, "Content-Length": str(len(body))}
        for name, value in head.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            # a client that has seen enough hangs up
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body[: self.fault.after])
        self.close_connection |= self.fault.after is not None
