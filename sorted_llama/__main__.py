"""The command `sorted-llama`; `python -m sorted_llama` is the same."""

import sys


def main() -> None:
    try:
        from .hub_card.commands import main as run
    except ImportError as error:  # of what an extra installs
        sys.exit(str(error))
    run()


if __name__ == "__main__":
    main()
