"""`python -m xim_agent`."""

from xim_agent.cli import main

if __name__ == "__main__":
    main()
