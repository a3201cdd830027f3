"""The job that the demo teaches: a customer's message becomes an order in JSON.

Messages are put together from parts at random. Held-out ones have wordings, things, cities and
names that no message of the training set has.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

Exchange = tuple[str, str]  # a message, and the order as JSON
TAUGHT, HELD_OUT = 320, 40
COLORS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Parts:
    """What messages are made of: things as (one, several), and wordings with five gaps."""

    things: tuple[tuple[str, str], ...]
    cities: tuple[str, ...]
    names: tuple[str, ...]
    wordings: tuple[str, ...]


LEARNED = Parts(
    things=(
        ("mug", "mugs"),
        ("lamp", "lamps"),
        ("chair", "chairs"),
        ("towel", "towels"),
        ("basket", "baskets"),
        ("blanket", "blankets"),
        ("jacket", "jackets"),
        ("scarf", "scarves"),
        ("candle", "candles"),
        ("notebook", "notebooks"),
        ("umbrella", "umbrellas"),
        ("teapot", "teapots"),
        ("cushion", "cushions"),
        ("backpack", "backpacks"),
        ("bicycle", "bicycles"),
        ("pencil", "pencils"),
    ),
    cities=(
        "Lyon",
        "Porto",
        "Turin",
        "Graz",
        "Leeds",
        "Bremen",
        "Ghent",
        "Malmo",
        "Gdansk",
        "Seville",
        "Tampere",
        "Bergen",
        "Cork",
        "Utrecht",
        "Basel",
        "Brno",
    ),  # fmt: skip
    names=(
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Felix",
        "Grace",
        "Hugo",
        "Irene",
        "Jonas",
        "Karin",
        "Leo",
        "Maria",
        "Nils",
        "Olga",
        "Peter",
    ),  # fmt: skip
    wordings=(
        "Hello, I would like {count} {color} {things}, please. Send to {city}. {name}",
        "Hi, can you ship {count} {color} {things} to {city}? Thanks, {name}",
        "{name} here. I need {count} {color} {things} in {city}.",
        "Please send {count} {things} in {color} to {name} in {city}.",
        "We need {count} {color} {things} for our office in {city}. Regards, {name}",
        "Good morning, this is {name} from {city}. {count} {color} {things}, please!",
        "My name is {name}. I want to order {count} {things}, color {color}, delivery to {city}.",
        "To {city}, please: {count} {color} {things}. The name is {name}.",
        "Could I get {count} {color} {things}? I live in {city}. Best, {name}",
        "I saw your {color} {things} and want {count}. Ship them to {name}, {city}.",
        "Order for {name}: {count} {things}, {color}, to be delivered in {city}.",
        "Hey, {count} of the {color} {things} for {name}, please. Address is in {city}.",
    ),
)
NEW = Parts(
    things=(
        ("bottle", "bottles"),
        ("mirror", "mirrors"),
        ("pillow", "pillows"),
        ("table", "tables"),
        ("hat", "hats"),
        ("clock", "clocks"),
    ),
    cities=("Zagreb", "Bilbao", "Dresden", "Naples", "Aarhus", "Nantes"),
    names=("Sofia", "Martin", "Julia", "Oscar", "Laura", "Victor"),
    wordings=(
        "Dear shop, {count} {color} {things} should go to {city}. Yours, {name}",
        "Is it possible to get {count} {things} in {color} delivered to {city}? {name}",
        "I'm {name} and I'd love to have {count} {color} {things} sent to {city}.",
        "{count} {color} {things} to {city}, for {name}. Thank you!",
    ),
)


def taught(count: int = TAUGHT, seed: int = 0) -> list[Exchange]:
    """Messages to learn from, with their orders."""
    return _drawn(LEARNED, count, f"taught/{seed}")


def held_out(count: int = HELD_OUT, seed: int = 0) -> list[Exchange]:
    """Messages that share no wording, thing, city or name with those that are taught."""
    return _drawn(NEW, count, f"held out/{seed}")


def _drawn(parts: Parts, count: int, seed: str) -> list[Exchange]:
    """`count` different messages."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        number = draw.randint(1, len(NUMBERS))
        thing, color = draw.choice(parts.things), draw.choice(COLORS)
        name, city = draw.choice(parts.names), draw.choice(parts.cities)
        message = draw.choice(parts.wordings).format(
            count=draw.choice((NUMBERS[number - 1], number)),
            color=color,
            things=thing[number > 1],
            city=city,
            name=name,
        )
        order = {"item": thing[0], "color": color, "quantity": number, "city": city, "name": name}
        found[message[0].upper() + message[1:]] = json.dumps(order)
    return list(found.items())
