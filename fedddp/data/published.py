"""Readers of published datasets in their own layout: VOC, Oxford-IIIT Pet, Cityscapes, CelebA."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data.annotated import (
    LabelledFiles,
    MaskedFiles,
    box_target,
    check_files,
    label_table,
    lines_of,
)
from fedddp.data.image_files import is_hidden
from fedddp.data.targets import IGNORED, Target

VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The classes of VOC; in masks 1 to 20, behind the background."""

CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
"""The classes of Cityscapes that are evaluated, by their numbers in `labelIds.png`."""


def voc(root: Path, part: str, target: Target) -> Dataset[Any]:
    """Return Pascal VOC 2012, in `root`/VOCdevkit/VOC2012: its sets `train` and, as the test set, `val`.

    Labels are of the objects that are not marked as difficult; boxes keep the mark. Pixels count from 0, and
    the right and bottom edges lie behind the last pixel.

    Args:
        root: holds VOCdevkit.
        part: "train" or "test".
        target: "mask", "boxes" or "multilabel".

    Raises:
        ValueError: files are missing or cannot be read.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    kind = "Segmentation" if target == "mask" else "Main"
    listed = folder / "ImageSets" / kind / ("train.txt" if part == "train" else "val.txt")
    names = [line.split()[0] for line in lines_of(listed, "VOC2012", root)]
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    check_files(images, listed)
    if target == "mask":
        masks = [folder / "SegmentationClass" / f"{name}.png" for name in names]
        check_files(masks, listed)
        return MaskedFiles(images, masks, ["background", *VOC], {number: number for number in range(21)})
    files = [folder / "Annotations" / f"{name}.xml" for name in names]
    check_files(files, listed)
    found = [_voc_objects(file) for file in files]
    if target == "boxes":
        return LabelledFiles(images, found, VOC)
    present = [one["labels"][~one["difficult"]] for one in found]
    return LabelledFiles(images, label_table([labels.tolist() for labels in present], len(VOC)), VOC)


def _voc_objects(file: Path) -> dict[str, Tensor]:
    """Return the boxes of an image, and which of them are difficult."""
    boxes, labels, difficult = [], [], []
    try:
        for found in ElementTree.parse(file).getroot().iterfind("object"):
            difficult.append(found.findtext("difficult", "0").strip() == "1")
            edges = [float(found.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
            labels.append(VOC.index(found.findtext("name", "").strip()))
            boxes.append([edges[0] - 1, edges[1] - 1, edges[2], edges[3]])
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{file} is no annotation of VOC ({error}); replace it by the published file"
        ) from None
    return box_target(boxes, labels, difficult=difficult)


def oxford_pet(root: Path, part: str) -> Dataset[Any]:
    """Return the Oxford-IIIT Pet dataset with masks: 0 background, 1 pet, 2 the border between both.

    Raises:
        ValueError: files are missing.
    """
    folder = root / "oxford-iiit-pet"
    listed = folder / "annotations" / ("trainval.txt" if part == "train" else "test.txt")
    names = [line.split()[0] for line in lines_of(listed, "OxfordIIITPet", root)]
    images = [folder / "images" / f"{name}.jpg" for name in names]
    masks = [folder / "annotations" / "trimaps" / f"{name}.png" for name in names]
    check_files([*images, *masks], listed)
    return MaskedFiles(images, masks, ["background", "pet", "border"], {1: 1, 2: 0, 3: 2})


def cityscapes(root: Path, part: str) -> Dataset[Any]:
    """Return Cityscapes with fine masks of the 19 classes that are evaluated; cities are the natural clients.

    Raises:
        ValueError: files are missing.
    """
    name = "train" if part == "train" else "val"
    folder = root / "leftImg8bit" / name
    images = sorted(
        file for file in folder.glob("*/*_leftImg8bit.png") if not is_hidden(file.relative_to(folder))
    )
    if not images:
        raise ValueError(
            f"data.root={root} has no intact Cityscapes (no images leftImg8bit/{name}/CITY/"
            "*_leftImg8bit.png); unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there"
        )
    masks = []
    for image in images:
        stem = image.name.removesuffix("_leftImg8bit.png")
        masks.append(root / "gtFine" / name / image.parent.name / f"{stem}_gtFine_labelIds.png")
    check_files(masks, folder)
    numbers = dict.fromkeys(range(34), IGNORED)
    numbers.update({value: number for number, value in enumerate(CITYSCAPES)})
    cities = np.array([image.parent.name for image in images])
    return MaskedFiles(images, masks, list(CITYSCAPES.values()), numbers, ids=cities)


def celeba(root: Path, part: str) -> Dataset[Any]:
    """Return CelebA with its 40 attributes; the people are the natural clients, other ones in each part.

    Raises:
        ValueError: files are missing, or do not list the same images.
    """
    folder = root / "celeba"
    parts = lines_of(folder / "list_eval_partition.txt", "CelebA", root)
    listed = lines_of(folder / "list_attr_celeba.txt", "CelebA", root)
    people = lines_of(folder / "identity_CelebA.txt", "CelebA", root)
    names, attributes = listed[1].split(), listed[2:]
    if not len(parts) == len(attributes) == len(people):
        raise ValueError(
            f"data.root={root}: the lists of CelebA have {len(parts)}, {len(attributes)} and {len(people)} "
            "images; download them again"
        )
    wanted = "0" if part == "train" else "2"
    images, rows, ids = [], [], []
    for lines in zip(parts, attributes, people, strict=True):
        (image, group), (other, *values), (third, person) = (line.split() for line in lines)
        if not image == other == third:
            raise ValueError(f"data.root={root}: the lists of CelebA differ at {image}; download them again")
        if group == wanted:
            images.append(folder / "img_align_celeba" / image)
            rows.append(values)
            ids.append(int(person))
    check_files(images, folder / "list_eval_partition.txt")
    table = (np.array(rows).reshape(len(rows), -1) == "1").astype(np.uint8)
    return LabelledFiles(images, table, names, ids=np.array(ids, dtype=np.int64))
