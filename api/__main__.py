"""`python -m sharpscope`."""

from .cli import main

if __name__ == "__main__":
    main()
