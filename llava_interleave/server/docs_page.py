"""The page of /docs: /openapi.json as plain HTML, without a script."""

from __future__ import annotations

from typing import Any

from .. import reports

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}
BOUNDS = {
    "minimum": "from ",
    "exclusiveMinimum": "above ",
    "maximum": "to ",
    "exclusiveMaximum": "below ",
    "minLength": "characters from ",
    "maxLength": "characters to ",
    "minItems": "items from ",
    "maxItems": "items to ",
    "maxProperties": "fields to ",
    "pattern": "like ",
}
"""JSON Schema's limits in words."""


def reference(document: dict[str, Any]) -> str:
    """The whole page."""
    return reports.render(
        "docs_page.html", title="LLaVA-Interleave API", document=document, bounds=BOUNDS
    )
