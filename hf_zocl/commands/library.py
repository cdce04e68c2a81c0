"""The recipes and presets that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from .door import Parser, command


KINDS = {"recipe": "recipes", "preset": "presets"}


@command
def main() -> None:
    Parser(description="List the recipes and presets that come with the package.").parse_args()
    for kind in KINDS:
        print(f"--{kind} NAME")
        width = max(map(len, names(kind)))
        for name in names(kind):
            print(f"  {name:<{width}}  {first_line(kind, name)}")


def names(kind: str) -> list[str]:
    """The names of all recipes or presets."""
    return sorted(file.stem for file in _folder(kind).glob("*.yaml"))


def find(kind: str, name: str) -> Path | None:
    """The file of a recipe or preset in the package; None if no file has that name."""
    return _folder(kind) / f"{name}.yaml" if name in names(kind) else None


def first_line(kind: str, name: str) -> str:
    """The first line of the comment at the top of a recipe or preset."""
    return find(kind, name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def recipe_file(given: str, beside: Path | None = None) -> Path:
    """The file of a recipe, by name or path; names in the package come first (`./name` always means a file).

    Args:
        given: A name or a path.
        beside: A folder in which a path is looked up before the current one.

    Raises:
        ValueError: If there is no such name and no such file.
    """
    named = find("recipe", given)
    if named is not None:
        return named
    places = [folder / given for folder in (beside, Path()) if folder is not None]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"there is no such file and no such recipe: expected a file, or one of {', '.join(names('recipe'))}."
    )


def preset_file(name: str) -> Path:
    """The file of a preset.

    Raises:
        ValueError: If there is no preset of that name.
    """
    file = find("preset", name)
    if file is None:
        raise ValueError(f"there is no such preset: expected one of {', '.join(names('preset'))}.")
    return file


def _folder(kind: str) -> Path:
    return Path(__file__).parent / KINDS[kind]
