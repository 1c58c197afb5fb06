"""Names of images: which files are read, which look as if they should be, and when two spellings mean one file.

A name is a path below where the images lie, with "/" between its parts. It may hold bytes that are no UTF-8, as
surrogates (PEP 383): such names are read, hashed by their bytes, and escaped where people or JSON see them.
"""

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Files that are read, in any case of letters."""
OTHER_IMAGES = frozenset(
    {".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dds", ".dib", ".dng", ".exr", ".fits", ".hdr", ".heic",
     ".heif", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".mpo", ".nef", ".nii", ".orf", ".pbm", ".pcx", ".pfm",
     ".pgm", ".pnm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".sgi", ".svg", ".tga", ".xbm", ".xcf", ".xpm"}
)  # fmt: skip
ARCHIVES = frozenset(
    {".7z", ".bz2", ".gz", ".h5", ".lmdb", ".mat", ".mdb", ".npy", ".npz", ".parquet", ".rar", ".tar", ".tfrecord",
     ".tgz", ".xz", ".zip", ".zst"}
)  # fmt: skip
MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")
"""How the files that are read begin."""


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in small letters: ".png", or "" where there is none."""
    return posixpath.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """True for what people do not see: hidden files and folders, and the __MACOSX that archives carry along."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_image_name(name: str) -> bool:
    """True for the name of an image file that is read."""
    return suffix_of(name) in SUFFIXES and not is_hidden(name)


def may_hold_images(name: str) -> bool:
    """True for the name of a file that is not read, and that looks like an image or an archive of images."""
    return suffix_of(name) in OTHER_IMAGES | ARCHIVES and not is_hidden(name)


@dataclass(frozen=True)
class Listing:
    """The files below a place."""

    images: list[str]
    """Sorted."""
    unread: list[str]
    """Those that may hold images and are not read; sorted."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Listing":
        names = list(names)
        return cls(sorted(filter(is_image_name, names)), sorted(filter(may_hold_images, names)))


def unread_note(unread: Sequence[str]) -> str:
    """One line that counts files by suffix, and names one; "" where there are none."""
    if not unread:
        return ""
    counts = Counter(suffix_of(name) or "without suffix" for name in unread)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
    subject = (
        "1 file that may hold images is" if len(unread) == 1 else f"{len(unread):,} files that may hold images are"
    )
    return f"{subject} not read: {kinds} (as {printable(min(unread))}); read are {', '.join(SUFFIXES)}"


# ------------------------------------------------------------------------------------------------------------ spelling


def printable(name: str) -> str:
    """The name with bytes that are no UTF-8 escaped, `caf\\xe9.png`: what screens and JSON can take."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_bytes(name: str) -> bytes:
    """The bytes of a name as its file system has them."""
    return name.encode("utf-8", "surrogateescape")


def with_slashes(name: str) -> str:
    """A name as archives and lists of other systems spell it, with "/" and without "./" and doubled slashes."""
    return posixpath.normpath(name.replace("\\", "/")) if name else name


def spelling_key(name: str) -> str:
    """Equal for two spellings of one file: "\\" or "/", "./" or nothing, accents composed or not, .JPG or .jpg.

    Bytes that are no UTF-8 are letters of Windows-1252, which has those of Latin-1.
    """
    if any("\udc80" <= character <= "\udcff" for character in name):
        name = name_bytes(name).decode("cp1252", "surrogateescape")
    plain = unicodedata.normalize("NFC", with_slashes(name))
    stem, suffix = posixpath.splitext(plain)
    return stem + suffix.lower()


def as_spelt_in(names: Sequence[str], members: Iterable[str]) -> list[str]:
    """The names as `members` spell them; one that is not among them stays as it is."""
    members = list(members)
    exact = set(members)
    places: Mapping[str, str] = {spelling_key(member): member for member in members}
    return [name if name in exact else places.get(spelling_key(name), name) for name in names]
