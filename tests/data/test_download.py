"""`in2nect data download` from a server on this machine: resume, md5, safe unpacking, nothing half-written."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from in2nect.data import download
from in2nect.training.cli import main
from tests.data import trees


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by name; `ranges` off, it sends everything; a connection closes after `cut` bytes, once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.cut: int | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((name, wanted))
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted[len("bytes=") : -1]) if wanted and self.server.ranges else 0
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body, cut, self.server.cut = content[start:], self.server.cut, None
        self.wfile.write(body[:cut])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def archives(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    trees.loveda(tmp_path / "published")
    for part in ("Train", "Val", "Test"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as content:
            for path in sorted((tmp_path / "published" / part).rglob("*.png")):
                content.write(path, path.relative_to(tmp_path / "published"))
        serve(server, monkeypatch, part, buffer.getvalue())
    return server.files


def serve(server: Server, monkeypatch: pytest.MonkeyPatch, part: str, content: bytes) -> None:
    server.files[f"{part}.zip"] = content
    monkeypatch.setitem(download.LOVEDA_MD5, part, hashlib.md5(content).hexdigest())


def zipped(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            if name == link:
                info.external_attr = 0o120777 << 16
            content.writestr(info, data)
    return buffer.getvalue()


def test_everything_arrives_and_a_second_call_fetches_nothing(
    server: Server, archives: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "loveda"
    command = ["data", "download", "loveda", "--root", str(root), "--base-url", server.url]
    assert main(command) == 0
    published = tmp_path / "published"
    expected = {path.relative_to(published): path.read_bytes() for path in published.rglob("*.png")}
    assert {path.relative_to(root): path.read_bytes() for path in root.rglob("*.png")} == expected
    assert sorted(path.name for path in root.iterdir()) == ["Test", "Train", "Val"]
    assert main(["data", "check", str(root), "--dataset=loveda"]) == 0
    asked = len(server.requests)
    assert main(command) == 0
    assert len(server.requests) == asked == 3
    assert "Train is there already" in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off(server: Server, archives: dict[str, bytes], tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.cut = ranges, 1000
    download.download_loveda(tmp_path / "l", base_url=server.url, parts=("Val",))
    assert server.requests == [("Val.zip", None), ("Val.zip", "bytes=1000-")]
    assert (tmp_path / "l" / "Val" / "Rural" / "images_png" / "2523.png").is_file()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [700, None])
def test_a_partial_file_of_an_earlier_call(
    server: Server, archives: dict[str, bytes], tmp_path: Path, ranges: bool, have: int | None
) -> None:
    server.ranges = ranges
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "Val.zip.part").write_bytes(archives["Val.zip"][:have])
    download.download_loveda(tmp_path / "l", base_url=server.url, parts=("Val",), keep_archives=True)
    assert len(server.requests) == 1
    assert (tmp_path / "l" / "Val.zip").read_bytes() == archives["Val.zip"]


def test_a_partial_file_of_something_else_is_fetched_anew(
    server: Server, archives: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "Val.zip.part").write_bytes(b"x" * 500)
    download.download_loveda(tmp_path / "l", base_url=server.url, parts=("Val",))
    assert [wanted for _, wanted in server.requests] == ["bytes=500-", None]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Val.zip.part").write_bytes(b"x" * 99_999)  # longer than the archive
    download.download_loveda(tmp_path / "m", base_url=server.url, parts=("Val",))
    assert (tmp_path / "m" / "Val").is_dir()


def test_another_md5_leaves_nothing(
    server: Server, archives: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["Val.zip"] = b"<html>sorry</html>"
    root = tmp_path / "l"
    assert main(["data", "download", "loveda", f"--root={root}", f"--base_url={server.url}", "--parts=[Val]"]) == 2
    told = capsys.readouterr().err
    assert "Val.zip: md5 " in told and download.LOVEDA_MD5["Val"] in told
    assert list(root.iterdir()) == []


def test_no_such_file_and_no_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Train\.zip: the server answers 404 .*; see --base_url"):
        download.download_loveda(tmp_path / "l", base_url=server.url)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"0 bytes are kept, and the same command goes on"):
        download.download_loveda(tmp_path / "l", base_url=server.url)


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "Val/../../evil.txt", "C:/evil.txt", "Val\\..\\..\\evil"])
def test_no_member_leaves_the_folder(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    serve(server, monkeypatch, "Val", zipped({"Val/Urban/fine.png": b"1", name: b"2"}))
    with pytest.raises(ValueError, match=r"would lie outside the folder .* nothing was unpacked"):
        download.download_loveda(tmp_path / "l" / "root", base_url=server.url, parts=("Val",))
    assert [path.name for path in tmp_path.rglob("*")] == ["l", "root", "Val.zip"]


def test_links_foreign_archives_and_damage(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetched(content: bytes) -> None:
        serve(server, monkeypatch, "Val", content)
        download.download_loveda(tmp_path, base_url=server.url, parts=("Val",))

    with pytest.raises(ValueError, match="is a link"):
        fetched(zipped({"Val/Urban/link": b"/etc/passwd"}, link="Val/Urban/link"))
    with pytest.raises(ValueError, match="holds no folder Val, Urban or Rural"):
        fetched(zipped({"other/a.png": b"1"}))
    whole = zipped({"Val/Urban/a.png": b"aaaaaaaaaaaaaaaa"})
    with pytest.raises(OSError, match=r"Val\.zip: damaged"):
        fetched(whole.replace(b"aaaaaaaaaaaaaaaa", b"aaaaaaaabaaaaaaa"))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3}))
    with pytest.raises(OSError, match="make room"):
        fetched(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["Val.zip"]
    monkeypatch.undo()
    without = zipped({"Urban/images_png/1.png": b"1", "Rural/images_png/2.png": b"2"})
    (tmp_path / "Val.zip").write_bytes(without)
    unpacked = download.unpack(download.Archive("Val", "", ""), tmp_path / "Val.zip", tmp_path)
    assert sorted(path.name for path in unpacked.iterdir()) == ["Rural", "Urban"]
