"""`data get`: downloads from a local server that answers as the Hugging Face Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants, file_download
from typer.testing import CliRunner

from gpu_gpt2.cli.app import app
from gpu_gpt2.data.prepare import download as downloads
from gpu_gpt2.data.prepare import published, recipes
from gpu_gpt2.data.prepare.download import Remote, download, download_all
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.tokens import read_tokens, write_tokens

CONTENT = np.random.default_rng(0).bytes(300_001)
BLOCK = 1_000  # bytes that huggingface_hub hands over at once


@dataclass
class Site:
    """A server with files of the Hub and others, how it behaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # by path
    ranges: bool = True  # whether it knows them
    sizes: bool = True  # whether it says how long an answer is
    redirects: bool = False  # whether files lie elsewhere, as the Hub's large ones do
    cut_after: int | None = None  # bytes of every answer
    hold_after: int | None = None  # bytes of every answer, after which it waits
    holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    failures: list[int] = field(default_factory=list)  # statuses of the next answers
    etag: str | None = None  # in place of the SHA-256
    listing: bytes = b""
    asked: list[str] = field(default_factory=list)  # method and range
    sent: int = 0  # bytes

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        if path == "api/agent-harnesses":  # huggingface_hub asks for it of its own accord
            request.send_error(404)
            return
        self.asked.append(f"{request.command} {request.headers.get('Range', 'all')}")
        if self.failures:
            request.send_error(self.failures.pop(0))
            return
        if path.startswith("api/"):
            request.send_response(200)
            request.send_header("Content-Length", str(len(self.listing)))
            request.end_headers()
            request.wfile.write(self.listing)
            return
        content = self.files.get(path.removeprefix("elsewhere/"))
        if content is None:
            request.send_error(404)
            return
        sha256 = self.etag or hashlib.sha256(content).hexdigest()
        if self.redirects and not path.startswith("elsewhere/"):
            request.send_response(302)
            request.send_header("Location", f"{self.url}/elsewhere/{path}")
            request.send_header("X-Linked-Etag", f'"{sha256}"')
            request.send_header("X-Linked-Size", str(len(content)))
            request.send_header("X-Repo-Commit", "0" * 40)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        wanted = request.headers.get("Range", "") if self.ranges else ""
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if first >= len(content):
            request.send_error(416)
            return
        body = content[first:]
        request.send_response(206 if wanted else 200)
        if self.sizes:
            request.send_header("Content-Length", str(len(body)))
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        request.send_header("ETag", f'"{sha256}"')
        request.send_header("X-Repo-Commit", "0" * 40)
        request.end_headers()
        if request.command == "GET":
            body = body[: self.cut_after]
            self.sent += len(body)
            request.wfile.write(body[: self.hold_after])
            if self.hold_after is not None and len(body) > self.hold_after:
                self.holding.set()
                self.released.wait(60)
                return
            request.wfile.write(b"" if self.hold_after is None else body[self.hold_after :])
        request.close_connection = True


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.answer(self)

        def do_HEAD(self) -> None:
            site.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    # What HF_ENDPOINT sets, which huggingface_hub reads when it is imported.
    template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", BLOCK)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def remote(site: Site, folder: Path, **options: object) -> Remote:
    """A file of the Hub."""
    values = {"check": lambda path: None, "on_hub": True, **options}
    return Remote(url=f"{site.url}/file", path=folder / "file", **values)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("redirects", [False, True])
def test_a_file_comes_and_is_not_asked_for_again(
    site: Site, tmp_path: Path, redirects: bool
) -> None:
    site.files["file"] = CONTENT
    site.redirects = redirects
    counts: list[int] = []
    download(remote(site, tmp_path), counts.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    assert sum(counts) == len(CONTENT)
    site.asked.clear()
    download(remote(site, tmp_path), counts.append)
    download(remote(site, tmp_path, size=len(CONTENT)))
    assert not site.asked
    assert sum(counts) == 2 * len(CONTENT)


def test_a_connection_that_is_cut_goes_on(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    site.cut_after = 40_000
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert site.asked[:2] == ["HEAD all", "GET all"]
    assert len(site.asked) > 7
    assert site.sent <= len(CONTENT) + 9 * BLOCK


def test_the_next_command_goes_on_too(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    stop = threading.Event()
    got = []

    def advance(count: int) -> None:
        got.append(count)
        if sum(got) > 100_000:
            stop.set()

    with pytest.raises(downloads._StoppedError):
        download(remote(site, tmp_path), advance, stop)
    part = tmp_path / f"file.{hashlib.sha256(CONTENT).hexdigest()[:16]}.part"
    assert only(tmp_path) == [part.name]
    have = part.stat().st_size
    assert have >= 100_000
    site.asked.clear()
    counts: list[int] = []
    download(remote(site, tmp_path), counts.append)
    assert sum(counts) == len(CONTENT)
    assert site.asked == ["HEAD all", f"GET bytes={have}-"]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]


def leave_part(site: Site, folder: Path, content: bytes) -> None:
    """Leaves what a download of `content` leaves that is stopped after 90,000 bytes."""
    site.files["file"] = content
    stop = threading.Event()
    got = []

    def advance(count: int) -> None:
        got.append(count)
        if sum(got) >= 90_000:
            stop.set()

    with pytest.raises(downloads._StoppedError):
        download(remote(site, folder), advance, stop)
    site.asked.clear()


@pytest.mark.parametrize("new", [CONTENT, CONTENT[:50_000]])
def test_a_file_that_changed_comes_anew(site: Site, tmp_path: Path, new: bytes) -> None:
    leave_part(site, tmp_path, CONTENT[::-1])
    site.files["file"] = new
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == new
    assert site.asked == ["HEAD all", "GET all"]
    assert only(tmp_path) == ["file"]


def test_a_file_that_became_shorter_under_its_etag_comes_anew(site: Site, tmp_path: Path) -> None:
    site.etag = "unchanged"
    leave_part(site, tmp_path, CONTENT)
    site.files["file"] = CONTENT[:50_000]
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT[:50_000]


def test_a_part_that_was_damaged_is_thrown_away(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, CONTENT)
    (part,) = tmp_path.iterdir()
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(DataError, match=r"what came is not that file: its SHA-256 is "):
        download(remote(site, tmp_path))
    assert not only(tmp_path)
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, CONTENT)
    site.ranges = False
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    leave_part(site, tmp_path, CONTENT)
    site.failures = [503]
    with pytest.raises(DataError, match=r"cannot get .*/file \(status 503\); .* put it here: "):
        download(remote(site, tmp_path))
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("on_hub", [True, False])
def test_a_missing_file_is_not_asked_for_twice(site: Site, tmp_path: Path, on_hub: bool) -> None:
    with pytest.raises(DataError, match=r"\(status 404\); .* by hand and put it here: .*/file"):
        download(remote(site, tmp_path, on_hub=on_hub))
    assert len(site.asked) == 1
    assert not only(tmp_path)


@pytest.mark.parametrize("on_hub", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 5}, "300001 bytes, expected 5"),
        ({"check": lambda path: read_tokens(path)}, "magic"),
    ],
)
def test_a_wrong_file_is_thrown_away(
    site: Site, tmp_path: Path, on_hub: bool, options: dict[str, object], message: str
) -> None:
    site.files["file"] = CONTENT
    with pytest.raises(DataError, match=f"what came is not that file: .*({message})"):
        download(remote(site, tmp_path, on_hub=on_hub, **options))
    assert not only(tmp_path)


def test_a_bad_file_under_the_right_name_is_replaced(site: Site, tmp_path: Path) -> None:
    write_tokens(tmp_path / "file", np.arange(500))
    site.files["file"] = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(site.files["file"][:1_500])
    download(remote(site, tmp_path, check=read_tokens))
    assert (tmp_path / "file").read_bytes() == site.files["file"]


def test_no_network_is_one_line(site: Site, tmp_path: Path) -> None:
    for on_hub in (True, False):
        refused = Remote(
            url="http://127.0.0.1:1/file",
            path=tmp_path / "file",
            check=lambda path: None,
            on_hub=on_hub,
        )
        expected = r"http://127.0.0.1:1/file \(Connect\w+\).*put it here: .*/file$"
        with pytest.raises(DataError, match=expected) as caught:
            download_all([refused] * 9, lambda count: None)
        assert "\n" not in str(caught.value)
    assert not only(tmp_path)


def test_the_hubs_offline_mode_is_one_line(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"OfflineModeIsEnabled.*put it here: .*/file"):
        download(remote(site, tmp_path))


def test_a_folder_that_cannot_be_written_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match=r"cannot write .*out/file: .* choose another --out"):
        download(remote(site, tmp_path / "out"))


def test_one_failure_stops_the_others(site: Site, tmp_path: Path) -> None:
    missing = Remote(url=f"{site.url}/x", path=tmp_path / "x", check=lambda path: None, on_hub=True)
    with pytest.raises(DataError, match="404"):
        download_all([missing] * 500, lambda count: None)
    assert len(site.asked) < 500


# Files that are not on the Hub


def test_a_file_from_elsewhere(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    counts: list[int] = []
    download(remote(site, tmp_path, on_hub=False, sha256=sha256), counts.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    assert sum(counts) == len(CONTENT)
    assert site.asked == ["GET all"]
    (tmp_path / "file").unlink()
    with pytest.raises(DataError, match=r"its SHA-256 is .*expected 0000"):
        download(remote(site, tmp_path, on_hub=False, sha256="0" * 64))
    assert not only(tmp_path)


def test_a_file_from_elsewhere_that_is_cut_begins_again(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    site.cut_after = 90_000
    with pytest.raises(DataError, match=r"cannot get .*give the same command again"):
        download(remote(site, tmp_path, on_hub=False))
    assert only(tmp_path) == ["file.part"]
    site.cut_after = None
    download(remote(site, tmp_path, on_hub=False))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]


# Shards


@pytest.fixture
def shards(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A published set of one shard of 1,000 tokens for validation, two of 1,000, one of 300."""
    values = {}
    names = ["fineweb_val_000000", *(f"fineweb_train_{i:06d}" for i in (1, 2, 3))]
    for name, count in zip(names, (1_000, 1_000, 1_000, 300), strict=True):
        values[name] = np.random.default_rng(len(values)).integers(0, 50_257, count, np.uint16)
        write_tokens(tmp_path / "made.bin", values[name])
        path = f"datasets/someone/shards/resolve/main/{name}.bin"
        site.files[path] = (tmp_path / "made.bin").read_bytes()
    monkeypatch.setattr(published, "SHARD_TOKENS", 1_000)
    shard_set = published.ShardSet(dataset="someone/shards", stem="fineweb", shards=3)
    monkeypatch.setattr(published, "SHARD_SETS", {"fineweb10B": shard_set})
    return values


def get(tmp_path: Path, *arguments: str) -> str:
    command = ["data", "get", "fineweb", "--out", str(tmp_path), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_all_shards(site: Site, tmp_path: Path, shards: dict[str, np.ndarray]) -> None:
    get(tmp_path)
    folder = tmp_path / "fineweb10B"
    for name, values in shards.items():
        assert (read_tokens(folder / f"{name}.bin") == values).all()
    assert len(only(folder)) == 4
    site.asked.clear()
    get(tmp_path)
    assert not site.asked


def test_ctrl_c_ends_at_once_and_the_same_command_resumes(site: Site, tmp_path: Path) -> None:
    """The command as users start it, with files of more than huggingface_hub's block of 10 MB."""
    folder = "datasets/kjj0/fineweb10B-gpt2/resolve/main"
    for name, count in (("val_000000", 10), ("train_000001", 12_000_000)):
        write_tokens(tmp_path / "made.bin", np.arange(count) % 50_257)
        site.files[f"{folder}/fineweb_{name}.bin"] = (tmp_path / "made.bin").read_bytes()
    site.hold_after = 20_000_000
    arguments = ["data", "get", "fineweb10B", "--tokens", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "gpu_gpt2", *arguments]
    environment = {**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "home")}
    # A shell's background jobs ignore the signal, and their children inherit that.
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert site.holding.wait(60)
        out_folder = tmp_path / "fineweb10B"
        for _ in range(500):
            if any(path.stat().st_size for path in out_folder.glob("*.part")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=5)
    site.released.set()
    assert process.returncode == 130
    assert out == b"stopped; give the same command again to resume\n"
    (part,) = out_folder.glob("*.part")
    have = part.stat().st_size
    assert have > 10_000_000
    site.hold_after = None
    site.asked.clear()
    result = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    assert result.stderr == ""
    assert "24,001,024 bytes" in result.stdout.replace("\n", "")
    assert site.asked == ["HEAD all", f"GET bytes={have}-"]
    assert read_tokens(out_folder / "fineweb_train_000001.bin").size == 12_000_000
    assert only(out_folder) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (1_000, 1), (1_001, 2), (99_999, 3)])
def test_tokens_take_whole_shards(
    site: Site, tmp_path: Path, shards: dict[str, np.ndarray], tokens: int, count: int
) -> None:
    get(tmp_path, "--tokens", str(tokens))
    folder = tmp_path / "fineweb10B"
    names = ["fineweb_val_000000", *(f"fineweb_train_{i:06d}" for i in range(1, count + 1))]
    assert only(folder) == sorted(f"{name}.bin" for name in names)
    for name in names:
        assert (read_tokens(folder / f"{name}.bin") == shards[name]).all()
    site.asked.clear()
    get(tmp_path, "--tokens", "1")
    assert not site.asked


def test_the_published_sets() -> None:
    for name, first in (
        ("fineweb10B", "kjj0/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin"),
        ("fineweb100B", "chrisdryden/FineWebTokenizedGPT2/resolve/main/fineweb_val_000000.bin"),
        (
            "edu_fineweb100B",
            "karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/edu_fineweb_val_000000.bin",
        ),
    ):
        remotes = published.published(name, Path("data"), None)
        assert remotes[0].url == f"https://huggingface.co/datasets/{first}"
        assert len(remotes) == 1 + published.SHARD_SETS[name].shards
    remotes = published.published("fineweb10B", Path("data"), 250_000_000)
    assert [remote.path.name for remote in remotes] == [
        "fineweb_val_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "fineweb_train_000003.bin",
    ]
    assert published.expected_bytes(remotes) == 4 * 200_001_024
    names = [remote.path.name for remote in published.published("starter-pack", Path("data"), None)]
    assert names[:2] == ["gpt2_124M.bin", "gpt2_124M_bf16.bin"]
    for arguments in (("x", None), ("starter-pack", 10), ("fineweb10B", 0)):
        with pytest.raises(ConfigError):
            published.published(arguments[0], Path("data"), arguments[1])


# Raw text for data prepare


def test_raw_text_is_got_once(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"First.\n\n" * 20_000
    site.files["input.txt"] = text
    recipe = recipes.RECIPES["tinyshakespeare"]
    changed = {
        "place": f"{site.url}/input.txt",
        "bytes": 160_000,
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    monkeypatch.setattr(recipes, "RECIPES", {"tinyshakespeare": recipes.replace(recipe, **changed)})
    command = ["data", "prepare", "tinyshakespeare", "--out", str(tmp_path)]
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.exception
    assert site.asked == ["GET all"]
    (tmp_path / "tinyshakespeare/tiny_shakespeare_manifest.json").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert site.asked == ["GET all"]


def test_the_files_of_a_sample_are_listed_and_got(site: Site, tmp_path: Path) -> None:
    entries = []
    for i in (1, 0):
        pq.write_table(pa.table({"text": [f"Document {i}."] * 9}), tmp_path / "made")
        content = (tmp_path / "made").read_bytes()
        path = f"sample/10BT/00{i}_00000.parquet"
        site.files[f"datasets/HuggingFaceFW/fineweb/resolve/main/{path}"] = content
        entries.append({"type": "file", "path": path, "size": len(content), "oid": "0" * 40})
    entries.append({"type": "directory", "path": "sample/10BT/more", "oid": "0" * 40})
    site.listing = json.dumps(entries).encode()
    plan = recipes.plan_named("fineweb10B", tmp_path, "gpt2", 20)

    def get_all(remotes: list[Remote]) -> None:
        download_all(remotes, lambda count: None)

    for _ in range(2):
        plan = recipes.with_text(plan, "fineweb10B", None, get_all)
        assert [source.path.name for source in plan.sources] == [
            "000_00000.parquet",
            "001_00000.parquet",
        ]
    assert sorted(site.asked) == ["GET all"] * 3 + ["HEAD all"] * 2
    listing = tmp_path / "fineweb10B/raw/files.json"
    listing.write_text("[1]")
    with pytest.raises(DataError, match="is no list of files"):
        recipes.with_text(plan, "fineweb10B", None, get_all)
    listing.unlink()
    site.listing = b"<html>"
    expected = r"cannot list sample/10BT of the data set HuggingFaceFW/fineweb .* with --from"
    with pytest.raises(DataError, match=expected):
        recipes.with_text(plan, "fineweb10B", None, get_all)
    site.failures = [404]
    with pytest.raises(DataError, match=expected):
        recipes.with_text(plan, "fineweb10B", None, get_all)
