"""What a structure is called, coded and coloured in DICOM: `Label` to the items of SEG, RTSTRUCT
and SR, and back.

Colours are CIELab of D65, as pixelmed, dcmqi and highdicom write them (PS3.3 C.10.7.1.1 scales them
to 16 bits).
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from medseg.errors import BadConfig

if TYPE_CHECKING:
    from medseg.labels import Code, Label, LabelTable

# medseg.labels is imported where used: it writes its tables through medseg.files, in this package.

#: Coding scheme of structures that have no code of a terminology; every object that uses it
#: declares it.
PRIVATE_SCHEME = "99MEDSEG"
_TISSUE = ("SCT", "85756007", "Tissue")
_STRUCTURE = ("SCT", "123037004", "Anatomical Structure")


def category_of(label: Label) -> Code:
    """The category of a structure; of one without codes it is 'Tissue', which claims least."""
    from medseg.labels import Code

    if label.category is not None:
        return label.category
    return Code(*(_STRUCTURE if label.type is not None else _TISSUE))


def type_of(label: Label) -> Code:
    """What a structure is: its own code, or a private one that is the same wherever the name is the
    same.
    """
    from medseg.labels import Code

    if label.type is not None:
        return label.type
    return Code(
        PRIVATE_SCHEME, hashlib.sha256(label.name.encode()).hexdigest()[:16], text(label.name)
    )


def code_item(code: Code) -> Any:
    """A code as an item of a DICOM sequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    if len(code.value) <= 16:
        item.CodeValue = text(code.value, 16)
    elif code.value.startswith(("urn:", "http:", "https:")):
        item.URNCodeValue = code.value
    else:
        item.LongCodeValue = code.value
    item.CodingSchemeDesignator = text(code.scheme, 16)
    item.CodeMeaning = text(code.meaning) or text(code.value)
    return item


def scheme_item() -> Any:
    """The declaration of the private coding scheme (PS3.3 C.12.1.1.7)."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE_SCHEME
    item.CodingSchemeName = "Structure names of medseg label tables"
    item.CodingSchemeResponsibleOrganization = "medseg"
    return item


def read_code(items: Any) -> Code | None:
    """The first code of a DICOM sequence, or None if there is none, or only a private one of
    medseg.
    """
    from medseg.labels import Code

    if not items:
        return None
    item = items[0]
    value = str(
        item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue") or ""
    ).strip()
    scheme = str(item.get("CodingSchemeDesignator") or "").strip()
    if not value or scheme == PRIVATE_SCHEME:
        return None
    return Code(scheme, value, str(item.get("CodeMeaning") or "").strip())


def read_codes(category: Any, kind: Any, region: Any) -> dict[str, Code | None]:
    """The codes of a `Label` from the sequences of a segment or an ROI; modifiers are nested in
    what they modify.
    """
    codes = {
        "category": read_code(category),
        "type": read_code(kind),
        "type_modifier": (
            read_code(kind[0].get("SegmentedPropertyTypeModifierCodeSequence")) if kind else None
        ),
        "region": read_code(region),
        "region_modifier": (
            read_code(region[0].get("AnatomicRegionModifierSequence")) if region else None
        ),
    }
    if codes["type"] is None and codes["category"] == _TISSUE:
        codes["category"] = None  # what `category_of` says of a label without codes
    return codes


def table_of(
    values: list[int], *, names: list[str], colors: list[Any], codes: list[dict[str, Any]]
) -> LabelTable:
    """A label table from what an object says of each structure; without a name or colour it gets
    one.

    Raises `BadConfig`.
    """
    from medseg.labels import Label, LabelTable

    if len(set(values)) != len(values):
        raise BadConfig("two of its segments have the same number")
    plain = {label.value: label for label in LabelTable.from_values(values).labels}
    labels = []
    for place, value in enumerate(values):
        name = names[place].strip() or plain[value].name
        color = colors[place] or plain[value].color
        labels.append(Label(value, name, color, **codes[place]))
    return LabelTable(tuple(labels))


def text(words: str, limit: int = 64) -> str:
    """A name as DICOM can hold it: no backslashes, which divide values, no control characters, at
    most `limit` long.
    """
    return re.sub(r"[\x00-\x1f\x7f]+", " ", words.replace("\\", "/")).strip()[:limit].strip()


def cielab(color: tuple[int, int, int]) -> list[int]:
    """sRGB (0-255) as the three 16-bit numbers of a CIELab value."""
    linear = [_to_linear(part / 255) for part in color]
    x, y, z = (
        sum(m * part for m, part in zip(row, linear)) / white for row, white in zip(_TO_XYZ, _WHITE)
    )
    fx, fy, fz = _f(x), _f(y), _f(z)
    lightness, a, b = 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
    components = (lightness / 100 * 65535, (a + 128) / 255 * 65535, (b + 128) / 255 * 65535)
    return [min(65535, max(0, round(part))) for part in components]


def rgb(lab: Any) -> tuple[int, int, int] | None:
    """The sRGB colour of a CIELab value of three 16-bit numbers, clipped to what a screen shows;
    None if damaged.
    """
    if lab is None or len(lab) != 3:
        return None
    lightness, a, b = (
        int(lab[0]) / 65535 * 100,
        int(lab[1]) / 65535 * 255 - 128,
        int(lab[2]) / 65535 * 255 - 128,
    )
    fy = (lightness + 16) / 116
    xyz = [_f_inverse(f) * white for f, white in zip((fy + a / 500, fy, fy - b / 200), _WHITE)]
    linear = [sum(m * part for m, part in zip(row, xyz)) for row in _FROM_XYZ]
    red, green, blue = (min(255, max(0, round(_from_linear(part) * 255))) for part in linear)
    return red, green, blue


_WHITE = (0.95047, 1.0, 1.08883)
_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_FROM_XYZ = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))


def _to_linear(part: float) -> float:
    return float(((part + 0.055) / 1.055) ** 2.4) if part > 0.04045 else part / 12.92


def _from_linear(part: float) -> float:
    return float(1.055 * part ** (1 / 2.4) - 0.055) if part > 0.0031308 else 12.92 * part


def _f(t: float) -> float:
    return float(t ** (1 / 3)) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116


def _f_inverse(t: float) -> float:
    return float(t**3) if t**3 > 216 / 24389 else (116 * t - 16) / (24389 / 27)
