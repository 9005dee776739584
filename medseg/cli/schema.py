"""`medseg schema`: the JSON Schema (2020-12) of what medseg writes and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli.options import check_one_of

_FOLDER = Path(__file__).with_name("schemas")
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MODEL = "model"


def schema(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="Which of them. Default: list them all.")
    ] = None,
) -> None:
    """Print the JSON Schema of what medseg writes: files, and what commands print with --json.

    Examples:
    medseg schema
    medseg schema record
    """
    if kind is None:
        from medseg.cli.show import print_table

        print_table("", ("kind", "what it is"), list(descriptions().items()))
        return
    check_one_of("KIND", kind, tuple(descriptions()))
    print(json.dumps(schema_of(kind), indent=1, ensure_ascii=False))


def descriptions() -> dict[str, str]:
    """Every kind of JSON that medseg writes, with what it is."""
    kinds = [path.stem for path in _FOLDER.glob("*.json")]
    return {kind: schema_of(kind)["description"] for kind in sorted([*kinds, _MODEL])}


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind that `descriptions` names."""
    if kind == _MODEL:
        return _model_schema()
    content: dict[str, Any] = json.loads((_FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    return content


def _model_schema() -> dict[str, Any]:
    """That of model.json, which the class that reads it knows."""
    from medseg.models import ModelSpec

    head = {"$schema": _DIALECT, "$id": f"urn:medseg:schema:{_MODEL}"}
    about = {
        "title": "Model",
        "description": "model.json of a model folder, beside its weights and labels.csv.",
    }
    return head | ModelSpec.model_json_schema() | about
