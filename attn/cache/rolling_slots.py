"""Rolling slots: which slots of a cache a mask lets new tokens take from old ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.segments import TokenPositions
from attn.masks import FOREVER, Mask


class RollingSlots(NamedTuple):
    """How a mask lets slots be used again: the first `first` tokens stay where they
    are, the others share the rest by turns. `endless`: no visible token is lost."""

    slots: int
    first: int
    endless: bool

    def slot(self, place: TokenPositions) -> jax.Array:
        """The slot [B,T] of each token; -1 if a later token of the call takes it."""
        if not self.endless:
            return place.pos
        around = self.slots - self.first  # slots that are shared by turns
        later = self.first + (place.pos - self.first) % around
        stays = place.pos >= place.next_pos[:, None] - around
        return jnp.where(
            place.pos < self.first, place.pos, jnp.where(stays, later, -1)
        )


def rolling_slots(mask: Mask, slots: int) -> RollingSlots:
    """The slots that `mask` needs, in at most `slots` slots."""
    left, first = mask.reach()
    # the window and the token itself
    need = first + left + 1 if 0 <= left < FOREVER else FOREVER
    return RollingSlots(min(slots, need), first, need <= slots)
