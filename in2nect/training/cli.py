"""The command `in2nect`. Each subcommand imports what it needs when it runs, so that help and `doctor` answer
quickly.
"""

import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "fit": "train a network on LoveDA, Vaihingen, Potsdam or a folder of your own",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split, at native resolution",
    "predict": "write class codes of whole rasters as GeoTIFFs",
    "data": "check, prepare or download a data set, or check a submission",
    "demo": "train with and without the losses on a synthetic scene, and compare",
    "doctor": "show versions, devices and which backends work",
}
_TRACEBACK = "IN2NECT_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `in2nect`; returns the exit code: 0, 2 for a mistake that the user can mend, 1 for a training that failed,
    130 where it was interrupted.

    Errors in what was given are told in one message; IN2NECT_TRACEBACK=1 shows where they arose.
    """
    _spin_briefly()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] not in _COMMANDS:
        print(f"in2nect: there is no command {arguments[0]!r}; expected one of {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, 2)
    except FloatingPointError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("in2nect: interrupted", file=sys.stderr)
        return 130  # as shells count the signal


def _run(arguments: list[str]) -> int:
    command, *rest = arguments
    if command == "doctor":
        from in2nect.training.doctor import main as doctor

        return doctor(rest)
    if command == "data":
        from in2nect.data.command import main as data

        return data(rest)
    if command == "demo":
        from in2nect.demo import main as demo

        return demo(rest)
    from in2nect.training.lightning_cli import run

    run(arguments)
    return 0


def _spin_briefly() -> None:
    """Tells OpenMP's threads to sleep soon while they wait for one another, instead of spinning for milliseconds.

    Measured on two cores, a training step: alone 0.86 s with either; with one core taken by another process 1.9 s in
    place of 14. The library reads the setting as it is loaded, with torch: in2nect itself does not load it before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _fail(error: Exception, code: int) -> int:
    if os.environ.get(_TRACEBACK, "0") not in ("", "0"):
        raise error
    mend = ". Install the pipeline: pip install 'in2nect[train]'." if isinstance(error, ModuleNotFoundError) else ""
    print(f"in2nect: {error}{mend}\n(set {_TRACEBACK}=1 to see where this arose)", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:<10}{text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        ["usage: in2nect COMMAND [OPTIONS]", "", *lines, "", "in2nect COMMAND --help explains every option."]
    )


if __name__ == "__main__":
    sys.exit(main())
