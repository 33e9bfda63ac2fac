"""`python -m foley`: the same as the `foley` command."""

from foley.cli.main import main

if __name__ == "__main__":
    main()
