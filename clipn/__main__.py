"""python -m clipn: the `clipn` command."""

from clipn.cli import main

if __name__ == "__main__":
    main()
