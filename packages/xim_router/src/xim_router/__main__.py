"""`python -m xim_router` is `xerotier-router`."""

from xim_router.cli import main

if __name__ == "__main__":
    main()
