"""The command `jaxtrain VERB ...`: the list of verbs, and their start and end (signals, output, errors, exit codes).

`python -m jaxtrain` imports `early` before this, and a verb is imported only when it is called. Ctrl-C ends the program with
one line and exit code 130 (128 + the signal's number), whatever is being imported.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import keyword
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple, NoReturn

from jaxtrain import quiet_plugin
from jaxtrain.config import Config
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, ExplainedError, Interrupted, Stopped, UsageError, nearest
from jaxtrain.processes import announce, are_several
from jaxtrain.signals import STOPPING, Request, Watch, begin_timer, end_at_once, say
from jaxtrain.text import make_streams_safe, printable

UNWINDING_SECONDS = 5.0  # from an interrupt to the end of the process, if the interrupt was swallowed or its handling hangs

MOST_FILES = 65_536  # the usual 1,024 are few for a host's processes, sockets and checkpoint files


class Verb(NamedTuple):
    """A module of `jaxtrain.verbs`, and how it runs."""

    about: str
    """One line."""
    answers_on_stdout: bool = True
    """Whether its output is its result: it then ends with exit code 141, as coreutils do, if the reader is gone (`| head`). A
    verb that writes files goes on silently."""
    unwinds: bool = True
    """See `Signals`. A training run does not: before its loop there is nothing to clean up, and in it a signal is a request to
    save (`train.stop.StopOnSignal`)."""
    joins: bool = False
    """Whether it runs as several processes if the environment says so."""


VERBS = {
    "train": Verb("train a model: --config=FILE, and every field of a config as a flag", False, False, True),
    "plan": Verb("rank the layouts of a model on a cluster: do they fit, how long does a step take"),
    "launch": Verb("run on several processes of this machine, or submit to SLURM, MPI, Kubernetes or Ray", False),
    "preflight": Verb("check devices, links, folders, clocks, software, memory and data for a run", joins=True),
    "checkpoint": Verb("list, verify, inspect, compare or prune the checkpoints of a run"),
    "import": Verb("turn a HuggingFace folder into a run that holds its weights", False),
    "export": Verb("write the weights of a run as a HuggingFace folder", False),
    "generate": Verb("continue prompts, or chat, with a run or a HuggingFace folder"),
    "evaluate": Verb("measure a run or a HuggingFace folder on tasks: choices, likelihoods, exact answers"),
    "replay": Verb("compute a recorded step again, on any mesh, and say where it differs", joins=True),
    "tokenize": Verb("turn text into token files once, for runs to read", False),
    "bench": Verb("measure the compiled train step on the devices at hand"),
    "calibrate": Verb("measure the devices at hand, and write a chip file for the planner"),
    "layouts": Verb("prove that the layout does not change what a config trains, on fake devices"),
    "ladder": Verb("train small models of a config, and foretell its loss and the rate it wants", unwinds=False),
    "report": Verb("report runs side by side, as one page with curves or as tables"),
    "configs": Verb("list the configs that are shipped: name, parameters, one line"),
}


def module_of(verb: str) -> str:
    """Return the module of a verb; `import` is a word of Python, which no module's name can be."""
    return f"jaxtrain.verbs.{verb}{'_' * keyword.iskeyword(verb)}"


def main(*before: str) -> NoReturn:
    """Run the verb that the command line names, and end the process with its exit code.

    Args:
      before: words put before those of the command line.
    """
    arguments = [*before, *sys.argv[1:]]
    if arguments and arguments[0] in VERBS:
        run(module_of(arguments[0]), arguments=arguments[1:], **VERBS[arguments[0]]._asdict())
    run("jaxtrain.cli", "answer_without_verb", arguments=arguments)


def answer_without_verb(arguments: Sequence[str]) -> int:
    """Print the list of verbs, the version, or the bash completion.

    Raises:
      UsageError: the first word is not a verb.
    """
    first = arguments[0] if arguments else "--help"
    if first == "--version":
        from importlib.metadata import version

        print(f"jaxtrain {version('jaxtrain')}")
    elif first == "--completion":
        print(completion())
    elif first in ("-h", "--help"):
        from jaxtrain.command.help import print_list

        about = "Train transformers that outgrow one device. `jaxtrain VERB --help` lists what a verb takes; "
        about += '`eval "$(jaxtrain --completion)"` completes verbs and flags in bash.'
        verbs = {name: verb.about for name, verb in VERBS.items()}
        print_list("jaxtrain VERB [flags]   (or: python -m jaxtrain VERB [flags])", about, verbs)
    elif first.startswith("-"):
        raise UsageError(f"jaxtrain {first}: the verb comes first, e.g. jaxtrain train {first}; one of: {', '.join(VERBS)}")
    else:
        raise UsageError(f"jaxtrain {first}: {nearest(first, VERBS)}")
    return EXIT_DONE


class Signals:
    """A signal's effect on a verb: during import, during its work, and after its exit code is known.

    Args:
      unwinds: during the work a signal raises `Interrupted` in the main thread, so that temporary files and child processes are
        cleaned up; else it ends the process at once.
    """

    def __init__(self, unwinds: bool):
        self._unwinds, self._works = unwinds, False
        self.interrupted = False
        """Whether `Interrupted` was raised."""
        self._code: int | None = None

    def work(self) -> None:
        """Let signals unwind from now on: everything is imported."""
        self._works = self._unwinds

    def settle(self, exit_code: int) -> None:
        """Fix the exit code: the work is done, and later signals do not change it."""
        self._code = exit_code

    def hear(self, number: int, request: Request) -> None:
        """End the process if there is nothing to clean up, or if the interrupt has not ended it in time."""
        if self._code is not None:
            if request == "at once" or (request == "stop" and not are_several()):
                end_at_once(self._code, _flush)
        elif request == "at once" or (request == "stop" and not self._works):
            self._end(number)
        elif request == "stop":
            begin_timer(UNWINDING_SECONDS, self._end, number)

    def in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """Raise `Interrupted` once."""
        if self._works and not self.interrupted and self._code is None:
            if _is_importing(frame):  # a library may swallow exceptions during its import, and has nothing to clean up
                self._end(number)
            self.interrupted = True
            raise Interrupted(number)

    def _end(self, number: int) -> None:
        end_at_once(128 + number, lambda: say(f"interrupted by {signal.Signals(number).name}"))


def completion() -> str:
    """Return bash code that completes the verbs of the command `jaxtrain`, and their flags."""
    from jaxtrain.command import flag_names

    cases = []
    for verb in VERBS:
        module = importlib.import_module(module_of(verb))
        words = flag_names(module.USAGE) if hasattr(module, "USAGE") else [*module.USAGES]
        cases.append(f"    {verb}) words='--help {' '.join(words)}' ;;\n")
    return f"""_jaxtrain() {{
  local words='{" ".join(VERBS)} --help --version'
  ((COMP_CWORD > 1)) && case ${{COMP_WORDS[1]}} in
{"".join(cases)}  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _jaxtrain jaxtrain"""


def run(
    module: str,
    function: str = "main",
    answers_on_stdout: bool = True,
    unwinds: bool = True,
    joins: bool = False,
    arguments: Sequence[str] | None = None,
    about: str = "",
) -> NoReturn:
    """Import a verb's module, call its function with the command line's arguments, and end the process with its exit code.

    Args:
      arguments: those of the command line where None.
      about, answers_on_stdout, unwinds, joins: see `Verb`.
    """
    make_streams_safe(answers_on_stdout)
    quiet_plugin.install()
    raise_file_limit()
    signals = Signals(unwinds)
    Watch(signals.hear, signals.in_main_thread).__enter__()  # to the end of the process
    atexit.register(_ignore_signals)  # the first registered is the last to run
    work: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    from jaxtrain.launch import distributed

    def answer() -> int:
        code = work(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code

    def to_the_end() -> int:
        signals.work()
        try:
            code = explained(answer)
        except SystemExit as end:  # from the flags' parser, or because of a closed pipe
            signals.settle(end.code if isinstance(end.code, int) else EXIT_ERROR)
            raise
        signals.settle(code)
        if signals.interrupted:
            _flush()
            os._exit(code)  # jax crashes at exit where a lowering was broken off (0.10.2)
        return code

    distributed.run_and_exit(to_the_end, joins)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def raise_file_limit() -> None:
    """Raise the limit of open files for this process and its children to what the system allows, at most MOST_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the real limit may be lower than the stated one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def explained(work: Callable[[], int]) -> int:
    """Return the exit code of `work`; turn an ExplainedError, an interrupt or a lack of device memory into one message.

    The peers of this process get the reason too.
    """
    try:
        return work()
    except ExplainedError as error:
        return _refuse(printable(str(error)), error.exit_code)
    except Stopped as stop:
        print(f"stopped: {stop}; nothing that was saved is lost, and the same command resumes from there", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt as stop:
        print(f"interrupted by {stop}" if isinstance(stop, Interrupted) else "interrupted", file=sys.stderr)
        announce(exit_code_of(stop), "it was interrupted")
        return exit_code_of(stop)
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding():
            raise
        return _refuse(
            f"the file name {error.object!a} cannot be written in this environment's encoding, {error.encoding}; "
            "set LC_ALL=C.UTF-8, and leave PYTHONUTF8=0 out",
            EXIT_ERROR,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _refuse(
            f"out of device memory: {str(error).splitlines()[0]}\nWhat helps: more mesh.fsdp or mesh.tensor, more "
            "train.microbatches, --train.remat=full, a smaller train.global_batch_size or data.sequence_length.",
            EXIT_ERROR,
        )


def _refuse(words: str, exit_code: int) -> int:
    """Print an error, tell the peers, and return its exit code."""
    print(f"error: {words}", file=sys.stderr)
    announce(exit_code, words)
    return exit_code


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """Return 128 + the signal's number; Python's own interrupt is one of SIGINT."""
    return interrupt.exit_code if isinstance(interrupt, Interrupted) else 128 + signal.SIGINT


def is_out_of_memory(error: Exception) -> bool:
    """Return whether XLA ran out of memory, compiling a program or running it."""
    return "RESOURCE_EXHAUSTED" in str(error) and not isinstance(error, ExplainedError)


@contextlib.contextmanager
def memory_explained(config: Config, backend: str) -> Iterator[None]:
    """Turn a lack of device memory into an error that lists the memory's use and what would fit (`planner/relief.py`).

    Args:
      config: a valid config with a resolved mesh.
      backend: the attention backend.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        import jax

        from jaxtrain.hardware import resolve_chip
        from jaxtrain.planner.relief import explain_out_of_memory

        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit") or resolve_chip(config.telemetry.hardware, device.device_kind).memory_bytes
        held = stats.get("bytes_in_use")
        raise ExplainedError(explain_out_of_memory(config, jax.device_count(), str(error), limit, held, backend)) from error


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _ignore_signals() -> None:
    """Ignore signals at exit: Python restores their default action, which would replace a known exit code."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
