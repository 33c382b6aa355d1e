"""Blobs in a folder of a local file system: what `sync` and `commit` return from is on the disk, names included."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from batchrunner.blobs.names import checked, is_name
from batchrunner.durable import FULL, sync_folder
from batchrunner.errors import BlobsUnavailable, DiskFull, NameTaken, NotFound, OwnError

_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
# The kernel writes at most 2 GiB less a page at one call.
_WRITE_BYTES_MAX = 1 << 30
_BUFFER_BYTES = 1 << 18
# "~" is in no blob's name: files named with it are never read, listed or written over as blobs.
_RESERVE = "reserve~"
_UNFINISHED = re.compile(r".+~\d+-[0-9a-f]{16}")


class LocalBlobs:
    """Blobs below `root`, which is made if it is missing. Several processes may share it; any thread may call."""

    has_frozen_segments = False

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        # Folders whose own names are known to be on the disk.
        self._durable_folders: set[Path] = set()
        try:
            self._make_folder(self._root)
        except OSError as error:
            _translate(error, str(root))

    def create_segment(self, name: str) -> LocalAppender:
        """See Blobs."""
        path = self._path(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        try:
            self._make_folder(path.parent)
            fd = os.open(path, flags, 0o666)
            try:
                sync_folder(path.parent)
            except OSError:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            _translate(error, name)
        return LocalAppender(fd, name)

    def writer(self, name: str) -> LocalWriter:
        """See Blobs."""
        path = self._path(name)
        try:
            self._make_folder(path.parent)
            return LocalWriter(path, name)
        except OSError as error:
            _translate(error, name)

    def read(self, name: str, start: int, end: int) -> bytes:
        """See Blobs."""
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return _read_range(fd, start, min(end, os.fstat(fd).st_size))
            finally:
                os.close(fd)
        except OSError as error:
            _translate_reading(error, name)

    def size_bytes(self, name: str) -> int:
        """See Blobs."""
        try:
            found = self._path(name).stat()
        except OSError as error:
            _translate_reading(error, name)
        if not stat.S_ISREG(found.st_mode):
            raise NotFound(f"{name} is no file")
        return found.st_size

    def exists(self, name: str) -> bool:
        """See Blobs."""
        try:
            self.size_bytes(name)
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        """See Blobs."""
        folder = prefix.rpartition("/")[0]
        try:
            yield from self._walk(f"{folder}/" if folder else "", prefix)
        except OSError as error:
            _translate(error, prefix)

    def delete(self, name: str) -> None:
        """See Blobs. Of an adopted file only the link goes."""
        try:
            self._path(name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            _translate(error, name)

    def drop_unfinished(self, *, dead: Collection[str] = ()) -> int:
        """See Blobs. A living writer holds a lock on its file."""
        del dead
        count = 0
        try:
            for folder, _, names in os.walk(self._root, onerror=_raise):
                count += sum(_drop_if_dead(Path(folder, name)) for name in names if _UNFINISHED.fullmatch(name))
        except OSError as error:
            _translate(error, str(self._root))
        return count

    def free_bytes(self) -> int | None:
        """See Blobs."""
        try:
            space = os.statvfs(self._root)
        except OSError as error:
            _translate(error, str(self._root))
        return space.f_bavail * space.f_frsize

    def keep_reserve(self, size_bytes: int) -> None:
        """See Blobs. Does nothing where files cannot be preallocated."""
        if sys.platform == "darwin":
            return
        path = self._root / _RESERVE
        try:
            if path.exists() and path.stat().st_size >= size_bytes:
                return
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        except OSError as error:
            _translate(error, _RESERVE)

    def release_reserve(self) -> None:
        """See Blobs."""
        try:
            (self._root / _RESERVE).unlink(missing_ok=True)
        except OSError as error:
            _translate(error, _RESERVE)

    def drop_begun(self) -> int:
        """See Blobs."""
        return self.drop_unfinished()

    def download_url(self, name: str, *, expires_s: float, filename: str) -> str | None:
        """See Blobs."""
        del name, expires_s, filename
        return None

    def adopt(self, name: str, path: Path) -> None:
        """Make `name` a link to a user's own file, so that it is read in place; an earlier adoption is replaced.

        Raises:
            NotFound: no such file.
            NameTaken: the name is a blob of ours.
            OwnError: `path` is not absolute.
        """
        if not path.is_absolute():
            raise OwnError(f"{path} is not absolute")
        link = self._path(name)
        temporary = _temporary(link)
        try:
            if not path.is_file():
                raise NotFound(f"{path} is not a file")
            self._make_folder(link.parent)
            if link.exists() and not link.is_symlink():
                raise NameTaken(f"{name} exists and is not an adopted file")
            # Only one run at a time works on a folder: what is here was left by one that died.
            for left in link.parent.glob(f"{link.name}~*"):
                left.unlink(missing_ok=True)
            temporary.symlink_to(path)
            temporary.replace(link)
            sync_folder(link.parent)
        except OSError as error:
            _translate(error, name)

    def path(self, name: str) -> Path:
        """Where a blob lies, for those who may read the folder themselves."""
        return self._path(name)

    def _path(self, name: str) -> Path:
        return self._root / checked(name)

    def _make_folder(self, folder: Path) -> None:
        """Have the folder, with its name and those of the folders above it, up to the root, on the disk."""
        if folder in self._durable_folders and folder.is_dir():
            return
        if self._root in folder.parents or not folder.parent.is_dir():
            self._make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            # A file stands where the folder has to be; that is no name of ours that is taken.
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        # Another process may have made it just now and not synced it yet.
        sync_folder(folder.parent)
        self._durable_folders.add(folder)

    def _walk(self, folder: str, prefix: str) -> Iterator[str]:
        """Give the names below a folder. A folder sorts with its slash, which gives the order of whole names."""
        try:
            with os.scandir(self._root / folder) as found:
                names = sorted(f"{folder}{each.name}{'/' if each.is_dir() else ''}" for each in found)
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith("/") and (name.startswith(prefix) or prefix.startswith(name)):
                yield from self._walk(name, prefix)
            elif name.startswith(prefix) and is_name(name):
                yield name


class LocalAppender:
    """See Appender."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd: int | None = fd
        self._name = name
        self._is_broken = False

    def append(self, chunk: bytes) -> None:
        """See Appender. A short write counts as a full disk: the rest would hardly fit either."""
        fd = self._whole_fd()
        try:
            for start in range(0, len(chunk), _WRITE_BYTES_MAX):
                piece = memoryview(chunk)[start : start + _WRITE_BYTES_MAX]
                written = os.write(fd, piece)
                if written < len(piece):
                    self._is_broken = True
                    raise DiskFull(f"{self._name}: {written} of {len(piece)} bytes were written")
        except OSError as error:
            self._is_broken = True
            _translate(error, self._name)

    def sync(self) -> None:
        """See Appender."""
        fd = self._whole_fd()
        try:
            _sync_file(fd)
        except OSError as error:
            self._is_broken = True
            _translate(error, self._name)

    def close(self) -> None:
        """See Appender."""
        fd, self._fd = self._fd, None
        if fd is not None:
            # What counts was synced; a late error of close says nothing about it.
            with contextlib.suppress(OSError):
                os.close(fd)

    def _whole_fd(self) -> int:
        """After a failed sync the kernel forgets what it could not write, so a later one would lie."""
        if self._fd is None or self._is_broken:
            raise BlobsUnavailable(f"{self._name} has ended")
        return self._fd


class LocalWriter:
    """See BlobWriter."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._temporary, fd = _open_temporary(path)
        self._file: BinaryIO = os.fdopen(fd, "wb", buffering=_BUFFER_BYTES)
        self._is_lost = False

    def write(self, chunk: bytes) -> None:
        """See BlobWriter. The buffer takes a chunk only if it could be emptied, and keeps what could not be written."""
        try:
            self._file.write(chunk)
        except OSError as error:
            _translate(error, self._name)

    def commit(self, last_part: str | None = None) -> None:
        """See BlobWriter. A link, unlike a rename, never replaces what is there."""
        path = self._path if last_part is None else self._path.with_name(last_part)
        if self._is_lost:
            raise BlobsUnavailable(f"{self._name} has ended")
        try:
            self._file.flush()
            self._sync()
            os.link(self._temporary, path)
            self._file.close()
            self._temporary.unlink()
            sync_folder(path.parent)
        except OSError as error:
            _translate(error, self._name)

    def _sync(self) -> None:
        """After a failed sync the kernel forgets what it could not write, so a later one would lie."""
        try:
            os.fsync(self._file.fileno())
        except OSError:
            self._is_lost = True
            raise

    def abort(self) -> None:
        """See BlobWriter."""
        # Closing flushes what is thrown away anyhow, perhaps on a full disk.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}~{os.getpid()}-{os.urandom(8).hex()}")


def _open_temporary(path: Path) -> tuple[Path, int]:
    """Make a temporary and lock it for as long as it is open."""
    while True:
        temporary = _temporary(path)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink:
            return temporary, fd
        # A sweep came between the two and took it for a dead one's.
        os.close(fd)


def _drop_if_dead(temporary: Path) -> bool:
    """Remove a temporary that nobody has locked; tell whether it was one."""
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _MISSING:
            return False
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _raise(error: OSError) -> None:
    if error.errno not in _MISSING:
        raise error


def _read_range(fd: int, start: int, end: int) -> bytes:
    """Read in one call where the kernel gives all at once, as it does for files up to 2 GiB."""
    first = os.pread(fd, max(0, end - start), start)
    if len(first) >= end - start:
        return first
    pieces = [first]
    while pieces[-1] and (at := start + sum(map(len, pieces))) < end:
        pieces.append(os.pread(fd, end - at, at))
    return b"".join(pieces)


def _sync_file(fd: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def _translate(error: OSError, name: str) -> NoReturn:
    """Raise our error for the system's."""
    reason = f"{name}: {error.strerror or error}"
    if error.errno in FULL:
        raise DiskFull(reason) from error
    if error.errno == errno.EEXIST:
        raise NameTaken(f"{name} exists already") from error
    raise BlobsUnavailable(reason) from error


def _translate_reading(error: OSError, name: str) -> NoReturn:
    if error.errno in _MISSING:
        raise NotFound(f"{name} does not exist") from error
    _translate(error, name)
