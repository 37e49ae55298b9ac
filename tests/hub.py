"""Hugging Face Hub on loopback: the endpoints that huggingface_hub uses to create, upload, list and download.

It keeps commits in memory, checks tokens, digests and sizes, and can interrupt one download.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"
OWNER = "me"
LARGE_FILES = (".safetensors", ".pt", ".parquet", ".mp4")  # suffixes of what is stored by LFS


class Refused(Exception):
    """An HTTP status and the Hub's name for the error."""

    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    """Server and storage: ``branches[repo][branch]`` is a list of commits, each a dictionary of file contents."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.branches, self.private, self.blobs = {}, set(), {}
        self.cut_after = None  # bytes after which the next download of a large file breaks
        self.damaged = 0  # downloads of large files, from the next one on, whose last byte is wrong
        self.requests, self.resumed = [], []  # all requests, and the files of range requests
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo, branch="main"):
        """Return name and content of every file at the head of a branch."""
        return self.branches[repo][branch][-1]

    def environment(self, cache, token=TOKEN):
        """Return the environment of a process that uses this Hub with an empty cache, LFS and a token."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**variables, "HF_TOKEN": token} if token else variables


def commit_id(files):
    """Return the digest that stands for a commit."""
    names = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in sorted(files.items())})
    return hashlib.sha1(names.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Handler of one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Keep quiet."""

    def do_GET(self):
        self.respond(self.get)

    def do_HEAD(self):
        self.respond(self.get)

    def do_POST(self):
        self.respond(self.post)

    def do_PUT(self):
        self.respond(self.put)

    def respond(self, method):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {unquote(parts.path)}")
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        if path[:2] == ["api", "datasets"]:  # datasets are stored like models
            path[1] = "models"
        elif path[0] == "datasets":
            del path[0]
        try:
            method(path)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self.send(json.dumps({"error": str(refused)}).encode(), refused.status, headers)

    def send(self, content, status=200, headers=(), kind="application/json"):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content, status=200):
        self.send(json.dumps(content).encode(), status)

    @property
    def is_owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_owner(self):
        if not self.is_owner:
            raise Refused(401, "Unauthorized", "Invalid credentials in Authorization header")

    def head(self, repo, revision="main"):
        """Return the files of a repository at a branch or a commit."""
        branches = self.server.branches.get(repo)
        if branches is None or (repo in self.server.private and not self.is_owner):
            raise Refused(401, "RepoNotFound", "Repository not found")
        commits = {commit_id(files): files for commits in branches.values() for files in commits}
        if revision in branches:
            return branches[revision][-1]
        if revision in commits:
            return commits[revision]
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def get(self, path):
        match path:
            case ["api", "whoami-v2"]:
                self.require_owner()
                self.send_json({"type": "user", "name": OWNER, "orgs": [], "auth": {"type": "access_token"}})
            case ["api", "models", owner, name]:
                self.send_info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self.send_info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision, *folder]:
                self.send_tree(self.head(f"{owner}/{name}", revision), "/".join(folder))
            case [owner, name, "resolve", revision, *file]:
                self.send_file(self.head(f"{owner}/{name}", revision), "/".join(file))
            case _:
                raise Refused(404, "NotFound", f"No such endpoint: {self.path}")

    def send_info(self, repo, revision):
        files = self.head(repo, revision)
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        info = {"_id": "0", "id": repo, "modelId": repo, "sha": commit_id(files), "siblings": siblings, "tags": []}
        self.send_json({**info, "private": repo in self.server.private, "downloads": 0, "likes": 0, "gated": False})

    def send_tree(self, files, folder):
        inside = {name: content for name, content in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        entries = []
        for name, content in inside.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
            if name.endswith(LARGE_FILES):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            entries.append(entry)
        self.send_json(entries)

    def send_file(self, files, name):
        if name not in files:
            raise Refused(404, "EntryNotFound", f"{name} does not exist")
        content, start, end = files[name], 0, len(files[name])
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_id(files)}
        headers["Accept-Ranges"] = "bytes"
        byte_range = self.headers.get("Range", "")
        if byte_range.startswith("bytes="):
            self.server.resumed.append(name)
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end) + 1, end)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        if self.command == "GET" and self.server.damaged and name.endswith(LARGE_FILES):
            self.server.damaged -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.command == "GET" and self.server.cut_after and name.endswith(LARGE_FILES):
            length, self.server.cut_after = self.server.cut_after, None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content[:length])
            self.close_connection = True
            return
        self.send(content[start:end], 206 if byte_range else 200, headers, "application/octet-stream")

    def post(self, path):
        self.require_owner()
        match path:
            case ["api", "repos", "create"]:
                self.create(json.loads(self.body))
            case ["api", "validate-yaml"]:
                self.send_json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "branch", branch]:
                branches = self.server.branches[f"{owner}/{name}"]
                if branch in branches:
                    raise Refused(409, "Conflict", "Reference already exists")
                branches[branch] = list(branches["main"])
                self.send_json({})
            case ["api", "models", owner, name, "tag", revision]:
                self.server.branches[f"{owner}/{name}"][json.loads(self.body)["tag"]] = [
                    self.head(f"{owner}/{name}", revision)
                ]
                self.send_json({})
            case ["api", "models", owner, name, "preupload", revision]:
                self.head(f"{owner}/{name}", revision)
                self.preupload()
            case [owner, git, "info", "lfs", "objects", "batch"]:
                self.head(f"{owner}/{git.removesuffix('.git')}")
                self.lfs_batch(json.loads(self.body))
            case ["lfs", "verify"]:
                blob = json.loads(self.body)
                if len(self.server.blobs.get(blob["oid"], b"")) != blob["size"]:
                    raise Refused(404, "NotFound", "object does not exist")
                self.send_json({})
            case ["api", "models", owner, name, "commit", revision]:
                self.commit(f"{owner}/{name}", revision)
            case _:
                raise Refused(404, "NotFound", f"No such endpoint: {self.path}")

    def create(self, request):
        repo = f"{request.get('organization') or OWNER}/{request['name']}"
        if repo in self.server.branches:
            self.send_json({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
            return
        self.server.branches[repo] = {"main": [{".gitattributes": b"*.safetensors filter=lfs\n"}]}
        if request.get("private") or request.get("visibility") == "private":
            self.server.private.add(repo)
        self.send_json({"url": f"{self.server.url}/{repo}", "name": repo, "id": "0"})

    def preupload(self):
        entries = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") or file["size"] > 1_000_000 else "regular"
            entries.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.send_json({"files": entries})

    def lfs_batch(self, request):
        objects = []
        for entry in request["objects"]:
            reply = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/lfs/{entry['oid']}"}
                reply["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append(reply)
        self.send(json.dumps({"transfer": "basic", "objects": objects}).encode(), kind="application/vnd.git-lfs+json")

    def put(self, path):
        match path:
            case ["lfs", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise Refused(400, "BadRequest", "the content does not have this digest")
                self.server.blobs[oid] = self.body
                self.send(b"")
            case _:
                raise Refused(404, "NotFound", f"No such endpoint: {self.path}")

    def commit(self, repo, revision):
        files = dict(self.head(repo, revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] != "header":
                raise Refused(400, "BadRequest", f"unknown operation {entry['key']}")
        branches = self.server.branches[repo]
        commit = {"commitUrl": f"{self.server.url}/{repo}/commit/{commit_id(files)}", "commitOid": commit_id(files)}
        if self.query.get("create_pr") == ["1"]:
            number = len(branches)
            branches[f"refs/pr/{number}"] = [files]
            commit["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        else:
            branches.setdefault(revision, []).append(files)
        self.send_json(commit)


def upload_folder(hub, repo, folder, path_in_repo=""):
    """Commit a folder's files to a repository, or to a folder in it ("" or a path that ends with "/")."""
    files = {
        path_in_repo + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    commits = hub.branches.setdefault(repo, {"main": [{}]})["main"]
    commits.append({**commits[-1], **files})
