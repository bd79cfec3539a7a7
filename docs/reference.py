"""The generated parts of this folder: `python -m docs.reference` (`make docs`) writes them from the code.

A page keeps what stands above its mark; what follows it is replaced. A test fails while a page is stale.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from mixloom.cli.main import app as cli_app
from server.api.app import create_app
from server.settings import Settings

FOLDER = Path(__file__).parent
MARK = "<!-- What follows is written by `make docs`. -->"
NOT_OURS = ("help", "install_completion", "show_completion")
"""Options that every command line of this kind has."""
OF_A_LIST = {"limit", "order", "after"}
PIPE = "\\|"

Schema = dict[str, Any]


def main() -> None:
    """Bring every page up to date."""
    for name in PAGES:
        (FOLDER / name).write_text(page(name), encoding="utf-8")


def page(name: str) -> str:
    """What a page should be now: its own head, and what the code says."""
    head, mark, _ = (FOLDER / name).read_text(encoding="utf-8").partition(MARK)
    assert mark, f"docs/{name} has no line `{MARK}`"
    return f"{head}{MARK}\n\n" + "\n\n".join(PAGES[name]()) + "\n"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', PIPE) for cell in row)} |" for row in cells)


def settings() -> Iterator[str]:
    """Every setting with its default."""
    yield table(
        ("setting", "default", "meaning"),
        (
            (f"`{name}`", "" if field.default is None else f"`{field.default}`", field.description or "")
            for name, field in Settings.model_fields.items()
        ),
    )


def cli() -> Iterator[str]:
    """Every command, in the order of `mixloom --help`."""
    yield from _commands("mixloom", typer.main.get_command(cli_app))


def _commands(path: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.name not in NOT_OURS
    ]
    usage = [path, *(_argument(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])]
    yield f"## `{' '.join(usage)}`"
    yield command.help
    lines = [f"- `{_argument(argument)}`: {argument.help}" for argument in arguments]
    lines += [f"- `{_option(option)}`: {_help(option)}" for option in options]
    if lines:
        yield "\n".join(lines)
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(f"{path} {name}", child)


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _option(option: Any) -> str:
    return ", ".join(option.opts) + ("" if option.is_flag else f" {option.metavar or option.name.strip('_').upper()}")


def _help(option: Any) -> str:
    has_default = not option.is_flag and option.default not in (None, "")
    said = f"{option.help}{f' Default {option.default}.' if has_default else ''}"
    return f"{said} Can be repeated." if option.multiple else said


def api() -> Iterator[str]:
    """Every route, by noun."""
    with tempfile.TemporaryDirectory() as folder:
        openapi = create_app(Settings(data_dir=Path(folder), admin_key="x" * 32)).openapi()
    schemas = openapi["components"]["schemas"]
    first_route: dict[str, str] = {}  # of each body's schema
    noun = None
    for path, method, operation in (
        (path, method.upper(), operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ):
        if operation["tags"][0] != noun:
            noun = operation["tags"][0]
            yield f"## {noun}"
        yield f"### {method} {path}"
        yield operation["description"]
        yield from _parameters(_inlined(operation.get("parameters", []), schemas))
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            schema = _inlined(content["schema"], schemas)
            first = first_route.setdefault(schema.get("title", path), f"{method} {path}")
            if first == f"{method} {path}":
                yield table((f"field of `{media_type}`", "type", "meaning"), _fields(schema, ""))
            else:
                yield f"Body: that of `{first}`."


def _inlined(value: Any, schemas: Schema) -> Any:
    """A part of an OpenAPI document, with what it refers to in place."""
    if isinstance(value, list):
        return [_inlined(item, schemas) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(schemas[value["$ref"].rpartition("/")[2]], schemas)
    return {key: _inlined(item, schemas) for key, item in value.items()}


def _parameters(parameters: list[Schema]) -> Iterator[str]:
    """Those of the query. A list's own three are described once, at the top of the page."""
    of_query = {parameter["name"]: parameter["schema"] for parameter in parameters if parameter["in"] == "query"}
    is_list = of_query.keys() >= OF_A_LIST
    rows = [
        (f"`{name}`", _type(schema), _meaning(schema))
        for name, schema in of_query.items()
        if not (is_list and name in OF_A_LIST)
    ]
    if rows:
        yield table(("parameter", "type", "meaning"), rows)
    if is_list:
        yield "A list, in pages."


def _fields(schema: Schema, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in schema["properties"].items():
        if "properties" in field:
            yield from _fields(field, f"{prefix}{name}.")
        else:
            required = ["Required."] if name in schema.get("required", []) else []
            yield f"`{prefix}{name}`", _type(field), " ".join([*required, _meaning(field)]).strip()


def _type(schema: Schema) -> str:
    if forms := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(one) for one in forms if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if "properties" in schema:
        return f"{{{', '.join(schema['properties'])}}}"
    return f"{schema.get('type', '')} {_bounds(schema)}".strip()


def _bounds(schema: Schema) -> str:
    """`from 0 to 1`. A bound that is only there against nonsense (a million or more) is not shown."""
    words = [
        f"{word} {schema[name]:g}"
        for word, name in (
            ("from", "minimum"),
            ("above", "exclusiveMinimum"),
            ("to", "maximum"),
            ("below", "exclusiveMaximum"),
        )
        if abs(schema.get(name, 1e6)) < 1e6
    ]
    return " ".join(words)


def _meaning(schema: Schema) -> str:
    text, default = schema.get("description", ""), schema.get("default")
    is_said = default in (None, "", {}, []) or "default" in text.lower()
    return text if is_said else f"{text} Default `{json.dumps(default)}`.".strip()


PAGES: dict[str, Callable[[], Iterator[str]]] = {"cli.md": cli, "api.md": api, "settings.md": settings}

if __name__ == "__main__":
    main()
