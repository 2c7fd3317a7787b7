"""The numbers of ``xcit-dino recipe``: which options suit which data and how much time.

``rules.py`` only looks them up; :class:`Choice` says where a number comes from.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """One option of a recipe."""

    option: str
    value: Any
    source: str
    """What stands in brackets in the recipe: ``data``: it follows from the data; ``time``: from the
    hours and the speed measured on this machine; ``ours``: this project's choice; ``dino``,
    ``vissl`` ...: as in the recipes of configs/."""
    reason: str = ""


class Views(NamedTuple):
    """Crops and patches for images of a size."""

    side: float
    """Up to this shorter side (median) in pixels."""
    slow: bool | None
    """Only where there is little time (True), or enough (False); None: always."""
    patch: int
    size: int | None
    """Of a global crop; None: the images' own shorter side."""
    scale: tuple[float, float]
    local_number: int
    local_size: int | None
    """None: half the global crop."""
    local_scale: tuple[float, float]
    blur: bool
    reason: str


class Network(NamedTuple):
    """A size of XCiT, and from when on it pays."""

    size: str
    images: int
    """In the set, at least."""
    seen: float
    """Views of images that fit into the time (images times epochs), at least."""
    cost: int
    """Depth times width squared: operations of a token, in proportion."""
    drop_path: float
    lr: float
    """Peak of a step of up to 256 images (not yet divided by batch / 256, as ``--lr`` is); it grows
    with the root of larger batches: small_12 has 0.001 at 1024, as in VISSL."""
    hidden: int
    bottleneck: int
    prototypes: int
    """At most."""


class Batch(NamedTuple):
    """Images of a step."""

    images: int
    """In the set, at least."""
    cpu: int
    gpu: int


class Momentum(NamedTuple):
    """The teacher's momentum at the start."""

    steps: int
    """Of the run, at least."""
    value: float
    source: str
    reason: str


# -- the numbers -----------------------------------------------------------------------------------

ALL = math.inf
OWN = None
VIEWS = (
    #     side  slow   patch size scale       local: number, size, scale   blur
    Views(48, True, 8, OWN, (0.2, 1.0), 0, OWN, (0.05, 0.2), False,
          "their own size; patches of 8 make 2.6 times as many steps as patches of 4"),
    Views(48, False, 4, OWN, (0.2, 1.0), 0, OWN, (0.05, 0.2), False,
          "their own size; patches of 4 see the detail"),
    Views(80, None, 8, OWN, (0.3, 1.0), 4, OWN, (0.1, 0.3), False,
          "their own size; patches of 8 make a grid of 8 x 8 and more"),
    Views(112, None, 8, OWN, (0.3, 1.0), 6, OWN, (0.1, 0.3), True,
          "their own size; patches of 8 make a grid of 10 x 10 and more"),
    Views(180, False, 16, OWN, (0.3, 1.0), 8, OWN, (0.1, 0.3), True,
          "their own size; patches of 16 make a grid of 7 x 7 and more"),
    Views(ALL, True, 8, 96, (0.3, 1.0), 4, 48, (0.05, 0.3), True,
          "small crops, many more steps: hours of CPUs are too short for 224 pixels"),
    Views(ALL, False, 16, 224, (0.3, 1.0), 8, 96, (0.05, 0.3), True,
          "the sizes of DINO's and XCiT's published runs"),
)  # fmt: skip
SLOW_HOURS = 24  # on CPUs, below which large images are trained in small crops
NETWORKS = (
    #        size    images     seen     cost          drop  lr     hidden, bottleneck, prototypes
    Network("pico_6", 0, 0, 6 * 80**2, 0.0, 1.5e-3, 256, 64, 1024),
    Network("nano_12", 0, 2e6, 12 * 128**2, 0.0, 1e-3, 512, 128, 8192),
    Network("tiny_12", 5_000, 8e6, 12 * 192**2, 0.0, 7.5e-4, 1024, 256, 16384),
    Network("small_12", 50_000, 40e6, 12 * 384**2, 0.05, 5e-4, 2048, 256, 65536),
)
COST_EXPONENT = 0.6
"""Images per second fall with this power of the cost, on GPUs rather less: hopeful, as a network
that turns out to be too slow is given up again, and one that is never tried is not."""
BATCHES = (
    #     images  on CPUs, on each GPU
    Batch(0, 64, 64),
    Batch(10_000, 64, 128),
    Batch(100_000, 64, 256),
    Batch(1_000_000, 128, 512),
)
MOST_BATCH = 1024  # as in the published runs, but at least LEAST_BATCH for each GPU
STEPS_OF_AN_EPOCH = 8  # at least, so small sets get small batches
LEAST_BATCH = 32  # batch-norm and center need some images
MOMENTA = (
    Momentum(0, 0.99, "ours", "a short run needs a quicker teacher"),
    Momentum(20_000, 0.996, "dino", "the official start"),
)
IMAGES_A_PROTOTYPE = 12  # the quickstart has 256 for 3,000, ImageNet 65,536 for 1.28 million
PROTOTYPES = (64, 65536)
BATCHNORM_BELOW = 10e6  # images seen: above, the head needs no batch-norm to leave its start
KOLEO_BELOW = 10e6  # images seen: below, the features of small networks collapse to few directions
KOLEO = 0.05
DECAY_BELOW = 10e6  # images seen: below, the weight decay ends at 0.1 instead of 0.4
WARM_UP = (0.08, 10)  # of the epochs, at most so many
FREEZE = (0.04, 1)  # the prototypes, likewise
MOST_EPOCHS = 1000
MOST_WORKERS = 10  # of a loader, as pretrain has them
EVALUATIONS = 10  # k-NN during the run, where there are labels
EVALUATION_TIME = 0.1  # of the run, at most
EVALUATED = (20_000, 4_000)  # images at most of each, of train and val: eval/online.py
TIME_KEPT = 0.05  # of the hours, for checkpoints, the log and a machine that is not always the same
START_SECONDS = {"cpu": 10, "cuda": 60}  # to the first step
FEW = 2_000  # images, below which existing weights are the better start
LEAST_STEPS = 300  # below which features hardly differ from random ones

KINDS = {  # of images: the recipe that their augmentation is taken from
    "photographs": None,
    "grayscale": "images/grayscale.yaml",
    "xray": "images/xray.yaml",
    "satellite": "images/satellite.yaml",
    "microscopy": "images/microscopy.yaml",
}
SCALES = {  # of global and local crops, where images have masks or boxes, or are of a kind
    "mask": ((0.4, 1.0), (0.1, 0.4), "objects with masks: crops that hold whole ones"),
    "boxes": ((0.4, 1.0), (0.1, 0.4), "objects with boxes: crops that hold whole ones"),
    "xray": ((0.5, 1.0), (0.1, 0.5), "all are of one composition: crops show which part they are"),
}

FIXED = (
    Choice("min_lr", 1e-5, "ours"),
    Choice("weight_decay", 0.04, "dino"),
    Choice("clip_grad", 3.0, "dino"),
    Choice("student_temp", 0.1, "dino"),
    Choice("warmup_teacher_temp", 0.04, "dino"),
    Choice("teacher_temp", 0.04, "dino"),
    Choice("center_momentum", 0.9, "dino"),
    Choice("head_nlayers", 3, "dino"),
    Choice("norm_last_layer", True, "dino", "more stable"),
    Choice("global_crops_number", 2, "dino"),
    Choice("seed", 0, "dino"),
)
