"""The reference of recipe keys, written from the models that check them, so that it cannot fall behind."""

from __future__ import annotations

import json
import typing
from typing import Any

from polyreward.training.recipe import Recipe, Section


def recipe_reference() -> str:
    """All recipe keys with type, default and meaning, as Markdown tables, one a section."""
    lines: list[str] = []
    _section(Recipe, "", lines)
    return "\n".join(lines) + "\n"


def _section(section: type[Section], path: str, lines: list[str]) -> None:
    lines += [f"### {'`' + path + '`' if path else 'Top level'}", "", (section.__doc__ or "").strip(), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    inner: list[tuple[str, type[Section]]] = []
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None:
            inner.append((name if not path else f"{path}.{name}", nested))
        kind = f"section `{name}`" if nested is field.annotation else _kind(field.annotation)
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {field.description or ''} |")
    lines.append("")
    for name, nested in inner:
        _section(nested, name, lines)


def _nested(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _nested(arg))), None)


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict or annotation is dict:
        return "table"
    if arguments:
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "tables"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}[annotation.__name__]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, Section) or value in ((), {}):
        return ""
    return f"`{json.dumps(value)}`"
