"""What is installed with medseg, under which licences: `docs/licences.md`, and an SBOM.

    python docs/packaging/licences.py                    # writes docs/licences.md anew
    python docs/packaging/licences.py --sbom sbom.json  # CycloneDX 1.6, with the versions here
    python docs/packaging/licences.py --sbom sbom.json --extras dicom pacs

Read from the metadata of the environment in which it is run; medseg has to be installed there.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "licences.md"
#: What packages call their licences, by the names of SPDX.
SPDX = {
    "BSD": "BSD-3-Clause", "BSD License": "BSD-3-Clause", "MIT License": "MIT",
    "ISC License": "ISC", "ISC License (ISCL)": "ISC", "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0", "Python Software Foundation License": "PSF-2.0",
    "Dual License": "Apache-2.0 OR BSD-3-Clause",
}  # fmt: skip
#: Licences that ask for more than their text to be handed on.
WEAK = {"LGPL-3.0-or-later", "MPL-2.0"}
PERMISSIVE = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
#: What PyTorch brings along where it is built for NVIDIA's GPUs, under NVIDIA's own licences.
OF_GPUS = re.compile(r"nvidia-.*|cuda-.*|triton")


def requirements(extras: Sequence[str] = ()) -> list[Requirement]:
    """What medseg requires, with that of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [one for one in map(Requirement, lines) if one.name != "medseg"]


def installed(wanted: Iterable[Requirement]) -> dict[str, Distribution]:
    """The packages that these requirements lead to on this system, by their names."""
    packages: dict[str, Distribution] = {}
    waiting = [(one, set(one.extras)) for one in wanted if _applies(one, set())]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in packages and not extras:
            continue
        try:
            packages[name] = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here; run this where medseg is") from None
        inner = map(Requirement, packages[name].requires or ())
        known = [one for one in inner if _applies(one, extras)]
        waiting += [(one, set(one.extras)) for one in known if one.name not in packages]
    return dict(sorted(packages.items()))


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": one}) for one in ("", *extras))


def licence_of(package: Distribution) -> str:
    """The licence of a package, as SPDX names it where it can be told."""
    about: Any = package.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [one.rpartition(":: ")[2] for one in about.get_all("Classifier") or ()]
    named = [SPDX[one] for one in classifiers if one in SPDX]
    first = (about.get("License") or "").strip().partition("\n")[0]
    return SPDX.get(first, first) if not named or first in PERMISSIVE | WEAK else named[0]


def parts(licence: str) -> set[str]:
    """The single licences that an expression combines."""
    return {one.strip(" ()") for one in re.split(r"\bAND\b|\bOR\b", licence)}


def page(packages: dict[str, Distribution]) -> str:
    """The text of docs/licences.md."""
    rows = [
        f"| {name} | {licence_of(one)} |"
        for name, one in packages.items()
        if not OF_GPUS.fullmatch(name)
    ]
    return f"""# Licences

medseg is under Apache-2.0. NiiVue (BSD-2-Clause) lies in `medseg/view/niivue`, with its licence
and those of what it holds. `pip install medseg` brings these packages along; the list is made by
`docs/packaging/licences.py` from what they say of themselves.

| package | licence |
|---|---|
{chr(10).join(rows)}

All but one are permissive. **connected-components-3d** is under the LGPL, version 3 or later.
medseg imports it as it is installed, from its own package, and changes nothing in it; so medseg's
licence stays as it is, and who hands on an image or an installer with it has to hand on its
licence, too, and let it be replaced. It numbers connected parts of label maps in
`medseg/postprocess/components.py`, `medseg/inference/frame.py`, `medseg/inference/tissues/` and
`medseg/dataset/check/measures.py`.

PyTorch built for NVIDIA's GPUs brings NVIDIA's libraries along, under NVIDIA's licences.
`constraints.txt` names a version that comes without them where there is no GPU.

`python docs/packaging/licences.py --sbom sbom.json` writes a software bill of materials
(CycloneDX 1.6) of what is installed, with versions. With the names of extras,
`python docs/packaging/licences.py --sbom sbom.json --extras dicom pacs`, it holds what these need.
"""


def sbom(packages: dict[str, Distribution]) -> dict[str, Any]:
    """A bill of materials as CycloneDX 1.6 has it (ECMA-424)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "medseg" / "packages.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    own = {"type": "application", "name": "medseg", "version": version, "bom-ref": "medseg"}
    own |= {"licenses": [{"expression": project["license"]}]}
    components = [
        {
            "type": "library",
            "name": name,
            "version": one.version,
            "bom-ref": f"pkg:pypi/{name}@{one.version}",
            "purl": f"pkg:pypi/{name}@{one.version}",
            "licenses": [_licence(licence_of(one))],
        }
        for name, one in packages.items()
    ]
    needs = [
        {"ref": f"pkg:pypi/{name}@{one.version}", "dependsOn": _needs(one, packages)}
        for name, one in packages.items()
    ]
    direct = {canonicalize_name(one.name) for one in requirements()}
    own_needs = [part["bom-ref"] for part in components if part["name"] in direct]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": components,
        "dependencies": [{"ref": "medseg", "dependsOn": own_needs}, *needs],
    }


def _licence(licence: str) -> dict[str, Any]:
    known = parts(licence) <= PERMISSIVE | WEAK
    return {"expression": licence} if known else {"license": {"name": licence or "not told"}}


def _needs(package: Distribution, packages: dict[str, Distribution]) -> list[str]:
    names = {canonicalize_name(Requirement(one).name) for one in package.requires or ()}
    names &= packages.keys()
    return sorted(f"pkg:pypi/{name}@{packages[name].version}" for name in names)


def main() -> None:
    """Write the page, or the bill."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sbom", type=Path)
    parser.add_argument("--extras", nargs="*", default=[])
    options = parser.parse_args()
    packages = installed(requirements(options.extras))
    if options.sbom is None:
        PAGE.write_text(page(packages), encoding="utf-8", newline="\n")
    else:
        text = json.dumps(sbom(packages), indent=1) + "\n"
        options.sbom.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
