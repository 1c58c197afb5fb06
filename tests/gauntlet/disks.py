"""Small file systems in memory that only this process and its children see: to be filled, locked and taken away."""

import ctypes
import os
from pathlib import Path

_PRIVATE, _REC, _RDONLY, _REMOUNT, _BIND, _DETACH = 1 << 18, 1 << 14, 1, 32, 4096, 2
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


class CannotMountError(OSError):
    """This machine lets nobody mount."""


def leave_the_mounts_of_others() -> None:
    """From now on what this process mounts is its own. Raises CannotMountError."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_MOUNTS) != 0:
        if _libc.unshare(_NEW_MOUNTS | _NEW_USERS) != 0:
            raise CannotMountError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), "", _REC | _PRIVATE)


def small_disk(folder: Path, kibibytes: int) -> None:
    """A file system of that size in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", folder, "tmpfs", 0, f"size={kibibytes}k")


def resize(folder: Path, kibibytes: int) -> None:
    _mount("tmpfs", folder, "tmpfs", _REMOUNT, f"size={kibibytes}k")


def set_writable(folder: Path, writable: bool) -> None:
    """By a remount of the whole file system; raises OSError while files are open for writing."""
    _mount("tmpfs", folder, "tmpfs", _REMOUNT | (0 if writable else _RDONLY))


def show_also_at(folder: Path, place: Path) -> None:
    """The folder appears at another place, too."""
    place.mkdir(parents=True, exist_ok=True)
    _mount(str(folder), place, "", _BIND)


def take_away(folder: Path) -> None:
    """The file system is gone from there, whoever uses it."""
    if _libc.umount2(os.fsencode(folder), _DETACH) != 0:
        raise CannotMountError(ctypes.get_errno(), "umount")


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    arguments = source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    if _libc.mount(*arguments) != 0:
        raise CannotMountError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")
