"""Readers of published datasets, on files in their layout: VOC, Pet, Cityscapes, CelebA, COCO, FEMNIST."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fedddp.data import catalog, coco
from fedddp.data.catalog import NAMES, TARGETS, TORCHVISION, open_dataset
from fedddp.data.datasets import DataConfig, load
from fedddp.data.image_files import read_image
from fedddp.data.labelling import boxes_of
from fedddp.data.resizing import Resizing
from fedddp.data.targets import Boxes, Target

ROOT = Path("data")


def opened(name: str, target: Target) -> tuple[Any, Any]:
    return open_dataset(name, str(ROOT), target=target)


def picture(name: str, width: int = 8, height: int = 6) -> None:
    (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (50, 100, 150)).save(ROOT / name)


def mask(name: str, values: Any) -> None:
    (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(ROOT / name)


def text(name: str, *lines: str) -> None:
    (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / name).write_text("".join(f"{line}\n" for line in lines))


def document(name: str, content: Any) -> None:
    (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / name).write_text(json.dumps(content))


# ---- what a dataset has ----


def test_every_name_has_targets_and_every_target_has_datasets() -> None:
    assert set(TARGETS) == set(NAMES) >= set(TORCHVISION)
    assert {name for name in NAMES if "boxes" in TARGETS[name]} == {"scenes", "coco", "voc"}
    assert {name for name in NAMES if "class" not in TARGETS[name]} == {
        *("mask_folder", "coco", "voc", "cityscapes", "celeba")
    }


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "mnist",
            "mask",
            "data.dataset=mnist gives one class per image, but the task needs a mask per image; use scenes, "
            "mask_folder, coco, oxford-pet, voc, cityscapes, or your own dataset by its dotted path",
        ),
        (
            "voc",
            "class",
            "data.dataset=voc gives several labels per image or a mask per image or boxes per image, but the "
            "task needs one class per image; use digits, image_folder, one of torchvision such as cifar10",
        ),
        (
            "celeba",
            "class",
            "data.dataset=celeba gives several labels per image, but the task needs one class",
        ),
        (
            "cityscapes",
            "boxes",
            "data.dataset=cityscapes gives a mask .* needs boxes per image; use scenes, coco, voc",
        ),
    ],
)
def test_a_target_that_a_dataset_does_not_have_is_refused(name: str, target: Target, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        opened(name, target)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "voc",
            r"data.root=data has no intact VOC2012 \(VOCdevkit/VOC2012/ImageSets/Main/train.txt is miss",
        ),
        (
            "oxford-pet",
            r"data.root=data has no intact OxfordIIITPet \(oxford-iiit-pet/annotations/trainval.txt",
        ),
        (
            "celeba",
            r"data.root=data has no intact CelebA \(celeba/list_eval_partition.txt is missing\); pass --da",
        ),
        ("cityscapes", r"data.root=data has no intact Cityscapes \(no images leftImg8bit/train/CITY/"),
        ("coco", r"data.root=data has no file \*train\*.json; coco reads annotations/\*train\*.json and"),
        (
            "femnist",
            "data.root=data has no train/\\*.json; femnist reads train/\\*.json and test/\\*.json as LEAF",
        ),
    ],
)
def test_missing_files_are_named_with_a_fix(name: str, message: str) -> None:
    target = "mask" if name in ("oxford-pet", "cityscapes") else TARGETS[name][-1]
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        opened(name, "boxes" if name == "voc" else target)
    assert "\n" not in str(caught.value)


def test_datasets_of_torchvision_are_downloaded_only_if_they_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(catalog, "_torchvision", lambda *arguments: asked.append(arguments))
    for name, target in (("voc", "mask"), ("voc", "boxes"), ("oxford-pet", "mask"), ("celeba", "multilabel")):
        with pytest.raises(ValueError, match="has no intact"):
            open_dataset(name, str(ROOT), target=target, download=True)  # type: ignore[arg-type]
    assert [(a[0], a[3]) for a in asked] == [
        *(("VOCSegmentation", True), ("VOCDetection", True), ("OxfordIIITPet", True), ("CelebA", True))
    ]
    (ROOT / "VOCdevkit/VOC2012").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no intact"):
        open_dataset("voc", str(ROOT), target="mask", download=True)
    assert len(asked) == 4


# ---- Pascal VOC ----

VOC = "VOCdevkit/VOC2012"


def voc_object(name: str, box: tuple[Any, ...], difficult: int = 0) -> str:
    edges = "".join(f"<{e}>{v}</{e}>" for e, v in zip(("xmax", "xmin", "ymax", "ymin"), box, strict=True))
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    about = f"<name>{name}</name><difficult>{difficult}</difficult>"
    return f"<object>{about}<bndbox>{edges}</bndbox>{part}</object>"


def write_voc() -> None:
    objects = {
        "one": voc_object("person", (4, 2, 6, 3)) + voc_object("aeroplane", ("7.5", "1.0", "5", "1")),
        "two": voc_object("cat", (3, 1, 3, 1), difficult=1),
        "three": voc_object("tvmonitor", (8, 1, 6, 1)),
    }
    for kind in ("Main", "Segmentation"):
        text(f"{VOC}/ImageSets/{kind}/train.txt", "one", "two")
        text(f"{VOC}/ImageSets/{kind}/val.txt", "three")
    for name, content in objects.items():
        picture(f"{VOC}/JPEGImages/{name}.jpg")
        text(f"{VOC}/Annotations/{name}.xml", f"<annotation><filename>x</filename>{content}</annotation>")
        values = np.zeros((6, 8), np.uint8)
        values[0] = 255
        values[1, :3] = (1, 15, 20)
        mask(f"{VOC}/SegmentationClass/{name}.png", values)
        file = ROOT / f"{VOC}/SegmentationClass/{name}.png"
        palette = Image.fromarray(values, "P")
        palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * 759)
        palette.save(file)


def test_voc_boxes_count_pixels_from_0_and_mark_difficult_objects() -> None:
    write_voc()
    train, test = opened("voc", "boxes")
    # The first pixel of a row is number 1: 2..4 are the pixels 1, 2 and 3, from edge 1 to edge 4.
    assert train[0][1]["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 7.5, 5]]
    assert train[0][1]["labels"].tolist() == [14, 0]
    assert train[0][1]["difficult"].tolist() == [False, False]
    assert train[1][1]["difficult"].tolist() == [True]
    assert train[1][1]["labels"].dtype == torch.int64
    assert test[0][1]["boxes"].tolist() == [[0, 0, 8, 6]]
    assert test[0][1]["labels"].tolist() == [19]
    assert len(train.classes) == 20
    assert train[0][0].shape == (3, 6, 8)


def test_voc_labels_are_those_of_the_boxes() -> None:
    write_voc()
    train, test = opened("voc", "multilabel")
    assert [np.flatnonzero(train[i][1]).tolist() for i in range(2)] == [[0, 14], []]
    assert np.flatnonzero(test[0][1]).tolist() == [19]
    assert train[0][1].shape == (20,)


def test_voc_masks_have_the_numbers_of_the_palette() -> None:
    write_voc()
    train, test = opened("voc", "mask")
    values = train[0][1]
    assert values[0].tolist() == [255] * 8
    assert values[1].tolist() == [1, 15, 20, 0, 0, 0, 0, 0]
    assert [train.classes[number] for number in (0, 1, 15, 20)] == [
        *("background", "aeroplane", "person", "tvmonitor")
    ]
    assert (len(train.classes), len(train), len(test)) == (21, 2, 1)
    images, _ = load(DataConfig(dataset="voc", root=str(ROOT)), target="mask")
    assert (images.classes, images.shape) == (21, (3, 6, 8))


def test_wrong_files_of_voc_are_named() -> None:
    write_voc()
    mask(f"{VOC}/SegmentationClass/one.png", np.full((6, 8), 21))
    with pytest.raises(
        ValueError, match="SegmentationClass/one.png, the mask of .*/one.jpg, has the value 21, wh"
    ):
        opened("voc", "mask")[0][0]
    text(f"{VOC}/Annotations/one.xml", f"<annotation>{voc_object('unicorn', (1, 1, 1, 1))}</annotation>")
    with pytest.raises(ValueError, match=r"Annotations/one.xml is no annotation of VOC \(.*\); replace it"):
        opened("voc", "boxes")
    (ROOT / f"{VOC}/JPEGImages/three.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"^data/VOCdevkit/VOC2012/JPEGImages/three.jpg is missing, but .*val.txt"
    ):
        opened("voc", "mask")


# ---- Oxford-IIIT Pet, Cityscapes ----


def test_pet_masks_have_the_pet_and_its_border() -> None:
    folder = "oxford-iiit-pet"
    text(f"{folder}/annotations/trainval.txt", "Abyssinian_1 1 1 1", "beagle_2 2 2 1")
    text(f"{folder}/annotations/test.txt", "beagle_3 2 2 1")
    for name in ("Abyssinian_1", "beagle_2", "beagle_3"):
        picture(f"{folder}/images/{name}.jpg", 4, 1)
        mask(f"{folder}/annotations/trimaps/{name}.png", [[1, 2, 3, 2]])  # pet, background, border
    train, test = opened("oxford-pet", "mask")
    assert train[0][1].tolist() == test[0][1].tolist() == [[1, 0, 2, 0]]
    assert train.classes == ["background", "pet", "border"]
    assert (len(train), len(test)) == (2, 1)
    classed, _ = opened("oxford-pet", "class")
    assert (classed[1][1], classed.classes) == (1, ["Abyssinian", "Beagle"])
    (ROOT / f"{folder}/annotations/trimaps/beagle_3.png").unlink()
    with pytest.raises(ValueError, match=r"trimaps/beagle_3.png is missing, but .*test.txt lists it"):
        opened("oxford-pet", "mask")


def test_cityscapes_has_19_classes_and_its_cities_as_clients() -> None:
    for part, name in (("train", "ulm/ulm_0"), ("train", "aachen/aachen_1"), ("val", "munster/munster_0")):
        picture(f"leftImg8bit/{part}/{name}_leftImg8bit.png", 8, 1)
        # unlabelled, ego vehicle, road, sidewalk, parking, person, bicycle, license plate
        mask(f"gtFine/{part}/{name}_gtFine_labelIds.png", [[0, 1, 7, 8, 9, 24, 33, 255]])
    train, test = opened("cityscapes", "mask")
    assert train[0][1].tolist() == [[255, 255, 0, 1, 255, 11, 18, 255]]
    assert train.ids.tolist() == ["aachen", "ulm"]
    assert test.ids.tolist() == ["munster"]
    assert (len(train.classes), train.classes[0], train.classes[18]) == (19, "road", "bicycle")
    (ROOT / "gtFine/val/munster/munster_0_gtFine_labelIds.png").unlink()
    with pytest.raises(
        ValueError, match=r"munster_0_gtFine_labelIds.png is missing, but .*leftImg8bit/val lists"
    ):
        opened("cityscapes", "mask")


def test_the_classes_of_cityscapes_are_torchvisions_training_classes() -> None:
    from torchvision.datasets import Cityscapes

    from fedddp.data.published import CITYSCAPES

    expected = {c.id: c.name for c in Cityscapes.classes if 0 <= c.train_id < 255}
    assert expected == CITYSCAPES
    assert list(CITYSCAPES) == sorted(expected)


# ---- CelebA ----


def write_celeba() -> None:
    names = [f"00000{i}.jpg" for i in range(1, 6)]
    for name in names:
        picture(f"celeba/img_align_celeba/{name}")
    groups = (0, 1, 0, 2, 0)
    text("celeba/list_eval_partition.txt", *(f"{n} {g}" for n, g in zip(names, groups, strict=True)))
    rows = ("-1  1 -1", " 1  1  1", " 1 -1 -1", "-1 -1  1", "-1 -1 -1")
    head = ("5", "5_o_Clock_Shadow Arched_Eyebrows Young ")
    text("celeba/list_attr_celeba.txt", *head, *(f"{n} {r}" for n, r in zip(names, rows, strict=True)))
    text(
        "celeba/identity_CelebA.txt",
        *(f"{n} {p}" for n, p in zip(names, (2880, 7, 12, 99, 2880), strict=True)),
    )


def test_celeba_has_attributes_and_people() -> None:
    write_celeba()
    train, test = opened("celeba", "multilabel")
    assert [train[i][1].tolist() for i in range(3)] == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert (train.ids.tolist(), test.ids.tolist()) == ([2880, 12, 2880], [99])
    assert test[0][1].tolist() == [0, 0, 1]
    assert train.classes == ["5_o_Clock_Shadow", "Arched_Eyebrows", "Young"]
    assert train.images[1] == "data/celeba/img_align_celeba/000003.jpg"
    images, _ = load(DataConfig(dataset="celeba", root=str(ROOT)), target="multilabel")
    assert images.ids is not None
    assert images.ids.tolist() == [1, 0, 1]  # of the people 12 and 2880


def test_lists_of_celeba_that_differ_are_refused() -> None:
    write_celeba()
    lines = (ROOT / "celeba/identity_CelebA.txt").read_text().splitlines()
    text("celeba/identity_CelebA.txt", *lines[1:])
    with pytest.raises(
        ValueError, match="^data.root=data: the lists of CelebA have 5, 5 and 4 images; download them again$"
    ):
        opened("celeba", "multilabel")
    text("celeba/identity_CelebA.txt", *reversed(lines))
    with pytest.raises(
        ValueError, match="^data.root=data: the lists of CelebA differ at 000001.jpg; download"
    ):
        opened("celeba", "multilabel")


# ---- COCO ----

SQUARE = [[1, 2, 4, 2, 4, 5, 1, 5]]  # columns 1 to 3, rows 2 to 4


def annotation(image: int, category: int, box: Any, outline: Any = SQUARE, **fields: Any) -> dict[str, Any]:
    return {
        "id": 77,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "segmentation": outline,
        **fields,
    }


def content(*annotations: dict[str, Any], images: int = 1) -> dict[str, Any]:
    return {
        "images": [
            {"id": 10 - i, "file_name": f"{10 - i}.png", "width": 8, "height": 6} for i in range(images)
        ],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 3, "name": "car"},
            {"id": 44, "name": "bottle"},
        ],
        "annotations": list(annotations),
    }


def write_coco(train: dict[str, Any], test: dict[str, Any] | None = None) -> None:
    document("annotations/instances_train2017.json", train)
    document("annotations/captions_train2017.json", {"annotations": []})
    document("annotations/instances_val2017.json", test or content())
    for part in ("train2017", "val2017"):
        for number in range(8, 11):
            picture(f"{part}/{number}.png")


def test_coco_boxes_have_corners_and_classes_by_rising_id() -> None:
    write_coco(
        content(
            annotation(10, 90, [1, 2, 3, 3]),
            annotation(10, 3, [0.5, 0, 2.25, 6]),
            annotation(8, 44, [0, 0, 8, 6]),
            annotation(8, 44, [0, 0, 8, 6], iscrowd=1),
            images=3,
        )
    )
    train, test = opened("coco", "boxes")
    assert train.classes == ["car", "bottle", "toothbrush"]
    assert train.images == [f"data/train2017/{number}.png" for number in (8, 9, 10)]
    assert train[2][1]["boxes"].tolist() == [[1, 2, 4, 5], [0.5, 0, 2.75, 6]]
    assert train[2][1]["labels"].tolist() == [2, 0]
    assert train[0][1]["labels"].tolist() == [1, 1]
    assert train[0][1]["iscrowd"].tolist() == [False, True]
    assert train[1][1]["boxes"].shape == (0, 4)
    assert test.images == ["data/val2017/10.png"]
    labelled, _ = opened("coco", "multilabel")
    assert [labelled[i][1].tolist() for i in range(3)] == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_boxes_without_area_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    write_coco(
        content(
            annotation(10, 3, [1, 1, 0, 2]),
            annotation(10, 3, [1, 1, 2, -1]),
            annotation(10, 3, [1, 1, 1, 1]),
            annotation(10, 3, [8, 1, 1, 1]),  # of an image of 8 x 6 pixels
            annotation(10, 3, [1, 6, 1, 1]),
            annotation(10, 3, [-3, 1, 3, 1]),
            annotation(10, 3, [7, 5, 9, 9]),
        )
    )
    assert opened("coco", "boxes")[0][0][1]["boxes"].tolist() == [[1, 1, 2, 2], [7, 5, 16, 14]]
    assert [r.getMessage() for r in caplog.records] == [
        "data/annotations/instances_train2017.json: left out 5 boxes without area or outside of their image"
    ]


def test_labels_of_coco_need_no_boxes() -> None:
    bare = annotation(10, 3, None)
    del bare["bbox"]
    write_coco(content(bare, annotation(10, 90, [1, 1, 0, 0])))
    assert opened("coco", "multilabel")[0][0][1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("target", ["boxes", "mask"])
def test_an_image_of_another_size_than_its_file_lists_is_refused(target: Target) -> None:
    write_coco(content(annotation(10, 3, [0, 0, 1, 1])))
    picture("train2017/10.png", 16, 12)
    message = r"^data/train2017/10.png is 12x16 pixels, but data/annotations/.*json lists 6x8 for it; correct"
    with pytest.raises(ValueError, match=message) as caught:
        opened("coco", target)[0][0]
    assert "\n" not in str(caught.value)
    for memory in ("device", "stream"):
        config = DataConfig(dataset="coco", root=str(ROOT), image_size=8, memory=memory)
        with pytest.raises(ValueError, match=message):
            load(config, target)
    unknown = content(annotation(10, 3, [0, 0, 1, 1]))
    unknown["images"][0] |= {"width": 0, "height": None}
    write_coco(unknown)
    picture("train2017/10.png", 16, 12)
    assert opened("coco", target)[0][0][0].shape == (3, 12, 16)


@pytest.mark.parametrize("size", [None, 4])
def test_boxes_are_read_without_decoding_the_images(
    size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(content(annotation(10, 3, [1, 1, 6, 4]), annotation(8, 44, [2, 0, 5, 6]), images=3))
    decoded: list[str] = []

    def counted(path: str, *rest: Any) -> torch.Tensor:
        decoded.append(path)
        return read_image(path, *rest)

    monkeypatch.setattr("fedddp.data.annotated.read_image", counted)
    found = []
    for memory in ("device", "stream"):
        decoded.clear()
        images, _ = load(DataConfig(dataset="coco", root=str(ROOT), image_size=size, memory=memory), "boxes")
        # The first of a set for its shape; all three of the training set once, for pixels or statistics.
        assert sorted(Path(file).name for file in decoded if "train" in file) == [
            *("10.png", "8.png", "8.png", "9.png")
        ]
        assert images.boxes is not None
        found.append(images.boxes)
    assert torch.equal(found[0].boxes, found[1].boxes)
    assert found[0].offsets.tolist() == found[1].offsets.tolist() == [0, 1, 1, 2]
    items = opened("coco", "boxes")[0]
    resizing = Resizing(size, "pad")
    expected = [resizing.boxes(boxes_of(items[i][1], ""), (6, 8)) for i in (0, 2)]
    assert torch.equal(found[0].boxes, Boxes.cat(expected).boxes)


def test_coco_masks_have_small_objects_on_large_ones_and_ignore_crowds() -> None:
    everything = [[0, 0, 8, 0, 8, 6, 0, 6]]
    # Runs down the columns of 6 rows: the first row of columns 0 and 1, and all of column 7.
    crowd = {"size": [6, 8], "counts": [0, 1, 5, 1, 35, 6]}
    write_coco(
        content(
            annotation(10, 90, [0, 0, 1, 1], SQUARE),
            annotation(10, 3, [0, 0, 1, 1], [[0, 1, 8, 1, 8, 6, 0, 6]]),
            annotation(10, 44, [0, 0, 1, 1], crowd, iscrowd=1),
        )
    )
    train, _ = opened("coco", "mask")
    assert train.classes == ["background", "car", "bottle", "toothbrush"]
    assert train[0][1].tolist() == [
        [255, 255, 0, 0, 0, 0, 0, 255],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 3, 3, 3, 1, 1, 1, 1],
        [1, 3, 3, 3, 1, 1, 1, 1],
        [1, 3, 3, 3, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
    write_coco(content(annotation(10, 3, [0, 0, 8, 6], everything)))
    assert opened("coco", "mask")[0][0][1].tolist() == [[1] * 8] * 6


def centre_inside(polygon: list[tuple[float, float]], x: float, y: float) -> bool:
    """Return whether a point lies in a polygon: by the edges to its right."""
    inside = False
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (x2 - x1) * (y - y1) / (y2 - y1):
            inside = not inside
    return inside


def test_a_pixel_is_in_an_outline_if_its_centre_is() -> None:
    rng = np.random.default_rng(0)
    for corners in (3, 4, 7, 12):
        polygon = [(float(x), float(y)) for x, y in rng.uniform(-3, 23, (corners, 2))]
        found = coco._region([[value for corner in polygon for value in corner]], (16, 20))
        assert found is not None
        expected = [[centre_inside(polygon, x + 0.5, y + 0.5) for x in range(20)] for y in range(16)]
        np.testing.assert_array_equal(found, expected)


def test_an_object_of_several_outlines_has_all_of_them() -> None:
    found: NDArray[np.bool_] | None = coco._region(
        [[0, 0, 1, 0, 1, 1, 0, 1], [2, 0, 3, 0, 3, 1, 2, 1]], (2, 4)
    )
    assert found is not None
    assert found.tolist() == [[True, False, True, False], [False] * 4]


@pytest.mark.parametrize(
    "place", ["{name}.png", "images/{name}.png", "images/{part}/{name}.png", "{part}/{name}.png"]
)
def test_images_of_coco_lie_in_one_of_several_folders(place: str) -> None:
    for part in ("train", "val"):
        document(f"{part}.json", content())
        picture(place.format(part=part, name=10))
    train, test = opened("coco", "boxes")
    assert train.images == [f"data/{place.format(part='train', name=10)}"]
    assert test.images == [f"data/{place.format(part='val', name=10)}"]


@pytest.mark.parametrize(
    ("target", "train", "message"),
    [
        (
            "boxes",
            {"images": []},
            r"data/annotations/instances_train2017.json is no COCO-style file \(KeyError",
        ),
        (
            "boxes",
            {**content(), "images": content()["images"] * 2},
            "data/annotations/instances_train2017.json has two images with the id 10; give each an id",
        ),
        ("boxes", content(images=0), "data/annotations/instances_train2017.json lists no images"),
        (
            "boxes",
            content(annotation(99, 3, [0, 0, 1, 1])),
            ".*: an annotation has the image_id 99, which no image",
        ),
        (
            "boxes",
            content(annotation(10, 4, [0, 0, 1, 1])),
            ".*: annotation 77 has the category_id 4, which no",
        ),
        (
            "boxes",
            content(annotation(10, 3, [0, 0, 1])),
            r".*: annotation 77 has the bbox \[0, 0, 1\]; give \[x, y,",
        ),
        (
            "boxes",
            content(images=4),
            "data/train2017/7.png is missing, but .*json lists it; complete the images",
        ),
        (
            "mask",
            content(annotation(10, 3, [], [])),
            ".*: annotation 77 has no polygons for its segmentation, but",
        ),
        ("mask", content(annotation(10, 3, [], [[1, 2, 3, 4]])), ".*: annotation 77 has no polygons"),
        (
            "mask",
            content(annotation(10, 3, [], {"size": [6, 8], "counts": "abc"})),
            ".*: annotation 77 has a compressed run-length code for its segmentation, but masks are drawn",
        ),
    ],
)
def test_wrong_coco_files_are_refused(target: Target, train: dict[str, Any], message: str) -> None:
    write_coco(train)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        opened("coco", target)
    assert "\n" not in str(caught.value)


def test_coco_files_that_do_not_fit_together_are_refused() -> None:
    other = content()
    other["categories"][0]["name"] = "comb"
    write_coco(content(), other)
    with pytest.raises(
        ValueError, match="instances_val2017.json has other categories than .*train2017.json; give"
    ):
        opened("coco", "boxes")
    write_coco(content(annotation(10, 3, [], {"size": [8, 6], "counts": [48]})))
    with pytest.raises(
        ValueError, match=r"annotation 77 is not of the size of data/train2017/10.png, 6x8; correct"
    ):
        opened("coco", "mask")[0][0]
    document("annotations/my_train.json", {})
    document("annotations/instances_train2014.json", {})
    with pytest.raises(
        ValueError, match=r"^data.root=data has 4 files \*train\*.json in data/annotations, such as"
    ):
        opened("coco", "boxes")


def test_images_of_coco_that_are_nowhere_are_refused() -> None:
    for part in ("train", "val"):
        document(f"{part}.json", content())
    with pytest.raises(
        ValueError, match="^data/train.json lists the image 10.png, which is not below data.root=data"
    ):
        opened("coco", "boxes")


# ---- LEAF's FEMNIST ----


def users(**counts: list[int]) -> dict[str, Any]:
    """Return a file of LEAF; every image of class y is white, but for its first pixel, of y / 100."""
    data = {user: {"x": [[y / 100] + [1.0] * 783 for y in ys], "y": ys} for user, ys in counts.items()}
    return {"users": list(counts), "num_samples": [len(ys) for ys in counts.values()], "user_data": data}


def write_femnist(train: dict[str, Any], test: dict[str, Any]) -> None:
    document("femnist/data/train/all_data_0_niid_0_keep_0_train_9.json", train)
    document("femnist/data/test/all_data_0_niid_0_keep_0_test_9.json", test)


def test_femnist_has_writers_that_are_the_same_in_both_sets() -> None:
    write_femnist(users(f10=[10, 61], a2=[0]), users(a2=[36], f10=[9, 35]))
    document("femnist/data/train/all_data_1_niid_0_keep_0_train_9.json", users(z=[5]))
    train, test = opened("femnist", "class")
    assert train.targets.tolist() == [10, 61, 0, 5]
    assert train.ids.tolist() == ["f10", "f10", "a2", "z"]
    assert [train.classes[label] for label in train.targets.tolist()] == ["A", "z", "0", "5"]
    assert [test.classes[label] for label in test.targets.tolist()] == ["a", "9", "Z"]
    image, label = train[1]
    assert (image.shape, image.dtype, label) == ((28, 28), torch.uint8, 61)
    assert image[0, :2].tolist() == [round(0.61 * 255), 255]  # on white
    images, tested = load(DataConfig(dataset="femnist", root=str(ROOT)))
    assert images.ids is not None
    assert tested.ids is not None
    assert (images.ids.tolist(), tested.ids.tolist()) == ([1, 1, 0, 2], [0, 1, 1])
    assert (images.classes, images.shape) == (62, (1, 28, 28))


def test_writers_without_training_images_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    write_femnist(users(a=[1, 2], b=[3]), users(c=[4], d=[5], a=[1]))
    with caplog.at_level(logging.INFO, "fedddp"):
        _, test = opened("femnist", "class")
    assert test.ids.tolist() == ["c", "d", "a"]
    (record,) = caplog.records
    assert record.getMessage() == "data/femnist/data/test: 2 writers have no training images, such as c"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"users": ["a"]},
            r".*train_9.json is no file of LEAF's FEMNIST \(KeyError: 'user_data'\); it needs users",
        ),
        (users(a=[62]), r".*train_9.json is no file of LEAF's FEMNIST \(ValueError: classes from 62 to 62\)"),
        (users(a=[-1]), r".* \(ValueError: values from -0.01 to 1\)"),
        (
            {"users": ["a"], "user_data": {"a": {"x": [[0.0] * 9], "y": [1]}}},
            r".* \(ValueError: cannot reshape",
        ),
        (users(), "data/femnist/data/train has no images; femnist reads"),
    ],
)
def test_wrong_files_of_leaf_are_refused(train: dict[str, Any], message: str) -> None:
    write_femnist(train, users(a=[1]))
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        opened("femnist", "class")
    assert "\n" not in str(caught.value)


def test_two_datasets_of_leaf_are_refused() -> None:
    write_femnist(users(a=[1]), users(a=[1]))
    document("other/train/x.json", {})
    with pytest.raises(
        ValueError, match="^data.root=data has the folders data/other/train and data/femnist/data/tr"
    ):
        opened("femnist", "class")


def test_cached_masks_of_coco_follow_a_change_of_the_json_file() -> None:
    for grown, expected in ((SQUARE, 9), ([[0, 0, 8, 0, 8, 6, 0, 6]], 48)):
        write_coco(content(annotation(10, 3, [], grown)))
        images, _ = load(DataConfig(dataset="coco", root=str(ROOT)), target="mask")
        assert images.pixels is not None
        assert int((images.pixels[0, 3] == 1).sum()) == expected
