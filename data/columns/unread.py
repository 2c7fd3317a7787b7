"""Sources that are not read, each with the command that turns it into files which are."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path

SAVE = "PIL.Image.fromarray(x).save(f'images/{n:08d}.png') for n, x in enumerate"
WRITE = "open(f'images/{n:08d}', 'wb').write"


def unread(path: Path) -> str | None:
    """What to do with a file of a kind that is not read; None for other kinds."""
    name = shlex.quote(str(path))
    match path.suffix.lower():
        case ".7z":
            return f"unpack it (7z x {name})"
        case ".rar":
            return f"unpack it (unar {name})"
        case ".zst":
            return f"decompress it (unzstd {name})"
        case ".npz":
            return _script("numpy pillow", "numpy, PIL.Image",
                           f"[{SAVE}(numpy.load('{path}')['{_array_of(path)}'])]")  # fmt: skip
        case ".h5" | ".hdf5":
            return (
                _script("h5py pillow", "h5py, PIL.Image", f"[{SAVE}(h5py.File('{path}')['KEY'])]")
                + f"; KEY is one of: python -c \"import h5py; print(list(h5py.File('{path}')))\""
            )
        case ".tfrecord" | ".tfrecords":
            return _script(
                "tfrecord", "tfrecord.reader as r",
                f"[{WRITE}(bytes(x['image/encoded'])) for n, x in "
                f"enumerate(r.tfrecord_loader('{path}', None))]",
            )  # fmt: skip
        case ".mdb" | ".lmdb":
            folder = path.parent if path.name == "data.mdb" else path
            alone = "" if path.name == "data.mdb" else ", subdir=False"
            return _script(
                "lmdb", "lmdb",
                f"[{WRITE}(v) for n, (k, v) in enumerate(lmdb.open('{folder}', readonly=True"
                f"{alone}).begin().cursor())]",
            )  # fmt: skip
    return None


def first_unread(folder: Path, kinds: Iterable[str]) -> str:
    """The remedy for one such file below a folder, where there is one."""
    for suffix in kinds:
        path = next((p for p in sorted(folder.rglob(f"*{suffix}")) if p.is_file()), None)
        if path is not None and (remedy := unread(path)):
            return f"; {path.name} is not read: {remedy}"
    return ""


def _script(packages: str, imports: str, code: str) -> str:
    return (
        f"write its images as files (mkdir images; pip install {packages}; "
        f'python -c "import {imports}; {code}") and pack the folder images'
    )


def _array_of(path: Path) -> str:
    """The array of an .npz that looks most like the images."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        return "KEY"
    likely = [name for name in names if "image" in name.lower() or name.lower() in ("x", "data")]
    return (likely or names or ["KEY"])[0]
