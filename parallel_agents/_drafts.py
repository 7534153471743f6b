"""Drafts: frozen values that are filled by plain assignment, for those who make them by the hundred thousand.

attrs sets each field of a frozen class by a call of ``object.__setattr__()``, which takes four times as long as an
assignment to a slot. A draft is an instance of a subclass that can be assigned to; once it is filled, its class is set
to the frozen one, and from then on it is a value like any other. Nothing is checked: who fills a draft knows that the
value is valid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any


def draft_maker(frozen_class: type[Any]) -> Callable[[], Any]:
    """Return a function that makes drafts of a slotted, frozen class, with no field set yet."""
    name = f"_{frozen_class.__name__}Draft"
    # both at once: Python assigns through the fast path of plain slots only if neither is attrs' own
    namespace = {"__slots__": (), "__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
    draft_class = type(frozen_class)(name, (frozen_class,), namespace)
    return partial(object.__new__, draft_class)
