"""The data sets that torchvision downloads, as sources of images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.pack.archives import list_archive
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.mat_file import read_mat
from xcit_dino.data.pack.sources import list_folder
from xcit_dino.errors import InputError, suggest


def torchvision_names() -> list[str]:
    return sorted(_TORCHVISION)


def list_torchvision(name: str, root: Path, download: bool, work: Path) -> Listing:
    """Images of a torchvision data set as ``train/CLASS/...`` and ``val/CLASS/...``.

    torchvision downloads, verifies and unpacks; the images are then taken as they are, and only
    CIFAR's arrays, which are no image files, are stored as PNG.

    Raises:
        InputError: not in ``root`` and not downloaded.
    """
    if name not in _TORCHVISION:
        raise InputError(f"no data set {name!r}{suggest(name, _TORCHVISION)}")
    try:
        return _TORCHVISION[name](root, download, work)
    except RuntimeError as error:
        hint = "" if download else "; add --download, or give its folder with --root"
        raise InputError(f"{name} in {root}: {' '.join(str(error).split())}{hint}") from None
    except OSError as error:
        raise InputError(f"{name}: download to {root} failed: {error}") from None


def _cifar(class_name: str) -> Callable[..., Listing]:
    def listing(root: Path, download: bool, work: Path) -> Listing:
        import torchvision

        work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(work / f"{class_name}.tar", "w") as tar:
            for split in ("train", "val"):
                data = getattr(torchvision.datasets, class_name)(
                    root, train=split == "train", download=download
                )
                _add_arrays(tar, split, data)
        return list_archive(work / f"{class_name}.tar", work)

    return listing


def _add_arrays(tar: tarfile.TarFile, split: str, data: Any) -> None:
    """Store the arrays of a torchvision CIFAR as ``SPLIT/CLASS/NUMBER.png``."""
    import PIL.Image

    for number, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        png = io.BytesIO()
        PIL.Image.fromarray(pixels).save(png, "PNG")
        member = tarfile.TarInfo(f"{split}/{data.classes[label]}/{number:05d}.png")
        member.size = png.tell()
        png.seek(0)
        tar.addfile(member, png)


def _imagenette(root: Path, download: bool, work: Path) -> Listing:
    import torchvision

    for split in ("train", "val"):
        torchvision.datasets.Imagenette(root, split, download=download and split == "train")
    return list_folder(root / "imagenette2")


def _flowers102(root: Path, download: bool, work: Path) -> Listing:
    """Train: the official train and val parts (2,040), on which papers train; val: test (6,149)."""
    import torchvision

    try:
        torchvision.datasets.Flowers102(str(root), download=download)
    except ModuleNotFoundError:  # SciPy, which is only needed after the download: see matfile.py
        pass
    folder = root / "flowers-102"
    tables = {n: read_mat((folder / n).read_bytes(), n) for n in ("setid.mat", "imagelabels.mat")}
    labels, sets = np.ravel(tables["imagelabels.mat"]["labels"]), tables["setid.mat"]
    split = {int(n): "train" for key in ("trnid", "valid") for n in np.ravel(sets[key])}
    split |= {int(n): "val" for n in np.ravel(sets["tstid"])}
    listing = Listing()
    for number in sorted(split):
        label = f"{int(labels[number - 1]) - 1:03d}"
        file = folder / "jpg" / f"image_{number:05d}.jpg"
        name = f"{split[number]}/{label}/{file.name}"
        listing.images.append(Image(name, str(file), size=file.stat().st_size))
    return listing


_TORCHVISION: dict[str, Callable[[Path, bool, Path], Listing]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "imagenette": _imagenette,
    "flowers102": _flowers102,
}
