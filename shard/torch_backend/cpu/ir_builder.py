"""A little of what C offers, over llvmlite's IR builder: typed loads and stores, counted loops, vector constants.

Kernels are written once, for vectors of any number of lanes, and compiled on the machine that they run on: no compiler
has to be installed, and the instructions are those that its processor has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir


class _BFloat(ir.types.Type):  # type: ignore[misc]  # llvmlite is untyped
    """bfloat16, which llvmlite has no type for. Only its name is needed."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, BF16 = ir.HalfType(), ir.FloatType(), _BFloat()
PTR = ir.PointerType()
VOID = ir.VoidType()

# llvmlite is untyped: IR values, types and builders are `Any` to mypy.
Value = Any
IrType = Any


def i64(value: int) -> Value:
    return ir.Constant(I64, value)


def f32(value: float) -> Value:
    return ir.Constant(F32, value)


def vector(element: IrType, lanes: int) -> IrType:
    return ir.VectorType(element, lanes)


def filled(element: IrType, lanes: int, value: float) -> Value:
    """A vector constant of `lanes` equal elements."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


class Kernel:
    """One function of a module while it is written. `arguments` are (name, type); pointers never overlap."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[tuple[str, IrType]]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, [kind for _, kind in arguments]), name)
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._entry = self.builder.block
        self._arguments = {}
        for value, (argument, kind) in zip(self.function.args, arguments, strict=True):
            value.name = argument
            if kind is PTR:
                value.add_attribute("noalias")
            self._arguments[argument] = value

    def __getitem__(self, argument: str) -> Value:
        return self._arguments[argument]

    def variable(self, kind: IrType) -> Value:
        """Memory for a value that changes; the optimizer makes a register of it."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    @contextmanager
    def loop(self, first: Value, last: Value, step: Value | None = None) -> Iterator[Value]:
        """for (i = first; i < last; i += step), 64-bit signed; yields i."""
        builder = self.builder
        counter = self.variable(I64)
        builder.store(first, counter)
        test, body, end = (self.function.append_basic_block() for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        index = builder.load(counter, typ=I64)
        builder.cbranch(builder.icmp_signed("<", index, last), body, end)
        builder.position_at_end(body)
        yield index
        builder.store(builder.add(index, i64(1) if step is None else step), counter)
        builder.branch(test)
        builder.position_at_end(end)

    @contextmanager
    def only_if(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition):
            yield

    def at(self, pointer: Value, offset_bytes: Value | int) -> Value:
        offset = i64(offset_bytes) if isinstance(offset_bytes, int) else offset_bytes
        return self.builder.gep(pointer, [offset], source_etype=I8)

    def load(self, pointer: Value, kind: IrType, align: int = 1) -> Value:
        return self.builder.load(pointer, typ=kind, align=align)

    def store(self, value: Value, pointer: Value, align: int = 1) -> None:
        self.builder.store(value, pointer, align=align)

    def splat(self, value: Value, lanes: int) -> Value:
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, filled(I32, lanes, 0))

    def call(self, name: str, result: IrType, arguments: Sequence[Value]) -> Value:
        """An intrinsic, or a function outside of the module."""
        function = self.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            function = ir.Function(self.module, kind, name)
        return self.builder.call(function, arguments)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, rounded once where the processor can do that at once."""
        return self.call(f"llvm.fmuladd.{_suffix(a.type)}", a.type, [a, b, c])

    def unary(self, name: str, value: Value) -> Value:
        """llvm.`name` (fabs, rint, sqrt) of each element."""
        return self.call(f"llvm.{name}.{_suffix(value.type)}", value.type, [value])

    def minimum(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def finish(self) -> None:
        self.builder.ret_void()


def read_fields(kernel: Kernel, names: tuple[str, ...], pointers: tuple[str, ...]) -> dict[str, Value]:
    """A kernel's fields: 64-bit numbers, some of which are addresses."""
    fields = {name: kernel.load(kernel.at(kernel["fields"], 8 * i), I64, 8) for i, name in enumerate(names)}
    for name in pointers:
        fields[name] = kernel.builder.inttoptr(fields[name], PTR)
    return fields


def write_task_loops(
    module: ir.Module, name: str, fields: tuple[str, ...], task: Value, *, before: Value | None = None
) -> None:
    """Functions NAME(fields) and NAME_team(fields), for one thread and for each of a team: (fields, index, thread) of
    `task` for each of the field "tasks". `before`, (fields, first, step), comes first, and all wait for it."""
    alone = Kernel(module, name, [("fields", PTR)])
    tasks = read_fields(alone, fields, ())["tasks"]
    if before is not None:
        alone.builder.call(before, [alone["fields"], i64(0), i64(1)])
    with alone.loop(i64(0), tasks) as index:
        alone.builder.call(task, [alone["fields"], index, i64(0)])
    alone.finish()
    team = Kernel(module, f"{name}_team", [("fields", PTR)])
    tasks = read_fields(team, fields, ())["tasks"]
    thread, num_threads = team_thread(team)
    if before is not None:
        team.builder.call(before, [team["fields"], thread, num_threads])
        team.call("GOMP_barrier", VOID, [])
    with team.loop(thread, tasks, num_threads) as index:
        team.builder.call(task, [team["fields"], index, thread])
    team.finish()


def team_thread(team: Kernel) -> tuple[Value, Value]:
    """The number of this thread in its team, and how many there are."""
    names = ("omp_get_thread_num", "omp_get_num_threads")
    number, size = (team.builder.sext(team.call(name, I32, []), I64) for name in names)
    return number, size


def _suffix(kind: IrType) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}f32"
    return "f32"
