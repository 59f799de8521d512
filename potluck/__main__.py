"""`python -P -m potluck` is the `potluck` command."""

from potluck.entry import main

if __name__ == "__main__":
    main()
