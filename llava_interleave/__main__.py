"""`python -m llava_interleave` and `torchrun -m llava_interleave` are `llava`."""

from .cli import main

if __name__ == "__main__":
    main()
