"""What the compiled loops over channels are written with: vectors of 16 channels, emitted as LLVM
instructions.

LLVM's vectoriser does not find the best code for such loops. A vector is one register with AVX-512,
several elsewhere. Memory is float32, or bfloat16 in arrays of uint16: the upper half of a float32,
rounded to nearest even.

Code that was compiled with another version of this file is not used (`medseg.kernels.stamps`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
INT = ir.IntType(64)
VECTOR = ir.VectorType(ir.FloatType(), LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)
WORDS, HALVES = (ir.VectorType(ir.IntType(bits), LANES) for bits in (32, 16))


class Lanes:
    """16 float32 in a vector; arithmetic emits instructions."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: Lanes) -> Lanes:
        return Lanes(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Lanes) -> Lanes:
        return Lanes(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Lanes) -> Lanes:
        return Lanes(self.builder, self.builder.fmul(self.value, other.value))

    def plus(self, factor: float | Lanes, other: Lanes) -> Lanes:
        """Self + factor · other, rounded once."""
        factor = (
            factor.value if isinstance(factor, Lanes) else ir.Constant(VECTOR, [factor] * LANES)
        )
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        fma = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32")
        return Lanes(self.builder, self.builder.call(fma, [factor, other.value, self.value]))

    def activated(self, slope: Lanes) -> Lanes:
        """Leaky ReLU of a slope from 0 to 1; NaN stays."""
        product = self.builder.fmul(self.value, slope.value)
        positive = self.builder.fcmp_ordered(">", self.value, product)
        return Lanes(self.builder, self.builder.select(positive, self.value, product))


class Memory:
    """Float32 or bfloat16 memory; offsets count numbers."""

    def __init__(self, builder: Any, pointer: Any) -> None:
        self.builder, self.pointer = builder, pointer
        self.is_half = pointer.type.pointee == ir.IntType(16)

    def at(self, offset: Any, times: int = 1) -> Memory:
        """The memory `offset · times` numbers on."""
        offset = ir.Constant(INT, offset) if isinstance(offset, int) else offset
        offset = self.builder.mul(offset, ir.Constant(INT, times)) if times != 1 else offset
        return Memory(self.builder, self.builder.gep(self.pointer, [offset]))

    def load(self, offset: Any = 0) -> Lanes:
        """16 numbers from the offset on."""
        b, kind = self.builder, HALVES if self.is_half else VECTOR
        value = b.load(
            b.bitcast(self.at(offset).pointer, kind.as_pointer()), align=2 if self.is_half else 4
        )
        if self.is_half:
            value = b.bitcast(b.shl(b.zext(value, WORDS), ir.Constant(WORDS, [16] * LANES)), VECTOR)
        return Lanes(b, value)

    def store(self, lanes: Lanes, offset: Any = 0) -> None:
        """Writes 16 numbers, rounded where the memory is bfloat16."""
        b, value, kind = self.builder, lanes.value, HALVES if self.is_half else VECTOR
        if self.is_half:
            bits, sixteen = b.bitcast(value, WORDS), ir.Constant(WORDS, [16] * LANES)
            odd = b.and_(b.lshr(bits, sixteen), ir.Constant(WORDS, [1] * LANES))
            # A NaN that arithmetic makes stays one: its low bits are zero.
            rounded_bits = b.add(bits, b.add(odd, ir.Constant(WORDS, [0x7FFF] * LANES)))
            value = b.trunc(b.lshr(rounded_bits, sixteen), HALVES)
        b.store(
            value,
            b.bitcast(self.at(offset).pointer, kind.as_pointer()),
            align=2 if self.is_half else 4,
        )

    def stream(self, lanes: Lanes, offset: Any = 0) -> None:
        """Store to a whole cache line past the caches: faster than reading the line first. The
        memory is aligned.

        Sixteen numbers in bfloat16 are half a line, which is stored as usual.
        """
        if self.is_half:
            self.store(lanes, offset)
            return
        pointer = self.builder.bitcast(self.at(offset).pointer, VECTOR.as_pointer())
        store = self.builder.store(lanes.value, pointer, align=4 * LANES)
        store.set_metadata(
            "nontemporal", self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        )

    def prefetch(self) -> None:
        """Have the memory brought near; it may lie outside of any array."""
        byte = ir.IntType(8).as_pointer()
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(flag, value) for value in (0, 3, 1)]  # to read, keep near, data
        self.builder.call(function, [self.builder.bitcast(self.pointer, byte), *flags])

    def broadcast(self, offset: int = 0) -> Lanes:
        """The float at the offset in all lanes."""
        return broadcast(self.builder, self.builder.load(self.at(offset).pointer))


def broadcast(builder: Any, scalar: Any) -> Lanes:
    """A number in all lanes."""
    if scalar.type != ir.FloatType():
        scalar = builder.fptrunc(scalar, ir.FloatType())
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(WORDS, [0] * LANES)
    return Lanes(builder, builder.shuffle_vector(first, undefined, zeros))


class Sum:
    """A vector that grows in a register, from what the memory holds to where it is stored again."""

    def __init__(self, builder: Any, memory: Memory) -> None:
        self.builder, self.memory = builder, memory
        self.place = cgutils.alloca_once(builder, VECTOR)
        builder.store(memory.load().value, self.place)

    def add(self, value: Lanes, factor: Lanes | None = None) -> None:
        """Adds value, or factor · value."""
        total = Lanes(self.builder, self.builder.load(self.place))
        total = total + value if factor is None else total.plus(factor, value)
        self.builder.store(total.value, self.place)

    def store(self) -> None:
        """Writes it back."""
        self.memory.store(Lanes(self.builder, self.builder.load(self.place)))


class Moments:
    """Centre (given), sum and sum of squares from the centre of 16 channels: float32 memory (3,
    16).
    """

    def __init__(self, builder: Any, memory: Memory) -> None:
        self.centre = memory.load()
        self.total, self.squares = (Sum(builder, memory.at(n * LANES)) for n in (1, 2))

    def add(self, value: Lanes) -> None:
        """Takes in 16 numbers."""
        value = value - self.centre
        self.total.add(value)
        self.squares.add(value, value)

    def store(self) -> None:
        """Writes the sums back."""
        self.total.store()
        self.squares.store()


def emitted(emit: Callable[..., None]) -> Any:
    """A function for compiled code from `emit(builder, ...)`; each `Memory` is passed as a flat
    array and an index.
    """
    names = ["typing"]
    for name, parameter in list(inspect.signature(emit).parameters.items())[1:]:
        names += [name, f"{name}_at"] if parameter.annotation == "Memory" else [name]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arguments: list[Any] = []
        pairs = iter(zip(signature.args, values, strict=True))
        for kind, value in pairs:
            if isinstance(kind, types.Array):
                data = context.make_array(kind)(context, builder, value).data
                arguments.append(Memory(builder, builder.gep(data, [next(pairs)[1]])))
            else:
                arguments.append(value)
        emit(builder, *arguments)
        return context.get_dummy_value()

    def typed(typing: Any, *kinds: Any) -> tuple[Any, Any]:
        return types.void(*kinds), generate

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed.__name__ = emit.__name__
    typed.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return intrinsic(typed)


def loop(builder: Any, count: Any) -> Any:
    """`with loop(builder, count) as n`: what is emitted inside runs for n.index from 0 to count -
    1.
    """
    return cgutils.for_range(builder, ir.Constant(INT, count) if isinstance(count, int) else count)


@emitted
def centre(builder: Any, x: Memory, moments: Memory) -> None:
    """16 channels of a first voxel as the centre of moments."""
    moments.store(x.load())


@emitted
def settle(
    builder: Any,
    x: Memory,
    column: Any,
    count: Any,
    scale: Memory,
    shift: Memory,
    slope: Any,
    y: Memory,
    to: Any,
) -> None:
    """Scales, shifts and activates 16 channels of `count` voxels, `column` numbers apart, to `y`,
    `to` apart.
    """
    factor, offset, leak = scale.load(), shift.load(), broadcast(builder, slope)
    with loop(builder, count) as n:
        voxel = x.at(builder.mul(n.index, column)).load()
        y.at(builder.mul(n.index, to)).store(offset.plus(factor, voxel).activated(leak))
