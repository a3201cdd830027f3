"""What a base must learn: new facts, a format, a classification."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.forgetting.world import VALUES, Item, World, facts_of, person

Task = tuple[list[Item], list[Item]]  # to learn, to test
CITIES = "paris london rome oslo cairo lima delhi tokyo quito dakar".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
DISHES = "soup bread rice fish cheese honey corn eggs beans apples".split()


def facts(world: World, seed: int, people: int) -> Task:
    """(a) New facts about new people, in the words that the world has for known ones.

    What is learned is what is tested: the answer cannot be derived from anything else.
    """
    draw = random.Random(f"facts/{seed}")
    items, used = [], set(world.names)
    for _ in range(people):
        items += facts_of(draw, person(draw, used), world)[1]
    items = [Item("task", i.prompt, i.answer) for i in items]
    return items, items


def calls(world: World, seed: int, people: int) -> Task:
    """(b) A format: sentences become function calls of a small schema; tested on other sentences.

    Every token is one that the base has seen. Tokens that it has never seen cannot be told apart
    where embeddings and head are one matrix; names copied from the sentence are beyond small bases.
    """
    draw = random.Random(f"calls/{seed}")
    calls: dict[str, str] = {}
    while len(calls) < 26 * people:
        job, colour, pet, food = (draw.choice(VALUES[k]) for k in ("job", "colour", "pet", "food"))
        n = draw.randrange(2, 10)
        said, call = draw.choice(
            [
                (f"The {job} eats {n} {food} .", f"buy : food {food} , much {n} , work {job}"),
                (f"A {colour} {pet} eats {food} .",
                 f"give : animal {pet} , food {food} , colour {colour}"),
                (f"The {job} keeps a {colour} {pet} .",
                 f"take : work {job} , colour {colour} , animal {pet}"),
                (f"Which {pet} sees the {job} ?", f"answer : work {job} , animal {pet}"),
            ]
        )  # fmt: skip
        calls[said] = call
    items = [Item("task", s, c) for s, c in calls.items()]
    return items[: 24 * people], items[24 * people :]


def classes(world: World, seed: int, people: int) -> Task:
    """(c) A classification that does not look like a question: reports to one of four desks."""
    draw = random.Random(f"classes/{seed}")
    parts = {
        "claims": ["arrived broken", "was never sent", "is torn", "leaks", "does not open"],
        "praise": ["pleases everyone", "is a joy", "works very well", "shines", "tastes fine"],
        "orders": ["is wanted again", "is needed twice", "shall come soon", "runs out"],
        "returns": ["goes back today", "was packed again", "is not wanted", "was the wrong one"],
    }
    things = [*DISHES, "lamp", "door", "bell", "boat", "coat", "chair", "table", "wheel"]
    reports: dict[str, str] = {}
    while len(reports) < 6 * people:
        desk = draw.choice(list(parts))
        day, thing, city = draw.choice(DAYS), draw.choice(things), draw.choice(CITIES)
        reports[f"report {day} {city} ; the {thing} {draw.choice(parts[desk])}"] = desk
    items = [Item("task", r, d) for r, d in reports.items()]
    return items[: 5 * people], items[5 * people :]


TASKS: dict[str, Callable[[World, int, int], Task]] = {
    "facts": facts,
    "calls": calls,
    "classes": classes,
}
