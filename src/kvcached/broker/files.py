"""Files of the runtime directory: opened relative to it, never through a link, replaced whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os


class RuntimeDir:
    """An open runtime directory and the names in it that belong to one device."""

    def __init__(self, path: str, slug: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.socket, self.lock = f"{slug}.sock", f"{slug}.lock"
        self.roster, self.log = f"{slug}.roster.json", f"{slug}.log"

    @property
    def socket_path(self) -> str:
        """Where the broker of this device listens."""
        return f"{self.path}/{self.socket}"

    def open(self, name: str, flags: int) -> int:
        """Open ``name`` in the directory with mode 0600; a link there raises ``OSError``."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Unlink ``name`` if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def read(self, name: str, limit: int) -> bytes | None:
        """The first ``limit`` bytes of ``name``, or ``None`` if it is not there."""
        try:
            fd = self.open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.read(fd, limit)
        finally:
            os.close(fd)

    def replace(self, name: str, data: bytes) -> None:
        """Write ``name`` whole: a reader sees the old contents or the new, never a part."""
        temporary = f"{name}.new"  # one writer, who holds the lock; a killed one's is replaced
        self.remove(temporary)
        fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            written = os.write(fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError:
            self.remove(temporary)
            raise
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the directory."""
        os.close(self.fd)


def try_lock(directory: RuntimeDir) -> int | None:
    """Win the election to be (or to start) the broker: a locked fd, or ``None`` if it is taken.

    The lock belongs to the open file, so it can be handed to the broker's process. A broker that
    leaves unlinks the file, so the lock counts only while the file is in the directory.
    """
    while True:
        fd = directory.open(directory.lock, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(fd)
            current = os.stat(directory.lock, dir_fd=directory.fd, follow_symlinks=False)
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            os.close(fd)
            continue
        except BaseException:  # whatever it was, nobody else knows the descriptor
            os.close(fd)
            raise
        if os.path.samestat(mine, current):
            return fd
        os.close(fd)
