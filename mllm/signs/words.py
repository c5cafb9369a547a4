"""The words of the pictures and questions: what signs say, how questions are put, and what is asked with no picture."""

from __future__ import annotations

import string

import numpy as np

Rng = np.random.Generator

ASK_SHAPES = ("Describe the shapes.", "Describe the picture.", "What shapes are there, and where?")
ASK_TEXT = ("What does the sign say?", "Read the sign.", "What is written here?", "What text is in the picture?")
ASK_COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
ASK_CHANGE = ("What changed?", "What is different in the second picture?", "What changed between the two pictures?")

WORDS = tuple(
    """open closed exit enter stop go slow fast push pull danger caution warning hot cold wet dry up down in out left
    right north south east west main street road avenue lane park market bakery cafe coffee tea bread milk sugar salt
    pepper apple orange lemon banana cherry melon grape soup salad pizza pasta rice fish meat cheese butter hotel motel
    museum library school hospital pharmacy police bank office station airport harbour bridge tunnel tower castle church
    garden forest river lake ocean beach island mountain valley desert field farm house home room kitchen hall door
    window wall floor ceiling stairs lift toilet shower ladies gentlemen women men boys girls baby child family private
    public staff only no yes please thanks welcome hello goodbye sale free new old big small half price ticket cash card
    pay here queue wait start finish begin end one two three four five six seven eight nine ten monday tuesday wednesday
    thursday friday saturday sunday january february march april may june july august september october november
    december spring summer autumn winter today tomorrow red green blue yellow black white purple pink silver gold music
    cinema theatre dance paint book paper pencil letter number phone camera radio clock watch light lamp fire water air
    earth sun moon star cloud rain snow wind storm bus train tram taxi plane ship boat bike car truck parking garage
    petrol diesel engine wheel driver pilot doctor nurse teacher student baker farmer lost found keep clear quiet smile
    jump run walk look listen touch smoke dogs cats horses tigers zebra quartz jazz vex fizz wolf fox owl eagle""".split()
)


def sign_text(rng: Rng, longest: int) -> str:
    """What a sign might say; the caller checks the length, and that it is not `ambiguous`."""
    form = rng.random()
    if form < 0.38:
        return _words(rng, longest)
    length = int(rng.integers(1, longest + 1))
    if form < 0.56:
        return _number(rng, length)
    letters = string.ascii_uppercase
    if form < 0.70:
        letters = string.ascii_lowercase
    elif form < 0.82:
        letters = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"
    text = "".join(letters[int(i)] for i in rng.integers(len(letters), size=length))
    if letters[-1] == "9" and length > 4 and rng.random() < 0.4:
        text = text[: length // 2] + "-" + text[length // 2 + 1 :]
    return text


def _words(rng: Rng, longest: int) -> str:
    text = WORDS[int(rng.integers(len(WORDS)))]
    if rng.random() < 0.3:
        text += " " + WORDS[int(rng.integers(len(WORDS)))]
        if len(text) > longest:
            text = text.split()[0]
    form = rng.random()
    text = text.upper() if form < 0.55 else text.capitalize() if form < 0.75 else text
    return text + "!" if rng.random() < 0.05 else text


def _number(rng: Rng, length: int) -> str:
    text = "".join(str(int(i)) for i in rng.integers(10, size=length))
    if length in (4, 5) and rng.random() < 0.4:
        return f"{text[:-3]}:{text[-2:]}" if length == 5 else f"{text[:1]}.{text[2:]}"
    if length > 6 and rng.random() < 0.3:
        return f"{text[:3]}-{text[4:]}"
    return text


def ambiguous(text: str) -> bool:
    """Whether the same marks could be read another way: 'O' and '0', 'I' and 'l', or 'SOX' and 'sox' at another size."""
    return all(c in "OoIl0CcSsUuVvWwXxZz -.:" for c in text)


def ink(rng: Rng, light: bool) -> tuple[int, int, int]:
    """A light or a dark colour, strong against the other sort and against the grounds."""
    colour = rng.uniform(0, 1, 3)
    level = float(colour @ (0.3, 0.59, 0.11))
    goal = rng.uniform(0.82, 1.0) if light else rng.uniform(0.0, 0.25)
    # Mix towards white or black until it is as bright as the goal
    if light and level < goal:
        colour = colour + (1 - colour) * (goal - level) / (1 - level)
    elif not light and level > goal:
        colour = colour * goal / level
    return tuple(int(v) for v in colour * 255)  # type: ignore[return-value]


FACTS = (
    ("Hello!", "Hello! Show me a picture and ask me about it."),
    ("Hi.", "Hello! Show me a picture and ask me about it."),
    ("What are you?", "I am signs, a small model that looks at pictures."),
    ("Who are you?", "I am signs, a small model that looks at pictures."),
    ("What can you do?", "I can describe shapes, count them, read signs and say what changed."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("What does the sign say?", "There is no picture."),
    ("Describe the picture.", "There is no picture."),
    ("What colour is the sky?", "blue"),
    ("What colour is grass?", "green"),
    ("What colour is snow?", "white"),
    ("What colour is a banana?", "yellow"),
    ("How many sides has a triangle?", "3"),
    ("How many sides has a square?", "4"),
    ("How many days are in a week?", "7"),
    ("How many months are in a year?", "12"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of above?", "below"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def chat(rng: Rng) -> tuple[str, str]:
    """A question with no picture, and its answer."""
    form = int(rng.integers(7))
    one, two = (int(i) for i in rng.integers(0, 21, 2))
    if form == 0:
        return f"What is {one} plus {two}?", str(one + two)
    if form == 1:
        return f"What is {max(one, two)} minus {min(one, two)}?", str(abs(one - two))
    if form == 2:
        return f"Count to {one + 1}.", " ".join(str(i) for i in range(1, one + 2))
    if form == 3:
        day = one % 7
        return f"What day comes after {DAYS[day]}?", DAYS[(day + 1) % 7]
    if form == 4:
        letter = one % 25
        return f"What letter comes after {string.ascii_uppercase[letter]}?", string.ascii_uppercase[letter + 1]
    if form == 5:
        text = sign_text(rng, 8)
        return f'Repeat "{text}".', text
    return FACTS[int(rng.integers(len(FACTS)))]
