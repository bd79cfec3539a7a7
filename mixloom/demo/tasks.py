"""The demo's data: three small tasks that a base model fails and about twenty steps teach.

Rows are generated, as pure functions of a seed. Whether a prompt is held out depends on its own hash alone,
so a held-out prompt cannot occur in training, whatever the seeds and the counts are. Knows no server and no
tokenizer.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

Row = dict[str, str]

HELD_OUT_SEED = 20_000
HELD_OUT_BYTES = 64
"""A prompt is held out when the first byte of its sha256 is below this: one prompt in four."""

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Laura", "Mark",
    "Nina", "Paul",
]  # fmt: skip
ITEMS = [
    "apples", "books", "chairs", "lamps", "pens", "cups", "keys", "shirts", "boxes", "coins", "bikes", "maps",
]  # fmt: skip
PLACES = [
    "Rome", "Paris", "Berlin", "Madrid", "Oslo", "Vienna", "Dublin", "Tokyo", "the market", "the old shop",
]  # fmt: skip
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
ORDER_FORMS = [
    "{name} bought {number} {item} in {place}.",
    "In {place}, {name} ordered {number} {item}.",
    "{number} {item} were sold to {name} in {place}.",
]

MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
DAYS = [
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth",
    "nineteenth", "twentieth", "twenty-first", "twenty-second", "twenty-third", "twenty-fourth",
    "twenty-fifth", "twenty-sixth", "twenty-seventh", "twenty-eighth",
]  # fmt: skip
"""Every month has these days."""
DATE_FORMS = ["the {day} of {month} {year}", "{month} the {day}, {year}"]

OPENINGS = ["Hello,", "Hi team,", "Good morning,", "Please help:", "Urgent:", "Once again,", "Since Monday"]
QUEUES = {
    "billing": (
        ["my invoice", "our last receipt", "our yearly bill", "the subscription fee"],
        ["was charged twice", "shows the wrong amount", "is higher than agreed", "has no tax number"],
    ),
    "delivery": (
        ["my parcel", "the package", "our shipment", "the courier"],
        ["has not arrived", "went to the wrong street", "is three days late", "is stuck at customs"],
    ),
    "login": (
        ["my password", "the sign-in page", "the account code", "my user name"],
        ["is not accepted", "has expired", "must be reset", "is locked after three tries"],
    ),
    "printer": (
        ["the office printer", "the ink cartridge", "the paper tray", "the scanner"],
        ["prints empty pages", "leaves black stripes", "jams on every sheet", "needs new toner"],
    ),
    "network": (
        ["the wifi", "our internet line", "the router", "the office VPN"],
        ["drops every hour", "is very slow", "loses the connection", "has no signal upstairs"],
    ),
    "careers": (
        ["my job application", "the open position", "the interview", "my resume"],
        ["was not answered", "needs a new date", "is for the sales role", "was sent to a recruiter"],
    ),
    "privacy": (
        ["my personal data", "the cookie banner", "your newsletter consent", "our customer records"],
        ["must be deleted", "was shared without consent", "breaks data protection law", "tracks me anyway"],
    ),
    "catering": (
        ["the lunch menu", "the canteen", "our coffee order", "the sandwich buffet"],
        ["has nothing vegan", "ran out of food", "was cold and stale", "lists no nuts or allergies"],
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """A family of rows, each with one right answer."""

    name: str
    sentence: str
    max_tokens: int
    draw: Callable[[random.Random], Row]

    def train_rows(self, n: int, seed: int = 0) -> list[Row]:
        """`n` rows to train on, of different prompts (there are 600 or more)."""
        return self._rows(n, seed, held_out=False)

    def heldout_rows(self, n: int) -> list[Row]:
        """`n` rows whose prompts no training row has (there are 200 or more), always the same ones."""
        return self._rows(n, HELD_OUT_SEED, held_out=True)

    def _rows(self, n: int, seed: int, *, held_out: bool) -> list[Row]:
        chance = random.Random(f"{self.name} {seed}")
        rows: dict[str, Row] = {}
        while len(rows) < n:
            row = self.draw(chance)
            if (sha256(row["prompt"].encode()).digest()[0] < HELD_OUT_BYTES) == held_out:
                rows.setdefault(row["prompt"], row)
        return list(rows.values())


def _order(chance: random.Random) -> Row:
    number = chance.randrange(len(NUMBERS))
    name, item, place = chance.choice(NAMES), chance.choice(ITEMS), chance.choice(PLACES)
    text = chance.choice(ORDER_FORMS).format(name=name, number=NUMBERS[number], item=item, place=place)
    return {
        "prompt": text[0].upper() + text[1:],
        "completion": json.dumps({"buyer": name, item: number + 2}),
    }


def _date(chance: random.Random) -> Row:
    month, day, year = chance.randrange(12), chance.randrange(28), chance.randrange(1950, 2030)
    text = chance.choice(DATE_FORMS).format(day=DAYS[day], month=MONTHS[month], year=year)
    return {"prompt": f"Date: {text}", "completion": f"{year}-{month + 1:02d}-{day + 1:02d}"}


def _message(chance: random.Random) -> Row:
    queue = chance.choice(list(QUEUES))
    subjects, troubles = QUEUES[queue]
    text = f"{chance.choice(OPENINGS)} {chance.choice(subjects)} {chance.choice(troubles)}."
    return {"prompt": text, "completion": queue}


TASKS = {
    task.name: task
    for task in (
        Task(name="orders", sentence="A sentence about a purchase becomes JSON.", max_tokens=16, draw=_order),
        Task(name="dates", sentence="A written date becomes ISO 8601.", max_tokens=12, draw=_date),
        Task(name="queues", sentence="A message goes to one of eight queues.", max_tokens=6, draw=_message),
    )
}


def majority_accuracy(train: list[Row], held_out: list[Row]) -> float:
    """Share of held-out rows that the most frequent answer of the training rows gets right."""
    answer = Counter(row["completion"] for row in train).most_common(1)[0][0]
    return sum(row["completion"] == answer for row in held_out) / len(held_out)
