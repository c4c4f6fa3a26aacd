"""manifest.json of a checkpoint: the size and SHA-256 of every other file.

A file that differs in one bit is refused before anything from it is used. The manifest finds damage
and edits. It does not protect from an attacker, who can write a new manifest.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from gpu_gpt2.errors import CheckpointError

MANIFEST_FILE: Final = "manifest.json"
BLOCK_BYTES: Final = 1 << 20  # bytes per read; SHA-256 takes about a millisecond for them

_ADVICE: Final = "restore the file from a copy, or use another checkpoint"


@dataclass(frozen=True, slots=True)
class Checksum:
    """The size of a file in bytes and the SHA-256 of its contents in hex."""

    bytes: int
    sha256: str


class _Digest(threading.Thread):
    """Computes the checksum of one file in parallel: hashlib releases the interpreter lock."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(name=f"sha256 {path.name}", daemon=True)
        self._path, self._stopped = path, stop
        self._found: Checksum | OSError = OSError("not read yet")

    def run(self) -> None:
        digest, size = hashlib.sha256(), 0
        block = memoryview(bytearray(BLOCK_BYTES))
        try:
            with self._path.open("rb", buffering=0) as file:
                while (count := file.readinto(block)) and not self._stopped.is_set():
                    digest.update(block[:count])
                    size += count
            self._found = Checksum(size, digest.hexdigest())
        except OSError as error:
            self._found = error

    def result(self) -> Checksum:
        """Waits for the checksum. Raises the OSError of a file that cannot be read."""
        self.join()
        if isinstance(self._found, OSError):
            raise self._found
        return self._found


class Digests:
    """Computes checksums of files, each in a thread of its own; a context manager."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._stop = threading.Event()
        self._threads: dict[str, _Digest] = {}
        self.start(paths)

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads.values():
            thread.join()

    @property
    def started(self) -> Collection[str]:
        """Names of the files that have been given to `start`."""
        return self._threads.keys()

    def start(self, paths: Iterable[Path]) -> None:
        """Starts to read files, which must not change from now on."""
        for path in paths:
            self._threads[path.name] = thread = _Digest(path, self._stop)
            thread.start()

    def result(self, name: str) -> Checksum:
        """Waits for the checksum of a file. Raises the OSError of one that cannot be read."""
        return self._threads[name].result()


def write(folder: Path, digests: Digests) -> None:
    """Writes the manifest of all files that `digests` reads. Raises OSError."""
    files = {name: asdict(digests.result(name)) for name in sorted(digests.started)}
    (folder / MANIFEST_FILE).write_bytes(_text(files))


def read(folder: Path) -> dict[str, Checksum] | None:
    """Returns the checksums in a folder's manifest by file name, or None if it has no manifest.

    Raises CheckpointError if the manifest is damaged, by a single bit even.
    """
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_ADVICE}") from error
    try:
        files = json.loads(content)["files"]
        # _text gives the only valid text of a manifest, so comparing it checks every bit.
        if content == _text(files) and all(Path(name).name == name for name in files):
            return {name: Checksum(**values) for name, values in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path}: the file is damaged or was edited; {_ADVICE}")


def check(folder: Path, expected: Mapping[str, Checksum], digests: Digests) -> None:
    """Compares all files that `digests` reads with the checksums `expected` from a manifest.

    Raises CheckpointError, which names the first file that differs, in alphabetical order.
    """
    for name in sorted(digests.started):
        path = folder / name
        if name not in expected:
            raise CheckpointError(f"{path}: {MANIFEST_FILE} does not list the file; {_ADVICE}")
        try:
            found = digests.result(name)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; {_ADVICE}") from error
        if found.bytes != expected[name].bytes:
            raise CheckpointError(
                f"{path}: the file has {found.bytes} bytes, {expected[name].bytes} in "
                f"{MANIFEST_FILE}; {_ADVICE}"
            )
        if found.sha256 != expected[name].sha256:
            raise CheckpointError(
                f"{path}: the file is damaged or was edited: its SHA-256 is not the one in "
                f"{MANIFEST_FILE}; {_ADVICE}"
            )


def _text(files: Mapping[str, Any]) -> bytes:
    """Returns the contents of a manifest, which end with the SHA-256 of the list of files."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": digest}, indent=2) + "\n").encode()
