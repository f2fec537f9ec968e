"""The command line of every verb: its flags, their parsing, and --help."""

from jaxtrain.command.parsing import CommandLine, flag_names, parse, parse_config, wanted_help
from jaxtrain.command.usage import NoFlags, Usage

__all__ = ["CommandLine", "NoFlags", "Usage", "flag_names", "parse", "parse_config", "wanted_help"]
