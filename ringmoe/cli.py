"""The `ringmoe` command."""

import argparse
import sys
from collections.abc import Sequence

from absl import logging

from ringmoe.inspector import command, guard


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; its exit status is the process's."""
    parser = argparse.ArgumentParser(prog="ringmoe", description="Ring attention and expert parallelism for JAX.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what ringmoe.jit finds and does")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="train a sharded byte model on real text, and check it", add_help=False)
    commands.add_parser(
        "needle",
        help="train a long-context multimodal model, and measure its recall to ten million tokens",
        add_help=False,
    )
    for name, what in (
        ("inspect", "compile a function for a machine and show what of its communication is exposed"),
        ("targets", "list the machines that inspect knows"),
    ):
        command.add_arguments(commands.add_parser(name, help=what), name)
    args, rest = parser.parse_known_args(argv)
    if args.verbose:
        logging.set_verbosity(1)
    if args.command in ("demo", "needle"):
        return _program(args.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "inspect" and not args.in_process:
        words = [*(sys.argv[1:] if argv is None else argv), "--in-process"]
        return guard.run([sys.executable, "-m", "ringmoe.cli", *words], timeout=args.timeout, memory=args.memory)
    return command.main(args)


def _program(name: str, argv: Sequence[str]) -> int:
    try:  # they need packages of their own, and set XLA's flags before jax looks for devices: imported when asked for
        if name == "demo":
            from ringmoe.demo import train as program
        else:
            from ringmoe.needle import command as program
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    return program.main(argv)


if __name__ == "__main__":
    sys.exit(main())
