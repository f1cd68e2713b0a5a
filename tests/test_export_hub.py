"""--push_to_hub against a server on this machine that answers as the hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import export_sam3_lora
from lora_layers import LoRAConfig, apply_lora
from sam3_lora import checkpoint
from sam3_lora.model import load_model

REPO = "someone/rust"
TOKEN = "hf_token_of_a_test"
LORA = LoRAConfig(rank=2, alpha=4.0, target_modules=("v_proj",), components=("detr_decoder",))


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that making a repository and uploading small files need."""

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        """Looks at a repository that is empty."""
        self.answer({"id": REPO, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        """Makes a repository, tells how to upload files, takes a commit."""
        body, server = self.read(), self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or server.refuse:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            self.answer({"url": f"{constants.ENDPOINT}/{REPO}", "id": REPO})
        elif "/preupload/" in self.path:
            names = [item["path"] for item in json.loads(body)["files"]]
            ways = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": ways})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{constants.ENDPOINT}/{REPO}/commit/{'1' * 40}"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})


pytestmark = pytest.mark.scripts  # a server, threads


@pytest.fixture
def hub(monkeypatch) -> Iterator[Any]:
    """The server, to which the client is turned with a token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.files, server.refuse = [], {}, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """An adapter of the tiny model."""
    path = tmp_path_factory.mktemp("adapter") / "lora_weights.pt"
    model, _ = load_model(str(tiny_model_dir))
    apply_lora(model, LORA)
    description = {"base_model": str(tiny_model_dir), "geometry_cls": "hf"}
    checkpoint.save_adapter(path, model, LORA, **description)
    return path


def command(kind: str, adapter: Path, folder: Path) -> list[str]:
    """A run that pushes."""
    words = [kind, "--push_to_hub", REPO, "--private"]
    if kind == "import":
        (folder / "other.txt").write_text("not to be uploaded", encoding="utf-8")
        return [*words, "--source", str(adapter), "--output", str(folder / "lora_weights.pt")]
    return [*words, "--lora_weights", str(adapter), "--output_dir", str(folder / "out")]


@pytest.mark.parametrize(
    "kind", ["peft", "import", pytest.param("merge", marks=pytest.mark.scripts)]
)
def test_what_is_written_is_uploaded(hub, adapter, tmp_path, capsys, kind) -> None:
    assert export_sam3_lora.main(command(kind, adapter, tmp_path)) == 0
    place, address = capsys.readouterr().out.splitlines()
    assert address == f"{constants.ENDPOINT}/{REPO}"
    assert [(made["name"], made["organization"]) for made in hub.made] == [("rust", "someone")]
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"
    folder = Path(place) if kind != "import" else Path(place).parent
    names = {path.name for path in folder.iterdir()} - {"other.txt"}
    assert hub.files == {name: (folder / name).read_bytes() for name in names}
    assert ("README.md" in names) == (kind != "import")


@pytest.mark.parametrize("kind", ["refused", "offline", "no token", "nobody there", "of a file"])
def test_a_failed_upload_is_one_line_after_the_local_write(
    hub, adapter, tmp_path, capsys, monkeypatch, kind
) -> None:
    hub.refuse = kind in ("refused", "of a file")
    if kind == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if kind == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if kind == "nobody there":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    command_kind = "import" if kind == "of a file" else "peft"
    assert export_sam3_lora.main(command(command_kind, adapter, tmp_path)) == 2
    out, err = capsys.readouterr()
    place = tmp_path / {"peft": "out", "import": "lora_weights.pt"}[command_kind]
    assert out == f"{place}\n" and place.exists() and hub.files == {}
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    assert f"{place} is written, but not uploaded to {REPO}: " in errors[0]
    assert f"run `hf auth login`, then `hf upload {REPO} {place}`" in errors[0]
