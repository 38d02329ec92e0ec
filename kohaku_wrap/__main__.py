"""`kwrap` and `python -m kohaku_wrap`: signals are taken from the first moment on, before the command is imported."""

from kohaku_wrap.import_path import drop_current_folder

drop_current_folder()

import os  # noqa: E402
import signal  # noqa: E402


def leave(_number: int, _frame: object) -> None:
    """End at once; nothing has begun."""
    try:
        os.write(2, b"error: interrupted\nNothing was begun.\n")
    finally:
        os._exit(130)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    from kohaku_wrap.outlets import open_outlets

    open_outlets()
    from kohaku_wrap import cli

    cli.main()


if __name__ == "__main__":
    main()
