"""The `@op` decorator: one Python function is an op's declaration and its NumPy reference at once.

    @op(inplace="x")
    def rms_norm(x: F32["... d"], weight: F32["d"] | None = None, *, eps: float) -> F32["... d"]: ...

Everything that others need is read from it: shape and dtype rules from the annotations (graph), the parameter struct and the
kernel prototype (`pyengine.compiler.codegen`), memory facts from the decorator (`pyengine.compiler.arena`), cases for tests and
benchmarks from `.case(...)`. Called with arrays, the op computes; called with tensors, it adds a node to the graph.

Annotations
  F32["m k"]          axes by name, separated by blanks; the same name must have the same size everywhere in the op;
                      `...` first stands for any leading axes; `h*e` is a product of named axes; a number is itself
  I32, F32            that dtype; Float: F32, F16 or BF16; Weight: any dtype that can be dequantized;
                      Cache: F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a format that only caches have
  list[F32["m n"]]    several tensors (each with its own sizes for axis names that end in an underscore: "n_ k")
  F32["k"] | None     may be absent
Results: F32[...] a new tensor; Same["cache"] the (modified) argument of that name; list[...] one per element of the list
argument named in @op(per="w"); F32[...] | None, last: only where the op's `infer` gives it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Literal, get_args, get_origin

import numpy as np

from pyengine.dtype import CACHE_DTYPES, DType, dtype as dtype_of
from pyengine.errors import ShapeError
from pyengine.graph.tensor import Axis, make_leaf, Node, product, Shape, Tensor
from pyengine.records import dataclass, NamedTuple


@dataclass(frozen=True)
class Spec:
    """Dtype class and axes of one argument or result."""

    kind: str                    # F32 | I32 | Float | Weight | Cache | Same
    axes: tuple[str, ...]
    optional: bool = False
    many: bool = False

    def __or__(self, other: None) -> Spec:
        return Spec(self.kind, self.axes, True, self.many)


class _Kind:
    def __init__(self, kind: str):
        self.kind = kind

    def __getitem__(self, axes: str) -> Spec:
        return Spec(self.kind, tuple(axes.split()))


F32, I32, Float, Weight, Cache, Same = (_Kind(k) for k in ("F32", "I32", "Float", "Weight", "Cache", "Same"))

MOST_KNOWN = 1024                        # shapes of results that an op keeps
_ALLOWED = {"F32": {"F32"}, "I32": {"I32"}, "Float": {"F32", "F16", "BF16"},
            "Cache": {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", *(t.name for t in CACHE_DTYPES)}}


class Param(NamedTuple):
    """A keyword-only argument: float, int, bool, a tuple of ints (at most 6), or a Literal of strings (an enum in C)."""

    name: str
    kind: str                    # float | int | bool | ints | enum
    default: Any = inspect.Parameter.empty
    choices: tuple[str, ...] = ()


def _spec_of(annotation: Any, where: str) -> Spec:
    if isinstance(annotation, Spec):
        return annotation
    if get_origin(annotation) is list:
        inner = _spec_of(get_args(annotation)[0], where)
        return Spec(inner.kind, inner.axes, inner.optional, many=True)
    if isinstance(annotation, types.UnionType):
        inner = _spec_of(next(a for a in get_args(annotation) if a is not type(None)), where)
        return Spec(inner.kind, inner.axes, True, inner.many)
    raise TypeError(f"{where}: annotation {annotation!r} is not a tensor spec")


def _param_of(p: inspect.Parameter, annotation: Any, where: str) -> Param:
    if get_origin(annotation) is Literal:
        return Param(p.name, "enum", p.default, get_args(annotation))
    if get_origin(annotation) is tuple:
        return Param(p.name, "ints", p.default)
    kinds = {float: "float", int: "int", bool: "bool"}
    if annotation not in kinds:
        raise TypeError(f"{where}: parameter '{p.name}' has no C counterpart: {annotation!r}")
    return Param(p.name, kinds[annotation], p.default)


class Case(NamedTuple):
    """Shapes of the arguments (None: absent; a list for list arguments), dtypes where not F32, and parameters."""

    shapes: dict[str, Any]
    dtypes: dict[str, str]
    params: dict[str, Any]


@dataclass(eq=False)
class Op:
    """A declared op. See the module's docstring."""

    name: str
    fn: Callable[..., Any]
    args: dict[str, Spec]
    params: dict[str, Param]
    results: tuple[Spec, ...]
    inplace: str | None = None               # result 0 may use the memory of this argument
    view: Callable[..., Any] | None = None   # (shape, strides in elements, params) -> (offset, shape, strides): no kernel
    strided: tuple[str, ...] = ()            # arguments that may have any strides; others must be contiguous
    per: str | None = None                   # list argument that gives the number of results of a list result
    infer: Callable[..., Any] | None = None  # (args, params) -> [(shape, dtype)] where annotations do not suffice
    flops: Callable[..., Any] | None = None  # (*args with .shape, **params) -> number of operations
    packed: tuple[str, ...] = ()             # weights that kernels may want in a packed form of their own
    sparse: tuple[str, ...] = ()             # weights of which a row reads some matrices only
    any_format: tuple[str, ...] = ()         # and those that kernels read in any format of a file, packed or not
    fault: str = "{} is not below {}"        # what a device says of a number that it finds out of its range, and of the range
    rowwise: bool = False                    # a row of the results needs that row only of the arguments that have the rows' axis
    light: bool = False                      # computing some rows again costs no more than moving them
    cases: list[Case] = field(default_factory=list)
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)           # results of `shapes`: layers are alike

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.fn.__doc__

    # -- calling ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute (arrays) or add a node (tensors)."""
        bound = self._bind(args, kwargs)
        values, params = [bound[a] for a in self.args], {p: bound[p] for p in self.params}
        flat = [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]
        if not any(isinstance(t, Tensor) for t in flat):
            return self.fn(*values, **params)
        values = [[as_tensor(t) for t in v] if isinstance(v, (list, tuple)) else as_tensor(v) for v in values]
        return self.node(values, params)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(self.args)
        if len(args) > len(names):
            raise TypeError(f"{self.name}: {len(args)} arguments, but it takes {len(names)}: {', '.join(names)}")
        bound = dict(zip(names, args))
        for key, value in kwargs.items():
            if key in bound or (key not in self.args and key not in self.params):
                raise TypeError(f"{self.name}: unexpected or repeated argument '{key}'")
            bound[key] = value
        for key, spec in self.args.items():
            if bound.get(key) is None:
                if not spec.optional:
                    raise TypeError(f"{self.name}: argument '{key}' is missing")
                bound[key] = None
        for key, p in self.params.items():
            if key not in bound:
                if p.default is inspect.Parameter.empty:
                    raise TypeError(f"{self.name}: parameter '{key}' is missing")
                bound[key] = p.default
            bound[key] = self._check_param(p, bound[key])
        return bound

    def _check_param(self, p: Param, value: Any) -> Any:
        if p.kind == "enum":
            if value not in p.choices:
                raise ShapeError(f"{self.name}: '{p.name}' is {value!r}, not one of {', '.join(map(repr, p.choices))}")
            return value
        if p.kind == "ints":
            value = tuple(int(v) for v in value)
            if len(value) > 6:
                raise ShapeError(f"{self.name}: '{p.name}' has {len(value)} numbers, at most 6 are possible")
            return value
        return {"float": float, "int": int, "bool": bool}[p.kind](value)

    def node(self, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Add a node; returns its tensor, or a tuple where it has several results."""
        args = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        node = Node(self, args, tuple(params.items()))
        node.outputs = outputs = tuple([Tensor(node, s, d, i) for i, (s, d) in enumerate(self.shapes(args, params))])
        return outputs[0] if len(outputs) == 1 and not self.results[0].many else outputs

    def shapes(self, args: tuple[Any, ...], params: dict[str, Any]) -> list[tuple[Shape, DType]]:
        """Return shape and dtype of each result. Raises: ShapeError where the arguments do not go together."""
        key = (tuple([None if a is None else tuple([(t.shape, t.dtype.id) for t in a]) if isinstance(a, tuple) else (a.shape, a.dtype.id)
                      for a in args]), tuple(params.items()))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            found = self.infer(args, params) if self.infer else self._infer(args)
            known = self._known[key] = [(tuple(shape), dtype) for shape, dtype in found]
        return known

    def argument(self, args: Sequence[Any], name: str) -> Any:
        """Return the one of a node's arguments that has this name."""
        return args[list(self.args).index(name)]

    # -- shapes -------------------------------------------------------------------------------------------------------

    def match(self, args: Sequence[Any]) -> tuple[dict[str, Any], dict[tuple[str, int], Axis]]:
        """Check arguments against their annotations; returns the sizes of named axes, and of those that list elements own.

        Raises: ShapeError naming the argument and the axis.
        """
        sizes: dict[str, Any] = {}
        own: dict[tuple[str, int], Axis] = {}        # axes of list elements: (name, element)
        for (name, spec), value in zip(self.args.items(), args):
            if value is None:
                continue
            many = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) != spec.many:
                raise ShapeError(f"{self.name}: '{name}' must be {'a list of tensors' if spec.many else 'one tensor'}")
            for i, t in enumerate(many):
                self._match(name, spec, t, i, sizes, own)
        return sizes, own

    def _infer(self, args: Sequence[Any]) -> list[tuple[tuple[Axis, ...], DType]]:
        sizes, own = self.match(args)
        out: list[tuple[tuple[Axis, ...], DType]] = []
        for spec in self.results:
            if spec.kind == "Same":
                same = self.argument(args, spec.axes[0])
                if same is None:
                    raise ShapeError(f"{self.name}: '{spec.axes[0]}' must be given")
                out.append((same.shape, same.dtype))
                continue
            n = len(self.argument(args, self.per)) if spec.many else 1
            for i in range(n):
                shape: list[Axis] = []
                for axis in spec.axes:
                    if axis == "...":
                        shape.extend(sizes["..."])
                    elif axis.endswith("_"):
                        shape.append(own[axis, i])
                    else:
                        shape.append(product([int(a) if a.isdigit() else sizes[a] for a in axis.split("*")]))
                out.append((tuple(shape), dtype_of(spec.kind)))
        return out

    def _match(self, name: str, spec: Spec, t: Tensor, element: int, sizes: dict[str, Any], own: dict) -> None:
        where = f"{self.name}: '{name}'"
        allowed = _ALLOWED.get(spec.kind)
        if allowed and t.dtype.name not in allowed:
            raise ShapeError(f"{where}: dtype is {t.dtype.name}, but must be {' or '.join(sorted(allowed))}")
        axes = list(spec.axes)
        shape = t.shape
        if axes and axes[0] == "...":
            n_lead = len(shape) - len(axes) + 1
            if n_lead < 0:
                raise ShapeError(f"{where}: shape {shape} has fewer than {len(axes) - 1} axes")
            lead = shape[:n_lead]
            if sizes.setdefault("...", lead) != lead:
                raise ShapeError(f"{where}: leading axes are {lead} here but {sizes['...']} earlier")
            axes, shape = axes[1:], shape[n_lead:]
        if len(axes) != len(shape):
            raise ShapeError(f"{where}: shape {t.shape} must have axes ({' '.join(spec.axes)})")
        for axis, size in zip(axes, shape):
            known = int(axis) if axis.isdigit() else None
            if axis.endswith("_"):
                known = own.setdefault((axis, element), size)
            elif "*" in axis:
                known = product([sizes[a] for a in axis.split("*")])
            elif known is None:
                known = sizes.setdefault(axis, size)
            if known != size:
                raise ShapeError(f"{where}: axis '{axis}' is {size} here but {known} earlier")

    # -- cases --------------------------------------------------------------------------------------------------------

    def case(self, dtypes: dict[str, str] | None = None, **kwargs: Any) -> None:
        """Add a case for tests and benchmarks: shapes by argument name, parameters by name."""
        shapes = {k: v for k, v in kwargs.items() if k in self.args}
        params = {k: v for k, v in kwargs.items() if k in self.params}
        if len(shapes) + len(params) != len(kwargs):
            raise TypeError(f"{self.name}: unknown names in a case: {sorted(set(kwargs) - set(shapes) - set(params))}")
        self.cases.append(Case(shapes, dict(dtypes or {}), params))


REGISTRY: dict[str, Op] = {}


def op(**facts: Any) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op; see the module's docstring and the fields of `Op` for `facts`."""

    def declare(fn: Callable[..., Any]) -> Op:
        notes = inspect.get_annotations(fn, eval_str=True)
        args: dict[str, Spec] = {}
        params: dict[str, Param] = {}
        for p in inspect.signature(fn).parameters.values():
            if p.kind is inspect.Parameter.KEYWORD_ONLY:
                params[p.name] = _param_of(p, notes[p.name], fn.__name__)
            else:
                args[p.name] = _spec_of(notes[p.name], f"{fn.__name__}: '{p.name}'")
        returned = notes["return"]
        results = get_args(returned) if get_origin(returned) is tuple else (returned,)
        declared = Op(fn.__name__, fn, args, params, tuple(_spec_of(r, fn.__name__) for r in results), **facts)
        if declared.name in REGISTRY:
            raise TypeError(f"op {declared.name} is declared twice")
        REGISTRY[declared.name] = declared
        return declared

    return declare


def as_tensor(value: Any) -> Tensor | None:
    """Turn an array into a constant of the graph; tensors and None stay as they are."""
    if value is None or isinstance(value, Tensor):
        return value
    try:
        array = np.ascontiguousarray(value)
    except Exception as error:                               # lists of unequal lengths, or what a stranger's __array__ raises
        raise ShapeError(f"a {type(value).__name__} cannot be a constant: {error}") from None
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    names = {"float32": "F32", "float16": "F16", "int32": "I32"}
    if array.dtype.name not in names:
        raise ShapeError(f"arrays of dtype {array.dtype} cannot be constants; use one of {', '.join(names)}")
    return make_leaf("constant", "", array.shape, dtype_of(names[array.dtype.name]), array)
