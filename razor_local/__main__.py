"""Entry point of the `razor-local` command and of `python -m razor_local`."""


def main() -> None:
    """Run the command line. Ctrl-C during its imports prints no traceback."""
    import sys

    try:
        from .cli import main as run
    except KeyboardInterrupt:
        sys.exit("\nAborted!")  # what click prints for a later one
    run(prog_name="razor-local")


if __name__ == "__main__":
    main()
