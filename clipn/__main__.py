"""python -m clipn: the `clipn` command."""

from .cli import main

if __name__ == "__main__":
    main()
