"""The `prefopt` command, also for launchers that start modules: `python -m prefopt_cli`."""

import sys


def main() -> None:
    """Run it; see `prefopt_cli.cli.main.main`."""
    try:
        from prefopt_cli.cli.main import main as run
        from prefopt_cli.launch.leaving import leave
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    try:
        run()
    except SystemExit as end:
        leave(end.code)


def _interrupted() -> int:
    """Say so; the exit code of Ctrl-C."""
    print("prefopt: Interrupted.", file=sys.stderr)
    return 130


if __name__ == "__main__":
    main()
