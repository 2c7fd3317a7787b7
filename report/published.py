"""Published top-1 on ImageNet-1k, J&F on DAVIS 2017, Jaccard on Pascal VOC 2012, box AP on COCO and
mAP of retrieval; in percent, each with its source."""

from __future__ import annotations

from typing import Any, NamedTuple

IMAGENET_VAL = 50_000  # validation images of every number here
DINO_SOURCE = "DINO README"
XCIT_SOURCE = "XCiT README"
DAVIS_SOURCE = "DINO, table 5"
VOC_SOURCE = "DINO, figure 4"


class Published(NamedTuple):
    """One number as its authors report it."""

    top1: float
    """Or J&F, the Jaccard index, box AP, or mAP."""
    what: str
    source: str


DINO = {  # arch -> (k-NN, linear)
    "xcit_small_12_p16": (76.0, 77.8),
    "xcit_small_12_p8": (77.1, 79.2),
    "xcit_medium_24_p16": (76.4, 78.8),
    "xcit_medium_24_p8": (77.9, 80.3),
}
SUPERVISED = {  # arch -> (supervised at 224, distilled at 224, distilled at 384)
    "xcit_nano_12_p16": (69.9, 72.2, 75.4),
    "xcit_tiny_12_p16": (77.1, 78.6, 80.9),
    "xcit_tiny_24_p16": (79.4, 80.4, 82.6),
    "xcit_small_12_p16": (82.0, 83.3, 84.7),
    "xcit_small_24_p16": (82.6, 83.9, 85.1),
    "xcit_medium_24_p16": (82.7, 84.3, 85.4),
    "xcit_large_24_p16": (82.9, 84.9, 85.8),
    "xcit_nano_12_p8": (73.8, 76.3, 77.8),
    "xcit_tiny_12_p8": (79.7, 81.2, 82.4),
    "xcit_tiny_24_p8": (81.9, 82.6, 83.7),
    "xcit_small_12_p8": (83.4, 84.2, 85.1),
    "xcit_small_24_p8": (83.9, 84.9, 85.6),
    "xcit_medium_24_p8": (83.7, 85.1, 85.8),
    "xcit_large_24_p8": (84.4, 85.4, 86.0),
}

DAVIS = {  # backbone -> J&F, J, F on DAVIS 2017 val
    "DINO, ViT-S/16": (61.8, 60.2, 63.4),
    "DINO, ViT-B/16": (62.3, 60.7, 63.9),
    "DINO, ViT-S/8": (69.9, 66.6, 73.1),
    "DINO, ViT-B/8": (71.4, 67.9, 74.9),
}
COCO = {  # arch -> box AP on COCO val, Mask R-CNN, 36 epochs, from supervised weights
    "xcit_tiny_12_p16": 42.7,
    "xcit_small_12_p16": 45.3,
    "xcit_small_24_p16": 46.5,
    "xcit_medium_24_p16": 46.7,
    "xcit_tiny_12_p8": 44.5,
    "xcit_small_12_p8": 47.0,
    "xcit_small_24_p8": 48.1,
    "xcit_medium_24_p8": 48.5,
}
COCO_SOURCE = "XCiT detection/README"
COCO_VAL = 5_000
DAVIS_SUPERVISED = ("supervised, ViT-S/8", 66.0)
DAVIS_PROTOCOL = {
    "videos": 30, "objects": 61, "image_size": 480, "n_last_frames": 7,
    "size_mask_neighborhood": 12, "topk": 5, "temperature": 0.1,
}  # fmt: skip
VOC = {  # backbone -> Jaccard of attention masks, Pascal VOC 2012 val
    "random weights, ViT-S/16": 22.0,
    "supervised, ViT-S/16": 27.3,
    "DINO, ViT-S/16": 45.9,
    "random weights, ViT-S/8": 21.8,
    "supervised, ViT-S/8": 23.7,
    "DINO, ViT-S/8": 44.7,
}
VOC_PROTOCOL = {"val_images": 1449, "threshold": 0.6, "background": [0]}

RETRIEVAL = {  # collection -> what is measured there, source, rows
    "roxford5k": ("ROxford, Medium", "DINO, table 3", {
        "supervised, ViT-S/16": 33.5, "DINO, ResNet-50": 35.4, "DINO, ViT-S/16": 41.8,
        "DINO, ViT-S/16 pretrained on GLDv2": 51.5,
    }),
    "rparis6k": ("RParis, Medium", "DINO, table 3", {
        "supervised, ViT-S/16": 63.0, "DINO, ResNet-50": 55.9, "DINO, ViT-S/16": 63.1,
        "DINO, ViT-S/16 pretrained on GLDv2": 75.3,
    }),
    "copydays": ("Copydays, strong", "DINO, table 4", {
        "supervised, ViT-B/16": 76.4, "DINO, ViT-B/16 at 224": 81.7, "DINO, ViT-B/8 at 320": 85.5,
    }),
}  # fmt: skip
RETRIEVAL_PROTOCOL = {
    "roxford5k": {"queries": 70, "bank": 4993, "image_size": 224, "multiscale": False},
    "rparis6k": {"queries": 70, "bank": 6322, "image_size": 512, "multiscale": True},
    "copydays": {"distractors": 10_000, "whitening_images": 20_000, "resize": "square"},
}


def published(arch: str, evaluation: str, collection: str = "") -> list[Published]:
    """The numbers of an architecture that compare with an evaluation (``knn``, ``linear`` ...), of
    a retrieval those of its collection."""
    found = []
    if evaluation == "retrieve" and collection in RETRIEVAL:
        where, source, means = RETRIEVAL[collection]
        return [Published(mean, f"{what}, on {where}", source) for what, mean in means.items()]
    if evaluation == "propagate":
        rows = [(what, values[0]) for what, values in DAVIS.items()] + [DAVIS_SUPERVISED]
        return [Published(mean, f"{what}, on DAVIS 2017 val", DAVIS_SOURCE) for what, mean in rows]
    if evaluation == "masks":
        return [
            Published(mean, f"{what}, on VOC 2012 val", VOC_SOURCE) for what, mean in VOC.items()
        ]
    if evaluation == "detect" and arch in COCO:
        what = "Mask R-CNN from supervised weights, on COCO val"
        return [Published(COCO[arch], what, COCO_SOURCE)]
    if arch in DINO and evaluation in ("knn", "linear", "linear-dino"):
        top1, what = DINO[arch][evaluation != "knn"], "linear, augmented crops"
        found.append(Published(top1, "k-NN" if evaluation == "knn" else what, DINO_SOURCE))
    if arch in SUPERVISED and evaluation in ("finetune", "distill", "evaluate"):
        plain, distilled, large = SUPERVISED[arch]
        if evaluation != "distill":
            found.append(Published(plain, "supervised from scratch, 224", XCIT_SOURCE))
        if evaluation != "finetune":
            found.append(Published(distilled, "distilled, 224", XCIT_SOURCE))
        found.append(Published(large, "distilled, 384", XCIT_SOURCE))
    return found


def differences_from_published(
    evaluation: str, protocol: dict[str, Any], val_images: int | None
) -> list[str]:
    """In which ways a result was measured differently from the published ones."""
    others = {"propagate": DAVIS_PROTOCOL, "masks": VOC_PROTOCOL}
    if evaluation in others:
        pairs = [(name, protocol.get(name), value) for name, value in others[evaluation].items()]
        return ["another backbone"] + [f"{n} {a} instead of {b}" for n, a, b in pairs if a != b]
    if evaluation == "detect":
        masked = protocol.get("detector") == "Mask R-CNN"
        found = [] if masked else ["Faster R-CNN, which learns no masks"]
        if val_images != COCO_VAL:
            found.append(f"validation images {val_images} instead of COCO's {COCO_VAL:,}")
        if protocol.get("resize") != 800:
            found.append(f"shorter side {protocol.get('resize')} instead of 800")
        return found
    if evaluation == "retrieve":
        theirs = RETRIEVAL_PROTOCOL.get(protocol.get("collection", ""), {})
        pairs = [(name, protocol.get(name), value) for name, value in theirs.items()]
        return ["another backbone"] + [f"{n} {a} instead of {b}" for n, a, b in pairs if a != b]
    found = []
    if val_images != IMAGENET_VAL:
        count = "unknown" if val_images is None else f"{val_images:,}"
        found.append(f"validation images {count} instead of ImageNet's {IMAGENET_VAL:,}")
    few = (protocol.get("recipe") or {}).get("labels_per_class")
    if few:
        found.append(f"{few} training images a class instead of all")
    if evaluation == "linear":
        found.append("features of one crop instead of augmented crops (--protocol dino)")
    crop = protocol.get("crop")
    if evaluation in ("knn", "linear", "linear-dino") and crop != 224:
        found.append(f"crop {crop} instead of 224")
    return found
