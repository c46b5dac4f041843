"""Pushing a model to a server that speaks the needed part of the Hub's interface, and fails on request."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from mmssl.cli import main
from mmssl.errors import MmsslError, RecipeError
from mmssl.hub import push as pushing
from mmssl.hub.push import plan, push

TOKEN = "hf_" + "s3cret" * 5
REPO = "lab/encoder"


class Hub(ThreadingHTTPServer):
    """Repositories in memory. `fails(number, path)` says how a request is met: None, a status, "cut" or "lost"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.objects, self.asked = {}, {}, []
        self.fails = lambda number, path: None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, repo=REPO):
        """Of the newest commit: what anyone sees."""
        commits = self.repos.get(repo, {"commits": []})["commits"]
        return commits[-1]["files"] if commits else {}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do(self):
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        how = hub.fails(len(hub.asked), path)
        if how == "cut":
            return self.connection.close()
        if isinstance(how, int):
            return self.say({"error": "as asked"}, how)
        status, answer = self.answer(path, body)
        return self.connection.close() if how == "lost" else self.say(answer, status)

    do_GET = do_POST = do_PUT = do

    def say(self, answer, status=200):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, path, body):
        hub = self.server
        if path.startswith("/object/"):
            hub.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "who are you?"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "others":
                return 403, {"error": "not yours"}
            known = name in hub.repos
            first = {"id": "0" * 40, "title": "initial commit", "files": {".gitattributes": b""}}
            hub.repos.setdefault(name, {"private": asked["visibility"] == "private", "commits": [first]})
            return (409 if known else 200), {"url": f"{hub.url}/{name}", "name": name}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            action = lambda one: {"upload": {"href": f"{hub.url}/object/{one['oid']}"}}  # noqa: E731
            return 200, {"transfer": "basic", "objects": [{**one, "actions": action(one)} for one in wanted]}
        name = "/".join(path.split("/")[3:5])
        if name not in hub.repos:
            return 404, {"error": "no such repository"}
        commits = hub.repos[name]["commits"]
        if "/preupload/" in path:
            mode = lambda one: "lfs" if one["path"].endswith(".safetensors") else "regular"  # noqa: E731
            told = [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in json.loads(body)["files"]]
            return 200, {"files": told}
        if "/commits/" in path:
            date = "2026-01-01T00:00:00.000Z"
            return 200, [{**c, "files": None, "authors": [], "date": date, "message": ""} for c in reversed(commits)]
        if "/commit/" in path:
            return self.commit(name, commits, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": file} for file in commits[-1]["files"]]
        return 200, {"id": name, "sha": commits[-1]["id"], "private": hub.repos[name]["private"], "siblings": siblings}

    def commit(self, name, commits, lines):
        head, files = lines[0]["value"], dict(commits[-1]["files"])
        if head["parentCommit"] != commits[-1]["id"]:
            return 412, {"error": "a commit has happened since"}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commits.append({"id": f"{len(commits):040x}", "title": head["summary"], "files": files})
        return 200, {
            "commitUrl": f"{self.server.url}/{name}/commit/{commits[-1]['id']}",
            "commitOid": commits[-1]["id"],
            "pullRequestUrl": None,
        }


@pytest.fixture
def hub(monkeypatch):
    """The server, with a client that knows its token and does not wait."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path):
    """A folder such as an export writes."""
    return write(tmp_path / "model", b"first weights")


def write(folder, weights, **more):
    folder.mkdir()
    card = b'---\nlibrary_name: transformers\n---\nmodel = AutoModel.from_pretrained("PATH")\n'
    files = {"config.json": b"{}", "model.safetensors": weights, "README.md": card, **more}
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def test_a_model_arrives_in_one_commit_with_a_card_that_knows_where(hub, model):
    assert push(model, REPO, endpoint=hub.url) == f"{hub.url}/{REPO}"
    assert hub.repos[REPO]["private"] is True
    assert len(hub.repos[REPO]["commits"]) == 2
    assert hub.files()["model.safetensors"] == b"first weights"
    assert b'from_pretrained("lab/encoder")' in hub.files()["README.md"]
    assert b"PATH" in (model / "README.md").read_bytes()  # of the folder
    push(model, REPO, endpoint=hub.url)
    assert len(hub.repos[REPO]["commits"]) == 2  # nothing new to say


def test_files_of_an_earlier_export_go_and_those_of_users_stay(hub, model, tmp_path):
    (model / "modeling_mmssl.py").write_text("old")
    push(model, REPO, endpoint=hub.url)
    mine = {"LICENSE", "adapter_model.safetensors", "special_tokens.md"}
    hub.repos[REPO]["commits"][-1]["files"] |= dict.fromkeys(mine, b"mine")
    push(write(tmp_path / "next", b"second"), REPO, endpoint=hub.url)
    assert {*hub.files()} == mine | {".gitattributes", "README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("how", [500, "cut", "lost"])
def test_t34_an_interruption_at_any_call_leaves_the_old_model_or_the_new_one(hub, model, tmp_path, how, monkeypatch):
    """T34: for good, and once."""
    monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)
    push(model, REPO, endpoint=hub.url)
    old, calls = hub.files(), len(hub.asked)
    new = write(tmp_path / "new", b"new weights", preprocessor_config__json=b"{}")
    first = hub.asked[:]
    wanted = {**old, **{n: d if isinstance(d, bytes) else d.read_bytes() for n, d in plan(new, REPO).files.items()}}
    assert wanted != old
    for call in range(1, calls + 2):
        for lasting in (True, False):
            hub.repos[REPO]["commits"][:] = hub.repos[REPO]["commits"][:2]
            hub.asked.clear()
            hub.fails = lambda n, path, call=call, lasting=lasting: how if n == call or (lasting and n > call) else None
            told = None
            try:
                push(new, REPO, endpoint=hub.url)
            except MmsslError as error:
                told = str(error)
            if told is None:
                assert hub.files() == wanted
                assert len(hub.repos[REPO]["commits"]) == 3
            else:
                assert lasting
                assert TOKEN not in told
                assert "old model, or all of the new" in told
                assert hub.files() in (old, wanted)
            hub.fails = lambda n, path: None
            push(new, REPO, endpoint=hub.url)
            assert hub.files() == wanted
            assert len(hub.repos[REPO]["commits"]) == 3
    assert any("/commit/" in line for line in first)


def test_who_may_not_write_is_told_and_nothing_is_changed(hub, model, monkeypatch):
    with pytest.raises(RecipeError, match="others/encoder: the token may not write there"):
        push(model, "others/encoder", endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong1" * 5)
    with pytest.raises(RecipeError, match="the token is not accepted"):
        push(model, REPO, endpoint=hub.url)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(RecipeError, match="hf auth login"):
        push(model, REPO, endpoint=hub.url)
    assert hub.repos == {}


def test_another_who_writes_meanwhile_is_not_overwritten_unseen(hub, model):
    """The first try is refused, and the second one sees what is new."""
    push(model, REPO, endpoint=hub.url)
    (model / "model.safetensors").write_bytes(b"second")
    commits = hub.repos[REPO]["commits"]

    def meanwhile(number, path):
        if "/commit/" in path and len(commits) == 2:
            commits.append({"id": "f" * 40, "title": "mine", "files": {**commits[-1]["files"], "NOTES": b"of another"}})

    hub.fails = meanwhile
    push(model, REPO, endpoint=hub.url)
    assert [commit["title"] for commit in commits[:3]][2] == "mine"
    assert hub.files()["NOTES"] == b"of another"
    assert hub.files()["model.safetensors"] == b"second"


def test_what_is_no_model_is_refused_before_anything_is_asked(hub, model, tmp_path):
    (tmp_path / "several" / "speech").mkdir(parents=True)
    (tmp_path / "several" / "speech" / "config.json").write_text("{}")
    with pytest.raises(
        RecipeError, match=r"a model for each of speech and none of all; push one, such as .*several/speech, or"
    ):
        plan(tmp_path / "several", REPO)
    with pytest.raises(RecipeError, match=r"holds no model .*mmssl export"):
        push(tmp_path / "several" / "speech" / "nothing", REPO, endpoint=hub.url)
    with pytest.raises(RecipeError, match="ORG/NAME"):
        push(model, "encoder", endpoint=hub.url)
    (model / "secrets").symlink_to("/etc/passwd")
    with pytest.raises(RecipeError, match="secrets is no plain file"):
        push(model, REPO, endpoint=hub.url)
    assert hub.asked == []


def test_the_command_shows_what_it_would_send(model, tmp_path, capsys):
    assert main(["push", str(tmp_path), REPO, "dry=true"]) == 0  # a run: its model/ is meant
    assert capsys.readouterr().out.splitlines() == [
        f"would send to {REPO}:",
        "  README.md  " + f"{len((model / 'README.md').read_bytes()) + len(REPO) - len('PATH')} bytes",
        "  config.json  2 bytes",
        "  model.safetensors  13 bytes",
    ]
    assert main(["push", str(tmp_path / "nothing"), REPO]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_offline_is_told(model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        push(model, REPO)
    huggingface_hub.close_session()
