"""Which arguments a `_target_` of the configs takes."""

from __future__ import annotations

import inspect

from hydra.utils import get_object


def accepted(target: str) -> set[str] | None:
    """Names of the arguments of a class or function; None if it takes any.

    A class with `**options` hands them to the next one that it inherits from, whose arguments are its own, too.
    """
    found = get_object(target)
    makers = [cls.__init__ for cls in found.__mro__ if "__init__" in vars(cls)] if inspect.isclass(found) else [found]
    names: set[str] = set()
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        names |= {each.name for each in parameters if each.kind != each.VAR_KEYWORD}
        if all(each.kind != each.VAR_KEYWORD for each in parameters):
            return names
    return None
