import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from safetensors.torch import load_file

from repcodec.codec import RepCodec
from repcodec.kmeans import KMeansTokenizer

TOKENS = {"Bearer writer": True, "Bearer reader": False}
"""Tokens the hub knows, and whether they may write."""


class Hub(ThreadingHTTPServer):
    """Plays the Hugging Face hub: as much of its HTTP interface as downloads and uploads of models use.

    Attributes:
        repos: id -> branch -> file name -> content.
        requests: method and path of every request.
        received: every body, and everything that stood in one as base64.
        upload_mode: "regular" or "lfs", how weights are uploaded.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.requests, self.received, self.large, self.upload_mode = {}, [], [], {}, "regular"
        Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repo_id, folder, branch="main"):
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repos.setdefault(repo_id, {})[branch] = files

    def commit(self, repo_id, revision):
        """Return name and files of a branch or commit; None where there is none."""
        for branch, files in self.repos[repo_id].items():
            name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (branch, name):
                return name, files
        return None

    def downloads(self):
        return [path.split("/")[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"{}", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        hub.requests.append((self.command, path))
        hub.received += [self.path.encode(), str(self.headers).encode(), body]
        if self.command in ("POST", "PUT") and not path.startswith("/large/"):
            writes = TOKENS.get(self.headers.get("Authorization"))
            if not writes:
                return self.answer(401 if writes is None else 403, {"error": "not you"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch)/(.+))?", path):
            return getattr(self, match[2] or "revision")(match[1], match[3] or "main", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, files = hub.commit(match[1], match[2])
            content = files[match[3]]
            return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=name)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization'] or 'writer'}/{asked['name']}"
            there = repo_id in hub.repos
            hub.repos.setdefault(repo_id, {"main": {}})
            return self.answer(409 if there else 200, {"url": f"{hub.url}/{repo_id}"})
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "repcodec"
            return self.answer()
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            found = [{**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}} for one in objects]
            return self.answer(200, {"transfer": "basic", "objects": found})
        if path.startswith("/large/"):
            assert hashlib.sha256(body).hexdigest() == path.split("/")[-1]
            hub.large[path.split("/")[-1]] = body
            return self.answer()
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def revision(self, repo_id, revision, body):
        if repo_id not in self.server.repos:
            return self.answer(404, X_Error_Code="RepoNotFound")
        found = self.server.commit(repo_id, revision)
        if found is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": file} for file in found[1]]
        return self.answer(200, {"id": repo_id, "sha": found[0], "siblings": siblings})

    def tree(self, repo_id, revision, body):
        _, files = self.server.commit(repo_id, revision)
        rows = [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
        return self.answer(200, rows)

    def branch(self, repo_id, revision, body):
        there = revision in self.server.repos[repo_id]
        self.server.repos[repo_id].setdefault(revision, {})
        return self.answer(409 if there else 200)

    def preupload(self, repo_id, revision, body):
        asked = json.loads(body)["files"]
        self.server.received += [base64.b64decode(file["sample"]) for file in asked]
        modes = {"model.safetensors": self.server.upload_mode}
        rows = [
            {"path": file["path"], "uploadMode": modes.get(file["path"], "regular"), "shouldIgnore": False}
            for file in asked
        ]
        return self.answer(200, {"files": rows})

    def commit(self, repo_id, revision, body):
        files = self.server.repos[repo_id][revision]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
        return self.answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/0", "commitOid": "0"})


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def ask(hub, tmp_path):
    """Run Python that talks to the hub, in a process of its own: the address counts when the library is imported."""

    def run(code, **env):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
        code = "from repcodec.errors import one_sentence\nwith one_sentence():\n" + textwrap.indent(code, "    ")
        return subprocess.run(
            [sys.executable, "-c", code], env=kept | env | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, text=True,
            capture_output=True, timeout=120, check=False,
        )  # fmt: skip

    return run


LOAD = """
from safetensors.torch import save_file
from repcodec.codec import RepCodec
from repcodec.kmeans import KMeansTokenizer
for number, tokenizer in enumerate([{tokenizers}]):
    save_file(tokenizer.state_dict(), f"state-{{number}}")
"""


def loaded(ask, tmp_path, *tokenizers, before="", **env):
    """What a process loads from the hub: the state of each tokenizer, given as Python."""
    done = ask(before + LOAD.format(tokenizers=", ".join(tokenizers)), **env)
    assert done.returncode == 0, done.stderr
    return [load_file(tmp_path / f"state-{number}") for number in range(len(tokenizers))]


def same(state, module):
    expected = module.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def refused(done, *fragments):
    """One sentence, no traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in errors[0]


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_codec_by_id_is_the_same_bit_for_bit_and_downloaded_once(hub, ask, tmp_path, codec):
    codec = codec.float()
    codec.save_pretrained(tmp_path / "saved", {"encoder": "hubert_base"})
    (tmp_path / "saved" / "optimizer.bin").write_bytes(b"not asked for")
    hub.add("user/codec", tmp_path / "saved")
    torch.manual_seed(1)
    other = RepCodec(8, codebook_size=4)
    other.save_pretrained(tmp_path / "other")
    hub.add("user/codec", tmp_path / "other", "wide")
    by_id, wide = (f"RepCodec.from_pretrained('user/codec'{more})" for more in ("", ", revision='wide'"))
    one, again, another = loaded(ask, tmp_path, by_id, by_id, wide)
    assert same(one, codec)
    assert same(again, codec)
    assert same(another, other)
    assert sorted(hub.downloads()) == sorted(2 * ["README.md", "config.json", "model.safetensors"])
    hub.requests.clear()
    assert same(loaded(ask, tmp_path, by_id, HF_HUB_OFFLINE="1")[0], codec)
    assert same(loaded(ask, tmp_path, by_id, HF_ENDPOINT=closed_port())[0], codec)
    assert not hub.requests


def test_a_folder_is_taken_as_it_is(hub, ask, tmp_path):
    KMeansTokenizer(torch.randn(4, 3)).save_pretrained(tmp_path / "user" / "codec")
    done = ask("from repcodec.hub import local_folder; print(local_folder('user/codec'), local_folder('no/such/one'))")
    assert done.stdout.split() == ["user/codec", "no/such/one"]
    assert not hub.requests


FIND = "from repcodec import hub; hub.local_folder({name!r}{more})"


def test_what_the_hub_does_not_have_is_one_sentence(hub, ask, tmp_path, codec):
    refused(ask(FIND.format(name="user/none", more="")), "user/none: no folder here", "no such id", "(404)")
    codec.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").unlink()
    hub.add("user/part", tmp_path / "saved")
    refused(ask(FIND.format(name="user/part", more="")), "user/part: what the hub has there lacks config.json")
    refused(ask(FIND.format(name="user/part", more=", 'v9'")), "user/part", "at revision v9", "no such revision")


def test_a_hub_that_does_not_answer_is_one_sentence_and_no_long_wait(ask):
    start = time.monotonic()
    url = closed_port()
    refused(ask(FIND.format(name="user/codec", more=""), HF_ENDPOINT=url), f"{url} gave no answer", "refused")
    refused(ask(FIND.format(name="user/codec", more=""), HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "unset it")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = "from repcodec import hub; hub.SECONDS = 1; hub.local_folder('user/codec')"
        refused(ask(code, HF_ENDPOINT=url), f"{url} gave no answer", "timed out")
    assert time.monotonic() - start < 30


PUSH = """
from repcodec.codec import RepCodec
from repcodec.kmeans import KMeansTokenizer
address = {kind}.from_pretrained("saved").push_to_hub({arguments})
open("address", "w").write(address)
"""


@pytest.mark.parametrize(("mode", "xet"), [("regular", True), ("regular", False), ("lfs", False)])
def test_pushed_codec_comes_back_bit_for_bit_and_names_no_folder(hub, ask, tmp_path, codec, mode, xet):
    codec = codec.float()
    about = {"encoder": "hubert_base", "layer": 9, "encoder_sha256": "ab" * 32}
    codec.save_pretrained(tmp_path / "saved", {**about, "encoder_model": str(tmp_path / "secret-folder")})
    hub.upload_mode = mode
    push = PUSH.format(kind="RepCodec", arguments="'user/mine', private=True, token='writer'")
    env = {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    (state,) = loaded(ask, tmp_path, "RepCodec.from_pretrained('user/mine')", before=push, **env)
    assert same(state, codec)
    assert (tmp_path / "address").read_text() == f"{hub.url}/user/mine"
    assert bool(hub.large) == (mode == "lfs")
    assert any(re.search(rb'"visibility": ?"private"', body) for body in hub.received)
    files = hub.repos["user/mine"]["main"]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert not any(b"secret-folder" in content for content in [*hub.received, *files.values()])
    config = json.loads(files["config.json"])
    assert about.items() <= config.items()
    assert "encoder_model" not in config
    assert b'RepCodec.from_pretrained("user/mine")' in files["README.md"]


def test_pushed_kmeans_goes_to_its_branch_and_keeps_a_hub_id(hub, ask, tmp_path):
    kmeans = KMeansTokenizer(torch.randn(5, 3))
    kmeans.save_pretrained(tmp_path / "saved", {"encoder_model": "facebook/x", "features": "/home/me/features/l9"})
    push = PUSH.format(kind="KMeansTokenizer", arguments="'mine', token='writer', revision='five'")
    from_hub = "KMeansTokenizer.from_pretrained('writer/mine', revision='five')"
    (state,) = loaded(ask, tmp_path, from_hub, before=push)
    assert same(state, kmeans)
    assert (tmp_path / "address").read_text() == f"{hub.url}/writer/mine/tree/five"
    assert hub.repos["writer/mine"]["main"] == {}
    config = json.loads(hub.repos["writer/mine"]["five"]["config.json"])
    assert config["encoder_model"] == "facebook/x"
    assert "features" not in config
    assert not any(b"/home/me" in body for body in hub.received)


def test_refused_pushes_are_one_sentence(hub, ask, tmp_path):
    KMeansTokenizer(torch.randn(5, 3)).save_pretrained(tmp_path / "saved")
    code = "from repcodec.hub import push_folder; push_folder({folder!r}, {name!r})"
    push = code.format(folder="saved", name="user/mine")
    refused(ask(push), "user/mine: the hub takes no uploads without a token", "hf auth login")
    refused(ask(push, HF_TOKEN="who"), "user/mine: not uploaded", "does not know the token (401)")
    refused(ask(push, HF_TOKEN="reader"), "user/mine: not uploaded", "the token may not do that (403)")
    refused(ask(push, HF_TOKEN="writer", HF_ENDPOINT=closed_port()), "gave no answer", "refused")
    refused(ask(push, HF_TOKEN="writer", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")
    refused(ask(code.format(folder="saved", name="a/b/c"), HF_TOKEN="writer"), "a/b/c", "this is no id")
    refused(ask(code.format(folder="home", name="user/mine"), HF_TOKEN="writer"), "home is not a saved codec")
    assert hub.repos == {}
