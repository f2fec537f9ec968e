"""What a run prints, without the time that stands before each message."""

import re

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", re.MULTILINE)


def unstamped(text: str) -> str:
    """The text without the times; each line's, where it has one."""
    return STAMP.sub("", text)
