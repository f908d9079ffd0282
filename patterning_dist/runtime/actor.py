"""What type checkers know of Ray's actors: that their classes and handles have methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    # Ray annotates whatever a handle has as Never: what follows a call of an actor would count as out of reach.
    ActorHandle: TypeAlias = Any
else:
    from ray.actor import ActorHandle

__all__ = ["Actor", "ActorHandle"]


class Actor:
    """Base of the classes that are decorated with ``ray.remote``: checkers do not follow decorators of classes."""

    if TYPE_CHECKING:
        remote: ClassVar[Any]
        options: ClassVar[Any]
