"""What medseg is told to segment, and what it says of the result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from MedSegLib.settings import Settings


class Box(NamedTuple):
    """A part of the room of a scan, in mm: from and to along R, A and S."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]


class Summary(NamedTuple):
    """What a run says of its result: the device that was used, what it doubts, seconds, and the
    volume of every structure in mL.
    """

    device: str
    warnings: tuple[str, ...]
    seconds: float
    volumes_ml: tuple[tuple[str, float], ...]


def infer_command(
    command: Sequence[str],
    scans: Sequence[Path],
    output: Path,
    settings: Settings,
) -> list[str]:
    """The arguments that segment one case into `output`, say how far they are, and print the
    record. scans: a file per channel, in the model's order.
    """
    arguments = ["infer", str(scans[0]), "-o", str(output)]
    arguments += ["--model", settings.model] if settings.model else []
    for scan in scans[1:]:
        arguments += ["--channel", str(scan)]
    if settings.structures:
        arguments += ["--roi", roi_text(settings.structures)]
    arguments += ["--device", settings.device, "--progress", "json", "--json"]
    arguments += [] if settings.cleanup else ["--no-cleanup"]
    arguments += ["--tta"] if settings.mirrored else []
    return [*command, *arguments]


def roi_text(names: Sequence[str]) -> str:
    """Structures as `--roi` takes them. Raises `ValueError` for a name with a comma, which it
    cannot take by name.
    """
    for name in names:
        if "," in name:
            raise ValueError(
                f"'{name}' holds a comma, so it cannot be chosen by name; segment all structures"
            )
    return ",".join(names)


def summary_of(outputs: Sequence[str]) -> Summary:
    """What the records that were printed say together; nothing of what is damaged."""
    devices: list[str] = []
    warnings: list[str] = []
    seconds = 0.0
    volumes: tuple[tuple[str, float], ...] = ()
    for text in outputs:
        try:
            record = json.loads(text)
            devices.append(str(record["settings"]["device"]))
            warnings += [str(one) for one in record.get("warnings", [])]
            seconds += sum(float(one) for one in record["seconds"].values())
            rows = record["structures"]
            volumes = tuple((str(row["name"]), float(row["ml"])) for row in rows)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return Summary(
        device=devices[0] if devices else "",
        warnings=tuple(dict.fromkeys(warnings)),
        seconds=seconds,
        volumes_ml=volumes,
    )


def device_words(asked: str, used: str) -> str:
    """Which device it was, and who chose it."""
    if not used:
        return ""
    return f"auto chose {used}" if asked == "auto" else f"on {used}"


def devices_in(text: str) -> list[str]:
    """The devices that `medseg infer --help` says it takes."""
    match = re.search(r"--device\s+([a-z|:N]+)", text)
    names = match[1].split("|") if match else ["auto", "cpu"]
    return [name for name in names if ":" not in name]


def cube_around(centre: Sequence[float], edge_mm: float) -> Box:
    """The cube of an edge around a point."""
    half = edge_mm / 2
    low = tuple(float(one) - half for one in centre)
    high = tuple(float(one) + half for one in centre)
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def box_of_bounds(bounds: Sequence[float]) -> Box:
    """The box of bounds as VTK gives them: from and to for each axis in turn."""
    low, high = bounds[0::2], bounds[1::2]
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
