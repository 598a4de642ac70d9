"""Handwritten digits, 8 x 8 pixels of 0 to 16, split by the form that they were written on.

The 1,797 test images of the UCI set (Alpaydin and Kaynak 1998), as shipped in scikit-learn (BSD-3). They come
in order of the original forms, one writer each, so a form is a device. The split is one of writers' styles
only: every form holds every digit.
"""

from __future__ import annotations

import gzip
import io

import numpy as np

from models.datasets.source import read_packaged
from models.examples import Examples

PACKAGE = "sklearn"
FILE = "datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
LABELS = tuple(str(digit) for digit in range(10))
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)


def load() -> list[Examples]:
    """One `Examples` a form, `form-01` to `form-14`; x is (n, 8, 8, 1) raw, 1,797 images in all.

    Raises:
        DataSetUnavailable: scikit-learn is not installed, or its file is not the reviewed one.
    """
    text = gzip.decompress(read_packaged(PACKAGE, FILE, SHA256)).decode("ascii")
    table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float32)
    x = table[:, :-1].reshape(-1, 8, 8, 1)
    y = table[:, -1].astype(np.int32)
    ends = (*FORM_STARTS[1:], len(table))
    return [
        Examples(f"form-{number:02d}", x[start:end].copy(), y[start:end].copy())
        for number, (start, end) in enumerate(zip(FORM_STARTS, ends, strict=True), start=1)
    ]
