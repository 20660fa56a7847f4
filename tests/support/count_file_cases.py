"""What the tests of read_counts share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

COCO: dict[str, Any] = {
    "images": [{"id": 1}, {"id": 2}],
    # Not sorted, and with gaps, as in COCO.
    "categories": [{"id": 90, "name": "c"}, {"id": 1, "name": "a"}, {"id": 3, "name": "b"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0},
        {"id": 4, "image_id": 2, "category_id": 90, "bbox": [0, 0, 1, 1], "iscrowd": 0},
        {"id": 5, "image_id": 2, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 1},
    ],
}
LVIS_CATEGORIES = [
    {"id": 2, "name": "b", "image_count": 7, "instance_count": 9, "frequency": "r"},
    {"id": 1, "name": "a", "image_count": 120, "instance_count": 300, "frequency": "f"},
]
# As shipped: a space after an Idx and after a name, commas in names.
ADE20K = (
    "Idx\tRatio\tTrain\tVal\tName\n"
    "1\t0.1576\t11664\t1172\twall\n"
    "2 \t0.1072\t6046\t612\tbuilding, edifice\n"
    "3\t0.0878\t8265\t796\tbed \n"
)


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def npy(array: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **kwargs)
    return buffer.getvalue()
