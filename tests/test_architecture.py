"""The house rules of ARCHITECTURE.md, held by reading the source: who may import whom, and what may
not be written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "medseg"
#: Imported where used, so that `medseg --help` answers at once; torch is at the top of the modules
#: that are only loaded to compute with it.
HEAVY = {
    "torch",
    "monai",
    "SimpleITK",
    "matplotlib",
    "PIL",
    "pydicom",
    "highdicom",
    "scipy",
    "numba",
    "nibabel",
    "cc3d",
    "safetensors",
    "pynetdicom",
    "tensorboard",
    "mlflow",
    "dicomweb_client",
    "requests",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "pyarrow",
}
#: What is only loaded to compute with it may import torch at the top; the compiled loops may import
#: numba.
TORCH_AT_TOP = ("networks", "training", "inference.window", "inference.exact", "inference.backends")
ALSO_AT_TOP = {
    "kernels": {"numba"},
    "evaluation.surfaces": {"scipy"},
    "evaluation.lesions": {"scipy"},
    "evaluation.comparison": {"scipy"},
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, places: Iterable[str]) -> bool:
    """Whether a module is one of the places or lies in one of these packages."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


NAMES = {name_of(path) for path in SOURCES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=path.name)


def imports(node: ast.AST, *, whole: bool) -> Iterator[tuple[str, str]]:
    """(module, name) of every import below `node` but those for type checkers; with `whole` also
    inside functions.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.module or "", alias.name) for alias in child.names)
        elif whole or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, whole=whole)


def floors() -> list[list[str]]:
    """The floors of ARCHITECTURE.md from the ground up: packages, and on the ground modules in
    their order.
    """
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = text.split("```floors\n")[1].split("```")[0]
    rows = sorted(line.split() for line in block.splitlines())
    return [names for _, *names in rows]


FLOORS = floors()
GROUND = FLOORS[0]
PACKAGES = {name for row in FLOORS for name in row if (PACKAGE / name / "__init__.py").is_file()}
#: Doors beside those of the packages, and rooms without one: each of their modules is for the one
#: of the same subject.
DOORS = PACKAGES | {"io.dicom"}
WITHOUT_A_DOOR = ("kernels", "networks.ops")


def home_of(name: str) -> str:
    """The package of a module, or the module itself on the ground floor."""
    return name.split(".")[0]


@cache
def handed_out(package: str) -> dict[str, str]:
    """What the door of a package hands out: name -> module; of a module that is handed out whole,
    itself.
    """
    for node in ast.walk(tree_of(PACKAGE / package.replace(".", "/") / "__init__.py")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "door":
            table: dict[str, tuple[str, ...]] = ast.literal_eval(node.args[1])
            return {name: module or name for module, names in table.items() for name in names}
    return {}


def imported(path: Path, *, whole: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) of what a module imports from medseg, without 'medseg.'; the name is '' for a
    whole module.
    """
    for module, name in imports(tree_of(path), whole=whole):
        if module.split(".")[0] == "medseg":
            inner = module.removeprefix("medseg").lstrip(".")
            longer = f"{inner}.{name}".lstrip(".")
            yield (longer, "") if longer in NAMES else (inner, name)


def own_imports(path: Path, *, whole: bool = True) -> set[str]:
    """The modules of medseg that a module imports; through a door, those that it hands out."""
    found = set()
    for module, name in imported(path, whole=whole):
        inside = handed_out(module).get(name) if module in DOORS and name else None
        found.add(f"{module}.{inside}" if inside else module)
    return found - {""}


def test_every_room_has_its_floor():
    listed = [name for row in FLOORS for name in row]
    assert sorted(listed) == sorted(set(listed))
    assert {home_of(name) for name in NAMES} - {"", "__main__"} == set(listed)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_room_imports_only_from_floors_below(path: Path):
    own = home_of(name_of(path))
    if own in ("", "__main__"):  # the public names, looked up when used
        return
    floor = next(n for n, names in enumerate(FLOORS) if own in names)
    below = {name for names in FLOORS[:floor] for name in names}
    if floor == 0:
        below = set(GROUND[: GROUND.index(own)])
    homes = {home_of(module) for module, _ in imported(path)} - {own, ""}
    assert homes <= below


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_another_package_is_entered_by_its_door(path: Path):
    name = name_of(path)
    for module, what in imported(path):
        if is_below(module, WITHOUT_A_DOOR) or home_of(module) not in PACKAGES:
            continue
        at_home = home_of(module) == home_of(name) or name == ""
        if at_home:  # where doors are not for those who live there
            assert module not in PACKAGES or path.name == "__init__.py", (
                f"{module} imports from its own door"
            )
        elif module in DOORS and not what:
            continue  # the door as a whole has nothing but what it hands out
        elif module in DOORS:
            assert what in handed_out(module), f"{module} does not hand out {what}"
        else:
            package, _, whole = module.rpartition(".")
            assert handed_out(package).get(whole) == whole, (
                f"{module} is behind the door of {package}"
            )


@pytest.mark.parametrize("package", sorted(DOORS))
def test_a_door_imports_nothing_and_hands_out_what_it_says(package: str):
    path = PACKAGE / package.replace(".", "/") / "__init__.py"
    assert set(imports(tree_of(path), whole=True)) <= {
        ("typing", "TYPE_CHECKING"),
        ("medseg", "door"),
    }
    names = handed_out(package)
    block = [node for node in tree_of(path).body if isinstance(node, ast.If)]
    said = {
        alias.name: (node.module or "").removeprefix(f"medseg.{package}").lstrip(".") or alias.name
        for node in ast.walk(block[0]) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } if block else {}  # fmt: skip
    assert said == names
    door = import_module(f"medseg.{package}")
    for name, module in names.items():
        assert module == name or f"{package}.{name}" not in NAMES, (
            f"{name} would be hidden by a module of its name"
        )
        home = import_module(f"medseg.{package}.{module}")
        assert getattr(door, name) is (home if module == name else getattr(home, name))


def test_modules_do_not_import_each_other_in_circles():
    """Imports inside functions count, too."""
    graph = {
        name_of(path): own_imports(path) - {name_of(path)}
        for path in SOURCES
        if name_of(path) not in DOORS
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_heavy_packages_are_imported_where_they_are_used(path: Path):
    name = name_of(path)
    allowed = {"torch"} if is_below(name, TORCH_AT_TOP) else set()
    for place, packages in ALSO_AT_TOP.items():
        allowed |= packages if is_below(name, (place,)) else set()
    top = {module.split(".")[0] for module, _ in imports(tree_of(path), whole=False)}
    assert top & HEAVY <= allowed


def test_the_public_names_need_no_package_at_all():
    top = {
        module.split(".")[0] for module, _ in imports(tree_of(PACKAGE / "__init__.py"), whole=False)
    }
    assert top <= {"collections", "importlib", "typing"}


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save",
    "np.load", "np.save",
    "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp",
}  # fmt: skip
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "xmlrpc",
    "telnetlib",
    "socket", "socketserver", "ssl", "http", "urllib", "requests", "ftplib", "smtplib",
}  # fmt: skip
#: Where one of these modules is what the module is for.
ALLOWED_MODULES = {
    "view.server": {"http"},
    "pacs.client": {"requests"},
    "pacs.node": {"socketserver"},
    "annotation.server": {"socket"},
    "cohort.cluster": {"socket"},  # to the head of the cluster that --on ray names
}
FORBIDDEN_METHODS = {"extractall", "unpack_archive"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_dangerous_is_called_or_imported(path: Path):
    for module, name in imports(tree_of(path), whole=True):
        top = module.split(".")[0]
        assert top not in FORBIDDEN_MODULES or top in ALLOWED_MODULES.get(name_of(path), ()), module
        assert (module, name) != ("urllib", "request")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            where = f"line {node.lineno}: {called}"
            safely = any(
                f"{k.arg}={ast.unparse(k.value)}" == "weights_only=True" for k in node.keywords
            )
            stand_ins = (
                called == "torch.load"
                and name_of(path) in ("models.nnunet_weights", "models.weights")
                and safely
            )
            # What MONAI's bundles keep weights in; medseg writes it and reads it as plain tensors.
            state = called == "torch.save" and name_of(path) == "inference.bundles"
            assert called not in FORBIDDEN_CALLS or stand_ins or state, where
            assert called.rpartition(".")[2] not in FORBIDDEN_METHODS, where
            for keyword in node.keywords:
                text = f"{keyword.arg}={ast.unparse(keyword.value)}"
                assert text not in ("shell=True", "allow_pickle=True", "weights_only=False"), where


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_error_is_swallowed_unseen(path: Path):
    """No bare except; what catches everything raises it again."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            if "BaseException" in ast.unparse(node.type):
                assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"line {node.lineno}"


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_everything_public_says_what_it_is_and_of_which_types(path: Path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    for name, node in public(tree):
        assert ast.get_docstring(node), f"{name} has no docstring"
        # Numba finds the types itself.
        compiled = any("jit" in ast.unparse(d) for d in node.decorator_list)
        if isinstance(node, ast.FunctionDef) and not compiled:
            assert node.returns is not None, f"{name} has no return type"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
            untyped = [
                a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not untyped, f"{name} has no types for {untyped}"


def test_only_volume_knows_how_ras_and_lps_differ():
    """The constant is written once; a second sign flip of x and y is where sides get swapped."""
    flip = re.compile(
        r"(diag\(|[*@])\s*(np\.array\()?\s*[\[(]\s*-\s*1(\.0*)?\s*,\s*-\s*1(\.0*)?\s*,"
    )
    homes = [name_of(path) for path in SOURCES if flip.search(path.read_text(encoding="utf-8"))]
    assert homes == ["volume"]


def test_only_what_exchanges_files_or_millimetres_with_others_uses_that_constant():
    users = {
        name_of(path)
        for path in SOURCES
        if any(
            (module, name) == ("medseg.volume", "LPS")
            for module, name in imports(tree_of(path), whole=True)
        )
    }
    assert users <= {
        "io.nrrd", "io.metaimage", "io.slicer", "io.objects", "io.dicom.stack", "io.dicom.grid",
        "view.meshes.files",
    }  # fmt: skip


def test_environment_variables_steer_nothing():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        # Sets two of MLflow's, so that it tells nobody, and reads none.
        if name_of(path) == "training.tracking":
            text = text.replace("os.environ.setdefault(", "")
        # Tells libgomp how long its threads wait, in this process only.
        if name_of(path) == "machine":
            text = text.replace('os.environ.setdefault("GOMP_SPINCOUNT"', "")
        if name_of(path) == "training.processes":  # reads how torchrun numbers its processes
            text = text.replace('os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG"', "")
            text = re.sub(r'os\.environ\.get\("(LOCAL_)?(RANK|WORLD_SIZE)", [01]\)', "", text)
            text = re.sub(r'os\.environ\["MASTER_(ADDR|PORT)"\]', "", text)
        if name_of(path) == "cohort.shards":  # reads how SLURM and Kubernetes number their jobs
            text = text.replace('os.environ.get(name, "")', "")
        if name_of(path) == "cohort.on_ray":  # switches Ray's reports off, and reads none
            text = text.replace("os.environ.update(_SILENT)", "")
        if name_of(path) == "cli.help":  # reads what says that a terminal wants no colours
            text = re.sub(r'os\.environ\.get\("(NO_COLOR|TERM)"\)', "", text)
        if name_of(path) == "kernels.hatch_build":  # hands it on to the process that compiles
            text = re.sub(r'os\.environ\.get\("PYTHONPATH", ""\)|os\.environ \|', "", text)
        assert not re.search(r"os\.environ|getenv", text), name_of(path)
