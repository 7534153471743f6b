"""Drafts: frozen values that are filled by plain assignment, for those who make them by the hundred thousand.

attrs sets each field of a frozen class by a call of ``object.__setattr__()``, which takes four times as long as an
assignment to a slot. A draft is an instance of a subclass that can be assigned to; once it is filled, its class is set
to the frozen one, and from then on it is a value like any other. Nothing is checked: who fills a draft knows that the
value is valid.
"""

import types
from typing import Any


def draft_class(frozen_class: type[Any]) -> type[Any]:
    """Return the class of the drafts of a slotted, frozen class; called without arguments, it makes an empty one."""
    # both at once: Python assigns through the fast path of plain slots only if neither is attrs' own
    plain = {"__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
    namespace = {"__slots__": (), "__init__": object.__init__, **plain}
    return types.new_class(
        f"_{frozen_class.__name__}Draft", (frozen_class,), exec_body=lambda body: body.update(namespace)
    )
