"""Code in a model card: loading the file, and preparing an image as in the network's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xcit_dino.inputs import BYTES, InputSettings


def loading_code(
    output: Path, arch: str, model: Any, settings: InputSettings, hub: bool = False
) -> str:
    """Code that loads the file."""
    shape = f"[B, {settings.channels}, H, W]"
    chans = "" if settings.channels == 3 else f", in_chans={settings.channels}"
    if hub and (settings.channels != 3 or settings.window != BYTES):
        code = f"""import timm

# from the hub: "hf-hub:OWNER/NAME"
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
outputs = model(images)  # images: float32 {shape}, normalized

# or prepared from files or arrays of the training images' kind
import xcit_dino

features = xcit_dino.embed(["image.tif"], *xcit_dino.load("FOLDER"))"""
    elif hub:
        code = """import timm

# from the hub: "hf-hub:OWNER/NAME"
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
outputs = model(transform(image).unsqueeze(0))  # image: a PIL image"""
    elif output.suffix == ".onnx":
        code = f"""import onnxruntime

session = onnxruntime.InferenceSession("{output.name}")
(name,) = [node.name for node in session.get_inputs()]
outputs = session.run(None, {{name: images}})  # images: float32 {shape}, normalized"""
    else:
        code = f"""import xcit_dino
from safetensors.torch import load_file

model = xcit_dino.create_model("{arch}", num_classes={model.num_classes}{chans}).eval()
model.load_state_dict(load_file("{output.name}"))
outputs = model(images)  # images: float32 {shape}, normalized"""
    mean, std = format_values(settings.mean), format_values(settings.std)
    scaled = "" if settings.window == BYTES else f" ({window_text(settings)})"
    channels = f"Mean {mean}, std {std} of values in [0, 1]{scaled}."
    return f"```python\n{code}\n```\n\n{channels}"


def preprocessing_code(settings: InputSettings) -> str:
    """Code that prepares an image, and for which images."""
    mean, std = format_values(settings.mean), format_values(settings.std)
    resize, crop = settings.resize, settings.crop
    if settings.channels == 3 and settings.window == BYTES:
        code = f"""from PIL import Image
from torchvision import transforms

transform = transforms.Compose([
    transforms.Resize({resize}, transforms.InterpolationMode.{settings.interpolation.upper()}),
    transforms.CenterCrop({crop}),
    transforms.ToTensor(),
    transforms.Normalize({mean}, {std}),
])
images = transform(Image.open("image.jpg").convert("RGB"))[None]"""
    else:
        low, high = map(format_values, settings.window)
        code = f"""import numpy as np

# pixels: float32 [{settings.channels}, H, W], {channels_text(settings)};
# shorter side resized to {resize} ({settings.interpolation}, antialiased), center crop of {crop}
low, high, mean, std = (
    np.array(values, np.float32).reshape(-1, 1, 1)
    for values in ({low}, {high}, {mean}, {std})
)
images = (((pixels.clip(low, high) - low) / (high - low) - mean) / std)[None]"""
    known = "" if settings.size else " The size is the published protocols': the file has none."
    return f"```python\n{code}\n```{known}"


def channels_text(settings: InputSettings) -> str:
    """``RGB``, or the number of channels, which these are, and how their values are scaled."""
    plural = "s" * (settings.channels != 1)
    kind = "RGB" if settings.channels == 3 else f"{settings.channels} channel{plural}"
    if settings.bands:
        kind = f"bands {', '.join(map(str, settings.bands))} of the images"
    return kind if settings.window == BYTES else f"{kind}, {window_text(settings)}"


def window_text(settings: InputSettings) -> str:
    """``values 0 to 4095 scaled to [0, 1]``, of several channels each in its order."""
    pairs = [f"{low:g} to {high:g}" for low, high in zip(*settings.window, strict=True)]
    return f"values {', '.join(pairs)} scaled to [0, 1]"


def format_values(values: tuple[float, ...]) -> str:
    """``(0.485, 0.456, 0.406)``, of a single value ``(0.5,)``."""
    comma = "," if len(values) == 1 else ""
    return f"({', '.join(f'{value:g}' for value in values)}{comma})"
