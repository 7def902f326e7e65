"""Shared by tests: see tests/test_cli.py."""

import contextlib
import io
import logging
import sys
from dataclasses import dataclass

import pytest

from llava_interleave.cli import main


@dataclass(frozen=True)
class Done:
    code: object
    out: str
    err: str


def llava(*words: object, stdin: bytes = b"") -> Done:
    """Run the program in this process, as a shell would: no terminal on any side."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["llava", *map(str, words)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        try:
            main()
            code: object = 0
        except SystemExit as ended:
            code = ended.code
    for name in ("", "llava_interleave.access"):  # of `llava serve`, to a stream that ends here
        logger = logging.getLogger(name)
        for handler in [one for one in logger.handlers if getattr(one, "stream", None) is err]:
            logger.removeHandler(handler)
    written = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Done(code or 0, *written)
