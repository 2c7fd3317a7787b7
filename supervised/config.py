"""Options of supervised training (finetuning, distillation); torch-free.

Names are DeiT's and XCiT's (``main.py``) where they have the concept; defaults are the supervised
recipe of XCiT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from xcit_dino.command_line import named, parse, pop_option, pop_path
from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.errors import InputError, needs, within
from xcit_dino.eval.config import NetworkName
from xcit_dino.inputs import Scaled, check_window
from xcit_dino.models.zoo import TIMM_PREFIX, ModelConfig, canonical_name, model_spec
from xcit_dino.options import read_yaml, replace
from xcit_dino.train.config import CONFIGS, OptimConfig, RunConfig

Config = TypeVar("Config", bound="FinetuneConfig")


@dataclass(frozen=True)
class StartConfig:
    """Where training starts."""

    pretrained_weights: Path | None = None
    """A run folder (its newest checkpoint, arch and data), or a file of any format that `weights`
    reads: self-supervised or supervised. Default: from scratch."""
    checkpoint_key: NetworkName | None = None
    """Which network of a checkpoint; default: the teacher of a DINO one, else the only one."""
    new_head: bool = False
    """Replace the weights' classifier by a new one, for other classes."""

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        there = self.pretrained_weights
        return needs(there, "without --pretrained_weights", "checkpoint_key", "new_head")


@dataclass(frozen=True)
class RegularizationConfig(Scaled):
    """The network's input and its augmentation and regularization."""

    input_size: int = 224
    """Side of the training crops and of the validation images in pixels."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel; others are clipped. A
    number, or a percentile of each channel in the data (p0.1 p99.9). By default as the weights to
    start from were trained, else by the data: 0 255 of 8 bits, 0 4095 where 12 bits are used."""
    mean: tuple[float, ...] | None = None
    """Of each channel (values in [0, 1]), subtracted; by default as the weights to start from were
    trained, else that of the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """The channels are divided by it; by default as for mean."""
    train_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a training crop covers, from and to (torchvision)."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """timm's policy of automatic augmentation: rand-..., augmix-..., original, v0, 3a; or none. Off
    for images that are not 8-bit RGB, which its operations are made for."""
    color_jitter: float = 0.4
    """Strength of color jitter, where there is no automatic augmentation (timm's rule), of 8-bit
    RGB."""
    reprob: float = 0.25
    """Probability of erasing a random rectangle."""
    remode: Literal["pixel", "rand", "const"] = "pixel"
    """Filled with noise for each pixel, one random color, or the mean color."""
    recount: int = 1
    """Rectangles."""
    repeated_aug: int = 3
    """How often a sample is in a global batch, each time augmented differently; 1: off. An epoch
    keeps its number of images, but has fewer different samples."""
    mixup: float = 0.8
    """Alpha of mixup; 0: off."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0: off."""
    mixup_prob: float = 1.0
    """Probability of mixing at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix instead of mixup if both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Mixing parameters are drawn per batch of a process, per pair of images, or per image."""
    smoothing: float = 0.1
    """Label smoothing."""
    model_ema_decay: float = 0.99996
    """Decay per step of the moving average of the weights; 0: off."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "hflip", "reprob", "mixup_prob", "mixup_switch_prob", "smoothing")
        within(self, 1, 4096, "input_size")
        within(self, 0, 1, "mean")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        within(self, 0, 10, "color_jitter", "mixup", "cutmix")
        within(self, 1, 100, "recount", "repeated_aug")
        within(self, 0, 1, "model_ema_decay")
        if self.model_ema_decay == 1:
            raise InputError("--model_ema_decay must be below 1")
        low, high = self.train_scale
        if not 0 < low <= high <= 1:
            raise InputError("--train_scale must be two shares of the area, 0 < from <= to <= 1")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        jitters = self.aa in ("", "none") or "3a" in self.aa or not self.color_jitter
        either, both = self.mixup or self.cutmix, self.mixup and self.cutmix
        prob = ["mixup_prob"] if self.mixup_prob else []
        idle = [name for name in ("mixup", "cutmix") if getattr(self, name)]
        idle += ["mixup_mode", "mixup_switch_prob"]
        return {
            **needs(jitters, f"with --aa {self.aa}", "color_jitter"),
            **needs(self.reprob, "with --reprob 0", "remode", "recount"),
            **needs(both, "unless both --mixup and --cutmix are on", "mixup_switch_prob"),
            **needs(either, "with --mixup 0 --cutmix 0", "mixup_mode", *prob),
            **needs(self.mixup_prob, "with --mixup_prob 0", *idle),
        }

    @property
    def crops(self) -> CropsConfig:
        """One crop per image, as options of the loader."""
        return CropsConfig(
            global_crops_number=1,
            global_crops_size=self.input_size,
            global_crops_scale=self.train_scale,
            local_crops_number=0,
        )

    @property
    def uses_pillow(self) -> bool:
        """Whether images go through timm's operations, which are Pillow's."""
        return bool(self.pillow_options)

    @property
    def pillow_options(self) -> list[str]:
        """The options that ask for them."""
        asked = {"aa": self.aa not in ("", "none"), "color_jitter": self.color_jitter > 0}
        return [name for name, is_on in asked.items() if is_on]

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class ValidationConfig:
    """Accuracy during training."""

    eval_every: int = 10
    """Epochs between validations of the raw and the averaged weights; 0: only at the end."""
    eval_crop_ratio: float = 1.0
    """Share of the resized image's side that the center crop keeps (XCiT's --full_crop: 1)."""
    eval_batch_size: int = 128
    """Images per batch and process in validation."""

    def __post_init__(self) -> None:
        within(self, 0, 1e6, "eval_every")
        within(self, 0.1, 1, "eval_crop_ratio")
        within(self, 1, 1e6, "eval_batch_size")


@dataclass(frozen=True)
class FewLabelsConfig:
    """Training on few labels."""

    labels_per_class: int = 0
    """Train on only this many random images of each class; 0: on all."""
    draw_seed: int = 0
    """Seed of this choice."""

    def __post_init__(self) -> None:
        within(self, 0, 1e9, "labels_per_class")
        within(self, 0, 2**31, "draw_seed")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.labels_per_class, "without --labels_per_class", "draw_seed")


@dataclass(frozen=True)
class FinetuneConfig:
    """A complete supervised training: from self-supervised or supervised weights, or scratch."""

    run: RunConfig = field(default_factory=lambda: RunConfig(epochs=400, batch_size_per_gpu=128))
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=0.00025,  # for 256 images: XCiT's 0.0005 is for 512
            min_lr=1e-5,
            warmup_epochs=5,
            warmup_lr=1e-6,
            weight_decay=0.05,
            weight_decay_end=0.05,
            clip_grad=0,
        )
    )
    cooldown_epochs: float = 0.0
    """Epochs at the end with min_lr."""
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    few: FewLabelsConfig = field(default_factory=FewLabelsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        within(self, 0, 1e6, "cooldown_epochs")
        if self.loader.decoder != "host":
            raise InputError(
                "--decoder cuda: RandAugment works on the host's pixels; use --decoder host"
            )
        if self.regularization.mixes and self.run.batch_size_per_gpu % 2:
            raise InputError(
                f"--batch_size_per_gpu {self.run.batch_size_per_gpu}: mixup pairs images, so it "
                "must be even (or --mixup 0 --cutmix 0)"
            )
        if not self.model.arch.startswith(TIMM_PREFIX):
            size, patch = self.regularization.input_size, model_spec(self.model.arch).patch_size
            if size % patch:
                near = max(patch, round(size / patch) * patch)
                raise InputError(
                    f"--input_size {size}: {self.model.arch} needs a multiple of its patch size "
                    f"{patch}, say {near}"
                )

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return self.loader.unused_cache()

    def remarks(self) -> list[str]:
        """Unexpected effects of combined options, one line each."""
        epochs, warmup = self.run.epochs, self.optim.warmup_epochs
        found = self.optim.remarks(epochs)
        if not found and self.cooldown_epochs and warmup + self.cooldown_epochs >= epochs:
            found.append(
                f"--warmup_epochs {warmup:g} and --cooldown_epochs {self.cooldown_epochs:g} with "
                f"--epochs {epochs}: the learning rate falls to --min_lr at once after the warm-up"
            )
        return found


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher and the distillation loss."""

    teacher_model: str = "regnety_160.deit_in1k"
    """A timm model, or a built-in one; the default is the teacher of DeiT and XCiT."""
    teacher_path: Path | None = None
    """The teacher's weights: a file, or a run folder; by default timm's own, downloaded once."""
    teacher_size: int = 0
    """Side of the images that the teacher sees; 0: its own (from its run, or timm), else the
    student's."""
    distillation_type: Literal["hard", "soft", "symmetric"] = "hard"
    """hard: cross-entropy with the teacher's top class. soft: KL from the teacher, averaged over
    classes (both DeiT). symmetric: mean of KL both ways (PASSL)."""
    distillation_alpha: float = 0.5
    """Weight of the teacher's term in the loss; the labels' term has the rest."""
    distillation_tau: float = 1.0
    """Temperature of soft and symmetric."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "distillation_alpha")
        within(self, 1e-3, 1e3, "distillation_tau")
        within(self, 0, 4096, "teacher_size")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        soft, share = self.distillation_type != "hard", self.distillation_alpha
        names = ("teacher_size", "distillation_type", "distillation_tau")
        return {
            **needs(soft, "with --distillation_type hard", "distillation_tau"),
            **needs(share, "with --distillation_alpha 0", *names),
        }


@dataclass(frozen=True)
class DistillConfig(FinetuneConfig):
    """Supervised training with labels and a frozen teacher."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        labels = self.teacher.distillation_alpha < 1
        idle = needs(labels, "with --distillation_alpha 1", "smoothing")
        return super().ineffective() | idle


# -- command lines


def finetune_config(argv: Sequence[str], prog: str = "xcit-dino finetune") -> FinetuneConfig:
    """Recipe (``--config FILE``, or ``configs/finetune/ARCH.yaml``) plus command-line overrides.

    Raises:
        InputError: unknown model, file, option or value, in one line.
    """
    return _config(FinetuneConfig(), "finetune", argv, prog, "Train a classifier.")


def distill_config(argv: Sequence[str], prog: str = "xcit-dino distill") -> DistillConfig:
    """Recipe (``--config FILE``, or ``configs/distill/ARCH_dist.yaml``) plus overrides."""
    return _config(DistillConfig(), "distill", argv, prog, "Train a classifier with a teacher.")


def recipe_path(kind: str, arch: str) -> Path | None:
    """The recipe for a name as published: ``xcit_small_12_p8_384`` has one of its own beside
    ``xcit_small_12_p8``; None where there is neither.

    Raises:
        InputError: there is one for 224 pixels only.
    """
    suffix = "_dist" if kind == "distill" else ""
    bare = canonical_name(arch)
    names = (f"{arch.removesuffix('_dist')}{suffix}", f"{bare}{suffix}")
    paths = [CONFIGS / kind / f"{name.replace('/', '_')}.yaml" for name in names]
    found = next((path for path in paths if path.is_file()), None)
    if found == paths[1] and "_384" in arch:
        raise InputError(
            f"--arch {arch}: there is no recipe for 384 pixels; take {bare}{suffix}, and add "
            "--input_size 384"
        )
    return found


def _config(base: Config, kind: str, argv: Sequence[str], prog: str, about: str) -> Config:
    """Defaults, overridden by the run folder to start from, then the recipe, then the flags."""
    file, argv = pop_path(argv, "config")
    folder = pop_path(argv, "pretrained_weights")[0]
    known = passed_on(folder)
    arch = pop_option(argv, "arch")[0] or known.get("arch") or base.model.arch
    path = file or recipe_path(kind, arch)
    config = replace(base, known, source=f"{folder}/config.yaml")
    if path is None:
        config = replace(config, {"arch": arch})
    else:
        config = replace(config, read_yaml(path), source=str(path))
    origin = f"Defaults below: {path or 'those of the supervised XCiT recipe'}"
    config = parse(config, argv, prog, f"{about} {origin} (another with --config FILE).")
    refuse_pillow(named(argv, type(base)), config)
    name = canonical_name(config.model.arch)
    values: dict[str, Any] = {"arch": name}
    if config.run.output_dir == RunConfig.output_dir:
        runs = folder if folder and known else Path("runs") / name.replace("/", "_")
        values["output_dir"] = runs / kind
    return replace(config, values)


def refuse_pillow(given: set[str], config: FinetuneConfig) -> None:
    """Raise InputError where the command line, which gives these options, asks for operations of
    8-bit RGB on other images; those of a recipe are off without it."""
    asked = [name for name in config.regularization.pillow_options if name in given]
    if not asked:
        return
    from xcit_dino.data.native.scaling import form_of  # reads the index: only where it is needed

    form = form_of(config.loader.data_path, config.loader.bands)
    if form is not None and not form.is_rgb8:
        raise InputError(
            f"--{asked[0]}: timm's operations are made for 8-bit RGB, and "
            f"{config.loader.data_path} holds {form.name}; leave it out"
        )


def passed_on(folder: Path | None) -> dict[str, Any]:
    """What a run folder passes on to its continuation: the arch and the location of the data."""
    path = folder / "config.yaml" if folder else None
    options = read_yaml(path) if path and path.is_file() else {}
    names = ("arch", "data_path", "shard_url", "bands")
    return {name: options[name] for name in names if options.get(name)}
