"""Builds the client bundles and prints their sizes: `python -m deploy.bundle`, or `make bundle`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.bundle.build import TARGETS, BundleError, build_bundle


def main() -> int:
    """Builds what is asked for; returns the exit code."""
    systems = "\n".join(f"  {target.name}  {target.system}" for target in TARGETS.values())
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bundle",
        description="Build the client as one file for a device: no pip and no compiler needed there.",
        epilog=f"targets:\n{systems}\n\nexample: python -m deploy.bundle --out dist bookworm-arm64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="*", metavar="TARGET", help="all of them by default")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR", help="default: dist")
    parser.add_argument(
        "--sign-key",
        type=Path,
        metavar="PEM",
        help="the operator's key (STATE/keys/operator-key.pem): signs each bundle as an update, beside it",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.target) - TARGETS.keys())
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    try:
        for name in options.target or TARGETS:
            bundle = build_bundle(TARGETS[name], options.out)
            sys.stdout.write(f"{bundle}  {bundle.stat().st_size / 1e6:.1f} MB\n")
            if options.sign_key is not None:
                sys.stdout.write(f"{_sign(bundle, name, options.sign_key)}\n")
    except BundleError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _sign(bundle: Path, target: str, key: Path) -> Path:
    # Imported here: building needs nothing but pip, signing the aggregator's packages.
    from aggregator.adapters.keyfiles import UnusableKeys, private_key
    from deploy.bundle.signing import sign_bundle

    try:
        return sign_bundle(bundle, TARGETS[target], private_key(key))
    except UnusableKeys as error:
        raise BundleError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
