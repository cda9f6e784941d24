"""Files that can be trusted: durable, vouched for by a sha256 manifest, and one sentence when the disk says no.

`seal` writes a folder's manifest: size and sha256 of every other file, and a digest of the manifest itself. A single
flipped bit, a cut or a missing file then shows in `verify`; a folder without a valid manifest was never finished.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vgjax.errors import StorageError, UserError
from vgjax.typing import Json

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Makes every file of a step durable and writes its manifest, durable too."""
    paths = sorted(folder.rglob("*"))

    def sealed_file(path: Path) -> tuple[str, Json]:
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return path.relative_to(folder).as_posix(), {"sha256": checksum, "size": path.stat().st_size}

    with ThreadPoolExecutor() as threads:  # hashing and waiting for the disk release the interpreter lock
        files = dict(threads.map(sealed_file, filter(Path.is_file, paths)))
    for path in paths:
        if path.is_dir():
            fsync(path)
    replace(folder / MANIFEST, _manifest(files))


def verify(folder: Path) -> list[str]:
    """What is wrong with a step, file by file; empty when every byte is as it was saved."""
    files = sealed(folder)
    if files is None:
        return [f"{MANIFEST} is {'damaged' if (folder / MANIFEST).exists() else 'missing'}"]

    def fault(name: str) -> str | None:
        try:
            with open(folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != files[name]["size"]:
                    return f"{name} has {size} bytes instead of {files[name]['size']}"
                same = hashlib.file_digest(file, "sha256").hexdigest() == files[name]["sha256"]
                return None if same else f"{name} does not match its sha256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock: about 1 GB/s a core
        return [found for found in threads.map(fault, files) if found]


def sealed(folder: Path) -> Json | None:
    """The files a manifest vouches for; None unless it is, byte for byte, what `seal` wrote."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        files = json.loads(raw)["files"]
        return files if raw == _manifest(files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes; UserError where one holds it. A kill gives it free."""
    with writing(folder):
        file = open(folder / ".lock", "w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a child that loads data would hold it too
        except BlockingIOError:
            raise UserError(f"another training writes to {folder}: stop it, or choose another workdir") from None
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an operating system's refusal to write into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {path}: {reason(error)}") from error


def replace(path: Path, data: bytes) -> None:
    """Writes a file so that, whatever happens, either its old or its new contents are there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    fsync(path.parent)


def fsync(directory: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """An error's cause in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:300]


def _manifest(files: Json) -> bytes:
    text = json.dumps(files, indent=1, sort_keys=True)
    return json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "files": files}, indent=1).encode()
