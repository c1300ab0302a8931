"""Where photographs come from: a folder or a zip, with CelebA's official lists where they stand beside it."""

import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sega_dist.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MAX_BYTES = 64 << 20  # of one image file; photographs are far smaller, and memory is not endless
PARTITION = "list_eval_partition.txt"


@dataclass(frozen=True)
class Source:
    """A folder or a zip, and the sorted names of its images."""

    path: Path
    names: tuple[str, ...]


def open_source(path: Path) -> Source:
    """The images of a folder (with its sub-folders) or of a zip; raises UserError where there are none."""
    if not path.exists():
        raise UserError(f"source {path} does not exist; give a folder or a zip of images")
    if path.is_dir():
        names = [str(p.relative_to(path)) for p in path.rglob("*") if _is_image_name(p.name) and p.is_file()]
    else:
        names = _zip_names(path)
    if not names:
        raise UserError(f"source {path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return Source(path.resolve(), tuple(sorted(names)))


def read_images(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Each name with its bytes from the folder or zip `path`, or None where it cannot be read."""
    if path.is_dir():
        for name in names:
            yield name, _file_bytes(path / name)
        return
    with zipfile.ZipFile(path) as archive:
        for name in names:
            yield name, _member_bytes(archive, name)


def sample_keys(names: tuple[str, ...]) -> dict[str, str]:
    """A webdataset key for each name: the file's stem where stems are unique, else its path; no dots, no slashes."""
    stems = [_clean(Path(name).stem) for name in names]
    paths = [_clean(str(Path(name).with_suffix(""))) for name in names]
    candidates = stems if len(set(stems)) == len(stems) else paths
    seen: Counter[str] = Counter()
    keys = {}
    for name, key in zip(names, candidates, strict=True):
        seen[key] += 1
        keys[name] = key if seen[key] == 1 else f"{key}--{seen[key]}"
    if len(set(keys.values())) != len(keys):
        raise UserError("two images of the source have the same name; rename one of them")
    return keys


def read_partition(source: Path, lists: Path | None) -> dict[str, int]:
    """CelebA's official split, file name -> 0 train, 1 val, 2 test, from `lists` or from beside the images."""
    folders = [lists] if lists else [source, source.parent]
    found = next((folder / PARTITION for folder in folders if (folder / PARTITION).is_file()), None)
    if found is None:
        raise UserError(
            f"split official needs {PARTITION}, not found in {', '.join(map(str, folders))}; give --lists DIR"
        )
    partition = {}
    for number, line in enumerate(found.read_text(errors="replace").splitlines(), 1):
        match = re.fullmatch(r"\s*(\S+)\s+([012])\s*", line)
        if match is None or match[1] in partition:
            raise UserError(f"{found}, line {number}: expected 'name 0|1|2', each name once, got {line[:60]!r}")
        partition[match[1]] = int(match[2])
    return partition


def _is_image_name(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not Path(name).name.startswith("._")


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise UserError(f"cannot read source {path}: {error.strerror}") from None
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            is_page = file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html"))
        reason = "is a web page, so the download failed; fetch it again" if is_page else "is not a zip, or is cut short"
        raise UserError(f"source {path} {reason}") from None
    names = [m.filename for m in members if _is_image_name(m.filename) and not stat.S_ISLNK(m.external_attr >> 16)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"source {path} holds {repeated[0]!r} more than once")
    return names


def _file_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except OSError:
        return None


def _member_bytes(archive: zipfile.ZipFile, name: str) -> bytes | None:
    try:
        return archive.read(name) if archive.getinfo(name).file_size <= MAX_BYTES else None
    except (OSError, RuntimeError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError):
        return None  # damaged, encrypted, or in a compression unknown here
