"""Every message and every reply of the world.

A prompt is a customer's message about an item with a problem. A well-formed reply fills five slots, so a prompt
has exactly 4 x 4 x 12 x 3 x 4 = 2304 of them, from rude and useless to kind and right.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

ITEMS = (
    "kettle", "lamp", "radio", "clock", "heater", "blender", "toaster", "printer", "camera", "tent",
    "backpack", "bicycle", "helmet", "keyboard", "monitor", "speaker", "jacket", "watch", "suitcase", "drill",
    "guitar", "mirror", "mattress", "stroller", "scooter", "projector", "tablet", "microphone", "telescope",
    "vacuum", "fridge", "freezer", "oven", "grill", "ladder", "mower", "desk", "chair", "bookcase", "wardrobe",
)  # fmt: skip

GREETINGS = ("", "Hello. ", "Hi there. ", "Good morning. ", "Good evening. ", "Dear support team. ")

DATES = (
    "yesterday", "last week", "last month", "on Monday", "on Friday", "two weeks ago", "three days ago",
    "in March", "in June", "in October",
)  # fmt: skip

PROBLEMS: dict[str, tuple[str, ...]] = {
    "broken": (
        "The {item} I bought {date} stopped working.",
        "I got a {item} {date} and it is already broken.",
        "My {item} makes a terrible noise since I bought it {date}.",
        "The {item} that I ordered {date} does not turn on any more.",
    ),
    "late": (
        "I ordered a {item} {date} and it has not arrived.",
        "The {item} I paid for {date} was never delivered.",
        "I am still waiting for the {item} I ordered {date}.",
        "Where is the {item} that I ordered {date}?",
    ),
    "wrong": (
        "I ordered a {item} {date} but got the wrong colour.",
        "The {item} I ordered {date} is far too small.",
        "You sent me the wrong {item} {date}.",
        "The {item} that came {date} is not the one I chose.",
    ),
    "overcharged": (
        "I was charged twice for the {item} I bought {date}.",
        "The bill for the {item} I bought {date} is too high.",
        "I returned a {item} {date} and still have to pay for it.",
        "You took too much money for my {item} {date}.",
    ),
    "confused": (
        "I bought a {item} {date} and do not know how it works.",
        "I do not understand the manual of the {item} I got {date}.",
        "How do I clean the {item} that I bought {date}?",
        "I cannot set up the {item} I bought {date}.",
    ),
    "incomplete": (
        "The {item} I bought {date} came without its cable.",
        "A screw was missing from the {item} I ordered {date}.",
        "My {item} arrived {date} but one piece was not in the box.",
        "I opened the box of my {item} {date} and a part is missing.",
    ),
}  # fmt: skip

REQUESTS = (
    "", " Please help.", " Can you help me?", " What can you do?", " What should I do now?",
    " This is very annoying.", " I need it soon.", " I hope you can fix this.",
)  # fmt: skip

BEFORE, AFTER = "Customer: ", "\nSupport:"
"""What stands around the message in a prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One message, with what it is about."""

    item: str
    problem: str
    text: str


@dataclass(frozen=True, slots=True)
class Option:
    """One way to fill a slot of a reply, and what it counts for in the gold rewards."""

    text: str
    politeness: float = 0.0
    remedy: str | None = None
    names_item: bool = False
    promptness: float = 0.0
    weight: float = 1.0
    """How often the texts that the base policy learned from have it, relative to the slot's other options."""


def _remedies() -> Iterator[Option]:
    phrases = {
        "refund": " We will refund {object}",
        "replace": " We will replace {object}",
        "trace": " We will trace {object}",
        "send_part": " We will send the missing part of {object}",
        "explain": " We will explain how to use {object}",
        "look": " We will have a look at {object}",
    }
    for remedy, phrase in phrases.items():
        yield Option(phrase.replace("{object}", "your {item}"), remedy=remedy, names_item=True)
        yield Option(phrase.replace("{object}", "your order"), remedy=remedy)


SLOTS: tuple[tuple[Option, ...], ...] = (
    (
        Option("", weight=1.5),
        Option(" Hello.", politeness=0.4, weight=1.5),
        Option(" Good morning and thank you for your message.", politeness=1.0),
        Option(" What is it now?", politeness=-0.8),
    ),
    (
        Option("", weight=1.5),
        Option(" Sorry about that.", politeness=0.5),
        Option(" We are very sorry for the trouble.", politeness=1.0),
        Option(" You should have been more careful.", politeness=-1.0),
    ),
    tuple(_remedies()),
    (
        Option("."),
        Option(" soon.", promptness=0.3),
        Option(" within two days.", promptness=0.8),
    ),
    (
        Option("", weight=1.5),
        Option(" Thank you for your patience.", politeness=0.8),
        Option(" Please let us know if we can do anything else for you.", politeness=1.2),
        Option(" Do not write to us again.", politeness=-1.2),
    ),
)
"""Opening, sympathy, remedy, time, closing."""

REMEDY_SLOT = 2

RIGHT_REMEDY_WEIGHT = 3.0
"""How much more often than another remedy the base policy has seen the right one."""

GRADES: dict[str, dict[str, float]] = {
    "broken": {"refund": 0.6, "replace": 1.0, "trace": 0.0, "send_part": 0.4, "explain": 0.3, "look": 0.3},
    "late": {"refund": 0.5, "replace": 0.6, "trace": 1.0, "send_part": 0.0, "explain": 0.0, "look": 0.4},
    "wrong": {"refund": 0.6, "replace": 1.0, "trace": 0.1, "send_part": 0.1, "explain": 0.1, "look": 0.3},
    "overcharged": {
        "refund": 1.0, "replace": 0.1, "trace": 0.0, "send_part": 0.0, "explain": 0.3, "look": 0.4,
    },
    "confused": {"refund": 0.2, "replace": 0.2, "trace": 0.0, "send_part": 0.1, "explain": 1.0, "look": 0.3},
    "incomplete": {
        "refund": 0.5, "replace": 0.7, "trace": 0.2, "send_part": 1.0, "explain": 0.2, "look": 0.3,
    },
}  # fmt: skip
"""How well a remedy meets a problem, from 0 to 1."""

Choice = tuple[int, ...]
"""A reply as the number of the option in every slot."""

CHOICES: tuple[Choice, ...] = tuple(itertools.product(*(range(len(slot)) for slot in SLOTS)))
"""Every well-formed reply, in the order in which all arrays over replies are."""


def fill(option: Option, item: str) -> str:
    """The option's text in a reply about this item."""
    return option.text.replace("{item}", item)


def reply_text(prompt: Prompt, choice: Choice) -> str:
    """The reply, beginning with the space that separates it from the prompt."""
    return "".join(fill(slot[number], prompt.item) for slot, number in zip(SLOTS, choice, strict=True))


@cache
def _texts_about(item: str) -> dict[str, Choice]:
    prompt = Prompt(item, "", "")
    return {reply_text(prompt, choice): choice for choice in CHOICES}


def parse_reply(prompt: Prompt, reply: str) -> Choice | None:
    """Which well-formed reply to ``prompt`` this text is; None if it is none."""
    return _texts_about(prompt.item).get(reply)


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Every phrasing of a problem as a pattern of the whole prompt."""

    def any_of(words: tuple[str, ...]) -> str:
        return "(?:" + "|".join(map(re.escape, words)) + ")"

    before = re.escape(BEFORE) + any_of(GREETINGS)
    after = any_of(REQUESTS) + re.escape(AFTER)
    blanks = {re.escape("{item}"): "(?P<item>" + "|".join(ITEMS) + ")", re.escape("{date}"): any_of(DATES)}
    found = []
    for problem, phrasings in PROBLEMS.items():
        for phrasing in map(re.escape, phrasings):
            for blank, words in blanks.items():
                phrasing = phrasing.replace(blank, words)
            found.append((problem, re.compile(before + phrasing + after)))
    return found


def parse_prompt(text: str) -> Prompt | None:
    """The prompt behind a text; None if the world has no such prompt."""
    for problem, pattern in _patterns():
        if match := pattern.fullmatch(text):
            return Prompt(match["item"], problem, text)
    return None


def number_of_prompts() -> int:
    """How many different prompts there are."""
    phrasings = sum(map(len, PROBLEMS.values()))
    return len(GREETINGS) * phrasings * len(ITEMS) * len(DATES) * len(REQUESTS)


def draw_prompts(count: int, random: Random) -> list[Prompt]:
    """So many different prompts; the problems are equally frequent."""
    drawn: dict[str, Prompt] = {}
    while len(drawn) < count:
        problem = random.choice(tuple(PROBLEMS))
        item = random.choice(ITEMS)
        sentence = random.choice(PROBLEMS[problem]).format(item=item, date=random.choice(DATES))
        text = BEFORE + random.choice(GREETINGS) + sentence + random.choice(REQUESTS) + AFTER
        drawn[text] = Prompt(item, problem, text)
    return list(drawn.values())


def draw_choice(prompt: Prompt, random: Random) -> Choice:
    """A reply of mixed quality, as in the texts that the base policy learns from."""
    return tuple(
        random.choices(range(len(slot)), [_weight(option, prompt) for option in slot])[0] for slot in SLOTS
    )


def _weight(option: Option, prompt: Prompt) -> float:
    right = option.remedy is not None and GRADES[prompt.problem][option.remedy] == 1.0
    return option.weight * (RIGHT_REMEDY_WEIGHT if right else 1.0)


def all_texts() -> Iterator[str]:
    """Texts that together hold every word of the world as it stands in prompts and replies."""
    for word in (*ITEMS, *DATES):
        yield f" {word}"
    yield from ((BEFORE + greeting).strip() for greeting in GREETINGS)
    for phrasing in itertools.chain.from_iterable(PROBLEMS.values()):
        yield f" {phrasing.format(item=ITEMS[0], date=DATES[0])}"
    yield from REQUESTS
    for slot in SLOTS:
        yield from (fill(option, ITEMS[0]) for option in slot)
    yield AFTER
