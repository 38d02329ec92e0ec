"""`kwrap` and `python -m kohaku_wrap`: signals are taken from the first moment on, before the command is imported."""

from kohaku_wrap.import_path import drop_current_folder

drop_current_folder()

# After the call: a contextlib.py of the current folder must not be what is imported.
import contextlib  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

NEEDED_BYTES = (2 << 30) + (40 << 20) * min(os.cpu_count() or 1, 64)
"""Of address space: `extract` reserves 1.9 GB on two processors, and numpy 40 MiB for a thread of each more."""

TOO_LITTLE = (
    f"error: there is not enough memory: kwrap needs {NEEDED_BYTES >> 20:,} MiB of address space\n"
    "`ulimit -v` shows its limit in KiB; raise it: ulimit -v unlimited\n"
)


def leave(_number: int, _frame: object) -> None:
    """End at once; nothing has begun."""
    try:
        os.write(2, b"error: interrupted\nNothing was begun.\n")
    finally:
        os._exit(130)


def has_room() -> bool:
    """Whether the limit of address space lets the libraries load: many abort or crash where it does not."""
    try:
        mmap.mmap(-1, NEEDED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    if not has_room():
        with contextlib.suppress(OSError):
            os.write(2, TOO_LITTLE.encode())
        sys.exit(1)
    from kohaku_wrap.outlets import open_outlets

    open_outlets()
    from kohaku_wrap import cli

    cli.main()


if __name__ == "__main__":
    main()
