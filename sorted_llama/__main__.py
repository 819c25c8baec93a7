"""The command `sorted-llama`; `python -m sorted_llama` is the same."""

import sys


def main() -> None:
    try:
        from .hub_card.commands import main as run
    except ImportError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):  # a fault, not an extra that is missing
            raise
        sys.exit(f'{error.__cause__}: the commands need pip install "sorted-llama[eval]".')
    run()


if __name__ == "__main__":
    main()
