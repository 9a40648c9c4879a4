"""The `ringmoe` command."""

import argparse
import sys
from collections.abc import Sequence

from ringmoe import inspect_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; its exit status is the process's."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="ringmoe", description="Ring attention and expert parallelism for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="train a sharded byte model on real text, and check it", add_help=False)
    for name, what in (
        ("inspect", "compile a function for a machine and show what of its communication is exposed"),
        ("targets", "list the machines that inspect knows"),
    ):
        inspect_cli.add_arguments(commands.add_parser(name, help=what), name)
    if argv[:1] == ["demo"]:
        return _demo(argv[1:])
    return inspect_cli.main(parser.parse_args(argv))


def _demo(argv: Sequence[str]) -> int:
    try:  # needs packages of its own, and sets XLA's flags before jax looks for devices: imported when asked for
        from ringmoe.demo import train
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
