"""HTML reports: every page is one self-contained file made from a template in `templates/`. Knows
no models and no HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_url import encode
from .errors import DataError

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **data: Any) -> str:
    """The page as text."""
    return _environment().get_template(template).render(data)


def write(path: str | os.PathLike[str], template: str, **data: Any) -> None:
    """Write the page a piece at a time; the file appears when it is complete. Raises
    `DataError`.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    with _writing(target, draft), draft.open("w", encoding="utf-8", errors="backslashreplace") as f:
        f.writelines(_environment().get_template(template).generate(data))


@contextmanager
def _writing(target: Path, draft: Path) -> Iterator[None]:
    try:
        yield
        draft.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def data_url(image: Image.Image, side: int, form: str = "JPEG", **options: int) -> str:
    """The image as a data URL, shrunk in place to at most `side` pixels a side."""
    image.thumbnail((side, side))
    file = BytesIO()
    image.save(file, form, **options)
    return encode(file.getvalue(), f"image/{form.lower()}")
