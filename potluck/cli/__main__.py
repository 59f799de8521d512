"""`python -m potluck.cli` is how services that an older version installed start Potluck."""

from potluck.cli.app import main

if __name__ == "__main__":
    main()
