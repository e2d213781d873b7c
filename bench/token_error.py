"""Measures the token estimator against tiktoken, and finds its weights anew.

    python bench/token_error.py          errors on tests/data/tokens: the table in docs/guides/tokens.md
    python bench/token_error.py --fit    weights fitted on what is on this machine, ready to paste

The weights are not fitted on the texts that the table reports. They need numpy, and gain from a machine
with translated programs (/usr/share/locale).
"""

# ruff: noqa: SLF001 - it measures what is private

from __future__ import annotations

import argparse
import base64
import gettext
import json
import random
import re
import sys
import sysconfig
import uuid
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from LLM import tokens

HERE = Path(__file__).resolve().parent
TEXTS = HERE.parent / "tests" / "data" / "tokens"
LANGUAGES = (
    "de fr es pt it pl tr vi fi ru el ar he hi bn th zh_CN ja ko uk cs hu sv nl ro fa ta te id"
).split()
# Which features lower a count: three digits in a row, punctuation in a row.
LOWERING = (6, 10)


def encodings():
    return {name: tokens._load(name) for name in tokens._WEIGHTS}


def data_of(text):
    return b"\n" + text.encode()


def errors():
    """Kind, characters, and for each vocabulary the tokens and the estimate's relative error."""
    loaded = encodings()
    for path in sorted(TEXTS.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        row = []
        for name, encoding in loaded.items():
            real = len(encoding.encode_ordinary(text))
            found = tokens._features(data_of(text))
            guess = sum(map(tokens.mul, found, tokens._WEIGHTS[name]))
            row.append((real, guess / real - 1))
        yield path.stem, len(text), row


def show():
    print("| kind | characters | o200k_base | error | cl100k_base | error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    sums = [[], []]
    for kind, size, row in errors():
        cells = [f"{real} | {error:+.0%}" for real, error in row]
        print(f"| {kind} | {size} | {' | '.join(cells)} |")
        for column, (_, error) in zip(sums, row, strict=True):
            column.append(error)
    for name, column in zip(tokens._WEIGHTS, sums, strict=True):
        mean = sum(map(abs, column)) / len(column)
        print(f"{name}: mean {mean:.1%}, from {min(column):+.0%} to {max(column):+.0%}")


class Corpus:
    """Pieces of 200 to 2500 characters, by kind."""

    def __init__(self):
        self.random = random.Random(7)
        self.pieces = []

    def add(self, kind, text, count):
        for _ in range(count):
            size = self.random.choice((200, 500, 1000, 2500))
            if len(text) > 150:
                start = self.random.randrange(max(len(text) - size, 0) + 1)
                self.pieces.append((kind, text[start : start + size]))

    def add_files(self, kind, paths, files, count):
        paths = sorted(path for path in paths if path.is_file() and path.stat().st_size > 1000)
        for path in self.random.sample(paths, min(files, len(paths))):
            text = path.read_text(encoding="utf-8", errors="ignore")[:200_000]
            self.add(kind, text, count)
            if kind == "python":
                prose = " ".join(" ".join(re.findall(r'"""(.*?)"""', text, re.DOTALL)).split())
                self.add("english", prose, 2)

    def add_languages(self):
        for language in LANGUAGES:
            said = []
            for path in Path("/usr/share/locale").glob(f"{language}*/LC_MESSAGES/*.mo"):
                try:
                    with path.open("rb") as file:
                        catalog = gettext.GNUTranslations(file)._catalog
                except (OSError, UnicodeDecodeError):
                    continue
                said += [
                    text
                    for key, text in catalog.items()
                    if key and isinstance(text, str) and len(text) > 20 and text != key
                    if "%" not in text and "{" not in text
                ]
            said.sort()
            self.random.shuffle(said)
            self.add(language, " ".join(" ".join(said).split())[:400_000], 60)

    def add_noise(self):
        draw = self.random
        words = "the sea is warm and we are happy to see you again soon my friend".split()
        emoji = [chr(code) for code in range(0x1F300, 0x1F650)]
        full_width = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
        symbols = [*"→≤≥≠±×÷∑∫√∞∈∀∃⊆⇒⇔ℕℝ₁₂ₙⁿ²³·•…−αβεδλπ", "e\u0301", "o\u0308", "x\u0302"]
        for _ in range(60):
            noise = draw.randbytes(700)
            self.add("base64", base64.b64encode(noise).decode(), 1)
            self.add("hex", noise.hex(), 1)
            ids = [str(uuid.UUID(int=draw.getrandbits(128))) for _ in range(20)]
            self.add("uuid", "\n".join(ids), 1)
            numbers = [str(draw.randrange(10 ** draw.randrange(1, 9))) for _ in range(200)]
            self.add("numbers", " ".join(numbers), 1)
            rows = [
                ",".join(f"{draw.random() * 10 ** draw.randrange(4):.3f}" for _ in range(6))
                for _ in range(40)
            ]
            self.add("csv", "\n".join(rows), 1)
            records = [
                {
                    "id": draw.randrange(10**5),
                    "name": draw.choice(("Ada", "Bob")),
                    "x": draw.random(),
                }
                for _ in range(20)
            ]
            self.add("json", json.dumps(records, indent=draw.choice((None, 2, 4))), 1)
            blanks = [sign * draw.randrange(1, 200) for sign in " \n\t" for _ in range(9)]
            self.add("blank", "".join(draw.choice((*words, *blanks)) for _ in range(300)), 1)
            wide = [word.translate(full_width) for word in words]
            for kind, signs in (("emoji", emoji), ("symbols", symbols), ("wide", wide)):
                mixed = [draw.choice(words if draw.random() < 0.5 else signs) for _ in range(300)]
                self.add(kind, " ".join(mixed), 1)


def corpus():
    found = Corpus()
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    found.add_files("python", library.glob("*.py"), 100, 4)
    found.add_files("markdown", packages.glob("*/METADATA"), 60, 4)
    found.add_files("javascript", packages.rglob("*.js"), 40, 4)
    found.add_files("css", packages.rglob("*.css"), 15, 3)
    found.add_files("html", packages.rglob("*.html"), 30, 4)
    found.add_files("c", Path(sysconfig.get_path("include")).rglob("*.h"), 60, 4)
    found.add_languages()
    found.add_noise()
    return found.pieces


def fit():
    import numpy as np

    pieces = corpus()
    kinds = Counter(kind for kind, _ in pieces)
    weights = np.array([kinds[kind] ** -0.5 for kind, _ in pieces])
    widest = len(tokens._features("\n\xe9".encode()))
    table = np.zeros((len(pieces), widest))
    for row, (_, text) in zip(table, pieces, strict=True):
        found = tokens._features(data_of(text))
        row[: len(found)] = found
    # The counts of the two-byte prefixes are part of their group's count: their weight is a difference,
    # so they may be negative, as may what lowers a count. Everything else must not.
    free = {*LOWERING, *range(widest - len(tokens._PREFIXES), widest)}
    print(len(pieces), "pieces of", ", ".join(kinds))
    for name, encoding in encodings().items():
        real = np.array([len(encoding.encode_ordinary(text)) for _, text in pieces], float)
        scaled = table * (weights / real)[:, None]
        found = solve(scaled.T @ scaled, scaled.T @ weights, free)
        error = table @ found / real - 1
        print(f"    {name!r}: ({', '.join(f'{value:.3f}'.rstrip('0') for value in found)}),")
        print(f"    # mean {abs(error).mean():.1%}, from {error.min():+.0%} to {error.max():+.0%}")
        for kind in kinds:
            of_kind = [
                value for value, (other, _) in zip(error, pieces, strict=True) if other == kind
            ]
            print(f"    #   {kind}: from {min(of_kind):+.0%} to {max(of_kind):+.0%}")


def solve(square, right, free):
    """Least squares by one coordinate after the other, at least 0 where not free."""
    import numpy as np

    found = np.zeros(len(right))
    for _ in range(5000):
        for at in range(len(found)):
            if square[at, at] > 0:
                step = found[at] + (right[at] - square[at] @ found) / square[at, at]
                found[at] = step if at in free else max(step, 0.0)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    fit() if parser.parse_args().fit else show()
