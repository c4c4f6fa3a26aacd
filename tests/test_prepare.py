"""`data prepare`: the right tokens in the right files, and what becomes of bad text and breaks."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gpu_gpt2.cli.app import app
from gpu_gpt2.data.prepare import documents, encode, recipes
from gpu_gpt2.data.prepare.documents import Source, read_pieces
from gpu_gpt2.data.prepare.download import Remote
from gpu_gpt2.data.prepare.shards import Plan, Prepared, finished, prepare
from gpu_gpt2.errors import ConfigError, DataError, UserError
from gpu_gpt2.formats.multiple_choice import read_choices
from gpu_gpt2.formats.tokens import read_tokens
from gpu_gpt2.tokenizer import GPT2Tokenizer, Tokenizer
from gpu_gpt2.tokenizer.gpt2 import _PIECES

T = TypeVar("T")
WORDS = ["Hark", "thou", "cat\n", "1,024", "don't", "  ", "\n\n", "fünf", "x" * 40, "."]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return GPT2Tokenizer.gpt2()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def quiet(read: int, tokens: int) -> None:
    pass


def in_one_line(call: Callable[[], T]) -> T | None:
    """What `call` returns, or None after a UserError of one line."""
    try:
        return call()
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return None


def no_network(remotes: Sequence[Remote]) -> None:
    raise AssertionError(f"asked for {remotes[0].url}")


def own(paths: list[Path], out: Path, **options: Any) -> Plan:
    values = {"tokenizer": "bytes", "field": "text", "shard_tokens": None, "val_tokens": None}
    return recipes.plan_own(paths, out, **{**values, **options})


def tokens_of(done: Prepared, folder: Path) -> npt.NDArray[np.uint16]:
    return np.concatenate([read_tokens(folder / shard.file) for shard in done.shards])


def expected_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    return [t for text in texts for t in (tokenizer.eot, *tokenizer.encode(text).tolist())]


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


# Documents


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK_CHARS", 50)
    monkeypatch.setattr(documents, "FORCED_CHARS", 10**6)
    path = tmp_path / "long.txt"
    for seed in range(30):
        text = sentence(random.Random(seed), 200)
        path.write_text(text)
        pieces = list(read_pieces(Source(path=path, kind="text")))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert len(pieces) > 5
        assert pieces[-1].read == path.stat().st_size
        ids = [t for piece in pieces for t in gpt2.encode(piece.text).tolist()]
        assert ids == gpt2.encode(text).tolist()


@given(st.text(st.sampled_from("a1.' \n\t\u00a0\u2003\x1c\u4e2d"), min_size=20, max_size=80))
@settings(max_examples=200, deadline=None)
def test_a_cut_leaves_the_pieces_of_the_pattern_as_they_are(text: str) -> None:
    pieces = regex.compile(_PIECES).findall
    cut = documents._last_border(text, 0)
    assert pieces(text[:cut]) + pieces(text[cut:]) == pieces(text)


def test_text_without_a_place_to_cut_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "blank.txt"
    path.write_text("\n" * 1_200_000 + "x")  # more than tiktoken can take at once
    done = prepare(own([path], tmp_path / "out", tokenizer="gpt2", val_tokens=0), quiet)
    text = GPT2Tokenizer.gpt2().decode(tokens_of(done, tmp_path / "out/blank")[1:])
    assert text == path.read_text()


def test_text_comes_from_all_kinds_of_files_in_the_order_of_their_names(
    tmp_path: Path, gpt2: Tokenizer
) -> None:
    folder = tmp_path / "mine"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfOne\r\ntext.")
    (folder / "b/c.jsonl").write_text(
        '{"text": "Two"}\n\n{"text": "half a pair: \\ud800", "n": 1}\n{"text": ""}'
    )
    pq.write_table(pa.table({"id": [1, 2], "text": ["Five", "Six"]}), folder / "d.parquet")
    (folder / "readme.md").write_text("not text of mine")
    (folder / "empty.txt").write_text("")
    done = prepare(own([folder], tmp_path, tokenizer="gpt2", val_tokens=3), quiet)
    texts = ["One\r\ntext.", "Two", "half a pair: \ufffd", "", "Five", "Six"]
    assert [s.file for s in done.shards] == ["mine_val_000000.bin", "mine_train_000001.bin"]
    assert done.shards[0].tokens == 3
    assert tokens_of(done, folder).tolist() == expected_tokens(gpt2, texts)


def test_own_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defg"], "content")
    done = prepare(own([path], tmp_path, field="content", val_tokens=0), quiet)
    assert bytes(tokens_of(done, tmp_path / "a")[1:4].astype(np.uint8)) == b"abc"
    with pytest.raises(DataError, match=r"line 1 at offset 0.*'text', found nothing.*content"):
        prepare(own([path], tmp_path / "other"), quiet)


def write_text(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "bad.txt"
        path.write_bytes(content)
        return path

    return write


def write_lines(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "bad.jsonl"
        path.write_bytes(content)
        return path

    return write


def write_parquet(table: Any, damage: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "bad.parquet"
        pq.write_table(table, path)
        if damage:
            path.write_bytes(path.read_bytes()[:-30])
        return path

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_text(b"abc\xff"), r"bad.txt is not UTF-8 text: byte 0xff at offset 3"),
        (write_text(b"a" * 262_143 + b"\xe4x"), r"byte 0xe4 at offset 262143"),
        (write_text(b"abc\xe4\xb8"), r"byte 0xe4 at offset 3"),
        (write_text(b""), r"makes 0 tokens.*more text"),
        (write_lines(b'{"text": "a"}\n{"text": "\xff"}\n'), r"byte 0xff at offset 24"),
        (write_lines(b'{"text": "a"}\n\n{"text": 1}\n'), r"line 3 at offset 15.*str.*found a int"),
        (write_lines(b'{"text": "a"}\n{"text"'), r"line 2 at offset 14 is not JSON"),
        (write_lines(b'["text"]\n'), r"line 1 at offset 0 is a list, expected an object"),
        (write_lines(b"[" * 100_000), r"line 1 at offset 0 is not JSON"),
        (write_parquet(pa.table({"txt": ["a"]})), r"no column 'text', only txt"),
        (write_parquet(pa.table({"text": [1]})), r"column 'text' holds int64"),
        (write_parquet(pa.table({"text": ["a", None]})), r"row 2 of column 'text' is empty"),
        (write_parquet(pa.table({"text": ["a"]}), damage=True), r"not a readable .parquet"),
    ],
)
def test_bad_text_is_refused_in_one_line_and_leaves_no_tokens(
    tmp_path: Path, write: Callable[[Path], Path], message: str
) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        prepare(own([path], tmp_path, shard_tokens=10**6), quiet)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "bad").rglob("*"))


@given(content=st.binary(max_size=300), kind=st.sampled_from([".txt", ".jsonl", ".parquet"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_pieces_or_one_line(
    content: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{kind}"
    path.write_bytes(content if kind != ".parquet" else b"PAR1" + content + b"PAR1")
    source = Source(path=path, kind=documents.KINDS[kind])
    in_one_line(lambda: list(read_pieces(source)))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    for path, message in (
        (tmp_path, "holds no .txt or .jsonl or .parquet file"),
        (tmp_path / "a.pdf", "expected a .txt"),
        (tmp_path / "b.txt", "no file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            own([path], tmp_path)
    write_text(b"x")(tmp_path)
    with pytest.raises(ConfigError, match="--shard-tokens 0"):
        own([tmp_path / "bad.txt"], tmp_path, shard_tokens=0)
    with pytest.raises(ConfigError, match="--val-tokens -1"):
        own([tmp_path / "bad.txt"], tmp_path, val_tokens=-1)
    with pytest.raises(ConfigError, match="bpe:300 would have to be trained"):
        own([tmp_path / "bad.txt"], tmp_path, tokenizer="bpe:300")


# Shards


def test_documents_run_on_from_shard_to_shard(tmp_path: Path) -> None:
    texts = [sentence(random.Random(seed), 5) for seed in range(9)]
    path = write_jsonl(tmp_path / "own.jsonl", texts)
    done = prepare(own([path], tmp_path, shard_tokens=50, val_tokens=20), quiet)
    ids = expected_tokens(GPT2Tokenizer.of_bytes(), texts)
    assert tokens_of(done, tmp_path / "own").tolist() == ids
    rest = (len(ids) - 20) % 50
    assert [s.tokens for s in done.shards] == [20, *[50] * ((len(ids) - 20) // 50), rest]
    assert [s.file for s in done.shards[:3]] == [
        "own_val_000000.bin",
        "own_train_000001.bin",
        "own_train_000002.bin",
    ]


def test_all_cores_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [sentence(random.Random(seed), 50) for seed in range(40)]
    path = write_jsonl(tmp_path / "own.jsonl", texts)
    monkeypatch.setattr(encode, "CHUNK_CHARS", 500)
    alone = prepare(own([path], tmp_path / "a", shard_tokens=999), quiet)
    monkeypatch.setattr(encode, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(encode, "cores", lambda: 2)
    together = prepare(own([path], tmp_path / "b", shard_tokens=999), quiet)
    assert alone.shards == together.shards
    assert len(alone.shards) > 3


def test_default_split_is_about_a_tenth(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    done = prepare(own([path], tmp_path), quiet)
    assert [s.tokens for s in done.shards] == [100, 901]


def test_all_held_out_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    with pytest.raises(DataError, match=r"makes 4 tokens, and the first 9 are held out"):
        prepare(own([path], tmp_path, val_tokens=9), quiet)
    assert not list((tmp_path / "a").iterdir())


# Going on


class Interrupt:
    """Ctrl-C when so many tokens are written."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.seen: list[int] = []

    def __call__(self, read: int, tokens: int) -> None:
        self.seen.append(tokens)
        if tokens >= self.tokens:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 20, 21, 170, 240, 1_000])
def test_an_interrupted_run_goes_on_to_the_same_files(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARS", 37)
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(5):
        texts = [sentence(random.Random(10 * i + seed), 12) for seed in range(6)]
        write_jsonl(folder / f"{i}.jsonl", texts)
    plan = own([folder], tmp_path / "whole", shard_tokens=50, val_tokens=20)
    whole = prepare(plan, quiet)
    assert whole.tokens > 1_000
    plan = own([folder], tmp_path / "parts", shard_tokens=50, val_tokens=20)
    with pytest.raises(KeyboardInterrupt):
        prepare(plan, Interrupt(at))
    assert not [p for p in plan.folder.iterdir() if p.name.startswith(".")]
    before = {path: path.stat().st_mtime_ns for path in plan.folder.glob("*.bin")}
    counts = Interrupt(10**9)
    done = prepare(plan, counts)
    assert done.shards == whole.shards
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert counts.seen[0] > sum(len(read_tokens(path)) for path in before)  # none done twice
    assert (finished(plan) or done).complete


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = write_jsonl(tmp_path / "own.jsonl", [sentence(random.Random(1), 40)] * 3)
    plan = own([path], tmp_path / "out", shard_tokens=100, val_tokens=20)
    prepare(plan, quiet)
    return plan


def test_a_finished_run_is_recognised(plan: Plan) -> None:
    def fail(read: int, tokens: int) -> None:
        raise AssertionError("encoded again")

    done = prepare(plan, fail)
    assert done.complete
    assert done.text_bytes == 0


def test_what_a_killed_run_left_is_cleared_away(plan: Plan) -> None:
    plan.manifest.unlink()
    for name in (".own_train_000001.bin.1.tmp", ".other_train_000001.bin.1.tmp"):
        (plan.folder / name).touch()
    prepare(plan, quiet)
    assert [path.name for path in plan.folder.glob(".*")] == [".other_train_000001.bin.1.tmp"]


def test_a_shard_that_changed_is_refused(plan: Plan) -> None:
    path = plan.folder / "own_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"own_train_000001.bin is not as it was.*to begin again"):
        prepare(plan, quiet)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*own_train_000001.bin"):
        prepare(plan, quiet)


@pytest.mark.parametrize("name", ["tokens", "piece", "skip"])
def test_a_number_that_changed_is_refused(plan: Plan, name: str) -> None:
    content = json.loads(plan.manifest.read_bytes())
    content["shards"][1][name] += 1
    plan.manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is damaged \(ValueError: its SHA-256 .* to begin again"):
        prepare(plan, quiet)


def test_other_settings_or_text_are_refused(plan: Plan, tmp_path: Path) -> None:
    source = tmp_path / "own.jsonl"
    other = own([source], tmp_path / "out", shard_tokens=101, val_tokens=20)
    with pytest.raises(DataError, match=r"another settings \(shard_tokens 100, now 101\)"):
        prepare(other, quiet)
    with source.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"another text \(1 files, now 1; own.jsonl changed\)"):
        prepare(plan, quiet)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_manifest_is_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    path = write_jsonl(folder / "own.jsonl", ["some text", "more"])
    plan = own([path], folder, val_tokens=2)
    prepare(plan, quiet)
    content = bytearray(plan.manifest.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:position]
    plan.manifest.write_bytes(content)
    done = in_one_line(lambda: prepare(plan, quiet))
    assert done is None or done.tokens == 15


# Data sets by name


def test_tinyshakespeare_marks_every_section_and_holds_out_the_first_tokens(
    tmp_path: Path, gpt2: Tokenizer
) -> None:
    sections = [f"Player {i}:\n{sentence(random.Random(i), 30).strip()}x" for i in range(900)]
    raw = tmp_path / "input.txt"
    raw.write_text("\n\n".join(sections) + "\n")
    plan = recipes.plan_named("tinyshakespeare", tmp_path, "gpt2", None)
    assert finished(plan) is None
    plan = recipes.with_text(plan, "tinyshakespeare", raw, no_network)
    done = prepare(plan, quiet)
    folder = tmp_path / "tinyshakespeare"
    text = raw.read_text().split("\n\n")
    texts = [section + "\n\n" for section in text[:-1]] + [text[-1]]
    assert tokens_of(done, folder).tolist() == expected_tokens(gpt2, texts)
    assert [(s.file, s.tokens) for s in done.shards[:1]] == [("tiny_shakespeare_val.bin", 32_768)]
    assert done.shards[1].file == "tiny_shakespeare_train.bin"
    # Without the raw text too it is known to be finished.
    assert finished(recipes.plan_named("tinyshakespeare", tmp_path, "gpt2", None)) == done_again(
        done
    )


def done_again(done: Prepared) -> Prepared:
    return Prepared(shards=done.shards, complete=True)


def stories(number: int) -> list[dict[str, str]]:
    return [{"story": f" Story {number}.{i}.\n", "source": "x"} for i in range(7)]


def shuffled_stories(number: int, seed: int) -> list[str]:
    values = stories(number)
    random.Random(seed).shuffle(values)
    return [value["story"].strip() for value in values]


def test_tinystories_holds_out_the_first_file_and_shuffles_each(
    tmp_path: Path, gpt2: Tokenizer
) -> None:
    raw = tmp_path / "tinystories/raw/TinyStories_all_data.tar.gz"
    raw.parent.mkdir(parents=True)
    with tarfile.open(raw, "w:gz") as tar:
        for number in (2, 0, 1):
            content = json.dumps(stories(number)).encode()
            for name in (f"./data0{number}.json", f"./._data0{number}.json"):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    plan = recipes.plan_named("tinystories", tmp_path, "gpt2", None)
    done = prepare(recipes.with_text(plan, "tinystories", None, no_network), quiet)
    folder = tmp_path / "tinystories"
    assert [s.file for s in done.shards] == ["TinyStories_val.bin", "TinyStories_train.bin"]
    assert read_tokens(folder / "TinyStories_val.bin").tolist() == expected_tokens(
        gpt2, shuffled_stories(0, 1337)
    )
    assert read_tokens(folder / "TinyStories_train.bin").tolist() == expected_tokens(
        gpt2, shuffled_stories(1, 1337) + shuffled_stories(2, 1338)
    )


@pytest.mark.parametrize("at", [1, 60, 100, 200])
def test_tinystories_goes_on_with_the_file_that_is_missing(tmp_path: Path, at: int) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(3):
        (raw / f"data0{number}.json").write_text(json.dumps(stories(number)))
    named = recipes.plan_named("tinystories", tmp_path, "bytes", None)
    plan = recipes.with_text(named, "tinystories", raw, no_network)
    with pytest.raises(KeyboardInterrupt):
        prepare(plan, Interrupt(at))
    done = prepare(plan, quiet)
    assert tokens_of(done, plan.folder).tolist() == expected_tokens(
        GPT2Tokenizer.of_bytes(),
        shuffled_stories(0, 1337) + shuffled_stories(1, 1337) + shuffled_stories(2, 1338),
    )


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'[{"story": 1}]', b"[", b"\xff"])
def test_stories_that_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data00.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data00.json"):
        list(read_pieces(Source(path=path, kind="stories")))


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\0\0\0\0\0\0\0garbage"])
def test_an_archive_that_is_none(tmp_path: Path, content: bytes) -> None:
    raw = tmp_path / "tinystories/raw/TinyStories_all_data.tar.gz"
    raw.parent.mkdir(parents=True)
    raw.write_bytes(content)
    plan = recipes.plan_named("tinystories", tmp_path, "gpt2", None)
    with pytest.raises(DataError, match=r"TinyStories_all_data.tar.gz cannot be unpacked"):
        recipes.with_text(plan, "tinystories", None, no_network)
    assert [path.name for path in raw.parent.iterdir()] == [raw.name]


@pytest.mark.parametrize(
    ("name", "stem"), [("fineweb10B", "fineweb"), ("edu_fineweb100B", "edu_fineweb")]
)
def test_fineweb_has_llmcs_names(tmp_path: Path, gpt2: Tokenizer, name: str, stem: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    texts = [sentence(random.Random(seed), 9) for seed in range(8)]
    for i in (1, 0):
        table = pa.table({"text": texts[4 * i : 4 * i + 4]})
        pq.write_table(table, raw / f"00{i}_00000.parquet")
    plan = recipes.plan_named(name, tmp_path, "gpt2", 100)
    done = prepare(recipes.with_text(plan, name, raw, no_network), quiet)
    ids = expected_tokens(gpt2, texts)
    assert done.shards[0].file == f"{stem}_val_000000.bin"
    assert [s.file for s in done.shards[1:]] == [
        f"{stem}_train_{i:06d}.bin" for i in range(1, len(done.shards))
    ]
    assert [s.tokens for s in done.shards] == [100] * (len(ids) // 100) + [len(ids) % 100]
    assert tokens_of(done, tmp_path / name).tolist() == ids


def hellaswag_line(i: int, **changes: Any) -> str:
    endings = [f"ends so {j}." for j in range(4)]
    return json.dumps(
        {"ind": i, "ctx": f"Context {i}", "endings": endings, "label": i % 4, **changes}
    )


def test_hellaswag(tmp_path: Path, gpt2: Tokenizer) -> None:
    raw = tmp_path / "val.jsonl"
    raw.write_text("\n".join(hellaswag_line(i) for i in range(5)))
    path, count = recipes.prepare_hellaswag(tmp_path, raw, "gpt2", no_network)
    assert (path, count) == (tmp_path / "hellaswag/hellaswag_val.bin", 5)
    examples = read_choices(path)
    assert [example.label for example in examples] == [0, 1, 2, 3, 0]
    assert examples[3].context.tolist() == gpt2.encode("Context 3").tolist()
    assert examples[3].completions[2].tolist() == gpt2.encode(" ends so 2.").tolist()


@pytest.mark.parametrize(
    "changes",
    [{"endings": ["a"] * 3}, {"endings": [1] * 4}, {"label": 4}, {"ctx": ""}, {"label": "0"}],
)
def test_hellaswag_that_is_wrong(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = tmp_path / "val.jsonl"
    raw.write_text(hellaswag_line(0) + "\n" + hellaswag_line(1, **changes))
    with pytest.raises(DataError, match=r"example 1|line 2"):
        recipes.prepare_hellaswag(tmp_path, raw, "gpt2", no_network)
    assert not (tmp_path / "hellaswag/hellaswag_val.bin").exists()


# The command


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    path = tmp_path / "my text.txt"
    path.write_text("Some words. " * 400)
    command = ["data", "prepare", str(path), "--out", str(tmp_path), "--val-tokens", "100"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "made 1,102 training and 100 validation tokens in 2 files" in first.output
    assert "MB/s" in first.output
    assert f"train --data '{tmp_path}/my text/my text_train_*.bin'" in first.output
    again = CliRunner().invoke(app, command)
    assert "were here already, checked: 1,102 training and 100 validation" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fineweb", "x.txt"], "without other names"),
        (["tinyshakespeare", "--val-tokens", "5"], "for own files"),
        (["tinyshakespeare", "--shard-tokens", "5"], "not cut into shards"),
        (["mine.txt", "--from", "x"], "--from goes with"),
        (["fineweb20B"], "no data set and no file fineweb20B"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["data", "prepare", *arguments, "--out", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
