"""``xcit-dino finetune``: a classifier from self-supervised or supervised weights, or from scratch
(XCiT ``main.py``)."""

from __future__ import annotations

from xcit_dino.supervised.config import FinetuneConfig
from xcit_dino.supervised.data import open_data
from xcit_dino.supervised.train import soft_cross_entropy, train
from xcit_dino.supervised.trainer import Method, build_model, with_input_settings
from xcit_dino.train import loop
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.folder import check_output


def main(config: FinetuneConfig) -> None:
    """The command; a launcher's job calls :func:`finetune` and handles signals itself."""
    loop.command(finetune, config)


def finetune(config: FinetuneConfig) -> None:
    """Train and write ``finetune`` and ``finetune/ema`` to ``results.json``; see
    :func:`xcit_dino.supervised.train.train`."""
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    data = open_data(config)
    config = with_input_settings(config, data.form)
    run = config.run
    model, facts = build_model(
        config.model, config.start, data.num_classes, run.output_dir, run.seed,
        config.regularization.channels,
    )  # fmt: skip
    train(config, Method("finetune", "model", soft_cross_entropy, facts), model, data, world)
