"""`medseg models` and `medseg version`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Json
from medseg.cli.show import print_table


def models(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="List the models in this folder, medseg's, nnU-Net's and MONAI's.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models that come with medseg, or those in a folder.

    Example:
    medseg models
    """
    import json

    from medseg.inference import UNTRAINED
    from medseg.models import bundled_models, list_models, load_checkpoint

    if folder is not None:
        entries = list_models(folder)
        if as_json:
            print(json.dumps(entries))
        else:
            rows_of_folder = [tuple(row.values()) for row in entries]
            print_table(
                f"Models in {folder}", ("path", "name", "structures", "about"), rows_of_folder
            )
        return
    rows = []
    for name in bundled_models():
        spec = load_checkpoint(name).spec
        rows.append({"name": name, "structures": len(spec.classes) - 1, "about": spec.description})
    for name, model in UNTRAINED.items():
        rows.append({"name": name, "structures": len(model.table), "about": model.about})
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(
            "Models",
            ("name", "structures", "about"),
            [tuple(map(str, row.values())) for row in rows],
        )


def version() -> None:
    """Print medseg's version."""
    from importlib.metadata import version as installed

    print(installed("medseg"))
