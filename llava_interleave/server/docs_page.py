"""The page of /docs: what /openapi.json says, to be read. Plain HTML of our own, without a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

BOUNDS = {
    "minimum": "from ",
    "exclusiveMinimum": "above ",
    "maximum": "to ",
    "exclusiveMaximum": "below ",
} | {
    "minLength": "characters from ",
    "maxLength": "characters to ",
    "minItems": "items from ",
    "maxItems": "items to ",
    "maxProperties": "fields to ",
    "pattern": "like ",
}
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>LLaVA-Interleave: the API</title><link rel="icon" href="data:,"><link rel="stylesheet" href="style.css"></head>
<body class="reference"><main><h1>The API</h1>
<p>What is sent and answered, made from <a href="openapi.json">/openapi.json</a>. A field that may be null may be left out.
Whatever is refused (4XX) or goes wrong (5XX) is answered by a <a href="#Failure">Failure</a>.</p>
"""


def reference(document: dict[str, Any]) -> str:
    """The whole page."""
    return HEAD + "".join(_parts(document)) + "</main></body></html>\n"


def _parts(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(route['description'])}</p><dl>"
            if "requestBody" in route:
                yield f"<dt>sent</dt><dd>{_contents(route['requestBody'])}</dd>"
            yield f"<dt>answered</dt><dd>{_contents(route['responses']['200'])}</dd></dl>"
    yield "<h2>Forms</h2>"
    for name, schema in document["components"]["schemas"].items():
        about = "".join(
            f"<p>{escape(text)}</p>" for text in schema.get("description", "").split("\n\n") if text
        )
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3>{about}<table><tr><th>field<th>form<th>without it</tr>'
        for field, form in schema["properties"].items():
            needed = field in schema.get("required", ())
            default = (
                "needed"
                if needed
                else escape(json.dumps(form["default"]))
                if form.get("default") is not None
                else ""
            )
            yield f"<tr><th>{escape(field)}<td>{_form(form)}<td>{default}</tr>"
        yield "</table>"


def _contents(told: dict[str, Any]) -> str:
    """The forms of a body, by media type."""
    return " or ".join(
        f"<code>{escape(kind)}</code>: {_form(body['schema'])}"
        for kind, body in told.get("content", {}).items()
    )


def _form(schema: dict[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if several := schema.get("anyOf") or schema.get("oneOf"):
        forms = list(dict.fromkeys(map(_form, several)))
        return (
            " or ".join(forms)
            if len(forms) < 4
            else "one of <ul>" + "".join(f"<li>{form}</li>" for form in forms) + "</ul>"
        )
    if "const" in schema or "enum" in schema:
        return " or ".join(
            f"<code>{escape(json.dumps(value))}</code>"
            for value in schema.get("enum", [schema.get("const")])
        )
    kind = schema.get("type", "anything")
    words = escape(" or ".join(kind) if isinstance(kind, list) else kind)
    if kind == "array":
        words = f"list of ({_form(schema.get('items', {}))})"
    elif "properties" in schema:
        words = (
            "{"
            + ", ".join(
                f"{escape(name)}: {_form(form)}" for name, form in schema["properties"].items()
            )
            + "}"
        )
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        words = f"object of ({_form(schema['additionalProperties'])})"
    bounds = [
        f"{said}{_number(schema[bound])}" for bound, said in BOUNDS.items() if bound in schema
    ]
    return f"{words} <small>({', '.join(bounds)})</small>" if bounds else words


def _number(bound: float | str) -> str:
    return escape(bound) if isinstance(bound, str) else f"{bound:,.15g}"
