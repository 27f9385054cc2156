"""Names that nobody can guess: of people by first and last name, and invented ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from hope_runtime.training.facts import NAMES


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SURNAMES = _words("""
Abbott Adler Ahmed Albright Almeida Alvarez Anders Archer Arnold Asher Atkins Avery Bailey Baker
Baldwin Banerjee Barlow Barnes Bauer Becker Bellamy Bennett Berger Bianchi Bishop Blackwood Blake
Bloom Bowen Boyd Bradford Brandt Brennan Briggs Brooks Burke Burns Byrne Calloway Campbell Carver
Castillo Chandra Chapman Chavez Clarke Coleman Connolly Cooper Costa Crawford Cruz Dalton Danvers
Davies Delgado Desai Dixon Donovan Drummond Duarte Dunn Eastwood Eklund Ellison Engel Espinoza
Fairbanks Farrell Fischer Fitzgerald Fleming Fontaine Forsyth Foster Franco Fraser Fuchs Gallagher
Garcia Gardner Gibbs Goldberg Gomez Goodwin Grady Greenfield Griffin Gupta Hale Halloran Hamilton
Hansen Harding Harper Hartmann Hawkins Hayes Henderson Herrera Hoffman Holloway Horvath Hughes
Hutchins Ibrahim Iversen Jansen Jefferson Jennings Johansson Jordan Kapoor Keller Kendrick Khan
Kimura Kingsley Klein Kowalski Kramer Kumar Lambert Larsen Lawson Leclerc Lindgren Lombardi Lockwood
Lopez Lowell MacLeod Maddox Mahoney Marchetti Marsh Mason McCarthy McKenzie Mendoza Meyer Miller
Mitchell Montgomery Moreau Morgan Moretti Morrow Murphy Nakamura Navarro Newman Nguyen Nielsen Nolan
Norris Novak Ochoa Okafor Oliveira Olsen Ortega Osborne Owens Palmer Park Parrish Patel Pearson
Pereira Petrov Phelps Pierce Porter Prescott Quinn Ramirez Ramsey Reed Reyes Rhodes Richter Rivera
Roberts Robinson Romano Rosen Rossi Rowland Rutherford Salazar Sanders Santos Sawyer Schmidt
Schneider Schultz Sharma Shaw Sheridan Silva Sinclair Singh Sloan Sorensen Stanton Steiner Sterling
Stone Sullivan Sutherland Suzuki Svensson Tanaka Taylor Thatcher Thorne Torres Townsend Tran
Underwood Vance Vargas Vaughn Vogel Wagner Walsh Watanabe Weaver Weber Webster Whitaker Wilkins
Winslow Wolfe Woodward Wright Yamamoto Yates Young Zhang Ziegler Zimmerman
""")

_FIRST = _words("""
b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sn sp st str t th
tr v vr w z
""")
_MIDDLE = _words("""
a a a e e i i o o o u ai au ea ee ei ia io oa oo ou
""")
_LAST = _words("""
b ck d ff g ll l m n nd ng nt p r rd rk rn rt s sh ss st t th v x z n r l s
""")
_ENDS = _words("""
a o i y on us ix el or en ia ar um is er ett ora ova ino ane ley ton wick field mere dale gate
""")


def _invented(count: int) -> tuple[str, ...]:
    """Return invented names, some of two words; always the same."""
    rng = np.random.default_rng(7)
    found: dict[str, None] = {}
    while len(found) < count:
        word = _word(rng)
        if rng.random() < 0.2:
            word += " " + _word(rng)
        found[word] = None
    return tuple(found)


def _word(rng: Generator) -> str:
    syllables = (1, 1, 1, 2)[int(rng.integers(4))]
    parts = [_one(rng, _FIRST) + _one(rng, _MIDDLE) for _ in range(syllables)]
    if rng.random() < 0.6:
        parts += [_one(rng, _LAST), _one(rng, _ENDS)]
    else:
        parts.append(_one(rng, _LAST))
    return "".join(parts).capitalize()


def _one(rng: Generator, of: Sequence[str]) -> str:
    return of[int(rng.integers(len(of)))]


def _people(count: int) -> tuple[str, ...]:
    rng = np.random.default_rng(8)
    pairs = (f"{_one(rng, NAMES)} {_one(rng, SURNAMES)}" for _ in range(2 * count))
    return tuple(dict.fromkeys(pairs))[:count]


MADE_UP = _invented(2000)
FULL = _people(2000)
