"""A run that is given away: what is in the folder, what is not, and a hub that takes it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from helpers import SETTING, Patterns
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_cli import METHOD

from fedlscl.cli import main
from fedlscl.run.predict import predict

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run of Fed-LSCL, which has a replay buffer."""
    folder = tmp_path_factory.mktemp("published")
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    (folder / "setting.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(folder / "setting.yaml"), "--run_dir", str(folder / "run")])
    return folder / "run"


def test_the_folder_predicts_as_the_run_does_and_has_neither_images_nor_paths(
    run_dir: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second writes it anew
        main(["publish", str(run_dir), "--out", str(out)])
    assert "no images, no features" in capsys.readouterr().out
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    clients = {f"checkpoint/client-{client}.1.safetensors" for client in range(3)}
    assert names == clients | {"README.md", "config.yaml", "split.json", "summary.json", "checkpoint/state.json"}
    for name in clients:
        memory = {key: t.numel() for key, t in load_file(out / name).items() if key.startswith("memory.")}
        assert memory == {"memory.progress": 2, "memory.buffer": 0, "memory.candidates": 0}
    for path in out.rglob("*"):
        if path.suffix in (".md", ".yaml", ".json"):
            assert str(cache) not in path.read_text()

    files = [str(tmp_path / f"{n}.png") for n in range(4)]
    for file, pixels in zip(files, Patterns(11).load(tmp_path).test.images, strict=False):
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file)
    assert predict(out, files, 1) == predict(run_dir, files, 1)

    card = ModelCard.load(out / "README.md")
    summary = json.loads((run_dir / "summary.json").read_text())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["final average, mask seen"] == round(summary["accuracy"]["seen"]["final_average"], 2)
    assert "each client's weights" in card.text
    assert "membership" in card.text
    split = json.loads((out / "split.json").read_text())
    first = split["split"]["clients"][2]["tasks"][0]["classes"]
    assert f"| 2 | {', '.join(split['classes'][label] for label in first)} |" in card.text


@pytest.mark.parametrize(
    ("made", "complaint"),
    [("notes.txt", r"holds other files \(notes.txt\)"), ("summary.json", "which holds a run; give a new")],
)
def test_a_folder_with_anything_else_is_left_alone(run_dir: Path, tmp_path: Path, made: str, complaint: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / made).write_text("mine")
    with pytest.raises(SystemExit, match=complaint):
        main(["publish", str(run_dir), "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [made]
    with pytest.raises(SystemExit, match="holds no finished run"):
        main(["publish", str(tmp_path), "--out", str(tmp_path / "new")])


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as a commit takes, all files in the commit itself."""

    requests: ClassVar[list[tuple[str, str, Any]]] = []  # path, token, body
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.requests.append((self.path, self.headers["Authorization"], lines))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            answer: Any = {"url": f"{self.base}/me/digits", "name": "me/digits"}
        elif "/preupload/" in path:
            sent = lines[0]["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in sent]}
        else:
            answer = {"commitUrl": f"{self.base}/me/digits/commit/{'0' * 40}", "commitOid": "0" * 40}
        self.answer(401 if self.refuse else 200, answer)

    def do_GET(self) -> None:
        self.answer(404 if self.refuse else 200, {"id": "me/digits", "sha": "0" * 40, "siblings": []})

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, code: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr(Hub, "requests", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield Hub
        server.shutdown()
        thread.join()


def test_a_hub_is_sent_every_file_and_makes_it_private(
    run_dir: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(
        SystemExit, match=r"nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_T"
    ):
        main(["publish", str(run_dir), "--out", str(tmp_path / "out"), "--push", "me/digits"])
    assert hub.requests == []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    capsys.readouterr()
    main(["publish", str(run_dir), "--out", str(tmp_path / "out"), "--push", "me/digits"])
    assert "pushed: http://127.0.0.1" in capsys.readouterr().out
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_secret"}
    (created,) = [lines[0] for path, _, lines in hub.requests if path == "/api/repos/create"]
    assert (created["name"], created["organization"]) == ("digits", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    (commit,) = [lines for path, _, lines in hub.requests if "/commit/main" in path]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit if line["key"] == "file"
    }
    out = tmp_path / "out"
    assert sent == {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    monkeypatch.setattr(hub, "refuse", True)
    with pytest.raises(SystemExit, match=r"push to 'me/digits' failed: .*401"):
        main(["publish", str(run_dir), "--out", str(out), "--push", "me/digits"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match=r"push to 'me/digits' failed: .*refused"):
        main(["publish", str(run_dir), "--out", str(out), "--push", "me/digits"])
    with pytest.raises(SystemExit, match="push is 'a b/c', must be a name on the Hub"):
        main(["publish", str(run_dir), "--out", str(out), "--push", "a b/c"])
    with pytest.raises(SystemExit, match="public has no effect without --push"):
        main(["publish", str(run_dir), "--public"])
