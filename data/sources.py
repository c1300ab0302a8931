"""Where photographs come from: a folder, a zip, or a parquet file as the Hugging Face hub keeps them."""

import contextlib
import errno
import hashlib
import lzma
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sega_dist.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MAX_BYTES = 64 << 20  # of one image file; photographs are far smaller, and memory is not endless
MAX_KEY = 80  # characters; a tar's header has 100 for a name


@dataclass(frozen=True)
class Source:
    """A folder or a file, and the sorted names of its images."""

    path: Path
    names: tuple[str, ...]


def open_source(path: Path) -> Source:
    """The images of a folder (with its sub-folders), a zip or a parquet file; UserError where there are none."""
    if not path.exists():
        raise UserError(f"source {path} does not exist; give a folder, a zip or a parquet file of images")
    names = sorted(_folder_names(path) if path.is_dir() else _parquet_names(path) if _is_parquet(path) else
                   _zip_names(path))  # fmt: skip
    if not names:
        raise UserError(f"source {path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return Source(path.resolve(), tuple(names))


def read_images(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Each name with its bytes from the folder or file `path`, or None where it cannot be read."""
    if path.is_dir():
        for name in names:
            data = _file_bytes(path / name)
            if data is None and not path.is_dir():
                raise UserError(f"source {path} is gone")
            yield name, data
    elif not path.exists():
        raise UserError(f"source {path} is gone")
    elif _is_parquet(path):
        cells = Parquet(path)
        for name in names:
            yield name, cells.image(name)
    else:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                yield name, _member_bytes(archive, name)


def key_function(names: tuple[str, ...]) -> Callable[[str], str]:
    """A webdataset key for a name: the file's stem where stems are unique, else its path; no dots, no slashes."""

    def from_stem(name: str) -> str:
        return _clean(name.rsplit("/", 1)[-1].rsplit(".", 1)[0])

    def from_path(name: str) -> str:
        return _clean(name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name)

    candidate = from_stem if len(set(map(from_stem, names))) == len(names) else from_path
    counts = Counter(map(candidate, names))
    if len(counts) == len(names):
        return candidate
    seen: Counter[str] = Counter()
    numbered: dict[str, str] = {}
    for name in names:
        key = candidate(name)
        if counts[key] > 1:
            seen[key] += 1
            numbered[name] = f"{key}--{seen[key]}"
            if counts[numbered[name]]:
                raise UserError(f"two images of the source become {numbered[name]!r}; rename {name!r}")
    return lambda name: numbered.get(name) or candidate(name)


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith("._")


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _clean(text: str) -> str:
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    return key if len(key) <= MAX_KEY else f"{key[: MAX_KEY - 17]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _folder_names(path: Path) -> Iterator[str]:
    for folder, _, files in os.walk(path, onerror=_refuse):
        inside = os.path.relpath(folder, path)
        yield from (os.path.normpath(os.path.join(inside, file)) for file in files if _is_image_name(file))


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read folder {error.filename}: {error.strerror}")


def _file_bytes(path: Path) -> bytes | None:
    """None for what is no file, too large, not ours to read or gone; a failing disk is no fault of the image."""
    try:
        found = path.stat()
        return path.read_bytes() if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES else None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise UserError(f"cannot read source {path}: {error.strerror}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise UserError(f"source {path} {_why_no_archive(path)}") from None
    names = [m.filename for m in members if _is_image_name(m.filename) and not stat.S_ISLNK(m.external_attr >> 16)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"source {path} holds {repeated[0]!r} more than once")
    return names


def _why_no_archive(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "is a web page, so the download failed; fetch it again"
    if start.startswith(b"7z\xbc\xaf\x27\x1c"):
        return "is a 7z archive; unpack it and give the folder"
    return "is neither a zip nor a parquet file, or is cut short"


def _member_bytes(archive: zipfile.ZipFile, name: str) -> bytes | None:
    try:
        return archive.read(name) if archive.getinfo(name).file_size <= MAX_BYTES else None
    except (RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError, ValueError,
            KeyError):  # fmt: skip
        return None  # damaged, encrypted, or in a compression unknown here


def _parquet_names(path: Path) -> list[str]:
    return list(Parquet(path).rows)


class Parquet:
    """The image column of a parquet file: bytes, or a struct of bytes and path; one row group in memory at a time."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"to read {path} install pyarrow: pip install 'sega-dist[hub]'") from None
        self.path, self.group, self.damage = path, -1, pyarrow.ArrowException
        self.cells: Any = None
        try:
            self.file = parquet.ParquetFile(path)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"source {path} {_why_no_archive(path)} ({type(error).__name__})") from None
        self.column = self._image_column(pyarrow)
        counts = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self.places = [(group, row) for group, count in enumerate(counts) for row in range(count)]
        self.rows = {name: number for number, name in enumerate(self._names())}

    def image(self, name: str) -> bytes | None:
        """The bytes of an image; None where there are none, or far too many."""
        group, row = self.places[self.rows[name]]
        if group != self.group:
            self.group, self.cells = group, None
            with contextlib.suppress(OSError, self.damage):  # then its images are skipped and named
                self.cells = self.file.read_row_group(group, columns=[self.column]).column(0)
        if self.cells is None:
            return None
        cell = self.cells[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        return data if data is not None and len(data) <= MAX_BYTES else None

    def _image_column(self, pyarrow: Any) -> str:
        def is_bytes(kind: Any) -> bool:
            return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

        for field in self.file.schema_arrow:
            has_bytes = pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
            if is_bytes(field.type) or (has_bytes and is_bytes(field.type.field("bytes").type)):
                return str(field.name)
        found = ", ".join(self.file.schema_arrow.names)
        raise UserError(f"source {self.path} has no column of images, only {found}")

    def _names(self) -> list[str]:
        """The paths that stand beside the images where each has its own, else the number of the row."""
        kind = self.file.schema_arrow.field(self.column).type
        if kind.num_fields and kind.get_field_index("path") >= 0:
            paths = self.file.read(columns=[f"{self.column}.path"]).column(0).combine_chunks().field("path").to_pylist()
            if all(paths) and len(set(paths)) == len(paths):
                return paths
        return [f"{number:09d}" for number in range(len(self.places))]
