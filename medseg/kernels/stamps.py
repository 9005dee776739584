"""What compiled code was made from and for: the text of its sources, and a kind of processor.

numba stamps code with the time and size of one file, and with the very processor. Installing
changes times, a changed file of which code was inlined is not noticed, and a container moves from
one processor to the next.
"""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache
from pathlib import Path

#: Kinds of processors that code is compiled for ahead, best first: the machine's name, LLVM's name,
#: and the instructions without which it does not run (x86-64 psABI, section 3.1.1).
_AVX2 = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "x86-64-v4": ("x86_64", "x86-64-v4", (*_AVX2, *_AVX512)),
    "x86-64-v3": ("x86_64", "x86-64-v3", _AVX2),
    "arm64": ("arm64", "generic", ()),
}
_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}
_KERNEL = re.compile(r"^\s*(?:from medseg\.kernels\.|import medseg\.kernels\.)(\w+)", re.MULTILINE)
_KERNELS = re.compile(r"^\s*from medseg\.kernels import \(?([\w, \n]+)", re.MULTILINE)


def kinds_of_machine() -> list[str]:
    """The kinds of processors that code can be compiled for on a machine such as this."""
    machine = _MACHINES.get(platform.machine().lower(), "")
    return [name for name, (of, _, _) in KINDS.items() if of == machine]


@cache
def kind_of_processor() -> str:
    """The best kind that this processor is of; '' if it is of none, or numba is told another."""
    import numba
    from llvmlite import binding

    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system
        features = {}
    for name in kinds_of_machine():
        _, processor, needs = KINDS[name]
        if all(features.get(one) for one in needs):
            return name if numba.config.CPU_NAME in (None, processor) else ""
    return ""


def stamp_of(file: str) -> str:
    """SHA-256 over a file of kernels and all kernels' files that it imports, directly or not.

    Raises `OSError` for a function that lies in no file.
    """
    digest = hashlib.sha256()
    for path in sorted(_sources(Path(file), set()), key=lambda one: one.name):
        digest.update(f"{path.name} {_read(path)[0]}\n".encode())
    return digest.hexdigest()


def _sources(path: Path, others: set[Path]) -> set[Path]:
    """`others` with a file and what it imports of `medseg.kernels`."""
    others.add(path)
    for name in _read(path)[1]:
        imported = Path(__file__).with_name(f"{name}.py")
        if imported not in others and imported.is_file():
            _sources(imported, others)
    return others


def _read(path: Path) -> tuple[str, list[str]]:
    """A file's hash, and the names that it imports of `medseg.kernels`."""
    about = path.stat()
    return _read_once(path, about.st_mtime_ns, about.st_size)


@cache
def _read_once(path: Path, time_ns: int, size_bytes: int) -> tuple[str, list[str]]:
    """The same; a file that changes is read again."""
    content = path.read_bytes()
    text = content.decode("utf-8", "replace")
    names = [*_KERNEL.findall(text), *re.findall(r"\w+", " ".join(_KERNELS.findall(text)))]
    return hashlib.sha256(content).hexdigest(), names
