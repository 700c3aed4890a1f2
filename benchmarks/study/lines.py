"""The results of a study: one JSON line for each finished run, which no interruption can lose."""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def key(settings: Mapping) -> str:
    """What a run is known by: a digest of its settings, whatever their order."""
    text = json.dumps(settings, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append(path: Path, line: Mapping) -> None:
    """
    Adds a line, and returns once it is on the disk. Several processes may do so at once.

    Args:
        path (`Path`):
            The file; it and its folder are made where missing.
        line (`Mapping`):
            What to write. A number that is not finite becomes `null`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(line), allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a process died in the middle of its line: it stays the only one that is lost
                text = b"\n" + text
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """
    The lines of a file, without those that were cut off while they were written. Of two with one key, the later.

    Args:
        path (`Path`):
            The file. One that is not there has no lines.
    """
    if not path.is_file():
        return []
    found = {}
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found[line.get("key", f"line {number}")] = line
    return list(found.values())


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """
    Whether a run is this process's, so that several can work on one study. The system lets go of the claim of a
    process that dies.

    Args:
        folder (`Path`):
            Where the claims lie.
        name (`str`):
            The key of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _finite(value):
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
