"""Write train.jsonl and test.jsonl: arithmetic word problems with one or two steps and whole-number answers.

    python examples/smollm2/make_data.py            # the same files every time

A row is {"prompt": [system, examples..., user], "solution": "42"}. No problem of the test set is in the training set,
not even with other names or things in it: the two share no combination of a template with its numbers.
"""

# ruff: noqa: E501, SIM905
# One template a line, and words in running text, are easier to read than what the linter wants.

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TRAIN_ROWS, TEST_ROWS, SEED = 4096, 256, 0
DEFAULT_OUT = Path("runs/smollm2/data")

SYSTEM = "Solve the problem. End with the answer on a line of its own: #### number"
# Without examples this small model rarely keeps to the format, and reinforcement learning needs some right answers to
# start from.
EXAMPLES = (
    ("Max had 15 nuts and gave 6 to Ann. How many nuts does Max have left?", "Max has 15 - 6 = 9 nuts left.\n#### 9"),
    ("Liv has 8 pens. Ann gives Liv 5 more. How many pens does Liv have now?", "Liv has 8 + 5 = 13 pens.\n#### 13"),
    ("Eva has 4 boxes with 3 toys in each. How many toys does Eva have?", "Eva has 4 * 3 = 12 toys.\n#### 12"),
    ("4 friends share 20 plums equally. How many does each get?", "Each friend gets 20 / 4 = 5 plums.\n#### 5"),
)

NAMES = (
    "Ada Alan Amir Anna Ben Bruno Carla Chen Clara Daniel Diego Elena Emma Farid Fatima Finn Grace Hana Hugo Ines Ivan "
    "Jack Jamal Julia Kai Karim Lara Leo Lina Lucas Maria Mei Mila Nadia Nina Noah Olga Omar Oscar Paul Pia Priya Rosa "
    "Ruby Sam Sara Simon Sofia Tariq Tess Tom Uma Victor Wei Yara Yusuf Zoe"
).split()
THINGS = (
    "apples balloons beads books bottles buttons cards coins cookies crayons cups eggs flowers grapes hats keys lemons "
    "letters marbles mugs muffins nuts oranges pears pencils pens photos plants plates plums postcards ribbons rocks "
    "sandwiches shells shirts socks spoons stamps stars stickers stones strawberries tickets tomatoes toys"
).split()
CONTAINERS = "bags baskets boxes bowls crates drawers jars packs shelves trays".split()
PLACES = ("a bakery", "a cinema", "a farm", "a garden", "a library", "a market", "a museum", "a park", "a school", "a shop")  # fmt: skip


class Template(NamedTuple):
    """`text` with slots, the numbers' ranges, and the answer as an expression of the numbers a, b and c."""

    text: str
    ranges: tuple[tuple[int, int], ...]
    answer: str


SMALL, MIDDLE, LARGE = (2, 9), (2, 12), (10, 20)

ONE_STEP = [
    # Sums.
    Template("{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?", (MIDDLE, MIDDLE), "a + b"),
    Template("{name} finds {a} {things} in the morning and {b} in the afternoon. How many {things} does {name} find in all?", (MIDDLE, MIDDLE), "a + b"),
    Template("There are {a} {things} on one table and {b} {things} on another. How many {things} are there in total?", (MIDDLE, LARGE), "a + b"),
    Template("{name} is {a} years old. {other} is {b} years older than {name}. How old is {other}?", (MIDDLE, SMALL), "a + b"),
    Template("{name} paid {a} dollars for a shirt and {b} dollars for a cap. How much did {name} pay altogether?", (MIDDLE, MIDDLE), "a + b"),
    Template("In {place} there were {a} people. Then {b} more came in. How many people are there now?", (LARGE, MIDDLE), "a + b"),
    # Differences.
    Template("{name} had {a} {things} and gave {b} of them to {other}. How many {things} does {name} have left?", (LARGE, SMALL), "a - b"),
    Template("A box holds {a} {things}. {name} takes out {b}. How many {things} are still in the box?", (LARGE, SMALL), "a - b"),
    Template("{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?", (LARGE, SMALL), "a - b"),
    Template("{name} wants to read {a} pages and has read {b} of them. How many pages are left?", (LARGE, SMALL), "a - b"),
    Template("A toy costs {a} dollars. {name} has {b} dollars. How many more dollars does {name} need?", (LARGE, SMALL), "a - b"),
    Template("There were {a} birds in a tree and {b} of them flew away. How many birds stayed?", (LARGE, SMALL), "a - b"),
    # Products.
    Template("{name} has {a} {containers} with {b} {things} in each. How many {things} does {name} have?", (SMALL, SMALL), "a * b"),
    Template("{name} buys {a} {things} for {b} dollars each. How many dollars does {name} pay?", (SMALL, SMALL), "a * b"),
    Template("{name} walks {a} miles every day. How many miles does {name} walk in {b} days?", (SMALL, SMALL), "a * b"),
    Template("There are {a} rows of chairs with {b} chairs in each row. How many chairs are there?", (SMALL, SMALL), "a * b"),
    Template("{name} earns {a} dollars an hour and works for {b} hours. How many dollars does {name} earn?", (MIDDLE, SMALL), "a * b"),
    # Quotients: the text names the product.
    Template("{name} puts {ab} {things} into {a} {containers}, the same number in each. How many {things} are in each of them?", (SMALL, SMALL), "b"),
    Template("{a} friends share {ab} {things} equally. How many {things} does each friend get?", (SMALL, SMALL), "b"),
    Template("{name} has {ab} dollars. A ticket costs {a} dollars. How many tickets can {name} buy?", (SMALL, SMALL), "b"),
    Template("{name} packs {ab} {things}, {a} in every box. How many boxes does {name} need?", (SMALL, SMALL), "b"),
]  # fmt: skip

TWO_STEPS = [
    Template("{name} had {a} {things}, bought {b} more and then lost {c}. How many {things} does {name} have now?", ((5, 12), (5, 12), SMALL), "a + b - c"),
    Template("A bus has {a} passengers. At a stop {b} get off and {c} get on. How many passengers are on the bus now?", (LARGE, SMALL, SMALL), "a - b + c"),
    Template("{name} had {a} {things}, gave {b} to {other} and {c} to a neighbor. How many {things} are left?", ((20, 30), SMALL, SMALL), "a - b - c"),
    Template("{name} picked {a} {things} on Monday, {b} on Tuesday and {c} on Wednesday. How many {things} is that in total?", (MIDDLE, MIDDLE, SMALL), "a + b + c"),
    Template("{name} buys {a} {things} for {b} dollars each and a bag for {c} dollars. How many dollars does {name} spend?", (SMALL, SMALL, SMALL), "a * b + c"),
    Template("{name} has {a} {containers} with {b} {things} in each, and {c} {things} outside. How many {things} does {name} have in all?", (SMALL, SMALL, SMALL), "a * b + c"),
    Template("{name} had {a} {containers} with {b} {things} in each and gave away {c}. How many {things} are left?", ((3, 9), (3, 9), (2, 8)), "a * b - c"),
    Template("{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they have together?", (MIDDLE, SMALL), "a + a + b"),
    Template("{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have together?", (SMALL, (2, 4)), "a + a * b"),
    Template("{name} pays with a {a} dollar bill for {b} {things} that cost {c} dollars each. How many dollars does {name} get back?", ((50, 50), SMALL, (2, 5)), "a - b * c"),
    Template("In {place} there are {a} tables with {b} chairs each. {c} chairs are broken. How many chairs are not broken?", ((3, 9), (3, 9), (2, 8)), "a * b - c"),
]  # fmt: skip

TEMPLATES = [*ONE_STEP, *TWO_STEPS]


class Problem(NamedTuple):
    key: tuple[int, ...]
    """The template's index and its numbers: what makes two problems the same."""
    question: str
    answer: int


def problems(random_state: random.Random) -> Iterator[Problem]:
    """Endless problems: every one-step template twice, then every two-step template once, in a new order each time."""
    while True:
        order = [*range(len(ONE_STEP)), *range(len(TEMPLATES))]
        random_state.shuffle(order)
        for index in order:
            template = TEMPLATES[index]
            values = [random_state.randint(low, high) for low, high in template.ranges]
            numbers = dict(zip("abc", values, strict=False))
            name, other = random_state.sample(NAMES, 2)
            question = template.text.format(
                **numbers,
                ab=values[0] * values[1],
                name=name,
                other=other,
                things=random_state.choice(THINGS),
                containers=random_state.choice(CONTAINERS),
                place=random_state.choice(PLACES),
            )
            question = question[0].upper() + question[1:]
            answer = eval(template.answer, {"__builtins__": {}}, numbers)
            yield Problem((index, *values), question, answer)


def make_rows(train: int = TRAIN_ROWS, test: int = TEST_ROWS, seed: int = SEED) -> tuple[list[dict], list[dict]]:
    """`train` and `test` rows; their problems are disjoint by template and numbers, and no question occurs twice."""
    stream = problems(random.Random(seed))
    chosen: dict[str, list[Problem]] = {"test": [], "train": []}
    tested: set[tuple[int, ...]] = set()
    questions: set[str] = set()
    while len(chosen["test"]) < test:
        problem = next(stream)
        if problem.key not in tested:
            tested.add(problem.key)
            chosen["test"].append(problem)
    while len(chosen["train"]) < train:
        problem = next(stream)
        if problem.key not in tested and problem.question not in questions:
            questions.add(problem.question)
            chosen["train"].append(problem)
    return [row(problem) for problem in chosen["train"]], [row(problem) for problem in chosen["test"]]


def row(problem: Problem) -> dict:
    """The dataset row of a problem."""
    messages = [{"role": "system", "content": SYSTEM}]
    for question, answer in EXAMPLES:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": problem.question})
    return {"prompt": messages, "solution": str(problem.answer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder to write, default {DEFAULT_OUT}")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), make_rows(), strict=True):
        file = arguments.out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{file}: {len(rows)} rows, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
