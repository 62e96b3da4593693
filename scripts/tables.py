"""Markdown that several programs print."""

from collections.abc import Iterable
from typing import Any


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(columns)
    return "\n".join(
        [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def origin(facts: dict[str, Any]) -> str:
    """Where a file's numbers come from."""
    driver = facts.get("driver") and f"driver {facts['driver']}"
    words = [
        facts.get("gpu"),
        driver,
        facts.get("cpu"),
        facts["date"][:10],
        f"commit {short_commit(facts['git_commit'])}",
    ]
    words += [f"{name} {number}" for name, number in facts["versions"].items() if number]
    return ", ".join(word for word in words if word)


def short_commit(commit: str | None) -> str:
    """The beginning of a commit's hash, and whether there were changes to it."""
    hash_, changes, _ = (commit or "unknown").partition("+")
    return f"{hash_[:12]}{' and changes' if changes else ''}"
