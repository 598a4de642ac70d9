"""What keeps the device's process small: how it allocates, and what it does not import.

A library's own imports bring in more than the device calls. Such a module is deferred: it is there, under its
name, and loads itself when somebody touches it. Nothing that works without this stops to work with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>
_MADV_DONTNEED = 4  # <sys/mman.h>
_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<mode>\S{4}) \S+ \S+ \d+ *(?P<path>.*)")
DEFERRED: Mapping[str, tuple[str, ...]] = {
    # pydantic asks for its plug-ins, which are switched off below: 1 MiB.
    "importlib.metadata": ("entry_points",),
    # paho asks for a proxy at each connection, if there is a module for proxies: 1.5 MiB with http.
    "urllib.request": (),
    # numpy imports all of itself: 1 MiB.
    "numpy.ctypeslib": (),
    "numpy.fft": (),
    "numpy.ma": (),
    "numpy.polynomial": (),
}
"""Modules -> the functions of each that are imported by name, and load it at their first call."""


def settle() -> None:
    """Settles, before numpy is loaded, how this process uses memory: a round must not leave it larger."""
    # Training uses one core; every further thread of a linear algebra library only reserves memory.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    # Nor may a package that happens to be installed change how messages are checked.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if not any(isinstance(finder, _Deferrer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Deferrer(DEFERRED))
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    # By default glibc keeps what was freed, by thread, and more of it with every large block (mallopt(3)).
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 65_536), (_M_TRIM_THRESHOLD, 65_536)):
        mallopt(parameter, value)


def give_back() -> None:
    """Gives back to the system what this process holds and does not use now.

    That is memory that lies free between blocks in use (glibc by itself only trims the end), and the code and
    constants of libraries: most was used while they were loaded, and is not needed again. What is comes back
    from the page cache.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError, AttributeError):  # not Linux
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, size in library_pages(_SMAPS.read_text()):
            advise(start, size, _MADV_DONTNEED)


def library_pages(smaps: str) -> Iterator[tuple[int, int]]:
    """Finds the mappings of libraries that hold nothing but what is in their files.

    Args:
        smaps: text of `/proc/PID/smaps`, see proc(5).

    Yields:
        Address and size in bytes. A mapping that can be written, or was (`Anonymous`), is left out: what was
        written would be lost.
    """
    mapping: re.Match[str] | None = None
    for line in smaps.splitlines():
        if (found := _MAPPING.match(line)) is not None:
            mapping = found
        elif mapping is not None and line.startswith("Anonymous:") and int(line.split()[1]) == 0:
            start, end = int(mapping["start"], 16), int(mapping["end"], 16)
            if mapping["mode"] in ("r--p", "r-xp") and ".so" in mapping["path"]:
                yield start, end - start


class _Deferrer(MetaPathFinder, Loader):
    """Finds the modules that are deferred, and puts a stand-in in the place of each."""

    def __init__(self, deferred: Mapping[str, tuple[str, ...]]) -> None:
        self._deferred = deferred

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._deferred:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is None or found.loader is None:
            return None
        return ModuleSpec(fullname, self, origin=found.origin, loader_state=found)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.loader_state, self._deferred[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """Does no more than to let it load itself."""
        module.__dict__["_ready"] = True


class _Deferred(ModuleType):
    """Stands for a module until one of its attributes is asked for."""

    def __init__(self, spec: ModuleSpec, functions: tuple[str, ...]) -> None:
        super().__init__(spec.name)
        self.__dict__.update(_spec=spec, _functions=functions, _ready=False, _real=None)
        self.__dict__["_lock"] = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            if name in self._functions:
                return self._later(name)
            if name == "__path__":
                return self._below()
        return getattr(self._load(), name)

    def _below(self) -> Sequence[str]:
        """Where a package's own modules are: asked when one is imported, and when a function is by name."""
        path: list[str] | None = self._spec.submodule_search_locations
        if path is None or not self._ready:
            raise AttributeError("__path__")
        return path if self._functions else self._load().__path__

    def _later(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(self._load(), name)(*arguments, **named)

        return call

    def _load(self) -> ModuleType:
        with self._lock:
            if self._real is None:
                spec = self._spec
                real = module_from_spec(spec)
                sys.modules[spec.name] = real
                spec.loader.exec_module(real)
                parent, _, child = spec.name.rpartition(".")
                setattr(sys.modules[parent], child, real)
                self.__dict__["_real"] = real
            loaded: ModuleType = self._real
            return loaded
