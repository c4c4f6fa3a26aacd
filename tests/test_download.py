"""`data get`: downloads that go on where they stopped, over all that a server may do to them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gpu_gpt2.cli.app import app
from gpu_gpt2.data.prepare import download as downloads
from gpu_gpt2.data.prepare import published, recipes
from gpu_gpt2.data.prepare.download import Remote, download, download_all
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.tokens import read_tokens, write_tokens

CONTENT = np.random.default_rng(0).bytes(300_001)


@dataclass
class Site:
    """Files on a local server, how it behaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # whether it knows them
    etag: bool = True
    cut_after: int | None = None  # bytes of every answer
    failures: list[int] = field(default_factory=list)  # statuses of the next answers
    headers: dict[str, str] = field(default_factory=dict)
    listing: bytes = b""
    asked: list[str] = field(default_factory=list)  # ranges
    sent: int = 0  # bytes

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(f"{request.command} {request.headers.get('Range', 'all')}")
        name = request.path.lstrip("/")
        content = self.listing if name.startswith("api/") else self.files.get(name)
        if self.failures or content is None:
            request.send_error(self.failures.pop(0) if self.failures else 404)
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        wanted = request.headers.get("Range", "") if self.ranges else ""
        if request.headers.get("If-Range", etag) != etag:
            wanted = ""
        first, last = 0, len(content) - 1
        if wanted:
            start, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(end or last), last)
            if first >= len(content):
                request.send_error(416)
                return
        body = content[first : last + 1]
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(body)))
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if self.etag:
            request.send_header("ETag", etag)
        for key, value in self.headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            body = body[: self.cut_after]
            self.sent += len(body)
            request.wfile.write(body)
        request.close_connection = True


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(downloads, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(downloads, "BLOCK_BYTES", 1_000)
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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def remote(site: Site, folder: Path, **options: object) -> Remote:
    values = {"check": lambda path: None, **options}
    return Remote(url=f"{site.url}/file", path=folder / "file", **values)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_and_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    counts: list[int] = []
    download(remote(site, tmp_path), counts.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    assert sum(counts) == len(CONTENT)
    download(remote(site, tmp_path))
    download(remote(site, tmp_path, size=len(CONTENT)))
    assert site.asked == ["GET all", "HEAD all"]


def test_a_connection_that_is_cut_goes_on(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    site.cut_after = 40_000
    counts: list[int] = []
    download(remote(site, tmp_path), counts.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert site.asked[0] == "GET all"
    assert len(site.asked) > downloads.ATTEMPTS
    assert site.sent <= len(CONTENT) + 9 * downloads.BLOCK_BYTES
    assert sum(counts) == len(CONTENT)


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
    assert only(tmp_path) == ["file.part", "file.part.json"]
    have = (tmp_path / "file.part").stat().st_size
    counts: list[int] = []
    download(remote(site, tmp_path), counts.append)
    assert sum(counts) == len(CONTENT)
    assert site.asked == ["GET all", f"GET bytes={have}-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def leave_part(site: Site, folder: Path, content: bytes) -> None:
    """What a download of `content` leaves that was cut off after 90,000 bytes."""
    site.files["file"] = content
    site.cut_after = 90_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "ATTEMPTS", 1)
        with pytest.raises(DataError):
            download(remote(site, folder))
    site.cut_after = None
    site.asked.clear()


def test_a_file_that_changed_comes_anew(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, CONTENT[::-1])
    assert (tmp_path / "file.part").stat().st_size >= 80_000
    site.files["file"] = CONTENT
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(site.asked) == 1


def test_a_file_that_became_shorter_comes_anew(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, CONTENT)
    site.files["file"] = CONTENT[:50_000]
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == CONTENT[:50_000]


@pytest.mark.parametrize("new", [CONTENT, CONTENT[:50_000]])
def test_a_file_that_changed_behind_the_same_etag_is_seen_by_its_size(
    site: Site, tmp_path: Path, new: bytes
) -> None:
    old = CONTENT[::-1][:200_000]
    leave_part(site, tmp_path, old)
    record = tmp_path / "file.part.json"
    sums = [hashlib.md5(content).hexdigest() for content in (old, new)]
    record.write_text(record.read_text().replace(*sums))
    site.files["file"] = new
    download(remote(site, tmp_path))
    assert (tmp_path / "file").read_bytes() == new


def test_a_server_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, CONTENT)
    site.ranges = False
    counts: list[int] = []
    download(remote(site, tmp_path), counts.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(site.asked) == 1
    assert sum(counts) == len(CONTENT)


def test_without_a_validator_nothing_is_gone_on_with(site: Site, tmp_path: Path) -> None:
    site.etag = False
    leave_part(site, tmp_path, CONTENT)
    download(remote(site, tmp_path))
    assert site.asked == ["GET all"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    site.failures = [503, 429, 500]
    download(remote(site, tmp_path))
    assert len(site.asked) == 4
    site.failures = [503] * 9
    with pytest.raises(DataError, match=r"cannot get .*/file \(HTTPError\).*put that file here"):
        download(Remote(url=f"{site.url}/file", path=tmp_path / "b", check=lambda path: None))


def test_a_missing_file_is_not_asked_for_twice(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the server answers 404 Not Found.*put it here: .*/file"):
        download(remote(site, tmp_path))
    assert site.asked == ["GET all"]


@pytest.mark.parametrize(
    ("options", "headers", "message"),
    [
        ({"size": 5}, {}, "300001 bytes, expected 5"),
        ({}, {"X-Linked-Etag": '"' + "0" * 64 + '"'}, "its SHA-256 is .*expected 0000"),
        ({"check": lambda path: read_tokens(path)}, {}, "no token file|magic"),
    ],
)
def test_a_wrong_file_is_thrown_away(
    site: Site, tmp_path: Path, options: dict[str, object], headers: dict[str, str], message: str
) -> None:
    site.files["file"] = CONTENT
    site.headers = headers
    with pytest.raises(DataError, match=f"what came is not that file: .*({message})"):
        download(remote(site, tmp_path, **options))
    assert "file" not in only(tmp_path)
    assert "file.part" not in only(tmp_path)


def test_the_right_sum_passes(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    site.headers = {"X-Linked-Etag": f'"{hashlib.sha256(CONTENT).hexdigest()}"'}
    download(remote(site, tmp_path))
    assert only(tmp_path) == ["file"]


def test_no_network_is_one_line(site: Site, tmp_path: Path) -> None:
    refused = Remote(url="http://127.0.0.1:1/file", path=tmp_path / "file", check=lambda path: None)
    with pytest.raises(DataError, match=r"http://127.0.0.1:1/file .*put that file here: .*/file"):
        download_all([refused] * 9, lambda count: None)
    assert not only(tmp_path)


def test_one_failure_stops_the_others(site: Site, tmp_path: Path) -> None:
    site.files["file"] = CONTENT
    site.cut_after = 0
    missing = Remote(url=f"{site.url}/x", path=tmp_path / "x", check=lambda path: None)
    with pytest.raises(DataError, match="404"):
        download_all([remote(site, tmp_path), missing], lambda count: None)


# Shards


@pytest.fixture
def shards(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A published set of one shard of 1,000 tokens for validation, two of 1,000, one of 300."""
    values = {}
    names = ["fineweb_val_000000", *(f"fineweb_train_{i:06d}" for i in (1, 2, 3))]
    for name, count in zip(names, (1_000, 1_000, 1_000, 300), strict=True):
        values[name] = np.random.default_rng(len(values)).integers(0, 50_257, count, np.uint16)
        write_tokens(tmp_path / "made.bin", values[name])
        site.files[f"{name}.bin"] = (tmp_path / "made.bin").read_bytes()
    monkeypatch.setattr(published, "SHARD_TOKENS", 1_000)
    sets = {"fineweb10B": published.ShardSet(url=site.url, stem="fineweb", shards=3)}
    monkeypatch.setattr(published, "SHARD_SETS", sets)
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
    assert site.asked == ["HEAD all"]  # only the last may have any size


@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        (10, {"val_000000": 1, "train_000001": 10}),
        (1_000, {"val_000000": 100, "train_000001": 1_000}),
        (1_500, {"val_000000": 150, "train_000001": 1_000, "train_000002": 500}),
        (
            99_999,
            {
                "val_000000": 1_000,
                "train_000001": 1_000,
                "train_000002": 1_000,
                "train_000003": 300,
            },
        ),
    ],
)
def test_a_limit_of_tokens_cuts_the_last_shard(
    site: Site, tmp_path: Path, shards: dict[str, np.ndarray], limit: int, counts: dict[str, int]
) -> None:
    get(tmp_path, "--tokens", str(limit))
    folder = tmp_path / "fineweb10B"
    assert only(folder) == sorted(f"fineweb_{name}.bin" for name in counts)
    for name, count in counts.items():
        values = read_tokens(folder / f"fineweb_{name}.bin")
        assert (values == shards[f"fineweb_{name}"][:count]).all()
        assert len(values) == count
    assert site.sent == sum(1024 + 2 * count for count in counts.values())


def test_a_larger_limit_replaces_what_was_cut(
    site: Site, tmp_path: Path, shards: dict[str, np.ndarray]
) -> None:
    get(tmp_path, "--tokens", "200")
    get(tmp_path, "--tokens", "100")  # more is here already
    folder = tmp_path / "fineweb10B"
    assert len(read_tokens(folder / "fineweb_train_000001.bin")) == 200
    get(tmp_path, "--tokens", "1200")
    assert len(read_tokens(folder / "fineweb_train_000001.bin")) == 1_000
    assert len(read_tokens(folder / "fineweb_train_000002.bin")) == 200


def test_a_cut_shard_from_a_server_without_ranges(
    site: Site, tmp_path: Path, shards: dict[str, np.ndarray]
) -> None:
    site.ranges = False
    get(tmp_path, "--tokens", "200")
    assert len(site.asked) == 2
    values = read_tokens(tmp_path / "fineweb10B/fineweb_train_000001.bin")
    assert (values == shards["fineweb_train_000001"][:200]).all()


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
        assert remotes[0].limit is None
    remotes = published.published("fineweb10B", Path("data"), 250_000_000)
    assert [remote.limit for remote in remotes] == [50_001_024, None, None, 100_001_024]
    names = [remote.path.name for remote in published.published("starter-pack", Path("data"), None)]
    assert names[:2] == ["gpt2_124M.bin", "gpt2_124M_bf16.bin"]
    for arguments in (("x", None), ("starter-pack", 10), ("fineweb10B", 9)):
        with pytest.raises(ConfigError):
            published.published(arguments[0], Path("data"), arguments[1])


# Raw text for data prepare


def test_raw_text_is_got_once(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["input.txt"] = b"First.\n\n" * 20_000
    recipe = recipes.RECIPES["tinyshakespeare"]
    changed = {"url": f"{site.url}/input.txt", "bytes": 160_000}
    monkeypatch.setattr(recipes, "RECIPES", {"tinyshakespeare": recipes.replace(recipe, **changed)})
    command = ["data", "prepare", "tinyshakespeare", "--out", str(tmp_path)]
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.exception
    assert site.asked == ["GET all"]
    (tmp_path / "tinyshakespeare/tiny_shakespeare_manifest.json").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert site.asked == ["GET all"]


def test_the_files_of_a_sample_are_listed_and_got(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = []
    for i in (1, 0):
        pq.write_table(pa.table({"text": [f"Document {i}."] * 9}), tmp_path / "made")
        name = f"00{i}_00000.parquet"
        path = f"sample/10BT/{name}"
        site.files[f"datasets/F/fineweb/resolve/main/{path}"] = (tmp_path / "made").read_bytes()
        entries.append(f'{{"path": "{path}", "size": {(tmp_path / "made").stat().st_size}}}')
    site.listing = f"[{', '.join(entries)}]".encode()
    recipe = recipes.RECIPES["fineweb10B"]
    url = f"{site.url}/datasets/F/fineweb/resolve/main/sample/10BT"
    monkeypatch.setattr(recipes, "RECIPES", {"fineweb10B": recipes.replace(recipe, url=url)})
    plan = recipes.plan_named("fineweb10B", tmp_path, "gpt2", 20)

    def get_all(remotes: list[Remote]) -> None:
        download_all(remotes, lambda count: None)

    for _ in range(2):
        plan = recipes.with_text(plan, "fineweb10B", None, get_all)
        assert [source.path.name for source in plan.sources] == [
            "000_00000.parquet",
            "001_00000.parquet",
        ]
    assert len(site.asked) == 3
    site.listing = b"<html>"
    listing = tmp_path / "fineweb10B/raw/files.json"
    listing.write_text("[1]")
    with pytest.raises(DataError, match="is no list of files"):
        recipes.with_text(plan, "fineweb10B", None, get_all)
    listing.unlink()
    with pytest.raises(DataError, match=r"cannot get the list .*/main/sample/10BT by hand"):
        recipes.with_text(plan, "fineweb10B", None, get_all)
