"""Find and check a data file inside an installed package, without importing the package."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


class DataSetUnavailable(RuntimeError):
    """The package that carries a data set is not installed, or its file is not the one reviewed."""


def read_packaged(package: str, relative: str, sha256: str) -> bytes:
    """The bytes of a file in an installed package, if they have the expected digest.

    The package is located, not imported: importing may need things that the data does not, and costs memory.

    Raises:
        DataSetUnavailable: no such package or file, or another digest.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataSetUnavailable(f"the package {package} is not installed (pip install 'covey[demo]')")
    path = Path(spec.origin).parent / relative
    if not path.is_file():
        raise DataSetUnavailable(f"the installed {package} has no {relative}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataSetUnavailable(f"{relative} of {package} is not the reviewed file; refusing to read it")
    return data
