"""From an attached segment to the object."""

from __future__ import annotations

from typing import Any

from onecopy import skeleton
from onecopy.process import note


def rebuild(attached: Any) -> Any:
    """The object over its mapping, whose pages are mapped by a native thread meanwhile.

    Raises whatever the classes of the object raise here.
    """
    note(attached.mapping)
    attached.mapping.prefault()
    return skeleton.put_together(attached.skeleton, attached.mapping, attached.data_offset)
