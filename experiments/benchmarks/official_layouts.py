"""Write retrieval data sets in their official layout, at any fraction of the official size.

``write_sop(folder, scale, image)`` and the other writers create the annotation files and a file with the bytes
``image`` for each image. For DeepFashion2, whose loader reads the sizes of the images, no bytes stand for a white image
of 500 x 500 pixels. At scale 1 the numbers of images and classes are the official ones. The files depend on the scale
only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from io import BytesIO
from itertools import count
from pathlib import Path

Writer = Callable[[Path, float, bytes], None]
Label = tuple[int, int, int]


def scaled(number: int, scale: float) -> int:
    """Return a fraction of a number, at least 1."""
    return max(1, round(number * scale))


def write_images(files: Iterable[Path], image: bytes) -> None:
    """Write the same bytes to all files, and create their folders."""
    folders = set()
    for file in files:
        if file.parent not in folders:
            file.parent.mkdir(parents=True, exist_ok=True)
            folders.add(file.parent)
        file.write_bytes(image)


def write_sop(folder: Path, scale: float, image: bytes = b"") -> None:
    """Write Stanford Online Products. The images of class c are in the folder of super class c mod 12."""
    ids, first_class = count(1), 1
    for part, images, classes in (("train", 59_551, 11_318), ("test", 60_502, 11_316)):
        rows, images, classes = [], scaled(images, scale), scaled(classes, scale)
        for number in range(images):
            label = first_class + number * classes // images
            rows.append((next(ids), label, 1 + label % 12, f"kind{label % 12}_final/{label}_{number}.JPG"))
        write_images((folder / path for *_, path in rows), image)
        lines = ["image_id class_id super_class_id path", *(" ".join(map(str, row)) for row in rows)]
        (folder / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")
        first_class += classes


def write_inshop(folder: Path, scale: float, image: bytes = b"") -> None:
    """Write In-Shop Clothes Retrieval, with the fixed column widths of the official list."""
    rows, items = [], scaled(3_997, scale)
    for part, images, first, classes in (
        ("train", 25_882, 1, items),
        ("query", 14_218, items + 1, scaled(3_985, scale)),
        ("gallery", 12_612, items + 1, scaled(3_985, scale)),
    ):
        for number in range(scaled(images, scale)):
            item = f"id_{first + number % classes:08}"
            rows.append((f"img/WOMEN/Dresses/{item}/{number:05}_{part}.jpg", item, part))
    write_images((folder / "Img" / path for path, *_ in rows), image)
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    lines += [f"{path:<80}{item:<16}{part}" for path, item, part in rows]
    (folder / "Eval").mkdir()
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


def write_cub200(folder: Path, scale: float, image: bytes = b"") -> None:
    """Write CUB-200-2011, with all 200 classes if there are enough images."""
    species = [number * 100 // scaled(5_864, scale) for number in range(scaled(5_864, scale))]
    species += [100 + number * 100 // scaled(5_924, scale) for number in range(scaled(5_924, scale))]
    paths = [f"{label + 1:03}.Bird/Bird_{number:04}.jpg" for number, label in enumerate(species, 1)]
    write_images((folder / "images" / path for path in paths), image)
    for name, values in (("images", paths), ("image_class_labels", [label + 1 for label in species])):
        (folder / f"{name}.txt").write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, 1)))


def write_cars196(folder: Path, scale: float, image: bytes = b"") -> None:
    """Write Cars196 with all images in one folder, and with all 196 classes if there are enough images."""
    import numpy as np
    from scipy.io import savemat

    cars = [1 + number * 98 // scaled(8_054, scale) for number in range(scaled(8_054, scale))]
    cars += [99 + number * 98 // scaled(8_131, scale) for number in range(scaled(8_131, scale))]
    names = [f"car_ims/{number:06}.jpg" for number in range(1, len(cars) + 1)]
    write_images((folder / name for name in names), image)
    annotations = np.array(list(zip(names, cars, strict=True)), [("relative_im_path", object), ("class", object)])
    savemat(folder / "cars_annos.mat", {"annotations": annotations})


def blank_image() -> bytes:
    """Return a white image of 500 x 500 pixels in a few bytes."""
    from PIL import Image

    buffer = BytesIO()
    Image.new("1", (500, 500), 1).save(buffer, "PNG")
    return buffer.getvalue()


def write_deepfashion2(folder: Path, scale: float, image: bytes = b"") -> None:
    """Write DeepFashion2: 391,000 JSON files of about 2 kB, with the paper's numbers of items, queries and labels."""
    image = image or blank_image()
    pairs = scaled(31_517, scale)
    images = scaled(358_847, scale)
    items = _placed([(pair, 1, 1) for pair in range(pairs)], scaled(217_778, scale), images, pairs)
    _add(items, _placed([(pair, 2, 0) for pair in range(pairs)], scaled(94_408, scale), images, pairs))
    kinds = ("user" if number // pairs % 2 == 0 else "shop" for number in range(images))
    _write_part(folder / "train", items, kinds, pairs, image)

    pairs = scaled(3_128, scale)
    users, shops = scaled(10_844, scale), scaled(21_309, scale)
    paired: list[Label] = [(pair, 1, 1) for pair in range(pairs)]
    others: list[Label] = [(number % pairs, 2 + number // pairs, 0) for number in range(scaled(7_059, scale) - pairs)]
    items = _placed(paired, scaled(12_377, scale), users, pairs)
    _add(items, _placed(others[:pairs], scaled(3_152, scale), users, pairs))
    for number, members in _placed(paired + others, scaled(36_961, scale), shops, pairs).items():
        # Shop images begin at the first image of pair 0 after the user images.
        items[_next_start(users, pairs) + number] = members
    total = _next_start(users, pairs) + shops
    kinds = ("user" if number < users else "shop" for number in range(total))
    _write_part(folder / "validation", items, kinds, pairs, image)


def _next_start(images: int, pairs: int) -> int:
    return -(-images // pairs) * pairs


def _placed(labels: list[Label], number: int, images: int, pairs: int) -> dict[int, list[Label]]:
    """Distribute ``number`` items over the images of their pair, where image i belongs to pair i mod ``pairs``."""
    items = defaultdict(list)
    for item in range(number):
        label = labels[item % len(labels)]
        of_pair = range(label[0], images, pairs)
        items[of_pair[item // len(labels) % len(of_pair)]].append(label)
    return items


def _add(items: dict[int, list[Label]], more: dict[int, list[Label]]) -> None:
    for number, members in more.items():
        items[number] += members


def _write_part(folder: Path, items: dict[int, list[Label]], kinds: Iterable[str], pairs: int, image: bytes) -> None:
    for name in ("annos", "image"):
        (folder / name).mkdir(parents=True)
    for number, kind in enumerate(kinds):
        content = {"source": kind, "pair_id": number % pairs + 1}
        content |= {f"item{i}": _item(i, label) for i, label in enumerate(items.get(number, ()), 1)}
        (folder / "annos" / f"{number + 1:06}.json").write_text(json.dumps(content))
        (folder / "image" / f"{number + 1:06}.jpg").write_bytes(image)


def _item(number: int, label: Label) -> dict[str, object]:
    _, category, style = label
    return {
        "segmentation": [[100 + i for i in range(120)]],
        "scale": 2,
        "viewpoint": 2,
        "zoom_in": 1,
        "landmarks": [100 + i for i in range(90)],
        "style": style,
        "bounding_box": [2 * number, number, 2 * number + 20, number + 10],
        "category_id": category,
        "occlusion": 1,
        "category_name": "skirt",
    }


WRITERS: dict[str, Writer] = {
    "sop": write_sop,
    "inshop": write_inshop,
    "cub200": write_cub200,
    "cars196": write_cars196,
    "deepfashion2": write_deepfashion2,
}
