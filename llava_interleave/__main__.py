"""`python -m llava_interleave`, `torchrun -m llava_interleave` and the command `llava`."""

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C meanwhile is one line and exits 130, too."""
    try:
        from .cli import main as command_line
    except KeyboardInterrupt:
        print("llava: interrupted", file=sys.stderr)
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
