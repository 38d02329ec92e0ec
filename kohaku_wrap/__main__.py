"""`python -m kohaku_wrap` is the `kwrap` command."""

from kohaku_wrap.cli import main

if __name__ == "__main__":
    main()
