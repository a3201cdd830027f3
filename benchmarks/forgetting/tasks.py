"""What a base must learn: new facts, a format, a classification."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.forgetting.world import Item, World, facts_of, person

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
    """(b) A format: requests become function calls of a small schema; tested on other requests."""
    draw = random.Random(f"calls/{seed}")
    requests: dict[str, str] = {}
    while len(requests) < 8 * people:
        city, day, dish, n = (draw.choice(x) for x in (CITIES, DAYS, DISHES, range(2, 10)))
        ask, call = draw.choice(
            [
                (f"Will it rain in {city} on {day} ?", f"weather ( city = {city} , day = {day} )"),
                (f"Order {n} {dish} for {day} .", f"order ( dish = {dish} , count = {n} )"),
                (f"Book a table in {city} for {n} .", f"book ( city = {city} , seats = {n} )"),
                (f"Remind me on {day} to buy {dish} .", f"remind ( day = {day} , of = {dish} )"),
            ]
        )
        requests[ask] = call
    items = [Item("task", a, c) for a, c in requests.items()]
    return items[: 6 * people], items[6 * people :]


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
