"""`python -m prefopt_cli`, for launchers that start modules."""

from prefopt_cli.cli.main import main

if __name__ == "__main__":
    main()
