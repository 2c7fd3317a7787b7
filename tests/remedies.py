"""Messages that name an option or a command: a command line that provokes each, and its remedy
followed by the letter.

Folders in the lines: ``{shards}`` 96 + 48 labeled images, ``{plain}`` such without labels,
``{away}`` an index without its shards, ``{photos}`` two class folders, ``{run}`` a pretraining run,
``{weights}`` a network without a run, ``{tmp}`` an empty folder.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.victims import TINY


class Case(NamedTuple):
    """One message."""

    message: str
    """Part of its text in the code, ``{}`` for what is filled in; the whole text after ``=``."""
    bad: str
    """The command line that is answered with it."""
    good: tuple[str, ...]
    """Command lines that do what it says; the last one does what was wanted."""


def case(message: str, bad: str, *good: str) -> Case:
    return Case(message, bad, good)


SIZE = "--epochs 1 --batch_size_per_gpu 48 --num_workers 0 --device cpu"
NETWORK = "--arch xcit_pico_6_p8"
SMALL = " ".join(f"--{k} {v}" for k, v in TINY.items() if k not in ("batch_size_per_gpu", "epochs"))
PRETRAIN = f"pretrain {SMALL} {SIZE} --warmup_epochs 0 --knn_every 0 --output_dir {{tmp}}/run"
FINETUNE = (
    f"finetune {NETWORK} {SIZE} --input_size 32 --warmup_epochs 0 --eval_every 0 "
    "--output_dir {tmp}/tuned"
)
DISTILL = FINETUNE.replace("finetune", "distill", 1)
UNLABELED = (
    "pretrain --arch xcit_pico_6_p8 --global_crops_size 32 --local_crops_number 0 "
    f"{SIZE} --warmup_epochs 0 --knn_every 0 --output_dir {{tmp}}/run --data_path {{shards}} "
)
PLAIN = "--num_workers 0 --device cpu --crop_size 32"
BARE = f"{NETWORK} --pretrained_weights {{weights}} {PLAIN} --output_dir {{tmp}}/out"
KNN = f"knn {BARE} --nb_knn 5"
EMBED = f"embed {{tmp}}/embedded {BARE}"
LAUNCH = f"launch {NETWORK} --ngpus 0 --dry_run"

# -- answered by the option parser: only the parser is called --------------------------------------

PARSED = [
    case("--window: takes LOW HIGH", "pretrain --window 1", "pretrain --window 0 4095"),
    case("--crops_ratio must be", "pretrain --crops_ratio 2 1", "pretrain --crops_ratio 0.01 100"),
    case(
        "--color_jitter must lie",
        "pretrain --color_jitter 2 0.4 0.2 0.1",
        "pretrain --color_jitter 1 0 1 0.5",
    ),
    case(
        "--koleo_weight: it compares the images of a micro-batch; take --batch_size_per_gpu 2",
        "pretrain --koleo_weight 0.1 --batch_size_per_gpu 1",
        "pretrain --koleo_weight 0.1 --batch_size_per_gpu 2",
    ),
    case(
        "--stage_scales has {} values and --stage_shares {}; each stage needs one of both: "
        "--stage_scales 0.5 1 --stage_shares 0.75 0.25",
        "pretrain --stage_scales 0.5 1",
        "pretrain --stage_scales 0.5 1 --stage_shares 0.75 0.25",
    ),
    case(
        "--stage_shares: {} is not 1; take shares such as 0.75 0.25",
        "pretrain --stage_scales 0.5 1 --stage_shares 0.75 0.5",
        "pretrain --stage_scales 0.5 1 --stage_shares 0.75 0.25",
    ),
    case("--blur_sigma must be", "pretrain --blur_sigma 3 1", "pretrain --blur_sigma 0.1 100"),
    case(
        "--{} must be two shares of the area",
        "pretrain --global_crops_scale 0.5 0.2",
        "pretrain --global_crops_scale 0.01 1",
    ),
    case(
        "--init_from {}: not the weights of --arch {}; take --arch {}",
        "pretrain --init_from timm/resnet18 --arch timm/resnet34",
        "pretrain --init_from timm/resnet18 --arch timm/resnet18",
    ),
    case(
        "names a file, and --format timm-hub writes a folder; take --output",
        "weights export a.pth --format timm-hub --output b.safetensors",
        "weights export a.pth --format timm-hub --output b",
    ),
    case(
        "--train_scale must be two shares",
        "finetune --train_scale 0.5 0.2",
        "finetune --train_scale 0.08 1",
    ),
    case(
        "--bits: makes 8-bit images; without it --pixels keeps all bits",
        "shards make a b --bits 12 --pixels 1xuint16",
        "shards make a b --pixels 1xuint16",
    ),
    case(
        "--pixels {}: auto, rgb8, or channels",
        "shards make a b --pixels 13xuint32",
        "shards make a b --pixels auto",
        "shards make a b --pixels rgb8",
        "shards make a b --pixels 13xuint16",
    ),
    case(
        "--quality: images of {} are stored without loss",
        "shards make a b --quality 80 --resize 64 --pixels 1xuint16",
        "shards make a b --resize 64 --pixels 1xuint16",
    ),
    case(
        "--{}: has no effect with --pixels rgb8",
        "shards make a b --nodata 0 --pixels rgb8",
        "shards make a b --pixels rgb8",
        "shards make a b --nodata 0 --pixels 3xuint8",
    ),
    case(
        "--split must be a plain name", "shards make a b --split a/b", "shards make a b --split val"
    ),
    case(
        "--resize_size {}: must be at least",
        "knn --resize_size 32 --crop_size 64",
        "knn --resize_size 64 --crop_size 64",
        "knn --resize_size -1 --crop_size 64",
    ),
    case(
        "--quality: images are not re-encoded without --resize",
        "shards make a b --quality 80",
        "shards make a b --quality 80 --resize 64",
    ),
    case(
        "--seed: nothing is random with --shuffle false",
        "shards make a b --seed 1 --shuffle false",
        "shards make a b --seed 1",
    ),
    case(
        "--{}: nothing is cut into tiles without --tile",
        "shards make a b --stride 16",
        "shards make a b --stride 16 --tile 32",
    ),
    case(
        "--background: no tile is left out without --min_foreground",
        "shards make a b --tile 32 --background slide",
        "shards make a b --tile 32 --background slide --min_foreground 0.1",
    ),
    case(
        "--{}: is not available for tiles; leave it out, or --tile",
        "shards make a b --tile 32 --bits 12",
        "shards make a b --tile 32",
        "shards make a b --bits 12",
    ),
    case(
        "--{}: is for the preflight; add --nodes or --gpus",
        "shards check a --batch_size_per_gpu 8",
        "shards check a --batch_size_per_gpu 8 --nodes 1",
        "shards check a --batch_size_per_gpu 8 --gpus 1",
    ),
    case(
        "--decoder cuda: for --protocol dino only",
        "linear --decoder cuda",
        "linear --decoder cuda --protocol dino",
    ),
    case(
        "--warmup_teacher_temp_epochs {}: the temperature changes once per epoch",
        "pretrain --warmup_teacher_temp_epochs 1.5",
        "pretrain --warmup_teacher_temp_epochs 2",
    ),
    case(
        "--baselines: a random network has no classifier",
        "evaluate --baselines true",
        "evaluate",
        "knn --baselines true",
        "linear --baselines true",
    ),
    case(
        "--{}: a rehearsal is one pretraining; leave the option out",
        "launch rehearse --seeds 0 1",
        "launch rehearse",
    ),
    case(
        "has no effect {}; leave it out",
        "pretrain --local_crops_number 0 --local_crops_size 48",
        "pretrain --local_crops_number 0",
    ),
    case(
        "--baselines: near-duplicates are those of one network",
        "duplicates --baselines true",
        "duplicates",
        "knn --baselines true",
    ),
    case(
        "--labels_per_class: for --protocol cached only",
        "linear --labels_per_class 5 --protocol dino",
        "linear --labels_per_class 5",
    ),
    case("--splits: name train, val or both", "duplicates --splits val val", "duplicates"),
    case("--nb_knn: give one or more", "knn --nb_knn", "knn --nb_knn 5"),
    case("--{}: give at least one", "linear --lrs", "linear --lrs 0.1"),
    case(
        "--{} {}: must be from {} to {}",
        "pretrain --lr -1",
        "pretrain --lr 0",
        "pretrain --lr 1000",
    ),
    case("--{} {}: must be {}", "pretrain --epochs x", "pretrain --epochs 5"),
    case("=unknown option --{}{}", "knn --nb_kn 5", "knn --nb_knn 5"),
    case("unknown option --{}{}{}", f"{LAUNCH} --epoch 5", f"{LAUNCH} --epochs 5"),
    case("--{} needs a value", "pretrain --config", "pretrain --epochs 5"),
    case("={} (see {} --help)", "pretrain --epochs x", "pretrain --epochs 5"),
    case(
        "there is no recipe for 384 pixels",
        "finetune --arch xcit_pico_6_p8_384",
        "finetune --arch xcit_pico_6_p8 --input_size 384",
    ),
    case(
        "--model_ema_decay must be below 1",
        "finetune --model_ema_decay 1",
        "finetune --model_ema_decay 0.99",
    ),
    case("--decoder cuda: RandAugment works", "finetune --decoder cuda", "finetune --decoder host"),
    case(
        "mixup pairs images, so it must be even",
        "finetune --batch_size_per_gpu 3 --mixup 0.8",
        "finetune --batch_size_per_gpu 4 --mixup 0.8",
        "finetune --batch_size_per_gpu 3 --mixup 0 --cutmix 0",
    ),
    case(
        "--input_size {}: {} needs a multiple",
        "finetune --input_size 100",
        "finetune --input_size 96",
    ),
    case(
        "--{} {}: {} needs a multiple of its patch size",
        f"pretrain {NETWORK} --global_crops_size 100",
        f"pretrain {NETWORK} --global_crops_size 96",
    ),
    case(
        "--output {}: the name must end in",
        "weights extract a.pth --output b.txt",
        "weights extract a.pth --output b.pth",
    ),
    case(
        "is PASSL's layout; drop the option",
        "weights convert a.pth --output b.pdparams --layout timm",
        "weights convert a.pth --output b.pdparams",
    ),
    case(
        "--drop_path_rate {}: must be at least 0 and below 1",
        "pretrain --drop_path_rate 1",
        "pretrain --drop_path_rate 0.9",
    ),
    case(
        "--fsdp: --precision fp16",
        "pretrain --fsdp true --precision fp16",
        "pretrain --fsdp true --precision bf16",
        "pretrain --fsdp true --precision fp32",
    ),
    case(
        "drop one of --group_backward and --use_bn_in_head",
        "pretrain --group_backward true --use_bn_in_head true",
        "pretrain --group_backward true",
        "pretrain --use_bn_in_head true",
    ),
    case(
        "with one view of an image there is nothing to compare",
        "pretrain --global_crops_number 1 --local_crops_number 0",
        "pretrain --global_crops_number 2 --local_crops_number 0",
        "pretrain --global_crops_number 1 --local_crops_number 2",
    ),
    case(
        "--{}{}: must not contain line breaks",
        f"{LAUNCH} --comment 'a\nb'",
        f"{LAUNCH} --comment 'a b'",
    ),
    case("--{}{} {}: must be from {} to 1e7", f"{LAUNCH} --nodes 0", f"{LAUNCH} --nodes 1"),
    case(
        "--signal_delay {}: must be at most half",
        f"{LAUNCH} --timeout 2 --signal_delay 90",
        f"{LAUNCH} --timeout 2 --signal_delay 60",
    ),
    case(
        "write KEY=VALUE, with KEY a long option",
        f"{LAUNCH} --slurm qos",
        f"{LAUNCH} --slurm licenses=a",
    ),
    case(
        "set by the launcher itself",
        f"{LAUNCH} --slurm signal=TERM --comment a",
        f"{LAUNCH} --comment a",
    ),
    case("--slurm {}: give --{} instead", f"{LAUNCH} --slurm time=60", f"{LAUNCH} --timeout 60"),
    case(
        "must not contain % or control", f"{LAUNCH} --output_dir a%j", f"{LAUNCH} --output_dir aj"
    ),
    case(
        "--{}.*: that stage is not in --stages",
        f"{LAUNCH} --knn.nb_knn 5",
        f"{LAUNCH} --stages pretrain,knn --knn.nb_knn 5",
    ),
    case(
        "name one or more stages, each once",
        f"{LAUNCH} --stages knn,knn",
        f"{LAUNCH} --stages pretrain,knn",
    ),
    case(
        "--stages: no stage {}{}",
        f"{LAUNCH} --stages pretrain,kn",
        f"{LAUNCH} --stages pretrain,knn",
    ),
    case(
        "--seeds: give each seed once",
        f"{LAUNCH} --seeds 1 1",
        f"{LAUNCH} --seeds 1 2 --stages pretrain",
    ),
    case(
        "--{}.output_dir: name the run folder, or add pretrain",
        "launch --stages knn",
        "launch --stages knn --knn.output_dir {run}",
        f"{LAUNCH} --stages pretrain,knn",
    ),
    case(
        "not an option of the launcher; for a stage write --{}.OPTION",
        "launch --stages knn --knn.output_dir {run} --nb_knn 5",
        "launch --stages knn --knn.output_dir {run} --knn.nb_knn 5",
    ),
    case(
        "=--config {}: {}",
        "pretrain --config {tmp}/none.yaml",
        "pretrain --config {run}/config.yaml",
    ),
    case(
        "--config {}: must hold lines of 'name: value'",
        "pretrain --config {tmp}/list.yaml",
        "pretrain --config {run}/config.yaml",
    ),
    case(
        "--config {}: not YAML",
        "pretrain --config {tmp}/broken.yaml",
        "pretrain --config {run}/config.yaml",
    ),
]

# -- answered by the command itself: the command is run --------------------------------------------

RUN = [
    case("no command {}{} (see xcit-dino --help)", "knm", "--help"),
    case(
        "holds no shards (*.tar); make some: xcit-dino shards make SRC {}",
        "shards check {empty}",
        "shards make {photos} {empty}",
        "shards check {empty}",
    ),
    case(
        "no {} shards there; make them with: xcit-dino shards make SRC {}",
        f"{EMBED} --data_path {{empty}} --split train",
        "shards make {photos} {empty}",
        f"{EMBED} --data_path {{empty}} --split train",
    ),
    case(
        "holds tars but no {}; make it with: xcit-dino shards check {}",
        f"{KNN} --data_path {{tars}}",
        "shards check {tars}/train",
        "shards check {tars}/val",
        f"{KNN} --data_path {{tars}}",
    ),
    case(
        "cannot be used ({}); build it again with: xcit-dino shards check {} --rebuild",
        f"{KNN} --data_path {{damaged}}",
        "shards check {damaged}/train --rebuild",
        f"{KNN} --data_path {{damaged}}",
    ),
    case(
        "images of several kinds: {}; {}, --pixels {} turns all into 8-bit RGB",
        "shards make {kinds} {tmp}/new",
        "shards make {kinds} {tmp}/deep --pixels 1xuint16",
        "shards make {kinds} {tmp}/new --pixels rgb8",
    ),
    case(
        "scenes of several kinds: {}; --pixels {} takes those alone",
        "shards make {kinds} {tmp}/new --tile 16",
        "shards make {kinds} {tmp}/deep --tile 16 --pixels 1xuint16",
        "shards make {kinds} {tmp}/new --tile 16 --pixels rgb8",
    ),
    case(
        "--pixels {}: the scenes are {}; leave it out, or name that one",
        "shards make {flat} {tmp}/new --tile 16 --pixels 2xuint16",
        "shards make {flat} {tmp}/new --tile 16",
        "shards make {flat} {tmp}/named --tile 16 --pixels 3xuint8",
    ),
    case(
        "{}: these images are {}, those of {} {}; --pixels {} takes them as such",
        "shards make {deep} {packed} --split test",
        "shards make {deep} {packed} --split test --pixels rgb8",
    ),
    case(
        "--{}: these are 8-bit images; --pixels 1xuint8 (or 3) reads it",
        "shards make {flat} {tmp}/new --nodata 0",
        "shards make {flat} {tmp}/new --nodata 0 --pixels 3xuint8",
    ),
    case(
        "is one set of shards, and {} needs another one",
        f"{KNN} --data_path {{shards}}/train",
        "shards make {parts} {empty}",
        f"{KNN} --data_path {{empty}}",
    ),
    case(
        "holds shards already; train on it with --data_path",
        "shards make {shards}/train {tmp}/new",
        f"{PRETRAIN} --data_path {{shards}}/train",
    ),
    case(
        "index them: xcit-dino shards check",
        "shards make {tars}/train {tmp}/new",
        "shards check {tars}/train",
    ),
    case(
        "give them with --labels FILE, or leave {} out with --splits {}",
        "shards make {mixed} {tmp}/new",
        "shards make {mixed} {tmp}/new --labels {mixed}.csv",
        "shards make {mixed} {tmp}/second --splits train=train",
    ),
    case(
        "--{}: the shards have an index already; add --rebuild",
        "shards check {damaged}/val --hash",
        "shards check {damaged}/val --hash --rebuild",
    ),
    case(
        "--label_column {}: {} has no such column",
        "shards make {flat} {tmp}/new --labels {mixed}.csv --label_column kind",
        "shards make {flat} {tmp}/new --labels {mixed}.csv --label_column label",
    ),
    case(
        "--label_column: there is no list of labels; give one with --labels",
        "shards make {flat} {tmp}/new --label_column label",
        "shards make {flat} {tmp}/new --label_column label --labels {mixed}.csv",
    ),
    case(
        "--splits {}: expected SPLIT=FOLDER",
        "shards make {parts} {tmp}/new --splits train",
        "shards make {parts} {tmp}/new --splits train=train",
    ),
    case(
        "--splits {}={}: {} has no images in such a folder",
        "shards make {parts} {tmp}/new --splits train=nothing",
        "shards make {parts} {tmp}/new --splits train=train",
    ),
    case(
        "--split {}: --splits says already",
        "shards make {parts} {tmp}/new --split val --splits train=train",
        "shards make {parts} {tmp}/new --splits train=train",
    ),
    case(
        "--label_map: {} has no labels",
        "shards make {flat} {tmp}/new --label_map {classes}",
        "shards make {flat} {tmp}/new",
    ),
    case(
        "no image of {} is in a class of --label_map",
        "shards make {photos} {tmp}/new --label_map {tmp}/others.txt",
        "shards make {photos} {tmp}/new --label_map {classes}",
    ),
    case(
        "is not in the split packed before into",
        "shards make {others} {trainonly} --split val",
        "shards make {others} {tmp}/another --split val",
    ),
    case(
        "the images have no labels, which an accuracy needs",
        f"{KNN} --data_path {{plain}}",
        "shards make {parts} {empty}",
        f"{KNN} --data_path {{empty}}",
    ),
    case(
        "fewer than one global batch of {}; lower --batch_size_per_gpu",
        f"{PRETRAIN} --data_path {{shards}} --batch_size_per_gpu 500",
        f"{PRETRAIN} --data_path {{shards}} --batch_size_per_gpu 96",
    ),
    case(
        "--shard_url pipe:COMMAND needs {shard} where",
        f"{PRETRAIN} --data_path {{shards}} --shard_url pipe:cat --cache_dir {{tmp}}/c",
        f"{PRETRAIN} --data_path {{shards}} --cache_dir {{tmp}}/c "
        "--shard_url 'pipe:cat {shards}/train/{{shard}}'",
    ),
    case(
        "--shard_url pipe:COMMAND needs --cache_dir",
        f"{PRETRAIN} --data_path {{shards}} --shard_url 'pipe:cat {{shards}}/train/{{{{shard}}}}'",
        f"{PRETRAIN} --data_path {{shards}} --cache_dir {{tmp}}/c "
        "--shard_url 'pipe:cat {shards}/train/{{shard}}'",
    ),
    case(
        "--cache_gb {} is too small",
        f"{PRETRAIN} --data_path {{shards}} --cache_dir {{tmp}}/c --cache_gb 1e-6 "
        "--shard_url 'pipe:cat {shards}/train/{{shard}}'",
        f"{PRETRAIN} --data_path {{shards}} --cache_dir {{tmp}}/c --cache_gb 1 "
        "--shard_url 'pipe:cat {shards}/train/{{shard}}'",
    ),
    case(
        "--arch: needed, as {} holds no config.yaml",
        f"knn --pretrained_weights {{weights}} {PLAIN} --output_dir {{tmp}}/o "
        "--data_path {shards}",
        f"{KNN} --data_path {{shards}}",
    ),
    case("--data_path: needed, as {} holds no config.yaml", KNN, f"{KNN} --data_path {{shards}}"),
    case(
        "holds no checkpoint: pretrain first, or name a file with --pretrained_weights",
        f"knn {NETWORK} {PLAIN} --nb_knn 5 --data_path {{shards}} --output_dir {{tmp}}/run",
        f"{PRETRAIN} --data_path {{shards}}",
        f"knn {NETWORK} {PLAIN} --nb_knn 5 --data_path {{shards}} --output_dir {{tmp}}/run",
        f"{KNN} --data_path {{shards}}",
    ),
    case(
        "--arch {}: only XCiT has class attention",
        "attention {flat} {tmp}/maps --arch timm/resnet18 --pretrained_weights {weights}",
        "attention {flat} {tmp}/maps --arch xcit_pico_6_p8 --pretrained_weights {weights} "
        "--device cpu --image_size 32",
    ),
    case(
        "--tile {}: must be a multiple of the patch, {}; take {}",
        "attention {flat} {tmp}/maps --arch xcit_pico_6_p8 --pretrained_weights {weights} "
        "--device cpu --tile 20",
        "attention {flat} {tmp}/maps --arch xcit_pico_6_p8 --pretrained_weights {weights} "
        "--device cpu --tile 16",
    ),
    case(
        "is missing: the folder that xcit-dino shards make wrote",
        PRETRAIN,
        f"{PRETRAIN} --data_path {{shards}}",
    ),
    case(
        "timm has no such policy",
        f"{FINETUNE} --data_path {{shards}} --aa wrong",
        f"{FINETUNE} --data_path {{shards}} --aa rand-m9-mstd0.5-inc1",
    ),
    case(
        "--teacher_path is missing: timm has no weights for our",
        f"{DISTILL} --data_path {{shards}} --teacher_model xcit_pico_6_p8",
        f"{FINETUNE} --data_path {{shards}}",
        f"{DISTILL} --data_path {{shards}} --teacher_model xcit_pico_6_p8 "
        "--output_dir {tmp}/distilled --teacher_path {tmp}/tuned",
    ),
    case(
        "=--objective {}: names no teacher; add --teacher_model timm/NAME, or a built-in one with "
        "its --teacher_path",
        f"{UNLABELED} --objective distill",
        f"{FINETUNE} --data_path {{shards}}",
        f"{UNLABELED} --objective distill --teacher_model xcit_pico_6_p8 "
        "--teacher_path {tmp}/tuned",
    ),
    case(
        "name a teacher of these classes with --teacher_path",
        f"{DISTILL} --data_path {{shards}} --teacher_model regnety_160.deit_in1k",
        f"{FINETUNE} --data_path {{shards}}",
        f"{DISTILL} --data_path {{shards}} --teacher_model xcit_pico_6_p8 "
        "--output_dir {tmp}/distilled --teacher_path {tmp}/tuned",
    ),
    case(
        "has {} classes, and the data have {}; train a head on these data",
        f"evaluate {BARE} --data_path {{shards}} --head {{heads}}/other.pth",
        f"linear {BARE} --data_path {{shards}} --epochs 1 --lrs 0.1 --layers cls",
        f"evaluate {BARE} --data_path {{shards}} --head {{tmp}}/out/linear_head.safetensors",
    ),
    case(
        "name the backbone it belongs to with --arch and --pretrained_weights",
        f"evaluate {BARE} --data_path {{shards}} --head {{heads}}/wide.pth",
        f"linear {BARE} --data_path {{shards}} --epochs 1 --lrs 0.1 --layers cls",
        f"evaluate {BARE} --data_path {{shards}} --head {{tmp}}/out/linear_head.safetensors",
    ),
    case(
        "but the model is {}; change --arch or the file",
        f"{KNN} --data_path {{shards}} --arch xcit_nano_12_p16",
        f"{KNN} --data_path {{shards}}",
    ),
    case(
        "finetune these with --new_head true",
        f"{FINETUNE} --data_path {{shards}} --pretrained_weights {{heads}}/classifier.pth",
        f"{FINETUNE} --data_path {{shards}} --pretrained_weights {{heads}}/classifier.pth "
        "--new_head true",
    ),
    case(
        "or take the backbone alone with --new_head true",
        f"{PRETRAIN} --data_path {{shards}} --init_from {{run}} --out_dim 64",
        f"{PRETRAIN} --data_path {{shards}} --init_from {{run}} --out_dim 32",
        f"{PRETRAIN} --data_path {{shards}} --init_from {{run}} --out_dim 64 --new_head true "
        "--output_dir {tmp}/other",
    ),
    case(
        "does not fit {} ({}); check --arch and the file",
        f"{KNN} --data_path {{shards}} --pretrained_weights {{heads}}/half.pth",
        f"{KNN} --data_path {{shards}}",
    ),
    case(
        "--prefix {}: no such names in",
        "weights extract {weights} --output {tmp}/a.pth --prefix nothing",
        "weights extract {weights} --output {tmp}/a.pth --prefix student",
    ),
    case(
        "timm has no {}; it has patch 8 and 16 of the paper",
        "weights convert {weights} --output {tmp}/a.pth --layout timm",
        "weights convert {weights} --output {tmp}/a.pth --layout official",
    ),
    case(
        "--results {}: cannot be read ({})",
        "weights export {weights} --output {tmp}/a.safetensors --results {tmp}/none",
        "weights export {weights} --output {tmp}/a.safetensors",
    ),
    case(
        "says where the shards of train lie, not those of val",
        f"{KNN} --data_path {{away}} --cache_dir {{tmp}}/c "
        "--shard_url 'pipe:cat {shards}/train/{{shard}}'",
        f"{KNN} --data_path {{away}} --cache_dir {{tmp}}/c "
        "--shard_url 'pipe:cat {shards}/{{split}}/{{shard}}'",
    ),
    case(
        "--nb_knn {}: ",
        f"knn {BARE} --data_path {{shards}} --nb_knn 500",
        f"knn {BARE} --data_path {{shards}} --nb_knn 96",
    ),
    case(
        "=--output {}: {}",
        "report {run} --output {classes}/report.html",
        "report {run} --output {tmp}/report.html",
    ),
    case(
        "use --device cpu, or check CUDA_VISIBLE_DEVICES",
        f"{KNN} --data_path {{shards}} --device cuda",
        f"{KNN} --data_path {{shards}} --device cpu",
    ),
    case(
        "--device mps: this torch sees no GPU of a Mac",
        f"{KNN} --data_path {{shards}} --device mps",
        f"{KNN} --data_path {{shards}} --device cpu",
    ),
    case(
        "--precision fp16 needs a GPU",
        f"{PRETRAIN} --data_path {{shards}} --precision fp16",
        f"{PRETRAIN} --data_path {{shards}} --precision bf16",
    ),
    case(
        "--decoder cuda needs CUDA",
        f"{PRETRAIN} --data_path {{shards}} --decoder cuda",
        f"{PRETRAIN} --data_path {{shards}} --decoder host",
    ),
    case(
        "=--decoder cuda needs CUDA; use --decoder host",
        f"linear {BARE} --data_path {{shards}} --epochs 1 --lrs 0.1 --layers cls --protocol dino "
        "--decoder cuda --batch_size_per_gpu 48",
        f"linear {BARE} --data_path {{shards}} --epochs 1 --lrs 0.1 --layers cls --protocol dino "
        "--decoder host --batch_size_per_gpu 48",
    ),
    case(
        "--cache_gb {} is too small: two windows of {} shards take {} GB; raise it",
        f"{KNN} --data_path file://{{shards}} --cache_dir {{tmp}}/c --cache_gb 1e-6",
        f"{KNN} --data_path file://{{shards}} --cache_dir {{tmp}}/c --cache_gb 0.01",
    ),
    case(
        "--compile on: this backbone has no blocks",
        f"{PRETRAIN} --data_path {{shards}} --arch timm/resnet18 --compile on "
        "--global_crops_size 32 --local_crops_size 32",
        f"{PRETRAIN} --data_path {{shards}} --arch timm/resnet18 --compile auto "
        "--global_crops_size 32 --local_crops_size 32",
    ),
    case(
        "choose another folder, or allow it with --may_change",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}} --lr 0.1 --epochs 2",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}} --lr 0.1 --epochs 2 "
        "--may_change lr epochs",
    ),
    case(
        "=--output_dir {}: {}",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{classes}}/run",
        f"{PRETRAIN} --data_path {{shards}}",
    ),
    case(
        "--may_change {}: no such option{}",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}} --lr 0.1 --may_change lrs",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}} --lr 0.1 --may_change lr",
    ),
    case(
        "the global batch is {} and was {}",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}} --batch_size_per_gpu 24",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}} --batch_size_per_gpu 24 "
        "--accum_iter 2",
        f"{PRETRAIN} --data_path {{shards}} --batch_size_per_gpu 24",
    ),
    case(
        "--data_path: the shards changed under this run",
        f"{PRETRAIN} --data_path {{redrawn}} --output_dir {{run}}",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{run}}",
        f"{PRETRAIN} --data_path {{shards}} --output_dir {{tmp}}/another",
    ),
    case(
        "--output_dir {}: contains no run; add pretrain to --stages",
        "launch --cluster local --stages report --report.output_dir {tmp}/none",
        f"{LAUNCH} --output_dir {{tmp}}/none --stages pretrain,report",
    ),
    case(
        "--data_path: name the folder with the shards (xcit-dino shards make)",
        f"launch {NETWORK} --ngpus 0 --cluster local --output_dir {{tmp}}/r",
        "shards make {photos} {empty}",
        f"{LAUNCH} --data_path {{empty}}",
    ),
    case(
        "--nodes {}: one machine is one node; give --cluster slurm",
        f"{LAUNCH} --nodes 2 --cluster local",
        f"{LAUNCH} --nodes 2 --cluster slurm",
    ),
    case(
        "the global batch of {} exceeds the {} images of {}; lower it",
        f"launch {NETWORK} --ngpus 0 --cluster local --data_path {{shards}} "
        "--batch_size_per_gpu 97 --output_dir {tmp}/r",
        f"{PRETRAIN} --data_path {{shards}} --batch_size_per_gpu 96",
    ),
    case(
        "with GPUs, each has one process; leave --nproc out",
        f"launch {NETWORK} --cluster slurm --dry_run --ngpus 2 --nproc 2",
        f"launch {NETWORK} --cluster slurm --dry_run --ngpus 2",
        f"launch {NETWORK} --cluster slurm --dry_run --ngpus 0 --nproc 2",
    ),
    case(
        "--cluster debug is one process; give",
        f"{LAUNCH} --cluster debug --nproc 2",
        f"{LAUNCH} --cluster debug --nproc 1",
        f"{LAUNCH} --cluster local --nproc 2",
    ),
    case(
        "--ngpus {}: a node has {}; {}",
        f"launch {NETWORK} --cluster local --dry_run --ngpus 2",
        f"launch {NETWORK} --cluster local --dry_run",
    ),
    # images that are not 8-bit RGB
    case(
        "--bands {}: the images have channels 1 to {}",
        f"{PRETRAIN} --data_path {{bands}} --bands 6",
        f"{PRETRAIN} --data_path {{bands}} --bands 5",
    ),
    case(
        "--bands {}: name each channel once",
        f"{PRETRAIN} --data_path {{bands}} --bands 5 4 5",
        f"{PRETRAIN} --data_path {{bands}} --bands 5 4",
    ),
    case(
        "have no saturation and hue; take --color_jitter",
        f"{PRETRAIN} --data_path {{bands}} --color_jitter 0.4 0.3 0.2 0.1",
        f"{PRETRAIN} --data_path {{bands}} --color_jitter 0.4 0.3 0 0",
    ),
    case(
        "--{}: images of {} channel{} ({}) {}; leave it out",
        f"{PRETRAIN} --data_path {{bands}} --gray_prob 0.3",
        f"{PRETRAIN} --data_path {{bands}}",
    ),
    case(
        "--{}: {} values, and the images have {} channel{} ({}); give one of each",
        f"{PRETRAIN} --data_path {{bands}} --mean 0.5 0.5 0.5",
        f"{PRETRAIN} --data_path {{bands}} --mean 0.5 0.5 0.5 0.5 0.5",
    ),
    case(
        "--{}: timm's operations are made for 8-bit RGB",
        f"{FINETUNE} --data_path {{bands}} --aa 3a",
        f"{FINETUNE} --data_path {{bands}}",
    ),
    case(
        "--pretrained_weights: the network takes {} channels",
        "knn --output_dir {run} --data_path {bands} --nb_knn 5 --num_workers 0 --device cpu",
        "knn --output_dir {run} --data_path {bands} --nb_knn 5 --num_workers 0 --device cpu "
        "--bands 3 2 1",
    ),
    case(
        "--show_channels {}: 8-bit RGB images are shown as they are; leave it out",
        f"{EMBED} --data_path {{shards}} --show_channels 1 2 3",
        f"{EMBED} --data_path {{shards}}",
    ),
    case(
        "--show_channels {}: name three of the channels 1 to {}",
        f"{EMBED} --data_path {{bands}} --bands 1 2 3 --show_channels 1 2",
        f"{EMBED} --data_path {{bands}} --bands 1 2 3 --show_channels 1 2 3",
    ),
]

# -- not run here, and why -------------------------------------------------------------------------

ELSEWHERE = {
    "=--{}: {}": "paths that are empty, or of no user: test_paths.py",
    "--device mps: takes one process, not {}": "a Mac: test_mps.py",
    "--head {}: was trained on features of another": "a line of a command that goes on: "
    "test_classify.py",
    "--layers {}: {} has its output only; use": "weights of another network: test_linear.py",
    "--container {}: no such file; build it from apptainer.def": "a container: "
    "test_launch_options.py",
    "--container: cannot mount {}, whose name has a colon or comma": "a container: "
    "test_launch_options.py",
    "--container: makes containers on SLURM only": "a container: test_launch_options.py",
    "--window {}: values lie between -1e9 and 1e9": "test_fuzz.py, with every number",
    "--boxes {}: no XML files in it": "masks and boxes: test_targets.py",
    "--boxes {}: no such file or folder": "masks and boxes: test_targets.py",
    ": not COCO's JSON of images, annotations and categories (": "masks and boxes: test_targets.py",
    "--boxes {}: other categories than in {}": "masks and boxes: test_targets.py",
    "=--boxes {}: {}": "masks and boxes: test_targets.py",
    ", which is not among its categories": "masks and boxes: test_targets.py",
    "--boxes {}: {} is listed twice": "masks and boxes: test_targets.py",
    "--boxes: name JSON files, or folders of XML, not both": "masks and boxes: test_targets.py",
    "names is that of an image (the first is": "masks and boxes: test_targets.py",
    "; name the folder of one kind of images as SRC": "masks and boxes: test_targets.py",
    "--boxes: {}.xml is in two folders": "masks and boxes: test_targets.py",
    "; pack them with: xcit-dino shards make SRC DST": "masks and boxes: test_targets.py",
    "of --masks mean? Give a file with one class name per": "masks and boxes: test_targets.py",
    "--mask_classes {}: no such file, and no convention of": "masks and boxes: test_targets.py",
    '--mask_classes {}: not of the form {"road": 0, "car":': "masks and boxes: test_targets.py",
    "--mask_classes {}: one class per line, each once, no": "masks and boxes: test_targets.py",
    ": values are numbers from 0 to 65535, or colors as": "masks and boxes: test_targets.py",
    "--mask_classes {}: {} classes; 1 to {} are possible": "masks and boxes: test_targets.py",
    "--mask_classes {}: {} stands for {} and {}": "masks and boxes: test_targets.py",
    "--mask_ignore {}: --mask_classes has it for {}": "masks and boxes: test_targets.py",
    "--masks and --boxes: an image has one target; pack two": "masks and boxes: test_targets.py",
    "--masks {}: no images (PNG, BMP, GIF, TIFF) in it": "masks and boxes: test_targets.py",
    "--masks {}: no such folder, neither here nor in {}": "masks and boxes: test_targets.py",
    "masks has the name of an image (the first mask is": "masks and boxes: test_targets.py",
    "; name the folder of one kind of masks": "masks and boxes: test_targets.py",
    "--masks: {} holds no images beside them": "masks and boxes: test_targets.py",
    "; leave it out (training and evaluation resize both)": "masks and boxes: test_targets.py",
    "--splits {}={}: no such file, neither here nor in {}": "masks and boxes: test_targets.py",
    "lines names an image of": "masks and boxes: test_targets.py",
    "--splits {}={}: {} is in {} too": "masks and boxes: test_targets.py",
    "--splits {}={}: {} may be {} or {}; write the folder too": "masks and boxes: test_targets.py",
    "--splits: name folders or text files, not both": "masks and boxes: test_targets.py",
    "--{}: there are no --masks": "masks and boxes: test_targets.py",
    "{} {}: the first must be below the second": "test_pixels.py, with every window",
    "takes LOW HIGH, or that for each of {} channels": "test_pixels.py, with every window",
    "a number, or a percentile such as p0.1": "test_pixels.py, with every window",
    "a percentile lies between p0 and p100": "test_pixels.py, with every window",
    "8-bit RGB images have no stored percentiles": "test_pixels.py, with every window",
    "--logger {}: is not installed: pip install": "the tests have the package: test_trackers.py",
    "--logger {}: not everything was sent within": "a server that hangs: test_trackers.py",
    "--logger {}: does not answer": "a server that hangs: test_trackers.py",
    "--logger {}: {}; training continues without it": "a server that fails: test_trackers.py",
    # videos and their masks: test_propagate.py
    **dict.fromkeys(
        [
            "--arch {}: does not accept images of {} x {} pixels",
            "--masks {}: no such file or folder",
            "holds several videos; name a folder with a folder of masks for each",
            "--masks: name the frames with --videos too",
            "--masks: needed, as {} is not DAVIS 2017",
            "--masks: not beside DAVIS 2017, which has its own; leave it out",
            "--tap {}: {} has layers 0 to {}, and -1 for its output",
            "--videos {}: holds no frames",
            "--videos {}: no such folder",
            "is missing; unpack DAVIS 2017 there",
            "--videos {}: {} names no video",
            "--videos {}: {} names {}, not a folder",
            "=--videos {}: {}: {}{}",
            "--videos: name the folder of DAVIS 2017, or a folder of frames",
        ],
        "test_propagate.py",
    ),
    # patches and attention masks
    "--patches true: about {} GB, and {} has {} GB free; choose": "a full disk: test_patches.py",
    "--background {}: no such class; there are {}": "shards with masks: test_masks.py",
    "no mask has a class besides --background {}": "shards with masks: test_masks.py",
    # classes of the data in a head of others
    **dict.fromkeys(
        [
            "--label_map {}: lacks {} classes of the data",
            "--label_map {}: must be {",
            "--label_map {}: names output {}, and the head has outputs 0 to {}",
            "--label_map {}: output {} stands for two classes",
            "--label_map: the data have numbers for classes, no names",
        ],
        "test_classify.py",
    ),
    # several labels an image
    **dict.fromkeys(
        [
            "--labels: an image has these or --{}; leave one of them out",
            "--{} and --{}: an image has one target; pack two sets",
            "--{} {}: its first line must name the columns",
            "--values {}: {} is a number; name a column of numbers with --label_column",
            "--multi_labels {}: which column holds the labels ({})",
        ],
        "test_several.py",
    ),
    **dict.fromkeys(
        [
            "--data_path {}: its images have no lists of labels",
            "--data_path {}: the images have {}, which are for `xcit-dino knn`",
            "--head {}: its labels are {}, and those of the data {}",
            "--label_map: not for images with several labels or values; leave it out",
            "--labels_per_class: not for images with several labels or values; leave it out",
            "--data_path: {} have different kinds of labels; pack both alike",
            "--data_path: no label of val is one that some images have and some lack",
            "--data_path: {} have different labels; pack both from one table",
        ],
        "test_several_labels.py",
    ),
    # a validation set from a source without one
    **dict.fromkeys(
        [
            "--group_column {}: needs a list with columns",
            "--group_column {}: there is nothing to divide; add --val_fraction 0.2",
            "--group_column {}: {} images have no value in {}",
            "--val_fraction {}: leaves {} without images",
            "--val_fraction: with --split {} there is one split only",
            "--val_fraction: {} has {} already",
            "--label_column {}: --group_column names it too",
            "--values {}: {} has two rows, {}; keep one row for each image",
        ],
        "test_groups.py",
    ),
    # images to search
    **dict.fromkeys(
        [
            "--arch {}: does not accept images of {} x {} pixels",
            "--bank: name the folder of the images to search",
            "--distractors {}: {} of its images are in the bank already",
            "--whitening {}: {} images for {} features; as many as features",
            "--whitening {}: {} of its images are searched too",
            "--bank {}: no copy of an image in {} is in the other folders",
            "--bank {}: {} of its images are missing, among them {}; unpack them there",
            "--relevant {}: cannot be read ({})",
            "--relevant {}: has no column {}",
            "--relevant {}: {} of its names are not among the images",
            "=--{} {}: holds no images",
            "=--{} {}: no such folder",
            "--{}: name the images to search with --bank too",
            "--{}: not beside {}, which has its own; leave it out",
        ],
        "test_retrieve.py",
    ),
    "=--{} {}; name the folder {}": "folders of stages: test_retrieve.py",
    # layers of a backbone
    **dict.fromkeys(
        [
            "--arch: maps of stride {} do not fit a pyramid",
            "--arch: {} gives no maps of its layers",
            "--arch: {} does not accept images of {} x {} pixels ({})",
            "--taps {}: {} has layers 0 to {}, and -1 for its output",
        ],
        "test_dense.py",
    ),
    # images that are not 8-bit RGB
    "--bands: the images are read as 8-bit RGB; pack them": "packs anew: test_native_loader.py",
    "--channel_drop_prob: the images have one channel": "such a set: test_native_runs.py",
    "holds images of another kind ({}) than the other split": "such a set: test_native_runs.py",
    "--data_path: the splits hold different kinds of images": "such a set: test_native_runs.py",
    "--decoder cuda: decodes 8-bit RGB only": "needs CUDA: test_native_loader.py",
    # of the launcher: need SLURM, several ranks, or a second process
    "--cluster slurm: SLURM does not respond": "test_launch.py turns SLURM off and on",
    "SLURM does not respond here ({})": "test_launch.py turns SLURM off and on",
    "; see `xcit-dino launch status`": "test_launch.py, with a live process",
    "is already called {}; give another --job_name": "needs a queue: test_slurm_cluster.py",
    "--partition {}: no such partition": "needs a queue: test_slurm_cluster.py",
    "a global batch of {} does not divide among": "needs a job that shrank: test_job.py",
    "a node has {}; using {}": "says what is done, and asks nothing",
    "no index.json there, as seen from this machine": "part of a dry run's answer: test_launch.py",
    "--data_path is not given": "part of a dry run's answer: test_launch.py",
    "contains an earlier rehearsal; remove it": "needs a rehearsal of minutes: test_launch.py",
    "no progress; see: xcit-dino launch status": "comes after an hour in a queue",
    "has no such log": "needs a finished job: test_launch.py",
    "the result above is not stored, as {} cannot be written": "a disk that fails: test_results.py",
    "{}: {}; free it, or name another folder with --output_dir": "a full disk: test_features.py",
    "instead of {} features; take another --arch": "no such network at hand",
    "--output {}: exists; name a new folder": "test_timm_folder.py, with such a folder",
    "--format timm-hub: timm has no {}": "says what timm has: test_timm_folder.py",
    "does not say which network of timm it holds; add": "test_timm_folder.py, with such a file",
    "--layer_decay: this backbone does not say its layers": "no such network: test_optim.py",
    "--epochs {}: ends at step {}, and the run in {} is": "a run that is further: test_segment.py",
    "keep --layer_decay as it was, or start": "needs --may_change on a run: test_start.py",
    "--arch {}: it cannot be trained ({})": "no such network at hand: test_timm_backbones.py",
    "--{} {}: {} does not accept images of that size": "networks of timm for one size: test_zoo.py",
    "xcit-dino knn makes them (embed, if there are no labels)": "needs a report with pictures: "
    "test_report.py",
    # need several processes, GPUs or a fault
    "whose statistics cannot be shared among processes": "needs several ranks: test_syncbn.py",
    "found other shards there than rank 0": "needs several ranks: test_run.py",
    "cannot be split evenly over": "needs several ranks: test_loader.py",
    "process {} of this node has no GPU of its own": "needs GPUs",
    "is in use by {}; wait for it": "needs a second process: test_lock.py",
    "non-finite gradients in all {} steps": "a diverging run: test_log.py",
    "loader workers died {} times": "killed workers: test_faults_inside.py",
    "no image can be read in place of an unreadable one": "damaged shards: test_loader.py",
    "and had {} when it was indexed (xcit-dino shards check": "truncated shards: test_storage.py",
    "--data_path {}: not one image can be read": "needs a validation set of damaged images",
    "=--init_from {}: {}": "a warning of a run: test_native_runs.py",
    "in bf16 on a CPU, torch computes wrong gradients": "a check of networks: "
    "tests/ssl/test_timm_backbones.py",
    "holds none of the values of {}; take --window p0.1 p99.9": "tests/data/test_pixels.py",
    "videos need PyAV": "needs PyAV to be missing: test_attention.py",
    "no alarms for collapse: --batch_size_per_gpu {}": "a warning of a run: test_sentinel.py",
    "--grad_checkpointing: this backbone does not support it": "no such backbone: test_compiler.py",
    # layouts and lists, whose remedies tests/data/test_layouts.py follows
    **dict.fromkeys(
        [
            "are both called like {}",
            "that folder holds splits itself; name them",
            "number the classes from 0 on, where they are packed with --label_map",
            "--label_column {}: no line of {} has it",
            "--label_column: {} comes with its labels",
            "--label_column: {} has no columns",
            "--labels folders: {} has no folders",
            "--labels {}: it holds labels in the order of the images",
            "--labels: {} is a list, which holds the labels itself",
            "--split {}: the rows of {} say the split",
            "--splits: {} is a list, whose rows say the split",
            "--splits: {} is one split; give the folder above it",
            "exists, and is no data set that torchvision downloads",
            "differ in case only; rename one, or say with --label_map",
            "none of its {} files exists",
            "could be {} or {}; write their paths",
            "looks like masks of the images",
            "could each be the label; choose with --label_column",
            "list these numbers in a file, one per line, and give --label_map",
        ],
        "a layout or a list",
    ),
    # columns, and members of foreign shards: test_columns.py and test_layouts.py choose others
    **dict.fromkeys(
        [
            "--image_key {}: that column of {} holds {}, not the bytes of images",
            "--image_key: {} is no Parquet or Arrow file with columns",
            "--label_column {}: that column of {} holds {}s; an image has one class",
            "--label_key {}: expected an extension such as cls or txt, or json:FIELD",
            "--label_key {}: no sample has such a label",
            "--label_key {}: {} different texts in {} samples are no classes",
            "--{} {}: {} has no such column",
            "hold images; choose with --image_key",
        ],
        "test_columns.py and test_layouts.py",
    ),
    "holds addresses of images, not images": "needs a download: tried with a local server",
    "--teacher_path: the frozen teacher changed under this run": "test_distillation.py",
    "--arch: the network expects {} channels": "weights for gray images: tests of the zoo",
    "and this run has {} and {}": "a warning that a run begins with",
    "outputs of the network are NaN or infinite": "finite weights that overflow: test_features.py",
    # data that a test of its own makes
    "--labels_per_class {}: the largest class has only {}": "test_metrics.py",
    "--data_path {}: fewer than two images can be read": "damaged shards",
    **dict.fromkeys(
        [
            "--exclude {}: {} is an image of {}; add a column called split",
            "--exclude {}: names none of the images",
            "--exclude {}: its column of splits holds",
            "--exclude {}: names all images of a split",
        ],
        "a list of images to leave out: test_pack.py",
    ),
    "--split {}: {} holds {}": "names what there is: test_pack.py",
    "continue from it with --init_from in another --output_dir": "test_forgetting.py follows it",
    "labels such as {} are quantities": "test_layouts.py, with such a list",
    "labels are numbers, but {} is none": "test_pack.py, with such a list",
    "have different class names; pack both with one label map": "test_features.py",
    "--data_path {}: holds no images": "an index of nothing: test_features.py",
    "--data_path {}: none of the images can be read": "damaged shards: test_embed.py",
    "has no {}; make shards with: xcit-dino shards make SRC": "another entry: test_index.py",
    # masks and boxes, and trainings on them, whose data their own tests make
    **dict.fromkeys(
        [
            "=--boxes {}: no XML files in it",
            "=--boxes {}: no such file or folder",
            "=--boxes {}: not COCO's JSON of images, annotations and categories ({}: {})",
            "=--boxes {}: other categories than in {}",
            "=--boxes {}: {}",
            "=--boxes {}: {} has a box of category {}, which is not among its categories",
            "--boxes {}: {} is listed twice",
            "--boxes: {} and {} may both be {}; name the folder that holds the images of",
            "=--boxes: name JSON files, or folders of XML, not both",
            "=--boxes: none of {} names is that of an image (the first is {}, the first image {})",
            "=--boxes: {} may be {} or {}; name the folder of one kind of images as SRC",
            "=--boxes: {}.xml is in two folders",
            "=--data_path {}: its images have {}; pack them with: xcit-dino shards make SRC DST {}",
            "--mask_classes is missing: what do the values {} of --masks mean? Give a file wi",
            "=--mask_classes {}: no such file, and no convention of that name ({})",
            '=--mask_classes {}: not of the form {"road": 0, "car": [1, 2]}',
            "=--mask_classes {}: one class per line, each once, no empty line",
            '=--mask_classes {}: values are numbers from 0 to 65535, or colors as "#0080ff"',
            "=--mask_classes {}: {} classes; 1 to {} are possible",
            "=--mask_classes {}: {} stands for {} and {}",
            "=--mask_ignore {}: --mask_classes has it for {}",
            "=--masks and --boxes: an image has one target; pack two sets",
            "=--masks {}: no images (PNG, BMP, GIF, TIFF) in it",
            "=--masks {}: no such folder, neither here nor in {}",
            "--masks: none of {} masks has the name of an image (the first mask is {}, the fi",
            "=--masks: {} and {} both have the name of {}; name the folder of one kind of masks",
            "=--masks: {} holds no images beside them",
            "--resize: would shrink images, not their {}; leave it out (training and evaluati",
            "=--splits {}={}: no such file, neither here nor in {}",
            "=--splits {}={}: none of its {} lines names an image of {} (the first is {})",
            "=--splits {}={}: {} is in {} too",
            "=--splits {}={}: {} may be {} or {}; write the folder too",
            "=--splits: name folders or text files, not both",
            "=--{}: there are no --masks",
        ],
        "masks or boxes beside images: test_targets.py",
    ),
    **dict.fromkeys(
        [
            "--hours {}: one epoch of {} images takes longer, at {}; take --hours {}",
            "=--gpus {}: this is measured on CPUs; leave it out",
            "--device cuda: not one image of {} fits into the GPU's memory",
            "of no image the size can be read; find out why: xcit-dino shards check",
        ],
        "a speed that is not this machine's, or damaged shards: test_recipe.py",
    ),
    **dict.fromkeys(
        [
            "=--arch: maps of stride {} do not fit a pyramid",
            "=--arch: {} gives no maps of its layers",
            "=--arch: {} does not accept images of {} x {} pixels ({})",
            "=--crop_size {}: {} with --head {} needs a multiple of {}, such as {}",
            "=--data_path {}: no image of it has an object",
            "=--data_path {}: no pixel of it counts",
            "--data_path {}: the classes of the {} have no names; write them to {}/target_",
            "--data_path {}: train and val have {} of different classes",
            "--data_path {}: no {} counts; pack validation images that have some",
            "=--data_path {}: skipped {}",
            "=--decoder cuda: {} are read on the host; use --decoder host",
            "=--finetune: a grid of learning rates shares one backbone; give one with --lrs {}",
            "=--fsdp: {} keeps all weights in each process; leave it out",
            "=--lrs: give one or more learning rates, each once",
            "=--short_sides: give one or more sides in pixels",
            "detect measures by pycocotools, which is not installed: pip install 'xcit-dino[",
            "=--scale must be two factors, 0.01 <= from <= to <= 100",
            "=--taps {}: {} has layers 0 to {}, and -1 for its output",
            "=--taps: --head {} takes four layers",
            "=--taps: a pyramid takes four layers",
            "=--taps: a pyramid takes four layers, not {}",
            "=--taps: strides {} do not go from fine to coarse",
        ],
        "shards with masks or boxes: test_segment.py, test_detect.py, test_dense.py",
    ),
}
