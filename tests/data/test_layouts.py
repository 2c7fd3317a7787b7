"""Folders, lists and archives as people have them: results, messages and refusals.

Images are named by a number; ``out`` says for each split which of them are in which class:
``"a:1,2 b:3"``, the classes in their order, ``-:1`` without labels. A row with ``refused`` has an
``out`` only if it has a ``remedy``: options that stand in the message word for word.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import unicodedata
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import simplejpeg

from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.io.storage import open_source, read_origin
from xcit_dino.data.shards.index import ShardIndex, printable, resolve_split
from xcit_dino.errors import InputError

JPEG = simplejpeg.encode_jpeg(np.full((8, 8, 3), 99, np.uint8), quality=80)
Files = str | dict[str, bytes]


def tar(names: str, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name in names.split():
            info = tarfile.TarInfo(name)
            info.size = len(JPEG)
            archive.addfile(info, io.BytesIO(JPEG))
    return buffer.getvalue()


def zipped(names: str, utf8: bool = True, **more: bytes) -> bytes:
    """A zip of images; without ``utf8`` as macOS writes it: UTF-8, but no flag says so."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names.split():
            archive.writestr(zipfile.ZipInfo(name), JPEG)
        for name, data in more.items():
            archive.writestr(name.replace("__", "."), data)
    data = bytearray(buffer.getvalue())
    for mark, at in ((b"PK\3\4", 7), (b"PK\1\2", 9)):  # flags, in both kinds of headers
        start = data.find(mark)
        while not utf8 and start >= 0:
            data[start + at] &= 0xF7
            start = data.find(mark, start + 1)
    return bytes(data)


@dataclass
class Layout:
    what: str
    files: Files
    """Names of images, and what else is on the disk."""
    out: dict[str, str] = field(default_factory=dict)
    options: str = ""
    src: str = "src"
    also: dict[str, bytes | str] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    refused: str = ""
    remedy: str = ""
    bad: int = 0
    """How many files are listed in quarantine.jsonl."""


TWO = {"train": "a:1 b:2", "val": "a:3 b:4"}
FLAT = "1.jpg 2.jpg 3.jpg 4.jpg"
SPLITS = [
    Layout("ImageFolder", "b/2.jpg a/1.jpg a/3.jpg", {"": "a:1,3 b:2"}),
    Layout("train and val", "train/a/1.jpg train/b/2.jpg val/a/3.jpg val/b/4.jpg", TWO),
    *(
        Layout(
            f"{train} and {val}",
            {f"{train}/a/1.jpg": JPEG, f"{train}/b/2.jpg": JPEG,
             f"{val}/a/3.jpg": JPEG, f"{val}/b/4.jpg": JPEG},
            TWO, said=tuple(f"split: {name}/ -> {split}" for name, split in
                            ((train, "train"), (val, "val")) if name != split),
        )
        for train, val in (
            ("Training", "Testing"), ("Train", "Val"), ("TRAIN", "TEST"), ("train", "test"),
            ("training", "validation"), ("train", "dev"), ("train set", "test set"),
            ("train_set", "test_set"), ("seg_train", "seg_test"), ("train2017", "val2017"),
            ("TrainImages", "ValImages"), ("train", "valid"), ("x-trn", "x-tst"),
            ("images_train", "images_val"), ("Train_Data", "Test_Data"),
        )
    ),
    Layout("seg_train/seg_train, as Kaggle unzips it",
           "seg_train/seg_train/a/1.jpg seg_train/seg_train/b/2.jpg seg_test/seg_test/a/3.jpg "
           "seg_test/seg_test/b/4.jpg", TWO),
    Layout("train/train", "train/train/a/1.jpg train/train/b/2.jpg test/test/a/3.jpg "
           "test/test/b/4.jpg", TWO),
    Layout("dataset/dataset/train", "d/d/train/a/1.jpg d/d/train/b/2.jpg d/d/test/a/3.jpg "
           "d/d/test/b/4.jpg", TWO),
    Layout("a third split", "seg_train/a/1.jpg seg_train/b/2.jpg seg_test/a/3.jpg seg_test/b/4.jpg "
           "seg_pred/5.jpg", TWO,
           refused="seg_test/ and seg_train/ are .* like a split, and beside it there is seg_pred/",
           remedy="--splits train=seg_train val=seg_test"),
    Layout("train, val and test", "train/a/1.jpg train/b/2.jpg val/a/3.jpg val/b/4.jpg "
           "test/a/5.jpg", TWO, said=("skipped: 1 images in test/, because val/ is the "
                                      "validation set",)),
    Layout("train, val and test, which one chooses", "train/a/1.jpg train/b/2.jpg val/a/5.jpg "
           "val/b/6.jpg test/a/3.jpg test/b/4.jpg", TWO, options="--splits train=train val=test",
           said=("skipped: 2 images outside --splits",)),
    Layout("a test set of its own", "train/a/1.jpg val/a/2.jpg train/b/3.jpg test/a/4.jpg",
           {"train": "a:1 b:3", "val": "a:2 b:", "test": "a:4 b:"},
           options="--splits train=train val=val test=test"),
    Layout("train twice", "train/a/1.jpg Training/a/2.jpg train/b/3.jpg test/a/4.jpg",
           {"train": "-:2"}, refused="Training and train are both called like train",
           remedy="--splits train=Training"),
    Layout("classes called train and car", "airplane/1.jpg bus/2.jpg car/3.jpg train/4.jpg",
           {"": "airplane:1 bus:2 car:3 train:4"}, refused="train/ is called like a split",
           remedy="--splits none"),
    Layout("classes called train and test", "train/1.jpg test/2.jpg", {"": "test:2 train:1"},
           options="--splits none"),
    Layout("a bullet train is a class", "bullet_train/1.jpg test-tube/2.jpg",
           {"": "bullet_train:1 test-tube:2"}),
    Layout("class first", "a/train/1.jpg b/train/2.jpg a/test/3.jpg b/test/4.jpg", TWO,
           said=("split: */test/ -> val", "split: */train/ -> train")),
    Layout("class first, with more", "a/train/1.jpg b/train/2.jpg a/test/3.jpg b/test/4.jpg "
           "a/masks/5.jpg", TWO, refused="test/ and train/ are called like a split, and beside it "
           "there is a/masks/", remedy="--splits 'train=*/train' 'val=*/test'"),
    Layout("a stray image", "train/a/1.jpg train/b/2.jpg val/a/3.jpg val/b/4.jpg cover.jpg", TWO,
           said=("skipped: 1 files outside train and val",)),
    Layout("one class in one split", "train/a/1.jpg train/b/2.jpg val/a/3.jpg",
           {"train": "a:1 b:2", "val": "a:3 b:"},
           said=("class 'b' of train without images in val",)),
    Layout("one class in the training set", "train/a/1.jpg train/a/2.jpg test/a/3.jpg test/b/4.jpg",
           {"train": "a:1,2 b:", "val": "a:3 b:4"}),
    Layout("one class, folders inside", "train/a/1.jpg train/b/2.jpg val/a/deep/3.jpg",
           {"train": "a:1 b:2", "val": "a:3 b:"}),
    Layout("one class only", "cats/1.jpg cats/2.jpg", {"": "-:1,2"},
           said=("no labels: all images lie in one folder, cats/", "2 images without labels")),
    Layout("one class only, labeled", "cats/1.jpg cats/2.jpg", {"": "cats:1,2"},
           options="--labels folders"),
    Layout("folders that are no classes", "2021/1.jpg 2022/2.jpg", {"": "-:1,2"},
           options="--labels none"),
    Layout("a class that only val has", "train/a/1.jpg train/b/2.jpg val/a/3.jpg val/c/4.jpg",
           {"train": "a:1 b:2 c:", "val": "a:3 b: c:4"},
           said=("class 'c' of val without images in train",)),
    Layout("unlabeled test", "train/a/1.jpg train/b/2.jpg test/3.jpg", {"train": "a:1 b:2"},
           refused="val has no labels, but train has", remedy="--splits train=train"),
    Layout("YOLO's images and labels", {"images/train/1.jpg": JPEG, "images/val/2.jpg": JPEG,
           "labels/train/1.txt": b"0 .5 .5 .1 .1", "labels/val/2.txt": b""},
           {"train": "-:1", "val": "-:2"}, said=("skipped: 2 .txt files",)),
    Layout("images and masks", "images/1.jpg masks/2.jpg", {"train": "-:1"},
           refused="masks/ beside images/ looks like masks", remedy="--splits train=images"),
    Layout("images and masks, each in splits", "images/train/1.jpg images/val/2.jpg "
           "masks/train/3.jpg masks/val/4.jpg", {"train": "-:1", "val": "-:2"},
           refused="masks/ beside images/ looks like masks",
           remedy="--splits train=images/train val=images/val"),
    Layout("splits, each with images and masks", "train/images/1.jpg train/masks/2.jpg "
           "val/images/3.jpg val/masks/4.jpg", {"train": "-:1", "val": "-:3"},
           refused="masks/ beside images/ looks like masks",
           remedy="--splits train=train/images val=val/images"),
    Layout("splits inside a split", "images/train/1.jpg images/val/2.jpg x/3.jpg", {},
           "--splits train=images", refused="holds splits itself; name them: "
           "--splits train=images/train val=images/val"),
    Layout("splits of unknown names", "Entrenamiento/a/1.jpg Entrenamiento/b/2.jpg Prueba/a/3.jpg "
           "Prueba/b/4.jpg", {"": "Entrenamiento:1,2 Prueba:3,4"},
           said=("Entrenamiento/, Prueba/ are taken for classes, though all hold folders of the "
                 "same names (a/, b/); if they are splits: --splits train=Entrenamiento "
                 "val=Prueba",)),
    Layout("splits of unknown names, named", "fold1/a/1.jpg fold1/b/2.jpg fold2/a/3.jpg "
           "fold2/b/4.jpg", TWO, "--splits train=fold1 val=fold2"),
    Layout("subfolders of the same names, without labels", "p1/left/1.jpg p1/right/2.jpg "
           "p2/left/3.jpg p2/right/4.jpg", {"": "-:1,2,3,4"}, "--labels none"),
    Layout("only test", "test/a/1.jpg test/b/2.jpg", {"val": "a:1 b:2"},
           said=("split: test/ -> val",)),
]  # fmt: skip
CLASSES = [
    Layout("species and subspecies", "cat/manx/1.jpg cat/sphynx/2.jpg dog/3.jpg",
           {"": "cat:1,2 dog:3"}),
    Layout("numbered classes", "1/1.jpg 2/2.jpg 10/3.jpg", {"": "1:1 10:3 2:2"},
           said=("as by ImageFolder: label 0 is '1'",)),
    Layout("hidden files", {"a/1.jpg": JPEG, "b/2.jpg": JPEG, "a/._1.jpg": b"\0" * 99,
           "__MACOSX/a/1.jpg": b"", "a/Thumbs.db": b"x", ".git/3.jpg": JPEG, "b/.DS_Store": b""},
           {"": "a:1 b:2"}, said=("skipped: 4 hidden files", "skipped: 1 .db files")),
    Layout("extensions", "a/1.JPG a/2.jpeg a/3.jfif b/4 b/5.jpg_large b/6.JPE",
           {"": "a:1,2,3 b:4,5,6"}, said=("2 files are images by their content",)),
    Layout("no images without an extension", {"a/1.jpg": JPEG, "b/2.jpg": JPEG, "a/README": b"x",
           "a/3.svg": b"<svg/>"}, {"": "a:1 b:2"},
           said=("1 no extension files", "1 .svg files")),
    Layout("an empty class folder", {"a/1.jpg": JPEG, "b/2.jpg": JPEG, "c/": b""}, {"": "a:1 b:2"},
           said=("skipped: empty folders, c/",)),
    Layout("case", "train/Cat/1.jpg train/dog/2.jpg val/cat/3.jpg val/dog/4.jpg",
           refused="classes 'Cat' and 'cat' differ in case only"),
    Layout("case, mapped", "train/Cat/1.jpg train/dog/2.jpg val/cat/3.jpg val/dog/4.jpg",
           {"train": "Cat/cat:1 dog:2", "val": "Cat/cat:3 dog:4"}, "--label_map {}/map.json",
           also={"../map.json": '{"Cat": 0, "cat": 0, "dog": 1}'}),
    Layout("Unicode, composed and not", {f"train/{unicodedata.normalize('NFC', 'é')}/1.jpg": JPEG,
           "train/z/2.jpg": JPEG, f"val/{unicodedata.normalize('NFD', 'é')}/3.jpg": JPEG,
           "val/z/4.jpg": JPEG}, {"train": "z:2 é:1", "val": "z:4 é:3"}),
    Layout("spaces", {"red fox/1.jpg": JPEG, "grey wolf/2.jpg": JPEG},
           {"": "grey_wolf:2 red_fox:1"}),
    Layout("a label map with a typing error", "a/1.jpg b/2.jpg c/3.jpg", {"": "a:1 bb:"},
           options="--label_map {}/map.txt", also={"../map.txt": "a\nbb\n"},
           said=("class 'bb' without images", "skipped: 2 images of classes 'b', 'c'")),
]  # fmt: skip
LABELLED = "--labels {}/l.csv"


def table(text: str | bytes) -> dict[str, bytes | str]:
    return {"../l.csv": text}


LISTS = [
    Layout("id,label without extension", FLAT, {"": "a:1,3 b:2,4"}, LABELLED,
           also=table("id,label\n1,a\n2,b\n3,a\n4,b\n")),
    Layout("pandas' index first", FLAT, {"": "a:1,3 b:2,4"}, LABELLED,
           also=table(",filename,label\n0,1.jpg,a\n1,2.jpg,b\n2,3.jpg,a\n3,4.jpg,b\n")),
    Layout("semicolons", FLAT, {"": "a:1,3 b:2,4"}, LABELLED,
           also=table("image;class\n1.jpg;a\n2.jpg;b\n3.jpg;a\n4.jpg;b\n")),
    Layout("tabs in a .csv", FLAT, {"": "a:1,3 b:2,4"}, LABELLED,
           also=table("image\tclass\n1.jpg\ta\n2.jpg\tb\n3.jpg\ta\n4.jpg\tb\n")),
    Layout("Latin-1", FLAT, {"": "ane:1,3 âne:2,4"}, LABELLED,
           also=table("image,class\n1.jpg,ane\n2.jpg,âne\n3.jpg,ane\n4.jpg,âne\n".encode("latin1")),
           said=("l.csv is not UTF-8; it was read as Windows-1252",)),
    Layout("UTF-16", FLAT, {"": "ane:1,3 âne:2,4"}, LABELLED,
           also=table("image,class\n1.jpg,ane\n2.jpg,âne\n3.jpg,ane\n4.jpg,âne\n".encode("utf-16"))),
    Layout("a mark of UTF-8", FLAT, {"": "a:1,3 b:2,4"}, LABELLED,
           also=table("\ufeffimage,class\n1.jpg,a\n2.jpg,b\n3.jpg,a\n4.jpg,b\n")),
    Layout("quotes, two words", FLAT, {"": "golden_retriever:1,3 pug,_black:2,4"}, LABELLED,
           also=table('image,class\n"1.jpg","golden retriever"\n"2.jpg","pug, black"\n'
                      '3.jpg,golden retriever\n4.jpg,"pug, black"\n')),
    Layout("backslashes and drives", "x/1.jpg x/2.jpg x/3.jpg x/4.jpg", {"": "a:1,3 b:2,4"},
           LABELLED, also=table("path,label\nx\\1.jpg,a\nC:\\d\\x\\2.jpg,b\nx/3.jpg,a\n4.jpg,b\n")),
    Layout("absolute paths of another machine", FLAT, {"": "a:1,3 b:2,4"}, LABELLED,
           also=table("path,label\n/content/1.jpg,a\n/content/2.jpg,b\n./3.jpg,a\n4.jpg,b\n")),
    Layout("numbers", FLAT, {"": "0:1,3 7:2,4"}, LABELLED,
           also=table("image,target\n1.jpg,0\n2.jpg,7\n3.jpg,0.0\n4.jpg,7.0\n")),
    Layout("HAM10000's columns", FLAT, {"": "mel:1,3 nv:2,4"}, LABELLED,
           also=table("lesion_id,image_id,dx,age\nL1,1,mel,80\nL2,2,nv,80\nL3,3,mel,70\nL4,4,nv,9\n"),
           refused="lesion_id, dx, age could each be the label", remedy="--label_column dx"),
    Layout("image,age,diagnosis", FLAT, {"": "mel:1,3 nv:2,4"}, LABELLED,
           also=table("image,age,diagnosis\n1,80,mel\n2,80,nv\n3,7,mel\n4,9,nv\n"),
           refused="age, diagnosis could each be", remedy="--label_column diagnosis"),
    Layout("one-hot", FLAT, {"": "BCC:1 MEL:2,4 NV:3"}, LABELLED,
           also=table("image,MEL,NV,BCC\n1,0.0,0.0,1.0\n2,1.0,0.0,0.0\n3,0.0,1.0,0.0\n4,1,0,0\n"),
           said=("labels of l.csv: 3 one-hot columns (MEL, NV, BCC)",)),
    Layout("quantities", FLAT, {"": "0.5:1,3 1.5:2,4"}, LABELLED,
           also=table("id,label\n1,0.5\n2,1.5\n3,0.5\n4,1.5\n") | {"../map.txt": "0.5\n1.5\n"},
           refused="labels such as 0.5 are quantities, not classes; choose another column with "
           "--label_column", remedy="--label_map {}/map.txt"),
    Layout("several labels in a cell", FLAT, {"": "cat:1 cat_dog:2 dog:3,4"}, LABELLED,
           also=table("id,label\n1,cat\n2,cat dog\n3,dog\n4,dog\n"),
           said=("label 'cat dog' is a class of its own, though 'cat' is one too: an image has one "
                 "class",)),
    Layout("label and label_name", FLAT, {"": "0:1,3 1:2,4"}, LABELLED,
           also=table("id,label,label_name\n1,0,cat\n2,1,dog\n3,0,cat\n4,1,dog\n"),
           said=("labels of l.csv: column label (not label_name; another with --label_column)",)),
    Layout("label_name", FLAT, {"": "cat:1,3 dog:2,4"}, f"{LABELLED} --label_column label_name",
           also=table("id,label,label_name\n1,0,cat\n2,1,dog\n3,0,cat\n4,1,dog\n")),
    Layout("one-hot, in words", FLAT, {"": "BCC:1 MEL:2,4 NV:3"}, LABELLED,
           also=table("image,MEL,NV,BCC\n1,False,False,True\n2,True,False,False\n"
                      "3,False,True,False\n4,True,False,False\n")),
    Layout("JSON of names and labels", FLAT, {"": "a:1,3 b:2,4"}, "--labels {}/l.json",
           also={"../l.json": '{"1.jpg": "a", "2.jpg": "b", "3": "a", "x/4.jpg": "b"}'}),
    Layout("StyleGAN's dataset.json", FLAT, {"": "0:1,3 5:2,4"}, "--labels {}/l.json",
           also={"../l.json": '{"labels": [["1.jpg", 0], ["2.jpg", 5], ["3.jpg", 0], '
                              '["4.jpg", 5]]}'}),
    Layout("JSON of records", FLAT, {"": "a:1,3 b:2,4"}, "--labels {}/l.json --label_column kind",
           also={"../l.json": json.dumps([{"file_name": f"{n}.jpg", "kind": "ab"[n % 2 - 1]}
                                          for n in (1, 2, 3, 4)])}),
    Layout("COCO's JSON", FLAT, {}, "--labels {}/l.json",
           also={"../l.json": '{"images": [{"id": 1}], "annotations": []}'},
           refused=r'l.json: expected {"NAME": label, ...}'),
    Layout("Latin-1 on the disk and in the list",
           {"src-1.jpg": JPEG, os.fsdecode(b"caf\xe9-2.jpg"): JPEG}, {"": "a:src-1 b:caf\\udce9-2"},
           LABELLED, also=table("name;label\nsrc-1.jpg;a\ncaf\xe9-2.jpg;b\n".encode("latin1")),
           said=("l.csv is not UTF-8; it was read as Windows-1252",)),
    Layout("a list of Latin-1 names", {"src-1.jpg": JPEG, os.fsdecode(b"caf\xe9-2.jpg"): JPEG},
           {"": "a:src-1 b:caf\\udce9-2"}, src="src/l.csv",
           also={"l.csv": "name;label\nsrc-1.jpg;a\ncaf\xe9-2.jpg;b\n".encode("latin1")}),
    *(
        Layout(f"metadata{suffix} beside the images", "train/1.jpg train/2.jpg test/x/3.jpg "
               "test/4.jpg", TWO,
               also={f"train/metadata{suffix}": one, f"test/metadata{suffix}": two},
               said=(f"labels are those of train/metadata{suffix}",))
        for suffix, one, two in (
            (".csv", "file_name,text,label\n1.jpg,x,a\n2.jpg,y,b\n",
             "file_name,text,label\nx/3.jpg,x,a\n4.jpg,y,b\n"),
            (".jsonl", '{"file_name": "1.jpg", "label": "a"}\n{"file_name": "2.jpg", "label": "b"}',
             '{"file_name": "x/3.jpg", "label": "a"}\n{"file_name": "4.jpg", "label": "b"}\n'),
        )
    ),
    Layout("metadata.csv with another column", FLAT, {"": "a:1,3 b:2,4"}, "--label_column kind",
           also={"metadata.csv": "file_name,kind,age\n1.jpg,a,3\n2.jpg,b,4\n3.jpg,a,3\n"
                                 "4.jpg,b,4\n"}),
    Layout("metadata.csv with captions", FLAT, {"": "-:1,2,3,4"},
           also={"metadata.csv": "file_name,text\n1.jpg,a cat\n2.jpg,a dog\n"},
           said=("metadata.csv has no column called label; not read: text",)),
    Layout("metadata.csv with captions, class folders", "a/1.jpg b/2.jpg", {"": "a:1 b:2"},
           also={"metadata.csv": "file_name,text\na/1.jpg,a cat\nb/2.jpg,a dog\n"},
           said=("metadata.csv has no column called label; not read: text",)),
    Layout("metadata.csv, not wanted", "a/1.jpg b/2.jpg", {"": "a:1 b:2"}, "--labels folders",
           also={"metadata.csv": "file_name,label\na/1.jpg,y\nb/2.jpg,x\n"}),
    Layout("several ones in a row", FLAT, {"": "0:1 1:2,3,4"}, LABELLED,
           also=table("image,MEL,NV\n1,0,1\n2,1,1\n3,1,0\n4,1,0\n"),
           refused="MEL, NV could each be the label", remedy="--label_column MEL"),
    Layout("no such column", FLAT, {}, f"{LABELLED} --label_column dz",
           also=table("image,dx\n1,a\n"), refused="dz: .*no such column; it has image, dx"),
    Layout("two labels for an image", FLAT, {}, LABELLED,
           also=table("filename,width,class\n1.jpg,9,a\n1.jpg,9,b\n"),
           refused="1.jpg has two labels, a and b"),
    Layout("rows without images, images without rows", FLAT, {"": "a:1 b:2"}, LABELLED,
           also=table("id,label\n1,a\n2,b\nx9,a\n"), bad=2,
           said=("skipped: 1 rows of l.csv that name no image (the first is x9)",)),
    Layout("a word among numbers", FLAT, {}, LABELLED,
           also=table("id,label\n1,0\n2,1\n3,x\n"), refused="labels are numbers, but 'x' is none"),
    Layout("far apart numbers", FLAT, {}, LABELLED,
           also=table("id,label\n1,0\n2,16000000\n3,0\n4,0\n"),
           refused="labels go up to 16,000,000, but only 2 different ones occur"),
    Layout("far apart numbers, listed", FLAT, {"": "0:1,3,4 16000000:2"},
           f"{LABELLED} --label_map {{}}/map.txt", also=table(
               "id,label\n1,0\n2,16000000\n3,0\n4,0\n") | {"../map.txt": "0\n16000000\n"}),
    Layout("one list for train and test", "train/1.jpg train/2.jpg test/3.jpg test/4.jpg", TWO,
           LABELLED, also=table("id,label\n1,a\n2,b\n3,a\n4,b\n")),
    Layout("flat train and its list", "train/1.jpg train/2.jpg", {"train": "a:1 b:2"}, LABELLED,
           also=table("id,label\n1,a\n2,b\n")),
    Layout("one name in two splits", "train/1.jpg train/2.jpg test/1.jpg", {}, LABELLED,
           also=table("id,label\n1,a\n2,b\n"), refused="1 could be test/1.jpg or train/1.jpg"),
    Layout("one name in two splits, by path", "train/1.jpg train/2.jpg test/1.jpg test/3.jpg",
           {"train": "a:1 b:2", "val": "a:3 b:1"}, LABELLED,
           also=table("path,label\ntrain/1.jpg,a\ntrain/2.jpg,b\ntest/1.jpg,b\ntest/3.jpg,a\n")),
    Layout("train.csv for train, test left out", "train/1.jpg train/2.jpg test/3.jpg",
           {"train": "a:1 b:2"}, f"{LABELLED} --splits train=train",
           also=table("id,label\n1,a\n2,b\n")),
    Layout("a list beside the images that was not asked for", FLAT, {"": "-:1,2,3,4"},
           also={"labels.csv": "id,label\n1,a\n"}, said=("no labels: labels.csv was not read",)),
    Layout("a list against the folders", "00/1.jpg 01/2.jpg", {"": "x:1 y:2"}, LABELLED,
           also=table("path,label\n00/1.jpg,x\n01/2.jpg,y\n"),
           said=("l.csv, not the folders' names",)),
    Layout("lines of path and number", FLAT, {"": "0:1,3 1:2,4"}, "--labels {}/l.txt",
           also={"../l.txt": "1.jpg 0\n2.jpg 1\n3.jpg 0\n4.jpg 1\n"}),
    Layout("a list as the source", FLAT, {"": "a:1,3 b:2"}, src="src/l.csv", bad=1,
           also={"l.csv": "file;label\n1.jpg;a\n2.jpg;b\n3.jpg;a\nsub\\4.jpg;b\n"}),
    Layout("a list with splits", FLAT, TWO, src="src/l.csv",
           also={"l.csv": "filepaths,labels,data set\n1.jpg,a,train\n2.jpg,b,train\n3.jpg,a,test\n"
                          "4.jpg,b,test\n"}, said=("splits by the column of l.csv: test -> val",)),
    Layout("train.txt of paths", FLAT, {"": "-:1,3"}, src="src/train.txt",
           also={"train.txt": "1.jpg\n3.jpg\n"}),
    Layout("metadata.jsonl of Hugging Face", FLAT, {"": "0:1,3 1:2"}, src="src/metadata.jsonl",
           also={"metadata.jsonl": "".join(json.dumps({"file_name": f"{n}.jpg", "label": n % 2 ^ 1})
                                           + "\n" for n in (1, 2, 3))}),
    Layout("ids only as the source", FLAT, {}, src="src/l.csv",
           also={"l.csv": "id,label\n1,a\n2,b\n"},
           refused="none of its 2 files exists .*shards make FOLDER DST --labels"),
]  # fmt: skip
ARCHIVES = [
    Layout("a tar a class", {"a.tar": tar("1.jpg 2.jpg"), "b.tar": tar("3.jpg")},
           {"": "a:1,2 b:3"}),
    Layout("gzip called .tar, .tar.gz, .tgz", {"a.tar": tar("1.jpg", "w:gz"),
           "b.tar.gz": tar("2.jpg", "w:gz"), "c.tgz": tar("3.jpg", "w:gz"), "d.tar": tar("4.jpg")},
           {"": "a:1 b:2 c:3 d:4"}),
    Layout("train.zip and test.zip", {"train.zip": zipped("a/1.jpg b/2.jpg"),
           "test.zip": zipped("a/3.jpg b/4.jpg")}, TWO),
    Layout("train.tar.gz", {"train.tar.gz": tar("a/1.jpg b/2.jpg", "w:gz")},
           {"train": "a:1 b:2"}, src="src/train.tar.gz"),
    Layout("a zip of macOS", {"x.zip": zipped("é/1.jpg z/2.jpg __MACOSX/é/._1.jpg", utf8=False)},
           {"": "z:2 é:1"}, src="src/x.zip", said=("skipped: 1 hidden files",)),
    Layout("a zip in a zip", {"x.zip": zipped("a/1.jpg b/2.jpg", train__zip=zipped("3.jpg"))},
           {"": "a:1 b:2"}, src="src/x.zip", bad=1),
    Layout("WebDataset shards", {"0.tar": tar("1.jpg 1.cls")}, {},
           refused="holds WebDataset shards; index them: xcit-dino shards check .*src$"),
    Layout("compressed WebDataset shards", {"0.tar.gz": tar("1.jpg 1.cls", "w:gz")}, {},
           src="src/0.tar.gz", refused=r"decompress them \(find .* -exec gunzip {} \+\), then"),
]  # fmt: skip
OPTIONS = [
    Layout("labels for class folders only", "train/a/1.jpg train/b/2.jpg", {}, "--label_column x",
           refused="--label_column: there is no list of labels"),
    Layout("labels and a list", FLAT, {}, "--labels {}/src/l.csv", src="src/l.csv",
           also={"l.csv": "path,label\n1.jpg,a\n"}, refused="--labels: .* is a list"),
    Layout("splits of a list", FLAT, {}, "--splits none", src="src/l.csv",
           also={"l.csv": "path,label\n1.jpg,a\n"}, refused="--splits: .* is a list"),
    Layout("quality without resize", FLAT, {}, "--quality 80", refused="--quality"),
    Layout("a seed without shuffling", FLAT, {}, "--seed 3 --shuffle false", refused="--seed"),
    Layout("root of a folder", FLAT, {}, "--root {}", refused="--root: .* is no data set"),
    Layout("download of a folder", FLAT, {}, "--download", refused="--download: "),
    Layout("a label map without labels", FLAT, {}, "--label_map {}/m", also={"../m": "a\n"},
           refused="--label_map: .* has no labels"),
    Layout("one split of two", "train/a/1.jpg val/a/2.jpg", {}, "--split holdout",
           refused="--split holdout: .* holds train and val"),
    Layout("split and splits", "x/a/1.jpg x/b/2.jpg", {}, "--split val --splits val=x",
           refused="--split val: --splits says"),
    Layout("splits that are not there", "x/a/1.jpg y/b/2.jpg", {}, "--splits train=z",
           refused="--splits train=z: .* no images in such a folder; it has x/a, y/b"),
    Layout("folders for a flat source", FLAT, {}, "--labels folders", refused="has no folders"),
]  # fmt: skip
LAYOUTS = SPLITS + CLASSES + LISTS + ARCHIVES + OPTIONS


def lay_out(layout: Layout, root: Path) -> None:
    images = layout.files
    files: dict[str, Any] = dict(images) if isinstance(images, dict) else {
        name: JPEG for name in images.split()
    }  # fmt: skip
    for name, data in (files | layout.also).items():
        path = root / "src" / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def described(dst: Path) -> dict[str, str]:
    """What was packed, in the notation of the table."""
    found = {}
    for path in sorted(dst.rglob("index.json")):
        index = ShardIndex.load(path.parent)
        numbers: dict[str, list[str]] = defaultdict(list)
        for name in index.classes or ():
            numbers[name] = []
        for shard in range(len(index.shards)):
            with tarfile.open(index.path(shard)) as archive:
                members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
            for name, data in members.items():
                if name.endswith(".json"):
                    label = int(members.get(name.replace(".json", ".cls"), b"-1"))
                    kind = index.classes[label] if index.classes else str(label)
                    kind = "-" if label < 0 else kind
                    numbers[kind].append(PurePosixPath(json.loads(data)["source"]).stem)
        names = list(index.classes) if index.classes else sorted(numbers)
        split = str(path.parent.relative_to(dst)).replace(".", "")
        found[split] = " ".join(
            f"{name.replace(' ', '_')}:{','.join(sorted(numbers[name]))}" for name in names
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.what for layout in LAYOUTS])
def test_a_layout_gives_what_it_says_or_is_refused(
    layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lay_out(layout, tmp_path)
    src, dst = tmp_path / layout.src, tmp_path / "dst"
    command = ["shards", "make", str(src), str(dst), "--num_workers", "1"]
    command += shlex.split(layout.options.format(tmp_path, tmp_path))
    code = main(command)
    out, err = capsys.readouterr()
    if layout.refused:
        assert code == 2 and re.search(layout.refused, err.strip()), err
        assert err.splitlines()[-1].startswith("xcit-dino: ") and not dst.exists()
        if not layout.out:
            return
        assert all(w.strip("'") in err for w in layout.remedy.split() if "{" not in w), err
        remedy = shlex.split(layout.remedy.format(tmp_path))
        assert main([*command, *remedy]) == 0
        out = capsys.readouterr().out
    assert code == 0 or layout.refused, err
    assert described(dst) == layout.out
    for line in layout.said:
        assert line in out, out
    listed = [path.read_text().count("\n") for path in dst.rglob("quarantine.jsonl")]
    assert sum(listed) == layout.bad
    said_again(dst, out, capsys)


def said_again(dst: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``shards check`` says again what was left out and renamed when the shards were packed."""
    assert main(["shards", "check", str(dst), "--num_workers", "1"]) == 0
    again = capsys.readouterr().out
    notes = [line for path in dst.rglob("packing.json")
             for line in json.loads(path.read_bytes())["notes"]]  # fmt: skip
    for line in notes:
        assert line in out and line in again
    assert again.count("unusable, listed in") == out.count("unusable, listed in")


def test_there_are_enough_layouts():
    assert len(LAYOUTS) >= 40 and len({layout.what for layout in LAYOUTS}) == len(LAYOUTS)


def test_classes_are_those_of_imagefolder(tmp_path: Path):
    from torchvision.datasets import ImageFolder

    names = ["Zebra", "ant", "bee 2", "10", "9", "été", "_x", "a.b"]
    layout = Layout("", {f"{name}/{n}.jpg": JPEG for n, name in enumerate(names)})
    lay_out(layout, tmp_path)
    assert main(["shards", "make", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    reference = ImageFolder(str(tmp_path / "src"))
    assert ShardIndex.load(tmp_path / "dst").classes == reference.classes
    expected = defaultdict(list)
    for path, label in reference.samples:
        expected[reference.classes[label].replace(" ", "_")].append(Path(path).stem)
    assert described(tmp_path / "dst")[""] == " ".join(
        f"{name}:{','.join(numbers)}" for name, numbers in expected.items()
    )


def test_links_are_followed_and_broken_ones_listed(tmp_path: Path):
    lay_out(Layout("", "a/1.jpg b/2.jpg"), tmp_path)
    src = tmp_path / "src"
    (src / "b" / "3.jpg").symlink_to(src / "a" / "1.jpg")
    (src / "b" / "4.jpg").symlink_to(src / "gone.jpg")
    (src / "b" / "round").symlink_to(src)
    assert main(["shards", "make", str(src), str(tmp_path / "dst")]) == 0
    assert described(tmp_path / "dst") == {"": "a:1 b:2,3"}
    notes = json.loads((tmp_path / "dst" / "packing.json").read_bytes())["notes"]
    assert "skipped: 1 links in a circle" in notes
    assert "4.jpg" in (tmp_path / "dst" / "quarantine.jsonl").read_text()


def test_shards_inside_their_source_are_no_images(tmp_path: Path):
    lay_out(Layout("", "a/1.jpg b/2.jpg"), tmp_path)
    dst = tmp_path / "src" / "shards"
    for _ in range(2):  # the second time, they are there
        assert main(["shards", "make", str(tmp_path / "src"), str(dst)]) == 0
        assert described(dst) == {"": "a:1 b:2"}


# -- shards from elsewhere -------------------------------------------------------------------------


def members(names: str) -> bytes:
    """A tar of images, and of ``.cls`` with the number that follows a colon: ``1.cls:3``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for word in names.split():
            name, _, text = word.partition(":")
            image = not text and name.rpartition(".")[2] in ("jpg", "png", "jfif")
            data = JPEG if image else text.encode()
            if name.endswith(".npy"):
                data = _array()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((8, 8), np.uint8))
    return buffer.getvalue()


@dataclass
class Foreign:
    what: str
    shards: dict[str, bytes]
    out: dict[str, str] = field(default_factory=dict)
    """By split: key:label of each sample, in order."""
    said: tuple[str, ...] = ()
    refused: str = ""
    code: int = 0
    options: str = ""
    as_webdataset: bool = True
    """The webdataset library reads the same samples and labels."""


FOREIGN = [
    Foreign("cls", {"0.tar": members("1.jpg 1.cls:3 2.jpg 2.cls:0")}, {"": "1:3 2:0"}),
    Foreign("txt and json", {"0.tar": members("1.jpg 1.txt:cat 1.json:{} 2.jpg 2.txt:dog")},
            {"": "1:-1 2:-1"}, ("labels │ none", "not read │ 2 .txt",
                                "no labels; --rebuild --label_key txt reads them from the .txt")),
    Foreign("words in cls", {"0.tar": members("1.jpg 1.cls:cat 2.jpg 2.cls:dog")},
            {"": "1:-1 2:-1"}, ("unreadable label 'cat': .cls holds a number",), code=1,
            as_webdataset=False),
    Foreign("all images before all labels", {"0.tar": members("1.jpg 2.jpg 1.cls:0 2.cls:1")},
            {"": "1:0 2:1"}, ("2 members that lie apart from their image", "problems │ none"),
            as_webdataset=False),
    Foreign("all labels before all images", {"0.tar": members("1.cls:7 2.cls:8 1.jpg 2.jpg")},
            {"": "1:7 2:8"}, ("2 members that lie apart",), as_webdataset=False),
    Foreign("arrays and labels apart from their images", {"0.tar": members("1.jpg 2.jpg 1.npy "
            "1.cls:3 2.npy 2.cls:4")}, {"": "1:3 2:4"},
            ("2 .npy", "2 members that lie apart", "problems │ none"), as_webdataset=False),
    Foreign("arrays before their images", {"0.tar": members("1.npy 1.cls:3 2.npy 2.cls:4 1.jpg "
            "2.jpg")}, {"": "1:3 2:4"}, ("2 .npy",), as_webdataset=False),
    Foreign("a label apart from two images of its key", {"0.tar": members("1.jpg 2.jpg 1.jpg "
            "2.cls:3 1.cls:4")}, {"": "1:-1 2:3 1:-1"},
            ("1: its key names several images elsewhere",), code=1, as_webdataset=False),
    Foreign("words in txt", {"0.tar": members("1.jpg 1.txt:dog 2.jpg 2.txt:cat 3.jpg 3.txt:dog")},
            {"": "1:1 2:0 3:1"}, ("2 classes",), options="--label_key txt", as_webdataset=False),
    Foreign("words in txt, in the order of classes.txt", {"classes.txt": b"dog\ncat\ncow\n",
            "0.tar": members("1.jpg 1.txt:dog 2.jpg 2.txt:cat")}, {"": "1:0 2:1"},
            ("3 classes",), options="--label_key txt", as_webdataset=False),
    Foreign("a word that classes.txt lacks", {"classes.txt": b"dog\ncat\n",
            "0.tar": members("1.jpg 1.txt:dog 2.jpg 2.txt:fox")}, {"": "1:0 2:-1"},
            ("label 'fox' is none of the classes",), code=1, options="--label_key txt",
            as_webdataset=False),
    Foreign("numbers in json", {"0.tar": members('1.jpg 1.json:{"label":3} 2.json:{"label":0} '
            "2.jpg")}, {"": "1:3 2:0"}, options="--label_key json:label", as_webdataset=False),
    Foreign("inner fields of json", {"0.tar": members('1.jpg 1.json:{"a":{"b":"y"}} 2.jpg '
            '2.json:{"a":{"b":"x"}}')}, {"": "1:1 2:0"}, options="--label_key json:a.b",
            as_webdataset=False),
    Foreign("a json without the field", {"0.tar": members('1.jpg 1.json:{"label":3} 2.jpg '
            "2.json:{}")}, {"": "1:3 2:-1"}, ("unreadable label",), code=1,
            options="--label_key json:label", as_webdataset=False),
    Foreign("no such labels", {"0.tar": members("1.jpg 1.txt:3")},
            refused="--label_key json:x: no sample has such a label",
            options="--label_key json:x"),
    Foreign("json without a field", {"0.tar": members("1.jpg")}, refused="expected an extension",
            options="--label_key json"),
    Foreign("captions", {"0.tar": members(" ".join(f"{n}.jpg {n}.txt:c{n}" for n in range(1100)))},
            refused="1,100 different texts in 1,100 samples are no classes",
            options="--label_key txt"),
    Foreign("numbers and words in txt", {"0.tar": members("1.jpg 1.txt:3 2.jpg 2.txt:x")},
            refused="labels are numbers, but 'x' is none", options="--label_key txt"),
    Foreign("one of two images", {"0.tar": members("1.jpg 1.png 1.cls:2 2.png 2.cls:1")},
            {"": "1:2 2:1"}, ("not read │ 1 .jpg",), options="--image_key png",
            as_webdataset=False),
    Foreign("an image with dots", {"0.tar": members("1.left.jpg 1.right.jpg 1.cls:2")},
            {"": "1:2"}, ("not read │ 1 .left.jpg",), options="--image_key right.jpg",
            as_webdataset=False),
    Foreign("two images", {"0.tar": members("1.jpg 1.png 1.cls:2")},
            {"": "1:2"}, ("several images a sample: --rebuild --image_key png takes the .png",)),
    Foreign("samples without the image asked for", {"0.tar": members("1.jpg 1.png 2.jpg 2.cls:1")},
            {"": "1:-1"}, ("2: no .png among its members",), code=1, options="--image_key png",
            as_webdataset=False),
    Foreign("macOS's ._x", {"0.tar": members("._1.jpg:x 1.jpg ._1.cls:x 1.cls:5 ._2.jpg:x 2.jpg "
            "._2.cls:x 2.cls:6")}, {"": "1:5 2:6"}, ("4 ._ files of macOS",)),
    Foreign("keys with dots", {"0.tar": members("22.05.png 22.05.cls:1 22.10.png 22.10.cls:2 "
            "23.05.png 23.05.cls:3")}, {"": "22:1 23:3"},
            ("2 images in one sample: .05.png is taken, .10.png not",), code=1,
            as_webdataset=False),
    Foreign("several images a sample", {"0.tar": members("1.jpg 1.seg.png 1.cls:2")},
            {"": "1:2"}, ("1 .seg.png",)),
    Foreign("folders in keys", {"0.tar": members("./a.b/1.jpg ./a.b/1.cls:1 c/1.jpg c/1.cls:0")},
            {"": "./a.b/1:1 c/1:0"}),
    Foreign("keys that are long or not ASCII", {"0.tar": members(f"é.jpg {'x' * 150}.jpg")},
            {"": f"é:-1 {'x' * 150}:-1"}),
    Foreign("jfif", {"0.tar": members("1.jfif 1.cls:1")}, {"": "1:1"}, as_webdataset=False),
    Foreign("far apart labels", {"0.tar": members("1.jpg 1.cls:0 2.jpg 2.cls:16000000")},
            {"": "1:0 2:16000000"}, ("labels go up to 16,000,000, but only 2 different",), code=1),
    Foreign("train and test", {"train/0.tar": members("1.jpg 1.cls:0"),
            "test/0.tar": members("2.jpg 2.cls:0")}, {"train": "1:0", "val": "2:0"},
            ("test serves as val",)),
    Foreign("Training and Testing", {"Training/0.tar": members("1.jpg 1.cls:0"),
            "Testing/0.tar": members("2.jpg 2.cls:0")}, {"train": "1:0", "val": "2:0"},
            ("Testing serves as val", "Training serves as train")),
    Foreign("train, val and test", {f"{name}/0.tar": members(f"{n}.jpg {n}.cls:0")
            for n, name in enumerate(("train", "val", "test"))}, {"train": "0:0", "val": "1:0"},
            ("test is used by no command, because val is the validation set",)),
    Foreign("train and something else", {"train/0.tar": members("1.jpg"),
            "more/0.tar": members("2.jpg")}, {"train": "1:-1"},
            ("more holds shards, but its name is not that of a split",)),
    Foreign("parts of one set", {"p1/0.tar": members("1.jpg"), "p2/0.tar": members("2.jpg")},
            {"": "1:-1 2:-1"}),
    Foreign("train and val in one folder", {"x-train-0.tar": members("1.jpg"),
            "x-val-0.tar": members("2.jpg")}, refused="holds shards of train and val together"),
    Foreign("gzip called .tar", {"0.tar": gzip.compress(members("1.jpg"))},
            refused="is compressed, and shards are read at any place"),
    Foreign("tar.gz", {"0.tar.gz": gzip.compress(members("1.jpg"))}, refused="is compressed"),
    Foreign("tgz beside a tar", {"0.tar": members("1.jpg"), "1.tgz": gzip.compress(b"x")},
            refused="1.tgz is compressed"),
]  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN, ids=[case.what for case in FOREIGN])
def test_foreign_shards_are_read_as_webdataset_reads_them(
    case: Foreign, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.setenv("COLUMNS", "300")
    for name, data in case.shards.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    command = ["shards", "check", str(tmp_path), "--num_workers", "1"]
    code = main([*command, *case.options.split()])
    out, err = capsys.readouterr()
    if case.refused:
        assert code == 2 and case.refused in err
        return
    assert code == case.code, out + err
    for line in case.said:
        assert line in re.sub(" +", " ", out), out
    for split, expected in case.out.items():
        index = ShardIndex.load(resolve_split(tmp_path, split) if split else tmp_path)
        assert " ".join(samples_of(index)) == expected
        if case.as_webdataset:
            assert list(webdataset_samples(index)) == samples_of(index)
    before = (tmp_path / "index.json").read_bytes() if "" in case.out else b""
    assert main(command) == code  # the index says how the shards are to be read ...
    assert main([*command, "--rebuild"]) == code  # ... and so is the next one made
    assert not before or (tmp_path / "index.json").read_bytes() == before


def samples_of(index: ShardIndex) -> list[str]:
    source = open_source(index, LoaderConfig())
    keys = [read_origin(source, index, n)[0] for n in range(index.num_samples)]
    return [f"{key}:{label}" for key, label in zip(keys, index.labels, strict=True)]


def webdataset_samples(index: ShardIndex) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset.tariterators import group_by_keys, tar_file_iterator
    for shard in range(len(index.shards)):
        with open(index.path(shard), "rb") as file:
            named = [member | {"__url__": ""} for member in tar_file_iterator(file)]  # type: ignore[arg-type]
        for sample in group_by_keys(named):
            yield f"{sample['__key__']}:{int(sample.get('cls', b'-1'))}"


@pytest.mark.parametrize("options", [
    ["--hash"], ["--workers", "3"], ["--batch_size_per_gpu", "8"], ["--images_per_second", "9"],
], ids=str)  # fmt: skip
def test_options_of_check_without_effect_are_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "0.tar").write_bytes(members("1.jpg"))
    assert main(["shards", "check", str(tmp_path)]) == 0
    assert main(["shards", "check", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert options[0] in error
    remedy = "--rebuild" if "--rebuild" in error else "--nodes 1"
    assert main(["shards", "check", str(tmp_path), *options, *remedy.split()]) == 0


def test_rebuilding_keeps_checksums(tmp_path: Path):
    (tmp_path / "0.tar").write_bytes(members("1.jpg"))
    assert main(["shards", "check", str(tmp_path), "--hash"]) == 0
    before = ShardIndex.load(tmp_path).checksum
    assert main(["shards", "check", str(tmp_path), "--rebuild"]) == 0
    assert ShardIndex.load(tmp_path).checksum == before


def test_far_apart_labels_are_refused_by_evaluations(tmp_path: Path):
    from xcit_dino.eval.features import count_classes

    (tmp_path / "0.tar").write_bytes(members("1.jpg 1.cls:0 2.jpg 2.cls:16000000"))
    main(["shards", "check", str(tmp_path)])
    with pytest.raises(InputError, match="labels go up to 16,000,000, but only 2 different"):
        count_classes(ShardIndex.load(tmp_path))


def test_names_in_other_encodings_can_be_joined(tmp_path: Path):
    """What ``embed`` writes of a name that is no UTF-8 is what ``printable`` makes of it."""
    name = b"caf\xe9.jpg"
    folder = tmp_path / "src"
    folder.mkdir()
    (Path(os.fsdecode(bytes(folder) + b"/" + name))).write_bytes(JPEG)
    (folder / "plain.jpg").write_bytes(JPEG)
    assert main(["shards", "make", str(folder), str(tmp_path / "dst")]) == 0
    index = ShardIndex.load(tmp_path / "dst")
    source = open_source(index, LoaderConfig())
    origins = {read_origin(source, index, n)[1] for n in range(2)}
    assert origins == {printable(entry) for entry in os.listdir(folder)}
    assert printable(os.fsdecode(name)) == r"caf\udce9.jpg"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "0.tar").write_bytes(members("caf\udce9.jpg caf\udce8.jpg"))
    assert main(["shards", "check", str(tmp_path / "foreign")]) == 0
    assert samples_of(ShardIndex.load(tmp_path / "foreign")) == [r"caf\udce9:-1", r"caf\udce8:-1"]


def test_gzip_is_found_by_content_not_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "0.tar").write_bytes(gzip.compress(tar("1.jpg 2.jpg")))
    assert main(["shards", "check", str(tmp_path)]) == 2
    command = capsys.readouterr().err.split("decompress them: ", 1)[1]
    subprocess.run(["bash", "-c", command], check=True)
    assert main(["shards", "check", str(tmp_path)]) == 0
    assert ShardIndex.load(tmp_path).num_samples == 2
