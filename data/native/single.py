"""Single images that lie in no shard, as a network of other than 8-bit RGB images takes them.

The values are those that the loader would have: the same decoders, ``--bands`` picked, invalid
pixels filled with their channel's mean.
"""

from __future__ import annotations

import numpy as np

from xcit_dino.data.decode.native import (
    Values,
    Wanted,
    as_dtype,
    decode_values,
    dtype_of,
    fill,
    invalid,
    open_native,
)
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.inputs import BYTES, InputSettings


def values_of_file(raw: bytes, inputs: InputSettings, form: PixelFormat | None = None) -> Values:
    """[H, W, C] of one of :data:`~xcit_dino.data.pixels.DTYPES`, from an encoded image.

    Args:
        inputs: of the network.
        form: of the set that it was trained on, all channels; None: not known. It names the page
            to read, and no-data values that files do not name.

    Raises:
        BadImage: no image, damaged, or not one that the network takes.
    """
    page = form.page if form else None
    header = open_native(raw, Wanted(page, _channels(inputs, form), _most_pixels(form)))
    return taken(decode_values(header), inputs, form, header.nodata)


def values_of_array(
    array: Values, inputs: InputSettings, form: PixelFormat | None = None
) -> Values:
    """As :func:`values_of_file`, from an array [H, W, C], or [H, W] of one channel, of any type."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise BadImage(f"an array of {list(array.shape)} is no image; give [H, W, C]")
    values = array if array.ndim == 3 else array[..., None]
    return taken(as_dtype(values, np.dtype(dtype_of(values.dtype))), inputs, form, None)


def taken(
    values: Values, inputs: InputSettings, form: PixelFormat | None, nodata: float | None
) -> Values:
    """The channels that the network takes, without invalid pixels.

    Raises:
        BadImage: other channels, or integers of another depth than those of its training.
    """
    kind = f"{values.shape[2]}x{values.dtype}"
    if inputs.bands and values.shape[2] >= max(inputs.bands):
        values = values[..., [band - 1 for band in inputs.bands]]
    if values.shape[2] != inputs.channels:
        picked = f", bands {' '.join(map(str, inputs.bands))} of its images" if inputs.bands else ""
        plural = "s" * (inputs.channels != 1)
        raise BadImage(f"{kind}, and the network takes {inputs.channels} channel{plural}{picked}")
    deeper, shallower = inputs.window == BYTES, max(inputs.high) > 255
    if (values.dtype == np.uint16 and deeper) or (values.dtype == np.uint8 and shallower):
        raise BadImage(
            f"{kind}, and the network takes values from {min(inputs.low):g} to "
            f"{max(inputs.high):g}; give the image in the depth of the training images, or as "
            "float32 values of that range"
        )
    if form is not None and form.nodata is not None:
        nodata = form.nodata
    mask = invalid(values, nodata)
    if mask is None:
        return values
    return fill(values.copy(), mask, _means(inputs, form))


def _means(inputs: InputSettings, form: PixelFormat | None) -> tuple[float, ...]:
    """Of each channel, in the data's own units: measured, else by the normalization."""
    if form is not None and form.statistics is not None:
        return form.select(inputs.bands).statistics.mean  # type: ignore[union-attr]
    bounds = zip(*(np.broadcast_to(row, inputs.channels) for row in inputs.window), strict=True)
    return tuple(
        float(low + mean * (high - low))
        for mean, (low, high) in zip(inputs.mean, bounds, strict=True)
    )


def _channels(inputs: InputSettings, form: PixelFormat | None) -> int | None:
    """Of the images, where that is certain."""
    if form is not None:
        return form.channels
    return None if inputs.bands else inputs.channels


def _most_pixels(form: PixelFormat | None) -> int:
    return (form.max_pixels if form else None) or MAX_PIXELS
