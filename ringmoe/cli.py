"""The `ringmoe` command."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; its exit status is the process's."""
    parser = argparse.ArgumentParser(prog="ringmoe", description="Ring attention and expert parallelism for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="train a sharded byte model on real text, and check it", add_help=False)
    args, rest = parser.parse_known_args(argv)
    # The demo sets XLA's flags and needs optax: it is imported only when asked for.
    from ringmoe.demo import train

    assert args.command == "demo"
    return train.main(rest)


if __name__ == "__main__":
    sys.exit(main())
