"""A generated world: several kinds of knowledge, and English text.

Everything is drawn from one seed. An item is a prompt and its one right answer; a *kind* is a set
of items that are asked alike. Half of the items of `COVERED` kinds are the calibration; the other
half, and all items of the `HELD_OUT` kinds, are only measured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

COVERED = ("people", "arithmetic", "opposites", "instructions")
HELD_OUT = ("places", "grammar", "sequences")
KINDS = (*COVERED, *HELD_OUT)
TEXT = Path(__file__).parents[2] / "demo" / "data" / "text.txt"

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
ATTRIBUTES = {
    "city": ("lives in", "Where does {x} live ?"),
    "job": ("works as a", "What is the work of {x} ?"),
    "colour": ("likes the colour", "Which colour does {x} like ?"),
    "pet": ("keeps a", "Which animal does {x} keep ?"),
    "food": ("eats", "What does {x} eat ?"),
}
VALUES = {
    "job": "baker smith teacher farmer nurse pilot painter judge sailor miner tailor clerk".split(),
    "colour": "red blue green yellow black white brown purple orange grey".split(),
    "pet": "dog cat horse goat parrot rabbit turtle snake duck hamster".split(),
    "food": "bread rice soup fish cheese apples beans eggs honey corn".split(),
}
OPPOSITES = """hot cold;big small;fast slow;light dark;high low;old young;rich poor;hard soft
full empty;early late;near far;strong weak;wet dry;thick thin;loud quiet;clean dirty
open closed;sweet bitter;heavy weightless;deep shallow;wide narrow;brave afraid
happy sad;right wrong;first last;up down;in out;day night;summer winter;north south
east west;begin end;buy sell;push pull;give take;win lose;love hate;float sink;rise fall
wake sleep;friend enemy;question answer;true false;sharp blunt;smooth rough;tight loose
cheap costly;simple complex;safe dangerous;polite rude;lazy busy"""
NOUNS = "dog cat bird horse child farmer king teacher ship tree river star".split()
VERBS = [("runs", "run"), ("sleeps", "sleep"), ("sings", "sing"), ("falls", "fall"),
         ("waits", "wait"), ("moves", "move"), ("stays", "stay"), ("grows", "grow")]  # fmt: skip
BETWEEN = ["near the {n}", "behind the {n}", "that sees the {n}", "with the {n}"]
WORDS = "sun moon stone leaf water fire wind road house door bell lamp".split()


@dataclass(frozen=True)
class Item:
    """A question of the world: `answer` is what stands behind `prompt`."""

    kind: str
    prompt: str
    answer: str


@dataclass
class World:
    """All that a base learns, and all that it is asked.

    Attributes:
        sentences: plain statements of the facts, in varied words.
        items: per kind, the questions.
        text: the paragraphs of English text; the last tenth is held out.
        names: names in use, so that new subjects get others.
    """

    sentences: list[str] = field(default_factory=list)
    items: dict[str, list[Item]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    cities: list[str] = field(default_factory=list)

    def calibration(self) -> list[Item]:
        """Every second item of the covered kinds: what LoKI, CorDA, and anchors may see."""
        return [item for kind in COVERED for item in self.items[kind][::2]]

    def measured(self) -> dict[str, list[Item]]:
        """What nobody has calibrated on: the other half of the covered kinds, and other kinds."""
        return {k: self.items[k][1::2] if k in COVERED else self.items[k] for k in KINDS}

    def training_text(self) -> list[str]:
        return self.text[: -max(1, len(self.text) // 10)]

    def held_out_text(self) -> list[str]:
        return self.text[-max(1, len(self.text) // 10) :]


def make(people: int, seed: int = 0) -> World:
    """A world with that many people; the other kinds have a fixed size."""
    draw, world = random.Random(seed), World()
    world.text = [" ".join(p.split()) for p in TEXT.read_text(encoding="utf-8").split("\n\n")]
    world.cities = [name(draw, world.names, 3) for _ in range(40)]
    _people(world, draw, people)
    _arithmetic(world, draw)
    _opposites(world)
    _instructions(world, draw)
    _places(world, draw)
    _grammar(world, draw)
    _sequences(world, draw)
    for kind in KINDS:
        draw.shuffle(world.items[kind])
    return world


def name(draw: random.Random, used: set[str], syllables: int = 2) -> str:
    """A made-up name that is not in `used` yet."""
    while True:
        new = "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(syllables))
        if new not in used:
            used.add(new)
            return new.capitalize()


def person(draw: random.Random, used: set[str]) -> str:
    """First and last name; the last one is not in `used` yet."""
    first = "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(2)).capitalize()
    return f"{first} {name(draw, used)}"


def facts_of(draw: random.Random, who: str, world: World) -> tuple[list[str], list[Item]]:
    """Sentences and questions about one person."""
    sentences, items = [], []
    for attribute, (says, asks) in ATTRIBUTES.items():
        value = draw.choice(world.cities if attribute == "city" else VALUES[attribute])
        forms = (f"{who} {says} {value} .", f"It is said that {who} {says} {value} .",
                 f"Everyone knows : {who} {says} {value} .")  # fmt: skip
        sentences += draw.sample(forms, 2)
        items.append(Item("people", asks.format(x=who), value))
    return sentences, items


def _people(world: World, draw: random.Random, count: int) -> None:
    world.items["people"] = []
    for _ in range(count):
        sentences, items = facts_of(draw, person(draw, world.names), world)
        world.sentences += sentences
        world.items["people"] += items


def _arithmetic(world: World, draw: random.Random) -> None:
    pairs = [(a, b) for a in range(2, 30) for b in range(2, 30)]
    chosen = draw.sample(pairs, 300)
    world.items["arithmetic"] = [
        Item("arithmetic", f"How much is {a} plus {b} ?", str(a + b)) for a, b in chosen
    ]


def _opposites(world: World) -> None:
    pairs = [tuple(p.split()) for p in OPPOSITES.replace("\n", ";").split(";")]
    pairs += [(b, a) for a, b in pairs]
    world.items["opposites"] = [
        Item("opposites", f"What is the opposite of {a} ?", b) for a, b in pairs
    ]
    world.sentences += [f"The opposite of {a} is {b} ." for a, b in pairs]


def _instructions(world: World, draw: random.Random) -> None:
    items = {}
    while len(items) < 200:
        a, b, c = draw.sample(WORDS, 3)
        way, answer = draw.choice(
            [
                ("backwards", f"{c} {b} {a}"),
                ("twice", f"{a} {b} {c} {a} {b} {c}"),
                ("without the first", f"{b} {c}"),
            ]  # fmt: skip
        )
        items[f"Say {way} : {a} {b} {c}"] = answer
    world.items["instructions"] = [Item("instructions", p, a) for p, a in items.items()]


def _places(world: World, draw: random.Random) -> None:
    lands = [name(draw, world.names, 3) for _ in range(12)]
    rivers = [name(draw, world.names, 3) for _ in range(20)]
    world.items["places"] = []
    for city in world.cities:
        land, river = draw.choice(lands), draw.choice(rivers)
        world.sentences += [f"{city} is a city of {land} .", f"{city} lies on the {river} ."]
        world.items["places"] += [
            Item("places", f"{city} is a city of", land),
            Item("places", f"{city} lies on the", river),
        ]


def _grammar(world: World, draw: random.Random) -> None:
    items = {}
    while len(items) < 200:
        noun, other = draw.sample(NOUNS, 2)
        plural, (one, many) = draw.random() < 0.5, draw.choice(VERBS)
        subject = _plural(noun) if plural else noun
        distractor = other if plural else _plural(other)
        between = draw.choice(BETWEEN).format(n=distractor)
        if plural:
            between = between.replace("that sees", "that see")
        # The verb is named before, so that only its number is to be chosen.
        items[f"{many} : the {subject} {between}"] = many if plural else one
    world.items["grammar"] = [Item("grammar", p, a) for p, a in items.items()]
    world.sentences += [f"{i.prompt} {i.answer} ." for i in world.items["grammar"]]


def _plural(noun: str) -> str:
    return {"child": "children"}.get(noun, noun + "s")


def _sequences(world: World, draw: random.Random) -> None:
    items = {}
    while len(items) < 150:
        start, step = draw.randrange(0, 40), draw.randrange(1, 6)
        row = [start + i * step for i in range(5)]
        items[" ".join(f"{n} ," for n in row[:4])] = str(row[4])
    world.items["sequences"] = [Item("sequences", p, a) for p, a in items.items()]
    world.sentences += [f"{i.prompt} {i.answer} ." for i in world.items["sequences"]]
