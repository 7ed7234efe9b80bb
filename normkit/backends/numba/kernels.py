"""The CPU's arithmetic: Numba kernels over raw memory, for every dtype and layout.

A kernel is ``kernel(call, first, last)``: it does tasks first..last of the work that the named
tuple `call` points to describes, so that threads can share it and the bits do not depend on who
does what. It is compiled to a C function, whose address is all that the threads need. Two kinds of
them serve all axes (k0, r0, k1, r1), by what is contiguous:

rows     r1 is long: a group is r0 stretches of r1 elements, summed along memory.
columns  r1 is short: r0 rows of k1*r1 columns, summed down the columns, r1 of which are a group.

Kernels do what is usual. What is not they leave to others, which are compiled when it is met.

Sums are float64. float32 and the half types, whose squares float64 holds exactly, take one pass:
the variance is the mean square less the squared mean, which loses to rounding at most 2**-30 of
itself where the mean is below 1000 standard deviations. A group whose mean is above, and all
float64 data, are summed about an element, then about the mean. Where a mean of halves is below 4
standard deviations, float32 adds up a few hundred products before they enter a sum: the variance
is off by some 2**-22. (Short rows, eight of which are summed at a time, are float64's at once.)
Elements are then centred before they are scaled, in their arithmetic type, or in float64 where a
statistic is extreme.

Everything compiled stands in this one file: Numba's disk cache sees edits to it, and to no other.
"""

from __future__ import annotations

import ctypes
import operator
from collections import namedtuple
from collections.abc import Collection
from functools import cache, cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import cfunc, njit, prange, types
from numba.core import cgutils, config
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typing.templates import (
    AbstractTemplate,
    AttributeTemplate,
    infer_getattr,
    infer_global,
)
from numba.extending import (
    NativeValue,
    intrinsic,
    lower_builtin,
    lower_getattr_generic,
    models,
    register_model,
    unbox,
)

from normkit.backends.numba.threads import failure, start_threads

_BYTE = ir.IntType(8).as_pointer()
_INPUTS, _SCRATCH = "normkit.inputs", "normkit.scratch"


# --------------------------------------------------------------------------------------- raw memory
class Pointer(types.Type):
    """Where the elements of a C-contiguous array begin; NULL for None.

    Loads from "in", stores to "out" and both to "scratch" memory are told apart, so that LLVM need
    not ask whether they overlap: y may be x, since an element is stored after it was loaded. "own"
    memory may be any of these.
    """

    def __init__(self, dtype: str = "void", role: str = "in") -> None:
        self.element, self.role = dtype, role
        #: what an element is computed in
        self.real = types.float64 if dtype == "float64" else types.float32
        super().__init__(f"normkit.Pointer({dtype}, {role})")


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Pointer) -> None:
        super().__init__(manager, kind, _BYTE)


@unbox(Pointer)
def _unbox_pointer(kind: Pointer, array: Any, c: Any) -> NativeValue:
    # NumPy's ABI: an array object is a PyObject head of two words, then the data pointer. Reading
    # it here costs nothing; Numba's own array arguments cost about 0.2 us each.
    head = ir.Constant(ir.IntType(64), 2 * np.intp().itemsize)
    field = c.builder.bitcast(array, _BYTE)
    data = c.builder.load(c.builder.bitcast(c.builder.gep(field, [head]), _BYTE.as_pointer()))
    none = c.builder.icmp_unsigned("==", array, c.pyapi.borrow_none())
    return NativeValue(c.builder.select(none, ir.Constant(_BYTE, None), data))


_STORED = {
    "float16": ir.IntType(16),
    "bfloat16": ir.IntType(16),
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
}
DTYPES = tuple(_STORED)
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_LINE = 64  #: bytes of a cache line
SPARE = _LINE // 2  #: elements that lanes may have in any dtype: scratch memory has more by them
FEW = 8  #: elements of rows that are loaded eight at a time, a tuple of so many lanes each
_SQUARE = FEW * FEW  # a literal, as `scratch` needs


def _mark(builder: Any, instruction: Any, kind: str, *scopes: str) -> None:
    module = builder.module
    domain = module.add_metadata(["normkit"])
    nodes = [module.add_metadata([scope, domain]) for scope in scopes]
    instruction.set_metadata(kind, module.add_metadata(nodes))


def _mark_store(builder: Any, instruction: Any, kind: Pointer) -> None:
    if kind.role == "scratch":
        _mark(builder, instruction, "alias.scope", _SCRATCH)
        _mark(builder, instruction, "noalias", _INPUTS)
    elif kind.role == "out":
        _mark(builder, instruction, "noalias", _INPUTS, _SCRATCH)


def _element(builder: Any, kind: Pointer, pointer: Any, index: Any) -> Any:
    # LLVM prefers 256-bit vectors even where the processor has 512, for fear of lower clock rates;
    # these loops gain 20 % from the wide ones.
    set.add(builder.function.attributes, '"prefer-vector-width"="512"')
    typed = builder.bitcast(pointer, _STORED[kind.element].as_pointer())
    return builder.gep(typed, [index])


@intrinsic
def load(typing: Any, pointer: Any, index: Any) -> Any:
    """Element `index`, in its arithmetic type; None of None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        if kind is types.none:
            return context.get_dummy_value()
        value = builder.load(_element(builder, kind, *args), align=1)
        if kind.role == "scratch":
            _mark(builder, value, "alias.scope", _SCRATCH)
        elif kind.role == "in":
            _mark(builder, value, "alias.scope", _INPUTS)
        if kind.element == "float16":
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if kind.element == "bfloat16":
            word = builder.shl(builder.zext(value, ir.IntType(32)), _word(16))
            return builder.bitcast(word, ir.FloatType())
        return value

    number = types.none if pointer is types.none else pointer.real
    return number(pointer, types.int64), generate


@intrinsic
def store(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Round `value`, float32 or float64, to the element type and store it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, value = signature.args[0], args[2]
        if kind.real is types.float32 and signature.args[2] is types.float64:
            value = builder.fptrunc(value, ir.FloatType())
        elif kind.real is types.float64 and signature.args[2] is types.float32:
            value = builder.fpext(value, ir.DoubleType())
        if kind.element == "float16":
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        elif kind.element == "bfloat16":
            upper = builder.lshr(_round_to_bfloat16(builder, value), _word(16))
            value = builder.trunc(upper, ir.IntType(16))
        done = builder.store(value, _element(builder, kind, args[0], args[1]), align=1)
        _mark_store(builder, done, kind)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), generate


class Lanes(types.Type):
    """As many elements as a cache line has, or fewer, as numbers of one type.

    What loops over lanes leave is loaded and stored in part: the lanes beyond are 0. Of `paired`
    bfloat16 elements, the even ones are the first half: each shares a word with the next.
    """

    def __init__(self, element: str, number: Any, paired: bool, count: int = _LINE) -> None:
        self.element, self.number, self.paired = element, number, paired and element == "bfloat16"
        self.count = min(count, _LINE // _SIZES[element])
        super().__init__(f"normkit.Lanes({element}, {number}, {self.paired}, {self.count})")

    @property
    def order(self) -> list[int]:
        """Which element of memory each lane is."""
        if self.paired:
            return [*range(0, self.count, 2), *range(1, self.count, 2)]
        return [*range(self.count)]

    def vector(self, number: Any = None) -> Any:
        """The LLVM type of as many numbers."""
        scalar = ir.DoubleType() if (number or self.number) is types.float64 else ir.FloatType()
        return ir.VectorType(scalar, self.count)

    def stored(self, element: str) -> Any:
        """The LLVM type of as many elements in memory."""
        return ir.VectorType(_STORED[element], self.count)

    def mask(self, builder: Any, part: Any, places: list[int]) -> Any:
        """Whether each of `places` is in `part`: the first so many, or (so many before, count)."""
        word = ir.IntType(8 * _LINE // self.count)

        def splat(value: Any) -> Any:
            value = builder.trunc(value, word) if word.width < 64 else value
            return _splat(builder, value, self.count)

        skipped, count = _limits(builder, part)
        at: Any = ir.Constant(ir.VectorType(word, self.count), places)
        return builder.icmp_unsigned("<", builder.sub(at, splat(skipped)), splat(count))


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, kind.vector())


def _splat(builder: Any, value: Any, count: int) -> Any:
    """A vector of `count` equal numbers."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    one = builder.insert_element(undefined, value, _word(0))
    return builder.shuffle_vector(one, undefined, _word(0, count))


def _zeros(*form: Any) -> Any:
    def make(typing: Any, pointer: Any, number: Any) -> Any:
        """Zeros of the type of `number`, or of numbers behind it, for elements like `pointer`'s."""
        kind = number.real if isinstance(number, Pointer) else types.unliteral(number)
        kind = Lanes(pointer.element, kind, *form)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(kind.vector(), [0.0] * kind.count)

        return kind(pointer, number), generate

    return intrinsic(make)


lanes = _zeros(True)
lanes_in_order = _zeros(False)  #: for tables of float32 or float64 beside the elements
lanes_of_sums = _zeros(False, 16)  #: as many as registers hold in float64, with their sums
lanes_of_few = _zeros(False, FEW)


@intrinsic
def widened(typing: Any, value: Any) -> Any:
    """Lanes in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if value is wide else builder.fpext(args[0], wide.vector())

    wide = Lanes(value.element, types.float64, value.paired, value.count)
    return wide(value), generate


@intrinsic
def narrowed(typing: Any, value: Any) -> Any:
    """Lanes in float32."""
    narrow = Lanes(value.element, types.float32, value.paired, value.count)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fptrunc(args[0], narrow.vector())

    return narrow(value), generate


@intrinsic
def minus(typing: Any, one: Any, other: Any) -> Any:
    """A difference that no product is fused into: the same bits of numbers and of lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(*args)

    return one(one, one), generate


@intrinsic
def zero_like(typing: Any, value: Any) -> Any:
    """A zero of the type of a number, or of lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(args[0].type, [0.0] * value.count if isinstance(value, Lanes) else 0.0)

    return value(value), generate


def _of_each(builder: Any, name: str, value: Any) -> Any:
    """LLVM's function of numbers, of each lane."""
    kind = ir.FunctionType(value.type, [value.type])
    scalar = "f64" if value.type.element == ir.DoubleType() else "f32"
    name = f"llvm.{name}.v{value.type.count}{scalar}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])


@intrinsic
def root(typing: Any, value: Any) -> Any:
    """The square root of each lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _of_each(builder, "sqrt", args[0])

    return value(value), generate


def _count_lanes(builder: Any, kind: Lanes, condition: Any, part: Any) -> Any:
    first = builder.and_(condition, kind.mask(builder, part, kind.order))
    bits = builder.bitcast(first, ir.IntType(kind.count))
    return builder.zext(builder.ctpop(bits), ir.IntType(64))


@intrinsic
def above(typing: Any, value: Any, limit: Any, part: Any) -> Any:
    """How many of the first `part` lanes are not at most `limit`'s: NaNs, too."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _count_lanes(builder, value, builder.fcmp_unordered(">", *args[:2]), args[2])

    return types.int64(value, value, types.int64), generate


@intrinsic
def beyond(typing: Any, value: Any, most: Any, part: Any) -> Any:
    """How many of the first `part` lanes are `_beyond` a number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, most = _of_each(builder, "fabs", args[0]), _splat(builder, args[1], value.count)
        zero, one, inf = (ir.Constant(size.type, [n] * value.count) for n in (0, 1, float("inf")))

        def between(lower: Any, upper: Any) -> Any:
            over = builder.fcmp_ordered(">", size, lower)
            return builder.and_(over, builder.fcmp_ordered("<", size, upper))

        either = builder.or_(between(zero, builder.fdiv(one, most)), between(most, inf))
        return _count_lanes(builder, value, either, args[2])

    return types.int64(value, value.number, types.int64), generate


@intrinsic
def load_lanes(typing: Any, pointer: Any, index: Any, count: Any, like: Any) -> Any:
    """Elements from `index` on, `count` or with None all, as numbers of the type of lanes `like`
    and in their order; a number instead of a pointer in all lanes, or such lanes, or None, as they
    are.

    Lanes of scratch memory, the backend's own or the stack's, are always all loaded, as it has some
    to spare: where those left out are of a page that was never used, processors take hundreds of
    cycles to find no fault is due.
    """

    def convert(builder: Any, value: Any, number: Any) -> Any:
        if number is like.number:
            return value
        return (builder.fpext if number is types.float32 else builder.fptrunc)(value, like.vector())

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if pointer in (like, types.none):
            return args[0]
        if not isinstance(pointer, Pointer):
            return convert(builder, _splat(builder, args[0], like.count), pointer)
        kind, stored = signature.args[0], like.stored(signature.args[0].element)
        at = builder.bitcast(_element(builder, kind, *args[:2]), stored.as_pointer())
        if signature.args[2] is types.none or kind.role == "scratch":
            value = builder.load(at, align=1)
        else:
            value = _load_part(builder, like, at, args[2])
        if kind.role == "scratch":
            _mark(builder, value, "alias.scope", _SCRATCH)
        elif kind.role == "in":
            _mark(builder, value, "alias.scope", _INPUTS)
        number: Any = types.float32
        half = like.count // 2
        if kind.element == "bfloat16" and not like.paired:
            words = builder.zext(value, _word(0, like.count).type)
            value = builder.bitcast(builder.shl(words, _word(16, like.count)), like.vector(number))
        elif kind.element == "bfloat16":
            words = builder.bitcast(value, _word(0, half).type)
            low = builder.shl(words, _word(16, half))
            high = builder.and_(words, _word(0xFFFF0000, half))
            value = builder.shuffle_vector(low, high, _words(range(like.count)))
            value = builder.bitcast(value, like.vector(number))
        elif kind.element == "float16":
            value = builder.bitcast(value, ir.VectorType(ir.HalfType(), like.count))
            value = builder.fpext(value, like.vector(number))
        elif kind.element == "float64":
            number = types.float64
        if like.paired and kind.element != "bfloat16":
            value = builder.shuffle_vector(value, value, _words(like.order))
        return convert(builder, value, number)

    found = pointer if pointer is types.none else like
    return found(pointer, types.int64, count, like), generate


def _storing(streams: bool) -> Any:
    def put(typing: Any, pointer: Any, index: Any, count: Any, value: Any) -> Any:
        """Round `value` to the element type and store `count` of it, or with None all, from `index`
        on; or stream all past the caches, to a line of memory.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind, (pointer, index, count, value) = signature.args[0], args
            if kind.element == "float64":
                if lanes.number is types.float32:
                    value = builder.fpext(value, lanes.vector(types.float64))
            elif lanes.number is types.float64:
                value = builder.fptrunc(value, lanes.vector(types.float32))
            stored = lanes.stored(kind.element)
            if kind.element == "float16":
                value = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes.count))
                value = builder.bitcast(value, stored)
            elif kind.element == "bfloat16" and not lanes.paired:
                words = builder.lshr(_round_to_bfloat16(builder, value), _word(16, lanes.count))
                value = builder.trunc(words, stored)
            elif kind.element == "bfloat16":
                words, half = _round_to_bfloat16(builder, value), lanes.count // 2
                low = builder.shuffle_vector(words, words, _words(range(half)))
                high = builder.shuffle_vector(words, words, _words(range(half, 2 * half)))
                low = builder.lshr(low, _word(16, half))
                value = builder.or_(low, builder.and_(high, _word(0xFFFF0000, half)))
                value = builder.bitcast(value, stored)
            elif lanes.paired:
                places = sorted(range(lanes.count), key=lanes.order.__getitem__)
                value = builder.shuffle_vector(value, value, _words(places))
            at = builder.bitcast(_element(builder, kind, pointer, index), stored.as_pointer())
            if signature.args[2] is not types.none:
                done = _store_part(builder, lanes, value, at, count)
            else:
                done = builder.store(value, at, align=_LINE if streams else 1)
            if streams:
                one = builder.module.add_metadata([_word(1)])
                done.set_metadata("nontemporal", one)
            if done is not None:  # a copy knows nothing of roles
                _mark_store(builder, done, kind)
            return context.get_dummy_value()

        lanes = value
        return types.void(pointer, types.int64, count, value), generate

    return intrinsic(put)


store_lanes = _storing(streams=False)
stream_lanes = _storing(streams=True)


# Where the processor cannot load and store parts of vectors, LLVM would branch for each lane; they
# go by way of a whole vector on the stack.
def _has_masks(element: Any) -> bool:
    features = vars(config)["CPU_FEATURES"]  # by which Numba compiles for another processor
    if features is None:
        features = [name for name, has in get_host_cpu_features().items() if has]
    else:
        features = [name[1:] for name in features.split(",") if name.startswith("+")]
    return "avx512bw" in features or (element != ir.IntType(16) and "avx" in features)


def _limits(builder: Any, part: Any) -> Any:
    """How many elements are before a part, and how many are in it."""
    if isinstance(part.type, ir.ArrayType):
        return builder.extract_value(part, 0), builder.extract_value(part, 1)
    return ir.Constant(part.type, 0), part


def _load_part(builder: Any, lanes: Lanes, at: Any, part: Any) -> Any:
    vector = at.type.pointee
    zeros = ir.Constant(vector, [0] * vector.count)
    if _has_masks(vector.element):
        mask = lanes.mask(builder, part, [*range(vector.count)])
        return _masked(builder, "load", vector, [at, _word(1), mask, zeros])
    whole = cgutils.alloca_once(builder, vector)
    builder.store(zeros, whole)
    _copy_part(builder, whole, at, part)
    return builder.load(whole)


def _store_part(builder: Any, lanes: Lanes, value: Any, at: Any, part: Any) -> Any:
    if _has_masks(value.type.element):
        mask = lanes.mask(builder, part, [*range(value.type.count)])
        return _masked(builder, "store", value.type, [value, at, _word(1), mask])
    whole = cgutils.alloca_once(builder, value.type)
    builder.store(value, whole)
    return _copy_part(builder, at, whole, part)


def _copy_part(builder: Any, to: Any, source: Any, part: Any) -> Any:
    skipped, count = _limits(builder, part)
    first = to.type.pointee.element.as_pointer()
    to, source = (builder.gep(builder.bitcast(p, first), [skipped]) for p in (to, source))
    size = {ir.FloatType(): 4, ir.DoubleType(): 8}.get(first.pointee, 2)
    return cgutils.raw_memcpy(builder, to, source, count, size)


def _masked(builder: Any, name: str, vector: Any, args: list[Any]) -> Any:
    scalars = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}
    suffix = f"v{vector.count}{scalars.get(vector.element, 'i16')}"
    result = vector if name == "load" else ir.VoidType()
    kind = ir.FunctionType(result, [arg.type for arg in args])
    name = f"llvm.masked.{name}.{suffix}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def transposed(typing: Any, rows: Any) -> Any:
    """A tuple of lanes, as many as each has, with rows and columns exchanged."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = [builder.extract_value(args[0], i) for i in range(rows.count)]
        places = range(rows.count)
        step = rows.count // 2
        while step:  # in squares of twice the step, exchange the two corners off the diagonal
            upper = _words([i + rows.count - step if i & step else i for i in places])
            lower = _words([i + rows.count if i & step else i + step for i in places])
            for i in places:
                if not i & step:
                    a, b = vectors[i], vectors[i + step]
                    vectors[i] = builder.shuffle_vector(a, b, upper)
                    vectors[i + step] = builder.shuffle_vector(a, b, lower)
            step //= 2
        return cgutils.pack_array(builder, vectors)

    return rows(rows), generate


@intrinsic
def first_lanes(typing: Any, value: Any, count: Any) -> Any:
    """The first `count` elements, or with None all; the others 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if count is types.none:
            return args[0]
        mask = value.mask(builder, args[1], value.order)
        return builder.select(mask, args[0], ir.Constant(value.vector(), [0.0] * value.count))

    return value(value, count), generate


@intrinsic
def lanes_of_each(typing: Any, tables: Any, index: Any, like: Any) -> Any:
    """Of each of several tables, its number at `index` in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = []
        for place in range(tables.count):
            pointer = builder.extract_value(args[0], place)
            number = builder.load(_element(builder, tables.dtype, pointer, args[1]))
            _mark(builder, number, "alias.scope", _SCRATCH)
            found.append(_splat(builder, number, like.count))
        return cgutils.pack_array(builder, found)

    return types.UniTuple(like, tables.count)(tables, types.int64, like), generate


@intrinsic
def spliced(typing: Any, first: Any, rest: Any, count: Any) -> Any:
    """The first `count` elements of each of several lanes `first`, then those of `rest`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = first.dtype.mask(builder, args[2], first.dtype.order)
        found = []
        for place in range(first.count):
            one, other = (builder.extract_value(lanes, place) for lanes in args[:2])
            found.append(builder.select(mask, one, other))
        return cgutils.pack_array(builder, found)

    return first(first, rest, count), generate


@intrinsic
def totals(typing: Any, one: Any, other: Any) -> Any:
    """The sums of all lanes of two, which share a register when half of it is left of each."""

    def shuffle(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
        return builder.shuffle_vector(a, b, _words(places))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts, half = list(args), one.count // 2
        while half * _SIZES[str(one.number)] > _LINE // 2:
            low, high = [*range(half)], [*range(half, 2 * half)]
            parts = [
                builder.fadd(shuffle(builder, v, v, low), shuffle(builder, v, v, high))
                for v in parts
            ]
            half //= 2
        low = [*range(half), *range(2 * half, 3 * half)]
        both = builder.fadd(
            shuffle(builder, *parts, low), shuffle(builder, *parts, [i + half for i in low])
        )
        step = half // 2
        while step:
            turned = [i // half * half + (i + step) % half for i in range(2 * half)]
            both = builder.fadd(both, shuffle(builder, both, both, turned))
            step //= 2
        found = [builder.extract_element(both, _word(i)) for i in (0, half)]
        return cgutils.pack_array(builder, found)

    return types.UniTuple(one.number, 2)(one, other), generate


def _define(symbol: Any, instruction: str) -> None:
    """Let lanes be operands of `symbol`, the other one being a number or lanes as well."""

    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            lanes = args[0]
            if isinstance(lanes, Lanes) and args[1] in (lanes, lanes.number):
                return lanes(*args)
            return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, second = args
        if not isinstance(signature.args[1], Lanes):
            second = _splat(builder, second, first.type.count)
        return getattr(builder, instruction)(first, second, flags=("contract",))

    for other in (types.float32, types.float64, Lanes):
        lower_builtin(symbol, Lanes, other)(generate)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


@intrinsic
def per_line(typing: Any, like: Any) -> Any:
    """Elements to a cache line, or the number of lanes: known at compile time."""
    count = like.count if isinstance(like, Lanes) else _LINE // _SIZES[like.element]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), count)

    return types.int64(like), generate


def _prefetch(far: bool) -> Any:
    def ask(typing: Any, pointer: Any, index: Any) -> Any:
        """Ask for the cache line of element `index`, to be written to if it is an output's."""
        numbers = int(pointer.role == "out"), 2 if far else 3, 1  # to write, how near, data

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = ir.IntType(32)
            place = builder.bitcast(_element(builder, signature.args[0], *args), _BYTE)
            kind = ir.FunctionType(ir.VoidType(), [_BYTE, word, word, word])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE], kind)
            builder.call(prefetch, [place, *(ir.Constant(word, number) for number in numbers)])
            return context.get_dummy_value()

        return types.void(pointer, types.int64), generate

    return intrinsic(ask)


fetch = _prefetch(far=False)  #: into the first cache: for what is used at once
fetch_early = _prefetch(far=True)  #: into the second, which holds what is used some KB later


@intrinsic
def past_line(typing: Any, pointer: Any, index: Any) -> Any:
    """Elements from the beginning of a cache line to element `index`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        place = builder.ptrtoint(_element(builder, signature.args[0], *args), word)
        past = builder.and_(place, ir.Constant(word, _LINE - 1))
        return builder.udiv(past, ir.Constant(word, _SIZES[pointer.element]))

    return types.int64(pointer, types.int64), generate


@intrinsic
def is_aligned(typing: Any, pointer: Any) -> Any:
    """Whether elements begin at multiples of their size."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        past = ir.Constant(word, _SIZES[pointer.element] - 1)
        past = builder.and_(builder.ptrtoint(args[0], word), past)
        return builder.icmp_unsigned("==", past, ir.Constant(word, 0))

    return types.boolean(pointer), generate


@intrinsic
def settle(typing: Any) -> Any:
    """Let other threads see all that was streamed before they see what follows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _word(number: int, count: int = 0) -> Any:
    """A constant, or a vector of `count` of them."""
    return _words([number] * count) if count else ir.Constant(ir.IntType(32), number)


def _words(numbers: Collection[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), list(numbers))


def _round_to_bfloat16(builder: Any, value: Any) -> Any:
    """The word whose upper half is a float32, or those of several, rounded to nearest even.

    NaNs that arithmetic gives stay NaNs.
    """
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    bits = builder.bitcast(value, _word(0, count).type)
    odd = builder.and_(builder.lshr(bits, _word(16, count)), _word(1, count))
    half = builder.add(odd, _word(0x7FFF, count))
    number = builder.fcmp_ordered("ord", value, value)
    return builder.add(bits, builder.select(number, half, _word(0, count)))


@intrinsic(prefer_literal=True)
def scratch(typing: Any, like: Any, count: Any) -> Any:
    """`count` (a literal) elements of the type of number `like` on the stack, and lanes to spare
    before and after them.
    """
    kind = Pointer("float64" if types.unliteral(like) is types.float64 else "float32", "scratch")
    size = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _on_stack(builder, kind, size)

    return kind(like, count), generate


@intrinsic(prefer_literal=True)
def scratch_for_halves(typing: Any, pointer: Any, count: Any) -> Any:
    """The same of float32 where elements are of a half type; else None."""
    is_half = pointer.element not in ("float32", "float64")
    kind, size = Pointer("float32", "scratch"), count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _on_stack(builder, kind, size) if is_half else context.get_dummy_value()

    return (kind if is_half else types.none)(pointer, count), generate


def _on_stack(builder: Any, kind: Pointer, size: int) -> Any:
    with builder.goto_entry_block():  # and not cgutils.alloca_once, which clears the memory
        memory = builder.alloca(ir.ArrayType(_STORED[kind.element], size + 2 * SPARE))
        memory.align = _LINE  # a vector of 512 bits then is in one cache line
    return builder.bitcast(builder.gep(memory, [_word(0), _word(SPARE)]), _BYTE)


@intrinsic
def real(typing: Any, pointer: Any, value: Any) -> Any:
    """float64 `value` in the arithmetic type of the elements behind `pointer`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = signature.return_type is types.float32
        return builder.fptrunc(args[1], ir.FloatType()) if narrow else args[1]

    return pointer.real(pointer, types.float64), generate


@intrinsic
def zero_of_few(typing: Any, pointer: Any) -> Any:
    """A zero of the type that a few elements and their squares are added up in."""
    kind = types.float64 if pointer.element in ("float32", "float64") else types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(kind, 0.0)

    return kind(pointer), generate


@intrinsic
def is_float64(typing: Any, pointer: Any) -> Any:
    """Whether the elements are computed in float64: known at compile time."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(signature.args[0].real is types.float64))

    return types.boolean(pointer), generate


def _choosing(*elements: str) -> Any:
    def choose(typing: Any, pointer: Any, value: Any, other: Any) -> Any:
        """`value` for some types of elements, `other` for the rest: of any types, functions among
        them, and known at compile time.
        """
        chosen = pointer.element in elements

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return args[1] if chosen else args[2]

        return (value if chosen else other)(pointer, value, other), generate

    return intrinsic(choose)


if_float64 = _choosing("float64")
if_halves = _choosing("float16", "bfloat16")


@intrinsic
def significand(typing: Any, pointer: Any) -> Any:
    """Bits of an element's significand: known at compile time."""
    bits = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}[pointer.element]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), bits)

    return types.int64(pointer), generate


@intrinsic
def as_elements(typing: Any, pointer: Any, like: Any) -> Any:
    """The pointer, to elements of the type of those behind `like`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return Pointer(like.element, pointer.role)(pointer, like), generate


@intrinsic
def moved(typing: Any, pointer: Any, index: Any) -> Any:
    """The pointer to element `index`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_element(builder, signature.args[0], *args), _BYTE)

    return pointer(pointer, types.int64), generate


def _in_role(role: str) -> Any:
    def change(typing: Any, pointer: Any) -> Any:
        """The pointer in another role."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return args[0]

        return Pointer(pointer.element, role)(pointer), generate

    return intrinsic(change)


own = _in_role("own")  #: what LLVM is to know nothing of
as_input = _in_role("in")  #: what is not written to any more


@intrinsic
def given(typing: Any, pointer: Any) -> Any:
    """Whether a pointer is not NULL."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], ir.Constant(_BYTE, None))

    return types.boolean(pointer), generate


@intrinsic
def nothing_like(typing: Any, pointer: Any) -> Any:
    """NULL, of a pointer's type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_BYTE, None)

    return pointer(pointer), generate


@intrinsic
def address_of(typing: Any, value: Any) -> Any:
    """Address of a copy of `value` on the stack, as an int."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = cgutils.alloca_once_value(builder, args[0])
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(value), generate


_KERNEL = ir.FunctionType(ir.VoidType(), [_BYTE, ir.IntType(64), ir.IntType(64)]).as_pointer()


def _call_kernel(builder: Any, address: Any, call: Any, first: Any, last: Any) -> None:
    kernel = builder.inttoptr(address, _KERNEL)
    builder.call(kernel, [call, first, last])


@intrinsic
def call_at(typing: Any, function: Any, call: Any, first: Any, last: Any) -> Any:
    """Run the kernel at address `function`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call_kernel(builder, args[0], builder.inttoptr(args[1], _BYTE), *args[2:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def leave(typing: Any, index: Any, call: Any, first: Any, last: Any) -> Any:
    """Let the kernel that `Links` at call.links have at `index` do tasks first..last of a call."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        links = _field(context, builder, call, args[1], "links")
        cells = builder.inttoptr(links, ir.IntType(64).as_pointer())
        _call_kernel(builder, builder.load(builder.gep(cells, [args[0]])), *args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, call, types.int64, types.int64), generate


@intrinsic
def team(typing: Any) -> Any:
    """Numba's threads to use: its own `get_num_threads`, but for functions that are cached."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])  # as Numba declares it
        ask = cgutils.get_or_insert_function(builder.module, kind, "get_num_threads")
        return builder.call(ask, [])

    return types.int64(), generate


class Call(types.Type):
    """A pointer to the named tuple that describes some work; a kernel reads its fields one by one.

    As a tuple, each of its numbers would be an argument of every function that it is given to.
    """

    def __init__(self, kind: Any, x: str, dy: str) -> None:
        fields = _fields(kind, x, dy)
        self.fields = dict(zip(kind._fields, fields, strict=True))
        self.tuple = types.NamedTuple(fields, kind)
        super().__init__(f"normkit.{kind.__name__}({x}, {dy})")

    def place(self, context: Any, builder: Any, call: Any, field: str) -> Any:
        """Pointer to a field."""
        memory = builder.bitcast(call, context.get_value_type(self.tuple).as_pointer())
        return builder.gep(memory, [_word(0), _word([*self.fields].index(field))])


@register_model(Call)
class _CallModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Call) -> None:
        super().__init__(manager, kind, _BYTE)


@infer_getattr
class _Fields(AttributeTemplate):
    key = Call

    def generic_resolve(self, call: Call, field: str) -> Any:  # type: ignore[override]
        return call.fields.get(field)


@lower_getattr_generic(Call)
def _field(context: Any, builder: Any, kind: Call, call: Any, field: str) -> Any:
    value = builder.load(kind.place(context, builder, call, field))
    _mark(builder, value, "alias.scope", _INPUTS)
    return value


@intrinsic
def copied(typing: Any, call: Any) -> Any:
    """A copy on the stack, of which `put` may change fields."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(call.tuple)
        with builder.goto_entry_block():
            memory = builder.alloca(kind)
        builder.store(builder.load(builder.bitcast(args[0], kind.as_pointer())), memory)
        return builder.bitcast(memory, _BYTE)

    return call(call), generate


@intrinsic(prefer_literal=True)
def put(typing: Any, call: Any, field: Any, value: Any) -> Any:
    """Set a field, a literal's, of a call that was `copied`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], call.place(context, builder, args[0], field.literal_value))
        return context.get_dummy_value()

    return types.void(call, field, value), generate


# ------------------------------------------------------------------------------------ kinds of loop
class _Part(JITCodeLibrary):
    """A function that only kernels call, which LLVM therefore compiles as a part of them alone.

    Numba would do it once more for each by itself, a third of the time that a kernel takes.
    """

    def _optimize_final_module(self) -> None:
        """Leave that to the kernel's."""

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        """What Numba asks to set a variable that is only there with the machine's code."""
        return SimpleNamespace(set_env=lambda name, env: None)


class _PartCompiler(Compiler):
    def define_pipelines(self) -> Any:
        state = self.state
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        return super().define_pipelines()


_ERRORS: dict[str, Any] = {"error_model": "numpy"}  # x / 0 is inf
#: what only kernels call needs no way in from Python, and is on disk as a part of them
_OPTIONS: dict[str, Any] = _ERRORS | {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _PartCompiler,
}
#: a sum whose order LLVM may choose (once, when it compiles: the bits are fixed)
reduction = njit(fastmath={"reassoc", "nsz", "contract"}, forceinline=True, **_OPTIONS)
#: element by element, or lanes by lanes, in the order written but for fused multiply-adds
elementwise = njit(fastmath={"contract"}, forceinline=True, **_OPTIONS)
#: bookkeeping around the loops, for every group (unsaid, options would be the caller's)
inline = njit(fastmath=False, forceinline=True, **_OPTIONS)
#: and what is rare or large
plain = njit(fastmath=False, forceinline=False, **_OPTIONS)

NARROW = 512  #: products of halves that float32 adds up before they enter a float64 sum
GOOD = 2.0**20  #: squared means over variances up to which one pass serves
WIDE, VAST = 2.0**40, 2.0**100  #: of what float32 scales by, and of all that it scales
TINY = 2.0**-100  #: a sum of products so small that float32 may have lost some of them
NARROW_ROWS = 32  #: rows of columns from which on it adds up theirs, a few at a time
CHUNK = 4096  #: elements of a stretch that are summed, or of a parameter that are widened, at once
NEAR = 2048  #: elements of several groups that are near when they are met again
FAR = 1 << 14  #: cache lines of data from which on they are fetched from memory, ahead of their use
LONG = 32  #: cache lines of a stretch from which on the processor fetches them well by itself
STREAMED = 97 << 13  #: cache lines read and written, 48.5 MiB, of which caches would keep too few
SHORTEST = 8  #: cache lines of a run that is streamed; half, if they are whole
PARTLY = 96  #: cache lines ahead that those between runs, which are not streamed, are asked for
LEAD = 32  #: cache lines ahead that data are asked for
AHEAD = 2  #: rows of columns that they are fetched ahead
LEAD_ROWS = 16  #: the same where they are summed
STRIP = 64  #: columns that are summed, of a few rows at once, before others are asked for
STAYS = 1 << 16  #: elements of a group whose y, fetched with x, is still near when it is written
#: elements of rows below which eight are summed at a time: only of few, if loading parts is slow
SHORT_ROW = 32 if _has_masks(ir.IntType(16)) else FEW + 1
SHORT = 64  #: stretches of fewer elements are columns, if there are several rows
GIVEN = 32  #: the same where no sums are needed, since the statistics are given
#: columns that one task sums side by side, if those are a whole row, or rows whose statistics are
#: made at once; wider rows of columns are cut into pieces, of which a cache keeps more
SLAB, NARROW_SLAB = 384, 256
TOGETHER = 256  #: columns of several rows that are summed, or stored, as if they were one
WINDOW = 2048  #: columns that it gives results of: long pieces of rows are what memory likes
#: all columns of the groups that those may belong to; tables a power of two long would evict each
#: other, as their entries for a column would be in one set of the cache
TABLE = WINDOW + 2 * SHORT
PAIR = 2 * SLAB  #: a slab's sums: of one thing for each column, then of another
PAIRS = 2 * PAIR  #: those of all parts so far, then of one part
ROW_LIMIT = 4096  #: parameters that a thread widens for itself, on its stack
#: groups side by side, or their runs, whose formulas are kept: rows meet the groups again
KNOWN = 2048 + 2 * SHORT
ROW_MOST = 1 << 14  #: elements of a row whose sums and gradients are made at once, in the cache
ROW_BLOCK = 16  #: rows summed in the arithmetic type before they enter a float64 sum
FEW_BLOCK = 128  #: the same of rows of few elements, by lanes: sixteen in each

#: `links`: address of the `Links` to what the kernel called leaves to others; `round`: of float64's
#: sums, but columns_apply_any gives the result in rows round..parts
Forward = namedtuple(
    "Forward",
    "x y gamma beta mean rstd var residual r d partial running_mean running_spread kinds factor "
    "momentum clip axes links eps center round parts",
)
#: places of a family's kernels in them: `Family.left_forward`
ANY, EXACT, GENERAL = range(3)
#: `of_part`: whether a task of columns_backward is a part of a slab
Backward = namedtuple(
    "Backward",
    "dy x dx gamma mean residual rstd partial sums grads dgamma dbeta kinds axes links center "
    "frozen of_part parts rows",
)
PARAMS = 1  #: the second place of `Family.left_backward`; the first is ANY, too
Fold = namedtuple(
    "Fold",
    "sums dgamma dbeta outer tile params inner per_outer per_tile per_param per_inner per_kind",
)
Widen = namedtuple("Widen", "param wide params repeat tile")

#: Kinds of running statistics: float64 instead of float32; a standard deviation, not a variance:
#: they are Batch Renormalization's, whose training corrects by them.
WIDE_MEAN, WIDE_SPREAD, DEVIATION = 1, 2, 4
#: Kinds of parameters: of x's dtype, not of the arithmetic one.
NARROW_GAMMA, NARROW_BETA = 8, 16


@inline
def _own_param(call, param, kind, buffer):
    """`param` in the arithmetic type: in this thread's `buffer`, if call.kinds has `kind`.

    If one thread converted it for all, each cache line would take the others 40 ns.
    """
    if buffer is None:  # in which case it is not of another type
        return param
    if call.kinds & kind:
        memory, count = own(buffer), call.axes[4]
        _copy_run(as_elements(param, call.x), 0, memory, 0, count)
        _fill(memory, -SPARE, 0, 0.0)  # whose pages parts of lanes may touch: see `load_lanes`
        _fill(memory, count, count + SPARE, 0.0)
        return as_input(buffer)
    return param


@inline
def _with_gamma(call, buffer):
    """The call, a copy, with its gamma as `_own_param`, and no more of a kind that must become so:
    beta comes first.
    """
    put(call, "gamma", _own_param(call, call.gamma, NARROW_GAMMA, buffer))
    put(call, "kinds", call.kinds & ~(NARROW_GAMMA | NARROW_BETA))
    return call


@inline
def _with_params(call, gamma, beta):
    """The same with beta, in two buffers."""
    put(call, "beta", _own_param(call, call.beta, NARROW_BETA, beta))
    return _with_gamma(call, gamma)


@inline
def _beyond(value, most):
    """Whether a size is above a number, or below its reciprocal.

    Not of 0, inf and NaN, which are what they are in float32 too: the columns of a slab are all
    computed in one type, and those beside a NaN keep their bits.
    """
    size = abs(value)
    return (size > 0.0) & (size < 1.0 / most) | (size > most) & (size < np.inf)


@inline
def _extreme(rstd):
    """Whether centring and scaling in float32 might overflow or lose small values."""
    return _beyond(rstd, WIDE)


@inline
def _unsafe(factor):
    """Whether a float32 factor, or what it scales, might overflow or lose small values."""
    return _beyond(factor, VAST)


@inline
def _origin(axes, group):
    """Flat position of a group's first element."""
    k0, r0, k1, r1, params, span = axes
    if k1 == 1:
        return group * r0 * r1
    return group // k1 * (r0 * k1 * r1) + group % k1 * r1


@inline
def _parameter(axes, at):
    """Index of the parameter of flat element `at`, and where its run of elements ends.

    With span 1 a run is one of consecutive parameters, else one of elements that share theirs.
    """
    k0, r0, k1, r1, params, span = axes
    if span == 1:
        index = at % params
        return index, at + params - index
    run = at // span
    return run % params, (run + 1) * span


@inline
def _run(x, axes, whole):
    """Elements of the runs with one parameter each that make up stretches, or, if those are not
    `whole`, that are stretches; 0 if there are none.
    """
    k0, r0, k1, r1, params, span = axes
    if span % r1 == 0 and (r0 == 1 or _by_column(axes)):
        return r1
    lines = r0 == 1 and r1 % span == 0 and per_line(x) <= span and r1 <= KNOWN * span
    return span if lines and whole else 0


@inline
def _next_parameter(axes, index, end, first, last):
    """`_parameter` of element `last`, which is in the run of `first` or the next after it."""
    k0, r0, k1, r1, params, span = axes
    if last < end:
        return (index + last - first if span == 1 else index), end
    if span == 1:
        return 0, end + params
    return (index + 1 if index + 1 < params else 0), end + span


@inline
def _by_column(axes):
    """Whether every row of k1*r1 columns has the same parameters."""
    k0, r0, k1, r1, params, span = axes
    return k1 * r1 % (params * span) == 0


# Memory is slow to answer, and the processor asks ahead only where it recognises a pattern: not for
# what is written, and not over the border of a page. So sums ask for x and dy line by line, and
# kernels, where data are many, for what is written or is not in order.
@inline
def _far(x, axes):
    """Whether data are too many to be in the cache."""
    k0, r0, k1, r1, params, span = axes
    return k0 * r0 * k1 * r1 >= FAR * per_line(x)


@inline
def _late(x, axes):
    """Whether data read in their order, and no sums, are to be asked for: halves are in time."""
    return _far(x, axes) and significand(x) >= 24


@inline
def _ahead_of_stretch(x, axes):
    """Prefetch distance, in elements, where every element is read once; 0 for none."""
    k0, r0, k1, r1, params, span = axes
    return min(k1 * r1, LEAD * per_line(x)) if _late(x, axes) else 0


@inline
def _ahead_of_short_rows(x, axes):
    """Prefetch distance of rows so short that several are summed at once; 0 for none."""
    return LEAD // 2 * per_line(x) if _far(x, axes) else 0


@inline
def _leaps(x, axes):
    """Whether the processor would be late, since stretches are short and far from each other."""
    k0, r0, k1, r1, params, span = axes
    return r0 > 1 and r1 <= LONG * per_line(x) and _far(x, axes)


@inline
def _ahead_of_sums(dy, x, axes):
    """Prefetch distance of sums, of x or of dy and x: so many stretches that `LEAD` lines are on
    their way.
    """
    k0, r0, k1, r1, params, span = axes
    lead = (LEAD if dy is None else LEAD // 2) * per_line(x)
    return (lead + r1 - 1) // r1 * k1 * r1 if _leaps(x, axes) else 0


@inline
def _ahead_of_result(x, axes):
    """Prefetch distance of what is written after the sums of a group that is not near any more."""
    k0, r0, k1, r1, params, span = axes
    return k1 * r1 if r0 * r1 > STAYS and _leaps(x, axes) else 0


@inline
def _fetch(pointer, first, last):
    """Ask for elements first..last."""
    while first < last:
        fetch(pointer, first)
        first += per_line(pointer)


@inline
def _fetch_early(pointer, first, last):
    """Ask for elements first..last, long before they are used."""
    while first < last:
        fetch_early(pointer, first)
        first += per_line(pointer)


# What is written past the caches need not be read first, a third of the traffic. It pays where the
# result would not stay in them. So often do data of its size pass through them: twice x, for its
# sums too, twice dy, and what is written.
PASSES_BACKWARD = 5
PASSES_APPLY = 2  #: the same of a result by statistics that are given


@inline
def _passes(axes):
    """The same from statistics on. Sums over all samples count as more: so it was measured."""
    return 4 if axes[0] == 1 else 3


@inline
def _streams(to, passes, axes, whole):
    """Whether to write a result past the caches: not where many lines would be written in parts."""
    k0, r0, k1, r1, params, span = axes
    many = passes * k0 * r0 * k1 * r1 >= STREAMED * per_line(to)
    return many and whole and is_aligned(to)


@inline
def _streams_rows(to, passes, axes, in_order):
    """The same of rows: not in short runs of elements that share a line with others, unless
    `_store_runs` goes through all of them in the order of memory.
    """
    k0, r0, k1, r1, params, span = axes
    run = min(r1, params if span == 1 and params > 1 else span)
    odd = run % per_line(to) != 0 or r1 % per_line(to) != 0
    least = 1 if in_order else SHORTEST if odd else SHORTEST // 2
    return _streams(to, passes, axes, run >= least * per_line(to))


@inline
def _streams_columns(to, passes, axes):
    """The same of columns: only if those with the same parameters are whole lines long, or many are
    stored at once.
    """
    k0, r0, k1, r1, params, span = axes
    whole = _by_column(axes) and (k1 * r1 <= SLAB or k1 * r1 % per_line(to) == 0)
    return _streams(to, passes, axes, whole)


# A stretch of memory is one of a group's r0, or a part of its only one. Walking over them must not
# divide: that takes as long as a hundred elements.
@inline
def _find_stretch(axes, parts, task):
    """(group, its place among the k1 or the part, row, first element) of a stretch."""
    k0, r0, k1, r1, params, span = axes
    if r0 == 1:
        group, part = task // parts, task % parts
        return group, part, 0, group * r1 + part * r1 // parts
    sample, rest = task // (r0 * k1), task % (r0 * k1)
    return sample * k1 + rest % k1, rest % k1, rest // k1, task * r1


@inline
def _next_stretch(axes, parts, group, place, row):
    """The same, but for the element, of the next."""
    k0, r0, k1, r1, params, span = axes
    if r0 == 1:
        return (group, place + 1, 0) if place + 1 < parts else (group + 1, 0, 0)
    if place + 1 < k1:
        return group + 1, place + 1, row
    return (group + 1 - k1, 0, row + 1) if row + 1 < r0 else (group + 1, 0, 0)


@inline
def _end_of_stretch(axes, parts, group, place, at):
    k0, r0, k1, r1, params, span = axes
    if r0 == 1 and parts > 1:
        return group * r1 + (place + 1) * r1 // parts
    return at + r1


# ----------------------------------------------------------------------------------- loops of lanes
# What they do with the lanes of a line is a function's: ``make(i, count, like, *what)`` for the
# elements from i on, `count` of them if it is not None, in lanes as `like`. What it makes depends
# on numbers, or on tables whose first entry is for element `at`. (Before other arguments, Numba
# would warn of a function.)
@elementwise
def _plus(a, b):
    return a[0] + b[0], a[1] + b[1]


@elementwise
def _line_ahead(like, make, i, at, dy, x, *what):
    """``make(i, None, like, at, dy, x, *what)``, after asking for a line to come: even of data in
    their order, processors have too few on their way.
    """
    fetch(x, i + LEAD * per_line(x))
    if dy is not None:
        fetch(dy, i + LEAD * per_line(x))
    return make(i, None, like, at, dy, x, *what)


@elementwise
def _sum_lines(like, make, first, last, *what):
    """The sums of the two lanes that ``make(i, count, like, *what)`` gives."""
    many = per_line(like)
    if last - first < many:
        a = make(first, last - first, like, *what)
    else:
        a, b, i = _line_ahead(like, make, first, *what), (like, like), first + many
        while i + 2 * many <= last:
            a = _plus(a, _line_ahead(like, make, i, *what))
            b = _plus(b, _line_ahead(like, make, i + many, *what))
            i += 2 * many
        if i + many <= last:
            a = _plus(a, _line_ahead(like, make, i, *what))
            i += many
        if i < last:
            b = _plus(b, make(i, last - i, like, *what))
        a = _plus(a, b)
    return totals(a[0], a[1])


@inline
def _fetch_all(to, x, dy, first, last):
    if dy is not None:
        _fetch(dy, first, last)
    _fetch(x, first, last)
    _fetch(to, first, last)


@elementwise
def _store_whole_lines(to, make, like, i, last, ahead, streams, at, dy, x, *what):
    """`_store_lines` from `i`, the first of a line if it is streamed, on; where less than one is
    left.
    """
    many = per_line(like)
    if streams:
        while i + many <= last:
            stream_lanes(to, i, None, make(i, None, like, at, dy, x, *what))
            i += many
        return i
    while i + 4 * many <= last:
        if ahead:
            _fetch_all(to, x, dy, i + ahead, i + ahead + 4 * many)
        a = make(i, None, like, at, dy, x, *what)
        b = make(i + many, None, like, at, dy, x, *what)
        c = make(i + 2 * many, None, like, at, dy, x, *what)
        d = make(i + 3 * many, None, like, at, dy, x, *what)
        store_lanes(to, i, None, a)
        store_lanes(to, i + many, None, b)
        store_lanes(to, i + 2 * many, None, c)
        store_lanes(to, i + 3 * many, None, d)
        i += 4 * many
    if ahead:
        _fetch_all(to, x, dy, i + ahead, last + ahead)
    while i + many <= last:
        store_lanes(to, i, None, make(i, None, like, at, dy, x, *what))
        i += many
    return i


@elementwise
def _store_some(to, make, like, i, part, *what):
    store_lanes(to, i, part, make(i, part, like, *what))


@elementwise
def _store_lines(to, make, like, first, last, ahead, streams, *what):
    """Let elements first..last of `to` be what ``make(i, count, like, at, dy, x, *what)`` gives.

    Memory is asked for `ahead` elements early, if that is not 0; where lines are streamed, for a
    last one of `to` that is not.
    """
    i = first
    if streams:
        if past_line(to, last):
            fetch(to, last + ahead - 1)
        past = past_line(to, first)
        if past:
            i = min(last, first + per_line(like) - past)
            # Of a line: processors would load all that a store may reach.
            _store_some(to, make, like, first - past, (past, i - first), *what)
        ahead = 0
    i = _store_whole_lines(to, make, like, i, last, ahead, streams, *what)
    if i < last:
        _store_some(to, make, like, i, (np.int64(0), last - i), *what)


@inline
def _to_rest(size, to):
    """`PARTLY` lines in whole runs of `size` elements, for `_store_lines` that stream."""
    return PARTLY * per_line(to) // size * size


# Runs of a line or more that follow each other have a formula each, which is lanes full of numbers.
# A line of `to` that two of them share is made by both, and stored once: it waits for the second.
@inline
def _of_run(dy, x, form):
    """What ``make`` takes of a run: its parameters are in the formula, which has no factor."""
    return np.int64(0), dy, x, None, None, 0, None, *form


@elementwise
def _store_run(to, make, like, at, first, end, ahead, streams, dy, x, before, form):
    """Let elements `at` to `end` of `to` be what ``make`` gives, by `before` up to `first` and then
    by `form`, as far as lines are whole; where the rest begins.
    """
    past, what = past_line(to, at), _of_run(dy, x, form)
    if at < first:
        both = _of_run(dy, x, spliced(before, form, first - at))
        next_line = at + per_line(like)
        at = _store_whole_lines(to, make, like, at, next_line, ahead, streams, *both)
    elif past:
        _store_some(to, make, like, at - past, (past, per_line(like) - past), *what)
        at += per_line(like) - past
    return _store_whole_lines(to, make, like, at, end, ahead, streams, *what)


@elementwise
def _store_rest(to, make, like, at, end, dy, x, form):
    """The last part of a line after the last run."""
    if at < end:
        _store_some(to, make, like, at, (np.int64(0), end - at), *_of_run(dy, x, form))


@inline  # LLVM would keep `make`, an address of this process
def _store_runs(to, make, first, size, count, ahead, streams, dy, x, table, i):
    """Let `count` runs side by side be what ``make`` gives by numbers at i, i + 1 ... of tables."""
    like, zero = lanes(x, real(x, 1.0)), np.int64(0)
    at, end = first, first + count * size
    if streams and past_line(to, end):
        fetch(to, end + _to_rest(end - first, to) - 1)
    before = form = lanes_of_each(table, zero, like)
    for j in range(i, i + count):
        before, form = form, lanes_of_each(table, j, like)
        last = first + size
        at = _store_run(to, make, like, at, first, last, ahead, streams, dy, x, before, form)
        first = last
    _store_rest(to, make, like, at, end, dy, x, form)


# ------------------------------------------------------------------------------------------ moments
@elementwise
def _powers(i, count, like, at, dy, x, shift, before, after):
    """(x*before - shift)*after and its square; if those are None, 1 of them and shift float64's."""
    d, about = load_lanes(x, i, count, like), load_lanes(shift, i - at, count, like)
    if before is not None:
        d = (d * before - about) * after
    elif is_float64(x):
        d = d - about
    d = first_lanes(d, count)
    return d, d * d


@inline
def _is_kept(x, s, q, count):
    """Whether float32's sums of `count` halves and of their squares lost nothing to speak of.

    Squares are in its range, and the mean is below 4 standard deviations: of this part of a group,
    and so, if of every part, of the group.
    """
    in_range = (q < 2.0**120) & (significand(x) == 11 or q > 2.0**-100)
    return in_range & (16.0 * s * s <= 15.0 * count * q)


@inline
def _sums(x, first, last, shift, before, after):
    """Sum and sum of squares of (x*before - shift)*after; the factors matter to float64 only."""
    sums = if_halves(x, _sums_of_halves, _exact_sums)
    return sums(x, first, last, shift, before, after)


@inline
def _exact_sums(x, first, last, shift, before, after):
    return _sum_lines(lanes(x, 0.0), _powers, first, last, 0, None, x, shift, before, after)


@inline
def _sums_of_halves(x, first, last, shift, before, after):
    """`_sums`, in float32 first if that loses nothing."""
    if shift == 0.0:
        zero = np.float32(0.0)
        s = q = 0.0
        for begin in range(first, last, NARROW):
            end = min(begin + NARROW, last)
            ds, dq = _sum_lines(lanes(x, zero), _powers, begin, end, 0, None, x, zero, None, None)
            s += ds
            q += dq
        if _is_kept(x, s, q, last - first):
            return s, q
    return _exact_sums(x, first, last, shift, before, after)


@elementwise
def _columns_of_eight(like, x, first, size, part, count):
    """The first `part` elements of eight rows, the last of `count` in place of more, as columns."""
    last = count - 1
    return transposed((
        load_lanes(x, first, part, like),
        load_lanes(x, first + min(1, last) * size, part, like),
        load_lanes(x, first + min(2, last) * size, part, like),
        load_lanes(x, first + min(3, last) * size, part, like),
        load_lanes(x, first + min(4, last) * size, part, like),
        load_lanes(x, first + min(5, last) * size, part, like),
        load_lanes(x, first + min(6, last) * size, part, like),
        load_lanes(x, first + min(7, last) * size, part, like),
    ))  # fmt: skip


@elementwise
def _store_eight(to, first, size, count, rows):
    """Store `count` of eight rows: any others in the place of the last one, before that."""
    last = count - 1
    store_lanes(to, first + min(7, last) * size, size, rows[7])
    store_lanes(to, first + min(6, last) * size, size, rows[6])
    store_lanes(to, first + min(5, last) * size, size, rows[5])
    store_lanes(to, first + min(4, last) * size, size, rows[4])
    store_lanes(to, first + min(3, last) * size, size, rows[3])
    store_lanes(to, first + min(2, last) * size, size, rows[2])
    store_lanes(to, first + min(1, last) * size, size, rows[1])
    store_lanes(to, first, size, rows[0])


@elementwise
def _sums_of_columns(columns, s, q):
    """`s` and `q` plus the sums of eight rows and of their squares."""
    for column in columns:
        d = widened(column)
        s, q = s + d, q + d * d
    return s, q


@elementwise
def _sums_of_eight(x, first, size, count, sums, to):
    """`_sums` of `count` of eight short rows."""
    like, s = lanes_of_few(x, np.float32(0.0)), lanes_of_few(x, 0.0)
    q = s
    for j in range(0, size, 8):
        columns = _columns_of_eight(like, x, first + j, size, min(size - j, 8), count)
        s, q = _sums_of_columns(columns, s, q)
    store_lanes(sums, to, None, s)
    store_lanes(sums, SLAB + to, None, q)


@plain
def _sums_of_rows(x, y, first, size, count, shift, sums, ahead):
    """`_sums` of stretches of `size` elements, side by side. If `ahead` is not 0, short ones are
    asked for so many elements early, and any y's, which are soon written to, while x's are summed.
    """
    if size < SHORT_ROW and not is_float64(x):
        for i in range(0, count, 8):
            at = first + i * size
            if ahead:
                _fetch(x, at + ahead, at + ahead + 8 * size)
                if given(y):
                    _fetch(y, at, at + 8 * size)
            _sums_of_eight(x, at, size, count - i, sums, i)
        return
    for i in range(count):
        about = load(shift, i) if is_float64(x) else 0.0
        s, q = _sums(x, first, first + size, about, 1.0, 1.0)
        store(sums, i, s)
        store(sums, SLAB + i, q)
        first += size


@inline
def _part_sums(call, group, part, shift, before, after):
    """`_sums` over one of the parts that a group is cut into.

    If memory is fetched ahead, that of y is, where it is soon written to.
    """
    x, y, axes, parts = call.x, call.y, call.axes, call.parts
    k0, r0, k1, r1, params, span = axes
    pieces = (r1 + CHUNK - 1) // CHUNK
    row, at, count = 0, 0, r0 * pieces
    if parts > 1:
        begin = part * count // parts
        count = (part + 1) * count // parts - begin
        row, at = begin // pieces, begin % pieces * CHUNK
    origin = _origin(axes, group) + row * k1 * r1
    ahead = _ahead_of_sums(None, x, axes)
    streams = _streams_rows(y, _passes(axes), axes, False)
    writes = given(y) and r0 * r1 <= STAYS and not streams
    s = q = 0.0
    for _ in range(count):
        first, last = origin + at, origin + min(at + CHUNK, r1)
        if ahead:
            _fetch(x, first + ahead, last + ahead)
            if writes:
                _fetch(y, first, last)
        ds, dq = _sums(x, first, last, shift, before, after)
        s += ds
        q += dq
        at += last - first
        if at == r1:
            at = 0
            origin += k1 * r1
    return s, q


@plain
def _sums_across(call, task):
    """`_part_sums` of all groups side by side, not of float64: stretch by stretch as in memory."""
    s, q = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    k0, r0, k1, r1, params, span = call.axes
    sample, part = task // call.parts, task % call.parts
    _fill(s, 0, k1, 0.0)
    _fill(q, 0, k1, 0.0)
    row, end = part * r0 // call.parts, (part + 1) * r0 // call.parts
    at = (sample * r0 + row) * k1 * r1
    for _ in range(row, end):
        for i in range(k1):
            ds, dq = _sums(call.x, at, at + r1, 0.0, 1.0, 1.0)
            store(s, i, load(s, i) + ds)
            store(q, i, load(q, i) + dq)
            at += r1
    for i in range(k1):
        to = (sample * k1 + i) * call.parts + part
        store(call.partial, 2 * to, load(s, i))
        store(call.partial, 2 * to + 1, load(q, i))


@inline
def _group_sums(call, group, shift, before, after):
    """`_sums` of a whole group."""
    s = q = 0.0
    for part in range(call.parts):
        ds, dq = _part_sums(call, group, part, shift, before, after)
        s += ds
        q += dq
    return s, q


@inline
def _sums_of_parts(call, group):
    """Both sums of a group, or of its gradients, whose parts were summed before."""
    s = q = 0.0
    for part in range(group * call.parts, (group + 1) * call.parts):
        s += load(call.partial, 2 * part)
        q += load(call.partial, 2 * part + 1)
    return s, q


@inline
def _central(s, q, count, center):
    """Mean and variance of differences whose sum and sum of squares are given."""
    if not center:
        return 0.0, q / count
    delta = s / count
    return delta, max(q / count - delta * delta, 0.0)


@inline
def _is_good(delta, var):
    """Whether the variance may be a difference from the squared mean; a NaN is not good."""
    return delta * delta <= GOOD * var


@plain
def _two_passes(call, group, before, after):
    """(mean*before, its rounding error, variance*(before*after)**2), as exactly as float64 can."""
    count = call.axes[1] * call.axes[3]
    shift = delta = var = 0.0
    if call.center:
        shift = np.float64(load(call.x, _origin(call.axes, group))) * before
        s, q = _group_sums(call, group, shift, before, after)
        shift += s / count / after
    s, q = _group_sums(call, group, shift, before, after)
    delta, var = _central(s, q, count, call.center)
    mean = shift + delta / after
    return mean, shift - mean + delta / after, var


@plain
def _exact_moments(call, group):
    """Moments of any group, one that needs scaling by a power of two included."""
    eps, before, after = call.eps, 1.0, 1.0
    mean, residual, var = _two_passes(call, group, before, after)
    if is_float64(call.x):
        if not np.isfinite(var):
            before = 2.0**-600
        elif var < 2.0**-900 and eps < 2.0**-850:
            after = 2.0**600
        if before * after != 1.0:
            mean, residual, var = _two_passes(call, group, before, after)
    if not np.isfinite(var) and call.center:  # an inf or NaN: the mean that numpy.mean gives
        s, q = _group_sums(call, group, 0.0, before, 1.0)
        return s / (call.axes[1] * call.axes[3]), 0.0, np.nan, np.nan
    scale = before * after
    rstd = scale / np.sqrt(var + eps * scale * scale)
    return mean / before, residual / before, var / scale / scale, rstd


def exact_moments(call, first, last):
    """Moments of groups that one pass did not serve, to call.mean and so on: a task is a group."""
    for group in range(first, last):
        mean, residual, var, rstd = _exact_moments(call, group)
        store(call.mean, group, mean)
        store(call.residual, group, residual if is_float64(call.x) else 0.0)  # nobody keeps it
        store(call.var, group, var)
        store(call.rstd, group, rstd)


@inline
def _with_moments(call, group, mean, residual, rstd):
    """The call, a copy, with tables of moments, whose first is of `group`."""
    put(call, "mean", moved(mean, -group))
    put(call, "residual", moved(residual, -group))
    put(call, "rstd", moved(rstd, -group))
    return call


@plain
def _leave_moments(call, group, i, mean, residual, var, rstd):
    """Let the moments of the i-th group from `group` on be exact."""
    exact = _with_moments(copied(call), group, mean, residual, rstd)
    put(exact, "var", moved(var, -group))
    leave(EXACT, exact, group + i, group + i + 1)


@inline
def _given_moments(call, group, mean, residual, rstd):
    """`_with_moments` for the result: all that was to enter them, or running ones, has."""
    put(call, "running_mean", nothing_like(call.running_mean))
    put(call, "r", nothing_like(call.r))
    put(call, "parts", np.int64(1))
    return _with_moments(call, group, mean, residual, rstd)


@plain
def _leave_groups(call, begin, groups):
    """Let any result's kernel take all stretches of groups, whose statistics, or sums, it has."""
    k0, r0, k1, r1, params, span = call.axes
    if r0 == 1:
        leave(ANY, call, begin, begin + groups)
        return
    for group in range(begin, begin + groups):
        first = _origin(call.axes, group) // r1
        for task in range(first, first + r0 * k1, k1):
            leave(ANY, call, task, task + 1)


@elementwise
def _blend(old, first, new, factor, momentum, count):
    """Let `count` new statistics enter running ones, those from `first` on."""
    for i in range(count):
        value = np.float64(load(old, first + i))
        store(old, first + i, value + momentum * (load(new, i) * factor - value))


@inline
def _update(call, first, mean, var, count):
    """Let the moments of `count` groups enter the running statistics."""
    if given(call.running_mean):
        if call.kinds & WIDE_MEAN:
            _blend(as_elements(call.running_mean, mean), first, mean, 1.0, call.momentum, count)
        else:
            _blend(call.running_mean, first, mean, 1.0, call.momentum, count)
        if call.kinds & WIDE_SPREAD:
            _blend(
                as_elements(call.running_spread, mean),
                first,
                var,
                call.factor,
                call.momentum,
                count,
            )
        else:
            _blend(call.running_spread, first, var, call.factor, call.momentum, count)


@inline
def _running(call, first, mean, spread, count):
    """The running statistics of `count` groups."""
    if call.kinds & WIDE_MEAN:
        _copy_from(as_elements(call.running_mean, mean), first, mean, count)
    else:
        _copy_from(call.running_mean, first, mean, count)
    if call.kinds & WIDE_SPREAD:
        _copy_from(as_elements(call.running_spread, mean), first, spread, count)
    else:
        _copy_from(call.running_spread, first, spread, count)


@elementwise
def _invert(rstd, eps, deviation, count):
    if deviation:
        for i in range(count):
            store(rstd, i, 1.0 / load(rstd, i))
    else:
        for i in range(count):
            store(rstd, i, 1.0 / np.sqrt(load(rstd, i) + eps))


@inline
def _clip(value, low, high):
    """NaN stays NaN."""
    return low if value < low else high if value > high else value


@elementwise
def _renorm(clip, mean, rstd, std, r, d, count):
    """r and d of Batch Renormalization, in place of the running mean and standard deviation, and
    the new standard deviation.
    """
    r_max, d_max = clip
    for i in range(count):
        old_mean, old_std, new = load(r, i), load(d, i), 1.0 / load(rstd, i)
        ratio, shift = new / old_std, (load(mean, i) - old_mean) / old_std
        store(std, i, new)
        store(r, i, 1.0 if r_max == 1.0 else _clip(ratio, 1.0 / r_max, r_max))
        store(d, i, 0.0 if d_max == 0.0 else _clip(shift, -d_max, d_max))


@elementwise
def _correct(r, d, first, residual, rstd, count):
    """Let (x - mean - residual)*rstd be what it was, times r, plus d: no table knows of them."""
    for i in range(count):
        a, lift = load(rstd, i) * load(r, first + i), load(d, first + i)
        store(rstd, i, a)
        store(residual, i, load(residual, i) - (lift / a if lift != 0.0 else 0.0))


@elementwise
def _copy_from(source, first, target, count):
    for j in range(count):
        store(target, j, load(source, first + j))


@elementwise
def _copy_to(target, first, source, count):
    for j in range(count):
        store(target, first + j, load(source, j))


@reduction
def _group_moments(x, count, groups, center, eps, shift, sums, mean, residual, var, rstd):
    """Moments of groups from their sums; how many of them need `_exact_moments`."""
    bad, share = 0, 1.0 / count
    for i in range(groups):
        s, q = load(sums, i), load(sums, SLAB + i)
        delta = (s / count if is_float64(x) else s * share) if center else 0.0
        v = max((q / count if is_float64(x) else q * share) - delta * delta, 0.0)
        bad += not (_is_good(delta, v) & (q < np.inf))
        store(mean, i, delta)
        store(var, i, v)
        store(rstd, i, 1.0 / np.sqrt(v + eps))
    for i in range(groups):
        _add_exactly(shift, mean, residual, i)
    return bad


@elementwise
def _add_exactly(shift, mean, residual, i):
    """mean + residual = shift + mean, the rounding error of the sum being the residual."""
    about, delta = load(shift, i), load(mean, i)
    total = about + delta
    store(residual, i, about - total + delta)
    store(mean, i, total)


@inline
def _keep_moments(call, group, groups, mean, var, rstd):
    if given(call.mean):
        _copy_to(call.mean, group, mean, groups)
        _copy_to(call.rstd, group, rstd, groups)
    if given(call.var):
        _copy_to(call.var, group, var, groups)


@inline
def _finish(call, group, groups, last, shift, sums, mean, residual, var, rstd):
    """Moments of `groups` groups from `group` on, from their sums; only the mean if not `last`."""
    x, axes = call.x, call.axes
    count = axes[1] * axes[3]
    bad = _group_moments(
        x, count, groups, call.center, call.eps, shift, sums, mean, residual, var, rstd
    )
    if last and (bad or is_float64(x)):
        for i in range(groups):
            v, q = load(var, i), load(sums, SLAB + i)
            delta = (load(mean, i) - load(shift, i)) + load(residual, i)
            good = v > 2.0**-900 if is_float64(x) else _is_good(delta, v)
            if not (good and np.isfinite(q)):
                _leave_moments(call, group, i, mean, residual, var, rstd)
    _keep_moments(call, group, groups, mean, var, rstd)
    if given(call.residual):
        _copy_to(call.residual, group, residual, groups)
    if last:
        if call.kinds & DEVIATION:
            r, d = sums, moved(sums, SLAB)  # which are done with
            _running(call, group, r, d, groups)
            _renorm(call.clip, mean, rstd, var, r, d, groups)
            if given(call.r):
                _copy_to(call.r, group, r, groups)
                _copy_to(call.d, group, d, groups)
            _correct(r, d, 0, residual, rstd, groups)
        _update(call, group, mean, var, groups)


@inline
def _saved(call, group):
    """(mean, its rounding error, rstd) of a group."""
    residual = load(call.residual, group) if given(call.residual) else 0.0
    return load(call.mean, group), residual, load(call.rstd, group)


@inline
def _load_groups(call, group, groups, mean, residual, rstd):
    """`_saved` of several groups."""
    _copy_from(call.mean, group, mean, groups)
    _copy_from(call.rstd, group, rstd, groups)
    if given(call.residual):
        _copy_from(call.residual, group, residual, groups)
    else:
        _fill(residual, 0, groups, 0.0)


@inline
def _given_groups(call, group, groups, mean, residual, rstd):
    """`_saved` of several groups, with any r and d, or the running statistics where they are to be
    used.
    """
    if given(call.running_mean):
        _running(call, group, mean, rstd, groups)
        _invert(rstd, call.eps, call.kinds & DEVIATION, groups)
        _fill(residual, 0, groups, 0.0)
    else:
        _load_groups(call, group, groups, mean, residual, rstd)
        if given(call.r):
            _correct(call.r, call.d, group, residual, rstd, groups)


@inline
def _centre(x, mean, residual, rstd):
    """(factor, high, low, rstd/factor): x - mean is ((x*factor - high) - low) / factor.

    `high` is a number of the arithmetic type. The factor is a power of two, other than 1 only for
    float64 statistics so extreme that sums of squares would overflow or underflow.
    """
    if is_float64(x):
        factor = 2.0**-960 if rstd < 2.0**-900 else 2.0**960 if rstd > 2.0**900 else 1.0
        return factor, mean * factor, residual * factor, rstd / factor
    high = mean if _extreme(rstd) else np.float64(np.float32(mean))
    return 1.0, high, mean - high + residual, rstd


# Groups that follow each other in memory are planned side by side: the numbers that the formula of
# every run is made of, elements that share a parameter, are in tables.
@elementwise
def _centre_each(x, count, factor, high, low, rstd):
    """`_centre` of groups whose mean, rounding error and rstd are `high`, `low` and `rstd`."""
    for i in range(count):
        f, h, e, r = _centre(x, load(high, i), load(low, i), load(rstd, i))
        if is_float64(x):  # others have none
            store(factor, i, f)
        store(high, i, h)
        store(low, i, e)
        store(rstd, i, r)


@inline
def _centre_runs(call, group, groups, runs, factor, high, low, rstd):
    """The same of each of their runs, from `group` on."""
    _load_groups(call, group, groups, high, low, rstd)
    _centre_each(call.x, groups, factor, high, low, rstd)
    if is_float64(call.x):
        _expand(factor, groups, runs)
    _expand(high, groups, runs)
    _expand(low, groups, runs)
    _expand(rstd, groups, runs)


@inline
def _run_params(axes, at, run, count, values, found):
    """The parameter of each of `count` runs, side by side from `at` on."""
    index, end_of_run = _parameter(axes, at)
    for j in range(count):
        store(found, j, np.float64(load(values, index)))
        index, end_of_run = _next_parameter(axes, index, end_of_run, at, at + run)
        at += run


# ------------------------------------------------------------------------------------ rows: forward
# The types of the numbers decide the type of the arithmetic: each loop serves float32 and float64.
@elementwise
def _y_of(i, count, like, at, dy, x, gamma, beta, to, factor, high, scale, shift):
    """y = (x*factor - high)*scale + shift, without a factor if that is None; with gamma and beta,
    numbers or parameters of which `to` + i is the first, that times gamma + beta. No dy.
    """
    j, d = i - at, load_lanes(x, i, count, like)
    if factor is not None:
        d = d * load_lanes(factor, j, count, like)
    d = d - load_lanes(high, j, count, like)
    z = d * load_lanes(scale, j, count, like) + load_lanes(shift, j, count, like)
    if gamma is None:
        return z
    return z * load_lanes(gamma, to + i, count, like) + load_lanes(beta, to + i, count, like)


@inline  # no fused multiply-add, as where a group's neighbour takes float64: the same bits
def _set_formulas(x, count, mean, residual, rstd, high, scale, shift):
    """Let y of `count` runs, whose gamma and beta are `scale` and `shift`, be (x - high)*scale +
    shift by the numbers of the tables; how many take float64 or a factor.
    """
    wides = 0
    for j in range(count):
        r = load(rstd, j)
        factor, h, low, a = _centre(x, load(mean, j), load(residual, j), r)
        a *= load(scale, j)
        wides += factor != 1.0 if is_float64(x) else _extreme(r) | _unsafe(a)
        store(high, j, h)
        store(scale, j, a)
        store(shift, j, load(shift, j) - low * a)
    return wides


@inline
def _formulas(call, group, groups, run, moments, of_runs, table):
    """`_set_formulas` for every `run` elements of groups from `group` on, with their parameter, or
    for every group but for parameters if that is 0; how many take float64.
    """
    runs = call.axes[3] // run if run else 1
    count, (_, scale, shift) = groups * runs, table
    if runs > 1:
        for i in range(3):
            _spread_to(of_runs[i], moments[i], groups, runs, 1)
        moments = of_runs
    if run:
        # As if all groups were side by side: rows of them begin with the same parameter.
        at = _origin(call.axes, group)
        _run_params(call.axes, at, run, count, call.gamma, scale)
        _run_params(call.axes, at, run, count, call.beta, shift)
    else:
        _fill(scale, 0, count, 1.0)
        _fill(shift, 0, count, 0.0)
    return _set_formulas(call.x, count, *moments, *table)


@inline
def _apply_groups(call, run, first, size, stride, count, i, step, ahead, streams, table):
    """y of `count` stretches of `size` elements, by the `_formulas` of every `step`-th group."""
    x, y, params = call.x, call.y, call.axes[4]
    place = first, size, stride, count, i, step, ahead, streams
    if run >= per_line(x) and step and stride == size:
        _apply_runs(x, y, first, size, run, count, i, ahead, streams, table)
    elif run:
        _apply_each(x, y, None, None, params, *place, table)
    else:
        _apply_each(x, y, call.gamma, call.beta, params, *place, table)


@plain
def _apply_runs(x, y, first, size, run, count, i, ahead, streams, table):
    """The same of stretches side by side, of runs with one formula each."""
    runs = max(1, size // run)
    _store_runs(
        y, _y_of, first, min(run, size), count * runs, ahead, streams, None, x, table, i * runs
    )


@inline  # LLVM would keep `make`, an address of this process
def _store_each(
    to, make, dy, x, gamma, beta, params, first, size, stride, count, i, step, ahead, streams, table
):
    """Let each of some stretches be what ``make`` gives by the numbers of tables at i, i + step and
    so on, and by gamma and beta if their elements have one each.
    """
    index, hop = (0, 0) if gamma is None else (first % params, stride % params)
    like = lanes(x, real(x, 1.0))
    if streams:
        ahead = _to_rest(size if gamma is None else min(size, params), to)
    for _ in range(count):
        form = lanes_of_each(table, i, like)
        at, end, param = first, first + size, index
        while at < end:
            last = end if gamma is None else min(end, at + params - param)
            what = 0, dy, x, gamma, beta, param - at, None, *form
            _store_lines(to, make, like, at, last, ahead, streams, *what)
            at, param = last, 0
        first += stride
        i += step
        index += hop
        if index >= params:
            index -= params


@plain
def _apply_each(
    x, y, gamma, beta, params, first, size, stride, count, i, step, ahead, streams, table
):
    """y of stretches, each by itself."""
    place = first, size, stride, count, i, step, ahead, streams
    _store_each(y, _y_of, None, x, gamma, beta, params, *place, table)


@inline
def _store_stretch(
    arrays, make, axes, first, end, index, end_of_run, ahead, streams, wide, low, factor, high,
    scaled, slope, narrow_slope, shift
):  # fmt: skip
    """Let elements first..end, of one group and side by side, be what `make` gives; `_parameter` of
    the next.

    The parameter that a run of elements shares becomes a part of its scale and, in y, of its shift;
    dx has no `low` but a `slope`, in a tuple that is empty for y.
    """
    to, dy, x, gamma, beta = arrays
    by_element = axes[5] == 1 and axes[3] > 1
    while first < end:
        last, scale, lift = min(end, end_of_run), scaled, shift
        if not by_element:
            scale *= load(gamma, index)
        if low is not None:
            lift = -low * scale if by_element else load(beta, index) - low * scale
        if streams:
            ahead = _to_rest(last - first, to)
        one, run = np.float32(1.0), (first, last, ahead, streams, 0, dy, x)
        form = factor, high, scale, *slope, lift
        narrow = one, np.float32(high), np.float32(scale), *narrow_slope, np.float32(lift)
        if by_element:
            params = gamma, beta, index - first
            if wide:
                _store_lines(to, make, lanes(x, scale), *run, *params, *form)
            else:
                _store_lines(to, make, lanes(x, one), *run, *params, *narrow)
        elif wide or _unsafe(scale):
            _store_lines(to, make, lanes(x, scale), *run, None, None, 0, *form)
        else:
            _store_lines(to, make, lanes(x, one), *run, None, None, 0, *narrow)
        index, end_of_run = _next_parameter(axes, index, end_of_run, first, last)
        first = last
    return index, end_of_run


@inline
def _rounds(call):
    """How often x is summed: float64's second time about the mean."""
    return 2 if is_float64(call.x) and call.center else 1


@inline
def _shift(call, group, again, mean, i):
    """What a group is summed about: for float64 its first element, then its rounded mean."""
    if not (is_float64(call.x) and call.center):
        return 0.0
    return load(mean, i) if again else np.float64(load(call.x, _origin(call.axes, group)))


def rows_sums(call, first, last):
    """Sums of elements and of their squares: a task is a part of a group, a stretch of memory."""
    for task in range(first, last):
        group, part = task // call.parts, task % call.parts
        about = _shift(call, group, call.round == 1, call.mean, group)
        s, q = _part_sums(call, group, part, about, 1.0, 1.0)
        store(call.partial, 2 * task, s)
        store(call.partial, 2 * task + 1, q)


def rows_sums_across(call, first, last):
    """The same: a task is a part of all groups side by side."""
    for task in range(first, last):
        _sums_across(call, task)


def rows_finish(call, first, last):
    """Statistics of groups whose parts were summed; of float64, after a first round, the mean."""
    shift, sums, var = scratch(0.0, SLAB), scratch(0.0, PAIR), scratch(0.0, SLAB)
    mean, residual, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    final = call.round == _rounds(call) - 1
    for begin in range(first, last, SLAB):
        groups = min(SLAB, last - begin)
        for i in range(groups):
            store(shift, i, _shift(call, begin + i, call.round == 1, call.mean, begin + i))
            s, q = _sums_of_parts(call, begin + i)
            store(sums, i, s)
            store(sums, SLAB + i, q)
        _finish(call, begin, groups, final, shift, sums, mean, residual, var, rstd)


@inline
def _is_uniform(axes, run):
    """Whether `_formulas` serve: of runs, or where elements have a parameter each."""
    return run > 0 or axes[5] == 1


def rows_apply(call, first, last):
    """y by statistics that are given: a task is a stretch of memory."""
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call = _with_params(copied(call), *buffers)
    x, axes, parts, zero = call.x, call.axes, call.parts, real(call.x, 0.0)
    k0, r0, k1, r1, params, span = axes
    mean, residual, rstd = scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    of_runs = scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    table = scratch(zero, KNOWN), scratch(zero, KNOWN), scratch(zero, KNOWN)
    run, step = _run(x, axes, parts == 1), np.int64(1)  # for a literal, all would be compiled again
    if not _is_uniform(axes, run):
        leave(ANY, call, first, last)
        return
    streams = _streams_rows(call.y, PASSES_APPLY, axes, run >= per_line(x))
    ahead = _ahead_of_stretch(x, axes)
    most = min(SLAB, KNOWN * run // r1) if run else SLAB
    begin, stop, quick = 0, 0, False  # of the groups whose statistics are at hand
    group, place, row, at = _find_stretch(axes, parts, first)
    task = first
    while task < last:
        if not begin <= group < stop:
            if r0 == 1:
                begin, stop = group, min(group + most, k0 * k1)
            elif last - task > k1 - place:  # they are met again in the next row
                begin = group - place % KNOWN
                stop = min(begin + KNOWN, group - place + k1)
            else:
                begin, stop = group, min(group + KNOWN, group + last - task)
            _given_groups(call, begin, stop - begin, mean, residual, rstd)
            quick = not _formulas(
                call, begin, stop - begin, run, (mean, residual, rstd), of_runs, table
            )
        i, count = group - begin, 1
        size = _end_of_stretch(axes, parts, group, place, at) - at
        if parts == 1 or r0 > 1:
            count = min(stop - group, last - task)
        if quick:
            _apply_groups(call, run, at, size, size, count, i, step, ahead, streams, table)
        else:
            leave(ANY, call, task, task + count)
        task += count
        at += count * size
        skipped = count - 1
        group, place, row = _next_stretch(
            axes, parts, group + skipped, place + (skipped if r0 > 1 else 0), row
        )


def rows_apply_any(call, first, last):
    """The same of any stretches, each by itself: those that take float64 or a factor, or which
    begin and end within runs that share a parameter.
    """
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call = _with_params(copied(call), *buffers)
    mean, residual, rstd = scratch(0.0, FEW), scratch(0.0, FEW), scratch(0.0, FEW)
    x, axes, parts, known = call.x, call.axes, call.parts, -1
    arrays = call.y, None, x, call.gamma, call.beta
    streams = _streams_rows(call.y, PASSES_APPLY, axes, False)
    ahead = _ahead_of_stretch(x, axes)
    group, place, row, at = _find_stretch(axes, parts, first)
    index, end_of_run = _parameter(axes, at)
    for _ in range(first, last):
        if group != known:
            known = group
            _given_groups(call, group, 1, mean, residual, rstd)
        end = _end_of_stretch(axes, parts, group, place, at)
        m, e, r = load(mean, 0), load(residual, 0), load(rstd, 0)
        factor, high, low, scaled = _centre(x, m, e, r)
        wide = is_float64(x) or _extreme(r)
        index, end_of_run = _store_stretch(
            arrays, _y_of, axes, at, end, index, end_of_run, ahead, streams, wide, low, factor,
            high, scaled, (), (), 0.0
        )  # fmt: skip
        group, place, row = _next_stretch(axes, parts, group, place, row)
        at = end


@inline
def _block(axes):
    """Groups that are taken from sums to result, before others."""
    k0, r0, k1, r1, params, span = axes
    block = min(SLAB, max(1, NEAR // (r0 * r1)))
    return block - block % 8 if r1 < SHORT_ROW else block


@inline
def _sums_of_groups(call, begin, groups, shift, sums, ahead):
    """`_sums` of groups from `begin` on."""
    k0, r0, k1, r1, params, span = call.axes
    if r0 == call.parts == 1 and r1 <= CHUNK:
        _sums_of_rows(call.x, call.y, begin * r1, r1, groups, shift, sums, ahead)
    else:
        for i in range(groups):
            about = load(shift, i) if is_float64(call.x) else 0.0  # LLVM then knows it
            s, q = _group_sums(call, begin + i, about, 1.0, 1.0)
            store(sums, i, s)
            store(sums, SLAB + i, q)


@plain
def _leave_rows(call, begin, groups, mean, residual, rstd):
    """Let y of groups be given by tables of their moments."""
    _leave_groups(_given_moments(copied(call), begin, mean, residual, rstd), begin, groups)


def rows_forward(call, first, last):
    """Statistics and, if there is a y, the result: a task is a group."""
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call = _with_params(copied(call), *buffers)
    x, axes, zero = call.x, call.axes, real(call.x, 0.0)
    k0, r0, k1, r1, params, span = axes
    shift, sums, var = scratch(0.0, SLAB), scratch(0.0, PAIR), scratch(0.0, SLAB)
    mean, residual, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    of_runs = scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    table = scratch(zero, KNOWN), scratch(zero, KNOWN), scratch(zero, KNOWN)
    run = _run(x, axes, True)
    streams = _streams_rows(call.y, _passes(axes), axes, run >= per_line(x) and r0 == 1)
    later, rounds, uniform = _ahead_of_result(x, axes), _rounds(call), _is_uniform(axes, run)
    none, step = np.int64(0), np.int64(1)  # for literals, functions would be compiled once more
    ahead = _ahead_of_short_rows(x, axes)
    block = _block(axes)
    for begin in range(first, last, block):
        groups = min(block, last - begin)
        for again in range(rounds):
            for i in range(groups):
                store(shift, i, _shift(call, begin + i, again == 1, mean, i))
            _sums_of_groups(call, begin, groups, shift, sums, ahead)
            final = again == rounds - 1
            _finish(call, begin, groups, final, shift, sums, mean, residual, var, rstd)
        if not given(call.y):
            continue
        if not uniform or _formulas(
            call, begin, groups, run, (mean, residual, rstd), of_runs, table
        ):
            _leave_rows(call, begin, groups, mean, residual, rstd)
        elif r0 == 1:
            at = begin * r1
            _apply_groups(call, run, at, r1, r1, groups, none, step, none, streams, table)
        else:
            for i in range(groups):
                at = _origin(axes, begin + i)
                _apply_groups(call, run, at, r1, k1 * r1, r0, i, none, later, streams, table)


# What is usual, by kernels that take a third of the time to compile. What is not they leave, with
# more that follows it: the other kernel has to prepare for every call.
@inline
def _usual_rows(call, gamma, beta, first, last):
    """`rows_forward` of rows, not of float64, whose elements have gamma and beta each, or share
    one if those are None; unusual ones are left.
    """
    x, y, axes, zero = call.x, call.y, call.axes, real(call.x, 0.0)
    k0, r0, k1, r1, params, span = axes
    shift, sums, var = scratch(0.0, SLAB), scratch(0.0, PAIR), scratch(0.0, SLAB)
    mean, residual, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    table = scratch(zero, SLAB), scratch(zero, SLAB), scratch(zero, SLAB)
    _fill(shift, 0, SLAB, 0.0)
    streams = _streams_rows(y, _passes(axes), axes, False)
    none, step = np.int64(0), np.int64(1)  # for literals, functions would be compiled once more
    scale, lift = real(x, 1.0), zero
    if gamma is None:
        scale, lift = load(call.gamma, 0), load(call.beta, 0)
    block, begin = max(1, NEAR // r1), first
    while begin < last:
        groups, at = min(block, last - begin), begin * r1
        for i in range(groups):  # as `_group_sums`, which has more to compile
            row, s, q = at + i * r1, 0.0, 0.0
            for piece in range(row, row + r1, CHUNK):
                ds, dq = _sums(x, piece, min(piece + CHUNK, row + r1), 0.0, 1.0, 1.0)
                s += ds
                q += dq
            store(sums, i, s)
            store(sums, SLAB + i, q)
        unusual = _group_moments(
            x, r1, groups, call.center, call.eps, shift, sums, mean, residual, var, rstd
        )
        _fill(table[1], 0, groups, scale)
        _fill(table[2], 0, groups, lift)
        if unusual + _set_formulas(x, groups, mean, residual, rstd, *table):
            groups = min(SLAB, last - begin)
            leave(GENERAL, call, begin, begin + groups)
        else:
            _keep_moments(call, begin, groups, mean, var, rstd)
            place = at, r1, r1, groups, none, step, none, streams
            _apply_each(x, y, gamma, beta, params, *place, table)
        begin += groups


def rows_usual_forward(call, first, last):
    """Statistics and result of usual rows with a parameter for each element, not of float64."""
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call = _with_params(copied(call), *buffers)
    _usual_rows(call, call.gamma, call.beta, first, last)


def rows_alike_forward(call, first, last):
    """The same of rows with one parameter for all elements."""
    buffers = scratch_for_halves(call.x, FEW), scratch_for_halves(call.x, FEW)
    _usual_rows(_with_params(copied(call), *buffers), None, None, first, last)


@elementwise
def _y_of_column(call, k, like, columns, *form):
    of_k = min(k, call.axes[3] - 1)
    gamma, beta = load(call.gamma, of_k), load(call.beta, of_k)
    return _y_of(0, None, like, 0, None, columns[k], gamma, beta, 0, None, *form)


def rows_of_few_forward(call, first, last):
    """The same of rows of few elements with a parameter each, eight rows at a time, by columns."""
    buffers = scratch_for_halves(call.x, FEW), scratch_for_halves(call.x, FEW)
    call = _with_params(copied(call), *buffers)
    x, y, size = call.x, call.y, call.axes[3]
    ahead = _ahead_of_short_rows(x, call.axes)
    like, zero = lanes_of_few(x, np.float32(0.0)), lanes_of_few(x, 0.0)
    one, share = zero + 1.0, 1.0 / size
    row = first
    while row < last:
        at, count = row * size, min(last - row, FEW)
        if ahead:
            _fetch_all(y, x, None, at + ahead, at + ahead + FEW * size)
        columns = _columns_of_eight(like, x, at, size, size, count)
        s, q = _sums_of_columns(columns, zero, zero)
        mean = s * share if call.center else zero
        square = mean * mean
        var = q * share - square
        rstd = one / root(var + call.eps)
        if beyond(rstd, WIDE, count) + above(square, var * GOOD, count):
            count = min(SLAB, last - row)
            leave(GENERAL, call, row, row + count)
            row += count
            continue
        if given(call.mean):
            store_lanes(call.mean, row, count, mean)
            store_lanes(call.rstd, row, count, rstd)
        if given(call.var):
            store_lanes(call.var, row, count, var)
        high = narrowed(mean)
        form = high, narrowed(rstd), narrowed(zero - (mean - widened(high)) * rstd)
        rows = transposed((
            _y_of_column(call, 0, like, columns, *form),
            _y_of_column(call, 1, like, columns, *form),
            _y_of_column(call, 2, like, columns, *form),
            _y_of_column(call, 3, like, columns, *form),
            _y_of_column(call, 4, like, columns, *form),
            _y_of_column(call, 5, like, columns, *form),
            _y_of_column(call, 6, like, columns, *form),
            _y_of_column(call, 7, like, columns, *form),
        ))  # fmt: skip
        _store_eight(y, at, size, count, rows)
        row += count


# ----------------------------------------------------------------------------------- rows: backward
@elementwise
def _centred(x, i, factor, high, low):
    """(x - mean)*factor in float64; no sum, so that LLVM may not reassociate it."""
    if is_float64(x):
        return (load(x, i) * factor - high) - low
    return np.float64(load(x, i)) - (high + low)


@elementwise
def _products(i, count, like, at, dy, x, gamma, to, factor, high, low):
    """dy, and dy*(x - mean)*factor; with gamma, a number or parameters of which `to` + i is the
    first, both times gamma.
    """
    j = i - at
    g, d = load_lanes(dy, i, count, like), load_lanes(x, i, count, like)
    if gamma is not None:
        g = g * load_lanes(gamma, to + i, count, like)
    h, e = load_lanes(high, j, count, like), load_lanes(low, j, count, like)
    d = (d * load_lanes(factor, j, count, like) - h) - e if is_float64(x) else d - (h + e)
    return g, first_lanes(g * d, count)


@inline
def _in_range(least, s, p):
    """Whether no sum in float32 may have lost what float64 holds."""
    return (least <= abs(p) < 2.0**120) and abs(s) < np.inf


@inline
def _grad_sums(dy, x, first, last, factor, high, low, gamma, to):
    """Sums of what `_products` gives."""
    sums = if_halves(x, if_halves(dy, _grad_sums_of_halves, _exact_grad_sums), _exact_grad_sums)
    return sums(dy, x, first, last, factor, high, low, gamma, to)


@inline
def _exact_grad_sums(dy, x, first, last, factor, high, low, gamma, to):
    like = lanes(x, 0.0)
    return _sum_lines(like, _products, first, last, 0, dy, x, gamma, to, factor, high, low)


@inline
def _grad_sums_of_halves(dy, x, first, last, factor, high, low, gamma, to):
    """`_grad_sums`, in float32 first if that loses nothing: halves are coarser than it."""
    h = np.float32(high)
    if np.float64(h) == high:
        zero = np.float32(0.0)
        like = lanes(x, zero)
        s = p = 0.0
        for begin in range(first, last, NARROW):
            end = min(begin + NARROW, last)
            ds, dp = _sum_lines(like, _products, begin, end, 0, dy, x, gamma, to, h, h, zero)
            s += ds
            p += dp
        if _in_range(TINY, s, p):
            return s, p - low * s
    return _exact_grad_sums(dy, x, first, last, factor, high, low, gamma, to)


@elementwise
def _grad_sums_of_columns(x, dy, weights, mean):
    """Sums of weighted dy and dy*(x - mean) of eight rows."""
    s = p = zero_like(mean)
    for k in range(FEW):
        g = widened(dy[k]) * widened(weights[k])
        s, p = s + g, p + g * (widened(x[k]) - mean)
    return s, p


@elementwise
def _dx_of(i, count, like, at, dy, x, gamma, beta, to, factor, high, scale, slope, shift):
    """dx: a line in x plus scale*dy, all of it divided by the factor, if there is one, to stay in
    range; with gamma, a number or parameters of which `to` + i is the first, dy is first multiplied
    by it. No beta.
    """
    j, d, g = i - at, load_lanes(x, i, count, like), load_lanes(dy, i, count, like)
    if gamma is not None:
        g = g * load_lanes(gamma, to + i, count, like)
    if factor is not None:
        d = d * load_lanes(factor, j, count, like)
    d = d - load_lanes(high, j, count, like)
    line = d * load_lanes(slope, j, count, like) + load_lanes(shift, j, count, like)
    dx = g * load_lanes(scale, j, count, like) + line
    return dx if factor is None else dx * load_lanes(factor, j, count, like)


@elementwise
def _dx_and_params_of(
    i, count, like, at, dy, x, gamma, dgamma, dbeta, factor, high, rstd, slope, shift, lift
):
    """The same by gamma; dgamma and dbeta, which have lanes to spare, gain dy*xhat and dy."""
    j, g = i - at, load_lanes(dy, i, count, like)
    d = load_lanes(x, i, count, like) * factor - high
    of_gamma = first_lanes(g * (d * rstd + lift), count)
    # Whole lanes: what was stored in part, processors cannot load before it is in the cache.
    store_lanes(dgamma, j, None, load_lanes(dgamma, j, None, like) + of_gamma)
    store_lanes(dbeta, j, None, load_lanes(dbeta, j, None, like) + g)
    return (g * load_lanes(gamma, j, count, like) * rstd + (d * slope + shift)) * factor


@inline
def _walk(call, writes):
    """What all `_row_grads` have in common: the length of a run of parameters, or of elements that
    share one, its pieces, those of a stretch; whether rows begin with the same parameter; how far
    ahead memory is asked for, and whether dx's is, if it `writes` it soon.
    """
    k0, r0, k1, r1, params, span = call.axes
    run = min(r1, params if span == 1 else span)
    pieces = (run + CHUNK - 1) // CHUNK
    ahead = _ahead_of_sums(call.dy, call.x, call.axes)
    writes = writes and r0 * r1 <= STAYS
    return run, pieces, r1 // run * pieces, r0 == 1 or _by_column(call.axes), ahead, writes


@inline
def _row_grads(call, group, part, walk):
    """Sums of gamma*dy and gamma*dy*xhat over one part of a group; of dy, dy*xhat for each run."""
    dy, x, gamma, sums, parts = call.dy, call.x, call.gamma, call.sums, call.parts
    k0, r0, k1, r1, params, span = call.axes
    run, pieces, per_stretch, fixed, ahead, writes = walk
    mean, residual, rstd = _saved(call, group)
    factor, high, low, rstd = _centre(x, mean, residual, rstd)
    count = r0 * per_stretch
    row, at, inside = 0, 0, 0
    if parts > 1:
        begin = part * count // parts
        count = (part + 1) * count // parts - begin
        row, at = begin // per_stretch, begin % per_stretch
        at, inside = at // pieces * run, at % pieces * CHUNK
    origin = _origin(call.axes, group) + row * k1 * r1
    index, _ = _parameter(call.axes, origin + at)
    first_of_row = index if at == 0 else _parameter(call.axes, origin)[0]
    s = p = 0.0
    for _ in range(count):
        first = origin + at + inside
        last = first + min(CHUNK, run - inside)
        if ahead:
            _fetch(dy, first + ahead, last + ahead)
            _fetch(x, first + ahead, last + ahead)
            if writes:
                _fetch(call.dx, first, last)
        if span == 1:
            to = index + inside - first
            ds, dp = _grad_sums(dy, x, first, last, factor, high, low, gamma, to)
            s += ds
            p += dp
        else:
            ds, dp = _grad_sums(dy, x, first, last, factor, high, low, None, 0)
            weight = np.float64(load(gamma, index))
            s += ds * weight
            p += dp * weight
            if given(sums):
                piece = (origin + at) // run * pieces + inside // CHUNK
                store(sums, 2 * piece, dp * rstd)
                store(sums, 2 * piece + 1, ds)
        inside += last - first
        if inside == run:
            inside = 0
            at += run
            if span > 1:
                index = index + 1 if index + 1 < params else 0
            if at == r1:
                at = 0
                origin += k1 * r1
                if not fixed:
                    first_of_row, _ = _parameter(call.axes, origin)
                index = first_of_row
    return s, p * rstd


@elementwise
def _keep_sums(sums, piece, count, s, p, rstd):
    for j in range(count):
        store(sums, 2 * (piece + j), load(p, j) * load(rstd, j))
        store(sums, 2 * (piece + j) + 1, load(s, j))


@inline
def _sums_of_runs(call, at, run, count, factor, high, low, rstd, weight, s, p):
    """Sums of gamma*dy and gamma*dy*(x - mean)*factor of runs side by side, of at most CHUNK
    elements each; of dy, dy*xhat for each.
    """
    first = at
    for j in range(count):
        form = load(factor, j), load(high, j), load(low, j)
        ds, dp = _grad_sums(call.dy, call.x, at, at + run, *form, None, 0)
        store(s, j, ds)
        store(p, j, dp)
        at += run
    if given(call.sums):
        _keep_sums(call.sums, first // run, count, s, p, rstd)
    _multiply(count, s, weight)
    _multiply(count, p, weight)


@plain
def _row_grads_across(call, task):
    """`_row_grads` of one part of all groups side by side: stretch by stretch as in memory, each of
    one parameter.
    """
    factor, high = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    low, rstd = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    weight = scratch(real(call.x, 0.0), KNOWN)
    s, p = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    of_s, of_p = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    k0, r0, k1, r1, params, span = call.axes
    sample, part = task // call.parts, task % call.parts
    _centre_runs(call, sample * k1, k1, 1, factor, high, low, rstd)
    _fill(of_s, 0, k1, 0.0)
    _fill(of_p, 0, k1, 0.0)
    _run_params(call.axes, sample * r0 * k1 * r1, r1, k1, call.gamma, weight)
    row, end = part * r0 // call.parts, (part + 1) * r0 // call.parts
    for at in range((sample * r0 + row) * k1 * r1, (sample * r0 + end) * k1 * r1, k1 * r1):
        _sums_of_runs(call, at, r1, k1, factor, high, low, rstd, weight, s, p)
        _add(of_s, 0, s, 0, k1)
        _add(of_p, 0, p, 0, k1)
    _multiply(k1, of_p, rstd)
    for i in range(k1):
        to = (sample * k1 + i) * call.parts + part
        store(call.partial, 2 * to, load(of_s, i))
        store(call.partial, 2 * to + 1, load(of_p, i))


@inline
def _line(call, s, p, low, rstd):
    """(slope, shift) of the part of dx that is linear in x*factor - high, over the factor."""
    zero = zero_like(rstd)
    if call.frozen:
        return zero, zero
    share = -1.0 / (call.axes[1] * call.axes[3])
    slope = rstd * rstd * (p * share)
    return slope, minus(rstd * (s * share) if call.center else zero, slope * low)


@elementwise
def _grad_formulas(call, count, centre, s, p, high, scale, slope, shift):
    """Let dx of `count` runs, whose gamma is `scale`, be what `_dx_of` gives by the numbers of the
    tables; how many take float64 or a factor.
    """
    factors, highs, lows, rstds = centre
    wides = 0
    for j in range(count):
        r, low = load(rstds, j), load(lows, j)
        a, b = _line(call, load(s, j), load(p, j), low, r)
        of_dy = r * load(scale, j)
        if is_float64(call.x):
            wides += load(factors, j) != 1.0
        else:
            wides += _extreme(r) | _unsafe(a) | _unsafe(of_dy)
        store(high, j, load(highs, j))
        store(scale, j, of_dy)
        store(slope, j, a)
        store(shift, j, b)
    return wides


@inline
def _apply_grads_in_order(call, first, last, streams):
    """dx of stretches first..last, each of one parameter, in the order of memory."""
    x, axes, zero = call.x, call.axes, real(call.x, 0.0)
    k0, r0, k1, r1, params, span = axes
    of_s, of_p = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    centre = scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    table = (
        scratch(zero, KNOWN), scratch(zero, KNOWN), scratch(zero, KNOWN), scratch(zero, KNOWN)
    )  # fmt: skip
    ahead = _ahead_of_stretch(x, axes)
    task, known, wide = first, np.int64(-1), False
    while task < last:
        row, place, at = task // k1, task % k1, task * r1
        count, group = min(k1 - place, last - task), row // r0 * k1
        if group != known:
            known = group
            for i in range(k1):
                s = p = 0.0
                if not call.frozen:
                    s, p = _sums_of_parts(call, group + i)
                store(of_s, i, s)
                store(of_p, i, p)
            _centre_runs(call, group, k1, 1, *centre)
            _run_params(axes, row * k1 * r1, r1, k1, call.gamma, table[1])
            wide = _grad_formulas(call, k1, centre, of_s, of_p, *table)
        if wide:
            leave(ANY, call, task, task + count)
        else:
            _store_runs(call.dx, _dx_of, at, r1, count, ahead, streams, call.dy, x, table, place)
        task += count


def rows_grad_sums(call, first, last):
    """Sums of gradients: a task is a part of a group, a stretch of memory."""
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    walk = _walk(call, False)
    for task in range(first, last):
        s, p = _row_grads(call, task // call.parts, task % call.parts, walk)
        store(call.partial, 2 * task, s)
        store(call.partial, 2 * task + 1, p)


def rows_grad_sums_across(call, first, last):
    """The same: a task is a part of all groups side by side."""
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    for task in range(first, last):
        _row_grads_across(call, task)


def rows_grads(call, first, last):
    """dx of groups of several stretches, whose parts were summed: a task is a stretch of memory."""
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    x, axes = call.x, call.axes
    k0, r0, k1, r1, params, span = axes
    if _run(x, axes, True) >= per_line(x) and k1 <= KNOWN:
        streams = _streams_rows(call.dx, PASSES_BACKWARD, axes, True)
        _apply_grads_in_order(call, first, last, streams)
    else:
        leave(ANY, call, first, last)


def rows_grads_any(call, first, last):
    """The same of any stretches, each by itself."""
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    x, axes, parts, arrays = call.x, call.axes, call.parts, (call.dx, call.dy, call.x, call.gamma)
    in_order = axes[1] == 1 and _run(x, axes, False) >= per_line(x)
    streams = _streams_rows(call.dx, PASSES_BACKWARD, axes, in_order)
    ahead = _ahead_of_stretch(x, axes)
    group, place, row, at = _find_stretch(axes, parts, first)
    index, end_of_run = _parameter(axes, at)
    for _ in range(first, last):
        s = p = 0.0
        if not call.frozen:
            s, p = _sums_of_parts(call, group)
        mean, residual, rstd = _saved(call, group)
        factor, high, low, scaled = _centre(x, mean, residual, rstd)
        slope, shift = _line(call, s, p, low, scaled)
        wide = is_float64(x) or _extreme(rstd) or _unsafe(slope)
        end = _end_of_stretch(axes, parts, group, place, at)
        index, end_of_run = _store_stretch(
            (*arrays, None), _dx_of, axes, at, end, index, end_of_run, ahead, streams, wide, None,
            factor, high, scaled, (slope,), (np.float32(slope),), shift
        )  # fmt: skip
        group, place, row = _next_stretch(axes, parts, group, place, row)
        at = end


@plain
def _leave_grads(call, begin, groups, runs, s, p):
    """Let dx of groups be given by tables of their sums, in which each has `runs`."""
    sums, rest = scratch(0.0, PAIR), copied(call)
    for i in range(groups):
        store(sums, 2 * i, load(s, i * runs))
        store(sums, 2 * i + 1, load(p, i * runs))
    put(rest, "partial", moved(sums, -2 * begin))
    put(rest, "parts", np.int64(1))
    _leave_groups(rest, begin, groups)


def rows_backward(call, first, last):
    """dx, from sums to the end: a task is a group."""
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    dy, x, axes, parts, zero = call.dy, call.x, call.axes, call.parts, real(call.x, 0.0)
    k0, r0, k1, r1, params, span = axes
    table = (
        scratch(zero, KNOWN), scratch(zero, KNOWN), scratch(zero, KNOWN), scratch(zero, KNOWN)
    )  # fmt: skip
    table_of_s, table_of_p = scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    centre = scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN), scratch(0.0, KNOWN)
    run = _run(x, axes, True)
    uniform, quick = _is_uniform(axes, run), run >= per_line(x) and r0 == 1
    streams = _streams_rows(call.dx, PASSES_BACKWARD, axes, quick)
    walk = _walk(call, not streams)
    later, none, one = _ahead_of_result(x, axes), np.int64(0), np.int64(1)
    block, runs = min(SLAB, max(1, NEAR // r1)) if r0 == 1 else 1, r1 // run if quick else 1
    like, done = lanes(x, zero), first * r1  # what is stored of groups side by side, by `form`
    before = form = lanes_of_each(table, none, like)
    for begin in range(first, last, block):
        groups, at = min(block, last - begin), _origin(axes, begin)
        count = groups * runs
        _centre_runs(call, begin, groups, runs, *centre)
        if run:
            _run_params(axes, at, run, count, call.gamma, table[1])
        else:
            _fill(table[1], 0, count, 1.0)
        if quick and parts == 1 and run <= CHUNK:
            _sums_of_runs(call, at, run, count, *centre, table[1], table_of_s, table_of_p)
            _fold_runs(table_of_s, groups, runs)
            _fold_runs(table_of_p, groups, runs)
            _expand(table_of_s, groups, runs)
            _expand(table_of_p, groups, runs)
            _multiply(count, table_of_p, centre[3])
        else:
            for i in range(groups):
                s = p = 0.0
                for part in range(parts):
                    ds, dp = _row_grads(call, begin + i, part, walk)
                    s += ds
                    p += dp
                _fill(table_of_s, i * runs, (i + 1) * runs, s)
                _fill(table_of_p, i * runs, (i + 1) * runs, p)
        usual = uniform and not _grad_formulas(call, count, centre, table_of_s, table_of_p, *table)
        if usual and quick:
            for i in range(count):
                before, form = form, lanes_of_each(table, i, like)
                done = _store_run(
                    call.dx, _dx_of, like, done, at, at + run, none, streams, dy, x, before,
                    form,
                )  # fmt: skip
                at += run
            continue
        if quick:
            _store_rest(call.dx, _dx_of, like, done, at, dy, x, form)
            done = at + groups * r1
        place = at, r1, k1 * r1, r0, none, none, later, streams
        if r0 == 1:
            place = at, r1, r1, groups, none, one, later, streams
        if not usual:
            _leave_grads(call, begin, groups, runs, table_of_s, table_of_p)
        elif run:
            _store_each(call.dx, _dx_of, dy, x, None, None, params, *place, table)
        else:
            _store_each(call.dx, _dx_of, dy, x, call.gamma, None, params, *place, table)
    if quick:
        _store_rest(call.dx, _dx_of, like, done, last * r1, dy, x, form)


@inline
def are_few(axes, frozen):
    """Whether gradients of rows are made by columns, unless they are of float64."""
    k0, r0, k1, r1, params, span = axes
    return r1 == params and r1 <= FEW and not frozen


@inline
def grads_space(chunk):
    """Elements that dgamma, or dbeta, of a chunk of parameters takes, with lanes to spare."""
    return (chunk + 2 * _LINE - 1) // _LINE * _LINE


@elementwise
def _dx_of_column(k, count, like, dy, x, gamma, sums, *form):
    g = first_lanes(dy[k], count)
    return _dx_and_params_of(k * FEW, count, like, 0, g, x[k], gamma[k], *sums, *form)


@plain
def _grads_of_few(call, gamma, row, rows, ahead, of_s, of_p, dgamma, dbeta):
    """dx of rows of few elements, whose parameters are `gamma`, eight rows at a time, by columns,
    and their share of dgamma and dbeta; if any takes float64, only their sums: whether none does.
    """
    dy, x, dx, size = call.dy, call.x, call.dx, call.axes[3]
    one = np.float32(1.0)
    like, zero = lanes_of_few(x, one), lanes_of_few(x, 0.0)
    weights = _columns_of_eight(like, gamma, 0, np.int64(0), size, 8)
    sums = scratch(one, _SQUARE), scratch(one, _SQUARE)
    _fill(sums[0], 0, _SQUARE, 0.0)
    _fill(sums[1], 0, _SQUARE, 0.0)
    wides = 0
    for i in range(0, rows, FEW):
        at, count = (row + i) * size, min(rows - i, FEW)
        if ahead:
            _fetch_all(dx, x, dy, at + ahead, at + ahead + FEW * size)
        x_columns = _columns_of_eight(like, x, at, size, size, count)
        dy_columns = _columns_of_eight(like, dy, at, size, size, count)
        mean = load_lanes(as_input(call.mean), row + i, count, zero)
        rstd = load_lanes(as_input(call.rstd), row + i, count, zero)
        s, p = _grad_sums_of_columns(x_columns, dy_columns, weights, mean)
        p = p * rstd
        store_lanes(of_s, i, None, s)
        store_lanes(of_p, i, None, p)
        high = narrowed(mean)
        low = mean - widened(high)
        slope, shift = _line(call, s, p, low, rstd)
        wides += beyond(rstd, WIDE, count) + beyond(slope, VAST, count)
        if wides:
            continue
        lift = narrowed(zero - low * rstd)
        form = one, high, narrowed(rstd), narrowed(slope), narrowed(shift), lift
        what = count, like, dy_columns, x_columns, weights, sums, *form
        made = transposed((
            _dx_of_column(0, *what),
            _dx_of_column(1, *what),
            _dx_of_column(2, *what),
            _dx_of_column(3, *what),
            _dx_of_column(4, *what),
            _dx_of_column(5, *what),
            _dx_of_column(6, *what),
            _dx_of_column(7, *what),
        ))  # fmt: skip
        _store_eight(dx, at, size, count, made)
    if wides:
        return False
    for k in range(size):
        store(dgamma, k, _sum_run(sums[0], k * FEW, (k + 1) * FEW))
        store(dbeta, k, _sum_run(sums[1], k * FEW, (k + 1) * FEW))
    return True


@inline
def _clear_grads(dgamma, dbeta, count):
    _fill(dgamma, 0, count + SPARE, 0.0)
    _fill(dbeta, 0, count + SPARE, 0.0)


@inline
def _keep_grads(call, block, skipped, dgamma, dbeta, count):
    """Let dgamma and dbeta of some rows enter a block's share of them, or be all of them."""
    if given(call.sums):
        share = 2 * block * call.axes[4] + skipped
        _add(call.sums, share, dgamma, 0, count)
        _add(call.sums, share + call.axes[4], dbeta, 0, count)
    else:
        _copy_to(call.dgamma, skipped, dgamma, count)
        _copy_to(call.dbeta, skipped, dbeta, count)


@inline
def _row_grad_sums(call, gamma, at, end, index, factor, high, low):
    """Sums of gamma*dy and gamma*dy*(x - mean)*factor of a row whose first parameter is `index`."""
    params = call.axes[4]
    s = p = 0.0
    while at < end:
        last, to = min(end, at + min(CHUNK, params - index)), index - at
        ds, dp = _grad_sums(call.dy, call.x, at, last, factor, high, low, gamma, to)
        s += ds
        p += dp
        index += last - at
        if index == params:
            index = 0
        at = last
    return s, p


@inline
def _store_row_grads(
    call, arrays, at, end, start, count, streams, factor, high, low, rstd, s, p, general
):  # fmt: skip
    """dx of a row whose first parameter is `start` of `count`, and its share of their gradients;
    the first parameter of the next row. -1, and nothing, of a row that takes float64, if that is
    not `general`.
    """
    x, one = call.x, np.float32(1.0)
    slope, shift = _line(call, s, p, low, rstd)
    lift, wide = -low * rstd, is_float64(x) or _extreme(rstd) or _unsafe(slope)
    form = factor, high, rstd, slope, shift, lift
    narrow = (
        one, np.float32(high), np.float32(rstd), np.float32(slope), np.float32(shift),
        np.float32(lift),
    )  # fmt: skip
    if general is None and wide:
        return -1
    while at < end:
        last = min(end, at + count - start)
        run, what = (at, last, 0, streams), (at - start, call.dy, x, *arrays)
        if general is None:
            _store_lines(call.dx, _dx_and_params_of, lanes(x, one), *run, *what, *narrow)
        elif wide:
            _store_lines(call.dx, _dx_and_params_of, lanes(x, 0.0), *run, *what, *form)
        else:
            _store_lines(call.dx, _dx_and_params_of, lanes(x, one), *run, *what, *narrow)
        start += last - at
        if start == count:
            start = 0
        at = last
    return start


@inline
def _rows_and_params(call, first, last, general):
    """A task is a chunk of the parameters in a block of `rows` rows: dx, and the block's share of
    dgamma and dbeta, by way of `grads`, which has two lines to spare. Rows of several chunks were
    summed before. Of a single block of at most ROW_BLOCK rows, dgamma and dbeta themselves.

    Unless this is the `general` kernel, rows of few elements are as others, and tasks with one that
    takes float64 are left.
    """
    every_gamma = _own_param(call, call.gamma, NARROW_GAMMA, scratch_for_halves(call.x, ROW_LIMIT))
    x = call.x
    k0, r0, k1, r1, params, span = call.axes
    chunk = params if params <= ROW_MOST else CHUNK
    chunks, space = (params + chunk - 1) // chunk, grads_space(chunk)
    # Whole lines, after one for lanes before a row's first, where that is not the first of a line.
    # A thread's tasks share those of its first, which stay near.
    dgamma = moved(call.grads, 2 * per_line(call.grads) - past_line(call.grads, 0))
    dgamma = moved(dgamma, 2 * first * space)
    dbeta = moved(dgamma, space)
    of_s, of_p = scratch(0.0, FEW_BLOCK), scratch(0.0, FEW_BLOCK)
    few = False
    if general is not None:
        few = are_few(call.axes, call.frozen) and not is_float64(x)
    ahead, several = _ahead_of_short_rows(x, call.axes), FEW_BLOCK if few else ROW_BLOCK
    # Halves have twice as many sums a line, which then begin and end within lines.
    streams = significand(x) >= 24 and _streams_rows(call.dx, PASSES_BACKWARD, call.axes, False)
    for task in range(first, last):
        block, skipped = task // chunks, task % chunks * chunk
        gamma = moved(every_gamma, skipped)
        count = min(params - skipped, chunk)
        size = count if chunks > 1 else r1
        end = min((block + 1) * call.rows, k0)
        start = block * call.rows * r1 % params  # a row's first parameter
        if given(call.sums):
            share = 2 * block * params + skipped
            _fill(call.sums, share, share + count, 0.0)
            _fill(call.sums, share + params, share + params + count, 0.0)
        for begin in range(block * call.rows, end, several):
            stop = min(begin + several, end)
            if (
                general is not None
                and few
                and _grads_of_few(
                    call, gamma, begin, stop - begin, ahead, of_s, of_p, dgamma, dbeta
                )
            ):
                _keep_grads(call, block, skipped, dgamma, dbeta, count)
                continue
            for row in range(begin, stop):
                inside = (row - begin) % ROW_BLOCK
                if inside == 0:
                    _clear_grads(dgamma, dbeta, count)
                mean, residual, rstd = _saved(call, row)
                factor, high, low, rstd = _centre(x, mean, residual, rstd)
                at = row * r1 + skipped
                s = p = 0.0
                if given(call.partial):
                    s, p = _sums_of_parts(call, row)
                elif few:
                    s, p = load(of_s, row - begin), load(of_p, row - begin)
                elif not call.frozen:
                    s, p = _row_grad_sums(call, gamma, at, at + size, start, factor, high, low)
                    p *= rstd
                start = _store_row_grads(
                    call, (gamma, dgamma, dbeta), at, at + size, start, count, streams, factor,
                    high, low, rstd, s, p, general
                )  # fmt: skip
                if general is None and start < 0:
                    break
                if inside == ROW_BLOCK - 1 or row + 1 == stop:
                    _keep_grads(call, block, skipped, dgamma, dbeta, count)
            if general is None and start < 0:
                leave(PARAMS, call, task, task + 1)
                break


def rows_usual_backward_params(call, first, last):
    """`_rows_and_params` that are usual, not of float64."""
    _rows_and_params(call, first, last, None)


def rows_backward_params(call, first, last):
    """The same of any rows."""
    _rows_and_params(call, first, last, True)


@elementwise
def _fill(target, first, last, value):
    for i in range(first, last):
        store(target, i, value)


@elementwise
def _add(target, at, source, begin, count):
    for i in range(count):
        store(target, at + i, load(target, at + i) + load(source, begin + i))


# --------------------------------------------------------------------------------- columns: forward
@inline
def slab_groups(k1, r1):
    """How many of k1 groups side by side, of r1 columns each, are a slab."""
    return k1 if k1 * r1 <= SLAB else NARROW_SLAB // r1


@inline
def _slab(axes, unit):
    """(first group, groups, first column, columns, flat position) of a unit of columns."""
    k0, r0, k1, r1, params, span = axes
    size = slab_groups(k1, r1)
    sample, slab = 0, unit
    if k0 > 1:
        slabs = (k1 + size - 1) // size
        sample, slab = unit // slabs, unit % slabs
    group = slab * size
    groups = min(size, k1 - group)
    column = group * r1
    return sample * k1 + group, groups, column, groups * r1, sample * r0 * k1 * r1 + column


@inline
def _windows(axes):
    """Windows of a row, for what needs no sums: then it may be cut anywhere."""
    return (axes[2] * axes[3] + WINDOW - 1) // WINDOW


@inline
def _find_window(axes, parts, task):
    """(window, part of its rows). Those of a few rows follow each other: threads then share few
    lines, which on two core complexes take them twice as long.
    """
    windows = _windows(axes)
    rows, window = task // windows, task % windows
    return rows // parts * windows + window, rows % parts


@inline
def _window(axes, unit):
    """`_slab_of` a window: equal shares of 64 columns, which are whole lines in every dtype."""
    k0, r0, k1, r1, params, span = axes
    windows = _windows(axes)
    width = ((k1 * r1 + windows - 1) // windows + 63) // 64 * 64
    sample, column = unit // windows, unit % windows * width
    return _slab_of(axes, sample, column, min(column + width, k1 * r1))


@inline
def _slab_of(axes, sample, begin, end):
    """What `_slab` gives of the groups of columns begin..end, and which of theirs those are."""
    k0, r0, k1, r1, params, span = axes
    group = begin // r1
    groups, first = (end + r1 - 1) // r1 - group, group * r1
    slab = sample * k1 + group, groups, first, groups * r1, sample * r0 * k1 * r1 + first
    return slab, begin - first, end - first


@inline
def _step(axes):
    """How many columns of a slab are alike: a group's, if they share a parameter."""
    k0, r0, k1, r1, params, span = axes
    return r1 if span % r1 == 0 else 1


@inline
def _side_by_side(axes, columns, most):
    """How many rows of a slab lie side by side in memory and are taken as one, of at most so many
    columns.
    """
    return most // columns if columns == axes[2] * axes[3] and columns <= most else 1


@inline
def _most(x, axes, streams):
    """Columns of a result that are stored at once: where rows are no whole lines, runs that are
    streamed had better be long, but their tables near.
    """
    return WINDOW // 2 if streams and axes[2] * axes[3] % per_line(x) else TOGETHER


@elementwise
def _add_line_of_columns(like, make, sums, to, j, count, at, stride, rows, *what):
    a = make(at + j, count, like, at, *what)
    for _ in range(1, rows):
        at += stride
        a = _plus(a, make(at + j, count, like, at, *what))
    wide = widened(like)
    for kind in range(2):
        k = to + kind * SLAB + j
        store_lanes(sums, k, count, load_lanes(sums, k, count, wide) + widened(a[kind]))


@elementwise
def _sum_columns(like, make, sums, to, first, last, at, stride, rows, *what):
    """Add to the columns' pairs of sums those of what ``make`` gives of `rows` rows, which are
    added up in the type of `like`.
    """
    many = per_line(like)
    j = first
    while j + many <= last:
        _add_line_of_columns(like, make, sums, to, j, None, at, stride, rows, *what)
        j += many
    if j < last:
        _add_line_of_columns(like, make, sums, to, j, last - j, at, stride, rows, *what)


@inline
def _column_sums(call, unit, part, shift, sums, to):
    """Sums of one part of a slab: a block of rows."""
    add = if_halves(call.x, _column_sums_of_halves, _add_columns)
    add(call, unit, part, shift, zero_of_few(call.x), sums, to)


@reduction
def _lost(x, count, columns, sums, to):
    """How many columns' sums of `count` elements float32 did not keep."""
    lost = 0
    for j in range(columns):
        lost += not _is_kept(x, load(sums, to + j), load(sums, to + SLAB + j), count)
    return lost


@plain
def _column_sums_of_halves(call, unit, part, shift, zero, sums, to):
    """`_column_sums`, in float64 again where float32 did not keep them."""
    _add_columns(call, unit, part, shift, zero, sums, to)
    r0, parts = call.axes[1], call.parts
    _, _, _, columns, _ = _slab(call.axes, unit)
    count = (part + 1) * r0 // parts - part * r0 // parts
    if count >= 8 and _lost(call.x, count, columns, sums, to):
        wide = scratch(0.0, PAIR)
        _add_columns(call, unit, part, shift, 0.0, wide, 0)
        for j in range(columns):
            if _lost(call.x, count, 1, sums, to + j):
                store(sums, to + j, load(wide, j))
                store(sums, to + SLAB + j, load(wide, SLAB + j))


@plain
def _add_columns(call, unit, part, shift, zero, sums, to):
    """`_column_sums`, every eight rows being added up in the type of `zero`."""
    form = if_float64(call.x, shift, 0.0), None, None
    _add_rows(call, unit, part, zero, np.int64(8), sums, to, _powers, None, *form)


@inline  # LLVM would keep `make`, an address of this process
def _add_rows(call, unit, part, zero, several, sums, to, make, dy, *form):
    """A slab's sums of what ``make`` gives of one part: `several` rows at once in `zero`'s type, so
    that the sums are read and written less often, those left over in float64.
    """
    k0, r0, k1, r1, params, span = call.axes
    _, _, _, columns, origin = _slab(call.axes, unit)
    x, like, exact = call.x, lanes_of_sums(call.x, zero), lanes_of_sums(call.x, 0.0)
    row, end = part * r0 // call.parts, (part + 1) * r0 // call.parts
    stride, many = k1 * r1, _side_by_side(call.axes, columns, TOGETHER)
    ahead = _far(x, call.axes)
    _clear_pair(sums, to, many * columns)
    wide = many * columns
    begin, alone = np.int64(0), np.int64(1)  # for literals, all would be compiled once more
    strip = STRIP if ahead else wide
    while row + several * many <= end:
        at = origin + row * stride
        for first in range(0, wide, strip):
            if ahead:
                if dy is not None:
                    _fetch_share(dy, at, many * stride, several, wide, first)
                _fetch_share(x, at, many * stride, several, wide, first)
            last = min(first + strip, wide)
            _sum_columns(
                like, make, sums, to, first, last, at, many * stride, several, dy, x, *form
            )
        row += several * many
    while row + several <= end:
        at = origin + row * stride
        _sum_columns(like, make, sums, to, begin, columns, at, stride, several, dy, x, *form)
        row += several
    while row < end:
        at = origin + row * stride
        _sum_columns(exact, make, sums, to, begin, columns, at, stride, alone, dy, x, *form)
        row += 1
    _gather_pair(sums, to, many, columns)


@inline
def _fetch_share(pointer, at, stride, rows, columns, first):
    """Before columns first.. of `rows` rows are summed, ask for a share of those LEAD_ROWS ahead.

    Row by row: lines that follow each other in memory arrive twice as fast as those of a strip.
    """
    strips = (columns + STRIP - 1) // STRIP
    share = (rows + strips - 1) // strips
    row = first // STRIP * share
    for ahead in range(LEAD_ROWS + row, LEAD_ROWS + min(row + share, rows)):
        _fetch_early(pointer, at + ahead * stride, at + ahead * stride + columns)


@inline
def _gather_pair(sums, to, many, columns):
    """Sums of a row of columns from those of `many` side by side."""
    for i in range(1, many):
        _add(sums, to, sums, to + i * columns, columns)
        _add(sums, to + SLAB, sums, to + SLAB + i * columns, columns)


@inline
def _repeat(values, many, columns):
    """`many` copies of a row of columns side by side."""
    for i in range(1, many):
        _copy_to(values, i * columns, values, columns)


@inline
def _column_shift(call, unit, again, mean, shift):
    """What a slab's columns are summed about, as `_shift`."""
    r1 = call.axes[3]
    _, groups, _, columns, origin = _slab(call.axes, unit)
    if not (is_float64(call.x) and call.center):
        _fill(shift, 0, SLAB, 0.0)
        return
    if again:
        _copy_from(mean, 0, shift, groups)
    else:
        for i in range(groups):
            store(shift, i, load(call.x, origin + i * r1))
    _expand(shift, groups, r1)
    _repeat(shift, _side_by_side(call.axes, columns, TOGETHER), columns)


@reduction
def _sum_run(values, first, last):
    s = 0.0
    for j in range(first, last):
        s += load(values, j)
    return s


@inline
def _fold_to(target, values, groups, runs):
    """Sums of groups of `runs` values each."""
    if runs > 1:
        for i in range(groups):
            store(target, i, _sum_run(values, i * runs, (i + 1) * runs))
    else:
        _copy_from(values, 0, target, groups)


@inline
def _fold_runs(values, groups, runs):
    """The same in place."""
    if runs > 1:
        _fold_to(values, values, groups, runs)


@inline
def _fold_pair(sums, groups, step):
    """The same of a slab's pairs of sums."""
    _fold_runs(sums, groups, step)
    _fold_runs(moved(sums, SLAB), groups, step)


@inline
def _finish_columns(call, unit, last, shift, sums, mean, residual, var, rstd):
    """`_finish` of a slab's groups, from its columns' sums."""
    r1 = call.axes[3]
    group, groups, _, _, _ = _slab(call.axes, unit)
    _fold_pair(sums, groups, r1)
    if is_float64(call.x) and r1 > 1:
        for i in range(groups):
            store(shift, i, load(shift, i * r1))
    _finish(call, group, groups, last, shift, sums, mean, residual, var, rstd)


@elementwise
def _clear_pair(sums, to, columns):
    _fill(sums, to, to + columns, 0.0)
    _fill(sums, to + SLAB, to + SLAB + columns, 0.0)


@elementwise
def _add_pair(sums, source, at, gap, columns):
    _add(sums, 0, source, at, columns)
    _add(sums, SLAB, source, at + gap, columns)


# A part's sums are made on the stack, so that threads share no line before they are done.
@inline
def _pair_size(k1, r1):
    """Elements that the sums of a part of a slab take in `partial`."""
    return 2 * slab_groups(k1, r1) * r1


@inline
def _keep_pair(call, task, sums):
    """Keep the sums of a part of a slab."""
    k0, r0, k1, r1, params, span = call.axes
    _, _, _, columns, _ = _slab(call.axes, task // call.parts)
    at = task * _pair_size(k1, r1)
    _copy_to(call.partial, at, sums, columns)
    _copy_to(call.partial, at + columns, moved(sums, SLAB), columns)


@plain
def _total(call, unit, columns, sums):
    """Sums of a slab from those of its parts."""
    k0, r0, k1, r1, params, span = call.axes
    _clear_pair(sums, 0, columns)
    for task in range(unit * call.parts, (unit + 1) * call.parts):
        _add_pair(sums, call.partial, task * _pair_size(k1, r1), columns, columns)


@reduction
def _centre_groups(x, groups, mean, residual, rstd, factor, high, low, scaled, wide):
    """`_centre` for each group, and whether it takes float64 or a factor; how many do."""
    count = 0
    for i in range(groups):
        r = load(rstd, i)
        f, h, e, s = _centre(x, load(mean, i), load(residual, i), r)
        extreme = f != 1.0 if is_float64(x) else _extreme(r)
        count += extreme
        store(wide, i, 1.0 if extreme else 0.0)
        store(factor, i, f)
        store(high, i, h)
        store(low, i, e)
        store(scaled, i, s)
    return count


@inline
def _expand(values, groups, r1):
    """Repeat each group's value for its r1 columns, in place."""
    if r1 > 1:
        for i in range(groups - 1, -1, -1):
            _fill(values, i * r1, (i + 1) * r1, load(values, i))


@inline
def _column_params(axes, slab, step, values, default, found):
    """The parameter of every `step` columns, or `default` where it differs between rows."""
    k0, r0, k1, r1, params, span = axes
    _, _, first, columns, _ = slab
    count = columns // step
    if not _by_column(axes):
        _fill(found, 0, count, default)
        return
    index, end = _parameter(axes, first)
    at, stop, run = 0, (end - first) // step, (params if span == 1 else span) // step
    while at < count:
        stop = min(stop, count)
        if span == 1:
            _copy_run(values, index, found, at, stop)
        else:
            _fill(found, at, stop, load(values, index))
        index = index + 1 if span > 1 and index + 1 < params else 0
        at, stop = stop, stop + run


@elementwise
def _copy_run(source, index, target, first, last):
    offset = index - first
    for j in range(first, last):
        store(target, j, load(source, j + offset))


@elementwise
def _fold_affine(columns, scale, shift, low):
    """Each column's y = (x*factor - high)*scale + shift, given rstd in `scale`, beta in `shift`."""
    for j in range(columns):
        store(shift, j, load(shift, j) - load(low, j) * load(scale, j))


@elementwise
def _multiply(columns, values, by):
    for j in range(columns):
        store(values, j, load(values, j) * load(by, j))


@reduction
def _widen(x, columns, factor, wide, count):
    """Let columns with an `_unsafe` factor be computed in float64; how many now are."""
    for j in range(columns):
        before = load(wide, j)
        now = 1.0 if not is_float64(x) and _unsafe(load(factor, j)) else before
        count += now > before
        store(wide, j, now)
    return count


@plain
def _same_type(wide, count, first, columns, end):
    """End of the run of columns from `first` on, before `end`, that are computed in one type."""
    if count == 0 or count == columns:
        return end
    last = first + 1
    while last < end and load(wide, last) == load(wide, first):
        last += 1
    return last


@inline
def _column_formulas(call, slab, mean, residual, rstd, factor, high, scale, shift, wide):
    """The y = (x*factor - high)*scale + shift of every `_step` columns; how many of those take
    float64 or a factor.
    """
    low, weight = scratch(0.0, TABLE), scratch(0.0, TABLE)
    axes, r1 = call.axes, call.axes[3]
    _, groups, _, columns, _ = slab
    step = _step(axes)
    alike, count = r1 // step, columns // step
    wides = _centre_groups(call.x, groups, mean, residual, rstd, factor, high, low, scale, wide)
    _expand(high, groups, alike)
    _expand(low, groups, alike)
    _expand(scale, groups, alike)
    _expand(wide, groups, alike)
    _column_params(axes, slab, step, call.gamma, 1.0, weight)
    _column_params(axes, slab, step, call.beta, 0.0, shift)
    _multiply(count, scale, weight)
    _fold_affine(count, scale, shift, low)
    return _widen(call.x, count, scale, wide, wides * alike)


@inline
def _spread_formulas(call, slab, streams, tables, spread):
    """The numbers of tables for every column, of rows side by side, in the arithmetic type."""
    columns, step = slab[3], _step(call.axes)
    many = _side_by_side(call.axes, columns, _most(call.x, call.axes, streams))
    for i in range(3):
        _spread_to(spread[i], tables[i], columns // step, step, many)


@inline
def _spread(values, count, step, many):
    """Repeat each value for `step` columns, and those for `many` rows side by side, in place."""
    _expand(values, count, step)
    _repeat(values, many, count * step)


@inline
def _spread_to(target, values, count, step, many):
    """The same in another array."""
    _copy_from(values, 0, target, count)
    _spread(target, count, step, many)


@inline
def _rows_ahead(streams, late, size, stride, to):
    """How far ahead `_store_lines` asks for memory, `size` elements of rows at a time."""
    if streams:
        return (PARTLY * per_line(to) + size - 1) // size * stride
    whole = size == stride  # and then so near that the first cache has it still when it is used
    ahead = min(AHEAD * stride, LEAD * per_line(to)) if whole else AHEAD * stride
    return ahead if late else 0


@inline  # LLVM would keep `make`, an address of this process
def _store_rows(arrays, make, axes, slab, row, end, streams, begin, stop, *form):
    """Let rows row..end, columns begin..stop of a slab, be what `make` gives, by tables `form`: of
    rows with the same parameters, which are in them.
    """
    to, dy, x, gamma, beta = arrays
    k0, r0, k1, r1, params, span = axes
    _, _, _, _, origin = slab
    stride, like = k1 * r1, lanes_in_order(x, form[1])
    many = _side_by_side(axes, stop, _most(x, axes, streams)) if begin == 0 else 1
    while row < end:
        if row + many > end:
            many = 1
        at = origin + row * stride
        first, last = at + begin, at + (many - 1) * stride + stop
        ahead = _rows_ahead(streams, _late(x, axes), last - first, many * stride, to)
        _store_lines(to, make, like, first, last, ahead, streams, at, dy, x, None, None, 0, *form)
        row += many


@inline
def _store_rows_apart(arrays, make, axes, slab, row, end, begin, stop, *form):
    """The same of rows with parameters of their own."""
    to, dy, x, gamma, beta = arrays
    k0, r0, k1, r1, params, span = axes
    _, _, _, _, origin = slab
    stride, like = k1 * r1, lanes_in_order(x, form[1])
    ahead = _rows_ahead(False, _late(x, axes), stop - begin, stride, to)
    for at in range(origin + row * stride, origin + end * stride, stride):
        first, last = at + begin, at + stop
        while first < last:
            index, end_of_run = _parameter(axes, first)
            end_of_run = min(last, end_of_run)
            run = first, end_of_run, ahead, False, at, dy, x
            if span == 1:
                _store_lines(to, make, like, *run, gamma, beta, index - first, *form)
            else:
                _store_lines(to, make, like, *run, load(gamma, index), load(beta, index), 0, *form)
            first = end_of_run


@inline
def _store_slab(
    arrays, make, axes, slab, row, end, streams, begin, last, wide, count, form, narrow
):  # fmt: skip
    """Rows row..end, columns begin..last by tables: those of float64 where `wide`, of which `count`
    are not 0, says so.
    """
    while begin < last:
        stop = _same_type(wide, count, begin, slab[3], last)
        rows, columns = (arrays, make, axes, slab, row, end), (begin, stop)
        if _by_column(axes):
            if count == 0 or load(wide, begin) == 0.0:
                _store_rows(*rows, streams, *columns, None, *narrow)
            else:
                _store_rows(*rows, streams, *columns, *form)
        elif count == 0 or load(wide, begin) == 0.0:
            _store_rows_apart(*rows, *columns, None, *narrow)
        else:
            _store_rows_apart(*rows, *columns, *form)
        begin = stop


def columns_sums(call, first, last):
    """Sums of elements and of their squares: a task is a part of a slab, a block of rows."""
    shift, sums = scratch(0.0, SLAB), scratch(0.0, PAIR)
    for task in range(first, last):
        unit, part = task // call.parts, task % call.parts
        _column_shift(
            call, unit, call.round == 1, moved(call.mean, _slab(call.axes, unit)[0]), shift
        )
        _column_sums(call, unit, part, shift, sums, 0)
        _keep_pair(call, task, sums)


def columns_finish(call, first, last):
    """Statistics of slabs whose parts were summed; of float64, after a first round, the mean."""
    shift, sums, var = scratch(0.0, SLAB), scratch(0.0, PAIR), scratch(0.0, SLAB)
    mean, residual, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    final = call.round == _rounds(call) - 1
    for unit in range(first, last):
        group, _, _, columns, _ = _slab(call.axes, unit)
        _column_shift(call, unit, call.round == 1, moved(call.mean, group), shift)
        _total(call, unit, columns, sums)
        _finish_columns(call, unit, final, shift, sums, mean, residual, var, rstd)


def columns_apply(call, first, last):
    """y by statistics that are given: a task is a block of rows of a window of columns."""
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call, zero = _with_params(copied(call), *buffers), real(call.x, 0.0)
    mean, residual, rstd = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, TABLE)
    factor, wide = scratch(0.0, TABLE), scratch(0.0, TABLE)
    tables = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, TABLE)
    spread = scratch(zero, TABLE), scratch(zero, TABLE), scratch(zero, TABLE)
    arrays, axes, parts = (call.y, None, call.x, call.gamma, call.beta), call.axes, call.parts
    r0, rest, streams = axes[1], copied(call), _streams_columns(call.y, PASSES_APPLY, axes)
    uniform, whole, task = _by_column(axes), _windows(axes) == 1, first
    while task < last:
        unit, part = _find_window(axes, parts, task)
        stop = min(parts, part + last - task) if whole else part + 1  # parts that follow each other
        row, end_row = part * r0 // parts, stop * r0 // parts
        slab, begin, end = _window(axes, unit)
        quick = uniform
        if quick:
            _given_groups(call, slab[0], slab[1], mean, residual, rstd)
            quick = not _column_formulas(call, slab, mean, residual, rstd, factor, *tables, wide)
        if quick:
            _spread_formulas(call, slab, streams, tables, spread)
            place = axes, slab, row, end_row, streams, begin, end
            _store_rows(arrays, _y_of, *place, None, *spread)
        else:
            put(rest, "round", row)
            put(rest, "parts", end_row)
            column = slab[0] * axes[3] + begin
            leave(ANY, rest, column, column + end - begin)
        task += stop - part


def columns_apply_any(call, first, last):
    """The same of any columns in rows round..parts: a task is a column, and all tasks are of one
    sample and no more than a window.
    """
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call, zero = _with_params(copied(call), *buffers), real(call.x, 0.0)
    mean, residual, rstd = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, TABLE)
    factor, wide = scratch(0.0, TABLE), scratch(0.0, TABLE)
    tables = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, TABLE)
    spread = scratch(zero, TABLE), scratch(zero, TABLE), scratch(zero, TABLE)
    arrays, axes = (call.y, None, call.x, call.gamma, call.beta), call.axes
    k0, r0, k1, r1, params, span = axes
    streams = _streams_columns(call.y, PASSES_APPLY, axes)
    sample, column = first // (k1 * r1), first % (k1 * r1)
    slab, begin, end = _slab_of(axes, sample, column, column + last - first)
    _, groups, _, columns, _ = slab
    _given_groups(call, slab[0], groups, mean, residual, rstd)
    wides = _column_formulas(call, slab, mean, residual, rstd, factor, *tables, wide)
    _spread_formulas(call, slab, streams, tables, spread)
    step = _step(axes)
    if wides:
        many = _side_by_side(axes, columns, _most(call.x, axes, streams))
        for i in range(3):
            _spread(tables[i], columns // step, step, many)
        _spread(factor, groups, r1, many)
        _expand(wide, columns // step, step)
    _store_slab(
        arrays, _y_of, axes, slab, call.round, call.parts, streams, begin, end, wide, wides * step,
        (factor, *tables), spread
    )  # fmt: skip


@plain
def _leave_columns(call, slab, mean, residual, rstd):
    """Let y of a slab be given by tables of its moments."""
    call = _given_moments(copied(call), slab[0], mean, residual, rstd)
    put(call, "round", np.int64(0))
    put(call, "parts", call.axes[1])
    column = slab[0] * call.axes[3]
    leave(ANY, call, column, column + slab[3])


def columns_forward(call, first, last):
    """Statistics and, if there is a y, the result: a task is a slab of columns."""
    buffers = scratch_for_halves(call.x, ROW_LIMIT), scratch_for_halves(call.x, ROW_LIMIT)
    call, zero = _with_params(copied(call), *buffers), real(call.x, 0.0)
    shift, sums, var = scratch(0.0, SLAB), scratch(0.0, PAIRS), scratch(0.0, SLAB)
    mean, residual, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    factor, wide = scratch(0.0, TABLE), scratch(0.0, TABLE)
    tables = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, TABLE)
    spread = scratch(zero, TABLE), scratch(zero, TABLE), scratch(zero, TABLE)
    arrays, axes, none = (call.y, None, call.x, call.gamma, call.beta), call.axes, np.int64(0)
    streams, rounds = _streams_columns(call.y, _passes(axes), axes), _rounds(call)
    for unit in range(first, last):
        slab = _slab(axes, unit)
        _, _, _, columns, _ = slab
        for again in range(rounds):
            _column_shift(call, unit, again == 1, mean, shift)
            for i in range(call.parts):
                _column_sums(call, unit, i, shift, sums, PAIR * min(i, 1))
                if i:
                    _add_pair(sums, sums, PAIR, SLAB, columns)
            final = again == rounds - 1
            _finish_columns(call, unit, final, shift, sums, mean, residual, var, rstd)
        if not given(call.y):
            continue
        if not _by_column(axes) or _column_formulas(
            call, slab, mean, residual, rstd, factor, *tables, wide
        ):
            _leave_columns(call, slab, mean, residual, rstd)
            continue
        _spread_formulas(call, slab, streams, tables, spread)
        place = axes, slab, none, axes[1], streams, none, columns
        _store_rows(arrays, _y_of, *place, None, *spread)


# -------------------------------------------------------------------------------- columns: backward
@inline
def _column_grad_sums(call, unit, part, factor, high, low, sums, to):
    """Gradient sums of one part of a slab; weighted by gamma if that differs between rows."""
    of_halves = if_halves(call.dy, _column_grad_sums_of_halves, _add_column_grads)
    add = if_halves(call.x, of_halves, _add_column_grads)
    add(call, unit, part, 0.0, factor, high, low, sums, to)


@reduction
def _lost_grads(least, high, columns, sums, to):
    """How many columns' sums in float32, about `high`, may have lost what float64 holds: those of
    products below `least`, too.
    """
    lost = 0
    for j in range(columns):
        h, s, p = load(high, j), load(sums, to + j), load(sums, to + SLAB + j)
        lost += not (np.float64(np.float32(h)) == h and _in_range(least, s, p))
    return lost


@plain
def _column_grad_sums_of_halves(call, unit, part, zero, factor, high, low, sums, to):
    """`_column_grad_sums`, of many rows in float32, and again in float64 where that lost any."""
    if call.axes[1] < NARROW_ROWS:
        _add_column_grads(call, unit, part, zero, factor, high, low, sums, to)
        return
    _, _, _, columns, _ = _slab(call.axes, unit)
    about, wide = scratch(np.float32(0.0), SLAB), scratch(0.0, PAIR)
    _copy_from(high, 0, about, SLAB)
    narrow = np.float32(0.0)
    _add_column_grads(call, unit, part, narrow, factor, about, narrow, sums, to)
    # Channels that had no gradient at all are common, and products of float16 are never tiny.
    exact = min(significand(call.dy), significand(call.x)) > 8 and _by_column(call.axes)
    least = 0.0 if exact else TINY
    again = _lost_grads(least, high, columns, sums, to) > 0
    if again:
        _add_column_grads(call, unit, part, zero, factor, high, low, wide, 0)
    for j in range(columns):
        if again and _lost_grads(least, moved(high, j), 1, sums, to + j):
            store(sums, to + j, load(wide, j))
            store(sums, to + SLAB + j, load(wide, SLAB + j))
        else:
            p = load(sums, to + SLAB + j)
            store(sums, to + SLAB + j, p - load(low, j) * load(sums, to + j))


@plain
def _add_column_grads(call, unit, part, zero, factor, high, low, sums, to):
    """`_column_grad_sums`, four rows with the same gamma being added up in the type of `zero`."""
    dy, x, axes = call.dy, call.x, call.axes
    k0, r0, k1, r1, params, span = axes
    if _by_column(axes):
        what = dy, None, 0, factor, high, low
        _add_rows(call, unit, part, zero, np.int64(4), sums, to, _products, *what)
        return
    _, _, _, columns, origin = _slab(axes, unit)
    row, end = part * r0 // call.parts, (part + 1) * r0 // call.parts
    _clear_pair(sums, to, columns)
    stride, like, alone = k1 * r1, lanes_of_sums(x, zero), np.int64(1)
    for at in range(origin + row * stride, origin + end * stride, stride):
        first = 0
        while first < columns:
            index, end_of_run = _parameter(axes, at + first)
            last = min(columns, end_of_run - at)
            if span == 1:
                form = dy, x, call.gamma, index - at - first, factor, high, low
                _sum_columns(like, _products, sums, to, first, last, at, stride, alone, *form)
            else:
                form = dy, x, load(call.gamma, index), 0, factor, high, low
                _sum_columns(like, _products, sums, to, first, last, at, stride, alone, *form)
            first = last


@inline
def _centre_columns(call, unit, mean, residual, factor, high, low, rstd, wide, lows, rstds):
    """`_centre` for each group of a slab, then for each column; how many rstds need float64."""
    axes, r1 = call.axes, call.axes[3]
    group, groups, _, columns, _ = _slab(axes, unit)
    alike, many = r1 // _step(axes), _side_by_side(axes, columns, TOGETHER)
    _load_groups(call, group, groups, mean, residual, rstd)
    wides = _centre_groups(call.x, groups, mean, residual, rstd, factor, high, low, rstd, wide)
    _copy_to(lows, 0, low, groups)
    _copy_to(rstds, 0, rstd, groups)
    _expand(rstd, groups, alike)
    _expand(wide, groups, alike)
    _spread(high, groups, r1, many)
    _spread(low, groups, r1, many)
    _spread(factor, groups, r1, many)
    return wides * alike


@elementwise
def _lines(groups, count, frozen, center, low, rstd, s, p, slope, shift):
    """`_line` for each of the groups."""
    for i in range(groups):
        r = load(rstd, i)
        a = b = 0.0
        if not frozen:
            a = -r * r * (load(p, i) * r / count)
            b = (-r * (load(s, i) / count) if center else 0.0) - a * load(low, i)
        store(slope, i, a)
        store(shift, i, b)


@inline
def _column_grad_formulas(
    call, slab, lows, rstds, rstd, wide, wides, weight, s, p, scale, slope, shift
):  # fmt: skip
    """The scale, slope and shift of dx = (dy*scale + (x*factor - high)*slope + shift)*factor for
    every `_step` columns, from their sums; how many of those take float64 or a factor.
    """
    axes, r1, step = call.axes, call.axes[3], _step(call.axes)
    _, groups, _, columns, _ = slab
    alike, count = r1 // step, columns // step
    _column_params(axes, slab, step, call.gamma, 1.0, weight)
    _copy_from(rstd, 0, scale, count)
    _multiply(count, scale, weight)
    _multiply(count, s, weight)
    _multiply(count, p, weight)
    _fold_runs(s, groups, alike)
    _fold_runs(p, groups, alike)
    _lines(groups, axes[1] * r1, call.frozen, call.center, lows, rstds, s, p, slope, shift)
    _expand(slope, groups, alike)
    _expand(shift, groups, alike)
    wides = _widen(call.x, count, scale, wide, wides)
    return _widen(call.x, count, slope, wide, wides)


def columns_grad_sums(call, first, last):
    """Sums of gradients: a task is a part of a slab, a block of rows."""
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    mean, residual, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    factor, high, low = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, SLAB)
    wide, lows, rstds = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    sums = scratch(0.0, PAIR)
    for task in range(first, last):
        unit, part = task // call.parts, task % call.parts
        _centre_columns(call, unit, mean, residual, factor, high, low, rstd, wide, lows, rstds)
        _column_grad_sums(call, unit, part, factor, high, low, sums, 0)
        _keep_pair(call, task, sums)


@inline
def _backward_of_columns(call, first, last, general):
    """dx: a task is a slab of columns, from sums to the end, or, of slabs whose parts were summed,
    a block of rows. Unless this is the `general` kernel, a slab with a column that takes float64 is
    left.
    """
    call = _with_gamma(copied(call), scratch_for_halves(call.x, ROW_LIMIT))
    axes, parts, zero = call.axes, call.parts, real(call.x, 0.0)
    k0, r0, k1, r1, params, span = axes
    sums = scratch(0.0, PAIRS)
    factor, high = scratch(0.0, TABLE), scratch(0.0, TABLE)
    low, rstd = scratch(0.0, SLAB), scratch(0.0, SLAB)
    scale, slope, shift = scratch(0.0, TABLE), scratch(0.0, TABLE), scratch(0.0, TABLE)
    weight, s, p = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    wide, lows, rstds = scratch(0.0, SLAB), scratch(0.0, SLAB), scratch(0.0, SLAB)
    spread = (
        scratch(zero, TABLE), scratch(zero, TABLE), scratch(zero, TABLE), scratch(zero, TABLE)
    )  # fmt: skip
    arrays, one = (call.dx, call.dy, call.x, call.gamma, None), np.int64(1)
    step, streams = _step(axes), _streams_columns(call.dx, PASSES_BACKWARD, axes)
    for task in range(first, last):
        unit, part, row, end = task, 0, 0, r0
        if call.of_part:
            unit, part = task // parts, task % parts
            row, end = part * r0 // parts, (part + 1) * r0 // parts
        slab = _slab(axes, unit)
        _, groups, _, columns, _ = slab
        many, count = _side_by_side(axes, columns, _most(call.x, axes, streams)), columns // step
        wides = _centre_columns(call, unit, s, p, factor, high, low, rstd, wide, lows, rstds)
        if not (given(call.sums) or not call.frozen):
            _clear_pair(sums, 0, columns)
        elif call.of_part:
            _total(call, unit, columns, sums)
        else:
            for i in range(parts):
                _column_grad_sums(call, unit, i, factor, high, low, sums, PAIR * min(i, 1))
                if i:
                    _add_pair(sums, sums, PAIR, SLAB, columns)
        _fold_to(s, sums, count, step)
        _fold_to(p, moved(sums, SLAB), count, step)
        if given(call.sums) and part == 0:
            _save_column_sums(call, unit, rstd, s, p)
        wides = _column_grad_formulas(
            call, slab, lows, rstds, rstd, wide, wides, weight, s, p, scale, slope, shift
        )
        place = axes, slab, row, end, streams, 0, columns
        _spread_to(spread[0], high, columns, one, many)
        _spread_to(spread[1], scale, count, step, many)
        _spread_to(spread[2], slope, count, step, many)
        _spread_to(spread[3], shift, count, step, many)
        if general is None:
            if wides:
                _leave_column_grads(call, task, columns, sums)
            else:
                _store_rows(arrays, _dx_of, *place, None, *spread)
        else:
            if wides:
                _spread(scale, count, step, many)
                _spread(slope, count, step, many)
                _spread(shift, count, step, many)
                _repeat(factor, many, columns)
                _repeat(high, many, columns)
                _expand(wide, count, step)
            form = factor, high, scale, slope, shift
            _store_slab(arrays, _dx_of, *place, wide, wides * step, form, spread)


@plain
def _leave_column_grads(call, task, columns, sums):
    """Let dx of a slab, or of a part of it, be given by its sums."""
    if call.of_part:
        leave(ANY, call, task, task + 1)
        return
    pair, rest = scratch(0.0, PAIR), copied(call)
    _copy_to(pair, 0, sums, columns)
    _copy_to(pair, columns, moved(sums, SLAB), columns)
    put(rest, "partial", moved(pair, -task * _pair_size(call.axes[2], call.axes[3])))
    put(rest, "parts", np.int64(1))
    put(rest, "of_part", True)
    leave(ANY, rest, task, task + 1)


def columns_backward(call, first, last):
    """`_backward_of_columns` that are usual, of rows with the same parameters."""
    _backward_of_columns(call, first, last, None)


def columns_backward_any(call, first, last):
    """The same of any columns."""
    _backward_of_columns(call, first, last, True)


@plain
def _save_column_sums(call, unit, rstd, s, p):
    """Sums of dy*xhat and of dy of every `_step` columns: call.sums is (k0, k1*r1/step, 2)."""
    k0, r0, k1, r1, params, span = call.axes
    group, _, first, columns, _ = _slab(call.axes, unit)
    step = _step(call.axes)
    to = (group // k1 * k1 * r1 + first) // step
    for j in range(columns // step):
        store(call.sums, 2 * (to + j), load(p, j) * load(rstd, j))
        store(call.sums, 2 * (to + j) + 1, load(s, j))


# -------------------------------------------------------------------- parameter gradients, the rest
@reduction
def _column_param_sums(dy, x, first, count, mean, residual, rstd, group):
    """Sums of dy*xhat and of dy, each element being of a group of its own."""
    s = p = 0.0
    for j in range(count):
        g = np.float64(load(dy, first + j))
        m, r = load(mean, group + j), load(rstd, group + j)
        e = load(residual, group + j) if given(residual) else 0.0
        factor, high, low, scaled = _centre(x, m, e, r)
        s += g
        p += g * (_centred(x, first + j, factor, high, low) * scaled)
    return p, s


def param_sums(call, first, last):
    """Sums of dy*xhat and dy over runs first..last that share a parameter: (runs, 2)."""
    dy, x, axes = call.dy, call.x, call.axes
    k0, r0, k1, r1, params, span = axes
    for run in range(first, last):
        s = p = 0.0
        at, end = run * span, (run + 1) * span
        while at < end:
            column = at % (k1 * r1)
            group = at // (r0 * k1 * r1) * k1 + column // r1
            if r1 == 1:
                stop = min(end, at + k1 - column)
                dp, ds = _column_param_sums(
                    dy, x, at, stop - at, call.mean, call.residual, call.rstd, group
                )
            else:
                stop = min(end, at + r1 - column % r1)
                mean, residual, rstd = _saved(call, group)
                factor, high, low, scaled = _centre(x, mean, residual, rstd)
                ds, dp = _grad_sums(dy, x, at, stop, factor, high, low, None, 0)
                dp *= scaled
            s += ds
            p += dp
            at = stop
        store(call.sums, 2 * run, p)
        store(call.sums, 2 * run + 1, s)


def slab_params(call, first, last):
    """dgamma and dbeta, summed over all elements with the same parameter, if those follow each
    other in memory: a task is a slab of parameters in one of `rows` shares of the data, (rows, 2,
    params).
    """
    dy, x, axes, sums = call.dy, call.x, call.axes, call.sums
    k0, r0, k1, r1, params, span = axes
    dgamma, dbeta = scratch(0.0, NARROW_SLAB), scratch(0.0, NARROW_SLAB)
    slabs = (params + NARROW_SLAB - 1) // NARROW_SLAB
    periods = k0 * r0 * k1 * r1 // params
    for task in range(first, last):
        share, begin = task // slabs, task % slabs * NARROW_SLAB
        count = min(NARROW_SLAB, params - begin)
        _fill(dgamma, 0, NARROW_SLAB, 0.0)
        _fill(dbeta, 0, NARROW_SLAB, 0.0)
        for period in range(share * periods // call.rows, (share + 1) * periods // call.rows):
            start = period * params + begin
            at, end = start, start + count
            while at < end:
                column = at % (k1 * r1)
                stop = min(end, at + r1 - column % r1)
                group = at // (r0 * k1 * r1) * k1 + column // r1
                mean, residual, rstd = _saved(call, group)
                factor, high, low, scaled = _centre(x, mean, residual, rstd)
                _add_param_grads(
                    dy, x, at, stop, factor, high, scaled, -low * scaled, dgamma, dbeta, at - start
                )
                at = stop
        to = 2 * share * params + begin
        _copy_to(sums, to, dgamma, count)
        _copy_to(sums, to + params, dbeta, count)


@elementwise
def _add_param_grads(dy, x, first, last, factor, high, rstd, lift, dgamma, dbeta, index):
    offset = index - first
    for i in range(first, last):
        g = np.float64(load(dy, i))
        xhat = (np.float64(load(x, i)) * factor - high) * rstd + lift
        store(dgamma, i + offset, load(dgamma, i + offset) + g * xhat)
        store(dbeta, i + offset, load(dbeta, i + offset) + g)


def fold(call, first, last):
    """dgamma and dbeta from sums over parts of the data; a task is a slab of parameters.

    Of each parameter there are outer*tile*inner sums of either kind, whose distances in memory are
    `per_outer` and so on.
    """
    total = scratch(0.0, NARROW_SLAB)
    for task in range(first, last):
        begin = task * NARROW_SLAB
        count = min(NARROW_SLAB, call.params - begin)
        for kind in range(2):
            origin = kind * call.per_kind + begin * call.per_param
            if call.outer == call.tile == call.inner == call.per_param == 1:
                _copy_from(call.sums, origin, total, count)
            else:
                _fill(total, 0, count, 0.0)
                for i in range(call.outer):
                    for j in range(call.tile):
                        at = origin + i * call.per_outer + j * call.per_tile
                        for k in range(call.inner):
                            _add_every(
                                total, call.sums, at + k * call.per_inner, call.per_param, count
                            )
            if kind:
                _copy_to(call.dbeta, begin, total, count)
            else:
                _copy_to(call.dgamma, begin, total, count)


@elementwise
def _add_every(total, sums, at, step, count):
    for j in range(count):
        store(total, j, load(total, j) + load(sums, at + j * step))


class Family(NamedTuple):
    """The kernels of one family, by what a task is and does."""

    sums: Any  #: of a part, forward
    finish: Any  #: statistics, from those
    apply: Any  #: y of a piece, by statistics that are given
    apply_any: Any  #: the same of what that, or `forward`, leaves
    forward: Any  #: all of it of one unit: a group, or a slab of columns
    grad_sums: Any  #: of a part, backward
    grads: Any  #: dx of a piece, from those
    grads_any: Any  #: the same of what that, or `backward`, leaves or cannot do
    backward: Any  #: all of it of one unit
    otherwise: Any = None  #: that of forward for all that `forward` leaves, or cannot do

    @property
    def general(self) -> Any:
        """The kernel of one unit that can do all."""
        return self.otherwise or self.forward

    @property
    def left_forward(self) -> tuple[Any, ...]:
        """What others leave work to: at ANY, EXACT and GENERAL,"""
        return self.apply_any, exact_moments, self.general

    @property
    def left_backward(self) -> tuple[Any, ...]:
        """and at ANY and PARAMS."""
        return self.grads_any, rows_backward_params

    @property
    def every_forward(self) -> tuple[Any, ...]:
        """All that are called with a `Forward`,"""
        return self.sums, self.finish, self.apply, self.forward, *self.left_forward

    @property
    def every_backward(self) -> tuple[Any, ...]:
        """and those with a `Backward`, but for parameters'."""
        return self.grad_sums, self.grads, self.backward, *self.left_backward


ROWS = Family(
    rows_sums, rows_finish, rows_apply, rows_apply_any, rows_forward,
    rows_grad_sums, rows_grads, rows_grads_any, rows_backward,
)  # fmt: skip
#: rows that are whole groups, of at most `FEW` elements with a parameter each, not of float64,
ROWS_OF_FEW = ROWS._replace(forward=rows_of_few_forward, otherwise=rows_forward)
#: those of so many that sums take one row at a time,
USUAL_ROWS = ROWS_OF_FEW._replace(forward=rows_usual_forward)
#: and those with one parameter for all
ALIKE_ROWS = ROWS_OF_FEW._replace(forward=rows_alike_forward)
#: rows whose parts are of all groups side by side
ACROSS = ROWS._replace(sums=rows_sums_across, grad_sums=rows_grad_sums_across)
COLUMNS = Family(
    columns_sums, columns_finish, columns_apply, columns_apply_any, columns_forward,
    columns_grad_sums, columns_backward, columns_backward_any, columns_backward,
)  # fmt: skip
FAMILIES = ROWS, ROWS_OF_FEW, USUAL_ROWS, ALIKE_ROWS, ACROSS, COLUMNS


# --------------------------------------------------------------------------------------- parameters
def widen(call, first, last):
    """A parameter in the arithmetic type: each element `repeat` times, then all `tile` times.

    A task is a chunk of its elements.
    """
    params, repeat = call.params, call.repeat
    for task in range(first, last):
        begin, end = task * CHUNK, min((task + 1) * CHUNK, params)
        for to in range(0, call.tile * params * repeat, params * repeat):
            if repeat == 1:
                _copy_run(call.param, begin, call.wide, to + begin, to + end)
            else:
                for i in range(begin, end):
                    at = to + i * repeat
                    _fill(call.wide, at, at + repeat, load(call.param, i))


# ----------------------------------------------------------------------------------------- compiled
@njit(nogil=True, cache=True)
def enter(kernel, call, tasks):
    """Run all tasks of a kernel on this thread."""
    call_at(kernel, address_of(call), 0, tasks)


@njit(nogil=True, cache=True, parallel=True)
def _share(kernel, call, tasks, threads):
    """An equal share each."""
    for thread in prange(threads):
        call_at(kernel, call, thread * tasks // threads, (thread + 1) * tasks // threads)
        settle()  # a thread alone has its result seen by way of Python's lock, which does the same


@njit(nogil=True, cache=True)
def enter_parallel(kernel, call, tasks):
    """Run the tasks of a kernel on as many threads as Numba is set to use."""
    call, threads = address_of(call), team()
    if threads == 1:
        call_at(kernel, call, 0, tasks)
    else:
        _share(kernel, call, tasks, threads)


def _fields(kind: type, x: str, dy: str) -> list[Any]:
    """Types of a call's fields; pointers by the role of what they point to.

    In a `Fold`, `x` is the dtype of dgamma and dbeta; in a `Widen` of a parameter, `dy` what it
    becomes.
    """
    real = "float64" if x == "float64" else "float32"
    param = x if kind is Fold else real
    element = {
        "x": Pointer(x), "y": Pointer(x, "out"), "dy": Pointer(dy), "dx": Pointer(x, "out"),
        "gamma": Pointer(real), "beta": Pointer(real),
        "mean": Pointer("float64", "scratch"), "residual": Pointer("float64", "scratch"),
        "rstd": Pointer("float64", "scratch"), "var": Pointer("float64", "scratch"),
        "dgamma": Pointer(param, "out"), "dbeta": Pointer(param, "out"),
        "param": Pointer(x), "wide": Pointer(dy, "out"),
        "partial": Pointer("float64", "scratch"), "sums": Pointer("float64", "scratch"),
        "grads": Pointer(real, "scratch"),
        "axes": types.UniTuple(types.int64, 6), "eps": types.float64,
        "center": types.boolean, "frozen": types.boolean, "of_part": types.boolean,
        "running_mean": Pointer("float32", "scratch"),
        "running_spread": Pointer("float32", "scratch"),
        "factor": types.float64, "momentum": types.float64,
        "r": Pointer("float64", "scratch"), "d": Pointer("float64", "scratch"),
        "clip": types.UniTuple(types.float64, 2),
    }  # fmt: skip
    return [element.get(field, types.int64) for field in kind._fields]  # type: ignore[attr-defined]


_C_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Compiled:
    """A kernel for given dtypes: `address`, to `run` on this thread, to `share` between several."""

    def __init__(self, kernel: Any, kind: type, x: str, dy: str) -> None:
        call = Call(kind, x, dy)
        signature = types.void(call, types.int64, types.int64)
        self._function = cfunc(signature, cache=True, **_ERRORS)(kernel)
        self.address = cast(int, self._function.address)
        self._call = types.Tuple(
            [Pointer() if isinstance(f, Pointer) else f for f in call.tuple.types]
        )
        self.run = _entry(enter, types.int64, self._call, types.int64)

    @cached_property
    def share(self) -> Any:
        """``share(address, call, tasks)``; Numba's threads start with the first use."""
        start_threads()  # which what is read from disk may fail to do
        return _entry(enter_parallel, types.int64, self._call, types.int64)


compiled = cache(Compiled)


class Links:
    """Where a kernel finds others that it rarely needs, as a dynamic linker's table has them: each
    entry is first a function of Python, which compiles that kernel and puts its address there.

    Nothing can be raised through a kernel: what is raised is left for `Pool.run`. (But for an
    interrupt that Python meets just as it enters the function, and drops.)
    """

    def __init__(self, *kernels: Any) -> None:
        places = range(len(kernels))
        self._kernels = kernels
        self._first = [_C_KERNEL(partial(self._compile_and_run, place)) for place in places]
        first = [ctypes.cast(function, ctypes.c_void_p).value for function in self._first]
        self._table = (ctypes.c_void_p * len(kernels))(*first)
        self.address = ctypes.addressof(self._table)

    def _compile(self, place: int) -> int:
        with global_compiler_lock:  # once, if several threads come here together
            address = compiled(*self._kernels[place]).address
            self._table[place] = address
        return address

    def _compile_and_run(self, place: int, call: int, first: int, last: int) -> None:
        try:
            self._compile(place)
        except BaseException as error:  # and tried once more: an interrupt comes after the work
            failure[0] = error
        try:
            _C_KERNEL(self._compile(place))(call, first, last)
        except BaseException as error:
            failure[0] = error


_links: dict[tuple[Any, ...], Links] = {}


def links(*kernels: Any) -> Links:
    """The links to some kernels, of which there is one table: others keep but its address."""
    return _links.get(kernels) or _links.setdefault(kernels, Links(*kernels))


@cache
def _entry(function: Any, *arguments: Any) -> Any:
    """The compiled function itself, without Numba's dispatch by argument types."""
    function.compile(arguments)
    return function.overloads[arguments].entry_point
