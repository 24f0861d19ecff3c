"""Classes of named fields that cost little until they are used: a start defines more than a hundred, and makes one of every second.

`dataclass` is the standard library's, which writes six methods as text and compiles them: here at the first call of a class, or the
first question for its fields. `NamedTuple` is typing's without the check that each annotation is a type. Type checkers see the
originals. For modules that are imported before the first token.
"""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

__all__ = ["dataclass", "NamedTuple"]

if TYPE_CHECKING:
    from dataclasses import dataclass
    from typing import NamedTuple
else:
    from collections import namedtuple
    from threading import RLock

    _making = RLock()                # several threads may be the first that call a class
    _FIELDS = "__dataclass_fields__"
    _ABSENT = object()               # the default of an argument whose value a factory makes

    class _Later:
        """An attribute that `dataclasses` gives a class, until it is asked for."""

        def __init__(self, name: str, cls: type, how: dict[str, bool]):
            self.name, self.cls, self.how = name, cls, how

        def __get__(self, instance: Any, owner: type) -> Any:
            """Finish the class and return what stands here then."""
            _finish(self.cls, self.how)
            return getattr(owner, self.name)

    def dataclass(cls: type | None = None, /, **how: bool) -> Any:
        """Return the class, to be finished when it is used. how: frozen, eq, repr, order, as `dataclasses.dataclass` takes them."""
        if cls is None:
            return lambda cls: dataclass(cls, **how)
        if "__init__" in vars(cls) or not how.keys() <= {"frozen", "eq", "repr", "order"}:
            raise TypeError(f"{cls.__name__}: of a dataclass that is finished later, __init__ is made, and so are no slots")

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            _finish(cls, how)
            cls.__init__(self, *args, **kwargs)

        cls.__init__ = __init__
        for name in (_FIELDS, "__dataclass_params__", "__match_args__"):
            setattr(cls, name, _Later(name, cls, how))
        return cls

    def _finish(cls: type, how: dict[str, bool]) -> None:
        """Let `dataclasses` finish a class, once. `__init__` is changed last: other threads wait here, or find all of it."""
        import dataclasses                                   # what asks the machine only has no use for it

        with _making:
            if isinstance(vars(cls)[_FIELDS], _Later):
                del cls.__match_args__
                dataclasses.dataclass(cls, init=False, **how)
                cls.__init__ = _init_of(cls, dataclasses.fields(cls), how.get("frozen", False))

    def _init_of(cls: type, fields: tuple[Any, ...], frozen: bool) -> Any:
        """Return `__init__` as `dataclasses` writes it: arguments in the order of the fields, then `__post_init__`."""
        from dataclasses import MISSING

        names: dict[str, Any] = {"_set": object.__setattr__, "_ABSENT": _ABSENT}
        given, body = ["self"], []
        for f in fields:
            value = f.name
            if f.default_factory is not MISSING:
                names[f"_new_{f.name}"] = f.default_factory
                value = f"_new_{f.name}() if {f.name} is _ABSENT else {f.name}" if f.init else f"_new_{f.name}()"
                default = "=_ABSENT"
            elif f.default is not MISSING:
                names[f"_default_{f.name}"], default = f.default, f"=_default_{f.name}"
            else:
                default = ""
            if f.init:
                given.append(f.name + default)
            if f.init or f.default_factory is not MISSING:
                body.append(f"_set(self, {f.name!r}, {value})" if frozen else f"self.{f.name} = {value}")
        body += ["self.__post_init__()"] if hasattr(cls, "__post_init__") else []
        exec(f"def __init__({', '.join(given)}):\n " + "\n ".join(body or ["pass"]), names)
        names["__init__"].__qualname__, names["__init__"].__module__ = f"{cls.__qualname__}.__init__", cls.__module__
        return names["__init__"]

    class _Named(type):
        """The kind of `NamedTuple`, which turns what a class says below it into a tuple's class."""

        def __new__(meta: type, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
            fields = body.pop("__annotations__", {})
            late = [n for n in fields if n in body]
            if late != list(fields)[len(fields) - len(late):]:
                raise TypeError(f"{name}: a field without a default follows one that has it")
            made = namedtuple(name, fields, defaults=[body.pop(n) for n in late], module=body["__module__"])
            made.__annotations__ = made.__new__.__annotations__ = fields
            for key, value in body.items():
                setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_Named, "NamedTuple", (), {})
