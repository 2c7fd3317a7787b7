"""Damaged images of every kind through the decoders, in a process of its own: a crash of a C
library, or memory without bound, ends that process and not the tests.

``python tests/data/fuzz_native.py FIRST COUNT`` prints how many were refused; each case is a
function of its number.
"""

from __future__ import annotations

import io
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 512 << 20
"""Bytes that decoding may take beyond what the process has at its start."""
MAX_PIXELS = 1 << 20


def samples() -> dict[str, bytes]:
    """A small valid file of every kind."""
    import imagecodecs
    import pillow_heif
    import tifffile
    from PIL import Image

    from tests.data.test_native import DICOM_FILES, npy

    rng = np.random.default_rng(0)
    deep = rng.integers(0, 4096, (40, 50, 3)).astype(np.uint16)
    eight = (deep >> 4).astype(np.uint8)
    heic = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(eight)).save(heic)

    def tiff(values: np.ndarray, **how: Any) -> bytes:
        file = io.BytesIO()
        tifffile.imwrite(file, values, photometric="minisblack", **how)
        return file.getvalue()

    planar = np.moveaxis(deep, -1, 0)
    found = {
        "tiff strips": tiff(deep[..., 0], rowsperstrip=7),
        "tiff tiles": tiff(planar, tile=(16, 16), planarconfig="separate"),
        "tiff deflate": tiff(deep[..., 0], compression="zlib", predictor=True),
        "tiff lzw": tiff(deep[..., 0], compression="lzw"),
        "tiff zstd": tiff(deep[..., 0].astype(np.float32), compression="zstd"),
        "tiff pages": tiff(planar, metadata=None), "BigTIFF": tiff(planar, bigtiff=True),
        "tiff big-endian": tiff(deep[..., 0], byteorder=">"),
        "npy": npy(deep), "png of 16 bits": bytes(imagecodecs.png_encode(deep)),
        "jp2": bytes(imagecodecs.jpeg2k_encode(deep, level=0, reversible=True)),
        "jxl": bytes(imagecodecs.jpegxl_encode(eight)),
        "avif": bytes(imagecodecs.avif_encode(eight)),
        "heic": heic.getvalue(),
    }  # fmt: skip
    names = {
        "CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm",
        "SC_rgb_rle_2frame.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm",
        "SC_rgb_small_odd_jpeg.dcm",
    }  # fmt: skip
    return found | {p.name: p.read_bytes() for p in DICOM_FILES if p.name in names}


def damaged(files: list[bytes], case: int) -> bytes:
    """A few bytes exchanged, half the time near the start, and sometimes the end cut off."""
    rng = np.random.RandomState(case)
    raw = np.frombuffer(files[case % len(files)], np.uint8).copy()
    reach = 600 if rng.randint(2) else len(raw)
    raw[rng.randint(min(reach, len(raw)), size=rng.randint(1, 8))] = rng.randint(256)
    return raw[: rng.randint(1, len(raw)) if rng.randint(4) == 0 else None].tobytes()


def main(first: int, count: int) -> None:
    from xcit_dino.data.decode.native import Wanted, decode_values, open_native
    from xcit_dino.data.decode.rgb import BadImage

    named = samples()
    files, names, results = list(named.values()), list(named), Counter()
    for raw in files:
        decode_values(open_native(raw))  # imports everything before memory is limited
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    for case in range(first, first + count):
        raw = damaged(files, case)
        print(case, names[case % len(names)], file=sys.stderr)  # the last one is the culprit
        try:
            header = open_native(raw, Wanted(max_pixels=MAX_PIXELS))
            values = decode_values(header)
            assert values.shape == (header.height, header.width, header.channels), case
            assert values.dtype == header.dtype and values.flags.c_contiguous, case
            results["decoded"] += 1
        except BadImage as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 1000, case
            assert "MemoryError" not in str(error) and "Unable to allocate" not in str(error), case
            results["refused"] += 1
    print(dict(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
