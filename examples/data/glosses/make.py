"""Makes train.csv and test.csv from WordNet 3.0's nouns (README.md); run once."""

import csv
import random
import re
from pathlib import Path


SOURCE = Path("/usr/share/wordnet/data.noun")  # of Debian's package wordnet-base
# WordNet's lexicographer files, by their numbers.
CATEGORIES = {
    "04": "act", "05": "animal", "06": "artifact", "08": "body",
    "13": "food", "15": "location", "18": "person", "20": "plant",
}  # fmt: skip
SIZES = {"train": 1600, "test": 800}
LENGTHS = range(25, 141)


def definitions() -> dict[str, str]:
    """Every definition of one category, without its usage examples."""
    found: dict[str, str] = {}
    several = set()
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence, in LICENSE
            continue
        fields, gloss = line.split(" | ", 1)
        category = CATEGORIES.get(fields.split()[1])
        text = re.split(r';\s*"', gloss)[0].strip()
        if category is None or len(text) not in LENGTHS or '"' in text:
            continue
        if found.setdefault(text, category) != category:
            several.add(text)
    return {text: category for text, category in found.items() if text not in several}


rows = sorted(definitions().items())
random.Random(0).shuffle(rows)
for name, size in SIZES.items():
    chosen, rows = rows[:size], rows[size:]
    with open(Path(__file__).with_name(f"{name}.csv"), "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("text", "label"), *chosen])
