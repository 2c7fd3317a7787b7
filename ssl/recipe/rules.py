"""Which options suit which data and how much time: pure functions that look up ``tables.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from xcit_dino.data.shards.describe import Description
from xcit_dino.errors import InputError
from xcit_dino.ssl.recipe import tables
from xcit_dino.ssl.recipe.tables import Choice, Network, Views

# -- what they are applied to ----------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Time and machine."""

    hours: float
    device: str = "cpu"
    """cpu or cuda."""
    cores: int = 1
    """Of this machine, for each process."""
    gpus: int = 1
    """Processes, one a GPU; on CPUs 1."""
    num_workers: int | None = None
    """Of the loader, a process; None: chosen."""
    precision: str = "auto"
    kind: str = "photographs"
    """Of images: a name of ``tables.KINDS``."""
    most_images: int | None = None
    """That fit into the memory of a process at once, where that was too little."""

    @property
    def seconds(self) -> float:
        """For steps and evaluations."""
        return 3600 * self.hours * (1 - tables.TIME_KEPT) - tables.START_SECONDS[self.device]


def views(data: Description, budget: Budget) -> Views:
    """Crops and patches, with the sizes filled in."""
    slow = budget.device == "cpu" and budget.hours < tables.SLOW_HOURS
    side = data.side(0.5)
    row = next(row for row in tables.VIEWS if side <= row.side and row.slow in (None, slow))
    size = row.size or max(2, side // row.patch) * row.patch
    return row._replace(size=size, local_size=row.local_size or size // 2 // row.patch * row.patch)


def network(data: Description, budget: Budget, rates: Mapping[str, float]) -> Network:
    """The largest network that pays at the images per second measured so far, by size; the smallest
    without any."""
    fitting = [n for n in tables.NETWORKS if data.images >= n.images]
    paying = [n for n in fitting if budget.seconds * rate_of(n, rates) >= n.seen]
    return paying[-1] if paying else tables.NETWORKS[0]


def rate_of(wanted: Network, rates: Mapping[str, float]) -> float:
    """Images per second of a network: measured, or from the nearest smaller one that was."""
    known = [n for n in tables.NETWORKS if n.size in rates and n.cost <= wanted.cost]
    if not known:
        return 0.0
    nearest = known[-1]
    return rates[nearest.size] * (nearest.cost / wanted.cost) ** tables.COST_EXPONENT


def prototypes(images: int, most: int = tables.PROTOTYPES[1]) -> int:
    """A power of two, not more than there are images."""
    least = tables.PROTOTYPES[0]
    power = 2 ** round(math.log2(max(least, images / tables.IMAGES_A_PROTOTYPE)))
    return max(2, min(power, most, 2 ** int(math.log2(max(images, 2)))))


def batch_size(data: Description, budget: Budget) -> int:
    """Images of a step over all processes: of the table, less for a small set."""
    row = [row for row in tables.BATCHES if data.images >= row.images][-1]
    wanted = (row.gpu if budget.device == "cuda" else row.cpu) * budget.gpus
    wanted = min(wanted, max(tables.MOST_BATCH, tables.LEAST_BATCH * budget.gpus))
    power = 2 ** int(math.log2(max(1, data.images // tables.STEPS_OF_AN_EPOCH)))
    least = min(tables.LEAST_BATCH, 2 ** int(math.log2(max(1, data.images))))
    return max(budget.gpus, min(wanted, max(power, least)) // budget.gpus * budget.gpus)


# -- the choice ------------------------------------------------------------------------------------


def choose(data: Description, budget: Budget, rates: Mapping[str, float]) -> list[Choice]:
    """Every option of the recipe with its reason, but the augmentation's.

    rates: images per second of all processes that were measured, by the size of the network
    (``pico_6``); without that of the network that is chosen, the length of the run is unknown.

    Raises:
        InputError: not one epoch fits into the time.
    """
    view, net = views(data, budget), network(data, budget, rates)
    batch = batch_size(data, budget)
    length = Length.of(data, budget, view, batch, rates.get(net.size))
    return [
        *_network(data, budget, view, net, rates),
        *_length(data, budget, length),
        *_step(data, budget, net, batch, length),
        *_head(data, net, length),
        *_crops(data, budget, view),
        *tables.FIXED,
        *_rest(data, budget, length),
    ]


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    rate: float
    """Images per second."""
    epochs: int
    steps_per_epoch: int
    images: int
    """Of an epoch."""
    evaluations: int
    evaluation_seconds: float

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def seen(self) -> int:
        """Images, counted in each epoch."""
        return self.epochs * self.images

    @property
    def seconds(self) -> float:
        """Of steps and evaluations."""
        return self.seen / self.rate + self.evaluations * self.evaluation_seconds

    @staticmethod
    def of(
        data: Description, budget: Budget, view: Views, batch: int, rate: float | None
    ) -> Length:
        """What fits into the time.

        Raises:
            InputError: not one epoch.
        """
        steps = max(1, data.images // batch)
        if rate is None:
            return Length(1.0, 1, steps, steps * batch, 0, 0.0)
        epoch = steps * batch / rate
        evaluated = 0
        if data.classes and data.val_images:
            pairs = zip(tables.EVALUATED, (data.images, data.val_images), strict=True)
            evaluated = sum(min(pair) for pair in pairs)
        each = evaluated / (rate * forward_passes(view))
        if epoch > budget.seconds:
            needed = 1.1 * epoch + tables.START_SECONDS[budget.device]
            hours = _rounded_up(needed / 3600 / (1 - tables.TIME_KEPT))
            raise InputError(
                f"--hours {budget.hours:g}: one epoch of {data.images:,} images takes longer, at "
                f"{per_second(rate)}; take --hours {hours:g}"
            )
        number = 0
        if evaluated:
            most = tables.EVALUATION_TIME * budget.seconds / each
            number = min(tables.EVALUATIONS, int(most))
        epochs = min(tables.MOST_EPOCHS, max(1, int((budget.seconds - number * each) / epoch)))
        return Length(rate, epochs, steps, steps * batch, min(number, epochs), each)


def forward_passes(view: Views) -> float:
    """What a step costs for an image, in passes of one global crop: student forward and backward
    (three passes), teacher forward."""
    assert view.size and view.local_size
    local = view.local_number * (view.local_size / view.size) ** 2
    return 3 * (2 + local) + 2


def _rounded_up(hours: float) -> float:
    digits = 1 - math.floor(math.log10(hours))
    return math.ceil(hours * 10**digits) / 10**digits


def _network(
    data: Description, budget: Budget, view: Views, net: Network, rates: Mapping[str, float]
) -> Iterator[Choice]:
    seen = budget.seconds * rate_of(net, rates)
    reason = f"{_millions(seen)} views of images fit into {budget.hours:g} h"
    larger = [each for each in tables.NETWORKS if each.cost > net.cost]
    if larger and data.images < larger[0].images:
        reason += f"; xcit_{larger[0].size} pays from {larger[0].images:,} images on"
    elif larger:
        theirs = budget.seconds * rate_of(larger[0], rates)
        reason += (
            f"; xcit_{larger[0].size} pays from {_millions(larger[0].seen)} on and would see "
            f"{_millions(theirs)}"
        )
    yield Choice("arch", f"xcit_{net.size}_p{view.patch}", "time", reason)
    small = "" if net.drop_path else "too small to need it"
    yield Choice("drop_path_rate", net.drop_path, "vissl" if net.drop_path else "ours", small)


def _length(data: Description, budget: Budget, length: Length) -> Iterator[Choice]:
    spent = length.seconds / 3600
    reason = (
        f"{length.steps:,} steps in {spent:.2g} of {budget.hours:g} h at {per_second(length.rate)}"
    )
    if length.epochs == tables.MOST_EPOCHS:
        reason += f"; more passes over {data.images:,} images only memorize them"
    yield Choice("epochs", length.epochs, "time", reason)
    share, most = tables.WARM_UP
    yield Choice(
        "warmup_epochs", _few_digits(min(share * length.epochs, most)), "ours",
        f"{share:.0%} of the epochs, at most {most}",
    )  # fmt: skip


def _step(
    data: Description, budget: Budget, net: Network, batch: int, length: Length
) -> Iterator[Choice]:
    each = batch // budget.gpus
    fitting = min(each, budget.most_images or each)
    per_epoch = f"{length.steps_per_epoch:,} step{'s' * (length.steps_per_epoch > 1)} per epoch"
    memory = ": as many as fit into memory" if fitting < each else ""
    yield Choice(
        "batch_size_per_gpu", fitting, "data", f"{data.images:,} images: {per_epoch}{memory}"
    )
    if fitting < each:
        yield Choice("accum_iter", each // fitting, "data", f"a global batch of {batch}")
    if length.seen < tables.KOLEO_BELOW and fitting > 1:  # it compares the images of a micro-batch
        yield Choice("koleo_weight", tables.KOLEO, "ours", "spreads the features of a short run")
    peak = net.lr * max(1, batch / 256) ** 0.5
    yield Choice(
        "lr", _few_digits(peak * 256 / batch), "ours",
        f"per 256 images: {peak:.2g} at a batch of {batch:,}, for xcit_{net.size}",
    )  # fmt: skip
    long = length.seen >= tables.DECAY_BELOW
    yield Choice(
        "weight_decay_end", 0.4 if long else 0.1, "dino" if long else "ours",
        "" if long else "a short run",
    )  # fmt: skip
    momentum = [row for row in tables.MOMENTA if length.steps >= row.steps][-1]
    yield Choice(
        "momentum_teacher", momentum.value, momentum.source,
        f"{length.steps:,} steps: {momentum.reason}",
    )  # fmt: skip


def _head(data: Description, net: Network, length: Length) -> Iterator[Choice]:
    number = prototypes(data.images, net.prototypes)
    why = f"a prototype for each {tables.IMAGES_A_PROTOTYPE}"
    if prototypes(data.images) > number:
        why += f", at most {net.prototypes:,} for xcit_{net.size}"
    elif data.images < tables.IMAGES_A_PROTOTYPE * tables.PROTOTYPES[0]:
        why = "the fewest that are used"
    yield Choice("out_dim", number, "data", f"{data.images:,} images: {why}")
    yield Choice("head_hidden_dim", net.hidden, "ours", f"for xcit_{net.size}")
    yield Choice("head_bottleneck_dim", net.bottleneck, "ours", f"for xcit_{net.size}")
    batchnorm = length.seen < tables.BATCHNORM_BELOW
    yield Choice(
        "use_bn_in_head", batchnorm, "ours" if batchnorm else "dino",
        "without it the outputs of short runs stay nearly uniform" if batchnorm else "",
    )  # fmt: skip
    share, most = tables.FREEZE
    frozen = _few_digits(min(share * length.epochs, most))
    yield Choice(
        "freeze_last_layer",
        frozen,
        "ours" if frozen < most else "dino",
        "epochs of fixed prototypes",
    )


def _crops(data: Description, budget: Budget, view: Views) -> Iterator[Choice]:
    source = "data" if view.slow is None else "time"
    side = f"shorter sides of {data.side(0.5)} pixels"
    yield Choice("global_crops_size", view.size, source, f"{side}: {view.reason}")
    rule = tables.SCALES.get(budget.kind) or tables.SCALES.get(data.targets or "")
    wide, narrow, why = rule if rule and view.local_number else (view.scale, view.local_scale, "")
    yield Choice("global_crops_scale", list(wide), "ours", why)
    number = "" if view.local_number else "two large views learn faster at this size"
    yield Choice("local_crops_number", view.local_number, "ours", number)
    yield Choice("local_crops_size", view.local_size, "ours")
    yield Choice("local_crops_scale", list(narrow), "ours", why)
    if not view.blur:
        no_blur = f"{side}: it removes what detail they have"
        yield Choice("blur_prob", [0.0, 0.0, 0.0], "data", no_blur)


def _rest(data: Description, budget: Budget, length: Length) -> Iterator[Choice]:
    if length.evaluations:
        every = math.ceil(length.epochs / length.evaluations)
        number, seconds = length.epochs // every, length.evaluation_seconds
        why = f"{number} evaluation{'s' * (number > 1)} of about {max(1, round(seconds))} s"
        yield Choice("knn_every", every, "time", why)
    else:
        labeled = data.classes and data.val_images
        yield (
            Choice("knn_every", 0, "time", "too little time")
            if labeled
            else Choice(
                "knn_every", 0, "data", "no labels" if data.val_images else "no validation split"
            )
        )
    workers = budget.num_workers
    if workers is None:
        workers = max(1, min(tables.MOST_WORKERS, budget.cores - 1))
    each = " for each GPU" if budget.gpus > 1 else ""
    cores = f"{budget.cores} core{'s' * (budget.cores > 1)} here{each}"
    yield Choice("num_workers", workers, "ours", cores)
    auto = budget.precision == "auto"
    why = "bf16 where there is hardware for it" if auto else "the one that was measured"
    yield Choice("precision", budget.precision, "ours", why)


def kind_of(data: Description) -> str:
    """The kind of images that channels and depth suggest: a name of ``tables.KINDS``."""
    if data.channels == 1:
        return "grayscale" if data.dtype == "uint8" else "xray"
    return "photographs" if data.channels == 3 else "satellite"


def per_second(rate: float) -> str:
    """``"142 images/s"``."""
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def _millions(number: float) -> str:
    if number < 1e6:
        return f"{max(number, 0):,.0f}"
    return f"{number / 1e6:,.0f} M" if number >= 1e7 else f"{number / 1e6:.2g} M"


def _few_digits(number: float) -> float:
    return float(f"{number:.2g}")
