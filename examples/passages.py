"""Python's own manual, as it lies in the standard library, cut into passages."""

import re
from collections.abc import Iterator
from pydoc_data.topics import topics

# Characters. MiniLM reads 128 tokens: about this much English.
LONGEST = 500


def passages() -> list[str]:
    """Every topic's paragraphs, joined up to about `LONGEST` characters, each passage with its topic's title in front."""
    return [f"{title}: {text}" for topic in topics.values() for title, text in _cut(topic)]


def _cut(topic: str) -> Iterator[tuple[str, str]]:
    # A title is a line with a line of asterisks below it.
    title, _, body = topic.partition("\n")
    title = title.strip().strip('"')
    joined = ""
    for paragraph in re.split(r"\n\s*\n", body):
        flat = re.sub(r"\s+", " ", paragraph).strip(" *=-")
        if joined and len(joined) + len(flat) > LONGEST:
            yield title, joined
            joined = ""
        joined = f"{joined} {flat}".strip()
    if joined:
        yield title, joined
