"""Errors of a medseg that runs, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Sequence

#: What a line of a failed program holds, and what to say of it. The first that fits is said.
_KNOWN = (
    ("No module named medseg", "medseg is not installed in this Python; press Install"),
    ("No module named 'medseg'", "medseg is not installed in this Python; press Install"),
    (
        "No module named 'torch'",
        "PyTorch is missing in this Python; press Install, or install the extension PyTorch",
    ),
    (
        "CUDA out of memory",
        "the graphics card has too little memory for this model; choose the device cpu, or close"
        " other programs that use the card",
    ),
    (
        "No space left on device",
        "the disk is full; free some space, or set the folder for temporary files in Slicer's"
        " settings to another disk",
    ),
    (
        "No matching distribution found",
        "the package server has no medseg for this Python; give a file of medseg (.whl) as what to"
        " install",
    ),
    (
        "Could not find a version that satisfies",
        "the package server has no medseg for this Python; give a file of medseg (.whl) as what to"
        " install",
    ),
    (
        "ResolutionImpossible",
        "medseg needs other packages than those this Slicer holds, which are kept as they are; use"
        " a newer Slicer, or a medseg that is installed elsewhere",
    ),
    (
        "Temporary failure in name resolution",
        "this computer has no network, and medseg is to be fetched; give a file of medseg (.whl)"
        " as what to install",
    ),
)
_OWN = "medseg: "


def sentence_of(lines: Sequence[str]) -> str:
    """The last thing a failed medseg said, without its name; '' where it said nothing."""
    own = [line[len(_OWN) :] for line in lines if line.startswith(_OWN)]
    rest = [line.strip() for line in lines if line.strip()]
    return own[-1] if own else rest[-1] if rest else ""


def explain_end(code: int, lines: Sequence[str]) -> str:
    """Why a program that ended with a code other than 0 did so, and what to do. lines: what it
    wrote to stderr.
    """
    own = [line for line in lines if line.startswith(_OWN)]
    if not own:
        for part, sentence in _KNOWN:
            if any(part in line for line in lines):
                return sentence
    if code in (-9, 137):
        return (
            "the system ended medseg, most likely because memory ran out; close other programs,"
            " crop the volume, or choose a smaller model"
        )
    if code < 0 or code in (0xC0000005, 0xC0000409):
        return (
            f"medseg crashed (code {code}); choose the device cpu, and report it with the text of"
            " the log"
        )
    said = sentence_of(lines)
    return said or f"medseg ended with exit code {code} and said nothing; look at the log"
