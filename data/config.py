"""Options of the data plane. No torch here: ``--help`` reads these classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from xcit_dino.errors import InputError, needs, within
from xcit_dino.inputs import Scaled, check_window
from xcit_dino.paths import Location


@dataclass(frozen=True)
class CropsConfig:
    """Multi-crop geometry (official dino main_dino.py, DataAugmentationDINO)."""

    global_crops_number: int = 2
    """Global crops of an image; they go through the teacher and the student."""
    global_crops_size: int = 224
    """Side of a global crop in pixels; the patch size must divide it."""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global crop covers, from and to."""
    local_crops_number: int = 8
    """Local crops of an image; they go through the student only. 0 switches multi-crop off."""
    local_crops_size: int = 96
    """Side of a local crop in pixels; the patch size must divide it."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local crop covers, from and to."""
    crops_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop before it is resized to a square, from and to (torchvision)."""
    stage_scales: tuple[float, ...] = (1.0,)
    """Crop sizes in successive stages of the training, relative to --global_crops_size and
    --local_crops_size and rounded to the patch size. 0.5 1: low resolution first (FastDINOv2,
    arXiv 2507.03779)."""
    stage_shares: tuple[float, ...] = (1.0,)
    """Share of the epochs of each stage, rounded to whole epochs; together 1. FastDINOv2: 0.75
    0.25."""

    def __post_init__(self) -> None:
        within(self, 1, 100, "global_crops_number")
        within(self, 0, 1000, "local_crops_number")
        within(self, 1, 4096, "global_crops_size", "local_crops_size")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"--{name} must be two shares of the area, 0 < from <= to <= 1")
        low, high = self.crops_ratio
        if not 0.01 <= low <= high <= 100:
            raise InputError("--crops_ratio must be two ratios, 0.01 <= from <= to <= 100")
        self._check_stages()

    def _check_stages(self) -> None:
        within(self, 0.05, 20, "stage_scales")
        within(self, 0, 1, "stage_shares")
        scales, shares = self.stage_scales, self.stage_shares
        if not scales or len(scales) != len(shares):
            raise InputError(
                f"--stage_scales has {len(scales)} values and --stage_shares {len(shares)}; each "
                "stage needs one of both: --stage_scales 0.5 1 --stage_shares 0.75 0.25"
            )
        if abs(sum(shares) - 1) > 1e-6:
            raise InputError(
                f"--stage_shares: {' + '.join(f'{share:g}' for share in shares)} is not 1; take "
                "shares such as 0.75 0.25"
            )

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        names = ("local_crops_size", "local_crops_scale")
        return needs(self.local_crops_number, "with --local_crops_number 0", *names)

    def stages(self, epochs: int, multiple: int) -> list[tuple[int, CropsConfig]]:
        """(first epoch, geometry) of each stage of a training of ``epochs``; sizes are multiples of
        ``multiple``, the patch size."""
        ends = [round(epochs * end) for end in accumulate(self.stage_shares)]
        return [
            (first, self._scaled(scale, multiple))
            for first, end, scale in zip([0, *ends], ends, self.stage_scales, strict=False)
            if first < end
        ]

    def _scaled(self, scale: float, multiple: int) -> CropsConfig:
        def scaled(size: int) -> int:
            return size if scale == 1 else max(1, round(size * scale / multiple)) * multiple

        sizes = scaled(self.global_crops_size), scaled(self.local_crops_size)
        return replace(
            self,
            global_crops_size=sizes[0],
            local_crops_size=sizes[1],
            stage_scales=(1.0,),
            stage_shares=(1.0,),
        )

    @property
    def sizes(self) -> str:
        """``"crops of 224 and 96 pixels"``."""
        local = f" and {self.local_crops_size}" if self.local_crops_number else ""
        return f"crops of {self.global_crops_size}{local} pixels"

    @property
    def num_crops(self) -> int:
        """All crops of an image; numbered globals first."""
        return self.global_crops_number + self.local_crops_number


@dataclass(frozen=True)
class AugmentConfig(Scaled):
    """Photometric augmentation of the crops (official dino main_dino.py, DataAugmentationDINO)."""

    flip_prob: float = 0.5
    """Probability of a left-right flip."""
    rot90_prob: float = 0.0
    """Probability of a rotation by 90, 180 or 270 degrees, each as likely: for images that have no
    upright position, such as those from above and through a microscope."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation (factors from 1-s to 1+s) and hue (+-s turns). The last two
    are off where images do not have 3 channels."""
    color_jitter_prob: float = 0.8
    """Probability of color jitter; its four operations come in random order."""
    channel_jitter: tuple[float, float] = (0.0, 0.0)
    """Brightness and contrast of each channel by itself (factors from 1-s to 1+s), after color
    jitter and with its probability."""
    gray_prob: float = 0.2
    """Probability that a crop loses its colors; 0 where images do not have 3 channels."""
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of blur for the first global, the other global and the local crops."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Blur radius in pixels, drawn uniformly (official utils.GaussianBlur; Pillow's radius)."""
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarization for the first global, the other global and the local crops; 0
    where images do not have 3 channels."""
    noise_prob: float = 0.0
    """Probability of Gaussian noise, after blur."""
    noise_std: float = 0.1
    """Its largest standard deviation (values in [0, 1]), drawn uniformly from 0."""
    channel_drop_prob: float = 0.0
    """Probability that a channel of a crop is replaced by its mean; one channel always stays."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel; others are clipped. A
    number, or a percentile of each channel in the data (p0.1 p99.9). By default as the weights to
    start from were trained, else by the data: 0 255 of 8 bits, 0 4095 where 12 bits are used."""
    mean: tuple[float, ...] | None = None
    """Of each channel (values in [0, 1]), subtracted; by default as the weights to start from were
    trained, else that of the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """The channels are divided by it; by default as for mean."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "flip_prob", "color_jitter_prob", "gray_prob", "blur_prob")
        within(self, 0, 1, "solarize_prob", "mean", "rot90_prob", "channel_jitter", "noise_prob")
        within(self, 0, 1, "channel_drop_prob", "noise_std")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        if (
            not all(0 <= s <= 1 for s in self.color_jitter[:3])
            or not 0 <= self.color_jitter[3] <= 0.5
        ):
            raise InputError("--color_jitter must lie in [0, 1], its hue in [0, 0.5]")
        low, high = self.blur_sigma
        if not 0 < low <= high <= 100:
            raise InputError("--blur_sigma must be two radii in pixels, 0 < from <= to <= 100")

    @property
    def effective(self) -> AugmentConfig:
        """The same without what has no meaning where images do not have 3 channels: saturation,
        hue, gray and solarize."""
        if self.channels == 3:
            return self
        jitter = (*self.color_jitter[:2], 0.0, 0.0)
        return replace(self, color_jitter=jitter, gray_prob=0.0, solarize_prob=(0.0, 0.0, 0.0))

    def without_meaning(self, channels: int) -> list[str]:
        """Options that ask for what images of ``channels`` channels cannot have."""
        if channels == 3:
            return []
        asked = {
            "color_jitter": any(self.color_jitter[2:]) and self.color_jitter_prob,
            "gray_prob": self.gray_prob,
            "solarize_prob": any(self.solarize_prob),
            "channel_drop_prob": self.channel_drop_prob and channels == 1,
        }
        return [name for name, value in asked.items() if value]

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`; what is off twice is not meant."""
        jitter, prob = any(self.color_jitter), self.color_jitter_prob
        jitters = jitter or any(self.channel_jitter)
        both = "with --color_jitter 0 0 0 0 and no --channel_jitter"
        return {
            **needs(prob or not jitter, "with --color_jitter_prob 0", "color_jitter"),
            **needs(prob, "with --color_jitter_prob 0", "channel_jitter"),
            **needs(jitters or not prob, both, "color_jitter_prob"),
            **needs(self.noise_prob, "with --noise_prob 0", "noise_std"),
            **needs(any(self.blur_prob), "with --blur_prob 0 0 0", "blur_sigma"),
        }


@dataclass(frozen=True)
class LoaderConfig:
    """Loading of shards."""

    data_path: Location | None = None
    """Folder or URL of shards with their index (``xcit-dino shards make`` writes one)."""
    shard_url: Location | None = None
    """Where the shards lie if not beside their index: http(s)://, s3:// or gs:// and a folder, or
    ``pipe:COMMAND {shard}``, a command (no shell) that writes the named shard to its output.
    Recipes from elsewhere may hold one and it is run. ``{split}`` stands for train or val, and so
    does a last part of that name."""
    num_workers: int = 10
    """Processes that decode and crop; 0 does it in the training process."""
    prefetch_factor: int = 2
    """Micro-batches that each worker prepares ahead."""
    shuffle_window: int = 16
    """Shards among which samples are mixed; the order of the shards is random too."""
    last_batch: Literal["drop", "wrap"] = "drop"
    """Samples that fill no whole batch at the end of an epoch: drop, or fill up with its first."""
    bands: tuple[int, ...] = ()
    """Channels to read, in this order, numbered from 1 (4 3 2: true colors where the first bands
    are coastal, blue, green, red); all by default. Not for 8-bit RGB images."""
    max_bad_fraction: float = 0.001
    """The run stops when more than this share of all samples is unreadable (1 always may be)."""
    cache_dir: Path | None = None
    """Local folder for copies of remote shards, shared by all processes of a node."""
    cache_gb: float = 100.0
    """The cache holds at most this many gigabytes; the shards unused for longest go first."""
    decoder: Literal["host", "cuda"] = "host"
    """Where JPEGs are decoded and cropped: the host's cores, or the GPU (needs CUDA)."""

    def __post_init__(self) -> None:
        within(self, 0, 4096, "num_workers")
        within(self, 1, 1e4, "prefetch_factor")
        within(self, 1, 1e9, "shuffle_window")
        within(self, 1, 512, "bands")
        within(self, 0, 1, "max_bad_fraction")
        within(self, 1e-9, 1e9, "cache_gb")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return {
            **needs(self.num_workers, "with --num_workers 0", "prefetch_factor"),
            **needs(self.cache_dir, "without --cache_dir", "cache_gb"),
        }

    def unused_cache(self, *others: str | None) -> dict[str, str]:
        """The cache's options, where neither these shards nor those at ``others`` are remote."""
        places = [place for place in (self.shard_url or self.data_path, *others) if place]
        remote = any("://" in place or place.startswith("pipe:") for place in places)
        why = "as the shards lie on a file system"
        return needs(remote or not places, why, "cache_dir", "cache_gb")
