"""The augmentation of a kind of images: that of the recipe in configs/images/, line by line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from xcit_dino.data.config import AugmentConfig
from xcit_dino.data.shards.describe import Description
from xcit_dino.options import read_yaml
from xcit_dino.ssl.recipe.tables import KINDS, Choice
from xcit_dino.train.config import CONFIGS

LINE = re.compile(r"^(\w+): .*?# \[([\w#]+)\] *(.*)$", re.MULTILINE)


def augmentation(kind: str, data: Description) -> Iterator[Choice]:
    """The options of the recipe of that kind, each with its source and reason there; of photographs
    none, as pretraining's defaults are DINO's."""
    if (name := KINDS[kind]) is None:
        return
    path = CONFIGS / name
    values, names = read_yaml(path), {field.name for field in fields(AugmentConfig)}
    for option, source, reason in LINE.findall(path.read_text()):
        if option == "channel_drop_prob" and data.channels == 1:
            continue  # the only one has to stay
        if option in names:
            yield Choice(option, values[option], source, reason)
