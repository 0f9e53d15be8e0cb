"""The command `specdec`, which is the same as `python -m specdec`."""

from specdec.interrupt import ends_at_once


def main() -> None:
    """Entry point of the console script."""
    with ends_at_once():
        from specdec.cli import main as run
    run()


if __name__ == "__main__":
    main()
