"""`python -m potluck.cli` is how services that an older version installed start Potluck."""

from potluck.entry import main

if __name__ == "__main__":
    main()
