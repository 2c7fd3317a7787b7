"""Options of the pretraining run; torch-free, so that ``--help`` and ``--dry_run`` are quick."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from xcit_dino.command_line import named, parse, pop_option, pop_path
from xcit_dino.data.config import AugmentConfig, CropsConfig, LoaderConfig
from xcit_dino.errors import InputError, needs, within
from xcit_dino.models.zoo import TIMM_PREFIX, ModelConfig, canonical_name, model_spec
from xcit_dino.options import read_yaml, replace
from xcit_dino.paths import Location, expand
from xcit_dino.train.config import CONFIGS, OptimConfig, RunConfig


@dataclass(frozen=True)
class HeadConfig:
    """The projection head (DINO ``vision_transformer.py:DINOHead``)."""

    out_dim: int = 65536
    """Prototypes K."""
    head_nlayers: int = 3
    """Layers of the MLP before the prototypes."""
    head_hidden_dim: int = 2048
    """Width of the MLP's hidden layers."""
    head_bottleneck_dim: int = 256
    """Width of the L2-normalized bottleneck."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit length: more stable training; false suits small models."""
    use_bn_in_head: bool = False
    """Batch-norm in the head's MLP."""
    freeze_last_layer: float = 1.0
    """Epochs during which the prototypes are not updated."""

    def __post_init__(self) -> None:
        within(self, 2, 1e7, "out_dim")
        within(self, 1, 1e5, "head_nlayers", "head_hidden_dim", "head_bottleneck_dim")
        within(self, 0, 1e6, "freeze_last_layer")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.head_nlayers > 1, "with --head_nlayers 1", "head_hidden_dim")


@dataclass(frozen=True)
class DinoConfig:
    """The self-distillation (DINO ``main_dino.py``)."""

    student_temp: float = 0.1
    """Student's softmax temperature."""
    warmup_teacher_temp: float = 0.04
    """Teacher's temperature at the start."""
    teacher_temp: float = 0.04
    """Teacher's temperature after its warm-up."""
    warmup_teacher_temp_epochs: float = 0.0
    """Epochs of the linear warm-up of the teacher's temperature."""
    centering: Literal["center", "sinkhorn_knopp"] = "center"
    """What keeps the teacher's outputs spread over all prototypes. center: DINO's moving average.
    sinkhorn_knopp: three iterations over each micro-batch of all processes (SwAV, DINOv2)."""
    center_momentum: float = 0.9
    """Momentum of the center of the teacher's outputs, updated once per optimizer step."""
    momentum_teacher: float = 0.996
    """EMA momentum of the teacher at the start; cosine to 1."""
    koleo_weight: float = 0.0
    """Weight of KoLeo, which spreads the student's features of the global crops of different images
    apart, per micro-batch and process; 0: none. DINOv2 uses 0.1."""

    def __post_init__(self) -> None:
        within(self, 1e-4, 1e4, "student_temp", "warmup_teacher_temp", "teacher_temp")
        within(self, 0, 1e6, "warmup_teacher_temp_epochs")
        within(self, 0, 1, "center_momentum", "momentum_teacher")
        within(self, 0, 1e4, "koleo_weight")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        plain = self.centering == "center"
        return needs(plain, "with --centering sinkhorn_knopp", "center_momentum")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student learns from: its own average, a frozen teacher, or both; without labels."""

    objective: Literal["dino", "distill", "dino+distill"] = "dino"
    """dino: the student's own moving average. distill: the features of --teacher_model.
    dino+distill: the sum of both losses."""
    teacher_model: str | None = None
    """The frozen teacher: timm/NAME for a timm model, or a built-in one."""
    teacher_path: Path | None = None
    """Its weights: a file, or a run folder; by default timm's own, downloaded once."""
    teacher_size: int = 0
    """Side of the global crops as the teacher sees them, local crops in proportion; 0: its own
    (from its run, or timm), else the student's."""
    distill_weight: float = 1.0
    """Weight of the distillation loss relative to DINO's."""
    distill_patch_weight: float = 1.0
    """Weight of the patch tokens in the distillation loss, relative to the class token; 0 ignores
    them."""

    def __post_init__(self) -> None:
        within(self, 0, 4096, "teacher_size")
        within(self, 0, 1e4, "distill_weight", "distill_patch_weight")

    def check_teacher(self) -> None:
        """Raise InputError if a teacher is needed and none is given (a recipe may leave that to
        the command line)."""
        if self.distills and self.teacher_model is None:
            raise InputError(
                f"--objective {self.objective}: names no teacher; add --teacher_model timm/NAME, "
                "or a built-in one with its --teacher_path"
            )

    @property
    def dino(self) -> bool:
        """Whether the student learns from its moving average."""
        return self.objective != "distill"

    @property
    def distills(self) -> bool:
        """Whether the student learns from a frozen teacher."""
        return self.objective != "dino"

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        names = ("teacher_model", "teacher_path", "teacher_size", "distill_patch_weight")
        both = self.objective == "dino+distill"
        return {
            **needs(both, "unless --objective is dino+distill", "distill_weight"),
            **needs(self.distills, "with --objective dino", *names),
        }


@dataclass(frozen=True)
class StartConfig:
    """Where pretraining starts."""

    init_from: Location | None = None
    """Initial weights; schedules start from the beginning: a file of any format that `weights`
    reads, a run folder (its newest checkpoint), or timm/NAME for timm's own weights. A full DINO
    checkpoint provides student, teacher, heads and center; any other the backbone. Default: random
    weights."""
    new_head: bool = False
    """Take only the backbone from a full DINO checkpoint, with new heads."""
    freeze_backbone: float = 0.0
    """Epochs in which the backbone is frozen, batch-norm statistics included, while a new head
    learns."""
    freeze_batchnorm: bool = False
    """Keep the batch-norm statistics of --init_from for the whole run, as is usual in detection:
    statistics of few, or of strongly augmented, images make a network forget."""

    @property
    def keeps_batchnorm(self) -> bool:
        """Whether there are batch-norm statistics to keep for the whole run."""
        return self.freeze_batchnorm and self.init_from is not None

    def __post_init__(self) -> None:
        within(self, 0, 1e6, "freeze_backbone")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        names = ("new_head", "freeze_backbone", "freeze_batchnorm")
        return needs(self.init_from, "without --init_from", *names)


@dataclass(frozen=True)
class OnlineConfig:
    """k-NN during training, on a fixed subset."""

    knn_every: int = 10
    """Epochs between k-NN evaluations of the teacher; 0: none. They need labels and a validation
    split; without these, a line is printed and nothing is evaluated."""
    knn_data_path: Location | None = None
    """Other shards whose k-NN is logged too, as knn_other_top1 and knn_other_top5: with
    --init_from, the data that the weights were trained on show what is forgotten."""
    show_channels: tuple[int, ...] = ()
    """Channels shown as red, green and blue, numbered from 1, in TensorBoard's pictures of images
    with other than 8-bit RGB. Default: the first three, of more than three the first principal
    components."""

    def __post_init__(self) -> None:
        within(self, 1, 512, "show_channels")
        within(self, 0, 1e6, "knn_every")


@dataclass(frozen=True)
class SpeedConfig:
    """How a step is computed; apart from rounding, and drop-path's masks under --compile, none of
    these options changes what is learned."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks. auto: on GPUs, falling back to eager if it fails. Compiled
    blocks draw other drop-path masks than eager ones from the same seed."""
    grad_checkpointing: bool = False
    """Recompute the student's activations in the backward pass: less memory, more time."""
    group_backward: bool = False
    """Backward pass of the global crops before the local ones start: only the activations of one
    group are kept at a time, about half; the same gradients. Not with --use_bn_in_head."""


@dataclass(frozen=True)
class HealthConfig:
    """What to do about an unhealthy run; docs/health.md lists the diagnostics."""

    on_collapse: Literal["continue", "stop"] = "continue"
    """What a collapse alarm does, besides naming the kind and the options to change."""
    on_forgetting: Literal["warn", "stop", "rollback"] = "warn"
    """What happens when too much of the weights of --init_from is forgotten: a warning, a stop, or
    a roll-back to the last good checkpoint with half the learning rate."""
    forgetting_every: float = 1.0
    """Epochs between measurements of forgetting, without labels, on 2,000 images; with
    --knn_data_path on those data too. 0: none."""
    forgetting_threshold: float = 0.5
    """Share that must be preserved: of each image's 10 nearest neighbors by the weights of
    --init_from (on --knn_data_path if given), and of the k-NN accuracy there."""

    def __post_init__(self) -> None:
        within(self, 0, 1e6, "forgetting_every")
        within(self, 0, 1, "forgetting_threshold")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        off = "with --forgetting_every 0"
        return needs(self.forgetting_every, off, "on_forgetting", "forgetting_threshold")


@dataclass(frozen=True)
class PretrainConfig:
    """A complete pretraining run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    start: StartConfig = field(default_factory=StartConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        bn_in_head = self.objective.dino and self.head.use_bn_in_head
        if self.speed.group_backward and bn_in_head:
            raise InputError(
                "--group_backward: the head's batch-norm needs all crops at once; drop one of "
                "--group_backward and --use_bn_in_head"
            )
        if not float(self.dino.warmup_teacher_temp_epochs).is_integer():
            raise InputError(
                f"--warmup_teacher_temp_epochs {self.dino.warmup_teacher_temp_epochs}: the "
                "temperature changes once per epoch, so take a whole number"
            )
        if self.objective.dino and self.crops.num_crops == 1:
            raise InputError(
                "--global_crops_number 1 --local_crops_number 0: with one view of an image there "
                "is nothing to compare; take --global_crops_number 2, or some local crops"
            )
        if self.dino.koleo_weight and self.run.batch_size_per_gpu == 1:
            raise InputError(
                "--koleo_weight: it compares the images of a micro-batch; take "
                "--batch_size_per_gpu 2 or more"
            )
        self._check_start()
        if self.model.arch.startswith(TIMM_PREFIX):
            return  # timm checks sizes itself
        patch = self._multiple
        for name in ("global_crops_size", "local_crops_size"):
            size = getattr(self.crops, name)
            if size % patch:
                near = max(patch, round(size / patch) * patch)
                raise InputError(
                    f"--{name} {size}: {self.model.arch} needs a multiple of its patch size "
                    f"{patch}, say {near}"
                )

    @property
    def _multiple(self) -> int:
        """What divides crop sizes: the patch size, or for timm's networks what divides the given
        sizes (16 of 224 and 96, 14 of 224 and 98)."""
        if not self.model.arch.startswith(TIMM_PREFIX):
            return model_spec(self.model.arch).patch_size
        return math.gcd(self.crops.global_crops_size, self.crops.local_crops_size, 224)

    @property
    def stages(self) -> list[tuple[int, CropsConfig]]:
        """(first epoch, crops) of each stage of the training."""
        return self.crops.stages(self.run.epochs, self._multiple)

    def _check_start(self) -> None:
        """Refuse timm's weights of one model for another."""
        names = [name or "" for name in (self.start.init_from, self.model.arch)]
        bare = {name.partition(".")[0] for name in names if name.startswith(TIMM_PREFIX)}
        if len(bare) > 1:
            raise InputError(
                f"--init_from {names[0]}: not the weights of --arch {names[1]}; take --arch "
                f"{names[0]}"
            )

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        start, guard = self.start.init_from, self.health.forgetting_every
        looks = self.online.knn_every or (start and guard)
        sections = (HeadConfig, DinoConfig)
        names = {each.name for section in sections for each in fields(section)} | {"new_head"}
        names -= {"momentum_teacher", "koleo_weight"}  # which every objective has
        forgetting = ("on_forgetting", "forgetting_every", "forgetting_threshold")
        return {
            **self.loader.unused_cache(self.online.knn_data_path),
            **needs(self.objective.dino, "with --objective distill", *names),
            **needs(looks, "with --knn_every 0 and no --init_from", "knn_data_path"),
            **needs(start, "without --init_from", *forgetting),
            **needs(self.online.knn_every, "with --knn_every 0", "show_channels"),
        }

    def remarks(self) -> list[str]:
        """Unexpected effects of combined options, one line each."""
        epochs = self.run.epochs
        found = self.optim.remarks(epochs) + (self._dino_remarks() if self.objective.dino else [])
        frozen = self.start.freeze_backbone
        if frozen >= epochs:
            found.append(
                f"--freeze_backbone {frozen:g} with --epochs {epochs}: the backbone is never "
                "trained"
            )
        if self.dino.momentum_teacher == 1:
            found.append("--momentum_teacher 1: the teacher stays as it is at the start")
        if len(self.stages) < len(self.crops.stage_scales):
            shares = " ".join(f"{share:g}" for share in self.crops.stage_shares)
            found.append(
                f"--stage_shares {shares} with --epochs {epochs}: a stage of less than half an "
                "epoch is left out"
            )
        if self.online.knn_every > epochs:
            found.append(
                f"--knn_every {self.online.knn_every} with --epochs {epochs}: no k-NN while "
                "pretraining goes on"
            )
        return found

    def _dino_remarks(self) -> list[str]:
        epochs, method = self.run.epochs, self.dino
        found = []
        if self.head.freeze_last_layer >= epochs:
            found.append(
                f"--freeze_last_layer {self.head.freeze_last_layer:g} with --epochs {epochs}: the "
                "prototypes are never trained"
            )
        warmup, start = method.warmup_teacher_temp_epochs, method.warmup_teacher_temp
        if warmup > epochs and start != method.teacher_temp:
            found.append(
                f"--warmup_teacher_temp_epochs {warmup:g} with --epochs {epochs}: the teacher's "
                f"temperature does not reach --teacher_temp {method.teacher_temp:g}"
            )
        if not warmup and start not in (DinoConfig.warmup_teacher_temp, method.teacher_temp):
            found.append(
                f"--warmup_teacher_temp {start:g} has no effect with --warmup_teacher_temp_epochs 0"
            )
        if self.head.use_bn_in_head and self.head.head_nlayers == 1:
            found.append("--use_bn_in_head has no effect with --head_nlayers 1: no hidden layer")
        return found


def recipe_path(arch: str) -> Path:
    """The recipe of ``--arch``: ``configs/pretrain/ARCH.yaml``, else ``default.yaml``."""
    own = CONFIGS / "pretrain" / f"{canonical_name(arch).replace('/', '_')}.yaml"
    return own if own.is_file() else CONFIGS / "pretrain" / "default.yaml"


def pretrain_config(argv: Sequence[str], prog: str = "xcit-dino pretrain") -> PretrainConfig:
    """Recipe (``--config FILE``, or the one of ``--arch``) plus command-line overrides.

    Raises:
        InputError: unknown model, file, option or value, in one line.
    """
    file, argv = pop_path(argv, "config")
    arch, source = (pop_option(argv, name)[0] for name in ("arch", "init_from"))
    if arch is None and source is not None and (arch := arch_of_start(source)):
        argv = [*argv, "--arch", arch]
    path = file or recipe_path(arch or ModelConfig().arch)
    recipe = replace(PretrainConfig(), read_yaml(path), source=str(path))
    about = f"Pretrain a backbone with DINO. Defaults below: {path} (another with --config FILE)."
    config = parse(recipe, argv, prog, about)
    config.objective.check_teacher()
    refuse_without_meaning(named(argv, PretrainConfig), config)
    return replace(config, {"arch": canonical_name(config.model.arch)})


def refuse_without_meaning(given: set[str], config: PretrainConfig) -> None:
    """Raise InputError where the command line asks for augmentations that the images cannot have;
    those of a recipe are off without it."""
    names = {each.name for each in fields(AugmentConfig)} & given
    if not names:
        return
    from xcit_dino.data.native.scaling import form_of  # reads the index: only where it is needed

    form = form_of(config.loader.data_path, config.loader.bands)
    asked = [n for n in config.augment.without_meaning(form.channels) if n in names] if form else []
    if form is None or not asked:
        return
    if asked[0] == "color_jitter":
        brightness, contrast, *_ = config.augment.color_jitter
        raise InputError(
            f"--color_jitter: images of {form.channels} channels ({form.name}) have no saturation "
            f"and hue; take --color_jitter {brightness:g} {contrast:g} 0 0"
        )
    reason = {
        "gray_prob": "have no gray version",
        "solarize_prob": "are not solarized",
        "channel_drop_prob": "cannot drop the only one",
    }[asked[0]]
    raise InputError(
        f"--{asked[0]}: images of {form.channels} channel{'s' * (form.channels > 1)} ({form.name}) "
        f"{reason}; leave it out"
    )


def arch_of_start(init_from: str) -> str | None:
    """The architecture that ``--init_from`` names: timm's, or that of a run folder, or of a folder
    for timm and the hub."""
    if init_from.startswith(TIMM_PREFIX):
        return init_from
    folder = Path(expand(init_from))
    if (run := folder / "config.yaml").is_file():
        return read_yaml(run).get("arch")
    try:
        name = str(json.loads((folder / "config.json").read_bytes())["architecture"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        return canonical_name(name)  # timm's names of XCiTs are the published ones
    except InputError:
        return f"{TIMM_PREFIX}{name}"
