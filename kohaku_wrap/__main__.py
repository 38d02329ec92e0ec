"""`kwrap` and `python -m kohaku_wrap`: signals are taken from the first moment on, before the command is imported."""

from kohaku_wrap.import_path import drop_current_folder

drop_current_folder()

# After the call: an mmap.py of the current folder must not be what is imported.
import mmap  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

NEEDED_BYTES = (2 << 30) + (40 << 20) * min(os.cpu_count() or 1, 64)
"""Of address space: `extract` reserves 1.9 GB on two processors, and numpy 40 MiB for a thread of each more."""

LARGE = ("numba", "numpy", "pyarrow", "torch")
"""Packages that many commands load; `--version` and whatever else needs none of them runs in 100 MiB."""


NOT_ON_WINDOWS = """error: kwrap does not run on Windows itself
Run it on Linux, or on Windows inside WSL2: https://learn.microsoft.com/windows/wsl/install
"""


def leave(_number: int, _frame: object) -> None:
    """End at once; nothing has begun."""
    try:
        os.write(2, b"error: interrupted\nNothing was begun.\n")
    finally:
        os._exit(130)


def has_room() -> bool:
    """Whether the limit of address space lets the large packages load."""
    try:
        mmap.mmap(-1, NEEDED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True


class AskForRoom:
    """An importer that finds nothing, and asks once for address space when the first large package is imported."""

    @classmethod
    def find_spec(cls, name: str, _path: object = None, _target: object = None) -> None:
        """Raises KwrapError where the limit does not let the package load: many abort or crash there."""
        if name in LARGE:
            if not has_room():
                from kohaku_wrap.errors import KwrapError

                raise KwrapError(
                    f"there is not enough memory: this command needs {NEEDED_BYTES >> 20:,} MiB of address space",
                    "`ulimit -v` shows its limit in KiB; raise it: ulimit -v unlimited",
                )
            sys.meta_path.remove(cls)


def main() -> None:
    """The console script."""
    if sys.platform == "win32":
        sys.exit(NOT_ON_WINDOWS.rstrip())
    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    sys.meta_path.insert(0, AskForRoom)
    from kohaku_wrap.outlets import open_outlets

    open_outlets()
    from kohaku_wrap import cli

    cli.main()


if __name__ == "__main__":
    main()
