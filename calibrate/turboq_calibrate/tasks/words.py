"""Words, names and sentences that mean nothing in particular: what prompts are filled with."""

from __future__ import annotations

import random
from collections.abc import Callable

_NOUNS = (
    "anchor apple bridge button candle carpet castle cherry circle cloud corner cotton desert "
    "engine feather finger forest garden ginger hammer harbor island jacket kettle ladder lantern "
    "lemon letter marble meadow mirror needle orange orchard paper pencil pepper planet pocket "
    "rabbit ribbon river rocket saddle shadow silver spider station stone summer table ticket "
    "timber tower tunnel valley velvet village violin wagon walnut window winter"
)
_ADJECTIVES = (
    "amber ancient bitter brave bright broken calm clever cold curious dark deep early empty "
    "gentle golden hidden hollow honest idle little loud narrow old patient plain proud quick "
    "quiet round rough sharp simple sleepy slow small smooth soft steady strange tall thin warm "
    "wide wild wooden young"
)
_VERBS = (
    "carried covered crossed followed found held kept left lifted met moved passed pulled pushed "
    "reached remembered saw touched turned watched"
)
NOUNS, ADJECTIVES, VERBS = (tuple(x.split()) for x in (_NOUNS, _ADJECTIVES, _VERBS))
PLACES = ("above", "behind", "beside", "near", "past", "under", "with", "without")


def sentence(rng: random.Random) -> str:
    """One that carries no fact anybody asks for."""
    first, second, third = rng.sample(NOUNS, 3)
    some = rng.sample(ADJECTIVES, 2)
    return (
        f"The {some[0]} {first} {rng.choice(VERBS)} the {second} {rng.choice(PLACES)} the "
        f"{some[1]} {third}."
    )


def number(rng: random.Random, digits: int) -> str:
    """Of exactly so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def different[T](rng: random.Random, count: int, make: Callable[[random.Random], T]) -> list[T]:
    """`count` results of make(rng), no two the same."""
    found: dict[T, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def name(rng: random.Random) -> str:
    """Two adjectives and a noun."""
    return f"{' '.join(rng.sample(ADJECTIVES, 2))} {rng.choice(NOUNS)}"
