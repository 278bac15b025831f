"""``python -m vst COMMAND ...``, as ``vst``; for launchers that want a module."""

from vst.cli import main

if __name__ == "__main__":
    main()
