"""Shell fragments that several starters' scripts share."""

from __future__ import annotations

import shlex
import textwrap

from jaxtrain.errors import EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE
from jaxtrain.launch.job import Job


def comment(job: Job) -> str:
    """Return comment lines: what the script runs, and the command that made it."""
    return f"# {job.headline} Made by\n#   {job.made_by}"


def exports(job: Job) -> str:
    """Return `export NAME=value` lines; variables that are passed on must be set already."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items()]
    lines += [f': "${{{name}:?is to be passed on, but is not set}}"\nexport {name}\n' for name in job.passed_on]
    return "".join(lines)


def command_lines(job: Job, indent: int, end: str = "") -> str:
    """Return the command of one process, broken into shell lines."""
    lines: list[str] = []
    for word in map(shlex.quote, job.command):
        if lines and len(lines[-1]) + len(word) < 110:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n".join(f"{' ' * (indent + 2 * (i > 0))}{line}" for i, line in enumerate(lines)) + end


def exit_code_lines(indent: int = 0) -> str:
    """Return lines that set $code, and end the script if the run is done or a restart would end the same way."""
    text = f"""\
ended_with() {{ grep -qx "$1" "$JAXTRAIN_EXIT_CODES"/* 2>/dev/null; }} # whether a process did
ended_with {EXIT_STOPPED} && code={EXIT_STOPPED} # saved after a signal
((code == 0)) && exit 0
for refused in {EXIT_USAGE} {EXIT_ERROR}; do
  if ended_with $refused; then
    echo "error: starting again would end the same way; see above" >&2
    exit $refused
  fi
done"""
    return textwrap.indent(text, " " * indent)
