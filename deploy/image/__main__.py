"""Builds the image: `python -m deploy.image --out covey-arm64.img`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.image.build import build_image
from deploy.image.root import ImageError, RootRecipe, default_cache, root_archive

_SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))


def main() -> int:
    """Builds the image; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.image",
        description="Build a minimal Debian arm64 image that `covey flash` provisions. Run as root.",
        epilog="example: python -m deploy.image --out covey-arm64.img",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the image; sparse")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="where roots are kept"
    )
    parser.add_argument(
        "--sources",
        type=Path,
        default=next((path for path in _SOURCES if path.is_file()), _SOURCES[0]),
        metavar="FILE",
        help="Debian's package sources; by default this machine's",
    )
    parser.add_argument("--size", type=int, default=1_536, metavar="MIB", help="root partition, in MiB")
    options = parser.parse_args()
    try:
        archive = root_archive(RootRecipe(), options.cache, options.sources)
        sys.stdout.write(f"root file system: {archive}\n")
        build_image(archive, options.out, root_mib=options.size)
    except ImageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    used = options.out.stat().st_blocks * 512
    sys.stdout.write(
        f"image: {options.out}, {used / 1e6:.0f} MB used of {options.out.stat().st_size / 1e6:.0f} MB\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
