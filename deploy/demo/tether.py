"""Becomes another program that the kernel kills when the process that asked for it dies.

Run as `python -I -S tether.py PARENT_PID PROGRAM [ARGUMENT ...]`. It is a program of its own, not a
`preexec_fn`, because code between fork and exec can deadlock in a process that has threads (Python 3.12
warns about it). The signal survives `execve` but not a change of user, so a tethered program must not drop
its privileges; and it is sent when the *thread* that started the child ends, so start from a thread that
lives as long as the child should (`processes.ChildProcess` insists on the main thread).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, then replaces itself by the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        # The parent may have died before the request was in place: no signal would ever come.
        if os.getppid() != parent:
            sys.exit("the parent died before its child began")
    os.execv(program[0], program)  # noqa: S606 - the absolute path and arguments come from our own parent


if __name__ == "__main__":
    main()
