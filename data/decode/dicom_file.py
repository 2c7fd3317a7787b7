"""DICOM through pydicom: modality rescaling, MONOCHROME1, palettes, frames.

Values are those of the modality (CT: Hounsfield units): stored value times slope plus intercept.
With an integer slope and intercept they stay integers, int16 where they can be negative; otherwise
they are float32. MONOCHROME1 is inverted within the range of its stored bits, so that black is
low. The frames of a file are its channels, or ``--page`` takes one. Frames in encodings that
pydicom leaves to other packages (JPEG lossless, JPEG-LS, 12-bit JPEG) are decoded by imagecodecs.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from xcit_dino.data.decode.coded_file import j2k_size
from xcit_dino.data.decode.extras import require
from xcit_dino.data.decode.native import NativeHeader, Values, Wanted, as_dtype, check_size
from xcit_dino.data.decode.rgb import BadImage

WINDOW = ("WindowCenter", "WindowWidth")
DEFLATED = b"1.2.840.10008.1.2.1.99"
JPEG = "1.2.840.10008.1.2.4."
BY_CODECS = {JPEG + n: name for n, name in (
    ("51", "jpeg"), ("57", "jpeg"), ("70", "jpeg"), ("80", "jpegls"), ("81", "jpegls"),
)}  # fmt: skip


def read_header(raw: bytes, wanted: Wanted) -> NativeHeader:
    """Raises BadImage for DICOM without pixels, deflated, or of types that are no image."""
    data = _open(raw)
    frames, width, height = (int(data.get(name) or least) for name, least in (
        ("NumberOfFrames", 1), ("Columns", 0), ("Rows", 0),
    ))  # fmt: skip
    if wanted.page is not None and wanted.page >= frames:
        raise BadImage(f"has {frames} frames, and none of number {wanted.page}")
    palette = data.PhotometricInterpretation == "PALETTE COLOR"
    samples = 3 if palette else int(data.SamplesPerPixel)
    channels = samples * (frames if wanted.page is None else 1)
    stored = np.dtype(np.uint32 if int(data.BitsAllocated) == 32 else np.uint16)
    check_size(height, width, channels, stored, wanted)
    dtype, pages = _dtype(data, palette), range(frames) if wanted.page is None else [wanted.page]

    def load() -> Values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planes = [_frame(data, page, np.dtype(dtype)) for page in pages]
        planes = [plane if plane.ndim == 3 else plane[..., None] for plane in planes]
        return planes[0] if len(planes) == 1 else np.concatenate(planes, -1)

    return NativeHeader(height, width, channels, dtype, load, pages=len(pages))


def windowed(raw: bytes, page: int | None = None) -> Values:
    """8-bit gray [H, W] of more than 8 bits by the file's own window (VOI LUT).

    Raises:
        BadImage: there is none, or frames that --page would have to choose from.
    """
    data, pixels = _open(raw), require("pydicom.pixels", "dicom", "DICOM")
    if "WindowCenter" not in data and "VOILUTSequence" not in data:
        raise BadImage("DICOM of more than 8 bits without a window; pack it in its own depth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = pixels.apply_modality_lut(_stored(data, page or 0), data)
        if "VOILUTSequence" in data:
            values = pixels.apply_voi_lut(values, data)
            low, high = float(values.min()), float(values.max())
        else:  # PS3.3 C.11.2.1.2: of several windows the first
            center, span = (float(np.atleast_1d(data[n].value)[0]) for n in WINDOW)
            low, high = center - span / 2, center + span / 2 - 1
    gray = np.rint((values - low) * (255 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8)
    return 255 - gray if data.PhotometricInterpretation == "MONOCHROME1" else gray


def _open(raw: bytes) -> Any:
    """The data set, pixels still encoded."""
    dicom = require("pydicom", "dicom", "DICOM")
    if DEFLATED in raw:
        raise BadImage("deflated DICOM: its size is not known beforehand; store it uncompressed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom.dcmread(io.BytesIO(raw))
        if not any(
            name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
        ):
            raise BadImage("DICOM without pixels")
        return data


def _dtype(data: Any, palette: bool) -> str:
    """The type of the values, by the header alone, so that it is the same for a whole series."""
    if "FloatPixelData" in data or "DoubleFloatPixelData" in data or int(data.BitsAllocated) > 16:
        return "float32"
    if palette:
        return "uint16" if data.RedPaletteColorLookupTableDescriptor[2] > 8 else "uint8"
    if data.get("ModalityLUTSequence"):
        return "uint16" if data.ModalityLUTSequence[0].LUTDescriptor[2] > 8 else "uint8"
    signed = bool(data.get("PixelRepresentation", 0))
    slope, intercept = _rescale(data)
    if not (slope.is_integer() and intercept.is_integer()):
        return "float32"
    bits = int(data.BitsStored)
    least = slope * (-(1 << (bits - 1)) if signed else 0) + intercept
    most = slope * ((1 << (bits - signed)) - 1) + intercept
    if min(least, most) < 0:
        return "int16"
    if int(data.BitsAllocated) <= 8 and max(least, most) <= 255:
        return "uint8"
    return "uint16" if max(least, most) <= 65535 else "float32"


def _rescale(data: Any) -> tuple[float, float]:
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    return (
        1.0 if slope is None or slope == "" else float(slope),
        0.0 if intercept is None or intercept == "" else float(intercept),
    )


def _frame(data: Any, page: int, dtype: np.dtype) -> Values:
    """One frame, of the modality's values."""
    pixels = require("pydicom.pixels", "dicom", "DICOM")
    stored = _stored(data, page)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        return pixels.apply_color_lut(stored, data)
    if data.PhotometricInterpretation == "MONOCHROME1":
        bits = int(data.BitsStored)
        ends = -1 if stored.dtype.kind == "i" else (1 << bits) - 1
        stored = (ends - stored.astype(np.int64)).astype(stored.dtype)
    if data.get("ModalityLUTSequence"):
        return pixels.apply_modality_lut(stored, data)
    if _rescale(data) == (1.0, 0.0):
        return as_dtype(stored.astype(stored.dtype.newbyteorder("=")), dtype)
    values = pixels.apply_rescale(stored, data)  # float64
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise BadImage(
                f"rescaled values from {values.min():g} to {values.max():g}: not {dtype}"
            )
    return values.astype(dtype)


def _stored(data: Any, page: int) -> Values:
    """One frame as it is stored [H, W] or [H, W, 3]; YCbCr becomes RGB."""
    encaps = require("pydicom.encaps", "dicom", "DICOM")
    syntax = str(data.file_meta.TransferSyntaxUID)
    if syntax.startswith(JPEG) or syntax in BY_CODECS:
        frame = encaps.get_frame(
            data.PixelData, page, number_of_frames=int(data.get("NumberOfFrames") or 1)
        )
        _check_frame(frame, syntax, (int(data.Rows), int(data.Columns)))
        if syntax in BY_CODECS:
            return _by_codecs(frame, data, BY_CODECS[syntax])
    return require("pydicom.pixels", "dicom", "DICOM").pixel_array(data, index=page)


def _check_frame(frame: bytes, syntax: str, declared: tuple[int, int]) -> None:
    """A frame of another size than the data set's would take any amount of memory."""
    size = j2k_size(frame) if int(syntax[len(JPEG) :]) >= 90 else _jpeg_size(frame)
    if size != declared:
        raise BadImage(f"a frame of {size[1]}x{size[0]} pixels in {declared[1]}x{declared[0]}")


def _jpeg_size(raw: bytes) -> tuple[int, int]:
    """(height, width) by the first frame header (SOF; also of lossless JPEG and JPEG-LS)."""
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(raw[at + 5 : at + 7]), int.from_bytes(raw[at + 7 : at + 9])
        at += 2 + int.from_bytes(raw[at + 2 : at + 4]) if marker != 0xFF else 1
    raise BadImage("cannot be decoded: a JPEG frame without a header")


def _by_codecs(frame: bytes, data: Any, name: str) -> Values:
    codecs = require("imagecodecs", "dicom", "DICOM with JPEG-LS, lossless or 12-bit JPEG")
    if name == "jpegls":
        values = codecs.jpegls_decode(frame)
    else:
        color = "RGB" if int(data.SamplesPerPixel) == 3 else None
        values = codecs.jpeg_decode(frame, colorspace=color, outcolorspace=color)
    if not data.get("PixelRepresentation", 0):
        return values
    unused = values.dtype.itemsize * 8 - int(data.BitsStored)
    signed = values.view(f"i{values.dtype.itemsize}")
    return (signed << unused) >> unused
