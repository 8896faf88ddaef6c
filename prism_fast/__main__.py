"""``python -m prism_fast``: the ``prism-fast`` command, for launchers that start a module."""

from prism_fast.entry import main

if __name__ == "__main__":
    main()
