"""``python -m polyreward``: the command line, also under ``accelerate launch -m polyreward``."""

from polyreward.cli import main

if __name__ == "__main__":
    main()
