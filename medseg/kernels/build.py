"""Compile the kernels of `medseg infer` before they are needed: `python -m medseg.kernels.build`.

What is compiled, and for which types, is listed in `medseg.kernels.signatures`. Code is made for
kinds of processors (`medseg.kernels.stamps.KINDS`) and not for the very one, so that a container
built here is fast there. A process compiles for one kind, for numba is told its processor once,
when it is loaded; there are as many processes as cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from medseg.errors import BadConfig, BadOutput
from medseg.kernels.signatures import SIGNATURES, types_of
from medseg.kernels.stamps import KINDS, kind_of_processor, kinds_of_machine


def build(folder: Path, kinds: list[str]) -> int:
    """Compile all listed kernels for kinds of processors into a folder; how many there are in all.

    What is there and fits is not compiled again. Raises `BadConfig` for kinds that cannot be
    compiled for here, `BadOutput` where the folder cannot be written or a kernel not be compiled.
    """
    for kind in kinds:
        if kind not in kinds_of_machine():
            known = ", ".join(kinds_of_machine()) or "none"
            raise BadConfig(f"code for {kind} cannot be compiled here; choose from: {known}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOutput(f"{folder}: cannot be written: {error.strerror}") from None
    cores = os.cpu_count() or 1
    shares = max(1, cores // max(1, len(kinds)))
    jobs = [(folder, kind, share) for share in _shares(shares) for kind in kinds]
    with ThreadPoolExecutor(cores) as workers:
        return sum(workers.map(_build_apart, jobs))


#: Seconds that modules take to compile, about, where it is more than one or two.
_SECONDS = {
    "painting": 12,
    "winograd": 6,
    "components": 4,
    "tissues": 4,
    "nets": 4,
    "thinning": 8,
    "interpolation": 5,
    "surfaces": 5,
    "outputs": 3,
    "rounding": 3,
}


def _shares(count: int) -> list[list[str]]:
    """The modules with listed kernels, shared out so that all shares take about as long."""
    modules = sorted({name.partition(".")[0] for name in SIGNATURES})
    shares: list[list[str]] = [[] for _ in range(min(count, len(modules)))]
    for module in sorted(modules, key=lambda one: -_SECONDS.get(one, 1)):
        min(shares, key=lambda share: sum(_SECONDS.get(one, 1) for one in share)).append(module)
    return shares


def _build_apart(job: tuple[Path, str, list[str]]) -> int:
    """Compile modules' kernels in a process whose numba believes to run on a kind of processor."""
    folder, kind, modules = job
    command = [sys.executable, "-m", "medseg.kernels.build", "--into", str(folder)]
    command += ["--kind", kind, "--modules", *modules]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or [f"ended with {ran.returncode}"])[-1]
        raise BadOutput(f"{folder}: kernels were not compiled for {kind}: {reason}")
    return int(ran.stdout)


def build_modules(folder: Path, kind: str, modules: list[str]) -> int:
    """Compile modules' listed kernels here and now; how many there are."""
    import numba

    numba.config.CPU_NAME, numba.config.CPU_FEATURES = KINDS[kind][1], ""  # read at the first use
    from medseg.kernels.compiled import CodeAhead
    from medseg.kernels.stamps import stamp_of

    kernels = {module: import_module(f"medseg.kernels.{module}") for module in modules}
    _keep_nothing_else()
    (folder / kind).mkdir(parents=True, exist_ok=True)
    count = 0
    for name, signatures in SIGNATURES.items():
        module, _, function = name.partition(".")
        if module not in kernels:
            continue
        kernel = getattr(kernels[module], function)
        stamp = stamp_of(kernel.py_func.__code__.co_filename)
        kernel._cache = CodeAhead(kernel.py_func, stamp, folder, kind=kind)
        for signature in signatures:
            kernel.compile(types_of(signature))
        count += len(signatures)
    return count


def _keep_nothing_else() -> None:
    """Kernels that others call are part of these; on their own they are nobody's."""
    from numba.core.caching import NullCache

    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("medseg.kernels.") else ():
            if hasattr(value, "py_func"):
                value._cache = NullCache()


def main() -> None:
    """Parse and build. Exit codes are those of `medseg`."""
    from medseg.kernels.compiled import AHEAD

    parser = argparse.ArgumentParser(prog="python -m medseg.kernels.build", description=__doc__)
    parser.add_argument("--into", type=Path, default=AHEAD, help="default: within medseg")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--kind", choices=KINDS, help="default: that of this processor")
    kinds.add_argument("--all", action="store_true", help="for all kinds of such machines")
    parser.add_argument("--modules", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.modules:
        print(build_modules(options.into, options.kind, options.modules))
        return
    kind = options.kind or kind_of_processor()
    chosen = kinds_of_machine() if options.all else [kind] if kind else []
    try:
        count = build(options.into, chosen)
    except (BadConfig, BadOutput) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{count} kernels for {', '.join(chosen) or 'no kind of processor'} in {options.into}")


if __name__ == "__main__":
    main()
