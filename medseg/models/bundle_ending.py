"""The transforms after a MONAI bundle's network as one decision: an allow-list, in the orders that
lead to labels."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from medseg.errors import BadModel
from medseg.models.bundle_config import Config, parsed
from medseg.models.bundle_parts import Given, composed, keys_of
from medseg.models.recipe import is_number
from medseg.models.steps import Ending


@dataclass(kw_only=True)
class Decision:
    """What becomes of the outputs, as far as the steps have been read.

    regions: outputs above a threshold, of which later ones lie on top. values: with a nested
    `where`, the label of each output in `order`. others: label to what it is called at the end.
    inner, outer: labels as they are at the end. notes: for people.
    """

    outputs: int
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    late: Literal["none", "softmax", "sigmoid"] = "none"  # after outputs went back
    decided: bool = False
    regions: bool = False
    threshold: float = 0.5
    order: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    back: bool = False
    linear: bool = False
    inner: tuple[int, ...] = ()
    outer: tuple[int, ...] = ()
    others: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed_by_nothing: bool = False  # outputs of 0 that went back are regions
    nearest: bool = False  # whatever `Invertd` is told, the nearest voxel is taken

    @property
    def labels(self) -> tuple[int, ...]:
        """The label of each output in the order in which they are painted; of classes the
        background first.
        """
        counted = range(1, self.outputs + 1) if self.regions else range(self.outputs)
        return tuple(self.others.get(n, n) for n in self.values or counted)

    def ending(self) -> Ending:
        """As a recipe has it."""
        return Ending(
            activation=self.activation,
            threshold=self.threshold,
            interpolate=self.linear,
            order=self.order,
            inner=self.inner,
            outer=self.outer,
        )


def read_ending(
    config: Config,
    outputs: int,
    *,
    resampled: bool,
    cropped: bool = False,
    nearest: bool = False,
) -> Decision:
    """What is done with the outputs. Raises `BadModel` for a transform that is not on the list, or
    an order that leads to no labels.

    resampled: the steps before change the grid, so that something has to lead back. cropped: they
    leave a part of the scan out, where outputs that go back are 0. nearest: they take the nearest
    voxel, and so does what undoes them.
    """
    decision = Decision(outputs=outputs, nearest=nearest)
    for part in composed(config, "postprocessing", AFTER):
        given = Given(config=config, part=part)
        work = AFTER[part.name]
        if work is None:  # it saves, and its arguments say where to
            continue
        keys = keys_of(given)
        if "pred" not in keys:
            raise config.refuse(
                f"{part.where}: {part.name} is about {', '.join(keys)}, and the outputs are pred"
            )
        work(given, keys, decision)
        given.done()
    if not decision.decided:
        raise config.refuse("its postprocessing does not say how outputs become labels")
    if resampled and not decision.back:
        raise config.refuse(
            "its postprocessing does not bring labels back to the scan's grid (Invertd)"
        )
    if cropped and decision.passed_by_nothing:
        decision.notes.append(
            "outside of the box that the bundle crops to, 0 passes its threshold, and MONAI marks"
            " everything there; medseg leaves it background"
        )
    if not decision.regions and outputs < 2:
        raise config.refuse("takes the largest of one output, which is always the same")
    return decision


def _activate(given: Given, keys: Sequence[str], made: Decision) -> None:
    flags = {name: given.single(name, False, keys, key="pred") for name in ("softmax", "sigmoid")}
    given.must_be("other", None)
    names = [name for name, on in flags.items() if on is True]
    if made.decided or len(names) > 1 or any(type(on) is not bool for on in flags.values()):
        raise given.no(names[0] if names else "softmax", flags)
    for name in names:
        kind: Literal["softmax", "sigmoid"] = "softmax" if name == "softmax" else "sigmoid"
        if made.activation != "none" or made.late != "none":
            raise given.no(name, True)
        if made.linear:
            made.late = kind
        else:
            made.activation = kind


def _invert(given: Given, keys: Sequence[str], made: Decision) -> None:
    config = given.config
    transform = config.followed(given.part.arguments.get("transform"), given.part.where)
    given.must_be("post_func", None)
    if made.back or transform is not config.followed(config.part("preprocessing"), "preprocessing"):
        raise given.no("transform", given.part.arguments.get("transform"))
    nearest = given.single("nearest_interp", True, keys, key="pred")
    if type(nearest) is not bool:
        raise given.no("nearest_interp", nearest)
    nearest = nearest or made.nearest
    made.back = True
    if made.decided and not nearest:
        made.notes.append(
            "the bundle interpolates the numbers of labels, which makes labels that are not there;"
            " medseg takes the nearest voxel's"
        )
    made.linear = not nearest and not made.decided


def _decide(given: Given, keys: Sequence[str], made: Decision) -> None:
    largest = given.single("argmax", False, keys, key="pred")
    threshold = given.single("threshold", None, keys, key="pred")
    for name in ("to_onehot", "rounding"):
        if given.single(name, None, keys, key="pred") is not None:
            raise given.no(name, given(name))
    given.must_be("dim", 0)
    given.must_be("keepdim", True)
    given("dtype")
    if type(largest) is not bool or (threshold is not None and (largest or made.decided)):
        raise given.no("threshold", threshold)
    if threshold is None and not largest:
        return
    if made.decided:
        raise given.no("argmax", largest)
    made.decided = True
    if largest:
        return  # a softmax after the way back changes nothing about which is largest
    if not is_number(threshold):
        raise given.no("threshold", threshold)
    made.regions, made.threshold = True, float(threshold)
    if made.late == "sigmoid" and 0 < threshold < 1:
        made.threshold = math.log(threshold / (1 - threshold))
    elif made.late != "none":
        raise given.no("threshold", threshold)
    made.passed_by_nothing = made.back and made.threshold <= 0


def _largest_parts(given: Given, keys: Sequence[str], made: Decision) -> None:
    labels = given("applied_labels")
    labels = [labels] if type(labels) is int else labels
    everything = [n for n in made.labels if n]
    values = everything if labels is None else labels
    plain = isinstance(values, list) and all(type(n) is int and 0 <= n <= 65535 for n in values)
    if not plain or not made.decided or (made.regions and not made.values):
        raise given.no("applied_labels", labels)
    given.must_be("independent", True)
    given.must_be("connectivity", None, 3)
    given.must_be("num_components", 1)
    given.must_be("is_onehot", None, False)
    foreground = tuple(n for n in values if n)
    if made.back:
        made.outer = tuple(dict.fromkeys((*made.outer, *foreground)))
    else:
        made.inner = tuple(dict.fromkeys((*made.inner, *foreground)))


def _choose(given: Given, keys: Sequence[str], made: Decision) -> None:
    """`Lambdad` of a nested `where`: the outermost condition wins, so it is painted last."""
    function = given.part.arguments.get("func")
    given.must_be("overwrite", True)
    given.must_be("inv_func", None)
    given("func") if not isinstance(function, str) else given.leave("func")
    if not isinstance(function, str) or made.values or (made.decided and not made.regions):
        raise given.no("func", function)
    pairs = nested_where(function, given.config.refuse, given.part.where)
    if any(output >= made.outputs for output, _ in pairs):
        raise given.no("func", function)
    if not made.decided:  # outputs themselves are compared with 0
        if made.late != "none" or made.activation != "none":
            raise given.no("func", function)
        made.decided, made.regions = True, True
        made.threshold = math.ulp(0.0)
    made.order = tuple(output for output, _ in reversed(pairs))
    made.values = tuple(value for _, value in reversed(pairs))


def nested_where(text: str, refuse: Callable[[str], BadModel], where: str) -> list[tuple[int, int]]:
    """(output, label) of each condition of `lambda x: torch.where(x[[k]] > 0, label, ...)`.

    From the outermost to the innermost, which ends in 0. Raises what `refuse` makes for any other
    function.
    """
    wrong = refuse(
        f"{where}: Lambdad runs {text!r:.80}; medseg knows nested torch.where(x[[k]] > 0, label,"
        " ...) alone"
    )
    tree = parsed(text.removeprefix("$"), text, refuse, where=where)
    if not isinstance(tree, ast.Lambda) or not _takes_one(tree.args):
        raise wrong
    name, node = tree.args.args[0].arg, tree.body
    pairs: list[tuple[int, int]] = []
    while isinstance(node, ast.Call) and len(pairs) < 64:
        if ast.unparse(node.func) != "torch.where" or len(node.args) != 3 or node.keywords:
            raise wrong
        output = _compared(node.args[0], name)
        label = _whole(node.args[1])
        if output is None or label is None or not 1 <= label <= 65535:
            raise wrong
        pairs.append((output, label))
        node = node.args[2]
    outputs, labels = {output for output, _ in pairs}, {label for _, label in pairs}
    if _whole(node) != 0 or not pairs or min(len(outputs), len(labels)) < len(pairs):
        raise wrong
    return pairs


def _takes_one(arguments: ast.arguments) -> bool:
    more = (arguments.posonlyargs, arguments.kwonlyargs, arguments.defaults, arguments.kw_defaults)
    return len(arguments.args) == 1 and not any(more) and not (arguments.vararg or arguments.kwarg)


def _compared(node: ast.expr, name: str) -> int | None:
    """The k of `x[[k]] > 0`."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        return None
    left = node.left
    plain = isinstance(node.ops[0], ast.Gt) and _whole(node.comparators[0]) == 0
    if not plain or not isinstance(left, ast.Subscript) or not isinstance(left.value, ast.Name):
        return None
    index = left.slice
    if left.value.id != name or not isinstance(index, ast.List) or len(index.elts) != 1:
        return None
    number = _whole(index.elts[0])
    return number if number is not None and number >= 0 else None


def _whole(node: ast.expr) -> int | None:
    """The whole number that a constant is, 4.0 as well as 4."""
    value = node.value if isinstance(node, ast.Constant) else None
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _rename(given: Given, keys: Sequence[str], made: Decision) -> None:
    """`MapLabelValued`: each label another, all at once; the background stays what it is."""
    before, after = given("orig_labels"), given("target_labels")
    given("dtype")
    for name, labels in (("orig_labels", before), ("target_labels", after)):
        plain = isinstance(labels, list) and all(type(n) in (int, float) for n in labels)
        if not plain or any(n != int(n) or not 0 <= n <= 65535 for n in labels):
            raise given.no(name, labels)
    if len(before) != len(after) or len({int(n) for n in before}) < len(before):
        raise given.no("orig_labels", before)
    if not made.decided or (made.regions and not made.values):
        raise given.no("orig_labels", before)  # of what is no label yet
    new = {int(old): int(label) for old, label in zip(before, after)}
    here = [n for n in made.labels if n]
    labels = [new.get(n, n) for n in here]
    if new.get(0, 0) != 0 or 0 in labels or len(set(labels)) < len(labels):
        raise given.no("target_labels", after)  # two structures would be one, or none
    start = range(1, made.outputs) if not made.values else made.values
    made.others = {n: new.get(made.others.get(n, n), made.others.get(n, n)) for n in start}
    made.inner, made.outer = (
        tuple(new.get(n, n) for n in kept) for kept in (made.inner, made.outer)
    )


def _leave(given: Given, keys: Sequence[str], made: Decision) -> None:
    given("dtype")


#: Transform -> what it adds to the decision; None: nothing, whatever it is told.
AFTER: dict[str, Callable[[Given, Sequence[str], Decision], None] | None] = {
    "Activationsd": _activate,
    "Invertd": _invert,
    "AsDiscreted": _decide,
    "KeepLargestConnectedComponentd": _largest_parts,
    "Lambdad": _choose,
    "MapLabelValued": _rename,
    "EnsureTyped": _leave,
    "ToDeviced": _leave,
    "SaveImaged": None,
}
