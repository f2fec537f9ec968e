"""`jaxtrain tokenize --input='books/*.jsonl' --kind=jsonl --tokenizer=bpe:32000 --output=tokens`: text into token files."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.command import Usage, parse
from jaxtrain.data.tokenize_config import TokenizeConfig
from jaxtrain.errors import EXIT_DONE
from jaxtrain.text import show

USAGE = Usage("tokenize", "Tokenize text once, into files that kind=tokens reads.", TokenizeConfig, config="none")


def main(arguments: Sequence[str]) -> int:
    """Parse, tokenize, print; return the exit code."""
    config = parse(USAGE, arguments).own

    from jaxtrain.data.tokenize import summary, tokenize  # after parsing: numpy takes longer than --help

    show(summary(config, tokenize(config)))
    return EXIT_DONE
